import { createHash } from "node:crypto";
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers, type Handlers } from "../../provider/core/handlers.js";
import { generationMark } from "../../provider/core/owner.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { resourceType } from "../../provider/core/registry.js";
import { suggestedStore } from "../../provider/resources/copySource.js";
import type { Host } from "../../provider/ssh/types.js";
import { CopyHost } from "../support/copyHost.js";
import { fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { imported, importer } from "../support/imported.js";
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
/** The valid snapshot of the recorded servers. */
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
/** The recorded volumes, of the size of what is copied here. */
const ofThisSize = (report: string) => report.replaceAll('"67108864"', `"${moment.length}"`);
const validVolumes = () => ofThisSize(recordedLvs("valid"));

let destination: CopyHost;
/** What the snapshot's host says of its volumes. */
let volumes: string | LvmNbdError;
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
  const source: Host = fakeHost((command) => {
    if (command.argv[0] === "date") return String(Number(recorded.lv_time) + 100);
    const answer = destination.sourceAnswer(command);
    if (answer !== undefined) return answer;
    if (command.argv[0] === "vgs")
      return { exitCode: 5, stderr: `Volume group "${recorded.vg_name}" not found` };
    return volumes;
  });
  return createHandlers(resourceType("VolumeCopy"), {
    openHost: async (host) =>
      typeof host === "object" && host.address === "192.0.2.1" ? source : destination,
    progress: (line) => lines.push(line),
    warn: (line) => warnings.push(line),
    signal: cancel.signal,
  });
}

const image = () => join(destination.disk, "vm1.raw");
const manifestPath = () => `${image()}.manifest.json`;
const manifest = () => JSON.parse(readFileSync(manifestPath(), "utf8"));
const complete = ["vm1.raw", "vm1.raw.manifest.json"];

