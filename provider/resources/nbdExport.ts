/**
 * NbdExport: a block device, or the content of an image, offered over NBD by a hardened systemd unit of its own.
 */
import { isIP } from "node:net";
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, parseOutput, script, succeed } from "../core/command.js";
import { type ErrorCode, LvmNbdError } from "../core/errors.js";
import { commonInputs, refusing } from "../core/inputs.js";
import { ownerMark } from "../core/owner.js";
import type { Change, Context, Problem, ResourceType } from "../core/resource.js";
import { clientProblem, isAnyAddress, isLoopback } from "../linux/addresses.js";
import {
  type ExportPlan,
  exportConfig,
  exportConfigPath,
  exportUnitName,
  type FoundOnHost,
  probeUri,
  renderExportUnit,
  unitMark,
} from "../linux/exportUnit.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import {
  fileProblem,
  type ImageFormat,
  type ImageInfo,
  imageFormats,
  parseImageInfo,
} from "../linux/imageFile.js";
import { listenersOn, parseListeners } from "../linux/listeners.js";
import { canServe, defaultPort, nbdServers, nbdUri, pathOf, type Served } from "../linux/nbd.js";
import { missingFunction, missingPrograms } from "../linux/programs.js";
import { parseShow, type UnitProperties } from "../linux/systemd.js";
import { unitNameProblem } from "../linux/unitName.js";
import { changedMeanwhile, expectedMarks, unitFunctions } from "../linux/unitScript.js";
import type { RemoteCommand } from "../ssh/types.js";
import { enable, readPlan, unitDrift, writtenMeanwhile } from "./unit.js";

