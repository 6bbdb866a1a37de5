/**
 * Random stacks, random hands of others and random faults; when they have stopped, one `up --refresh` makes the
 * world as declared. The sequences are the same each time; `MODEL_SEED=... MODEL_RUNS=...` plays others, and
 * `MODEL_PATH=...`, which a failure prints, that one again.
 */
import fc from "fast-check";
import { afterEach, expect, it } from "vitest";
import { attachUnitName } from "../../provider/linux/attachUnit.js";
import { exportUnitName } from "../../provider/linux/exportUnit.js";
import { type Moment, strikeAt, strikes } from "./faults.js";
import { before, chain, expectConverged, expectOthersUntouched, furnishedWorld, ours } from "./program.js";
import { type Declared, ProcessKilled, Stack, type Values } from "./stack.js";
import type { FakeWorld } from "./world.js";

const sequences = Number(process.env.MODEL_RUNS ?? 1000);
/** No `up` may take longer, whatever happens to it (virtual time). */
const longestUpSeconds = 3600;

/** What a stack declares: chains by their number, each with what differs from the plain one. */
type Declaration = Map<number, { snapshot: Values; export: Values; attachment: Values; length: number }>;

const wholeChain = 3;

interface Model {
  readonly world: FakeWorld;
  readonly stacks: readonly [Stack, Stack];
  readonly declared: readonly [Declaration, Declaration];
  /** What the origins hold now. */
  written: number;
}

/** Chains of the two stacks differ in their numbers, so that they share hosts and never names. */
function program({ world, declared }: Model, stack: 0 | 1): Declared[] {
  return [...declared[stack]].flatMap(([n, { length, ...changes }]) =>
    chain(world, changes, n + 5 * stack).slice(0, length),
  );
}

abstract class Action {
  abstract run(model: Model): Promise<void>;
  abstract toString(): string;
}

class Declare extends Action {
  constructor(
    private readonly stack: 0 | 1,
    private readonly n: number,
    private readonly change: { snapshot?: Values; export?: Values; attachment?: Values } | "remove",
    private readonly length: number,
  ) {
    super();
  }
  async run({ declared }: Model): Promise<void> {
    const own = declared[this.stack];
    const old = own.get(this.n) ?? { snapshot: {}, export: {}, attachment: {} };
    const change = (what: "snapshot" | "export" | "attachment") => ({
      ...old[what],
      ...(this.change === "remove" ? {} : this.change[what]),
    });
    own.set(this.n, {
      snapshot: change("snapshot"),
      export: change("export"),
      attachment: change("attachment"),
      length: this.change === "remove" ? 0 : this.length,
    });
  }
  toString(): string {
    return `declare(${this.stack}, ${this.n}, ${JSON.stringify(this.change)}, ${this.length})`;
  }
}

class Up extends Action {
  constructor(
    private readonly stack: 0 | 1,
    private readonly fault: { at: number; moment: Moment; what: string } | undefined,
    private readonly refreshes: boolean,
  ) {
    super();
  }
  async run(model: Model): Promise<void> {
    const { world } = model;
    const stack = model.stacks[this.stack];
    const began = world.clock.now;
    let told = { struck: false };
    if (this.fault !== undefined) {
      const { at, moment, what } = this.fault;
      told = strikeAt(world, stack, at, moment, strikes[what] ?? (() => undefined));
    }
    try {
      if (this.refreshes) await stack.refresh();
      await stack.up(program(model, this.stack));
    } catch (error) {
      if (!(error instanceof ProcessKilled)) throw error;
    }
    world.hooks = {};
    if (told.struck) struck += 1;
    expect((world.clock.now - began) / 1000, "seconds").toBeLessThan(longestUpSeconds);
  }
  toString(): string {
    return `up(${this.stack}, ${JSON.stringify(this.fault)}, ${this.refreshes})`;
  }
}

