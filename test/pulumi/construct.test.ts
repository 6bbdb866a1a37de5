/** Components as any language asks for them: Construct over the wire, and what it says to the engine's monitor. */
import * as grpc from "@grpc/grpc-js";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { composeAs } from "../../provider/core/component.js";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers, type Environment } from "../../provider/core/handlers.js";
import { componentType, resourceType } from "../../provider/core/registry.js";
import type { resourceProto } from "../../provider/pulumi/monitor.js";
import { providerProto, structOf } from "../../provider/pulumi/proto.js";
import type { Parts } from "../../provider/pulumi/service.js";
import { unknownValue } from "../../provider/pulumi/unknowns.js";
import type { NamedHosts } from "../../provider/ssh/types.js";
import { type Answer, type FakeHost, fakeHost } from "../support/fakeHost.js";
import { startMonitor } from "../support/monitor.js";
import { callPlain, secret, startEngine, startService, unused, urnOf } from "../support/pluginClient.js";

type Request = providerProto.ConstructRequest;
type Values = Readonly<Record<string, unknown>>;

const component = "lvm-nbd:index:VmBackup";
const provider = "urn:pulumi:s::p::pulumi:providers:lvm-nbd::mine::1";
const declared = {
  ...{ host: "192.0.2.1", folder: "/backup", now: "2026-11-30T03:00:00", keep: { daily: 2 } },
  source: { host: "192.0.2.2", listenAddress: "10.0.0.1" },
  volumes: [{ volumeGroup: "VgVm", origin: "disk", size: "16M" }],
};

let answer: () => Answer;
let asked: FakeHost;
/** Hosts as a component finds them configured. */
let named: NamedHosts | undefined;
let opened: () => void;
let engine: Awaited<ReturnType<typeof startEngine>>;
let monitor: Awaited<ReturnType<typeof startMonitor>>;
let plugin: Awaited<ReturnType<typeof startService>>;

beforeEach(async () => {
  answer = () => "end\n";
  asked = fakeHost(() => answer());
  opened = () => undefined;
  const openHost = async () => {
    opened();
    return asked;
  };
  const parts: Parts = {
    version: "1.0.0",
    schema: async () => "{}",
    handlers: async (type, environment) => createHandlers(resourceType(type), { ...environment, openHost }),
    ask: unused,
    compose: async (type, environment: Omit<Environment, "openHost">, ...told) => {
      named = environment.namedHosts?.();
      return composeAs(componentType(type), { ...environment, openHost }, ...told);
    },
  };
  engine = await startEngine();
  monitor = await startMonitor();
  plugin = await startService(parts, engine.address);
});
afterEach(() => {
  plugin.close();
  monitor.close();
  engine.close();
});

const said = (request: Request) => {
  request.setMonitorendpoint(monitor.address);
  request.setOrganization("acme");
  request.setProject("p");
  request.setStack("s");
  request.getProvidersMap().set("lvm-nbd", provider);
};
const constructed = (inputs: Values = declared, edit: (request: Request) => void = () => undefined) =>
  plugin.construct(component, "vm1", inputs, (request) => {
    said(request);
    edit(request);
  });
/** An output as it crosses the wire. */
const output = (values: Values) => ({
  "4dabf18193072939515e22adb298388d": "d0e6a833031e9bbcd3f4e8bde6ca49a4",
  ...values,
});
const dependsOn = (request: Request, property: string, ...urns: string[]) => {
  const dependencies = new providerProto.ConstructRequest.PropertyDependencies();
  dependencies.setUrnsList(urns);
  request.getInputdependenciesMap().set(property, dependencies);
};
const dependenciesOf = (request: resourceProto.RegisterResourceRequest) =>
  Object.fromEntries(
    request
      .getPropertydependenciesMap()
      .getEntryList()
      .map(([key]) => [key, request.getPropertydependenciesMap().get(key)?.getUrnsList()]),
  );
const inputsOf = (name: string) => monitor.of(name).getObject()?.toJavaScript();

/** An image of that day as the host lists it. */
function listed(day: string, format = "raw"): string {
  const file = `/backup/vm1.VgVm.disk.${day}.${format}`;
  const manifest = {
    ...{ kind: "lvm-nbd image", mark: "m", copyId: "c", generation: "g" },
    image: { format, sha256: "0", sizeBytes: 1, verified: true, facts: "1 2" },
    source: { snapshot: { volumeGroup: "VgVm", origin: "disk", takenAt: `${day}T03:00:00Z` } },
    ...{ seconds: 1, startedAt: `${day}T03:00:00Z`, completedAt: `${day}T03:00:01Z`, tools: "" },
  };
  const words = [file, JSON.stringify(manifest), "9 1 2"];
  return `${words.map((word) => Buffer.from(word).toString("base64")).join(" ")}\n`;
}

