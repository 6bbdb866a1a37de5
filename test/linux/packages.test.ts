import { spawnSync } from "node:child_process";
import { describe, expect, it } from "vitest";
import {
  installCommand,
  installScripts,
  parseCandidates,
  parseOsRelease,
  upstreamVersion,
  wasUpdated,
} from "../../provider/linux/packages.js";
import { knownPackages, packageManagers, packagesOf } from "../../provider/linux/programs.js";

describe("os-release", () => {
  it.each([
    ['PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n', "Debian GNU/Linux 12 (bookworm)", "apt"],
    ['PRETTY_NAME="Ubuntu 24.04.1 LTS"\nID=ubuntu\nID_LIKE=debian\n', "Ubuntu 24.04.1 LTS", "apt"],
    ["PRETTY_NAME='Proxmox'\nID=proxmox\nID_LIKE=\"debian\"\n", "Proxmox", "apt"],
    [
      'PRETTY_NAME="AlmaLinux 9.4 (Seafoam Ocelot)"\nID="almalinux"\nID_LIKE="rhel centos fedora"\n',
      "AlmaLinux 9.4 (Seafoam Ocelot)",
      "dnf",
    ],
    ["NAME=Fedora\nID=fedora\n", "Fedora", "dnf"],
    [
      'PRETTY_NAME="openSUSE Leap 15.6"\nID="opensuse-leap"\nID_LIKE="suse opensuse"\n',
      "openSUSE Leap 15.6",
      "zypper",
    ],
    ['# a comment\nPRETTY_NAME="Alpine \\"3\\""\nID=alpine\n', 'Alpine "3"', undefined],
    ["", "an unknown distribution", undefined],
  ])("%j", (text, name, manager) => {
    expect(parseOsRelease(text)).toEqual({ name, manager });
  });
});

it("candidates are read as apt-cache policy lists them", () => {
  // As apt 2.6.2 printed it.
  const policy = `nbd-server:
  Installed: (none)
  Candidate: 1:3.24-1.1
  Version table:
     1:3.24-1.1 500
        500 http://mirror.example/debian bookworm/main amd64 Packages
nosuch:
  Installed: (none)
  Candidate: (none)
  Version table:
`;
  expect([...parseCandidates(policy)]).toEqual([["nbd-server", "1:3.24-1.1"]]);
  expect(upstreamVersion("1:3.24-1.1")).toBe("3.24");
  expect(upstreamVersion("7.2+dfsg-7+deb12u18")).toBe("7.2");
});

it.each([
  ["1:3.24-1.1", false],
  ["1.6.1-1", false],
  ["1:3.21-1+deb11u1", true],
  ["1:3.23-3ubuntu1", false],
  ["1:3.23-3ubuntu1.22.04.1", true],
  ["1:3.20-1ubuntu0.1", true],
])("%s was updated after its release: %j", (version, updated) => {
  expect(wasUpdated(version)).toBe(updated);
});

describe("packages", () => {
  it("are named as each family names them, each once", () => {
    const programs = ["nbd-client", "nbd-server", "nbdcopy", "nbdinfo", "qemu-img", "ss"];
    expect(packageManagers.map((manager) => packagesOf(programs, manager))).toEqual([
      ["iproute2", "libnbd-bin", "nbd-client", "nbd-server", "qemu-utils"],
      ["iproute", "libnbd", "nbd", "qemu-img"],
      ["/usr/bin/qemu-img", "iproute2", "libnbd", "nbd"],
    ]);
    for (const manager of packageManagers) expect(knownPackages(manager)).toContain("lvm2");
    expect(packagesOf(["mystery"], "apt")).toEqual(["mystery"]);
  });

  it("are installed by a command that a person can run", () => {
    expect(installCommand("dnf", ["nbd", "nbdkit"])).toBe("dnf install nbd nbdkit");
  });

  it.each([
    ["apt", /apt-get -q -y .*DPkg::Lock::Timeout=300.*--no-install-recommends --no-remove install "\$@"/],
    ["dnf", /dnf -y -q --setopt=install_weak_deps=False install "\$@"/],
    ["zypper", /zypper --non-interactive --quiet install --no-recommends "\$@"/],
  ] as const)(
    "by %s in a unit of their own, bounded, without a question or a restart",
    (manager, expected) => {
      const text = installScripts[manager];
      expect(text).toMatch(expected);
      expect(text).toMatch(/systemd-run .*--wait .*RuntimeMaxSec=1200/);
      expect(text).toMatch(/DEBIAN_FRONTEND=noninteractive --setenv=NEEDRESTART_MODE=l/);
      expect(spawnSync("sh", ["-n", "-c", text]).status).toBe(0);
    },
  );
});
