import { describe, expect, it } from "vitest";
import {
  createSnapshotCommand,
  deviceMapperNameProblem,
  identified,
  logicalVolumeNameProblem,
  lvmFailure,
  lvmSilence,
  parseLvs,
  parseSize,
  removeCommand,
  sizeInBytes,
  tagProblem,
  volumeGroupNameProblem,
} from "../../provider/linux/lvm.js";
import { recordedLvs } from "../support/recorded.js";

const GiB = 1024 ** 3;

describe("the volume of a UUID, which was in a group, is", () => {
  const ours = parseLvs(recordedLvs("valid"));
  const inGroup = (volumeGroup: string) => ours.map((lv) => ({ ...lv, volumeGroup }));
  const [clone, another] = [inGroup("VgClone"), inGroup("VgElse")];
  const uuid = ours[1]?.uuid ?? "";
  const others = ours.filter((lv) => lv.uuid !== uuid);
  it.each([
    ["in that group", ours, ["VgVm"]],
    ["in that group, whichever of a clone's is listed first", [...clone, ...ours], ["VgVm"]],
    ["gone, where others are left of the group and a clone has it", [...clone, ...others], []],
    ["in another, where nothing is left of the group", clone, ["VgClone"]],
    ["one of several that nobody can tell apart, there", [...clone, ...another], ["VgClone", "VgElse"]],
    ["gone, where no one has it", others, []],
  ])("%s", (_what, all, expected) => {
    const found = identified(all, { volumeGroup: "VgVm", uuid });
    expect(found.map(({ volumeGroup }) => volumeGroup)).toEqual(expected);
    expect(found.every((lv) => lv.uuid === uuid)).toBe(true);
  });
});

describe("parseSize", () => {
  it.each([
    ["1G", { bytes: GiB }],
    ["1g", { bytes: GiB }],
    ["1.5GiB", { bytes: 1.5 * GiB }],
    ["512M", { bytes: GiB / 2 }],
    ["1073741824", { bytes: GiB }],
    [1073741824, { bytes: GiB }],
    ["20%ORIGIN", { percentOfOrigin: 20 }],
    ["100%origin", { percentOfOrigin: 100 }],
  ])("reads %j", (written, meant) => {
    expect(parseSize(written)).toEqual(meant);
  });

  it.each([
    [1, /unit/],
    ["10", /"10G"/],
    [-5, /unit/],
    ["1X", /not a size/],
    ["G", /not a size/],
    ["", /not a size/],
    ["1K", /less than 1M/],
    ["0%ORIGIN", /at least 1/],
    ["20%FREE", /not a size/],
    ["99999999P", /larger than any/],
    [1.5 * 1024 ** 2 + 0.5, /unit/],
  ])("refuses %j and says what would be right", (written, message) => {
    expect(() => parseSize(written)).toThrow(message);
  });

  it("rounds up to whole sectors, since LVM refuses anything else", () => {
    expect(parseSize("1.3G")).toEqual({ bytes: 1395864576 });
    expect(parseSize(1395864371)).toEqual({ bytes: 1395864576 });
  });

  it("turns a share of the origin into bytes only where the origin's size is known", () => {
    expect(sizeInBytes({ percentOfOrigin: 20 }, 10 * GiB)).toBe(2 * GiB);
    expect(sizeInBytes({ percentOfOrigin: 20 }, undefined)).toBeUndefined();
    expect(sizeInBytes({ bytes: 5 }, undefined)).toBe(5);
  });
});

describe("names", () => {
  it.each(["vm1", "LV-VM1", "a.b_c+d-e", "0", "vm1-snapshot"])("accepts %s", (name) => {
    expect(logicalVolumeNameProblem(name)).toBeUndefined();
  });

  it.each([
    ["", /empty/],
    ["-a", /begin with "-"/],
    [".", /not a name/],
    ["..", /not a name/],
    ["a b", /characters/],
    ["a/b", /characters/],
    ["ä", /characters/],
    ["snapshot1", /begin with "snapshot"/],
    ["pvmove0", /pvmove/],
    ["x_tdata", /_tdata/],
    ["x_mimage_1", /_mimage/],
    ["a".repeat(128), /127/],
  ])("refuses the volume name %j", (name, message) => {
    expect(logicalVolumeNameProblem(name)).toMatch(message);
  });

  it("lets a volume group be called what a volume may not", () => {
    expect(volumeGroupNameProblem("snapshots")).toBeUndefined();
  });

  it("counts every dash twice for device-mapper and leaves room for -cow", () => {
    expect(deviceMapperNameProblem("vg", "a".repeat(120))).toBeUndefined();
    expect(deviceMapperNameProblem("vg", "a".repeat(121))).toMatch(/128 characters/);
    expect(deviceMapperNameProblem("v-g", "-".repeat(60))).toMatch(/129 characters/);
  });

  it("refuses tags that LVM refuses", () => {
    expect(tagProblem("a=b:c&d#e!f/g.h_i+j-k")).toBeUndefined();
    for (const tag of ["", "a b", "a@b", "a,b", "-a", "x".repeat(1025)])
      expect(tagProblem(tag)).toBeDefined();
  });
});

describe("commands", () => {
  const plan = {
    volumeGroup: "VgVm",
    origin: "vm1",
    name: "s",
    readOnly: true,
    chunkSize: 65536,
    tags: ["t"],
  };

  it("makes a COW snapshot of the declared size", () => {
    expect(createSnapshotCommand({ ...plan, size: { bytes: GiB } }).join(" ")).toBe(
      "lvcreate -s -y -p r -n s -c 65536b -L 1073741824b --addtag t VgVm/vm1",
    );
    expect(createSnapshotCommand({ ...plan, size: { percentOfOrigin: 20 } })).toContain("20%ORIGIN");
  });

  it("makes a thin snapshot without a size (a size would make it COW), and one that can be activated", () => {
    const argv = createSnapshotCommand({ ...plan, size: undefined });
    expect(argv).toEqual(expect.arrayContaining(["-kn", "-ay"]));
    expect(argv).not.toContain("-L");
    expect(argv).not.toContain("-c");
  });

  it("removes by UUID and never by force", () => {
    const argv = removeCommand({ volumeGroup: "VgVm", name: "s", uuid: "abc" });
    expect(argv).toEqual(["lvremove", "-y", "-S", 'lv_uuid="abc"', "VgVm/s"]);
  });
});

describe("lvmFailure", () => {
  it.each([
    ["  Can't get lock for VgVm", "LVM_LOCKED"],
    ['  Volume group "VgVm" has insufficient free space (1 extents): 2 required.', "NO_SPACE"],
    ['  Volume group "VgX" not found', "VOLUME_GROUP_NOT_FOUND"],
    ["  Snapshot origin LV x not found in Volume group VgVm.", "ORIGIN_NOT_FOUND"],
    ["  Logical volume VgVm/s contains a filesystem in use.", "VOLUME_IN_USE"],
    ["  Logical volume VgVm/s in use.", "VOLUME_IN_USE"],
    ["  Something new", undefined],
  ])("tells %j apart", (stderr, code) => {
    expect(lvmFailure(stderr)).toBe(code);
  });
});

it("a failure of which LVM names no reason gets the usual one, and no other does", () => {
  const silent =
    "  WARNING: Sum of all thin volume sizes exceeds it.\n  Command failed with status code 5.\n";
  expect(lvmSilence(silent)).toMatch(/full disk.*df \/etc\/lvm/);
  expect(lvmSilence('  Failed to find logical volume "VgVm/x"\n')).toBeUndefined();
});
