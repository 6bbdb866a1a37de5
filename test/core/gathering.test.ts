import { expect, it } from "vitest";
import { Gathering } from "../../provider/core/gathering.js";

/** A host of which looks end when a test says so. */
function asked(most = 10) {
  const owner = { name: "server1" };
  const gathering = new Gathering<string>();
  const looks: {
    readonly items: readonly string[];
    readonly signal: AbortSignal | undefined;
    end(left?: string | Error): void;
  }[] = [];
  const look = (items: readonly string[], signal?: AbortSignal) =>
    new Promise<ReadonlyMap<string, string>>((resolve, reject) => {
      const end = (left?: string | Error) =>
        left instanceof Error
          ? reject(left)
          : resolve(new Map(items.filter((item) => item !== left).map((item) => [item, `seen ${item}`])));
      looks.push({ items, signal, end });
    });
  const ask = (item: string, signal = new AbortController().signal) => {
    const alone = async () => (await look([item])).get(item) ?? "";
    return gathering.ask(owner, "units", item, { alone, together: look, most }, signal);
  };
  return { ask, looks };
}

async function settled(): Promise<void> {
  for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setImmediate(resolve));
}

it("those who ask while one is looked at are looked at together, after they asked", async () => {
  const { ask, looks } = asked();
  const first = ask("a");
  await settled();
  const others = [ask("b"), ask("c"), ask("b"), ask("a")];
  await settled();
  expect(looks.map(({ items }) => items)).toEqual([["a"]]);
  looks[0]?.end();
  expect(await first).toBe("seen a");
  await settled();
  expect(looks.map(({ items }) => items)).toEqual([["a"], ["b", "c", "a"]]);
  looks[1]?.end("c");
  expect(await Promise.all(others)).toEqual(["seen b", undefined, "seen b", "seen a"]);
});

it("no command looks at more than it may, and what fails fails for those of that look alone", async () => {
  const { ask, looks } = asked(2);
  const answers = ["a", "b", "c", "d", "e"].map((item) => ask(item).catch((error: Error) => error.message));
  for (let at = 0; at < 3; at++) {
    await settled();
    looks[at]?.end(at === 1 ? new Error("the link was lost") : undefined);
  }
  expect(await Promise.all(answers)).toEqual([
    ...["seen a", "seen b", "the link was lost", "the link was lost", "seen e"],
  ]);
  expect(looks.map(({ items }) => items.length)).toEqual([2, 2, 1]);
});

it("who is cancelled leaves the look to the others; it is stopped with the last, and the next ones have another", async () => {
  const { ask, looks } = asked();
  const [one, other] = [new AbortController(), new AbortController()];
  const answers = [ask("a", one.signal), ask("b", other.signal)].map((answer) =>
    answer.catch((error: Error) => error.message),
  );
  await settled();
  one.abort();
  expect(await answers[0]).toContain("cancelled");
  expect(looks[0]?.signal?.aborted).toBe(false);
  other.abort();
  expect(await answers[1]).toContain("cancelled");
  expect(looks[0]?.signal?.aborted).toBe(true);
  const next = ask("c");
  looks[0]?.end(new Error("stopped"));
  await settled();
  looks[1]?.end();
  expect(await next).toBe("seen c");
});

it("what was cancelled before its look began is not looked at", async () => {
  const { ask, looks } = asked();
  const first = ask("a");
  await settled();
  const cancelled = new AbortController();
  const second = ask("b", cancelled.signal).catch((error: Error) => error.message);
  await settled();
  cancelled.abort();
  expect(await second).toContain("cancelled");
  looks[0]?.end();
  expect(await first).toBe("seen a");
  await settled();
  expect(looks).toHaveLength(1);
});

it("nor is it where others, for whom there was no room, wait behind it", async () => {
  const { ask, looks } = asked(2);
  const first = ask("a");
  await settled();
  const cancelled = new AbortController();
  const second = ask("b", cancelled.signal).catch((error: Error) => error.message);
  const others = [ask("c"), ask("d")];
  cancelled.abort();
  expect(await second).toContain("cancelled");
  for (let at = 0; at < 3; at++) {
    looks[at]?.end();
    await settled();
  }
  expect(await Promise.all([first, ...others])).toEqual(["seen a", "seen c", "seen d"]);
  expect(looks.map(({ items }) => items)).toEqual([["a"], ["c"], ["d"]]);
});
