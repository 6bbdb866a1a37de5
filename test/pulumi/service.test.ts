import * as grpc from "@grpc/grpc-js";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import type { Answer } from "../../provider/core/functions.js";
import type { Environment, Handlers } from "../../provider/core/handlers.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import {
  engineProto,
  pluginProto,
  providerProto,
  statusProto,
  structOf,
} from "../../provider/pulumi/proto.js";
import type { Parts } from "../../provider/pulumi/service.js";
import { unknownValue } from "../../provider/pulumi/unknowns.js";
import { ask, callPlain, secret, startEngine, startService, unused, urnOf } from "../support/pluginClient.js";

const urn = urnOf("LvSnapshot");
const owner = "acme/p/s/vm1";
const base = { host: "server1", owner, name: "vm1" };
const asset = { "4dabf18193072939515e22adb298388d": "c44067f5952c0a294b673a41bacd8c17", text: "x" };

let calls: unknown[][];
let overrides: Partial<Handlers>;
let answer: Answer;
let environments: Omit<Environment, "openHost">[];
let plugin: Awaited<ReturnType<typeof startService>>;

/** Handlers that remember what they were given. */
const recorder = (): Handlers => ({
  nameInput: "name",
  id: ({ host, uuid }) => `${host}/${uuid ?? "x"}`,
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
    return { state: { ...wanted, path: "/dev/x" }, unknown: ["uuid"] };
  },
  async create(wanted) {
    calls.push(["create", wanted]);
    return { id: "server1/x", state: { ...wanted, uuid: "u" } };
  },
  async read(state) {
    calls.push(["read", state]);
    return { ...state, usedPercent: 3 };
  },
  async find(id, finder) {
    calls.push(["find", id, finder]);
    return { id, inputs: { name: "x" }, state: { name: "x", owner } };
  },
  async update(state, wanted) {
    calls.push(["update", state, wanted]);
    return { ...state, ...wanted };
  },
  async remove(state) {
    calls.push(["remove", state]);
  },
  ...overrides,
});

const parts: Parts = {
  ask: async (name, args, environment) => {
    calls.push(["ask", name, args]);
    environments.push(environment);
    return answer;
  },
  version: "1.2.3",
  schema: async () => '{"name":"lvm-nbd"}',
  handlers: async (type: string, environment: Omit<Environment, "openHost">) => {
    if (type !== "LvSnapshot") throw new Error(`no ${type}`);
    environments.push(environment);
    return recorder();
  },
  compose: unused,
};

beforeEach(async () => {
  calls = [];
  overrides = {};
  answer = { values: { kernel: "6.1", versions: { lvm: "2.03" } } };
  environments = [];
  plugin = await startService(parts);
});
afterEach(() => plugin.close());

const failing = (error: unknown): Partial<Handlers> => {
  const fail = () => Promise.reject(error);
  return {
    check: fail,
    diff: fail,
    preview: fail,
    create: fail,
    read: fail,
    find: fail,
    update: fail,
    remove: fail,
  };
};

/** Work that only ends with its signal, as a command on a host does. */
const untilAborted = (): Promise<never> =>
  new Promise((_, reject) => {
    const { signal } = environments.at(-1) ?? {};
    const cancelled = () => reject(new LvmNbdError("CANCELLED", { message: "cancelled", host: "server1" }));
    if (signal?.aborted) cancelled();
    signal?.addEventListener("abort", cancelled);
  });

