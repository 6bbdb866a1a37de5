import { afterEach, describe, expect, it, vi } from "vitest";
import { z } from "zod";
import { type ErrorCode, LvmNbdError } from "../../provider/core/errors.js";
import { ownerMark } from "../../provider/core/owner.js";
import { converge, PartialSuccess, refresh, remove } from "../../provider/core/reconciler.js";
import {
  ChangedMeanwhile,
  type CommonInputs,
  type CommonState,
  type Context,
  type ResourceType,
} from "../../provider/core/resource.js";

interface Thing {
  mark: string | undefined;
  id: number;
  right: boolean;
}
type State = CommonState & { id?: number; right?: boolean };

const wanted: CommonInputs = { host: "server1", owner: "o/p/s/vm1", adopt: false };
const mine = ownerMark(wanted.owner);
const [here, elsewhere] = ["a".repeat(32), "b".repeat(32)];

/** A world of at most one thing, whose operations can fail on demand. */
function scene(
  thing: Thing | undefined,
  failures: Partial<Record<"observe" | "create" | "converge" | "remove", (Error | undefined)[]>> = {},
) {
  const world = {
    thing,
    log: [] as string[],
    warnings: [] as string[],
    keepAfterRemove: false,
    machineId: here as string | undefined,
  };
  const step = (name: keyof typeof failures, effect: () => void, effectBeforeFailure = false) => {
    world.log.push(name);
    const failure = failures[name]?.shift();
    if (failure === undefined || effectBeforeFailure) effect();
    if (failure !== undefined) throw failure;
  };
  const type: ResourceType<CommonInputs, State, Thing> = {
    type: "Thing",
    description: "",
    example: {},
    inputs: z.object({}),
    outputs: z.object({}),
    nameInput: "owner",
    validate: () => [],
    predict: () => ({}),
    id: () => "server1/thing",
    async observe() {
      step("observe", () => undefined);
      return world.thing === undefined ? undefined : { ...world.thing };
    },
    isSame: (seen, state) => seen.id === state.id,
    toState: (declared, seen) => ({ ...declared, id: seen.id, right: seen.right }),
    diff: () => [],
    byId: { reason: "it is one of a test", advice: "Leave it." },
    collides: () => true,
    async create() {
      step(
        "create",
        () => {
          world.thing = { mark: mine, id: 1, right: true };
        },
        true,
      );
    },
    async converge() {
      step("converge", () => {
        if (world.thing) Object.assign(world.thing, { right: true, mark: mine });
      });
    },
    async remove() {
      step(
        "remove",
        () => {
          if (!world.keepAfterRemove) world.thing = undefined;
        },
        true,
      );
    },
    drift: (state, seen) => (state.right === seen.right ? [] : ["is wrong"]),
  };
  const context: Context = {
    host: {
      name: "server1",
      machineId: async () => world.machineId,
      run: async () => ({ exitCode: 0, stdout: "", stderr: "" }),
    },
    resource: "Thing vm1",
    signal: new AbortController().signal,
    progress: () => undefined,
    open: () => Promise.reject(new Error("no other host is named")),
    warn: (message) => world.warnings.push(message),
  };
  return { world, type, context };
}

const lost = () => new LvmNbdError("LINK_LOST", { message: "lost" });
const fail = (code: ErrorCode) => new LvmNbdError(code, { message: "failed" });

const changed = () => new ChangedMeanwhile(fail("FOREIGN_RESOURCE"));

