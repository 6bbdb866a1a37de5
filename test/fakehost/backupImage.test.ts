/**
 * BackupImage between two hosts: the source is a server of the fake world, with LVM, systemd and NBD; on the other one
 * the scripts run in a real shell, and what its NBD tools read is what the source serves at that moment.
 */
import {
  appendFileSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { isDeepStrictEqual } from "node:util";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers, type Finder, type Handlers } from "../../provider/core/handlers.js";
import { makingMark } from "../../provider/core/owner.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { resourceType } from "../../provider/core/registry.js";
import { restoreTagOf } from "../../provider/core/restoreMark.js";
import { commitCopyScript, followCopyScript, livingCopiesScript } from "../../provider/linux/copyScripts.js";
import { checkDeviceScript } from "../../provider/linux/deviceCopy.js";
import { parseNbdUri } from "../../provider/linux/nbd.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import type { Host } from "../../provider/ssh/types.js";
import { CopyHost } from "../support/copyHost.js";
import { imported, importer } from "../support/imported.js";
import { before, expectOthersUntouched, furnish, later, ours } from "./program.js";
import { readSources } from "./sourceReads.js";
import type { Values } from "./stack.js";
import { FakeWorld } from "./world.js";

vi.mock("node:timers/promises", async (original) =>
  (await import("../support/shortWaits.js")).shortWaits(await original()),
);

