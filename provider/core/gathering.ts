/** What several want to know of a host at about the same time goes by one command: that of all who came while the one before ran. */
import { setImmediate } from "node:timers/promises";
import { unlessCancelled } from "./cancel.js";
import { serially } from "./serial.js";

/** How things of a kind are looked at. */
export interface Looks<Answer> {
  /** At one that nobody else asks beside, if that is another look. */
  readonly alone?: () => Promise<Answer>;
  /** At several. What is missing in the answer could not be told, or not in time. */
  readonly together: (items: readonly string[], signal: AbortSignal) => Promise<ReadonlyMap<string, Answer>>;
  /** So many at once. */
  readonly most: number;
}

interface Batch<Answer> {
  /** How each is looked at alone, and who asks for it. */
  readonly items: Map<string, { readonly alone: Looks<Answer>["alone"]; askers: number }>;
  readonly answer: Promise<ReadonlyMap<string, Answer>>;
  readonly stop: AbortController;
  askers: number;
  begun: boolean;
}

/** What is asked of the owners under the keys of one kind. */
export class Gathering<Answer> {
  readonly #waiting = new WeakMap<object, Map<string, Batch<Answer>>>();

  /**
   * The look at the item begins after this. It is stopped when all who wait for it were cancelled. Raises what the look does, and
   * CANCELLED for who is.
   */
  async ask(
    owner: { readonly name: string },
    key: string,
    item: string,
    looks: Looks<Answer>,
    signal: AbortSignal,
  ): Promise<Answer | undefined> {
    const batches = this.#waiting.get(owner) ?? new Map<string, Batch<Answer>>();
    this.#waiting.set(owner, batches);
    let batch = batches.get(key);
    if (batch === undefined || (batch.items.size >= looks.most && !batch.items.has(item))) {
      batch = begin(owner, key, looks, batches);
      batches.set(key, batch);
    }
    const asked = batch.items.get(item) ?? { alone: looks.alone, askers: 0 };
    batch.items.set(item, asked);
    asked.askers++;
    batch.askers++;
    try {
      return (await unlessCancelled(batch.answer, signal, owner.name)).get(item);
    } finally {
      batch.askers--;
      asked.askers--;
      // While it has not begun. What is to be changed is not changed for nobody.
      if (asked.askers === 0 && signal.aborted && !batch.begun) batch.items.delete(item);
      if (batch.askers === 0 && signal.aborted) {
        batch.stop.abort();
        if (batches.get(key) === batch) batches.delete(key);
      }
    }
  }
}

function begin<Answer>(
  owner: object,
  key: string,
  { together }: Pick<Looks<Answer>, "together">,
  batches: Map<string, Batch<Answer>>,
): Batch<Answer> {
  const items: Batch<Answer>["items"] = new Map();
  const stop = new AbortController();
  const answer = serially(owner, key, async () => {
    // All who were waiting for the same thing ask in this turn.
    await setImmediate();
    if (batches.get(key) === batch) batches.delete(key);
    batch.begun = true;
    stop.signal.throwIfAborted();
    const [only, another] = items;
    const alone = another === undefined ? only?.[1].alone : undefined;
    if (only !== undefined && alone !== undefined) return new Map([[only[0], await alone()]]);
    return together([...items.keys()], stop.signal);
  });
  const batch: Batch<Answer> = { items, answer, stop, askers: 0, begun: false };
  answer.catch(() => {
    // Told to all who wait for it; those who were cancelled want to know nothing.
  });
  return batch;
}
