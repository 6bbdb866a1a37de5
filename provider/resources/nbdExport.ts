/**
 * NbdExport: a block device, or the content of an image, offered over NBD by a hardened systemd unit of its own.
 */
import { isIP } from "node:net";
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { makeCertificates } from "../core/certificateAuthority.js";
import { failure, parseOutput, refusal, succeed } from "../core/command.js";
import { type ErrorCode, LvmNbdError } from "../core/errors.js";
import { OutputOf } from "../core/example.js";
import { hostScript, script } from "../core/hostCommands.js";
import { commonInputs, refusing, replaces, secret, triggersInput } from "../core/inputs.js";
import { declareInstead, digest, ownerMark } from "../core/owner.js";
import type { Change, Context, Problem, ResourceType } from "../core/resource.js";
import { writingAmong } from "../core/restoreMark.js";
import { atMost } from "../core/serial.js";
import { clientProblem, isAnyAddress, isLoopback } from "../linux/addresses.js";
import {
  askedUri,
  type ExportPlan,
  exportCertificates,
  exportConfig,
  exportConfigPath,
  exportUnitName,
  type FoundOnHost,
  isEnforcedElsewhere,
  probeAddress,
  probeUri,
  renderExportUnit,
  unitMark,
} from "../linux/exportUnit.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import {
  fileProblem,
  type ImageFormat,
  imageFormats,
  imageGuardFunctions,
  imageProblem,
  imageSize,
  lookAtImageFunction,
} from "../linux/imageFile.js";
import { listenersOn, parseListeners } from "../linux/listeners.js";
import {
  canServe,
  defaultPort,
  type NbdServer,
  nbdServers,
  nbdUri,
  pathOf,
  type Served,
} from "../linux/nbd.js";
import { missingFunction, missingPrograms } from "../linux/programs.js";
import { hasDropIns, parseShow, type UnitProperties } from "../linux/systemd.js";
import {
  type CertificateFiles,
  type ClientTls,
  certificatesDigest,
  certificatesFolders,
  certificatesFunctions,
  expiryOf,
  expiryPhrase,
  expiryTime,
  isCertificateFor,
  isExpired,
  nameProblem,
  provenFile,
  type SeenCertificates,
  type ServerTls,
  serverFiles,
  type TlsRecord,
  tlsProblem,
  validFrom,
} from "../linux/tls.js";
import { unitNameProblem } from "../linux/unitName.js";
import {
  changedMeanwhile,
  expectedMarks,
  giveUpSeconds,
  provenOnly,
  unitFunctions,
} from "../linux/unitScript.js";
import { serverOf } from "../ssh/config.js";
import type { CommandResult, Host, NamedHosts, RemoteCommand } from "../ssh/types.js";
import {
  clientsFailure,
  clientsFunctions,
  clientsGuard,
  clientsProofSeconds,
  proveClients,
  warnOfClients,
} from "./clientsProof.js";
import { observeExportScript } from "./exportLook.js";
import { absent, lookAmongOthers, purposeOf } from "./hostPicture.js";
import { clientTlsShape, keyInput, pemInput, tlsRecordShape } from "./tls.js";
import { proveTls } from "./tlsProof.js";
import {
  couldNotEnable,
  enable,
  isName,
  lookAtUnit,
  readPlan,
  tellSystemd,
  unitDrift,
  withCertificates,
  writtenMeanwhile,
} from "./unit.js";
import { removeUnit } from "./unitRemoval.js";
import { writtenBy } from "./volumes.js";