describe("what the engine asks of a plugin before it asks of resources", () => {
  it("is told what this one understands", async () => {
    const response = await ask<providerProto.ProviderHandshakeResponse>((answer) =>
      plugin.client.handshake(new providerProto.ProviderHandshakeRequest(), answer),
    );
    expect(response.toObject()).toMatchObject({
      ...{ acceptSecrets: true, acceptResources: true, acceptOutputs: true },
      supportsAutonamingConfiguration: true,
    });
    expect(await plugin.configure({})).toMatchObject({ acceptsecrets: true, supportspreview: true });
  });

  it("has a version and a schema", async () => {
    const info = pluginProto.PluginInfo.deserializeBinary(await callPlain(plugin.client, "GetPluginInfo"));
    expect(info.getVersion()).toBe("1.2.3");
    const schema = (version: number) => {
      const request = new providerProto.GetSchemaRequest();
      request.setVersion(version);
      return ask<providerProto.GetSchemaResponse>((answer) => plugin.client.getSchema(request, answer));
    };
    expect((await schema(0)).getSchema()).toBe('{"name":"lvm-nbd"}');
    await expect(schema(7)).rejects.toThrow(/no version 7/);
  });

  const checkConfig = async (values: object) => {
    const request = new providerProto.CheckRequest();
    request.setNews(structOf(values));
    const response = await ask<providerProto.CheckResponse>((answer) =>
      plugin.client.checkConfig(request, answer),
    );
    const failures = response.getFailuresList().map((failure) => failure.toObject());
    return { inputs: response.getInputs()?.toJavaScript(), failures };
  };

  it("checks its configuration: what it does not know is a mistake, what the engine adds is none", async () => {
    const failed = async (values: object) => {
      const { inputs, failures } = await checkConfig(values);
      expect(inputs).toEqual(values);
      return failures.map(({ property }) => property);
    };
    expect(await failed({ version: "1.0.0", organization: "acme" })).toEqual([]);
    expect(await failed({ organization: unknownValue, hosts: unknownValue })).toEqual([]);
    expect(await failed({ hosts: { server1: { address: "a", privateKey: unknownValue } } })).toEqual([]);
    expect(await failed({ organization: "a/b", organisation: "acme" })).toEqual([
      "organization",
      "organisation",
    ]);
  });

  it("has its hosts kept as a secret, whoever marked them, and tells what is wrong with one by its path", async () => {
    const wrong = { server1: { address: "a", password: "planted", port: "22" } };
    for (const hosts of [wrong, JSON.stringify(wrong)]) {
      const { inputs, failures } = await checkConfig({ version: "1.0.0", hosts });
      expect(inputs).toEqual({ version: "1.0.0", hosts: secret(hosts) });
      expect(failures).toEqual([
        { property: "hosts.server1.port", reason: expect.stringMatching(/expected number/) },
      ]);
      expect(JSON.stringify(failures)).not.toContain("planted");
    }
    expect((await checkConfig({ hosts: "planted" })).failures).toEqual([
      { property: "", reason: expect.stringMatching(/^hosts: (?!.*planted)/) },
    ]);
  });

  it("never makes resources anew for another configuration", async () => {
    const diffConfig = async (olds: object, news: object) => {
      const request = new providerProto.DiffRequest();
      request.setOldInputs(structOf(olds));
      request.setNews(structOf(news));
      const response = await ask<providerProto.DiffResponse>((answer) =>
        plugin.client.diffConfig(request, answer),
      );
      expect(response.getReplacesList()).toEqual([]);
      return response.getDiffsList().sort();
    };
    const hosts = { server1: { address: "a", password: "p" } };
    expect(await diffConfig({ organization: "a", hosts }, { organization: "b" })).toEqual([
      "hosts",
      "organization",
    ]);
    const [other, password] = [{ server1: { address: "b" } }, { server1: { address: "a", password: "q" } }];
    for (const news of [{}, { hosts: other }, { hosts: JSON.stringify(password) }])
      expect(await diffConfig({ hosts }, news)).toEqual(["hosts"]);
    const reordered = JSON.stringify({ server1: { password: "p", address: "a" } });
    expect(await diffConfig({ hosts }, { hosts: reordered })).toEqual([]);
  });
});

