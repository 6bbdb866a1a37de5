/** Leaving what others wait for as well. */
import { LvmNbdError } from "./errors.js";

/** The promise, or CANCELLED at once for who is cancelled, who leaves the work to the others. */
export function unlessCancelled<T>(
  promise: Promise<T>,
  signal: AbortSignal | undefined,
  host: string,
): Promise<T> {
  if (signal === undefined) return promise;
  return new Promise((resolve, reject) => {
    const cancelled = () =>
      reject(new LvmNbdError("CANCELLED", { host, message: "cancelled before it began" }));
    if (signal.aborted) cancelled();
    signal.addEventListener("abort", cancelled);
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", cancelled));
  });
}
