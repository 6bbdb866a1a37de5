/**
 * `npm run bench -- startup`: how long Pulumi's dynamic provider takes from its start to its first answer about a resource of ours,
 * beside one that does nothing: both as the engine starts it, with what is in the state. Prints medians, and writes them to
 * results/startup.json.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import * as grpc from "@grpc/grpc-js";
import * as pulumi from "@pulumi/pulumi";
import type * as Proto from "../../provider/pulumi/proto.js";
import type * as Thin from "../../provider/pulumi/thinProvider.js";
import { median, rounded, say } from "./figures.mts";
import { ask, firstLine, root } from "./pluginProcess.mts";

const load = createRequire(import.meta.url);
const { providerGrpc, providerProto, structOf }: typeof Proto = load(join(root, "dist/pulumi/proto.js"));
const { thinProvider }: typeof Thin = load(join(root, "dist/pulumi/thinProvider.js"));

const starts = 15;
/** Of the first answer of one that does nothing; see the issue. */
const mostRatio = 1.2;

const empty: pulumi.dynamic.ResourceProvider = {
  check: async (_olds, news) => ({ inputs: news }),
  create: async (inputs) => ({ id: "nothing", outs: inputs }),
};

/** As Pulumi writes it into the state. */
async function serialized(provider: pulumi.dynamic.ResourceProvider): Promise<string> {
  return (await pulumi.runtime.serializeFunction(() => provider, { allowSecrets: true })).text;
}

const args = {
  host: { address: "127.0.0.1", password: "secret", hostKey: `SHA256:${"A".repeat(43)}` },
  ...{ volumeGroup: "VgVm", origin: "vm1", size: "1G", name: "backup", owner: "bench/bench/bench/backup" },
};

/** Milliseconds from the start of the provider's process: to the port that it prints, and to its answer. */
async function firstAnswer(folder: string, provider: string): Promise<{ port: number; answer: number }> {
  const program = join(folder, "node_modules/@pulumi/pulumi/cmd/dynamic-provider");
  const began = performance.now();
  const child = spawn(process.execPath, [program, "127.0.0.1:1"], {
    cwd: folder,
    stdio: ["ignore", "pipe", "inherit"],
    env: { ...process.env, PULUMI_PROJECT: "bench", PULUMI_NODEJS_PROJECT: "bench" },
  });
  const address = `127.0.0.1:${await firstLine(child)}`;
  const port = performance.now() - began;
  const client = new providerGrpc.ResourceProviderClient(address, grpc.credentials.createInsecure());
  const configuration = new providerProto.ConfigureRequest();
  configuration.setArgs(structOf({}));
  await ask((done) => client.configure(configuration, done));
  const check = new providerProto.CheckRequest();
  check.setUrn("urn:pulumi:bench::bench::pulumi-nodejs:dynamic:Resource::backup");
  check.setOlds(structOf({}));
  check.setNews(structOf({ ...args, __provider: provider }));
  const checked = await ask<Proto.providerProto.CheckResponse>((done) => client.check(check, done));
  const answer = performance.now() - began;
  const [failure] = checked.getFailuresList();
  if (failure !== undefined) throw new Error(failure.getReason());
  client.close();
  child.kill();
  await once(child, "exit");
  return { port, answer };
}

const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-startup-"));
try {
  mkdirSync(join(folder, "node_modules/@pulumi"), { recursive: true });
  symlinkSync(join(root, "node_modules/@pulumi/pulumi"), join(folder, "node_modules/@pulumi/pulumi"));
  symlinkSync(root, join(folder, "node_modules/pulumi-lvm-nbd"));
  writeFileSync(join(folder, "package.json"), `${JSON.stringify({ name: "bench", private: true })}\n`);
  const sides = { ours: await serialized(thinProvider("LvSnapshot")), empty: await serialized(empty) };
  const took = { ours: [] as number[], empty: [] as number[], port: [] as number[] };
  for (let n = 0; n <= starts; n++) {
    for (const side of ["empty", "ours"] as const) {
      const { port, answer } = await firstAnswer(folder, sides[side]);
      // The first ones fill the caches of files.
      if (n === 0) continue;
      took[side].push(answer);
      took.port.push(port);
    }
  }
  const [ours, nothing, port] = [median(took.ours), median(took.empty), median(took.port)];
  const ratio = ours / nothing;
  say(
    `first answer of the dynamic provider: ${ours.toFixed(0)} ms, of an empty one ${nothing.toFixed(0)} ms (of which ${port.toFixed(0)} until it listens): ${ratio.toFixed(2)} times, at most ${mostRatio}: ${ratio <= mostRatio ? "kept" : "NOT KEPT"}`,
  );
  const results = {
    node: process.version,
    load: rounded(loadavg()[0] ?? 0),
    starts,
    oursMs: Math.round(ours),
    emptyMs: Math.round(nothing),
    listensMs: Math.round(port),
    ratio: rounded(ratio),
  };
  const file = join(import.meta.dirname, "results", "startup.json");
  writeFileSync(file, `${JSON.stringify(results, null, 2)}\n`);
  say(`written to ${file}`);
} finally {
  rmSync(folder, { recursive: true });
}
