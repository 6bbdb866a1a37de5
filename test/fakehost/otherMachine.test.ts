/** A host's name that comes to lead to another machine: nothing is gone, and nothing there is ours, whatever it looks like. */
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { chain, furnishedWorld, ours } from "./program.js";
import { Stack } from "./stack.js";
import type { FakeWorld } from "./world.js";

let world: FakeWorld;
let stack: Stack;
beforeEach(async () => {
  world = await furnishedWorld();
  stack = new Stack("one");
  stack.hosts.set("server1", world.host(world.server1));
  expect((await stack.up(snapshot())).errors).toEqual([]);
});
afterEach(() => {
  vi.unstubAllEnvs();
  return world.close();
});

const snapshot = (size = "16M") => chain(world, { snapshot: { host: "server1", size } }).slice(0, 1);
const idOf = (n: 0 | 1) => world.servers[n].files.read("/etc/machine-id").trim();
const made = (n: 0 | 1) => world.servers[n].lvm.find("VgVm", "vm1-snap1");

/** The second server has what a clone of the first one's disk would show: name, marks and UUID. */
async function clone(): Promise<void> {
  const other = new Stack("one");
  other.hosts.set("server1", world.host(world.server2));
  expect((await other.up(snapshot())).errors).toEqual([]);
  const [original, copy] = [made(0), made(1)];
  if (original === undefined || copy === undefined) throw new Error("there is nothing to clone");
  Object.assign(copy, { uuid: original.uuid, tags: [...original.tags] });
}

it("each resource keeps the machine of its own host", async () => {
  const all = new Stack("two");
  expect((await all.up(chain(world, {}, 2))).errors).toEqual([]);
  expect([...all.kept.values()].map(({ state }) => state.machineId)).toEqual([idOf(0), idOf(0), idOf(1)]);
  expect(idOf(0)).not.toBe(idOf(1));
});

describe.each([
  ["nothing of ours is", async () => undefined],
  ["a clone is", clone],
])("a name that leads to a machine where %s", (_what, prepare) => {
  beforeEach(async () => {
    await prepare();
    stack.hosts.set("server1", world.host(world.server2));
  });

  it.each<[what: string, run: () => ReturnType<Stack["up"]>]>([
    ["refresh", () => stack.refresh()],
    ["change", () => stack.up(snapshot("24M"))],
    ["removal", () => stack.up([])],
  ])("ends a %s, and both machines and the state stay as they are", async (_operation, run) => {
    const before = [stack.kept.get("snapshot1")?.state, ...world.servers.map(ours), made(1)?.sizeBytes];
    const { errors } = await run();
    expect(errors).toMatchObject([{ code: "HOST_CHANGED" }]);
    expect([stack.kept.get("snapshot1")?.state, ...world.servers.map(ours), made(1)?.sizeBytes]).toEqual(
      before,
    );
    stack.hosts.set("server1", world.host(world.server1));
    expect((await stack.up([])).errors).toEqual([]);
    expect(made(0)).toBeUndefined();
  });
});

it("a machine whose id was changed is refused until it is accepted, and then as good as before", async () => {
  const id = "d".repeat(32);
  world.server1.files.write("/etc/machine-id", `${id}\n`);
  expect((await stack.refresh()).errors).toMatchObject([{ code: "HOST_CHANGED" }]);
  vi.stubEnv("LVM_NBD_ACCEPT_MACHINE", id);
  expect(await stack.refresh()).toMatchObject({ errors: [] });
  vi.unstubAllEnvs();
  expect(stack.kept.get("snapshot1")?.state.machineId).toBe(id);
  expect(await stack.up(snapshot("24M"))).toMatchObject({ errors: [] });
});

it("a machine that was reinstalled and is accepted gets made anew what it had", async () => {
  stack.hosts.set("server1", world.host(world.server2));
  vi.stubEnv("LVM_NBD_ACCEPT_MACHINE", idOf(1));
  expect((await stack.refresh()).did).toEqual(new Map([["snapshot1", "gone"]]));
  vi.unstubAllEnvs();
  expect((await stack.up(snapshot())).errors).toEqual([]);
  expect(made(1)).toBeDefined();
});

it("another machine that is declared is asked for the new one, and the old one for the removal", async () => {
  stack.hosts.set("server2", world.host(world.server2));
  const moved = chain(world, { snapshot: { host: "server2" } }).slice(0, 1);
  expect((await stack.up(moved)).errors).toEqual([]);
  expect(world.servers.map((_, n) => made(n === 0 ? 0 : 1) !== undefined)).toEqual([false, true]);
  expect(stack.kept.get("snapshot1")?.state.machineId).toBe(idOf(1));
});

it("a state of before there were ids takes the machine over without a word, and has no diff for it", async () => {
  const kept = stack.kept.get("snapshot1");
  if (kept === undefined) throw new Error("nothing is in the state");
  const { machineId: _, ...earlier } = kept.state;
  stack.kept.set("snapshot1", { ...kept, state: earlier });
  expect((await stack.up(snapshot())).did).toEqual(new Map([["snapshot1", "unchanged"]]));
  expect(await stack.refresh()).toMatchObject({ errors: [] });
  expect(stack.warnings).toEqual([]);
  expect(stack.kept.get("snapshot1")?.state.machineId).toBe(idOf(0));
});