describe("a VmBackup", () => {
  it("is made of resources of the plugin: today's backup, and what is kept of what its host has", async () => {
    answer = () => `${listed("2026-11-29", "qcow2")}${listed("2026-11-28")}end\n`;
    const { urn, state } = await constructed({ ...declared, connections: 2, compress: false });
    expect(urn).toBe(urnOf("VmBackup"));
    expect(state).toEqual({ keys: ["2026-11-30", "2026-11-29"] });
    expect(monitor.outputs).toEqual([{ urn, values: state }]);
    expect(asked.commands.map(({ kind }) => kind)).toEqual(["read"]);

    const [own, ...parts] = monitor.registered;
    expect(own?.toObject()).toMatchObject({ type: component, name: "vm1", custom: false, remote: false });
    expect(own?.getObject()?.toJavaScript()).toEqual({});
    expect(parts.map((part) => part.getName()).sort()).toEqual(["vm1-2026-11-29", "vm1-2026-11-30"]);
    for (const part of parts)
      expect(part.toObject()).toMatchObject({
        ...{ type: "lvm-nbd:index:BackupImage", custom: true, parent: urn, provider },
        ...{ acceptsecrets: true, acceptresources: true, version: "1.0.0" },
        aliasesList: [{ spec: { type: "pulumi-nodejs:dynamic/lvm-nbd:BackupImage" } }],
      });
    const { host, source } = declared;
    const volume = { volumeGroup: "VgVm", origin: "disk" };
    expect(inputsOf("vm1-2026-11-30")).toEqual({
      ...{ host, source, connections: 2, compress: false, format: "raw", existing: false },
      volumes: [{ ...volume, size: "16M", chunkSize: 65536, file: "/backup/vm1.VgVm.disk.2026-11-30.raw" }],
      owner: "acme/p/s/vm1-2026-11-30",
    });
    expect(inputsOf("vm1-2026-11-29")).toMatchObject({
      ...{ format: "qcow2", existing: true, compress: false, owner: "acme/p/s/vm1-2026-11-29" },
      volumes: [{ ...volume, file: "/backup/vm1.VgVm.disk.2026-11-29.qcow2" }],
    });
  });

  it("has parts that the plugin itself takes as they come", async () => {
    await constructed();
    const inputs = inputsOf("vm1-2026-11-30") ?? {};
    const checked = await plugin.check(urnOf("BackupImage", "vm1-2026-11-30"), inputs);
    expect(checked.failures).toEqual([]);
    expect(checked.inputs).toMatchObject(inputs);
  });

  it("owns its parts by the organisation that is configured, else by the engine's, else not at all", async () => {
    await constructed(declared, (request) => request.setOrganization(""));
    expect(inputsOf("vm1-2026-11-30")).not.toHaveProperty("owner");
    monitor.registered.length = 0;
    await plugin.configure({ organization: "configured" });
    await constructed();
    expect(inputsOf("vm1-2026-11-30")).toHaveProperty("owner", "configured/p/s/vm1-2026-11-30");
  });

  it("knows the hosts that are configured by name", async () => {
    await plugin.configure({ organization: "o", hosts: { backup1: { address: "192.0.2.1" } } });
    await constructed({ ...declared, host: "backup1" });
    expect(named?.get("backup1")).toMatchObject({ address: "192.0.2.1" });
    expect(inputsOf("vm1-2026-11-30")).toHaveProperty("host", "backup1");
  });

  it("hands on secrets, and what is made of one is one", async () => {
    const host = { address: "a", password: secret("planted") };
    await constructed({ ...declared, host, source: secret(declared.source) });
    expect(inputsOf("vm1-2026-11-30")).toMatchObject({ host, source: secret(declared.source) });
    expect(inputsOf("vm1-2026-11-30")?.existing).toBe(false);
    monitor.registered.length = 0;
    const { state } = await constructed({ ...declared, keep: secret({ daily: 1 }) });
    expect(inputsOf("vm1-2026-11-30")).toMatchObject({
      volumes: secret([expect.objectContaining({ origin: "disk" })]),
      existing: secret(false),
      host: "192.0.2.1",
    });
    expect(state).toEqual({ keys: secret(["2026-11-30"]) });
  });

  it("hands on what its inputs depend on, told beside them or in them", async () => {
    const one = urnOf("NbdExport", "one");
    const [two, three] = [urnOf("LvSnapshot", "two"), urnOf("Mount", "three")];
    const source = { host: "192.0.2.2", listenAddress: output({ value: "10.0.0.1", dependencies: [two] }) };
    const folder = output({ value: "/backup", secret: true, dependencies: [three] });
    const { dependencies } = await constructed({ ...declared, source, folder }, (request) => {
      dependsOn(request, "host", one);
      dependsOn(request, "source", two);
      request.setDependenciesList([one]);
    });
    const part = monitor.of("vm1-2026-11-30");
    expect(dependenciesOf(part)).toMatchObject({ host: [one], source: [two], volumes: [three] });
    expect(part.getDependenciesList().sort()).toEqual([two, three, one].sort());
    expect(inputsOf("vm1-2026-11-30")).toMatchObject({ source: { listenAddress: "10.0.0.1" } });
    expect(inputsOf("vm1-2026-11-30")?.volumes).toMatchObject(secret([{ origin: "disk" }]));
    expect(dependencies).toEqual({ keys: [three] });
    expect(monitor.of("vm1").getDependenciesList()).toEqual([one]);
  });

  it("hands on at a preview what is only known later", async () => {
    const source = { host: "192.0.2.2", listenAddress: output({ dependencies: [urnOf("HostSetup")] }) };
    await constructed({ ...declared, source, verify: unknownValue }, (request) => request.setDryrun(true));
    expect(inputsOf("vm1-2026-11-30")).toMatchObject({
      source: { host: "192.0.2.2", listenAddress: unknownValue },
      verify: unknownValue,
    });
    expect(dependenciesOf(monitor.of("vm1-2026-11-30"))).toMatchObject({ source: [urnOf("HostSetup")] });
  });

  it("says at a preview that a host that is only known later was not looked at", async () => {
    const { state } = await constructed({ ...declared, host: unknownValue }, (request) =>
      request.setDryrun(true),
    );
    expect(state).toEqual({ keys: unknownValue });
    expect(asked.commands).toEqual([]);
    expect(inputsOf("vm1-2026-11-30")).toMatchObject({ host: unknownValue, existing: false });
    expect(engine.lines).toMatchObject([
      { urn: urnOf("VmBackup"), message: expect.stringContaining("looked up by `pulumi up`") },
    ]);
  });

  it("is protected, retained, found under its aliases and hooked as declared", async () => {
    const alias = new (await import("@pulumi/pulumi/proto/alias_pb.js")).default.Alias();
    alias.setUrn(urnOf("VmBackup", "before"));
    await constructed(declared, (request) => {
      request.setParent(urnOf("Group", "above"));
      request.setAliasesList([alias]);
      request.setProtect(true);
      request.setRetainondelete(false);
      request.setDeletedwith(urnOf("HostSetup"));
      request.setIgnorechangesList(["x"]);
      request.setReplaceonchangesList(["y"]);
      request.setReplaceWithList([urnOf("HostSetup")]);
      request.setDeletebeforereplace(true);
      request.setAdditionalsecretoutputsList(["keys"]);
      request.setStackTraceHandle("7");
      const timeouts = new providerProto.ConstructRequest.CustomTimeouts();
      timeouts.setCreate("1h");
      request.setCustomtimeouts(timeouts);
      const hooks = new providerProto.ConstructRequest.ResourceHooksBinding();
      hooks.setAfterDeleteList(["hook"]);
      request.setResourceHooks(hooks);
    });
    const own = monitor.of("vm1").toObject();
    expect(own).toMatchObject({
      ...{ parent: urnOf("Group", "above"), aliasesList: [{ urn: urnOf("VmBackup", "before") }] },
      ...{ aliasspecs: true, protect: true, retainondelete: false, deletedwith: urnOf("HostSetup") },
      ...{ ignorechangesList: ["x"], replaceonchangesList: ["y"], replaceWithList: [urnOf("HostSetup")] },
      ...{ deletebeforereplace: true, deletebeforereplacedefined: true, parentstacktracehandle: "7" },
      ...{ additionalsecretoutputsList: ["keys"], customtimeouts: { create: "1h" } },
      hooks: { afterDeleteList: ["hook"], beforeCreateList: [] },
    });
    expect(monitor.of("vm1").getProvidersMap().get("lvm-nbd")).toBe(provider);
    expect(monitor.of("vm1-2026-11-30").toObject()).toMatchObject({
      ...{ protect: true, retainondelete: false, deletedwith: urnOf("HostSetup") },
      ...{ ignorechangesList: [], deletebeforereplacedefined: false },
    });
    monitor.registered.length = 0;
    await constructed();
    expect(monitor.of("vm1-2026-11-30").hasProtect()).toBe(false);
  });
});

