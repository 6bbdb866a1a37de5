import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, it, vi } from "vitest";
import { z } from "zod";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers } from "../../provider/core/handlers.js";
import { loadResourceType, resourceNames } from "../../provider/core/lazyRegistry.js";
import { ownerMark } from "../../provider/core/owner.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { resourceType, resourceTypes } from "../../provider/core/registry.js";
import type { Host, HostConnection } from "../../provider/ssh/types.js";
import { fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { recordedLvs, suitableOrigins } from "../support/recorded.js";

const host = {
  address: "192.0.2.1",
  user: "admin",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const quiesce = { freeze: "freeze-it", thaw: "thaw-it", timeoutSeconds: 5 };
const wanted = {
  host,
  owner: "o/p/s/vm1",
  adopt: false,
  volumeGroup: "VgVm",
  origin: "vm1",
  name: "vm1-snap",
  size: "16M",
  readOnly: true,
  chunkSize: 65536,
  tags: ["mine"],
  triggers: [],
};
const state = {
  ...wanted,
  uuid: "b6tJ4e-0000-0000-0000-0000-0000-000000",
  path: "/dev/VgVm/vm1-snap",
  sizeBytes: 16777216,
  originSizeBytes: 67108864,
  originUuid: "o",
  createdAt: "2026-01-01T00:00:00.000Z",
  usedPercent: 3,
  state: "valid",
};
const none: ReadonlySet<string> = new Set();
const quiet = () => handlersOn("LvSnapshot", untouchedHost());
const suitable = () =>
  handlersOn(
    "LvSnapshot",
    fakeHost(() => suitableOrigins()),
  );

describe("the host of a resource", () => {
  const changes = async (host: unknown, unknown: ReadonlySet<string> = none) => {
    const { host: _, ...rest } = wanted;
    return suitable().diff(state, host === undefined ? rest : { ...rest, host }, unknown);
  };

  it.each([
    ["another password", { ...host, password: "y" }],
    ["another user", { ...host, user: "root" }],
    ["another pinned key", { ...host, hostKey: "SHA256:MzXqvNVVvjAAgYmpPZVnXDMnKAoGIQdD4PBOfNRDGEY" }],
    ["the default port written out", { ...host, port: 22 }],
  ])("is the same with %s: only the connection changes", async (_what, other) => {
    expect((await changes(other)).changes).toEqual([{ property: "host", effect: "connection" }]);
  });

  it.each([
    ["another address", { ...host, address: "192.0.2.2" }],
    ["another port, as of another server behind one address", { ...host, port: 2202 }],
    ["an alias that cannot be resolved", "no-such-host.invalid"],
  ])(
    "is another one with %s: replaced, the old removed first, lest it be the same machine after all",
    async (_what, other) => {
      expect(await changes(other)).toEqual({
        changes: [{ property: "host", effect: "replace" }],
        deleteBeforeReplace: true,
      });
    },
  );

  it("that is only known later may be another one", async () => {
    expect((await changes(undefined, new Set(["host"]))).changes).toEqual([
      { property: "host", effect: "replace" },
    ]);
  });

  it("written in another order of its properties is no change", async () => {
    expect((await changes(Object.fromEntries(Object.entries(host).reverse()))).changes).toEqual([]);
  });
});

describe("a host by a configured name", () => {
  const on = (hosts: Record<string, HostConnection>) => {
    const opened: unknown[] = [];
    const handlers = createHandlers(resourceType("LvSnapshot"), {
      openHost: async (asked) => {
        opened.push(asked);
        return fakeHost(() => suitableOrigins());
      },
      namedHosts: () => new Map(Object.entries(hosts)),
      progress: () => undefined,
      warn: () => undefined,
      signal: new AbortController().signal,
    });
    return { ...handlers, opened };
  };
  const byName = { ...state, host: "server1" };
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-aliases-"));
  const aliases = join(folder, "config");
  writeFileSync(aliases, "Host aliased\n HostName 192.0.2.1\nHost elsewhere\n HostName 192.0.2.9\n");
  afterEach(() => {
    vi.unstubAllEnvs();
  });
  afterAll(() => rmSync(folder, { recursive: true }));
  const { address } = host;

  it("is known to a check, and what is wrong with it is told", async () => {
    const problems = async (hosts: Record<string, HostConnection>) =>
      (await on(hosts).check(undefined, { ...wanted, host: "server1" }, none)).problems;
    expect(await problems({ server1: host })).toEqual([]);
    expect(await problems({ server1: { address, privateKeyPath: "/no/such/key" } })).toEqual([
      {
        property: "host",
        reason: expect.stringContaining("lvm-nbd:hosts.server1.privateKeyPath: the private"),
      },
    ]);
  });

  it.each([
    ["the host", "Server1", '"Server1"'],
    ["the host with a user", "ann@SERVER1", '"ann@SERVER1"'],
    ["a jump", { address, proxyJump: ["server1", { address }, "serveR1:22"] }, '"serveR1:22"'],
  ])("is not taken for an alias where %s has it in another case", async (_what, given, shown) => {
    const { problems } = await on({ server1: host }).check(undefined, { ...wanted, host: given }, none);
    const reason = `${shown} differs from the configured name server1 in nothing but case`;
    expect(problems).toEqual([{ property: "host", reason: expect.stringContaining(reason) }]);
    const both = { server1: host, Server1: host, SERVER1: host, serveR1: host };
    expect((await on(both).check(undefined, { ...wanted, host: given }, none)).problems).toEqual([]);
  });

  it("has no diff whatever becomes of the configuration, and opens no host for it", async () => {
    for (const hosts of [{}, { server1: host }, { server1: { address: "192.0.2.77", port: 2222 } }]) {
      const { diff, opened } = on(hosts);
      expect(await diff(byName, { ...wanted, host: "server1" }, none)).toMatchObject({ changes: [] });
      expect(opened).toEqual([]);
    }
  });

  it.each([
    ["the machine that was declared in detail", { server1: { address, user: "root" } }, "connection"],
    ["another machine", { server1: { address: "192.0.2.2" } }, "replace"],
    ["another machine whose name is like that address", { [address]: { address: "192.0.2.2" } }, "replace"],
  ])("that takes the place of %s is seen as such", async (_what, hosts, effect) => {
    const [name = ""] = Object.keys(hosts);
    const { changes } = await on(hosts).diff(state, { ...wanted, host: name }, none);
    expect(changes).toEqual([{ property: "host", effect }]);
    const back = await on(hosts).diff({ ...state, host: name }, wanted, none);
    expect(back.changes).toEqual([{ property: "host", effect }]);
  });

  it.each([
    ["the same server", "gate1", "connection"],
    ["the same server, as another user", "ann@gate1:22", "connection"],
    ["another server", "gate2", "replace"],
    ["none", undefined, "replace"],
  ])("and of another of one address, behind %s, is seen as such", async (_what, proxyJump, effect) => {
    const hosts = {
      server1: { address, proxyJump: "gate1" },
      server2: { address, ...(proxyJump === undefined ? {} : { proxyJump }) },
      gate1: { address: "192.0.2.11" },
      gate2: { address: "192.0.2.12" },
    };
    const { changes } = await on(hosts).diff(byName, { ...wanted, host: "server2" }, none);
    expect(changes).toEqual([{ property: "host", effect }]);
    const back = await on(hosts).diff({ ...state, host: "server2" }, { ...wanted, host: "server1" }, none);
    expect(back.changes).toEqual([{ property: "host", effect }]);
  });

  it.each([
    ["a name", "server1"],
    ["a name with a user", "ann@server1"],
    ["a name that resolves", "localhost"],
  ])("is refused in the place of %s that is configured no more, until both are", async (_what, old) => {
    const hosts = { vmhost1: { address } };
    const next = { ...wanted, host: "vmhost1" };
    for (const ask of ["diff", "preview"] as const) {
      const refused = on(hosts)[ask]({ ...state, host: old }, next, none);
      await expect(refused).rejects.toThrow(
        new RegExp(
          `INVALID_INPUT.*"${old}" of the state is configured no more.*keep both names for one \`pulumi up\``,
        ),
      );
    }
    const both = { ...hosts, [old.replace("ann@", "")]: { address } };
    const { changes } = await on(both).diff({ ...state, host: old }, next, none);
    expect(changes).toEqual([{ property: "host", effect: "connection" }]);
  });

  it.each([
    ["an alias of that address", "aliased", "connection"],
    ["an alias of another machine", "elsewhere", "replace"],
    ["another address", "192.0.2.9", "replace"],
  ])("takes the place of %s", async (_what, old, effect) => {
    vi.stubEnv("LVM_NBD_SSH_CONFIG", aliases);
    const { changes } = await on({ server1: { address } }).diff(
      { ...state, host: old },
      { ...wanted, host: "server1" },
      none,
    );
    expect(changes).toEqual([{ property: "host", effect }]);
  });

  it("is the place of an id, and keeps that", async () => {
    expect(on({ server1: host }).id(byName)).toBe("server1/VgVm/vm1-snap");
  });
});

describe("a change that concerns only Pulumi's side", () => {
  it.each([
    ["credentials", { host: { ...host, password: "y" } }, "host"],
    ["adopt", { adopt: true }, "adopt"],
    ["quiesce", { quiesce }, "quiesce"],
  ])("is stored and runs nothing: %s", async (_what, change, property) => {
    const asked = untouchedHost();
    const handlers = handlersOn("LvSnapshot", asked);
    const next = { ...wanted, ...change };
    expect((await handlers.diff(state, next, none)).changes).toEqual([{ property, effect: "connection" }]);
    const updated = await handlers.update(state, next);
    expect(updated).toEqual({ ...state, ...change });
    expect((await handlers.diff(updated, next, none)).changes).toEqual([]);
    expect(asked.commands).toEqual([]);
  });

  it("takes back what is no longer declared, so that the next up sees no change", async () => {
    const handlers = quiet();
    const updated = await handlers.update({ ...state, quiesce }, wanted);
    expect(updated).toEqual(state);
    expect((await handlers.diff(updated, wanted, none)).changes).toEqual([]);
  });

  it("keeps what the provider chose itself", async () => {
    const attached = {
      host,
      owner: "o/p/s/a",
      adopt: false,
      name: "a",
      uri: "nbd://10.0.0.1:10809/a",
      readOnly: true,
      connections: 1,
      timeoutSeconds: 30,
      blockSize: 512,
    };
    const kept = {
      ...attached,
      device: "/dev/nbd3",
      path: "/dev/lvm-nbd/a",
      sizeBytes: 512,
      state: "attached",
    };
    const other = { ...attached, host: { ...host, password: "y" } };
    expect(await handlersOn("NbdAttachment", untouchedHost()).update(kept, other)).toEqual({
      ...kept,
      host: other.host,
    });
  });
});

describe("what cannot be read", () => {
  it("in the state is an error that names the property, before any host is asked", async () => {
    const asked = untouchedHost();
    const handlers = handlersOn("LvSnapshot", asked);
    const { uuid: _, ...broken } = state;
    await expect(handlers.read(broken)).rejects.toThrow(/INVALID_INPUT.*LvSnapshot.*uuid: is required/s);
    await expect(handlers.remove(broken)).rejects.toThrow(/uuid: is required/);
    await expect(handlers.update(broken, wanted)).rejects.toThrow(/uuid: is required/);
    await expect(handlers.create({ ...wanted, size: 3 })).rejects.toThrow(/INVALID_INPUT.*size: /s);
    expect(asked.commands).toEqual([]);
  });

  it("does not concern properties that a newer version added", async () => {
    expect((await quiet().diff({ ...state, later: 1 }, wanted, none)).changes).toEqual([]);
  });
});

describe("an operation", () => {
  it("names resource and host in its error", async () => {
    const failing = fakeHost(() => ({ exitCode: 5, stderr: "  Internal error" }));
    await expect(handlersOn("LvSnapshot", failing).read(state)).rejects.toMatchObject({
      code: "COMMAND_FAILED",
      details: { resource: "LvSnapshot vm1", host: "server1", exitCode: 5 },
    });
  });

  it.each(["create", "read", "update", "remove"] as const)(
    "says which resource it was when the host cannot be reached: %s",
    async (operation) => {
      const handlers = createHandlers(resourceType("LvSnapshot"), {
        openHost: () =>
          Promise.reject(new LvmNbdError("HOST_UNREACHABLE", { message: "no route", host: "h" })),
        progress: () => undefined,
        warn: () => undefined,
        signal: new AbortController().signal,
      });
      const run =
        operation === "update"
          ? handlers.update(state, { ...wanted, name: "other" })
          : handlers[operation](operation === "create" ? wanted : state);
      await expect(run).rejects.toMatchObject({
        code: "HOST_UNREACHABLE",
        details: { resource: "LvSnapshot vm1", host: "h" },
      });
    },
  );

  it.each([0, 1])("is ended by a cancel in its command %i", async (at) => {
    const controller = new AbortController();
    const ended: number[] = [];
    let count = 0;
    const watched: Host = {
      name: "server1",
      async machineId() {
        return undefined;
      },
      run(_command, given) {
        if (count++ !== at) return Promise.resolve({ exitCode: 0, stdout: recordedLvs("empty"), stderr: "" });
        setImmediate(() => controller.abort());
        return new Promise((_, reject) => {
          given?.addEventListener("abort", () => {
            ended.push(at);
            reject(new LvmNbdError("CANCELLED", { message: "cancelled" }));
          });
        });
      },
    };
    const handlers = createHandlers(resourceType("LvSnapshot"), {
      openHost: async () => watched,
      progress: () => undefined,
      warn: () => undefined,
      signal: controller.signal,
    });
    // The look at the volumes, and the one at their group.
    await expect(handlers.read(state)).rejects.toThrow(/CANCELLED/);
    expect([ended, count]).toEqual([[at], at + 1]);
  });

  it("that failed after it made something tells id and state, without undefined values", async () => {
    const uuid = /"lv_uuid":"([^"]+)"[^}]*"lv_name":"vm1-snap"/.exec(recordedLvs("valid"))?.[1];
    const asked = fakeHost(({ kind }) =>
      kind === "read" ? recordedLvs("valid") : { exitCode: 5, stderr: "  Something new" },
    );
    const failure = await handlersOn("LvSnapshot", asked)
      .create({ ...wanted, tags: ["other"], quiesce: undefined })
      .catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(PartialFailure);
    expect(failure).toMatchObject({
      id: "192.0.2.1/VgVm/vm1-snap",
      state: { uuid, tags: ["mine"] },
      cause: { code: "COMMAND_FAILED", details: { resource: "LvSnapshot vm1" } },
    });
    expect(Object.keys((failure as PartialFailure).state)).not.toContain("quiesce");
  });

  it("shows nothing to the person's terminal that a hostile host wrote as escape codes", async () => {
    const hostile = `${ownerMark("o/p/s/x")}#1b#5b2J#c2#9b1m`;
    const asked = fakeHost(() =>
      recordedLvs("valid").replace(/"lv_tags":"lvm-nbd\.owner=[^"]*"/, `"lv_tags":"${hostile}"`),
    );
    const handlers = handlersOn("LvSnapshot", asked);
    expect(await handlers.read(state)).toBeUndefined();
    expect(handlers.warnings).toEqual([expect.stringContaining("belongs to o/p/s/x?[2J?1m")]);
  });

  it("shows which resource on which host a line is about", async () => {
    const handlers = handlersOn(
      "LvSnapshot",
      fakeHost(() => recordedLvs("empty")),
    );
    await handlers.read(state);
    expect(handlers.warnings).toEqual([expect.stringMatching(/^LvSnapshot vm1 on server1: is gone/)]);
  });
});

