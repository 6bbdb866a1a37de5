/**
 * NbdAttachment: an export as a block device of a host, kept there by a systemd unit.
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, parseOutput, refusal, succeed } from "../core/command.js";
import { LvmNbdError } from "../core/errors.js";
import { OutputOf } from "../core/example.js";
import { hostScript, script } from "../core/hostCommands.js";
import { commonInputs, plainName, readableBy, refusing, replaces, secret } from "../core/inputs.js";
import { declareInstead, ownerMark } from "../core/owner.js";
import type { Change, Context, Problem, ResourceType } from "../core/resource.js";
import { serially } from "../core/serial.js";
import {
  type AttachPlan,
  attachCertificates,
  attachPath,
  attachUnitName,
  modulesLoad,
  renderAttachUnit,
  udevRule,
} from "../linux/attachUnit.js";
import { unitMark } from "../linux/exportUnit.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import { holdersScript, parseHolders } from "../linux/holders.js";
import { defaultPort, type NbdEndpoint, nbdUri, parseNbdUri, sameEndpoint } from "../linux/nbd.js";
import { missingFunction, missingPrograms } from "../linux/programs.js";
import { hasDropIns, parseShow, type UnitProperties } from "../linux/systemd.js";
import {
  canHaveCertificates,
  certificatesDigest,
  certificatesFolders,
  certificatesFunctions,
  clientFiles,
  expiryOf,
  expiryPhrase,
  expiryTime,
  type SeenCertificates,
} from "../linux/tls.js";
import { unitNameProblem } from "../linux/unitName.js";
import { changedMeanwhile, expectedMarks, unitFunctions } from "../linux/unitScript.js";
import type { Host, RemoteCommand } from "../ssh/types.js";
import { observeAttachmentScript } from "./attachmentLook.js";
import { absent, lookAmongOthers, purposeOf } from "./hostPicture.js";
import { asking, clientTlsInput, tlsProblems, tlsRecordShape } from "./tls.js";
import {
  enable,
  isName,
  lookAtUnit,
  readPlan,
  unitDrift,
  withCertificates,
  writtenMeanwhile,
} from "./unit.js";
import { removeUnit } from "./unitRemoval.js";

const inputs = z.strictObject({
  ...commonInputs,
  name: z
    .string()
    .regex(plainName, "must begin with a letter or digit and hold only letters, digits and _ . : + -")
    .superRefine(refusing((value) => unitNameProblem("attach", value)))
    .describe("Name of the attachment; `/dev/lvm-nbd/NAME` leads to it. Default: the resource's name.")
    .meta(replaces),
  uri: z
    .string()
    .superRefine(readableBy(parseNbdUri))
    .optional()
    .describe("The export, e.g. the `uri` of an NbdExport. Or give `server`, `port` and `exportName`."),
  server: z
    .string()
    .regex(/^[A-Za-z0-9][A-Za-z0-9.:_-]*$/, "must be an address or a host name")
    .optional()
    .describe("Address or name of the NBD server, instead of `uri`.")
    .meta(replaces),
  port: z
    .number()
    .int()
    .min(1, "must be a port from 1 to 65535")
    .max(65535, "must be a port from 1 to 65535")
    .optional()
    .describe(`TCP port, beside \`server\`. Default ${defaultPort}.`)
    .meta(replaces),
  exportName: z
    .string()
    .min(1)
    .regex(/^[^\p{Cc}]+$/u, "must not hold control characters")
    .optional()
    .describe("NBD export name, beside `server`.")
    .meta(replaces),
  device: z
    .string()
    .regex(/^\/dev\/nbd(0|[1-9]\d{0,2})$/, 'must be an NBD device, e.g. "/dev/nbd0"')
    .optional()
    .describe("Device to use. Default: the first free one."),
  readOnly: z.boolean().default(true).describe("Whether the device may not be written."),
  connections: z.number().int().min(1).max(16).default(1).describe("TCP connections to the server."),
  timeoutSeconds: z
    .number()
    .int()
    .min(1)
    .max(600)
    .default(30)
    .describe("Seconds after which an unanswered read or write fails and the link counts as dead."),
  blockSize: z
    .number()
    .int()
    .refine((value) => [512, 1024, 2048, 4096].includes(value), "must be 512, 1024, 2048 or 4096")
    .default(512)
    .describe("Logical block size of the device in bytes."),
  tls: clientTlsInput
    .optional()
    .describe(
      "Certificates (PEM) for an export with TLS, e.g. its output `clientTls`: only the server that shows one of `caCertificate` for " +
        "its address is talked to. Encrypted in the state; a file of root's alone on the host.",
    )
    .meta(secret),
});

const outputs = z.object({
  device: z.string().describe("The device in use, e.g. `/dev/nbd0`."),
  path: z.string().describe("Stable path, `/dev/lvm-nbd/NAME`."),
  sizeBytes: z.number().describe("Size of the device in bytes."),
  certificatesExpireAt: z
    .string()
    .optional()
    .describe("With `tls`: when the first of the certificates expires (ISO 8601)."),
  state: z
    .enum(["attached", "detached", "dead", "replaced", "disabled", "edited"])
    .describe(
      "`attached` (proven by a read); `detached`; `dead` (reads fail); `replaced` (something else is behind the device); " +
        "`disabled` (would not come back after a reboot); `edited` (its unit or its certificates were changed by hand).",
    ),
});

type Inputs = z.infer<typeof inputs>;
type State = Omit<Inputs, "device"> & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type NbdAttachmentDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type NbdAttachmentOutputs = State;

interface Observed {
  readonly mark: string | undefined;
  /** What our unit says it was made from; `undefined` if it is not ours or its record was spoiled. */
  readonly plan: AttachPlan | undefined;
  readonly edited: boolean;
  /** The unit runs, but its file was deleted. */
  readonly fileGone: boolean;
  readonly show: UnitProperties;
  /** A boot starts it: by the links on the disk. */
  readonly boots: boolean;
  /** The device the unit names, or its path leads to when the unit's file is gone or spoiled. */
  readonly device: string | undefined;
  /** Process of the link, as the kernel has it. */
  readonly pid: string | undefined;
  readonly sizeBytes: number;
  readonly readOnly: boolean;
  readonly readable: boolean;
  readonly linked: boolean;
  /** `undefined` without TLS, and where they are not what the unit was made with. */
  readonly certificates: SeenCertificates | undefined;
}

