/** Restores from images: what is refused by looking, and the rest on a host whose scripts run in a real shell. */
import { execFile, execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers, type Handlers } from "../../provider/core/handlers.js";
import { ownerInTag, ownerMark } from "../../provider/core/owner.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { resourceType } from "../../provider/core/registry.js";
import { restoreGeneration, restoreMarksAmong, restoreTagOf } from "../../provider/core/restoreMark.js";
import { restoreJob, unfollowedMinutes } from "../../provider/linux/imageRestore.js";
import type { RemoteCommand } from "../../provider/ssh/types.js";
import { CopyHost } from "../support/copyHost.js";
import { fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { extentBytes } from "../support/lvmStandIns.js";
import { recordedLvs } from "../support/recorded.js";

type Values = Readonly<Record<string, unknown>>;
const none: ReadonlySet<string> = new Set();
const MiB = 1024 ** 2;
const host = {
  address: "192.0.2.1",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const sha256 = (content: string) => createHash("sha256").update(content).digest("hex");
const moment = "a moment of the disk\n".repeat(1000);
const extents = Math.ceil(moment.length / extentBytes) + 1;
const uuid = "mFPTPy-HFZm-HexA-3aO9-JBDR-mKUZ-V2dcWb";
const other = "AAAAAA-1111-1111-1111-1111-1111-AAAAAA";
const owner = "o/p/s/restore";
const uri = "nbd://10.0.0.2:10809/vm1";
const image = { uri, sha256: sha256(moment) };
const declared = { host, owner, volumeGroup: "VgVm", origin: "vm1", image, overwrite: uuid };
const complete = { ...declared, adopt: false, whenOpen: "refuse", triggers: [] as unknown[] };
const markOf = (stage: "begun" | "merging" | "writing" | "restored", more: object = {}) =>
  restoreTagOf({
    ...{ generation: restoreGeneration([]), life: "0123abcd", stage, startedAt: 1000, thinId: 0 },
    ...{ seconds: stage === "restored" ? 60 : 0, source: image.sha256, owner: ownerInTag(owner), ...more },
  });

describe("bad input is refused before any host is asked", () => {
  const snapshot = { name: "vm1-snap", uuid: other };
  const problemsOf = async (change: Values, unknown = none) => {
    const { problems } = await handlersOn("LvRestore", untouchedHost()).check(
      undefined,
      { ...declared, ...change },
      unknown,
    );
    return problems.map(({ property, reason }) => `${property}: ${reason}`);
  };

  it.each([
    ["neither source", { image: undefined, overwrite: undefined }, /^snapshot: is required, unless `image`/],
    ["both sources", { snapshot }, /^image: cannot go with `snapshot`/],
    ["no word on what is overwritten", { overwrite: undefined }, /^overwrite: is required.*lvs -o lv_uuid/],
    ["a yes instead of a UUID", { overwrite: true }, /^overwrite: /],
    ["a name instead of a UUID", { overwrite: "vm1" }, /^overwrite: is not an LVM UUID/],
    ["half a checksum", { image: { uri, sha256: "0abc" } }, /^image\.sha256: is no SHA-256/],
    ["no checksum", { image: { uri } }, /^image\.sha256: is required/],
    ["a file", { image: { ...image, uri: "/backup/vm1.raw" } }, /^image\.uri: .*nbd:\/\//],
    ["waiting", { whenOpen: "atNextActivation" }, /^whenOpen: .*is for a `snapshot`/],
    ["adopting", { adopt: true }, /^adopt: is for a `snapshot`/],
    ["a rate of bytes", { bandwidthLimit: 20 }, /^bandwidthLimit: .*too few/],
    ["what only an image needs", { image: undefined, snapshot }, /^overwrite: is for an `image`/],
  ])("%s", async (_what, change, message) => {
    expect(await problemsOf(change)).toEqual([expect.stringMatching(message)]);
  });

  it("what is only known later is none of these", async () => {
    const { image: _, overwrite: __, ...rest } = declared;
    const asked = handlersOn("LvRestore", untouchedHost());
    const unknown = new Set(["image", "overwrite"]);
    expect((await asked.check(undefined, rest, unknown)).problems).toEqual([]);
  });
});

describe("is refused, and nothing is touched, where", () => {
  type Row = Readonly<Record<string, string>>;
  const row = (state: Parameters<typeof recordedLvs>[0], name: string, more: Row = {}): Row => ({
    ...JSON.parse(recordedLvs(state)).report[0].lv.find((one: Row) => one.lv_name === name),
    ...more,
  });
  const report = (...rows: Row[]) => JSON.stringify({ report: [{ lv: rows }] });
  const plain = { lv_attr: "-wi-a-----", origin_size: "", lv_uuid: uuid, lv_tags: "" };
  const origin = (more: Row = {}) => row("valid", "vm1", { ...plain, ...more });
  const size = Number(origin().lv_size);
  const store = (more: Row = {}) => row("valid", "vm1-snap", { origin_uuid: uuid, lv_uuid: other, ...more });
  const thin = (more: Row = {}) => row("thin", "thin1", { ...more, lv_uuid: uuid });
  const pool = (more: Row = {}) => row("thin", "pool", more);
  const field = (name: string, value: string) => `${name} ${Buffer.from(value).toString("base64")}\n`;
  const answers = (bytes: string, missing = "") =>
    ["missing", missing, "now", "2000", "size", bytes, "size.rc", /^\d+$/.test(bytes) ? "0" : "1", "end", ""]
      .map((text, index, all) => (index % 2 === 0 ? field(text, all[index + 1] ?? "") : ""))
      .join("");
  const showing = (
    lvs: string,
    preflight = answers(String(size)),
    held: (command: RemoteCommand) => string = () => "",
  ) =>
    fakeHost((command) => {
      if (command.argv[0] === "lvs") return lvs;
      return command.argv[2]?.includes("emit_missing") ? preflight : held(command);
    });

  it.each([
    [
      "there is no such volume",
      report(store()),
      {},
      /ORIGIN_NOT_FOUND.*lvcreate -n vm1 -L SIZE VgVm.*VolumeCopy/s,
    ],
    [
      "the volume of that name is another",
      report(origin({ lv_uuid: other })),
      {},
      new RegExp(`IDENTITY_MISMATCH.*VgVm/vm1 has the UUID ${other}, not ${uuid}`),
    ],
    [
      "it is a COW snapshot",
      report(store({ lv_uuid: uuid })),
      { origin: "vm1-snap" },
      /ORIGIN_UNSUITABLE.*is a snapshot, of "vm1"/,
    ],
    [
      "it is a thin snapshot",
      report(row("thin", "thin1-snap", { lv_uuid: uuid }), pool()),
      { origin: "thin1-snap" },
      /ORIGIN_UNSUITABLE.*is a snapshot, of "thin1"/,
    ],
    [
      "it is a thin snapshot of ours, made writable",
      report(
        row("thin", "thin1-snap", { lv_uuid: uuid, lv_attr: "Vwi-a-tz--", lv_tags: ownerMark("o/p/s/x") }),
        pool(),
      ),
      { origin: "thin1-snap" },
      /ORIGIN_UNSUITABLE.*is a snapshot, of "thin1"/,
    ],
    [
      "it is a thin pool",
      report(pool({ lv_uuid: uuid })),
      { origin: "pool" },
      /ORIGIN_UNSUITABLE.*is a thin pool/,
    ],
    [
      "it is being merged",
      report(origin({ lv_attr: "Owi-a-s---" })),
      {},
      /ORIGIN_UNSUITABLE.*is being merged/,
    ],
    [
      "a snapshot of it ran full while a merge of that waited",
      report(
        origin({ lv_attr: "Owi-a-s---" }),
        store({ lv_attr: "Sri-I-s---", lv_merging: "1", lv_snapshot_invalid: "1" }),
      ),
      {},
      /SNAPSHOT_OVERFLOWED.*VgVm\/vm1-snap ran full before its merge into VgVm\/vm1 began.*lvremove VgVm\/vm1-snap/s,
    ],
    [
      "it is read-only",
      report(origin({ lv_attr: "-ri-a-----" })),
      {},
      /ORIGIN_UNSUITABLE.*lvchange -p rw VgVm\/vm1/s,
    ],
    [
      "it is not active",
      report(origin({ lv_attr: "-wi-------", lv_active: "" })),
      {},
      /DEVICE_NOT_FOUND.*lvchange -ay VgVm\/vm1/s,
    ],
    [
      "it is suspended",
      report(origin({ lv_attr: "-wi-s-----" })),
      {},
      /VOLUME_SUSPENDED.*lvchange --refresh/s,
    ],
    [
      "another resource restores it",
      report(origin({ lv_tags: markOf("writing", { owner: "o/p/other/r", life: "99999999" }) })),
      {},
      /VOLUME_IN_USE.*by o\/p\/other\/r.*lvchange --deltag '/s,
    ],
    [
      "a COW snapshot of it would overflow",
      report(origin({ lv_attr: "owi-a-s---" }), store({ lv_size: String(8 * MiB), snap_percent: "50.00" })),
      {},
      /RESTORE_OVERFLOWS.*writes \d+ MiB.*"vm1-snap" \(4\.0 MiB free\).*lvextend -l 101%ORIGIN/s,
    ],
    [
      "its thin pool has too little room",
      report(
        thin({ data_percent: "0.00", lv_size: String(size) }),
        pool({ lv_size: String(4 * MiB), data_percent: "50.00", snap_percent: "" }),
      ),
      { origin: "thin1" },
      /NO_SPACE.*thin pool pool has 2\.0 MiB free, the restore may need \d+ MiB/,
    ],
    [
      "its thin pool may have too little room: an inactive volume may share what it has",
      report(
        thin({ data_percent: "100.00", snap_percent: "", lv_size: String(size) }),
        row("thin", "thin1", { lv_name: "thin2", lv_uuid: other, data_percent: "", snap_percent: "" }),
        pool({ lv_size: String(size + MiB), data_percent: "99.00", snap_percent: "" }),
      ),
      { origin: "thin1" },
      /NO_SPACE.*the restore may need.*activate "thin2" \(`lvchange -ay`\).*what they share with VgVm\/thin1/s,
    ],
    [
      "its thin pool takes no changes",
      report(thin({ lv_size: String(size) }), pool({ lv_health_status: "metadata_read_only" })),
      { origin: "thin1" },
      /NO_SPACE.*takes no changes: metadata_read_only/,
    ],
  ])("%s", async (_why, lvs, change, message) => {
    const asked = showing(lvs);
    await expect(handlersOn("LvRestore", asked).create({ ...complete, ...change })).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it.each([
    [
      "the image is larger",
      answers(String(size + 512)),
      /NO_SPACE.*the image has .*\(\d+ bytes\), VgVm\/vm1 .*lvextend -L \d+b VgVm\/vm1/s,
    ],
    [
      "the export does not answer",
      answers("cannot connect"),
      /EXPORT_UNREACHABLE.*does not answer here.*cannot connect/s,
    ],
    ["a program is missing", answers("", "nbdcopy"), /PROGRAM_MISSING.*libnbd-bin/s],
  ])("%s", async (_why, preflight, message) => {
    const asked = showing(report(origin()), preflight);
    await expect(handlersOn("LvRestore", asked).create(complete)).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it.each([
    ["mount", "/srv/vm", /VOLUME_IN_USE.*VgVm\/vm1 is open: mounted at \/srv\/vm/],
    ["export", "lvm-nbd-export-x.service", /VOLUME_IN_USE.*exported by lvm-nbd-export-x/],
  ])("it is held by a %s", async (kind, who, message) => {
    const asked = showing(report(origin()), undefined, ({ argv }) =>
      (argv[2]?.includes("for device") === true) === (kind === "export")
        ? `${kind}\t${Buffer.from(who).toString("base64")}\n`
        : "",
    );
    await expect(handlersOn("LvRestore", asked).create(complete)).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it.each([
    [
      "a cached volume, whose cache is warm",
      [
        origin({ lv_attr: "Cwi-a-C---", origin: "vm1_corig", origin_uuid: other, pool_lv: "fast_cpool" }),
        origin({
          lv_name: "fast_cpool",
          lv_uuid: other,
          lv_attr: "Cwi---C---",
          lv_role: "private,cache,pool",
        }),
      ],
      "vm1",
      "",
    ],
    [
      "a thin clone of a template",
      [
        thin({ origin: "template", origin_uuid: other, data_percent: "0.00", lv_size: String(size) }),
        row("thin", "thin1", { lv_name: "template", lv_uuid: other }),
        pool({ lv_size: String(4 * size) }),
      ],
      "thin1",
      "pool",
    ],
  ])("nothing is: %s is restored as any volume", async (_what, rows, name, room) => {
    const asked = showing(report(...rows));
    await handlersOn("LvRestore", asked)
      .create({ ...complete, origin: name })
      .catch(() => undefined);
    const [start] = asked.changes;
    expect(start?.argv[2]).toContain("systemd-run");
    // The pool that the job looks at, and what it needs of it.
    expect(String(start?.stdin).split("\n")[0]).toMatch(new RegExp(` '?${room}'? '?\\d+'?$`));
  });

  it("nothing is: what stays behind a smaller image, and what fills snapshots, is told", async () => {
    const full = store({ lv_size: String(size + MiB), snap_percent: "90.00" });
    const asked = showing(report(origin({ lv_attr: "owi-a-s---" }), full), answers(String(size - 512)));
    const handlers = handlersOn("LvRestore", asked);
    await handlers.create(complete).catch(() => undefined);
    expect(handlers.warnings.join("\n")).toMatch(/the bytes behind the image stay as they are/);
    expect(handlers.warnings.join("\n")).toMatch(/fills the snapshots of it: "vm1-snap" \(/);
    expect(asked.changes).toHaveLength(1);
  });
});

let server: CopyHost;
let cancel: AbortController;
let warnings: string[];
let lines: string[];

function handlers(): Handlers {
  [cancel, warnings, lines] = [new AbortController(), [], []];
  return createHandlers(resourceType("LvRestore"), {
    openHost: async () => server,
    progress: (line) => lines.push(line),
    warn: (line) => warnings.push(line),
    signal: cancel.signal,
  });
}

const spoiled = "#".repeat(extents * extentBytes);
const restoredTo = (text: string) => text + spoiled.slice(text.length);
const content = () => readFileSync(server.device("vm1"), "utf8");
const tags = () => readFileSync(server.volume("vm1", "tags"), "utf8").split("\n").filter(Boolean);
const marks = () => restoreMarksAmong(tags());
const open = () => writeFileSync(server.volume("vm1", "open"), "");
const closed = () => rmSync(server.volume("vm1", "open"), { force: true });
const merging = () => writeFileSync(server.volume("vm1", "merging"), "");
const merged = () => rmSync(server.volume("vm1", "merging"), { force: true });
const changes = () => server.commands.filter(({ kind }) => kind === "change");
const starts = ({ argv }: RemoteCommand) => argv[2]?.includes("systemd-run") === true;
const follows = ({ argv }: RemoteCommand) => argv[2]?.includes("CPUUsageNSec") === true;

function put(name: string, id: string, text: string): void {
  mkdirSync(dirname(server.volume(name, "tags")), { recursive: true });
  writeFileSync(server.volume(name, "uuid"), `${id}\n`);
  writeFileSync(server.volume(name, "extents"), `${extents}\n`);
  writeFileSync(server.volume(name, "tags"), "theirs\n");
  mkdirSync(dirname(server.device(name)), { recursive: true });
  writeFileSync(server.device(name), text);
}

/** A snapshot whose store has one chunk too few for a table beside the header and what is written. */
function putLate(): void {
  put("late", other, "");
  writeFileSync(server.volume("late", "extents"), `${extents + 1}\n`);
  writeFileSync(server.volume("late", "origin"), uuid);
}

beforeEach(() => {
  server = new CopyHost("server1");
  server.serve(moment);
  server.kill(undefined);
  put("vm1", uuid, spoiled);
  handlers();
});
afterEach(() => server.close());

const created = async (change: Values = {}) => (await handlers().create({ ...complete, ...change })).state;
/** `up`: a create, or an update of what is kept. */
const up = (state: Values | undefined, change: Values = {}) =>
  state === undefined ? created(change) : handlers().update(state, { ...complete, ...change });
const failed = async (state: Values | undefined, change: Values = {}) => {
  const error: unknown = await up(state, change).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(Error);
  return error as Error;
};
const keptBy = (error: Error) => (error instanceof PartialFailure ? error.state : undefined);
const expectUntouched = () => {
  expect(content()).toBe(spoiled);
  expect(tags()).toEqual(["theirs"]);
  expect(server.left()).toEqual([]);
};
const expectRestored = () => {
  expect(content()).toBe(restoredTo(moment));
  expect(marks().map(({ stage, source }) => [stage, source])).toEqual([["restored", image.sha256]]);
  expect(tags()).toHaveLength(2);
  expect(server.left()).toEqual([]);
};

describe("a restore", () => {
  it("writes what the image holds, keeps what lies behind it, and marks the volume", async () => {
    put("vm1-snap", other, "");
    writeFileSync(server.volume("vm1-snap", "origin"), uuid);
    writeFileSync(server.volume("vm1-snap", "extents"), `${extents + 2}\n`);
    const state = await created();
    expectRestored();
    expect(warnings.join("\n")).toMatch(/fills the snapshots of it: "vm1-snap"/);
    expect(state).toMatchObject({
      ...{ state: "restored", restoredImage: image.sha256, restoredSnapshot: "", originUuid: uuid },
      ...{ snapshotRemoved: false, volumeGroup: "VgVm", origin: "vm1" },
    });
    expect(Date.parse(String(state.restoredAt))).toBeGreaterThan(Date.now() - 60_000);
    expect(warnings.join("\n")).toMatch(/the bytes behind the image stay as they are/);
    expect(lines.join("\n")).toMatch(/writing the image of nbd:.* onto VgVm\/vm1/);
  });

  it("is made once: neither up nor another image, nor what was written since, restores again", async () => {
    const state = await created();
    writeFileSync(server.device("vm1"), restoredTo("written since"));
    const before = server.commands.length;
    expect(await handlers().read(state)).toEqual(state);
    expect(warnings).toEqual([]);
    expect((await handlers().diff(state, complete, none)).changes).toEqual([]);
    await up(state);
    const another = { image: { uri: "nbd://10.0.0.2:1/x", sha256: sha256("x") }, overwrite: other };
    const { changes: differ } = await handlers().diff(state, { ...complete, ...another }, none);
    expect(differ).toEqual([
      { property: "image", effect: "connection" },
      { property: "overwrite", effect: "connection" },
    ]);
    expect(await up(state, another)).toMatchObject({ restoredImage: image.sha256 });
    // Without its state: found by its mark, which says what is there.
    await created({ image: another.image });
    expect(warnings.join("\n")).toMatch(/restored for these `triggers` already, from the image/);
    expect(server.commands.slice(before).filter(starts)).toEqual([]);
    expect(content()).toBe(restoredTo("written since"));
  });

  it("is made again for other triggers, and its mark takes the place of the earlier one", async () => {
    const state = await created();
    writeFileSync(server.device("vm1"), spoiled);
    expect(await up(state, { triggers: ["again"] })).toMatchObject({
      ...{ state: "restored", restoreId: state.restoreId, triggers: ["again"] },
    });
    expectRestored();
  });

  it.each([
    ["is gone", () => []],
    [
      "is that of before the volume was read back",
      (life: string, startedAt: number) => [markOf("writing", { life, startedAt })],
    ],
    [
      "is that of the restore before it",
      (life: string, startedAt: number) => [
        markOf("restored", { life, startedAt: startedAt - 100, generation: restoreGeneration([2]) }),
        // A merge has a life of its own.
        markOf("restored", { life: "99999999", startedAt: startedAt - 200, source: other }),
      ],
    ],
    [
      "is that of a merge before it, whose end nobody has marked",
      (_life: string, startedAt: number) => [
        markOf("merging", {
          life: "99999999",
          startedAt: startedAt - 100,
          source: other,
          generation: restoreGeneration([2]),
        }),
      ],
    ],
    [
      "is gone, beside one of a restore that nobody began to write",
      (life: string) => [markOf("begun", { life, generation: restoreGeneration([2]) })],
    ],
  ])(
    "whose mark %s is not made again: up puts the mark back, a removal removes what is left",
    async (_what, left) => {
      const took = await created();
      const [done] = marks();
      if (done === undefined) throw new Error("no mark");
      // It has taken three seconds.
      const before = ["theirs", restoreTagOf({ ...done, seconds: 3 })];
      writeFileSync(server.volume("vm1", "tags"), [...before, ""].join("\n"));
      const state = (await handlers().read(took)) ?? {};
      expect(state).toMatchObject({ seconds: 3, state: "restored" });
      const lose = () => {
        const tagsLeft = left(String(state.restoreId), Date.parse(String(state.startedAt)) / 1000);
        writeFileSync(server.volume("vm1", "tags"), ["theirs", ...tagsLeft, ""].join("\n"));
      };
      lose();
      writeFileSync(server.device("vm1"), restoredTo("written since"));
      const seen = await handlers().read(state);
      expect(seen).toEqual({ ...state, state: "unmarked" });
      expect(await up(seen)).toEqual(state);
      expect(tags().sort()).toEqual(before.sort());
      lose();
      await handlers().remove(seen ?? {});
      expect(tags()).toEqual(["theirs"]);
      // A new one is a new restore.
      expect(content()).toBe(restoredTo("written since"));
      expect(server.started).toBe(1);
      await created();
      expectRestored();
    },
  );

  it("whose state was not saved is not made again, though the host's clock had gone back before it", async () => {
    const state = await created();
    const [before] = marks();
    if (before === undefined) throw new Error("no mark");
    const later = restoreTagOf({
      ...before,
      generation: restoreGeneration([2]),
      startedAt: before.startedAt - 100,
    });
    writeFileSync(server.volume("vm1", "tags"), `${later}\n`);
    writeFileSync(server.device("vm1"), restoredTo("written since"));
    expect(await up(state, { triggers: [2] })).toMatchObject({
      state: "restored",
      restoreId: state.restoreId,
    });
    expect(tags()).toEqual([later]);
    // Nor where it stands beside the earlier one.
    writeFileSync(server.volume("vm1", "tags"), `${later}\n${before.tag}\n`);
    expect(await up(state, { triggers: [2] })).toMatchObject({ state: "restored", triggers: [2] });
    expect(tags()).toEqual([later]);
    expect(server.started).toBe(1);
    expect(content()).toBe(restoredTo("written since"));
  });

  it("follows one from a snapshot of the same resource", async () => {
    writeFileSync(server.volume("vm1", "tags"), `theirs\n${markOf("restored", { source: other })}\n`);
    const snapshot = { name: "vm1-snap", uuid: other };
    const { image: _, overwrite: __, ...rest } = complete;
    const state = (await handlers().create({ ...rest, snapshot })).state;
    expect(state).toMatchObject({ restoredSnapshot: other, restoredImage: "" });
    expect(await up(state, { triggers: [2] })).toMatchObject({ restoredSnapshot: "", state: "restored" });
    expectRestored();
  });

  it("is forgotten by a removal, which changes no data", async () => {
    const state = await created();
    await handlers().remove(state);
    expect(tags()).toEqual(["theirs"]);
    expect(content()).toBe(restoredTo(moment));
  });
});

describe("nothing is written, and no mark is left, where", () => {
  it("a byte of the image was flipped", async () => {
    server.serve(moment.replace("moment", "mOment"));
    const error = await failed(undefined);
    expect(error.message).toMatch(
      new RegExp(
        `IMAGE_CORRUPT.*not as ${image.sha256}; nothing was written to VgVm/vm1.*another backup`,
        "s",
      ),
    );
    expect(keptBy(error)).toBeUndefined();
    expectUntouched();
  });

  it("the image cannot be read to its end", async () => {
    server.set("broken-reread", "");
    expect((await failed(undefined)).message).toMatch(/COPY_FAILED.*nothing was written to VgVm\/vm1/s);
    expectUntouched();
  });

  it("somebody opens the volume while the image is checked", async () => {
    server.set("hold-reread", "");
    server.holders = `mount\t${Buffer.from("/mnt").toString("base64")}\n`;
    server.onCommand = (command) => {
      if (starts(command)) server.holders = "";
      if (!follows(command)) return undefined;
      open();
      server.holders = `mount\t${Buffer.from("/mnt").toString("base64")}\n`;
      server.set("hold-reread", undefined);
      return undefined;
    };
    server.holders = "";
    const error = await failed(undefined);
    expect(error.message).toMatch(/VOLUME_IN_USE.*opened meanwhile, mounted at \/mnt; nothing was written/s);
    closed();
    expectUntouched();
  });

  it("somebody takes a snapshot while the image is checked, which has too little room", async () => {
    server.set("hold-reread", "");
    server.onCommand = (command) => {
      if (!follows(command)) return undefined;
      putLate();
      server.set("hold-reread", undefined);
      return undefined;
    };
    expect((await failed(undefined)).message).toMatch(
      /RESTORE_OVERFLOWS.*may overflow snapshots of it: late; nothing was written to VgVm\/vm1.*Extend or remove/s,
    );
    rmSync(dirname(server.volume("late", "tags")), { recursive: true });
    expectUntouched();
  });

  it("somebody begins to merge a snapshot into the volume while the image is checked", async () => {
    server.set("hold-reread", "");
    server.onCommand = (command) => {
      if (!follows(command)) return undefined;
      merging();
      server.set("hold-reread", undefined);
      return undefined;
    };
    const error = await failed(undefined);
    expect(error.message).toMatch(/SNAPSHOT_MERGING.*is being merged into VgVm\/vm1; nothing was written/s);
    merged();
    expectUntouched();
  });

  it.each([
    ["a merge", /SNAPSHOT_MERGING.*; nothing was written/s],
    ["a snapshot that has too little room", /RESTORE_OVERFLOWS.*of it: late; nothing was written/s],
  ])("%s is just being begun, until that is done", async (what, message) => {
    const lock = join(server.disk, "..", "run", "lvm-nbd-restore.VgVm.vm1");
    const holding = execFile("flock", [lock, "sh", "-c", "echo held; read end"]);
    await once(holding.stdout ?? holding, "data");
    let looks = 0;
    server.onCommand = (command) => {
      if (!follows(command) || ++looks !== 3) return undefined;
      expect(content()).toBe(spoiled);
      expect(marks().map(({ stage }) => stage)).toEqual(["begun"]);
      if (what === "a merge") merging();
      else putLate();
      holding.stdin?.end("\n");
      return undefined;
    };
    expect((await failed(undefined)).message).toMatch(message);
    merged();
    rmSync(dirname(server.volume("late", "tags")), { recursive: true, force: true });
    expectUntouched();
  });

  it("its thin pool has run full while the image was checked", async () => {
    server.set("hold-reread", "");
    const run = server.run.bind(server);
    let isTold = false;
    server.run = async (command, signal) => {
      if (follows(command) && !isTold) {
        isTold = true;
        const { unit } = restoreJob({ volumeGroup: "VgVm", uuid });
        await run({ argv: ["systemctl", "stop", unit], kind: "change", deadlineSeconds: 10 });
        writeFileSync(jobFile("failure"), "full: the thin pool VgVm/pool has 5 bytes free");
      }
      return run(command, signal);
    };
    expect((await failed(undefined)).message).toMatch(
      /NO_SPACE.*full: the thin pool VgVm\/pool has 5 bytes free; nothing was written to VgVm\/vm1/s,
    );
    expectUntouched();
  });

  it("it is open already when the job is to start", async () => {
    server.onCommand = (command) => {
      if (!starts(command)) return undefined;
      open();
      return closed;
    };
    expect((await failed(undefined)).message).toMatch(
      /VOLUME_IN_USE.*could not be started: it is open; nothing was written/s,
    );
    expectUntouched();
  });

  it("another resource has begun a restore of it in the meantime", async () => {
    const theirs = markOf("begun", { owner: "o/p/other/r", life: "99999999" });
    let marked = false;
    server.onCommand = (command) => {
      if (starts(command) && !marked) writeFileSync(server.volume("vm1", "tags"), `theirs\n${theirs}\n`);
      marked ||= starts(command);
      return undefined;
    };
    expect((await failed(undefined)).message).toMatch(/VOLUME_IN_USE.*by o\/p\/other\/r/s);
    expect(content()).toBe(spoiled);
    expect(tags().sort()).toEqual([theirs, "theirs"].sort());
  });

  it("and what was restored earlier is remembered", async () => {
    const state = await created();
    writeFileSync(server.device("vm1"), restoredTo("written since"));
    server.serve(moment.replace("moment", "mOment"));
    const error = await failed(state, { triggers: [2] });
    expect(error.message).toMatch(/IMAGE_CORRUPT/);
    expect(keptBy(error)).toMatchObject({ state: "restored", triggers: [] });
    expect(content()).toBe(restoredTo("written since"));
    expect(marks().map(({ tag }) => tag)).toHaveLength(1);
    expect(await handlers().read(keptBy(error) ?? {})).toMatchObject({ state: "restored" });
  });
});

describe("a volume that is half-written is called so until it is restored", () => {
  const expectHalfWritten = async (error: Error, code: RegExp) => {
    expect(error.message).toMatch(code);
    expect(error.message).toMatch(/VgVm\/vm1 is HALF-WRITTEN: it holds neither.*Use nothing of VgVm\/vm1/s);
    const kept = keptBy(error);
    expect(kept).toMatchObject({ state: "restoring", restoredAt: "" });
    const seen = await handlers().read(kept ?? {});
    expect(warnings.join("\n")).toMatch(/HALF-WRITTEN.*nobody goes on with it/);
    expect((await handlers().diff(seen ?? {}, complete, none)).changes).toEqual([
      { property: "state", effect: "update" },
    ]);
    return seen;
  };

  it("the copy breaks off; the next up restores", async () => {
    server.set("broken", "nbd: connection reset\n");
    const kept = await expectHalfWritten(await failed(undefined), /COPY_FAILED.*connection reset/s);
    expect(content()).toMatch(/^half/);
    server.set("broken", undefined);
    expect(await up(kept)).toMatchObject({ state: "restored" });
    expectRestored();
  });

  it("whatever a clone of its disk, with the same UUIDs, holds", async () => {
    const run = server.run.bind(server);
    server.run = async (command, signal) => {
      const result = await run(command, signal);
      if (command.argv[0] !== "lvs") return result;
      const {
        report: [{ lv }],
      }: { report: [{ lv: Record<string, string>[] }] } = JSON.parse(result.stdout);
      const clones = lv.map((row) => ({ ...row, vg_name: "VgClone", lv_tags: "" }));
      return { ...result, stdout: JSON.stringify({ report: [{ lv: [...clones, ...lv] }] }) };
    };
    server.set("broken", "nbd: connection reset\n");
    await expectHalfWritten(await failed(undefined), /COPY_FAILED/);
  });

  it("the image is found spoiled when that is tried again: it is still half-written", async () => {
    server.set("broken", "nbd: connection reset\n");
    const kept = keptBy(await failed(undefined));
    server.set("broken", undefined);
    server.serve(moment.replace("moment", "mOment"));
    await expectHalfWritten(await failed(kept), /IMAGE_CORRUPT/);
    // With another image, of the same triggers, it is brought in order.
    const text = "another backup\n".repeat(100);
    server.serve(text);
    expect(await up(kept, { image: { uri, sha256: sha256(text) } })).toMatchObject({
      ...{ state: "restored", restoredImage: sha256(text) },
    });
    expect(content().startsWith(text)).toBe(true);
    expect(marks()).toHaveLength(1);
  });

  it("the volume does not read back as the image", async () => {
    server.set("hold", "");
    server.onCommand = (command) => {
      // Served otherwise than when it was checked.
      if (follows(command) && marks().some(({ stage }) => stage === "writing")) {
        server.serve(moment.replace("moment", "mOment"));
        server.set("hold", undefined);
      }
      return undefined;
    };
    await expectHalfWritten(await failed(undefined), /COPY_MISMATCH/);
  });

  it("the host's clock had gone back before it was begun, and its state was not saved", async () => {
    const state = await created();
    const [done] = marks();
    if (done === undefined) throw new Error("no mark");
    const left = { life: done.life, generation: restoreGeneration([2]), startedAt: done.startedAt - 100 };
    writeFileSync(server.volume("vm1", "tags"), `theirs\n${markOf("writing", left)}\n`);
    expect(await handlers().read(state)).toMatchObject({ state: "restoring" });
    expect(warnings.join("\n")).toMatch(/HALF-WRITTEN.*nobody goes on with it/);
    // Whatever triggers are declared, it is brought in order.
    expect(await up(state, { owner: "o/p/s/renamed" })).toMatchObject({ state: "restored" });
    expectRestored();
  });

  it("somebody opens it while it is written", async () => {
    server.set("hold", "");
    server.onCommand = (command) => {
      if (follows(command) && marks().some(({ stage }) => stage === "writing")) {
        open();
        server.set("hold", undefined);
      }
      return undefined;
    };
    const kept = await expectHalfWritten(await failed(undefined), /VOLUME_IN_USE.*opened meanwhile/s);
    closed();
    server.onCommand = () => undefined;
    expect(await up(kept)).toMatchObject({ state: "restored" });
  });

  it("another try is at its check: a refresh and a removal say so", async () => {
    server.set("broken", "nbd: connection reset\n");
    const kept = keptBy(await failed(undefined)) ?? {};
    server.set("broken", undefined);
    await dyingAt("begun", { triggers: [2] }, kept);
    expect(marks().map(({ stage }) => stage)).toEqual(["begun", "writing"]);
    expect(await handlers().read(kept)).toMatchObject({ state: "restoring" });
    expect(warnings.join("\n")).toMatch(/VgVm\/vm1 is HALF-WRITTEN.*another try is at its check/);
    await handlers().remove(kept);
    expect(warnings.join("\n")).toMatch(/HALF-WRITTEN.*nobody goes on with it any more/);
    expect(tags()).toEqual(["theirs"]);
    released();
  });

  it("somebody removes its mark while it is written: nobody says that nothing was", async () => {
    server.set("hold", "");
    server.onCommand = (command) => {
      if (follows(command) && marks().some(({ stage }) => stage === "writing")) {
        writeFileSync(server.volume("vm1", "tags"), "theirs\n");
        server.set("hold", undefined);
      }
      return undefined;
    };
    expect((await failed(undefined)).message).toMatch(
      /COPY_FAILED.*the mark of the restore was removed from VgVm\/vm1; whether VgVm\/vm1 was written to could not be found out.*Use nothing of VgVm\/vm1/s,
    );
    expect(content()).not.toBe(spoiled);
  });

  describe("somebody removes its mark when nobody writes it any more", () => {
    let kept: Values;
    beforeEach(async () => {
      server.set("broken", "nbd: connection reset\n");
      kept = keptBy(await failed(undefined)) ?? {};
      server.set("broken", undefined);
      writeFileSync(server.volume("vm1", "tags"), "theirs\n");
      server.commands.length = 0;
    });

    it("a refresh tells it, and up puts the mark back before anything else", async () => {
      expect(await handlers().read(kept)).toEqual(kept);
      expect(warnings.join("\n")).toMatch(
        /mark of the restore was removed from VgVm\/vm1.*HALF-WRITTEN.*nobody goes on with it/s,
      );
      server.serve(moment.replace("moment", "mOment"));
      await expectHalfWritten(await failed(kept, { triggers: [2] }), /IMAGE_CORRUPT/);
      expect(marks().map(({ stage }) => stage)).toEqual(["writing"]);
      server.serve(moment);
      expect(await up(kept)).toMatchObject({ state: "restored" });
      expectRestored();
    });

    it("a removal says so, and changes nothing", async () => {
      await handlers().remove(kept);
      expect(warnings.join("\n")).toMatch(/HALF-WRITTEN.*nobody goes on with it any more/);
      expect(changes()).toEqual([]);
    });
  });

  it("a removal ends the job though somebody removed the mark", async () => {
    await dyingAt("writing");
    const kept = (await handlers().read(toldOf("restoring"))) ?? {};
    expect(kept).toMatchObject({ state: "restoring" });
    writeFileSync(server.volume("vm1", "tags"), "theirs\n");
    await handlers().remove(kept);
    expect(warnings.join("\n")).toMatch(/HALF-WRITTEN/);
    expect(server.left()).toEqual([]);
  });

  it("but not for a check that has written nothing, of which a refresh told", async () => {
    await dyingAt("begun");
    const kept = (await handlers().read(toldOf("checking"))) ?? {};
    expect(kept).toMatchObject({ state: "checking", restoredAt: "" });
    expect(warnings).toEqual([]);
    server.serve("another image");
    server.onCommand = (command) => {
      if (follows(command)) released();
      return undefined;
    };
    const error = await failed(kept);
    expect(server.started).toBe(1);
    expect(error.message).toMatch(/IMAGE_CORRUPT.*nothing was written to VgVm\/vm1/s);
    expectUntouched();
    expect(await handlers().read(kept)).toBeUndefined();
    expect(warnings.join("\n")).not.toContain("HALF");
  });

  it("somebody merges a snapshot into it while it is written", async () => {
    server.set("hold", "");
    server.onCommand = (command) => {
      if (follows(command) && marks().some(({ stage }) => stage === "writing")) {
        merging();
        server.set("hold", undefined);
      }
      return undefined;
    };
    await expectHalfWritten(await failed(undefined), /SNAPSHOT_MERGING/);
  });

  it("it is cancelled: the job is ended", async () => {
    server.set("hold", "");
    server.onCommand = (command) => {
      if (follows(command) && marks().some(({ stage }) => stage === "writing")) cancel.abort();
      return undefined;
    };
    const kept = await expectHalfWritten(await failed(undefined), /CANCELLED/);
    expect(server.left()).toEqual([]);
    server.set("hold", undefined);
    server.onCommand = () => undefined;
    expect(await up(kept)).toMatchObject({ state: "restored" });
    expectRestored();
  });

  it("a removal says so", async () => {
    server.set("broken", "nbd: connection reset\n");
    const kept = keptBy(await failed(undefined));
    await handlers().remove(kept ?? {});
    expect(warnings.join("\n")).toMatch(/HALF-WRITTEN.*nobody goes on with it any more/);
    expect(tags()).toEqual(["theirs"]);
  });
});

class Died extends Error {}

/** The provider dies at the first look at a job that has come so far. */
async function dyingAt(stage: "begun" | "writing", change: Values = {}, state?: Values): Promise<void> {
  server.set(stage === "begun" ? "hold-reread" : "hold", "");
  let dead = false;
  server.onCommand = (command) => {
    dead ||= follows(command) && marks().some((mark) => mark.stage === stage);
    if (dead) throw new Died("the provider died");
    return undefined;
  };
  await expect(up(state, change)).rejects.toThrow(Died);
  server.onCommand = () => undefined;
}
/** The state of the restore whose mark is there. */
const toldOf = (state: string): Values => ({
  ...{ ...complete, state, snapshotRemoved: false, restoredSnapshot: "", seconds: 0 },
  ...{ restoredImage: image.sha256, originUuid: uuid, restoreId: marks()[0]?.life ?? "" },
  ...{ startedAt: new Date(1000 * (marks()[0]?.startedAt ?? 0)).toISOString(), restoredAt: "" },
});
const released = () => {
  server.set("hold-reread", undefined);
  server.set("hold", undefined);
};

const jobFile = (name: string) =>
  join(dirname(server.disk), restoreJob({ volumeGroup: "VgVm", uuid }).run, name);

/** The job was last followed so long ago. */
function unfollowedFor(minutes: number): void {
  const uptime = Math.floor(Number(readFileSync("/proc/uptime", "utf8").split(" ")[0]));
  writeFileSync(jobFile("followed"), `${uptime - 60 * minutes}\n`);
}

describe("a job that nobody follows any more", () => {
  it("writes nothing, and gives up after a while; the next up restores", async () => {
    await dyingAt("begun");
    unfollowedFor(1);
    released();
    // It has read the whole image.
    await expect.poll(() => readFileSync(jobFile("sum"), "utf8")).toContain("rc 0");
    unfollowedFor(unfollowedMinutes + 1);
    await server.jobsEnd();
    expect(content()).toBe(spoiled);
    expect(marks().map(({ stage }) => stage)).toEqual(["begun"]);
    expect(await created()).toMatchObject({ state: "restored" });
    expectRestored();
  });

  it.each([
    ["back", 3600],
    ["forward", -3600],
  ])("is told from one that is followed though the host's clock was set %s since", async (_way, seconds) => {
    // What is written down has a time of before.
    const setClock = () => {
      const when = Date.now() / 1000 + seconds;
      for (const name of ["job", "followed"].map(jobFile)) utimesSync(name, when, when);
    };
    await dyingAt("begun");
    unfollowedFor(1);
    setClock();
    released();
    await expect.poll(() => readFileSync(jobFile("sum"), "utf8")).toContain("rc 0");
    if (seconds > 0) {
      unfollowedFor(unfollowedMinutes + 1);
      setClock();
      await server.jobsEnd();
      expect(content()).toBe(spoiled);
    } else {
      expect(await created()).toMatchObject({ state: "restored" });
      expect(server.started).toBe(1);
    }
  });

  it("writes as soon as somebody follows it again", async () => {
    await dyingAt("begun");
    unfollowedFor(1);
    released();
    await expect.poll(() => readFileSync(jobFile("sum"), "utf8")).toContain("rc 0");
    expect(marks().map(({ stage }) => stage)).toEqual(["begun"]);
    expect(await created()).toMatchObject({ state: "restored" });
    expect(server.started).toBe(1);
  });

  it("and has given up is explained to who comes back to it", async () => {
    server.set("hold-reread", "");
    let looks = 0;
    const run = server.run.bind(server);
    server.run = async (command, signal) => {
      if (follows(command) && ++looks === 2) {
        unfollowedFor(unfollowedMinutes + 1);
        released();
        await server.jobsEnd();
      }
      return run(command, signal);
    };
    expect((await failed(undefined)).message).toMatch(
      /COPY_FAILED.*nobody had followed the restore for 10 min.*given up; nothing was written to VgVm\/vm1.*The next `pulumi up` begins anew/s,
    );
    expectUntouched();
  });

  it("and has begun to write goes on", async () => {
    await dyingAt("writing");
    unfollowedFor(unfollowedMinutes + 1);
    released();
    await server.jobsEnd();
    expect(marks().map(({ stage }) => stage)).toEqual(["restored"]);
  });
});

describe("a job that goes on by itself", () => {
  it.each(["unreachable", "back when it is looked at"])(
    "since the host is %s after a cancel, is told to, and how to end it",
    async (answers) => {
      server.set("hold-reread", "");
      server.onCommand = (command) => {
        if (follows(command)) cancel.abort();
        if (!cancel.signal.aborted || (answers !== "unreachable" && command.kind === "read"))
          return undefined;
        throw new LvmNbdError("HOST_UNREACHABLE", { message: "no route" });
      };
      const { message } = await failed(undefined);
      const stop = "`systemctl stop lvm-nbd-restore-[0-9a-f]{16}\\.service` on the host ends it";
      expect(message).toMatch(new RegExp(`CANCELLED.*${stop}`, "s"));
      expect(message).not.toMatch(/nothing was written to VgVm\/vm1(?! yet, but)/);
      expect(warnings.join("\n")).toMatch(
        new RegExp(
          `could not be ended: .*goes on by itself and may OVERWRITE VgVm/vm1; ${stop}: HOST_UNREACHABLE`,
        ),
      );
      expect(warnings.join("\n")).not.toContain("removes it");
      released();
      await server.jobsEnd();
      expect(content()).toBe(restoredTo(moment));
    },
  );

  it.each(["begun", "writing"] as const)("is found in the stage %s, and not started again", async (stage) => {
    await dyingAt(stage);
    let looks = 0;
    server.onCommand = (command) => {
      if (follows(command) && ++looks > 1) released();
      return undefined;
    };
    expect(await created()).toMatchObject({ state: "restored" });
    expect(lines.join("\n")).toMatch(/is on its way: going on with it/);
    expect(server.started).toBe(1);
    expectRestored();
  });

  it("marks the volume though nobody follows: what is written to it afterwards stays", async () => {
    await dyingAt("writing");
    released();
    await expect.poll(() => marks().map(({ stage }) => stage), { timeout: 20_000 }).toEqual(["restored"]);
    server.reboot();
    writeFileSync(server.device("vm1"), restoredTo("the VM has run since"));
    expect(await created()).toMatchObject({ state: "restored", restoredImage: image.sha256 });
    expect(content()).toBe(restoredTo("the VM has run since"));
    expect(server.started).toBe(1);
  });

  it.each(["done", "broken off"])("and is %s leaves no certificate behind", async (end) => {
    await dyingAt("writing");
    mkdirSync(jobFile("tls"));
    writeFileSync(jobFile("tls/client-key.pem"), "secret");
    writeFileSync(jobFile("job"), "# secret\n", { flag: "a" });
    utimesSync(jobFile("job"), 1_790_000_000, 1_790_000_000);
    if (end !== "done") server.set("broken", "nbd: connection reset\n");
    released();
    await server.jobsEnd();
    expect(existsSync(jobFile(end === "done" ? "result" : "failure"))).toBe(true);
    expect(existsSync(jobFile("tls"))).toBe(false);
    expect(readFileSync(jobFile("job"), "utf8")).toBe("");
    expect(statSync(jobFile("job")).mtimeMs).toBe(1_790_000_000_000);
    server.set("broken", undefined);
    expect(await created()).toMatchObject({ state: "restored" });
  });

  it.each(["begun", "writing"] as const)(
    "and is stopped in the stage %s leaves no certificate behind, and nothing that runs",
    async (stage) => {
      await dyingAt(stage);
      await expect.poll(() => existsSync(jobFile("phase"))).toBe(true);
      mkdirSync(jobFile("tls"));
      const pid = Number(
        readFileSync(
          join(dirname(server.disk), "units", `${restoreJob({ volumeGroup: "VgVm", uuid }).unit}.pid`),
          "utf8",
        ),
      );
      // The whole unit, as systemd does.
      process.kill(-pid, "SIGTERM");
      const left = () => execFileSync("ps", ["-eo", "pgid=,stat="], { encoding: "utf8" });
      await expect.poll(left, { timeout: 20_000 }).not.toMatch(new RegExp(`^ *${pid} +[^Z]`, "m"));
      expect(existsSync(jobFile("tls"))).toBe(false);
      expect(existsSync(jobFile("result"))).toBe(false);
      expect(marks().map((mark) => mark.stage)).toEqual([stage]);
      released();
      expect(await created()).toMatchObject({ state: "restored" });
    },
  );

  it("of another run that ended in the meantime is not made a second time", async () => {
    let looks = 0;
    server.onCommand = ({ argv }) => {
      if (argv[0] === "lvs" && ++looks === 2)
        writeFileSync(server.volume("vm1", "tags"), `theirs\n${markOf("restored")}\n`);
      return undefined;
    };
    expect(await created()).toMatchObject({ state: "restored", restoredImage: image.sha256 });
    expect(lines.join("\n")).toMatch(/somebody else changed it in the meantime/);
    expect(server.started).toBe(0);
  });

  it("that ends between two looks is not taken for one that was cut off", async () => {
    await dyingAt("writing");
    // The volumes were listed, and its unit is not yet looked at.
    server.onCommand = ({ argv }) =>
      argv[0] === "lvs"
        ? () => {
            released();
            server.onCommand = () => undefined;
          }
        : undefined;
    const ended = async () => {
      await expect.poll(() => marks()[0]?.stage, { timeout: 20_000 }).toBe("restored");
      await server.jobsEnd();
    };
    const run = server.run.bind(server);
    let waited = false;
    server.run = async (command, signal) => {
      if (!waited && command.argv[2]?.includes("emit recordDigest")) {
        waited = true;
        await ended();
      }
      return run(command, signal);
    };
    expect(await handlers().read(toldOf("restoring"))).toMatchObject({ state: "restored" });
    expect(waited).toBe(true);
    expect(warnings.join("\n")).not.toContain("HALF");
  });

  it.each(["begun", "writing"] as const)("is begun anew after a reboot in the stage %s", async (stage) => {
    await dyingAt(stage);
    server.reboot();
    released();
    expect(await created()).toMatchObject({ state: "restored" });
    expect(server.started).toBe(2);
    expectRestored();
  });

  it("is ended for another image, and for other triggers", async () => {
    const text = "another backup\n".repeat(100);
    for (const change of [{ image: { uri, sha256: sha256(text) } }, { triggers: [2] }]) {
      server.serve(moment);
      await dyingAt("writing");
      const earlier = server.started;
      // The earlier one is still at work when it is ended.
      server.onCommand = () => {
        if (server.started > earlier) released();
        return undefined;
      };
      server.serve("image" in change ? text : moment);
      const state = await created(change);
      expect(state).toMatchObject({ state: "restored", ...change });
      expect(lines.join("\n")).toMatch(/ending an earlier restore of VgVm\/vm1/);
      expect(marks()).toHaveLength(1);
      await handlers().remove(state);
    }
    expect(server.started).toBe(4);
  });

  it("that was done is not done again by a resource of another name", async () => {
    await created();
    server.commands.length = 0;
    const error = await failed(undefined, { owner: "o/p/s/renamed" });
    expect(error.message).toMatch(/FOREIGN_RESOURCE.*restored from this very image already, by o\/p\/s\//);
    expect(server.commands.filter(({ kind }) => kind === "change")).toEqual([]);
    expect(server.started).toBe(1);
  });

  it.each(["begun", "writing"] as const)(
    "is followed in the stage %s by a resource that was renamed",
    async (stage) => {
      await dyingAt(stage);
      const kept = (await handlers().read(toldOf("restoring"))) ?? {};
      server.onCommand = (command) => {
        if (follows(command)) released();
        return undefined;
      };
      const renamed = { owner: "o/p/s/renamed" };
      expect(await up(kept, renamed)).toMatchObject({
        ...renamed,
        state: "restored",
        restoreId: kept.restoreId,
      });
      expect(marks().map((mark) => mark.owner)).toEqual([ownerInTag(renamed.owner)]);
      expect(server.started).toBe(1);
      expectRestored();
    },
  );

  it("is not ended for a volume that must not be overwritten, once it is being written", async () => {
    await dyingAt("writing");
    const { message } = await failed(undefined, { overwrite: other });
    expect(message).toMatch(
      /IDENTITY_MISMATCH.*an earlier restore of VgVm\/vm1 from an image goes on and OVERWRITES it.*systemctl stop lvm-nbd-restore-/s,
    );
    expect(message).not.toContain("Nothing was touched");
    released();
    await expect.poll(() => marks().map(({ stage }) => stage), { timeout: 20_000 }).toEqual(["restored"]);
  });

  it.each([
    [
      "the export of another image does not answer",
      { image: { uri, sha256: sha256("x") } },
      /EXPORT_UNREACHABLE/,
    ],
    [
      "there is no such snapshot",
      { image: undefined, overwrite: undefined, snapshot: { name: "vm1-snap", uuid: other } },
      /SNAPSHOT_NOT_FOUND/,
    ],
  ])(
    "is not ended while it writes, where what is declared now is not possible: %s",
    async (_what, change, code) => {
      await dyingAt("writing");
      server.serve(undefined);
      const { message } = await failed(undefined, { ...change, triggers: [2] });
      expect(message).toMatch(code);
      expect(message).toMatch(/goes on and OVERWRITES it/);
      expect(message).not.toContain("Nothing was touched");
      server.serve(moment);
      released();
      await expect.poll(() => marks().map(({ stage }) => stage), { timeout: 20_000 }).toEqual(["restored"]);
    },
  );

  it("has left the volume half-written, and what fails afterwards says so", async () => {
    await dyingAt("writing");
    server.serve("x");
    open();
    server.holders = `mount\t${Buffer.from("/mnt").toString("base64")}\n`;
    const changed = { image: { uri, sha256: sha256("x") } };
    const halfWritten =
      /VOLUME_IN_USE.*mounted at \/mnt; VgVm\/vm1 is HALF-WRITTEN.*what to do: Use nothing of VgVm\/vm1 until it is restored\. Shut the VM/s;
    expect((await failed(undefined, changed)).message).toMatch(halfWritten);
    expect(lines.join("\n")).toContain("ending an earlier restore");
    // Nor is it forgotten while there is no job any more.
    expect((await failed(undefined, changed)).message).toMatch(halfWritten);
    closed();
    server.holders = "";
    released();
    expect(await created(changed)).toMatchObject({ state: "restored", restoredImage: sha256("x") });
  });

  it("is ended for it before anything is written", async () => {
    await dyingAt("begun");
    expect((await failed(undefined, { overwrite: other })).message).toMatch(
      /IDENTITY_MISMATCH.*Nothing was touched/s,
    );
    released();
    await server.jobsEnd();
    expectUntouched();
  });

  it("is ended by a removal", async () => {
    server.set("hold", "");
    server.onCommand = (command) => {
      if (follows(command) && marks().some(({ stage }) => stage === "writing")) throw new Died("died");
      return undefined;
    };
    const kept = keptBy(await failed(undefined)) ?? {};
    server.onCommand = () => undefined;
    await handlers().remove({ ...complete, ...kept });
    expect(tags()).toEqual(["theirs"]);
    expect(server.left()).toEqual([]);
  });
});

describe("whatever cuts it, the next up finishes the work, and what is half-written is never called restored", () => {
  const neverHalf = () => {
    if (marks().some(({ stage }) => stage === "restored")) expect(content()).toBe(restoredTo(moment));
    else if (marks().every(({ stage }) => stage !== "writing")) expect(content()).toBe(spoiled);
  };
  beforeEach(() => server.save());
  /** At which command a run begins to change anything; before that there is nothing to lose. */
  const firstChange = async () => {
    await created();
    return server.commands.findIndex(({ kind }) => kind === "change");
  };

  it("the provider is killed before each command", { timeout: 120_000 }, async () => {
    const first = await firstChange();
    for (let at = first; ; at++) {
      server.restore();
      server.onCommand = (_command, index) => {
        if (index >= at) throw new Died("died");
        return undefined;
      };
      const end: unknown = await created().catch((error: unknown) => error);
      server.onCommand = () => undefined;
      neverHalf();
      if (!(end instanceof Died)) {
        expect(at).toBeGreaterThan(first + 2);
        return;
      }
      await created();
      expectRestoredBut();
    }
  });

  it("the link drops at each change: the same run goes on", { timeout: 120_000 }, async () => {
    for (let at = 0; ; at++) {
      server.restore();
      let seen = 0;
      server.onCommand = ({ kind }) => {
        if (kind !== "change" || seen++ !== at) return undefined;
        return () => {
          throw new LvmNbdError("LINK_LOST", { message: "lost" });
        };
      };
      await created();
      expectRestoredBut();
      if (seen <= at) return;
    }
  });

  it("a script is killed after every other of its steps", { timeout: 120_000 }, async () => {
    for (let step = 1; ; step += 2) {
      server.restore();
      server.kill({ step, when: "after" });
      await created();
      expectRestoredBut();
      if (server.stepsTaken >= step) continue;
      expect(step).toBeGreaterThan(5);
      return;
    }
  });

  it("a cancel at each command leaves nothing running, and the next run finishes", {
    timeout: 120_000,
  }, async () => {
    const first = await firstChange();
    for (let at = first; ; at++) {
      server.restore();
      server.onCommand = (_command, index) => {
        if (index === at) cancel.abort();
        return undefined;
      };
      const end: unknown = await created().catch((error: unknown) => error);
      server.onCommand = () => undefined;
      neverHalf();
      if (!(end instanceof Error)) {
        expect(at).toBeGreaterThan(first + 2);
        return;
      }
      expect(end.message).toMatch(/^CANCELLED/);
      await up(keptBy(end));
      expectRestoredBut();
    }
  });

  /** A run that was cut at its very end leaves what the next reboot clears away. */
  const expectRestoredBut = () => {
    expect(content()).toBe(restoredTo(moment));
    expect(marks().map(({ stage }) => stage)).toEqual(["restored"]);
    expect(server.started).toBeLessThanOrEqual(2);
    expect(server.left().every((path) => path.startsWith("/run/"))).toBe(true);
    expect(existsSync(server.volume("vm1", "open"))).toBe(false);
  };
});

it("its changes are few: one starts the job, one clears away", async () => {
  await created();
  expect(changes()).toHaveLength(2);
});