describe("the hosts that are configured", () => {
  const server1 = { address: "192.0.2.1", password: "p" };
  const known = async () => {
    await plugin.check(urn, base);
    return environments.at(-1)?.namedHosts?.().get("server1");
  };

  it.each([
    ["values", { hosts: { server1: { ...server1, password: secret("p") } } }],
    ["a text", { hosts: JSON.stringify({ server1 }) }],
    ["a secret text", { hosts: secret(JSON.stringify({ server1 })) }],
  ])("are known to all that is asked afterwards, from %s", async (_what, args) => {
    expect(await known()).toBeUndefined();
    await plugin.configure(args);
    expect(await known()).toEqual(server1);
    await plugin.configure({});
    expect(await known()).toBeUndefined();
  });

  it("are known from an engine that has only texts for configuration", async () => {
    const request = new providerProto.ConfigureRequest();
    request.getVariablesMap().set("lvm-nbd:config:hosts", JSON.stringify({ server1 }));
    request.getVariablesMap().set("lvm-nbd:config:organization", "acme");
    await ask((answer) => plugin.client.configure(request, answer));
    expect(await known()).toEqual(server1);
    expect((await plugin.check(urn, {})).inputs.owner).toBe(owner);
  });

  it("that are wrong are refused, as by a state that nobody checked, and without what they hold", async () => {
    const error = await rejection(
      plugin.configure({ hosts: { s: { address: "a", password: "planted", sudo: "planted" } } }),
    );
    expect(error.code).toBe(grpc.status.INVALID_ARGUMENT);
    expect(error.details).toMatch(/^INVALID_INPUT: lvm-nbd:hosts\.s\.sudo: .*expected boolean/);
    expect(error.details).not.toContain("planted");
  });
});

describe("the owner of a resource", () => {
  const ownerIn = async (news: object, olds?: object, of = urn) =>
    (await plugin.check(of, { ...news }, { ...olds })).inputs.owner;

  it("is the URN's with the organisation that is configured, whatever the program's language", async () => {
    await plugin.configure({ organization: "acme" });
    expect(await ownerIn({})).toBe(owner);
    expect(await ownerIn({}, undefined, urnOf("LvSnapshot", "a::b/c"))).toBe("acme/p/s/a::b/c");
  });

  it("is the program's own where that tells it", async () => {
    await plugin.configure({ organization: "acme" });
    expect(await ownerIn({ owner: "other/p/s/vm1" })).toBe("other/p/s/vm1");
  });

  it("keeps the organisation of the state, also of a stack that was made through the other door", async () => {
    expect(await ownerIn({}, { owner: "acme/p/s/before" })).toBe(owner);
    // A replacement is checked again without its past.
    expect(await ownerIn({})).toBe(owner);
  });

  it("is never guessed: without an organisation nothing is made", async () => {
    const { inputs, failures } = await plugin.check(urn, { size: "1G" });
    expect(inputs.owner).toBeUndefined();
    expect(failures).toEqual([
      { property: "", reason: expect.stringContaining("`pulumi config set lvm-nbd:organization NAME`") },
    ]);
  });
});

describe("the name of a thing for which the program gives none", () => {
  const { Mode } = providerProto.CheckRequest.AutonamingOptions;
  const nameIn = async (mode: number | undefined, news: object, olds: object) => {
    const edit = (request: providerProto.CheckRequest) => {
      if (mode === undefined) return;
      const options = new providerProto.CheckRequest.AutonamingOptions();
      options.setMode(mode);
      options.setProposedName("vm1-8a3f");
      request.setAutonaming(options);
    };
    return (await plugin.check(urn, { owner, ...news }, { ...olds }, edit)).inputs.name;
  };

  it.each([
    ["is the resource's", undefined, {}, {}, "vm1"],
    ["is the resource's, also where another was declared before", undefined, {}, { name: "old" }, "vm1"],
    ["is proposed by the engine where that is configured", Mode.PROPOSE, {}, {}, "vm1-8a3f"],
    ["stays what it was once", Mode.ENFORCE, {}, { name: "vm1-0000" }, "vm1-0000"],
    ["is missing where names are to be declared", Mode.DISABLE, {}, {}, undefined],
    ["is the declared one otherwise", Mode.PROPOSE, { name: "mine" }, { name: "vm1-0000" }, "mine"],
  ])("%s", async (_what, mode, news, olds, name) => {
    expect(await nameIn(mode, news, olds)).toBe(name);
  });
});