/** Somebody else's hands. */
const hands: Readonly<Record<string, (model: Model, n: number) => void>> = {
  "writes on the origins": (model) => {
    model.written += 1;
    for (const { lvm } of model.world.servers)
      for (const name of ["vm1", "vm2", "thin1"]) {
        const volume = lvm.find("VgVm", name);
        if (volume !== undefined) volume.data = `${before}, then ${model.written}`;
      }
  },
  "fills a snapshot": ({ world }, n) => {
    const volume = snapshots(world)[n];
    if (volume?.kind === "cow") volume.usedPercent = 100;
  },
  // Only of one that is in a state: its mark is looked for under the name that was declared.
  "renames a snapshot": ({ world, stacks }, n) => {
    const volume = snapshots(world)[n];
    const isKnown = stacks.some(({ kept }) =>
      [...kept.values()].some(({ state }) => state.uuid === volume?.uuid),
    );
    if (volume !== undefined && isKnown) world.server1.lvm.rename("VgVm", volume, `elsewhere${n}`);
  },
  "makes a snapshot writable": ({ world }, n) => {
    const volume = snapshots(world)[n];
    if (volume !== undefined) volume.readOnly = !volume.readOnly;
  },
  "tags a snapshot": ({ world }, n) => {
    snapshots(world)[n]?.tags.push("somebody");
  },
  "removes a snapshot": ({ world }, n) => {
    const volume = snapshots(world)[n];
    if (volume !== undefined && !world.server1.isOpen(volume)) world.server1.lvm.delete(volume);
  },
  "kills an export": ({ world }, n) => world.server1.kill(exportUnitName(`vm1-${n}`)),
  "kills an attachment": ({ world }, n) => world.server2.kill(attachUnitName(`vm1-${n}`)),
  "edits a unit": ({ world }, n) => {
    const path = `/etc/systemd/system/${attachUnitName(`vm1-${n}`)}`;
    if (world.server2.files.exists(path)) world.server2.files.append(path, "# edited\n");
  },
  "disables an export": ({ world }, n) => {
    const link = `/etc/systemd/system/multi-user.target.wants/${exportUnitName(`vm1-${n}`)}`;
    if (world.server1.files.kind(link, false) !== undefined) world.server1.files.remove(link);
  },
  // Only of one that is in a state: what nobody remembers and nothing marks any more cannot be known as ours.
  "removes a unit's file": ({ world, stacks }, n) => {
    if (!stacks[0].kept.has(`export${n}`)) return;
    const path = `/etc/systemd/system/${exportUnitName(`vm1-${n}`)}`;
    if (world.server1.files.exists(path)) world.server1.files.remove(path);
  },
  "mounts an attachment": ({ world }, n) => {
    const name = [...world.server2.nbd.links.keys()][n];
    if (name !== undefined) world.server2.nbd.mount(name, true);
  },
  "unmounts all": ({ world }) => unmountAll(world),
  "turns server1 off and on": ({ world }) => world.reboot(world.server1),
  "turns server2 off and on": ({ world }) => world.reboot(world.server2),
};

function unmountAll({ server2 }: FakeWorld): void {
  server2.files.write("/proc/1/mountinfo", "");
}

function snapshots(world: FakeWorld) {
  return world.server1.lvm.all().flatMap(({ volume }) => (volume.origin === undefined ? [] : [volume]));
}

class Hand extends Action {
  constructor(
    private readonly what: string,
    private readonly n: number,
  ) {
    super();
  }
  async run(model: Model): Promise<void> {
    hands[this.what]?.(model, this.n);
    await model.world.settle();
  }
  toString(): string {
    return `${this.what} ${this.n}`;
  }
}

const stackNumber = fc.constantFrom<0 | 1>(0, 0, 0, 1);
const chainNumber = fc.integer({ min: 1, max: 2 });

const change = fc.oneof(
  fc
    .constantFrom<Values>({}, { size: "24M" }, { tags: ["a"] }, { readOnly: false }, { chunkSize: "4K" })
    .map((snapshot) => ({ snapshot })),
  fc.constantFrom("b", "c", "d").map((trigger) => ({ snapshot: { triggers: [trigger] } })),
  fc
    .constantFrom<Values>(
      { clients: ["10.0.0.0/24"] },
      { server: "nbd-server" },
      { server: "qemu-nbd" },
      { server: "nbdkit" },
    )
    .map((exported) => ({ export: exported })),
  fc
    .constantFrom<Values>({ blockSize: 4096 }, { timeoutSeconds: 10 }, { connections: 2 })
    .map((attachment) => ({ attachment })),
);

