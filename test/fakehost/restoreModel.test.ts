/**
 * Random courses of a restore: what is declared, cut and cancelled, states that are lost, what the VM writes, and hands that remove
 * snapshots and marks, undo merges and turn back the clock. A volume is never restored unasked, nor called restored where it was not.
 * The sequences are the same each time; `MODEL_SEED=... MODEL_RUNS=...` plays others, and `MODEL_PATH=...`, which a failure prints,
 * that one again.
 *
 * Not in it: renamed resources, several resources of one volume, removals, and a thin pool that is full. What `lvremove -An` removes
 * while it is merged looks to LVM like the end of its merge, and may be called so. What writes an image is a stand-in; see imageJobs.ts.
 */
import fc from "fast-check";
import { afterEach, expect, it, vi } from "vitest";
import { restoreGeneration, restoreMarksAmong } from "../../provider/core/restoreMark.js";
import { type Moment, strikeAt, strikes } from "./faults.js";
import { ImageJobs } from "./imageJobs.js";
import type { Volume } from "./lvm.js";
import { finish, run } from "./machine.js";
import { furnishedWorld } from "./program.js";
import { type Declared, ProcessKilled, type Report, Stack, type Values } from "./stack.js";
import type { FakeWorld } from "./world.js";

vi.mock("node:timers/promises", async (original) => {
  const timers = await original<typeof import("node:timers/promises")>();
  const setTimeout: typeof timers.setTimeout = (milliseconds, value, options) =>
    timers.setTimeout((milliseconds ?? 0) / 50, value, options);
  return { ...timers, setTimeout };
});

const sequences = Number(process.env.MODEL_RUNS ?? 200);
const MiB = 1024 ** 2;
const group = "VgVm";
type Kind = "COW" | "thin";
type Moments = "A" | "B";
/** What is restored. */
type Source = Moments | "image";
const sha256 = "a".repeat(64);
type Trigger = "first" | "again";

/** After one of these nothing is restored until somebody does what it says. */
const final = ["RESTORE_UNCERTAIN", "SNAPSHOT_OVERFLOWED"];
/** For a snapshot that was merged already, or whose origin LVM has forgotten with that. */
const spent = ["SNAPSHOT_NOT_FOUND", "IDENTITY_MISMATCH"];

/** What somebody wants, from the first `up` for those triggers to the first for others. */
interface Ask {
  readonly trigger: Trigger;
  /** LVM was told to merge for it, or an image was written for it and read back. */
  isServed: boolean;
}

class Model {
  readonly stack = new Stack("one");
  /** UUIDs of the last ones of those names. */
  readonly snapshots = new Map<Moments, string>();
  /** Of images too, by their checksums: told with the first byte that is written. */
  readonly merges: {
    readonly what: "told" | "begun" | "ended";
    readonly uuid: string;
    /** Of an image, whose job may be of an earlier run. */
    readonly generation?: string;
  }[] = [];
  ask: Ask | undefined;
  last: { readonly source: Source; readonly trigger: Trigger } = { source: "A", trigger: "first" };
  /** State and marks before the last `up`. */
  before: {
    readonly kept: Stack["kept"];
    readonly tags: readonly string[];
    /** UUIDs. */
    readonly merging: readonly string[];
  } = { kept: new Map(), tags: [], merging: [] };
  /** The last `up` has ended with one of `final`. */
  refused:
    | { readonly uuid: string | undefined; readonly wasBegun: boolean; readonly text: string }
    | undefined;
  /** Somebody's hands were in between, or a state was lost: an error may be all that is left to tell. */
  disturbed = false;
  stateLost = false;
  marksRemoved = false;
  /** Removed so that LVM has nothing archived of it. */
  readonly untold = new Set<string>();
  written = 0;
  readonly jobs: ImageJobs;

  constructor(
    readonly world: FakeWorld,
    readonly kind: Kind,
  ) {
    this.lvm.onMerge = (what, { uuid }) => this.merges.push({ what, uuid });
    this.jobs = new ImageJobs(world.server1, (what, { generation }) =>
      this.merges.push({ what: what === "written" ? "told" : what, uuid: sha256, generation }),
    );
  }

  get lvm() {
    return this.world.server1.lvm;
  }

