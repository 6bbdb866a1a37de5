/** Copies into volumes, on a host whose scripts run in a real shell; what they share with images is tested there. */
import { createHash } from "node:crypto";
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { dirname } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers, type Handlers } from "../../provider/core/handlers.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { resourceType } from "../../provider/core/registry.js";
import { asideOf } from "../../provider/linux/copiedVolume.js";
import { CopyHost } from "../support/copyHost.js";
import { fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { importer } from "../support/imported.js";
import { extentBytes } from "../support/lvmStandIns.js";
import { recordedLvs } from "../support/recorded.js";

vi.mock("node:timers/promises", async (original) =>
  (await import("../support/shortWaits.js")).shortWaits(await original()),
);

type Values = Readonly<Record<string, unknown>>;
const none: ReadonlySet<string> = new Set();
const address = (name: string) => ({
  address: name,
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
});
const sha256 = (content: string) => createHash("sha256").update(content).digest("hex");
const recorded = JSON.parse(recordedLvs("valid")).report[0].lv.find(
  (row: Values) => row.lv_attr === "sri-a-s---",
);
const snapshot = {
  host: address("192.0.2.1"),
  volumeGroup: recorded.vg_name,
  name: recorded.lv_name,
  uuid: recorded.lv_uuid,
};
const moment = "a moment of the disk\n".repeat(1000);
const later = "a later moment\n".repeat(1400);
const extents = Math.ceil(moment.length / extentBytes);
const validVolumes = () => recordedLvs("valid").replaceAll('"67108864"', `"${moment.length}"`);
const volume = { volumeGroup: "VgVm", name: "vm1" };
const part = `lvmnbd-part-${sha256("/dev/VgVm/vm1").slice(0, 16)}`;
const aside = asideOf(volume).name;

let destination: CopyHost;
let volumes: string;
let cancel: AbortController;
let warnings: string[];
let lines: string[];

beforeEach(() => {
  destination = new CopyHost();
  destination.serve(moment);
  destination.kill(undefined);
  volumes = validVolumes();
});
afterEach(() => destination.close());

function handlers(): Handlers {
  [cancel, warnings, lines] = [new AbortController(), [], []];
  const source = fakeHost(
    (command) =>
      destination.sourceAnswer(command) ??
      (command.argv[0] === "date" ? String(Number(recorded.lv_time) + 100) : volumes),
  );
  return createHandlers(resourceType("VolumeCopy"), {
    openHost: async (host) =>
      typeof host === "object" && host.address === "192.0.2.1" ? source : destination,
    progress: (line) => lines.push(line),
    warn: (line) => warnings.push(line),
    signal: cancel.signal,
  });
}

async function checked(change: Values = {}, old?: Values): Promise<Values> {
  const wanted = {
    ...{ host: address("192.0.2.2"), owner: "o/p/s/vm1", uri: "nbd://10.0.0.1:10809/vm1", volume },
    ...change,
  };
  const { inputs, problems } = await handlers().check(old, wanted, none);
  expect(problems).toEqual([]);
  return inputs;
}

async function made(change: Values = {}): Promise<Values> {
  const wanted = await checked(change);
  return (await handlers().create(wanted)).state;
}

const content = (name = "vm1") => readFileSync(destination.device(name), "utf8");
const padded = (text: string) => text.padEnd(extents * extentBytes, "\0");
const tags = (name = "vm1") => readFileSync(destination.volume(name, "tags"), "utf8").trim().split("\n");
const uuid = (name = "vm1") => readFileSync(destination.volume(name, "uuid"), "utf8").trim();
/** Somebody's volume. */
function put(name: string, marks: readonly string[] = [], size = extents): void {
  mkdirSync(dirname(destination.volume(name, "tags")), { recursive: true });
  writeFileSync(destination.volume(name, "uuid"), `uuid-of-${name}\n`);
  writeFileSync(destination.volume(name, "extents"), `${size}\n`);
  writeFileSync(destination.volume(name, "tags"), marks.map((mark) => `${mark}\n`).join(""));
  mkdirSync(dirname(destination.device(name)), { recursive: true });
  writeFileSync(destination.device(name), "theirs");
}

/** An earlier copy that is still to be removed; writable. */
function putAside(copyId: string, owner = "o/p/s/vm1"): void {
  const facts = [`uuid=uuid-of-${aside}`, "sha256=0", "sizeBytes=1"].map((fact) => `lvm-nbd.fact.${fact}`);
  put(aside, [`lvm-nbd.owner=${owner}`, `lvm-nbd.copy=${copyId}`, ...facts]);
}

describe("bad input is refused before any host is asked", () => {
  const declared = { host: address("192.0.2.2"), owner: "o/p/s/vm1", uri: "nbd://10.0.0.1/vm1", volume };
  const problemsOf = async (change: Values) => {
    const wanted = { ...declared, ...change };
    const { problems } = await handlersOn("VolumeCopy", untouchedHost()).check(undefined, wanted, none);
    return problems.map(({ property, reason }) => `${property}: ${reason}`);
  };

  it.each([
    ["neither place", { volume: undefined }, /^file: is required, unless `volume` is given/],
    ["both places", { file: "/backup/vm1.raw" }, /^volume: cannot go with `file`/],
    ["a volume without its group", { volume: { name: "vm1" } }, /^volume\.volumeGroup: is required/],
    ["a name that LVM reserves", { volume: { ...volume, name: "snapshot1" } }, /^volume\.name: .*reserved/],
    [
      "the name of an unfinished copy",
      { volume: { ...volume, name: part } },
      /^volume\.name: .*lvmnbd-part-/,
    ],
    ["a group in the name", { volume: { ...volume, name: "VgVm/vm1" } }, /^volume\.name: .*characters/],
    [
      "a group's name that leaves no room",
      { volume: { ...volume, volumeGroup: "v".repeat(100) } },
      /^volume: .*127 fit/,
    ],
    ["a format of files", { format: "qcow2" }, /^format: .*leave it out for a `volume`/],
    ["taking over", { adopt: true }, /^adopt: takes over no `volume`/],
  ])("%s", async (_what, change, message) => {
    expect(await problemsOf(change)).toEqual([expect.stringMatching(message)]);
  });

  it("a place that is only known later is none of these", async () => {
    const { volume: _, ...without } = declared;
    const check = (wanted: Values, unknown: string) =>
      handlersOn("VolumeCopy", untouchedHost()).check(undefined, wanted, new Set([unknown]));
    expect((await check(without, "volume")).problems).toEqual([]);
    expect((await check(declared, "file")).problems).toEqual([]);
  });

  it("the device's path is known before there is one", async () => {
    const { predicted } = await handlers().check(undefined, await checked(), none);
    expect(predicted).toEqual({ path: "/dev/VgVm/vm1" });
  });
});

describe("a copy", () => {
  it("holds what the source served and zeros behind it, and nothing else is left", async () => {
    const state = await made({ snapshot });
    expect(content()).toBe(padded(moment));
    expect(destination.volumes()).toEqual(["vm1"]);
    expect(destination.left()).toEqual([]);
    expect(state).toMatchObject({
      ...{ path: "/dev/VgVm/vm1", uuid: uuid(), sha256: sha256(moment), sizeBytes: moment.length },
      ...{ allocatedBytes: extents * extentBytes, verified: true, state: "complete" },
    });
    expect(state).not.toHaveProperty("manifest");
    expect(Date.parse(String(state.completedAt))).toBeGreaterThan(Date.now() - 60_000);
    expect(lines.join("\n")).toMatch(/copying nbd:\/\/10.*is complete: giving it its name/s);
  });

  it("says in its tags what it is, without any state", async () => {
    await made({ snapshot });
    expect(tags()).toEqual(
      expect.arrayContaining([
        "lvm-nbd.owner=o/p/s/vm1",
        `lvm-nbd.fact.sha256=${sha256(moment)}`,
        `lvm-nbd.fact.sizeBytes=${moment.length}`,
        `lvm-nbd.fact.uuid=${uuid()}`,
        `lvm-nbd.fact.snapshotUuid=${snapshot.uuid}`,
        "lvm-nbd.fact.verified=true",
      ]),
    );
    for (const tag of tags()) expect(tag.length).toBeLessThan(128);
  });

  it("of a source that fills its extents has nothing behind it", async () => {
    destination.serve("x".repeat(3 * extentBytes));
    expect(await made()).toMatchObject({ sizeBytes: 3 * extentBytes, allocatedBytes: 3 * extentBytes });
    expect(content()).toBe("x".repeat(3 * extentBytes));
  });

  it("again changes nothing, and a refresh finds nothing", async () => {
    const state = await made();
    const before = destination.commands.length;
    expect((await handlers().diff(state, await checked({}, state), none)).changes).toEqual([]);
    await handlers().update(state, await checked({}, state));
    expect(await handlers().read(state)).toEqual(state);
    expect(warnings).toEqual([]);
    expect(destination.commands.slice(before).filter(({ kind }) => kind === "change")).toEqual([]);
  });

  it("anew keeps the earlier one until the new one is verified", async () => {
    const state = await made({ triggers: [1] });
    destination.serve(later);
    destination.set("hold", "");
    let during: string | undefined;
    destination.onCommand = () => {
      if (destination.started === 2 && during === undefined) {
        during = content();
        expect(destination.volumes()).toEqual([part, "vm1"]);
        destination.set("hold", undefined);
      }
      return undefined;
    };
    const wanted = await checked({ triggers: [2] }, state);
    expect(await handlers().update(state, wanted)).toMatchObject({ sha256: sha256(later), triggers: [2] });
    expect(during).toBe(padded(moment));
    expect(content()).toBe(padded(later));
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it("to another place is made before the earlier one is removed", async () => {
    const state = await made();
    const elsewhere = await checked({ volume: { ...volume, name: "other" } }, state);
    expect(await handlers().diff(state, elsewhere, none)).toEqual({
      changes: [{ property: "volume", effect: "replace" }],
      deleteBeforeReplace: false,
    });
    const toFile = await checked({ volume: undefined, file: "/backup/vm1.raw" }, state);
    expect((await handlers().diff(state, toFile, none)).changes).toEqual([
      { property: "file", effect: "replace" },
      { property: "volume", effect: "replace" },
    ]);
  });
});

describe("a copy that cannot be made leaves nothing but its reason", () => {
  const fails = async (code: string, text: RegExp, change: Values = {}) => {
    const error = await handlers()
      .create(await checked(change))
      .catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code, message: expect.stringMatching(text) });
    expect(destination.volumes()).toEqual([]);
    expect(destination.left()).toEqual([]);
  };
  const untouched = () => expect(destination.commands.filter(({ kind }) => kind === "change")).toEqual([]);

  it("the group has too little room: said with the numbers, before anything is made", async () => {
    destination.set("extents", "2\n");
    await fails(
      "NO_SPACE",
      /VgVm has 8\.0 KiB \(8192 bytes\) free, the copy needs 24 KiB \(24576 bytes\)[\s\S]*16 KiB \(16384 bytes\) more/,
    );
    untouched();
  });

  it("the volume group is not there", async () => {
    destination.set("group-gone", "");
    await expect(made()).rejects.toThrow(/VOLUME_GROUP_NOT_FOUND/);
    untouched();
  });

  it("the export does not answer", async () => {
    destination.serve(undefined);
    await fails("EXPORT_UNREACHABLE", /does not answer here/);
    untouched();
  });

  it("the source breaks off", async () => {
    destination.set("broken", "nbd: connection reset\n");
    await fails("COPY_FAILED", /the copy broke off[\s\S]*connection reset/);
  });

  it("the source serves something else the second time", async () => {
    destination.set("reread", later);
    await fails("COPY_MISMATCH", new RegExp(sha256(later)));
  });

  it("the job cannot be started", async () => {
    destination.set("no-units", "");
    await fails("COMMAND_FAILED", /could not be started/);
  });

  it("the snapshot overflows after the last byte was read", async () => {
    const overflowed = recordedLvs("overflowed");
    const uuidOf = JSON.parse(overflowed).report[0].lv.find(
      (row: Values) => row.lv_snapshot_invalid === "1",
    ).lv_uuid;
    destination.onCommand = ({ argv }) =>
      argv[2]?.includes("CPUUsageNSec")
        ? () => {
            volumes = overflowed.replaceAll(uuidOf, snapshot.uuid);
          }
        : undefined;
    await fails("SNAPSHOT_OVERFLOWED", /ran full/, { snapshot });
  });

  it("and an earlier copy is untouched; room is needed for both", async () => {
    const state = await made();
    destination.set("extents", `${2 * extents - 1}\n`);
    const failed = async () =>
      handlers()
        .update(state, await checked({ triggers: [2] }, state))
        .catch((reason: unknown) => reason);
    const full = await failed();
    expect(full).toMatchObject({ message: expect.stringMatching(/NO_SPACE.*earlier copy .*room for both/) });
    destination.set("extents", "100\n");
    destination.set("broken", "nbd: connection reset\n");
    const error = await failed();
    expect(error).toBeInstanceOf(PartialFailure);
    expect((error as PartialFailure).state).toMatchObject({ triggers: [], sha256: sha256(moment) });
    expect(content()).toBe(padded(moment));
    expect(destination.volumes()).toEqual(["vm1"]);
  });
});

describe("what is not ours", () => {
  it.each([
    ["a volume without a mark", []],
    ["a snapshot of a resource of this very name", ["lvm-nbd.owner=o/p/s/vm1"]],
    [
      "another stack's",
      [
        "lvm-nbd.owner=o/p/other/vm1",
        "lvm-nbd.copy=1",
        "lvm-nbd.fact.uuid=uuid-of-vm1",
        "lvm-nbd.fact.sha256=0",
        "lvm-nbd.fact.sizeBytes=1",
      ],
    ],
    [
      "a copy of ours that vgimportclone gave another UUID",
      [
        "lvm-nbd.owner=o/p/s/vm1",
        "lvm-nbd.copy=1",
        "lvm-nbd.fact.uuid=another",
        "lvm-nbd.fact.sha256=0",
        "lvm-nbd.fact.sizeBytes=1",
      ],
    ],
  ])("is refused before anything is touched: %s", async (_what, marks) => {
    put("vm1", marks);
    await expect(made()).rejects.toThrow(/FOREIGN_RESOURCE.*server2\/dev\/VgVm\/vm1 exists already/);
    expect(destination.commands.filter(({ kind }) => kind === "change")).toEqual([]);
    expect(content()).toBe("theirs");
  });

  it("is refused: somebody's volume where the unfinished copy would lie", async () => {
    for (const marks of [[], ["lvm-nbd.owner=o/p/s/vm1"]]) {
      put(part, marks);
      await expect(made()).rejects.toThrow(
        /FOREIGN_RESOURCE.*lvmnbd-part-.* is not an unfinished copy of this resource/,
      );
    }
    expect(destination.volumes()).toEqual([part]);
    expect(content(part)).toBe("theirs");
  });

  it("is refused: another stack's unfinished copy to that name", async () => {
    put(part, ["lvm-nbd.owner=o/p/other/vm1", "lvm-nbd.copy=1", "lvm-nbd.run=1"]);
    await expect(made()).rejects.toThrow(/FOREIGN_RESOURCE.*belongs to o\/p\/other\/vm1/);
    expect(content(part)).toBe("theirs");
  });

  it("is not removed, nor taken for the copy: another volume that has its name by now", async () => {
    const state = await made();
    rmSync(dirname(destination.volume("vm1", "tags")), { recursive: true });
    put("vm1");
    expect(await handlers().read(state)).toBeUndefined();
    expect(warnings.join()).toMatch(/was replaced by something of the same name/);
    await handlers().remove(state);
    expect(warnings.join()).toMatch(/left alone/);
    expect(content()).toBe("theirs");
  });

  it("is not removed: a copy that another resource has taken over", async () => {
    const state = await made();
    const moved = await made({ host: address("192.0.2.3") });
    expect(moved.copyId).not.toBe(state.copyId);
    expect(destination.started).toBe(1);
    await handlers().remove(state);
    expect(warnings.join()).toMatch(/another resource's by now/);
    expect(destination.volumes()).toEqual(["vm1"]);
    await handlers().remove(moved);
    expect(destination.volumes()).toEqual([]);
  });
});

describe("what is in use is neither removed nor replaced, and its holder is named", () => {
  it.each([
    ["open", () => writeFileSync(destination.volume("vm1", "open"), ""), /VOLUME_IN_USE.*mounted at \/mnt/],
    [
      "the origin of a snapshot",
      () => {
        put("theirs");
        writeFileSync(destination.volume("theirs", "origin"), uuid());
      },
      /VOLUME_IN_USE.*origin of "theirs"/,
    ],
  ])("%s", async (_what, hold, message) => {
    const state = await made();
    hold();
    destination.holders = `mount\t${Buffer.from("/mnt").toString("base64")}\n`;
    const before = destination.volumes();
    await expect(handlers().remove(state)).rejects.toThrow(message);
    const anew = await checked({ triggers: [2] }, state);
    await expect(handlers().update(state, anew)).rejects.toThrow(message);
    expect(destination.started).toBe(1);
    expect(destination.volumes()).toEqual(before);
    expect(content()).toBe(padded(moment));
  });

  it("opened while its successor was copied: that waits verified, and the next run gives it its name", async () => {
    const state = await made();
    destination.serve(later);
    destination.holders = `mount\t${Buffer.from("/mnt").toString("base64")}\n`;
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("lvrename")) writeFileSync(destination.volume("vm1", "open"), "");
      return undefined;
    };
    const anew = await checked({ snapshot, triggers: [2] }, state);
    volumes = volumes.replaceAll(`"${moment.length}"`, `"${later.length}"`);
    await expect(handlers().update(state, anew)).rejects.toThrow(/VOLUME_IN_USE.*mounted at \/mnt/);
    expect(content()).toBe(padded(moment));
    destination.onCommand = () => undefined;
    rmSync(destination.volume("vm1", "open"));
    expect(await handlers().update(state, anew)).toMatchObject({ sha256: sha256(later) });
    expect(destination.started).toBe(2);
    expect(destination.volumes()).toEqual(["vm1"]);
  });
});