it.each([
  ["2026-11-30T03:00", "2026-11-30"],
  ["2026-11-30T23:59:59.5", "2026-11-30"],
  // Which day that is here depends on where here is.
  ["2026-11-30T12:00:00Z", expect.stringMatching(/^2026-1/)],
  ["2026-11-30T12:00:00+01:00", expect.stringMatching(/^2026-1/)],
])("%s is a time", async (now, day) => {
  expect((await constructed({ ...declared, now })).state).toEqual({ keys: [day] });
});

it("components that look at one folder at once have it listed once; the next one looks anew", async () => {
  let open: () => void = () => undefined;
  const gate = new Promise<void>((resolve) => {
    open = resolve;
  });
  const { run } = asked;
  let asking = 0;
  asked = { ...asked, run: (command) => gate.then(() => run(command)) };
  opened = () => {
    asking += 1;
  };
  const all = ["vm1", "vm2"].map((name) => plugin.construct(component, name, declared, said));
  await vi.waitFor(() => expect(asking).toBe(2));
  open();
  for (const { state } of await Promise.all(all)) expect(state).toEqual({ keys: ["2026-11-30"] });
  expect(asked.commands).toHaveLength(1);
  answer = () => `${listed("2026-11-29")}end\n`;
  expect((await constructed()).state).toEqual({ keys: ["2026-11-30", "2026-11-29"] });
});