async function checked(change: Values = {}, old?: Values): Promise<Values> {
  const wanted = {
    ...{ host: address("192.0.2.2"), owner: "o/p/s/vm1", uri: "nbd://10.0.0.1:10809/vm1", file: image() },
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

describe("bad input is refused before any host is asked", () => {
  const declared = {
    host: address("192.0.2.2"),
    owner: "o/p/s/vm1",
    uri: "nbd://10.0.0.1:10809/vm1",
    file: "/backup/vm1",
  };
  it.each([
    ["a relative file", { file: "backup/vm1" }, /^file: .*absolute path/],
    ["a file that climbs", { file: "/backup/../etc/passwd" }, /^file: .*"\.\."/],
    ["a folder", { file: "/backup/" }, /^file: .*empty parts/],
    ["a file with a line break", { file: "/backup/a\nb" }, /^file: .*control/],
    ["a device", { file: "/dev/nbd0" }, /^file: .*outlive a reboot/],
    ["a file of this run alone", { file: "/run/vm1.raw" }, /^file: .*outlive a reboot/],
    ["the name of an unfinished copy", { file: "/backup/vm1.part" }, /^file: .*\.part/],
    ["the name of a manifest", { file: "/backup/vm1.manifest.json" }, /^file: .*\.manifest\.json/],
    ["a name without room for its manifest's", { file: `/backup/${"ä".repeat(120)}` }, /^file: .*no room/],
    ["a uri that is none", { uri: "http://10.0.0.1/vm1" }, /^uri: /],
    ["an unknown format", { format: "vmdk" }, /^format: .*qcow2/],
    ["a compressed raw image", { compress: true }, /^compress: .*qcow2/],
    ["too many connections", { connections: 17 }, /^connections: /],
    ["a limit without a unit that cannot be meant", { bandwidthLimit: 20 }, /^bandwidthLimit: .*"20M"/],
    ["a limit that is none", { bandwidthLimit: "fast" }, /^bandwidthLimit: .*no rate/],
    [
      "a snapshot without its UUID",
      { snapshot: { ...snapshot, uuid: undefined } },
      /^snapshot\.uuid: is required/,
    ],
    ["a relative mount point", { mountPoint: "backup" }, /^mountPoint: .*absolute path/],
    ["a mount point that climbs", { mountPoint: "/backup/.." }, /^mountPoint: .*"\.\."/],
    ["a file beside the mount point", { mountPoint: "/back" }, /^file: .*not below `mountPoint` "\/back"/],
    ["an unknown property", { path: "/backup/vm1" }, /^path: is no property/],
  ])("%s", async (_what, change, message) => {
    const asked = untouchedHost();
    const { problems } = await handlersOn("VolumeCopy", asked).check(
      undefined,
      { ...declared, ...change },
      none,
    );
    expect(problems.map(({ property, reason }) => `${property}: ${reason}`)).toEqual([
      expect.stringMatching(message),
    ]);
  });

  it.each(["uri", "host"])("a missing %s", async (property) => {
    const wanted = { ...declared, [property]: undefined };
    const { problems } = await handlersOn("VolumeCopy", untouchedHost()).check(undefined, wanted, none);
    expect(problems).toContainEqual({ property, reason: "is required" });
  });
});

describe("a copy", () => {
  it("holds what the source served, and nothing else is left", async () => {
    const state = await made();
    expect(readFileSync(image(), "utf8")).toBe(moment);
    expect(destination.left()).toEqual(complete);
    expect(state).toMatchObject({
      ...{ sha256: sha256(moment), sizeBytes: moment.length, state: "complete", filesystem: "1111-2222" },
      manifest: manifestPath(),
    });
    expect(Date.parse(String(state.completedAt))).toBeGreaterThan(Date.now() - 60_000);
    expect(lines.join("\n")).toMatch(/copying nbd:\/\/10.*is complete: giving it its name/s);
  });

  it("says in its manifest what it is, without a secret", async () => {
    await made({ snapshot });
    expect(manifest()).toMatchObject({
      kind: "lvm-nbd image",
      mark: "lvm-nbd.owner=o/p/s/vm1",
      image: { format: "raw", sha256: sha256(moment), sizeBytes: moment.length, verified: true },
      source: {
        uri: "nbd://10.0.0.1:10809/vm1",
        snapshot: {
          host: "192.0.2.1",
          name: recorded.lv_name,
          uuid: recorded.lv_uuid,
          originUuid: recorded.origin_uuid,
        },
      },
      tools: expect.stringMatching(/nbdcopy 1\.14\.2,Linux/),
    });
    expect(readFileSync(manifestPath(), "utf8")).not.toMatch(/password/);
  });

  it("again changes nothing", async () => {
    const state = await made();
    const before = destination.commands.length;
    const { changes } = await handlers().diff(state, await checked({}, state), none);
    expect(changes).toEqual([]);
    await handlers().update(state, await checked({}, state));
    expect(destination.commands.slice(before).filter(({ kind }) => kind === "change")).toEqual([]);
    expect(destination.started).toBe(1);
  });

  it("anew keeps the earlier image until the new one is verified", async () => {
    const state = await made({ triggers: [1] });
    destination.serve(later);
    destination.set("hold", "");
    let during: string | undefined;
    destination.onCommand = () => {
      if (destination.started === 2 && existsSync(`${image()}.part/record.json`)) {
        during = readFileSync(image(), "utf8");
        destination.set("hold", undefined);
      }
      return undefined;
    };
    const wanted = await checked({ triggers: [2] }, state);
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([
      { property: "triggers", effect: "update" },
    ]);
    expect(await handlers().update(state, wanted)).toMatchObject({ sha256: sha256(later), triggers: [2] });
    expect(during).toBe(moment);
    expect(readFileSync(image(), "utf8")).toBe(later);
    expect(destination.left()).toEqual(complete);
  });

  it.each([
    ["connections", { connections: 2 }],
    ["bandwidthLimit", { bandwidthLimit: "20M" }],
    ["verify, which was done", { verify: false }],
    ["deepCheck", { deepCheck: true }],
    ["mountPoint", { mountPoint: "/" }],
  ])("with another %s is not made anew", async (what, change) => {
    const property = what.split(",")[0];
    const state = await made();
    const wanted = await checked(change, state);
    const before = destination.commands.length;
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([
      { property, effect: "connection" },
    ]);
    expect(await handlers().update(state, wanted)).toMatchObject(change);
    expect(destination.commands.length).toBe(before);
  });

  it("that was not verified is made anew, and is verified, where that is declared now", async () => {
    const state = await made({ verify: false });
    expect(manifest().image.verified).toBe(false);
    const wanted = await checked({ verify: true }, state);
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([
      { property: "verify", effect: "update" },
    ]);
    expect(await handlers().update(state, wanted)).toMatchObject({ state: "complete", verify: true });
    expect(manifest().image.verified).toBe(true);
    expect(destination.started).toBe(2);
  });

  it("from another uri or of another snapshot is another copy; the same snapshot reached otherwise is not", async () => {
    const state = await made({ snapshot });
    const moved = await checked({ snapshot, uri: "nbd://10.0.0.1:10810/vm1" }, state);
    expect((await handlers().diff(state, moved, none)).changes).toEqual([
      { property: "uri", effect: "update" },
    ]);
    const there = { ...snapshot, host: { ...address("192.0.2.1"), port: 2222 } };
    const reached = await checked({ snapshot: there }, state);
    expect((await handlers().diff(state, reached, none)).changes).toEqual([
      { property: "snapshot", effect: "connection" },
    ]);
    const other = await checked({ snapshot: { ...snapshot, uuid: "other" } }, state);
    expect((await handlers().diff(state, other, none)).changes).toEqual([
      { property: "snapshot", effect: "update" },
    ]);
    expect(
      (await handlers().diff(state, { ...moved, uri: undefined }, new Set(["uri", "snapshot"]))).changes,
    ).toEqual([
      { property: "uri", effect: "update" },
      { property: "snapshot", effect: "update" },
    ]);
  });

  it("to another file is made before the earlier one is removed", async () => {
    const state = await made();
    const wanted = await checked({ file: join(destination.disk, "other.raw") }, state);
    expect(await handlers().diff(state, wanted, none)).toEqual({
      changes: [{ property: "file", effect: "replace" }],
      deleteBeforeReplace: false,
    });
  });

  it("reaches the job with its arguments, whatever is in the file's name", async () => {
    const strange = join(destination.disk, 'a b\'$HOME %n "q".raw');
    const state = await made({ file: strange });
    expect(readFileSync(strange, "utf8")).toBe(moment);
    await handlers().remove(state);
    expect(destination.left()).toEqual([]);
  });
});

describe("a copy that cannot be made leaves nothing but its reason", () => {
  const fails = async (code: string, text: RegExp, change: Values = {}) => {
    const error = await handlers()
      .create(await checked(change))
      .catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(LvmNbdError);
    expect(error).toMatchObject({ code, message: expect.stringMatching(text) });
    expect(destination.left()).toEqual([]);
  };

  it("the export does not answer", async () => {
    destination.serve(undefined);
    await fails("EXPORT_UNREACHABLE", /does not answer here/);
  });

  it("there is no such folder", async () => {
    await fails("DIRECTORY_NOT_FOUND", /there is no folder .*nowhere/, {
      file: join(destination.disk, "nowhere/vm1"),
    });
  });

  it("nothing is mounted where the disk of the images should be", async () => {
    await fails("NOT_MOUNTED", new RegExp(`nothing is mounted at ${destination.disk}`), {
      mountPoint: destination.disk,
    });
  });

  it("the source breaks off", async () => {
    destination.set("broken", "nbd: connection reset\n");
    await fails("COPY_FAILED", /the copy broke off[\s\S]*connection reset/);
  });

  it("the disk is full", async () => {
    destination.set("broken", "write: No space left on device\n");
    await fails("NO_SPACE", /disk of the image is full/);
  });

  it("the source serves something else the second time", async () => {
    destination.set("reread", later);
    await fails("COPY_MISMATCH", new RegExp(sha256(later)));
  });

  it("its snapshot reads as something else on its own host", async () => {
    destination.set("reread", later);
    await fails("COPY_MISMATCH", new RegExp(sha256(later)), { snapshot });
  });

  it("the snapshot overflows while it is copied: said with a size that would do", async () => {
    destination.set("broken", "Input/output error\n");
    onceFollowed(() => {
      volumes = overflowed();
    });
    await fails("SNAPSHOT_OVERFLOWED", /larger `size`.*filled 8\.0 MiB in 100 s.*"\d+M"|100%ORIGIN/, {
      snapshot,
    });
  });

  it("the snapshot overflows after the last byte was read: the image is not certified", async () => {
    onceFollowed(() => {
      volumes = overflowed();
    });
    await fails("SNAPSHOT_OVERFLOWED", /ran full/, { snapshot });
  });

  it("the export serves something else than the snapshot", async () => {
    destination.serve(`${moment}and more`);
    await fails("COPY_MISMATCH", /uri: .*serves \d+ bytes, the snapshot .* has 21000/, { snapshot });
  });

  it("the export has become something else while it was copied", async () => {
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("systemd-run")) destination.serve(`${moment}and more`);
      return undefined;
    };
    await fails("COPY_MISMATCH", /serves \d+ bytes/, { snapshot });
  });

  it("the source cannot be read to its end the second time", async () => {
    destination.set("broken-reread", "");
    await fails("COPY_FAILED", /could not be read a second time/);
  });

  it("the reason is that of this job, not that of an earlier one", async () => {
    destination.set("broken", "write: No space left on device\n");
    await fails("NO_SPACE", /disk of the image is full/);
    destination.set("broken", "nbd: connection reset\n");
    await fails("COPY_FAILED", /connection reset/);
  });

  it("the snapshot is another one by now", async () => {
    await fails("COPY_UNCERTIFIED", /is not there any more/, { snapshot: { ...snapshot, uuid: "gone" } });
  });

  it("and an earlier copy of that name is untouched", async () => {
    const state = await made();
    destination.set("broken", "nbd: connection reset\n");
    const error = await handlers()
      .update(state, await checked({ triggers: [2] }, state))
      .catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(PartialFailure);
    expect((error as PartialFailure).state).toMatchObject({
      triggers: [],
      sha256: sha256(moment),
      state: "complete",
    });
    expect(readFileSync(image(), "utf8")).toBe(moment);
    expect(destination.left()).toEqual(complete);
  });
});