async function observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined> {
  const unit = attachUnitName(wanted.name);
  const command: RemoteCommand = {
    argv: script(observeAttachmentScript, unit, attachPath(wanted.name), ...purposeOf(context)),
    kind: "read",
    // A read through a dead link cannot be stopped before the kernel's own timeout has passed.
    deadlineSeconds: 60 + wanted.timeoutSeconds,
  };
  const result = await lookAmongOthers(context, unit, () => lookAtUnit(context, command, unit));
  if (result === absent) return undefined;
  return parseOutput(context, command, result, (stdout) => readObservation(parseFields(stdout)));
}

function readObservation(fields: ReadonlyMap<string, string>): Observed | undefined {
  const shown = fields.get("show");
  if (shown === undefined) throw new Error('"show" is missing');
  const show = parseShow(shown);
  const text = fields.get("unit");
  const running = !["inactive", "failed"].includes(show.ActiveState ?? "");
  if (text === undefined && !running) return undefined;
  const plan = text === undefined ? undefined : readPlan(text, planShape);
  const [authority, certificate] = [fields.get("ca"), fields.get("certificate")];
  return {
    mark: text === undefined ? undefined : unitMark(text),
    plan,
    edited:
      plan === undefined ||
      fields.has("linked") ||
      renderAttachUnit(plan) !== text ||
      (show.NeedDaemonReload === "yes" && !fields.has("outdated")) ||
      hasDropIns(show),
    fileGone: text === undefined,
    show,
    boots: fields.has("boots"),
    device: planShape.shape.device.safeParse(fields.get("device")).data,
    pid: fields.get("pid"),
    // sysfs counts sectors of 512 bytes, whatever the block size.
    sizeBytes: Number(fields.get("size") ?? "0") * 512,
    readOnly: fields.get("ro") === "1",
    readable: fields.get("read.rc") === "0",
    linked: fields.get("link") === fields.get("device"),
    certificates:
      authority && certificate
        ? { expiresAt: expiryOf(authority, certificate), now: Number(fields.get("now")) }
        : undefined,
  };
}

