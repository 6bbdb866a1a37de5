/** The package as a user gets it: packed, installed outside the repository, and driven by the real CLI. */
import {
  cpSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { z } from "zod";
import { runChild } from "./child.mts";
import type { Lab } from "./lab.mts";
import { ensurePulumi, PulumiStack } from "./pulumi.mts";
import { checksum, freshLab, leftovers, makeOrigin, spoil } from "./support.mts";

const root = join(__dirname, "..", "..");
// The CLI starts a compiler and a plugin each time: a minute a command where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let folder: string;
let project: string;
let environment: NodeJS.ProcessEnv;

beforeAll(async () => {
  lab = await freshLab();
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-package-"));
  ({ env: environment } = await ensurePulumi((line) => process.stdout.write(`${line}\n`)));
  environment = { ...environment, LVM_NBD_SSH_CONFIG: lab.sshConfigPath };
  project = join(folder, "first-backup");
  cpSync(join(root, "examples", "first-backup"), project, {
    recursive: true,
    filter: (source) => !source.includes("node_modules"),
  });
  const tarball = await pack();
  await runChild(["npm", "install", "--no-audit", "--no-fund", "--no-save", "--loglevel=error", tarball], {
    cwd: project,
    env: environment,
    timeoutSeconds: 600,
  });
});

afterAll(() => {
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
});

/** Packs a copy of the checkout: packing builds `dist`, and others may be using the checkout's own. */
async function pack(): Promise<string> {
  const copy = join(folder, "checkout");
  mkdirSync(copy);
  for (const name of readdirSync(root)) {
    if (["node_modules", ".git", "dist", "coverage", "test"].includes(name)) continue;
    cpSync(join(root, name), join(copy, name), { recursive: true });
  }
  symlinkSync(join(root, "node_modules"), join(copy, "node_modules"));
  await runChild(["npm", "pack", "--silent", "--pack-destination", folder], {
    cwd: copy,
    env: environment,
    timeoutSeconds: 300,
  });
  const tarball = readdirSync(folder).find((name) => name.endsWith(".tgz"));
  if (tarball === undefined) throw new Error("npm pack made no tarball");
  return join(folder, tarball);
}

const exportedState = z.object({
  deployment: z.object({
    resources: z.array(
      z.object({ urn: z.string(), type: z.string(), inputs: z.record(z.string(), z.unknown()).optional() }),
    ),
  }),
});

/** Changes to LVM's metadata, starts of units and writes of their files: the same after a run that changed nothing. */
async function fingerprint(): Promise<string> {
  const units = (name: string) =>
    `systemctl show -p InvocationID ${name}; stat -c '%n %Y %i' /etc/systemd/system/${name} /etc/modules-load.d/* 2>/dev/null`;
  const one = await lab.server1.run(
    `vgs --noheadings -o vg_seqno VgVm; ${units("lvm-nbd-export-vm1.service")}`,
  );
  const two = await lab.server2.run(units("lvm-nbd-attach-vm1.service"));
  return one.stdout + two.stdout;
}

/** The resource types in the order in which the output says that something was done to them. */
function order(output: string, what: RegExp): string[] {
  const lines = output.split("\n").filter((line) => what.test(line));
  return [...new Set(lines.map((line) => /LvSnapshot|NbdExport|NbdAttachment/.exec(line)?.[0] ?? "?"))];
}

describe("examples/first-backup with the packed package", () => {
  let stack: PulumiStack;
  let moment: string;
  let uuid: string;
  const snapshotField = async (field: string) =>
    (
      await lab.server1.run(`lvs --noheadings --nosuffix --units b -o ${field} VgVm/LV-VM1-backup`)
    ).stdout.trim();

  beforeAll(async () => {
    moment = await makeOrigin(lab.server1);
    stack = await PulumiStack.create({
      projectDir: project,
      stackName: "packed",
      backendDir: join(folder, "backend"),
      env: environment,
      config: {
        source: "server1",
        client: "server2",
        listenAddress: lab.server1.privateAddress,
        clientAddress: lab.server2.privateAddress,
        size: "8M",
      },
    });
  });

  it("makes the chain with up", async () => {
    const { stdout } = await stack.up();
    expect(stdout).toMatch(/4 created/);
    await spoil(lab.server1, "/dev/VgVm/LV-VM1");
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
    expect(await stack.outputs()).toMatchObject({
      device: "/dev/lvm-nbd/vm1",
      uri: `nbd://${lab.server1.privateAddress}:10809/vm1`,
      takenAt: expect.stringMatching(/^\d{4}-\d\d-\d\dT/),
    });
    uuid = await snapshotField("lv_uuid");
  });

  it("finds no change with preview --refresh", async () => {
    const { stdout } = await stack.preview({ refresh: true, args: ["--expect-no-changes"] });
    expect(stdout).toMatch(/4 unchanged/);
  });

  it("changes nothing on the servers with a second up", async () => {
    const before = await fingerprint();
    const { stdout } = await stack.up({ args: ["--expect-no-changes"] });
    expect(stdout).toMatch(/4 unchanged/);
    expect(await fingerprint()).toBe(before);
  });

  it("keeps nothing in the state but the thin closure and plain values", async () => {
    const state = await stack.exportState();
    expect(JSON.stringify(state)).not.toMatch(/PRIVATE KEY|id_ed25519|createHostPool|ssh2/);
    const closures = exportedState
      .parse(state)
      .deployment.resources.filter(({ type }) => type.includes("lvm-nbd"))
      .map(({ inputs }) => JSON.stringify(inputs?.__provider));
    expect(closures).toHaveLength(3);
    for (const closure of closures) {
      expect(closure).toContain("pulumi-lvm-nbd/runtime");
      expect(closure.length).toBeLessThan(4000);
    }
    // The type's name is all in which the closures differ: nothing else was captured.
    const alike = closures.map((closure) =>
      closure.replaceAll(/LvSnapshot|NbdExport|NbdAttachment/g, "TYPE"),
    );
    expect(new Set(alike).size).toBe(1);
  });

  it("grows the snapshot in place", async () => {
    const attached = (await lab.server2.run("systemctl show -p InvocationID lvm-nbd-attach-vm1.service"))
      .stdout;
    await stack.run(["config", "set", "--stack", "packed", "size", "12M"]);
    const { stdout } = await stack.up();
    expect(stdout).toMatch(/1 updated/);
    expect(stdout).toMatch(/3 unchanged/);
    expect(await snapshotField("lv_size")).toBe(String(12 * 1024 ** 2));
    expect(await snapshotField("lv_uuid")).toBe(uuid);
    expect((await lab.server2.run("systemctl show -p InvocationID lvm-nbd-attach-vm1.service")).stdout).toBe(
      attached,
    );
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
  });

  it("takes a new moment by replacing the chain, from its end and to its end", async () => {
    const now = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
    await stack.run(["config", "set", "--stack", "packed", "moment", "second"]);
    const { stdout } = await stack.up();
    expect(stdout).toMatch(/3 replaced/);
    expect(order(stdout, /deleted/)).toEqual(["NbdAttachment", "NbdExport", "LvSnapshot"]);
    expect(order(stdout, /created/)).toEqual(["LvSnapshot", "NbdExport", "NbdAttachment"]);
    expect(await snapshotField("lv_uuid")).not.toBe(uuid);
    expect(now).not.toBe(moment);
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(now);
  });

  it("names drift with preview --refresh", async () => {
    await lab.server1.run("systemctl stop lvm-nbd-export-vm1.service");
    const { stdout, stderr } = await stack.preview({ refresh: true });
    expect(stdout + stderr).toContain("NbdExport vm1 on server1: is stopped");
    await stack.up({ refresh: true });
    const { stdout: active } = await lab.server1.run("systemctl is-active lvm-nbd-export-vm1.service");
    expect(active.trim()).toBe("active");
  });

  it("keeps the state when a host cannot be reached", async () => {
    const before = await stack.exportState();
    const failed = await stack.refresh({
      allowFailure: true,
      env: { LVM_NBD_SSH_CONFIG: unreachableConfig() },
    });
    expect(failed.exitCode).not.toBe(0);
    expect(failed.stdout + failed.stderr).toContain("HOST_UNREACHABLE");
    const urns = (state: unknown) => exportedState.parse(state).deployment.resources.map(({ urn }) => urn);
    expect(urns(await stack.exportState()).sort()).toEqual(urns(before).sort());
  });

  it("takes everything down with destroy and leaves the origin", async () => {
    const origin = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
    await stack.destroy();
    expect(await leftovers(lab.server1)).toBe("");
    expect(await leftovers(lab.server2)).toBe("");
    expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).toBe(origin);
  });

  /** The lab's configuration with a port on which nothing listens. */
  function unreachableConfig(): string {
    const path = join(folder, "unreachable_config");
    writeFileSync(path, readFileSync(lab.sshConfigPath, "utf8").replaceAll(/Port \d+/g, "Port 1"));
    return path;
  }
});

