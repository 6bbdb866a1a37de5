/** How much is looked at: a refresh of many resources takes one picture of each host, which tells what looks by themselves tell. */
import { isDeepStrictEqual } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { resourceType } from "../../provider/core/registry.js";
import type { CommonState, Context } from "../../provider/core/resource.js";
import { sharingLooks } from "../../provider/core/sharedLooks.js";
import { attachUnitName } from "../../provider/linux/attachUnit.js";
import { exportUnitName } from "../../provider/linux/exportUnit.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import type { Tool } from "./machine.js";
import { chain, furnishedWorld } from "./program.js";
import type { FakeServer } from "./server.js";
import { Stack } from "./stack.js";
import type { FakeWorld } from "./world.js";

const chains = [1, 2, 3, 4, 5, 6];
let world: FakeWorld;
let stack: Stack;
beforeEach(async () => {
  world = await furnishedWorld();
  stack = new Stack("one");
  expect((await stack.up(chains.flatMap((n) => chain(world, {}, n)))).errors).toEqual([]);
});
afterEach(() => world.close());

/** What a refresh tells and keeps; the stack stays as it was. */
async function refreshed() {
  const kept = new Map(stack.kept);
  const began = world.commands.length;
  stack.warnings.length = 0;
  const { errors, did } = await stack.refresh();
  const states = [...stack.kept].map(([name, { state }]) => [name, state]);
  stack.kept.clear();
  for (const [name, one] of kept) stack.kept.set(name, one);
  const commands = world.commands.slice(began);
  const on = (server: FakeServer) => commands.filter((command) => command.server === server).length;
  const told = { errors, did: Object.fromEntries(did), states, warnings: [...stack.warnings].sort() };
  return { told, commands: world.servers.map(on) };
}

/** Somebody else's hands, on several chains at once. */
const hands: Readonly<Record<string, () => void>> = {
  nobody: () => undefined,
  "who kills": () => {
    world.server1.kill(exportUnitName("vm1-1"));
    world.server2.kill(attachUnitName("vm1-2"));
  },
  "who edits and removes units": () => {
    world.server2.files.append(`/etc/systemd/system/${attachUnitName("vm1-1")}`, "# edited\n");
    world.server1.files.remove(`/etc/systemd/system/${exportUnitName("vm1-2")}`);
    world.server1.files.remove(`/etc/systemd/system/multi-user.target.wants/${exportUnitName("vm1-3")}`);
  },
  "who removes all of a chain": () => {
    for (const [server, unit] of [
      [world.server1, exportUnitName("vm1-4")],
      [world.server2, attachUnitName("vm1-4")],
    ] as const) {
      server.kill(unit);
      server.files.remove(`/etc/systemd/system/${unit}`);
      server.files.remove(`/etc/systemd/system/multi-user.target.wants/${unit}`);
      server.reboot();
    }
  },
  "who fills and renames snapshots": () => {
    const [first, second] = world.server1.lvm
      .all()
      .flatMap(({ volume }) => (volume.origin === undefined ? [] : [volume]));
    if (first === undefined || second === undefined) throw new Error("there are no snapshots");
    first.usedPercent = 100;
    world.server1.lvm.rename("VgVm", second, "elsewhere");
  },
};

it.each(Object.entries(hands))("after %s", async (_who, acts) => {
  acts();
  await world.settle();
  for (const { systemd } of world.servers) systemd.lists = false;
  const alone = await refreshed();
  for (const { systemd } of world.servers) systemd.lists = true;
  const pictured = await refreshed();
  expect(pictured.told).toEqual(alone.told);
  // Which machine it is, and the picture.
  expect(pictured.commands).toEqual([2, 2]);
  expect(alone.commands[0]).toBeGreaterThan(chains.length);
});

