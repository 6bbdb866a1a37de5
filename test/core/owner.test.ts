import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  generationMark,
  isOfAnotherGeneration,
  markAmong,
  ownerMark,
  ownerOf,
  ownerOfMark,
  userTags,
} from "../../provider/core/owner.js";
import { tagProblem } from "../../provider/linux/lvm.js";

describe("owner mark", () => {
  it("is a tag that LVM takes, whatever the names hold", () => {
    fc.assert(
      fc.property(fc.string({ unit: "grapheme" }), (name) => {
        const mark = ownerMark(ownerOf("org", "project", "stack", name));
        expect(tagProblem(mark)).toBeUndefined();
        expect(mark.length).toBeLessThanOrEqual(120);
      }),
    );
  });

  it("names its owner for people", () => {
    fc.assert(
      fc.property(fc.string({ unit: "binary", maxLength: 5 }), (name) => {
        expect(ownerOfMark(ownerMark(`o/p/s/${name}`))).toBe(`o/p/s/${name}`);
      }),
    );
  });

  it("differs for long owners that begin alike", () => {
    const long = "x".repeat(200);
    expect(ownerMark(`${long}a`)).not.toBe(ownerMark(`${long}b`));
  });

  it("stays what it is where it is given as it was seen, also a shortened one", () => {
    fc.assert(
      fc.property(fc.string({ unit: "grapheme", maxLength: 200 }), (name) => {
        const mark = ownerMark(`o/p/s/${name}`);
        expect(ownerMark(mark)).toBe(mark);
      }),
    );
  });

  it("is found among the tags and kept apart from the user's", () => {
    const mark = ownerMark("o/p/s/vm1");
    expect(markAmong(["a", mark, "b"])).toBe(mark);
    expect(markAmong(["a"])).toBeUndefined();
    expect(userTags(["b", mark, generationMark([1]), "a"])).toEqual(["a", "b"]);
  });
});

describe("generation mark", () => {
  it("tells another declared moment, but takes a lost mark for none", () => {
    const now = generationMark(["vm1", 65536, ["monday"]]);
    expect(isOfAnotherGeneration([generationMark(["vm1", 65536, ["sunday"]])], now)).toBe(true);
    expect(isOfAnotherGeneration([now], now)).toBe(false);
    expect(isOfAnotherGeneration(["other"], now)).toBe(false);
  });
});
