/**
 * A restore from an image: what an export serves is written onto a volume that is there and closed, once its checksum is found
 * to be the declared one, and the volume is read back. Its job keeps the mark; see linux/imageRestore.ts.
 */
import { randomUUID } from "node:crypto";
import { parseOutput, refusal, succeed } from "../core/command.js";
import { type ErrorDetails, errorCodes, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import { markAmong, ownerInTag } from "../core/owner.js";
import { ChangedMeanwhile, type Context } from "../core/resource.js";
import {
  imageOfRestore,
  isRestoreOf,
  ownerOfRestore,
  type RestoreMark,
  restoreGeneration,
  restoreMarksAmong,
  restoreTagOf,
  restoreTagParts,
  writingAmong,
} from "../core/restoreMark.js";
import { bytesPhrase, type CopyProgress, parseRate } from "../linux/copyJob.js";
import { type DeviceCopyPlan, type DeviceJob, deviceCopyPrograms } from "../linux/deviceCopy.js";
import { parseFields } from "../linux/fields.js";
import {
  endImageRestoreScript,
  filledSnapshots,
  followImageRestoreScript,
  imageRestoreArguments,
  imageRestoreJob,
  parseChunkSizes,
  poolNeed,
  preflightRestoreScript,
  type RestoreMarks,
  restoreJob,
  startImageRestoreScript,
} from "../linux/imageRestore.js";
import type { LogicalVolume } from "../linux/lvm.js";
import { leftBytes as usedBytes } from "../linux/merge.js";
import { missingPrograms } from "../linux/programs.js";
import type { ClientTls } from "../linux/tls.js";
import { longestSeconds, runCopy } from "./copyRun.js";
import { refused, sourceSize } from "./copySource.js";
import { changeVolumeByScript, type DeviceCopyRecord, followingOf, observeDeviceJob } from "./deviceCopy.js";
import { asking, jobText } from "./tls.js";
import {
  holdersOf,
  listed,
  named,
  pathOf,
  refuseOpen,
  refuseRanFull,
  refuseSuspended,
  requireOrigin,
  volumeOf,
  volumes,
} from "./volumes.js";

/** What is written onto which volume, for whom. */
export interface ImageWanted {
  readonly owner: string;
  readonly volumeGroup: string;
  readonly origin: string;
  readonly image: {
    readonly uri: string;
    readonly sha256: string;
    readonly tls?: ClientTls | undefined;
  };
  /** UUID of the volume. */
  readonly overwrite: string;
  readonly connections?: number | undefined;
  readonly bandwidthLimit?: string | number | undefined;
  readonly triggers: readonly (string | number | boolean)[];
}

/** A job that runs, and the mark that was on its volume when it began. */
export interface RunningRestore {
  readonly begun: string;
  readonly recordDigest: string;
}

/** The job that writes the volume now. */
export async function runningRestore(
  context: Context,
  origin: LogicalVolume,
): Promise<RunningRestore | undefined> {
  const { running, record, recordDigest } = await observeDeviceJob(context, restoreJob(origin));
  return running && record !== undefined ? { begun: record.generation, recordDigest } : undefined;
}

/** True if the mark, in whatever stage, is of the restore that this job makes. */
export function isMarkOf(job: RunningRestore | undefined, mark: RestoreMark): boolean {
  return job?.begun === restoreTagOf({ ...mark, stage: "begun", seconds: 0 });
}

/** How a volume is while nobody goes on with what has begun. */
export function halfWritten(origin: LogicalVolume): string {
  return `${pathOf(origin)} is HALF-WRITTEN: it holds neither what it held before nor the image`;
}

function stopping({ unit }: DeviceJob): string {
  return `\`systemctl stop ${unit}\` on the host ends it`;
}

/** The failure beside a restore that was begun earlier and writes the volume on by itself. */
export function goingOn(origin: LogicalVolume, error: LvmNbdError): LvmNbdError {
  const path = pathOf(origin);
  return new LvmNbdError(error.code, {
    ...error.details,
    message: `${error.details.message}; an earlier restore of ${path} from an image goes on and OVERWRITES it`,
    advice: `${adviceOf(error)} ${stopping(restoreJob(origin))}, and leaves ${path} half-written.`,
  });
}

/** Ends the job of that record, which writes the volume, and removes marks from it. */
export function endImageRestore(
  context: Context,
  origin: LogicalVolume,
  recordDigest: string,
  marks: readonly string[],
): Promise<void> {
  const { volumeGroup, name, uuid } = origin;
  const { unit, run } = restoreJob(origin);
  const argv = script(endImageRestoreScript, unit, run, volumeGroup, name, uuid, recordDigest, ...marks);
  const what = `the restore of ${pathOf(origin)} could not be ended`;
  return changeVolumeByScript(context, volumeGroup, what, argv, []);
}

/** Raises IDENTITY_MISMATCH unless the volume is the one that may be overwritten. */
function requireOverwrite(
  context: Context,
  { overwrite }: Pick<ImageWanted, "overwrite">,
  origin: LogicalVolume,
): void {
  if (origin.uuid === overwrite) return;
  throw refusal(
    context,
    "IDENTITY_MISMATCH",
    `overwrite: ${pathOf(origin)} has the UUID ${origin.uuid}, not ${overwrite}`,
    `Nothing was touched. If it is this volume whose content is to be given up, set \`overwrite: "${origin.uuid}"\`.`,
  );
}

/** Raises what is wrong with a declaration, whoever writes the volume now. */
export async function requireRestorable(
  context: Context,
  wanted: ImageWanted,
  origin: LogicalVolume,
): Promise<void> {
  requireOverwrite(context, wanted, origin);
  const { sizeBytes } = await preflight(context, wanted);
  requireSize(context, origin, sizeBytes);
}

/** The failure of what was to bring a volume in order that an earlier restore has left half-written. */
export async function sayingHalfWritten(
  context: Context,
  origin: LogicalVolume,
  error: LvmNbdError,
): Promise<LvmNbdError> {
  if (error.details.message.includes("HALF-WRITTEN")) return error;
  const told = (how: string) =>
    new LvmNbdError(error.code, {
      ...error.details,
      message: `${error.details.message}; ${how}`,
      advice: `Use nothing of ${pathOf(origin)} until it is restored. ${adviceOf(error)}`,
    });
  try {
    const all = await volumes({ ...context, signal: AbortSignal.timeout(60_000) });
    const now = all.find(
      ({ volumeGroup, uuid }) => volumeGroup === origin.volumeGroup && uuid === origin.uuid,
    );
    return now === undefined || writingAmong(now.tags) === undefined ? error : told(halfWritten(now));
  } catch (failure) {
    if (!isLvmNbdError(failure)) throw failure;
    return told(`whether ${pathOf(origin)} is half-written could not be found out`);
  }
}

/** What to do, also where something was touched. */
function adviceOf({ code, details }: LvmNbdError): string {
  return (details.advice ?? errorCodes[code]).replace("Nothing was touched. ", "");
}

/** What is to be written where. */
interface Target {
  readonly origin: LogicalVolume;
  readonly sizeBytes: number;
  /** Of its thin pool. */
  readonly needBytes: number;
  readonly marks: RestoreMarks;
}

/**
 * Restores, or goes on with the job that does. `life`: whose marks its own takes the place of; `going`: that job, and the volume
 * that it writes.
 */
export async function restoreImage(
  context: Context,
  wanted: ImageWanted,
  life: string,
  going?: RunningRestore & { readonly origin: LogicalVolume },
): Promise<void> {
  const job = restoreJob(going?.origin ?? { volumeGroup: wanted.volumeGroup, uuid: wanted.overwrite });
  const path = `${wanted.volumeGroup}/${wanted.origin}`;
  let target: Target | undefined;
  const ended = async (to: Context, recordDigest: string, mark?: string) => {
    const origin = going?.origin ?? target?.origin;
    if (origin !== undefined)
      await endImageRestore(to, origin, recordDigest, mark === undefined ? [] : [mark]);
  };
  await runCopy(context, {
    target: path,
    unfinished: `the unfinished restore of ${path}`,
    whenLeft: `could not be ended: unless it has ended it goes on by itself and may OVERWRITE ${path}; ${stopping(job)}`,
    whenFull: "Extend the thin pool (`lvextend`), or remove what is not needed of it.",
    going: going?.recordDigest,
    following: followingOf(job, followImageRestoreScript),
    prepare: async () => {
      target = await prepared(context, wanted, life);
      const record: DeviceCopyRecord = { generation: target.marks.begun, verify: true, readThere: false };
      return `${JSON.stringify({ ...record, started: randomUUID() })}\n`;
    },
    start: async (record) => {
      if (target === undefined) throw new Error("a restore without its volume");
      context.progress(
        `writing the image of ${wanted.image.uri} onto ${path}, once its checksum is found right`,
      );
      await start(context, wanted, target, record);
    },
    certify: (_result, recordDigest) => ended(context, recordDigest),
    // Where nothing was written it still has that mark.
    discard: (to, recordDigest) => ended(to, recordDigest, going?.begun ?? target?.marks.begun),
    explain: (error, progress, isDiscarded) =>
      explained(context, wanted, life, error, progress, isDiscarded ? "" : `${stopping(job)}.`),
  });
}

async function start(
  context: Context,
  wanted: ImageWanted,
  { origin, sizeBytes, needBytes, marks }: Target,
  record: string,
): Promise<void> {
  const { volumeGroup, name, uuid } = origin;
  const [job, plan] = [restoreJob(origin), planOf(wanted)];
  const argv = script(
    ...[startImageRestoreScript, job.unit, job.run, volumeGroup, name, uuid, record],
    `lvm-nbd: restore of ${pathOf(origin)} from ${plan.uri}`,
    String(longestSeconds(sizeBytes, plan.bandwidthLimit)),
    marks.begun,
    ...restoreMarksAmong(origin.tags).map(({ tag }) => tag),
  );
  const text = jobText(
    job.run,
    plan.tls,
    imageRestoreArguments(job, origin, plan, marks, needBytes),
    imageRestoreJob,
  );
  const what = `the restore of ${pathOf(origin)} could not be started`;
  // It may have snapshots.
  await changeVolumeByScript(context, volumeGroup, what, argv, [origin], text, "");
}

function planOf({ image, connections, bandwidthLimit }: ImageWanted): DeviceCopyPlan {
  return {
    ...{
      uri: image.uri,
      tls: image.tls,
      expected: image.sha256,
      connections: connections ?? 4,
      rest: "keep",
    },
    bandwidthLimit: bandwidthLimit === undefined ? undefined : parseRate(bandwidthLimit),
    // The volume is held to the declared checksum instead.
    verify: false,
  };
}

/** Finds the volume, and everything for which it must not or cannot be written, before anything is touched. */
async function prepared(context: Context, wanted: ImageWanted, life: string): Promise<Target> {
  const { volumeGroup: group, origin: name } = wanted;
  const all = await volumes(context);
  const origin = await requireOrigin(
    context,
    wanted,
    all,
    `Create it, as large as the image: \`lvcreate -n ${name} -L SIZE ${group}\`. Or let a VolumeCopy make it of the image: \`volume: { volumeGroup: "${group}", name: "${name}" }\`.`,
  );
  requireOverwrite(context, wanted, origin);
  refuseRanFull(context, all, origin);
  refuseUnsuitable(context, origin);
  refuseSuspended(context, [origin]);
  const isOurs = (mark: RestoreMark) => mark.life === life || isRestoreOf(mark, wanted.owner);
  const marks = restoreMarksAmong(origin.tags);
  refuseDone(context, origin, marks, wanted);
  refuseOthers(
    context,
    origin,
    marks.find((mark) => !isOurs(mark) && mark.stage !== "restored" && imageOfRestore(mark) !== undefined),
  );
  await refuseOpen(
    context,
    [origin],
    "Nothing was touched. Shut the VM down, unmount the volume, remove its export, and run again.",
  );
  const { sizeBytes, startedAt, chunkSizes } = await preflight(context, wanted);
  requireSize(context, origin, sizeBytes);
  const needBytes = requireRoom(
    context,
    all.filter(({ volumeGroup }) => volumeGroup === group),
    origin,
    sizeBytes,
    chunkSizes,
  );
  const told = {
    ...{ generation: restoreGeneration(wanted.triggers), life, source: wanted.image.sha256 },
    ...{ owner: ownerInTag(wanted.owner), startedAt, seconds: 0, thinId: 0 },
  };
  const writing = restoreTagOf({ ...told, stage: "writing" });
  return {
    origin,
    sizeBytes,
    needBytes,
    marks: {
      begun: restoreTagOf({ ...told, stage: "begun" }),
      writing,
      ...restoreTagParts(told),
      startedAt,
      // One of the same second has this very mark.
      earlier: marks.filter((mark) => isOurs(mark) && mark.tag !== writing).map(({ tag }) => tag),
    },
  };
}

/**
 * A thin volume with an origin may as well be a VM's own disk, a clone of a template. LVM also calls the slow part of a cached volume
 * its origin.
 */
function isSnapshot({ kind, originUuid, readOnly, tags }: LogicalVolume): boolean {
  if (kind !== "thin") return kind === "cow";
  return originUuid !== undefined && (readOnly || markAmong(tags) !== undefined);
}

function refuseUnsuitable(context: Context, origin: LogicalVolume): void {
  const path = pathOf(origin);
  const unsuitable = (what: string, advice: string) => {
    throw refusal(context, "ORIGIN_UNSUITABLE", `origin: ${path} ${what}`, `Nothing was touched. ${advice}`);
  };
  if (isSnapshot(origin))
    unsuitable(`is a snapshot, of "${origin.origin}"`, "Name the volume that is to hold the image.");
  if (origin.kind === "pool")
    unsuitable("is a thin pool, not a volume", "Name the volume that is to hold the image.");
  if (origin.attr[0] === "O") unsuitable("is being merged with a snapshot", "Run again when that has ended.");
  if (origin.readOnly)
    unsuitable("is read-only", `Make it writable (\`lvchange -p rw ${path}\`), and run again.`);
  if (origin.active) return;
  throw refusal(
    context,
    "DEVICE_NOT_FOUND",
    `origin: ${path} is not active, so it cannot be written`,
    `Nothing was touched. Activate it (\`lvchange -ay ${path}\`), and run again.`,
  );
}

/** A restore that ended since it was looked at is not made a second time. */
function refuseDone(
  context: Context,
  origin: LogicalVolume,
  marks: readonly RestoreMark[],
  { owner, triggers, image }: ImageWanted,
): void {
  const generation = restoreGeneration(triggers);
  // A resource that was renamed, or whose state was lost, has another owner in its mark.
  const byAnother = marks.find(
    (mark) =>
      !isRestoreOf(mark, owner) &&
      mark.stage === "restored" &&
      mark.generation === generation &&
      mark.source === image.sha256,
  );
  if (byAnother !== undefined) {
    throw refusal(
      context,
      "FOREIGN_RESOURCE",
      `${pathOf(origin)} was restored from this very image already, by ${ownerOfRestore(byAnother)}`,
      "Nothing was touched. If that is this resource under a former name, give it the `aliases` of that name. To restore once more, change `triggers`.",
    );
  }
  const isDone = (mark: RestoreMark) =>
    isRestoreOf(mark, owner) && mark.stage === "restored" && mark.generation === generation;
  if (!marks.some(isDone)) return;
  const what = `${pathOf(origin)} was restored for these \`triggers\` by another run meanwhile`;
  throw new ChangedMeanwhile(refusal(context, "VOLUME_IN_USE", what));
}

/** Raises VOLUME_IN_USE for a mark of another restore from an image. */
export function refuseOthers(context: Context, origin: LogicalVolume, other: RestoreMark | undefined): void {
  if (other === undefined) return;
  throw refusal(
    context,
    "VOLUME_IN_USE",
    `${pathOf(origin)} is being restored from an image by ${ownerOfRestore(other)}`,
    `Let that end, or remove it there. If nothing of it is left but its mark: \`lvchange --deltag '${other.tag}' ${pathOf(origin)}\`.`,
  );
}

async function preflight(
  context: Context,
  wanted: ImageWanted,
): Promise<{
  readonly sizeBytes: number;
  readonly startedAt: number;
  readonly chunkSizes: ReadonlyMap<string, number>;
}> {
  const { volumeGroup, overwrite, image } = wanted;
  const { uri, tls } = image;
  const asked = asking(uri, tls);
  const programs = deviceCopyPrograms(planOf(wanted));
  const looking = asked.command(preflightRestoreScript, volumeGroup, overwrite, asked.uri, ...programs);
  const command = { ...looking, kind: "read", deadlineSeconds: 60 } as const;
  const result = await succeed(context, command, "the host could not be looked at");
  const fields = parseOutput(context, command, result, parseFields);
  const missing = missingPrograms(fields);
  if (missing !== undefined) throw refused(context, "PROGRAM_MISSING", "host", missing);
  const answer = { exitCode: fields.get("size.rc"), text: fields.get("size") ?? "" };
  return {
    sizeBytes: await sourceSize(context, { uri }, answer),
    startedAt: Number(fields.get("now")),
    chunkSizes: parseChunkSizes(fields.get("chunks") ?? ""),
  };
}

function requireSize(context: Context, origin: LogicalVolume, sizeBytes: number): void {
  const number = (bytes: number) => `${bytesPhrase(bytes)} (${bytes} bytes)`;
  const both = `the image has ${number(sizeBytes)}, ${pathOf(origin)} ${number(origin.sizeBytes)}`;
  if (sizeBytes > origin.sizeBytes) {
    throw refusal(
      context,
      "NO_SPACE",
      `origin: ${both}`,
      `Nothing was touched. Extend it (\`lvextend -L ${sizeBytes}b ${pathOf(origin)}\`), or name another volume.`,
    );
  }
  if (sizeBytes < origin.sizeBytes) context.warn(`${both}: the bytes behind the image stay as they are`);
}

/** What is written takes room in the stores of COW snapshots, and in a thin pool. Returns how many bytes of that. */
function requireRoom(
  context: Context,
  all: readonly LogicalVolume[],
  origin: LogicalVolume,
  sizeBytes: number,
  chunkSizes: ReadonlyMap<string, number>,
): number {
  const filled = filledSnapshots(all, origin, sizeBytes, chunkSizes);
  const phrase = (some: typeof filled) =>
    some.map((lv) => `"${lv.name}" (${bytesPhrase(lv.freeBytes)} free)`).join(", ");
  const writes = `the restore writes ${bytesPhrase(sizeBytes)} to ${pathOf(origin)}`;
  const overflowing = filled.filter(({ overflows }) => overflows);
  if (overflowing.length > 0) {
    throw refusal(
      context,
      "RESTORE_OVERFLOWS",
      `${writes}, which may overflow snapshots of it: ${phrase(overflowing)}`,
      `Nothing was touched. Extend them (\`lvextend -l 101%ORIGIN ${origin.volumeGroup}/NAME\`), or remove them, and run again.`,
    );
  }
  if (filled.length > 0) context.warn(`${writes}, which fills the snapshots of it: ${phrase(filled)}`);
  if (origin.kind !== "thin") return 0;
  const pool = named(all, origin.volumeGroup, origin.pool ?? "");
  const need = poolNeed(all, origin, sizeBytes);
  const free = pool ? pool.sizeBytes - usedBytes(pool) : 0;
  const isReady = pool?.health === "" && (pool.metadataPercent ?? 0) < 100;
  if (isReady && free >= need.bytes) return need.bytes;
  const state = isReady
    ? `has ${bytesPhrase(free)} free, the restore may need ${bytesPhrase(need.bytes)}`
    : `takes no changes: ${pool?.health || "its metadata is full"}`;
  const untold =
    need.untold.length === 0
      ? ""
      : ` Or activate ${listed(need.untold)} (\`lvchange -ay\`): while they are inactive, nobody can tell what they share with ${pathOf(origin)}.`;
  throw refusal(
    context,
    "NO_SPACE",
    `the thin pool ${origin.pool} ${state}`,
    `Nothing was touched. Extend it (\`lvextend\`, \`lvextend --poolmetadatasize\`), or remove what is not needed of it, and run again.${isReady ? untold : ""}`,
  );
}

/** The failure, with what it means for the volume. `stop`: how to end a job that could not be. */
async function explained(
  context: Context,
  wanted: ImageWanted,
  life: string,
  error: LvmNbdError,
  progress: CopyProgress | undefined,
  stop: string,
): Promise<LvmNbdError> {
  // A cancelled one has its signal aborted.
  const looking = { ...context, signal: AbortSignal.timeout(60_000) };
  const told = (details: Partial<ErrorDetails>) =>
    new LvmNbdError(error.code, { ...error.details, ...details });
  const path = `${wanted.volumeGroup}/${wanted.origin}`;
  const never = `Use nothing of ${path} until it is restored.`;
  const again = "The next `pulumi up` writes it anew from its beginning.";
  const cancelled = error.code === "CANCELLED";
  const reason = error.details.advice ?? (cancelled ? "" : "Put right what the message names.");
  const advising = (...sentences: string[]) => sentences.filter((one) => one !== "").join(" ");
  try {
    const origin = await volumeOf(looking, await volumes(looking), wanted.volumeGroup, wanted.overwrite);
    if (origin === undefined) throw refusal(looking, "ORIGIN_NOT_FOUND", `${path} is not there any more`);
    const marks = restoreMarksAmong(origin.tags).filter(
      (mark) => mark.life === life || isRestoreOf(mark, wanted.owner),
    );
    const isOpen = error.details.message.startsWith("open: ");
    const holders = isOpen ? await holdersOf(looking, origin) : [];
    const message = [error.details.message, ...holders].join(", ");
    if (marks.some(({ stage }) => stage === "writing"))
      return told({
        message: `${message}; ${halfWritten(origin)}`,
        advice: advising(never, stop, reason, again),
      });
    const isDone = marks.some(
      (mark) => mark.stage === "restored" && mark.generation === restoreGeneration(wanted.triggers),
    );
    if (isDone)
      return told({ message: `${message}; ${path} holds the image all the same`, advice: "Run again." });
    if (progress?.phase === "copy" || progress?.phase === "verify")
      throw refusal(looking, "IDENTITY_MISMATCH", `the mark of the restore was removed from ${path}`);
    // The advice of its code says more.
    const begins = advising(stop, reason, "The next `pulumi up` begins anew.");
    if (stop !== "") {
      const how = `nothing was written to ${path} yet, but the restore could not be ended and may go on`;
      return told({ message: `${message}; ${how}`, advice: begins });
    }
    return told({
      message: `${message}; nothing was written to ${path}`,
      advice: isLvmNbdError(error, "IMAGE_CORRUPT", "RESTORE_OVERFLOWS") ? undefined : begins,
    });
  } catch (failure) {
    if (!isLvmNbdError(failure)) throw failure;
    return told({
      message: `${error.details.message}; whether ${path} was written to could not be found out`,
      advice: advising(never, stop, reason, again),
    });
  }
}
