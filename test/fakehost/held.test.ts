/** What somebody uses is never cut: the models raise an error of their own if it is, whatever the provider says. */
import { afterEach, beforeEach, expect, it } from "vitest";
import { chain, disable, furnishedWorld, ours, unitsOf } from "./program.js";
import { Stack } from "./stack.js";
import type { FakeWorld } from "./world.js";

let world: FakeWorld;
let stack: Stack;
beforeEach(async () => {
  world = await furnishedWorld();
  stack = new Stack("one");
});
afterEach(() => world.close());

const messages = (errors: readonly unknown[]) => errors.map(String);

it.each([
  ["removed", () => []],
  ["given another device", () => chain(world, { attachment: { device: "/dev/nbd7" } })],
  ["given another block size", () => chain(world, { attachment: { blockSize: 4096 } })],
  ["replaced with all its chain", () => chain(world, { snapshot: { triggers: ["tuesday"] } })],
])("an attachment that is mounted is not %s, until it is unmounted", async (_, wanted) => {
  expect((await stack.up(chain(world))).errors).toEqual([]);
  const link = world.server2.nbd.links.get("nbd1");
  world.server2.nbd.mount("nbd1", true);
  const refused = await stack.up(wanted());
  expect(messages(refused.errors)[0]).toMatch(
    /DEVICE_IN_USE: .*\/dev\/nbd1 is in use: mounted at \/mnt\/nbd1/,
  );
  expect(world.server2.nbd.links.get("nbd1")).toBe(link);
  world.server2.nbd.mount("nbd1", false);
  expect((await stack.up(wanted())).errors).toEqual([]);
  await stack.up([]);
  expect(world.servers.flatMap(ours)).toEqual([]);
});

it("a chain that is in use is enabled again after somebody disabled it, and nobody is cut off", async () => {
  expect((await stack.up(chain(world))).errors).toEqual([]);
  const link = world.server2.nbd.links.get("nbd1");
  world.server2.nbd.mount("nbd1", true);
  const servers = unitsOf(world);
  const pids = () => servers.map(([{ systemd }, unit]) => systemd.units.get(unit)?.mainPid);
  const running = pids();
  for (const [server, unit] of servers) {
    disable(server, unit);
    expect(server.systemd.isEnabled(unit)).toBe(false);
  }
  expect((await stack.refresh()).errors).toEqual([]);
  const mended = await stack.up(chain(world));
  expect(mended.errors).toEqual([]);
  expect(mended.did).toEqual(
    new Map([
      ["snapshot1", "unchanged"],
      ["export1", "updated"],
      ["attachment1", "updated"],
    ]),
  );
  for (const [{ systemd }, unit] of servers) expect(systemd.isEnabled(unit)).toBe(true);
  expect(pids()).toEqual(running);
  expect(world.server2.nbd.links.get("nbd1")).toBe(link);
});

it("a device that somebody else has connected is neither taken nor cut", async () => {
  const refused = await stack.up(chain(world, { attachment: { device: "/dev/nbd0" } }));
  expect(messages(refused.errors)).toEqual([expect.stringMatching(/DEVICE_IN_USE: .*\/dev\/nbd0/)]);
  expect((await stack.up(chain(world))).errors).toEqual([]);
  expect(stack.kept.get("attachment1")?.state.device).toBe("/dev/nbd1");
  expect((await stack.up([])).errors).toEqual([]);
  expect([...world.server2.nbd.others]).toEqual(["nbd0"]);
});
