/** Where an operation runs. */
import type { Host, HostArgs } from "../ssh/types.js";
import { isLvmNbdError, printable } from "./errors.js";
import type { Environment } from "./handlers.js";
import type { Context } from "./resource.js";
import { sharingLooks } from "./sharedLooks.js";

/**
 * The context on a host. `resource`: on whose behalf, for messages. `recentSeconds`: see `Context`. Raises what opening a host
 * raises.
 */
export async function contextOn(
  environment: Environment,
  args: HostArgs,
  resource: string,
  recentSeconds = 0,
): Promise<Context> {
  const open = async (asked: HostArgs): Promise<Host> => {
    try {
      return sharingLooks(await environment.openHost(asked));
    } catch (error) {
      throw named(error, resource);
    }
  };
  const host = await open(args);
  return {
    host,
    namedHosts: environment.namedHosts?.(),
    resource,
    recentSeconds,
    signal: environment.signal,
    // A message may hold what a host wrote, e.g. the owner named in a tag.
    progress: (message) => environment.progress(printable(`${resource} on ${host.name}: ${message}`)),
    warn: (message) => environment.warn(printable(`${resource} on ${host.name}: ${message}`)),
    open,
  };
}

/** The failure as one of that resource's, where it does not say yet whose it is. */
export function named(error: unknown, resource: string): unknown {
  return isLvmNbdError(error) ? error.with({ resource }) : error;
}
