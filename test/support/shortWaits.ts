/** For tests whose hosts are stand-ins on this machine: the provider's waits between two looks are a quarter as long. */
import type * as timers from "node:timers/promises";

/** `node:timers/promises` with short waits, for `vi.mock`. */
export function shortWaits(original: typeof timers): typeof timers {
  return {
    ...original,
    setTimeout: (milliseconds, value, options) =>
      original.setTimeout((milliseconds ?? 0) / 4, value, options),
  };
}