describe("hosts with a private key from the stack's secrets", () => {
  const program = `
import * as pulumi from "@pulumi/pulumi";
import { LvSnapshot, NbdAttachment, NbdExport } from "pulumi-lvm-nbd";

const config = new pulumi.Config();
const host = (name: string, user: string) => ({
  address: "127.0.0.1",
  port: config.requireNumber(name + "Port"),
  user,
  privateKey: config.require("sshKey"),
  hostKey: config.require(name + "Key"),
});
const snapshot = new LvSnapshot("keyed", {
  host: host("server1", "operator"),
  volumeGroup: "VgVm",
  origin: config.require("origin"),
  size: "8M",
});
const exported = new NbdExport("keyed", {
  host: host("server1", "operator"),
  device: snapshot.path,
  listenAddress: "10.77.0.1",
  clients: ["10.77.0.2"],
});
export const path = new NbdAttachment("keyed", { host: host("server2", "root"), uri: exported.uri }).path;
`;
  let stack: PulumiStack;
  let moment: string;
  let secretLines: string[];
  const outputs: string[] = [];
  const backend = () => join(folder, "keyed-backend");
  const keyed = () => join(folder, "keyed");

  beforeAll(async () => {
    mkdirSync(keyed());
    for (const name of ["tsconfig.json", "package.json"]) cpSync(join(project, name), join(keyed(), name));
    writeFileSync(join(keyed(), "Pulumi.yaml"), "name: keyed\nruntime: nodejs\n");
    writeFileSync(join(keyed(), "index.ts"), program);
    symlinkSync(join(project, "node_modules"), join(keyed(), "node_modules"));
    const key = readFileSync(lab.privateKeyPath, "utf8");
    secretLines = key.split("\n").filter((line) => line.length > 40 && !line.includes("KEY"));
    moment = await makeOrigin(lab.server1, "LV-VM2");
    stack = await PulumiStack.create({
      projectDir: keyed(),
      stackName: "keyed",
      backendDir: backend(),
      env: { ...environment, LVM_NBD_SSH_CONFIG: "/dev/null" },
      config: {
        origin: "LV-VM2",
        server1Port: String(lab.server1.port),
        server2Port: String(lab.server2.port),
        server1Key: lab.server1.hostKey,
        server2Key: lab.server2.hostKey,
      },
    });
    await stack.run(["config", "set-all", "--stack", "keyed", "--secret", `sshKey=${key}`]);
  });

  /** All text files below a folder. */
  function texts(path: string): string {
    return readdirSync(path, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile() && !entry.parentPath.includes("node_modules"))
      .map((entry) => readFileSync(join(entry.parentPath, entry.name), "utf8"))
      .join("\n");
  }

  it("make the chain, as an ordinary user with sudo on one side", async () => {
    const preview = await stack.preview();
    const up = await stack.up();
    outputs.push(preview.stdout, preview.stderr, up.stdout, up.stderr);
    expect(up.stdout).toMatch(/4 created/);
    expect(await checksum(lab.server2, "/dev/lvm-nbd/keyed")).toBe(moment);
  });

  it("show no change with preview --refresh and with up", async () => {
    const preview = await stack.preview({ refresh: true, args: ["--expect-no-changes"] });
    const up = await stack.up({ args: ["--expect-no-changes"] });
    outputs.push(preview.stdout, preview.stderr, up.stdout, up.stderr);
  });

  it("refuse a server that shows another host key, and keep the state", async () => {
    const pin = (key: string) => stack.run(["config", "set", "--stack", "keyed", "server1Key", key]);
    await pin(lab.server2.hostKey);
    const pinned = await stack.up();
    const refused = await stack.refresh({ allowFailure: true });
    outputs.push(pinned.stdout, pinned.stderr, refused.stdout, refused.stderr);
    expect(refused.exitCode).not.toBe(0);
    expect(refused.stdout + refused.stderr).toContain("HOST_KEY_MISMATCH");
    const { resources } = exportedState.parse(await stack.exportState()).deployment;
    expect(resources.filter(({ type }) => type.includes("lvm-nbd"))).toHaveLength(3);
    await pin(lab.server1.hostKey);
    await stack.up();
    const destroyed = await stack.destroy();
    outputs.push(destroyed.stdout, destroyed.stderr);
    expect(await leftovers(lab.server1)).toBe("");
    expect(await leftovers(lab.server2)).toBe("");
  });

  it("leave the key in no output, in no state and in no file in plain text", () => {
    expect(secretLines.length).toBeGreaterThan(2);
    const files = texts(backend()) + texts(keyed());
    expect(files).toContain("ciphertext");
    for (const line of secretLines) {
      expect(outputs.join("\n")).not.toContain(line);
      expect(files).not.toContain(line);
    }
  });
});