/** Does something when the job was first looked at: its source was read on its own host by then. */
function onceFollowed(act: () => void): void {
  destination.onCommand = ({ argv }) => {
    if (!argv[2]?.includes("CPUUsageNSec")) return undefined;
    destination.onCommand = () => undefined;
    return act;
  };
}

/** The recorded overflow, as that of the snapshot that is copied, with a store of 8 MiB. */
const overflowed = () =>
  ofThisSize(recordedLvs("overflowed"))
    .replaceAll(overflowedUuid, snapshot.uuid)
    .replaceAll('"16777216"', '"8388608"');
const overflowedUuid = JSON.parse(recordedLvs("overflowed")).report[0].lv.find(
  (row: Values) => row.lv_snapshot_invalid === "1",
).lv_uuid;

describe("what is not ours", () => {
  it("is not overwritten: a file without a manifest", async () => {
    writeFileSync(image(), "somebody's only copy");
    await expect(made()).rejects.toThrow(/FOREIGN_RESOURCE.*carries no owner mark/);
    expect(readFileSync(image(), "utf8")).toBe("somebody's only copy");
  });

  it("is taken over on purpose, once the copy is verified", async () => {
    writeFileSync(image(), "somebody's");
    expect(await made({ adopt: true })).toMatchObject({ sha256: sha256(moment) });
    expect(destination.left()).toEqual(complete);
  });

  it("is not overwritten: a manifest of somebody's without an image", async () => {
    writeFileSync(manifestPath(), "somebody's notes");
    await expect(made()).rejects.toThrow(/FOREIGN_RESOURCE.*is not the manifest of a copy of this resource/);
    expect(destination.left()).toEqual(["vm1.raw.manifest.json"]);
  });

  it("is refused with its owner named: another stack's copy, finished or not", async () => {
    await made({ owner: "o/p/other/vm1" });
    await expect(made()).rejects.toThrow(/FOREIGN_RESOURCE.*belongs to o\/p\/other\/vm1/);
    destination.set("hold", "");
    destination.onCommand = (_command, index) => {
      if (destination.started > 1 && index > 0) throw new Error("killed");
      return undefined;
    };
    const path = join(destination.disk, "second.raw");
    await expect(made({ owner: "o/p/other/vm2", file: path })).rejects.toThrow("killed");
    destination.onCommand = () => undefined;
    await expect(made({ file: path })).rejects.toThrow(/FOREIGN_RESOURCE.*belongs to o\/p\/other\/vm2/);
    expect(existsSync(`${path}.part/record.json`)).toBe(true);
  });

  it.each([
    ["a folder", () => mkdirSync(image())],
    [
      "a folder of somebody's where the unfinished copy would lie",
      () => {
        mkdirSync(`${image()}.part`);
        writeFileSync(`${image()}.part/data`, "x");
      },
    ],
    [
      "a link of somebody's there, to an empty folder",
      () => {
        mkdirSync(join(destination.disk, "elsewhere"));
        symlinkSync(join(destination.disk, "elsewhere"), `${image()}.part`);
      },
    ],
  ])("is left alone, whatever adopt says: %s", async (_what, put) => {
    put();
    const before = destination.left();
    await expect(made({ adopt: true })).rejects.toThrow(/FOREIGN_RESOURCE/);
    expect(destination.left()).toEqual(before);
  });

  it("is not removed: a copy that another resource has taken over", async () => {
    const state = await made();
    // The same machine under another name: Pulumi creates there first, and removes here after it.
    const moved = await made({ host: address("192.0.2.3") });
    expect(moved.copyId).not.toBe(state.copyId);
    expect(destination.started).toBe(1);
    await handlers().remove(state);
    expect(warnings.join()).toMatch(/another resource's by now/);
    expect(destination.left()).toEqual(complete);
    await handlers().remove(moved);
    expect(destination.left()).toEqual([]);
  });

  it("is not removed: a file that was put there by hand", async () => {
    const state = await made();
    rmSync(manifestPath());
    await handlers().remove(state);
    expect(existsSync(image())).toBe(true);
  });
});

describe("what is in use", () => {
  const holding = async (work: () => Promise<unknown>) => {
    const { open } = await import("node:fs/promises");
    const handle = await open(image());
    try {
      await work();
    } finally {
      await handle.close();
    }
  };

  it("is not removed, and its holder is named", async () => {
    const state = await made();
    await holding(() =>
      expect(handlers().remove(state)).rejects.toThrow(/FILE_IN_USE.*held by .*\(pid \d+\)/),
    );
    expect(destination.left()).toEqual(complete);
    await handlers().remove(state);
    expect(destination.left()).toEqual([]);
  });

  it("is also what an export serves, though nobody has it open before a client comes", async () => {
    const state = await made();
    const unit = "lvm-nbd-export-vm1.service";
    destination.exportImage("lvm-nbd-export-other.service", `${image()}.other`);
    destination.exportImage(unit, image());
    const renewed = await checked({ triggers: [2] }, state);
    for (const change of [() => handlers().remove(state), () => handlers().update(state, renewed)])
      await expect(change()).rejects.toThrow(/FILE_IN_USE.*held by export lvm-nbd-export-vm1\.service\n/s);
    expect(destination.left()).toEqual(complete);
    destination.reboot();
    await handlers().remove(state);
    expect(destination.left()).toEqual([]);
  });

  it("is not who only has the folder open", async () => {
    const state = await made();
    const { open } = await import("node:fs/promises");
    const handle = await open(destination.disk);
    await handlers().remove(state);
    await handle.close();
    expect(destination.left()).toEqual([]);
  });

  it("is not replaced", async () => {
    const state = await made();
    await holding(async () => {
      await expect(handlers().update(state, await checked({ triggers: [2] }, state))).rejects.toThrow(
        /FILE_IN_USE/,
      );
    });
    expect(readFileSync(image(), "utf8")).toBe(moment);
  });
});

describe("a refresh", () => {
  it("finds nothing where nothing changed, and reads no content", async () => {
    const state = await made({ deepCheck: false });
    expect(await handlers().read(state)).toEqual(state);
    expect(warnings).toEqual([]);
  });

  it("names a file that was changed, and up copies anew", async () => {
    const state = await made();
    appendFileSync(image(), "x");
    const seen = await handlers().read(state);
    expect(seen).toMatchObject({ state: "changed" });
    expect(warnings.join()).toMatch(/was changed.*`pulumi up` will copy anew/);
    expect((await handlers().diff(seen ?? {}, await checked({}, state), none)).changes).toEqual([
      { property: "state", effect: "update" },
    ]);
    expect(await handlers().update(seen ?? {}, await checked({}, state))).toMatchObject({
      state: "complete",
    });
    expect(readFileSync(image(), "utf8")).toBe(moment);
  });

  it("with deepCheck finds a byte that was flipped behind every time stamp", async () => {
    const state = await made({ deepCheck: true });
    expect(await handlers().read(state)).toEqual(state);
    const facts = JSON.parse(readFileSync(manifestPath(), "utf8")).image.facts.split(" ");
    writeFileSync(image(), moment.replace("moment", "mOment"));
    const touch = await destination.run({
      argv: ["touch", "-d", `@${facts[1]}`, image()],
      kind: "read",
      deadlineSeconds: 9,
    });
    expect(touch.exitCode).toBe(0);
    const seen = await handlers().read(state);
    expect(seen).toMatchObject({ state: "corrupt" });
    expect(warnings.join()).toMatch(/does not read back as it was copied/);
    // Neither its time nor its size tell: what the refresh saw has to.
    expect(await handlers().update(seen ?? {}, await checked({ deepCheck: true }, state))).toMatchObject({
      state: "complete",
    });
    expect(readFileSync(image(), "utf8")).toBe(moment);
  });

  it("knows a corrupt image as corrupt until it is copied anew, whatever fails meanwhile", async () => {
    const state = { ...(await made()), state: "corrupt" };
    destination.set("broken", "nbd: connection reset\n");
    const error = await handlers()
      .update(state, await checked({}, state))
      .catch((reason: unknown) => reason);
    expect((error as PartialFailure).state).toMatchObject({ state: "corrupt" });
    expect(await handlers().read(state)).toMatchObject({ state: "corrupt" });
    destination.set("broken", undefined);
    expect(await handlers().update(state, await checked({}, state))).toMatchObject({ state: "complete" });
    expect(destination.started).toBe(3);
  });

  it("says gone of what is positively absent", async () => {
    const state = await made();
    rmSync(image());
    expect(await handlers().read(state)).toBeUndefined();
    expect(await made()).toMatchObject({ state: "complete" });
    rmSync(image());
    rmSync(manifestPath());
    expect(await handlers().read(state)).toBeUndefined();
  });

  it("never takes the copies of a disk that is not mounted for gone", async () => {
    const state = await made();
    rmSync(image());
    rmSync(manifestPath());
    destination.set("filesystem", "the root file system's\n");
    await expect(handlers().read(state)).rejects.toThrow(/ANOTHER_FILE_SYSTEM.*not on 1111-2222/);
    await expect(handlers().remove(state)).rejects.toThrow(/ANOTHER_FILE_SYSTEM/);
    rmSync(destination.disk, { recursive: true });
    await expect(handlers().read(state)).rejects.toThrow(/ANOTHER_FILE_SYSTEM.*folder of .* is not there/);
    mkdirSync(destination.disk);
  });
});

/** The provider's process dies: nothing it would have done after this is done. */
class Died extends Error {}

function dies(host: CopyHost, at: number, when: "before" | "after"): void {
  let dead = false;
  const begin = host.commands.length;
  host.onCommand = (_command, index) => {
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
const timeout = 240_000;

describe("whatever cuts it, the next up finishes the work", () => {
  /** What is to be done, on what there is, and how the world looks when it is done. */
  const operations = {
    create: {
      prepared: async (): Promise<Values | undefined> => undefined,
      run: async (_state: Values | undefined) => made({ snapshot }),
      done: () => {
        expect(readFileSync(image(), "utf8")).toBe(moment);
        expect(destination.left()).toEqual(complete);
      },
    },
    "a copy anew": {
      prepared: async () => {
        const state = await made({ snapshot });
        destination.serve(later);
        return state;
      },
      run: async (state: Values | undefined) => {
        const wanted = await checked({ snapshot, triggers: [2] }, state);
        return handlers().update(state ?? {}, wanted);
      },
      done: () => {
        expect(readFileSync(image(), "utf8")).toBe(later);
        expect(manifest()).toMatchObject({ image: { sha256: sha256(later) } });
        expect(destination.left()).toEqual(complete);
      },
    },
    remove: {
      prepared: async () => made({ snapshot }),
      run: async (state: Values | undefined) => handlers().remove(state ?? {}),
      done: () => expect(destination.left()).toEqual([]),
    },
  };
  /** An earlier image is either whole or replaced by a whole one, at every moment. */
  const neverHalf = () => {
    if (existsSync(image())) expect([moment, later]).toContain(readFileSync(image(), "utf8"));
  };

  describe.each(Object.entries(operations))("%s", (_name, { prepared, run, done }) => {
    let state: Values | undefined;
    beforeEach(async () => {
      state = await prepared();
      destination.save();
    }, 60_000);

    it("the provider is killed at each command", { timeout }, async () => {
      for (let at = 0; ; at++) {
        let reached = false;
        for (const when of ["before", "after"] as const) {
          destination.restore();
          dies(destination, at, when);
          const end = await run(state).catch((error: unknown) => error);
          destination.onCommand = () => undefined;
          neverHalf();
          if (!(end instanceof Died)) continue;
          reached = true;
          await run(state);
          done();
        }
        if (!reached) {
          expect(at).toBeGreaterThan(2);
          return;
        }
      }
    });

    it("the link drops at each command: the same run goes on", { timeout }, async () => {
      for (let at = 0; ; at++) {
        destination.restore();
        let reached = false;
        destination.onCommand = ({ kind }, index) => {
          if (index !== at) return undefined;
          reached = true;
          // The SSH layer runs reads again by itself.
          if (kind === "read") return undefined;
          return () => {
            throw new LvmNbdError("LINK_LOST", { message: "lost" });
          };
        };
        await run(state);
        done();
        if (!reached) return;
      }
    });

    it("a script is killed at each of its steps", { timeout }, async () => {
      // After a step is before the next one, but for what the shell itself does in between.
      for (const when of ["before", "after"] as const) {
        for (let step = 1; ; step += when === "after" ? 3 : 1) {
          destination.restore();
          destination.kill({ step, when });
          // It goes on by itself after the lost link, and looks at what the script has left.
          await run(state);
          done();
          if (destination.stepsTaken < step) {
            expect(step).toBeGreaterThan(3);
            break;
          }
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
          if (index > 6) destination.set("hold", undefined);
          return undefined;
        };
        const end = await run(state).catch((error: unknown) => error);
        destination.onCommand = () => undefined;
        destination.set("hold", undefined);
        neverHalf();
        if (!(end instanceof Error)) {
          expect(at).toBeGreaterThan(1);
          return;
        }
        expect(end.message).toMatch(/^CANCELLED/);
        const left = destination.left().filter((file) => file.includes(".part") || file.startsWith("/run"));
        // Cancelled while it gets its name, a verified image waits for that.
        if (!left.includes("vm1.raw.part/result")) expect(left).toEqual([]);
        await run(end instanceof PartialFailure ? end.state : state);
        done();
      }
    });
  });

  it("a job that goes on is found, not started again", async () => {
    destination.set("hold", "");
    dies(destination, 3, "after");
    await expect(made()).rejects.toThrow(Died);
    destination.onCommand = (_command, index) => {
      if (index > 6) destination.set("hold", undefined);
      return undefined;
    };
    await made();
    expect(lines.join("\n")).toMatch(/is on its way: going on with it/);
    expect(destination.started).toBe(1);
    expect(destination.left()).toEqual(complete);
  });

  it("a job that ends while it is looked at is found, not started again", async () => {
    destination.set("hold", "");
    dies(destination, 4, "after");
    await expect(made({ snapshot })).rejects.toThrow(Died);
    destination.onCommand = () => undefined;
    destination.set("ends-meanwhile", "");
    await made({ snapshot });
    expect(destination.started).toBe(1);
    expect(destination.left()).toEqual(complete);
  });

  it("a job for another declaration is not taken for it", async () => {
    destination.set("hold", "");
    dies(destination, 3, "after");
    await expect(made({ triggers: [1] })).rejects.toThrow(Died);
    destination.onCommand = () => undefined;
    destination.set("hold", undefined);
    destination.serve(later);
    expect(await made({ triggers: [2] })).toMatchObject({ sha256: sha256(later) });
    expect(destination.started).toBe(2);
  });

  it("a finished job of a source without identity is not taken for what is served now", async () => {
    dies(destination, 5, "before");
    await expect(made()).rejects.toThrow(Died);
    destination.onCommand = () => undefined;
    destination.serve(later);
    expect(await made()).toMatchObject({ sha256: sha256(later) });
  });

  it("a job that was begun without verification is not taken for a verified copy", async () => {
    destination.set("hold", "");
    dies(destination, 3, "after");
    await expect(made({ snapshot, verify: false })).rejects.toThrow(Died);
    destination.onCommand = () => undefined;
    destination.set("hold", undefined);
    await made({ snapshot });
    expect(destination.started).toBe(2);
    expect(manifest().image.verified).toBe(true);
  });

  it("a job from another uri is not taken for this one, though the snapshot is the same", async () => {
    destination.set("hold", "");
    dies(destination, 4, "after");
    await expect(made({ snapshot, uri: "nbd://10.0.0.1:10809/wrong" })).rejects.toThrow(Died);
    destination.onCommand = () => undefined;
    destination.set("hold", undefined);
    await made({ snapshot });
    expect(destination.started).toBe(2);
    expect(manifest().source.uri).toBe("nbd://10.0.0.1:10809/vm1");
  });

  it("a job whose folder somebody removed is ended and begun anew", async () => {
    destination.set("hold", "");
    dies(destination, 3, "after");
    await expect(made()).rejects.toThrow(Died);
    rmSync(`${image()}.part`, { recursive: true });
    destination.onCommand = () => undefined;
    destination.set("hold", undefined);
    expect(await made()).toMatchObject({ state: "complete" });
    expect(destination.started).toBe(2);
    expect(destination.left()).toEqual(complete);
  });

  it.each(["the job", "the manifest"])("the link breaks while %s is sent", async (what) => {
    destination.onCommand = ({ stdin, argv }) => {
      const hit =
        stdin !== undefined && argv[2]?.includes(what === "the job" ? "systemd-run" : "seen_record=$3 image");
      if (!hit) return undefined;
      destination.onCommand = () => undefined;
      destination.cutInput();
      return () => {
        throw new LvmNbdError("LINK_LOST", { message: "lost" });
      };
    };
    expect(await made({ snapshot })).toMatchObject({ state: "complete" });
    expect(manifest()).toMatchObject({ image: { sha256: sha256(moment) } });
    expect(destination.started).toBe(1);
    expect(destination.left()).toEqual(complete);
  });

  it.each([
    ["a look at it that fails", () => undefined, "COMMAND_FAILED"],
    [
      "a snapshot that is not active",
      () => validVolumes().replaceAll('"sri-a-s---"', '"sri---s---"').replaceAll('"active"', '""'),
      "SNAPSHOT_INACTIVE",
    ],
    ["a volume group that is not there now", () => recordedLvs("empty"), "VOLUME_GROUP_NOT_FOUND"],
  ])("a verified image waits, whatever cannot be told: %s", async (_what, listing, code) => {
    onceFollowed(() => {
      volumes = listing() ?? new LvmNbdError("COMMAND_FAILED", { message: "lvs was killed" });
    });
    const wanted = await checked({ snapshot });
    await expect(handlers().create(wanted)).rejects.toThrow(code);
    expect(destination.left()).toContain("vm1.raw.part/result");
    volumes = validVolumes();
    await handlers().create(wanted);
    expect(destination.started).toBe(1);
    expect(destination.left()).toEqual(complete);
  });

  it("a verified image waits for a snapshot's host that does not answer", async () => {
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("systemd-run"))
        volumes = new LvmNbdError("HOST_UNREACHABLE", { message: "no route" });
      return undefined;
    };
    const wanted = await checked({ snapshot });
    await expect(handlers().create(wanted)).rejects.toThrow(/HOST_UNREACHABLE/);
    expect(destination.left()).toContain("vm1.raw.part/result");
    volumes = validVolumes();
    await handlers().create(wanted);
    expect(destination.started).toBe(1);
    expect(destination.left()).toEqual(complete);
  });

  it("the source is read a second time on its own host, not over the network; cut off there, it is read once more", async () => {
    destination.set("broken-reread", "");
    let cuts = 1;
    destination.onSource = () => {
      if (cuts-- > 0) throw new LvmNbdError("LINK_LOST", { message: "connection reset" });
    };
    expect(await made({ snapshot })).toMatchObject({ state: "complete", verified: true });
    expect(cuts).toBe(-1);
    expect(destination.started).toBe(1);
  });

  it("a host that does not answer for a while is waited for: its job goes on", async () => {
    let failures = 3;
    destination.onCommand = ({ argv }) => {
      if (argv[2]?.includes("CPUUsageNSec") && failures-- > 0)
        throw new LvmNbdError("HOST_UNREACHABLE", { message: "no route" });
      return undefined;
    };
    await made();
    expect(lines.join("\n")).toMatch(/has not answered for \d+ s; the copy goes on there/);
    expect(destination.started).toBe(1);
  });
});

describe("the suggested size of a store", () => {
  const seen = {
    store: 100,
    origin: 10_000,
    lived: 60,
    phase: "copy" as const,
    done: 0.5,
    since: 1000,
    now: 1030,
  };
  it("lasts for the rest of the copy and the reading back, twice over", () => {
    // 30 s for the first half: 30 s more, and 60 s to read back. 150 s at 100 bytes in 60 s.
    expect(suggestedStore(seen)).toBeCloseTo(2 * 100 * (150 / 60));
  });

  it("is never more than the origin, which cannot overflow", () => {
    expect(suggestedStore({ ...seen, done: 0 })).toBe(10_000);
  });

  it("is sound where clocks are not", () => {
    expect(suggestedStore({ ...seen, since: 5000 })).toBeGreaterThan(100);
  });
});

describe("read by its id alone", () => {
  const id = () => `192.0.2.2${image()}`;
  const found = () => imported(handlers(), id(), importer);

  it.each<[string, Values, Values]>([
    ["of a known snapshot", { snapshot }, { snapshot: { ...snapshot, host: "192.0.2.1" } }],
    ["of an export alone", {}, {}],
    ["unverified", { verify: false }, { verify: false }],
    ["made with what no manifest tells", { connections: 2, deepCheck: true }, {}],
  ])(
    "an image %s is declared as its manifest has it, so that nothing is to change",
    async (_what, change, told) => {
      const { connections: _c, deepCheck: _d, ...state } = await made(change);
      const started = destination.started;
      const { inputs, state: seen } = await found();
      expect(inputs).toEqual({
        ...{ host: "192.0.2.2", owner: "o/p/s/vm1", uri: "nbd://10.0.0.1:10809/vm1", file: image() },
        ...told,
      });
      expect(seen).toEqual({ ...state, ...inputs, connections: 4, deepCheck: false });
      expect(destination.started).toBe(started);
    },
  );

  it.each([false, true])("an image of qcow2, compressed: %j, is declared so", async (compress) => {
    await made();
    const generation = generationMark(["nbd://10.0.0.1:10809/vm1", "", "qcow2", compress, []]);
    const told = { ...manifest(), generation, image: { ...manifest().image, format: "qcow2" } };
    writeFileSync(manifestPath(), JSON.stringify(told));
    const { inputs } = await found();
    expect(inputs).toMatchObject({ format: "qcow2", ...(compress ? { compress } : {}) });
  });

  it("of what was copied for triggers, with certificates, or by another type of resource, is refused, with what to do", async () => {
    await made({ triggers: ["monday"] });
    const refusal = (what: string) =>
      new RegExp(`INVALID_INPUT.*${what}.*Declare it with all its properties`, "s");
    await expect(found()).rejects.toThrow(refusal("triggers: "));
    writeFileSync(manifestPath(), JSON.stringify({ ...manifest(), source: { uri: "nbds://10.0.0.1/vm1" } }));
    await expect(found()).rejects.toThrow(refusal("tls: "));
    writeFileSync(manifestPath(), JSON.stringify({ ...manifest(), source: {} }));
    await expect(found()).rejects.toThrow(refusal("no manifest that tells what it was copied from"));
  });

  it("what is declared then is found by its mark, and nothing is copied", async () => {
    const state = await made({ triggers: ["monday"] });
    const started = destination.started;
    expect(await made({ triggers: ["monday"] })).toMatchObject({ completedAt: state.completedAt });
    expect(destination.started).toBe(started);
  });

  it("of another's is refused, and of what has no manifest", async () => {
    await made();
    await expect(handlers().find(id(), { ...importer, stack: "other" })).rejects.toThrow(
      /FOREIGN_RESOURCE.*belongs to o\/p\/s\/vm1/s,
    );
    rmSync(manifestPath());
    await expect(found()).rejects.toThrow(/INVALID_INPUT.*has no manifest/s);
    rmSync(image());
    expect(await handlers().find(id(), importer)).toBeUndefined();
  });

  it("of an image that was changed is refused: it would be copied anew, over what may be the only one", async () => {
    await made();
    utimesSync(image(), 1e9, 1e9);
    await expect(handlers().find(id(), importer)).rejects.toThrow(
      /INVALID_INPUT.*size or time.*copied anew.*touch -d @[0-9.]+`/s,
    );
  });

  it("says that another resource which has it removes it; one that is declared instead has it alone", async () => {
    const first = await made();
    await handlers().find(id(), importer);
    expect(warnings).toEqual([
      expect.stringMatching(/another resource of this stack.*`pulumi state delete`.*Declared .* instead/s),
    ]);
    const second = await made();
    await handlers().remove(first);
    expect(await handlers().read(second)).toMatchObject({ state: "complete" });
  });

  it("of a path that no image has is refused", async () => {
    await expect(handlers().find("192.0.2.2/backup/../vm1", importer)).rejects.toThrow(
      /INVALID_INPUT.*file: /s,
    );
  });
});