it("two components at once are each told to their own monitor, of their own stack", async () => {
  let open: () => void = () => undefined;
  const gate = new Promise<void>((resolve) => {
    open = resolve;
  });
  const other = await startMonitor(() => gate, "other");
  const first = plugin.construct(component, "first", declared, (request) => {
    said(request);
    request.setMonitorendpoint(other.address);
    request.setStack("other");
    request.setOrganization("others");
    request.setDryrun(true);
  });
  await vi.waitFor(() => expect(other.registered).toHaveLength(1));
  const second = await plugin.construct(component, "second", declared, said);
  expect(second.urn).toBe(urnOf("VmBackup", "second"));
  open();
  expect((await first).urn).toBe("urn:pulumi:other::p::lvm-nbd:index:VmBackup::first");
  const told = ({ registered }: typeof monitor) =>
    registered.map((request) => [request.getName(), request.getObject()?.toJavaScript().owner]);
  expect(told(other)).toEqual([
    ["first", undefined],
    ["first-2026-11-30", "others/p/other/first-2026-11-30"],
  ]);
  expect(told(monitor)).toEqual([
    ["second", undefined],
    ["second-2026-11-30", "acme/p/s/second-2026-11-30"],
  ]);
  other.close();
});

describe("a component that cannot be made is a failure, and nothing of it is registered", () => {
  const { INVALID_ARGUMENT, FAILED_PRECONDITION, INTERNAL } = grpc.status;
  const at = (now: string) => ({ ...declared, now });
  const noTime = /now: must be a day and/;

  it.each<[string, string, string, Values, number, RegExp]>([
    ["of no type", "", "vm1", declared, INTERNAL, /is no type of lvm-nbd/],
    ["of another package", "aws:s3:Bucket", "vm1", declared, INTERNAL, /is no type of lvm-nbd/],
    ["that is a resource", "lvm-nbd:index:LvSnapshot", "vm1", declared, INVALID_ARGUMENT, /no component/],
    ["without a name", component, "", declared, INVALID_ARGUMENT, /no name/],
    ["of a name that is none of a file", component, "a/b", declared, INVALID_ARGUMENT, /part of file names/],
    ["without inputs", component, "vm1", {}, INVALID_ARGUMENT, /volumes: is required/],
    ["that keeps nothing", component, "vm1", { ...declared, keep: {} }, INVALID_ARGUMENT, /keeps nothing/],
    ["of no time", component, "vm1", at("noon"), INVALID_ARGUMENT, noTime],
    // JavaScript reads that as midnight of Greenwich, which is the day before in half of the world.
    ["of a day", component, "vm1", at("2026-11-30"), INVALID_ARGUMENT, noTime],
    ["of a year", component, "vm1", at("2026"), INVALID_ARGUMENT, noTime],
    ["of slashes", component, "vm1", at("11/12/2026"), INVALID_ARGUMENT, noTime],
    ["of a wrong input", component, "vm1", { ...declared, format: 7 }, INVALID_ARGUMENT, /format/],
    ["of an input too many", component, "vm1", { ...declared, frmt: 1 }, INVALID_ARGUMENT, /frmt: is no/],
    [
      ...(["with an asset", component, "vm1"] as const),
      { ...declared, host: { "4dabf18193072939515e22adb298388d": "c44067f5952c0a294b673a41bacd8c17" } },
      ...([INVALID_ARGUMENT, /host is an asset/] as const),
    ],
  ])("%s", async (_what, type, name, inputs, code, message) => {
    const failed = plugin.construct(type, name, inputs, said);
    await expect(failed).rejects.toMatchObject({ code, details: expect.stringMatching(message) });
    expect(monitor.registered).toEqual([]);
  });

  it("where a name is only known later, or at an update anything", async () => {
    for (const [inputs, dryRun, message] of [
      [{ ...declared, folder: unknownValue }, true, /folder: must be known to the program/],
      [{ ...declared, frmt: unknownValue }, true, /frmt: is no property/],
      [{ ...declared, host: unknownValue }, false, /host is not known/],
    ] as const) {
      const failed = constructed(inputs, (request) => request.setDryrun(dryRun));
      await expect(failed).rejects.toThrow(message);
    }
    expect(monitor.registered).toEqual([]);
  });

  it("of a host that cannot be reached: it is not taken for one without backups", async () => {
    answer = () => new LvmNbdError("HOST_UNREACHABLE", { message: "no route" });
    await expect(constructed()).rejects.toMatchObject({
      code: FAILED_PRECONDITION,
      details: expect.stringMatching(/^HOST_UNREACHABLE: VmBackup vm1: no route/),
    });
    expect(monitor.registered).toEqual([]);
  });

  it("tells no secret", async () => {
    const host = { address: "a", password: secret("planted"), prt: 1 };
    const failed = constructed({ ...declared, host, keep: secret("planted") });
    await expect(failed).rejects.toMatchObject({ details: expect.not.stringContaining("planted") });
  });
});