const planShape = z.strictObject({
  owner: z.string(),
  name: z.string(),
  server: z.string(),
  port: z.number(),
  exportName: z.string(),
  device: z.string().regex(/^\/dev\/nbd\d+$/),
  readOnly: z.boolean(),
  connections: z.number(),
  timeoutSeconds: z.number(),
  blockSize: z.number(),
  tls: tlsRecordShape.optional(),
});

function endpoint(
  wanted: Partial<Pick<Inputs, "uri" | "server" | "port" | "exportName" | "tls">>,
): NbdEndpoint {
  if (wanted.uri !== undefined) return parseNbdUri(wanted.uri);
  return {
    ...(wanted.tls === undefined ? {} : { tls: true }),
    server: wanted.server ?? "",
    port: wanted.port ?? defaultPort,
    exportName: wanted.exportName ?? "",
  };
}

function planOf(wanted: Inputs, device: string): AttachPlan {
  const { owner, name, readOnly, connections, timeoutSeconds, blockSize } = wanted;
  const { server, port, exportName } = endpoint(wanted);
  const tls = wanted.tls && { tls: { digest: certificatesDigest(clientFiles(wanted.tls)) } };
  return {
    ...{ owner, name, server, port, exportName, device },
    ...{ readOnly, connections, timeoutSeconds, blockSize, ...tls },
  };
}

function endpointOf({ server, port, exportName, tls }: AttachPlan): NbdEndpoint {
  return { server, port, exportName, tls: tls !== undefined };
}

function stateOf(seen: Observed): State["state"] {
  const foreign = seen.pid !== undefined && seen.pid !== seen.show.MainPID;
  if (seen.show.ActiveState !== "active" || seen.sizeBytes === 0) return foreign ? "replaced" : "detached";
  if (seen.pid !== seen.show.MainPID) return "replaced";
  // Our own link with another permission stays ours: it is only cut when nobody holds it.
  if (seen.edited || seen.readOnly !== seen.plan?.readOnly) return "edited";
  if (seen.plan.tls !== undefined && seen.certificates === undefined) return "edited";
  if (!seen.readable) return "dead";
  if (!seen.linked) return "edited";
  return seen.boots ? "attached" : "disabled";
}

const preflightScript = hostScript(
  "preflight-attachment",
  "observe",
  `${emitFunctions}${missingFunction}
uri=$1
emit_missing nbd-client nbdinfo systemctl flock udevadm
if [ -d /sys/module/nbd ]; then emit module.rc 0; else emit_output module modprobe -n nbd; fi
if command -v nbdinfo >/dev/null; then
  emit_output size timeout 30 nbdinfo --size "$uri"
  # Refused packets are dropped: asking twice would wait twice.
  if [ "$emit_rc" = 0 ]; then emit_output readOnly timeout 20 nbdinfo --is read-only "$uri"; fi
fi
emit end ""
`,
  ["uri"],
);

canHaveCertificates(preflightScript);