it("the plugin in it serves a project that names npm's folder of programs", async () => {
  await makeOrigin(lab.server1, "LV-VM3");
  const plugged = join(folder, "plugged");
  mkdirSync(plugged);
  symlinkSync(join(project, "node_modules"), join(plugged, "node_modules"));
  const plugins = "plugins: { providers: [{ name: lvm-nbd, path: node_modules/.bin }] }";
  writeFileSync(join(plugged, "Pulumi.yaml"), `name: plugged\nruntime: nodejs\n${plugins}\n`);
  writeFileSync(join(plugged, "package.json"), '{ "main": "index.js" }');
  const program = `
const pulumi = require("@pulumi/pulumi");
const args = { host: "server1", volumeGroup: "VgVm", origin: "LV-VM3", size: "8M", path: undefined };
exports.path = new pulumi.CustomResource("lvm-nbd:index:LvSnapshot", "plugged", args).path;
`;
  writeFileSync(join(plugged, "index.js"), program);
  const stack = await PulumiStack.create({
    projectDir: plugged,
    stackName: "plugged",
    backendDir: join(folder, "plugged-backend"),
    env: environment,
    config: { "lvm-nbd:organization": "organization" },
  });
  await stack.up();
  expect(await stack.outputs()).toEqual({ path: "/dev/VgVm/plugged" });
  expect(await leftovers(lab.server1)).toContain("lvm-nbd.owner=organization/plugged/plugged/plugged");
  await stack.destroy();
  expect(await leftovers(lab.server1)).toBe("");
});
