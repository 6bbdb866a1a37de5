/**
 * Every command of every operation, cut in every way: after it, one `up` makes the world as declared. The table of
 * operations is all there is to write: what they run is found by running them once.
 */
import { afterAll, afterEach, beforeEach, describe, expect, it } from "vitest";
import { quoteAll } from "../../provider/ssh/quoting.js";
import { type Moment, strikeAt, strikes } from "./faults.js";
import {
  before,
  chain,
  disable,
  expectConverged,
  expectOthersUntouched,
  furnishedWorld,
  later,
  unitsOf,
  writeOrigins,
} from "./program.js";
import { type Declared, ProcessKilled, Stack } from "./stack.js";
import type { FakeWorld } from "./world.js";

interface Operation {
  /** What was up before; `undefined`: nothing. */
  readonly from?: (world: FakeWorld) => Declared[];
  /** What happens behind Pulumi's back, then. */
  readonly hands?: (world: FakeWorld) => void;
  readonly to: (world: FakeWorld) => Declared[];
  /** What the snapshot holds at the end. */
  readonly moment: string;
}

const quiesce = { freeze: ": frozen", thaw: ": thawed" };

const operations: Readonly<Record<string, Operation>> = {
  "a chain is made": { to: (world) => chain(world), moment: before },
  "a chain is made with nbd-server, of a thin origin": {
    to: (world) =>
      chain(world, { snapshot: { origin: "thin1", size: undefined }, export: { server: "nbd-server" } }),
    moment: before,
  },
  "a snapshot is taken of a frozen VM": {
    to: (world) => chain(world, { snapshot: { quiesce } }).slice(0, 1),
    moment: before,
  },
  "a snapshot is grown, tagged and made writable": {
    from: (world) => chain(world),
    to: (world) => chain(world, { snapshot: { size: "24M", tags: ["a", "b"], readOnly: false } }),
    moment: before,
  },
  "a snapshot is renamed": {
    from: (world) => chain(world).slice(0, 1),
    to: (world) => chain(world, { snapshot: { name: "another" } }).slice(0, 1),
    moment: before,
  },
  "a chain is replaced by one of now": {
    from: (world) => chain(world),
    to: (world) => chain(world, { snapshot: { triggers: ["tuesday"] } }),
    moment: later,
  },
  "an overflowed snapshot is replaced": {
    from: (world) => chain(world).slice(0, 1),
    hands: (world) => {
      const volume = world.server1.lvm.find("VgVm", "vm1-snap1");
      if (volume !== undefined) volume.usedPercent = 100;
    },
    to: (world) => chain(world).slice(0, 1),
    moment: later,
  },
  "an export gets another port, other clients and another server": {
    from: (world) => chain(world, { export: { server: "qemu-nbd" } }).slice(0, 2),
    to: (world) =>
      chain(world, { export: { port: 12000, clients: ["10.0.0.0/24"], server: "nbd-server" } }).slice(0, 2),
    moment: before,
  },
  "an export gets another name": {
    from: (world) => chain(world),
    to: (world) => chain(world, { export: { exportName: "another" } }),
    moment: before,
  },
  "an attachment gets another device and block size": {
    from: (world) => chain(world),
    to: (world) => chain(world, { attachment: { device: "/dev/nbd7", blockSize: 4096 } }),
    moment: before,
  },
  "units that were stopped and edited are mended": {
    from: (world) => chain(world),
    hands: ({ server1, server2 }) => {
      server1.kill("lvm-nbd-export-vm1-1.service");
      server2.files.append("/etc/systemd/system/lvm-nbd-attach-vm1-1.service", "# edited\n");
    },
    to: (world) => chain(world),
    moment: before,
  },
  "units that were disabled are enabled": {
    from: (world) => chain(world),
    hands: (world) => {
      for (const [server, unit] of unitsOf(world)) disable(server, unit);
    },
    to: (world) => chain(world),
    moment: before,
  },
  "a chain is removed": { from: (world) => chain(world), to: () => [], moment: before },
};

/** What it leaves is what the last change left: of the looks up to the next one, it is killed at the first alone. */
const killed = "the provider is killed";

const places = { before: "before", input: "between the input and", after: "after" };

let world: FakeWorld;
let cuts = 0;

