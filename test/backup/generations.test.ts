import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { generations, type RetentionPolicy } from "../../provider/backup/generations.js";

const dayMs = 24 * 3600 * 1000;
/** A time of the night after that many days from Thursday, 2026-01-01. */
const night = (day: number, hour = 1) => new Date(2026, 0, 1 + day, hour);
const key = (day: number) => new Date(Date.UTC(2026, 0, 1) + day * dayMs).toISOString().slice(0, 10);

/** Nightly runs on those days; returns what exists after each. */
function nights(policy: RetentionPolicy, days: readonly number[]): string[][] {
  let made: string[] = [];
  return days.map((day) => {
    made = generations(policy, night(day), made);
    return made;
  });
}

const range = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, index) => from + index);

describe("the generations that should exist", () => {
  it("are today's alone at first", () => {
    expect(generations({ daily: 7 }, night(0), [])).toEqual(["2026-01-01"]);
  });

  it("over thirty nights are exactly the last seven days", () => {
    const seen = nights({ daily: 7 }, range(0, 29));
    for (const [day, keys] of seen.entries())
      expect(keys).toEqual(
        range(Math.max(0, day - 6), day)
          .reverse()
          .map(key),
      );
  });

  it("over thirty nights are exactly the declared days and weeks", () => {
    const seen = nights({ daily: 3, weekly: 3 }, range(0, 29));
    // 2026-01-01 is a Thursday: Sundays are the days 3, 10, 17, 24.
    const sundays = [3, 10, 17, 24];
    for (const [day, keys] of seen.entries()) {
      const weeks = [day, ...sundays.filter((sunday) => sunday < day).reverse()].slice(0, 3);
      const last = range(Math.max(0, day - 2), day);
      const wanted = [...new Set([...weeks, ...last])].sort((one, other) => other - one);
      // A week whose Sunday is the last one before is this week's no more.
      expect(keys, key(day)).toEqual(wanted.map(key));
    }
  });

  it("over two years are months and years by their last day", () => {
    const seen = nights({ monthly: 12, yearly: 2 }, range(0, 729)).at(-1);
    expect(seen).toHaveLength(13);
    expect(seen?.slice(0, 3)).toEqual(["2027-12-31", "2027-11-30", "2027-10-31"]);
    expect(seen?.at(-1)).toBe("2026-12-31");
  });

  it("are the same in a second run of the day", () => {
    const once = generations({ daily: 3, weekly: 2 }, night(20), range(0, 19).map(key));
    expect(generations({ daily: 3, weekly: 2 }, night(20, 23), once)).toEqual(once);
  });

  it("after a week of silence are as many as before, and none is made up for it", () => {
    const before = nights({ daily: 7 }, range(0, 9)).at(-1) ?? [];
    expect(generations({ daily: 7 }, night(17), before)).toEqual([17, 9, 8, 7, 6, 5, 4].map(key));
  });

  it("of a run late at night are those of its day", () => {
    expect(generations({ daily: 1 }, new Date(2026, 0, 1, 23, 59, 59), [])).toEqual(["2026-01-01"]);
    expect(generations({ daily: 1 }, new Date(2026, 0, 2, 0, 0, 1), [])).toEqual(["2026-01-02"]);
  });

  it("keep what a wrong clock has dated into the future", () => {
    expect(generations({ daily: 2 }, night(5), [key(90), key(4), key(3)])).toEqual([90, 5, 4].map(key));
  });

  it.each([
    [{}, /keeps nothing/],
    [{ daily: 0 }, /keeps nothing/],
    [{ daily: -1 }, /daily: -1 must be/],
    [{ weekly: 1.5 }, /weekly: 1.5 must be/],
    [{ hourly: 3 } as RetentionPolicy, /"hourly" is no period/],
  ])("are refused for a policy of %j", (policy, message) => {
    expect(() => generations(policy, night(0), [])).toThrow(message);
  });

  it.each(["2026-1-1", "2026-02-30", "monday", ""])("are refused with the key %j", (wrong) => {
    expect(() => generations({ daily: 1 }, night(0), [wrong])).toThrow(/is no generation's key/);
  });

  it("whatever was made: hold today's, nothing that was not made, and every period's newest", () => {
    const counts = fc.integer({ min: 0, max: 5 });
    const policies = fc
      .record({ daily: counts, weekly: counts, monthly: counts, yearly: counts })
      .filter((policy) => Object.values(policy).some((count) => count > 0));
    fc.assert(
      fc.property(policies, fc.uniqueArray(fc.integer({ min: 0, max: 900 })), (policy, days) => {
        const made = days.map(key);
        const keys = generations(policy, night(900), made);
        expect(keys[0]).toBe(key(900));
        for (const one of keys.slice(1)) expect(made).toContain(one);
        const total = Object.values(policy).reduce((sum, count) => sum + count, 0);
        expect(keys.length).toBeLessThanOrEqual(total);
        // A run later that day removes nothing more.
        expect(generations(policy, night(900, 5), keys)).toEqual(keys);
        // The newest one that exists goes only when today's takes its place in every period that keeps it.
        const newest = [...made].sort().at(-1);
        const counted = Math.max(...Object.values(policy));
        if (newest !== undefined && counted > 1 && policy.daily > 1) expect(keys).toContain(newest);
      }),
    );
  });
});
