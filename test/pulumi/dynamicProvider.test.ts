import { describe, expect, it } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import type { Handlers } from "../../provider/core/handlers.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { toDynamicProvider } from "../../provider/pulumi/dynamicProvider.js";
import { unknownValue } from "../../provider/pulumi/unknowns.js";

const bag = { host: "server1", __provider: "code" };

/** Handlers that remember what they were given. */
function recorder(overrides: Partial<Handlers> = {}) {
  const calls: unknown[][] = [];
  const handlers: Handlers = {
    nameInput: undefined,
    id: (state) => `${state.host}/x`,
    async check(old, wanted, unknown) {
      calls.push(["check", old, wanted, [...unknown]]);
      return { inputs: { ...wanted, added: 1 }, predicted: { path: "/dev/x" }, problems: [] };
    },
    async diff(state, wanted, unknown) {
      calls.push(["diff", state, wanted, [...unknown]]);
      return { changes: [], deleteBeforeReplace: true };
    },
    async preview(state, wanted, unknown) {
      calls.push(["preview", state, wanted, [...unknown]]);
      return { state: wanted, unknown: ["uuid"] };
    },
    async find(id, finder) {
      calls.push(["find", id, finder]);
      return undefined;
    },
    async create(wanted) {
      calls.push(["create", wanted]);
      return { id: "server1/x", state: { ...wanted, uuid: "u" } };
    },
    async read(state) {
      calls.push(["read", state]);
      return { ...state, usedPercent: 3 };
    },
    async update(state, wanted) {
      calls.push(["update", state, wanted]);
      return { ...state, ...wanted };
    },
    async remove(state) {
      calls.push(["remove", state]);
    },
    ...overrides,
  };
  const warnings: string[] = [];
  const provider = toDynamicProvider(handlers, (message) => warnings.push(message));
  const method = <Name extends "check" | "diff" | "create" | "read" | "update" | "delete">(name: Name) => {
    const found = provider[name];
    if (found === undefined) throw new Error(`no ${name}`);
    return found.bind(provider) as NonNullable<typeof found>;
  };
  return { calls, method, warnings };
}

it("knows Pulumi's own word for an unknown value", async () => {
  const { unknownValue: theirs } = await import("@pulumi/pulumi/runtime/rpc.js");
  expect(unknownValue).toBe(theirs);
});

describe("check", () => {
  it("keeps unknown values, at any depth, away from the checks and puts them back", async () => {
    const { calls, method } = recorder();
    const news = {
      ...bag,
      device: unknownValue,
      clients: ["10.0.0.2", unknownValue],
      deep: { a: [{ b: unknownValue }] },
      port: 1,
    };
    const { inputs } = await method("check")({}, news);
    expect(calls).toEqual([
      ["check", undefined, { host: "server1", port: 1 }, ["device", "clients", "deep"]],
    ]);
    expect(inputs).toEqual({ ...news, added: 1, path: "/dev/x" });
  });

  it("names a problem's property in the text alone: of one that is named the engine prints the value, were it a key", async () => {
    const { method } = recorder({
      check: async () => ({
        inputs: {},
        predicted: {},
        problems: [{ property: "size", reason: "is required" }],
      }),
    });
    expect((await method("check")({}, bag)).failures).toEqual([
      { property: "", reason: "size: is required" },
    ]);
  });

  it("takes null for nothing: so a secret output that is undefined arrives", async () => {
    const { calls, method } = recorder();
    await method("check")({}, { ...bag, tls: null });
    expect(Object.keys(calls[0]?.[2] as object)).not.toContain("tls");
  });

  it("hands over the old inputs without Pulumi's own property", async () => {
    const { calls, method } = recorder();
    await method("check")({ ...bag, size: "1G" }, bag);
    expect(calls[0]?.[1]).toEqual({ host: "server1", size: "1G" });
  });
});