describe("a cancelled converge", () => {
  it("keeps what was made already, and says that the next up goes on from there", async () => {
    const { world, type, context } = scene(undefined, { create: [fail("CANCELLED")] });
    const failure = await converge(type, context, wanted, undefined).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(PartialSuccess);
    expect(world.warnings).toEqual([
      expect.stringMatching(/cancelled; it is on the host.*next `pulumi up` goes on/),
    ]);
  });

  it("that had made nothing says so", async () => {
    const { world, type, context } = scene(undefined);
    type.create = async () => {
      throw fail("CANCELLED");
    };
    await expect(converge(type, context, wanted, undefined)).rejects.toThrow(/CANCELLED/);
    expect(world.warnings).toEqual([expect.stringMatching(/cancelled; nothing of it/)]);
  });

  it("whose host does not answer any more says nothing about what is there", async () => {
    const { world, type, context } = scene(undefined, {
      observe: [undefined, fail("HOST_UNREACHABLE")],
      create: [fail("CANCELLED")],
    });
    await expect(converge(type, context, wanted, undefined)).rejects.toThrow(/CANCELLED/);
    expect(world.warnings).toEqual([expect.stringMatching(/could not be looked at/)]);
  });

  it("looks at what is left although its signal is aborted", async () => {
    const { type, context } = scene(undefined, { create: [fail("CANCELLED")] });
    const signals: boolean[] = [];
    const { observe } = type;
    type.observe = async (own, declared) => {
      signals.push(own.signal.aborted);
      return observe(own, declared);
    };
    const failure = await converge(
      type,
      { ...context, signal: AbortSignal.abort() },
      wanted,
      undefined,
    ).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(PartialSuccess);
    expect(signals).toEqual([true, false]);
  });
});

describe("somebody who comes in between", () => {
  it("is looked at again, and the work goes on from what is there", async () => {
    const { world, type, context } = scene(undefined, { create: [changed()] });
    await converge(type, context, wanted, undefined);
    expect(world.log).toEqual(["observe", "create", "observe", "converge", "observe"]);
  });

  it("again and again is an error in the end, that of the refusal", async () => {
    const { type, context } = scene(
      { mark: mine, id: 1, right: false },
      { converge: Array.from({ length: 9 }, changed) },
    );
    await expect(converge(type, context, wanted, undefined)).rejects.toThrow(/FOREIGN_RESOURCE/);
  });
});

