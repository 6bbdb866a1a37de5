/** A whole life of a stack with keys, passphrases and certificates in it, through the CLI: none of them is anywhere it should not be. */
import { execFileSync } from "node:child_process";
import { copyFileSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { FaultStack, output, type Run, snapshot } from "./faults/fault-stack.mts";
import { GUESTS } from "./image-contents.mts";
import type { Guest, Lab } from "./lab.mts";
import { freshLab, leftovers, makeOrigin } from "./support.mts";

vi.setConfig({ testTimeout: 600_000, hookTimeout: 600_000 });

const passphrase = "planted-passphrase-Zq7";
const [server1, server2] = GUESTS.map(({ privateAddress }) => privateAddress);

let lab: Lab;
let stack: FaultStack;
let folder: string;
let env: NodeJS.ProcessEnv;
const said: string[] = [];
const shown = new Set<string>();
let watching: NodeJS.Timeout;

/** Every argument list on this machine. */
function sample(): void {
  for (const pid of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    try {
      shown.add(readFileSync(`/proc/${pid}/cmdline`, "latin1"));
    } catch {
      // It has ended meanwhile.
    }
  }
}

/** The encrypted key, in a host that is declared with it. */
const host = ({ address, port, hostKey }: Guest, user: string) => ({
  ...{ address, port, user, hostKey },
  privateKey: { $env: "PLANTED_KEY" },
  passphrase: { $env: "PLANTED_PASSPHRASE" },
});

async function does(work: Promise<Run>): Promise<Run> {
  const run = await work;
  said.push(run.text);
  return run;
}

beforeAll(async () => {
  lab = await freshLab();
  await makeOrigin(lab.server1);
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-secrets-"));
  const key = join(folder, "key");
  copyFileSync(lab.privateKeyPath, key);
  execFileSync("ssh-keygen", ["-q", "-p", "-P", "", "-N", passphrase, "-f", key]);
  env = { PLANTED_KEY: readFileSync(key, "utf8"), PLANTED_PASSPHRASE: passphrase };
  stack = await FaultStack.create(lab);
  for (const guest of [lab.server1, lab.server2])
    await guest.run(
      'systemd-run -q -u sampler sh -c \'while :; do cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ; sleep 0.2; done 2>/dev/null | tr "\\0" "\\n" >/run/samples\'',
    );
  watching = setInterval(sample, 50);
});

afterAll(() => {
  clearInterval(watching);
  stack?.close();
  if (folder) rmSync(folder, { recursive: true, force: true });
});

/** Lines of PEM texts that say something: not the armour, and what tells one key from all others. */
const body = (pem: string) =>
  pem
    .split("\n")
    .filter((line) => line !== "" && !line.startsWith("-----"))
    .map((line) => line.slice(-40));

it("keys and passphrases are in no output, state, log or argument list, nor in a file that others can read", async () => {
  const [on1, on2] = [host(lab.server1, "root"), host(lab.server2, "operator")];
  const serve = { host: on1, listenAddress: server1, clients: [server2], tls: true };
  const declared = (triggers: string[], port = 10809) => [
    snapshot("snap", { host: on1, origin: "LV-VM1", size: "8M" }),
    {
      type: "NbdExport" as const,
      name: "vm1",
      args: { ...serve, device: output("snap", "path"), triggers, port },
    },
    {
      ...{ type: "NbdAttachment" as const, name: "vm1-attached" },
      args: { host: on2, uri: output("vm1", "uri"), tls: output("vm1", "clientTls") },
    },
    {
      ...{ type: "VolumeCopy" as const, name: "vm1-copy" },
      args: { host: on2, file: "/root/vm1.raw", uri: output("vm1", "uri"), tls: output("vm1", "clientTls") },
    },
    {
      ...{ type: "BackupImage" as const, name: "vm1-backup" },
      args: {
        ...{ host: on2, source: { host: on1, listenAddress: server1, tls: true } },
        volumes: [{ volumeGroup: "VgVm", origin: "LV-VM1", size: "8M", file: "/root/backup.raw" }],
      },
    },
  ];
  const keys: string[] = [];
  const remember = async () => {
    for (const guest of [lab.server1, lab.server2]) {
      const { stdout } = await guest.run("cat /etc/lvm-nbd/*~*/*-key.pem");
      keys.push(...body(stdout));
    }
  };
  stack.declare(...declared(["first"]));
  (await does(stack.up({ env }))).succeeded("6 created");
  await remember();
  (await does(stack.refresh({ env }))).succeeded("6 unchanged");
  (await does(stack.preview({ env }))).succeeded("6 unchanged");
  stack.declare(...declared(["second"]));
  (await does(stack.preview({ env }))).succeeded();
  (await does(stack.up({ env, args: ["--diff"] }))).succeeded("3 updated");
  await remember();
  // What fails says much: a port that is taken, and a server that is gone.
  stack.declare(...declared(["second"], 22));
  (await does(stack.up({ env }))).failedWith(
    "PORT_IN_USE",
    "NbdExport vm1",
    `${lab.server1.address}:${lab.server1.port}`,
  );
  await lab.server1.run("systemctl stop lvm-nbd-export-vm1");
  stack.declare(...declared(["second"]));
  (await does(stack.refresh({ env }))).succeeded();
  expect(new Set(keys).size).toBeGreaterThan(8);

  const planted = [passphrase, ...body(env.PLANTED_KEY ?? ""), ...keys];
  const found = (text: string) => planted.filter((secret) => text.includes(secret));
  expect(found(said.join("\n"))).toEqual([]);
  expect(found([...shown].join("\n"))).toEqual([]);
  expect(shown.size).toBeGreaterThan(10);
  // What is to be given to others is a secret in the state, and so is what was given.
  const state = JSON.stringify(await stack.cli.exportState());
  expect(found(state)).toEqual([]);
  expect(state).not.toContain("BEGIN");
  for (const guest of [lab.server1, lab.server2]) {
    const patterns = planted.map((secret) => `${secret}\n`).join("");
    const grep = async (command: string) =>
      (
        await guest.run(`cat >/dev/shm/planted; ${command}; rm /dev/shm/planted`, { stdin: patterns })
      ).stdout.trim();
    expect(await grep("wc -l </run/samples")).toMatch(/^\d{4,}$/);
    expect(await grep("grep -cFf /dev/shm/planted /run/samples; true")).toBe("0");
    expect(await grep("journalctl -q -o export | grep -caFf /dev/shm/planted; true")).toBe("0");
    // The samples hold this very command's patterns no more than its name.
    const files = await grep(
      "grep -rlaFf /dev/shm/planted --exclude=planted --exclude=authorized_keys /etc /run /var /tmp /root /home /dev/shm 2>/dev/null | xargs -r stat -c '%U %a %n' | sed 's,~[0-9a-f]*/,~X/,' | sort",
    );
    const [name, parts] =
      guest === lab.server1 ? ["export-vm1", ["client", "server"]] : ["attach-vm1-attached", ["client"]];
    expect(files.split("\n")).toEqual(
      parts.map((part) => `root 600 /etc/lvm-nbd/lvm-nbd-${name}~X/${part}-key.pem`),
    );
    await guest.run("systemctl stop sampler; rm /run/samples");
  }

  (await does(stack.destroy({ env }))).succeeded("6 deleted");
  expect(found(said.join("\n"))).toEqual([]);
  for (const guest of [lab.server1, lab.server2]) expect(await leftovers(guest)).toBe("");
});
