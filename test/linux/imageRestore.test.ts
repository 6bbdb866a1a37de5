import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { deviceCopySteps, deviceJob } from "../../provider/linux/deviceCopy.js";
import {
  filledSnapshots,
  imageRestoreArguments,
  imageRestoreJob,
  parseChunkSizes,
  poolFunctions,
  poolNeed,
  restoreJob,
  roomFunctions,
} from "../../provider/linux/imageRestore.js";
import { type LogicalVolume, parseLvs, storeNeed } from "../../provider/linux/lvm.js";
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

it("a job follows from the volume's group and UUID, whatever the volume is called, and is none of a copy's", () => {
  expect(restoreJob(origin).unit).toMatch(/^lvm-nbd-restore-[0-9a-f]{16}\.service$/);
  const { name: _, ...nameless } = origin;
  expect(restoreJob(nameless)).toEqual(restoreJob(origin));
  expect(restoreJob({ ...origin, uuid: `${origin.uuid}x` })).not.toEqual(restoreJob(origin));
  // As vgimportclone(8) makes it.
  expect(restoreJob({ ...origin, volumeGroup: "VgClone" })).not.toEqual(restoreJob(origin));
  expect(restoreJob(origin).unit).not.toBe(deviceJob(origin.path).unit);
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
  const args = imageRestoreArguments(
    restoreJob(origin),
    { ...origin, kind: "thin", pool: "pool" },
    plan,
    marks,
    4095.5,
  );
  expect(args.slice(7)).toEqual([
    ...["abc", "VgVm", "vm1", origin.uuid, "B", "W", "H", "T", "7", "--deltag X --deltag Y", "pool", "4096"],
  ]);
  // That of a cached volume is its cache's.
  const cached = { ...origin, kind: "other", pool: "fast_cpool" } as const;
  expect(imageRestoreArguments(restoreJob(origin), cached, plan, marks, 0).slice(-2)).toEqual(["", "0"]);
});

describe("a COW snapshot of the volume", () => {
  const none = new Map<string, number>();
  const store = (more: Partial<LogicalVolume>) => volume("valid", "vm1-snap", { usedPercent: 50, ...more });
  const KiB = 1024;

  it.each([
    ["4 KiB", 4 * KiB, "94.50"],
    ["64 KiB", 64 * KiB, "94.30"],
    ["512 KiB", 512 * KiB, "95.59"],
  ])("with chunks of %s is as full as the kernel's when 64 MiB were written", (_what, chunkSize, percent) => {
    // As lvs(8) told of stores of 68 MiB, to which `lvcreate -l 100%ORIGIN` came.
    expect(((100 * storeNeed(64 * MiB, chunkSize)) / (68 * MiB)).toFixed(2)).toBe(percent);
  });

  it("needs as much by the job's own reckoning", () => {
    for (const chunkSize of [4 * KiB, 64 * KiB, 512 * KiB])
      for (const bytes of [512, 4096, MiB - 512, MiB, 3 * MiB + 1536, 1024 * MiB, 3 * 1024 ** 4]) {
        const told = spawnSync("sh", ["-c", `${roomFunctions}store_need ${bytes} ${chunkSize}`]).stdout;
        expect(Number(told)).toBe(storeNeed(bytes, chunkSize));
      }
  });

  it.each([
    ["overflows where the image fits and its tables do not", 8 * MiB, 4 * MiB, undefined, true],
    ["holds what its free store has room for, tables and all", 8 * MiB, 4 * MiB - 64 * KiB, undefined, false],
    ["has smaller tables for larger chunks", 8 * MiB, 4 * MiB - 128 * KiB, 64 * KiB, false],
    ["but rounds to them", 8 * MiB, 4 * MiB - 64 * KiB, 64 * KiB, true],
    [
      "does not hold all where its store is as large as the origin",
      origin.sizeBytes,
      60 * MiB,
      undefined,
      true,
    ],
    ["holds all with the tables of it", storeNeed(origin.sizeBytes, 4 * KiB), 60 * MiB, undefined, false],
    ["holds all with larger chunks", storeNeed(origin.sizeBytes, 64 * KiB), 60 * MiB, 64 * KiB, false],
    ["does not hold all with the least", storeNeed(origin.sizeBytes, 64 * KiB), 60 * MiB, 0, true],
  ])("%s", (_what, sizeBytes, image, chunkSize, overflows) => {
    const snapshot = store({ sizeBytes });
    const sizes = chunkSize === undefined ? none : new Map([[snapshot.uuid, chunkSize]]);
    const [filled] = filledSnapshots([origin, snapshot], origin, image, sizes);
    expect(filled).toEqual({ name: "vm1-snap", freeBytes: sizeBytes / 2, overflows });
  });

  it("counts as full where LVM cannot tell", () => {
    const [filled] = filledSnapshots([store({ usedPercent: undefined })], origin, 512, none);
    expect(filled).toMatchObject({ freeBytes: 0, overflows: true });
  });

  it("does not count where it is lost already, nor one of another volume", () => {
    const all = [store({ invalid: true }), store({ originUuid: "another" })];
    expect(filledSnapshots(all, origin, 64 * MiB, none)).toEqual([]);
  });

  it("has the chunk size that lvs tells", () => {
    const told =
      "  1Fa6Nc-hZ1I-To0Q-RKo4-chQ1-GrTL-znD1tp   4096\n  od27KR-bcQY-1IiM-qrbO-rBcv-63sB-XWDds1 524288";
    expect([...parseChunkSizes(told)]).toEqual([
      ["1Fa6Nc-hZ1I-To0Q-RKo4-chQ1-GrTL-znD1tp", 4096],
      ["od27KR-bcQY-1IiM-qrbO-rBcv-63sB-XWDds1", 524288],
    ]);
    expect(parseChunkSizes("").get("x")).toBeUndefined();
  });
});