  get origin(): Volume {
    const origin = this.lvm.find(group, this.kind === "COW" ? "vm1" : "thin1");
    if (origin === undefined) throw new Error("the origin is gone");
    return origin;
  }

  snapshot(moment: Moments): Volume | undefined {
    return this.lvm.find(group, nameOf(moment));
  }

  get isOpen(): boolean {
    return this.world.server1.isOpen(this.origin);
  }

  take(moment: Moments): void {
    const { machine } = this.world.server1;
    if (this.snapshot(moment) !== undefined) return;
    const size = this.kind === "COW" ? ["-L", `${16 * MiB}b`] : [];
    const path = `${group}/${this.origin.name}`;
    const said = { out: () => undefined, err: () => undefined };
    // LVM refuses it during a merge.
    finish(machine, run(machine, ["lvcreate", "-s", "-y", "-n", nameOf(moment), ...size, path], said));
    const taken = this.snapshot(moment);
    if (taken === undefined) return;
    taken.usedPercent = 60;
    this.snapshots.set(moment, taken.uuid);
  }

  /** The VM goes on writing. */
  write(): void {
    this.written += 1;
    this.origin.data = `written ${this.written}`;
  }

  open(opens: boolean): void {
    const line = `36 35 253:${this.origin.minor} / /srv/vm rw - ext4 /dev/dm-${this.origin.minor} rw\n`;
    this.world.server1.files.write("/proc/1/mountinfo", opens ? line : "");
  }

  /** As at a stop and a start of the VM. */
  reactivate(): void {
    if (this.isOpen) return;
    for (const { volume } of this.lvm.all())
      if (volume === this.origin || (volume.kind === "cow" && volume.origin === this.origin))
        this.lvm.deactivate(group, volume);
    this.lvm.activate(group, this.origin);
  }

  program(source: Source, trigger: Trigger, whenOpen: string): Declared[] {
    const restored =
      source === "image"
        ? { image: { uri: "nbd://10.0.0.2:10809/vm1", sha256 }, overwrite: this.origin.uuid }
        : { snapshot: { name: nameOf(source), uuid: this.snapshots.get(source) }, whenOpen };
    const args: Values = {
      host: this.world.host(this.world.server1),
      volumeGroup: group,
      origin: this.origin.name,
      triggers: triggersOf(trigger),
      ...restored,
    };
    return [{ type: "LvRestore", name: "restore", args }];
  }

  get state(): Values | undefined {
    return this.stack.kept.get("restore")?.state;
  }

  get merging(): string[] {
    return this.lvm.all().flatMap(({ volume }) => (volume.merging === "no" ? [] : [volume.uuid]));
  }

  get told(): string[] {
    return this.merges.flatMap(({ what, uuid }) => (what === "told" ? [uuid] : []));
  }

  hasEnded(uuid: string): boolean {
    return this.merges.some((one) => one.what === "ended" && one.uuid === uuid);
  }
}

/** UUID or checksum. */
function sourceOf(state: Values): string {
  return String(state.restoredSnapshot || state.restoredImage);
}

function triggersOf(trigger: Trigger): string[] {
  return trigger === "first" ? [] : [trigger];
}

function nameOf(moment: Moments): string {
  return `vm1-${moment.toLowerCase()}`;
}

function codeOf(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return /^[A-Z_]+(?=:)/.exec(text)?.[0] ?? text;
}

/** What the state tells, by a look at the host just now, must be so. */
function expectTrue(model: Model, report: Report, commands: number): void {
  const { state } = model;
  const hasLooked = report.errors.length === 0 && model.stack.commands.length > commands;
  if (state === undefined || !hasLooked) return;
  if (state.state !== "restored" && state.state !== "unmarked") return;
  const uuid = sourceOf(state);
  counted.restored += 1;
  if (model.untold.has(uuid)) return;
  expect(model.hasEnded(uuid), `${uuid} was merged`).toBe(true);
  // A later one is forgotten where neither a mark nor a state tells of it.
  if (model.marksRemoved && model.stateLost) return;
  // `unmarked` is also what was restored before another one that was cut off as it began.
  const isCut = restoreMarksAmong(model.origin.tags).some(({ stage }) => stage === "begun");
  if (state.state === "unmarked" && isCut) return;
  // By marks of before: that is said.
  if (/is not restored again/.test(model.stack.warnings.at(-1) ?? "")) return;
  expect(model.told.at(-1), "the last that was merged").toBe(uuid);
}

