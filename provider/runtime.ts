/**
 * The only module that Pulumi's state names: the closure of a dynamic resource requires it by this path, so
 * `handlers` and its signature stay as they are for ever.
 */
import type * as pulumi from "@pulumi/pulumi";
import { createHandlers, type Environment, type Handlers } from "./core/handlers.js";
import { resourceType } from "./core/registry.js";
import { cancelSignal } from "./pulumi/cancellation.js";
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
    provider = toDynamicProvider(own, environment.warn);
    made.set(type, provider);
  }
  return provider;
}

function createEnvironment(): Environment {
  endWithPulumi();
  const pool = createHostPool();
  const log = connectEngineLog(process.argv.at(-1));
  return {
    openHost: (host) => pool.get(host),
    progress: log.progress,
    warn: log.warn,
    signal: cancelSignal(),
  };
}

/**
 * Pulumi's engine reads this process's stderr. Where that is gone (Pulumi was killed alone), the SDK prints the
 * failure to print, for ever, on a full CPU: end instead. What runs on a host is found by the next `up`.
 */
function endWithPulumi(): void {
  process.stderr.on("error", () => process.exit(1));
}
