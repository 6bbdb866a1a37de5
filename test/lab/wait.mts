import { setTimeout as sleep } from "node:timers/promises";

/** How long to wait for a condition, how often to look, and what to say when it does not come true. */
export interface WaitOptions {
  timeoutSeconds: number;
  intervalMs?: number;
  /** What is waited for: "server1 to answer on SSH". */
  what: string;
  /** Adds context (the end of a log) to the error. */
  detail?: () => Promise<string>;
}

/**
 * Looks again and again until `look` returns something other than `undefined`, and returns that. An error
 * of `look` counts as "not yet" and is told when the time is up.
 */
export async function waitFor<T>(look: () => Promise<T | undefined>, options: WaitOptions): Promise<T> {
  const deadline = performance.now() + options.timeoutSeconds * 1000;
  let last: unknown;
  for (;;) {
    try {
      const found = await look();
      if (found !== undefined) return found;
    } catch (error) {
      if (error instanceof Fatal) throw error;
      last = error;
    }
    if (performance.now() >= deadline) break;
    await sleep(options.intervalMs ?? 200);
  }
  const parts = [`waited ${options.timeoutSeconds} s for ${options.what}, in vain`];
  if (last instanceof Error) parts.push(`last error: ${last.message}`);
  if (options.detail) parts.push(await options.detail());
  throw new Error(parts.join("\n"));
}

/** Thrown inside a `waitFor` to say that waiting longer is of no use. */
export class Fatal extends Error {
  override name = "Fatal";
}

/** "12.3 s" since a `performance.now()` reading. */
export function elapsed(since: number): string {
  return `${((performance.now() - since) / 1000).toFixed(1)} s`;
}
