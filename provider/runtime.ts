/**
 * The only module that Pulumi's state names: the closure of a dynamic resource requires it by this path, so
 * `handlers` and its signature stay as they are for ever.
 */
import type * as pulumi from "@pulumi/pulumi";
import { createHandlers, type Environment, type Handlers } from "./core/handlers.js";
import { resourceType } from "./core/registry.js";
import { toDynamicProvider } from "./pulumi/dynamicProvider.js";
import { connectEngineLog } from "./pulumi/engine.js";
import { createHostPool } from "./ssh/pool.js";

let environment: Environment | undefined;
const made = new Map<string, pulumi.dynamic.ResourceProvider>();

/** The handlers of a resource type for Pulumi's dynamic provider; one SSH pool for the whole process. */
export function handlers(type: string): pulumi.dynamic.ResourceProvider {
  let provider = made.get(type);
  if (provider === undefined) {
    environment ??= createEnvironment();
    const own: Handlers = createHandlers(resourceType(type), environment);
    provider = toDynamicProvider(own);
    made.set(type, provider);
  }
  return provider;
}

function createEnvironment(): Environment {
  const pool = createHostPool();
  const log = connectEngineLog(process.argv.at(-1));
  return {
    openHost: (host) => pool.get(host),
    progress: log.progress,
    warn: log.warn,
    signal: new AbortController().signal,
  };
}
