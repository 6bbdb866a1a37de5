import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { type LogicalVolume, parseLvs } from "../../provider/linux/lvm.js";
import {
  fillingSnapshots,
  leftBytes,
  mergePhase,
  mergePhrase,
  snapshotFateScript,
} from "../../provider/linux/merge.js";
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

  it.each([
    ["while it waits", recorded("merging", "vm1")],
    ["before it was to begin", recorded("mergeRunning", "o")],
  ])("of a COW merge whose snapshot ran full %s tells that", (_when, origin) => {
    const snapshot = { ...recorded("merging", "vm1-snap"), invalid: true };
    expect(mergePhase(snapshot, origin)).toBe("overflowed");
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
    ["may overflow", { usedPercent: 50 }, false],
    ["surely overflow", { sizeBytes: 8 * MiB }, true],
  ])("that %s are told whatever their age", (_how, more, overflows) => {
    // The clock may have been set back in between, its chunks may be smaller, and the merged one may have been written to.
    expect(filling({ ...more, createdAt: 999 })).toMatchObject([{ name: "other", overflows }]);
  });

  it("that are older, with room for all that the merge writes, are not named", () => {
    expect(filling({ createdAt: 999 })).toEqual([]);
  });

  it.each([
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

describe("by LVM's archive a merging snapshot", () => {
  const uuid = "AAAAAA-1111-1111-1111-1111-1111-AAAAAA";
  const metadata = (command: string, ...uuids: string[]) =>
    [
      'contents = "Text Format Volume Group"',
      `description = "Created *before* executing '${command}'"`,
      "VgVm {",
      "\tlogical_volumes {",
      ...uuids.flatMap((id, at) => [`\t\tvm-snap${at || ""} {`, `\t\t\tid = "${id}"`, "\t\t}"]),
      "\t}",
      "}",
      "",
    ].join("\n");
  const told = (...archived: string[]) => {
    const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-archive-"));
    try {
      archived.forEach((text, at) => {
        // The index grows beyond its five digits.
        writeFileSync(join(folder, `VgVm_${99_998 + at}-123.vg`), text);
      });
      const clone = metadata("lvremove VgVm/vm-snap", uuid);
      writeFileSync(join(folder, "VgVm_clone_00001-1.vg"), clone);
      return execFileSync("sh", [
        "-c",
        snapshotFateScript.replaceAll("/etc/lvm/archive", folder),
        ...["sh", "VgVm", uuid],
      ]).toString();
    } finally {
      rmSync(folder, { recursive: true });
    }
  };
  const begun = metadata("lvconvert -y -b -i 1 --merge @x", uuid);
  const marked = metadata("lvchange -y --deltag b --addtag m VgVm/vm", uuid);
  const other = "BBBBBB-1111-1111-1111-1111-1111-BBBBBB";

  it.each([
    ["lvremove VgVm/vm-snap", [], "removed"],
    ["/usr/sbin/lvremove -y /dev/VgVm/vm-snap VgVm/x", [], "removed"],
    ["lvremove /dev/mapper/VgVm-vm--snap", [], "removed"],
    ["lvm lvremove -y VgVm/vm-snap", [], "removed"],
    ["vgreduce --removemissing --force VgVm", [], "removed"],
    // None of them tells which volumes it removes.
    ["lvremove -y -S lv_merging=1", [], "unknown"],
    ["lvremove -yS lv_merging=1 VgVm/x", [], "unknown"],
    ["lvremove -y --select lv_merging=1 VgVm/x", [], "unknown"],
    ["lvremove -y @old", [], "unknown"],
    ["lvremove -y VgVm", [], "unknown"],
    ["lvremove -y /dev/VgVm", [], "unknown"],
    // As LVM_VG_NAME, of which the archive tells nothing, has it.
    ["lvremove -y vm-snap", [], "unknown"],
    ["lvremove -y VgOther/vm-snap2", [], "unknown"],
    // LVM does not archive the end of a merge: that came in between, or later.
    ["lvremove -y VgVm/vm-snap1", [other], "ended"],
    ["lvremove -y VgVm/x-vm-snap", [other], "ended"],
    ["lvremove -A y --yes /dev/mapper/VgVm-vm--snap1", [other], "ended"],
    ["vgreduce VgVm /dev/sdc", [], "ended"],
    ["lvchange -ay VgVm/vm", [], "ended"],
  ] as const)("where the last command before was %s", (command, more, expected) => {
    expect(told(begun, marked, metadata(command, uuid, ...more), metadata("lvcreate x")).trim()).toBe(
      expected,
    );
  });

  it.each([
    ["it holds nothing of it", [metadata("lvremove VgVm/vm-snap", other)]],
    ["it is empty", []],
    ["it does not tell the command", [metadata("lvchange x", uuid).replace("executing", "")]],
  ])("is not told of where %s", (_why, archived) => {
    expect(told(...archived).trim()).toBe("unknown");
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
