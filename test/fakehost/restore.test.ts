/** A restore, cut at every command in every way: after it one `up` has restored once, and never again. */
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { restoreTagOf } from "../../provider/core/restoreMark.js";
import { type Moment, strikeAt, strikes } from "./faults.js";
import { before, chain, furnishedWorld, later, writeOrigins } from "./program.js";
import { type Declared, ProcessKilled, Ref, Stack, type Values } from "./stack.js";
import type { FakeWorld } from "./world.js";

let world: FakeWorld;

beforeEach(anew);
afterEach(() => world.close());

async function anew(): Promise<void> {
  world = await furnishedWorld();
}

const kinds = {
  COW: { origin: "vm1", snapshot: {} },
  thin: { origin: "thin1", snapshot: { origin: "thin1", size: undefined } },
} as const;
type Kind = keyof typeof kinds;

const taken = (kind: Kind): Declared[] => chain(world, { snapshot: kinds[kind].snapshot }).slice(0, 1);
const restored = (kind: Kind, more: Values = {}): Declared => ({
  type: "LvRestore",
  name: "restore",
  args: {
    host: world.host(world.server1),
    volumeGroup: "VgVm",
    origin: kinds[kind].origin,
    snapshot: { name: new Ref("snapshot1", "name"), uuid: new Ref("snapshot1", "uuid") },
    ...more,
  },
});
const program = (kind: Kind, more: Values = {}): Declared[] => [...taken(kind), restored(kind, more)];
const lvm = () => world.server1.lvm;
const data = (kind: Kind) => lvm().find("VgVm", kinds[kind].origin)?.data;
const state = (stack: Stack) => stack.kept.get("restore")?.state;

/** A snapshot of `before`, and an origin that holds `later`. */
async function begin(kind: Kind): Promise<Stack> {
  const stack = new Stack("one");
  expect((await stack.up(taken(kind))).errors).toEqual([]);
  writeOrigins(world);
  const snapshot = lvm().find("VgVm", "vm1-snap1");
  if (snapshot !== undefined) snapshot.usedPercent = 40;
  return stack;
}

async function attempt(stack: Stack, declared: readonly Declared[]): Promise<void> {
  try {
    await stack.up(declared);
  } catch (error) {
    if (!(error instanceof ProcessKilled)) throw error;
  }
}

async function expectRestoredOnce(stack: Stack, kind: Kind): Promise<void> {
  world.hooks = {};
  await world.settle();
  expect((await stack.up(program(kind))).errors).toEqual([]);
  expect(data(kind)).toBe(before);
  expect(lvm().find("VgVm", "vm1-snap1")).toBeUndefined();
  expect(state(stack)).toMatchObject({ state: "restored", snapshotRemoved: true });
  expect(state(stack)?.restoredAt).not.toBe("");
  expect(lvm().merges).toBe(1);
  // The snapshot is taken anew, of what was written since, and nothing is restored from it.
  const origin = lvm().find("VgVm", kinds[kind].origin);
  if (origin !== undefined) origin.data = "since";
  await stack.refresh();
  expect((await stack.up(program(kind))).errors).toEqual([]);
  expect(lvm().find("VgVm", "vm1-snap1")?.data).toBe("since");
  expect(data(kind)).toBe("since");
  expect(lvm().merges).toBe(1);
  const from = stack.commands.length;
  const quiet = await stack.up(program(kind));
  expect([...quiet.did.values()]).toEqual(["unchanged", "unchanged"]);
  expect((await stack.refresh()).errors).toEqual([]);
  expect(stack.commands.slice(from).filter(({ kind: effect }) => effect === "change")).toEqual([]);
}