describe("the job, right before it writes,", () => {
  const MiBs = (n: number) => n * MiB;
  const room = (stores: string, bytes = MiBs(16)) =>
    spawnSync("sh", [
      "-c",
      `lvs() { printf '%s' "$stores"; }
      fail() { echo "$1"; exit 1; }
      stores='${stores}' group=VgVm name=vm1 uuid=U
      ${roomFunctions}require_room ${bytes} ${MiBs(64)}; echo fits`,
    ]).stdout.toString();

  it.each([
    ["has no snapshots", "", "fits\n"],
    ["has one with room", `  s:swi-a-s---:${MiBs(32)}:49.08:4096\n`, "fits\n"],
    ["has one for all of the origin", `  s:swi-a-s---:${MiBs(68)}:99.09:4096\n`, "fits\n"],
    ["has one that is lost already", `  s:swi-I-s---:${MiBs(4)}:100.00:4096\n`, "fits\n"],
    ["has one with larger chunks", `  s:swi-a-s---:${MiBs(16) + 128 * 1024}:0.00:65536\n`, "fits\n"],
  ])("lets pass what %s", (_what, stores, expected) => {
    expect(room(stores)).toBe(expected);
  });

  it.each([
    ["the image fits and its tables do not", `  s:swi-a-s---:${MiBs(32)}:50.00:4096\n`],
    ["the store is as large as the origin", `  s:swi-a-s---:${MiBs(64)}:99.99:65536\n`],
    ["how full it is cannot be told", `  s:swi-a-s---:${MiBs(32)}::4096\n`],
    ["the chunk size cannot be told", `  s:swi-a-s---:${MiBs(16) + 64 * 1024}:0.00:\n`],
  ])("refuses where %s, and names each", (_what, stores) => {
    expect(room(`${stores}  fits:swi-a-s---:${MiBs(68)}:1.00:4096\n${stores.replace("s:", "t:")}`)).toBe(
      `overflows: writing ${MiBs(16)} bytes to VgVm/vm1 may overflow snapshots of it: s t\n`,
    );
  });
});

