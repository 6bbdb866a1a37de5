/** examples/yaml through Pulumi's engine, its language host of YAML and the plugin. Only the server is a stand-in. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { connection, type FakeServer, startFakeServer } from "../ssh/fakeServer.js";
import { ensurePulumi, PulumiStack } from "./pulumi.mts";
import { ensureYamlLanguage } from "./yamlLanguage.mts";

vi.setConfig({ testTimeout: 300_000, hookTimeout: 1_800_000 });

const root = join(__dirname, "..", "..");
const settings = {
  ...{ source: "-", client: "-", backups: "-", listenAddress: "10.0.0.1", clientAddress: "10.0.0.2" },
  ...{ volumeGroup: "VgVm", origin: "LV-VM1", "lvm-nbd:organization": "organization" },
};

let server: FakeServer;
let folder: string;
let env: NodeJS.ProcessEnv;

beforeAll(async () => {
  const log = (line: string) => process.stdout.write(`${line}\n`);
  const language = await ensureYamlLanguage(log);
  const pulumi = await ensurePulumi(log);
  // A folder for images without any, and nothing else.
  server = await startFakeServer({
    run: ({ line, started, exit }) => {
      started();
      if (line.includes("/var/backups") && line.includes("echo end")) exit(0, "end\n");
      else exit(1);
    },
  });
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-yaml-"));
  // As npm installs it, the program can be executed.
  const plugin = `#!/bin/sh\nexec "${process.execPath}" "${join(root, "dist", "plugin.js")}" "$@"\n`;
  writeFileSync(join(folder, "pulumi-resource-lvm-nbd"), plugin, { mode: 0o755 });
  env = { ...pulumi.env, PATH: [folder, language, pulumi.env.PATH].join(delimiter) };
});

afterAll(async () => {
  await server?.close();
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
});

/** Previews the example as edited, on the stand-in. */
async function previewed(name: string, edit: (program: string) => string) {
  const projectDir = join(folder, name);
  mkdirSync(projectDir);
  const { address, port, user, password } = connection({ port: server.port });
  const host = JSON.stringify({ address, port, user, password, hostKey: server.publicKey });
  const program = readFileSync(join(root, "examples", "yaml", "Pulumi.yaml"), "utf8");
  writeFileSync(
    join(projectDir, "Pulumi.yaml"),
    edit(program).replaceAll(/host: \$\{\w+\}/g, `host: ${host}`),
  );
  const backendDir = join(folder, `${name}-state`);
  const stack = await PulumiStack.create({ projectDir, stackName: "dev", backendDir, env, config: settings });
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