/** What the looks of who is to change something tell of all units, taken at once or one after the other; and how many commands they were. */
async function looked(atOnce: boolean, forRemoval: boolean) {
  const pool = createHostPool();
  const units = [...stack.kept.values()].flatMap(({ declared: { type }, state }) =>
    type === "LvSnapshot" ? [] : [{ type, state: state as unknown as CommonState }],
  );
  const began = world.commands.length;
  const look = async ({ type, state }: (typeof units)[number]): Promise<unknown> => {
    const warnings: string[] = [];
    const context: Context = {
      ...{ host: sharingLooks(await pool.get(state.host, stack.hosts)), resource: type, forRemoval },
      ...{ signal: new AbortController().signal, progress: () => undefined, namedHosts: stack.hosts },
      ...{ warn: (line: string) => warnings.push(line), open: () => Promise.reject(new Error("not asked")) },
    };
    const { observe, isSame, toState, drift } = resourceType(type);
    try {
      const seen = await observe(context, state);
      return seen && [isSame(seen, state), toState(state, seen), drift(state, seen)];
    } catch (error) {
      return String(error);
    }
  };
  const told: unknown[] = [];
  if (atOnce) told.push(...(await Promise.all(units.map(look))));
  else for (const unit of units) told.push(await look(unit));
  pool.close();
  return { told, commands: world.commands.length - began };
}

describe.each([false, true])("to be removed: %s", (forRemoval) => {
  it.each(Object.entries(hands))(
    "looks that go together tell what each alone tells, after %s",
    async (_who, acts) => {
      acts();
      await world.settle();
      const alone = await looked(false, forRemoval);
      const together = await looked(true, forRemoval);
      expect(together.told).toEqual(alone.told);
      expect(alone.commands).toBe(2 * chains.length);
      expect(together.commands).toBe(world.servers.length);
    },
  );
});

it("what the picture does not tell is looked at by itself", async () => {
  const before = (await refreshed()).told;
  const { machine } = world.server1;
  const lvs = machine.tools.get("lvs");
  if (lvs === undefined) throw new Error("there is no lvs");
  let failures = 0;
  machine.tools.set("lvs", (process) => (failures++ === 0 ? 5 : lvs(process)));
  const { told, commands } = await refreshed();
  expect(isDeepStrictEqual(told, before)).toBe(true);
  expect([failures, commands]).toEqual([2, [3, 2]]);
});

it("what is looked at to be removed is not read", async () => {
  const programs = new Map<string, number>();
  world.hooks = {
    step: (_command, { argv: [program = ""] }) => programs.set(program, (programs.get(program) ?? 0) + 1),
  };
  const reads = () => ["nbdinfo", "nbdcopy", "dd"].map((program) => programs.get(program) ?? 0);
  expect((await stack.refresh()).errors).toEqual([]);
  expect(reads().every((count) => count >= chains.length)).toBe(true);
  programs.clear();
  expect((await stack.up([])).errors).toEqual([]);
  expect(programs.get("systemctl")).toBeGreaterThan(chains.length);
  expect(reads()).toEqual([0, 0, 0]);
});

/** The first of those that the picture asks tells nothing. */
const silent: Readonly<Record<string, (server: FakeServer) => void>> = {
  "sort that is killed": ({ machine }) => failFirst(machine.tools, "sort"),
  "cut that is killed": ({ machine }) => failFirst(machine.tools, "cut"),
  "base64 that is killed": ({ machine }) => failFirst(machine.tools, "base64"),
  "systemctl that lists nothing": ({ systemd }) => {
    systemd.lists = "nothing";
  },
  "systemctl that lists in another way": ({ systemd }) => {
    systemd.lists = "with bullets";
  },
};

function failFirst(tools: Map<string, Tool>, name: string): void {
  const tool = tools.get(name);
  if (tool === undefined) throw new Error(`there is no ${name}`);
  tools.set(name, () => {
    tools.set(name, tool);
    return 137;
  });
}

it.each(Object.entries(silent))("a picture by a %s takes nothing for gone", async (_what, spoil) => {
  // It runs all the same.
  world.server2.files.remove(`/etc/systemd/system/${attachUnitName("vm1-2")}`);
  for (const { systemd } of world.servers) systemd.lists = false;
  const alone = await refreshed();
  for (const server of world.servers) {
    server.systemd.lists = true;
    spoil(server);
  }
  expect((await refreshed()).told).toEqual(alone.told);
});