describe("the job, right before it writes to a thin volume,", () => {
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "pool-"));
  });
  afterEach(() => rmSync(folder, { recursive: true }));

  /** Another restore, of a volume of that UUID, which has a pool of ours. */
  const other = (name: string, told: string) => {
    const run = join(folder, `lvm-nbd-restore-${name}`);
    mkdirSync(run);
    writeFileSync(join(run, "pool"), `${told}\n`);
  };
  /** Needs 30 MiB of a pool of 100, of an image of 60. */
  const look = (
    pool: string,
    volumes = `  U:${100 * MiB}:10.00\n`,
    { snapshots = "", need = 30 * MiB, waited = 8640 } = {},
  ) => {
    const run = join(folder, "lvm-nbd-restore-own");
    mkdirSync(run, { recursive: true });
    const { stdout, stderr } = spawnSync("sh", [
      "-c",
      `lvs() { case "$*" in *origin_uuid=*) printf '${snapshots}';; *pool_lv=*) printf '${volumes}';; *) printf '${pool}';; esac; }
      systemctl() { case $* in *ended.service) echo inactive;; *) echo active;; esac; }
      fail() { echo "$1"; exit 1; }
      group=VgVm name=vm1 uuid=U pool=pool need=${need} waited=${waited} size=${60 * MiB} run=${run}
      ${poolFunctions.replaceAll("/run/lvm-nbd", `${folder}/lvm-nbd`)}require_pool && cat ${run}/pool || echo waits`,
    ]);
    expect(stderr.toString()).toBe("");
    return stdout.toString();
  };
  const pool = (percent: string, health = "") => `  ${100 * MiB}:${percent}:${health}\n`;
  const held = 10 * MiB;
  const others = `  U:${100 * MiB}:10.00\n  V:${100 * MiB}:50.00\n  W:${100 * MiB}:\n`;

  it("writes down what it takes of a pool that has room", () => {
    expect(look(pool("69.99"))).toBe(`VgVm U ${30 * MiB} ${held}\n`);
    expect(look(pool("0.00"))).toBe(`VgVm U ${30 * MiB} ${held}\n`);
  });

  it("has room where the volume fills its pool, as the look before the check has found", () => {
    // What is needed holds what lvs rounds off, where that could matter.
    expect(look(pool("70.00"))).toBe(`VgVm U ${30 * MiB} ${held}\n`);
    expect(look(pool("100.00"), `  U:${100 * MiB}:100.00\n`, { need: 0 })).toBe(`VgVm U 0 ${100 * MiB}\n`);
  });

  it.each([
    [
      "has no room any more",
      pool("70.01"),
      "",
      /^full: the thin pool VgVm\/pool has \d+ bytes free, the restore may need 31457280, others that run 0\n$/,
    ],
    ["takes no changes", pool("1.00", "out_of_data"), "", /^full: .*takes no changes: out_of_data/],
    ["cannot be told of", pool(""), "", /^full: .* has 0 bytes free/],
    [
      "has room for the rest only, where a snapshot was taken meanwhile",
      pool("50.00"),
      "  late\n",
      /^full: .*may need 6292504\d, others/,
    ],
  ])("refuses a pool that %s", (_what, found, snapshots, message) => {
    expect(look(found, undefined, { snapshots, waited: 0 })).toMatch(message);
  });

  it("counts what other restores may still take of it", () => {
    other("a", `VgVm V ${40 * MiB} ${40 * MiB}`);
    // Ten of the forty MiB are written, but for what is rounded off.
    expect(look(pool("39.97"), others)).toContain("VgVm U");
    rmSync(join(folder, "lvm-nbd-restore-own"), { recursive: true });
    expect(look(pool("40.10"), others)).toMatch(/^full: .*need 31457280, others that run 3146\d{4}\n$/);
    // Of one that is about to begin nothing is.
    other("b", `VgVm W ${20 * MiB} 0`);
    expect(look(pool("30.00"), others)).toMatch(/^full: .*others that run 5243\d{4}\n$/);
  });

  it("waits where only others may still take the room, also what they have written over shared blocks", () => {
    // A snapshot shares all that V has: its own fill level does not grow.
    other("a", `VgVm V ${40 * MiB} ${50 * MiB}`);
    expect(look(pool("60.00"), others, { waited: 0 })).toBe("waits\n");
    expect(existsSync(join(folder, "lvm-nbd-restore-own", "pool"))).toBe(false);
    expect(look(pool("60.00"), others)).toMatch(/^full: .*others that run 41943040\n$/);
    // Without the others there is none either.
    expect(look(pool("70.01"), others, { waited: 0 })).toMatch(/^full: /);
    writeFileSync(join(folder, "lvm-nbd-restore-a", "phase"), "copy 1790000000\n");
    expect(look(pool("60.00"), others, { waited: 0 })).toBe("waits\n");
    // It only reads back.
    writeFileSync(join(folder, "lvm-nbd-restore-a", "phase"), "verify 1790000000\n");
    expect(look(pool("70.00"), others)).toContain("VgVm U");
  });

  it.each(["dash", "bash"])(
    "lets go of its locks while it waits, and begins once there is room (%s)",
    (shell) => {
      const functions = imageRestoreJob
        .replace(deviceCopySteps, "")
        .replaceAll("/run/lvm-nbd", `${folder}/lvm-nbd`);
      const { stdout, stderr } = spawnSync(shell, [
        "-c",
        `${functions}
      fail() { echo "$1"; exit 1; }
      phase() { echo "phase $1"; }
      require_followed() { echo followed; }
      require_room() { :; }
      require_pool() { [ "$waited" = 2 ]; }
      sleep() { flock -n "${folder}/lvm-nbd-restore.VgVm.vm1" echo sleeps; }
      change() { flock -n "${folder}/lvm-nbd-restore.VgVm.vm1" true || echo "changes $*"; }
      group=VgVm name=vm1 begun=B writing=W earlier= size=1 room=1
      before_write`,
      ]);
      expect(stderr.toString()).toBe("");
      const looks = ["followed", "phase wait", "sleeps", "followed", "sleeps", "followed"];
      expect(stdout.toString()).toBe(`${[...looks, "changes B --addtag W"].join("\n")}\n`);
    },
  );

  it("does not count restores that have ended, or are of another pool", () => {
    other("ended", `VgVm V ${40 * MiB} 0`);
    other("c", `VgElse V ${40 * MiB} 0`);
    other("d", `VgVm X ${40 * MiB} 0`);
    expect(look(pool("69.00"), others)).toContain("VgVm U");
  });
});

