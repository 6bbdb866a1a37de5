/** Symbolic links where this package writes, which only root can have put there: none of them is written through. */
import { afterEach, beforeEach, expect, it } from "vitest";
import { chain, furnishedWorld, ours, unitsOf } from "./program.js";
import { Stack } from "./stack.js";
import type { FakeWorld } from "./world.js";

const victim = "/root/victim";
const units = "/etc/systemd/system";

let world: FakeWorld;
let stack: Stack;
beforeEach(async () => {
  world = await furnishedWorld();
  stack = new Stack("one");
  for (const { files } of world.servers) {
    files.mkdirs("/root");
    files.write(victim, "# precious\n");
  }
});
afterEach(() => {
  for (const { files } of world.servers) expect(files.read(victim)).toBe("# precious\n");
  return world.close();
});

it("a unit that was moved away behind a link counts as edited, and is a file again after the next up", async () => {
  expect((await stack.up(chain(world))).errors).toEqual([]);
  for (const [{ files }, unit] of unitsOf(world)) {
    files.rename(`${units}/${unit}`, "/root/moved");
    files.link("/root/moved", `${units}/${unit}`);
  }
  expect((await stack.refresh()).errors).toEqual([]);
  for (const name of ["export1", "attachment1"])
    expect(stack.kept.get(name)?.state).toMatchObject({ state: "edited" });
  const moved = unitsOf(world).map(([{ files }]) => files.read("/root/moved"));
  expect((await stack.up(chain(world))).errors).toEqual([]);
  for (const [{ files }, unit] of unitsOf(world)) {
    expect(files.kind(`${units}/${unit}`, false)).toBe("file");
    expect(moved).toContain(files.read("/root/moved"));
  }
  expect((await stack.up([])).errors).toEqual([]);
  expect(world.servers.flatMap(ours)).toEqual([]);
});

it("a link to somebody's file in the place of a unit is refused, and with adopt replaced itself", async () => {
  for (const [{ files }, unit] of unitsOf(world)) files.link(victim, `${units}/${unit}`);
  const refused = await stack.up(chain(world));
  expect(refused.errors.map(String)).toContainEqual(expect.stringMatching(/FOREIGN_RESOURCE: .*export1/));
  const adopt = { adopt: true };
  expect((await stack.up(chain(world, { export: adopt, attachment: adopt }))).errors).toEqual([]);
  for (const [{ files }, unit] of unitsOf(world)) expect(files.kind(`${units}/${unit}`, false)).toBe("file");
});

it("files that are about to be written are new ones, whatever links have their names", async () => {
  for (const [{ files }, unit] of unitsOf(world)) files.link(victim, `${units}/${unit}.new`);
  const { files } = world.server2;
  for (const folder of ["modules-load.d", "udev/rules.d"]) files.mkdirs(`/etc/${folder}`);
  files.link(victim, "/etc/modules-load.d/lvm-nbd.conf.new");
  files.link(victim, "/etc/udev/rules.d/59-lvm-nbd.rules");
  expect((await stack.up(chain(world))).errors).toEqual([]);
  expect(files.kind("/etc/udev/rules.d/59-lvm-nbd.rules", false)).toBe("file");
});

it("a lock that is a link ends the run, which names it", async () => {
  for (const { files } of world.servers) files.link(victim, "/run/lvm-nbd.lock");
  const refused = await stack.up(chain(world));
  expect(String(refused.errors[0])).toMatch(/\/run\/lvm-nbd\.lock is a symbolic link/);
  for (const [{ files }, unit] of unitsOf(world))
    expect(files.kind(`${units}/${unit}`, false)).toBeUndefined();
});

it("a folder of ours that is a link ends the run, which names it and leaves nothing, and no word of more", async () => {
  const { files } = world.server1;
  files.mkdirs("/srv/victims");
  files.link("/srv/victims", "/etc/lvm-nbd");
  const refused = await stack.up(chain(world, { export: { server: "nbd-server" } }));
  expect(String(refused.errors[0])).toMatch(/\/etc\/lvm-nbd is a symbolic link/);
  expect(files.list("/srv/victims")).toEqual([]);
  expect(files.kind(`${units}/${unitsOf(world)[0]?.[1]}`, false)).toBeUndefined();
  expect(stack.warnings.join()).not.toContain("taken down");
});
