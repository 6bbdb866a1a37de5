import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { ownerMark } from "../../provider/core/owner.js";
import {
  allowedAddresses,
  type ExportPlan,
  exportConfig,
  exportConfigPath,
  exportUnitName,
  probeUri,
  renderExportUnit,
  unitMark,
} from "../../provider/linux/exportUnit.js";
import { imageGuard } from "../../provider/linux/imageFile.js";
import { execLine, ownDirective } from "../../provider/linux/systemd.js";
import { recordedExportUnit } from "../support/recorded.js";
import { directives } from "../support/units.js";

const plan: ExportPlan = {
  owner: "o/p/s/vm1",
  device: "/dev/VgVm/LV-VM1Snapshot",
  exportName: "vm1",
  listenAddress: "10.0.0.1",
  port: 10809,
  readOnly: true,
  clients: ["10.0.0.2", "10.1.0.0/16"],
  server: "nbdkit",
};
const unit = (change: Partial<ExportPlan> = {}) => directives(renderExportUnit({ ...plan, ...change }));
const servers = ["nbdkit", "nbd-server", "qemu-nbd"] as const;

it("of a device has the text that it had since the first version: no unit that serves counts as edited", () => {
  expect(renderExportUnit(plan)).toBe(recordedExportUnit());
});

describe("clients", () => {
  it("are let in, with the host itself, and nobody else is", () => {
    expect(unit().get("Service.IPAddressDeny")).toEqual(["any"]);
    expect(unit().get("Service.IPAddressAllow")).toEqual(["10.0.0.2 10.1.0.0/16 10.0.0.1"]);
  });

  it("do not include the host's other addresses, but the one from which it reaches a second address", () => {
    expect(allowedAddresses({ ...plan, ownAddress: "10.0.0.9" })).toEqual([
      "10.0.0.2",
      "10.1.0.0/16",
      "10.0.0.1",
      "10.0.0.9",
    ]);
  });

  it.each(["0.0.0.0", "::", "127.0.0.1", "::1"])("are joined by localhost alone on %s", (listenAddress) => {
    expect(unit({ listenAddress, clients: ["10.0.0.2"] }).get("Service.IPAddressAllow")).toEqual([
      "10.0.0.2 localhost",
    ]);
  });

  it("are named once each", () => {
    expect(allowedAddresses({ ...plan, clients: ["10.0.0.1", "10.0.0.2", "10.0.0.2"] })).toEqual([
      "10.0.0.1",
      "10.0.0.2",
    ]);
  });
});

describe("hardening", () => {
  it.each(servers)("of %s: no rights, no other files, no other devices", (server) => {
    const service = Object.fromEntries(
      [...unit({ server })].map(([name, values]) => [name.replace("Service.", ""), values.join(" | ")]),
    );
    expect(service).toMatchObject({
      DynamicUser: "yes",
      DevicePolicy: "closed",
      CapabilityBoundingSet: "",
      AmbientCapabilities: "",
      NoNewPrivileges: "yes",
      ProtectSystem: "strict",
      ProtectHome: "yes",
      PrivateTmp: "yes",
      RestrictAddressFamilies: "AF_INET AF_INET6 AF_UNIX",
      SystemCallFilter: "@system-service | ~@privileged",
    });
  });

  it("lets the server open the one device, and write to it only where that is declared", () => {
    expect(unit().get("Service.DeviceAllow")).toEqual(["/dev/VgVm/LV-VM1Snapshot r"]);
    expect(unit({ readOnly: false }).get("Service.DeviceAllow")).toEqual(["/dev/VgVm/LV-VM1Snapshot rw"]);
  });

  it("gives the right to bind a low port, and only that, only where it is needed", () => {
    expect(unit({ port: 1024 }).get("Service.CapabilityBoundingSet")).toEqual([""]);
    expect(unit({ port: 1023 }).get("Service.CapabilityBoundingSet")).toEqual(["CAP_NET_BIND_SERVICE"]);
    expect(unit({ port: 1023 }).get("Service.AmbientCapabilities")).toEqual(["CAP_NET_BIND_SERVICE"]);
  });
});