describe("a thin volume needs of its pool", () => {
  const thin = (name: string, usedPercent: number | undefined, more: Partial<LogicalVolume> = {}) =>
    volume("thin", "thin1", { name, uuid: name, sizeBytes: 100 * MiB, usedPercent, ...more });
  const pool = (usedPercent: number) => volume("thin", "pool", { sizeBytes: 256 * MiB, usedPercent });
  const [a, b, c] = [thin("a", 30), thin("b", 40), thin("c", 10)];
  const others = { volumeGroup: "VgOther" };

  // What lvs told of three volumes of 100 MiB, and of two snapshots of the first one of which was merged into it.
  it.each([
    ["what it has not yet, beside other VMs' volumes", [a, b, c, pool(31.25)], 70, []],
    [
      "everything, where a snapshot shares what it has",
      [a, thin("a1", 30, { originUuid: "a" }), pool(33.2)],
      100,
      [],
    ],
    [
      "everything, after a merge made LVM forget whose its snapshot is",
      [a, thin("a2", 30), b, c, pool(31.25)],
      100,
      [],
    ],
    ["less, once it was written to since", [a, thin("a2", 30), b, c, pool(39.06)], 80, []],
    [
      "what it has not yet, where others' snapshots are",
      [a, thin("b1", 0, { originUuid: "b" }), b, pool(27.34)],
      70,
      [],
    ],
    [
      "what it has not yet, where another group has a pool of that name",
      [a, b, c, pool(31.25), thin("a", 30, others), { ...pool(0), ...others }],
      70,
      [],
    ],
    [
      "everything, where nobody can tell what an inactive one shares",
      [a, b, thin("c", undefined), pool(31.25)],
      100,
      ["c"],
    ],
    ["everything, where there is no pool", [a], 100, []],
  ])("%s", (_what, all, expected, untold) => {
    const need = poolNeed(all, a, 100 * MiB);
    expect(need.untold).toEqual(untold);
    // Not a byte too little; what is rounded off more.
    expect(need.bytes).toBeGreaterThanOrEqual(expected * MiB);
    expect(need.bytes).toBeLessThan((expected + 0.1) * MiB);
  });

  it.each([
    ["everything, where what it has may all lie behind the image", 50, 50, 50],
    ["what is left of that", 80, 50, 20],
    ["nothing, where it has all", 100, 50, 0],
  ])("%s", (_what, usedPercent, image, expected) => {
    const part = thin("a", usedPercent);
    const { bytes } = poolNeed([part, pool((100 * usedPercent) / 256)], part, image * MiB);
    expect(bytes).toBe(expected * MiB);
  });

  it("nothing, where it alone has filled the pool", () => {
    const full = thin("a", 100);
    expect(poolNeed([full, pool(39.06)], full, 100 * MiB).bytes).toBe(0);
  });

  it("what is rounded off too, where the pool cannot hold all of it or snapshots share it", () => {
    const small = volume("thin", "pool", { sizeBytes: 90 * MiB, usedPercent: 33.33 });
    expect(poolNeed([a, small], a, 100 * MiB).bytes).toBeGreaterThan(70.01 * MiB);
    expect(
      poolNeed([a, thin("a1", 30, { originUuid: "a" }), pool(33.2)], a, 100 * MiB).bytes,
    ).toBeGreaterThan(100.02 * MiB);
  });
});
