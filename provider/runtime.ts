/**
 * The only module that Pulumi's state names: the closure of a dynamic resource requires it by this path, so
 * `configure`, `handlers` and their signatures stay as they are for ever.
 */
import type * as pulumi from "@pulumi/pulumi";
import { namedHosts } from "./core/configuration.js";
import { createHandlers, type Environment } from "./core/handlers.js";
import { loadResourceType } from "./core/lazyRegistry.js";
import { cancelSignal } from "./pulumi/cancellation.js";
import { type DynamicProvider, toDynamicProvider } from "./pulumi/dynamicProvider.js";
import { connectEngineLog } from "./pulumi/engine.js";
import type { HostPool } from "./ssh/pool.js";
import type { NamedHosts } from "./ssh/types.js";

let environment: Environment | undefined;
let pool: HostPool | undefined;
const made = new Map<string, pulumi.dynamic.ResourceProvider>();
/** `lvm-nbd:hosts` of the stack, and what it says once it was read. */
let configured: string | undefined;
let hosts: NamedHosts | undefined;

/**
 * Takes the configuration of the stack, which Pulumi gives to each provider that it has made out of the state, before it asks that
 * for anything. It never fails, and nothing of it is later than its call: what is asked at the same time does not wait for it, nor
 * for its failure. A closure that an earlier version wrote does not call it, and stays in the state until its resource is updated or
 * made anew: until then a configured host is known to it only where a closure of now has called this before, in the same process.
 */
export async function configure({ config }: pulumi.dynamic.ConfigureRequest): Promise<void> {
  const text = config.get("lvm-nbd:hosts");
  if (text === configured) return;
  configured = text;
  hosts = undefined;
}

/** The handlers of a resource type for Pulumi's dynamic provider; one SSH pool for the whole process. */
export function handlers(type: string): pulumi.dynamic.ResourceProvider {
  environment ??= createEnvironment();
  const provider = made.get(type) ?? whenAsked(type, environment);
  made.set(type, provider);
  return provider;
}

/** What a type needs is loaded when it is first asked something. */
function whenAsked(type: string, ours: Environment): DynamicProvider {
  let loading: Promise<DynamicProvider> | undefined;
  const load = async () => toDynamicProvider(createHandlers(await loadResourceType(type), ours), ours.warn);
  // One for all: it knows what this run has made.
  const own = () => {
    loading ??= load().catch((error: unknown) => {
      loading = undefined;
      throw error;
    });
    return loading;
  };
  return {
    check: async (...asked) => (await own()).check(...asked),
    diff: async (...asked) => (await own()).diff(...asked),
    create: async (...asked) => (await own()).create(...asked),
    read: async (...asked) => (await own()).read(...asked),
    update: async (...asked) => (await own()).update(...asked),
    delete: async (...asked) => (await own()).delete(...asked),
  };
}

function createEnvironment(): Environment {
  endWithPulumi();
  const log = connectEngineLog(process.argv.at(-1));
  const named = () => {
    hosts ??= namedHosts(configured);
    return hosts;
  };
  return {
    openHost: async (host) => {
      // Not before a host is to be reached: ssh2 takes longer to load than all that a check needs.
      if (pool === undefined) {
        const { createHostPool } = await import("./ssh/pool.js");
        pool ??= createHostPool();
      }
      return pool.get(host, named());
    },
    namedHosts: named,
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
