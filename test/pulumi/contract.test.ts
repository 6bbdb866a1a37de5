/** The plugin as a black box: what the engine may send, over the wire, for every property that the schema has. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import * as grpc from "@grpc/grpc-js";
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { z } from "zod";
import { LvmNbdError } from "../../provider/core/errors.js";
import { askFunction } from "../../provider/core/functions.js";
import { createHandlers, type Environment } from "../../provider/core/handlers.js";
import { outputsOf } from "../../provider/core/outputs.js";
import { resourceType } from "../../provider/core/registry.js";
import { isSecret } from "../../provider/core/secrets.js";
import { functionType } from "../../provider/functions/registry.js";
import { providerProto, structOf } from "../../provider/pulumi/proto.js";
import { unknownValue } from "../../provider/pulumi/unknowns.js";
import type { Host } from "../../provider/ssh/types.js";
import { type Answer, type FakeHost, fakeHost } from "../support/fakeHost.js";
import { machineId } from "../support/machineId.js";
import {
  callPlain,
  connectPlugin,
  secret,
  startEngine,
  startService,
  unused,
  urnOf,
} from "../support/pluginClient.js";
import { pluginCommand } from "../support/pluginCommand.mjs";
import { recordedLvs } from "../support/recorded.js";
import { SetupHost } from "../support/setupHost.js";

type Values = Readonly<Record<string, unknown>>;

const properties = z.object({
  properties: z.record(z.string(), z.unknown()),
  required: z.array(z.string()).default([]),
});
const schema = z
  .object({
    resources: z.record(
      z.string(),
      z.object({
        isComponent: z.boolean().default(false),
        inputProperties: z.record(z.string(), z.unknown()),
      }),
    ),
    functions: z.record(z.string(), z.object({ inputs: properties, outputs: properties })),
  })
  .parse(JSON.parse(readFileSync("schema.json", "utf8")));
/** Components are made of these, by Construct. */
const resources = Object.fromEntries(
  Object.entries(schema.resources).filter(([, { isComponent }]) => !isComponent),
);
const everyInput = Object.entries(resources).flatMap(([token, { inputProperties }]) =>
  Object.keys(inputProperties).map((property) => [typeOf(token), property] as const),
);
const everyType = Object.keys(resources).map((token) => [typeOf(token)] as const);

function typeOf(token: string): string {
  return token.split(":").at(-1) ?? "";
}