describe("check", () => {
  it.each([
    ["a host that is a number", { host: 5 }, "host: must be string or object"],
    ["a host without an address", { host: {} }, "host.address: is required"],
    [
      "a host whose address is a number",
      { host: { address: 5 } },
      "host.address: Invalid input: expected string, received number",
    ],
    [
      "a jump without an address",
      { host: { ...host, proxyJump: [{}] } },
      "host.proxyJump.0.address: is required",
    ],
    [
      "a jump that is a number",
      { host: { ...host, proxyJump: 5 } },
      "host.proxyJump: must be string or object or array",
    ],
    ["a size that is a list", { size: [] }, "size: must be string or number"],
    ["a trigger that is a list", { triggers: [[]] }, "triggers.0: must be string or number or boolean"],
    [
      "a flag that is a word",
      { readOnly: "yes" },
      "readOnly: Invalid input: expected boolean, received string",
    ],
  ])("says where and what would be right of %s", async (_what, change, expected) => {
    const { problems } = await quiet().check(undefined, { ...wanted, ...change }, none);
    expect(problems.map(({ property, reason }) => `${property}: ${reason}`)).toEqual([expected]);
  });

  it.each(resourceTypes.map((type) => [type.type]))(
    "of %s names every required property at once",
    async (type) => {
      const { problems } = await handlersOn(type, untouchedHost()).check(undefined, {}, none);
      const needed = Object.entries(resourceType(type).inputs.shape)
        .filter(([, shape]) => !z.safeParse(shape, undefined).success)
        .map(([property]) => property);
      expect(needed).toEqual(expect.arrayContaining(["host", "owner"]));
      expect(problems.map(({ property }) => property).sort()).toEqual(needed.sort());
      for (const { reason } of problems) expect(reason).toBe("is required");
    },
  );

  it("gives no problem with the host twice, and none for a host that is only known later", async () => {
    const { host: _, ...rest } = wanted;
    expect((await quiet().check(undefined, rest, new Set(["host"]))).problems).toEqual([]);
  });

  it("predicts nothing from names that are only known later", async () => {
    for (const [type, property] of [
      ["LvSnapshot", "volumeGroup"],
      ["NbdExport", "listenAddress"],
      ["NbdAttachment", "name"],
    ] as const) {
      expect(resourceType(type).predict({ host: "server1", [property]: undefined }, none)).toEqual({});
    }
  });

  it("gives back inputs that hold no undefined value", async () => {
    const { inputs } = await quiet().check(undefined, { ...wanted, quiesce: undefined }, none);
    expect(Object.values(inputs)).not.toContain(undefined);
    expect(Object.keys(inputs)).not.toContain("quiesce");
  });
});

