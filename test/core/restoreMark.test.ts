import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { ownerInTag, tagPrefix, userTags } from "../../provider/core/owner.js";
import {
  imageOfRestore,
  isRestoreOf,
  ownerOfRestore,
  restoreGeneration,
  restoreMarksAmong,
  restoreTagOf,
  restoreTagParts,
} from "../../provider/core/restoreMark.js";
import { tagProblem } from "../../provider/linux/lvm.js";

const told = {
  generation: restoreGeneration(["monday"]),
  life: "0123abcd",
  source: "mFPTPy-HFZm-HexA-3aO9-JBDR-mKUZ-V2dcWb",
  owner: ownerInTag("o/p/s/vm1"),
  startedAt: 1_795_694_259,
};
const stages = [
  { ...told, stage: "begun", seconds: 0, thinId: 7 },
  { ...told, stage: "merging", seconds: 0, thinId: 0 },
  { ...told, stage: "restored", seconds: 61, thinId: 0 },
  { ...told, stage: "writing", seconds: 0, thinId: 0, source: "0f".repeat(32) },
] as const;

describe("the mark of a restore", () => {
  it.each(stages)("of the stage $stage comes out of its tag as it went in", (mark) => {
    const tag = restoreTagOf(mark);
    expect(restoreMarksAmong(["other", tag])).toEqual([{ ...mark, tag }]);
    const { head, tail } = restoreTagParts(mark);
    expect(tag.startsWith(head) && tag.endsWith(`:${tail}`)).toBe(true);
    expect(userTags([tag])).toEqual([]);
  });

  it("is a tag that LVM takes, and its owner's, whatever the names hold", () => {
    fc.assert(
      fc.property(fc.string({ unit: "grapheme" }), (name) => {
        const owner = `organization/project/stack/${name}`;
        const tag = restoreTagOf({ ...stages[3], owner: ownerInTag(owner) });
        expect(tagProblem(tag)).toBeUndefined();
        expect(tag.length).toBeLessThanOrEqual(240);
        const [mark] = restoreMarksAmong([tag]);
        expect(mark && isRestoreOf(mark, owner)).toBe(true);
        expect(mark && isRestoreOf(mark, `${owner}x`)).toBe(false);
      }),
    );
  });

  it("tells an image from a snapshot", () => {
    expect(imageOfRestore(stages[3])).toBe("0f".repeat(32));
    expect(imageOfRestore(stages[2])).toBeUndefined();
  });

  it("names its owner for people", () => {
    const [mark] = restoreMarksAmong([restoreTagOf({ ...stages[1], owner: ownerInTag("o/p/s/vm 1") })]);
    expect(mark && ownerOfRestore(mark)).toBe("o/p/s/vm 1");
  });

  it.each(["restore=", "restore=x:y:z", "owner=o/p/s/vm1", "restoring=0123abcd"])(
    "is not taken from the tag %s",
    (rest) => {
      expect(restoreMarksAmong([tagPrefix + rest])).toEqual([]);
    },
  );

  it("tells other triggers", () => {
    expect(restoreGeneration(["monday"])).toBe(told.generation);
    expect(restoreGeneration(["tuesday"])).not.toBe(told.generation);
    expect(restoreGeneration(["1"])).not.toBe(restoreGeneration([1]));
  });
});