const counted = { struck: 0, merges: 0, restored: 0, codes: new Map<string, number>() };

/** At that command, or when that has become of a merge. */
interface Fault {
  readonly at: number | "told" | "begun";
  readonly moment: Moment;
  readonly what: string;
}

function strike({ world, stack, merges }: Model, { at, moment, what }: Fault): { struck: boolean } {
  const hit = strikes[what] ?? (() => undefined);
  if (typeof at === "number") return strikeAt(world, stack, at, moment, hit);
  const told = { struck: false };
  const first = merges.length;
  world.hooks = {
    step: (command) => {
      if (told.struck || !merges.slice(first).some((one) => one.what === at)) return;
      told.struck = true;
      hit(world, stack, command);
    },
  };
  return told;
}

abstract class Action {
  abstract run(model: Model): Promise<void>;
  abstract toString(): string;
}

class Up extends Action {
  constructor(
    private readonly source: Source,
    private readonly trigger: Trigger,
    private readonly whenOpen: "refuse" | "atNextActivation",
    /** As an LvSnapshot does after its merge. */
    private readonly takesAnew: boolean,
    private readonly fault: Fault | undefined,
  ) {
    super();
  }

  async run(model: Model): Promise<void> {
    const { world, stack } = model;
    const { trigger } = this;
    if (model.ask?.trigger !== trigger) {
      model.ask = { trigger, isServed: false };
      model.refused = undefined;
    }
    const { source } = this;
    if (this.takesAnew && source !== "image") model.take(source);
    const { ask } = model;
    const uuid = source === "image" ? sha256 : model.snapshots.get(source);
    model.last = { source, trigger };
    model.before = { kept: new Map(stack.kept), tags: [...model.origin.tags], merging: model.merging };
    const old = model.state;
    const first = model.merges.length;
    const commands = stack.commands.length;
    const struck = this.fault && strike(model, this.fault);
    let report: Report | undefined;
    try {
      report = await stack.up(model.program(source, trigger, this.whenOpen));
    } catch (error) {
      if (!(error instanceof ProcessKilled)) throw error;
    }
    world.hooks = {};
    await world.settle();
    if (struck?.struck) counted.struck += 1;
    expectAsked(model, ask, old, first);
    if (report === undefined) return;
    expectTrue(model, report, commands);
    const [error] = report.errors;
    if (error === undefined) {
      // From another snapshot it may be restored where nothing was begun.
      if (model.refused?.wasBegun || model.refused?.uuid === uuid)
        expect(model.refused?.text, "an error before, and nobody did what it says").toBeUndefined();
      model.refused = undefined;
      return;
    }
    const code = codeOf(error);
    counted.codes.set(code, (counted.codes.get(code) ?? 0) + 1);
    if (final.includes(code)) model.refused = { uuid, wasBegun: ask.isServed, text: String(error) };
  }

  toString(): string {
    return `up(${this.source}, ${this.trigger}, ${this.whenOpen}, ${this.takesAnew}, ${JSON.stringify(this.fault)})`;
  }
}

/** Nothing was restored, since that many events, but what is asked for. */
function expectAsked(model: Model, ask: Ask, old: Values | undefined, first: number): void {
  const isOver = ["restored", "unmarked", "failed"].includes(String(old?.state)) || isMerging(old);
  const isDeclaredStill = old !== undefined && isTriggers(old.triggers, ask.trigger);
  const isForgotten = model.marksRemoved && model.stateLost;
  const generation = restoreGeneration(triggersOf(ask.trigger));
  for (const { what, uuid, ...of } of model.merges.slice(first)) {
    if (of.generation !== undefined && of.generation !== generation) continue;
    if (what === "told") {
      counted.merges += 1;
      if (isDeclaredStill) expect(isOver, "restored for triggers that the state has").toBe(false);
      if (!isForgotten) expect(ask.isServed, "restored more than once for a change of triggers").toBe(false);
    }
    if (what === "told" ? uuid !== sha256 : what === "ended" && uuid === sha256) ask.isServed = true;
  }
}