describe("diff", () => {
  it("of nothing is nothing, and asks for no order", async () => {
    expect(await recorder().method("diff")("id", bag, bag)).toEqual({
      changes: false,
      replaces: [],
      deleteBeforeReplace: false,
    });
  });

  it("of a state that the plugin wrote adds what a refresh and a delete need", async () => {
    const { __provider: _, ...moved } = bag;
    expect(await recorder().method("diff")("id", moved, bag)).toMatchObject({ changes: true, replaces: [] });
  });

  it("names what is replaced", async () => {
    const { method } = recorder({
      diff: async () => ({
        changes: [
          { property: "size", effect: "update" },
          { property: "origin", effect: "replace" },
        ],
        deleteBeforeReplace: true,
      }),
    });
    expect(await method("diff")("id", bag, bag)).toEqual({
      changes: true,
      replaces: ["origin"],
      deleteBeforeReplace: true,
    });
  });
});

describe("state", () => {
  it("never reaches the handlers with Pulumi's own property", async () => {
    const { calls, method } = recorder();
    await method("create")(bag);
    await method("update")("id", bag, bag);
    await method("delete")("id", bag);
    await method("read")("id", bag);
    expect(JSON.stringify(calls)).not.toContain("__provider");
  });

  it("keeps Pulumi's own property through a refresh", async () => {
    expect(await recorder().method("read")("id", bag)).toEqual({
      id: "id",
      props: { ...bag, usedPercent: 3 },
    });
  });

  it("drops a resource only with a blank id, for what is positively gone", async () => {
    expect(await recorder({ read: async () => undefined }).method("read")("id", bag)).toEqual({
      id: "",
      props: {},
    });
    const failing = recorder({ read: () => Promise.reject(new Error("unreachable")) });
    await expect(failing.method("read")("id", bag)).rejects.toThrow("unreachable");
  });

  it.each(["create", "update"] as const)(
    "a partial %s keeps id, what is there and Pulumi's own property, not what was declared and not reached",
    async (name) => {
      const fail = () =>
        Promise.reject(
          new PartialFailure("server1/x", { host: "server1", uuid: "u" }, new Error("thaw failed")),
        );
      const { method } = recorder({ create: fail, update: fail });
      const run =
        name === "create"
          ? method("create")({ ...bag, size: "1G" })
          : method("update")("id", bag, { ...bag, size: "1G" });
      const failure = await run.catch((error: unknown) => error);
      expect(failure).toMatchObject({ message: "thaw failed", id: "server1/x", reasons: ["thaw failed"] });
      expect(failure).toHaveProperty("properties", { ...bag, uuid: "u" });
    },
  );

  it("a whole failure stays as it is", async () => {
    const { method } = recorder({ create: () => Promise.reject(new Error("refused")) });
    await expect(method("create")(bag)).rejects.not.toHaveProperty("id");
  });
});

describe("a replacement that no diff asked for, which creates first", () => {
  const owned = { ...bag, owner: "o/p/s/vm1" };

  it("keeps what the create took for its own by its mark, and says so", async () => {
    const { calls, method, warnings } = recorder();
    await method("create")(owned);
    await method("delete")("server1/x", owned);
    expect(calls.map(([name]) => name)).toEqual(["create"]);
    expect(warnings).toEqual([expect.stringMatching(/^server1\/x was there already .* it is kept as it is/)]);
  });

  it.each([
    ["another place", { ...owned, host: "server2" }],
    ["another's", { ...owned, owner: "o/p/s/vm2" }],
  ])("removes what is at %s", async (_what, old) => {
    const { calls, method, warnings } = recorder();
    await method("create")(owned);
    await method("delete")("", old);
    expect(calls.map(([name]) => name)).toEqual(["create", "remove"]);
    expect(warnings).toEqual([]);
  });
});

describe("what Pulumi prints of a failure", () => {
  it("is its message, without the stack, but for what nobody has foreseen", async () => {
    const told = new LvmNbdError("HOST_UNREACHABLE", { host: "server1", message: "no answer" });
    const bug = new TypeError("x is undefined");
    for (const [failure, stack] of [
      [told, ""],
      [bug, bug.stack],
    ] as const) {
      const fail = () => Promise.reject(failure);
      const { method } = recorder({ check: fail, diff: fail, read: fail, remove: fail });
      for (const work of [
        method("check")({}, bag),
        method("diff")("id", bag, bag),
        method("read")("id", bag),
        method("delete")("id", bag),
      ])
        await expect(work).rejects.toMatchObject({ message: failure.message, stack });
    }
  });
});