const MiB = 1024 ** 2;
const none: ReadonlySet<string> = new Set();
const backupHost = {
  address: "192.0.2.2",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const complete = ["vm.raw", "vm.raw.manifest.json"];
/** What the VM's other volume holds. */
const dataBefore = "records";
const completeBoth = ["data.raw", "data.raw.manifest.json", ...complete];

class Died extends Error {}

let world: FakeWorld;
let destination: CopyHost;
let pool: ReturnType<typeof createHostPool>;
let cancel: AbortController;
let warnings: string[];
let lines: string[];
/** Commands to either host, and what a test does to them. */
let sent: {
  readonly host: string;
  readonly kind: string;
  readonly text: string;
  readonly isLookAtJob: boolean;
}[];
let onCommand: (index: number) => undefined | (() => void);

beforeEach(anew);
afterEach(end);

async function anew(): Promise<void> {
  world = new FakeWorld();
  furnish(world);
  for (const server of [world.server1, world.server2]) readSources(server);
  world.server1.lvm.addVolume("VgVm", "small", 4 * MiB, before);
  world.server1.lvm.addVolume("VgVm", "data", 4 * MiB, dataBefore);
  await world.open();
  destination = new CopyHost();
  destination.kill(undefined);
  pool = createHostPool({ backoff: [1, 1, 1] });
  [sent, onCommand] = [[], () => undefined];
}

async function end(): Promise<void> {
  pool.close();
  destination.close();
  await world.close();
}

function watched(host: Host, prepare: (argv: readonly string[]) => unknown): Host {
  return {
    name: host.name,
    machineId: (signal) => host.machineId(signal),
    async run(command, signal) {
      const text = command.argv.join(" ");
      const isLookAtJob = command.argv.includes(followCopyScript);
      const after = onCommand(sent.push({ host: host.name, kind: command.kind, text, isLookAtJob }) - 1);
      await prepare(command.argv);
      const result = await host.run(command, signal);
      after?.();
      return result;
    },
  };
}

/** What the backup host's tools read, where a command names an export: what is served to it just then. */
async function serve(argv: readonly string[]): Promise<void> {
  // Sooner there than the provider would look again.
  if (argv.includes(followCopyScript)) await destination.jobsEnd();
  const uri = argv.find((word) => /^nbd:\/\/\S+$/.test(word));
  if (uri === undefined) return;
  const { server: address, port, exportName } = parseNbdUri(uri);
  const answer = world.network.connect(world.server2.address, { address, port, exportName });
  const content = "listener" in answer ? answer.listener.read() : undefined;
  const size = "listener" in answer ? (answer.listener.size() ?? 0) : 0;
  destination.serve(content?.padEnd(size, "\0"));
}

function handlers(): Handlers {
  [cancel, warnings, lines] = [new AbortController(), [], []];
  const backups = watched(destination, serve);
  const sources = new Map<string, Host>();
  return createHandlers(resourceType("BackupImage"), {
    openHost: async (host) => {
      if (typeof host === "object" && host.address === backupHost.address) return backups;
      if (isDeepStrictEqual(host, world.host(world.server2))) return pool.get(host);
      const key = JSON.stringify(host);
      const source = sources.get(key) ?? watched(await pool.get(host), () => undefined);
      sources.set(key, source);
      return source;
    },
    progress: (line) => lines.push(line),
    warn: (line) => warnings.push(line),
    signal: cancel.signal,
  });
}

const image = (name = "vm.raw") => join(destination.disk, name);
/** The text at the beginning of an image; all of it unless zeros follow. */
function content(name?: string): string {
  const bytes = readFileSync(image(name));
  const end = bytes.includes(0) ? bytes.indexOf(0) : bytes.length;
  const isText = bytes.subarray(end).equals(Buffer.alloc(bytes.length - end));
  return bytes.toString("utf8", 0, isText ? end : bytes.length);
}
const manifest = (name?: string) => JSON.parse(readFileSync(`${image(name)}.manifest.json`, "utf8"));

/** The declaration of one volume, or of those that `volumes` names; `file`, `origin` of the first. */
function declared({ source, file, origin, volumes, ...rest }: Values = {}): Values {
  const small = { volumeGroup: "VgVm", origin: origin ?? "small", size: "4M", file: file ?? image() };
  return {
    ...{ host: backupHost, owner: "organization/p/s/monday", volumes: volumes ?? [small] },
    source: {
      ...{ host: world.host(world.server1), listenAddress: world.server1.address },
      ...(source as object | undefined),
    },
    ...rest,
  };
}

/** Both volumes of the VM, as one moment. */
const both = () => ({
  volumes: [
    { volumeGroup: "VgVm", origin: "small", size: "4M", file: image() },
    { volumeGroup: "VgVm", origin: "data", size: "4M", file: image("data.raw") },
  ],
  source: { quiesce: { freeze: ": frozen", thaw: ": thawed" } },
});

async function checked(change: Values = {}, old?: Values): Promise<Values> {
  const wanted = declared(change);
  const { inputs, problems } = await handlers().check(old, wanted, none);
  expect(problems).toEqual([]);
  return inputs;
}

async function made(change: Values = {}): Promise<Values> {
  const wanted = await checked(change);
  return (await handlers().create(wanted)).state;
}

/** Somebody goes on writing on the volume. */
function write(data: string): void {
  const volume = world.server1.lvm.find("VgVm", "small");
  if (volume !== undefined) volume.data = data;
}

function expectSourceClean(): void {
  expect(ours(world.server1)).toEqual([]);
  expectOthersUntouched(world, before);
}

describe("bad input is refused before any host is asked", () => {
  const source = { host: "server1", listenAddress: "10.0.0.1" };
  const volume = { volumeGroup: "VgVm", origin: "vm1", size: "1G", file: "/b.raw" };
  const wanted = { host: backupHost, owner: "o/p/s/b", source, volumes: [volume] };
  const refused = async (change: Values) => {
    const { problems } = await handlers().check(undefined, { ...wanted, ...change }, none);
    expect(sent).toEqual([]);
    return problems.map(({ property, reason }) => `${property}: ${reason}`);
  };
  it.each([
    ["a source without its address", { listenAddress: undefined }, /^source\.listenAddress: is required/],
    ["a source on an interface", { listenAddress: "eth0" }, /^source\.listenAddress: .*IP address/],
    ["a port out of range", { port: 70_000 }, /^source\.port: .*65535/],
    ["a client that is no address", { clientAddress: "backup1" }, /^source\.clientAddress: /],
    ["a quiesce without thaw", { quiesce: { freeze: "true" } }, /^source\.quiesce\.thaw: is required/],
    ["a server that is none", { server: "nbdd" }, /^source\.server: .*nbdkit/],
    ["what is no property of a source", { origin: "vm1" }, /^source\.origin: is no property/],
  ])("%s", async (_what, change, message) => {
    expect(await refused({ source: { ...source, ...change } })).toEqual([expect.stringMatching(message)]);
  });

  it.each([
    ["a group that LVM refuses", [{ ...volume, volumeGroup: "a/b" }], /^volumes\.0\.volumeGroup: /],
    [
      "a group whose snapshot LVM could not name",
      [{ ...volume, volumeGroup: "g".repeat(90) }],
      /^volumes\.0\.volumeGroup: /,
    ],
    ["a size that cannot be meant", [{ ...volume, size: "1" }], /^volumes\.0\.size: /],
    ["a relative file", [{ ...volume, file: "b.raw" }], /^volumes\.0\.file: .*absolute path/],
    ["a volume without its image", [{ ...volume, file: undefined }], /^volumes\.0\.file: is required/],
    ["two images of one name", [volume, { ...volume, origin: "vm2" }], /^volumes: .*\/b\.raw/],
    ["a volume twice", [volume, { ...volume, file: "/c.raw" }], /^volumes: VgVm\/vm1 is there twice/],
    ["no volume", [], /^volumes: /],
  ])("%s", async (_what, volumes, message) => {
    expect(await refused({ volumes })).toEqual([expect.stringMatching(message)]);
  });

  it("a compressed raw image", async () => {
    expect(await refused({ compress: true })).toEqual([expect.stringMatching(/^compress: .*qcow2/)]);
  });
});

describe("a backup", () => {
  it("is the moment of the volume, and leaves nothing on the source", async () => {
    const state = await made({
      source: { quiesce: { freeze: ": frozen", thaw: ": thawed" } },
    });
    expect(content()).toBe(before);
    expect(destination.left()).toEqual(complete);
    expectSourceClean();
    expect(state).toMatchObject({ state: "complete", images: [{ state: "complete", sizeBytes: 4 * MiB }] });
    const { volumeGroup, origin, originUuid, takenAt } = manifest().source.snapshot;
    expect([volumeGroup, origin, originUuid]).toEqual([
      "VgVm",
      "small",
      world.server1.lvm.find("VgVm", "small")?.uuid,
    ]);
    expect(state.takenAt).toBe(takenAt);
    expect(manifest().image.verified).toBe(true);
    expect(await handlers().read(state)).toEqual(state);
  });

  it("looks at the source's volumes for what is left, at what it takes down, at the origin, and takes the moment", async () => {
    await made();
    const before = sent.slice(
      0,
      sent.findIndex(({ text }) => text.includes("lvcreate")),
    );
    expect(before.filter(({ text }) => text.startsWith("lvs "))).toHaveLength(3);
  });

  it("is exported to the backup host alone", async () => {
    let clients: readonly string[] | undefined;
    onCommand = () => {
      const [listener] = world.network.of(world.server1.address);
      if (listener !== undefined) clients = listener.allowed;
      return undefined;
    };
    await made();
    expect(clients).toContain(world.server2.address);
    expect(clients).not.toContain("any");
  });

  it.each([
    ["format", { format: "qcow2" }],
    ["verify", { verify: false }],
    ["bandwidthLimit", { bandwidthLimit: "20M" }],
    ["source", { source: { server: "qemu-nbd" } }],
  ])("once made is history: another %s is for those to come", async (property, change) => {
    const state = await made();
    write(later);
    const wanted = await checked(change, state);
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([
      { property, effect: "connection" },
    ]);
    sent = [];
    expect(await handlers().update(state, wanted)).toMatchObject({ images: state.images });
    expect(sent).toEqual([]);
    expect(content()).toBe(before);
  });

  it("is made anew by other triggers, in place", async () => {
    const state = await made();
    write(later);
    const wanted = await checked({ triggers: [2] }, state);
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([
      { property: "triggers", effect: "update" },
    ]);
    await handlers().update(state, wanted);
    expect(content()).toBe(later);
    expect(destination.left()).toEqual(complete);
    expectSourceClean();
  });

  it("in another file would be one of now: refused unless that is said", async () => {
    const state = await made();
    const moved = { file: image("moved.raw") };
    const { problems } = await handlers().check(state, declared(moved), none);
    expect(problems).toEqual([
      { property: "volumes", reason: expect.stringMatching(/give up the moment in .*vm\.raw.*`triggers`/) },
    ]);
    expect((await handlers().check(state, declared({ ...moved, triggers: [2] }), none)).problems).toEqual([]);
  });

  it("moved with other triggers is made anew there, and gone where it was", async () => {
    const state = await made();
    write(later);
    const wanted = await checked({ file: image("moved.raw"), triggers: [2] }, state);
    await handlers().update(state, wanted);
    expect(content("moved.raw")).toBe(later);
    expect(destination.left()).toEqual(complete.map((name) => name.replace("vm", "moved")));
    expectSourceClean();
  });

  it("on another machine would be one of now: refused unless that is said", async () => {
    const state = await made();
    const moved = { ...state, host: { ...backupHost, address: "192.0.2.77" } };
    await expect(handlers().diff(state, moved, none)).rejects.toThrow(/INVALID_INPUT.*give up the moment/s);
    expect((await handlers().diff(state, { ...moved, triggers: [2] }, none)).changes).toEqual([
      { property: "triggers", effect: "update" },
      { property: "host", effect: "replace" },
    ]);
  });

  it("that was not verified says so, whatever is declared later", async () => {
    const state = await made({ verify: false });
    const unverified = { images: [{ verified: false }] };
    expect(state).toMatchObject(unverified);
    const after = await handlers().update(state, await checked({ verify: true }, state));
    expect(after).toMatchObject(unverified);
  });

  it("tells nothing of the commands that froze the VM", async () => {
    await made({ source: { quiesce: { freeze: ": --password hunter2", thaw: ": thawed" } } });
    expect(Object.keys(manifest().source.snapshot).sort()).toEqual(
      ["host", "name", "origin", "originUuid", "takenAt", "uuid", "volumeGroup"].sort(),
    );
    expect(JSON.stringify(manifest())).not.toContain("hunter2");
  });

  it("is renamed without its source, which may be gone for good", async () => {
    const state = await made();
    const gone = { ...(state.source as object), host: { ...backupHost, address: "127.0.0.1", port: 1 } };
    const wanted = await checked({ owner: "organization/p/s/renamed", source: gone }, state);
    expect(await handlers().update(state, wanted)).toMatchObject({ state: "complete" });
    expect(manifest().mark).toContain("renamed");
    expect(warnings.join()).toMatch(/cannot be told/);
  });

  it("takes another port where its own is in use, and says so where one is declared", async () => {
    const taken = (port: number) =>
      world.network.of(world.server1.address).add({
        ...{ pid: 1, program: "other", address: world.server1.address, port, exportName: "x" },
        ...{ readOnly: true, allowed: undefined, frozen: false, size: () => 1, read: () => "x" },
      });
    await made();
    const first = Number(parseNbdUri(manifest().source.uri).port);
    taken(first);
    await made({ triggers: [2] });
    expect(parseNbdUri(manifest().source.uri).port).toBe(first + 1);
    await expect(made({ source: { port: first }, triggers: [3] })).rejects.toThrow(/PORT_IN_USE/);
    expect(ours(world.server1)).toEqual([]);
  });

  it("is refused by a source that does not enforce who may read it, unless something else does", async () => {
    world.server1.systemd.filters = false;
    await expect(made()).rejects.toThrow(/CLIENTS_NOT_ENFORCED/);
    expectSourceClean();
    const state = await made({ source: { clientsEnforcedElsewhere: true } });
    expect(state).toMatchObject({ state: "complete" });
    expect(warnings.join("\n")).toContain("kernel does not enforce `clients`");
    expectSourceClean();
  });

  it("runs beside another one of the same volume", async () => {
    const both = await checked({ file: image("other.raw"), owner: "organization/p/s/other" });
    const one = await checked();
    const { create } = handlers();
    await Promise.all([create(one), create(both)]);
    expect([content(), content("other.raw")]).toEqual([before, before]);
    expectSourceClean();
  });
});

describe("a VM of two volumes", () => {
  it("is frozen once, and both images are of that moment", async () => {
    const state = await made(both());
    expect([content(), content("data.raw")]).toEqual([before, dataBefore]);
    expect(destination.left()).toEqual(completeBoth);
    expectSourceClean();
    const taking = sent.filter(({ text }) => text.includes("lvcreate"));
    expect(taking).toHaveLength(1);
    expect(taking[0]?.text).toContain(": frozen");
    expect(state).toMatchObject({
      ...{ state: "complete", takenAt: manifest().source.snapshot.takenAt },
      images: [
        { file: image(), origin: "small", state: "complete" },
        { file: image("data.raw"), origin: "data", state: "complete" },
      ],
    });
    expect(await handlers().read(state)).toEqual(state);
    expect((await handlers().diff(state, await checked(both(), state), none)).changes).toEqual([]);
  });

  it("one copy of which fails is no backup: nothing is left of the other", async () => {
    // The second copy waits until it has been told to fail.
    onCommand = () => {
      if (destination.started === 1) destination.set("hold", undefined);
      if (destination.left().includes("vm.raw.part/result"))
        destination.set("broken", "nbd: connection reset\n");
      return undefined;
    };
    await expect(made(both())).rejects.toThrow(/COPY_FAILED/);
    expect(destination.left()).toEqual([]);
    expectSourceClean();
  });

  it.each(["TLS_UNSUPPORTED", "TLS_NOT_ENFORCED"] as const)(
    "one volume of which cannot be served as declared (%s) is no backup either",
    async (code) => {
      let isRefused = false;
      onCommand = (index) => {
        const isPreflight = sent[index]?.text.includes("emit listeners");
        if (isRefused || !isPreflight || !destination.left().includes("vm.raw.part/result")) return undefined;
        isRefused = true;
        throw new LvmNbdError(code, { message: "of the second volume" });
      };
      await expect(made(both())).rejects.toThrow(code);
      expect(destination.left()).toEqual([]);
      expectSourceClean();
    },
  );

  it("a volume of which does not exist is not frozen", async () => {
    const { volumes, source } = both();
    const wrong = volumes.map((volume, index) => (index === 1 ? { ...volume, origin: "dat" } : volume));
    await expect(made({ volumes: wrong, source })).rejects.toThrow(/ORIGIN_NOT_FOUND.*"dat"/s);
    expect(sent.some(({ text }) => text.includes("lvcreate"))).toBe(false);
    expectSourceClean();
  });

  it("an image of which is somebody's is refused, naming it, and nothing is frozen", async () => {
    writeFileSync(image("data.raw"), "somebody's only copy");
    await expect(made(both())).rejects.toThrow(/FOREIGN_RESOURCE.*data\.raw exists already/s);
    expect(sent.filter(({ kind }) => kind === "change")).toEqual([]);
    expect(destination.left()).toEqual(["data.raw"]);
  });

  it("one image of which is gone: that is told, and no other moment is put beside what is left", async () => {
    const state = await made(both());
    write(later);
    rmSync(image("data.raw"));
    const seen = await handlers().read(state);
    expect(seen).toMatchObject({
      state: "missing",
      images: [{ state: "complete" }, { state: "missing", filesystem: "1111-2222" }],
    });
    expect(warnings.join()).toMatch(/data\.raw is not there any more/);
    const wanted = await checked({ ...both(), owner: "organization/p/s/renamed" }, state);
    expect(await handlers().update(seen ?? {}, wanted)).toMatchObject({ state: "missing" });
    expect(content()).toBe(before);
    await handlers().remove({ ...seen, owner: "organization/p/s/renamed" });
    expect(destination.left()).toEqual([]);
  });

  it("one volume of which is no longer backed up: its image goes, the other stays as it is", async () => {
    const state = await made(both());
    write(later);
    const wanted = await checked({ source: both().source }, state);
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([
      { property: "volumes", effect: "update" },
    ]);
    expect(await handlers().update(state, wanted)).toMatchObject({
      state: "complete",
      takenAt: state.takenAt,
    });
    expect(content()).toBe(before);
    expect(destination.left()).toEqual(complete);
  });

  it("takes no volume into a moment that has passed", async () => {
    const state = await made();
    const { problems } = await handlers().check(state, declared(both()), none);
    expect(problems).toEqual([
      { property: "volumes", reason: expect.stringMatching(/VgVm\/data was not part of this moment/) },
    ]);
    expect((await handlers().check(state, declared({ ...both(), triggers: [2] }), none)).problems).toEqual(
      [],
    );
  });

  it("an image that became somebody else's is left alone when the backup is removed", async () => {
    const state = await made(both());
    writeFileSync(image("data.raw"), "somebody's");
    rmSync(`${image("data.raw")}.manifest.json`);
    await handlers().remove(state);
    expect(warnings.join()).toMatch(/data\.raw is not what was made here; it is left alone/);
    expect(destination.left()).toEqual(["data.raw"]);
  });
});

describe("a backup of a day that has passed (existing)", () => {
  const existing = { existing: true };

  it("is taken over as it is, also changed", async () => {
    await made();
    write(later);
    appendFileSync(image(), "x");
    expect(await made(existing)).toMatchObject({ state: "changed" });
    expectSourceClean();
  });

  it("is never made: what is not there is an error", async () => {
    await expect(made(existing)).rejects.toThrow(/INVALID_INPUT.*vm\.raw is not there/s);
    await made();
    const two = { ...both(), ...existing };
    await expect(made(two)).rejects.toThrow(/INVALID_INPUT.*data\.raw is not there/s);
    expect(destination.left()).toEqual(complete);
  });

  it("is what today's becomes tomorrow, without a command", async () => {
    const state = await made();
    const wanted = await checked(existing, state);
    sent = [];
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([
      { property: "existing", effect: "connection" },
    ]);
    await handlers().update(state, wanted);
    expect(sent).toEqual([]);
  });

  it("is not made anew by other triggers", async () => {
    const state = await made();
    const { problems } = await handlers().check(state, declared({ ...existing, triggers: [2] }), none);
    expect(problems).toEqual([{ property: "triggers", reason: expect.stringMatching(/forbids/) }]);
  });
});

describe("drift", () => {
  it("of the content is told and left alone: a backup of now would not be what it was", async () => {
    const state = await made();
    write(later);
    appendFileSync(image(), "x");
    const seen = await handlers().read(state);
    expect(seen).toMatchObject({ state: "changed" });
    expect(warnings.join()).toMatch(/left as it is.*change `triggers` to put one of now in its place/);
    expect((await handlers().diff(seen ?? {}, await checked({}, state), none)).changes).toEqual([]);
  });

  it("does not need the source", async () => {
    const state = await made();
    world.network.cut.add(world.server1.address);
    sent = [];
    expect(await handlers().read(state)).toEqual(state);
    expect(sent.map(({ host }) => host)).toEqual([destination.name]);
  });

  it("by an update that was cut and taken back is told: the next up takes down what it had begun", async () => {
    const state = await made();
    destination.set("hold", "");
    onCommand = () => {
      if (destination.started > 1) throw new Died("the provider died");
      return undefined;
    };
    const again = await checked({ triggers: [2] }, state);
    await expect(handlers().update(state, again)).rejects.toThrow(Died);
    onCommand = () => undefined;
    expect((await handlers().diff(state, await checked({}, state), none)).changes).toEqual([]);
    const seen = (await handlers().read(state)) ?? {};
    expect(warnings.join()).toMatch(/an unfinished copy to \S+vm\.raw was left/);
    const wanted = await checked({}, seen);
    const change = { property: "unfinished", effect: "update" };
    expect((await handlers().diff(seen, wanted, none)).changes).toEqual([change]);
    expect(await handlers().update(seen, wanted)).toEqual(state);
    expect(content()).toBe(before);
    expect(destination.left()).toEqual(complete);
    expectSourceClean();
  });

  it("of an image that is gone is gone", async () => {
    const state = await made();
    rmSync(image());
    expect(await handlers().read(state)).toBeUndefined();
  });
});

describe("a backup that fails leaves nothing but its reason", () => {
  const fails = async (code: string, change: Values = {}) => {
    const error = await made(change).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code });
    expectSourceClean();
    expect(destination.left()).toEqual([]);
  };

  it("no folder on the backup host: nothing is frozen for it", async () => {
    const error = await made({ file: join(destination.disk, "no/vm.raw") }).catch(
      (reason: unknown) => reason,
    );
    expect(error).toMatchObject({ code: "DIRECTORY_NOT_FOUND" });
    expect(sent.filter(({ kind }) => kind === "change")).toEqual([]);
  });

  it("the disk of the backups is not mounted: nothing is frozen for it", async () => {
    const error = await made({ mountPoint: destination.disk }).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code: "NOT_MOUNTED" });
    expect(sent.filter(({ kind }) => kind === "change")).toEqual([]);
  });

  it("somebody's restore from an image has left the volume half-written", async () => {
    const restore = restoreTagOf({
      ...{ generation: "0123456789ab", life: "0123abcd", stage: "writing", startedAt: 1000, seconds: 0 },
      ...{ thinId: 0, source: "a".repeat(64), owner: "o/p/other/r" },
    });
    const data = world.server1.lvm.find("VgVm", "data");
    data?.tags.push(restore);
    const error = await made(both()).catch((reason: unknown) => reason);
    expect(String(error)).toMatch(/ORIGIN_UNSUITABLE.*VgVm\/data is HALF-WRITTEN by o\/p\/other\/r/s);
    expect(sent.filter(({ kind, host }) => kind === "change" && host !== destination.name)).toEqual([]);
    expect(destination.left()).toEqual([]);
  });

  it.each([
    ["a port that another program has", "PORT_IN_USE", { port: 20_009 }],
    ["an address that is none of the source's", "ADDRESS_NOT_LOCAL", { listenAddress: "192.0.2.99" }],
  ])("%s: nothing is frozen for it", async (_what, code, source) => {
    world.network.of(world.server1.address).add({
      ...{ pid: 1, program: "other", address: world.server1.address, port: 20_009, exportName: "x" },
      ...{ readOnly: true, allowed: undefined, frozen: false, size: () => 1, read: () => "x" },
    });
    await fails(code, { source });
    expect(sent.filter(({ text }) => text.includes("lvcreate"))).toEqual([]);
  });

  it("no such volume", () => fails("ORIGIN_NOT_FOUND", { origin: "smal" }));

  it("freeze fails", () =>
    fails("QUIESCE_FAILED", { source: { quiesce: { freeze: "false", thaw: ": thawed" } } }));

  it("the disk of the backups is full", () => {
    destination.set("broken", "write: No space left on device\n");
    return fails("NO_SPACE");
  });

  it("the source cannot be read the second time", () => {
    world.server1.scripts.set(checkDeviceScript, (process) => {
      // Its first sector can be.
      if (process.argv.at(-1) !== "512") return 70;
      process.out(`${"0".repeat(64)}\n`);
      return 0;
    });
    return fails("COPY_FAILED");
  });

  it("the snapshot overflows on the way", () => {
    onCommand = () => {
      const volume = world.server1.lvm.all().find(({ volume }) => volume.name.startsWith("backup-"))?.volume;
      if (volume !== undefined && destination.started > 0) volume.usedPercent = 100;
      return undefined;
    };
    return fails("SNAPSHOT_OVERFLOWED");
  });

  it("and an earlier image of that name is kept", async () => {
    const state = await made();
    destination.set("broken", "nbd: connection reset\n");
    const error = await handlers()
      .update(state, await checked({ triggers: [2] }, state))
      .catch((reason: unknown) => reason);
    expect((error as PartialFailure).state).toMatchObject({ images: state.images, triggers: [] });
    expect(content()).toBe(before);
    expect(destination.left()).toEqual(complete);
    expectSourceClean();
  });

  it("a file of somebody's is not overwritten, and no VM is frozen", async () => {
    writeFileSync(image(), "somebody's only copy");
    await expect(made()).rejects.toThrow(/FOREIGN_RESOURCE/);
    expect(sent.filter(({ kind }) => kind === "change")).toEqual([]);
  });
});