describe.each(["COW", "thin"] as const)("a %s snapshot is merged", (kind) => {
  it("without a cut", async () => {
    await expectRestoredOnce(await begin(kind), kind);
  });

  it("and is not again by an update of nothing, as of a stack that moves from the plugin", async () => {
    const stack = await begin(kind);
    expect((await stack.up(program(kind))).errors).toEqual([]);
    // The snapshot is gone with the merge.
    await stack.refresh();
    expect((await stack.up(program(kind))).errors).toEqual([]);
    for (const [name, kept] of stack.kept) stack.kept.set(name, { ...kept, incomplete: true });
    writeOrigins(world);
    const from = stack.commands.length;
    const { did } = await stack.up(program(kind));
    expect([...did.values()]).toEqual(["updated", "updated"]);
    expect(stack.commands.slice(from).filter(({ kind: effect }) => effect === "change")).toEqual([]);
    expect(lvm().merges).toBe(1);
    expect(data(kind)).toBe(later);
  });

  it("cut at every command", async () => {
    const course = await begin(kind);
    const first = world.commands.length;
    expect((await course.up(program(kind))).errors).toEqual([]);
    const commands = world.commands.slice(first).map(({ steps, line }) => ({ steps, line }));
    const failures: string[] = [];
    for (const [at, { steps, line }] of commands.entries()) {
      const points: { readonly what: string; readonly moment: Moment }[] = [
        { what: "the link is cut", moment: "before" },
        { what: "the link is cut", moment: "after" },
        { what: "the provider is killed", moment: "after" },
      ];
      // The script that begins the merge is struck at each of its steps in every way, any other in one.
      const kindsOfStrike = Object.keys(strikes);
      for (let step = 1; step <= steps; step++) {
        const one = kindsOfStrike[(step + at) % kindsOfStrike.length] ?? "";
        for (const what of line.includes("lvconvert") ? kindsOfStrike : [one])
          points.push({ what, moment: step });
      }
      for (const { what, moment } of points) {
        await world.close();
        await anew();
        const stack = await begin(kind);
        const told = strikeAt(world, stack, at, moment, strikes[what] ?? (() => undefined));
        try {
          await attempt(stack, program(kind));
          expect(told.struck, "it was struck").toBe(true);
          await expectRestoredOnce(stack, kind);
        } catch (error) {
          const command = line.replaceAll(/\n[^']*/g, "...").slice(-120);
          failures.push(
            `${what} at ${moment} of ${at} (${command}): ${error instanceof Error ? error.message : error}`,
          );
        }
      }
    }
    expect(failures).toEqual([]);
  }, 600_000);
});

it("does not begin where another one's image has begun to be written since it was looked at", async () => {
  const stack = await begin("COW");
  const theirs = restoreTagOf({
    ...{ generation: "0123456789ab", life: "99999999", stage: "writing", startedAt: 1000, seconds: 0 },
    ...{ thinId: 0, source: "a".repeat(64), owner: "one/p/other/r" },
  });
  world.hooks = {
    arrived: ({ line }) => {
      const origin = lvm().find("VgVm", "vm1");
      if (line.includes("lvconvert")) origin?.tags.push(theirs);
      return true;
    },
  };
  const { errors } = await stack.up(program("COW"));
  expect(errors.join("\n")).toMatch(/ORIGIN_UNSUITABLE.*HALF-WRITTEN by one\/p\/other\/r/s);
  expect(lvm().merges).toBe(0);
  expect(data("COW")).toBe(later);
  expect(lvm().find("VgVm", "vm1")?.tags).toEqual([theirs]);
});

describe("where an image has left the origin half-written, that mark", () => {
  const ours = restoreTagOf({
    ...{ generation: "0123456789ab", life: "99999999", stage: "writing", startedAt: 1000, seconds: 0 },
    ...{ thinId: 0, source: "a".repeat(64), owner: "organization/project/one/restore" },
  });
  const tags = (kind: Kind = "COW") => lvm().find("VgVm", kinds[kind].origin)?.tags ?? [];
  const half = async (kind: Kind = "COW") => {
    const stack = await begin(kind);
    tags(kind).push(ours);
    return stack;
  };

  it.each(["COW", "thin"] as const)("is gone when the %s snapshot was merged", async (kind) => {
    const stack = await half(kind);
    expect((await stack.up(program(kind))).errors).toEqual([]);
    expect(data(kind)).toBe(before);
    expect(tags(kind)).toEqual([expect.stringMatching(/:r\d+\+\d+:/)]);
  });

  it("stays where the power fails before that has begun", async () => {
    const stack = await half();
    world.hooks = {
      step: ({ server }) => {
        if (tags().length < 2) return;
        world.hooks = {};
        world.reboot(server);
        stack.kill();
      },
    };
    await attempt(stack, program("COW"));
    await world.settle();
    expect(lvm().merges).toBe(0);
    expect(tags()).toContain(ours);
    expect((await stack.up(program("COW"))).errors).toEqual([]);
    expect(data("COW")).toBe(before);
    expect(tags()).toEqual([expect.stringMatching(/:r\d+\+\d+:/)]);
  });
});

describe("a snapshot that is taken while another one's image begins to be written", () => {
  const theirs = (stage: "writing" | "restored") =>
    restoreTagOf({
      ...{ generation: "0123456789ab", life: "99999999", stage, startedAt: 1_000_000_000 },
      ...{ seconds: stage === "restored" ? 999_999_999 : 0, thinId: 0 },
      ...{ source: "a".repeat(64), owner: "one/p/other/r" },
    });
  const mark = (stage: "writing" | "restored") => {
    const origin = lvm().find("VgVm", "vm1");
    if (origin !== undefined) origin.tags = [theirs(stage)];
  };
  const isTaken = () => lvm().find("VgVm", "vm1-snap1")?.kind === "cow";
  const refused = async (stack: Stack) => {
    const { errors } = await stack.up(taken("COW"));
    expect(errors.join("\n")).toMatch(/ORIGIN_UNSUITABLE.*HALF-WRITTEN by one\/p\/other\/r/s);
  };

  it("is taken back", async () => {
    let struck = 0;
    world.hooks = {
      arrived: ({ line }) => {
        if (line.includes("lvcreate") && struck++ === 0) mark("writing");
        return true;
      },
    };
    await refused(new Stack("one"));
    expect(lvm().find("VgVm", "vm1-snap1")).toBeUndefined();
    expect(struck).toBe(1);
  });

  it.each(["writing", "restored"] as const)(
    "and whose taking was cut off before that was looked at is kept until it can be taken anew (%s)",
    async (stage) => {
      const stack = new Stack("one");
      world.hooks = {
        step: ({ server }) => {
          if (!isTaken()) return;
          world.hooks = {};
          mark(stage);
          world.reboot(server);
          stack.kill();
        },
      };
      await attempt(stack, taken("COW"));
      await world.settle();
      const half = lvm().find("VgVm", "vm1-snap1")?.uuid;
      expect(half).toBeDefined();
      if (stage === "writing") {
        // It may be of before the first byte, and all that is left of that.
        await refused(stack);
        expect(lvm().find("VgVm", "vm1-snap1")?.uuid).toBe(half);
        mark("restored");
      }
      expect((await stack.up(taken("COW"))).errors).toEqual([]);
      expect(isTaken()).toBe(true);
      expect(lvm().find("VgVm", "vm1-snap1")?.uuid).not.toBe(half);
    },
  );
});

it("a volume that another one's image has left half-written is not exported until it is restored", async () => {
  const theirs = (stage: "writing" | "restored") =>
    restoreTagOf({
      ...{ generation: "0123456789ab", life: "99999999", stage, startedAt: 1000, seconds: 0, thinId: 0 },
      ...{ source: "a".repeat(64), owner: "one/p/other/r" },
    });
  const served: Declared = {
    type: "NbdExport",
    name: "export",
    args: {
      host: world.host(world.server1),
      device: "/dev/VgVm/vm1",
      exportName: "vm1",
      listenAddress: "127.0.0.1",
    },
  };
  const stack = new Stack("one");
  const origin = lvm().find("VgVm", "vm1");
  origin?.tags.push("theirs", theirs("writing"));
  expect((await stack.up([served])).errors.join("\n")).toMatch(
    /ORIGIN_UNSUITABLE.*device: VgVm\/vm1 is HALF-WRITTEN by one\/p\/other\/r.*Nothing was touched/s,
  );
  expect(stack.commands.filter(({ kind }) => kind === "change")).toEqual([]);
  origin?.tags.splice(1, 1, theirs("restored"));
  expect((await stack.up([served])).errors).toEqual([]);
});

it("whose state is lost is found restored by the next create, and its delete leaves what another life made", async () => {
  const stack = await begin("COW");
  expect((await stack.up(program("COW"))).errors).toEqual([]);
  const lost = state(stack);
  stack.kept.delete("restore");
  await stack.refresh();
  expect((await stack.up(program("COW"))).errors).toEqual([]);
  expect(lvm().merges).toBe(1);
  expect(state(stack)?.restoreId).not.toBe(lost?.restoreId);
  expect(state(stack)?.restoredSnapshot).toBe(lost?.restoredSnapshot);
  expect(stack.warnings.join("\n")).toContain("is not restored again. Change `triggers`");
});

it("whose mark is removed is not restored again by a refresh and an up, which put it back", async () => {
  const stack = await begin("COW");
  expect((await stack.up(program("COW"))).errors).toEqual([]);
  const kept = state(stack);
  const origin = lvm().find("VgVm", "vm1");
  if (origin === undefined) throw new Error("no origin");
  const tags = [...origin.tags];
  origin.tags.length = 0;
  origin.data = "since";
  await stack.refresh();
  expect(state(stack)).toEqual({ ...kept, state: "unmarked" });
  expect((await stack.up(program("COW"))).errors).toEqual([]);
  const { startedAt, restoredSnapshot, restoreId } = kept ?? {};
  expect(state(stack)).toMatchObject({ state: "restored", startedAt, restoredSnapshot, restoreId });
  expect(lvm().find("VgVm", "vm1")?.tags).toEqual(tags);
  expect([lvm().merges, data("COW")]).toEqual([1, "since"]);
});

it("restores again from a new snapshot when its triggers change", async () => {
  const stack = await begin("COW");
  expect((await stack.up(program("COW"))).errors).toEqual([]);
  writeOrigins(world);
  await stack.refresh();
  expect((await stack.up(program("COW"))).errors).toEqual([]);
  const origin = lvm().find("VgVm", "vm1");
  if (origin !== undefined) origin.data = "spoiled";
  expect((await stack.up(program("COW", { triggers: ["again"] }))).errors).toEqual([]);
  expect(data("COW")).toBe(later);
  expect(lvm().merges).toBe(2);
  expect(lvm().find("VgVm", "vm1")?.tags.length).toBe(1);
});

it("a snapshot that was removed before its merge began is not said to be restored", async () => {
  const stack = await begin("COW");
  const isMarked = () =>
    lvm()
      .find("VgVm", "vm1")
      ?.tags.some((tag) => tag.startsWith("lvm-nbd.restore="));
  let failures = 0;
  world.hooks = {
    step: ({ server }) => {
      if (failures > 0 || !isMarked()) return;
      failures += 1;
      world.reboot(server);
      stack.kill();
    },
  };
  await attempt(stack, program("COW"));
  expect(failures).toBe(1);
  world.hooks = {};
  await world.settle();
  const snapshot = lvm().find("VgVm", "vm1-snap1");
  if (snapshot !== undefined) lvm().delete(snapshot);
  const { errors } = await stack.up([
    restored("COW", { snapshot: { name: "vm1-snap1", uuid: snapshot?.uuid } }),
  ]);
  expect(String(errors[0])).toMatch(/RESTORE_UNCERTAIN.*lvchange --deltag/s);
  expect(data("COW")).toBe(later);
  expect(lvm().merges).toBe(0);
});
