/** One after the other: changes that the host would serialise anyway wait here, where no deadline is running yet. */

const queues = new WeakMap<object, Map<string, Promise<unknown>>>();

/** Runs the work when everything asked for earlier under the same owner and key has ended, well or not. */
export function serially<T>(owner: object, key: string, work: () => Promise<T>): Promise<T> {
  let keys = queues.get(owner);
  if (keys === undefined) {
    keys = new Map();
    queues.set(owner, keys);
  }
  const before = keys.get(key) ?? Promise.resolve();
  const mine = before.then(work, work);
  keys.set(key, mine);
  return mine;
}