/** Finds out before anything is changed what would make the attachment fail. Returns the export's size in bytes. */
async function preflight(context: Context, wanted: Inputs): Promise<number> {
  const uri = nbdUri(endpoint(wanted));
  const asked = asking(uri, wanted.tls);
  const command: RemoteCommand = {
    ...asked.command(preflightScript, asked.uri),
    kind: "read",
    deadlineSeconds: 90,
  };
  const result = await succeed(context, command, "the host could not be looked at");
  const fields = parseOutput(context, command, result, parseFields);
  const where = { host: context.host.name, resource: context.resource };
  const missing = missingPrograms(fields);
  if (missing !== undefined) throw new LvmNbdError("PROGRAM_MISSING", { ...where, message: missing });
  if (fields.get("module.rc") !== "0") {
    throw new LvmNbdError("MODULE_MISSING", {
      ...where,
      message: `modprobe nbd would fail: ${fields.get("module") ?? ""}`,
    });
  }
  const size = Number(fields.get("size"));
  if (fields.get("size.rc") !== "0" || !Number.isSafeInteger(size) || size <= 0) {
    throw new LvmNbdError("EXPORT_UNREACHABLE", {
      ...where,
      message: `${uri} does not answer here`,
      stderr: fields.get("size"),
    });
  }
  if (!wanted.readOnly && fields.get("readOnly.rc") === "0") {
    throw new LvmNbdError("INVALID_INPUT", {
      ...where,
      property: "readOnly",
      message: `readOnly: ${uri} is exported read-only, so it cannot be attached writable`,
      advice: "Leave `readOnly` out, or make the export writable (`readOnly: false` on the NbdExport).",
    });
  }
  return size;
}

/** Before the module is loaded there are none: it makes 16, unless somebody has configured more. */
const candidatesScript = hostScript(
  "free-devices",
  "observe",
  `
if [ ! -d /sys/module/nbd ]; then seq 0 15; exit; fi
for sys in /sys/block/nbd*; do
  [ -e "$sys" ] || continue
  n=\${sys##*/nbd}
  [ ! -e "$sys/pid" ] && [ "$(cat "$sys/size")" = 0 ] || continue
  set -- "$sys"/holders/*; [ -e "$1" ] && continue
  grep -qsx "Device=/dev/nbd$n" /etc/systemd/system/lvm-nbd-attach-*.service && continue
  echo "$n"
done | sort -n
`,
  [],
);

/**
 * Exit code 75: the device is not free. 76: what is attached now is held (named on stdout). 70: the client did
 * not connect. Nothing is stopped before both have been looked at under the lock.
 */
const applyScript = hostScript(
  "apply-attachment",
  "change",
  `${unitFunctions}${certificatesFunctions}
unit=$1 device=$2 expected=$3 wait=$4 current=$5 holders=$6 mark=$7 seen=$8 bytes=$9; shift 9
folders=$1 folder=$2; shift 2
file=/etc/systemd/system/$unit
lock
guard "$file" "$mark" "$seen"
install_file() {
  [ -f "$1" ] && [ ! -L "$1" ] && [ "$(cat "$1"; echo x)" = "$(printf %s "$2"; echo x)" ] && return 0
  mkdir -p "\${1%/*}" && rm -f "$1.new" && printf %s "$2" >"$1.new" && sync "$1.new" && mv -fT "$1.new" "$1"
}
umask 022
new=$(cat; echo x); new=\${new%x}
[ "$(printf %s "$new" | wc -c)" -eq "$bytes" ] || { echo "the unit did not arrive whole" >&2; exit 1; }
sys=/sys/block/\${device##*/}
busy() { [ -e "$sys/pid" ] || [ "$(cat "$sys/size" 2>/dev/null || echo 0)" != 0 ]; }
if [ "$device" != "$current" ] && busy; then echo "$device is in use" >&2; exit 75; fi
if [ -b "$current" ]; then
  held=$(sh -c "$holders" sh "$current" "$unit") || exit 1
  if [ -n "$held" ]; then printf '%s\\n' "$held"; exit 76; fi
fi
for other in $(grep -lsx "Device=$device" /etc/systemd/system/lvm-nbd-attach-*.service); do
  [ "$other" = "$file" ] || { echo "$device belongs to $other" >&2; exit 75; }
done
# A unit whose file was deleted may run all the same.
[ ! -e "$file" ] && [ "$(systemctl show -p ActiveState --value "$unit")" = inactive ] || systemctl stop "$unit" || exit 1
if busy; then echo "$device is in use" >&2; exit 75; fi
# systemd keeps what it has read, also of a file that is gone, until it reads all anew: a removal may have been cut before that.
is_new=
if [ ! -e "$file" ] && [ "$(systemctl show -p LoadState --value "$unit")" = not-found ]; then is_new=new; fi
while [ $# -gt 0 ]; do install_file "$1" "$2" || exit 1; shift 2; done
udevadm control --reload || exit 1
install_file "$file" "$new" && rm -rf "$file.d" || exit 1
modprobe nbd || exit 1
fail() { echo "$1" >&2; last_words "$unit" 15; exit 70; }
systemctl enable --root=/ --quiet "$unit" && read_anew "$unit" "$is_new" enabled && systemctl start "$unit" || fail "the unit did not start"
size=$(( $(cat "$sys/size") * 512 ))
[ "$size" = "$expected" ] || fail "the device has $size bytes, the export $expected"
timeout "$wait" dd if="$device" of=/dev/null bs=4096 count=1 iflag=direct 2>&1 || fail "no sector could be read"
tidy_certificates "$folders" "$folder"
`,
);