const deviceInput = z
  .string()
  .regex(/^\/dev\/[^\s%\\"]+$/, 'must be the path of a block device below /dev, e.g. "/dev/VgVm/vm1-snap"')
  .refine((path) => !path.split("/").includes(".."), 'must not hold ".."');
const fileInput = z
  .string()
  .superRefine(refusing(fileProblem))
  .refine((path) => !path.endsWith("\\"), "must not end with a backslash");
const formatInput = z.enum(imageFormats).meta({ title: "ImageFormat" });

const serverTls = z
  .strictObject({
    caCertificate: pemInput("certificate of the authority that signed both others"),
    certificate: pemInput("the server's certificate, for the address in `uri`"),
    privateKey: keyInput,
    clientCertificate: pemInput("a client's certificate, by which the host also proves that it serves"),
    clientPrivateKey: keyInput,
  })
  .superRefine((tls, refinement) => {
    const { clientCertificate: certificate, clientPrivateKey: privateKey } = tls;
    const names = { certificate: "clientCertificate", privateKey: "clientPrivateKey" };
    const problem =
      tlsProblem(tls, { usage: "server" }) ??
      tlsProblem({ ...tls, certificate, privateKey }, { usage: "client", ...names });
    if (problem) refinement.addIssue({ code: "custom", message: problem.reason, path: [problem.property] });
  });

/** Program that serves exports. */
export const nbdServerInput = z.enum(nbdServers).meta({ title: "NbdServer" }).default("nbdkit");

export const clientsElsewhereInput = z
  .boolean()
  .describe(
    "Whether something else, such as a firewall, lets in nobody but the clients. That the host's kernel does not enforce them is " +
      "then a warning, each time it is found so, instead of an error. Default: false.",
  );

/** Declared properties. */
export const nbdExportInputs = z.strictObject({
  ...commonInputs,
  device: deviceInput
    .optional()
    .describe("Block device to export, e.g. the `path` of an LvSnapshot. Either this or `file`.")
    .meta(replaces),
  file: fileInput
    .optional()
    .describe(
      "Absolute path of an image to export instead of a device, e.g. the `path` of a VolumeCopy. It is only read. The image and " +
        "every folder above it must be root's, and writable for nobody else.",
    )
    .meta(replaces),
  format: formatInput
    .optional()
    .describe('Format of `file`; `"qcow2"` needs `server: "qemu-nbd"`. Default: `"raw"`.')
    .meta(replaces),
  exportName: z
    .string()
    .min(1)
    .regex(/^[^\p{Cc}\p{Cs}[\]/]+$/u, "must not hold control characters, brackets or slashes")
    .superRefine(refusing((value) => unitNameProblem("export", value)))
    .describe("NBD export name; unique on the host. Default: the resource's name.")
    .meta(replaces),
  listenAddress: z
    .string()
    .refine((address) => isIP(address) !== 0, 'must be an IP address of the host, e.g. "10.0.0.1"')
    .describe("The one address to listen on. Required: nothing is exported on all interfaces by default."),
  port: z
    .number()
    .int("must be a whole number")
    .min(1, "must be a port from 1 to 65535")
    .max(65535, "must be a port from 1 to 65535")
    .default(defaultPort)
    .describe("TCP port."),
  readOnly: z.boolean().default(true).describe("Whether clients may only read."),
  clients: z
    .array(z.string().superRefine(refusing(clientProblem)))
    .default([])
    .describe(
      "Addresses or networks that may connect; enforced by the host's kernel. Required unless `listenAddress` is loopback. " +
        "The host itself can always connect.",
    ),
  clientsEnforcedElsewhere: clientsElsewhereInput.default(false),
  server: nbdServerInput.describe("Program that serves."),
  tls: z
    .union([z.boolean(), serverTls])
    .optional()
    .describe(
      "Encrypts the link, and lets in only clients with a certificate. `true`: an authority of this export's own makes them, for 397 " +
        "days; give an attachment the output `clientTls`. Or an object with your own (PEM): `caCertificate`, `certificate`, " +
        "`privateKey`, `clientCertificate`, `clientPrivateKey`. Encrypted in the state. Default: no TLS.",
    )
    .meta(secret),
  triggers: triggersInput.describe(
    "Any values; a change of one makes new certificates (`tls: true`). Clients are cut off until they have theirs.",
  ),
});

const outputs = z.object({
  uri: z.string().describe("NBD URI, e.g. `nbd://10.0.0.1:10809/vm1`; with TLS `nbds://...`."),
  clientTls: clientTlsShape
    .optional()
    .describe("With `tls`: the `tls` of an attachment. Encrypted in the state, like its copy there.")
    .meta(secret),
  certificatesExpireAt: z
    .string()
    .optional()
    .describe("With `tls`: when the first of the certificates expires (ISO 8601)."),
  sizeBytes: z.number().describe("Size that a client sees, in bytes."),
  state: z
    .enum(["serving", "stopped", "failed", "notServing", "disabled", "edited", "expired", "unproven"])
    .describe(
      "`serving` (proven by a handshake); `stopped`; `failed` (the server ends by itself); `notServing` (runs, but the handshake " +
        "fails or shows another size, or the image is not what was examined: replaced, or in others' hands); `disabled` (would not come back after a " +
        "reboot); `edited` (its unit or its certificates were changed by hand); `expired` (its certificates are; `pulumi up` makes new ones); " +
        "`unproven` (nobody has seen yet, of the unit as it is and with the kernel that runs, that it keeps out who may not connect; " +
        "`pulumi up` looks, and stops it where it does not).",
    ),
});

type Inputs = z.infer<typeof nbdExportInputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type NbdExportDeclaration = z.input<typeof nbdExportInputs>;
/** What a program can read of it. */
export type NbdExportOutputs = State;

interface Observed {
  readonly mark: string | undefined;
  /** What our unit says it was made from; `undefined` if it is not ours or its record was spoiled. */
  readonly plan: ExportPlan | undefined;
  readonly edited: boolean;
  /** The unit runs, but its file was deleted. */
  readonly fileGone: boolean;
  readonly show: UnitProperties;
  /** Of the device, or of the image's content. */
  readonly contentSizeBytes: number | undefined;
  /** Why the image may not be served as it is now, in a sentence. */
  readonly imageProblem: string | undefined;
  /** A boot starts it, whenever its device appears: by the links on the disk. systemd itself shows what it read when it last read all. */
  readonly boots: boolean;
  readonly probe: { readonly sizeBytes: number; readonly readOnly: boolean } | undefined;
  /** `undefined` without TLS, and where they are not what the unit was made with. */
  readonly certificates: (SeenCertificates & { readonly client: ClientTls }) | undefined;
  /** Somebody has tried, of the unit as it is, that they are asked for. */
  readonly proven: boolean;
  /** It was seen that the kernel which runs enforces the clients of units, and nothing lets in more than the unit says. */
  readonly clientsProven: boolean;
  /** `serverOf` its host. */
  readonly reachedBy: string;
  /** That was seen of this host, with whatever kernel. */
  readonly hostProven: boolean;
  /** Its unit was written while something else kept all others out. */
  readonly elsewhere: boolean;
}

async function observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined> {
  const unit = exportUnitName(wanted.exportName);
  const command: RemoteCommand = {
    argv: script(observeExportScript, unit, exportConfigPath(wanted.exportName), ...purposeOf(context)),
    kind: "read",
    deadlineSeconds: 90,
  };
  const missing = ({ exitCode }: CommandResult) => (exitCode === 127 ? "PROGRAM_MISSING" : undefined);
  const result = await lookAmongOthers(context, unit, () => lookAtUnit(context, command, unit, missing));
  if (result === absent) return undefined;
  const reachedBy = serverOf(wanted.host, context.namedHosts);
  return parseOutput(context, command, result, (stdout) => readObservation(parseFields(stdout), reachedBy));
}

function readObservation(fields: ReadonlyMap<string, string>, reachedBy: string): Observed | undefined {
  const show = parseShow(required(fields, "show"));
  const text = fields.get("unit");
  const running = !["inactive", "failed"].includes(show.ActiveState ?? "");
  if (text === undefined) {
    // A unit whose file was deleted while it runs still serves: that is not absent.
    return running
      ? {
          mark: undefined,
          plan: undefined,
          edited: true,
          fileGone: true,
          show,
          boots: false,
          contentSizeBytes: undefined,
          imageProblem: undefined,
          probe: undefined,
          certificates: undefined,
          proven: false,
          clientsProven: false,
          reachedBy,
          hostProven: false,
          elsewhere: false,
        }
      : undefined;
  }
  const plan = readPlan(text, planShape);
  const config = plan === undefined ? undefined : exportConfig(plan);
  const elsewhere = isEnforcedElsewhere(text);
  // A handshake alone can succeed where every read hangs: the proof is a sector.
  const served = fields.get("size.rc") === "0" && fields.get("bytes")?.trim() === "512";
  const size = served ? Number(fields.get("size")) : Number.NaN;
  return {
    mark: unitMark(text),
    plan,
    edited:
      plan === undefined ||
      fields.has("linked") ||
      renderExportUnit(plan, elsewhere) !== text ||
      (config !== undefined && config !== fields.get("conf")) ||
      (show.NeedDaemonReload === "yes" && !fields.has("outdated")) ||
      hasDropIns(show),
    fileGone: false,
    show,
    boots: fields.has("boots"),
    contentSizeBytes: contentSize(plan, fields),
    imageProblem: plan && "file" in plan ? problemOfServed(plan, fields) : undefined,
    probe: Number.isSafeInteger(size)
      ? { sizeBytes: size, readOnly: fields.get("readOnly.rc") === "0" }
      : undefined,
    certificates: seenCertificates(fields),
    proven: fields.has("proven"),
    clientsProven: fields.has("clientsProven"),
    reachedBy,
    hostProven: fields.has("hostProven"),
    elsewhere,
  };
}

function seenCertificates(fields: ReadonlyMap<string, string>): Observed["certificates"] {
  const [caCertificate, server] = [fields.get("ca"), fields.get("serverCert")];
  const [certificate, privateKey] = [fields.get("clientCert"), fields.get("clientKey")];
  if (!caCertificate || !server || !certificate || !privateKey) return undefined;
  return {
    client: { caCertificate, certificate, privateKey },
    expiresAt: expiryOf(caCertificate, server, certificate),
    now: Number(required(fields, "now")),
  };
}

/** `undefined` where there is no content. */
function contentSize(plan: ExportPlan | undefined, fields: ReadonlyMap<string, string>): number | undefined {
  if (plan && "file" in plan) return imageSize(plan.format, fields);
  const size = fields.get("deviceSize");
  return size === undefined ? undefined : Number(size);
}

function problemOfServed(
  plan: ExportPlan & { readonly file: string; readonly format: ImageFormat },
  fields: ReadonlyMap<string, string>,
): string | undefined {
  const problem = imageProblem(plan, fields);
  if (problem !== undefined) return problem.message;
  if (!fields.has("replaced") && fields.get("fileId") === plan.fileId) return undefined;
  return `${plan.file} is another file than the one that was examined; \`pulumi up\` examines it and serves it`;
}

function required(fields: ReadonlyMap<string, string>, name: string): string {
  const value = fields.get(name);
  if (value === undefined) throw new Error(`"${name}" is missing`);
  return value;
}

const { owner: ownerInput, ...termsInputs } = nbdExportInputs.pick({
  owner: true,
  exportName: true,
  listenAddress: true,
  port: true,
  readOnly: true,
  clients: true,
  server: true,
}).shape;
const termsShape = {
  ...termsInputs,
  tls: tlsRecordShape.optional(),
  ownAddress: z.string().optional(),
};
/** Its keys are in the order of `planOf`: what is read renders as what was written. */
const planShape = z.union([
  z.strictObject({ owner: ownerInput, device: deviceInput, ...termsShape }),
  z.strictObject({
    ...{ owner: ownerInput, file: fileInput, format: formatInput, ...termsShape },
    ...{ realPath: z.string().optional(), mountPoint: z.string().optional(), fileId: z.string().optional() },
  }),
]);

function planOf(wanted: Inputs, tls: TlsRecord | undefined): ExportPlan {
  const { owner, exportName, listenAddress, port, readOnly, clients, server } = wanted;
  const secured = tls === undefined ? {} : { tls };
  return {
    owner,
    ...servedOf(wanted),
    exportName,
    listenAddress,
    port,
    readOnly,
    clients,
    server,
    ...secured,
  };
}

/** What certificates that are made here are made for: `names` of the server. */
function madeFor(names: readonly string[], wanted: Inputs): string {
  return digest(JSON.stringify([names, wanted.triggers]), 16);
}

/** By which it is reached. */
function serverNames(
  { host, listenAddress }: Pick<Inputs, "host" | "listenAddress">,
  named?: NamedHosts,
): string[] {
  return [...new Set([serverName(listenAddress, serverOf(host, named)), probeAddress(listenAddress)])];
}

/** The record of certificates that are there and go on being right; `undefined`: none is. */
function keptRecord(context: Context, wanted: Inputs, seen: Observed | undefined): TlsRecord | undefined {
  const record = seen?.plan?.tls;
  if (record === undefined || seen?.certificates === undefined || !wanted.tls) return undefined;
  if (wanted.tls !== true)
    return record.digest === certificatesDigest(serverFiles(wanted.tls)) ? record : undefined;
  const made = madeFor(serverNames(wanted, context.namedHosts), wanted);
  return record.made === made && !isExpired(seen.certificates) ? record : undefined;
}

/** Certificates that are to be put on the host, given or made now. */
async function newCertificates(
  context: Context,
  wanted: Inputs,
  tls: true | ServerTls,
  now: number,
): Promise<{ readonly record: TlsRecord; readonly files: CertificateFiles }> {
  const made = tls === true;
  const names = serverNames(wanted, context.namedHosts);
  const all = made ? await makeCertificates(wanted.exportName, names, new Date(now * 1000)) : tls;
  const files = serverFiles(all);
  const record = { digest: certificatesDigest(files), ...(made ? { made: madeFor(names, wanted) } : {}) };
  return { record, files };
}

/** `validate` has seen that it is one of both. */
function servedOf({ device, file, format = "raw" }: Pick<Inputs, "device" | "file" | "format">): Served {
  if (file !== undefined) return { file, format };
  if (device !== undefined) return { device };
  throw new LvmNbdError("INVALID_INPUT", { message: "device: is required, or `file`", property: "device" });
}

/** `elsewhere`: `clientsEnforcedElsewhere`. */
function stateOf(seen: Observed, elsewhere: boolean): State["state"] {
  const { ActiveState: active } = seen.show;
  if (active === "failed" || active === "activating") return "failed";
  if (active !== "active") return "stopped";
  if (seen.edited) return "edited";
  if (seen.plan?.tls !== undefined) {
    if (seen.certificates === undefined) return "edited";
    if (isExpired(seen.certificates)) return "expired";
  }
  if (seen.probe === undefined || seen.probe.sizeBytes !== seen.contentSizeBytes) return "notServing";
  if (seen.imageProblem !== undefined) return "notServing";
  if (seen.probe.readOnly !== seen.plan?.readOnly) return "notServing";
  if (needsProof(seen.plan, seen, elsewhere)) return "unproven";
  return seen.boots ? "serving" : "disabled";
}

/**
 * Whether somebody has ever seen that it keeps others out: it starts at boot, and is enabled only after that. Nothing else has to remember it:
 * the note of the host may be lost, or never have been written (/var is full), and a disk in use would be cut off for that. Enabled without
 * it is what listens on loopback, and what was written while `clientsEnforcedElsewhere`: of such a one the note alone tells.
 */
function wasProven(seen: Observed): boolean {
  const isBeyondLoopback = seen.plan !== undefined && !isLoopback(seen.plan.listenAddress);
  return seen.boots && isBeyondLoopback && (!seen.elsewhere || seen.hostProven);
}

/** It starts at boot, and may go on to while it is changed: nobody has to see first whom it keeps out, or has before. */
function staysEnabled(plan: ExportPlan, seen: Observed | undefined, elsewhere: boolean): boolean {
  if (seen === undefined || !seen.boots) return false;
  return clientsGuard(plan, elsewhere) !== "refuse" || wasProven(seen);
}

function needsProof(plan: ExportPlan, seen: Observed, elsewhere: boolean): boolean {
  return (
    (clientsGuard(plan, elsewhere) === "refuse" && !seen.clientsProven) || (hasTls(plan) && !seen.proven)
  );
}

const preflightScript = hostScript(
  "preflight-export",
  "observe",
  `${emitFunctions}${missingFunction}${imageGuardFunctions}${lookAtImageFunction}
server=$1 path=$2 address=$3 port=$4 unit=$5 format=$6 tls=$7; shift 7
look_at_device() {
  if [ ! -e "$path" ]; then emit device absent
  elif [ ! -b "$path" ]; then emit device other
  else emit device block
    emit ro "$(blockdev --getro "$path")"
    # By whatever path; empty for what is no volume of LVM's.
    volume=$(dmsetup info -c --noheadings --separator / -o vg_name,lv_name "$path" 2>/dev/null)
    case $volume in ?*/?*)
      tags=$(lvs --noheadings -o lv_tags "$volume") || exit 1
      emit volume "$volume"
      emit tags "$tags";;
    esac
    emit_output read timeout 20 dd if="$path" of=/dev/null bs=4096 count=1 iflag=direct
  fi
}
look_at_file() {
  look_at_image "$path" "$format" || return
  # As the server will: by root without any right. Not by its path, which the server reaches in another way.
  emit_output read timeout 20 setpriv --bounding-set=-all --inh-caps=-all dd if=/proc/self/fd/3 of=/dev/null bs=4096 count=1 3<"$path"
}
emit_missing "$server" nbdinfo nbdcopy systemctl ss ip "$@"
case $format in "") look_at_device;; *) look_at_file;; esac
emit addresses "$(ip -o addr show to "$address")"
emit route "$(ip -o route get to "$address" 2>/dev/null)"
listeners=$(ss -Hltnp "sport = :$port")
emit listeners "$listeners"
# Only where there is one, it may be the unit's own.
case $listeners in ?*) emit pid "$(systemctl show -p MainPID --value "$unit")";; esac
if [ -n "$tls" ]; then
  emit now "$(date +%s)"
  emit systemd "$(systemctl --version | sed -n '1s/^systemd \\([0-9]*\\).*/\\1/p')"
  if [ "$server" = nbdkit ]; then emit nbdkitTls "$(nbdkit --dump-config | sed -n s/^tls=//p)"; fi
fi
emit end ""
`,
  ["word", "path", "address", "number", "unit", "format?", "word?", "many:word"],
);

/** The first systemd that hands a service root's files (LoadCredential=). */
const systemdOfCredentials = 247;

/** Looks at what would make the export fail. */
async function look(
  context: Context,
  wanted: Inputs,
  plan: ExportPlan,
): Promise<{ readonly fields: ReadonlyMap<string, string>; readonly refuse: Refuse }> {
  const unit = exportUnitName(plan.exportName);
  const format = "file" in plan ? plan.format : undefined;
  const command: RemoteCommand = {
    argv: script(
      ...([preflightScript, plan.server, pathOf(plan), plan.listenAddress, String(plan.port), unit] as const),
      ...[format ?? "", wanted.tls ? "tls" : "", ...(format === undefined ? [] : ["setpriv"])],
    ),
    kind: "read",
    deadlineSeconds: 90,
  };
  const result = await succeed(context, command, "the host could not be looked at");
  const fields = parseOutput(context, command, result, parseFields);
  const refuse: Refuse = (code, property, message, advice) =>
    new LvmNbdError(code, {
      message: `${property}: ${message}`,
      host: context.host.name,
      resource: context.resource,
      property,
      advice,
    });
  const missing = missingPrograms(fields);
  if (missing !== undefined) throw refuse("PROGRAM_MISSING", "server", missing);
  return { fields, refuse };
}

/** Refuses, by looking only, where the host cannot serve as declared, whatever it is to serve: that need not be there yet. */
export async function requireServing(context: Context, wanted: Inputs): Promise<void> {
  const plan = planOf(wanted, undefined);
  const { fields, refuse } = await look(context, wanted, plan);
  requireListening(plan, fields, refuse);
  if (wanted.tls) requireTls(plan, fields, refuse);
}

function requireListening(plan: ExportPlan, fields: ReadonlyMap<string, string>, refuse: Refuse): void {
  if (!isAnyAddress(plan.listenAddress) && (fields.get("addresses") ?? "").trim() === "") {
    throw refuse(
      "ADDRESS_NOT_LOCAL",
      "listenAddress",
      `${plan.listenAddress} is no address of the host; \`ip address\` lists them`,
    );
  }
  const others = listenersOn(parseListeners(fields.get("listeners") ?? ""), plan.listenAddress).filter(
    (listener) => !listener.pids.some((pid) => String(pid) === fields.get("pid")),
  );
  const other = others[0];
  if (other !== undefined) {
    throw refuse(
      "PORT_IN_USE",
      "port",
      `${plan.port} on ${other.address} is taken by ${other.program ?? "another program"}${other.pids.length === 0 ? "" : ` (pid ${other.pids.join(", ")})`}: choose another port`,
    );
  }
}

/** Finds out before anything is changed what would make the export fail. Returns the plan for this host. */
async function preflight(context: Context, wanted: Inputs, seen: Observed | undefined): Promise<Prepared> {
  const kept = keptRecord(context, wanted, seen);
  const plan = planOf(wanted, kept);
  const { fields, refuse } = await look(context, wanted, plan);
  const found = "file" in plan ? requireImage(plan, fields, refuse) : requireDevice(plan, fields, refuse);
  requireListening(plan, fields, refuse);
  const own = /\bsrc (\S+)/.exec(fields.get("route") ?? "")?.[1];
  const apart =
    own !== plan.listenAddress && !isAnyAddress(plan.listenAddress) && !isLoopback(plan.listenAddress);
  const onHost = { ...(apart ? { ownAddress: own } : {}), ...found };
  if (!wanted.tls) {
    if (!isLoopback(plan.listenAddress))
      context.warn(
        `what clients read of it travels unencrypted from ${plan.listenAddress}: anybody on the way can read it. \`tls: true\` encrypts it`,
      );
    return { plan: { ...plan, ...onHost }, files: undefined };
  }
  requireTls(plan, fields, refuse);
  const now = Number(required(fields, "now"));
  if (wanted.tls !== true) requireValid(wanted.tls, now, refuse);
  if (kept !== undefined) return { plan: { ...plan, ...onHost }, files: undefined };
  const { record, files } = await newCertificates(context, wanted, wanted.tls, now);
  return { plan: { ...planOf(wanted, record), ...onHost }, files };
}

/** By the host's clock, which is the server's. */
function requireValid(tls: ServerTls, now: number, refuse: Refuse): void {
  const all = [tls.caCertificate, tls.certificate, tls.clientCertificate];
  const seen = { expiresAt: expiryOf(...all), now };
  const from = validFrom(...all);
  const problem =
    from > now
      ? `its certificates are valid from ${expiryTime({ expiresAt: from })} on, by the host's clock it is ${expiryTime({ expiresAt: now })}`
      : isExpired(seen)
        ? expiryPhrase(seen)
        : undefined;
  if (problem !== undefined)
    throw refuse(
      "INVALID_INPUT",
      "tls",
      problem,
      "Nothing was touched. Give new ones, or set the clock right.",
    );
}

function requireTls(plan: ExportPlan, fields: ReadonlyMap<string, string>, refuse: Refuse): void {
  const systemd = Number(fields.get("systemd"));
  if (systemd < systemdOfCredentials) {
    const message = `systemd ${systemd} on this host cannot hand an export its keys: ${systemdOfCredentials} can`;
    throw refuse("TLS_UNSUPPORTED", "tls", message);
  }
  if (plan.server === "nbdkit" && fields.get("nbdkitTls") !== "yes")
    throw refuse("TLS_UNSUPPORTED", "tls", "this host's nbdkit was built without TLS");
}

type Refuse = (code: ErrorCode, property: string, message: string, advice?: string) => LvmNbdError;

function requireDevice(
  { device, readOnly }: { readonly device: string; readonly readOnly: boolean },
  fields: ReadonlyMap<string, string>,
  refuse: Refuse,
): FoundOnHost {
  if (fields.get("device") === "absent")
    throw refuse("DEVICE_NOT_FOUND", "device", `${device} does not exist on the host`);
  if (fields.get("device") !== "block")
    throw refuse("DEVICE_NOT_BLOCK", "device", `${device} is not a block device`);
  if (!readOnly && fields.get("ro")?.trim() === "1") {
    throw refuse(
      "INVALID_INPUT",
      "readOnly",
      `${device} is read-only, so it cannot be exported writable`,
      "Leave `readOnly` out, or make the device writable (`readOnly: false` on the LvSnapshot).",
    );
  }
  const mark = writingAmong((fields.get("tags") ?? "").trim().split(","));
  if (mark !== undefined) {
    const [volumeGroup = "", name = ""] = (fields.get("volume") ?? "").split("/");
    const [what, advice] = writtenBy({ volumeGroup, name }, mark);
    throw refuse("ORIGIN_UNSUITABLE", "device", what, `Nothing was touched. ${advice}`);
  }
  if (fields.get("read.rc") !== "0")
    throw refuse("DEVICE_UNREADABLE", "device", `${device} cannot be read: ${fields.get("read") ?? ""}`);
  return {};
}

function requireImage(
  image: { readonly file: string; readonly format: ImageFormat },
  fields: ReadonlyMap<string, string>,
  refuse: Refuse,
): FoundOnHost {
  const problem = imageProblem(image, fields);
  if (problem !== undefined) throw refuse(problem.code, "file", problem.message, problem.advice);
  if (fields.get("read.rc") !== "0") {
    throw refuse(
      "FILE_UNSUITABLE",
      "file",
      `${image.file} cannot be read by a server without capabilities: ${fields.get("read") ?? ""}`,
      "Let its owner, root, read it (`chmod u+r`), and run again.",
    );
  }
  const [realPath, mountPoint, fileId] = ["realPath", "mountPoint", "fileId"].map((name) => fields.get(name));
  return {
    ...(realPath === image.file ? {} : { realPath }),
    ...(mountPoint === "/" ? {} : { mountPoint }),
    fileId,
  };
}

/**
 * Writes the unit (stdin), starts it and waits for a handshake. The last argument is the port of an export that stays enabled; another one
 * is neither enabled nor served from what was before until it was proven. Exit code 70: the server does not serve, or that of
 * `prove_clients`, or `provenOnly`.
 */
const applyScript = hostScript(
  "apply-export",
  "change",
  `${unitFunctions}${certificatesFunctions}${clientsFunctions}
unit=$1 conf=$2 config=$3 uri=$4 clients=$5 mark=$6 seen=$7 bytes=$8 folders=$9 folder=\${10} port=\${11} file=/etc/systemd/system/$1
# From now on it starts at boot; with TLS only once somebody has tried that. The certificates are those of before, of an export that had it.
finish() {
  [ -z "$folder" ] || exit 0
  lock ${provenOnly}
  same "$file" || exit ${changedMeanwhile}
  tidy_certificates "$folders" || exit ${provenOnly}
  [ -n "$port" ] || systemctl enable --root=/ --quiet "$unit" || exit ${provenOnly}
  exit 0
}
lock
guard "$file" "$mark" "$seen"
# Removed since it was looked at.
[ -e "$file" ] || case $seen in ""|absent) ;; *) exit ${changedMeanwhile};; esac
# Disabled since it was looked at, it may be another one, which nobody has seen yet.
[ -z "$port" ] || boot_links "$unit" "$file" || exit ${changedMeanwhile}
umask 022
rm -f "$file.new" && receive "$file.new" "$bytes" || exit 1
if [ -n "$config" ]; then
  no_link /etc/lvm-nbd
  mkdir -p /etc/lvm-nbd && rm -f "$conf.new" && printf '%s' "$config" >"$conf.new" && sync "$conf.new" || exit 1
fi
# What nobody has seen to keep others out starts at no boot, and no server of before is taken for the one that is to be seen.
# systemd keeps what it has read, also of a file that is gone, until it reads all anew: a removal may have been cut before that.
is_new= state=
[ -e "$file" ] || state=$(systemctl show -p ActiveState -p LoadState "$unit")
case $state in *ActiveState=inactive*) case $state in *LoadState=not-found*) is_new=new;; esac;; *) [ -n "$port" ] || cut_off "$unit" || exit 1;; esac
[ -z "$folder" ] || rm -f "$folder/${provenFile}" || exit 1
[ -z "$config" ] || mv -fT "$conf.new" "$conf" || exit 1
mv -fT "$file.new" "$file" || exit 1
watch "$file"
if [ -z "$config" ]; then rm -f "$conf"; fi
rm -rf "$file.d"
linked() { for link in /etc/systemd/system/*.wants/"$1" /etc/systemd/system/*.requires/"$1"; do [ ! -L "$link" ] || return 0; done; return 1; }
if [ -z "$port" ]; then
  # Also what was left of a file that is gone.
  ! linked "$unit" || systemctl disable --quiet --no-reload "$unit" || exit 1
  # A new one systemd reads by itself, and only then: all of them cost most of what a change does.
  [ "$is_new" = new ] && show_with_slices "$unit" -p LoadState -p NeedDaemonReload -p UnitFileState && is_read "$shown" disabled ||
    { shown=; systemctl daemon-reload || exit 1; }
else
  systemctl enable --quiet "$unit" || exit 1
  shown=
fi
# What cannot be told now is asked when it serves.
if [ "$clients" = refuse ] && { [ -n "$shown" ] || show_with_slices "$unit"; }; then
  clients_allowed "$file"
  [ $? != 1 ] || { cut_off "$unit" || end_unproven 74; end_unproven 71; }
fi
[ -n "$port" ] || trap 'give_up "$unit" "$file"' HUP INT TERM
# Under the lock: what goes on although nobody follows it any more starts nothing that was removed meanwhile. It is waited for without.
systemctl restart --no-block "$unit" || { last_words "$unit" 15; exit 70; }
exec 9>&-
end=$(( $(date +%s) + 120 ))
while job=$(systemctl show -p Job --value "$unit") && [ -n "$job" ] && [ "$(date +%s)" -lt "$end" ]; do sleep 0.2; done
# nbd-server makes Diffie-Hellman parameters before it answers: seconds on a fast host, 20 and more on a slow one.
end=$(( $(date +%s) + 80 ))
while :; do
  if answer=$(timeout 75 nbdinfo --size "$uri" 2>&1); then
    bytes=$(timeout 20 nbdcopy --requests=1 --connections=1 "$uri" - 2>/dev/null | head -c 512 | wc -c)
    [ "$bytes" = 512 ] && {
      prove_clients "$unit" "$uri" "$clients" "$port"
      finish
    }
    answer="the handshake succeeds, but nothing can be read"
    break
  fi
  state=$(systemctl show -p NRestarts -p ActiveState "$unit")
  case $state in *NRestarts=0*ActiveState=active*|*ActiveState=active*NRestarts=0*) ;; *) break;; esac
  [ "$(date +%s)" -lt "$end" ] || break
  sleep 0.2
done
printf '%s\\n' "$answer" >&2
last_words "$unit" 15
exit 70
`,
);

/** What `preflight` found out. */
interface Prepared {
  readonly plan: ExportPlan;
  /** Certificates to be put on the host. */
  readonly files: CertificateFiles | undefined;
}

/** On a host. */
interface Applying {
  /** How many exports are being written and proven. */
  now: number;
  /** One of those was enabled, which systemd does not know yet. */
  enabled: boolean;
}
const applying = new WeakMap<Host, Applying>();

/** `seen`: what was there when it was looked at. `elsewhere`: `clientsEnforcedElsewhere`. */
async function apply(
  context: Context,
  prepared: Prepared,
  seen: Observed | undefined,
  elsewhere: boolean,
): Promise<void> {
  const all = applying.get(context.host) ?? { now: 0, enabled: false };
  applying.set(context.host, all);
  all.now++;
  try {
    // Also if it fails: its script may go on.
    all.enabled ||= !staysEnabled(prepared.plan, seen, elsewhere);
    await applyOne(context, prepared, seen, elsewhere);
  } finally {
    all.now--;
    // Once for all of them: it costs as much as all else that is done for one.
    if (all.now === 0 && all.enabled) {
      all.enabled = false;
      await tellSystemd(context);
    }
  }
}

async function applyOne(
  context: Context,
  { plan, files }: Prepared,
  seen: Observed | undefined,
  elsewhere: boolean,
): Promise<void> {
  const unit = exportUnitName(plan.exportName);
  const folder = exportCertificates(plan);
  if (files === undefined || folder === undefined) await writeUnit(context, plan, seen, elsewhere);
  else
    await withCertificates(context, unit, expectedMarks(ownerMark(plan.owner), seen), folder, files, () =>
      writeUnit(context, plan, seen, elsewhere),
    );
  const caCertificate = files?.["ca-cert.pem"] ?? seen?.certificates?.client.caCertificate;
  if (hasTls(plan) && caCertificate !== undefined)
    await proveTls(context, plan, caCertificate, staysEnabled(plan, seen, elsewhere));
}

function hasTls(plan: ExportPlan): plan is ExportPlan & { readonly tls: TlsRecord } {
  return plan.tls !== undefined;
}

/**
 * On one host. The first are served, and can be attached elsewhere, while others wait; all at once would end together. nbd-server itself
 * takes its time to begin.
 */
const startedAtOnce: Readonly<Record<NbdServer, number>> = { nbdkit: 2, "qemu-nbd": 2, "nbd-server": 8 };

async function writeUnit(
  context: Context,
  plan: ExportPlan,
  seen: Observed | undefined,
  elsewhere: boolean,
): Promise<void> {
  const mark = ownerMark(plan.owner);
  const unit = renderExportUnit(plan, elsewhere && !isLoopback(plan.listenAddress));
  const unitName = exportUnitName(plan.exportName);
  const folder = exportCertificates(plan);
  const command: RemoteCommand = {
    argv: script(
      applyScript,
      unitName,
      exportConfigPath(plan.exportName),
      exportConfig(plan) ?? "",
      askedUri(plan),
      clientsGuard(plan, elsewhere),
      ...expectedMarks(mark, seen),
      String(Buffer.byteLength(unit)),
      certificatesFolders(unitName),
      folder ?? "",
      staysEnabled(plan, seen, elsewhere) ? String(plan.port) : "",
    ),
    stdin: unit,
    kind: "change",
    graceSeconds: giveUpSeconds,
    // Twice the lock (120 s), the stop and the start (120 s), and the first answer of a slow server.
    deadlineSeconds: 600 + clientsProofSeconds,
  };
  const result = await atMost(context.host, plan.server, startedAtOnce[plan.server], () =>
    context.host.run(command, context.signal),
  );
  if (result.exitCode === 0) return warnOfClients(context, result);
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode === provenOnly) throw couldNotEnable(context, command, result);
  const unproven = clientsFailure(context, command, result);
  if (unproven !== undefined) throw unproven;
  throw failure(
    context,
    command,
    result,
    result.exitCode === 70
      ? `${plan.server} does not serve ${pathOf(plan)} on ${probeUri(plan)}`
      : "the export's unit could not be written",
    result.exitCode === 70 ? "EXPORT_NOT_SERVING" : "COMMAND_FAILED",
  );
}

/**
 * After these a new export is taken down: what does not serve would keep restarting, and what was not proven let in others, on a host
 * nobody looks at. Not what was proven and only could not be enabled: the next `up` does that. Also after what was killed or timed out, and may still be going on: it starts and enables a unit only under the lock,
 * while it is the one that it wrote.
 */
const takenBack: readonly ErrorCode[] = [
  ...(["EXPORT_NOT_SERVING", "CLIENTS_NOT_ENFORCED", "TLS_NOT_ENFORCED"] as const),
  ...(["COMMAND_FAILED", "COMMAND_TIMED_OUT"] as const),
];

function isTakenBack({ code, details }: LvmNbdError): boolean {
  return takenBack.includes(code) && details.exitCode !== provenOnly;
}

async function create(context: Context, wanted: Inputs): Promise<void> {
  const prepared = await preflight(context, wanted, undefined);
  const { plan } = prepared;
  context.progress(`starting ${plan.server} for ${pathOf(plan)} on ${plan.listenAddress}:${plan.port}`);
  try {
    await apply(context, prepared, undefined, wanted.clientsEnforcedElsewhere);
  } catch (error) {
    if (error instanceof LvmNbdError && isTakenBack(error)) {
      await takeDown(context, plan, ownerMark(plan.owner)).catch((cleanup: unknown) => {
        context.warn(`what did not start could not be taken down again: ${String(cleanup).split("\n")[0]}`);
      });
    }
    throw error;
  }
}

/** What starts at boot without proof says so: it is written anew for that. */
function tellsWhy({ listenAddress, clientsEnforcedElsewhere }: Inputs, seen: Observed): boolean {
  if (clientsGuard({ listenAddress }, clientsEnforcedElsewhere) !== "elsewhere") return true;
  return seen.elsewhere || seen.clientsProven || seen.boots;
}

async function converge(context: Context, wanted: Inputs, seen: Observed): Promise<void> {
  const kept = keptRecord(context, wanted, seen);
  const declared = { ...planOf(wanted, kept), ...(seen.plan && foundOf(seen.plan)) };
  const asDeclared =
    seen.plan !== undefined &&
    renderExportUnit(seen.plan) === renderExportUnit(declared) &&
    (kept !== undefined || !wanted.tls) &&
    tellsWhy(wanted, seen);
  const state = stateOf(seen, wanted.clientsEnforcedElsewhere);
  if (asDeclared && (state === "serving" || state === "unproven" || state === "disabled")) {
    // A run that was cut may not have come to it; nor has one for which something else enforces the clients.
    await prove(context, seen.plan, seen, wanted.clientsEnforcedElsewhere);
    if (!seen.boots)
      await enable(context, exportUnitName(wanted.exportName), ownerMark(wanted.owner), seen.plan);
    return;
  }
  const prepared = await preflight(context, wanted, seen);
  const { plan } = prepared;
  context.progress(
    state === "serving"
      ? `restarting the export ${plan.exportName}; connected clients are cut off and attachments reconnect`
      : `starting the export ${plan.exportName} again (it was ${state})`,
  );
  await apply(context, prepared, seen, wanted.clientsEnforcedElsewhere);
}

/** Of an export that serves: whatever nobody has tried of it yet. */
async function prove(context: Context, plan: ExportPlan, seen: Observed, elsewhere: boolean): Promise<void> {
  if (!seen.clientsProven && clientsGuard(plan, elsewhere) !== "none")
    await proveClients(context, plan, elsewhere, wasProven(seen));
  if (hasTls(plan) && !seen.proven && seen.certificates !== undefined)
    await proveTls(context, plan, seen.certificates.client.caCertificate, seen.boots);
}

/** `mark`: what the unit's file carries, "" for none. */
async function takeDown(
  context: Context,
  { exportName }: Pick<ExportPlan, "exportName">,
  mark: string,
): Promise<void> {
  await removeUnit(context, { unit: exportUnitName(exportName), path: exportConfigPath(exportName), mark });
}

/** The URI of what is declared. `reachedBy`: `serverOf` its host. */
export function uriOf(
  { listenAddress, port, exportName, tls }: Pick<Inputs, "listenAddress" | "port" | "exportName" | "tls">,
  reachedBy: string,
): string {
  return nbdUri({ server: serverName(listenAddress, reachedBy), port, exportName, tls: Boolean(tls) });
}

/** On all interfaces the host is reached by the name under which SSH reaches it. */
function serverName(listenAddress: string, reachedBy: string): string {
  return isAnyAddress(listenAddress) ? reachedBy : listenAddress;
}

function foundOf({ ownAddress, realPath, mountPoint, fileId }: ExportPlan): FoundOnHost {
  return { ownAddress, realPath, mountPoint, fileId };
}

function toState(declared: Inputs | State, seen: Observed): State {
  const merged = seen.plan === undefined ? declared : withPlan(declared, seen.plan);
  const { certificates } = seen;
  return {
    ...merged,
    uri: uriOf(merged, seen.reachedBy),
    clientTls: certificates?.client,
    certificatesExpireAt: certificates && expiryTime(certificates),
    sizeBytes:
      seen.probe?.sizeBytes ?? seen.contentSizeBytes ?? ("sizeBytes" in declared ? declared.sizeBytes : 0),
    state: stateOf(seen, declared.clientsEnforcedElsewhere),
  };
}

/** What is declared, as it was seen to be. */
function withPlan(declared: Inputs | State, plan: ExportPlan): Inputs | State {
  const { device: _device, file: _file, format: _format, tls: _tls, ...rest } = declared;
  const { exportName, listenAddress, port, readOnly, clients, server } = plan;
  const served = "file" in plan ? { file: plan.file, format: plan.format } : { device: plan.device };
  const tls = seenTls(declared, plan.tls);
  const secured = tls === undefined ? {} : { tls };
  return {
    ...rest,
    ...served,
    exportName,
    listenAddress,
    port,
    readOnly,
    clients: [...clients],
    server,
    ...secured,
  };
}

/** `false` and nothing mean the same. Of given certificates only those that are declared can be told whole. */
function seenTls(declared: Inputs | State, record: TlsRecord | undefined): Inputs["tls"] {
  if (record === undefined) return declared.tls ? undefined : declared.tls;
  return record.made === undefined && typeof declared.tls === "object" ? declared.tls : true;
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  for (const property of ["device", "file", "exportName"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property])
      changes.push({ property, effect: "replace" });
  }
  if (unknown.has("format") || formatOf(wanted) !== formatOf(state))
    changes.push({ property: "format", effect: "replace" });
  for (const property of ["listenAddress", "port", "readOnly", "server", "owner"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property])
      changes.push({ property, effect: "update" });
  }
  // Their order means nothing, and a restart for it would cut them off.
  if (unknown.has("clients") || !isDeepStrictEqual(new Set(wanted.clients), new Set(state.clients))) {
    changes.push({ property: "clients", effect: "update" });
  }
  if (
    unknown.has("clientsEnforcedElsewhere") ||
    wanted.clientsEnforcedElsewhere !== state.clientsEnforcedElsewhere
  )
    changes.push({ property: "clientsEnforcedElsewhere", effect: "update" });
  if (unknown.has("tls") || !isDeepStrictEqual(wanted.tls || false, state.tls || false))
    changes.push({ property: "tls", effect: "update" });
  // Certificates that were given have none.
  if (unknown.has("triggers") || (wanted.tls === true && !isDeepStrictEqual(wanted.triggers, state.triggers)))
    changes.push({ property: "triggers", effect: "update" });
  if (state.state !== "serving") changes.push({ property: "state", effect: "update" });
  return changes;
}