describe("converge", () => {
  it("makes what is absent and returns what is then there", async () => {
    const { world, type, context } = scene(undefined);
    expect(await converge(type, context, wanted, undefined)).toEqual({
      ...wanted,
      ...{ id: 1, right: true, machineId: here },
    });
    expect(world.log).toEqual(["observe", "create", "observe"]);
  });

  it("mends what is its own", async () => {
    const { world, type, context } = scene({ mark: mine, id: 7, right: false });
    expect(await converge(type, context, wanted, undefined)).toEqual({
      ...wanted,
      ...{ id: 7, right: true, machineId: here },
    });
    expect(world.log).toEqual(["observe", "converge", "observe"]);
  });

  it("refuses another owner's, with the owner named, whatever adopt says", async () => {
    for (const adopt of [false, true]) {
      const { world, type, context } = scene({ mark: ownerMark("o/p/s/other"), id: 7, right: false });
      await expect(converge(type, context, { ...wanted, adopt }, undefined)).rejects.toThrow(
        /FOREIGN_RESOURCE.*o\/p\/s\/other/s,
      );
      expect(world.log).toEqual(["observe"]);
    }
  });

  it("refuses an unmarked one, and takes it over with adopt", async () => {
    const { type, context } = scene({ mark: undefined, id: 7, right: false });
    await expect(converge(type, context, wanted, undefined)).rejects.toThrow(
      /FOREIGN_RESOURCE.*adopt: true/s,
    );
    const second = scene({ mark: undefined, id: 7, right: false });
    await converge(second.type, second.context, { ...wanted, adopt: true }, undefined);
    expect(second.world.thing).toEqual({ mark: mine, id: 7, right: true });
  });

  it("knows its own by identity though somebody took the mark away", async () => {
    const { type, context } = scene({ mark: undefined, id: 7, right: false });
    const old: State = { ...wanted, id: 7 };
    expect(await converge(type, context, wanted, old)).toMatchObject({ right: true });
  });

  it("knows its own after the resource was renamed in the program", async () => {
    const { type, context } = scene({ mark: ownerMark("o/p/s/old"), id: 7, right: false });
    expect(await converge(type, context, wanted, { ...wanted, owner: "o/p/s/old" })).toMatchObject({
      right: true,
    });
  });

  it("looks and goes on when the link is lost after the change took effect, and does not repeat it", async () => {
    const { world, type, context } = scene(undefined, { create: [lost()] });
    expect(await converge(type, context, wanted, undefined)).toMatchObject({ id: 1 });
    expect(world.log).toEqual(["observe", "create", "observe", "converge", "observe"]);
  });

  it("gives up after a bounded number of lost links and keeps what was made in the state", async () => {
    const { world, type, context } = scene(undefined, {
      create: [lost()],
      converge: [lost(), lost(), lost()],
    });
    const failure = await converge(type, context, wanted, undefined).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(PartialSuccess);
    expect(failure).toMatchObject({ state: { id: 1 }, cause: { code: "LINK_LOST" } });
    expect(world.log.filter((entry) => entry === "converge")).toHaveLength(3);
  });

  it("keeps what a failed change left, so that nothing of ours is forgotten", async () => {
    const { type, context } = scene(undefined, { create: [fail("THAW_FAILED")] });
    await expect(converge(type, context, wanted, undefined)).rejects.toMatchObject({
      state: { id: 1 },
      cause: { code: "THAW_FAILED" },
    });
  });

  it("shows the first failure when what it left cannot be looked at", async () => {
    const { world, type, context } = scene(
      { mark: mine, id: 7, right: false },
      {
        converge: [fail("COMMAND_FAILED")],
        observe: [undefined, fail("HOST_UNREACHABLE")],
      },
    );
    await expect(converge(type, context, wanted, undefined)).rejects.toMatchObject({
      code: "COMMAND_FAILED",
    });
    expect(world.warnings).toEqual([expect.stringContaining("HOST_UNREACHABLE")]);
  });

  it("does not wait a second time for a host that could not be looked at", async () => {
    for (const old of [undefined, { ...wanted, id: 7 }]) {
      const { world, type, context } = scene(
        { mark: mine, id: 7, right: false },
        { observe: [fail("HOST_UNREACHABLE")] },
      );
      await expect(converge(type, context, wanted, old)).rejects.toMatchObject({ code: "HOST_UNREACHABLE" });
      expect(world.log).toEqual(["observe"]);
      expect(world.warnings).toEqual([]);
    }
  });

  it("does not say that nothing was changed when the host is gone after a lost link", async () => {
    const gone = () => ({ observe: [undefined, fail("HOST_UNREACHABLE")] });
    const made = scene(undefined, { ...gone(), create: [lost()] });
    await expect(converge(made.type, made.context, wanted, undefined)).rejects.toMatchObject({
      code: "LINK_LOST",
    });
    expect(made.world.log).toEqual(["observe", "create", "observe"]);
    const removed = scene({ mark: mine, id: 7, right: true }, { ...gone(), remove: [lost()] });
    await expect(remove(removed.type, removed.context, { ...wanted, id: 7 } as State)).rejects.toMatchObject({
      code: "LINK_LOST",
    });
  });

  it("does not put a foreign thing into the state after a refusal", async () => {
    const { type, context } = scene({ mark: ownerMark("o/p/s/other"), id: 7, right: false });
    await expect(converge(type, context, wanted, undefined)).rejects.not.toBeInstanceOf(PartialSuccess);
  });

  it("does not report for its own what another resource of the same name made in the meantime", async () => {
    const { world, type, context } = scene(undefined);
    const late = {
      ...type,
      create: async () => {
        world.thing = { mark: ownerMark("o/p/s/other"), id: 9, right: true };
      },
    };
    await expect(converge(late, context, wanted, undefined)).rejects.toThrow(
      /FOREIGN_RESOURCE.*o\/p\/s\/other/s,
    );
  });

  it("tells when what was made is gone a moment later", async () => {
    const { world, type, context } = scene(undefined);
    const quiet = {
      ...type,
      create: async () => {
        world.log.push("create");
      },
    };
    await expect(converge(quiet, context, wanted, undefined)).rejects.toThrow(
      /IDENTITY_MISMATCH.*gone again/s,
    );
  });
});

