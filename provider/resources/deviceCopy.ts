/**
 * A copy onto a volume that is there and closed: started, found again, followed and verified. Where the volume comes from and
 * what becomes of it is its user's.
 */
import { z } from "zod";
import { failure, parseOutput, refusal, succeed } from "../core/command.js";
import { LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { serially } from "../core/serial.js";
import { type CopyResult, copyResult } from "../linux/copyJob.js";
import { followCopyScript } from "../linux/copyScripts.js";
import {
  checkDeviceScript,
  type DeviceCopyPlan,
  type DeviceJob,
  deviceCopyArguments,
  deviceCopyJob,
  observeDeviceCopyScript,
  startDeviceCopyScript,
  volumeOpen,
} from "../linux/deviceCopy.js";
import { parseFields } from "../linux/fields.js";
import { aliveSeconds } from "../linux/holders.js";
import { type LogicalVolume, lvmFailure } from "../linux/lvm.js";
import { withExtents } from "../linux/zeroRanges.js";
import { leastChunk } from "../ssh/receiveWindow.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import { changeByScript, longestSeconds, parsed, stallSeconds } from "./copyRun.js";
import { jobText } from "./tls.js";
import { changeSeconds, holdersOf, listed, pathOf } from "./volumes.js";

/** What a copy onto a device is for, whether it is compared with its source, and that read on its own host. In the folder of its job. */
const recordShape = z.object({
  generation: z.string(),
  verify: z.boolean(),
  readThere: z.boolean().default(false),
});
export type DeviceCopyRecord = z.infer<typeof recordShape>;

/** What was seen of a job. */
export interface DeviceJobObservation {
  readonly running: boolean;
  /** `undefined` if there is none, or none of ours. */
  readonly record: DeviceCopyRecord | undefined;
  /** "" without a record. */
  readonly recordDigest: string;
  readonly result: CopyResult | undefined;
}

/** Looks at the job, and changes nothing. */
export async function observeDeviceJob(context: Context, job: DeviceJob): Promise<DeviceJobObservation> {
  const argv = script(observeDeviceCopyScript, job.unit, job.run);
  const command: RemoteCommand = { argv, kind: "read", deadlineSeconds: 60 };
  const result = await succeed(context, command, `${job.unit} could not be looked at`);
  const fields = parseOutput(context, command, result, parseFields);
  return {
    running: !["inactive", "failed"].includes(fields.get("active") ?? ""),
    record: parsed(fields.get("record"), recordShape),
    recordDigest: fields.get("recordDigest") ?? "",
    result: parsed(fields.get("result"), copyResult),
  };
}

/** Prints how the job is, for `CopyRun`. */
export function followingOf({ unit, run }: DeviceJob, following = followCopyScript): string[] {
  return script(following, "-", run, "-", unit, run);
}

/**
 * Starts the copy of `sizeBytes` bytes onto the volume; `empty`: see `emptyRanges`; `record` is what `observeDeviceJob` finds again. Raises VOLUME_IN_USE
 * if the volume is open, and is `ChangedMeanwhile` if its name is another volume's.
 */
export async function startDeviceCopy(
  context: Context,
  job: DeviceJob,
  volume: LogicalVolume,
  plan: DeviceCopyPlan,
  record: string,
  sizeBytes: number,
  empty: string,
): Promise<void> {
  const { volumeGroup, name, uuid, path } = volume;
  const runtime = String(longestSeconds(sizeBytes, plan.bandwidthLimit));
  const description = `lvm-nbd: copy of ${plan.uri} onto ${path}`;
  await changeVolumeByScript(
    context,
    volumeGroup,
    `the copy onto ${path} could not be started`,
    script(
      ...[startDeviceCopyScript, job.unit, job.run, volumeGroup, name, uuid],
      ...[record, description, runtime],
    ),
    [volume],
    jobText(job.run, plan.tls, deviceCopyArguments(job, path, plan), withExtents(empty, deviceCopyJob)),
  );
}

/**
 * Runs a script that changes volumes of the group, in its turn there. Raises VOLUME_IN_USE if one of `closed` is open; `otherwise`:
 * what else the script calls so.
 */
export async function changeVolumeByScript(
  context: Context,
  volumeGroup: string,
  what: string,
  argv: string[],
  closed: readonly LogicalVolume[],
  stdin?: string,
  otherwise = " or has snapshots",
): Promise<void> {
  let open = false;
  const explain = (command: RemoteCommand, result: CommandResult) => {
    open = result.exitCode === volumeOpen;
    const code = lvmFailure(result.stderr);
    return code && failure(context, command, result, what, code);
  };
  try {
    await serially(context.host, volumeGroup, () =>
      changeByScript(context, what, argv, { stdin, explain, graceSeconds: changeSeconds }),
    );
  } catch (error) {
    if (!open) throw error;
    const holders = await Promise.all(closed.map((volume) => holdersOf(context, volume)));
    throw inUse(context, what, holders.flat(), otherwise);
  }
}

function inUse(context: Context, what: string, holders: readonly string[], otherwise = ""): LvmNbdError {
  const how = holders.length === 0 ? otherwise : `: ${holders.join(", ")}`;
  return refusal(context, "VOLUME_IN_USE", `${what}: it is open${how}`);
}

/** Raises VOLUME_IN_USE if somebody has the volume open, or it has snapshots, among `all`, that would go with it. */
export async function requireClosed(
  context: Context,
  volume: LogicalVolume,
  all: readonly LogicalVolume[],
): Promise<void> {
  const path = pathOf(volume);
  // Thin ones too: of a volume that is not thin, as the external origin of theirs, they would go with it.
  const snapshots = all.filter(
    ({ originUuid, volumeGroup }) => originUuid === volume.uuid && volumeGroup === volume.volumeGroup,
  );
  if (snapshots.length > 0) {
    const names = listed(snapshots.map(({ name }) => name));
    const what = `${path} is the origin of ${names}, which would be removed with it`;
    throw refusal(context, "VOLUME_IN_USE", what);
  }
  if (volume.open === false || !volume.active) return;
  const holders = await holdersOf(context, volume);
  if (holders.length > 0) throw inUse(context, `${path} is in use`, holders);
}

/** How a device is read. */
interface DeviceReading extends Pick<RemoteCommand, "ownConnection"> {
  /** Told how many bytes are read. What comes no further is ended, with SOURCE_STALLED. */
  readonly watch?: ((bytes: number) => void) | undefined;
}

/**
 * SHA-256 of the first bytes of a device, read from the disk; `undefined` if they cannot be read. What cannot be told is an
 * error.
 */
export async function deviceSum(
  context: Context,
  path: string,
  sizeBytes: number,
  { ownConnection, watch }: DeviceReading = {},
): Promise<string | undefined> {
  const deadlineSeconds = 600 + Math.ceil(sizeBytes / (5 * 1024 ** 2));
  const command: RemoteCommand = {
    ownConnection,
    argv: script(checkDeviceScript, path, String(sizeBytes)),
    kind: "read",
    deadlineSeconds,
    // Twice what it says until then: however long it reads, that is no reason to end it.
    maxOutputBytes: 64 * 1024 + 2 * leastChunk * Math.ceil(deadlineSeconds / aliveSeconds),
  };
  const result =
    watch === undefined
      ? await context.host.run(command, context.signal)
      : await watched(context, command, `reading ${path}`, watch);
  if (result.exitCode === 70) return undefined;
  if (result.exitCode !== 0)
    throw failure(context, command, result, `${path} could not be checked`, "COMMAND_FAILED");
  return parseOutput(context, command, result, parseSum);
}

/**
 * Runs a command that says how many bytes it has read. One that says for `stallSeconds` that it comes no further, or nothing, is ended, with
 * SOURCE_STALLED.
 */
async function watched(
  context: Context,
  command: RemoteCommand,
  what: string,
  watch: (bytes: number) => void,
): Promise<CommandResult> {
  const stalled = new AbortController();
  // The clock goes on while this process stands still; what was said meanwhile is then heard first.
  let silent: NodeJS.Timeout | undefined;
  const timer = setTimeout(() => {
    silent = setTimeout(() => stalled.abort(), 2 * aliveSeconds * 1000);
  }, stallSeconds * 1000);
  const heard = () => {
    clearTimeout(silent);
    timer.refresh();
  };
  let [position, begun, same] = ["", "", 0];
  const onOutput = (text: string) => {
    const lines = `${begun}${text}`.split("\n");
    begun = (lines.pop() ?? "").slice(0, 100);
    for (const line of lines.filter((one) => saysPosition.test(one))) {
      heard();
      // Where no position can be told it may come further for all we know.
      same = line === position && line !== "" ? same + 1 : 0;
      position = line;
      if (line !== "") watch(Number(line));
      if (same * aliveSeconds >= stallSeconds) stalled.abort();
    }
  };
  try {
    const signal = AbortSignal.any([context.signal, stalled.signal]);
    return await context.host.run({ ...command, onOutput }, signal);
  } catch (error) {
    if (!stalled.signal.aborted || context.signal.aborted) throw error;
    throw new LvmNbdError("SOURCE_STALLED", {
      message: `${what}: no progress for ${stallSeconds} s${position === "" ? "" : ` at byte ${position}`}`,
      host: context.host.name,
      resource: context.resource,
      cause: error,
    });
  } finally {
    clearTimeout(timer);
    clearTimeout(silent);
  }
}

/** Lines of `checkDeviceScript` before its checksum. */
const saysPosition = /^\d{0,20}$/;

/** The checksum among the lines that `checkDeviceScript` prints. Throws for anything else. */
function parseSum(stdout: string): string {
  const [sum = "", ...more] = stdout.split("\n").filter((line) => !saysPosition.test(line));
  if (more.length > 0 || !/^[0-9a-f]{64}$/.test(sum)) throw new Error("it tells no SHA-256");
  return sum;
}
