import { describe, expect, it } from "vitest";
import {
  type CopyFacts,
  copyIdAmong,
  copyTags,
  createVolumeCommand,
  extentsFor,
  factsAmong,
  isAsTagged,
  outdatedTags,
  ownTags,
  parseRoom,
  partOf,
  runTagAmong,
  runTagOf,
} from "../../provider/linux/copiedVolume.js";
import { logicalVolumeNameProblem, lvmFailure, parseLvs } from "../../provider/linux/lvm.js";
import { recordedLvs } from "../support/recorded.js";

const facts: CopyFacts = {
  ...{
    uuid: "oYVrrQ-Pivh-Kpzb-QsJG-6oat-Vogn-fHSuRv",
    volumeGroup: "VgVm",
    volumeBytes: 12_582_912,
    sizeBytes: 10_001_000,
  },
  ...{ sha256: "d".repeat(64), verified: true, seconds: 12, completedAt: 1_795_000_000 },
  ...{ snapshotUuid: "ua3XsD-JfZg-sm4f-mixX-TEqj-5JCI-nnYZE4", takenAt: 1_794_000_000, readOnly: 1 },
};

it("an unfinished copy's name follows from the volume's, and is one that LVM takes", () => {
  const part = partOf({ volumeGroup: "VgVm", name: "vm1" });
  expect(part).toEqual({ volumeGroup: "VgVm", name: expect.stringMatching(/^lvmnbd-part-[0-9a-f]{16}$/) });
  expect(partOf({ volumeGroup: "VgVm", name: "vm1" })).toEqual(part);
  expect(partOf({ volumeGroup: "VgVm", name: "vm2" })).not.toEqual(part);
  expect(partOf({ volumeGroup: "VgOther", name: "vm1" }).name).not.toBe(part.name);
  expect(logicalVolumeNameProblem(part.name)).toBeUndefined();
});

it("a volume is made of whole extents, and LVM is left nothing to ask or to wipe", () => {
  expect(createVolumeCommand({ volumeGroup: "VgVm", name: "part" }, 3, ["a=1", "b=2"]).join(" ")).toBe(
    "lvcreate -y -Wn -Zn -ay -l 3 -n part --addtag a=1 --addtag b=2 VgVm",
  );
});

it.each([
  [1, 1],
  [4 * 1024 ** 2, 1],
  [4 * 1024 ** 2 + 1, 2],
])("%d bytes take %d extents of 4 MiB", (bytes, extents) => {
  expect(extentsFor(bytes, 4 * 1024 ** 2)).toBe(extents);
});

describe("the room in a group", () => {
  it("is what vgs printed", () => {
    expect(parseRoom("  8585740288 4194304")).toEqual({ freeBytes: 8_585_740_288, extentBytes: 4_194_304 });
  });

  it("is found between LVM's warnings", () => {
    const text = "  WARNING: Device /dev/sdb 1 2 not found\n  0 4194304\n";
    expect(parseRoom(text)).toEqual({ freeBytes: 0, extentBytes: 4_194_304 });
  });

  it("is never guessed", () => {
    expect(() => parseRoom('  Volume group "VgNone" not found')).toThrow(/vgs printed/);
  });
});

// As lvcreate said it on the lab's servers.
it("too little room is told apart", () => {
  const said = 'Volume group "VgVm" has insufficient free space (2044 extents): 30000 required.';
  expect(lvmFailure(`  ${said}\n`)).toBe("NO_SPACE");
});

describe("the tags of a copy", () => {
  it("say what it is, and are read back", () => {
    const tags = copyTags("some-id", facts);
    expect(factsAmong(tags)).toEqual(facts);
    expect(copyIdAmong(tags)).toBe("some-id");
    for (const tag of tags) expect(tag).toMatch(/^lvm-nbd\.[A-Za-z0-9._\-+/=!:&#]{1,119}$/);
  });

  it("of a source without a snapshot, that was read once, say just that", () => {
    const unknown = { ...facts, snapshotUuid: "", takenAt: 0, verified: false };
    expect(copyTags("some-id", unknown).join()).not.toMatch(/snapshotUuid|takenAt/);
    expect(factsAmong(copyTags("some-id", unknown))).toEqual(unknown);
  });

  it("of an unfinished one say nothing of a content", () => {
    expect(factsAmong(copyTags("some-id"))).toBeUndefined();
  });

  describe("of another volume, copied along, are not its own", () => {
    const [found] = parseLvs(recordedLvs("valid"));
    if (found === undefined) throw new Error("no volume");
    const lv = { ...found, uuid: facts.uuid, tags: copyTags("some-id", facts) };
    const clone = { ...lv, volumeGroup: "VgClone" };
    const { volumeGroup: _, ...untold } = facts;
    const before = { ...lv, tags: copyTags("some-id", { ...untold, volumeGroup: "" }) };
    it.each([
      ["itself", lv, [], true],
      ["itself beside its clone, made by vgimportclone(8)", lv, [clone], true],
      ["that clone", clone, [lv], false],
      ["that clone, where another volume is left of the group", clone, [{ ...lv, uuid: "other" }], false],
      ["itself in a renamed group", clone, [], true],
      [
        "one of two clones, of which nobody knows which is meant",
        clone,
        [{ ...lv, volumeGroup: "Vg3" }],
        false,
      ],
      ["one of another UUID", { ...lv, uuid: "other" }, [], false],
      ["one from before its group was told", before, [], true],
    ])("%s", (_what, one, others, expected) => {
      expect(isAsTagged(one, [...others, one])).toBe(expected);
    });
  });

  it("can be told from those of the user, and of a restore", () => {
    const others = ["mine", "lvm-nbd.restore=1", "lvm-nbd.restoring=1"];
    const own = [
      "lvm-nbd.owner=o/p/s/x",
      "lvm-nbd.generation=1",
      "lvm-nbd.run=1",
      ...copyTags("some-id", facts),
    ];
    expect(ownTags([...others, ...own])).toEqual(own);
  });

  it("go for new ones, but those of the job and the user's own", () => {
    const run = runTagOf("0123456789abcdef0123");
    expect(run).toBe("lvm-nbd.run=0123456789abcdef");
    const tags = ["mine", run, "lvm-nbd.copy=old", "lvm-nbd.owner=o/p/s/x"];
    expect(outdatedTags(tags, ["lvm-nbd.owner=o/p/s/x", "lvm-nbd.copy=new"])).toEqual(["lvm-nbd.copy=old"]);
    expect(runTagAmong(tags)).toBe(run);
    expect(runTagAmong(["mine"])).toBeUndefined();
  });
});