beforeEach(anew);
afterEach(() => world.close());

/** How many were made, for the log: `npm test` shows it. */
afterAll(() => console.log(`${cuts} cuts`));

async function anew(): Promise<void> {
  world = await furnishedWorld();
}

/** Brings the world to where the operation begins. */
async function begin({ from, hands }: Operation): Promise<Stack> {
  const stack = new Stack("one");
  if (from !== undefined) {
    expect((await stack.up(from(world))).errors).toEqual([]);
    writeOrigins(world);
  }
  hands?.(world);
  if (hands !== undefined) {
    await world.settle();
    expect((await stack.refresh()).errors).toEqual([]);
  }
  return stack;
}

/** Runs the operation; whatever it does not survive is what the next `up` is for. */
async function attempt(stack: Stack, program: readonly Declared[]): Promise<void> {
  try {
    await stack.up(program);
  } catch (error) {
    if (!(error instanceof ProcessKilled)) throw error;
  }
}

async function finish(stack: Stack, { from, to, moment }: Operation): Promise<void> {
  world.hooks = {};
  await world.settle();
  const report = await stack.up(to(world));
  expect(report.errors).toEqual([]);
  await expectConverged(world, [{ stack, program: to(world) }], { snapshot1: moment });
  expectOthersUntouched(world, from === undefined ? before : later);
}

/** The commands of the operation, with how many steps each has. */
async function course(
  operation: Operation,
): Promise<
  { readonly line: string; readonly steps: number; readonly changes: boolean; readonly input: boolean }[]
> {
  const own = world;
  const stack = await begin(operation);
  const first = own.commands.length;
  const sent = stack.commands.length;
  expect((await stack.up(operation.to(own))).errors).toEqual([]);
  const asked = stack.commands.slice(sent);
  return own.commands.slice(first).map(({ line, steps }) => ({
    line,
    steps,
    changes: asked.some(({ kind, argv }) => kind === "change" && line.endsWith(quoteAll(argv))),
    input: asked.some(({ stdin, argv }) => stdin !== undefined && line.endsWith(quoteAll(argv))),
  }));
}

describe.each(Object.entries(operations))("%s", (_, operation) => {
  it("without a cut", async () => {
    const stack = await begin(operation);
    await finish(stack, operation);
  });

  it("cut at every command", async () => {
    const commands = await course(operation);
    const failures: string[] = [];
    for (const [at, { steps, changes, input }] of commands.entries()) {
      // Of the looks each meets some, and over all operations each look meets all: they outnumber the changes.
      const links: readonly Moment[] = changes ? ["before", "after"] : [at % 2 === 0 ? "before" : "after"];
      const points: { readonly what: string; readonly moment: Moment }[] = [
        ...links.map((moment) => ({ what: "the link is cut", moment })),
        ...(changes || commands[at - 1]?.changes !== false
          ? [{ what: killed, moment: "after" } as const]
          : []),
        ...(input ? [{ what: "the link is cut", moment: "input" } as const] : []),
      ];
      const kinds = Object.keys(strikes);
      if (changes) {
        // Each step of a change is struck by one of them; over all operations each meets each kind of step.
        for (let step = 1; step <= steps; step++)
          points.push({ what: kinds[(step + at) % kinds.length] ?? "", moment: step });
      } else {
        const others = kinds.filter((kind) => kind !== killed);
        for (const turn of [2 * at, 2 * at + 1])
          points.push({ what: others[turn % others.length] ?? "", moment: Math.ceil(steps / 2) });
      }
      for (const { what, moment } of points) {
        await world.close();
        await anew();
        const stack = await begin(operation);
        const told = strikeAt(world, stack, at, moment, strikes[what] ?? (() => undefined));
        try {
          await attempt(stack, operation.to(world));
          expect(told.struck, "it was struck").toBe(true);
          await finish(stack, operation);
        } catch (error) {
          const command = commands[at]?.line.replaceAll(/\n[^']*/g, "...").slice(-200);
          const where = typeof moment === "number" ? `at its step ${moment}` : `${places[moment]} it`;
          failures.push(
            `${what} ${where}, command ${at} (${command}): ${error instanceof Error ? error.message : error}`,
          );
        }
        cuts += 1;
      }
    }
    expect(failures).toEqual([]);
  }, 600_000);
});
