/** Logins with no right but the commands of this package, through the CLI. All other lab tests work as such a one, too. */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { hostCommandOf } from "../../provider/core/hostCommands.js";
import { clockCommand } from "../../provider/linux/looks.js";
import { commandFolder, commandPath } from "../../provider/ssh/keptCommands.js";
import { attachment, FaultStack, nbdExport, output, snapshot } from "./faults/fault-stack.mts";
import { OPERATOR } from "./image-contents.mts";
import type { Lab } from "./lab.mts";
import { freshLab, leftovers, makeOrigin, mayRun } from "./support.mts";

vi.setConfig({ testTimeout: 600_000, hookTimeout: 600_000 });

let lab: Lab;
let stack: FaultStack;

const chain = (size: string) => [
  snapshot("vm1", { origin: "LV-VM1", size }),
  nbdExport("vm1-export", { device: output("vm1", "path") }),
  attachment("vm1-disk", { uri: output("vm1-export", "uri") }),
];
const both = (role: "observe" | "operate") =>
  Promise.all([lab.server1, lab.server2].map((server) => mayRun(server, role)));

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([FaultStack.create(lab), makeOrigin(lab.server1)]);
  await both("operate");
});

afterAll(() => stack?.close());

it("the user can run nothing else as root, and no command otherwise than the provider does", async () => {
  const asUser = async (command: string) =>
    (await lab.server1.run(command, { user: OPERATOR.user, allowFailure: true })).exitCode;
  for (const command of ["true", "sh -c id", "/usr/sbin/lvs", "timeout 5 id", `sh ${commandFolder}/x`]) {
    expect([command, await asUser(`sudo -n ${command}`)]).toEqual([command, 1]);
  }
  const clock = hostCommandOf(clockCommand());
  if (clock === undefined) throw new Error("the clock has no name");
  expect(await asUser(`sudo -n ${commandPath(clock)} lvm-nbd-1 5 30`)).toBe(0);
  expect(await asUser(`sudo -n ${commandPath(clock)} lvm-nbd-1 5 30 -s 2020-01-01`)).toBe(64);
  expect(await asUser(`echo x >>${commandPath(clock)}`)).toBe(1);
  // Setting up a host is another role.
  expect(await asUser(`sudo -n -l | grep -q apply-setup-`)).toBe(1);
});

it("a login that only looks refreshes and previews, and changes nothing", async () => {
  stack.declare(...chain("8M"));
  (await stack.up()).succeeded("4 created");
  await both("observe");
  const seen = await stack.refresh();
  seen.succeeded("4 unchanged");
  expect(seen.text).not.toContain("warning:");
  stack.declare(...chain("12M"));
  (await stack.preview({ refresh: true })).succeeded("1 to update");
  (await stack.up()).failedWith(
    "SUDO_DENIED",
    "LvSnapshot vm1",
    "server1",
    "as operator was refused",
    "npx lvm-nbd sudoers USER",
  );
  expect(await leftovers(lab.server1)).toContain("vm1");
});

it("and once it may, the same up goes on; the log of sudo names what was done", async () => {
  await both("operate");
  (await stack.up()).succeeded("1 updated");
  expect(
    (await lab.server1.run("journalctl -q -o cat _COMM=sudo | grep -c COMMAND=.*/lvextend-")).stdout,
  ).toBe("1\n");
  (await stack.destroy()).succeeded();
  for (const server of [lab.server1, lab.server2]) expect(await leftovers(server)).toBe("");
});

it("certificates of an authority do instead of known keys: of the hosts, and of the login", async () => {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-authority-"));
  const file = (name: string) => join(folder, name);
  const keygen = (...args: string[]) => execFileSync("ssh-keygen", ["-q", ...args], { stdio: "pipe" });
  try {
    for (const name of ["authority", "login"]) keygen("-t", "ed25519", "-N", "", "-C", "", "-f", file(name));
    keygen("-s", file("authority"), "-I", "backup", "-n", OPERATOR.user, "-V", "-1h:+1d", file("login.pub"));
    const authority = readFileSync(file("authority.pub"), "utf8").trim();
    const hosts: string[] = [];
    for (const server of [lab.server1, lab.server2]) {
      const { name, port } = server;
      writeFileSync(file(`${name}.pub`), (await server.run(`ssh-keygen -y -f /etc/ssh/lab/${name}`)).stdout);
      keygen("-s", file("authority"), "-I", name, "-h", "-n", name, "-V", "-1h:+1d", file(`${name}.pub`));
      await server.run(
        `
        echo '${authority}' >/etc/ssh/authority.pub && cat >/etc/ssh/lab/${name}-cert.pub
        printf '%s\\n' 'TrustedUserCAKeys /etc/ssh/authority.pub' 'HostCertificate /etc/ssh/lab/${name}-cert.pub' >/etc/ssh/sshd_config.d/authority.conf
        systemctl restart ssh`,
        { stdin: readFileSync(file(`${name}-cert.pub`), "utf8") },
      );
      hosts.push(
        `Host ${name}`,
        "HostName 127.0.0.1",
        `HostKeyAlias ${name}`,
        `Port ${port}`,
        `User ${OPERATOR.user}`,
      );
    }
    const more = [
      "Host *",
      `IdentityFile ${file("login")}`,
      "IdentitiesOnly yes",
      `UserKnownHostsFile ${file("known_hosts")}`,
    ];
    writeFileSync(file("known_hosts"), `@cert-authority server* ${authority}\n`);
    writeFileSync(file("config"), [...hosts, ...more, "GlobalKnownHostsFile /dev/null", ""].join("\n"));
    const by = { env: { LVM_NBD_SSH_CONFIG: file("config") } };
    stack.declare(...chain("8M"));
    (await stack.up(by)).succeeded("4 created");
    (await stack.refresh(by)).succeeded("4 unchanged");
    writeFileSync(file("known_hosts"), `@cert-authority other* ${authority}\n`);
    (await stack.refresh(by)).failedWith("HOST_KEY_UNKNOWN", "LvSnapshot vm1", "server1");
    writeFileSync(file("known_hosts"), `@cert-authority server* ${authority}\n`);
    rmSync(file("login-cert.pub"));
    (await stack.refresh(by)).failedWith("AUTH_FAILED", "LvSnapshot vm1", "server1", file("login"));
  } finally {
    rmSync(folder, { recursive: true });
  }
  (await stack.destroy()).succeeded();
});
