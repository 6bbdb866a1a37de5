/** Many operations at once against the same servers, their commands interleaved at every step, in many orders. */
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { isLvmNbdError } from "../../provider/core/errors.js";
import { hostCommandOf } from "../../provider/core/hostCommands.js";
import { attachUnitName } from "../../provider/linux/attachUnit.js";
import {
  before,
  chain,
  type Deployed,
  expectConverged,
  expectOthersUntouched,
  furnishedWorld,
  ours,
} from "./program.js";
import { Stack } from "./stack.js";
import type { FakeWorld } from "./world.js";

let world: FakeWorld;
beforeEach(async () => {
  world = await furnishedWorld();
});
afterEach(() => world.close());

/** Pseudo-random numbers that are the same each time (a linear congruential generator). */
function orders(seed: number): (count: number) => number {
  let state = seed;
  return (count) => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    // Its low bits repeat soon.
    return (state >>> 16) % count;
  };
}

const seeds = Array.from({ length: 3 }, (_, seed) => seed + 1);

describe.each(seeds)("in order %i", (seed) => {
  beforeEach(() => {
    world.choose = orders(seed);
  });

  it("two stacks with 33 resources are made, changed and removed at once", async () => {
    const stacks = [new Stack("one"), new Stack("two")] as const;
    const numbers = [
      [1, 2, 3, 4, 5, 6],
      [11, 12, 13, 14, 15],
    ] as const;
    const deployed = (changes: Parameters<typeof chain>[1]): Deployed[] =>
      stacks.map((stack, at) => ({
        stack,
        program: (numbers[at] ?? []).flatMap((n) => chain(world, changes, n)),
      }));
    for (const changes of [
      {},
      { snapshot: { tags: ["changed"], size: "20M" }, export: { clients: ["10.0.0.0/24"] } },
      { snapshot: { triggers: ["tuesday"], size: "20M" }, attachment: { blockSize: 4096 } },
    ]) {
      const now = deployed(changes);
      const reports = await Promise.all(now.map(({ stack, program }) => stack.up(program)));
      expect(reports.flatMap(({ errors }) => errors)).toEqual([]);
      await world.settle();
      await expectConverged(world, now);
    }
    const devices = stacks.flatMap(({ kept }) =>
      [...kept.values()].flatMap(({ state }) => (state.timeoutSeconds === undefined ? [] : [state.device])),
    );
    expect(new Set(devices).size).toBe(11);
    const removed = await Promise.all(stacks.map((stack) => stack.up([])));
    expect(removed.flatMap(({ errors }) => errors)).toEqual([]);
    expect(world.servers.flatMap(ours)).toEqual([]);
    expectOthersUntouched(world, before);
  }, 180_000);

  it("of two stacks that want the same names one gets them whole, and the other is told whose they are", async () => {
    const stacks = [new Stack("one"), new Stack("two")] as const;
    const program = chain(world);
    const reports = await Promise.all(stacks.map((stack) => stack.up(program)));
    const first = reports.findIndex(({ did }) => did.has("snapshot1"));
    const loser = stacks[1 - first];
    const [failure, ...others] = reports[1 - first]?.errors ?? [];
    expect(others).toEqual([]);
    expect(isLvmNbdError(failure, "FOREIGN_RESOURCE")).toBe(true);
    expect(String(failure)).toContain(`organization/project/${stacks[first]?.name}/snapshot1`);
    expect(loser?.kept.size).toBe(0);
    const winner = stacks[first];
    if (winner === undefined) throw new Error("nobody has won");
    await expectConverged(world, [{ stack: winner, program }]);
  });

  it.each(["NbdExport", "NbdAttachment"] as const)(
    "of two %ss of one name one is made, and the other leaves it alone",
    async (type) => {
      const base = new Stack("base");
      const whole = chain(world);
      const at = whole.findIndex((declared) => declared.type === type);
      expect((await base.up(whole.slice(0, at))).errors).toEqual([]);
      const own = whole[at];
      if (own === undefined) throw new Error("no such type");
      const given = {
        NbdExport: { device: "/dev/VgVm/vm1-snap1" },
        NbdAttachment: { uri: "nbd://10.0.0.1:10809/vm1-1" },
      };
      const stacks = [new Stack("one"), new Stack("two")] as const;
      // Exports on ports of their own: nothing but the name keeps them apart.
      const programs = stacks.map((_, index) => [
        {
          ...own,
          args: { ...own.args, ...given[type], ...(type === "NbdExport" ? { port: 10809 + index } : {}) },
        },
      ]);
      const reports = await Promise.all(stacks.map((stack, index) => stack.up(programs[index] ?? [])));
      const winners = stacks.filter((_, index) => reports[index]?.errors.length === 0);
      expect(winners).toHaveLength(1);
      const failure = reports.flatMap(({ errors }) => errors);
      expect(failure).toHaveLength(1);
      expect(isLvmNbdError(failure[0], "FOREIGN_RESOURCE")).toBe(true);
      for (const stack of winners) {
        const program = programs[stacks.indexOf(stack)] ?? [];
        expect((await stack.refresh()).errors).toEqual([]);
        expect((await stack.up(program)).did.get(own.name)).toBe("unchanged");
      }
      for (const stack of stacks) expect((await stack.up([])).errors).toEqual([]);
      expect((await base.up([])).errors).toEqual([]);
      expect(world.servers.flatMap(ours)).toEqual([]);
    },
  );
});

it("attachments that are made at once are tried with a device of their own each", async () => {
  const stack = new Stack("one");
  const numbers = [1, 2, 3, 4, 5, 6];
  expect((await stack.up(numbers.flatMap((n) => chain(world, {}, n)))).errors).toEqual([]);
  const tried = stack.commands.filter(({ argv }) => hostCommandOf(argv)?.name === "apply-attachment");
  expect(tried).toHaveLength(numbers.length);
  // Those of one that is gone are free again.
  expect((await stack.up(numbers.slice(1).flatMap((n) => chain(world, {}, n)))).errors).toEqual([]);
  expect((await stack.up(numbers.flatMap((n) => chain(world, {}, n)))).errors).toEqual([]);
  await expectConverged(world, [{ stack, program: numbers.flatMap((n) => chain(world, {}, n)) }]);
});

it("one whose removal was cut before systemd had read its units anew is made as it is declared then", async () => {
  const { systemd, machine, files } = world.server2;
  const stack = new Stack("one");
  expect((await stack.up(chain(world))).errors).toEqual([]);
  const systemctl = machine.tools.get("systemctl");
  if (systemctl === undefined) throw new Error("there is no systemctl");
  machine.tools.set("systemctl", (process) => (process.argv[1] === "daemon-reload" ? 1 : systemctl(process)));
  expect((await stack.up(chain(world).slice(0, 2))).errors).toHaveLength(1);
  machine.tools.set("systemctl", systemctl);
  systemd.clockWentBack = true;
  expect((await stack.up(chain(world, { attachment: { timeoutSeconds: 60 } }))).errors).toEqual([]);
  const unit = attachUnitName("vm1-1");
  expect(systemd.units.get(unit)?.text).toBe(files.read(`/etc/systemd/system/${unit}`));
});