describe("what cannot be taken down once the images are complete", () => {
  const merging = (what: "waits" | "no") => {
    for (const { volume } of world.server1.lvm.all())
      if (volume.name.startsWith("backup-")) volume.merging = what;
  };
  /** The state after it. */
  const left = async () => {
    onCommand = () => {
      if (destination.left().includes("vm.raw")) merging("waits");
      return undefined;
    };
    const state = await made();
    onCommand = () => undefined;
    return state;
  };

  it("is told, and the next up takes it down", async () => {
    const state = await left();
    expect(warnings.join()).toMatch(
      /VgVm\/backup-\S+ is left, the next `pulumi up` takes it down: SNAPSHOT_MERGING/,
    );
    const path = expect.stringMatching(/^VgVm\/backup-/);
    expect(state).toMatchObject({ state: "complete", leftOnSource: [path] });
    expect(await handlers().read(state)).toEqual(state);
    const change = { property: "leftOnSource", effect: "update" };
    const wanted = await checked({}, state);
    expect((await handlers().diff(state, wanted, none)).changes).toEqual([change]);
    expect(await handlers().update(state, wanted)).toMatchObject({ leftOnSource: [path] });
    merging("no");
    const after = await handlers().update(state, wanted);
    expect(after).toMatchObject({ state: "complete", leftOnSource: [] });
    expect((await handlers().diff(after, wanted, none)).changes).toEqual([]);
    expectSourceClean();
  });

  it("is taken down also on the next day, when the backup is only kept", async () => {
    const state = await left();
    merging("no");
    expect(await handlers().update(state, await checked({ existing: true }, state))).toMatchObject({
      leftOnSource: [],
    });
    expectSourceClean();
  });

  it("is remembered also where what other backups have left cannot be told", async () => {
    const data = { volumeGroup: "VgVm", origin: "data", size: "4M", file: image("data.raw") };
    onCommand = () => {
      if (destination.left().includes("data.raw")) merging("waits");
      return undefined;
    };
    await made({ volumes: [data], owner: "organization/p/s/data" });
    const state = await left();
    onCommand = () => {
      if (sent.at(-1)?.text.includes(livingCopiesScript))
        throw new LvmNbdError("COMMAND_FAILED", { message: "exit code 1" });
      return undefined;
    };
    // A run that was killed has told nothing of it.
    const after = await handlers().update({ ...state, leftOnSource: [] }, await checked({}, state));
    expect(after.leftOnSource).toEqual(state.leftOnSource);
    expect(warnings.join()).toMatch(
      /whether other backups left snapshots on \S+ cannot be told: COMMAND_FAILED/,
    );
  });

  it("is remembered also while the source does not answer", async () => {
    const unreachable = () => {
      if (sent.at(-1)?.host !== destination.name && destination.left().includes("vm.raw"))
        throw new LvmNbdError("HOST_UNREACHABLE", { message: "no route" });
      return undefined;
    };
    onCommand = unreachable;
    const state = await made();
    expect(state.leftOnSource).toHaveLength(1);
    const wanted = await checked({}, state);
    expect((await handlers().update(state, wanted)).leftOnSource).toEqual(state.leftOnSource);
    onCommand = () => undefined;
    expect((await handlers().update(state, wanted)).leftOnSource).toEqual([]);
    expectSourceClean();
  });

  /** The disk of the VM's group is not there, until the group is put back. */
  const groupGone = () => {
    const group = world.server1.lvm.groups.get("VgVm");
    if (group === undefined) throw new Error("no group");
    world.server1.lvm.groups.delete("VgVm");
    return () => world.server1.lvm.groups.set("VgVm", group);
  };

  it("is remembered while its volume group is not there, until that comes back", async () => {
    const state = await left();
    const wanted = await checked({}, state);
    const comesBack = groupGone();
    const kept = await handlers().update(state, wanted);
    expect(kept.leftOnSource).toEqual(state.leftOnSource);
    expect(warnings.join()).toMatch(
      /is gone cannot be told: its volume group is not on .*`forgetLeft: true`/,
    );
    comesBack();
    merging("no");
    expect((await handlers().update(kept, wanted)).leftOnSource).toEqual([]);
    expectSourceClean();
  });

  it("is forgotten once that is asked for, and then there is nothing to do", async () => {
    const state = await left();
    groupGone();
    const wanted = await checked({ source: { forgetLeft: true } }, state);
    const after = await handlers().update(state, wanted);
    expect(after).toMatchObject({ state: "complete", leftOnSource: [] });
    expect((await handlers().diff(after, wanted, none)).changes).toEqual([]);
  });

  it("is not what nobody has ever seen: a group that is gone adds nothing", async () => {
    const state = await made();
    groupGone();
    const wanted = await checked({ owner: "organization/p/s/another" }, state);
    expect((await handlers().update(state, wanted)).leftOnSource).toEqual([]);
  });

  it("is known by its own name, whatever the backup is called or in what order its volumes are by now", async () => {
    onCommand = () => {
      if (destination.left().includes("vm.raw")) merging("waits");
      return undefined;
    };
    const state = await made(both());
    onCommand = () => undefined;
    expect(state.leftOnSource).toHaveLength(2);
    const volumes = both().volumes.reverse();
    const wanted = await checked({ ...both(), volumes, owner: "organization/p/s/tuesday" }, state);
    const kept = await handlers().update(state, wanted);
    expect([...(kept.leftOnSource as string[])].sort()).toEqual([...(state.leftOnSource as string[])].sort());
    merging("no");
    expect((await handlers().update(kept, wanted)).leftOnSource).toEqual([]);
    expectSourceClean();
  });

  it("is remembered with its host where another one is the source by now", async () => {
    const state = await left();
    const elsewhere = { ...(world.host(world.server2) as object) };
    world.server2.lvm.addVolume("VgVm", "small", 4 * MiB, before);
    const wanted = await checked(
      { source: { host: elsewhere, listenAddress: world.server2.address } },
      state,
    );
    const kept = await handlers().update(state, wanted);
    expect(kept.leftOnSource).toEqual([expect.stringMatching(/^VgVm\/backup-\S+ on /)]);
    expect((await handlers().update(kept, wanted)).leftOnSource).toEqual(kept.leftOnSource);
    merging("no");
    const back = await checked({}, kept);
    expect((await handlers().update(kept, back)).leftOnSource).toEqual([]);
    expectSourceClean();
  });

  it("is also what a killed run left on a source that is another host by now, of which nothing is known", async () => {
    const state = await made();
    onCommand = () => {
      if (ours(world.server1).length > 1) throw new Died("the provider died");
      return undefined;
    };
    const again = await checked({ triggers: [2] }, state);
    await expect(handlers().update(state, again)).rejects.toThrow(Died);
    onCommand = () => undefined;
    world.server2.lvm.addVolume("VgVm", "small", 4 * MiB, before);
    const source = { host: world.host(world.server2), listenAddress: world.server2.address };
    const moved = await checked({ triggers: [2], source }, state);
    expect(await handlers().update(state, moved)).toMatchObject({ state: "complete", leftOnSource: [] });
    expectSourceClean();
    expect(ours(world.server2)).toEqual([]);
  });

  it("is remembered also by an update that finds no image any more, which says that it is a backup of now", async () => {
    const kept = { ...(await made()), leftOnSource: ["VgVm/backup-x on another"] };
    for (const name of complete) rmSync(image(name));
    const after = await handlers().update(kept, await checked({}, kept));
    expect(after.leftOnSource).toEqual(kept.leftOnSource);
    expect(warnings.join()).toMatch(/no image of 20\S+ is there any more: a backup of now is made/);
  });

  it("on an earlier source is told of by a removal, after which nobody knows it", async () => {
    const state = await made();
    await handlers().remove({ ...state, leftOnSource: ["VgVm/backup-x on another"] });
    expect(warnings.join()).toMatch(/VgVm\/backup-x on another: left by a backup/);
  });

  it("does not keep a state of an earlier version, which knows nothing of it, from being read", async () => {
    const { leftOnSource: _, ...state } = await made();
    expect((await handlers().diff(state, await checked({}, state), none)).changes).toEqual([]);
    expect(await handlers().read(state)).toMatchObject({ state: "complete", leftOnSource: [] });
  });

  it("is taken down by a removal that the link interrupted", async () => {
    const state = await left();
    merging("no");
    let lost = false;
    onCommand = (index) => {
      if (lost || sent[index]?.host === destination.name || sent[index]?.kind !== "change") return undefined;
      lost = true;
      throw new LvmNbdError("LINK_LOST", { message: "lost" });
    };
    await handlers().remove(state);
    expect(lost).toBe(true);
    expect(destination.left()).toEqual([]);
    expectSourceClean();
  });
});

