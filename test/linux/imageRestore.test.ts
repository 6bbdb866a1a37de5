import { describe, expect, it } from "vitest";
import { deviceJob } from "../../provider/linux/deviceCopy.js";
import {
  filledSnapshots,
  imageRestoreArguments,
  poolNeed,
  restoreJob,
} from "../../provider/linux/imageRestore.js";
import { type LogicalVolume, parseLvs } from "../../provider/linux/lvm.js";
import { recordedLvs } from "../support/recorded.js";

const MiB = 1024 ** 2;
const volume = (
  state: Parameters<typeof recordedLvs>[0],
  name: string,
  more: Partial<LogicalVolume> = {},
): LogicalVolume => {
  const found = parseLvs(recordedLvs(state)).find((lv) => lv.name === name);
  if (found === undefined) throw new Error(`no ${name}`);
  return { ...found, ...more };
};
const origin = volume("valid", "vm1");

it("a job follows from the volume's UUID, whatever the volume is called, and is none of a copy's", () => {
  expect(restoreJob(origin.uuid).unit).toMatch(/^lvm-nbd-restore-[0-9a-f]{16}\.service$/);
  expect(restoreJob(origin.uuid)).not.toEqual(restoreJob(`${origin.uuid}x`));
  expect(restoreJob(origin.path).unit).not.toBe(deviceJob(origin.path).unit);
});

it("earlier marks are taken away together with its own first one", () => {
  const plan = {
    uri: "nbd://a/b",
    connections: 4,
    bandwidthLimit: undefined,
    verify: false,
    rest: "keep",
    expected: "abc",
  } as const;
  const marks = { begun: "B", writing: "W", head: "H", tail: "T", startedAt: 7, earlier: ["X", "Y"] };
  const args = imageRestoreArguments(restoreJob(origin.uuid), origin, plan, marks);
  expect(args.slice(7)).toEqual([
    ...["abc", "VgVm", "vm1", origin.uuid, "B", "W", "H", "T", "7", "--deltag X --deltag Y"],
  ]);
});

describe("a COW snapshot of the volume", () => {
  const store = (more: Partial<LogicalVolume>) => volume("valid", "vm1-snap", { usedPercent: 50, ...more });
  it.each([
    ["overflows whose free store is smaller than the image", { sizeBytes: 8 * MiB }, 5, true],
    ["holds what its free store has room for", { sizeBytes: 8 * MiB }, 4, false],
    ["holds all where its store is as large as the origin", { sizeBytes: origin.sizeBytes }, 60, false],
  ])("%s", (_what, more, image, overflows) => {
    const [filled] = filledSnapshots([origin, store(more)], origin, image * MiB);
    expect(filled).toEqual({ name: "vm1-snap", freeBytes: (more.sizeBytes ?? 0) / 2, overflows });
  });

  it("does not count where it is lost already, nor one of another volume", () => {
    const all = [store({ invalid: true }), store({ originUuid: "another" })];
    expect(filledSnapshots(all, origin, 64 * MiB)).toEqual([]);
  });
});

describe("a thin volume needs of its pool", () => {
  const thin = volume("thin", "thin1", { sizeBytes: 100 * MiB, usedPercent: 30 });
  const snapshot = volume("thin", "thin1-snap");
  it.each([
    ["what it has not yet", [thin], 70],
    ["everything, where a snapshot shares what it has", [thin, snapshot], 100],
    ["what it has not yet, where others' snapshots are", [thin, { ...snapshot, originUuid: "another" }], 70],
  ])("%s", (_what, all, expected) => {
    expect(poolNeed(all, thin, 100 * MiB)).toBe(expected * MiB);
  });
});