/**
 * `current`: the device that this attachment has now and that must not be held; `undefined` if it has none.
 * `seen`: what was there when it was looked at.
 */
async function apply(
  context: Context,
  plan: AttachPlan,
  sizeBytes: number,
  current: string | undefined,
  seen: Observed | undefined,
): Promise<"attached" | "taken"> {
  const mark = ownerMark(plan.owner);
  // The kernel cuts the device to whole blocks.
  const expected = sizeBytes - (sizeBytes % plan.blockSize);
  const unit = renderAttachUnit(plan);
  const unitName = attachUnitName(plan.name);
  const folder = attachCertificates(plan);
  const command: RemoteCommand = {
    argv: script(
      applyScript,
      unitName,
      plan.device,
      String(expected),
      String(Math.min(plan.timeoutSeconds, 30)),
      current ?? "",
      holdersScript,
      ...expectedMarks(mark, seen),
      String(Buffer.byteLength(unit)),
      ...[certificatesFolders(unitName), folder ?? ""],
      ...[modulesLoad, udevRule].flatMap(({ path, text }) => [path, text]),
    ),
    stdin: unit,
    kind: "change",
    deadlineSeconds: 300 + plan.timeoutSeconds,
  };
  const result = await serially(context.host, "nbd", () => context.host.run(command, context.signal));
  if (result.exitCode === 0) return "attached";
  if (result.exitCode === 75) return "taken";
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode === 76) {
    throw heldError(context, current ?? "", parseOutput(context, command, result, parseHolders));
  }
  const dead = result.exitCode === 70;
  throw failure(
    context,
    command,
    result,
    dead
      ? `${nbdUri(endpointOf(plan))} could not be attached as ${plan.device}`
      : "the attachment's unit could not be written",
    dead ? "ATTACHMENT_DEAD" : "COMMAND_FAILED",
  );
}

/** `seen`: the attachment that is there already. */
async function attach(
  context: Context,
  wanted: Inputs,
  current: string | undefined,
  seen: Observed | undefined,
): Promise<void> {
  const sizeBytes = await preflight(context, wanted);
  const attached = () => attachFree(context, wanted, current, seen, sizeBytes);
  const files = wanted.tls && clientFiles(wanted.tls);
  const tls = files && { digest: certificatesDigest(files) };
  const folder = attachCertificates({ name: wanted.name, tls });
  const isThere = seen?.plan?.tls?.digest === tls?.digest && seen?.certificates !== undefined;
  if (files === undefined || folder === undefined || isThere) return attached();
  // In a folder of their own, beside those that are in use.
  const marks = expectedMarks(ownerMark(wanted.owner), seen);
  await withCertificates(context, attachUnitName(wanted.name), marks, folder, files, attached);
}

