/** Following work that goes on by itself on a host, whatever becomes of the link to it. */
import { setTimeout as delay } from "node:timers/promises";
import { isLvmNbdError, LvmNbdError } from "./errors.js";
import type { Context } from "./resource.js";

/** How long a host that does not answer is waited for. */
const patienceSeconds = 300;

/** Looks, and again while the host does not answer. `work`: what goes on there meanwhile, e.g. "the merge". */
export async function lookPatiently<T>(context: Context, work: string, look: () => Promise<T>): Promise<T> {
  const since = performance.now();
  for (let wait = 1; ; wait = Math.min(wait * 2, 8)) {
    try {
      return await look();
    } catch (error) {
      if (!isLvmNbdError(error, "HOST_UNREACHABLE", "LINK_LOST", "COMMAND_TIMED_OUT")) throw error;
      const seconds = Math.round((performance.now() - since) / 1000);
      if (seconds > patienceSeconds) throw error;
      context.progress(`the host has not answered for ${seconds} s; ${work} goes on there`);
    }
    await pause(context, wait, `${work} was followed`);
  }
}

/** Waits; raises CANCELLED at once when the operation is cancelled. `meanwhile`: e.g. "the merge was followed". */
export async function pause(context: Context, seconds: number, meanwhile: string): Promise<void> {
  try {
    await delay(seconds * 1000, undefined, { signal: context.signal });
  } catch (cause) {
    throw new LvmNbdError("CANCELLED", {
      message: `cancelled while ${meanwhile}`,
      host: context.host.name,
      resource: context.resource,
      cause,
    });
  }
}