describe("a monitor that does not do its part ends a component with a failure", () => {
  it("where there is none", async () => {
    await expect(constructed(declared, (request) => request.setMonitorendpoint(""))).rejects.toThrow(
      /where its monitor is/,
    );
    const { address } = monitor;
    monitor.close();
    await expect(constructed(declared, (request) => request.setMonitorendpoint(address))).rejects.toThrow(
      /the engine did not take it/,
    );
  });

  it.each([
    ["refuses the component", "vm1", grpc.status.INVALID_ARGUMENT],
    ["refuses a part", "vm1-2026-11-30", grpc.status.UNKNOWN],
    ["is shut down meanwhile", "vm1-2026-11-30", grpc.status.UNAVAILABLE],
    ["cancels meanwhile", "vm1-2026-11-30", grpc.status.CANCELLED],
  ])("that %s", async (_what, name, code) => {
    const other = await startMonitor((request) => {
      if (request.getName() === name) throw { code, details: "so it is" };
    });
    const failed = constructed(declared, (request) => request.setMonitorendpoint(other.address));
    await expect(failed).rejects.toThrow(/the engine did not take it: so it is/);
    expect(other.outputs).toEqual([]);
    other.close();
    // The plugin serves on.
    expect((await constructed()).urn).toBe(urnOf("VmBackup"));
  });

  it("that does not answer, until the engine cancels", async () => {
    const other = await startMonitor(() => new Promise(() => undefined));
    const failed = constructed(declared, (request) => request.setMonitorendpoint(other.address));
    failed.catch(() => undefined);
    await vi.waitFor(() => expect(other.registered).toHaveLength(1));
    await plugin.cancel();
    await expect(failed).rejects.toMatchObject({ code: grpc.status.ABORTED });
    await vi.waitFor(() => expect(other.ended).toBe(1));
    other.close();
  });
});

it("a message that was cut anywhere is an error, or what was left of it", async () => {
  const request = new providerProto.ConstructRequest();
  request.setType(component);
  request.setName("vm1");
  request.setInputs(structOf(declared));
  said(request);
  const bytes = request.serializeBinary();
  for (let length = 0; length < bytes.length; length += 5)
    await expect(
      callPlain(plugin.client, "Construct", Buffer.from(bytes.slice(0, length))),
    ).rejects.toThrow();
  expect(monitor.registered).toEqual([]);
});