async function attachFree(
  context: Context,
  wanted: Inputs,
  current: string | undefined,
  seen: Observed | undefined,
  sizeBytes: number,
): Promise<void> {
  const fixed = wanted.device ?? current;
  const claims = claimsOn(context.host);
  for (const device of unclaimed(fixed === undefined ? await freeDevices(context) : [fixed], claims)) {
    const claim = claims.has(device) ? undefined : device;
    claims.add(device);
    context.progress(`attaching ${nbdUri(endpoint(wanted))} as ${device}`);
    try {
      const outcome = await apply(context, planOf(wanted, device), sizeBytes, current, seen);
      if (outcome === "attached") return;
      if (claim !== undefined) claims.delete(claim);
    } catch (error) {
      if (claim !== undefined) claims.delete(claim);
      // What does not connect is not left behind: it would keep trying on a host nobody looks at.
      // An attachment that was there before stays: its unit goes on trying, and the next up goes on from it.
      if (
        seen === undefined &&
        error instanceof LvmNbdError &&
        ["ATTACHMENT_DEAD", "COMMAND_FAILED"].includes(error.code)
      ) {
        await takeDown(context, wanted.name, device, ownerMark(wanted.owner)).catch((cleanup: unknown) => {
          context.warn(`what did not start could not be taken down again: ${String(cleanup).split("\n")[0]}`);
        });
      }
      throw error;
    }
  }
  throw new LvmNbdError(fixed === undefined ? "NO_FREE_DEVICE" : "DEVICE_IN_USE", {
    message:
      fixed === undefined ? "every NBD device is in use" : `device: ${fixed} is in use by something else`,
    host: context.host.name,
    resource: context.resource,
    advice:
      "Detach what is not needed, or give another `device`: `lsblk` and `nbd-client -c /dev/nbdN` show what is in use. " +
      "For more than there are: `options nbd nbds_max=64` in /etc/modprobe.d, then `modprobe -r nbd; modprobe nbd`.",
  });
}

/** Devices that this process attaches, or has attached, by host: all who look at once see the same ones free. */
const claimed = new WeakMap<Host, Set<string>>();

function claimsOn(host: Host): Set<string> {
  const claims = claimed.get(host) ?? new Set();
  claimed.set(host, claims);
  return claims;
}

/** Those that are claimed by then come last: they may be free again. */
function* unclaimed(devices: readonly string[], claims: ReadonlySet<string>): Generator<string> {
  const left = new Set(devices);
  while (left.size > 0) {
    const device = [...left].find((one) => !claims.has(one)) ?? [...left][0];
    if (device === undefined) return;
    left.delete(device);
    yield device;
  }
}

async function freeDevices(context: Context): Promise<string[]> {
  const command: RemoteCommand = {
    argv: script(candidatesScript),
    kind: "read",
    deadlineSeconds: 60,
    shared: { oldestSeconds: 0 },
  };
  const result = await succeed(context, command, "the NBD devices could not be listed");
  return parseOutput(context, command, result, (stdout) =>
    stdout
      .split("\n")
      .filter((line) => line !== "")
      .map((line) => `/dev/nbd${z.coerce.number().int().parse(line)}`),
  );
}

async function converge(context: Context, wanted: Inputs, seen: Observed): Promise<void> {
  const device = wanted.device ?? seen.plan?.device;
  const asDeclared =
    seen.plan !== undefined &&
    device !== undefined &&
    renderAttachUnit(seen.plan) === renderAttachUnit(planOf(wanted, device));
  const state = stateOf(seen);
  if (asDeclared && state === "attached") return;
  if (asDeclared && state === "disabled")
    return enable(context, attachUnitName(wanted.name), ownerMark(wanted.owner));
  const replaced = state === "replaced";
  // Somebody else's link is not ours to cut, whoever holds it: the unit leaves it alone.
  if (seen.device !== undefined && !replaced)
    await refuseHeld(context, seen.device, attachUnitName(wanted.name));
  await attach(context, wanted, replaced ? undefined : seen.device, seen);
}

