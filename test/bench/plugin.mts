/**
 * `npm run bench -- plugin`: how long the plugin takes to its first answer, beside a bare Node that starts and ends;
 * and how much memory it has at most while it makes, looks at and removes 1,000 snapshots of a fake host. Prints medians, and writes
 * them to results/plugin.json.
 */
import { spawn, spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import type * as Proto from "../../provider/pulumi/proto.js";
import { median, rounded, say } from "./figures.mts";
import { ask, firstLine, memory, root, startPlugin } from "./pluginProcess.mts";

const load = createRequire(import.meta.url);
const { providerProto, structOf }: typeof Proto = load(join(root, "dist/pulumi/proto.js"));

const starts = 15;
const resources = 1000;
/** At once, as the engine runs them on 4 processors. */
const parallel = 16;

/** Milliseconds from its start to its first answer. */
async function firstAnswer(): Promise<number> {
  const began = performance.now();
  const plugin = await startPlugin();
  await ask((answer) => plugin.client.handshake(new providerProto.ProviderHandshakeRequest(), answer));
  const took = performance.now() - began;
  await plugin.end();
  return took;
}

function bareNode(): number {
  const began = performance.now();
  const { status } = spawnSync(process.execPath, ["--eval", "0"]);
  if (status !== 0) throw new Error("node does not start");
  return performance.now() - began;
}

async function measureStart(): Promise<object> {
  const plugin: number[] = [];
  const node: number[] = [];
  await firstAnswer();
  for (let n = 0; n < starts; n++) {
    node.push(bareNode());
    plugin.push(await firstAnswer());
  }
  const [own, bare] = [median(plugin), median(node)];
  say(
    `start      first answer after ${own.toFixed(0)} ms, bare Node ${bare.toFixed(0)} ms: ${(own / bare).toFixed(1)} times`,
  );
  return { starts, pluginMs: Math.round(own), nodeMs: Math.round(bare), ratio: rounded(own / bare) };
}

async function inParallel(count: number, work: (n: number) => Promise<void>): Promise<number> {
  const began = performance.now();
  let next = 0;
  const worker = async () => {
    while (next < count) await work(next++);
  };
  await Promise.all(Array.from({ length: parallel }, worker));
  return (performance.now() - began) / 1000;
}

async function measureMemory(host: Readonly<Record<string, unknown>>): Promise<object> {
  const plugin = await startPlugin();
  const { client, pid } = plugin;
  const started = memory(pid).now;
  const configuration = new providerProto.ConfigureRequest();
  configuration.setArgs(structOf({ organization: "bench" }));
  await ask((answer) => client.configure(configuration, answer));

  const urn = (n: number) => `urn:pulumi:bench::bench::lvm-nbd:index:LvSnapshot::backup${n}`;
  const made: { id: string; state: Proto.Struct | undefined }[] = [];
  const phases: Record<string, { seconds: number; megabytes: number }> = {};
  const phase = async (name: string, work: (n: number) => Promise<void>) => {
    const seconds = await inParallel(resources, work);
    phases[name] = { seconds: rounded(seconds), megabytes: memory(pid).now };
    say(
      `memory     ${name.padEnd(8)} ${resources} resources in ${seconds.toFixed(1)} s, ${phases[name].megabytes} MB`,
    );
  };
  await phase("create", async (n) => {
    const check = new providerProto.CheckRequest();
    check.setUrn(urn(n));
    check.setNews(
      structOf({ host, volumeGroup: `VgVm${Math.floor(n / 100)}`, origin: `vm${n}`, size: "16M" }),
    );
    const checked = await ask<Proto.providerProto.CheckResponse>((answer) => client.check(check, answer));
    const [failure] = checked.getFailuresList();
    if (failure !== undefined) throw new Error(failure.getReason());
    const create = new providerProto.CreateRequest();
    create.setUrn(urn(n));
    create.setProperties(checked.getInputs());
    const created = await ask<Proto.providerProto.CreateResponse>((answer) => client.create(create, answer));
    made[n] = { id: created.getId(), state: created.getProperties() };
  });
  await phase("refresh", async (n) => {
    const read = new providerProto.ReadRequest();
    read.setUrn(urn(n));
    read.setId(made[n]?.id ?? "");
    read.setProperties(made[n]?.state);
    const seen = await ask<Proto.providerProto.ReadResponse>((answer) => client.read(read, answer));
    if (seen.getId() !== made[n]?.id) throw new Error(`${urn(n)} is gone`);
  });
  // What this run made it keeps: an engine that begins anew removes.
  await ask((answer) => client.handshake(new providerProto.ProviderHandshakeRequest(), answer));
  await phase("delete", async (n) => {
    const remove = new providerProto.DeleteRequest();
    remove.setUrn(urn(n));
    remove.setId(made[n]?.id ?? "");
    remove.setProperties(made[n]?.state);
    await ask((answer) => client.delete(remove, answer));
  });
  const { most } = memory(pid);
  say(`memory     ${started} MB at the start, ${most} MB at most`);
  await plugin.end();
  return { resources, parallel, startedMegabytes: started, mostMegabytes: most, phases };
}

say("compiling the fake host ...");
const compiling = spawnSync("tsc", ["-p", join(import.meta.dirname, "tsconfig.json")], { stdio: "inherit" });
if (compiling.status !== 0) throw new Error("the fake host does not compile");
const compiled = join(root, "node_modules/.cache/lvm-nbd-bench/test/fakehost/world.js");
const servers = spawn(
  process.execPath,
  [join(import.meta.dirname, "fakeServers.mts"), compiled, String(resources)],
  { stdio: ["pipe", "pipe", "inherit"] },
);
try {
  const start = await measureStart();
  const host: Record<string, unknown> = JSON.parse(await firstLine(servers));
  const results = { node: process.version, start, memory: await measureMemory(host) };
  const file = join(import.meta.dirname, "results", "plugin.json");
  writeFileSync(file, `${JSON.stringify(results, null, 2)}\n`);
  say(`written to ${file}`);
} finally {
  servers.stdin?.end();
}