function isMerging(state: Values | undefined): boolean {
  return state?.state === "merging" || state?.state === "scheduled";
}

function isTriggers(triggers: unknown, trigger: Trigger): boolean {
  return Array.isArray(triggers) && (triggers[0] ?? "first") === trigger;
}

class Refresh extends Action {
  async run(model: Model): Promise<void> {
    const merges = model.told.length;
    const commands = model.stack.commands.length;
    const report = await model.stack.refresh();
    expect(report.errors).toEqual([]);
    expect(model.told.length, "merges of a refresh").toBe(merges);
    expectTrue(model, report, commands);
    // It is what that error asks for.
    if (model.refused?.text.includes("`pulumi refresh`")) model.refused = undefined;
  }

  toString(): string {
    return "refresh";
  }
}

/** What the VM and its owner do. */
const ordinary: Readonly<Record<string, (model: Model) => void>> = {
  "the VM starts": (model) => {
    if (model.origin.active) model.open(true);
  },
  "the VM stops": (model) => model.open(false),
  "the VM writes": (model) => {
    if (model.isOpen) model.write();
  },
  "the VM is stopped and started": (model) => {
    model.open(false);
    model.reactivate();
    model.open(true);
    model.write();
  },
  "the host is turned off and on": ({ world }) => world.reboot(world.server1),
  "the job that writes is killed": ({ jobs }) => jobs.kill(),
  "the merge ends": ({ lvm }) => {
    for (const { volume } of lvm.all())
      if (volume.merging === "runs" && !volume.mergeFailed) lvm.finishMerge(group, volume);
  },
  "A is taken": (model) => model.take("A"),
  "B is taken": (model) => model.take("B"),
  "hours pass": ({ world }) => world.pass(7200),
};

/** Hands that are in the way. */
const hands: Readonly<Record<string, (model: Model) => void>> = {
  "A is removed": (model) => remove(model, "A", true),
  "B is removed": (model) => remove(model, "B", true),
  "what is merged is removed": (model) => removeMerging(model, true),
  "what is merged is removed by lvremove -An": (model) => removeMerging(model, false),
  "A runs full": (model) => fill(model, "A"),
  "B runs full": (model) => fill(model, "B"),
  "the kernel gives the merge up": ({ lvm }) => {
    for (const { volume } of lvm.all()) if (volume.merging === "runs") volume.mergeFailed = true;
  },
  "all marks are removed": (model) => {
    retag(model, []);
  },
  "LVM's metadata of before is brought back": (model) => {
    retag(model, model.before.tags);
    for (const { volume } of model.lvm.all())
      if (volume.merging === "waits" && !model.before.merging.includes(volume.uuid)) volume.merging = "no";
  },
  "the clock goes back": ({ world }) => {
    world.clock.now -= 5 * 3600_000;
  },
  "the state is lost": (model) => {
    model.stateLost = true;
    model.stack.kept.clear();
    for (const [name, kept] of model.before.kept) model.stack.kept.set(name, kept);
  },
};

function retag(model: Model, tags: readonly string[]): void {
  model.origin.tags = [...tags];
  model.marksRemoved = true;
  // A run that was killed has saved nothing.
  if (model.state === undefined || sourceOf(model.state) !== model.told.at(-1)) model.stateLost = true;
}

function remove(model: Model, moment: Moments, archives: boolean): void {
  const snapshot = model.snapshot(moment);
  if (snapshot === undefined) return;
  const isHalf = snapshot.merging === "runs";
  if (!model.lvm.removeByHand(group, snapshot, archives)) return;
  if (isHalf) model.origin.data = `half of ${snapshot.data}`;
  if (!archives) model.untold.add(snapshot.uuid);
}

/** LVM lets it go only if it ran full, or its merge failed. */
function removeMerging(model: Model, archives: boolean): void {
  for (const moment of ["A", "B"] as const) {
    const snapshot = model.snapshot(moment);
    if (snapshot?.kind !== "cow" || snapshot.merging === "no") continue;
    if (snapshot.merging === "runs") snapshot.mergeFailed = true;
    else snapshot.usedPercent = 100;
    remove(model, moment, archives);
  }
}

function fill(model: Model, moment: Moments): void {
  const snapshot = model.snapshot(moment);
  if (snapshot?.kind === "cow" && snapshot.merging !== "runs") snapshot.usedPercent = 100;
}

