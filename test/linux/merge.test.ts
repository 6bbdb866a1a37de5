import { describe, expect, it } from "vitest";
import { type LogicalVolume, parseLvs } from "../../provider/linux/lvm.js";
import { fillingSnapshots, leftBytes, mergePhase, mergePhrase } from "../../provider/linux/merge.js";
import { recordedLvs } from "../support/recorded.js";

const MiB = 1024 ** 2;

function recorded(state: Parameters<typeof recordedLvs>[0], name: string): LogicalVolume {
  const found = parseLvs(recordedLvs(state)).find((lv) => lv.name === name);
  if (found === undefined) throw new Error(`no ${name} in ${state}`);
  return found;
}

describe("the recorded report", () => {
  it("of a COW merge under way tells that, and what is left", () => {
    const snapshot = recorded("mergeRunning", "s");
    expect(snapshot).toMatchObject({ kind: "cow", merging: true });
    expect(mergePhase(snapshot, recorded("mergeRunning", "o"))).toBe("merging");
    expect(leftBytes(snapshot)).toBe(Math.round(48 * MiB * 0.6693));
  });

  it("of a COW merge whose origin is open tells that it waits", () => {
    expect(mergePhase(recorded("merging", "vm1-snap"), recorded("merging", "vm1"))).toBe("scheduled");
  });

  it("of a thin merge whose origin is mounted tells that it waits, though the origin's row says nothing of a merge", () => {
    const snapshot = recorded("thinMergeScheduled", "ts");
    const origin = recorded("thinMergeScheduled", "t");
    expect(snapshot).toMatchObject({ kind: "thin", merging: true, active: false, originUuid: origin.uuid });
    expect(origin).toMatchObject({ merging: false, attr: expect.stringMatching(/^O/), kind: "thin" });
    expect(mergePhase(snapshot, origin)).toBe("scheduled");
  });
});

describe("other COW snapshots of the origin", () => {
  const origin = recorded("valid", "vm1");
  // 48 MiB, half of it full.
  const snapshot: LogicalVolume = {
    ...recorded("valid", "vm1-snap"),
    ...{ uuid: "merged", sizeBytes: 48 * MiB, usedPercent: 50, createdAt: 1000 },
  };
  const other = (more: Partial<LogicalVolume>): LogicalVolume => ({
    ...snapshot,
    ...{ uuid: "other", name: "other", sizeBytes: 32 * MiB, usedPercent: 0, createdAt: 2000 },
    ...more,
  });
  const filling = (more: Partial<LogicalVolume>) =>
    fillingSnapshots([origin, snapshot, other(more)], snapshot, origin);

  it("with room for all that the merge writes are not named", () => {
    expect(filling({})).toEqual([]);
  });

  it("that may overflow are named with what is free", () => {
    expect(filling({ usedPercent: 50 })).toEqual([{ name: "other", freeBytes: 16 * MiB, overflows: false }]);
  });

  it("that surely overflow are told apart: their whole store is smaller than what is written", () => {
    expect(filling({ sizeBytes: 8 * MiB })).toEqual([{ name: "other", freeBytes: 8 * MiB, overflows: true }]);
  });

  it.each([
    ["are older have kept those chunks already", { sizeBytes: 8 * MiB, createdAt: 999 }],
    ["have overflowed have nothing to lose", { sizeBytes: 8 * MiB, invalid: true }],
    ["are of another origin are not written to", { sizeBytes: 8 * MiB, originUuid: "another" }],
    ["are thin have no store", { sizeBytes: 8 * MiB, kind: "thin" as const }],
  ])("that %s", (_why, more) => {
    expect(filling(more)).toEqual([]);
  });

  it("are not filled by a thin merge", () => {
    expect(fillingSnapshots([other({ sizeBytes: MiB })], { ...snapshot, kind: "thin" }, origin)).toEqual([]);
  });
});

describe("progress", () => {
  it("is told with rate and time", () => {
    expect(mergePhrase({ at: 100, leftBytes: 100 * MiB }, { at: 110, leftBytes: 75 * MiB })).toBe(
      "25 % merged, 75 MiB left at 2.5 MiB/s, about 30 s",
    );
  });

  it("promises no time while nothing has moved", () => {
    const first = { at: 100, leftBytes: 100 * MiB };
    expect(mergePhrase(first, first)).toBe("0 % merged, 100 MiB left");
    expect(mergePhrase({ at: 1, leftBytes: 0 }, { at: 2, leftBytes: 0 })).toBe("100 % merged, 0 B left");
  });
});