describe("removing a backup", () => {
  it("takes image and manifest", async () => {
    const state = await made();
    await handlers().remove(state);
    expect(destination.left()).toEqual([]);
    expectSourceClean();
  });

  it("does not need a source that is gone for good", async () => {
    const { source, ...state } = await made();
    const gone = { ...(source as object), host: { ...backupHost, address: "127.0.0.1", port: 1 } };
    await handlers().remove({ ...state, source: gone });
    expect(warnings.join()).toMatch(/cannot be told/);
    expect(destination.left()).toEqual([]);
  });
});

/**
 * True of a change, and of the look that waits for a job's end. What the hosts are between two of these is the same at
 * whatever command a killed provider stops: the others only look.
 */
const isTurn = ({ kind, isLookAtJob }: (typeof sent)[number]) => kind === "change" || isLookAtJob;

/** The provider is dead once so many turns have ended. */
function diesAfter(turns: number): void {
  let ended = 0;
  sent = [];
  const live = () => {
    if (ended >= turns) throw new Died("the provider died");
  };
  onCommand = (index) => {
    const command = sent[index];
    live();
    return () => {
      if (command !== undefined && isTurn(command)) ended += 1;
      live();
    };
  };
}

/** The provider is killed as soon as the copy has begun, which waits to be let go on (`hold`). */
async function killedWhileCopying(): Promise<void> {
  destination.set("hold", "");
  onCommand = () => {
    if (destination.started > 0) throw new Died("the provider died");
    return undefined;
  };
  await expect(made()).rejects.toThrow(Died);
}