describe("check", () => {
  it("keeps unknown values away from the handlers and puts them back, of whatever type and depth", async () => {
    const later = {
      device: unknownValue,
      count: "3eeb2bf0-c639-47a8-9e75-3b44932eb421",
      clients: ["10.0.0.2", { "4dabf18193072939515e22adb298388d": "d0e6a833031e9bbcd3f4e8bde6ca49a4" }],
      deep: secret({ a: [{ b: "dd056dcd-154b-4c76-9bd3-c8f88648b5ff" }] }),
    };
    const { inputs } = await plugin.check(urn, { ...base, ...later });
    expect(calls).toEqual([["check", undefined, base, ["clients", "count", "deep", "device"]]]);
    expect(inputs).toEqual({ ...base, ...later, clients: ["10.0.0.2", unknownValue], added: 1 });
  });

  it("keeps secrets as secrets at their paths, and the inputs free of what is only predicted", async () => {
    const host = { address: "a", user: secret("u"), password: "p" };
    const { inputs } = await plugin.check(urn, { ...base, host, size: secret("1G") });
    expect(calls[0]?.[2]).toMatchObject({ host: { address: "a", user: "u", password: "p" }, size: "1G" });
    expect(inputs).toEqual({
      ...base,
      host: { address: "a", user: secret("u"), password: secret("p") },
      size: secret("1G"),
      added: 1,
    });
  });

  it("takes null and nothing for the same", async () => {
    await plugin.check(urn, { ...base, size: null, tls: secret(null), host: { address: "a", port: null } });
    expect(calls[0]?.[2]).toEqual({ ...base, host: { address: "a" } });
  });

  it("names a problem by its path, and in its text alone where the engine would print a secret", async () => {
    const problems = ["size", "host", "host.port", "tls", ""].map((property) => ({
      property,
      reason: "is wrong",
    }));
    overrides = { check: async () => ({ inputs: {}, predicted: {}, problems }) };
    const { failures } = await plugin.check(urn, {
      ...base,
      size: "x",
      host: { password: "p" },
      tls: { a: "k" },
    });
    expect(failures).toEqual([
      { property: "size", reason: "is wrong" },
      { property: "", reason: "host: is wrong" },
      { property: "host.port", reason: "is wrong" },
      { property: "", reason: "tls: is wrong" },
      { property: "", reason: "is wrong" },
    ]);
  });

  it.each([
    ["a line of its own", "a\nerror: b"],
    ["a sequence for the terminal", "\u001b]0;owned\u0007"],
    ["a mark that turns what is read", "a\u202eb"],
    ["one in a list", [{ tag: "\u009b2J" }]],
    ["one in a key", { "a\rb": 1 }],
  ])("names a problem in its text alone where the engine would print %s", async (_, size) => {
    overrides = {
      check: async () => ({
        inputs: {},
        predicted: {},
        problems: [{ property: "size", reason: "is wrong" }],
      }),
    };
    const { failures } = await plugin.check(urn, { ...base, size });
    expect(failures).toEqual([{ property: "", reason: "size: is wrong" }]);
  });

  it("refuses an asset where it stands, once", async () => {
    const problems = [{ property: "device", reason: "is required" }];
    overrides = { check: async () => ({ inputs: {}, predicted: {}, problems }) };
    const { failures } = await plugin.check(urn, { ...base, device: asset, deep: { list: [asset] } });
    expect(failures).toEqual([
      { property: "deep.list.0", reason: expect.stringContaining("is an asset") },
      { property: "device", reason: expect.stringContaining("is an asset") },
    ]);
  });
});

