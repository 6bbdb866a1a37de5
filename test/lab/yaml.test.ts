/** examples/yaml through Pulumi's engine, its language host of YAML and the plugin. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { connection, type FakeServer, startFakeServer } from "../ssh/fakeServer.js";
import { ensurePulumi, PulumiStack } from "./pulumi.mts";
import { checksum, freshLab, leftovers, makeOrigin } from "./support.mts";
import { ensureYamlLanguage } from "./yamlLanguage.mts";

vi.setConfig({ testTimeout: 300_000, hookTimeout: 1_800_000 });

const root = join(__dirname, "..", "..");
const settings = { volumeGroup: "VgVm", origin: "LV-VM1", "lvm-nbd:organization": "organization" };

let folder: string;
let env: NodeJS.ProcessEnv;

beforeAll(async () => {
  const log = (line: string) => process.stdout.write(`${line}\n`);
  const language = await ensureYamlLanguage(log);
  const pulumi = await ensurePulumi(log);
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-yaml-"));
  // As npm installs it, the program can be executed.
  const plugin = `#!/bin/sh\nexec "${process.execPath}" "${join(root, "dist", "plugin.js")}" "$@"\n`;
  writeFileSync(join(folder, "pulumi-resource-lvm-nbd"), plugin, { mode: 0o755 });
  env = { ...pulumi.env, PATH: [folder, language, pulumi.env.PATH].join(delimiter) };
});

afterAll(() => {
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
});

/** A stack of the example as edited. */
async function stackOf(name: string, config: Record<string, string>, edit: (program: string) => string) {
  const projectDir = join(folder, name);
  mkdirSync(projectDir);
  const program = readFileSync(join(root, "examples", "yaml", "Pulumi.yaml"), "utf8");
  writeFileSync(join(projectDir, "Pulumi.yaml"), edit(program));
  const backendDir = join(folder, `${name}-state`);
  return PulumiStack.create({
    ...{ projectDir, stackName: "dev", backendDir, env },
    config: { ...settings, ...config },
  });
}

describe("previewed on a stand-in for its servers", () => {
  let server: FakeServer;

  beforeAll(async () => {
    // A folder for images without any, and nothing else.
    server = await startFakeServer({
      run: ({ line, started, exit }) => {
        started();
        if (line.includes("/var/backups") && line.includes("echo end")) exit(0, "end\n");
        else exit(1);
      },
    });
  });

  afterAll(() => server?.close());

  async function previewed(name: string, edit: (program: string) => string) {
    const { address, port, user, password } = connection({ port: server.port });
    const host = JSON.stringify({ address, port, user, password, hostKey: server.publicKey });
    const hosts = { source: "-", client: "-", backups: "-" };
    const config = { ...hosts, listenAddress: "10.0.0.1", clientAddress: "10.0.0.2" };
    const stack = await stackOf(name, config, (program) =>
      edit(program).replaceAll(/host: \$\{\w+\}/g, `host: ${host}`),
    );
    const { exitCode, stdout, stderr } = await stack.preview({ allowFailure: true });
    expect(stdout + stderr).not.toContain(password);
    return { exitCode, said: stdout + stderr };
  }

  it("is a program that the language host takes, and whose component makes resources of the plugin", async () => {
    const { exitCode, said } = await previewed("whole", (program) => program);
    expect(said).toMatch(/VmBackup\$lvm-nbd:index:BackupImage::vm1-\d{4}-\d\d-\d\d\]/);
    expect(said).toMatch(/\+ 6 to create/);
    expect(said).toContain('"organization/yaml/dev/vm1Disk"');
    expect(said).not.toMatch(/^error|does not exist on/im);
    expect(exitCode).toBe(0);
  });

  it("with a property that there is not is refused by the schema that the plugin serves", async () => {
    const { exitCode, said } = await previewed("misspelt", (program) => program.replace("keep:", "kept:"));
    expect(said).toMatch(/kept/);
    expect(exitCode).not.toBe(0);
  });
});

it("brings up on real servers what it is for, has nothing to do then, and is removed with all it made", async () => {
  const { server1, server2, operatorConfigPath } = await freshLab();
  const moment = await makeOrigin(server1);
  const hosts = { source: "server1", client: "server2", backups: "server2" };
  const addresses = { listenAddress: server1.privateAddress, clientAddress: server2.privateAddress };
  const stack = await stackOf("lab", { ...hosts, ...addresses }, (program) =>
    program.replace("keep:", 'now: "2026-11-30T03:00:00"\n      keep:'),
  );
  stack.env.LVM_NBD_SSH_CONFIG = operatorConfigPath;
  expect((await stack.up()).stdout).toContain("6 created");
  const { device, backups } = await stack.outputs();
  expect(backups).toEqual(["2026-11-30"]);
  expect(await checksum(server2, String(device))).toBe(moment);
  const image = "/var/backups/vm1.VgVm.LV-VM1.2026-11-30.raw";
  expect((await server2.run(`sha256sum <${image}`)).stdout).toContain(moment);

  const again = await stack.preview({ refresh: true, args: ["--expect-no-changes"] });
  expect(again.stdout).toContain("6 unchanged");
  // Of drift; the programs on the PATH are always told of.
  expect(again.stdout + again.stderr).not.toMatch(/warning: (?!using \S+ from \$PATH)/);

  expect((await stack.destroy()).stdout).toContain("6 deleted");
  for (const server of [server1, server2]) expect(await leftovers(server)).toBe("");
  expect((await server2.run(`ls ${image}* 2>/dev/null | wc -l`)).stdout.trim()).toBe("0");
  expect(await checksum(server1, "/dev/VgVm/LV-VM1")).toBe(moment);
});
