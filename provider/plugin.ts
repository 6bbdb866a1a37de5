#!/usr/bin/env -S node --optimize-for-size --max-semi-space-size=2 --initial-old-space-size=16 --no-opt
/**
 * `pulumi-resource-lvm-nbd`: started by Pulumi's engine with its address as the last argument, it prints the port of its
 * `ResourceProvider` service. Only what the first answer needs is loaded before that is given. It waits for hosts, not for code: V8 is
 * to take the little memory that it needs, and not 10 MB to compile code a second time. The first line has no variables, which shims of
 * package managers take for the program, and less than 127 bytes, of which kernels before 5.1 cut the rest.
 */
import { fstatSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { setFlagsFromString } from "node:v8";
import * as grpc from "@grpc/grpc-js";
import type { Answer } from "./core/functions.js";
import type { Environment, Handlers } from "./core/handlers.js";
import { once } from "./core/once.js";
import { anySize, providerGrpc } from "./pulumi/proto.js";
import { createService, type Parts } from "./pulumi/service.js";

const packageFolder = join(__dirname, "..");

/** What makes it is loaded when a host is first to be reached. */
const pool = once(async () => (await import("./ssh/pool.js")).createHostPool());
/** What every call about a resource needs. */
const forResources = once(async () => {
  const [{ createHandlers }, { loadResourceType }] = await Promise.all([
    import("./core/handlers.js"),
    import("./core/lazyRegistry.js"),
  ]);
  return { createHandlers, loadResourceType };
});

async function handlers(type: string, environment: Omit<Environment, "openHost">): Promise<Handlers> {
  const { createHandlers, loadResourceType } = await forResources();
  return createHandlers(await loadResourceType(type), { ...environment, openHost: opener(environment) });
}

async function ask(
  name: string,
  args: Readonly<Record<string, unknown>>,
  environment: Omit<Environment, "openHost">,
): Promise<Answer> {
  const [{ askFunction }, { functionType }] = await Promise.all([
    import("./core/functions.js"),
    import("./functions/registry.js"),
  ]);
  return askFunction(functionType(name), args, { ...environment, openHost: opener(environment) });
}

/** All share one connection a host. */
function opener({ namedHosts }: Pick<Environment, "namedHosts">): Environment["openHost"] {
  return async (host) => (await pool()).get(host, namedHosts?.());
}

const compose: Parts["compose"] = async (type, environment, ...declared) => {
  const [{ composeAs }, { componentType }] = await Promise.all([
    import("./core/component.js"),
    import("./core/registry.js"),
  ]);
  const openHost = opener(environment);
  return composeAs(componentType(type), { ...environment, openHost }, ...declared);
};

function version(): string {
  const { version }: { version: string } = JSON.parse(
    readFileSync(join(packageFolder, "package.json"), "utf8"),
  );
  return version;
}

/**
 * Without an engine nobody waits for what runs; the next run finds it on the host. The engine holds the other ends of these; that of
 * stdin only where it started this process itself, and not through a language's host.
 */
function endWithPulumi(): void {
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => process.exit(1));
  const stdin = fstatSync(0);
  if (stdin.isFIFO() || stdin.isSocket()) process.stdin.on("close", () => process.exit(1)).resume();
}

function start(): void {
  endWithPulumi();
  // Here and not in the first line: a Node that does not know it starts all the same. What is live grows by a tenth before it is looked
  // through again: by more, what a look at a thousand volumes leaves behind adds up.
  setFlagsFromString("--heap-growing-percent=10");
  // The other compiler that `--no-opt` leaves.
  setFlagsFromString("--no-maglev");
  const server = new grpc.Server(anySize);
  const address = process.argv.at(-1);
  const parts = {
    version: version(),
    schema: () => readFile(join(packageFolder, "schema.json"), "utf8"),
    handlers,
    ask,
    compose,
  };
  server.addService(
    providerGrpc.ResourceProviderService,
    createService(parts, /:\d+$/.test(address ?? "") ? address : undefined),
  );
  server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, port) => {
    if (error) throw error;
    process.stdout.write(`${port}\n`);
  });
}

start();