async function refuseHeld(context: Context, device: string, unit: string): Promise<void> {
  const command: RemoteCommand = {
    argv: script(heldScript, device, unit),
    kind: "read",
    deadlineSeconds: 60,
  };
  const result = await succeed(context, command, `who holds ${device} could not be found out`);
  const holders = parseOutput(context, command, result, parseHolders);
  if (holders.length > 0) throw heldError(context, device, holders);
}

const heldScript = hostScript("attachment-users", "observe", `[ -b "$1" ] || exit 0\n${holdersScript}`, [
  "path",
  "unit",
]);

function heldError(context: Context, device: string, holders: readonly string[]): LvmNbdError {
  return new LvmNbdError("DEVICE_IN_USE", {
    message: `${device} is in use: ${holders.join(", ")}`,
    host: context.host.name,
    resource: context.resource,
    advice: "Unmount or stop what is named, then run again. Nothing was detached.",
  });
}

/**
 * Unless somebody holds the device, which is looked at and cut in one go. `device`: what must not be held; `undefined` for what was never
 * attached or is not ours. `mark`: what the unit's file carries, "" for none.
 */
async function takeDown(
  context: Context,
  name: string,
  device: string | undefined,
  mark: string,
): Promise<void> {
  const holders = await removeUnit(context, {
    ...{ unit: attachUnitName(name), path: attachPath(name), mark, device },
  });
  if (holders.length > 0) throw heldError(context, device ?? "", holders);
  if (device !== undefined) claimsOn(context.host).delete(device);
}

function toState(declared: Inputs | State, seen: Observed): State {
  const { plan } = seen;
  const before = "sizeBytes" in declared ? declared : undefined;
  const seenEndpoint =
    plan === undefined || nbdUri(endpointOf(plan)) === nbdUri(endpoint(declared))
      ? {}
      : declared.uri !== undefined
        ? { uri: nbdUri(endpointOf(plan)) }
        : { server: plan.server, port: plan.port, exportName: plan.exportName };
  return {
    ...declared,
    ...seenEndpoint,
    ...(plan === undefined
      ? {}
      : {
          readOnly: plan.readOnly,
          connections: plan.connections,
          timeoutSeconds: plan.timeoutSeconds,
          blockSize: plan.blockSize,
          ...seenTls(declared, plan),
        }),
    device: plan?.device ?? declared.device ?? "",
    path: attachPath(declared.name),
    sizeBytes: seen.sizeBytes === 0 ? (before?.sizeBytes ?? 0) : seen.sizeBytes,
    certificatesExpireAt: seen.certificates && expiryTime(seen.certificates),
    state: stateOf(seen),
  };
}

/** What is declared, unless the unit was made with others: which, only their digest tells. */
function seenTls({ tls }: Inputs | State, plan: AttachPlan): Pick<Inputs, "tls"> {
  if (tls === undefined) return {};
  return { tls: plan.tls?.digest === certificatesDigest(clientFiles(tls)) ? tls : undefined };
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  if (unknown.has("name") || wanted.name !== state.name)
    changes.push({ property: "name", effect: "replace" });
  const where = ["uri", "server", "port", "exportName"] as const;
  const openEnd = where.filter((property) => unknown.has(property));
  if (openEnd.length > 0) {
    for (const property of openEnd) changes.push({ property, effect: "replace" });
  } else if (nbdUri(endpoint(wanted)) !== nbdUri(endpoint(state))) {
    // With TLS, or without it from now on, it is the same export.
    const effect = sameEndpoint(endpoint(wanted), endpoint(state)) ? "update" : "replace";
    const changed = where.filter((property) => wanted[property] !== state[property]);
    for (const property of changed) changes.push({ property, effect });
  }
  if (unknown.has("tls") || !isDeepStrictEqual(wanted.tls, state.tls))
    changes.push({ property: "tls", effect: "update" });
  for (const property of ["readOnly", "connections", "timeoutSeconds", "blockSize", "owner"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property])
      changes.push({ property, effect: "update" });
  }
  if (unknown.has("device") || (wanted.device !== undefined && wanted.device !== state.device)) {
    changes.push({ property: "device", effect: "update" });
  }
  if (state.state !== "attached") changes.push({ property: "state", effect: "update" });
  return changes;
}

