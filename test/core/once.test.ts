import { expect, it } from "vitest";
import { once } from "../../provider/core/once.js";

it("what is needed by several is made once, and again only after it failed", async () => {
  let tries = 0;
  const made = once(async () => {
    tries++;
    if (tries === 1) throw new Error("no file descriptor is left");
    return { tries };
  });
  expect(tries).toBe(0);
  const [one, other] = await Promise.allSettled([made(), made()]);
  expect([one.status, other.status, tries]).toEqual(["rejected", "rejected", 1]);
  const [first, second] = await Promise.all([made(), made()]);
  expect(first).toEqual({ tries: 2 });
  expect(second).toBe(first);
  expect(await made()).toBe(first);
});