/** Each cut runs shell scripts. */
const timeout = 600_000;

describe("whatever cuts it, the next run finishes the work", () => {
  const done = () => {
    expect(content()).toBe(before);
    expect(destination.left()).toEqual(complete);
    expectSourceClean();
  };
  const bothDone = () => {
    expect([content(), content("data.raw")]).toEqual([before, dataBefore]);
    expect(destination.left()).toEqual(completeBoth);
    expectSourceClean();
    const [one, other] = [manifest(), manifest("data.raw")];
    expect(one.together).toEqual([image(), image("data.raw")]);
    expect(other.together).toEqual(one.together);
    expect(other.copyId).toBe(one.copyId);
  };

  it("a command that only looks changes nothing", async () => {
    /** Everything that a backup can leave, and what is nobody's. */
    const seen = (beside: boolean) => [
      ...world.servers.map((server) => [
        server.lvm.all().map(({ group, volume }) => ({ group, ...volume })),
        server.files.snapshot("/etc"),
        ours(server),
      ]),
      beside ? [] : destination.left(),
    ];
    let looks = 0;
    onCommand = (index) => {
      const looked = sent[index];
      if (looked === undefined || isTurn(looked)) return undefined;
      // The source is looked at on its own host while the job goes on.
      const beside = looked.host !== destination.name;
      const before = structuredClone(seen(beside));
      return () => {
        expect(seen(beside), looked.text).toEqual(before);
        looks += 1;
      };
    };
    await made(both());
    expect(looks).toBeGreaterThan(30);
  });

  it("the provider is killed between any two commands that change something", { timeout }, async () => {
    for (let turns = 0; ; turns++) {
      await end();
      await anew();
      diesAfter(turns);
      const result = await made(both()).catch((error: unknown) => error);
      onCommand = () => undefined;
      if (!(result instanceof Error)) {
        expect(turns).toBeGreaterThan(10);
        return;
      }
      await world.settle();
      await made(both());
      bothDone();
    }
  });

  it("the link drops after each change: the same run goes on", { timeout }, async () => {
    for (let at = 0; ; at++) {
      await end();
      await anew();
      let changes = 0;
      // Looks are run again by the SSH layer.
      onCommand = (index) => {
        if (sent[index]?.kind !== "change" || changes++ !== at) return undefined;
        return () => {
          throw new LvmNbdError("LINK_LOST", { message: "lost" });
        };
      };
      await made(both());
      bothDone();
      if (changes <= at) {
        expect(at).toBeGreaterThan(10);
        return;
      }
    }
  });

  it("a cancel at each command leaves nothing", { timeout }, async () => {
    for (let at = 0; ; at++) {
      sent = [];
      onCommand = (index) => {
        if (index === at) cancel.abort();
        return undefined;
      };
      const result = await made(both()).catch((error: unknown) => error);
      onCommand = () => undefined;
      if (!(result instanceof Error)) {
        expect(at).toBeGreaterThan(40);
        bothDone();
        return;
      }
      expect(result.message).toMatch(/^CANCELLED/);
      await world.settle();
      const left = destination.left();
      // Cancelled while they get their names, verified images wait for that: each has its name, or all that it needs.
      const isCommitting =
        left.some((name) => name.endsWith(".part/result")) &&
        ["vm.raw", "data.raw"].every((name) => left.includes(name) || left.includes(`${name}.part/result`));
      if (!isCommitting) {
        expect(left).toEqual(result instanceof PartialFailure ? completeBoth : []);
        expectSourceClean();
      }
      // Where nothing is left, the next one goes a command further in the same world.
      if (left.length === 0) continue;
      await made(both());
      bothDone();
      await end();
      await anew();
    }
  });

  it("a copy that was on its way is gone on with: its moment is the one that was frozen", async () => {
    await killedWhileCopying();
    onCommand = () => {
      destination.set("hold", undefined);
      return undefined;
    };
    write(later);
    await made();
    expect(content()).toBe(before);
    expect(destination.started).toBe(1);
    expect(ours(world.server1)).toEqual([]);
  });

  /** Another program has the port, until it gives it back. */
  const portTaken = (port: number) => {
    const listeners = world.network.of(world.server1.address);
    const other = {
      ...{ pid: 1, program: "other", address: world.server1.address, port, exportName: "x" },
      ...{ readOnly: true, allowed: undefined, frozen: false, size: () => 1, read: () => "x" },
    };
    listeners.add(other);
    return () => listeners.delete(other);
  };
  const onPort = (port: number) => ({ ...both(), source: { ...both().source, port } });
  const diesWhenThere = async (file: string, work: () => Promise<unknown>) => {
    onCommand = () => {
      if (destination.left().includes(file)) throw new Died("the provider died");
      return undefined;
    };
    await expect(work()).rejects.toThrow(Died);
    onCommand = () => undefined;
  };

  it("copies that are complete get their names, though nothing can be served any more", async () => {
    await diesWhenThere("data.raw.part/result", () => made(onPort(20_001)));
    portTaken(20_002);
    write(later);
    await made(onPort(20_002));
    expect(destination.started).toBe(2);
    bothDone();
  });

  it("a complete copy is kept while another one of its moment cannot be served", async () => {
    await diesWhenThere("vm.raw.part/result", () => made(onPort(20_001)));
    const givenBack = portTaken(20_002);
    write(later);
    await expect(made(onPort(20_002))).rejects.toThrow(/PORT_IN_USE/);
    expect(destination.left()).toContain("vm.raw.part/result");
    givenBack();
    await made(onPort(20_002));
    expect(destination.started).toBe(2);
    bothDone();
  });

  it("a copy that runs is not cut off by what its export is to be next", async () => {
    await killedWhileCopying();
    onCommand = () => {
      destination.set("hold", undefined);
      return undefined;
    };
    await made({ source: { port: 20_003, server: "qemu-nbd" } });
    expect(lines.join()).not.toMatch(/(re)?starting the export/);
    expect(parseNbdUri(manifest().source.uri).port).not.toBe(20_003);
    done();
  });

  it("a moment that is not known to be of a frozen VM is taken anew", async () => {
    await diesWhenThere("vm.raw.part/result", () => made(both()));
    for (const { volume } of world.server1.lvm.all())
      if (volume.name.startsWith("backup-")) volume.tags.push(makingMark);
    write(later);
    await made(both());
    expect([content(), content("data.raw")]).toEqual([later, dataBefore]);
    expectSourceClean();
  });

  it("a moment is gone on with whatever the order of its volumes by then", async () => {
    await diesWhenThere("vm.raw.part/result", () => made(both()));
    write(later);
    await made({ ...both(), volumes: both().volumes.reverse() });
    expect(destination.started).toBe(2);
    expect([content(), content("data.raw")]).toEqual([before, dataBefore]);
    expectSourceClean();
  });

  it.each([
    ["the first", 1],
    ["the last", 0],
  ])("nothing of a moment is left where %s of its volumes is dropped then", async (_which, kept) => {
    for (const isTakenBack of [true, false]) {
      const state = await made(both());
      destination.set("hold", "");
      const started = destination.started;
      onCommand = () => {
        if (destination.started > started) throw new Died("the provider died");
        return undefined;
      };
      const anew = await checked({ ...both(), triggers: [2] }, state);
      await expect(handlers().update(state, anew)).rejects.toThrow(Died);
      onCommand = () => undefined;
      destination.set("hold", undefined);
      const volumes = both().volumes.filter((_, index) => index === kept);
      const wanted = await checked({ ...both(), volumes, triggers: isTakenBack ? [] : [2] }, state);
      const after = await handlers().update(state, wanted);
      expect(after).toMatchObject({ state: "complete", leftOnSource: [] });
      expect(destination.left()).toEqual(kept === 0 ? complete : completeBoth.slice(0, 2));
      expectSourceClean();
      await handlers().remove(after);
    }
  });

  it("a moment that was kept for no copy is too old: one of now is taken", async () => {
    onCommand = () => {
      if (ours(world.server1).length > 1) throw new Died("the provider died");
      return undefined;
    };
    await expect(made()).rejects.toThrow(Died);
    onCommand = () => undefined;
    write(later);
    await made();
    expect(content()).toBe(later);
    expect(ours(world.server1)).toEqual([]);
  });

  const tuesday = () => made({ file: image("tuesday.raw"), owner: "organization/p/s/tuesday" });

  it("what a killed run has left is taken down by the next backup of the volume, of whatever day", async () => {
    onCommand = () => {
      if (ours(world.server1).length > 1) throw new Died("the provider died");
      return undefined;
    };
    await expect(made()).rejects.toThrow(Died);
    onCommand = () => undefined;
    await tuesday();
    expectSourceClean();
    expect(existsSync(image("tuesday.raw"))).toBe(true);
  });

  it.each([
    ["for which a copy runs", true, 99],
    ["whose copy waits for the next run", false, 1],
    ["whose copy took long and waits since now", false, 99],
  ])("a moment of another day stays, %s", async (_what, runs, hours) => {
    await killedWhileCopying();
    world.clock.now += hours * 3600_000;
    if (!runs) {
      destination.set("hold", undefined);
      await expect.poll(() => destination.left()).toContain("vm.raw.part/result");
    }
    onCommand = () => {
      if (destination.started > 1) destination.set("hold", undefined);
      return undefined;
    };
    write(later);
    await tuesday();
    expect(content("tuesday.raw")).toBe(later);
    expect(ours(world.server1)).not.toEqual([]);
    // What a stand-in reads when it is let go is what was served last, to whomever.
    if (runs)
      world.server1.scripts.set(checkDeviceScript, (process) => {
        process.out(destination.servedSum());
        return 0;
      });
    await made();
    if (!runs) expect(content()).toBe(before);
    expect(destination.started).toBe(2);
    expect(ours(world.server1)).toEqual([]);
  });

  it("a moment whose copy has waited for longer than half a day is given up by the next backup", async () => {
    await killedWhileCopying();
    destination.set("hold", undefined);
    onCommand = () => undefined;
    await expect.poll(() => destination.left()).toContain("vm.raw.part/result");
    destination.waited(13);
    await tuesday();
    expect(warnings.join()).toMatch(/\/vm\.raw\.part is left of an earlier backup that was given up/);
    expectSourceClean();
  });

  describe("of another volume of the stack, which may never be backed up again,", () => {
    const other = { origin: "data", owner: "organization/p/s/data" };
    /** The provider dies when the other volume is exported, so many hours ago by the source's clock. */
    const leave = async (hours: number, change: Values = {}) => {
      onCommand = () => {
        if (exports().length > 0) throw new Died("the provider died");
        return undefined;
      };
      await expect(made({ ...other, file: image("data.raw"), ...change })).rejects.toThrow(Died);
      onCommand = () => undefined;
      world.clock.now += hours * 3600_000;
      expect(ours(world.server1)).not.toEqual([]);
    };
    const exports = () => [...world.network.of(world.server1.address)];

    it("what a killed run has left is taken down after half a day", async () => {
      await leave(13);
      await made();
      expect(lines.join()).toMatch(/taking down VgVm\/backup-/);
      expectSourceClean();
    });

    it("what was left an hour ago stays: its copy may be about to start", async () => {
      await leave(1);
      const left = ours(world.server1);
      await made();
      expect(ours(world.server1)).toEqual(left);
    });

    it("what another stack has left stays, also of the same volume", async () => {
      await leave(99, { owner: "organization/p/s2/data" });
      const left = ours(world.server1);
      await made();
      await made({ origin: "data", file: image("tuesday.raw"), owner: "organization/p/s/tuesday" });
      expect(ours(world.server1)).toEqual(left);
    });

    const days = 24;

    it("what was left of a backup to a host that is renamed, or gone, is taken down after a week", async () => {
      destination.set("name", "before\n");
      await leave(6 * days);
      const left = ours(world.server1);
      destination.set("name", "after\n");
      await made();
      expect(ours(world.server1)).toEqual(left);
      world.clock.now += 2 * days * 3600_000;
      await made({ triggers: [2] });
      expectSourceClean();
    });

    it("what another host reads one volume of stays as a whole: its other copies may be about to start", async () => {
      destination.set("name", "elsewhere\n");
      await leave(8 * days, { owner: "organization/p/s/other", ...both() });
      const [reading] = exports();
      if (reading === undefined) throw new Error("nothing is exported");
      destination.set("name", "here\n");
      world.network.readers.add(reading);
      const left = ours(world.server1);
      expect(left.filter((line) => line.startsWith("snapshot"))).toHaveLength(2);
      await made();
      expect(ours(world.server1)).toEqual(left);
      world.network.readers.delete(reading);
      await made({ triggers: [2] });
      expectSourceClean();
    });

    it("what was taken anew while it was looked at stays", async () => {
      await leave(13);
      const left = ours(world.server1);
      onCommand = (index) => {
        if (sent[index]?.text.includes(livingCopiesScript))
          for (const { volume } of world.server1.lvm.all())
            if (volume.name.startsWith("backup-")) Object.assign(volume, { uuid: "another" });
        return undefined;
      };
      await made();
      expect(ours(world.server1)).toEqual(left);
    });

    it.each([
      ["to the same host", "a-host.of.the.backups.example.org\n"],
      ["to another one", "another-host.of.the.backups.example.org\n"],
    ])(
      "what was left %s is taken down also where names are so long that the mark shortens them",
      async (_to, before) => {
        // Cut in the middle of an encoded character.
        const stack = `organization/p/${"s".repeat(48)}`;
        destination.set("name", before);
        await leave(8 * days, { owner: `${stack}/data` });
        destination.set("name", "a-host.of.the.backups.example.org\n");
        await made({ owner: `${stack}/monday` });
        expectSourceClean();
      },
    );

    it.each(["nbdkit", "qemu-nbd"])(
      "what another host is reading from %s stays until it has ended",
      async (server) => {
        destination.set("name", "elsewhere\n");
        await leave(8 * days, { source: { server } });
        const [reading] = exports();
        if (reading === undefined) throw new Error("nothing is exported");
        destination.set("name", "here\n");
        world.network.readers.add(reading);
        const left = ours(world.server1);
        await made();
        expect(ours(world.server1)).toEqual(left);
        world.network.readers.delete(reading);
        await made({ triggers: [2] });
        expectSourceClean();
      },
    );

    it("what cannot be taken down keeps no backup from being made", async () => {
      await leave(13);
      const [volume] = world.server1.lvm.all().filter(({ volume }) => volume.name.startsWith("backup-"));
      if (volume === undefined) throw new Error("nothing is left");
      volume.volume.merging = "waits";
      expect(await made()).toMatchObject({ state: "complete" });
      expect(warnings.join()).toMatch(/could not be taken down: SNAPSHOT_MERGING/);
    });

    it("a backup that is being made at the same time is not disturbed", async () => {
      // The stand-ins read what was served last, to whomever.
      const data = world.server1.lvm.find("VgVm", "data");
      if (data !== undefined) data.data = before;
      const [one, another] = [await checked(), await checked({ ...other, file: image("data.raw") })];
      const { create } = handlers();
      await Promise.all([create(one), create(another)]);
      expect(destination.left()).toEqual(completeBoth);
      expect(lines.join()).not.toMatch(/taking down/);
      expectSourceClean();
    });
  });

  it("a backup anew whose script is killed at each of its steps leaves the old moment or the new one, whole", {
    timeout,
  }, async () => {
    const state = await made();
    write(later);
    destination.save();
    for (let step = 1; ; step++) {
      destination.restore();
      destination.kill({ step, when: "after" });
      const wanted = await checked({ triggers: [2] }, state);
      const after = await handlers().update(state, wanted);
      expect(content()).toBe(later);
      expect(after).toMatchObject({ state: "complete", images: [{ verified: true }] });
      expect(destination.left()).toEqual(complete);
      expect(ours(world.server1)).toEqual([]);
      if (destination.stepsTaken < step) {
        expect(step).toBeGreaterThan(10);
        return;
      }
    }
  });

  it("a destroy after a broken update takes down what that had begun", async () => {
    const state = await made();
    destination.set("hold", "");
    onCommand = () => {
      if (destination.started > 1) throw new Died("the provider died");
      return undefined;
    };
    const wanted = await checked({ triggers: [2] }, state);
    await expect(handlers().update(state, wanted)).rejects.toThrow(Died);
    expect(ours(world.server1)).not.toEqual([]);
    onCommand = () => undefined;
    await handlers().remove(state);
    expect(destination.left()).toEqual([]);
    expectSourceClean();
  });

  it("one that is made already is claimed beside another that runs, and takes nothing of it", async () => {
    await made();
    const both = await checked({ file: image("other.raw"), owner: "organization/p/s/other" });
    const again = await checked();
    const { create } = handlers();
    await Promise.all([create(both), create(again)]);
    expect(content("other.raw")).toBe(before);
    expectSourceClean();
  });

  it("a backup host that cannot be looked at keeps what its copy needs", async () => {
    destination.set("hold", "");
    onCommand = (index) => {
      if (destination.started > 0 && sent[index]?.host === destination.name)
        throw new LvmNbdError("COMMAND_FAILED", { message: "fork: Cannot allocate memory" });
      return undefined;
    };
    await expect(made()).rejects.toThrow(/COMMAND_FAILED/);
    expect(warnings.join()).toMatch(/cannot be told.*stay for the next `pulumi up`/);
    expect(ours(world.server1)).not.toEqual([]);
    onCommand = () => {
      destination.set("hold", undefined);
      return undefined;
    };
    await made();
    done();
    expect(destination.started).toBe(1);
  });
});

