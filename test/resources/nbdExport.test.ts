import { X509Certificate } from "node:crypto";
import { describe, expect, it } from "vitest";
import { makeCertificates } from "../../provider/core/certificateAuthority.js";
import { LvmNbdError } from "../../provider/core/errors.js";
import { type ExportPlan, exportConfig, renderExportUnit } from "../../provider/linux/exportUnit.js";
import { type Answer, fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { fields } from "../support/fields.js";
import { machineId } from "../support/machineId.js";
import { recordedQcow2Header } from "../support/recorded.js";

const host = {
  address: "192.0.2.1",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const plan = {
  owner: "o/p/s/vm1",
  device: "/dev/VgVm/vm1-snap",
  exportName: "vm1",
  listenAddress: "10.0.0.1",
  port: 10809,
  readOnly: true,
  clients: ["10.0.0.2"],
  server: "nbdkit" as "nbdkit" | "nbd-server" | "qemu-nbd",
};
const declared = { host, ...plan };
const complete = { adopt: false, triggers: [], clientsEnforcedElsewhere: false, ...declared };
const state = {
  ...complete,
  uri: "nbd://10.0.0.1:10809/vm1",
  sizeBytes: 1048576,
  state: "serving",
};
const none: ReadonlySet<string> = new Set();
/** As it stands in the unit. */
const record = JSON.stringify(plan);

async function problems(change: object): Promise<string[]> {
  const asked = untouchedHost();
  const checked = await handlersOn("NbdExport", asked).check(undefined, { ...declared, ...change }, none);
  expect(asked.commands).toEqual([]);
  return checked.problems.map(({ property, reason }) => `${property}: ${reason}`);
}

describe("bad input is refused before any host is asked", () => {
  it.each([
    ["a port out of range", { port: 70000 }, /^port: .*1 to 65535/],
    ["port 0", { port: 0 }, /^port: .*1 to 65535/],
    ["a port that is no whole number", { port: 1.5 }, /^port: .*whole number/],
    [
      "an export of all interfaces without clients",
      { listenAddress: "0.0.0.0", clients: [] },
      /^clients: .*all interfaces.*everybody/,
    ],
    [
      "an export of all interfaces (IPv6) without clients",
      { listenAddress: "::", clients: [] },
      /^clients: .*all interfaces/,
    ],
    ["an export beyond loopback without clients", { clients: [] }, /^clients: .*needs the addresses/],
    ["everybody as a client", { clients: ["0.0.0.0/0"] }, /^clients\.0: .*everybody/],
    ["a name as a client", { clients: ["server2"] }, /^clients\.0: .*not an address or network/],
    ["a listen address that is none", { listenAddress: "server1" }, /^listenAddress: .*IP address/],
    ["a device that is not below /dev", { device: "/etc/passwd" }, /^device: .*below \/dev/],
    ["a device that climbs out of /dev", { device: "/dev/../etc/passwd" }, /^device: .*\.\./],
    ["a device with a space", { device: "/dev/a b" }, /^device: /],
    ["an export name with a line break", { exportName: "a\nb" }, /^exportName: .*control/],
    ["an export name with a slash", { exportName: "a/b" }, /^exportName: .*slashes/],
    ["an export name too long for a unit", { exportName: "ä".repeat(100) }, /^exportName: .*too long/],
    ["an unknown server", { server: "nfsd" }, /^server: .*nbdkit/],
    ["an unknown property", { adress: "x" }, /^adress: is no property/],
  ])("%s", async (_what, change, message) => {
    expect(await problems(change)).toEqual([expect.stringMatching(message)]);
  });

  it.each([
    ["neither", { device: undefined }, /^device: is required, unless `file` is given/],
    ["both", { file: "/b/vm1.raw" }, /^file: cannot go with `device`/],
    ["a format of a device", { format: "raw" }, /^format: goes only with `file`/],
  ])("what is exported: %s", async (_what, change, message) => {
    expect(await problems(change)).toEqual([expect.stringMatching(message)]);
  });

  it.each([
    ["a path that is not absolute", { file: "vm1.raw" }, /^file: .*absolute path/],
    ["a path that climbs", { file: "/b/../etc/shadow" }, /^file: .*"\.\."/],
    ["a device as a file", { file: "/dev/VgVm/vm1" }, /^file: .*does not outlive a reboot/],
    ["a path with a line break", { file: "/b/a\nb" }, /^file: .*control characters/],
    ["a name that ends with a backslash", { file: "/b/a\\" }, /^file: .*backslash/],
    ["an image that could be written", { readOnly: false }, /^readOnly: .*only ever read/],
    ["an unknown format", { format: "vmdk" }, /^format: .*qcow2/],
    ["qcow2 by nbdkit", { format: "qcow2" }, /^server: "nbdkit" cannot serve .*qcow2.*only "qemu-nbd" can/],
    [
      "qcow2 by nbd-server",
      { format: "qcow2", server: "nbd-server" },
      /^server: "nbd-server" cannot .*"qemu-nbd"/,
    ],
  ])("of an image: %s", async (_what, change, message) => {
    const wanted = { device: undefined, file: "/b/vm1.raw", ...change };
    expect(await problems(wanted)).toEqual([expect.stringMatching(message)]);
  });

  it("an image is checked as far as it is known at a preview, and gets no default that a device would get", async () => {
    const { device: _, ...rest } = declared;
    const handlers = handlersOn("NbdExport", untouchedHost());
    const unknown = await handlers.check(
      undefined,
      { ...rest, format: "qcow2", server: "qemu-nbd" },
      new Set(["file"]),
    );
    expect(unknown.problems).toEqual([]);
    expect((await handlers.check(undefined, { ...rest, file: "/b/vm1.raw" }, none)).problems).toEqual([]);
    expect(Object.keys((await handlers.check(undefined, declared, none)).inputs)).not.toContain("format");
  });

  it.each(["listenAddress", "exportName", "host"])("a missing %s", async (property) => {
    expect(await problems({ [property]: undefined })).toContain(`${property}: is required`);
  });

  it("loopback needs no clients, and the uri is known before anything runs", async () => {
    const wanted = { ...declared, listenAddress: "127.0.0.1", clients: undefined };
    const checked = await handlersOn("NbdExport", untouchedHost()).check(undefined, wanted, none);
    expect(checked.problems).toEqual([]);
    expect(checked.inputs).toMatchObject({ clients: [], server: "nbdkit" });
    expect(checked.predicted).toEqual({ uri: "nbd://127.0.0.1:10809/vm1" });
  });
});

interface World {
  unit?: string;
  conf?: string;
  active?: string;
  enabled?: string;
  size?: string;
  reads?: string;
  readOnly?: string;
  device?: string;
  read?: string;
  ro?: string;
  missing?: string;
  addresses?: string;
  route?: string;
  deviceSize?: string | null;
  listeners?: string;
  show?: string;
  applied?: number | LvmNbdError;
  /** What the host's kernel does about clients, as the look at it tells; undefined: it enforces them. */
  unenforced?: string;
  clientsProven?: boolean;
  /** False: it never was, on that host, with whatever kernel. */
  hostProven?: boolean;
  systemd?: string;
  /** Exit code of the proof. */
  proof?: number;
  /** All units of systemd look as if they were to be read anew. */
  outdated?: boolean;
  /** Exit code of its removal. */
  removal?: number;
  /** What systemd says when it is to read all units. */
  reload?: Answer;
  proven?: boolean;
  nbdkitTls?: string;
  /** Seconds since 1970. */
  now?: number;
  /** What was brought, by its names. */
  certificates?: Readonly<Record<string, string>>;
  /** What the looks at an image tell beside or instead of what is usual. */
  image?: Readonly<Record<string, string | undefined>>;
}

/** What only the proof of the clients by itself has. */
const proof = '\nprove_clients "$1"';

const reload = /\nreload_units\n$/;

/** A host with that unit; answers the look, the preflight and the changes of an export. `changes`: without those of systemd's memory. */
function world(at: World) {
  let taken = false;
  const asked = fakeHost(({ argv, kind, stdin }) => {
    const text = argv.join("\n");
    if (reload.test(argv[2] ?? "")) return at.reload ?? "";
    if (kind === "change") {
      const { applied } = at;
      if (applied instanceof LvmNbdError) return text.includes("systemctl restart") ? applied : "";
      const parts = argv.indexOf("ca-cert.pem");
      if (text.includes("refused()")) {
        if (at.proof === 0) at.proven = true;
        return { exitCode: at.proof ?? 0, stderr: "a client without TLS got in" };
      }
      if (parts > 0) at.certificates = broughtCertificates(argv.slice(parts), stdin ?? "");
      const isUnenforced = at.unenforced !== undefined && argv.includes("elsewhere");
      const told = isUnenforced ? `unenforced: ${at.unenforced}\n` : "";
      if (text.includes("systemctl restart")) {
        if (applied === undefined) at.unit = stdin ?? "";
        return { exitCode: applied ?? 0, stdout: told, stderr: "the log" };
      }
      if (text.includes(proof)) return { exitCode: applied ?? 0, stdout: told, stderr: "got in" };
      if (text.includes('end_unit "$1"')) {
        if (!at.removal) taken = true;
        return `${argv[5]} =${at.removal ?? 0}\n${argv[5]}.said =the log\nend =\n`;
      }
      if (text.includes("systemctl enable")) {
        at.enabled = "enabled";
        return { exitCode: applied ?? 0, stderr: "the log" };
      }
      return "";
    }
    if (text.includes("emit missing")) {
      return fields({
        missing: at.missing ?? "",
        ro: at.ro ?? "0",
        read: "dd: Input/output error",
        "read.rc": at.read ?? "0",
        ...(argv[9] === "" ? { device: at.device ?? "block" } : imageFields(at)),
        addresses: at.addresses ?? "2: eth0 inet 10.0.0.1/24",
        route: at.route ?? `local ${argv[6]} dev lo src ${argv[6]} uid 0`,
        listeners: at.listeners ?? "",
        pid: "7",
        systemd: at.systemd ?? "252",
        nbdkitTls: at.nbdkitTls ?? "yes",
        now: String(at.now ?? Math.floor(Date.now() / 1000)),
        end: "",
      });
    }
    const active = at.active ?? (at.unit === undefined || taken ? "inactive" : "active");
    return fields({
      ...(at.unit === undefined || taken ? {} : { unit: at.unit }),
      ...(at.conf === undefined ? {} : { conf: at.conf }),
      ...(at.hostProven === false ? {} : { hostProven: "yes" }),
      ...(at.clientsProven === false || at.unenforced !== undefined ? {} : { clientsProven: "yes" }),
      show: `LoadState=loaded\nActiveState=${active}\nNeedDaemonReload=no\nDropInPaths=\nMainPID=7\n${at.show ?? ""}`,
      ...(at.enabled === "disabled" ? {} : { boots: "yes" }),
      ...(at.outdated ? { outdated: "yes" } : {}),
      ...(at.deviceSize === null || at.image ? {} : { deviceSize: at.deviceSize ?? "1048576" }),
      ...(at.image && imageFields(at)),
      ...(at.certificates && {
        ca: at.certificates["ca-cert.pem"] ?? "",
        serverCert: at.certificates["server-cert.pem"] ?? "",
        clientCert: at.certificates["client-cert.pem"] ?? "",
        clientKey: at.certificates["client-key.pem"] ?? "",
        ...(at.proven === false ? {} : { proven: "yes" }),
        now: String(at.now ?? Math.floor(Date.now() / 1000)),
      }),
      ...(active === "active"
        ? {
            size: at.size ?? "1048576",
            "size.rc": "0",
            bytes: at.reads ?? "512",
            readOnly: "",
            "readOnly.rc": at.readOnly ?? "0",
          }
        : {}),
      end: "",
    });
  });
  return {
    ...asked,
    get changes() {
      return asked.changes.filter(({ argv }) => !reload.test(argv[2] ?? ""));
    },
    get reloads() {
      return asked.changes.filter(({ argv }) => reload.test(argv[2] ?? "")).length;
    },
  };
}

function broughtCertificates(parts: readonly string[], stdin: string): Record<string, string> {
  let from = 0;
  const files: Record<string, string> = {};
  for (let index = 0; index < parts.length; index += 2) {
    const bytes = Number(parts[index + 1]);
    files[parts[index] ?? ""] = stdin.slice(from, from + bytes);
    from += bytes;
  }
  return files;
}

function known(values: Readonly<Record<string, string | undefined>>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(values).flatMap(([name, value]) => (value === undefined ? [] : [[name, value]])),
  );
}

/** The look at a sound image, but for what the test says. */
function imageFields({ image }: World): Record<string, string> {
  const sound = {
    folder: "yes",
    kind: "regular file",
    realPath: "/b/vm1.raw",
    exposed: "",
    fileId: "12:1790000000",
    mountPoint: "/",
    fileSize: "1048576",
  };
  return known({ ...sound, read: "dd: Permission denied", "read.rc": "0", ...image });
}

describe("create finds out first what would make it fail", () => {
  it.each([
    ["a device that does not exist", { device: "absent" }, /DEVICE_NOT_FOUND.*device: .*does not exist/s],
    ["a device that is not a block device", { device: "other" }, /DEVICE_NOT_BLOCK.*not a block device/s],
    ["a read-only device to be exported writable", { ro: "1" }, /INVALID_INPUT.*readOnly: .*is read-only/s],
    ["an unreadable device", { read: "1" }, /DEVICE_UNREADABLE.*Input\/output error/s],
    [
      "a missing program",
      { missing: " nbdkit nbdinfo" },
      /PROGRAM_MISSING.*nbdkit, from package nbdkit; nbdinfo, from package libnbd-bin/s,
    ],
    ["an address that is not the host's", { addresses: "" }, /ADDRESS_NOT_LOCAL.*10\.0\.0\.1/s],
    [
      "a busy port",
      { listeners: 'LISTEN 0 5 0.0.0.0:10809 0.0.0.0:* users:(("nginx",pid=9,fd=3))' },
      /PORT_IN_USE.*10809.*nginx \(pid 9\)/s,
    ],
  ])("%s", async (_what, at: World, message) => {
    const asked = world(at);
    const wanted = { ...complete, readOnly: at.ro === undefined };
    await expect(handlersOn("NbdExport", asked).create(wanted)).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it("what starts but does not serve is taken down again, and the server's log is in the error", async () => {
    const asked = world({ applied: 70 });
    await expect(handlersOn("NbdExport", asked).create(complete)).rejects.toThrow(
      /EXPORT_NOT_SERVING.*the log/s,
    );
    expect(asked.changes).toHaveLength(2);
    expect(asked.changes[1]?.argv.join("\n")).toContain('end_unit "$1"');
  });

  it("what was not known to serve when its time was over is taken down again, whatever still goes on", async () => {
    const asked = world({
      applied: new LvmNbdError("COMMAND_TIMED_OUT", { message: "no end after 1440 s" }),
    });
    await expect(handlersOn("NbdExport", asked).create(complete)).rejects.toThrow(/COMMAND_TIMED_OUT/);
    expect(asked.changes).toHaveLength(2);
    expect(asked.changes[1]?.argv.join("\n")).toContain('end_unit "$1"');
  });

  it("an export whose clients the host does not enforce is stopped and taken down", async () => {
    const asked = world({ applied: 71 });
    await expect(handlersOn("NbdExport", asked).create(complete)).rejects.toThrow(
      /CLIENTS_NOT_ENFORCED.*everybody/s,
    );
    expect(asked.changes[1]?.argv.join("\n")).toContain('end_unit "$1"');
  });

  it("an export of whose clients that cannot be told is taken down, and not said to be open to everybody", async () => {
    const asked = world({ applied: 72 });
    const made = handlersOn("NbdExport", asked).create(complete);
    await expect(made).rejects.toThrow(/COMMAND_FAILED.*whether the host enforces them cannot be told/s);
    await expect(made).rejects.not.toThrow(/everybody/);
    expect(asked.changes[1]?.argv.join("\n")).toContain('end_unit "$1"');
  });

  it.each([
    ["refuse", {}],
    ["elsewhere", { clientsEnforcedElsewhere: true }],
    ["none", { listenAddress: "127.0.0.1" }],
  ])("its clients' guard is %s for %j", async (guard, change) => {
    const asked = world({});
    await handlersOn("NbdExport", asked).create({ ...complete, ...change });
    expect(asked.changes[0]?.argv[8]).toBe(guard);
  });

  it("another owner's export of that name is refused with its owner named", async () => {
    const asked = world({ unit: renderExportUnit({ ...plan, owner: "o/p/s/other" }) });
    await expect(handlersOn("NbdExport", asked).create(complete)).rejects.toThrow(
      /FOREIGN_RESOURCE.*o\/p\/s\/other/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("its own of an interrupted run is found and left as it is", async () => {
    const asked = world({ unit: renderExportUnit(plan) });
    const { id, state: made } = await handlersOn("NbdExport", asked).create(complete);
    expect(asked.changes).toEqual([]);
    expect({ id, made }).toEqual({ id: "192.0.2.1/vm1", made: state });
  });

  it("tells systemd once of all that were made at about the same time, and is made also where that fails", async () => {
    const at: World = { reload: { exitCode: 1, stderr: "Failed to reload daemon" } };
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const [one, other] = await Promise.all([handlers.create(complete), handlers.create(complete)]);
    expect([one.state, other.state]).toMatchObject([{ state: "serving" }, { state: "serving" }]);
    expect([asked.changes.length, asked.reloads]).toEqual([2, 1]);
    expect(handlers.warnings.filter((line) => line.includes("systemctl daemon-reload"))).toHaveLength(1);
    // The next one again; one that only goes on serving, never.
    await handlers.update({ ...one.state }, { ...complete, clients: ["10.0.0.3"] });
    expect(asked.reloads).toBe(1);
  });

  it("makes an absent one", async () => {
    const asked = world({});
    expect((await handlersOn("NbdExport", asked).create(complete)).state).toEqual(state);
    expect(asked.changes).toHaveLength(1);
    expect(asked.changes[0]?.stdin).toBe(renderExportUnit(plan));
  });
});

describe("clients that something else than the host enforces", () => {
  const elsewhere = { ...complete, clientsEnforcedElsewhere: true };

  it("are told as a warning each time that the host is found not to enforce them", async () => {
    const at: World = { unenforced: "a process got in" };
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const { state: made } = await handlers.create(elsewhere);
    expect(made).toMatchObject({ state: "serving", clientsEnforcedElsewhere: true });
    const warning = expect.stringMatching(
      /kernel does not enforce `clients` \(a process got in\).*something else keeps all others out/,
    );
    const ofThem = () => handlers.warnings.filter((line) => line.includes("enforce"));
    expect(ofThem()).toEqual([warning]);
    await handlers.update(made, { ...elsewhere, port: 10810 });
    expect(ofThem()).toEqual([warning, warning]);
    delete at.unenforced;
    await handlers.update(made, { ...elsewhere, port: 10811 });
    expect(ofThem()).toHaveLength(2);
  });

  it("are declared, and no more, without a restart; the host is looked at if it was not yet", async () => {
    const at: World = { unit: renderExportUnit(plan) };
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const change = [{ property: "clientsEnforcedElsewhere", effect: "update" }];
    expect((await handlers.diff(state, elsewhere, none)).changes).toEqual(change);
    expect(await handlers.update(state, elsewhere)).toEqual({ ...state, clientsEnforcedElsewhere: true });
    expect(asked.changes).toEqual([]);

    at.unenforced = "a process got in";
    expect(await handlers.update(state, elsewhere)).toMatchObject({ state: "serving" });
    expect(asked.changes.map(({ argv }) => argv.slice(4))).toEqual([
      ["lvm-nbd-export-vm1.service", "nbd://10.0.0.1:10809/vm1", "elsewhere", "10809", record],
    ]);
    expect(handlers.warnings).toEqual([expect.stringContaining("does not enforce `clients`")]);

    at.applied = 71;
    await expect(handlers.update({ ...state, clientsEnforcedElsewhere: true }, complete)).rejects.toThrow(
      /CLIENTS_NOT_ENFORCED.*clientsEnforcedElsewhere: true/s,
    );
    expect(asked.changes[1]?.argv.slice(6)).toEqual(["refuse", "10809", record]);
  });

  it("a run that was cut before the host was looked at is gone on with", async () => {
    const asked = world({ unit: renderExportUnit(plan), clientsProven: false });
    await handlersOn("NbdExport", asked).create(complete);
    expect(asked.changes.map(({ argv }) => argv.slice(-3))).toEqual([["refuse", "10809", record]]);
    expect(asked.changes[0]?.argv[2]).not.toContain("systemctl restart");
  });

  it("a refresh tells that nobody has looked at the host yet with the kernel that runs, and the next up does", async () => {
    const at: World = { unit: renderExportUnit(plan), clientsProven: false };
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const seen = await handlers.read(state);
    expect(seen).toMatchObject({ state: "unproven" });
    expect(handlers.warnings.join()).toContain("is unproven; `pulumi up` will see whether");
    expect((await handlers.diff(seen ?? {}, complete, none)).changes).toEqual([
      { property: "state", effect: "update" },
    ]);
    await handlers.update(seen ?? {}, complete);
    expect(asked.changes.map(({ argv }) => argv.slice(-3))).toEqual([["refuse", "10809", record]]);
    // Something else keeps all others out.
    const elsewhere = { ...state, clientsEnforcedElsewhere: true };
    expect(await handlers.read(elsewhere)).toMatchObject({ state: "serving" });
  });

  it("one that starts at no boot is looked at before it is to", async () => {
    const at: World = {
      unit: renderExportUnit(plan),
      clientsProven: false,
      enabled: "disabled",
      applied: 71,
    };
    const asked = world(at);
    await expect(handlersOn("NbdExport", asked).update(state, complete)).rejects.toThrow(
      "CLIENTS_NOT_ENFORCED",
    );
    expect(asked.changes).toHaveLength(1);
    at.applied = 0;
    await handlersOn("NbdExport", asked).update(state, complete);
    expect(asked.changes.slice(1).map(({ argv }) => argv[2]?.includes(proof))).toEqual([true, false]);
    expect(at.enabled).toBe("enabled");
  });

  it.each<[string, World, string]>([
    ["starts at boot", {}, "10809"],
    ["was cut between its start and its proof", { enabled: "disabled" }, ""],
    ["starts at boot, though the note of its host was lost or never written", { hostProven: false }, "10809"],
    [
      "starts at boot since something else kept all others out, on a host of which it never was",
      { unit: renderExportUnit(plan, true), hostProven: false },
      "",
    ],
    [
      "starts at boot since something else kept all others out, on a host of which it was",
      { unit: renderExportUnit(plan, true) },
      "10809",
    ],
  ])("one that %s, is spared for a client only if it was proven", async (_what, change, port) => {
    const at: World = { unit: renderExportUnit(plan), clientsProven: false, applied: 72, ...change };
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    await expect(handlers.update(state, complete)).rejects.toThrow(/COMMAND_FAILED.*the export was stopped/s);
    await expect(handlers.update(state, { ...complete, clients: ["10.0.0.3"] })).rejects.toThrow(
      /COMMAND_FAILED.*the export was stopped/s,
    );
    expect(asked.changes.map(({ argv }) => argv.at(argv.includes(record) ? -2 : -1))).toEqual([port, port]);
  });

  it.each<[string, World, object, string]>([
    [
      "listens on loopback",
      { unit: renderExportUnit({ ...plan, listenAddress: "::1" }) },
      { listenAddress: "::1", port: 10810 },
      "10810",
    ],
    ["listened on loopback until now", { unit: renderExportUnit({ ...plan, listenAddress: "::1" }) }, {}, ""],
    [
      "is kept from others by something else",
      { unit: renderExportUnit(plan, true), hostProven: false },
      { clientsEnforcedElsewhere: true, port: 10810 },
      "10810",
    ],
    ["starts at no boot", { enabled: "disabled" }, { port: 10810 }, ""],
    ["starts at boot", {}, { port: 10810 }, "10810"],
  ])("one that %s stays enabled while it is changed, or is seen first", async (_what, at, change, port) => {
    const asked = world({ unit: renderExportUnit(plan), ...at });
    await handlersOn("NbdExport", asked).update(state, { ...complete, ...change });
    const { argv, stdin } = asked.changes[0] ?? { argv: [] };
    expect([argv[2]?.includes("systemctl restart"), argv.at(-1)]).toEqual([true, port]);
    expect(stdin?.includes("ClientsEnforced=elsewhere")).toBe("clientsEnforcedElsewhere" in change);
  });

  it("one that was cut before its proof is written anew to start at boot without", async () => {
    const at: World = { unit: renderExportUnit(plan), unenforced: "no", enabled: "disabled" };
    const asked = world(at);
    await handlersOn("NbdExport", asked).update(state, { ...complete, clientsEnforcedElsewhere: true });
    expect(asked.changes[0]?.stdin).toBe(renderExportUnit(plan, true));
  });

  it("one that was proven, but not enabled, is left there for the next up", async () => {
    const asked = world({ applied: 75 });
    await expect(handlersOn("NbdExport", asked).create(complete)).rejects.toThrow(
      /COMMAND_FAILED.*serves and was proven/s,
    );
    expect(asked.changes).toHaveLength(1);
  });

  it.each([
    ["was stopped", 72, /COMMAND_FAILED.*cannot be told; the export was stopped/s],
    [
      "goes on serving",
      73,
      /COMMAND_FAILED.*cannot be told; the export goes on serving, since a client is connected/s,
    ],
    [
      "could not be stopped",
      74,
      /CLIENTS_NOT_ENFORCED.*could NOT be stopped\n.*what to do: Stop it on the host, now/s,
    ],
    ["may go on", 1, /COMMAND_FAILED.*could not be found out\n/s],
  ])("an export that serves already %s where that cannot be told: %i", async (_what, applied, message) => {
    const asked = world({ unit: renderExportUnit(plan), clientsProven: false, applied });
    await expect(handlersOn("NbdExport", asked).update(state, complete)).rejects.toThrow(message);
    expect(asked.changes).toHaveLength(1);
  });

  it("a state of before the property was there differs in nothing", async () => {
    const { clientsEnforcedElsewhere: _, ...before } = state;
    expect((await handlersOn("NbdExport", world({})).diff(before, complete, none)).changes).toEqual([]);
  });
});

describe("adopt", () => {
  const unmarked = "[Service]\nExecStart=nbdkit file=/dev/x\n";

  it("is needed to take over a unit without a mark, and rewrites it", async () => {
    const refused = world({ unit: unmarked });
    await expect(handlersOn("NbdExport", refused).create(complete)).rejects.toThrow(
      /FOREIGN_RESOURCE.*no owner mark.*adopt: true/s,
    );
    expect(refused.changes).toEqual([]);
    const asked = world({ unit: unmarked });
    await handlersOn("NbdExport", asked).create({ ...complete, adopt: true });
    expect(asked.changes.map(({ stdin }) => stdin)).toEqual([renderExportUnit(plan)]);
  });

  it("takes nothing from another owner", async () => {
    const asked = world({ unit: renderExportUnit({ ...plan, owner: "o/p/s/other" }) });
    await expect(handlersOn("NbdExport", asked).create({ ...complete, adopt: true })).rejects.toThrow(
      /FOREIGN_RESOURCE.*o\/p\/s\/other/s,
    );
    expect(asked.changes).toEqual([]);
  });
});

describe("the host's own look at its export", () => {
  it("is let in by the address from which the host reaches a second address of a network", async () => {
    const asked = world({ route: "local 10.0.0.1 dev lo src 10.0.0.9 uid 0" });
    const { state: made } = await handlersOn("NbdExport", asked).create(complete);
    expect(asked.changes[0]?.stdin).toBe(renderExportUnit({ ...plan, ownAddress: "10.0.0.9" }));
    expect(made).toEqual(state);
  });

  it("needs no further address on loopback and on all interfaces", async () => {
    for (const listenAddress of ["127.0.0.1", "0.0.0.0"]) {
      const asked = world({ route: "local x dev lo src 10.0.0.9 uid 0" });
      await handlersOn("NbdExport", asked).create({ ...complete, listenAddress });
      expect(asked.changes[0]?.stdin).toBe(renderExportUnit({ ...plan, listenAddress }));
    }
  });
});

it("an export on all interfaces is reached by the name of its host", async () => {
  const wanted = { ...declared, listenAddress: "0.0.0.0" };
  const { predicted } = await handlersOn("NbdExport", untouchedHost()).check(undefined, wanted, none);
  expect(predicted).toEqual({ uri: "nbd://192.0.2.1:10809/vm1" });
});

describe("an export on all interfaces of a host by a configured name", () => {
  const named = new Map([["server1", { address: host.address, user: "backup" }]]);
  const everywhere = { ...complete, listenAddress: "0.0.0.0" };
  const uri = "nbd://192.0.2.1:10809/vm1";

  it.each(["server1", "ann@server1:2222"])(
    "%s is reached by its address, which clients can know",
    async (name) => {
      const wanted = { ...everywhere, host: name };
      const handlers = handlersOn("NbdExport", world({}), named);
      expect((await handlers.check(undefined, wanted, none)).predicted).toEqual({ uri });
      expect((await handlers.preview(undefined, wanted, none)).state).toMatchObject({ uri });
      const { state: made } = await handlers.create(wanted);
      expect(made.uri).toBe(uri);
      expect(await handlers.read(made)).toMatchObject({ uri });
    },
  );

  it("has certificates for that address", async () => {
    const at: World = {};
    const handlers = handlersOn("NbdExport", world(at), named);
    await handlers.create({ ...everywhere, host: "server1", tls: true });
    const certificate = new X509Certificate(at.certificates?.["server-cert.pem"] ?? "");
    expect(certificate.checkIP("192.0.2.1")).toBe("192.0.2.1");
    expect(certificate.checkHost("server1")).toBeUndefined();
    const own = await makeCertificates("vm1", ["192.0.2.1", "127.0.0.1", "localhost"], new Date());
    const { problems } = await handlers.check(undefined, { ...everywhere, host: "server1", tls: own }, none);
    expect(problems).toEqual([]);
  });

  it("is the one that was declared in detail: with its uri and its certificates", async () => {
    const asked = world({});
    const handlers = handlersOn("NbdExport", asked, named);
    const { state: made } = await handlers.create({ ...everywhere, tls: true });
    const wanted = { ...everywhere, tls: true, host: "server1" };
    expect((await handlers.diff(made, wanted, none)).changes).toEqual([
      { property: "host", effect: "connection" },
    ]);
    const ran = asked.changes.length;
    const moved = await handlers.update(made, wanted);
    expect(moved).toEqual({ ...made, host: "server1" });
    expect(await handlers.read(moved)).toEqual(moved);
    expect(asked.changes.length).toBe(ran);
    const writable = await handlers.update(moved, { ...wanted, readOnly: false });
    expect(writable).toMatchObject({ uri: made.uri, clientTls: made.clientTls });
  });
});

describe("refresh", () => {
  const read = async (at: World, kept: object = state) => {
    const handlers = handlersOn("NbdExport", world(at));
    return { seen: await handlers.read({ ...kept }), warnings: handlers.warnings };
  };

  it("finds no drift where all is as declared", async () => {
    expect(await read({ unit: renderExportUnit(plan) })).toEqual({ seen: state, warnings: [] });
  });

  it.each([
    ["stopped", { active: "inactive" }, "stopped"],
    ["failed", { active: "failed" }, "failed"],
    ["restarting again and again", { active: "activating" }, "failed"],
    ["disabled", { enabled: "disabled" }, "disabled"],
    ["overridden by a drop-in", { show: "DropInPaths=/etc/systemd/system/x.d/a.conf" }, "edited"],
    ["serving another size", { size: "512" }, "notServing"],
    ["answering, but unreadable", { reads: "0" }, "notServing"],
    ["writable though declared read-only", { readOnly: "2" }, "notServing"],
    ["without its device", { deviceSize: null }, "notServing"],
    ["changed, and not reloaded", { show: "NeedDaemonReload=yes" }, "edited"],
  ])("tells %s, and up puts it right in place", async (_what, at: World, expected) => {
    const { seen, warnings } = await read({ unit: renderExportUnit(plan), ...at });
    expect(seen).toMatchObject({ state: expected });
    expect(warnings).toEqual([expect.stringContaining(`is ${expected}`)]);
    const { changes } = await handlersOn("NbdExport", untouchedHost()).diff(seen ?? {}, complete, none);
    expect(changes).toEqual([{ property: "state", effect: "update" }]);
  });

  it("a unit that systemd has not read as it is counts as edited, unless that says nothing of it", async () => {
    const at: World = { unit: renderExportUnit(plan), show: "NeedDaemonReload=yes\n" };
    const handlers = handlersOn("NbdExport", world(at));
    expect(await handlers.read({ ...state })).toMatchObject({ state: "edited" });
    at.outdated = true;
    expect(await handlers.read({ ...state })).toMatchObject({ state: "serving" });
  });

  it("a unit that only would not start at boot is enabled, and nothing is restarted", async () => {
    const asked = world({ unit: renderExportUnit(plan), enabled: "disabled" });
    const handlers = handlersOn("NbdExport", asked);
    await handlers.update({ ...state, state: "disabled" }, complete);
    expect(asked.changes).toHaveLength(1);
    expect(asked.changes[0]?.argv.join("\n")).not.toMatch(/systemctl (re)?start/);
  });

  it("a unit that cannot be enabled is told", async () => {
    const asked = world({ unit: renderExportUnit(plan), enabled: "disabled", applied: 1 });
    await expect(
      handlersOn("NbdExport", asked).update({ ...state, state: "disabled" }, complete),
    ).rejects.toThrow(/COMMAND_FAILED.*lvm-nbd-export-vm1\.service could not be enabled/);
  });

  it("a unit that is to be enabled and was written anew meanwhile is looked at again", async () => {
    const asked = world({ unit: renderExportUnit(plan), enabled: "disabled", applied: 77 });
    await handlersOn("NbdExport", asked).update({ ...state, state: "disabled" }, complete);
    expect(asked.changes).toHaveLength(1);
  });

  it("tells a unit edited by hand", async () => {
    const edited = renderExportUnit(plan).replace("IPAddressAllow=", "IPAddressAllow=any #");
    expect((await read({ unit: edited })).seen).toMatchObject({ state: "edited" });
  });

  it.each([
    ["is no JSON", (text: string) => text.replace(/^Plan=.*$/m, "Plan={")],
    ["lacks a property", (text: string) => text.replace(/^Plan=.*$/m, 'Plan={"owner":"o"}')],
    ["is gone", (text: string) => text.replace(/^Plan=.*\n/m, "")],
  ])("takes a unit whose record %s for edited, and up writes it anew", async (_what, spoil) => {
    const asked = world({ unit: spoil(renderExportUnit(plan)) });
    const handlers = handlersOn("NbdExport", asked);
    expect(await handlers.read({ ...state })).toMatchObject({ state: "edited" });
    await handlers.update({ ...state, state: "edited" }, complete);
    expect(asked.changes.map(({ stdin }) => stdin)).toEqual([renderExportUnit(plan)]);
  });

  it("leaves a unit alone that another owner has put in its place", async () => {
    const { seen, warnings } = await read({ unit: renderExportUnit({ ...plan, owner: "o/p/s/other" }) });
    expect(seen).toBeUndefined();
    expect(warnings).toEqual([expect.stringMatching(/belongs to o\/p\/s\/other; it is left alone/)]);
  });

  it("tells an edited nbd-server configuration", async () => {
    const served = { ...plan, server: "nbd-server" as const };
    const unit = renderExportUnit(served);
    const kept = { ...state, server: "nbd-server" };
    expect((await read({ unit, conf: exportConfig(served) ?? "" }, kept)).seen).toMatchObject({
      state: "serving",
    });
    expect((await read({ unit, conf: "[generic]\n" }, kept)).seen).toMatchObject({ state: "edited" });
  });

  it("names another port and device in the diff", async () => {
    const { seen, warnings } = await read({
      unit: renderExportUnit({ ...plan, port: 10810, device: "/dev/VgVm/x" }),
    });
    expect(seen).toMatchObject({ port: 10810, device: "/dev/VgVm/x", uri: "nbd://10.0.0.1:10810/vm1" });
    expect(warnings.join("\n")).toMatch(/device is "\/dev\/VgVm\/x"[\s\S]*port is 10810/);
  });

  it("a unit that runs while its file is gone is not absent", async () => {
    expect((await read({ active: "active" })).seen).toMatchObject({ state: "edited" });
  });

  it("only a missing unit is gone", async () => {
    expect((await read({})).seen).toBeUndefined();
  });

  it.each([
    ["a cut answer", fields({ show: "ActiveState=inactive" }), /OUTPUT_UNREADABLE/],
    ["no answer", "", /OUTPUT_UNREADABLE/],
    ["an answer without the unit's state", fields({ end: "" }), /OUTPUT_UNREADABLE/],
    ["a failed look", { exitCode: 1, stderr: "denied" }, /COMMAND_FAILED.*denied/s],
    ["a missing program", { exitCode: 127, stderr: "nbdinfo: not found" }, /PROGRAM_MISSING/],
  ] as [string, Answer, RegExp][])(
    "never takes %s for an absence: read, create, update and remove fail and change nothing",
    async (_what, answer, message) => {
      const asked = fakeHost(() => answer);
      const handlers = handlersOn("NbdExport", asked);
      await expect(handlers.read({ ...state })).rejects.toThrow(message);
      await expect(handlers.create(complete)).rejects.toThrow(message);
      await expect(handlers.update({ ...state }, { ...complete, port: 10810 })).rejects.toThrow(message);
      await expect(handlers.remove({ ...state })).rejects.toThrow(message);
      expect(asked.changes).toEqual([]);
    },
  );
});

describe("diff", () => {
  const diff = (change: object, unknown: ReadonlySet<string> = none) =>
    handlersOn("NbdExport", untouchedHost()).diff({ ...state }, { ...complete, ...change }, unknown);

  it("of the same declaration is empty", async () => {
    expect((await diff({})).changes).toEqual([]);
  });

  it.each([
    ["clients", { clients: ["10.0.0.3"] }],
    ["listenAddress", { listenAddress: "10.0.0.9" }],
    ["port", { port: 10810 }],
    ["server", { server: "qemu-nbd" }],
    ["readOnly", { readOnly: false }],
  ])("in place: %s", async (property, change) => {
    expect((await diff(change)).changes).toEqual([{ property, effect: "update" }]);
  });

  it.each([
    ["device", { device: "/dev/VgVm/other" }, true],
    ["exportName", { exportName: "vm2" }, true],
    ["host", { host: { ...host, address: "192.0.2.9" } }, true],
  ])("replacement: %s, the old removed first where names collide", async (property, change, first) => {
    const { changes, deleteBeforeReplace } = await diff(change);
    expect(changes).toEqual([{ property, effect: "replace" }]);
    expect(deleteBeforeReplace).toBe(first);
  });

  it("the same clients in another order are no change", async () => {
    const handlers = handlersOn("NbdExport", untouchedHost());
    const before = { ...state, clients: ["10.0.0.2", "10.0.0.3"] };
    const { changes } = await handlers.diff(before, { ...complete, clients: ["10.0.0.3", "10.0.0.2"] }, none);
    expect(changes).toEqual([]);
  });

  it("an unknown device means a replacement", async () => {
    const { device: _, ...rest } = complete;
    const { changes } = await handlersOn("NbdExport", untouchedHost()).diff(
      { ...state },
      rest,
      new Set(["device"]),
    );
    expect(changes).toEqual([{ property: "device", effect: "replace" }]);
  });
});

describe("an update", () => {
  it.each([
    ["clients", { clients: ["10.0.0.3"] }],
    ["listenAddress", { listenAddress: "10.0.0.9" }],
    ["port", { port: 10810 }],
    ["server", { server: "qemu-nbd" as const }],
    ["readOnly", { readOnly: false }],
    ["owner", { owner: "o/p/s/renamed" }],
  ])("of %s writes the unit anew and restarts it, in one command", async (_property, change) => {
    const asked = world({ unit: renderExportUnit(plan), readOnly: "readOnly" in change ? "2" : "0" });
    const made = await handlersOn("NbdExport", asked).update({ ...state }, { ...complete, ...change });
    expect(asked.changes.map(({ stdin }) => stdin)).toEqual([renderExportUnit({ ...plan, ...change })]);
    expect(made).toMatchObject({ ...change, state: "serving" });
  });

  it.each([
    ["a busy port", { listeners: 'LISTEN 0 5 10.0.0.1:10810 0.0.0.0:* users:(("x",pid=9,fd=3))' }],
    ["a device that is gone", { device: "absent" }],
  ])("finds %s before it touches what serves", async (_what, at: World) => {
    const asked = world({ unit: renderExportUnit(plan), ...at });
    await expect(
      handlersOn("NbdExport", asked).update({ ...state }, { ...complete, port: 10810 }),
    ).rejects.toThrow(/PORT_IN_USE|DEVICE_NOT_FOUND/);
    expect(asked.changes).toEqual([]);
  });

  it("does not take its own server for somebody else's on the port", async () => {
    const own = 'LISTEN 0 5 10.0.0.1:10809 0.0.0.0:* users:(("nbdkit",pid=7,fd=3))';
    const asked = world({ unit: renderExportUnit(plan), listeners: own });
    await handlersOn("NbdExport", asked).update({ ...state }, { ...complete, clients: ["10.0.0.3"] });
    expect(asked.changes).toHaveLength(1);
  });

  it("of the connection alone runs nothing", async () => {
    const asked = untouchedHost();
    const rotated = { ...complete, host: { ...host, password: "new" } };
    expect(await handlersOn("NbdExport", asked).update({ ...state }, rotated)).toEqual({
      ...state,
      host: rotated.host,
    });
    expect(asked.commands).toEqual([]);
  });
});

it("an update rewrites and restarts, and says that clients are cut off", async () => {
  const asked = world({ unit: renderExportUnit({ ...plan, clients: ["10.0.0.9"] }) });
  const handlers = handlersOn("NbdExport", asked);
  await handlers.update({ ...state, clients: ["10.0.0.9"] }, complete);
  expect(asked.changes).toHaveLength(1);
  expect(handlers.lines.join("\n")).toMatch(/restarting the export vm1; connected clients are cut off/);
});

it("remove stops and removes what is there, and is done where nothing is", async () => {
  const asked = world({ unit: renderExportUnit(plan) });
  await handlersOn("NbdExport", asked).remove({ ...state });
  expect(asked.changes).toHaveLength(1);
  const empty = world({});
  await handlersOn("NbdExport", empty).remove({ ...state });
  expect(empty.changes).toEqual([]);
});

describe("of an image", () => {
  const { device: _device, owner, ...terms } = plan;
  // The order of the keys is that of the record in the unit.
  const withoutId = { owner, file: "/b/vm1.raw", format: "raw", ...terms } as const;
  const fileId = "12:1790000000";
  const imagePlan: ExportPlan = { ...withoutId, fileId };
  const { device: _, ...common } = complete;
  const wanted = { ...common, file: "/b/vm1.raw" };
  const { device: _state, ...ofState } = state;
  const kept = { ...ofState, ...wanted, format: "raw" };
  const qcow2 = { ...wanted, format: "qcow2", server: "qemu-nbd" };
  const header = (name: Parameters<typeof recordedQcow2Header>[0]) => ({
    ...{ header: recordedQcow2Header(name), fileSize: "196616" },
  });
  /** What a create does to the host; throws if it changes anything before it fails. */
  const created = async (at: World, inputs: object = wanted) => {
    const asked = world({ ...at, image: at.image ?? {} });
    try {
      const { state: made } = await handlersOn("NbdExport", asked).create({ ...inputs });
      return { made, units: asked.changes.map(({ stdin }) => stdin) };
    } catch (error) {
      expect(asked.changes).toEqual([]);
      throw error;
    }
  };

  it("makes its unit, and the state tells the format", async () => {
    expect(await created({})).toEqual({ made: kept, units: [renderExportUnit(imagePlan)] });
  });

  it("is served from where it really is, while that disk is mounted", async () => {
    const found = { realPath: "/mnt/disk/vm1.raw", mountPoint: "/mnt/disk" };
    const asked = world({ image: found });
    const handlers = handlersOn("NbdExport", asked);
    const { state: made } = await handlers.create({ ...wanted });
    expect(made).toEqual(kept);
    expect(asked.changes.map(({ stdin }) => stdin)).toEqual([
      renderExportUnit({ ...withoutId, ...found, fileId }),
    ]);
    // And that is no change.
    await handlers.update({ ...made }, { ...wanted });
    expect(asked.changes).toHaveLength(1);
    expect((await handlers.diff(made, { ...wanted }, none)).changes).toEqual([]);
  });

  it.each([
    [
      "that is missing",
      { kind: undefined, realPath: undefined },
      /FILE_NOT_FOUND.*file: \/b\/vm1\.raw does not exist/s,
    ],
    [
      "in a folder that is missing",
      { folder: undefined, kind: undefined },
      /DIRECTORY_NOT_FOUND.*folder of \/b\/vm1\.raw/s,
    ],
    ["that is a folder", { kind: "directory", realPath: undefined }, /FILE_UNSUITABLE.*is a directory/s],
    [
      "that is a symbolic link",
      { leads: "/c/vm1.raw" },
      /FILE_UNSUITABLE.*symbolic link: give \/c\/vm1\.raw/s,
    ],
    [
      "that others can change",
      { exposed: "/b (bob, drwxr-xr-x)" },
      /FILE_UNSUITABLE.*others than root can change \/b \(bob, drwxr-xr-x\).*chown root.*chmod go-w/s,
    ],
    [
      "that even its owner cannot read",
      { "read.rc": "1" },
      /FILE_UNSUITABLE.*Permission denied.*chmod u\+r/s,
    ],
    ["that is empty", { fileSize: "0" }, /FILE_UNSUITABLE.*holds 0 bytes/s],
    ["with half a sector", { fileSize: "1048577" }, /FILE_UNSUITABLE.*1048577 bytes.*multiple of 512/s],
  ])("is refused where it is one %s, and nothing is touched", async (_what, image, message) => {
    await expect(created({ image })).rejects.toThrow(message);
  });

  it.each([
    [
      "a busy port",
      { listeners: 'LISTEN 0 5 0.0.0.0:10809 0.0.0.0:* users:(("nginx",pid=9,fd=3))' },
      /PORT_IN_USE/,
    ],
    ["a missing program", { missing: " setpriv" }, /PROGRAM_MISSING/],
  ])("is refused for %s", async (_what, at: World, message) => {
    await expect(created(at)).rejects.toThrow(message);
  });

  it("in qcow2 has the size of its content", async () => {
    const at = { size: "16777216", image: header("plain") };
    const { made } = await created(at, qcow2);
    expect(made).toMatchObject({ sizeBytes: 16777216, format: "qcow2", state: "serving" });
  });

  it.each([
    ["a backing file", header("backingFile"), /FILE_UNSUITABLE.*names a backing file/s],
    ["a data file", header("dataFile"), /FILE_UNSUITABLE.*names a data file/s],
    ["another format", { header: "00".repeat(80) }, /FILE_UNSUITABLE.*is no qcow2 image/s],
  ])("in qcow2 is refused for %s", async (_what, image, message) => {
    await expect(created({ image }, qcow2)).rejects.toThrow(message);
  });

  it("lets no program on the host interpret what is in it", async () => {
    for (const [inputs, at] of [
      [wanted, { image: {} }],
      [qcow2, { image: header("plain"), size: "16777216" }],
    ] as const) {
      const asked = world(at);
      await handlersOn("NbdExport", asked).create({ ...inputs });
      const commands = asked.commands.map(({ argv }) => argv.join("\n"));
      expect(commands.some((text) => text.includes("look_at_image"))).toBe(true);
      expect(commands.join()).not.toContain("qemu-img");
    }
  });

  const qcow2Plan: ExportPlan = { ...imagePlan, format: "qcow2", server: "qemu-nbd" };
  it.each([
    ["whose file is gone", imagePlan, { kind: undefined, realPath: undefined }, "does not exist"],
    ["whose file has grown", imagePlan, { fileSize: "2097152" }, undefined],
    ["whose name another file has taken", imagePlan, { replaced: "yes" }, "is another file than"],
    [
      "that was replaced while it stood still",
      imagePlan,
      { fileId: "13:1790000000" },
      "is another file than",
    ],
    ["whose place a link has taken", imagePlan, { leads: "/etc/shadow" }, "is a symbolic link"],
    [
      "in others' hands",
      imagePlan,
      { exposed: "/b (bob, drwxr-xr-x)" },
      "others than root can change /b (bob",
    ],
    ["in qcow2 that needs another file by now", qcow2Plan, header("backingFile"), "names a backing file"],
    ["in qcow2 that is none by now", qcow2Plan, { header: "" }, "is no qcow2 image"],
  ])("is told not to be served, and why: one %s", async (_what, served, image, why) => {
    const asked = world({
      ...{ unit: renderExportUnit(served), image },
      ...(served === qcow2Plan ? { size: "16777216" } : {}),
    });
    const handlers = handlersOn("NbdExport", asked);
    const { format, server } = served as typeof qcow2;
    const before = { ...kept, format, server };
    expect(await handlers.read(before)).toMatchObject({ file: "/b/vm1.raw", state: "notServing" });
    expect(handlers.warnings).toEqual([
      expect.stringContaining("is notServing"),
      ...(why === undefined ? [] : [expect.stringContaining(why)]),
    ]);
  });

  it("that was replaced is examined by the next update, and served; what is not safe is left as it is", async () => {
    const asked = world({ unit: renderExportUnit(imagePlan), image: { fileId: "13:1790000000" } });
    const handlers = handlersOn("NbdExport", asked);
    expect(await handlers.update({ ...kept, state: "notServing" }, { ...wanted })).toEqual(kept);
    expect(asked.changes.map(({ stdin }) => stdin)).toEqual([
      renderExportUnit({ ...imagePlan, fileId: "13:1790000000" }),
    ]);
    const theirs = world({ unit: renderExportUnit(imagePlan), image: { exposed: "/b (bob, drwxr-xr-x)" } });
    await expect(
      handlersOn("NbdExport", theirs).update({ ...kept, state: "notServing" }, { ...wanted }),
    ).rejects.toThrow(/FILE_UNSUITABLE.*others than root/s);
    expect(theirs.changes).toEqual([]);
  });

  it("finds no drift where all is as declared, and tells another file", async () => {
    const read = async (served: ExportPlan) => {
      const handlers = handlersOn("NbdExport", world({ unit: renderExportUnit(served), image: {} }));
      return [await handlers.read({ ...kept }), handlers.warnings.join()] as const;
    };
    expect(await read(imagePlan)).toEqual([kept, ""]);
    const [seen, told] = await read({ ...imagePlan, file: "/b/vm2.raw" } as ExportPlan);
    expect(seen).toMatchObject({ file: "/b/vm2.raw" });
    expect(told).toContain('file is "/b/vm2.raw"');
  });

  it.each([
    ["file", { file: "/b/vm2.raw" }],
    ["format", { format: "qcow2", server: "nbdkit" }],
  ])("is made anew for another %s", async (property, change) => {
    const { changes } = await handlersOn("NbdExport", untouchedHost()).diff(
      { ...kept },
      { ...wanted, ...change },
      none,
    );
    expect(changes).toEqual([{ property, effect: "replace" }]);
  });

  it("is made anew instead of a device, and the format that is the default is no change", async () => {
    const handlers = handlersOn("NbdExport", untouchedHost());
    const { changes } = await handlers.diff({ ...state }, { ...wanted }, none);
    expect(changes.map(({ property, effect }) => `${property} ${effect}`)).toEqual([
      ...["device replace", "file replace", "format replace"],
    ]);
    expect((await handlers.diff({ ...kept }, { ...wanted, format: "raw" }, none)).changes).toEqual([]);
  });
});

describe("with TLS", () => {
  const secured = { ...complete, tls: true };
  const day = 86_400;

  it.each([
    ["a systemd that cannot hand over keys", { systemd: "245" }, /TLS_UNSUPPORTED.*systemd 245/s],
    ["an nbdkit without TLS", { nbdkitTls: "no" }, /TLS_UNSUPPORTED.*nbdkit was built without/s],
  ])("%s is refused and nothing is changed", async (_what, at: World, message) => {
    const asked = world(at);
    await expect(handlersOn("NbdExport", asked).create(secured)).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it("keys travel on stdin alone, before the unit that needs them", async () => {
    const at: World = {};
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const { state: made } = await handlers.create(secured);
    expect(made).toMatchObject({ uri: "nbds://10.0.0.1:10809/vm1", state: "serving", tls: true });
    expect(made.clientTls).toEqual({
      caCertificate: at.certificates?.["ca-cert.pem"],
      certificate: at.certificates?.["client-cert.pem"],
      privateKey: at.certificates?.["client-key.pem"],
    });
    const [brought, applied] = asked.changes;
    expect(brought?.stdin).toContain("PRIVATE KEY");
    expect(applied?.stdin).toMatch(
      /LoadCredential=server-key\.pem:\/etc\/lvm-nbd\/lvm-nbd-export-vm1~[0-9a-f]{32}\/server-key\.pem\n/,
    );
    const shown = asked.commands
      .flatMap(({ argv }) => argv)
      .concat(handlers.lines, handlers.warnings, applied?.stdin ?? "");
    expect(shown.join("\n")).not.toMatch(/PRIVATE|BEGIN/);
    expect(handlers.warnings).toEqual([]);

    const { changes } = await handlers.diff(made, secured, none);
    expect(changes).toEqual([]);
    const before = asked.changes.length;
    await handlers.update(made, { ...secured, port: 10810 });
    // Those that are there go on being right for another port.
    const did = (from: number) =>
      asked.changes.slice(from).map(({ argv }) => {
        const text = argv.join("\n");
        return ["refused()", "systemctl restart"].find((one) => text.includes(one)) ?? "bring";
      });
    expect(did(before)).toEqual(["systemctl restart", "refused()"]);
    const then = asked.changes.length;
    await handlers.update(made, { ...secured, triggers: ["new"] });
    expect(did(then)).toEqual(["bring", "systemctl restart", "refused()"]);
  });

  it("certificates are told to expire, and are made anew once they have, or for another address", async () => {
    const at: World = {};
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const { state: made } = await handlers.create(secured);
    const start = Date.now() / 1000;
    at.now = start + 380 * day;
    const seen = await handlers.read(made);
    expect(seen).toMatchObject({ state: "serving" });
    expect(handlers.warnings).toEqual([
      expect.stringMatching(/expire on .*, in 1[67] days: change a value of `triggers`/),
    ]);
    expect((await handlers.diff(seen ?? {}, secured, none)).changes).toEqual([]);
    at.now = start + 400 * day;
    const late = await handlers.read(made);
    expect(late).toMatchObject({ state: "expired" });
    const renewed = await handlers.update(late ?? {}, secured);
    expect(renewed).toMatchObject({ state: "serving" });
    expect(renewed.clientTls).not.toEqual(made.clientTls);
    const moved = await handlers.update(renewed, { ...secured, listenAddress: "10.0.0.9" });
    expect(moved.clientTls).not.toEqual(renewed.clientTls);
  });

  it("certificates that are not what the unit was made with are put right", async () => {
    const at: World = {};
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const { state: made } = await handlers.create(secured);
    delete at.certificates;
    const seen = await handlers.read(made);
    expect(seen).toMatchObject({ state: "edited", tls: true });
    expect(seen).not.toHaveProperty("clientTls");
    expect(await handlers.update(seen ?? {}, secured)).toMatchObject({ state: "serving" });
  });

  it("a server that lets others in is stopped, and nothing of it is left", async () => {
    const asked = world({ proof: 72 });
    await expect(handlersOn("NbdExport", asked).create(secured)).rejects.toThrow(
      /TLS_NOT_ENFORCED.*without TLS/s,
    );
    const down = asked.changes.at(-1)?.argv.join("\n");
    expect(down).toContain('end_unit "$1"');
    expect(down).toContain("tidy_certificates");
  });

  it("what was brought for a unit that was not written is taken away again", async () => {
    const asked = world({ applied: 77 });
    await expect(handlersOn("NbdExport", asked).create(secured)).rejects.toThrow(/FOREIGN_RESOURCE/);
    expect(asked.changes.at(-1)?.argv.join("\n")).toContain('|| rm -rf "$2"');
  });

  it.each([
    ["not for its address", ["10.0.0.2"], undefined, /^tls\.certificate: is not for 10\.0\.0\.1/],
    ["without their key", ["10.0.0.1"], "x", /^tls\.privateKey: is no private key/],
  ])(
    "own certificates %s are refused before any host is asked",
    async (_what, names, privateKey, message) => {
      const own = await makeCertificates("vm1", names, new Date());
      expect(
        await problems({ tls: { ...own, ...(privateKey === undefined ? {} : { privateKey }) } }),
      ).toEqual([expect.stringMatching(message)]);
    },
  );

  it("own certificates that have expired are refused by the host's clock", async () => {
    const own = await makeCertificates("vm1", ["10.0.0.1"], new Date());
    const asked = world({ now: Date.now() / 1000 + 500 * day });
    await expect(handlersOn("NbdExport", asked).create({ ...complete, tls: own })).rejects.toThrow(
      /INVALID_INPUT.*certificates expired on/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("without it an export beyond loopback says that its bytes travel in clear", async () => {
    const open = handlersOn("NbdExport", world({}));
    const { state: made } = await open.create(complete);
    expect(open.warnings).toEqual([
      expect.stringMatching(/travels unencrypted from 10\.0\.0\.1.*`tls: true`/),
    ]);
    await open.update(made, complete);
    expect(open.warnings).toHaveLength(1);
    const inside = handlersOn("NbdExport", world({}));
    await inside.create({ ...complete, listenAddress: "127.0.0.1", clients: [] });
    expect(inside.warnings).toEqual([]);
  });

  it("what was not proven, for a run that was cut, is proven by the next one, without a restart", async () => {
    const at: World = {};
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const { state: made } = await handlers.create(secured);
    at.proven = false;
    const before = asked.changes.length;
    await handlers.create(secured);
    expect(asked.changes.slice(before).map(({ argv }) => argv.join().includes("refused()"))).toEqual([true]);
    at.proven = true;
    await handlers.update(made, secured);
    expect(asked.changes).toHaveLength(before + 1);
  });

  it("own certificates that have expired since are refused before the server is touched, and its clients cut", async () => {
    const own = await makeCertificates("vm1", ["10.0.0.1"], new Date());
    const at: World = {};
    const asked = world(at);
    const handlers = handlersOn("NbdExport", asked);
    const { state: made } = await handlers.create({ ...complete, tls: own });
    at.now = Date.now() / 1000 + 500 * day;
    const seen = await handlers.read(made);
    expect(seen).toMatchObject({ state: "expired" });
    const before = asked.changes.length;
    await expect(handlers.update(seen ?? {}, { ...complete, tls: own })).rejects.toThrow(
      /INVALID_INPUT.*expired on/s,
    );
    expect(asked.changes).toHaveLength(before);
  });

  it("its uri is known at a preview, also while its certificates are not", async () => {
    const handlers = handlersOn("NbdExport", untouchedHost());
    const secure = await handlers.check(undefined, { ...declared, tls: true }, none);
    expect(secure.predicted.uri).toBe("nbds://10.0.0.1:10809/vm1");
    const later = await handlers.check(undefined, declared, new Set(["tls"]));
    expect(later.predicted.uri).toBe("nbds://10.0.0.1:10809/vm1");
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
  const unit = renderExportUnit(plan);

  it("is declared as its unit has it, so that nothing is to change", async () => {
    const asked = world({ unit });
    const handlers = handlersOn("NbdExport", asked);
    const found = await handlers.find("192.0.2.1/vm1", finder);
    expect(found).toEqual({
      id: "192.0.2.1/vm1",
      inputs: {
        ...{ host: "192.0.2.1", owner: "o/p/s/vm1", device: plan.device, exportName: "vm1" },
        ...{ listenAddress: "10.0.0.1", clients: ["10.0.0.2"] },
      },
      state: { ...state, host: "192.0.2.1" },
    });
    const { inputs, problems: left } = await handlers.check(undefined, found?.inputs ?? {}, none);
    expect(left).toEqual([]);
    expect((await handlers.diff(found?.state ?? {}, inputs, none)).changes).toEqual([]);
    expect(asked.changes).toEqual([]);
  });

  it("is nothing where no such unit is", async () => {
    expect(await handlersOn("NbdExport", world({})).find("192.0.2.1/vm1", finder)).toBeUndefined();
  });

  it("of another resource is refused with whose it is, and given to who only reads it", async () => {
    const handlers = handlersOn("NbdExport", world({ unit }));
    const other = { ...finder, name: "vm2" };
    await expect(handlers.find("192.0.2.1/vm1", other)).rejects.toThrow(
      /FOREIGN_RESOURCE: NbdExport vm2 on host server1: server1\/vm1 belongs to o\/p\/s\/vm1/,
    );
    const found = await handlers.find("192.0.2.1/vm1", { ...other, readsOnly: true });
    expect(await handlers.read(found?.state ?? {})).toEqual(found?.state);
  });

  it("takes the organisation from the mark where that alone tells it", async () => {
    const found = await handlersOn("NbdExport", world({ unit })).find("192.0.2.1/vm1", {
      ...finder,
      organization: undefined,
    });
    expect(found?.inputs.owner).toBe("o/p/s/vm1");
  });

  it("with certificates that were given is refused: their keys are not read back", async () => {
    const secured = renderExportUnit({ ...plan, tls: { digest: "0".repeat(64) } });
    await expect(
      handlersOn("NbdExport", world({ unit: secured })).find("192.0.2.1/vm1", finder),
    ).rejects.toThrow(/INVALID_INPUT.*tls: .*given.*what to do: Declare it/s);
  });
});

describe("a preview", () => {
  it("warns of a port that is taken, and of what is served there needs nothing", async () => {
    const listeners = 'LISTEN 0 5 10.0.0.1:10809 0.0.0.0:* users:(("sshd",pid=9,fd=3))';
    const asked = world({ device: "absent", listeners });
    const handlers = handlersOn("NbdExport", asked);
    const { state: seen, unknown } = await handlers.preview(undefined, complete, none);
    expect(handlers.warnings).toEqual([
      expect.stringMatching(
        /as its host is now, this would be refused: PORT_IN_USE: .*10809.*sshd.* \(what to do: .*Choose another/,
      ),
    ]);
    expect(seen).toEqual({ ...complete, uri: "nbd://10.0.0.1:10809/vm1" });
    expect(unknown).toEqual(["clientTls", "certificatesExpireAt", "sizeBytes", "state", "machineId"]);
    expect(asked.changes).toEqual([]);
  });

  it("of an update knows the size, and the certificates while those stay", async () => {
    const handlers = handlersOn("NbdExport", untouchedHost());
    const clientTls = { caCertificate: "a", certificate: "c", privateKey: "k" };
    const old = { ...state, machineId, tls: true, clientTls };
    const kept = await handlers.preview(old, { ...complete, tls: true, readOnly: false }, none);
    expect(kept.state).toMatchObject({ sizeBytes: 1048576, clientTls, readOnly: false });
    expect(kept.unknown).toEqual(["certificatesExpireAt", "state"]);
    const renewed = await handlers.preview(old, { ...complete, tls: true, triggers: [1] }, none);
    expect(renewed.unknown).toContain("clientTls");
  });
});