class Happens extends Action {
  constructor(
    private readonly what: string,
    private readonly disturbs: boolean,
  ) {
    super();
  }

  async run(model: Model): Promise<void> {
    const merges = model.told.length;
    (this.disturbs ? hands : ordinary)[this.what]?.(model);
    if (this.disturbs) {
      model.disturbed = true;
      model.refused = undefined;
    }
    await model.world.settle();
    expect(model.told.length).toBe(merges);
  }

  toString(): string {
    return this.what;
  }
}

const fault = fc.record({
  at: fc.oneof(fc.integer({ min: 0, max: 9 }), fc.constantFrom("told" as const, "begun" as const)),
  moment: fc.oneof(fc.constantFrom<Moment>("before", "after"), fc.integer({ min: 1, max: 40 })),
  what: fc.constantFrom(...Object.keys(strikes)),
});
const up = fc
  .tuple(
    fc.constantFrom<Source>("A", "A", "B", "image"),
    fc.constantFrom<Trigger>("first", "first", "again"),
    fc.constantFrom("refuse" as const, "atNextActivation" as const),
    fc.boolean(),
    fc.option(fault, { nil: undefined }),
  )
  .map((parts) => new Up(...parts));
const happens = (what: Readonly<Record<string, unknown>>, disturbs: boolean) =>
  fc.constantFrom(...Object.keys(what)).map((one) => new Happens(one, disturbs));

const actions = fc.array(
  fc.oneof(
    { weight: 5, arbitrary: up },
    { weight: 2, arbitrary: fc.constant(new Refresh()) },
    { weight: 4, arbitrary: happens(ordinary, false) },
    { weight: 4, arbitrary: happens(hands, true) },
  ),
  { minLength: 2, maxLength: 9 },
);

let open: FakeWorld | undefined;
afterEach(async () => {
  await open?.close();
  open = undefined;
});

async function play(kind: Kind, isRunning: boolean, sequence: readonly Action[]): Promise<void> {
  const world = await furnishedWorld();
  open = world;
  const model = new Model(world, kind);
  model.take("A");
  model.write();
  model.take("B");
  model.write();
  model.open(isRunning);
  for (const action of sequence) await action.run(model);
  await expectEnds(model);
  open = undefined;
  await world.close();
}

/** With the VM out of the way, `up` after `up` ends restored, or with an error that says what to do. */
async function expectEnds(model: Model): Promise<void> {
  const { source, trigger } = model.last;
  let [code, text]: (string | undefined)[] = [];
  for (let round = 0; round < 4; round++) {
    model.open(false);
    model.reactivate();
    const errors: unknown[] = [];
    const last = new Up(source, trigger, "refuse", false, undefined);
    const up = model.stack.up.bind(model.stack);
    model.stack.up = async (program) => {
      const report = await up(program);
      errors.push(...report.errors);
      return report;
    };
    await last.run(model);
    model.stack.up = up;
    code = errors.length === 0 ? undefined : codeOf(errors[0]);
    text = String(errors[0]);
    if (code === undefined) break;
  }
  if (code === undefined) expect(model.state?.state).toBe("restored");
  else expect(model.disturbed ? [...final, ...spent] : spent, text).toContain(code);
}

it(`${sequences} random courses restore once, and tell what they did`, async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.constantFrom<Kind>("COW", "COW", "COW", "thin"),
      fc.boolean(),
      actions,
      async (...course) => {
        await open?.close();
        await play(...course);
      },
    ),
    {
      numRuns: sequences,
      seed: Number(process.env.MODEL_SEED ?? 1),
      ...(process.env.MODEL_PATH === undefined ? {} : { path: process.env.MODEL_PATH }),
      endOnFailure: process.env.MODEL_PATH !== undefined,
    },
  );
  console.log(counted);
  if (process.env.MODEL_PATH !== undefined) return;
  // Faults that meet no command, and courses without a merge, try nothing.
  expect(counted.struck).toBeGreaterThan(sequences / 5);
  expect(counted.merges).toBeGreaterThan(sequences / 3);
  if (process.env.MODEL_RUNS === undefined)
    expect([...counted.codes.keys()]).toEqual(expect.arrayContaining(final));
}, 1_800_000);
