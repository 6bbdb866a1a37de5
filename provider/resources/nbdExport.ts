/**
 * NbdExport: a block device offered over NBD by a hardened systemd unit of its own.
 */
import { isIP } from "node:net";
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, parseOutput, script, succeed } from "../core/command.js";
import { LvmNbdError } from "../core/errors.js";
import { commonInputs, refusing } from "../core/inputs.js";
import { ownerMark } from "../core/owner.js";
import type { Change, Context, Problem, ResourceType } from "../core/resource.js";
import { clientProblem, isAnyAddress, isLoopback } from "../linux/addresses.js";
import {
  type ExportPlan,
  exportConfig,
  exportConfigPath,
  exportUnitName,
  probeUri,
  renderExportUnit,
  unitMark,
} from "../linux/exportUnit.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import { listenersOn, parseListeners } from "../linux/listeners.js";
import { defaultPort, nbdServers, nbdUri } from "../linux/nbd.js";
import { missingFunction, missingPrograms } from "../linux/programs.js";
import { parseShow, type UnitProperties } from "../linux/systemd.js";
import { unitNameProblem } from "../linux/unitName.js";
import { changedMeanwhile, expectedMarks, unitFunctions } from "../linux/unitScript.js";
import type { RemoteCommand } from "../ssh/types.js";
import { enable, readPlan, unitDrift, writtenMeanwhile } from "./unit.js";

/** Declared properties. */
export const nbdExportInputs = z.strictObject({
  ...commonInputs,
  device: z
    .string()
    .regex(/^\/dev\/[^\s%\\"]+$/, 'must be the path of a block device below /dev, e.g. "/dev/VgVm/vm1-snap"')
    .refine((path) => !path.split("/").includes(".."), 'must not hold ".."')
    .describe("Block device to export, e.g. the `path` of an LvSnapshot."),
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
        "fails or shows another size); `disabled` (would not come back after a reboot); `edited` (its unit was changed by hand).",
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
  readonly deviceSizeBytes: number | undefined;
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
    deadlineSeconds: 60,
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
          deviceSizeBytes: undefined,
          probe: undefined,
        }
      : undefined;
  }
  const plan = readPlan(text, planShape);
  const config = plan === undefined ? undefined : exportConfig(plan);
  // A handshake alone can succeed where every read hangs: the proof is a sector.
  const served = fields.get("size.rc") === "0" && fields.get("bytes")?.trim() === "512";
  const size = served ? Number(fields.get("size")) : Number.NaN;
  const deviceSize = fields.get("deviceSize");
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
    deviceSizeBytes: deviceSize === undefined ? undefined : Number(deviceSize),
    probe: Number.isSafeInteger(size)
      ? { sizeBytes: size, readOnly: fields.get("readOnly.rc") === "0" }
      : undefined,
  };
}

function required(fields: ReadonlyMap<string, string>, name: string): string {
  const value = fields.get(name);
  if (value === undefined) throw new Error(`"${name}" is missing`);
  return value;
}

const planShape = nbdExportInputs
  .pick({
    owner: true,
    device: true,
    exportName: true,
    listenAddress: true,
    port: true,
    readOnly: true,
    clients: true,
    server: true,
  })
  .extend({ ownAddress: z.string().optional() })
  .strict();

function planOf(wanted: Inputs): ExportPlan {
  const { owner, device, exportName, listenAddress, port, readOnly, clients, server } = wanted;
  return { owner, device, exportName, listenAddress, port, readOnly, clients, server };
}

function stateOf(seen: Observed): State["state"] {
  const { ActiveState: active, UnitFileState: file } = seen.show;
  if (active === "failed" || active === "activating") return "failed";
  if (active !== "active") return "stopped";
  if (seen.edited) return "edited";
  if (seen.probe === undefined || seen.probe.sizeBytes !== seen.deviceSizeBytes) return "notServing";
  if (seen.probe.readOnly !== seen.plan?.readOnly) return "notServing";
  return file === "enabled" && seen.wanted ? "serving" : "disabled";
}