function validate(
  wanted: Partial<Inputs>,
  _old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  const problems: Problem[] = [];
  const given = (property: keyof Inputs) => wanted[property] !== undefined || unknown.has(property);
  if (!given("uri") && !(given("server") && given("exportName"))) {
    problems.push({
      property: "uri",
      reason: "is missing: give the `uri` of an NbdExport, or `server` and `exportName`",
    });
  }
  const apart = (["server", "port", "exportName"] as const).filter(
    (property) => wanted[property] !== undefined,
  );
  if (wanted.uri !== undefined && apart.length > 0) {
    problems.push({
      property: apart[0] ?? "server",
      reason: "is part of `uri` already: give `uri` alone, or `server` and `exportName`",
    });
  }
  return [...problems, ...tlsProblems(wanted.uri, wanted.tls, unknown)];
}

/** To what it is attached and how, as the unit's record has it. */
async function declared(context: Context, { plan }: Observed): Promise<Partial<Inputs>> {
  if (plan === undefined)
    throw refusal(context, "INVALID_INPUT", "its unit has no record of what is attached");
  if (plan.tls !== undefined) {
    const message = "tls: it has certificates, which are not read back from the host";
    throw refusal(context, "INVALID_INPUT", message, declareInstead);
  }
  const { name, readOnly, connections, timeoutSeconds, blockSize } = plan;
  return { name, uri: nbdUri(endpointOf(plan)), readOnly, connections, timeoutSeconds, blockSize };
}

/** The resource as the reconciler sees it. */
export const nbdAttachment: ResourceType<Inputs, State, Observed> = {
  type: "NbdAttachment",
  description: "An export as a block device of another host, kept there by a systemd unit.",
  example: {
    vm1Export: {
      type: "NbdExport",
      properties: {
        host: "server1",
        device: "/dev/VgVm/vm1-snap",
        listenAddress: "10.0.0.1",
        clients: ["10.0.0.2"],
        tls: true,
      },
    },
    vm1: {
      type: "NbdAttachment",
      properties: {
        host: "server2",
        uri: new OutputOf("vm1Export", "uri"),
        tls: new OutputOf("vm1Export", "clientTls"),
      },
    },
  },
  inputs,
  outputs,
  nameInput: "name",
  validate,
  predict: ({ name }) => (name === undefined ? {} : { path: attachPath(name) }),
  id: (wanted, hostName) => `${hostName}/${wanted.name}`,
  observe,
  isSame: (seen, state) => seen.mark === ownerMark(state.owner) || seen.fileGone,
  toState,
  diff,
  collides: (state, wanted) =>
    state.name === wanted.name || (wanted.device !== undefined && wanted.device === state.device),
  lasting: ({ state }, changed) =>
    state === "attached" && !changed.has("device") ? ["device", "sizeBytes"] : [],
  byId: { form: "NAME", place: (path) => (isName(path) ? { name: path } : undefined), declared },
  create: (context, wanted) => attach(context, wanted, undefined, undefined),
  converge,
  async remove(context, state, seen) {
    const device = seen.plan?.device ?? state.device;
    context.progress(`detaching ${device}`);
    // Somebody else's link behind the device is not ours to look at or to cut; the unit leaves it alone.
    await takeDown(context, state.name, stateOf(seen) === "replaced" ? undefined : device, seen.mark ?? "");
  },
  drift(state, seen) {
    const expiry = seen.certificates && expiryPhrase(seen.certificates);
    return [
      ...unitDrift(
        state,
        toState(state, seen),
        ["uri", "device", "readOnly", "connections", "timeoutSeconds", "blockSize"],
        "attached",
        "attach it as declared",
      ),
      ...(expiry === undefined
        ? []
        : [`${expiry}: after that it cannot connect again. Its export gives new ones`]),
    ];
  },
};