describe("diff", () => {
  const { Kind } = providerProto.PropertyDiff;

  it("of nothing is nothing, and says how it would be replaced, since a program may have it so", async () => {
    expect(await plugin.diff(urn, base, base)).toEqual({
      ...{ changes: providerProto.DiffResponse.DiffChanges.DIFF_NONE, replaces: [], diffs: [] },
      ...{ deleteBeforeReplace: true, detailed: {} },
    });
  });

  it("tells what becomes of each property, and whether the program or a drift changed it", async () => {
    const effects = {
      size: "update",
      origin: "replace",
      added: "update",
      gone: "replace",
      state: "update",
    } as const;
    overrides = {
      diff: async () => ({
        changes: Object.entries(effects).map(([property, effect]) => ({ property, effect })),
        deleteBeforeReplace: true,
      }),
    };
    const oldInputs = { size: "1G", origin: "a", gone: 1 };
    const news = { size: "2G", origin: "b", added: 1 };
    const { detailed, ...rest } = await plugin.diff(urn, { ...oldInputs, state: "stopped" }, news, {
      oldInputs,
    });
    expect(detailed).toEqual({
      size: { kind: Kind.UPDATE, inputdiff: true },
      origin: { kind: Kind.UPDATE_REPLACE, inputdiff: true },
      added: { kind: Kind.ADD, inputdiff: true },
      gone: { kind: Kind.DELETE_REPLACE, inputdiff: true },
      state: { kind: Kind.UPDATE, inputdiff: false },
    });
    expect(rest).toMatchObject({ replaces: ["origin", "gone"], deleteBeforeReplace: true });
  });

  it("leaves what is ignored as it is, also where it has drifted from what was declared", async () => {
    const state = { ...base, tags: ["by hand"], port: 1 };
    const news = { ...base, tags: ["declared"], port: 2 };
    overrides = {
      diff: async (old, wanted) => {
        calls.push([old, wanted]);
        return { changes: [{ property: "state", effect: "update" }], deleteBeforeReplace: false };
      },
    };
    expect((await plugin.diff(urn, state, news, { ignore: ["tags", "state"] })).diffs).toEqual([]);
    await plugin.diff(urn, state, news, { ignore: ["*"] });
    expect(calls).toEqual([
      [state, { ...news, tags: ["by hand"] }],
      [state, state],
    ]);
  });
});

describe("create", () => {
  it("gives back id and state with the secrets that were given, and a last line on the resource's row", async () => {
    const engine = await startEngine();
    const own = await startService(parts, engine.address);
    const { id, properties } = await own.create(urn, { ...base, size: secret("1G") });
    expect(id).toBe("server1/x");
    expect(properties).toEqual({ ...base, size: secret("1G"), uuid: "u" });
    expect(engine.lines).toEqual([
      {
        ...{ message: "made server1/x", urn, stream: expect.any(Number) },
        ...{ severity: engineProto.LogSeverity.INFO, ephemeral: true },
      },
    ]);
    own.close();
    engine.close();
  });

  it("that failed after it made something keeps that: id, state and reason are in the status", async () => {
    const cause = new LvmNbdError("COMMAND_FAILED", { message: "ä broke", host: "server1" });
    overrides = failing(new PartialFailure("server1/x", { ...base, size: "1G", uuid: "u" }, cause));
    const error = await rejection(plugin.create(urn, { ...base, size: secret("1G") }));
    expect(error.code).toBe(grpc.status.FAILED_PRECONDITION);
    const status = statusProto.Status.deserializeBinary(
      error.metadata.get("grpc-status-details-bin")[0] as Buffer,
    );
    expect(status.toObject()).toMatchObject({ code: error.code, message: cause.message });
    const [detail] = status.getDetailsList();
    expect(detail?.getTypeUrl()).toBe("type.googleapis.com/pulumirpc.ErrorResourceInitFailed");
    const kept = providerProto.ErrorResourceInitFailed.deserializeBinary(
      detail?.getValue_asU8() ?? Buffer.alloc(0),
    );
    expect(kept.getId()).toBe("server1/x");
    expect(kept.getReasonsList()).toEqual([cause.message]);
    expect(kept.getProperties()?.toJavaScript()).toEqual({ ...base, size: secret("1G"), uuid: "u" });
  });

  it("takes no value that is not known", async () => {
    await expect(plugin.create(urn, { ...base, size: unknownValue })).rejects.toThrow(/size is not known/);
    expect(calls).toEqual([]);
  });
});