const preflightScript = `${emitFunctions}${missingFunction}
server=$1 device=$2 address=$3 port=$4 unit=$5
emit_missing "$server" nbdinfo nbdcopy systemctl ss ip
if [ ! -e "$device" ]; then emit device absent
elif [ ! -b "$device" ]; then emit device other
else emit device block
  emit ro "$(blockdev --getro "$device")"
  emit_output read timeout 20 dd if="$device" of=/dev/null bs=4096 count=1 iflag=direct
fi
emit addresses "$(ip -o addr show to "$address")"
emit route "$(ip -o route get to "$address" 2>/dev/null)"
emit listeners "$(ss -Hltnp "sport = :$port")"
emit pid "$(systemctl show -p MainPID --value "$unit")"
emit end ""
`;

/** Finds out before anything is changed what would make the export fail. Returns the plan for this host. */
async function preflight(context: Context, plan: ExportPlan): Promise<ExportPlan> {
  const unit = exportUnitName(plan.exportName);
  const command: RemoteCommand = {
    argv: script(preflightScript, plan.server, plan.device, plan.listenAddress, String(plan.port), unit),
    kind: "read",
    deadlineSeconds: 60,
  };
  const result = await succeed(context, command, "the host could not be looked at");
  const fields = parseOutput(context, command, result, parseFields);
  const refuse = (
    code:
      | "PROGRAM_MISSING"
      | "DEVICE_NOT_FOUND"
      | "DEVICE_NOT_BLOCK"
      | "DEVICE_UNREADABLE"
      | "ADDRESS_NOT_LOCAL"
      | "PORT_IN_USE",
    property: string,
    message: string,
  ) =>
    new LvmNbdError(code, {
      message: `${property}: ${message}`,
      host: context.host.name,
      resource: context.resource,
      property,
    });

  const missing = missingPrograms(fields);
  if (missing !== undefined) throw refuse("PROGRAM_MISSING", "server", missing);
  if (fields.get("device") === "absent")
    throw refuse("DEVICE_NOT_FOUND", "device", `${plan.device} does not exist on the host`);
  if (fields.get("device") !== "block")
    throw refuse("DEVICE_NOT_BLOCK", "device", `${plan.device} is not a block device`);
  if (!plan.readOnly && fields.get("ro")?.trim() === "1") {
    throw new LvmNbdError("INVALID_INPUT", {
      message: `readOnly: ${plan.device} is read-only, so it cannot be exported writable`,
      host: context.host.name,
      resource: context.resource,
      property: "readOnly",
      advice: "Leave `readOnly` out, or make the device writable (`readOnly: false` on the LvSnapshot).",
    });
  }
  if (fields.get("read.rc") !== "0") {
    throw refuse("DEVICE_UNREADABLE", "device", `${plan.device} cannot be read: ${fields.get("read") ?? ""}`);
  }
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
  return apart ? { ...plan, ownAddress: own } : plan;
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
      ? `${plan.server} does not serve ${plan.device} on ${probeUri(plan)}`
      : "the export's unit could not be written",
    result.exitCode === 70 ? "EXPORT_NOT_SERVING" : "COMMAND_FAILED",
  );
}

async function create(context: Context, wanted: Inputs): Promise<void> {
  const plan = await preflight(context, planOf(wanted));
  context.progress(`starting ${plan.server} for ${plan.device} on ${plan.listenAddress}:${plan.port}`);
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
  const declared = { ...planOf(wanted), ownAddress: seen.plan?.ownAddress };
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

function toState(declared: Inputs | State, seen: Observed): State {
  const seenPlan = seen.plan === undefined ? {} : withoutOwner(seen.plan);
  const merged = { ...declared, ...seenPlan };
  return {
    ...merged,
    uri: uriOf(merged),
    sizeBytes:
      seen.probe?.sizeBytes ?? seen.deviceSizeBytes ?? ("sizeBytes" in declared ? declared.sizeBytes : 0),
    state: stateOf(seen),
  };
}

function withoutOwner({
  owner: _owner,
  ownAddress: _ownAddress,
  ...rest
}: ExportPlan): Omit<Inputs, "owner" | "host" | "adopt"> {
  return { ...rest, clients: [...rest.clients] };
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  for (const property of ["device", "exportName"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property])
      changes.push({ property, effect: "replace" });
  }
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

function validate(wanted: Partial<Inputs>): Problem[] {
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
  description: "A block device offered over NBD to named clients, by a hardened systemd unit of its own.",
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
      ["device", "listenAddress", "port", "readOnly", "server", "clients"],
      "serving",
      "start it as declared",
    ),
};