describe("refresh", () => {
  const state: State = { ...wanted, id: 7, right: true };

  it("returns what is there and names what drifted", async () => {
    const { world, type, context } = scene({ mark: mine, id: 7, right: false });
    expect(await refresh(type, context, state)).toMatchObject({ right: false });
    expect(world.warnings).toEqual(["is wrong"]);
  });

  it("says gone only of what is positively absent", async () => {
    const gone = scene(undefined);
    expect(await refresh(gone.type, gone.context, state)).toBeUndefined();
    const unreachable = scene(undefined, { observe: [fail("HOST_UNREACHABLE")] });
    await expect(refresh(unreachable.type, unreachable.context, state)).rejects.toMatchObject({
      code: "HOST_UNREACHABLE",
    });
  });

  it("takes a foreign thing of the same name for the absence of ours, and says so", async () => {
    const { world, type, context } = scene({ mark: ownerMark("o/p/s/other"), id: 8, right: true });
    expect(await refresh(type, context, state)).toBeUndefined();
    expect(world.warnings).toEqual([expect.stringMatching(/o\/p\/s\/other.*left alone/)]);
  });
});

describe("remove", () => {
  const state: State = { ...wanted, id: 7, right: true };

  it("removes its own and sees that it is gone", async () => {
    const { world, type, context } = scene({ mark: mine, id: 7, right: true });
    await remove(type, context, state);
    expect(world.log).toEqual(["observe", "remove", "observe"]);
  });

  it("is done where nothing is, and leaves a foreign thing alone", async () => {
    const absent = scene(undefined);
    await remove(absent.type, absent.context, state);
    expect(absent.world.log).toEqual(["observe"]);
    const foreign = scene({ mark: undefined, id: 8, right: true });
    await remove(foreign.type, foreign.context, state);
    expect(foreign.world.log).toEqual(["observe"]);
    expect(foreign.world.warnings).toEqual([expect.stringContaining("left alone")]);
  });

  it("goes on after a lost link and does not remove twice", async () => {
    const { world, type, context } = scene({ mark: mine, id: 7, right: true }, { remove: [lost()] });
    await remove(type, context, state);
    expect(world.log).toEqual(["observe", "remove", "observe"]);
  });

  it("never takes cannot-tell for gone", async () => {
    const { type, context } = scene(
      { mark: mine, id: 7, right: true },
      { observe: [undefined, fail("COMMAND_TIMED_OUT")] },
    );
    await expect(remove(type, context, state)).rejects.toMatchObject({ code: "COMMAND_TIMED_OUT" });
  });

  it("fails when it is still there afterwards", async () => {
    const { world, type, context } = scene({ mark: mine, id: 7, right: true });
    world.keepAfterRemove = true;
    await expect(remove(type, context, state)).rejects.toThrow(/still there/);
  });
});