const deviceInput = z
  .string()
  .regex(/^\/dev\/[^\s%\\"]+$/, 'must be the path of a block device below /dev, e.g. "/dev/VgVm/vm1-snap"')
  .refine((path) => !path.split("/").includes(".."), 'must not hold ".."');
const fileInput = z
  .string()
  .superRefine(refusing(fileProblem))
  .refine((path) => !path.endsWith("\\"), "must not end with a backslash");
const formatInput = z.enum(imageFormats);

/** Declared properties. */
export const nbdExportInputs = z.strictObject({
  ...commonInputs,
  device: deviceInput
    .optional()
    .describe("Block device to export, e.g. the `path` of an LvSnapshot. Either this or `file`."),
  file: fileInput
    .optional()
    .describe(
      "Absolute path of an image to export instead of a device, e.g. the `path` of a VolumeCopy. It is only read.",
    ),
  format: formatInput
    .optional()
    .describe('Format of `file`; `"qcow2"` needs `server: "qemu-nbd"`. Default: `"raw"`.'),
  exportName: z
    .string()
    .min(1)
    .regex(/^[^\p{Cc}[\]/]+$/u, "must not hold control characters, brackets or slashes")
    .superRefine(refusing((value) => unitNameProblem("export", value)))
    .describe("NBD export name; unique on the host. Default: the resource's name."),
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
  server: z.enum(nbdServers).default("nbdkit").describe("Program that serves."),
});

const outputs = z.object({
  uri: z.string().describe("NBD URI, e.g. `nbd://10.0.0.1:10809/vm1`."),
  sizeBytes: z.number().describe("Size that a client sees, in bytes."),
  state: z
    .enum(["serving", "stopped", "failed", "notServing", "disabled", "edited"])
    .describe(
      "`serving` (proven by a handshake); `stopped`; `failed` (the server ends by itself); `notServing` (runs, but the handshake " +
        "fails or shows another size, or another file has taken the image's place); `disabled` (would not come back after a " +
        "reboot); `edited` (its unit was changed by hand).",
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
  /** Another file has the image's name than the server has. */
  readonly fileReplaced: boolean;
  /** False if a boot would not start it whenever its device appears. */
  readonly wanted: boolean;
  readonly probe: { readonly sizeBytes: number; readonly readOnly: boolean } | undefined;
}

const observeScript = `${emitFunctions}${unitFunctions}
unit=$1 conf=$2 file=/etc/systemd/system/$1
cd /etc/systemd/system || exit 1
if [ -e "$file" ] || [ -L "$file" ]; then emit_file unit "$file"; fi
if [ -e "$conf" ]; then emit_file conf "$conf"; fi
show=$(systemctl show -p LoadState -p ActiveState -p SubState -p UnitFileState -p NeedDaemonReload -p DropInPaths -p MainPID "$unit") || exit 1
emit show "$show"
if [ -e "$file" ]; then
  # Enabling makes several links, and may have been cut between them.
  for target in $(sed -n 's/^WantedBy=//p' "$file"); do
    [ -L "/etc/systemd/system/$target.wants/$unit" ] || emit unwanted "$target"
  done
  device=$(own Device "$file")
  uri=$(own ProbeUri "$file")
  if [ -b "$device" ]; then emit deviceSize "$(blockdev --getsize64 "$device")"; fi
  image=$(own File "$file")
  if [ -n "$image" ] && [ -f "$image" ]; then
    case $(own Format "$file") in
    raw) emit fileSize "$(stat -L -c %s "$image")";;
    *)
      command -v qemu-img >/dev/null || { echo "qemu-img: not found" >&2; exit 127; }
      emit_output image timeout 20 qemu-img info --output=json -f qcow2 -U "$image";;
    esac
    seen=/proc/$(systemctl show -p MainPID --value "$unit")/root$(own RealPath "$file")
    [ "$seen" -ef "$image" ] || emit replaced yes
  fi
  case $show in *ActiveState=active*)
    command -v nbdinfo >/dev/null || { echo "nbdinfo: not found" >&2; exit 127; }
    emit_output size timeout 15 nbdinfo --size "$uri"
    # A server that does not answer is asked once: each question waits as long.
    if [ "$emit_rc" = 0 ]; then
      emit_output readOnly timeout 15 nbdinfo --is read-only "$uri"
      emit bytes "$(timeout 15 nbdcopy --requests=1 --connections=1 "$uri" - 2>/dev/null | head -c 512 | wc -c)"
    fi;;
  esac
fi
emit end ""
`;

async function observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined> {
  const unit = exportUnitName(wanted.exportName);
  const command: RemoteCommand = {
    argv: script(observeScript, unit, exportConfigPath(wanted.exportName)),
    kind: "read",
    deadlineSeconds: 90,
  };
  const result = await succeed(context, command, `the unit ${unit} could not be looked at`, (failed) =>
    failed.exitCode === 127 ? "PROGRAM_MISSING" : undefined,
  );
  return parseOutput(context, command, result, (stdout) => readObservation(parseFields(stdout)));
}

function readObservation(fields: ReadonlyMap<string, string>): Observed | undefined {
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
          wanted: false,
          contentSizeBytes: undefined,
          fileReplaced: false,
          probe: undefined,
        }
      : undefined;
  }
  const plan = readPlan(text, planShape);
  const config = plan === undefined ? undefined : exportConfig(plan);
  // A handshake alone can succeed where every read hangs: the proof is a sector.
  const served = fields.get("size.rc") === "0" && fields.get("bytes")?.trim() === "512";
  const size = served ? Number(fields.get("size")) : Number.NaN;
  return {
    mark: unitMark(text),
    plan,
    edited:
      plan === undefined ||
      renderExportUnit(plan) !== text ||
      (config !== undefined && config !== fields.get("conf")) ||
      show.NeedDaemonReload === "yes" ||
      (show.DropInPaths ?? "") !== "",
    fileGone: false,
    show,
    wanted: !fields.has("unwanted"),
    contentSizeBytes: contentSize(fields),
    fileReplaced: fields.has("replaced"),
    probe: Number.isSafeInteger(size)
      ? { sizeBytes: size, readOnly: fields.get("readOnly.rc") === "0" }
      : undefined,
  };
}

/** `undefined` where there is no content, or none that may be served. */
function contentSize(fields: ReadonlyMap<string, string>): number | undefined {
  const size = fields.get("deviceSize") ?? fields.get("fileSize");
  if (size !== undefined) return Number(size);
  const info = imageInfo(fields);
  return info?.needs === undefined ? info?.sizeBytes : undefined;
}

/** What qemu-img told; `undefined` if it was not asked, or could not read the image. */
function imageInfo(fields: ReadonlyMap<string, string>): ImageInfo | undefined {
  return fields.get("image.rc") === "0" ? parseImageInfo(required(fields, "image")) : undefined;
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
const termsShape = { ...termsInputs, ownAddress: z.string().optional() };
/** Its keys are in the order of `planOf`: what is read renders as what was written. */
const planShape = z.union([
  z.strictObject({ owner: ownerInput, device: deviceInput, ...termsShape }),
  z.strictObject({
    ...{ owner: ownerInput, file: fileInput, format: formatInput, ...termsShape },
    ...{ realPath: z.string().optional(), mountPoint: z.string().optional() },
  }),
]);

function planOf(wanted: Inputs): ExportPlan {
  const { owner, exportName, listenAddress, port, readOnly, clients, server } = wanted;
  return { owner, ...servedOf(wanted), exportName, listenAddress, port, readOnly, clients, server };
}

/** `validate` has seen that it is one of both. */
function servedOf({ device, file, format = "raw" }: Pick<Inputs, "device" | "file" | "format">): Served {
  if (file !== undefined) return { file, format };
  if (device !== undefined) return { device };
  throw new LvmNbdError("INVALID_INPUT", { message: "device: is required, or `file`", property: "device" });
}

function stateOf(seen: Observed): State["state"] {
  const { ActiveState: active, UnitFileState: file } = seen.show;
  if (active === "failed" || active === "activating") return "failed";
  if (active !== "active") return "stopped";
  if (seen.edited) return "edited";
  if (seen.probe === undefined || seen.probe.sizeBytes !== seen.contentSizeBytes) return "notServing";
  if (seen.fileReplaced) return "notServing";
  if (seen.probe.readOnly !== seen.plan?.readOnly) return "notServing";
  return file === "enabled" && seen.wanted ? "serving" : "disabled";
}

const preflightScript = `${emitFunctions}${missingFunction}
server=$1 path=$2 address=$3 port=$4 unit=$5 format=$6; shift 6
look_at_device() {
  if [ ! -e "$path" ]; then emit device absent
  elif [ ! -b "$path" ]; then emit device other
  else emit device block
    emit ro "$(blockdev --getro "$path")"
    emit_output read timeout 20 dd if="$path" of=/dev/null bs=4096 count=1 iflag=direct
  fi
}
look_at_file() {
  folder=\${path%/*}/
  if [ -L "$path" ]; then emit leads "$(readlink -f "$path")"; fi
  if [ -d "$folder" ]; then emit folder yes; fi
  if [ -e "$path" ]; then emit kind "$(stat -c %F "$path")"; fi
  if [ -f "$path" ]; then
    emit realPath "$(readlink -f "$path")"
    emit mountPoint "$(stat -c %m "$path")"
    emit fileSize "$(stat -c %s "$path")"
    # As the server will: by root without any right. Not by its path, which the server reaches in another way.
    emit_output read timeout 20 setpriv --bounding-set=-all --inh-caps=-all dd if=/proc/self/fd/3 of=/dev/null bs=4096 count=1 3<"$path"
    if [ "$format" = qcow2 ]; then emit_output image timeout 20 qemu-img info --output=json -f qcow2 -U "$path"; fi
  fi
}
emit_missing "$server" nbdinfo nbdcopy systemctl ss ip "$@"
case $format in "") look_at_device;; *) look_at_file;; esac
emit addresses "$(ip -o addr show to "$address")"
emit route "$(ip -o route get to "$address" 2>/dev/null)"
emit listeners "$(ss -Hltnp "sport = :$port")"
emit pid "$(systemctl show -p MainPID --value "$unit")"
emit end ""
`;

/** What the look at a file needs. */
const filePrograms = { raw: ["setpriv"], qcow2: ["setpriv", "qemu-img"] };

/** Finds out before anything is changed what would make the export fail. Returns the plan for this host. */
async function preflight(context: Context, plan: ExportPlan): Promise<ExportPlan> {
  const unit = exportUnitName(plan.exportName);
  const format = "file" in plan ? plan.format : undefined;
  const command: RemoteCommand = {
    argv: script(
      ...([preflightScript, plan.server, pathOf(plan), plan.listenAddress, String(plan.port), unit] as const),
      ...[format ?? "", ...(format === undefined ? [] : filePrograms[format])],
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
  const info = parseOutput(context, command, result, () => imageInfo(fields));
  const found =
    "file" in plan ? requireImage(plan, fields, info, refuse) : requireDevice(plan, fields, refuse);
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
  const own = /\bsrc (\S+)/.exec(fields.get("route") ?? "")?.[1];
  const apart =
    own !== plan.listenAddress && !isAnyAddress(plan.listenAddress) && !isLoopback(plan.listenAddress);
  return { ...plan, ...(apart ? { ownAddress: own } : {}), ...found };
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
  if (fields.get("read.rc") !== "0")
    throw refuse("DEVICE_UNREADABLE", "device", `${device} cannot be read: ${fields.get("read") ?? ""}`);
  return {};
}

function requireImage(
  { file, format }: { readonly file: string; readonly format: ImageFormat },
  fields: ReadonlyMap<string, string>,
  info: ImageInfo | undefined,
  refuse: Refuse,
): FoundOnHost {
  const unsuitable = (message: string, advice?: string) =>
    refuse("FILE_UNSUITABLE", "file", `${file} ${message}`, advice);
  const [kind, leads] = [fields.get("kind"), fields.get("leads")];
  if (leads !== undefined) throw unsuitable(`is a symbolic link: give ${leads}`);
  if (!fields.has("folder"))
    throw refuse("DIRECTORY_NOT_FOUND", "file", `the folder of ${file} does not exist on the host`);
  if (kind === undefined) throw refuse("FILE_NOT_FOUND", "file", `${file} does not exist on the host`);
  if (!fields.has("realPath")) throw unsuitable(`is a ${kind}, not a regular file`);
  if (fields.get("read.rc") !== "0") {
    throw unsuitable(
      `cannot be read by a server without capabilities: ${fields.get("read") ?? ""}`,
      "Make it root's (`chown root`), or readable for others, and run again.",
    );
  }
  if (format === "qcow2" && info === undefined)
    throw unsuitable(`is no qcow2 image that can be read: ${fields.get("image") ?? ""}`);
  if (info?.needs !== undefined)
    throw unsuitable(`names a ${info.needs.what}, ${info.needs.name}, whose content would be served too`);
  const sizeBytes = info?.sizeBytes ?? Number(fields.get("fileSize"));
  // A client's kernel leaves out the last bytes of others, and qemu-nbd makes some up.
  if (sizeBytes === 0 || sizeBytes % 512 !== 0)
    throw unsuitable(`holds ${sizeBytes} bytes: no disk, whose size is a multiple of 512`);
  const [realPath, mountPoint] = [fields.get("realPath"), fields.get("mountPoint")];
  return {
    ...(realPath === file ? {} : { realPath }),
    ...(mountPoint === "/" ? {} : { mountPoint }),
  };
}

/** Writes the unit (stdin), starts it and waits for a handshake. Exit code 70: the server does not serve. 71: its clients are not enforced. */
const applyScript = `${unitFunctions}
unit=$1 conf=$2 config=$3 uri=$4 open=$5 mark=$6 seen=$7 bytes=$8 file=/etc/systemd/system/$1
# systemd starts a unit whose address filter it cannot apply: once a boot, a process under the same filter must be
# seen to be kept out, and one without it to get in.
prove_clients() {
  proof=/run/lvm-nbd-clients-enforced
  [ "$open" = no ] || [ -e "$proof" ] && return
  if systemd-run -q --wait --pipe timeout 20 nbdinfo --size "$uri" >/dev/null 2>&1 &&
    ! systemd-run -q --wait --pipe -p IPAddressDeny=any timeout 3 nbdinfo --size "$uri" >/dev/null 2>&1; then
    : >"$proof"; return
  fi
  systemctl disable --quiet --now "$unit"
  exit 71
}
lock
guard "$file" "$mark" "$seen"
umask 022
rm -f "$file.new" && receive "$file.new" "$bytes" || exit 1
if [ -n "$config" ]; then
  mkdir -p /etc/lvm-nbd && rm -f "$conf.new" && printf '%s' "$config" >"$conf.new" && sync "$conf.new" && mv -f "$conf.new" "$conf" || exit 1
fi
mv -f "$file.new" "$file" || exit 1
if [ -z "$config" ]; then rm -f "$conf"; fi
rm -rf "$file.d"
exec 9>&-
# enable reloads systemd's view of the units as well
systemctl enable --quiet "$unit" && systemctl restart "$unit" || {
  journalctl -q -n 15 -o cat --no-pager -u "$unit" >&2; exit 70; }
# nbd-server makes Diffie-Hellman parameters before it answers: seconds on a fast host, 20 and more on a slow one.
end=$(( $(date +%s) + 80 ))
while :; do
  if answer=$(timeout 75 nbdinfo --size "$uri" 2>&1); then
    bytes=$(timeout 20 nbdcopy --requests=1 --connections=1 "$uri" - 2>/dev/null | head -c 512 | wc -c)
    [ "$bytes" = 512 ] && { prove_clients; exit 0; }
    answer="the handshake succeeds, but nothing can be read"
    break
  fi
  state=$(systemctl show -p NRestarts -p ActiveState "$unit")
  case $state in *NRestarts=0*ActiveState=active*|*ActiveState=active*NRestarts=0*) ;; *) break;; esac
  [ "$(date +%s)" -lt "$end" ] || break
  sleep 0.2
done
printf '%s\\n' "$answer" >&2
journalctl -q -n 15 -o cat --no-pager -u "$unit" >&2
exit 70
`;

/** `seen`: what was there when it was looked at. */
async function apply(context: Context, plan: ExportPlan, seen: Observed | undefined): Promise<void> {
  const mark = ownerMark(plan.owner);
  const unit = renderExportUnit(plan);
  const command: RemoteCommand = {
    argv: script(
      applyScript,
      exportUnitName(plan.exportName),
      exportConfigPath(plan.exportName),
      exportConfig(plan) ?? "",
      probeUri(plan),
      isLoopback(plan.listenAddress) ? "no" : "yes",
      ...expectedMarks(mark, seen),
      String(Buffer.byteLength(unit)),
    ),
    stdin: unit,
    kind: "change",
    // The lock 120 s, the start and the first answer of a slow server as long again, the proof of its clients 25 s.
    deadlineSeconds: 400,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === 0) return;
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode === 71) {
    throw failure(
      context,
      command,
      result,
      "clients: the host does not enforce them",
      "CLIENTS_NOT_ENFORCED",
    );
  }
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

async function create(context: Context, wanted: Inputs): Promise<void> {
  const plan = await preflight(context, planOf(wanted));
  context.progress(`starting ${plan.server} for ${pathOf(plan)} on ${plan.listenAddress}:${plan.port}`);
  try {
    await apply(context, plan, undefined);
  } catch (error) {
    // What does not serve is not left behind: it would keep restarting on a host nobody looks at.
    if (
      error instanceof LvmNbdError &&
      ["EXPORT_NOT_SERVING", "CLIENTS_NOT_ENFORCED", "COMMAND_FAILED"].includes(error.code)
    ) {
      await takeDown(context, plan, ownerMark(plan.owner)).catch((cleanup: unknown) => {
        context.warn(`what did not start could not be taken down again: ${String(cleanup).split("\n")[0]}`);
      });
    }
    throw error;
  }
}

async function converge(context: Context, wanted: Inputs, seen: Observed): Promise<void> {
  const declared = { ...planOf(wanted), ...(seen.plan && foundOf(seen.plan)) };
  const asDeclared = seen.plan !== undefined && renderExportUnit(seen.plan) === renderExportUnit(declared);
  const state = stateOf(seen);
  if (asDeclared && state === "serving") return;
  if (asDeclared && state === "disabled")
    return enable(context, exportUnitName(wanted.exportName), ownerMark(wanted.owner));
  const plan = await preflight(context, planOf(wanted));
  context.progress(
    state === "serving"
      ? `restarting the export ${plan.exportName}; connected clients are cut off and attachments reconnect`
      : `starting the export ${plan.exportName} again (it was ${state})`,
  );
  await apply(context, plan, seen);
}

/** The unit's file goes last: until then what a cut leaves is found by its mark, and removed by the next run. */
const takeDownScript = `${unitFunctions}
unit=$1 conf=$2 seen=$3 file=/etc/systemd/system/$1
lock
guard "$file" "$seen"
if [ -e "$file" ]; then systemctl disable --quiet --now --no-reload "$unit" || exit 1; else systemctl stop "$unit" || exit 1; fi
rm -f "$conf" "$conf.new" && rm -rf "$file.d" && rm -f "$file.new" "$file" || exit 1
exec 9>&-
rmdir /etc/lvm-nbd 2>/dev/null
systemctl daemon-reload || exit 1
systemctl reset-failed "$unit" 2>/dev/null
exit 0
`;

/** `mark`: what the unit's file carries, "" for none. */
async function takeDown(
  context: Context,
  { exportName }: Pick<ExportPlan, "exportName">,
  mark: string,
): Promise<void> {
  const unit = exportUnitName(exportName);
  const command: RemoteCommand = {
    argv: script(takeDownScript, unit, exportConfigPath(exportName), mark),
    kind: "change",
    deadlineSeconds: 180,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === 0) return;
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  throw failure(context, command, result, `the unit ${unit} could not be removed`, "COMMAND_FAILED");
}

/** On all interfaces the host is reached by the name under which SSH reaches it. */
function uriOf(plan: Pick<Inputs, "listenAddress" | "port" | "exportName" | "host">): string {
  const { host, listenAddress } = plan;
  if (!isAnyAddress(listenAddress)) return nbdUri({ ...plan, server: listenAddress });
  return nbdUri({ ...plan, server: typeof host === "string" ? host : host.address });
}

function foundOf({ ownAddress, realPath, mountPoint }: ExportPlan): FoundOnHost {
  return { ownAddress, realPath, mountPoint };
}

function toState(declared: Inputs | State, seen: Observed): State {
  const merged = seen.plan === undefined ? declared : withPlan(declared, seen.plan);
  return {
    ...merged,
    uri: uriOf(merged),
    sizeBytes:
      seen.probe?.sizeBytes ?? seen.contentSizeBytes ?? ("sizeBytes" in declared ? declared.sizeBytes : 0),
    state: stateOf(seen),
  };
}

/** What is declared, as it was seen to be. */
function withPlan(declared: Inputs | State, plan: ExportPlan): Inputs | State {
  const { device: _device, file: _file, format: _format, ...rest } = declared;
  const { exportName, listenAddress, port, readOnly, clients, server } = plan;
  const served = "file" in plan ? { file: plan.file, format: plan.format } : { device: plan.device };
  return { ...rest, ...served, exportName, listenAddress, port, readOnly, clients: [...clients], server };
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
): Problem[] {
  return [...servedProblems(wanted, unknown), ...listenProblems(wanted)];
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

/** The resource as the reconciler sees it. */
export const nbdExport: ResourceType<Inputs, State, Observed> = {
  type: "NbdExport",
  description:
    "A block device, or the content of an image, offered over NBD to named clients, by a hardened systemd unit of its own.",
  inputs: nbdExportInputs,
  outputs,
  nameInput: "exportName",
  validate,
  predict({ host, listenAddress, port, exportName }) {
    if (host === undefined || listenAddress === undefined || port === undefined || exportName === undefined)
      return {};
    return { uri: uriOf({ host, listenAddress, port, exportName }) };
  },
  id: (wanted, hostName) => `${hostName}/${wanted.exportName}`,
  observe,
  isSame: (seen, state) => seen.mark === ownerMark(state.owner) || seen.fileGone,
  toState,
  diff,
  // Two exports cannot listen on one port either.
  collides: (state, wanted) => state.exportName === wanted.exportName || state.port === wanted.port,
  create,
  converge,
  remove: (context, state, seen) => {
    context.progress(`stopping the export ${state.exportName}`);
    return takeDown(context, state, seen.mark ?? "");
  },
  drift: (state, seen) =>
    unitDrift(
      state,
      toState(state, seen),
      ["device", "file", "format", "listenAddress", "port", "readOnly", "server", "clients"],
      "serving",
      "start it as declared",
    ),
};
