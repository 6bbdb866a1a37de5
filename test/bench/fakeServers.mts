/**
 * The fake host as a process of its own, so that a bench measures the provider alone. Arguments: the compiled module, and how many
 * origins `vmN` there are, a hundred in each group `VgVmN`. Prints, as JSON, the `host` by which a resource names it; ends with its stdin.
 */
import { createRequire } from "node:module";
import type { FakeWorld } from "../fakehost/world.js";

const [compiled = "", origins] = process.argv.slice(2);
const made: { FakeWorld: typeof FakeWorld } = createRequire(import.meta.url)(compiled);

const world = new made.FakeWorld();
const { lvm } = world.server1;
for (let n = 0; n < Number(origins); n++) {
  const group = `VgVm${Math.floor(n / 100)}`;
  if (n % 100 === 0) lvm.addGroup(group, 100_000);
  lvm.addVolume(group, `vm${n}`, 64 * 1024 ** 2, "");
}
await world.open();
process.stdout.write(`${JSON.stringify(world.host(world.server1))}\n`);
process.stdin.on("close", () => process.exit()).resume();