const host = {
  ...{ address: "192.0.2.1", user: "admin", password: "planted" },
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const uuid = "ua3XsD-JfZg-sm4f-mixX-TEqj-5JCI-nnYZE4";
/** A declaration of each type that is right. */
const declarations: Readonly<Record<string, Values>> = {
  HostSetup: { host, roles: ["source"] },
  LvSnapshot: {
    ...{ host, volumeGroup: "VgVm", origin: "vm1", name: "vm1-snap", size: "16M", tags: ["mine"] },
    quiesce: { freeze: "freeze-it", thaw: "thaw-it" },
  },
  NbdExport: { host, device: "/dev/VgVm/vm1-snap", listenAddress: "10.0.0.1", clients: ["10.0.0.2"] },
  NbdAttachment: { host, uri: "nbd://10.0.0.1:10809/vm1" },
  Mount: { host, device: "/dev/lvm-nbd/vm1", path: "/mnt/vm1" },
  VolumeCopy: { host, uri: "nbd://10.0.0.1:10809/vm1", file: "/backup/vm1" },
  BackupImage: {
    ...{ host, source: { host, listenAddress: "10.0.0.1" } },
    volumes: [{ volumeGroup: "VgVm", origin: "vm1", size: "16M", file: "/backup/vm1" }],
  },
  LvRestore: { host, volumeGroup: "VgVm", origin: "vm1", snapshot: { name: "vm1-snap", uuid } },
};
const declared = (type: string): Values => declarations[type] ?? {};

/** As it comes back: what always is a secret is one. */
const kept = (property: string, value: unknown) => (isSecret(property, value) ? secret(value) : value);

let answer: (command: Parameters<Parameters<typeof fakeHost>[0]>[0]) => Answer;
let asked: FakeHost;
let opened: Host;
let engine: Awaited<ReturnType<typeof startEngine>>;
let plugin: Awaited<ReturnType<typeof startService>>;

beforeEach(async () => {
  answer = () => new LvmNbdError("HOST_UNREACHABLE", { message: "no route" });
  asked = fakeHost((command) => answer(command), machineId);
  opened = asked;
  const parts = {
    version: "1.0.0",
    schema: () => readFile("schema.json", "utf8"),
    handlers: async (type: string, environment: Omit<Environment, "openHost">) =>
      createHandlers(resourceType(type), { ...environment, openHost: async () => opened }),
    ask: (name: string, args: Values, environment: Omit<Environment, "openHost">) =>
      askFunction(functionType(name), args, { ...environment, openHost: async () => opened }),
    compose: unused,
  };
  engine = await startEngine();
  plugin = await startService(parts, engine.address);
  await plugin.configure({ organization: "o" });
});
afterEach(() => {
  plugin.close();
  engine.close();
});

describe("every resource of the schema", () => {
  it.each(everyType)(
    "%s has a declaration that is right, and whose check gives the same again",
    async (type) => {
      const { inputs, failures } = await plugin.check(urnOf(type), declared(type));
      expect(failures).toEqual([]);
      expect(inputs.owner).toBe("o/p/s/vm1");
      expect(await plugin.check(urnOf(type), inputs, inputs)).toEqual({ inputs, failures: [] });
    },
  );

  it.each(everyType)(
    "%s with everything unknown is checked and previewed, and no host is asked",
    async (type) => {
      const token = `lvm-nbd:index:${type}`;
      const keys = Object.keys(resources[token]?.inputProperties ?? {});
      const later = Object.fromEntries(keys.map((key) => [key, kept(key, unknownValue)]));
      const { inputs, failures } = await plugin.check(urnOf(type), later);
      expect(failures).toEqual([]);
      expect(inputs).toEqual({ ...later, owner: "o/p/s/vm1" });
      const { id, properties } = await plugin.create(urnOf(type), inputs, { preview: true });
      expect(id).toBe("");
      expect(properties).toMatchObject(later);
      for (const key of Object.keys(outputsOf(resourceType(type)).shape))
        expect(properties?.[key], key).toEqual(kept(key, unknownValue));
      expect(asked.commands).toEqual([]);
    },
  );

  it.each(everyType)("%s with everything missing or null has the same failures", async (type) => {
    const keys = Object.keys(resources[`lvm-nbd:index:${type}`]?.inputProperties ?? {});
    const missing = await plugin.check(urnOf(type), {});
    const nulls = await plugin.check(urnOf(type), Object.fromEntries(keys.map((key) => [key, null])));
    expect(nulls.failures).toEqual(missing.failures);
    expect(missing.failures.map(({ property }) => property)).toContain("host");
  });

  it.each(everyType)("%s keeps the passwords that nobody marked, at a preview too", async (type) => {
    const { inputs } = await plugin.check(urnOf(type), declared(type));
    const { properties } = await plugin.create(urnOf(type), inputs, { preview: true });
    for (const values of [inputs, properties]) expect(plainText(values)).not.toContain("planted");
  });
});

describe("every property of the schema", () => {
  it.each(everyInput)("%s.%s may be unknown, itself and inside", async (type, property) => {
    for (const later of [unknownValue, [unknownValue], { deep: [{ er: unknownValue }] }]) {
      const { inputs, failures } = await plugin.check(urnOf(type), { ...declared(type), [property]: later });
      expect(failures).toEqual([]);
      expect(inputs[property]).toEqual(kept(property, later));
    }
  });

  it.each(everyInput)(
    "%s.%s that is a secret stays one, through check and preview",
    async (type, property) => {
      const value = declared(type)[property];
      if (value === undefined) return;
      const { inputs, failures } = await plugin.check(urnOf(type), {
        ...declared(type),
        [property]: secret(value),
      });
      expect(failures).toEqual([]);
      expect(inputs[property]).toMatchObject(secret(value));
      const { properties } = await plugin.create(urnOf(type), inputs, { preview: true });
      expect(properties?.[property]).toEqual(inputs[property]);
    },
  );

  it.each(everyInput)(
    "%s.%s of any form is answered, and never a defect of the plugin",
    async (type, property) => {
      const forms = [
        "",
        [],
        {},
        [[[[[["deep"]]]]]],
        0,
        -1e308,
        true,
        "\u0000\ud7ff",
        { a: { b: {} } },
        [null],
      ];
      for (const form of forms) {
        const { failures } = await plugin.check(urnOf(type), { ...declared(type), [property]: form });
        for (const { reason } of failures) expect(reason).not.toBe("");
      }
    },
  );

  it.each(everyInput)("%s.%s takes no asset, and says so", async (type, property) => {
    const asset = { "4dabf18193072939515e22adb298388d": "c44067f5952c0a294b673a41bacd8c17", text: "x" };
    const { failures } = await plugin.check(urnOf(type), { ...declared(type), [property]: asset });
    expect(failures).toContainEqual({ property, reason: expect.stringContaining("is an asset") });
  });
});

describe("a snapshot, as the engine has it made", () => {
  const urn = urnOf("LvSnapshot");
  const recorded = () => {
    answer = ({ argv }) => {
      if (argv.join().includes("chunk_size")) return "  65536\n";
      return argv[0] === "vgs" ? "  VgVm\n" : recordedLvs("valid");
    };
  };

  it("is previewed by a look at its host, made, refreshed and found unchanged", async () => {
    recorded();
    const { inputs } = await plugin.check(urn, { ...declared("LvSnapshot"), size: secret("16M") });
    const preview = await plugin.create(urn, inputs, { preview: true });
    expect(preview.properties).toMatchObject({ path: "/dev/VgVm/vm1-snap", uuid: unknownValue });
    expect(asked.changes).toEqual([]);
    // One of its own mark is there: it is brought to its declared form.
    const { id, properties = {} } = await plugin.create(urn, inputs);
    expect(id).toBe("192.0.2.1/VgVm/vm1-snap");
    expect(properties).toMatchObject({ uuid, size: secret("16M"), host: { password: secret("planted") } });
    const refreshed = await plugin.read(urn, id, properties, inputs);
    expect(refreshed).toEqual({ id, properties, inputs: undefined });
    const news = (await plugin.check(urn, inputs, inputs)).inputs;
    expect((await plugin.diff(urn, properties, news, { oldInputs: inputs })).diffs).toEqual([]);
  });

  it("is imported by its id alone, and the next preview is empty", async () => {
    recorded();
    const found = await plugin.read(urn, "192.0.2.1/VgVm/vm1-snap");
    expect(found.inputs).toEqual({
      ...{ host: "192.0.2.1", owner: "o/p/s/vm1", volumeGroup: "VgVm", origin: "vm1", name: "vm1-snap" },
      ...{ size: 16777216, tags: ["mine"] },
    });
    expect(found.properties).toMatchObject({ machineId });
    const { owner: _, ...program } = found.inputs ?? {};
    const { inputs, failures } = await plugin.check(urn, program, found.inputs);
    expect(failures).toEqual([]);
    expect(
      (await plugin.diff(urn, found.properties ?? {}, inputs, { oldInputs: found.inputs ?? {} })).diffs,
    ).toEqual([]);
    expect(await plugin.read(urn, found.id, found.properties)).toMatchObject({
      properties: found.properties,
    });
    await expect(plugin.read(urnOf("LvSnapshot", "vm2"), found.id)).rejects.toThrow(/FOREIGN_RESOURCE/);
  });

  it("of a host that cannot be reached is neither gone nor found", async () => {
    recorded();
    const { properties } = await plugin.read(urn, "192.0.2.1/VgVm/vm1-snap");
    answer = () => new LvmNbdError("HOST_UNREACHABLE", { message: "no route" });
    await expect(plugin.read(urn, "192.0.2.1/VgVm/vm1-snap", properties)).rejects.toThrow(/HOST_UNREACHABLE/);
    await expect(plugin.read(urn, "192.0.2.1/VgVm/vm1-snap")).rejects.toThrow(/HOST_UNREACHABLE/);
  });

  it("that is cancelled in the middle answers, and so does everything else that runs", async () => {
    const running = vi.fn();
    const waiting = vi.fn();
    opened = {
      name: "server1",
      // Each asks for that before it looks, and all look at once.
      machineId: async () => {
        waiting();
        return undefined;
      },
      run: (_command, signal) =>
        new Promise((_, reject) => {
          running();
          signal?.addEventListener("abort", () =>
            reject(new LvmNbdError("CANCELLED", { message: "cancelled" })),
          );
          // The look at what is left has a signal of its own.
          if (running.mock.calls.length > 1) reject(new LvmNbdError("HOST_UNREACHABLE", { message: "gone" }));
        }),
    };
    const { inputs } = await plugin.check(urn, declared("LvSnapshot"));
    const all = Promise.allSettled(
      Array.from({ length: 20 }, (_, at) => plugin.create(urnOf("LvSnapshot", `vm${at}`), inputs)),
    );
    await vi.waitFor(() => expect(waiting).toHaveBeenCalledTimes(20));
    await vi.waitFor(() => expect(running).toHaveBeenCalled());
    await plugin.cancel();
    for (const result of await all) {
      expect(result).toMatchObject({ status: "rejected", reason: { code: grpc.status.ABORTED } });
    }
  });
});

describe("every function of the schema", () => {
  const all = Object.entries(schema.functions);
  const everyArgument = all.flatMap(([token, { inputs }]) =>
    Object.keys(inputs.properties).map((property) => [token, property] as const),
  );
  const right: Values = { host, volumeGroup: "VgVm" };
  const argsOf = (token: string): Values =>
    Object.fromEntries(
      Object.keys(schema.functions[token]?.inputs.properties ?? {}).map((key) => [key, right[key]]),
    );
  const real = new SetupHost();
  afterAll(() => real.close());

  beforeEach(() => {
    opened = {
      name: "server1",
      machineId: async () => undefined,
      run: async (command) =>
        command.argv[0] === "lvs" ? fakeHost(() => recordedLvs("valid")).run(command) : real.run(command),
    };
  });

  it.each(all)("%s tells what the schema says", async (token, { outputs }) => {
    const { values, failures } = await plugin.invoke(token, argsOf(token));
    expect(failures).toEqual([]);
    const told = Object.keys(values ?? {});
    expect(Object.keys(outputs.properties)).toEqual(expect.arrayContaining(told));
    expect(told).toEqual(expect.arrayContaining(outputs.required));
    expect(JSON.stringify(values)).not.toContain("planted");
  });

  it.each(everyArgument)(
    "%s may be asked with %s unknown, and tells nothing then",
    async (token, property) => {
      opened = asked;
      for (const later of [unknownValue, secret(unknownValue), { deep: [unknownValue] }])
        expect(await plugin.invoke(token, { ...argsOf(token), [property]: later })).toEqual({
          values: {},
          failures: [],
        });
      expect(asked.commands).toEqual([]);
    },
  );

  it.each(everyArgument)("%s of any form of %s is answered, by its failures", async (token, property) => {
    opened = asked;
    for (const form of ["", [], {}, 0, true, { a: { b: {} } }, [null], "\u0000"]) {
      const { failures } = await plugin.invoke(token, { ...argsOf(token), [property]: form });
      const [first] = failures;
      expect(`${first?.property}${first?.reason}`).toContain(property);
    }
    expect(asked.commands).toEqual([]);
  });

  it.each(all)("%s wants to know of which host, and no more than it has", async (token) => {
    expect((await plugin.invoke(token, {})).failures).toEqual([{ property: "host", reason: "is required" }]);
    const { failures } = await plugin.invoke(token, { host, more: 1 });
    expect(failures).toEqual([{ property: "more", reason: "is no property of this function" }]);
  });

  it.each(all)("%s of a host that cannot be reached tells that", async (token) => {
    opened = asked;
    const told = plugin.invoke(token, argsOf(token));
    await expect(told).rejects.toThrow(/HOST_UNREACHABLE: get(Host|Volumes)/);
  });

  it("that there is not is refused, by the names of those that there are", async () => {
    await expect(plugin.invoke("lvm-nbd:index:getMirrors", { host })).rejects.toThrow(
      /INVALID_INPUT: lvm-nbd has no function "getMirrors"; there are: getHost, getVolumes/,
    );
  });
});

it("a thousand calls at once are answered, each for itself", async () => {
  const types = everyType.map(([type]) => type);
  const answers = await Promise.all(
    Array.from({ length: 1000 }, (_, at) => {
      const type = types[at % types.length] ?? "";
      return plugin.check(urnOf(type, `r${at}`), declared(type));
    }),
  );
  expect(answers.map(({ inputs }) => inputs.owner)).toEqual(answers.map((_, at) => `o/p/s/r${at}`));
  expect(answers.flatMap(({ failures }) => failures)).toEqual([]);
});

describe("what is no message", () => {
  const methods = [
    "Handshake",
    "Check",
    "Diff",
    "Create",
    "Read",
    "Update",
    "Delete",
    "Configure",
    "CheckConfig",
    "Invoke",
  ];
  const refusals = [grpc.status.INTERNAL, grpc.status.INVALID_ARGUMENT];
  const stillAnswers = async () => {
    await plugin.configure({ organization: "o" });
    const { failures } = await plugin.check(urnOf("NbdExport"), declared("NbdExport"));
    expect(failures).toEqual([]);
  };

  const answerTo = (method: string, bytes: Uint8Array) =>
    callPlain(plugin.client, method, Buffer.from(bytes)).then(
      () => grpc.status.OK,
      (error: grpc.ServiceError) => error.code,
    );

  it.each(methods)(
    "%s of a message that was cut anywhere is an error, or what was left of it",
    async (method) => {
      const request = new providerProto.CheckRequest();
      request.setUrn(urnOf("NbdExport"));
      request.setOlds(structOf(declared("NbdExport")));
      request.setNews(structOf(declared("NbdExport")));
      const bytes = request.serializeBinary();
      for (let length = 0; length < bytes.length; length += 7)
        expect([grpc.status.OK, ...refusals]).toContain(await answerTo(method, bytes.slice(0, length)));
      await stillAnswers();
    },
  );

  it.each([
    ["a field of no known number", [0xf8, 0x7f, 0x01]],
    ["a number where a text is to be", [0x08, 0x01]],
    ["a text that is no UTF-8", [0x0a, 0x02, 0xff, 0xfe]],
    ["a wire type that does not exist", [0x0f]],
    ["a length without end", [0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]],
  ])("with %s is refused, and the next one is answered as ever", async (_what, bytes) => {
    for (const method of ["Check", "Create", "Read", "Delete"])
      expect(refusals).toContain(await answerTo(method, Uint8Array.from(bytes)));
    await stillAnswers();
  });

  it("nested without end is an error of that call alone", async () => {
    let deep: unknown = "x";
    for (let level = 0; level < 700; level++) deep = { a: [deep] };
    await plugin.check(urnOf("LvSnapshot"), { size: deep }).catch((error: unknown) => error);
    await stillAnswers();
  });

  it("of a thousand volumes is answered", async () => {
    const volumes = Array.from({ length: 1000 }, (_, at) => ({
      ...{ volumeGroup: "VgVm", origin: `vm${at}`, size: "16M", file: `/backup/vm${at}` },
    }));
    const { failures } = await plugin.check(urnOf("BackupImage"), { ...declared("BackupImage"), volumes });
    for (const { reason } of failures) expect(reason).toMatch(/volumes/);
  });
});

describe("the program", () => {
  let child: ChildProcess;
  const start = async () => {
    const { file, args, env } = pluginCommand();
    child = spawn(file, [...args, "127.0.0.1:1"], { stdio: ["pipe", "pipe", "inherit"], env });
    if (child.stdout === null) throw new Error("it has no stdout");
    const [line] = (await once(createInterface(child.stdout), "line")) as [string];
    return connectPlugin(Number(line));
  };
  afterEach(() => child.kill("SIGKILL"));

  it.each([
    ["as many at once as an engine calls on 4 processors, in little memory", 16, 120],
    ["all at once", 1000, 160],
  ])(
    "prints its port and nothing else before, and answers a thousand there: %s",
    async (_how, atOnce, megabytes) => {
      const own = await start();
      await own.configure({ organization: "o" });
      const previewed = async (n: number) => {
        const { inputs, failures } = await own.check(urnOf("LvSnapshot", `r${n}`), declared("LvSnapshot"));
        expect(failures).toEqual([]);
        await own.create(urnOf("LvSnapshot"), { ...inputs, origin: unknownValue }, { preview: true });
      };
      const left = Array.from({ length: 1000 }, (_, n) => n);
      const caller = async () => {
        for (let n = left.pop(); n !== undefined; n = left.pop()) await previewed(n);
      };
      await Promise.all(Array.from({ length: atOnce }, caller));
      const [, now] = /VmRSS:\s*(\d+)/.exec(readFileSync(`/proc/${child.pid}/status`, "utf8")) ?? [];
      expect((Number(now) * 1024) / 1e6).toBeLessThan(megabytes);
      own.close();
    },
  );

  it("begins as every kernel and every package manager's shim can read it", () => {
    const [line = ""] = readFileSync("dist/plugin.js", "utf8").split("\n", 1);
    expect(line).toMatch(/^#!\/usr\/bin\/env -S node( --[a-z-]+(=\d+)?)+$/);
    expect(line.length).toBeLessThan(127);
  });

  it("ends when the engine that started it is gone", async () => {
    const own = await start();
    const ended = once(child, "exit");
    child.stdin?.destroy();
    expect(await ended).toEqual([1, null]);
    own.close();
  });

  it("serves the package's schema", async () => {
    const own = await start();
    const bytes = await callPlain(own.client, "GetSchema");
    expect(bytes.toString("utf8")).toContain(readFileSync("schema.json", "utf8").slice(0, 200));
    own.close();
  });
});

/** Everything that is not marked as secret. */
function plainText(value: unknown): string {
  return JSON.stringify(value, (_key, child: unknown) =>
    typeof child === "object" && child !== null && "4dabf18193072939515e22adb298388d" in child
      ? "secret"
      : child,
  );
}
