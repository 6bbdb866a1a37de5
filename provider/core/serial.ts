/** So many at once, the others in turn: what the host would serialise, or be slowed down by, waits here, where no deadline is running yet. */

/** Does works; those that find no place wait for it in the order in which they came. */
export type Queue = <T>(work: () => Promise<T>) => Promise<T>;

/** With so many places. */
export function queueOf(most: number): Queue {
  let busy = 0;
  const waiting: (() => void)[] = [];
  return async (work) => {
    if (busy >= most) await new Promise<void>((resolve) => waiting.push(resolve));
    else busy++;
    try {
      return await work();
    } finally {
      // Whoever waits longest takes over the place.
      const next = waiting.shift();
      if (next === undefined) busy--;
      else next();
    }
  };
}

const queues = new WeakMap<object, Map<string, Queue>>();

/** Runs the work in one of the places that all have under the same owner and key. */
export function atMost<T>(owner: object, key: string, most: number, work: () => Promise<T>): Promise<T> {
  const keys = queues.get(owner) ?? new Map<string, Queue>();
  queues.set(owner, keys);
  const queue = keys.get(key) ?? queueOf(most);
  keys.set(key, queue);
  return queue(work);
}

/** Runs the work when everything asked for earlier under the same owner and key has ended, well or not. */
export function serially<T>(owner: object, key: string, work: () => Promise<T>): Promise<T> {
  return atMost(owner, key, 1, work);
}