describe("the service", () => {
  it.each(servers)("of %s comes back after a reboot, after its device, and for ever", (server) => {
    const text = unit({ server });
    expect(text.get("Install.WantedBy")).toEqual(["multi-user.target dev-VgVm-LV\\x2dVM1Snapshot.device"]);
    expect(text.get("Unit.Requires")).toEqual(["dev-VgVm-LV\\x2dVM1Snapshot.device"]);
    expect(text.get("Unit.After")).toEqual(["network-online.target dev-VgVm-LV\\x2dVM1Snapshot.device"]);
    expect(text.get("Service.Restart")).toEqual(["always"]);
    expect(text.get("Unit.StartLimitIntervalSec")).toEqual(["0"]);
  });

  it.each(servers)("of %s listens on the declared address alone", (server) => {
    const text = renderExportUnit({ ...plan, server }) + (exportConfig({ ...plan, server }) ?? "");
    expect(text).toMatch(/-i 10\.0\.0\.1 |-b 10\.0\.0\.1 |listenaddr=10\.0\.0\.1\n/);
  });

  it("has a configuration file only for nbd-server, and names it in its command", () => {
    expect(exportConfig(plan)).toBeUndefined();
    expect(exportConfig({ ...plan, server: "qemu-nbd" })).toBeUndefined();
    expect(unit({ server: "nbd-server" }).get("Service.ExecStart")?.[0]).toContain(exportConfigPath("vm1"));
    expect(exportConfigPath("vm1")).toBe("/etc/lvm-nbd/lvm-nbd-export-vm1.conf");
  });
});

describe("of an image", () => {
  const { device: _, ...terms } = plan;
  const image: ExportPlan = { ...terms, file: "/var/backups/vm1.raw", format: "raw" };
  const ofImage = (change: Partial<ExportPlan> = {}) =>
    directives(renderExportUnit({ ...image, ...change } as ExportPlan));

  it.each(servers)(
    "%s runs as root, without a right, a device or anything of the host but programs",
    (server) => {
      const text = ofImage({ server });
      for (const absent of ["DynamicUser", "User", "SupplementaryGroups", "DeviceAllow"])
        expect(text.get(`Service.${absent}`)).toBeUndefined();
      const service = Object.fromEntries(
        [...text].map(([name, values]) => [name.replace("Service.", ""), values.join(" | ")]),
      );
      expect(service).toMatchObject({
        ...{
          CapabilityBoundingSet: "",
          AmbientCapabilities: "",
          NoNewPrivileges: "yes",
          ProtectSystem: "strict",
        },
        ...{ DevicePolicy: "closed", PrivateDevices: "yes", RootDirectory: "%t/%N", RuntimeDirectory: "%N" },
        SystemCallFilter: "@system-service | ~@privileged",
        PrivateUsers: "yes",
      });
      const [programs, ...files] = text.get("Service.BindReadOnlyPaths") ?? [];
      expect(programs).toBe(
        "/usr -/bin -/sbin -/lib -/lib32 -/lib64 -/etc/ld.so.cache -/run/systemd/journal/dev-log",
      );
      expect(files).toEqual([
        '"/var/backups/vm1.raw"',
        ...(server === "nbd-server" ? ['"/etc/lvm-nbd/lvm-nbd-export-vm1.conf"'] : []),
      ]);
      expect(text.get("Service.BindPaths")).toBeUndefined();
    },
  );

  it.each(servers)(
    "is looked at before each start of %s, outside of its root: nobody may have swapped it",
    (server) => {
      const text = ofImage({ server });
      expect(text.get("Service.ExecStartPre")).toEqual([
        `+${execLine(["/bin/sh", "-c", imageGuard, "/var/backups/vm1.raw", "raw"])}`,
      ]);
      expect(text.get("Service.RootDirectoryStartOnly")).toEqual(["yes"]);
      expect(unit({ server }).get("Service.ExecStartPre")).toBeUndefined();
    },
  );

  it("has users of its own, but for a port that only the host's root can have", () => {
    expect(ofImage({ port: 1024 }).get("Service.PrivateUsers")).toEqual(["yes"]);
    expect(ofImage({ port: 1023 }).get("Service.PrivateUsers")).toBeUndefined();
  });

  it("has all the other hardening of an export of a device", () => {
    const changed = /^Service\.(ExecStart|DynamicUser|SupplementaryGroups|DeviceAllow|ProtectHome)$/;
    for (const [name, values] of unit())
      if (name.startsWith("Service.") && !changed.test(name))
        expect([name, ofImage().get(name)]).toEqual([name, values]);
  });

  it("runs only while the disk of the image is mounted, and comes back with it", () => {
    const text = ofImage({ mountPoint: "/var/back-ups" });
    expect(text.get("Unit.RequiresMountsFor")).toEqual(['"/var/backups"']);
    expect(text.get("Unit.BindsTo")).toEqual(["var-back\\x2dups.mount"]);
    expect(text.get("Unit.After")).toEqual(["network-online.target var-back\\x2dups.mount"]);
    expect(text.get("Install.WantedBy")).toEqual(["multi-user.target var-back\\x2dups.mount"]);
    expect(ofImage().get("Unit.BindsTo")).toBeUndefined();
    expect(ofImage().get("Install.WantedBy")).toEqual(["multi-user.target"]);
  });

  it("serves it from where it really is, and tells both", () => {
    const text = renderExportUnit({ ...image, realPath: "/mnt/disk/vm1.raw" } as ExportPlan);
    const read = directives(text);
    expect(read.get("Service.ExecStart")?.[0]).toContain("file=/mnt/disk/vm1.raw");
    expect(read.get("Service.BindReadOnlyPaths")?.[1]).toBe('"/mnt/disk/vm1.raw"');
    expect(read.get("Unit.RequiresMountsFor")).toEqual(['"/mnt/disk"']);
    expect(ownDirective(text, "File")).toBe("/var/backups/vm1.raw");
    expect(ownDirective(text, "RealPath")).toBe("/mnt/disk/vm1.raw");
    expect(ownDirective(text, "Device")).toBeUndefined();
  });

  it("takes a name literally in every directive", () => {
    const file = '/srv/back ups/we"ird:\\%n$x.raw';
    const text = ofImage({ file } as Partial<ExportPlan>);
    expect(text.get("Service.BindReadOnlyPaths")?.[1]).toBe('"/srv/back ups/we\\"ird:\\\\%%n$x.raw"');
    expect(text.get("Service.ExecStart")?.[0]).toContain('"file=/srv/back ups/we\\"ird:\\\\%%n$$x.raw"');
  });
});

