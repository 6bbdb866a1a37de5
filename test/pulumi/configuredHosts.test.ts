/** The hosts of the stack's configuration, as Pulumi's own provider of dynamic resources hands them over. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import * as pulumi from "@pulumi/pulumi";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { type FakeServer, startFakeServer, takesPassword } from "../ssh/fakeServer.js";
import { machineId } from "../support/machineId.js";
import { connectPlugin, secret, urnOf } from "../support/pluginClient.js";
import { recordedLvs } from "../support/recorded.js";

const require_ = createRequire(join(process.cwd(), "package.json"));
const urn = urnOf("LvSnapshot");
const password = "planted-password";

let server: FakeServer;
let folder: string;
let child: ChildProcess;
let said: string;
let provider: ReturnType<typeof connectPlugin>;
/** As the SDK writes it into a state, and as it was before configurations were known. */
let closure: string;
const earlier = readFileSync(join("test", "recorded", "earlierProvider.txt"), "utf8");

beforeAll(async () => {
  server = await startFakeServer({
    authenticate: takesPassword(password),
    run: ({ line, started, exit }) => {
      started();
      exit(0, line.includes("machine-id") ? `${machineId}\n` : recordedLvs("valid"));
    },
  });
  const { thinProvider } = require_(
    "./dist/pulumi/thinProvider.js",
  ) as typeof import("../../provider/pulumi/thinProvider.js");
  const made = thinProvider("LvSnapshot");
  closure = (await pulumi.runtime.serializeFunction(() => made, { allowSecrets: true })).text;
  // A project that has the package installed.
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-project-"));
  mkdirSync(join(folder, "node_modules"));
  symlinkSync(process.cwd(), join(folder, "node_modules", "pulumi-lvm-nbd"));
});
afterAll(() => {
  server.close();
  rmSync(folder, { recursive: true });
});

beforeEach(async () => {
  const program = require_.resolve("@pulumi/pulumi/cmd/dynamic-provider/index.js");
  child = spawn(process.execPath, [program, "127.0.0.1:1"], {
    cwd: folder,
    stdio: ["ignore", "pipe", "pipe"],
    env: { ...process.env, NODE_PATH: join(folder, "node_modules") },
  });
  said = "";
  if (child.stdout === null) throw new Error("it has no stdout");
  for (const stream of [child.stdout, child.stderr]) stream?.on("data", (data) => (said += data));
  const [line] = (await once(createInterface(child.stdout), "line")) as [string];
  provider = connectPlugin(Number(line));
});
afterEach(async () => {
  provider.close();
  const ended = once(child, "exit");
  child.kill("SIGKILL");
  await ended;
  expect(said).not.toContain(password);
});

const declared = { owner: "o/p/s/vm1", volumeGroup: "VgVm", origin: "vm1", name: "vm1-snap", size: "16M" };
const state = (__provider: string, host: unknown = "server1") => ({
  ...{ __provider, host, ...declared, adopt: false, readOnly: true, chunkSize: 65536, tags: ["mine"] },
  ...{ triggers: [], uuid: "ua3XsD-JfZg-sm4f-mixX-TEqj-5JCI-nnYZE4", path: "/dev/VgVm/vm1-snap" },
  ...{ sizeBytes: 16777216, originSizeBytes: 67108864, originUuid: "o", usedPercent: 0, state: "valid" },
  createdAt: "2026-01-01T00:00:00.000Z",
});

/** As the engine gives the configuration of a whole stack: by whole names, what is no text in JSON, secrets as such. */
const configure = (hosts: object) =>
  provider.configure({ "project:other": "x", "lvm-nbd:hosts": secret(JSON.stringify(hosts)) });
const server1 = () => ({
  ...{ address: "127.0.0.1", port: server.port, password, hostKey: server.publicKey, sudo: false },
});

describe("a dynamic resource on a configured host", () => {
  it("is refreshed there, all of them at once, with nothing of the configuration in its state", async () => {
    await configure({ server1: server1() });
    const all = await Promise.all(
      Array.from({ length: 20 }, () => provider.read(urn, "server1/VgVm/vm1-snap", state(closure))),
    );
    for (const { id, properties } of all) {
      expect(id).toBe("server1/VgVm/vm1-snap");
      expect(properties).toMatchObject({ host: "server1", __provider: closure, machineId });
      expect(JSON.stringify(properties)).not.toMatch(/planted|127\.0\.0\.1/);
    }
  });

  it("is neither gone nor removed where its name leads to another machine", async () => {
    await configure({ server1: server1() });
    const elsewhere = { ...state(closure), machineId: "f".repeat(32) };
    const changed = /HOST_CHANGED.*`server1` is another machine than the one LvSnapshot vm1 was made on/;
    await expect(provider.read(urn, "server1/VgVm/vm1-snap", elsewhere)).rejects.toThrow(changed);
    await expect(provider.remove(urn, elsewhere)).rejects.toThrow(changed);
  });

  it("is checked and compared there; a changed configuration is no difference", async () => {
    await configure({ server1: { address: "192.0.2.77" } });
    const news = { __provider: closure, host: "server1", ...declared };
    const { inputs, failures } = await provider.check(urn, news);
    expect(failures).toEqual([]);
    expect(inputs).toMatchObject({ host: "server1", __provider: closure });
    const old = { ...inputs, ...state(closure), tags: [] };
    expect((await provider.diff(urn, old, inputs)).diffs).toEqual([]);
  });

  it("is not checked, refreshed or removed by a wrong configuration, whose fault is told by its path", async () => {
    await configure({ server1: { ...server1(), port: "22" } });
    const wrong = /lvm-nbd:hosts\.server1\.port: .*expected number/;
    const { failures } = await provider.check(urn, { __provider: closure, host: "server1", ...declared });
    expect(failures).toEqual([{ property: "", reason: expect.stringMatching(wrong) }]);
    await expect(provider.read(urn, "id", state(closure))).rejects.toThrow(wrong);
    await expect(provider.remove(urn, state(closure))).rejects.toThrow(wrong);
    expect(said).toMatch(/what to do: Correct it by `pulumi config set --path`.*--run-program/);
    expect(said).not.toMatch(/^\s+at /m);
  });

  it("is told as unknown where it is configured nowhere", async () => {
    await provider.configure({});
    const { failures } = await provider.check(urn, {
      __provider: closure,
      ...declared,
      host: "no-such-host.invalid",
    });
    expect(failures).toEqual([{ property: "", reason: expect.stringContaining("HOST_UNKNOWN") }]);
  });
});

describe("a state of a version that knew no configuration", () => {
  it("works as it did", async () => {
    await configure({ server1: { address: "192.0.2.77" } });
    const { id, properties } = await provider.read(urn, "x/VgVm/vm1-snap", state(earlier, server1()));
    expect(id).toBe("x/VgVm/vm1-snap");
    expect(properties).toMatchObject({ usedPercent: expect.any(Number), __provider: earlier });
  });

  it("differs in nothing from the one of now, and so stays as it is until something is updated", async () => {
    await configure({ server1: { address: "192.0.2.77" } });
    const { inputs } = await provider.check(urn, { __provider: closure, host: "server1", ...declared });
    const old = { ...inputs, ...state(earlier), tags: [] };
    expect((await provider.diff(urn, old, inputs)).diffs).toEqual([]);
  });
});
