#!/usr/bin/env -S MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=32768 MALLOC_TRIM_THRESHOLD_=65536 node --optimize-for-size --max-semi-space-size=2 --initial-old-space-size=16
/**
 * `pulumi-resource-lvm-nbd`: started by Pulumi's engine with its address as the last argument, it prints the port of its
 * `ResourceProvider` service. Only what the first answer needs is loaded before that is given. It waits for hosts, not for code: V8 and
 * malloc are to take the little memory that it needs (glibc's malloc gives back what a large answer took; others know no such variable).
 */
import { fstatSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { setFlagsFromString } from "node:v8";
import * as grpc from "@grpc/grpc-js";
import type { Answer } from "./core/functions.js";
import type { Environment, Handlers } from "./core/handlers.js";
import { anySize, providerGrpc } from "./pulumi/proto.js";
import { createService, type Parts } from "./pulumi/service.js";
import type { HostPool } from "./ssh/pool.js";

const packageFolder = join(__dirname, "..");

let pool: HostPool | undefined;
/** What every call about a resource needs. Kept, since Node looks for a module anew each time that it is imported. */
let forResources: ReturnType<typeof loadForResources> | undefined;

/** Another try for the next one. */
function loadAgain(error: unknown): never {
  forResources = undefined;
  throw error;
}

async function loadForResources() {
  const [{ createHandlers }, { resourceType }, { createHostPool }] = await Promise.all([
    import("./core/handlers.js"),
    import("./core/registry.js"),
    import("./ssh/pool.js"),
  ]);
  return { createHandlers, resourceType, createHostPool };
}

async function handlers(type: string, environment: Omit<Environment, "openHost">): Promise<Handlers> {
  forResources ??= loadForResources().catch(loadAgain);
  const { createHandlers, resourceType } = await forResources;
  return createHandlers(resourceType(type), { ...environment, openHost: await opener(environment) });
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
  return askFunction(functionType(name), args, { ...environment, openHost: await opener(environment) });
}

/** All share one connection a host. */
async function opener({ namedHosts }: Pick<Environment, "namedHosts">): Promise<Environment["openHost"]> {
  forResources ??= loadForResources().catch(loadAgain);
  const { createHostPool } = await forResources;
  pool ??= createHostPool();
  const { get } = pool;
  return (host) => get(host, namedHosts?.());
}

const compose: Parts["compose"] = async (type, environment, ...declared) => {
  const [{ composeAs }, { componentType }] = await Promise.all([
    import("./core/component.js"),
    import("./core/registry.js"),
  ]);
  const openHost = await opener(environment);
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