describe("the host's own look", () => {
  it.each([
    ["10.0.0.1", "nbd://10.0.0.1:10809/vm1"],
    ["0.0.0.0", "nbd://127.0.0.1:10809/vm1"],
    ["::", "nbd://[::1]:10809/vm1"],
    ["fd00::1", "nbd://[fd00::1]:10809/vm1"],
  ])("at an export on %s goes to %s", (listenAddress, uri) => {
    expect(probeUri({ ...plan, listenAddress })).toBe(uri);
  });
});

describe("what the unit tells about itself", () => {
  it("is its owner, its device, and all that it was made from", () => {
    const text = renderExportUnit(plan);
    expect(unitMark(text)).toBe(ownerMark("o/p/s/vm1"));
    expect(ownDirective(text, "Device")).toBe(plan.device);
    expect(ownDirective(text, "ProbeUri")).toBe("nbd://10.0.0.1:10809/vm1");
    expect(JSON.parse(ownDirective(text, "Plan") ?? "")).toEqual(plan);
  });

  it("is nothing for a unit that is not ours", () => {
    expect(unitMark("[Service]\nExecStart=/bin/true\nMark=lvm-nbd.owner=o/p/s/vm1\n")).toBeUndefined();
  });

  it("is the same text for the same plan, and another for every other", () => {
    const text = renderExportUnit(plan);
    expect(renderExportUnit(structuredClone(plan))).toBe(text);
    const others: Partial<ExportPlan>[] = [
      { owner: "o/p/s/vm2" },
      { device: "/dev/VgVm/b" },
      { exportName: "vm2" },
      { listenAddress: "10.0.0.3" },
      { port: 10810 },
      { readOnly: false },
      { clients: ["10.0.0.2"] },
      { server: "nbd-server" },
      { server: "qemu-nbd" },
      { ownAddress: "10.0.0.9" },
    ];
    const texts = others.map((other) => renderExportUnit({ ...plan, ...other }));
    expect(new Set([text, ...texts]).size).toBe(others.length + 1);
  });
});

it("a hostile name adds no directive, no section and no other unit, and the mark is still found", () => {
  const hostile = fc.array(
    fc.oneof(
      fc.string({ unit: "binary" }),
      fc.constantFrom(
        "[",
        "]",
        "\u2028",
        "\u2029",
        "\u0085",
        "\\",
        '"',
        "'",
        "%n",
        "$x",
        ";",
        "#",
        "Mark=",
        "X-LvmNbd",
      ),
    ),
    { minLength: 1 },
  );
  const expected = [...unit().keys()];
  fc.assert(
    fc.property(hostile, fc.constantFrom(...servers), (parts, server) => {
      // What the input's check lets through.
      const exportName = parts.join("").replace(/[\p{Cc}[\]/]/gu, "") || "x";
      const text = renderExportUnit({ ...plan, exportName, server, owner: `o/p/s/${parts.join("")}` });
      expect([...directives(text).keys()].filter((key) => key !== "Service.RuntimeDirectory")).toEqual(
        expected,
      );
      expect(unitMark(text)).toBe(ownerMark(`o/p/s/${parts.join("")}`));
      expect(JSON.parse(ownDirective(text, "Plan") ?? "")).toMatchObject({ exportName });
      expect(exportUnitName(exportName)).toMatch(/^lvm-nbd-export-[A-Za-z0-9:_.\\-]+\.service$/);
    }),
  );
});

it("a line break in a name makes no unit at all", () => {
  expect(() => renderExportUnit({ ...plan, device: "/dev/a\nExecStartPost=/bin/evil" })).toThrow(
    /line break/,
  );
});
