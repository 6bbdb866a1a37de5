/** Hosts by name in the stack's configuration, through both doors and the CLI: keys rotate, and are nowhere they should not be. */
import { execFileSync } from "node:child_process";
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { FaultStack, Run } from "./faults/fault-stack.mts";
import type { Lab } from "./lab.mts";
import { freshLab, leftovers, makeOrigin } from "./support.mts";

vi.setConfig({ testTimeout: 600_000, hookTimeout: 600_000 });

const snapshot = '{ host: "store1", volumeGroup: "VgVm", origin: "LV-VM1", name: "snap", size: "8M" }';
const programs = {
  "dynamic resources": `const { getHost, getVolumes, LvSnapshot } = require("pulumi-lvm-nbd");
    module.exports = async () => {
      const { volumes } = await getVolumes({ host: "store1", volumeGroup: "VgVm" });
      const { kernel } = await getHost({ host: "store1" });
      return { names: volumes.filter(({ kind }) => kind === "other").map(({ name }) => name), kernel, uuid: new LvSnapshot("snap", ${snapshot}).uuid };
    };`,
  "the plugin": `const pulumi = require("@pulumi/pulumi");
    class LvSnapshot extends pulumi.CustomResource {
      constructor(name, args) { super("lvm-nbd:index:LvSnapshot", name, { uuid: undefined, ...args }); }
    }
    module.exports = async () => {
      const { volumes } = await pulumi.runtime.invoke("lvm-nbd:index:getVolumes", { host: "store1", volumeGroup: "VgVm" });
      const { kernel } = await pulumi.runtime.invoke("lvm-nbd:index:getHost", { host: "store1" });
      return { names: volumes.filter(({ kind }) => kind === "other").map(({ name }) => name), kernel, uuid: new LvSnapshot("snap", ${snapshot}).uuid };
    };`,
};

let lab: Lab;
let folder: string;

beforeAll(async () => {
  lab = await freshLab();
  await makeOrigin(lab.server1);
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-configured-"));
});
afterAll(() => {
  if (folder) rmSync(folder, { recursive: true, force: true });
});

/** A new key that server1 takes for root, instead of the one before. */
async function newKey(name: string): Promise<string> {
  const file = join(folder, name);
  execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", "rotated", "-f", file]);
  await lab.server1.run(
    "sed -i '/ rotated$/d' /root/.ssh/authorized_keys && cat >>/root/.ssh/authorized_keys",
    {
      stdin: readFileSync(`${file}.pub`, "utf8"),
    },
  );
  return readFileSync(file, "utf8");
}

/** Lines of PEM texts that tell one key from all others. */
const body = (pem: string) =>
  pem
    .split("\n")
    .filter((line) => line !== "" && !line.startsWith("-----"))
    .slice(-3)
    .map((line) => line.slice(-40));

it.each(Object.entries(programs))("%s", async (door, program) => {
  const from = mkdtempSync(join(folder, "program-"));
  writeFileSync(join(from, "index.js"), program);
  writeFileSync(join(from, "package.json"), '{ "name": "configured", "private": true, "main": "index.js" }');
  writeFileSync(
    join(from, "Pulumi.yaml"),
    "name: configured\nruntime:\n  name: nodejs\n  options:\n    typescript: false\n",
  );
  const { cli, close } = await open(from);
  const bin = join(from, "bin");
  const plugin = join(cli.projectDir, "node_modules", "pulumi-lvm-nbd", "dist", "plugin.js");
  mkdirSync(bin);
  chmodSync(plugin, 0o755);
  symlinkSync(plugin, join(bin, "pulumi-resource-lvm-nbd"));
  const env = { PATH: [bin, cli.env.PATH].join(delimiter) };
  const said: string[] = [];
  const does = async (command: "up" | "refresh" | "preview" | "destroy", ...args: string[]) => {
    const run = new Run(await cli[command]({ env, args, allowFailure: true }));
    said.push(run.text);
    return run;
  };
  const set = async (key: string, value: string, how = "--plaintext") => {
    const pair = `lvm-nbd:hosts.store1.${key}=${value}`;
    await cli.run(["config", "set-all", "--stack", cli.name, "--path", how, pair]);
  };

  const first = await newKey(`first-${door.replaceAll(" ", "-")}`);
  await cli.run(["config", "set", "--stack", cli.name, "lvm-nbd:organization", "organization"]);
  await set("address", lab.server1.address);
  await set("port", String(lab.server1.port));
  await set("hostKey", lab.server1.hostKey);
  await set("privateKey", first, "--secret");
  (await does("up")).succeeded("2 created");
  const outputs = await cli.outputs();
  expect(outputs).toMatchObject({ names: ["LV-VM1"], kernel: expect.stringMatching(/^\d/) });
  (await does("refresh")).succeeded("2 unchanged");

  const second = await newKey(`second-${door.replaceAll(" ", "-")}`);
  await set("privateKey", second, "--secret");
  (await does("refresh")).failedWith("AUTH_FAILED", "LvSnapshot snap", "store1", "--run-program");
  (await does("up", "--expect-no-changes", "--diff")).succeeded("2 unchanged");
  (await does("refresh")).succeeded("2 unchanged");
  expect((await cli.outputs()).uuid).toBe(outputs.uuid);

  await set("prot", "22");
  const wrong = await does("up");
  expect(wrong.exitCode).not.toBe(0);
  wrong.said("hosts.store1.prot");
  await cli.run(["config", "rm", "--stack", cli.name, "--path", "lvm-nbd:hosts.store1.prot"]);
  (await does("up")).succeeded("2 unchanged");

  const planted = [first, second].flatMap(body);
  const found = (text: string) => planted.filter((secret) => text.includes(secret));
  const state = JSON.stringify(await cli.exportState());
  expect(found(state)).toEqual([]);
  expect(state).not.toContain("BEGIN OPENSSH");
  (await does("destroy")).succeeded("2 deleted");
  expect(found(said.join("\n"))).toEqual([]);
  expect(await leftovers(lab.server1)).toBe("");
  close();
});

async function open(from: string) {
  const stack = await FaultStack.create(lab, { from });
  return { cli: stack.cli, close: () => stack.close() };
}