it("the folder of the backups may be made meanwhile", async () => {
  mkdirSync(join(destination.disk, "vms"));
  await made({ file: join(destination.disk, "vms/vm.raw") });
  expect(destination.left()).toContain("vms/vm.raw");
});

describe("the images of a set are of one moment", () => {
  it("while one of them is open, none gets its name", async () => {
    const state = await made(both());
    write(later);
    let held: number | undefined;
    // Opened while its new copy is on its way.
    onCommand = () => {
      if (destination.started === 4) held ??= openSync(image("data.raw"), "r");
      return undefined;
    };
    const wanted = await checked({ ...both(), triggers: [2] }, state);
    await expect(handlers().update(state, wanted)).rejects.toThrow(
      /FILE_IN_USE.*data\.raw cannot be replaced/,
    );
    onCommand = () => undefined;
    expect(content()).toBe(before);
    expect(await handlers().read(state)).toMatchObject({ state: "complete" });
    if (held !== undefined) closeSync(held);
    expect(await handlers().update(state, wanted)).toMatchObject({ state: "complete" });
    expect(content()).toBe(later);
    expect(destination.started).toBe(4);
    expect(manifest().moment).toMatch(/^[0-9a-f]{16}$/);
    expect(manifest("data.raw").moment).toBe(manifest().moment);
  });

  it("where a cut came between their names and the program was taken back, it is told that they are not", async () => {
    const state = await made(both());
    write(later);
    onCommand = (index) => {
      if (!sent[index]?.text.includes(commitCopyScript)) return undefined;
      return () => {
        throw new Died("the provider died");
      };
    };
    const wanted = await checked({ ...both(), triggers: [2] }, state);
    await expect(handlers().update(state, wanted)).rejects.toBeInstanceOf(PartialFailure);
    onCommand = () => undefined;
    const after = await handlers().update(state, await checked(both(), state));
    expect([content(), content("data.raw")]).toEqual([later, dataBefore]);
    expect(after).toMatchObject({ state: "mixed", images: [{ state: "complete" }, { state: "complete" }] });
    await handlers().read(after as Values);
    expect(warnings.join()).toMatch(
      /the images are of different moments: .*vm\.raw of .*data\.raw of .*change `triggers`/,
    );
    expect(destination.left()).toEqual(completeBoth);
    expectSourceClean();
    const again = await checked({ ...both(), triggers: [2] }, after as Values);
    expect(await handlers().update(after as Values, again)).toMatchObject({ state: "complete" });
  });
});