describe("delete", () => {
  it("removes what the state tells of", async () => {
    await plugin.remove(urn, { ...base, size: secret("1G") });
    expect(calls).toEqual([["remove", { ...base, size: "1G" }]]);
  });

  it("of the old half of a replacement leaves the thing alone where the new one is that very thing", async () => {
    const { id } = await plugin.create(urn, base);
    expect(id).toBe("server1/x");
    await plugin.remove(urn, base);
    expect(calls).toEqual([["create", base]]);
    await plugin.remove(urn, { ...base, uuid: "before" });
    await plugin.remove(urnOf("LvSnapshot", "vm2"), base);
    expect(calls).toHaveLength(3);
    // Another run has nothing to do with it.
    await ask((answer) => plugin.client.handshake(new providerProto.ProviderHandshakeRequest(), answer));
    await plugin.remove(urn, base);
    expect(calls).toHaveLength(4);
  });
});

describe("a preview", () => {
  it("of a create makes nothing, and tells what is known of the state", async () => {
    const { id, properties } = await plugin.create(
      urn,
      { ...base, size: secret("1G"), device: unknownValue },
      { preview: true },
    );
    expect(calls).toEqual([["preview", undefined, { ...base, size: "1G" }, ["device"]]]);
    expect(id).toBe("");
    expect(properties).toEqual({
      ...base,
      ...{ size: secret("1G"), device: unknownValue, path: "/dev/x", uuid: unknownValue },
    });
  });

  it("of an update changes nothing", async () => {
    const state = { ...base, uuid: "u" };
    await plugin.update(urn, state, { ...base, size: "2G" }, { preview: true });
    expect(calls).toEqual([["preview", state, { ...base, size: "2G" }, []]]);
  });
});

describe("update", () => {
  it("hands over state and declaration; what was a secret and is no more declared one is none any more", async () => {
    const state = { ...base, size: secret("1G"), token: secret("t") };
    const properties = await plugin.update(urn, state, { ...base, size: "2G" });
    expect(calls).toEqual([["update", { ...base, size: "1G", token: "t" }, { ...base, size: "2G" }]]);
    expect(properties).toEqual({ ...base, size: "2G", token: secret("t") });
  });

  it("leaves what is ignored as it is", async () => {
    await plugin.update(
      urn,
      { ...base, tags: ["by hand"] },
      { ...base, tags: ["declared"] },
      { ignore: ["tags"] },
    );
    expect(calls[0]?.[2]).toEqual({ ...base, tags: ["by hand"] });
  });
});

describe("read", () => {
  it("of a state refreshes that, and leaves the inputs to the engine", async () => {
    const state = { ...base, size: secret("1G") };
    expect(await plugin.read(urn, "server1/x", state, base)).toEqual({
      id: "server1/x",
      properties: { ...state, usedPercent: 3 },
      inputs: undefined,
    });
  });

  it.each([
    ["a state", { read: async () => undefined }, base],
    ["an id", { find: async () => undefined }, undefined],
  ])("of %s whose thing is positively gone tells no id and no properties", async (_what, gone, state) => {
    overrides = gone;
    expect(await plugin.read(urn, "server1/x", state)).toEqual({
      id: "",
      properties: undefined,
      inputs: undefined,
    });
  });

  it("of an id alone is an import, which takes nothing of another's; with properties it only reads", async () => {
    await plugin.configure({ organization: "acme" });
    expect(await plugin.read(urn, "server1/x")).toEqual({
      id: "server1/x",
      properties: { name: "x", owner },
      inputs: { name: "x" },
    });
    await plugin.read(urn, "server1/x", { host: { address: "a" } });
    const who = { organization: "acme", project: "p", stack: "s", name: "vm1" };
    expect(calls).toMatchObject([
      ["find", "server1/x", { ...who, readsOnly: false }],
      ["find", "server1/x", { ...who, host: { address: "a" }, readsOnly: true }],
    ]);
  });
});