const declare = fc
  .tuple(
    stackNumber,
    chainNumber,
    fc.oneof({ weight: 5, arbitrary: change }, { weight: 1, arbitrary: fc.constant("remove" as const) }),
    fc.integer({ min: 1, max: wholeChain }),
  )
  .map((parts) => new Declare(...parts));

const fault = fc.record({
  at: fc.integer({ min: 0, max: 16 }),
  moment: fc.oneof(fc.constantFrom<Moment>("before", "after"), fc.integer({ min: 1, max: 20 })),
  what: fc.constantFrom(...Object.keys(strikes)),
});

const up = fc
  .tuple(stackNumber, fc.option(fault, { nil: undefined }), fc.boolean())
  .map((parts) => new Up(...parts));
const hand = fc
  .tuple(fc.constantFrom(...Object.keys(hands)), fc.integer({ min: 0, max: 2 }))
  .map((parts) => new Hand(...parts));

/** Begins with an `up` of a whole chain that is struck, or not: an empty world is soon explored. */
const actions = fc
  .tuple(
    change,
    fc.option(fault, { nil: undefined }),
    fc.array(
      fc.oneof(
        { weight: 3, arbitrary: declare },
        { weight: 4, arbitrary: up },
        { weight: 2, arbitrary: hand },
      ),
      { maxLength: 5 },
    ),
  )
  .map(([first, struckBy, rest]): Action[] => [
    new Declare(0, 1, first, wholeChain),
    new Up(0, struckBy, false),
    ...rest,
  ]);

let open: FakeWorld | undefined;
/** Faults that met something. */
let struck = 0;
afterEach(async () => {
  await open?.close();
  open = undefined;
});

async function play(sequence: readonly Action[]): Promise<void> {
  const world = await furnishedWorld();
  open = world;
  const model: Model = {
    world,
    stacks: [new Stack("one"), new Stack("two")],
    declared: [new Map(), new Map()],
    written: 0,
  };
  const held = () => (model.written === 0 ? before : `${before}, then ${model.written}`);
  for (const action of sequence) {
    await action.run(model);
    expectOthersUntouched(world, held());
  }
  unmountAll(world);
  await world.settle(60);
  // A resource that is withdrawn after its create was cut, before anything was kept of it, is one nobody asks about
  // any more: so all come back once.
  for (const declared of model.declared)
    for (const [n, one] of declared) declared.set(n, { ...one, length: wholeChain });
  for (const at of [0, 1] as const) {
    const stack = model.stacks[at];
    expect((await stack.refresh()).errors).toEqual([]);
    expect((await stack.up(program(model, at))).errors).toEqual([]);
    await world.settle();
  }
  const deployed = ([0, 1] as const).map((at) => ({ stack: model.stacks[at], program: program(model, at) }));
  await expectConverged(world, deployed);
  expectOthersUntouched(world, held());
  for (const at of [0, 1] as const) expect((await model.stacks[at].up([])).errors).toEqual([]);
  await world.settle();
  expect(world.servers.flatMap(ours)).toEqual([]);
  expectOthersUntouched(world, held());
  open = undefined;
  await world.close();
}

it(`${sequences} random sequences end as declared`, async () => {
  await fc.assert(
    fc.asyncProperty(actions, async (sequence) => {
      await open?.close();
      await play(sequence);
    }),
    {
      numRuns: sequences,
      seed: Number(process.env.MODEL_SEED ?? 1),
      ...(process.env.MODEL_PATH === undefined ? {} : { path: process.env.MODEL_PATH }),
      endOnFailure: process.env.MODEL_PATH !== undefined,
    },
  );
  // A fault that meets no command is no fault.
  console.log(`${struck} faults met a command`);
  if (process.env.MODEL_PATH === undefined) expect(struck).toBeGreaterThan(sequences / 5);
}, 1_800_000);