function formatOf({ file, format }: Partial<Inputs>): ImageFormat | undefined {
  return format ?? (file === undefined ? undefined : "raw");
}

function servedProblems(wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Problem[] {
  const { device, file, format, readOnly, server } = wanted;
  const problems: Problem[] = [];
  const known = !unknown.has("device") && !unknown.has("file");
  if (known && device === undefined && file === undefined)
    problems.push({ property: "device", reason: "is required, unless `file` is given: what is exported" });
  if (device !== undefined && file !== undefined)
    problems.push({ property: "file", reason: "cannot go with `device`: an export serves one of them" });
  if (file === undefined) {
    if (!unknown.has("file") && format !== undefined)
      problems.push({ property: "format", reason: "goes only with `file`: a device is served as it is" });
    return problems;
  }
  if (readOnly === false) {
    const reason = "cannot be false with `file`: an image is only ever read. Leave it out";
    problems.push({ property: "readOnly", reason });
  }
  if (format !== undefined && server !== undefined && !canServe(server, format)) {
    const able = nbdServers.filter((one) => canServe(one, format)).map((one) => JSON.stringify(one));
    const reason = `"${server}" cannot serve the content of a ${format} image: only ${able.join(", ")} can`;
    problems.push({ property: "server", reason });
  }
  return problems;
}

function validate(
  wanted: Partial<Inputs>,
  _old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
  named?: NamedHosts,
): Problem[] {
  return [...servedProblems(wanted, unknown), ...listenProblems(wanted), ...tlsProblems(wanted, named)];
}

function tlsProblems({ host, listenAddress, tls }: Partial<Inputs>, named?: NamedHosts): Problem[] {
  if (!tls || listenAddress === undefined || host === undefined) return [];
  const names = serverNames({ host, listenAddress }, named);
  const unfit = names.flatMap((name) => nameProblem(name) ?? []);
  if (unfit.length > 0) return unfit.map((reason) => ({ property: "tls", reason }));
  if (tls === true) return [];
  return names
    .filter((name) => nameProblem(name) === undefined && !isCertificateFor(tls.certificate, name))
    .map((name) => ({
      property: "tls.certificate",
      reason: `is not for ${name}, by which the export is reached: make one with that among its subject alternative names`,
    }));
}

function listenProblems(wanted: Partial<Inputs>): Problem[] {
  const { listenAddress, clients, server, exportName } = wanted;
  if (server === "nbd-server" && exportName === "generic") {
    const reason = '"generic" is the name of nbd-server\'s own section: choose another, or another `server`';
    return [{ property: "exportName", reason }];
  }
  if (listenAddress === undefined || clients === undefined) return [];
  if (clients.length > 0 || isLoopback(listenAddress)) return [];
  return [
    {
      property: "clients",
      reason: isAnyAddress(listenAddress)
        ? `an export on all interfaces (${listenAddress}) would let everybody read the disk: name the addresses that may connect, e.g. ["10.0.0.2"], and better listen on one address`
        : `an export on ${listenAddress} needs the addresses or networks that may connect, e.g. ["10.0.0.2"]`,
    },
  ];
}

/** What to do about certificates that expire. */
function renewal({ tls }: State): string {
  return tls === true
    ? "change a value of `triggers` to make new ones, at a time when clients may be cut off"
    : "give new ones";
}

/** What is served and how, as the unit's record has it. */
async function declared(context: Context, { plan }: Observed): Promise<Partial<Inputs>> {
  if (plan === undefined) throw refusal(context, "INVALID_INPUT", "its unit has no record of what it serves");
  if (plan.tls !== undefined && plan.tls.made === undefined) {
    const message = "tls: its certificates were given, and are not read back from the host";
    throw refusal(context, "INVALID_INPUT", message, declareInstead);
  }
  const { exportName, listenAddress, port, readOnly, clients, server, tls } = plan;
  const served = "file" in plan ? { file: plan.file, format: plan.format } : { device: plan.device };
  const secured = tls === undefined ? {} : { tls: true };
  return { ...served, exportName, listenAddress, port, readOnly, clients: [...clients], server, ...secured };
}

/** The resource as the reconciler sees it. */
export const nbdExport: ResourceType<Inputs, State, Observed> = {
  type: "NbdExport",
  description:
    "A block device, or the content of an image, offered over NBD to named clients, by a hardened systemd unit of its own.",
  example: {
    vm1Snapshot: {
      type: "LvSnapshot",
      properties: { host: "server1", volumeGroup: "VgVm", origin: "LV-VM1", size: "1G" },
    },
    vm1: {
      type: "NbdExport",
      properties: {
        host: "server1",
        device: new OutputOf("vm1Snapshot", "path"),
        listenAddress: "10.0.0.1",
        clients: ["10.0.0.2"],
        tls: true,
      },
    },
  },
  inputs: nbdExportInputs,
  outputs,
  nameInput: "exportName",
  validate,
  predict({ host, listenAddress, port, exportName, tls }, unknown, named) {
    if (host === undefined || listenAddress === undefined || port === undefined || exportName === undefined)
      return {};
    // Certificates of one's own are often made by the same program.
    const isSecured = unknown.has("tls") || Boolean(tls);
    return { uri: uriOf({ listenAddress, port, exportName, tls: isSecured }, serverOf(host, named)) };
  },
  id: (wanted, hostName) => `${hostName}/${wanted.exportName}`,
  observe,
  isSame: (seen, state) => seen.mark === ownerMark(state.owner) || seen.fileGone,
  toState,
  diff,
  // What it is to serve need not be there yet.
  foresee: requireServing,
  lasting: (_state, changed) =>
    ["tls", "triggers", "listenAddress", "state"].some((property) => changed.has(property))
      ? ["sizeBytes"]
      : ["sizeBytes", "clientTls", "certificatesExpireAt"],
  byId: { form: "EXPORTNAME", place: (path) => (isName(path) ? { exportName: path } : undefined), declared },
  // Two exports cannot listen on one port either.
  collides: (state, wanted) => state.exportName === wanted.exportName || state.port === wanted.port,
  create,
  converge,
  remove: (context, state, seen) => {
    context.progress(`stopping the export ${state.exportName}`);
    return takeDown(context, state, seen.mark ?? "");
  },
  drift(state, seen) {
    const expiry = seen.certificates && expiryPhrase(seen.certificates);
    const now = toState(state, seen);
    return [
      ...unitDrift(
        state,
        now,
        ["device", "file", "format", "listenAddress", "port", "readOnly", "server", "clients"],
        "serving",
        now.state === "unproven" ? "see whether it keeps out who may not connect" : "start it as declared",
      ),
      ...(seen.imageProblem === undefined ? [] : [seen.imageProblem]),
      ...(expiry === undefined ? [] : [`${expiry}: ${renewal(state)}`]),
    ];
  },
};