describe("a function", () => {
  const token = "lvm-nbd:index:getHost";

  it("is asked with plain values, by what is configured, and tells plain ones", async () => {
    await plugin.configure({ hosts: { server1: { address: "a" } } });
    const host = { address: "a", password: secret("p") };
    const { values, failures } = await plugin.invoke(token, { host, volumeGroup: null });
    expect(values).toEqual({ kernel: "6.1", versions: { lvm: "2.03" } });
    expect(failures).toEqual([]);
    expect(calls).toEqual([["ask", "getHost", { host: { address: "a", password: "p" } }]]);
    expect(environments.at(-1)?.namedHosts?.().get("server1")).toEqual({ address: "a" });
  });

  it("tells secrets where it was asked with one, other than how its host is reached", async () => {
    const { values } = await plugin.invoke(token, { host: "a", volumeGroup: secret("VgVm") });
    expect(values).toEqual({ kernel: secret("6.1"), versions: secret({ lvm: "2.03" }) });
  });

  it("is not asked with what is not known yet, or is no plain value", async () => {
    for (const host of [unknownValue, secret(unknownValue), { address: "a", privateKey: unknownValue }])
      expect(await plugin.invoke(token, { host })).toEqual({ values: {}, failures: [] });
    expect((await plugin.invoke(token, { host: asset })).failures).toEqual([
      { property: "host", reason: expect.stringContaining("is an asset") },
    ]);
    expect(calls).toEqual([]);
  });

  it("that cannot be asked so tells why by property, in the text alone where that is a secret", async () => {
    answer = {
      problems: [
        { property: "host.port", reason: "a" },
        { property: "host", reason: "b" },
      ],
    };
    expect(await plugin.invoke(token, { host: { password: "p" } })).toEqual({
      values: undefined,
      failures: [
        { property: "host.port", reason: "a" },
        { property: "", reason: "host: b" },
      ],
    });
  });

  it("ends with a cancel", async () => {
    await plugin.cancel();
    await plugin.invoke(token, { host: "a" });
    expect(environments.at(-1)?.signal.aborted).toBe(true);
  });

  it("of another package is none", async () => {
    await expect(plugin.invoke("aws:index:getHost", {})).rejects.toThrow(/is no function of lvm-nbd/);
  });
});