describe("a copy that was made writable is a disk of its own", () => {
  const handedOver = async () => {
    const state = await made();
    rmSync(destination.volume("vm1", "ro"));
    return state;
  };

  it("it is not replaced, and says how it leaves the stack", async () => {
    const state = await handedOver();
    const message =
      /VOLUME_IN_USE.*VgVm\/vm1 was made writable since it was copied[\s\S]*out of the program: the volume stays/;
    for (const change of [{ triggers: [2] }, { uri: "nbd://10.0.0.1:10809/other" }]) {
      const anew = await checked(change, state);
      await expect(handlers().update(state, anew)).rejects.toThrow(message);
    }
    expect(destination.volumes()).toEqual(["vm1"]);
    expect(destination.started).toBe(1);
  });

  it("while its successor was copied: it keeps its name, and that waits verified", async () => {
    const state = await made();
    destination.serve(later);
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("lvrename")) rmSync(destination.volume("vm1", "ro"));
      return undefined;
    };
    const anew = await checked({ triggers: [2] }, state);
    await expect(handlers().update(state, anew)).rejects.toThrow(/VOLUME_IN_USE.*vm1 was made writable/);
    expect(destination.volumes()).toEqual([part, "vm1"]);
    expect(content()).toBe(padded(moment));
    destination.onCommand = () => undefined;
    writeFileSync(destination.volume("vm1", "ro"), "");
    expect(await handlers().update(state, anew)).toMatchObject({ sha256: sha256(later) });
    expect(destination.started).toBe(2);
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it("while it is removed: LVM leaves it", async () => {
    const state = await made();
    destination.set("hands-over", "");
    await handlers().remove(state);
    expect(warnings.join()).toMatch(/vm1 was made writable.*NOT removed/);
    expect(destination.volumes()).toEqual(["vm1"]);
    expect(content()).toBe(padded(moment));
  });

  it("leaves the stack, open or not, and is nobody's then; what else was made beside it goes", async () => {
    const state = await handedOver();
    put(part, ["lvm-nbd.owner=o/p/s/vm1", `lvm-nbd.copy=${state.copyId}`, "lvm-nbd.run=1"]);
    putAside(String(state.copyId));
    writeFileSync(destination.volume(aside, "ro"), "");
    writeFileSync(destination.volume("vm1", "open"), "");
    appendFileSync(destination.volume("vm1", "tags"), "mine\n");
    await handlers().remove(state);
    expect(warnings.join()).toMatch(/VgVm\/vm1 was made writable.*NOT removed/);
    expect(destination.volumes()).toEqual(["vm1"]);
    expect(tags()).toEqual(["mine"]);
    expect(content()).toBe(padded(moment));
    await expect(made()).rejects.toThrow(/FOREIGN_RESOURCE/);
  });

  it("put aside, it is not removed with its successor", async () => {
    const state = await made();
    putAside(String(state.copyId));
    await handlers().remove(state);
    expect(warnings.join()).toMatch(/VgVm\/lvmnbd-old-.* was made writable.*NOT removed/);
    expect(destination.volumes()).toEqual([aside]);
    expect(content(aside)).toBe("theirs");
  });

  it("when its successor had its name already: it is left alone and named", async () => {
    const state = await made();
    putAside(String(state.copyId));
    await handlers().update(state, await checked({}, state));
    expect(warnings.join()).toMatch(/VgVm\/lvmnbd-old-.* was made writable and is left alone/);
    expect(destination.volumes()).toEqual([aside, "vm1"]);
    writeFileSync(destination.volume(aside, "ro"), "");
    await handlers().update(state, await checked({}, state));
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it("one that had its name inactive is read-only nevertheless, and not taken for it", async () => {
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("lvrename")) writeFileSync(destination.volume(part, "inactive"), "");
      return undefined;
    };
    const state = await made();
    expect(state).toMatchObject({ state: "complete" });
    expect(existsSync(destination.volume("vm1", "ro"))).toBe(true);
    expect(tags()).toContain("lvm-nbd.fact.readOnly=1");
    await handlers().remove(state);
    expect(destination.volumes()).toEqual([]);
  });

  it("one that never was read-only is not taken for it, and is not given up either", async () => {
    const state = await handedOver();
    const never = tags().filter((tag) => !tag.includes("readOnly"));
    writeFileSync(destination.volume("vm1", "tags"), `${never.join("\n")}\n`);
    expect(await handlers().read(state)).toMatchObject({ state: "complete" });
    const anew = await checked({ triggers: [2] }, state);
    await expect(handlers().update(state, anew)).rejects.toThrow(
      /VOLUME_IN_USE.*was made writable[\s\S]*lvchange -p r/,
    );
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it("it is not taken back by a create", async () => {
    await handedOver();
    await expect(made()).rejects.toThrow(/VOLUME_IN_USE.*was made writable/);
  });

  it("a refresh tells it, and needs no change", async () => {
    const state = (await handlers().read(await handedOver())) as Values;
    expect(state).toMatchObject({ state: "handedOver" });
    expect(warnings.join()).toMatch(/was made writable.*neither replaced nor removed/);
    expect((await handlers().diff(state, await checked({}, state), none)).changes).toEqual([]);
  });
});

it("a snapshot that was taken a moment ago keeps the copy that is to be removed", async () => {
  const state = await made();
  destination.onCommand = ({ argv }) => {
    if (!argv[2]?.includes("remove_volume")) return undefined;
    put("theirs");
    writeFileSync(destination.volume("theirs", "origin"), readFileSync(destination.volume("vm1", "uuid")));
    return undefined;
  };
  await expect(handlers().remove(state)).rejects.toThrow(/VOLUME_IN_USE.*could not be removed/);
  expect(destination.volumes()).toContain("vm1");
});

it("somebody's snapshot of an unfinished copy keeps that, and is named with it", async () => {
  destination.set("broken", "nbd: connection reset\n");
  destination.onCommand = ({ argv }) => {
    if (!argv[2]?.includes("CPUUsageNSec")) return undefined;
    put("theirs");
    writeFileSync(destination.volume("theirs", "origin"), uuid(part));
    return undefined;
  };
  await expect(made()).rejects.toThrow(/COPY_FAILED/);
  expect(warnings.join()).toMatch(/lvmnbd-part-.* is left on the host.*has snapshots/);
  expect(destination.volumes()).toEqual([part, "theirs"]);
  destination.onCommand = () => undefined;
  await expect(made()).rejects.toThrow(/VOLUME_IN_USE.*lvmnbd-part-.*could not be removed/);
  expect(destination.volumes()).toEqual([part, "theirs"]);
});

describe("a refresh", () => {
  it("names a volume of another size, and up copies anew", async () => {
    const state = await made();
    writeFileSync(destination.volume("vm1", "extents"), `${extents + 1}\n`);
    const seen = await handlers().read(state);
    expect(seen).toMatchObject({ state: "changed" });
    expect(warnings.join()).toMatch(/it has 28672 bytes, not the 24576.*`pulumi up` will copy anew/);
    expect((await handlers().diff(seen ?? {}, await checked({}, state), none)).changes).toEqual([
      { property: "state", effect: "update" },
    ]);
    expect(await handlers().update(seen ?? {}, await checked({}, state))).toMatchObject({
      state: "complete",
    });
    expect(destination.started).toBe(2);
  });

  it("finds a flipped byte with deepCheck, and only then", async () => {
    const state = await made({ deepCheck: true });
    writeFileSync(destination.device("vm1"), padded(moment.replace("moment", "mOment")));
    expect(await handlers().read({ ...state, deepCheck: false })).toMatchObject({ state: "complete" });
    const seen = await handlers().read(state);
    expect(seen).toMatchObject({ state: "corrupt" });
    expect(warnings.join()).toMatch(/\/dev\/VgVm\/vm1 does not read back as it was copied/);
    const wanted = await checked({ deepCheck: true }, state);
    expect(await handlers().update(seen ?? {}, wanted)).toMatchObject({ state: "complete" });
    expect(content()).toBe(padded(moment));
  });

  it("does not look behind the content", async () => {
    const state = await made({ deepCheck: true });
    writeFileSync(destination.device("vm1"), padded(moment).slice(0, -1));
    appendFileSync(destination.device("vm1"), "x");
    expect(await handlers().read(state)).toMatchObject({ state: "complete" });
  });

  it("says gone of what is positively absent, and never of a group that is not there", async () => {
    const state = await made();
    destination.set("group-gone", "");
    await expect(handlers().read(state)).rejects.toThrow(/VOLUME_GROUP_NOT_FOUND/);
    await expect(handlers().remove(state)).rejects.toThrow(/VOLUME_GROUP_NOT_FOUND/);
    destination.set("group-gone", undefined);
    rmSync(dirname(destination.volume("vm1", "tags")), { recursive: true });
    expect(await handlers().read(state)).toBeUndefined();
  });
});

class Died extends Error {}

function dies(at: number, when: "before" | "after"): void {
  let dead = false;
  const begin = destination.commands.length;
  destination.onCommand = (_command, index) => {
    if (dead || (when === "before" && index - begin === at)) {
      dead = true;
      throw new Died("the provider died");
    }
    return () => {
      if (index - begin !== at) return;
      dead = true;
      throw new Died("the provider died");
    };
  };
}

/** Milliseconds for all cuts of one operation: each runs shell scripts. */
const timeout = 400_000;

describe("whatever cuts it, the next up finishes the work", () => {
  const operations = {
    create: {
      prepared: async (): Promise<Values | undefined> => undefined,
      run: async (_state: Values | undefined) => made({ snapshot }),
      done: () => {
        expect(destination.volumes()).toEqual(["vm1"]);
        expect(content()).toBe(padded(moment));
      },
    },
    "a copy anew": {
      prepared: async () => {
        const state = await made({ snapshot });
        destination.serve(later);
        volumes = volumes.replaceAll(`"${moment.length}"`, `"${later.length}"`);
        return state;
      },
      run: async (state: Values | undefined) => {
        const wanted = await checked({ snapshot, triggers: [2] }, state);
        return handlers().update(state ?? {}, wanted);
      },
      done: () => {
        expect(destination.volumes()).toEqual(["vm1"]);
        expect(content()).toBe(padded(later));
      },
    },
    remove: {
      prepared: async () => made({ snapshot }),
      run: async (state: Values | undefined) => handlers().remove(state ?? {}),
      done: () => expect(destination.volumes()).toEqual([]),
    },
  };
  /** An earlier copy is whole or replaced by a whole one; between them the new one lies verified under its own name. */
  const neverHalf = () => {
    if (existsSync(destination.device("vm1"))) expect([padded(moment), padded(later)]).toContain(content());
    else if (existsSync(destination.device(part)) && tags(part).some((tag) => tag.includes("fact.sha256")))
      expect([padded(moment), padded(later)]).toContain(content(part));
  };

  describe.each(Object.entries(operations))("%s", (name, { prepared, run, done }) => {
    let state: Values | undefined;
    beforeEach(async () => {
      state = await prepared();
      destination.save();
    }, 60_000);
    const finished = () => {
      neverHalf();
      done();
      expect(destination.left()).toEqual([]);
    };
    /** While the earlier one is not replaced, it must be there. */
    const nothingLost = () => {
      neverHalf();
      if (name !== "a copy anew") return;
      expect([destination.device("vm1"), destination.device(part)].some((path) => existsSync(path))).toBe(
        true,
      );
    };

    it("the provider is killed at each command", { timeout }, async () => {
      for (let at = 0; ; at++) {
        let reached = false;
        for (const when of ["before", "after"] as const) {
          destination.restore();
          dies(at, when);
          const end = await run(state).catch((error: unknown) => error);
          destination.onCommand = () => undefined;
          nothingLost();
          if (!(end instanceof Died)) continue;
          reached = true;
          await run(state);
          finished();
        }
        if (reached) continue;
        expect(at).toBeGreaterThan(2);
        return;
      }
    });

    it("the link drops at each command: the same run goes on", { timeout }, async () => {
      for (let at = 0; ; at++) {
        destination.restore();
        let reached = false;
        destination.onCommand = ({ kind }, index) => {
          if (index !== at) return undefined;
          reached = true;
          if (kind === "read") return undefined;
          return () => {
            throw new LvmNbdError("LINK_LOST", { message: "lost" });
          };
        };
        await run(state);
        finished();
        if (!reached) return;
      }
    });

    it("a script is killed at each of its steps", { timeout }, async () => {
      // After a step is before the next one, but for what the shell itself does in between.
      for (const when of ["before", "after"] as const) {
        for (let step = 1; ; step += when === "after" ? 3 : 1) {
          destination.restore();
          destination.kill({ step, when });
          await run(state);
          finished();
          if (destination.stepsTaken >= step) continue;
          expect(step).toBeGreaterThan(1);
          break;
        }
      }
    });

    it("a cancel at each command leaves nothing half done, and the next run finishes", {
      timeout,
    }, async () => {
      for (let at = 0; ; at++) {
        destination.restore();
        destination.set("hold", "");
        destination.onCommand = (_command, index) => {
          if (index === at) cancel.abort();
          if (index > 8) destination.set("hold", undefined);
          return undefined;
        };
        const end = await run(state).catch((error: unknown) => error);
        destination.onCommand = () => undefined;
        destination.set("hold", undefined);
        nothingLost();
        if (!(end instanceof Error)) {
          expect(at).toBeGreaterThan(1);
          return;
        }
        expect(end.message).toMatch(/^CANCELLED/);
        // Cancelled while it gets its name, a verified copy waits for that.
        const waits = lines.some((line) => line.includes("giving it its name"));
        if (!waits) expect(destination.volumes()).not.toContain(part);
        if (!waits) expect(destination.left()).toEqual([]);
        await run(end instanceof PartialFailure ? end.state : state);
        finished();
      }
    });
  });

  it.each([
    ["put aside", aside],
    ["verified", part],
  ])(
    "a copy that a cut left %s has its name again before another declaration is tried",
    async (_what, left) => {
      const state = await made();
      renameSync(dirname(destination.volume("vm1", "tags")), dirname(destination.volume(left, "tags")));
      renameSync(destination.device("vm1"), destination.device(left));
      // With no source to copy anew.
      destination.serve(undefined);
      const anew = await checked({ triggers: [3], uri: "nbd://10.0.0.1:10809/other" }, state);
      await expect(handlers().update(state, anew)).rejects.toThrow(/EXPORT_UNREACHABLE/);
      expect(destination.volumes()).toEqual(["vm1"]);
      expect(content()).toBe(padded(moment));
      destination.serve(later);
      expect(await handlers().update(state, anew)).toMatchObject({ sha256: sha256(later) });
      expect(destination.volumes()).toEqual(["vm1"]);
    },
  );

  it("an earlier copy from before the resource was renamed is removed as well, before its successor is copied", async () => {
    const state = await made();
    putAside(String(state.copyId), "o/p/s/former");
    writeFileSync(destination.volume(aside, "ro"), "");
    destination.set("extents", `${3 * extents - 1}\n`);
    const wanted = await checked({ triggers: [2] }, state);
    expect(await handlers().update(state, wanted)).toMatchObject({ state: "complete", triggers: [2] });
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it.each([
    ["somebody's volume", () => put(aside)],
    ["another copy's", () => putAside("another", "o/p/s/former")],
    ["one that was made writable", (state: Values) => putAside(String(state.copyId))],
  ])(
    "what lies where the earlier copy would be put aside is named before anything is copied: %s",
    async (_what, lay) => {
      const state = await made();
      lay(state);
      const wanted = await checked({ triggers: [2] }, state);
      await expect(handlers().update(state, wanted)).rejects.toThrow(
        /FOREIGN_RESOURCE.*VgVm\/lvmnbd-old-.* exists[\s\S]*lvrename VgVm lvmnbd-old-/,
      );
      expect(destination.started).toBe(1);
      expect(destination.volumes()).toEqual([aside, "vm1"]);
      expect(content(aside)).toBe("theirs");
    },
  );

  describe.each([
    ["put aside", aside],
    ["verified", part],
  ])("a copy that a cut left %s", (_what, left) => {
    const cut = async () => {
      const state = await made();
      renameSync(dirname(destination.volume("vm1", "tags")), dirname(destination.volume(left, "tags")));
      renameSync(destination.device("vm1"), destination.device(left));
      return state;
    };

    it("is kept by a refresh, and has its name again by the next up, without a copy", async () => {
      const seen = (await handlers().read(await cut())) as Values;
      expect(seen).toMatchObject({ state: "stale", sha256: sha256(moment) });
      expect(warnings.join()).toMatch(new RegExp(`lost its name to a cut, and is ${left} now`));
      const wanted = await checked({}, seen);
      expect((await handlers().diff(seen, wanted, none)).changes).toEqual([
        { property: "state", effect: "update" },
      ]);
      expect(await handlers().update(seen, wanted)).toMatchObject({ state: "complete" });
      expect(destination.volumes()).toEqual(["vm1"]);
      expect(content()).toBe(padded(moment));
      expect(destination.started).toBe(1);
    });

    it("goes with the resource", async () => {
      await handlers().remove(await cut());
      expect(destination.volumes()).toEqual([]);
    });
  });

  it("a copy that a cut left put aside has its name again although it is open and has a snapshot", async () => {
    const state = await made();
    renameSync(dirname(destination.volume("vm1", "tags")), dirname(destination.volume(aside, "tags")));
    renameSync(destination.device("vm1"), destination.device(aside));
    writeFileSync(destination.volume(aside, "open"), "");
    put("theirs");
    writeFileSync(destination.volume("theirs", "origin"), uuid(aside));
    const anew = await checked({ triggers: [3] }, state);
    await expect(handlers().update(state, anew)).rejects.toThrow(/VOLUME_IN_USE.*VgVm\/vm1 is the origin/);
    expect(destination.volumes()).toEqual(["theirs", "vm1"]);
    expect(content()).toBe(padded(moment));
  });

  it("a job that goes on is found, not started again", async () => {
    destination.set("hold", "");
    destination.onCommand = ({ argv }) => {
      if (!argv[2]?.includes("CPUUsageNSec")) return undefined;
      throw new Died("the provider died");
    };
    await expect(made()).rejects.toThrow(Died);
    expect(destination.volumes()).toEqual([part]);
    let looks = 0;
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("CPUUsageNSec") && ++looks > 1) destination.set("hold", undefined);
      return undefined;
    };
    await made();
    expect(lines.join("\n")).toMatch(/is on its way: going on with it/);
    expect(destination.started).toBe(1);
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it.each([
    ["another declaration", { triggers: [1] }],
    ["another uri", { uri: "nbd://10.0.0.1:10809/wrong" }],
    ["a copy without verification", { verify: false }],
  ])("a job for %s is not taken for it", async (_what, change) => {
    destination.set("hold", "");
    destination.onCommand = ({ argv }) => {
      if (!argv[2]?.includes("CPUUsageNSec")) return undefined;
      throw new Died("the provider died");
    };
    await expect(made({ snapshot, ...change })).rejects.toThrow(Died);
    destination.onCommand = () => undefined;
    destination.set("hold", undefined);
    expect(await made({ snapshot })).toMatchObject({ state: "complete", verified: true });
    expect(destination.started).toBe(2);
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it("what a reboot left of a copy on its way is made anew", async () => {
    destination.set("hold", "");
    destination.onCommand = ({ argv }) => {
      if (!argv[2]?.includes("CPUUsageNSec")) return undefined;
      throw new Died("the provider died");
    };
    await expect(made({ snapshot })).rejects.toThrow(Died);
    destination.reboot();
    destination.onCommand = () => undefined;
    destination.set("hold", undefined);
    expect(await made({ snapshot })).toMatchObject({ state: "complete" });
    expect(destination.started).toBe(2);
    expect(destination.volumes()).toEqual(["vm1"]);
  });

  it("a verified copy is given its name after a reboot too", async () => {
    destination.kill(undefined);
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("lvrename")) destination.set("no-rename", "");
      return undefined;
    };
    await expect(made({ snapshot })).rejects.toThrow(/COMMAND_FAILED.*could not get its name/);
    expect(destination.volumes()).toEqual([part]);
    destination.reboot();
    destination.set("no-rename", undefined);
    destination.onCommand = () => undefined;
    expect(await made({ snapshot })).toMatchObject({ state: "complete", sha256: sha256(moment) });
    expect(destination.started).toBe(1);
    expect(destination.volumes()).toEqual(["vm1"]);
  });
});

it("read by its id alone it is refused: what it was copied from is not kept on it", async () => {
  await made();
  await expect(handlers().find("192.0.2.2/dev/VgVm/vm1", importer)).rejects.toThrow(
    /INVALID_INPUT.*uri: what a volume was copied from.*Declare it with all its properties/s,
  );
});