describe("the machine that a host's name leads to", () => {
  const thing = (): Thing => ({ mark: mine, id: 7, right: false });
  const state: State = { ...wanted, id: 7, right: true, machineId: here };
  /** Nothing there, something else, and a clone, which has our marks and UUIDs. */
  const sights: [what: string, thing: Thing | undefined][] = [
    ["nothing of that name is", undefined],
    ["something else of that name is", { mark: undefined, id: 9, right: true }],
    ["a clone of it is", thing()],
  ];

  afterEach(() => vi.unstubAllEnvs());

  describe.each(sights)("if it is another one, where %s,", (_what, there) => {
    it.each(["refresh", "update", "remove"] as const)(
      "is told by a %s, before anything is looked at",
      async (operation) => {
        const { world, type, context } = scene(there && { ...there });
        world.machineId = elsewhere;
        const run = {
          refresh: () => refresh(type, context, state),
          update: () => converge(type, context, wanted, state),
          remove: () => remove(type, context, state),
        }[operation];
        const failure: unknown = await run().catch((error: unknown) => error);
        expect(failure).toMatchObject({ code: "HOST_CHANGED" });
        expect(failure).toMatchObject({
          message: expect.stringMatching(
            new RegExp(
              `\`server1\` is another machine than the one Thing vm1 was made on \\(machine-id ${here}, now ${elsewhere}\\)[^]*LVM_NBD_ACCEPT_MACHINE=${elsewhere} pulumi refresh`,
            ),
          ),
        });
        expect(world).toMatchObject({ log: [], warnings: [], thing: there });
      },
    );
  });

  it("is another one when a link that was lost in the middle of a look leads elsewhere: what was seen counts for nothing", async () => {
    for (const run of [refresh, remove]) {
      const { world, type, context } = scene(undefined);
      type.observe = async () => {
        world.machineId = elsewhere;
        return undefined;
      };
      await expect(run(type, context, state)).rejects.toMatchObject({ code: "HOST_CHANGED" });
      expect(world.warnings).toEqual([]);
    }
  });

  it("that becomes another one while something is made is an error, and the state has nothing of it", async () => {
    const { world, type, context } = scene(undefined);
    const { create } = type;
    type.create = async (...given) => {
      await create(...given);
      world.machineId = elsewhere;
    };
    const failure: unknown = await converge(type, context, wanted, undefined).catch(
      (error: unknown) => error,
    );
    expect(failure).toMatchObject({ code: "HOST_CHANGED" });
    expect(failure).not.toBeInstanceOf(PartialSuccess);
  });

  it("is taken over in silence by a refresh and an update of a state that has none yet", async () => {
    const { machineId: _, ...earlier } = state;
    const { world, type, context } = scene({ ...thing(), right: true });
    expect(await refresh(type, context, earlier)).toEqual(state);
    expect(await converge(type, context, wanted, earlier)).toEqual(state);
    expect(world.warnings).toEqual([]);
    await remove(type, context, earlier);
    expect(world.thing).toBeUndefined();
  });

  it("is kept with what a failed create left", async () => {
    const { type, context } = scene(undefined, { create: [fail("THAW_FAILED")] });
    await expect(converge(type, context, wanted, undefined)).rejects.toMatchObject({
      state: { id: 1, machineId: here },
    });
  });

  it("that is accepted by its own id, among others, is the one from then on", async () => {
    vi.stubEnv("LVM_NBD_ACCEPT_MACHINE", `${"c".repeat(32)},${elsewhere}`);
    const { world, type, context } = scene(thing());
    world.machineId = elsewhere;
    expect(await refresh(type, context, state)).toMatchObject({ id: 7, machineId: elsewhere });
    expect(await converge(type, context, wanted, state)).toMatchObject({ machineId: elsewhere });
    world.thing = undefined;
    expect(await refresh(type, context, state)).toBeUndefined();
  });

  it.each(["", here, "b".repeat(31), "yes"])("is not accepted by %j", async (accepted) => {
    vi.stubEnv("LVM_NBD_ACCEPT_MACHINE", accepted);
    const { world, type, context } = scene(thing());
    world.machineId = elsewhere;
    await expect(refresh(type, context, state)).rejects.toMatchObject({ code: "HOST_CHANGED" });
  });

  it("that does not tell which one it is leaves what a refresh finds by its identity as it is", async () => {
    const { world, type, context } = scene(thing());
    world.machineId = undefined;
    expect(await refresh(type, context, state)).toEqual({ ...state, right: false });
  });

  it.each<[string, Thing | undefined]>([
    ["nothing", undefined],
    ["another thing", { mark: mine, id: 9, right: true }],
  ])("that does not tell it, and where a refresh finds %s, cannot be told", async (_what, there) => {
    const { world, type, context } = scene(there);
    world.machineId = undefined;
    await expect(refresh(type, context, state)).rejects.toThrow(
      new RegExp(`HOST_CHANGED[^]*cannot be told[^]*write \`${here}\` back`),
    );
    expect(world.warnings).toEqual([]);
  });

  it("that does not tell it has nothing changed or removed", async () => {
    const { world, type, context } = scene(thing());
    world.machineId = undefined;
    await expect(converge(type, context, wanted, state)).rejects.toMatchObject({ code: "HOST_CHANGED" });
    await expect(remove(type, context, state)).rejects.toMatchObject({ code: "HOST_CHANGED" });
    expect(world.log).toEqual(["observe", "observe"]);
  });

  it("that never told it is as good as it was", async () => {
    const { machineId: _, ...earlier } = state;
    const { world, type, context } = scene(thing());
    world.machineId = undefined;
    expect(await converge(type, context, wanted, earlier)).toMatchObject({ right: true });
    expect(await refresh(type, context, earlier)).toEqual({ ...state, machineId: undefined });
    await remove(type, context, earlier);
    expect(world.thing).toBeUndefined();
  });
});