describe("an operation that does not end", () => {
  it.each([
    ["create", () => plugin.create(urn, base, { timeout: 0.05 })],
    ["update", () => plugin.update(urn, base, base, { timeout: 0.05 })],
    ["delete", () => plugin.remove(urn, base, 0.05)],
  ])("ends when its time has passed, and says whose time that was: %s", async (_name, call) => {
    overrides = { create: untilAborted, update: untilAborted, remove: untilAborted };
    const error = await rejection(call());
    expect(error.code).toBe(grpc.status.DEADLINE_EXCEEDED);
    expect(error.details).toMatch(/OPERATION_TIMED_OUT: .*0\.05 seconds that its `customTimeouts`/);
  });

  it("keeps what it made when its time passed", async () => {
    overrides = {
      create: () =>
        untilAborted().catch((error) => {
          throw new PartialFailure("server1/x", base, error);
        }),
    };
    const error = await rejection(plugin.create(urn, base, { timeout: 0.05 }));
    expect(error.details).toContain("OPERATION_TIMED_OUT");
    expect(error.metadata.get("grpc-status-details-bin")).toHaveLength(1);
  });

  it("ends with a cancel, and what is asked after that does too", async () => {
    overrides = { create: untilAborted, update: untilAborted };
    const running = rejection(plugin.create(urn, base));
    await vi.waitFor(() => expect(environments).toHaveLength(1));
    await plugin.cancel();
    expect((await running).code).toBe(grpc.status.ABORTED);
    expect((await rejection(plugin.update(urn, base, base))).details).toMatch(/^CANCELLED: /);
  });

  it("is not what the next engine finds, where the plugin outlives the one that ended with a cancel", async () => {
    await plugin.cancel();
    const request = new pluginProto.PluginAttach();
    request.setAddress("127.0.0.1:1");
    await ask((answer) => plugin.client.attach(request, answer));
    await plugin.check(urn, base);
    expect(environments.at(-1)?.signal.aborted).toBe(false);
  });

  it("with time left is not bothered", async () => {
    expect((await plugin.create(urn, base, { timeout: 3600 * 24 * 365 })).id).toBe("server1/x");
  });
});

describe("a failure", () => {
  it.each([
    ["of an argument", new LvmNbdError("INVALID_INPUT", { message: "size" }), grpc.status.INVALID_ARGUMENT],
    ["that is understood", new LvmNbdError("LINK_LOST", { message: "x" }), grpc.status.FAILED_PRECONDITION],
    ["that is none of ours", new TypeError("of undefined"), grpc.status.INTERNAL],
  ])(
    "%s has its text alone, and a code by which the engine keeps no pending operation needlessly",
    async (_what, error, code) => {
      overrides = failing(error);
      for (const call of [
        () => plugin.check(urn, base),
        () => plugin.diff(urn, base, base),
        () => plugin.create(urn, base),
        () => plugin.read(urn, "x", base),
        () => plugin.read(urn, "x"),
        () => plugin.update(urn, base, base),
        () => plugin.remove(urn, base),
      ]) {
        expect(await rejection(call())).toMatchObject({ code, details: error.message });
      }
    },
  );

  it("is told for what is no resource of this package", async () => {
    await expect(plugin.check("urn:pulumi:s::p::aws:s3:Bucket::b", base)).rejects.toThrow(
      /no type of lvm-nbd/,
    );
    await expect(plugin.check("nonsense", base)).rejects.toThrow(/is no URN/);
  });

  it("of a method that is not there is told as such", async () => {
    const error = await rejection(
      ask((answer) => plugin.client.getMapping(new providerProto.GetMappingRequest(), answer)),
    );
    expect(error.code).toBe(grpc.status.UNIMPLEMENTED);
  });
});

it("shows lines at the engine that the plugin is attached to later, each operation as a stream of its own", async () => {
  const engine = await startEngine();
  const request = new pluginProto.PluginAttach();
  request.setAddress(engine.address);
  await ask((answer) => plugin.client.attach(request, answer));
  overrides = {
    create: async (wanted) => {
      environments.at(-1)?.warn("something to know");
      return { id: "x", state: wanted };
    },
  };
  await plugin.create(urn, base);
  await plugin.create(urnOf("LvSnapshot", "vm2"), base);
  expect(engine.lines).toHaveLength(4);
  const warnings = engine.lines.filter(({ severity }) => severity === engineProto.LogSeverity.WARNING);
  expect(warnings).toMatchObject([
    { message: "something to know", urn, ephemeral: false },
    { urn: urnOf("LvSnapshot", "vm2") },
  ]);
  expect(new Set(warnings.map(({ stream }) => stream)).size).toBe(2);
  engine.close();
});

async function rejection(work: Promise<unknown>): Promise<grpc.ServiceError> {
  const error = await work.then(
    () => new Error("it succeeded"),
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof Error) || !("metadata" in error)) throw error;
  return error as grpc.ServiceError;
}
