/** An export of which nobody has seen yet whom it keeps out, and what happens to the script that was to see it. */
import { afterEach, beforeEach, expect, it } from "vitest";
import { exportUnitName } from "../../provider/linux/exportUnit.js";
import { clientsProof } from "../../provider/resources/clientsProof.js";
import type { Running, Signal, Step } from "./machine.js";
import { chain, expectConverged, furnishedWorld, ours } from "./program.js";
import { type Declared, ProcessKilled, Stack } from "./stack.js";
import type { Command, FakeWorld } from "./world.js";

let world: FakeWorld;
let stack: Stack;
beforeEach(anew);
afterEach(() => world.close());

async function anew(): Promise<void> {
  world = await furnishedWorld();
  stack = new Stack("one");
}

const unit = exportUnitName("vm1-1");
const declared = (): Declared[] => chain(world).slice(0, 2);
const state = () => world.server1.systemd.units.get(unit)?.state;

function applies({ line }: Command): boolean {
  return line.includes("systemctl restart --no-block");
}

const isFiltered = ({ argv }: Step) => argv[0] === "systemd-run" && argv.includes("IPAddressDeny=any");

/** Does that once, when the export serves and somebody is about to see whom it keeps out. */
function atProof(act: () => void): { met: boolean } {
  const told = { met: false };
  world.hooks = {
    step: (command, step) => {
      if (told.met || !applies(command) || !isFiltered(step)) return;
      told.met = true;
      expect(state()).toBe("active");
      act();
    },
  };
  return told;
}

/** The provider and all that runs for it end of that signal, as far as they do. */
function end(signal: Signal): () => void {
  return () => {
    stack.kill();
    for (const process of world.server1.machine.processes.values()) process.receive(signal);
  };
}

async function isKilled(program: readonly Declared[]): Promise<void> {
  await expect(stack.up(program)).rejects.toThrow(ProcessKilled);
  world.hooks = {};
  await world.settle();
}

it("one that was cut there starts at no boot, and the next up goes on from there", async () => {
  const cut = atProof(end("KILL"));
  await isKilled(declared());
  expect(cut.met).toBe(true);
  expect(state()).toBe("active");
  world.reboot(world.server1);
  await world.settle();
  expect(state()).toBe("inactive");
  expect((await stack.up(declared())).errors).toEqual([]);
  await expectConverged(world, [{ stack, program: declared() }]);
  world.reboot(world.server1);
  await world.settle();
  expect(state()).toBe("active");
});

it("one that is stopped there serves no more", async () => {
  const stopped = atProof(end("TERM"));
  await isKilled(declared());
  expect(stopped.met).toBe(true);
  expect(state()).toBe("inactive");
  expect((await stack.up(declared())).errors).toEqual([]);
  await expectConverged(world, [{ stack, program: declared() }]);
});

const changed = () => chain(world, { export: { clients: ["10.0.0.0/24"] } }).slice(0, 2);
/** Of which is to be seen again whom it keeps out. */
const bootsAnotherKernel = () => world.server1.files.write("/proc/version", "Linux version 6.2\n");

it.each([
  ["cut", "KILL"],
  ["stopped", "TERM"],
] as const)(
  "one that was proven, is changed and %s there serves on, also after a boot",
  async (_, signal) => {
    expect((await stack.up(declared())).errors).toEqual([]);
    bootsAnotherKernel();
    const cut = atProof(end(signal));
    await isKilled(changed());
    expect(cut.met).toBe(true);
    expect(state()).toBe("active");
    world.reboot(world.server1);
    await world.settle();
    expect(state()).toBe("active");
    expect((await stack.up(changed())).errors).toEqual([]);
    await expectConverged(world, [{ stack, program: changed() }]);
  },
);

/** At each step of the change from the moment on at which its unit is another, until that was seen. */
async function enabledWhileChanged(): Promise<Set<boolean>> {
  const { files, systemd } = world.server1;
  const path = `/etc/systemd/system/${unit}`;
  const old = files.read(path);
  bootsAnotherKernel();
  const enabled = new Set<boolean>();
  world.hooks = {
    step: (command) => {
      const isSeen = files.exists(clientsProof) && files.read(clientsProof).includes("6.2");
      if (!applies(command) || files.read(path) === old || isSeen) return;
      enabled.add(systemd.isEnabled(unit));
    },
  };
  expect((await stack.up(changed())).errors).toEqual([]);
  expect(systemd.isEnabled(unit)).toBe(true);
  return enabled;
}

it("one that is changed starts at every boot meanwhile, if it was proven", async () => {
  expect((await stack.up(declared())).errors).toEqual([]);
  expect(await enabledWhileChanged()).toEqual(new Set([true]));
});

it("one that is changed starts at no boot until it was seen, if it never was", async () => {
  atProof(end("KILL"));
  await isKilled(declared());
  expect(await enabledWhileChanged()).toEqual(new Set([false]));
});

it("one that is to start at boot again, and is another by then, is looked at again", async () => {
  expect((await stack.up(declared())).errors).toEqual([]);
  const { files } = world.server1;
  const path = `/etc/systemd/system/${unit}`;
  for (const link of files.glob(`/etc/systemd/system/*.wants/${unit}`)) files.remove(link);
  await stack.refresh();
  let met = false;
  world.hooks = {
    arrived: ({ line }) => {
      if (met || !line.includes('systemctl enable --quiet "$unit"')) return true;
      met = true;
      files.write(path, files.read(path).replaceAll("10809", "10999"));
      return true;
    },
  };
  expect((await stack.up(declared())).errors).toEqual([]);
  expect(met).toBe(true);
  await expectConverged(world, [{ stack, program: declared() }]);
});

/** Steps of the removal before which the script stands still: it goes on at that one. */
const lateSteps = ["rm -f", "systemctl daemon-reload"];

it.each(
  lateSteps.flatMap((late) => [
    ["makes one", late],
    ["changes one that was proven", late],
  ]),
)(
  "a script that %s and goes on, killed at any step, until before the removal's %s leaves nothing",
  async (what, late) => {
    const isChange = what !== "makes one";
    const failures: string[] = [];
    let removals = 0;
    for (let at = 1, more = true; more; at++) {
      await world.close();
      await anew();
      more = false;
      if (isChange) expect((await stack.up(declared())).errors).toEqual([]);
      let held: Running<number>[] = [];
      const { background } = world.server1.machine;
      world.hooks = {
        step: (command, step) => {
          if (applies(command) && command.steps === at) {
            more = true;
            // Of all that runs for it only the shell of the login.
            command.process.receive("KILL");
          }
          if (!command.line.includes('end_unit "$1"')) return;
          if (step.argv[0] === "systemctl" && step.argv[1] === "disable") {
            removals += 1;
            held = [...background];
            background.clear();
          }
          if (step.argv.join(" ").startsWith(late)) for (const one of held.splice(0)) background.add(one);
        },
      };
      await stack.up(isChange ? changed() : declared());
      // Of what is new the create itself takes it away.
      if (isChange) await stack.up([]);
      world.hooks = {};
      for (const one of held) background.add(one);
      await world.settle(300);
      try {
        expect((await stack.up(declared())).errors).toEqual([]);
        await expectConverged(world, [{ stack, program: declared() }]);
        expect((await stack.up([])).errors).toEqual([]);
        await world.settle();
        expect(world.servers.flatMap(ours)).toEqual([]);
      } catch (error) {
        failures.push(`killed at step ${at}: ${error instanceof Error ? error.message : error}`);
      }
    }
    expect(failures).toEqual([]);
    expect(removals).toBeGreaterThan(20);
  },
  120_000,
);