describe("read by its id alone", () => {
  const monday = { ...importer, organization: "organization", name: "monday" };
  const find = (id: string, more: Partial<Finder> = {}) =>
    handlers().find(id, { ...monday, ...more, host: backupHost });
  const found = (...names: string[]) =>
    imported(handlers(), `192.0.2.2${names.map((name) => image(name)).join(",")}`, {
      ...monday,
      host: backupHost,
    });
  const source = () => {
    const { address, port } = world.host(world.server1) as { address: string; port: number };
    return { host: { address, port }, listenAddress: world.server1.address, server: "nbdkit" };
  };

  it("a backup is declared as its manifest has it, and never made again, so that nothing is to change", async () => {
    const { volumes: _v, source: _s, ...state } = await made();
    sent = [];
    const { inputs, state: seen } = await found("vm.raw");
    expect(inputs).toMatchObject({
      ...{ host: backupHost, owner: "organization/p/s/monday", existing: true, source: source() },
      volumes: [{ volumeGroup: "VgVm", origin: "small", file: image() }],
    });
    expect(seen).toMatchObject({ ...state, existing: true });
    expect(sent.filter(({ kind }) => kind === "change")).toEqual([]);
    expect(new Set(sent.map(({ host }) => host))).toEqual(new Set([destination.name]));
  });

  it("of several volumes is the moment of all of them; of one of them, says which others there were", async () => {
    const state = await made(both());
    expect((await found("vm.raw", "data.raw")).state.images).toEqual(state.images);
    const others = expect.stringContaining(`there was also ${image("data.raw")}`);
    expect(warnings).not.toContainEqual(others);
    await find(`192.0.2.2${image()}`);
    expect(warnings).toContainEqual(others);
  });

  it("that was made for triggers is refused, and declared with them is kept, also where its time is another", async () => {
    await made({ triggers: ["2026-11-30"] });
    await expect(find(`192.0.2.2${image()}`)).rejects.toThrow(
      /INVALID_INPUT.*triggers: .*Declare it with all its properties/s,
    );
    write(later);
    utimesSync(image(), 1e9, 1e9);
    expect(await made({ triggers: ["2026-11-30"] })).toMatchObject({ state: "changed" });
    expect(content()).toBe(before);
    expect(warnings).toEqual([expect.stringMatching(/vm\.raw.* is kept as it is/)]);
    expect(await made({ triggers: ["2026-12-01"] })).toMatchObject({ state: "complete" });
    expect(content()).toBe(later);
  });

  it("says that another resource which has it removes it; one that is declared instead has it alone", async () => {
    const first = await made();
    const own = handlers();
    const second = await own.find(`192.0.2.2${image()}`, { ...monday, host: backupHost });
    expect(warnings).toEqual([
      expect.stringMatching(/another resource of this stack.*`pulumi state delete`.*Declared .* instead/s),
    ]);
    await find(`192.0.2.2${image()}`, { readsOnly: true });
    expect(warnings).toEqual([]);
    const declaredInstead = await made({ existing: true });
    await handlers().remove(first);
    expect(await handlers().read(declaredInstead)).toMatchObject({ state: "complete" });
    await handlers().remove(second?.state ?? {});
    expect(content()).toBe(before);
  });

  it("of a set of which an image is gone is refused; of one that was changed says so", async () => {
    await made(both());
    const id = `192.0.2.2${image()},${image("data.raw")}`;
    truncateSync(image("data.raw"), 100);
    expect(await find(id)).toMatchObject({ state: { state: "changed" } });
    expect(warnings).toContainEqual(expect.stringMatching(/data\.raw was changed: its size/));
    rmSync(image());
    await expect(find(id)).rejects.toThrow(/INVALID_INPUT.*vm\.raw is not there/s);
  });

  it("of an image that is named twice is refused before the host is asked", async () => {
    await made();
    sent = [];
    await expect(find(`192.0.2.2${image()},${image()}`)).rejects.toThrow(
      /INVALID_INPUT.*names .*vm\.raw twice/s,
    );
    expect(sent).toEqual([]);
  });

  it("of another stack's is refused, also where only one of the images is", async () => {
    await made(both());
    const id = `192.0.2.2${image()},${image("data.raw")}`;
    await expect(find(id, { stack: "other" })).rejects.toThrow(/FOREIGN_RESOURCE/);
    const theirs = { ...manifest("data.raw"), mark: "lvm-nbd.owner=organization/p/other/monday" };
    writeFileSync(`${image("data.raw")}.manifest.json`, JSON.stringify(theirs));
    const theOther = /FOREIGN_RESOURCE.*belongs to organization\/p\/other\/monday/s;
    await expect(find(id)).rejects.toThrow(theOther);
    await expect(find(id, { organization: undefined })).rejects.toThrow(theOther);
  });

  it("of what is no backup, or not there, is refused", async () => {
    await made();
    await expect(find(`192.0.2.2${image()},${image("data.raw")}`)).rejects.toThrow(
      /INVALID_INPUT.*data\.raw has no manifest of a backup/s,
    );
    expect(await find(`192.0.2.2${image("data.raw")}`)).toBeUndefined();
    const copied = { ...manifest(), source: { ...manifest().source, uri: "nbd://10.0.0.1/vm1" } };
    writeFileSync(`${image()}.manifest.json`, JSON.stringify(copied));
    await expect(find(`192.0.2.2${image()}`)).rejects.toThrow(/INVALID_INPUT.*no manifest of a backup/s);
  });
});
