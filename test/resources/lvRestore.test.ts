import { afterEach, describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers } from "../../provider/core/handlers.js";
import { ownerInTag, ownerMark } from "../../provider/core/owner.js";
import { resourceType } from "../../provider/core/registry.js";
import { restoreGeneration, restoreTagOf } from "../../provider/core/restoreMark.js";
import type { RemoteCommand } from "../../provider/ssh/types.js";
import { type Answer, type FakeHost, fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { fields } from "../support/fields.js";
import { importer } from "../support/imported.js";
import { recordedLvs } from "../support/recorded.js";

const MiB = 1024 ** 2;
const host = {
  address: "192.0.2.1",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
type Row = Readonly<Record<string, string>>;
const rowsOf = (state: Parameters<typeof recordedLvs>[0]): Row[] =>
  JSON.parse(recordedLvs(state)).report[0].lv;
const row = (state: Parameters<typeof recordedLvs>[0], name: string, more: Row = {}): Row => ({
  ...rowsOf(state).find(({ lv_name }) => lv_name === name),
  ...more,
});
const report = (...rows: Row[]) => JSON.stringify({ report: [{ lv: rows }] });

const origin = (more: Row = {}) => row("valid", "vm1", more);
const snapshot = (more: Row = {}) => row("valid", "vm1-snap", more);
const valid = report(origin(), snapshot());
const uuid = snapshot().lv_uuid ?? "";
const originUuid = origin().lv_uuid ?? "";
const declared = {
  host,
  owner: "o/p/s/restore",
  volumeGroup: "VgVm",
  origin: "vm1",
  snapshot: { name: "vm1-snap", uuid },
};
const complete = { ...declared, adopt: false, whenOpen: "refuse", triggers: [] as unknown[] };
const markOf = (stage: "begun" | "merging" | "writing" | "restored", more: object = {}) =>
  restoreTagOf({
    ...{ generation: restoreGeneration([]), life: "0123abcd", stage, startedAt: 1000, thinId: 0 },
    ...{ seconds: stage === "restored" ? 60 : 0, source: uuid, owner: ownerInTag(declared.owner) },
    ...more,
  });
/** Of an image. */
const theirs = (stage: "begun" | "writing") =>
  markOf(stage, { owner: "o/p/other/r", life: "99999999", source: "a".repeat(64) });
const none: ReadonlySet<string> = new Set();
const begins = ({ argv }: RemoteCommand) => argv[2]?.includes("lvconvert") === true;
const ends = ({ argv, kind }: RemoteCommand) => kind === "change" && argv[2]?.includes("started=$5") === true;

/** A host whose volumes are those, whatever is run. */
const showing = (lvs: string, others: (command: RemoteCommand) => Answer = () => "") =>
  fakeHost((command) => (command.argv[0] === "lvs" ? lvs : others(command)));

/** A host that shows the volumes in turn, and the last ones for ever. */
function turning(...all: (string | Error)[]): FakeHost {
  let turn = 0;
  return fakeHost(({ argv }) => (argv[0] === "lvs" ? (all[Math.min(turn++, all.length - 1)] ?? "") : ""));
}

const state = {
  ...complete,
  ...{
    state: "restored",
    snapshotRemoved: true,
    restoredSnapshot: uuid,
    restoredImage: "",
    originUuid,
    restoreId: "0123abcd",
    generation: restoreGeneration([]),
    mergeFailed: false,
  },
  ...{ startedAt: "1970-01-01T00:16:40.000Z", restoredAt: "1970-01-01T00:17:40.000Z", seconds: 60 },
};
const gone = (tag: string) => report(origin({ lv_tags: tag, lv_attr: "-wi-a-----", origin_size: "" }));
const running = (tag: string, percent = "30.00") =>
  report(
    origin({
      lv_attr: "Owi-a-s---",
      lv_merging: "1",
      lv_merge_failed: "0",
      lv_tags: tag,
      snap_percent: percent,
    }),
    snapshot({ lv_attr: "Sri-a-s---", lv_merging: "1", snap_percent: percent, lv_path: "" }),
  );
const waiting = (tag: string, open = "1") =>
  report(
    origin({ lv_attr: "Owi-aos---", lv_merging: "1", lv_tags: tag, lv_device_open: open, snap_percent: "" }),
    snapshot({ lv_attr: "Sri-a-s---", lv_merging: "1", lv_path: "" }),
  );

afterEach(() => {
  vi.restoreAllMocks();
});

describe("bad input is refused before any host is asked", () => {
  it.each([
    ["no snapshot", { snapshot: undefined }, /^snapshot: is required/],
    ["no UUID", { snapshot: { name: "vm1-snap" } }, /^snapshot\.uuid: is required/],
    [
      "what is no UUID",
      { snapshot: { name: "vm1-snap", uuid: "newest" } },
      /^snapshot\.uuid: .*not an LVM UUID/,
    ],
    [
      "the origin as its own snapshot",
      { snapshot: { name: "vm1", uuid } },
      /^snapshot\.name: .*origin's own name/,
    ],
    ["an empty origin", { origin: "" }, /^origin: must not be empty/],
    ["a group with characters LVM refuses", { volumeGroup: "a b" }, /^volumeGroup: /],
    ["another whenOpen", { whenOpen: "force" }, /^whenOpen: /],
  ])("%s", async (_what, change, message) => {
    const asked = untouchedHost();
    const { problems } = await handlersOn("LvRestore", asked).check(
      undefined,
      { ...declared, ...change },
      none,
    );
    expect(problems.map(({ property, reason }) => `${property}: ${reason}`)).toEqual([
      expect.stringMatching(message),
    ]);
  });
});

describe("is refused, and nothing is touched, where", () => {
  const other = "AAAAAA-1111-1111-1111-1111-1111-AAAAAA";
  const former = { owner: "o/p/s/former", life: "99999999" };
  const thin = (name: string, more: Row = {}) => row("thin", name, more);
  const thinPool = (more: Row = {}) => report(thin("thin1"), thin("thin1-snap"), thin("pool", more));
  const ofThin = {
    origin: "thin1",
    snapshot: { name: "thin1-snap", uuid: thin("thin1-snap").lv_uuid ?? "" },
  };
  const sibling = (more: Row = {}) =>
    snapshot({ lv_uuid: other, lv_name: "young", lv_time: "9999999999", snap_percent: "0.00", ...more });

  it.each([
    ["the origin is not there", report(snapshot()), {}, /ORIGIN_NOT_FOUND.*there are: "vm1-snap"/],
    [
      "the snapshot is not there",
      report(origin(), sibling()),
      {},
      /SNAPSHOT_NOT_FOUND.*VgVm\/vm1-snap .*snapshots of vm1 are: "young"/,
    ],
    [
      "another snapshot has its name",
      report(origin(), snapshot({ lv_uuid: other })),
      {},
      /IDENTITY_MISMATCH.*has the UUID AAAAAA.*another snapshot/,
    ],
    [
      "the snapshot is of another origin",
      report(origin(), snapshot({ origin: "vm2", origin_uuid: other })),
      {},
      /IDENTITY_MISMATCH.*is a snapshot of "vm2", not of "vm1"/,
    ],
    [
      "it is no snapshot",
      report(origin(), snapshot({ origin: "", origin_uuid: "", lv_attr: "-wi-a-----", lv_role: "public" })),
      {},
      /IDENTITY_MISMATCH.*is no snapshot/,
    ],
    [
      "the snapshot has overflowed",
      report(origin(), snapshot({ lv_attr: "sri-I-s---", lv_snapshot_invalid: "1" })),
      {},
      /SNAPSHOT_OVERFLOWED.*nothing can be restored.*another snapshot or from a backup/s,
    ],
    [
      "the snapshot is not active",
      report(
        origin({ lv_active: "", lv_attr: "owi---s---" }),
        snapshot({ lv_active: "", lv_attr: "sri---s---" }),
      ),
      {},
      /SNAPSHOT_INACTIVE.*lvchange -ay VgVm\/vm1/s,
    ],
    ["somebody merges it already", running(""), {}, /SNAPSHOT_MERGING.*by somebody.*adopt: true/s],
    [
      "another resource restores from it",
      running(markOf("merging", { owner: ownerInTag("o/p/other/r") })),
      { adopt: true },
      /SNAPSHOT_MERGING.*by o\/p\/other\/r/,
    ],
    [
      "the snapshot ran full while a merge of it waited that somebody began",
      waiting("").replaceAll("Sri-a", "Sri-I"),
      { adopt: true },
      /SNAPSHOT_OVERFLOWED.*VgVm\/vm1-snap ran full before its merge into VgVm\/vm1 began.*lvremove VgVm\/vm1-snap/s,
    ],
    [
      "another snapshot ran full while a merge of it waited",
      report(
        origin({ lv_attr: "Owi-aos---", lv_merging: "1" }),
        sibling({ lv_attr: "Sri-I-s---", lv_merging: "1", lv_snapshot_invalid: "1" }),
        snapshot(),
      ),
      {},
      /SNAPSHOT_OVERFLOWED.*VgVm\/young ran full before its merge into VgVm\/vm1 began.*lvremove VgVm\/young/s,
    ],
    [
      "another snapshot is merged into the origin",
      report(origin({ lv_attr: "Owi-a-s---" }), snapshot()),
      {},
      /SNAPSHOT_MERGING.*another snapshot is being merged/,
    ],
    [
      "another resource's image has left the origin half-written",
      report(origin({ lv_tags: theirs("writing") }), snapshot()),
      {},
      /ORIGIN_UNSUITABLE.*VgVm\/vm1 is HALF-WRITTEN by o\/p\/other\/r.*Use nothing of it/s,
    ],
    [
      "another resource of the stack has restored it for these triggers",
      report(origin({ lv_tags: markOf("restored", { ...former, source: other }) }), snapshot()),
      {},
      /FOREIGN_RESOURCE.*VgVm\/vm1 was restored for these `triggers` already, by o\/p\/s\/former.*`aliases`.*other `triggers`/s,
    ],
    [
      "another resource of the stack has, and nobody has marked the end",
      report(origin({ lv_tags: markOf("merging", { ...former, source: other }) }), snapshot()),
      {},
      /FOREIGN_RESOURCE.*was restored for these `triggers` already/,
    ],
    [
      "a younger COW snapshot would overflow",
      report(
        origin(),
        snapshot({ lv_size: String(48 * MiB), snap_percent: "50.00" }),
        sibling({ lv_size: String(8 * MiB) }),
      ),
      {},
      /RESTORE_OVERFLOWS.*writes 24 MiB.*"young" \(8\.0 MiB free\).*lvextend -L \+24M/s,
    ],
    [
      "the pool of a thin snapshot is read-only",
      thinPool({ lv_health_status: "metadata_read_only" }),
      ofThin,
      /NO_SPACE.*pool takes no changes: metadata_read_only/,
    ],
    [
      "the pool of a thin snapshot has no room for metadata",
      thinPool({ metadata_percent: "100.00" }),
      ofThin,
      /NO_SPACE.*metadata is full/,
    ],
    [
      "a thin origin has COW snapshots",
      report(
        thin("thin1"),
        thin("thin1-snap"),
        thin("pool"),
        sibling({ origin: "thin1", origin_uuid: thin("thin1").lv_uuid ?? "" }),
      ),
      ofThin,
      /ORIGIN_UNSUITABLE.*"young"/,
    ],
    [
      "a volume is suspended",
      report(origin({ lv_attr: "owi-s-s---" }), snapshot()),
      {},
      /VOLUME_SUSPENDED.*lvchange --refresh VgVm\/vm1/s,
    ],
  ])("%s", async (_why, lvs, change, message) => {
    const asked = showing(lvs);
    await expect(handlersOn("LvRestore", asked).create({ ...complete, ...change })).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it.each([
    ["for other triggers", { generation: restoreGeneration(["again"]) }],
    ["in another stack", { owner: "o/p/other/r" }],
  ])("nothing is: another resource has restored it %s", async (_how, change) => {
    const asked = showing(
      report(origin({ lv_tags: markOf("restored", { ...former, ...change }) }), snapshot()),
      (command) => (begins(command) ? new LvmNbdError("LVM_LOCKED", { message: "begun" }) : ""),
    );
    await expect(handlersOn("LvRestore", asked).create(complete)).rejects.toThrow(/begun/);
    expect(asked.changes.filter(begins)).toHaveLength(1);
  });

  it.each([
    [
      "origin is mounted",
      "/dev/VgVm/vm1",
      "mount",
      "/srv/vm",
      /VOLUME_IN_USE.*VgVm\/vm1 is open: mounted at \/srv\/vm/,
    ],
    [
      "snapshot is read",
      "/dev/VgVm/vm1-snap",
      "process",
      "dd (pid 7)",
      /VOLUME_IN_USE.*VgVm\/vm1-snap is open: open in dd/,
    ],
    [
      "snapshot is exported to nobody yet",
      "/dev/VgVm/vm1-snap",
      "export",
      "lvm-nbd-export-x.service",
      /exported by lvm-nbd-export-x.*atNextActivation/s,
    ],
  ])("the %s", async (_why, device, kind, who, message) => {
    const asked = showing(valid, ({ argv }) => {
      const isServers = argv[2]?.includes("for device") === true;
      if (argv[4] !== device || isServers !== (kind === "export")) return "";
      return `${kind}\t${Buffer.from(who).toString("base64")}\n`;
    });
    await expect(handlersOn("LvRestore", asked).create(complete)).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });
});

it("is refused while another resource's image is about to be written, but not for what its job has left", async () => {
  const lvs = report(origin({ lv_tags: theirs("begun") }), snapshot());
  const withJob = (active: string) =>
    showing(lvs, ({ argv }) => {
      if (!argv[2]?.includes("emit recordDigest")) return "";
      const record = JSON.stringify({ generation: theirs("begun"), verify: true });
      return fields({ active, recordDigest: "d", record, end: "" });
    });
  const running = withJob("active");
  await expect(handlersOn("LvRestore", running).create(complete)).rejects.toThrow(
    /VOLUME_IN_USE.*is being restored from an image by o\/p\/other\/r/,
  );
  expect(running.changes).toEqual([]);
  const ended = withJob("inactive");
  await handlersOn("LvRestore", ended)
    .create(complete)
    .catch(() => undefined);
  expect(ended.changes.some(begins)).toBe(true);
});

describe("a clone of the disk, with the same UUIDs in a group of its own,", () => {
  /** As vgimportclone(8) makes it. */
  const clone = (one: Row): Row => ({
    ...one,
    vg_name: "VgClone",
    lv_path: one.lv_path?.replace("VgVm", "VgClone") ?? "",
  });
  const young = { lv_uuid: "other", lv_name: "young", lv_time: "9999999999", lv_size: "4194304" };

  it("is not what is restored, and what holds or would overflow there stops nothing", async () => {
    const there = [
      clone(origin({ lv_device_open: "1", lv_attr: "owi-aos---" })),
      clone(snapshot()),
      clone(snapshot(young)),
    ];
    const full = report(...there, origin(), snapshot({ snap_percent: "60.00" }));
    const asked = turning(
      ...Array.from({ length: 4 }, () => full),
      gone(markOf("merging")),
      gone(markOf("restored")),
    );
    await handlersOn("LvRestore", asked).create(complete);
    expect(asked.changes.filter(begins)).toHaveLength(1);
  });

  it("tells nothing of a restore, whatever its marks", async () => {
    const elsewhere = clone(origin({ lv_tags: markOf("merging"), lv_attr: "-wi-a-----", origin_size: "" }));
    const {
      report: [{ lv }],
    }: { report: [{ lv: Row[] }] } = JSON.parse(gone(markOf("restored")));
    expect(await handlersOn("LvRestore", showing(report(elsewhere, ...lv))).read(state)).toEqual(state);
    // Somebody removed the origin itself.
    const left = showing(report(elsewhere, snapshot({ lv_uuid: "other" })));
    expect(await handlersOn("LvRestore", left).read(state)).toBeUndefined();
  });

  it("keeps its mark where nothing of the group is there", async () => {
    const one = report(clone(origin({ lv_tags: markOf("restored") })));
    const away = { exitCode: 5, stderr: '  Volume group "VgVm" not found\n' };
    const asked = showing(one, ({ argv }) => (argv[0] === "vgs" ? away : ""));
    await expect(handlersOn("LvRestore", asked).remove(state)).rejects.toThrow(
      /IDENTITY_MISMATCH.*VgClone\/vm1 has the UUID of what was in VgVm/,
    );
    expect(asked.changes).toEqual([]);
  });

  it("cannot be told from another where the group is gone, and that is an error", async () => {
    const one = origin({ lv_tags: markOf("restored") });
    const two = report(clone(one), { ...clone(one), vg_name: "VgElse" });
    const gone = { exitCode: 5, stderr: '  Volume group "VgVm" not found\n' };
    const asked = showing(two, ({ argv }) => (argv[0] === "vgs" ? gone : ""));
    await expect(handlersOn("LvRestore", asked).read(state)).rejects.toThrow(
      /IDENTITY_MISMATCH.*of VgClone\/vm1 and of VgElse\/vm1/,
    );
  });
});

describe("a restore", () => {
  it("of a COW snapshot marks and merges in one command, follows, and marks the end", async () => {
    const asked = turning(
      ...Array.from({ length: 4 }, () => valid),
      running(markOf("merging"), "20.00"),
      running(markOf("merging"), "10.00"),
      gone(markOf("merging")),
      gone(markOf("restored")),
    );
    const handlers = handlersOn("LvRestore", asked);
    const made = await handlers.create(complete);
    expect(made.state).toMatchObject({
      ...{ state: "restored", snapshotRemoved: true, restoredSnapshot: uuid, originUuid, seconds: 60 },
      ...{ startedAt: state.startedAt, restoredAt: state.restoredAt },
    });
    expect(asked.changes.map((command) => (begins(command) ? "begin" : ends(command) ? "end" : "?"))).toEqual(
      ["begin", "end"],
    );
    expect(asked.changes[0]?.argv.slice(4, 9)).toEqual(["VgVm", "vm1", originUuid, "vm1-snap", uuid]);
    expect(handlers.lines.join("\n")).toMatch(/49 % merged, 1\.6 MiB left at .*, about /);
  });

  it("tells whose snapshot it takes, and which others may overflow", async () => {
    const young = snapshot({
      ...{ lv_uuid: "other", lv_name: "young", lv_time: "9999999999", snap_percent: "90.00" },
    });
    const full = snapshot({ lv_tags: ownerMark("o/p/other/vm1"), snap_percent: "60.00" });
    const asked = turning(
      ...Array.from({ length: 4 }, () => report(origin(), full, young)),
      gone(markOf("restored")),
    );
    const handlers = handlersOn("LvRestore", asked);
    await handlers.create(complete);
    expect(handlers.warnings.join("\n")).toMatch(
      /may overflow other snapshots of it: "young" \(1\.6 MiB free\)/,
    );
    expect(handlers.warnings.join("\n")).toMatch(/belongs to o\/p\/other\/vm1/);
  });

  it("asks nobody who holds what where it may wait, and says what must happen", async () => {
    const asked = turning(valid, valid, waiting(markOf("merging")));
    const handlers = handlersOn("LvRestore", asked);
    const made = await handlers.create({ ...complete, whenOpen: "atNextActivation" });
    expect(made.state).toMatchObject({
      state: "scheduled",
      snapshotRemoved: false,
      restoredAt: "",
      seconds: 0,
    });
    expect(handlers.warnings.join("\n")).toMatch(
      /scheduled and has not begun.*lvchange -an VgVm\/vm1.*will be lost/s,
    );
    expect(asked.changes.filter(begins)).toHaveLength(1);
    expect(asked.changes.flatMap(({ argv }) => argv).join(" ")).not.toMatch(/-an|--refresh/);
  });

  it("that waits is begun by the next up when nobody has the volumes open any more", async () => {
    const asked = turning(
      ...Array.from({ length: 3 }, () => waiting(markOf("merging"), "0")),
      gone(markOf("merging")),
      gone(markOf("restored")),
    );
    const kept = { ...state, state: "scheduled", restoredAt: "", snapshotRemoved: false };
    expect(await handlersOn("LvRestore", asked).update(kept, complete)).toMatchObject({ state: "restored" });
    expect(asked.changes.map(({ argv }) => argv.slice(0, 3).join(" "))[0]).toBe("lvchange -y --refresh");
  });

  it("that was begun by hand is followed where it may be adopted", async () => {
    const asked = turning(
      ...Array.from({ length: 2 }, () => running("")),
      gone(markOf("merging")),
      gone(markOf("restored")),
    );
    await handlersOn("LvRestore", asked).create({ ...complete, adopt: true });
    expect(asked.changes.some(begins)).toBe(false);
  });

  it("whose link is lost is followed on", async () => {
    vi.spyOn(globalThis.performance, "now").mockReturnValue(0);
    const lost = new LvmNbdError("LINK_LOST", { message: "gone" });
    const merging = running(markOf("merging"));
    const asked = turning(merging, lost, merging, gone(markOf("merging")), gone(markOf("restored")));
    const handlers = handlersOn("LvRestore", asked);
    const kept = { ...state, state: "merging", restoredAt: "" };
    expect(await handlers.update(kept, complete)).toMatchObject({ state: "restored" });
    expect(handlers.lines.join("\n")).toMatch(/has not answered for 0 s; the merge goes on there/);
  });

  it("that makes no progress is an error that says how to look; LVM is told to end one that is all merged", async () => {
    let now = 0;
    vi.spyOn(globalThis.performance, "now").mockImplementation(() => {
      now += 40_000;
      return now;
    });
    const asked = showing(running(markOf("merging"), "0.00"));
    const kept = { ...state, state: "merging", restoredAt: "" };
    await expect(handlersOn("LvRestore", asked).update(kept, complete)).rejects.toThrow(
      /RESTORE_STALLED.*no progress for 300 s.*dmsetup status VgVm-vm1.*lvchange --poll y VgVm\/vm1/s,
    );
    const polls = asked.changes.map(({ argv }) => argv.join(" "));
    expect(new Set(polls)).toEqual(new Set(["lvchange -y --poll y VgVm/vm1"]));
  });

  describe("that the kernel gave up", () => {
    const failed = running(markOf("merging")).replace('"lv_merge_failed":"0"', '"lv_merge_failed":"1"');
    const kept = { ...state, state: "merging", restoredAt: "", seconds: 0, snapshotRemoved: false };
    const givenUp = { ...kept, mergeFailed: true };
    const removed = (fate: string) =>
      showing(gone(markOf("merging")), ({ argv }) => (argv[2]?.includes("tell removed") ? fate : ""));

    it("is an error, and is remembered until it goes on", async () => {
      await expect(handlersOn("LvRestore", showing(failed)).update(kept, complete)).rejects.toMatchObject({
        message: expect.stringMatching(/RESTORE_FAILED.*dmesg/s),
        state: givenUp,
      });
      expect(await handlersOn("LvRestore", showing(failed)).read(kept)).toEqual(givenUp);
      expect(await handlersOn("LvRestore", showing(running(markOf("merging")))).read(givenUp)).toEqual(kept);
    });

    it("is not called restored where its snapshot is gone, and LVM's archive does not tell that it ended", async () => {
      const asked = removed("unknown\n");
      expect(await handlersOn("LvRestore", asked).read(givenUp)).toMatchObject({ state: "failed" });
      await expect(handlersOn("LvRestore", asked).update(givenUp, complete)).rejects.toThrow(
        /RESTORE_UNCERTAIN.*how much of it was merged cannot be told/,
      );
      expect(asked.changes).toEqual([]);
      expect(await handlersOn("LvRestore", removed("ended\n")).read(givenUp)).toMatchObject({
        ...{ state: "restored", mergeFailed: false },
      });
    });
  });

  const scheduled = { ...state, state: "scheduled", restoredAt: "", seconds: 0, snapshotRemoved: false };

  it("whose snapshot ran full while it waited is an error that says so, for whatever triggers, and no restore", async () => {
    const full = snapshot({
      ...{ lv_attr: "Sri-I-s---", lv_merging: "1", lv_snapshot_invalid: "1", lv_path: "" },
    });
    const begun = origin({ lv_attr: "Owi-I-s---", lv_merging: "1", lv_tags: markOf("merging") });
    for (const there of [{ ...begun, lv_merge_failed: "0" }, begun]) {
      const asked = showing(report(there, full));
      const handlers = handlersOn("LvRestore", asked);
      const seen = await handlers.read(scheduled);
      expect(seen).toEqual({ ...scheduled, state: "failed" });
      expect(handlers.warnings.join("\n")).toMatch(
        /is now failed, was scheduled.*vm1-snap ran full before its merge into VgVm\/vm1 began.*lvremove VgVm\/vm1-snap/s,
      );
      expect(await handlers.read(seen ?? {})).toEqual(seen);
      for (const triggers of [[], ["again"]])
        await expect(handlers.update(seen ?? {}, { ...complete, triggers })).rejects.toThrow(
          /SNAPSHOT_OVERFLOWED.*VgVm\/vm1-snap ran full.*lvremove VgVm\/vm1-snap.*change `triggers`.*take this resource out of the program/s,
        );
      expect(asked.changes).toEqual([]);
    }
  });

  it("whose snapshot runs full while it is followed is that error too", async () => {
    const full = waiting(markOf("merging"), "0").replaceAll("Sri-a", "Sri-I");
    const asked = turning(waiting(markOf("merging"), "0"), waiting(markOf("merging"), "0"), full);
    await expect(handlersOn("LvRestore", asked).update(scheduled, complete)).rejects.toThrow(
      /SNAPSHOT_OVERFLOWED/,
    );
  });

  describe("whose snapshot was removed by hand before its merge ended", () => {
    const removed = (tag = markOf("merging")) =>
      showing(gone(tag), ({ argv }) => (argv[2]?.includes("tell removed") ? "removed\n" : ""));
    const uncertain =
      /RESTORE_UNCERTAIN.*was removed, or may have been, before its merge was seen to have ended.*lvchange --deltag '[^']*:m1000\+0:[^']*' --addtag '[^']*:r1000\+0:/s;

    it("is not called restored by a refresh, and an error for an up", async () => {
      const asked = removed();
      const handlers = handlersOn("LvRestore", asked);
      const seen = await handlers.read(scheduled);
      expect(seen).toEqual({ ...scheduled, state: "failed", snapshotRemoved: true });
      expect(handlers.warnings.join("\n")).toMatch(
        /the snapshot of the restore of VgVm\/vm1 was removed, or may have been, before its merge was seen to have ended/,
      );
      await expect(handlers.update(seen ?? {}, complete)).rejects.toThrow(uncertain);
      await expect(handlers.update({ ...scheduled, triggers: [] }, complete)).rejects.toThrow(uncertain);
      await expect(handlers.create(complete)).rejects.toThrow(uncertain);
      expect(asked.changes).toEqual([]);
    });

    it("is not called restored later, when LVM's archive does not tell it any more", async () => {
      const failed = { ...scheduled, state: "failed", snapshotRemoved: true };
      for (const fate of ["unknown\n", "ended\n"]) {
        const asked = showing(gone(markOf("merging")), ({ argv }) =>
          argv[2]?.includes("tell removed") ? fate : "",
        );
        const handlers = handlersOn("LvRestore", asked);
        expect(await handlers.read(failed)).toEqual(failed);
        await expect(handlers.update(failed, complete)).rejects.toThrow(uncertain);
      }
    });

    it.each([
      ["removed\n", "merging", "failed"],
      ["unknown\n", "merging", "restored"],
      ["unknown\n", "scheduled", "failed"],
      ["ended\n", "scheduled", "restored"],
    ])("or may have been: %s, which was %s, is %s", async (fate, was, expected) => {
      const asked = showing(gone(markOf("merging")), ({ argv }) =>
        argv[2]?.includes("tell removed") ? fate : "",
      );
      expect(await handlersOn("LvRestore", asked).read({ ...scheduled, state: was })).toMatchObject({
        state: expected,
      });
    });

    it("or may have been, beside an image's that left the volume half-written: that is said still", async () => {
      const half = markOf("writing", { source: "a".repeat(64), life: "77777777" });
      const asked = showing(gone(`${markOf("merging")},${half}`), ({ argv }) =>
        argv[2]?.includes("emit recordDigest")
          ? fields({ active: "inactive", recordDigest: "", record: "", end: "" })
          : argv[2]?.includes("tell removed")
            ? "unknown\n"
            : "",
      );
      const handlers = handlersOn("LvRestore", asked);
      expect(await handlers.read({ ...scheduled, state: "merging" })).toMatchObject({ state: "failed" });
      expect(handlers.warnings.join("\n")).toMatch(/HALF-WRITTEN.*unless the snapshot was merged/);
      await expect(handlers.update({ ...scheduled, state: "merging" }, complete)).rejects.toThrow(
        /RESTORE_UNCERTAIN.*HALF-WRITTEN.*--deltag '[^']*:w1000/s,
      );
      expect(asked.changes).toEqual([]);
    });

    it.each([
      ["may have been removed", { ...scheduled, state: "failed", snapshotRemoved: true }],
      ["is under way by the state", { ...scheduled, state: "merging" }],
    ])(
      "is not forgotten while an image for other triggers is at its check, nor after that: it %s",
      async (_what, old) => {
        const begun = markOf("begun", {
          ...{ generation: restoreGeneration(["again"]), startedAt: 2000, source: "a".repeat(64) },
        });
        const tags = `${markOf("merging")},${begun}`;
        const record = JSON.stringify({ generation: begun, verify: true });
        const looking = (active: string) =>
          showing(gone(tags), ({ argv }) => {
            if (argv[2]?.includes("tell removed")) return "removed\n";
            const isJob = argv[2]?.includes("emit recordDigest") === true;
            return isJob ? fields({ active, recordDigest: "d", record, end: "" }) : "";
          });
        const seen = await handlersOn("LvRestore", looking("active")).read(old);
        expect(seen).toEqual(old);
        const later = handlersOn("LvRestore", looking("inactive"));
        expect(await later.read(seen ?? {})).toEqual({ ...old, state: "failed", snapshotRemoved: true });
        await expect(later.update(seen ?? {}, complete)).rejects.toThrow(uncertain);
      },
    );

    it("is not followed by another one that nobody asks for", async () => {
      const asked = removed(markOf("merging", { generation: restoreGeneration(["again"]) }));
      for (const old of [state, scheduled])
        await expect(handlersOn("LvRestore", asked).update(old, complete)).rejects.toThrow(uncertain);
      await expect(handlersOn("LvRestore", asked).create(complete)).rejects.toThrow(uncertain);
      expect(asked.changes).toEqual([]);
    });

    it("is an error while it is followed", async () => {
      let looks = 0;
      const merging = waiting(markOf("merging"), "0");
      const asked = fakeHost(({ argv }) => {
        if (argv[0] === "lvs") return ++looks < 3 ? merging : gone(markOf("merging"));
        return argv[2]?.includes("tell removed") ? "removed\n" : "";
      });
      await expect(handlersOn("LvRestore", asked).update(scheduled, complete)).rejects.toThrow(uncertain);
      expect(asked.changes.some(ends)).toBe(false);
    });

    describe("and its mark as well,", () => {
      const failed = { ...scheduled, state: "failed", snapshotRemoved: true };
      const young = "AAAAAA-1111-1111-1111-1111-1111-AAAAAA";
      const wanted = { ...complete, snapshot: { name: "vm1-snap", uuid: young } };
      // The LvSnapshot was taken anew since.
      const there = (tags = "") => report(origin({ lv_tags: tags }), snapshot({ lv_uuid: young }));

      it.each([
        ["none", ""],
        [
          "one of a restore before it",
          markOf("restored", { startedAt: 500, generation: restoreGeneration([2]) }),
        ],
      ])("is not followed by another one that nobody asks for: there is %s", async (_what, tags) => {
        const asked = showing(there(tags));
        const handlers = handlersOn("LvRestore", asked);
        expect(await handlers.read(failed)).toEqual(failed);
        await expect(handlers.update(failed, wanted)).rejects.toThrow(
          /RESTORE_UNCERTAIN.*If not, change `triggers`, and name another snapshot.*take this resource out of the program/s,
        );
        expect(asked.changes).toEqual([]);
      });

      it("is for other triggers", async () => {
        const generation = restoreGeneration(["again"]);
        const asked = turning(
          ...Array.from({ length: 4 }, () => there()),
          gone(markOf("merging", { generation })),
          gone(markOf("restored", { generation })),
        );
        await handlersOn("LvRestore", asked).update(failed, { ...wanted, triggers: ["again"] });
        expect(asked.changes.filter(begins)).toHaveLength(1);
      });

      it("is restored where a later mark says so, by whomever it was set", async () => {
        for (const more of [{}, { startedAt: 2000, generation: restoreGeneration([2]) }])
          expect(
            await handlersOn("LvRestore", showing(there(markOf("restored", more)))).read(failed),
          ).toMatchObject({ state: "restored" });
      });

      it("is what is there, where a later one was begun", async () => {
        const merging = markOf("merging", { startedAt: 500, generation: restoreGeneration([2]) });
        expect(await handlersOn("LvRestore", showing(running(merging))).read(failed)).toMatchObject({
          state: "merging",
        });
      });

      it("nor where one for other triggers was begun and is not asked for any more", async () => {
        const other = { life: "77777777", startedAt: 2000, generation: restoreGeneration(["again"]) };
        const cut = report(
          origin({ lv_tags: markOf("begun", { ...other, source: young }) }),
          snapshot({ lv_uuid: young }),
        );
        expect(await handlersOn("LvRestore", showing(cut)).read(failed)).toEqual(failed);
        const refused = showing(cut);
        await expect(handlersOn("LvRestore", refused).update(failed, wanted)).rejects.toThrow(
          /RESTORE_UNCERTAIN.*began to be restored for these `triggers`.*cut off before it wrote anything/,
        );
        expect(refused.changes).toEqual([]);
        const begun = markOf("begun", { ...other, source: "a".repeat(64) });
        const asked: FakeHost = fakeHost(({ argv }) => {
          const isEnded = asked.changes.length > 0;
          if (argv[0] === "lvs") return there(isEnded ? "" : begun);
          if (!argv[2]?.includes("emit recordDigest")) return "";
          const record = JSON.stringify({ generation: begun, verify: true });
          return fields({ active: isEnded ? "inactive" : "active", recordDigest: "d", record, end: "" });
        });
        const handlers = handlersOn("LvRestore", asked);
        expect(await handlers.read(failed)).toEqual(failed);
        await expect(handlers.update(failed, wanted)).rejects.toThrow(/RESTORE_UNCERTAIN/);
        expect(asked.changes.map(({ argv }) => argv.at(-1))).toEqual([begun]);
      });

      it("is forgotten by a removal", async () => {
        const asked = showing(there());
        await handlersOn("LvRestore", asked).remove(failed);
        expect(asked.changes).toEqual([]);
      });
    });

    it("can be forgotten", async () => {
      let turn = 0;
      const asked = fakeHost(({ argv }) => {
        if (argv[0] === "lvs") return turn++ === 0 ? gone(markOf("merging")) : gone("");
        return argv[2]?.includes("tell removed") ? "removed\n" : "";
      });
      const handlers = handlersOn("LvRestore", asked);
      await handlers.remove({ ...scheduled, state: "failed" });
      expect(asked.changes.map(({ argv }) => argv[3])).toEqual([markOf("merging")]);
      expect(handlers.warnings).toEqual([expect.stringMatching(/how much of it was merged cannot be told/)]);
    });
  });

  it("that is cancelled goes on, and that is said", async () => {
    const controller = new AbortController();
    const asked = turning(running(markOf("merging")));
    const handlers = createHandlers(resourceType("LvRestore"), {
      openHost: async () => asked,
      progress: (line) => {
        if (line.includes("% merged")) controller.abort();
      },
      warn: () => undefined,
      signal: controller.signal,
    });
    const kept = { ...state, state: "merging", restoredAt: "" };
    await expect(handlers.update(kept, complete)).rejects.toMatchObject({
      message: expect.stringMatching(/CANCELLED.*the merge itself goes on.*follows it to its end/s),
      state: { state: "merging" },
    });
    expect(asked.changes).toEqual([]);
  });

  it("that LVM refuses is an error with LVM's words, and no restore is kept", async () => {
    const asked = showing(valid, (command) =>
      begins(command) ? { exitCode: 5, stderr: "  Can't get lock for VgVm" } : "",
    );
    await expect(handlersOn("LvRestore", asked).create(complete)).rejects.toThrow(/LVM_LOCKED/);
  });
});

describe("an image for other triggers, taken back while it is checked,", () => {
  const begun = markOf("begun", {
    ...{ generation: restoreGeneration(["again"]), life: "77777777", startedAt: 2000 },
    ...{ source: "a".repeat(64) },
  });
  const wanted = { ...complete, snapshot: { name: "vm1-snap", uuid: originUuid } };
  /** `tags`: beside the image's mark while its job runs, and then. */
  const host = (...tags: [string, string, string?]): FakeHost => {
    const asked: FakeHost = fakeHost(({ argv }) => {
      const at = asked.changes.length;
      // The LvSnapshot was taken anew since.
      if (argv[0] === "lvs")
        return report(
          origin({ lv_tags: at === 0 ? `${tags[0]},${begun}` : (tags[at] ?? tags[1]) }),
          snapshot({ lv_uuid: originUuid }),
        );
      if (!argv[2]?.includes("emit recordDigest")) return "";
      const record = JSON.stringify({ generation: begun, verify: true });
      return fields({ active: at === 0 ? "active" : "inactive", recordDigest: "d", record, end: "" });
    });
    return asked;
  };

  it("is ended, and no snapshot is merged instead", async () => {
    const asked = host(markOf("restored"), markOf("restored"));
    const kept = { ...state, state: "checking", restoredImage: "a".repeat(64), restoreId: "77777777" };
    expect(await handlersOn("LvRestore", asked).update(kept, wanted)).toMatchObject({
      ...{ state: "restored", restoredSnapshot: uuid, restoreId: "0123abcd", triggers: [] },
    });
    expect(asked.changes.some(begins)).toBe(false);
    expect(asked.changes[0]?.argv.at(-1)).toBe(begun);
  });

  it.each([
    ["", ""],
    [", and whose earlier one's mark was removed", "theirs"],
  ])("of which a refresh told%s, is ended, and no snapshot is merged instead", async (_how, left) => {
    const tags = left || markOf("restored");
    const looked = handlersOn("LvRestore", host(tags, tags));
    const kept = (await looked.read(state)) ?? {};
    expect(kept).toEqual({ ...state, state: "unmarked" });
    expect(looked.warnings).toEqual([
      expect.stringMatching(
        /another restore of VgVm\/vm1 was begun at 1970-01-01T00:33:20.* has written nothing yet; `pulumi up` .* ends it for these/,
      ),
    ]);
    expect(await looked.read(kept)).toEqual(kept);
    const asked = host(tags, tags, markOf("restored"));
    expect(await handlersOn("LvRestore", asked).update(kept, wanted)).toEqual({
      ...state,
      ...wanted,
      snapshotRemoved: true,
    });
    expect(asked.changes.some(begins)).toBe(false);
    expect(asked.changes.slice(1).map(({ argv }) => argv.slice(0, 4))).toEqual(
      left ? [["lvchange", "-y", "--addtag", markOf("restored")]] : [],
    );
  });
});

describe("an image for other triggers has left the origin half-written, and LVM's metadata of before is brought back", () => {
  const sha256 = "a".repeat(64);
  const again = { generation: restoreGeneration(["again"]), life: "77777777", source: sha256 };
  const half = {
    ...{ ...state, state: "restoring", snapshotRemoved: false, restoredSnapshot: "", restoredImage: sha256 },
    ...{ restoreId: again.life, generation: again.generation, seconds: 0 },
    ...{ startedAt: "1970-01-01T00:33:20.000Z", restoredAt: "" },
  };
  const begun = markOf("begun", { ...again, startedAt: 2000 });
  const noJob = (command: RemoteCommand) =>
    command.argv[2]?.includes("emit recordDigest")
      ? fields({ active: "inactive", recordDigest: "", record: "", end: "" })
      : "";

  it.each([
    ["the restore before it", markOf("restored")],
    ["the restore before it, and one before its first byte", `${markOf("restored")},${begun}`],
    ["its own before its first byte", begun],
    ["a merge before it, whose end nobody has marked", markOf("merging")],
  ])("with the mark of %s: it is still called so, and a removal leaves no mark", async (_what, tags) => {
    const handlers = handlersOn("LvRestore", showing(gone(tags), noJob));
    expect(await handlers.read(half)).toEqual(half);
    expect(handlers.warnings.join("\n")).toMatch(/HALF-WRITTEN.*nobody goes on with it/);
    const removing: FakeHost = fakeHost((command) => {
      if (command.argv[0] !== "lvs") return noJob(command);
      return gone(removing.changes.length === 0 ? tags : "");
    });
    await handlersOn("LvRestore", removing).remove(half);
    expect(removing.changes.flatMap(({ argv }) => argv.filter((one) => one.includes(":0123abcd:")))).toEqual(
      tags.split(",").filter((one) => one.includes(":0123abcd:")),
    );
  });

  it("with the mark of a merge that was cut off as it began: a removal leaves none of its marks", async () => {
    const cut = markOf("begun", { startedAt: 3000 });
    const removing: FakeHost = fakeHost((command) => {
      if (command.argv[0] !== "lvs") return noJob(command);
      const left = removing.changes.length === 0 ? [cut, theirs("begun")] : [theirs("begun")];
      return report(origin({ lv_tags: left.join(",") }), snapshot());
    });
    await handlersOn("LvRestore", removing).remove(half);
    expect(removing.changes.map(({ argv }) => argv.slice(2, -3))).toEqual([["--deltag", cut]]);
  });

  it("is not called so where another resource has restored it since, and nothing is restored unasked", async () => {
    const healed = { owner: "o/p/other/r", life: "99999999", generation: restoreGeneration([2]) };
    const lvs = (startedAt: number) =>
      report(origin({ lv_tags: markOf("restored", { ...healed, startedAt }) }), snapshot());
    const handlers = handlersOn("LvRestore", showing(lvs(1999), noJob));
    expect(await handlers.read(half)).toEqual(half);
    const asked = showing(lvs(3000), (command) =>
      begins(command) ? new LvmNbdError("LVM_LOCKED", { message: "begun" }) : noJob(command),
    );
    const looked = handlersOn("LvRestore", asked);
    expect(await looked.read(half)).toEqual(half);
    expect(looked.warnings).toEqual([expect.stringMatching(/broke off.*o\/p\/other\/r has restored it/)]);
    await looked.remove(half);
    expect(looked.warnings.join("\n")).not.toContain("HALF");
    await expect(handlersOn("LvRestore", asked).update(half, complete)).rejects.toThrow(
      /RESTORE_UNCERTAIN.*broke off that was begun at 1970-01-01T00:33:20.*o\/p\/other\/r has restored it at 1970-01-01T00:50:00.*take this resource out of the program.*change `triggers`/s,
    );
    expect(asked.changes).toEqual([]);
    await expect(
      handlersOn("LvRestore", asked).update(half, { ...complete, triggers: ["again"] }),
    ).rejects.toThrow("begun");
    expect(asked.changes.filter(begins)).toHaveLength(1);
  });

  it("keeps others from using it by its mark again only where something can be restored", async () => {
    const done = markOf("restored", { ...again, startedAt: 2000, seconds: 0 });
    const right = new RegExp(
      `If its content was put right since, .lvchange --addtag '${done.replaceAll("+", "\\+")}'`,
    );
    const looked = handlersOn("LvRestore", showing(valid, noJob));
    await looked.read(half);
    expect(looked.warnings.join("\n")).toMatch(right);
    const inUse = `process\t${Buffer.from("qemu (pid 7)").toString("base64")}\n`;
    const held = showing(valid, (command) =>
      command.argv[4] === "/dev/VgVm/vm1" && !command.argv[2]?.includes("for device")
        ? inUse
        : noJob(command),
    );
    const other = { name: "vm1-snap", uuid: originUuid };
    for (const [asked, wanted, why] of [
      [held, complete, /VOLUME_IN_USE.*open in qemu/],
      [showing(valid, noJob), { ...complete, snapshot: other }, /IDENTITY_MISMATCH/],
    ] as const) {
      const error: unknown = await handlersOn("LvRestore", asked)
        .update(half, wanted)
        .catch((reason: unknown) => reason);
      expect(String(error)).toMatch(why);
      expect(String(error)).toMatch(/by Pulumi's state VgVm\/vm1 is HALF-WRITTEN/);
      expect(String(error)).toMatch(right);
      expect(asked.changes).toEqual([]);
    }
    const free = showing(valid, noJob);
    await handlersOn("LvRestore", free)
      .update(half, complete)
      .catch(() => undefined);
    expect(free.changes[0]?.argv.slice(0, 3)).toEqual(["lvchange", "-y", "--addtag"]);
  });

  it.each([
    ["its own", again, ["again"]],
    ["others, which are declared now", { generation: restoreGeneration([2]), life: "88888888" }, [2]],
  ])(
    "with an earlier mark for %s, which may be of before or of a clock that went back: it is still called so, and not restored",
    async (_whose, more, triggers) => {
      const mark = markOf("restored", { ...more, startedAt: 500 });
      const there = report(origin({ lv_tags: mark }), snapshot());
      const handlers = handlersOn("LvRestore", showing(there, noJob));
      expect(await handlers.read(half)).toEqual(half);
      expect(handlers.warnings.join("\n")).toMatch(/HALF-WRITTEN/);
      const asked = showing(there, (command) =>
        begins(command) ? new LvmNbdError("LVM_LOCKED", { message: "begun" }) : noJob(command),
      );
      const declaredNow = { ...complete, triggers };
      await expect(handlersOn("LvRestore", asked).update(half, declaredNow)).rejects.toThrow(
        /RESTORE_UNCERTAIN.*begun at 1970-01-01T00:33:20.*restored for these `triggers` at 1970-01-01T00:08:20.*lvchange .*--addtag '[^']*:r2000\+0:.*--addtag '[^']*:r2001\+60:.*change `triggers`/s,
      );
      expect(asked.changes).toEqual([]);
      await expect(
        handlersOn("LvRestore", asked).update(half, { ...complete, triggers: ["once more"] }),
      ).rejects.toThrow("begun");
      const right = markOf("restored", { ...again, startedAt: 2000, seconds: 0 });
      const done = showing(gone(`${mark},${right}`), noJob);
      expect(await handlersOn("LvRestore", done).update(half, declaredNow)).toMatchObject({
        state: "restored",
      });
      expect(done.changes.some(begins)).toBe(false);
    },
  );

  it.each([
    ["its own", { ...again, startedAt: 2000 }],
    ["a later one's", { startedAt: 3000 }],
  ])("is not called so where the mark is %s, which has ended", async (_what, more) => {
    const handlers = handlersOn("LvRestore", showing(gone(markOf("restored", more)), noJob));
    expect(await handlers.read(half)).toMatchObject({ state: "restored" });
    expect(handlers.warnings.join("\n")).not.toContain("HALF");
  });
});

describe("an image has left the origin half-written, and a snapshot is merged now", () => {
  const written = markOf("writing", { source: "a".repeat(64), life: "77777777" });
  const kept = { ...state, state: "scheduled", restoredAt: "", seconds: 0, snapshotRemoved: false };
  const both = (stage: "begun" | "merging") => `${markOf(stage)},${written}`;
  /** Shows the volumes as they are after so many changes. No job writes the image. */
  const host = (...after: string[]) => {
    const asked: FakeHost = fakeHost(({ argv }) => {
      if (argv[0] === "lvs") return after[Math.min(asked.changes.length, after.length - 1)] ?? "";
      if (argv[2]?.includes("tell removed")) return "ended\n";
      const isJob = argv[2]?.includes("emit recordDigest") === true;
      return isJob ? fields({ active: "inactive", recordDigest: "", record: "", end: "" }) : "";
    });
    return asked;
  };

  it("while that waits a refresh, an up and a removal say so", async () => {
    const handlers = handlersOn("LvRestore", host(waiting(both("merging"))));
    const told = () => handlers.warnings.splice(0).join("\n");
    expect(await handlers.read(kept)).toEqual(kept);
    const half = /VgVm\/vm1 is HALF-WRITTEN.*Use nothing of it before the merge has begun/;
    expect(told()).toMatch(half);
    expect(await handlers.update(kept, complete)).toEqual(kept);
    expect(told()).toMatch(half);
    const removing = handlersOn("LvRestore", host(waiting(both("merging")), waiting("")));
    await removing.remove(kept);
    expect(removing.warnings.join("\n")).toMatch(half);
  });

  it("no more once it has begun: the mark of the image is removed", async () => {
    const handlers = handlersOn("LvRestore", host(running(both("merging"))));
    expect(await handlers.read(kept)).toMatchObject({ state: "merging" });
    expect(handlers.warnings.join("\n")).not.toContain("HALF");
    const asked = host(running(both("merging")), gone(markOf("merging")), gone(markOf("restored")));
    expect(await handlersOn("LvRestore", asked).update(kept, complete)).toMatchObject({ state: "restored" });
    expect(asked.changes.map(({ argv }) => argv.slice(0, 4).join(" "))[0]).toBe(
      `lvchange -y --deltag ${written}`,
    );
  });

  it("where it ended while nobody looked, up removes it too", async () => {
    const ended = gone(both("merging"));
    const seen = await handlersOn("LvRestore", host(ended)).read(kept);
    expect(seen).toMatchObject({ state: "merging", snapshotRemoved: true });
    const asked = host(ended, gone(markOf("restored")));
    expect(await handlersOn("LvRestore", asked).update(seen ?? {}, complete)).toMatchObject({
      state: "restored",
    });
    expect(asked.changes.map(({ argv }) => argv.at(-1))).toEqual([written]);
  });

  it("and may have been: the command of the error that says so is heeded, and nothing is restored again", async () => {
    const asked = host(gone(both("begun")));
    const error: unknown = await handlersOn("LvRestore", asked)
      .update(kept, complete)
      .catch((reason: unknown) => reason);
    const commands = /`lvchange ((?:--(?:del|add)tag '[^']+' ?)+)[^`]*`/.exec(String(error));
    const changes = [...(commands?.[1] ?? "").matchAll(/--(del|add)tag '([^']+)'/g)];
    const left = new Set(both("begun").split(","));
    for (const [, how, tag = ""] of changes) how === "add" ? left.add(tag) : left.delete(tag);
    expect([...left]).toEqual([markOf("restored", { seconds: 0 })]);
    // Nor where the mark of the image is not removed with it.
    const done = markOf("restored", { startedAt: 2000 });
    const seen = (tags: string) => report(origin({ lv_tags: tags }), snapshot());
    for (const tags of [`${done},${written}`, `${written},${done}`]) {
      expect(await handlersOn("LvRestore", host(seen(tags))).read(kept)).toMatchObject({ state: "merging" });
      const up = host(seen(tags), seen(done));
      expect(await handlersOn("LvRestore", up).update(kept, complete)).toMatchObject({ state: "restored" });
      expect(up.changes.map(({ argv }) => argv.slice(0, 4))).toEqual([
        ["lvchange", "-y", "--deltag", written],
      ]);
    }
  });

  it("where the power failed before LVM was told of it, it is half-written and merged by the next up", async () => {
    const lvs = report(origin({ lv_tags: both("begun") }), snapshot());
    const handlers = handlersOn("LvRestore", host(lvs));
    const old = { ...kept, state: "restoring", restoredImage: "a".repeat(64), restoredSnapshot: "" };
    expect(await handlers.read(old)).toMatchObject({ state: "restoring", restoredImage: "a".repeat(64) });
    expect(handlers.warnings.join("\n")).toMatch(/HALF-WRITTEN.*nobody goes on with it/);
    const asked = host(lvs, gone(both("merging")), gone(markOf("restored")));
    expect(await handlersOn("LvRestore", asked).update(old, complete)).toMatchObject({ state: "restored" });
    expect(asked.changes.filter(begins)).toHaveLength(1);
  });

  it("where the power failed just then, and its snapshot is gone, it is not said to be gone, and an error says so", async () => {
    const handlers = handlersOn("LvRestore", host(gone(both("begun"))));
    for (const old of [kept, state]) {
      expect(await handlers.read(old)).toMatchObject({ state: "restoring" });
      expect(handlers.warnings.splice(0).join("\n")).toMatch(/HALF-WRITTEN.*unless the snapshot was merged/);
      await expect(handlers.update({ ...old, state: "restoring" }, complete)).rejects.toThrow(
        /RESTORE_UNCERTAIN.*HALF-WRITTEN.*unless the snapshot was merged/s,
      );
    }
  });
});

describe("what is there already", () => {
  it("and done is left alone, also from another snapshot than the one declared now", async () => {
    const asked = showing(gone(markOf("restored")));
    const handlers = handlersOn("LvRestore", asked);
    const other = { name: "vm1-snap", uuid: "AAAAAA-1111-1111-1111-1111-1111-AAAAAA" };
    await handlers.create({ ...complete, snapshot: other });
    expect(handlers.warnings.join("\n")).toMatch(/not restored again. Change `triggers`/);
    // It becomes the new life's, no more.
    expect(asked.changes.map(({ argv }) => argv[2])).toEqual(["--addtag"]);
  });

  it("and only marked is begun anew", async () => {
    const marked = report(origin({ lv_tags: markOf("begun") }), snapshot());
    const asked = turning(
      ...Array.from({ length: 5 }, () => marked),
      gone(markOf("merging")),
      gone(markOf("restored")),
    );
    await handlersOn("LvRestore", asked).create(complete);
    expect(asked.changes.filter(begins)).toHaveLength(1);
    expect(asked.changes[0]?.argv.at(-1)).toBe(markOf("begun"));
  });

  it("and cut off in the moment it began is done if LVM knows of the merge, and else an error that says what to do", async () => {
    const knows = (answer: string) =>
      showing(gone(markOf("begun")), ({ argv }) => (argv[2]?.includes("echo merged") ? answer : ""));
    const unknown = knows("");
    await expect(handlersOn("LvRestore", unknown).create(complete)).rejects.toThrow(
      /RESTORE_UNCERTAIN.*lvchange --deltag '[^']*:b1000\+0:[^']*' --addtag '[^']*:r1000\+0:/s,
    );
    expect(unknown.changes).toEqual([]);
    const known = knows("merged\n");
    // That host never shows the new mark.
    await expect(handlersOn("LvRestore", known).create(complete)).rejects.toThrow();
    expect(known.changes[0]?.argv.find((one) => one.includes(":m1000+0:"))).toBeDefined();
  });
});

describe("a restore for other triggers that was cut off as it began, after one that has ended", () => {
  const begun = markOf("begun", {
    ...{ generation: restoreGeneration(["again"]), life: "99999999", startedAt: 2000 },
  });
  const pending = report(origin({ lv_tags: begun }), snapshot());
  const unmarked = { ...state, state: "unmarked" };
  const cuts = [
    ["its snapshot is there", pending, /cut off before it wrote anything/],
    ["its snapshot is gone", gone(begun), /cut off .*gone since: whether it was merged/],
  ] as const;

  it.each(cuts)("does not lose the state of the ended one in a refresh: %s", async (_what, lvs, why) => {
    const handlers = handlersOn("LvRestore", showing(lvs));
    expect(await handlers.read(state)).toEqual(unmarked);
    expect(handlers.warnings).toEqual([expect.stringMatching(why)]);
    expect(await handlers.read(unmarked)).toEqual(unmarked);
  });

  it.each(cuts)("is not made up for where nobody asks for one more: %s", async (_what, lvs) => {
    for (const old of [state, unmarked]) {
      const asked = showing(lvs);
      await expect(
        handlersOn("LvRestore", asked).update(old, { ...complete, owner: "o/p/s/renamed" }),
      ).rejects.toThrow(/RESTORE_UNCERTAIN.*lvchange --deltag '[^']*:b2000\+0:/s);
      expect(asked.changes).toEqual([]);
    }
  });

  it("is not either where the mark is of the ended one, as vgcfgrestore brings it back", async () => {
    const asked = showing(report(origin({ lv_tags: markOf("begun") }), snapshot()));
    await expect(handlersOn("LvRestore", asked).update(unmarked, complete)).rejects.toThrow(
      /RESTORE_UNCERTAIN/,
    );
    expect(asked.changes).toEqual([]);
  });

  it.each([["again"], ["once more"]])("is gone on with by an up for `%s`", async (trigger) => {
    const generation = restoreGeneration([trigger]);
    const asked = turning(
      ...Array.from({ length: 5 }, () => pending),
      gone(markOf("merging", { generation })),
      gone(markOf("restored", { generation })),
    );
    await handlersOn("LvRestore", asked).update(unmarked, { ...complete, triggers: [trigger] });
    expect(asked.changes.filter(begins)).toHaveLength(1);
  });

  it("is an error for a new resource where it may have been merged", async () => {
    const other = snapshot({ lv_uuid: "AAAAAA-1111-1111-1111-1111-1111-AAAAAA" });
    const asked = showing(report(origin({ lv_tags: begun }), other));
    const wanted = { ...complete, snapshot: { name: "vm1-snap", uuid: other.lv_uuid } };
    await expect(handlersOn("LvRestore", asked).create(wanted)).rejects.toThrow(
      /RESTORE_UNCERTAIN.*once more/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("is none for a new resource where LVM knows that it was merged: other triggers restore once more", async () => {
    const other = snapshot({ lv_uuid: "AAAAAA-1111-1111-1111-1111-1111-AAAAAA" });
    const asked = showing(report(origin({ lv_tags: begun }), other), (command) => {
      if (begins(command)) return new LvmNbdError("LVM_LOCKED", { message: "begun anew" });
      return command.argv[2]?.includes("echo merged") ? "merged\n" : "";
    });
    const wanted = { ...complete, snapshot: { name: "vm1-snap", uuid: other.lv_uuid } };
    await expect(handlersOn("LvRestore", asked).create(wanted)).rejects.toThrow("begun anew");
    expect(asked.changes.filter(begins).map(({ argv }) => argv.at(-1))).toEqual([begun]);
  });

  it("is not kept where it is the state's own, or of another volume: it goes on by itself", async () => {
    const own = report(origin({ lv_tags: markOf("begun") }), snapshot());
    const another = { ...state, originUuid: "AAAAAA-1111-1111-1111-1111-1111-AAAAAA" };
    for (const old of [{ ...state, state: "merging" }, another]) {
      expect(await handlersOn("LvRestore", showing(own)).read(old)).toBeUndefined();
    }
  });
});

describe("a difference", () => {
  const changesOf = async (wanted: object, kept: object = {}, unknown: ReadonlySet<string> = none) =>
    (
      await handlersOn("LvRestore", untouchedHost()).diff(
        { ...state, ...kept },
        { ...complete, ...wanted },
        unknown,
      )
    ).changes;

  it.each([
    ["nothing", {}, []],
    [
      "another snapshot",
      { snapshot: { name: "vm1-snap", uuid: "AAAAAA-1111-1111-1111-1111-1111-AAAAAA" } },
      [["snapshot", "connection"]],
    ],
    ["another whenOpen", { whenOpen: "atNextActivation" }, [["whenOpen", "connection"]]],
    ["other triggers", { triggers: ["again"] }, [["triggers", "update"]]],
    ["another origin", { origin: "vm2" }, [["origin", "replace"]]],
    ["another group", { volumeGroup: "VgOther" }, [["volumeGroup", "replace"]]],
  ])("by %s", async (_what, wanted, expected) => {
    const changes = await changesOf(wanted);
    expect(changes.map(({ property, effect }) => [property, effect])).toEqual(expected);
  });

  it("by a snapshot that is only known later restores nothing", async () => {
    const { snapshot: _, ...rest } = complete;
    const { changes } = await handlersOn("LvRestore", untouchedHost()).diff(
      state,
      rest,
      new Set(["snapshot"]),
    );
    expect(changes).toEqual([{ property: "snapshot", effect: "connection" }]);
  });

  it.each(["merging", "scheduled"])("by a restore that is still %s is followed", async (now) => {
    expect(await changesOf({}, { state: now })).toEqual([{ property: "state", effect: "update" }]);
  });
});

describe("a refresh", () => {
  it.each([
    ["restored", gone(markOf("restored")), { state: "restored", snapshotRemoved: true, seconds: 60 }],
    [
      "done while nobody looked",
      gone(markOf("merging")),
      { state: "restored", snapshotRemoved: true, restoredAt: "" },
    ],
    ["under way", running(markOf("merging")), { state: "merging", snapshotRemoved: false }],
    ["waiting", waiting(markOf("merging")), { state: "scheduled", snapshotRemoved: false }],
  ])("tells one that is %s", async (what, lvs, expected) => {
    const asked = showing(lvs);
    const handlers = handlersOn("LvRestore", asked);
    expect(await handlers.read(state)).toMatchObject(expected);
    // Whether the snapshot of a merge that nobody followed was removed by hand is asked apart.
    expect(asked.commands).toHaveLength(what === "done while nobody looked" ? 2 : 1);
  });

  it("is quiet about one that is as it was", async () => {
    const handlers = handlersOn("LvRestore", showing(gone(markOf("restored"))));
    expect(await handlers.read(state)).toEqual(state);
    expect(handlers.warnings).toEqual([]);
  });

  it("is not quiet where another resource's image has left the origin half-written since", async () => {
    const handlers = handlersOn("LvRestore", showing(gone(`${markOf("restored")},${theirs("writing")}`)));
    expect(await handlers.read(state)).toEqual(state);
    expect(handlers.warnings.join("\n")).toMatch(
      /VgVm\/vm1 is HALF-WRITTEN by o\/p\/other\/r.*Use nothing of it until that restore is done: run `pulumi up`/,
    );
  });

  it("names what has become of one", async () => {
    const handlers = handlersOn("LvRestore", showing(gone(markOf("restored"))));
    await handlers.read({ ...state, state: "scheduled" });
    expect(handlers.warnings.join("\n")).toContain("is now restored, was scheduled");
  });

  it("finds it on an origin that was renamed", async () => {
    const renamed = gone(markOf("restored")).replace('"lv_name":"vm1"', '"lv_name":"vm9"');
    expect(await handlersOn("LvRestore", showing(renamed)).read(state)).toMatchObject({ origin: "vm9" });
  });

  it("misses one whose origin is gone, though another volume has its name", async () => {
    const another = origin({ lv_uuid: "AAAAAA-1111-1111-1111-1111-1111-AAAAAA" });
    for (const lvs of [report(snapshot()), report(another)])
      expect(await handlersOn("LvRestore", showing(lvs)).read(state)).toBeUndefined();
  });
});

describe("one whose mark was removed", () => {
  it("is not gone: a refresh names it, and up writes that very mark and nothing else", async () => {
    const handlers = handlersOn("LvRestore", showing(valid));
    const seen = await handlers.read(state);
    expect(seen).toEqual({ ...state, state: "unmarked", snapshotRemoved: false });
    expect(handlers.warnings.join("\n")).toMatch(
      /the mark of the restore was removed from VgVm\/vm1; `pulumi up` puts it back and writes nothing/,
    );
    const { changes } = await handlers.diff(seen ?? {}, complete, none);
    expect(changes).toEqual([{ property: "state", effect: "update" }]);
    expect(await handlers.read(seen ?? {})).toEqual(seen);
    const asked = turning(gone(""), gone(markOf("restored")));
    expect(await handlersOn("LvRestore", asked).update(seen ?? {}, complete)).toEqual(state);
    expect(asked.changes.map(({ argv }) => argv.join(" "))).toEqual([
      `lvchange -y --addtag ${markOf("restored")} -S lv_uuid="${originUuid}" VgVm/vm1`,
    ]);
  });

  it("is restored again only for other triggers", async () => {
    const asked = showing(valid, () => new Error("begun"));
    const unmarked = { ...state, state: "unmarked" };
    await expect(
      handlersOn("LvRestore", asked).update(unmarked, { ...complete, triggers: ["again"] }),
    ).rejects.toThrow("begun");
    expect(asked.changes).toEqual([]);
    const merged = turning(
      ...Array.from({ length: 4 }, () => valid),
      gone(markOf("merging", { generation: restoreGeneration(["again"]) })),
      gone(markOf("restored", { generation: restoreGeneration(["again"]) })),
    );
    await handlersOn("LvRestore", merged).update(unmarked, { ...complete, triggers: ["again"] });
    expect(merged.changes.filter(begins)).toHaveLength(1);
  });

  const again = { generation: restoreGeneration(["again"]), life: "99999999" };

  it.each(["restored", "merging"] as const)(
    "is none where a later restore has an earlier time, since the host's clock had gone back: %s, it is not restored again",
    async (stage) => {
      // The LvSnapshot was taken anew since.
      const seen = report(
        origin({ lv_tags: markOf(stage, { ...again, startedAt: 500 }) }),
        snapshot({ lv_uuid: "new" }),
      );
      const done = seen.replace(":m500+0:", ":r500+60:");
      const asked = turning(...(stage === "restored" ? [seen] : [seen, seen]), done);
      const handlers = handlersOn("LvRestore", asked);
      const wanted = { ...complete, triggers: ["again"], snapshot: { name: "vm1-snap", uuid: originUuid } };
      expect(await handlers.update(state, wanted)).toMatchObject({
        ...{
          state: "restored",
          triggers: ["again"],
          startedAt: "1970-01-01T00:08:20.000Z",
          restoreId: "99999999",
        },
      });
      expect(asked.changes.filter((command) => !ends(command))).toEqual([]);
      expect(asked.changes.length).toBe(stage === "restored" ? 0 : 1);
      expect(handlers.warnings.join("\n")).toMatch(/restored for these `triggers` already.*00:08:20/);
    },
  );

  it("is none, and nothing is restored, where state and mark tell of different ones and nobody asks for another", async () => {
    const mark = markOf("restored", { ...again, startedAt: 2000 });
    const asked = showing(report(origin({ lv_tags: mark }), snapshot()));
    const renamed = { ...complete, owner: "o/p/s/renamed" };
    await expect(handlersOn("LvRestore", asked).update(state, renamed)).rejects.toThrow(
      new RegExp(
        `RESTORE_UNCERTAIN.*at 1970-01-01T00:16:40.*at 1970-01-01T00:33:20.*--deltag '${mark.replaceAll("+", "\\+")}'`,
        "s",
      ),
    );
    expect(asked.changes).toEqual([]);
  });

  it("is none, and nothing is restored, where an up for other triggers was cancelled and is taken back", async () => {
    const merged = report(
      origin({ lv_tags: markOf("merging", { ...again, startedAt: 2000 }) }),
      snapshot({ lv_uuid: "new" }),
    );
    const asked = turning(merged, merged, merged.replace(":m2000+0:", ":r2000+60:"));
    const handlers = handlersOn("LvRestore", asked);
    const kept = { ...state, state: "merging", restoreId: again.life, startedAt: "1970-01-01T00:33:20.000Z" };
    const wanted = { ...complete, snapshot: { name: "vm1-snap", uuid: originUuid } };
    expect(await handlers.update(kept, wanted)).toMatchObject({
      ...{ state: "restored", triggers: [], restoreId: again.life, restoredSnapshot: uuid },
    });
    expect(asked.changes.filter((command) => !ends(command))).toEqual([]);
    expect(handlers.warnings.join("\n")).toMatch(
      /restored at 1970-01-01T00:33:20.* for other `triggers` than these.*not restored again/,
    );
  });

  it("is that of the restore that was made, for other triggers than the state has: it is not made again for these", async () => {
    const tag = markOf("restored", again);
    const kept = await handlersOn("LvRestore", showing(gone(tag))).read({
      ...{ ...state, state: "merging", restoreId: again.life, generation: restoreGeneration(["again"]) },
    });
    expect(kept).toMatchObject({ state: "restored", triggers: [] });
    const lost = await handlersOn("LvRestore", showing(valid)).read(kept ?? {});
    expect(lost).toEqual({ ...kept, state: "unmarked", snapshotRemoved: false });
    // For the state's own triggers neither.
    for (const [triggers, why] of [
      [["again"], /restored for these `triggers` already, .* at 1970-01-01T00:16:40.*not restored again/],
      [[], /for other `triggers` than these.*change `triggers`: neither to these nor to those/],
    ] as const) {
      const asked = turning(valid, gone(tag));
      const wanted = { ...complete, triggers };
      const handlers = handlersOn("LvRestore", asked);
      expect(await handlers.update(lost ?? {}, wanted)).toMatchObject({ triggers });
      expect(asked.changes.map(({ argv }) => argv[3])).toEqual([tag]);
      expect(handlers.warnings).toEqual([expect.stringMatching(why)]);
    }
    // A state of before has its triggers alone.
    const { generation: _, ...old } = state;
    expect(await handlersOn("LvRestore", showing(valid)).read(old)).toMatchObject({ state: "unmarked" });
  });

  it("is none either where the state tells of another one that had not ended", async () => {
    const asked = showing(
      report(origin({ lv_tags: markOf("restored", { ...again, startedAt: 2000 }) }), snapshot()),
    );
    const kept = { ...state, state: "merging" };
    // Without its mark the volume would be restored.
    await expect(handlersOn("LvRestore", asked).update(kept, complete)).rejects.toThrow(
      /RESTORE_UNCERTAIN.*began to be restored for these `triggers`(?!.*--deltag).*`pulumi refresh`/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("is removed by doing nothing", async () => {
    const asked = showing(gone(""));
    await handlersOn("LvRestore", asked).remove({ ...state, state: "unmarked" });
    expect(asked.changes).toEqual([]);
  });
});

describe("one whose mark was removed before it was seen to have ended", () => {
  const young = "AAAAAA-1111-1111-1111-1111-1111-AAAAAA";
  const kept = { ...state, state: "merging", restoredAt: "", seconds: 0, snapshotRemoved: false };
  const each = ["merging", "scheduled"].map((now) => [now, { ...kept, state: now }] as const);
  // The LvSnapshot was taken anew since.
  const wanted = { ...complete, snapshot: { name: "vm1-snap", uuid: young } };
  const earlier = markOf("restored", { startedAt: 500, generation: restoreGeneration([2]) });
  const others = { generation: restoreGeneration(["again"]), life: "99999999", startedAt: 2000 };
  const there = (tags = "") => report(origin({ lv_tags: tags }), snapshot({ lv_uuid: young }));
  const answering =
    (fate: string) =>
    ({ argv }: RemoteCommand) =>
      argv[2]?.includes("tell removed") ? fate : "";

  it.each(each)(
    "was %s and may not have been merged: it is not begun anew for the same triggers",
    async (_was, old) => {
      for (const [fate, tags] of [
        ["unknown\n", ""],
        ["removed\n", earlier],
      ] as const) {
        const asked = showing(there(tags), answering(fate));
        const handlers = handlersOn("LvRestore", asked);
        const seen = await handlers.read(old);
        expect(seen).toEqual({ ...old, state: "failed", snapshotRemoved: true });
        for (const told of [old, seen ?? {}])
          await expect(handlers.update(told, wanted)).rejects.toThrow(
            tags === ""
              ? /RESTORE_UNCERTAIN.*was removed, or may have been, before its merge was seen to have ended/
              : /RESTORE_UNCERTAIN.*was not seen to have ended.*which of both came last cannot be told/,
          );
        expect(asked.changes).toEqual([]);
      }
    },
  );

  it.each(each)("was %s and has ended: up puts the mark back and restores nothing", async (_was, old) => {
    const handlers = handlersOn("LvRestore", showing(there(), answering("ended\n")));
    expect(await handlers.read(old)).toEqual({ ...old, state: "unmarked", snapshotRemoved: true });
    const asked: FakeHost = fakeHost((command) => {
      const tags = ["", markOf("merging"), markOf("restored")][asked.changes.length];
      return command.argv[0] === "lvs" ? there(tags) : answering("ended\n")(command);
    });
    expect(await handlersOn("LvRestore", asked).update(old, wanted)).toMatchObject({ state: "restored" });
    expect(asked.changes[0]?.argv.slice(2, 4)).toEqual(["--addtag", markOf("merging")]);
    expect(asked.changes.slice(1).map(ends)).toEqual([true]);
  });

  it("was for triggers that were taken back, and has ended: the volume is told to hold what those restored", async () => {
    const { life, generation } = others;
    const [merging, done] = [
      markOf("merging", { life, generation }),
      markOf("restored", { life, generation }),
    ];
    const asked: FakeHost = fakeHost((command) => {
      const tags = ["", merging, done][asked.changes.length];
      return command.argv[0] === "lvs" ? there(tags) : answering("ended\n")(command);
    });
    const handlers = handlersOn("LvRestore", asked);
    expect(await handlers.update({ ...kept, restoreId: life, generation }, wanted)).toMatchObject({
      ...{ state: "restored", restoreId: life, generation },
    });
    expect(handlers.warnings).toEqual([expect.stringMatching(/for other `triggers` than these/)]);
    expect(asked.changes[0]?.argv.slice(2, 4)).toEqual(["--addtag", merging]);
    expect(asked.changes.slice(1).map(ends)).toEqual([true]);
  });

  it.each([
    ["those that were taken back", others.generation, []],
    ["those that are declared", restoreGeneration([]), []],
    ["others than are declared now", restoreGeneration([]), [2]],
  ])(
    "was for %s, beside another one's mark that may be of after it, the host's clock having gone back: it is not told to have ended, nor after a refresh",
    async (_what, generation, triggers) => {
      const asked = showing(there(earlier), answering("ended\n"));
      const old = { ...kept, restoreId: others.life, generation };
      const seen = await handlersOn("LvRestore", asked).read(old);
      expect(seen).toEqual({ ...old, state: "failed", snapshotRemoved: true });
      for (const told of [old, seen ?? {}])
        await expect(handlersOn("LvRestore", asked).update(told, { ...wanted, triggers })).rejects.toThrow(
          /RESTORE_UNCERTAIN.*Look at the content of VgVm\/vm1.*lvchange .*--addtag '[^']*:r1000\+0:.*change `triggers`/s,
        );
      expect(asked.changes).toEqual([]);
    },
  );

  describe("beside another one's mark, of the declared triggers,", () => {
    const before = markOf("restored", { startedAt: 500, life: "88888888" });
    const mine = markOf("restored", { ...others, startedAt: 1000, seconds: 0 });
    const old = { ...kept, restoreId: others.life, generation: others.generation };

    it.each([
      ["its own", others.life],
      ["the other's", "88888888"],
    ])("and the content is %s: the command that the error prints says so", async (_whose, restoreId) => {
      const asked = showing(there(before), answering("ended\n"));
      const error: unknown = await handlersOn("LvRestore", asked)
        .update(old, wanted)
        .catch((why) => why);
      expect(String(error)).toMatch(/RESTORE_UNCERTAIN.*which of both came last/);
      expect(String(error)).not.toMatch(/how much of it was merged/);
      const printed = [
        ...String(error).matchAll(/`lvchange --deltag '([^']*)' --addtag '([^']*)' VgVm\/vm1`/g),
      ];
      expect(printed.map(([, drop]) => drop)).toEqual([before, before]);
      const add = printed.map(([, , tag]) => tag ?? "").find((tag) => tag.includes(`:${restoreId}:`));
      const said = showing(there(add));
      const handlers = handlersOn("LvRestore", said);
      expect(await handlers.update(old, wanted)).toMatchObject({ state: "restored", restoreId });
      expect(said.changes).toEqual([]);
    });

    it("and somebody has said that it came last, beside that: the other's goes", async () => {
      const asked: FakeHost = fakeHost(({ argv }) =>
        argv[0] === "lvs" ? there(asked.changes.length === 0 ? `${before},${mine}` : mine) : "",
      );
      const handlers = handlersOn("LvRestore", asked);
      expect(await handlers.update(old, wanted)).toMatchObject({
        ...{ state: "restored", restoreId: others.life, restoredSnapshot: uuid },
      });
      expect(asked.changes.map(({ argv }) => argv.join(" "))).toEqual([
        expect.stringMatching(
          /--addtag \S*:99999999:r1000.*--deltag \S*:88888888:r500|--deltag \S*:88888888:r500.*--addtag \S*:99999999:r1000/,
        ),
      ]);
      expect(handlers.warnings).toEqual([expect.stringMatching(/for other `triggers` than these/)]);
    });
  });

  it.each([
    ["merging", running],
    ["scheduled", waiting],
  ])("is %s still: up puts the mark back and follows", async (now, lvs) => {
    const old = { ...kept, state: now };
    const handlers = handlersOn("LvRestore", showing(lvs("")));
    expect(await handlers.read(old)).toEqual(old);
    expect(handlers.warnings.join("\n")).toMatch(/mark of the restore was removed.*puts it back and follows/);
    const asked: FakeHost = fakeHost((command) => {
      const shown = [lvs(""), gone(markOf("merging")), gone(markOf("restored"))][asked.changes.length];
      return command.argv[0] === "lvs" ? (shown ?? "") : answering("unknown\n")(command);
    });
    expect(await handlersOn("LvRestore", asked).update(old, complete)).toMatchObject({ state: "restored" });
    expect(asked.changes[0]?.argv.slice(2, 4)).toEqual(["--addtag", markOf("merging")]);
    expect(asked.changes.slice(1).map(ends)).toEqual([true]);
    const removing = showing(lvs(""));
    await handlersOn("LvRestore", removing).remove(old);
    expect(removing.changes).toEqual([]);
  });

  it.each(each)(
    "was %s and was undone, with its snapshot there again: it is not merged once more unasked",
    async (_was, old) => {
      const asked = showing(valid);
      const handlers = handlersOn("LvRestore", asked);
      const seen = await handlers.read(old);
      expect(seen).toEqual({ ...old, state: "failed" });
      expect(await handlers.read(seen ?? {})).toEqual(seen);
      for (const told of [old, seen ?? {}])
        await expect(handlers.update(told, complete)).rejects.toThrow(
          /RESTORE_UNCERTAIN.*VgVm\/vm1-snap is not being merged any more.*If not, change `triggers`\. To leave/s,
        );
      expect(asked.changes).toEqual([]);
      const other = showing(valid, (command) =>
        begins(command) ? new LvmNbdError("LVM_LOCKED", { message: "begun" }) : "",
      );
      await expect(
        handlersOn("LvRestore", other).update(old, { ...complete, triggers: ["again"] }),
      ).rejects.toThrow("begun");
    },
  );

  it.each(["unknown", "ended"])(
    "was for others than those that are declared, for which there is an earlier mark: nothing is restored, its end is %s",
    async (fate) => {
      const asked = showing(there(earlier), answering(`${fate}\n`));
      for (const now of ["merging", "scheduled"])
        await expect(
          handlersOn("LvRestore", asked).update({ ...kept, state: now }, { ...wanted, triggers: [2] }),
        ).rejects.toThrow(
          /RESTORE_UNCERTAIN.*merged into VgVm\/vm1 by a restore that was begun at 1970-01-01T00:16:40.*restored for these `triggers` at 1970-01-01T00:08:20.*--addtag '[^']*:r1000\+0:/s,
        );
      expect(asked.changes).toEqual([]);
    },
  );

  it.each(each)("was %s: it is remembered while another one is only begun", async (_was, old) => {
    const cut = report(
      origin({ lv_tags: markOf("begun", { ...others, source: young }) }),
      snapshot({ lv_uuid: young }),
    );
    const asked = showing(cut);
    expect(await handlersOn("LvRestore", asked).read(old)).toEqual(old);
    await expect(handlersOn("LvRestore", asked).update(old, wanted)).rejects.toThrow(
      /RESTORE_UNCERTAIN.*began to be restored for these `triggers`.*cut off before it wrote anything/,
    );
    expect(asked.changes).toEqual([]);
  });
});

describe("a removal", () => {
  it("takes the mark away and nothing else", async () => {
    const asked = turning(gone(markOf("restored")), gone(""));
    await handlersOn("LvRestore", asked).remove(state);
    expect(asked.changes.map(({ argv }) => argv.join(" "))).toEqual([
      `lvchange -y --deltag ${markOf("restored")} -S lv_uuid="${originUuid}" VgVm/vm1`,
    ]);
  });

  it("of one that is under way says that the merge goes on", async () => {
    const handlers = handlersOn("LvRestore", turning(running(markOf("merging")), running("")));
    await handlers.remove(state);
    expect(handlers.warnings.join("\n")).toMatch(/is merging and goes on/);
  });

  it("of one whose snapshot ran full while it waited says that nothing was restored, and what ends the merge", async () => {
    const full = (tag: string) => waiting(tag).replaceAll("Sri-a", "Sri-I");
    const handlers = handlersOn("LvRestore", turning(full(markOf("merging")), full("")));
    await handlers.remove({ ...state, state: "failed" });
    expect(handlers.warnings).toEqual([
      expect.stringMatching(/ran full before its merge.*nothing is restored.*lvremove VgVm\/vm1-snap/),
    ]);
  });

  it("leaves a mark alone that has become another life's", async () => {
    const asked = showing(gone(markOf("restored", { life: "99999999" })));
    await handlersOn("LvRestore", asked).remove(state);
    expect(asked.changes).toEqual([]);
  });
});

it("is not read by its id: declared otherwise than it was, it would be done again", async () => {
  const asked = untouchedHost();
  await expect(handlersOn("LvRestore", asked).find("server1/VgVm/vm1", importer)).rejects.toThrow(
    /INVALID_INPUT.*something that was done once.*leave it out of the program/s,
  );
  expect(asked.commands).toEqual([]);
});
