import { describe, expect, it } from "vitest";
import { makeCertificates } from "../../provider/core/certificateAuthority.js";
import { attachUnitName, renderAttachUnit } from "../../provider/linux/attachUnit.js";
import { type Answer, fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { fields } from "../support/fields.js";
import { machineId } from "../support/machineId.js";

const host = {
  address: "192.0.2.2",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const declared = { host, owner: "o/p/s/vm1", name: "vm1", uri: "nbd://10.0.0.1:10809/vm1" };
const complete = {
  adopt: false,
  readOnly: true,
  connections: 1,
  timeoutSeconds: 30,
  blockSize: 512,
  ...declared,
};
const plan = {
  owner: "o/p/s/vm1",
  name: "vm1",
  server: "10.0.0.1",
  port: 10809,
  exportName: "vm1",
  device: "/dev/nbd0",
  readOnly: true,
  connections: 1,
  timeoutSeconds: 30,
  blockSize: 512,
};
const state = {
  ...complete,
  device: "/dev/nbd0",
  path: "/dev/lvm-nbd/vm1",
  sizeBytes: 1048576,
  state: "attached",
};
const none: ReadonlySet<string> = new Set();

async function problems(change: object): Promise<string[]> {
  const asked = untouchedHost();
  const checked = await handlersOn("NbdAttachment", asked).check(undefined, { ...declared, ...change }, none);
  expect(asked.commands).toEqual([]);
  return checked.problems.map(({ property, reason }) => `${property}: ${reason}`);
}

describe("bad input is refused before any host is asked", () => {
  it.each([
    ["neither uri nor server", { uri: undefined }, /^uri: is missing: give/],
    ["a server without an export name", { uri: undefined, server: "a" }, /^uri: is missing: give/],
    ["a uri and a server", { server: "10.0.0.1" }, /^server: is part of `uri`/],
    ["a uri that is none", { uri: "server1:10809" }, /^uri: .*write nbd:\/\/SERVER/],
    ["a uri without an export", { uri: "nbd://server1/" }, /^uri: .*names no export/],
    ["a port out of range", { uri: undefined, server: "a", exportName: "b", port: 0 }, /^port: .*1 to 65535/],
    [
      "a server that would be taken for an option",
      { uri: undefined, server: "-x", exportName: "b" },
      /^server: /,
    ],
    ["a device that is no NBD device", { device: "/dev/sda" }, /^device: .*\/dev\/nbd0/],
    ["a partition as the device", { device: "/dev/nbd0p1" }, /^device: /],
    ["a name that leaves the folder", { name: "../x" }, /^name: .*letter or digit/],
    ["a block size that NBD does not have", { blockSize: 700 }, /^blockSize: .*512, 1024/],
    ["no connections", { connections: 0 }, /^connections: /],
    ["no timeout", { timeoutSeconds: 0 }, /^timeoutSeconds: /],
    ["an unknown property", { urii: "x" }, /^urii: is no property/],
  ])("%s", async (_what, change, message) => {
    expect(await problems(change)).toEqual([expect.stringMatching(message)]);
  });

  it("a uri that is only known later is not missing", async () => {
    const { uri: _, ...rest } = declared;
    const checked = await handlersOn("NbdAttachment", untouchedHost()).check(
      undefined,
      rest,
      new Set(["uri"]),
    );
    expect(checked.problems).toEqual([]);
    expect(checked.inputs).toMatchObject({ timeoutSeconds: 30 });
    expect(checked.predicted).toEqual({ path: "/dev/lvm-nbd/vm1" });
  });
});

interface World {
  unit?: string;
  active?: string;
  enabled?: string;
  sectors?: string;
  pid?: string;
  ro?: string;
  read?: string;
  link?: string;
  missing?: string;
  module?: string;
  size?: string;
  exportReadOnly?: string;
  free?: string;
  held?: string;
  applied?: number[];
  takeDown?: number;
  device?: string;
}

const unit = attachUnitName("vm1");

function world(at: World) {
  let taken = false;
  return fakeHost(({ argv, kind, stdin }) => {
    const text = argv.join("\n");
    if (kind === "change") {
      if (text.includes("systemctl disable")) {
        const outcome = (exitCode: number, said: string) =>
          fields({ [unit]: String(exitCode), [`${unit}.said`]: said, end: "" });
        if (at.held !== undefined) return outcome(75, `mount\t${Buffer.from(at.held).toString("base64")}\n`);
        if (at.takeDown !== undefined) return outcome(at.takeDown, "the log");
        taken = true;
        return fields({ [unit]: "0", end: "" });
      }
      const exitCode = at.applied?.shift() ?? 0;
      if (exitCode === 0 && stdin !== undefined) at.unit = stdin;
      return { exitCode, stderr: "the log" };
    }
    if (text.includes("emit missing")) {
      return fields({
        missing: at.missing ?? "",
        module: "not found",
        "module.rc": at.module ?? "0",
        size: at.size ?? "1048576",
        "size.rc": at.size === "" ? "1" : "0",
        "readOnly.rc": at.exportReadOnly ?? "2",
        end: "",
      });
    }
    if (text.includes("seq 0")) return at.free ?? "0\n1\n";
    if (text.includes("holders/*") && !text.includes("emit show")) {
      return at.held === undefined ? "" : `mount\t${Buffer.from(at.held).toString("base64")}\n`;
    }
    const there = at.unit !== undefined && !taken;
    return fields({
      ...(there ? { unit: at.unit ?? "" } : {}),
      show: `LoadState=loaded\nActiveState=${at.active ?? (there ? "active" : "inactive")}\nNeedDaemonReload=no\nDropInPaths=\nMainPID=7\n`,
      ...(there
        ? {
            ...(at.enabled === "disabled" ? {} : { boots: "yes" }),
            device: at.device ?? "/dev/nbd0",
            link: at.link ?? at.device ?? "/dev/nbd0",
            size: at.sectors ?? "2048",
            ro: at.ro ?? "1",
            pid: at.pid ?? "7",
            "read.rc": at.read ?? "0",
          }
        : {}),
      end: "",
    });
  });
}

describe("create", () => {
  it("takes the first free device and proves it", async () => {
    const asked = world({});
    const { id, state: made } = await handlersOn("NbdAttachment", asked).create(complete);
    expect({ id, made }).toEqual({ id: "192.0.2.2/vm1", made: state });
    expect(asked.changes).toHaveLength(1);
    expect(asked.changes[0]?.stdin).toBe(renderAttachUnit(plan));
  });

  it("takes the next device when the first was taken in between", async () => {
    const asked = world({ applied: [75, 0] });
    await handlersOn("NbdAttachment", asked).create(complete);
    expect(asked.changes.map(({ stdin }) => /nbd\d/.exec(stdin ?? "")?.[0])).toEqual(["nbd0", "nbd1"]);
  });

  it.each([
    ["an export that does not answer", { size: "" }, /EXPORT_UNREACHABLE/],
    ["a missing program", { missing: " nbd-client" }, /PROGRAM_MISSING.*package nbd-client/s],
    ["a kernel without the module", { module: "1" }, /MODULE_MISSING/],
    ["no free device", { free: "" }, /NO_FREE_DEVICE/],
  ])("%s is refused and nothing is changed", async (_what, at: World, message) => {
    const asked = world(at);
    await expect(handlersOn("NbdAttachment", asked).create(complete)).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it("a read-only export is not attached writable", async () => {
    const asked = world({ exportReadOnly: "0" });
    await expect(handlersOn("NbdAttachment", asked).create({ ...complete, readOnly: false })).rejects.toThrow(
      /INVALID_INPUT.*readOnly: .*exported read-only/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("a declared device that is in use is refused", async () => {
    const asked = world({ applied: [75] });
    await expect(
      handlersOn("NbdAttachment", asked).create({ ...complete, device: "/dev/nbd3" }),
    ).rejects.toThrow(/DEVICE_IN_USE.*\/dev\/nbd3/s);
  });

  it("what does not connect is taken down again, and the log is in the error", async () => {
    const asked = world({ applied: [70] });
    await expect(handlersOn("NbdAttachment", asked).create(complete)).rejects.toThrow(
      /ATTACHMENT_DEAD.*the log/s,
    );
    expect(asked.changes[1]?.argv.join("\n")).toContain("systemctl disable");
  });

  it("its own of an interrupted run is found and left as it is", async () => {
    const asked = world({ unit: renderAttachUnit(plan) });
    expect((await handlersOn("NbdAttachment", asked).create(complete)).state).toEqual(state);
    expect(asked.changes).toEqual([]);
  });

  it("another owner's of that name is refused with its owner named", async () => {
    const asked = world({ unit: renderAttachUnit({ ...plan, owner: "o/p/s/other" }) });
    await expect(handlersOn("NbdAttachment", asked).create(complete)).rejects.toThrow(
      /FOREIGN_RESOURCE.*o\/p\/s\/other/s,
    );
    expect(asked.changes).toEqual([]);
  });
});

describe("adopt", () => {
  it("is needed to take over a unit without a mark; another owner's is never taken", async () => {
    const unmarked = "[Service]\nExecStart=nbd-client\n";
    const refused = world({ unit: unmarked });
    await expect(handlersOn("NbdAttachment", refused).create(complete)).rejects.toThrow(
      /FOREIGN_RESOURCE.*no owner mark.*adopt: true/s,
    );
    expect(refused.changes).toEqual([]);
    const asked = world({ unit: unmarked });
    await handlersOn("NbdAttachment", asked).create({ ...complete, adopt: true });
    expect(asked.changes.map(({ stdin }) => stdin)).toEqual([renderAttachUnit(plan)]);
    const other = world({ unit: renderAttachUnit({ ...plan, owner: "o/p/s/other" }) });
    await expect(handlersOn("NbdAttachment", other).create({ ...complete, adopt: true })).rejects.toThrow(
      /FOREIGN_RESOURCE/,
    );
    expect(other.changes).toEqual([]);
  });
});

describe("an export given by server and name", () => {
  const { uri: _, ...rest } = complete;
  const apart = { ...rest, server: "10.0.0.1", exportName: "vm1" };

  it("is attached at the default port", async () => {
    const asked = world({});
    const { state: made } = await handlersOn("NbdAttachment", asked).create(apart);
    expect(asked.changes[0]?.stdin).toBe(renderAttachUnit(plan));
    expect(made).toMatchObject({ server: "10.0.0.1", exportName: "vm1", state: "attached" });
    expect(made).not.toHaveProperty("uri");
  });

  it("is told by a refresh to be another one, in the same words", async () => {
    const asked = world({ unit: renderAttachUnit({ ...plan, port: 10810 }) });
    const { uri: _uri, ...kept } = { ...state, ...apart };
    const read = await handlersOn("NbdAttachment", asked).read({ ...kept, uri: undefined });
    expect(read).toMatchObject({ server: "10.0.0.1", port: 10810, exportName: "vm1" });
    const { changes } = await handlersOn("NbdAttachment", untouchedHost()).diff({ ...read }, apart, none);
    expect(changes).toEqual([{ property: "port", effect: "replace" }]);
  });
});

it.each([
  ["1048576", 4096, "1048576"],
  ["1049088", 4096, "1048576"],
  ["1048577", 512, "1048576"],
])(
  "an export of %s bytes in blocks of %s is expected to be a device of %s",
  async (size, blockSize, expected) => {
    const asked = world({ size });
    await handlersOn("NbdAttachment", asked).create({ ...complete, blockSize });
    expect(asked.changes[0]?.argv).toContain(expected);
  },
);

describe("refresh", () => {
  const read = async (at: World) => {
    const handlers = handlersOn("NbdAttachment", world({ unit: renderAttachUnit(plan), ...at }));
    return { seen: await handlers.read({ ...state }), warnings: handlers.warnings };
  };

  it("finds no drift where all is as declared", async () => {
    expect(await read({})).toEqual({ seen: state, warnings: [] });
  });

  it.each([
    ["a stopped unit", { active: "inactive", sectors: "0" }, "detached"],
    ["a link cut by hand", { sectors: "0" }, "detached"],
    ["a dead link", { read: "1" }, "dead"],
    ["somebody else's link behind the device", { pid: "99" }, "replaced"],
    ["a device turned writable", { ro: "0" }, "edited"],
    ["a unit that would not start at boot", { enabled: "disabled" }, "disabled"],
    ["a missing stable path", { link: "" }, "edited"],
  ])("tells %s, and up puts it right in place", async (_what, at: World, expected) => {
    const { seen, warnings } = await read(at);
    expect(seen).toMatchObject({ state: expected });
    expect(warnings).toEqual([expect.stringContaining(`is ${expected}`)]);
    const { changes } = await handlersOn("NbdAttachment", untouchedHost()).diff(seen ?? {}, complete, none);
    expect(changes).toEqual([{ property: "state", effect: "update" }]);
  });

  it("a unit that runs while its file is gone is not absent, and is removed all the same", async () => {
    const asked = world({ active: "active" });
    const handlers = handlersOn("NbdAttachment", asked);
    expect(await handlers.read({ ...state })).toMatchObject({ state: "detached" });
    await expect(handlers.remove({ ...state })).rejects.toThrow(/still there/);
    expect(asked.changes).toHaveLength(1);
  });

  it("only a missing unit is gone", async () => {
    const handlers = handlersOn("NbdAttachment", world({}));
    expect(await handlers.read({ ...state })).toBeUndefined();
    expect(handlers.warnings).toEqual([expect.stringContaining("is gone")]);
  });

  it.each([
    ["is no JSON", (text: string) => text.replace(/^Plan=.*$/m, "Plan={")],
    ["lacks a property", (text: string) => text.replace(/^Plan=.*$/m, 'Plan={"owner":"o"}')],
    ["is gone", (text: string) => text.replace(/^Plan=.*\n/m, "")],
  ])(
    "takes a unit whose record %s for edited, and up writes it anew on the same device",
    async (_what, spoil) => {
      const asked = world({ unit: spoil(renderAttachUnit(plan)) });
      const handlers = handlersOn("NbdAttachment", asked);
      expect(await handlers.read({ ...state })).toMatchObject({ state: "edited" });
      await handlers.update({ ...state, state: "edited" }, complete);
      expect(asked.changes.map(({ stdin }) => stdin)).toEqual([renderAttachUnit(plan)]);
    },
  );

  it.each([
    ["a cut answer", fields({ show: "ActiveState=inactive" }), /OUTPUT_UNREADABLE/],
    ["no answer", "", /OUTPUT_UNREADABLE/],
    ["an answer without the unit's state", fields({ end: "" }), /OUTPUT_UNREADABLE/],
    ["a failed look", { exitCode: 1, stderr: "denied" }, /COMMAND_FAILED.*denied/s],
  ] as [string, Answer, RegExp][])(
    "never takes %s for an absence: read, create, update and remove fail and change nothing",
    async (_what, answer, message) => {
      const asked = fakeHost(() => answer);
      const handlers = handlersOn("NbdAttachment", asked);
      await expect(handlers.read({ ...state })).rejects.toThrow(message);
      await expect(handlers.create(complete)).rejects.toThrow(message);
      await expect(handlers.update({ ...state }, { ...complete, connections: 4 })).rejects.toThrow(message);
      await expect(handlers.remove({ ...state })).rejects.toThrow(message);
      expect(asked.changes).toEqual([]);
    },
  );

  it("tells a unit edited by hand, and another export in it", async () => {
    expect(
      (await read({ unit: renderAttachUnit(plan).replace("-timeout 30", "-timeout 0") })).seen,
    ).toMatchObject({ state: "edited" });
    const { seen } = await read({ unit: renderAttachUnit({ ...plan, exportName: "vm2" }) });
    expect(seen).toMatchObject({ uri: "nbd://10.0.0.1:10809/vm2" });
  });
});

describe("diff", () => {
  const diff = (change: object, unknown: ReadonlySet<string> = none) =>
    handlersOn("NbdAttachment", untouchedHost()).diff({ ...state }, { ...complete, ...change }, unknown);

  it("of the same declaration is empty, whichever device was chosen", async () => {
    expect((await diff({})).changes).toEqual([]);
  });

  it.each([
    ["device", { device: "/dev/nbd5" }],
    ["readOnly", { readOnly: false }],
    ["connections", { connections: 4 }],
    ["timeoutSeconds", { timeoutSeconds: 60 }],
    ["blockSize", { blockSize: 4096 }],
  ])("in place: %s", async (property, change) => {
    expect((await diff(change)).changes).toEqual([{ property, effect: "update" }]);
  });

  it.each([
    ["uri", { uri: "nbd://10.0.0.1:10809/vm2" }, true],
    ["name", { name: "vm2" }, false],
    ["host", { host: { ...host, address: "192.0.2.9" } }, true],
  ])("replacement: %s, the old removed first where names collide", async (property, change, first) => {
    const { changes, deleteBeforeReplace } = await diff(change);
    expect(changes).toEqual([{ property, effect: "replace" }]);
    expect(deleteBeforeReplace).toBe(first);
  });

  it("the same export written otherwise is no change", async () => {
    expect((await diff({ uri: "nbd://10.0.0.1/vm1" })).changes).toEqual([]);
    expect((await diff({ uri: undefined, server: "10.0.0.1", exportName: "vm1" })).changes).toEqual([]);
  });

  it("an unknown uri means a replacement, so that what is mounted is refused before anything breaks", async () => {
    const { uri: _, ...rest } = complete;
    const { changes } = await handlersOn("NbdAttachment", untouchedHost()).diff(
      { ...state },
      rest,
      new Set(["uri"]),
    );
    expect(changes).toEqual([{ property: "uri", effect: "replace" }]);
  });
});

describe("an update", () => {
  it.each([
    ["device", { device: "/dev/nbd5" }],
    ["readOnly", { readOnly: false }],
    ["connections", { connections: 4 }],
    ["timeoutSeconds", { timeoutSeconds: 60 }],
    ["blockSize", { blockSize: 4096 }],
    ["owner", { owner: "o/p/s/renamed" }],
  ])("of %s writes the unit anew and attaches again, in one command", async (_property, change) => {
    const asked = world({ unit: renderAttachUnit(plan), ro: "readOnly" in change ? "0" : "1" });
    const made = await handlersOn("NbdAttachment", asked).update({ ...state }, { ...complete, ...change });
    expect(asked.changes.map(({ stdin }) => stdin)).toEqual([renderAttachUnit({ ...plan, ...change })]);
    expect(made).toMatchObject({ ...change, state: "attached" });
  });

  it("stays on the device that was chosen", async () => {
    const asked = world({ unit: renderAttachUnit({ ...plan, device: "/dev/nbd3" }), device: "/dev/nbd3" });
    await handlersOn("NbdAttachment", asked).update(
      { ...state, device: "/dev/nbd3" },
      { ...complete, timeoutSeconds: 60 },
    );
    expect(asked.changes[0]?.stdin).toBe(
      renderAttachUnit({ ...plan, device: "/dev/nbd3", timeoutSeconds: 60 }),
    );
  });

  it("takes another device when somebody else's link is behind the old one, and leaves that alone", async () => {
    const asked = world({ unit: renderAttachUnit(plan), pid: "99", free: "4\n", held: "/mnt" });
    await handlersOn("NbdAttachment", asked).update({ ...state, state: "replaced" }, complete);
    expect(asked.changes[0]?.stdin).toBe(renderAttachUnit({ ...plan, device: "/dev/nbd4" }));
  });

  it("finds an export that does not answer before it touches what is attached", async () => {
    const asked = world({ unit: renderAttachUnit(plan), size: "" });
    await expect(
      handlersOn("NbdAttachment", asked).update({ ...state }, { ...complete, timeoutSeconds: 60 }),
    ).rejects.toThrow(/EXPORT_UNREACHABLE/);
    expect(asked.changes).toEqual([]);
  });

  it("of the connection alone runs nothing", async () => {
    const asked = untouchedHost();
    const rotated = { ...complete, host: { ...host, password: "new" } };
    const handlers = handlersOn("NbdAttachment", asked);
    expect((await handlers.diff({ ...state }, rotated, none)).changes).toEqual([
      { property: "host", effect: "connection" },
    ]);
    expect(await handlers.update({ ...state }, rotated)).toEqual({ ...state, host: rotated.host });
    expect(asked.commands).toEqual([]);
  });
});

it("a replacement that would take the same device removes the old one first", async () => {
  const { deleteBeforeReplace } = await handlersOn("NbdAttachment", untouchedHost()).diff(
    { ...state },
    { ...complete, name: "vm2", device: "/dev/nbd0" },
    none,
  );
  expect(deleteBeforeReplace).toBe(true);
});

it("a failed removal is an error with the host's words", async () => {
  const asked = world({ unit: renderAttachUnit(plan), takeDown: 1 });
  await expect(handlersOn("NbdAttachment", asked).remove({ ...state })).rejects.toThrow(
    /COMMAND_FAILED.*could not be removed.*the log/s,
  );
});

it("does not look for holders of a device behind which somebody else's link is, and cuts nothing", async () => {
  const asked = world({ unit: renderAttachUnit(plan), pid: "99" });
  await handlersOn("NbdAttachment", asked).remove({ ...state });
  expect(asked.changes).toHaveLength(1);
  expect(asked.changes[0]?.argv).not.toContain("/dev/nbd0");
});

describe("what is mounted stays", () => {
  it("a detach is refused with the holder named", async () => {
    const asked = world({ unit: renderAttachUnit(plan), held: "/mnt" });
    await expect(handlersOn("NbdAttachment", asked).remove({ ...state })).rejects.toThrow(
      /DEVICE_IN_USE.*mounted at \/mnt/s,
    );
  });

  it("a device turned writable by hand is not cut beneath a mount", async () => {
    const asked = world({ unit: renderAttachUnit(plan), ro: "0", held: "/mnt" });
    await expect(handlersOn("NbdAttachment", asked).update({ ...state }, complete)).rejects.toThrow(
      /DEVICE_IN_USE.*mounted at \/mnt/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("a failed change of what was there leaves it, with its unit, for the next up", async () => {
    const asked = world({ unit: renderAttachUnit(plan), applied: [70] });
    const changed = { ...complete, timeoutSeconds: 60 };
    await expect(handlersOn("NbdAttachment", asked).update({ ...state }, changed)).rejects.toThrow(
      /ATTACHMENT_DEAD/,
    );
    expect(asked.changes).toHaveLength(1);
  });

  it("a mount made between the look and the change is seen under the lock", async () => {
    const asked = world({ unit: renderAttachUnit(plan), applied: [76] });
    const changed = { ...complete, timeoutSeconds: 60 };
    await expect(handlersOn("NbdAttachment", asked).update({ ...state }, changed)).rejects.toThrow(
      /DEVICE_IN_USE/,
    );
    expect(asked.changes).toHaveLength(1);
    expect(asked.changes[0]?.argv).toContain("/dev/nbd0");
  });

  it("a change in place is refused and nothing is changed", async () => {
    const asked = world({ unit: renderAttachUnit(plan), held: "/mnt" });
    await expect(
      handlersOn("NbdAttachment", asked).update({ ...state }, { ...complete, timeoutSeconds: 60 }),
    ).rejects.toThrow(/DEVICE_IN_USE.*mounted at \/mnt/s);
    expect(asked.changes).toEqual([]);
  });
});

it("remove detaches what is there, and is done where nothing is", async () => {
  const asked = world({ unit: renderAttachUnit(plan) });
  await handlersOn("NbdAttachment", asked).remove({ ...state });
  expect(asked.changes).toHaveLength(1);
  const empty = world({});
  await handlersOn("NbdAttachment", empty).remove({ ...state });
  expect(empty.changes).toEqual([]);
});

describe("of an export with TLS", () => {
  const uri = "nbds://10.0.0.1:10809/vm1";
  const certificates = async () => {
    const made = await makeCertificates("vm1", ["10.0.0.1"], new Date());
    const { caCertificate, clientCertificate: certificate, clientPrivateKey: privateKey } = made;
    return { caCertificate, certificate, privateKey };
  };

  it("needs its certificates, and one without it none", async () => {
    const tls = await certificates();
    expect(await problems({ uri })).toEqual([expect.stringMatching(/^tls: is missing.*`clientTls`/)]);
    expect(await problems({ tls })).toEqual([expect.stringMatching(/^tls: goes only with an nbds/)]);
    expect(await problems({ uri, tls })).toEqual([]);
    expect(await problems({ uri, tls: { ...tls, privateKey: "x" } })).toEqual([
      expect.stringMatching(/^tls\.privateKey: is no private key/),
    ]);
    const later = await handlersOn("NbdAttachment", untouchedHost()).check(
      undefined,
      { ...declared, uri },
      new Set(["tls"]),
    );
    expect(later.problems).toEqual([]);
  });

  it("is asked and attached with them, and they travel on stdin alone", async () => {
    const tls = await certificates();
    const asked = world({});
    const handlers = handlersOn("NbdAttachment", asked);
    await handlers.create({ ...complete, uri, tls });
    expect(asked.changes[0]?.stdin).toContain("PRIVATE KEY");
    expect(asked.changes[1]?.stdin).toMatch(
      /-certfile "\/etc\/lvm-nbd\/lvm-nbd-attach-vm1~\S* .*-tlshostname 10\.0\.0\.1/,
    );
    const look = asked.commands.find(({ argv }) => argv.join("\n").includes("emit missing"));
    expect(look?.stdin).toContain("PRIVATE KEY");
    expect(look?.argv.at(-1)).toMatch(/^nbds:.*\?tls-certificates=@LVM-NBD/);
    const shown = asked.commands.flatMap(({ argv }) => argv).concat(handlers.lines, handlers.warnings);
    expect(shown.join("\n")).not.toMatch(/PRIVATE|BEGIN/);
  });

  it("other certificates are brought in place, and so is the same export with TLS or without", async () => {
    const [first, second] = [await certificates(), await certificates()];
    const handlers = handlersOn("NbdAttachment", untouchedHost());
    const kept = { ...state, uri, tls: first };
    const effects = async (before: object, wanted: object) =>
      (await handlers.diff({ ...before }, { ...complete, ...wanted }, none)).changes;
    expect(await effects(kept, { uri, tls: second })).toEqual([{ property: "tls", effect: "update" }]);
    expect(await effects(kept, {})).toEqual([
      { property: "uri", effect: "update" },
      { property: "tls", effect: "update" },
    ]);
    expect(await effects(kept, { uri: "nbds://10.0.0.2:10809/vm1", tls: first })).toEqual([
      { property: "uri", effect: "replace" },
    ]);
  });

  it("what was brought is taken away again when it cannot be attached", async () => {
    const asked = world({ applied: [0, 75, 75] });
    await expect(
      handlersOn("NbdAttachment", asked).create({ ...complete, uri, tls: await certificates() }),
    ).rejects.toThrow(/NO_FREE_DEVICE/);
    expect(asked.changes.at(-1)?.argv.join("\n")).toContain('|| rm -rf "$2"');
  });
});

describe("read by its id alone", () => {
  const finder = {
    organization: "o",
    project: "p",
    stack: "s",
    name: "vm1",
    host: undefined,
    readsOnly: false,
  };

  it("is declared as its unit has it, so that nothing is to change", async () => {
    const asked = world({ unit: renderAttachUnit(plan) });
    const handlers = handlersOn("NbdAttachment", asked);
    const found = await handlers.find("[2001:db8::1]:2222/vm1", finder);
    const at = { address: "2001:db8::1", port: 2222 };
    expect(found).toEqual({
      id: "[2001:db8::1]:2222/vm1",
      inputs: { ...declared, host: at },
      state: { ...state, host: at },
    });
    const checked = await handlers.check(undefined, found?.inputs ?? {}, none);
    expect(checked.problems).toEqual([]);
    expect((await handlers.diff(found?.state ?? {}, checked.inputs, none)).changes).toEqual([]);
    expect(asked.changes).toEqual([]);
  });

  it("with certificates is refused: their key is not read back", async () => {
    const secured = renderAttachUnit({ ...plan, tls: { digest: "0".repeat(64) } });
    await expect(
      handlersOn("NbdAttachment", world({ unit: secured })).find("server2/vm1", finder),
    ).rejects.toThrow(/INVALID_INPUT.*tls: /s);
  });
});

it("a preview of an update knows the device, unless another is declared", async () => {
  const handlers = handlersOn("NbdAttachment", untouchedHost());
  const kept = await handlers.preview(state, { ...complete, connections: 2 }, none);
  expect(kept.state).toMatchObject({ device: "/dev/nbd0", sizeBytes: 1048576, path: "/dev/lvm-nbd/vm1" });
  const moved = await handlers.preview({ ...state, machineId, state: "detached" }, complete, none);
  expect(moved.unknown).toEqual(["device", "sizeBytes", "certificatesExpireAt", "state"]);
});
