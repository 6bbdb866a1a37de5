import { expect, it } from "vitest";
import { atMost, serially } from "../../provider/core/serial.js";

it("runs work of one key in the order asked for, also after a failure", async () => {
  const host = {};
  const log: string[] = [];
  let release: () => void = () => undefined;
  const gate = new Promise<void>((resolve) => {
    release = resolve;
  });
  const first = serially(host, "VgVm", async () => {
    await gate;
    log.push("first");
    throw new Error("failed");
  });
  const second = serially(host, "VgVm", async () => log.push("second"));
  await serially(host, "Other", async () => log.push("other key"));
  await serially({}, "VgVm", async () => log.push("other host"));
  release();
  await expect(first).rejects.toThrow("failed");
  await second;
  expect(log).toEqual(["other key", "other host", "first", "second"]);
});

it("runs so many at once, and those that wait in the order in which they came", async () => {
  const host = {};
  const begun: number[] = [];
  const ends: (() => void)[] = [];
  const works = [1, 2, 3, 4].map((n) =>
    atMost(host, "units", 2, async () => {
      begun.push(n);
      await new Promise<void>((resolve) => ends.push(resolve));
      if (n === 1) throw new Error("failed");
    }).catch(String),
  );
  const turn = () => new Promise((resolve) => setImmediate(resolve));
  await turn();
  expect(begun).toEqual([1, 2]);
  ends[0]?.();
  await turn();
  expect(begun).toEqual([1, 2, 3]);
  ends[2]?.();
  await turn();
  for (const end of ends) end();
  expect(await Promise.all(works)).toEqual(["Error: failed", undefined, undefined, undefined]);
  expect(begun).toEqual([1, 2, 3, 4]);
});