it("a type that this version does not know asks for a newer one", async () => {
  expect(() => resourceType("LvMirror")).toThrow(/no resource "LvMirror".*newer version/);
  for (const name of ["LvMirror", "toString"])
    await expect(loadResourceType(name)).rejects.toThrow(
      `no resource "${name}": the stack was made with a newer`,
    );
});

it("each type is loaded by its name", async () => {
  expect(resourceNames).toEqual(resourceTypes.map(({ type }) => type));
  for (const type of resourceTypes) expect(await loadResourceType(type.type)).toBe(type);
});

it("what a host tells goes into the state without its escape codes, what is declared as it is", async () => {
  const report: { report: { lv: Record<string, string>[] }[] } = JSON.parse(recordedLvs("valid"));
  const seen = report.report[0]?.lv.find(({ lv_name }) => lv_name === "vm1-snap");
  if (seen === undefined) throw new Error("no snapshot was recorded");
  const mark = ownerMark("o/p/s/vm1");
  Object.assign(seen, { lv_path: "/dev/\u001b[2J\u009b1m\u0000", lv_tags: `mine,${mark}` });
  const quiesced = { freeze: "printf '\u001b'", thaw: "true", timeoutSeconds: 5 };
  const handlers = handlersOn(
    "LvSnapshot",
    fakeHost(() => JSON.stringify(report)),
  );
  const read = await handlers.read({ ...state, uuid: seen.lv_uuid, quiesce: quiesced });
  expect(read).toMatchObject({ path: "/dev/?[2J?1m?", quiesce: quiesced });
});
