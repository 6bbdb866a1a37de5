/**
 * LvRestore: brings a logical volume back, once: to the moment of one of its snapshots, by merging that into it, or to what a
 * verified image holds, by writing it; the latter is in imageRestore.ts.
 *
 * What was restored is remembered on the origin itself, by an LVM tag that is set before anything begins: a restore that
 * was cut off is gone on with, and one that is done is never done again, whatever becomes of Pulumi's state.
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, refusal, succeed } from "../core/command.js";
import { errorCodes, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { OutputOf } from "../core/example.js";
import { lookPatiently, pause } from "../core/following.js";
import { script } from "../core/hostCommands.js";
import { commonInputs, readableBy, refusing, replaces, triggersInput } from "../core/inputs.js";
import { markAmong, ownerInTag, ownerOfMark, ownerTag, tagPrefix } from "../core/owner.js";
import {
  type Change,
  ChangedMeanwhile,
  type Context,
  type Problem,
  type ResourceType,
} from "../core/resource.js";
import {
  imageOfRestore,
  isRestoreOf,
  newLife,
  ownerOfRestore,
  type RestoreMark,
  restoreGeneration,
  restoreMarksAmong,
  restoreTagOf,
  restoreTagParts,
} from "../core/restoreMark.js";
import { serially } from "../core/serial.js";
import { bytesPhrase } from "../linux/copyJob.js";
import { clockCommand } from "../linux/looks.js";
import {
  identified,
  type LogicalVolume,
  lvmFailure,
  tagCommand,
  volumeGroupNameProblem,
} from "../linux/lvm.js";
import {
  beginMergeScript,
  endMergeScript,
  fillingSnapshots,
  leftBytes,
  type MergeSample,
  mergePhase,
  mergePhrase,
  pollCommand,
  ranFullAdvice,
  ranFullPhrase,
  refreshCommand,
  snapshotFateScript,
  wasMergedScript,
} from "../linux/merge.js";
import { parseNbdUri } from "../linux/nbd.js";
import { changedMeanwhile } from "../linux/unitScript.js";
import type { RemoteCommand } from "../ssh/types.js";
import { imageInputs } from "./image.js";
import {
  endImageRestore,
  goingOn,
  halfWritten,
  type ImageWanted,
  isMarkOf,
  type RunningRestore,
  refuseOthers,
  requireRestorable,
  restoreImage,
  runningRestore,
  sayingHalfWritten,
} from "./imageRestore.js";
import { sourceTlsInput, tlsProblems } from "./tls.js";
import {
  changeSeconds,
  changeVolume,
  changing,
  holdersOf,
  listed,
  named,
  observeSeconds,
  pathOf,
  refuseHalfWritten,
  refuseOpen,
  refuseOtherGroup,
  refuseRanFull,
  refuseSuspended,
  requireGroup,
  requireOrigin,
  volumeOf,
  volumes,
  writtenBy,
} from "./volumes.js";

const name = z
  .string()
  .superRefine(refusing((value) => (value === "" ? "must not be empty" : volumeGroupNameProblem(value))));

const uuid = z
  .string()
  .regex(
    /^[A-Za-z0-9]{6}(-[A-Za-z0-9]{4}){5}-[A-Za-z0-9]{6}$/,
    "is not an LVM UUID, as an LvSnapshot's `uuid` and `lvs -o lv_uuid`",
  );

const inputs = z.strictObject({
  ...commonInputs,
  adopt: commonInputs.adopt.describe(
    "Follow a merge of this snapshot that somebody began by hand as this resource's own, instead of refusing.",
  ),
  volumeGroup: name.describe("Volume group of the origin, and of its snapshot.").meta(replaces),
  origin: name.describe("Logical volume that is brought back.").meta(replaces),
  snapshot: z
    .strictObject({
      name: name.describe("Name of the snapshot."),
      uuid: uuid.describe("LVM UUID of the snapshot."),
    })
    .optional()
    .describe(
      "The snapshot whose moment is restored, e.g. an LvSnapshot. Merging removes it; its UUID sees to it that no other one " +
        "of that name is. Another snapshot alone restores nothing. Either this or `image`.",
    ),
  image: z
    .strictObject({
      uri: z
        .string()
        .superRefine(readableBy(parseNbdUri))
        .describe("The `uri` of an NbdExport that serves the image and lets this host in."),
      sha256: z
        .string()
        .regex(/^[0-9a-f]{64}$/, "is no SHA-256: 64 lower-case hexadecimal digits, the copy's `sha256`")
        .describe("SHA-256 of what the image holds, as a VolumeCopy's or BackupImage's output tells it."),
      tls: sourceTlsInput,
    })
    .optional()
    .describe(
      "The image that is written onto the origin, of a VolumeCopy or BackupImage. It is read once before anything is written: unless " +
        "it has this checksum, nothing is. Another image alone restores nothing.",
    ),
  overwrite: uuid
    .optional()
    .describe(
      "LVM UUID of the origin, required with an `image`: its content is given up. `lvs -o lv_uuid VG/LV` prints it.",
    ),
  connections: imageInputs.connections
    .unwrap()
    .optional()
    .describe("NBD connections by which an `image` is copied. Default 4."),
  bandwidthLimit: imageInputs.bandwidthLimit.describe(
    'Bytes a second of an `image` that are read from its export at most, e.g. `"20M"` (1024-based). Default: no limit.',
  ),
  whenOpen: z
    .enum(["refuse", "atNextActivation"])
    .default("refuse")
    .describe(
      "What to do while the origin or the snapshot is open: `refuse` with an error that names who holds it, or let LVM merge " +
        "`atNextActivation` of the origin. With an `image` only `refuse`.",
    ),
  triggers: triggersInput.describe("Any values; only a change of one restores again."),
});

const outputs = z.object({
  state: z
    .enum(["restored", "merging", "scheduled", "restoring", "checking", "unmarked", "failed"])
    .describe(
      "`restored`; `merging` (under way: the origin shows the restored content already); `scheduled` (begins when the origin is next " +
        "activated: until then it has its present content, and what is written to it will be lost); " +
        "`checking` (an image, of which nothing is written before it was read once); " +
        "`restoring` (from an image: use nothing of the origin, it may be half-written); " +
        "`unmarked` (restored, but somebody removed the mark from the origin: `pulumi up` puts it back and writes nothing; or another " +
        "restore took its place and was cut off as it began: `pulumi up` restores for other `triggers`, and is an error for these; or one is " +
        "at its check: `pulumi up` ends it for these); " +
        "`failed` (the snapshot ran full, or somebody removed it or may have, or undid its merge, before that was seen to have ended: for " +
        "these `triggers` nothing is restored any more, `pulumi up` says what to do).",
    ),
  snapshotRemoved: z.boolean().describe("Whether the snapshot is gone, as it is after its merge."),
  restoredSnapshot: z.string().describe("LVM UUID of the snapshot that was restored; empty for an image."),
  restoredImage: z.string().describe("SHA-256 of the image that was restored; empty for a snapshot."),
  originUuid: z.string().describe("LVM UUID of the origin; it stays the same."),
  startedAt: z.string().describe("When the restore was begun or scheduled (ISO 8601, by the host's clock)."),
  restoredAt: z
    .string()
    .describe(
      "When the merge was seen to have ended, or the image was read back (ISO 8601, by the host's clock); empty before, and where " +
        "nobody followed a merge.",
    ),
  seconds: z.number().describe("From `startedAt` to `restoredAt`."),
  restoreId: z.string().describe("Which resource's life the restore belongs to."),
  generation: z
    .string()
    .default("")
    .describe(
      "Digest of the `triggers` that the restore was made for: others than the declared ones where an `up` for them was taken back.",
    ),
  mergeFailed: z
    .boolean()
    .default(false)
    .describe(
      "Whether the kernel gave the merge up, e.g. for a disk that cannot be read: it goes on when the origin is activated anew.",
    ),
});

type Inputs = z.infer<typeof inputs>;
type FromSnapshot = Inputs & { readonly snapshot: NonNullable<Inputs["snapshot"]> };
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type LvRestoreDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type LvRestoreOutputs = State;

interface Observed {
  readonly mark: string | undefined;
  readonly halfMade: boolean;
  readonly removed: boolean;
  readonly restore: RestoreMark;
  readonly origin: LogicalVolume;
  /** `undefined` when it is gone, and of an image. */
  readonly snapshot: LogicalVolume | undefined;
  /** Of another one's restore that writes an image onto the origin, or has left it half-written. */
  readonly others: RestoreMark | undefined;
  /** Of this resource's restores that have ended: a merge's snapshot is gone then, also where nobody has marked that. */
  readonly ended: readonly RestoreMark[];
  /** The job that writes an image. */
  readonly job: RunningRestore | undefined;
  /** Of another resource, which has restored the volume since this one left it half-written; this one's mark is lost then. */
  readonly healed: RestoreMark | undefined;
  /** Marks of this resource's images that were begun to be written, unless it is healed. */
  readonly written: readonly string[];
  /**
   * `pending`: marked, but the snapshot is there and nobody merges it, or no byte of the image was written and nobody is about
   * to; `uncertain`: it is gone, and the mark was left from before LVM was told to merge it; `halfWritten`: nobody goes on
   * writing the image; `unmarked`: only the state tells of the restore, and `restore` is the mark that it had, as it is where somebody
   * removed that of an image that was being written, or of a merge that has not ended; `overflowed`: the snapshot ran full before its
   * merge began; `withdrawn`: somebody removed it, or may have, after LVM was told to merge it, or undid the merge and removed the mark.
   */
  readonly phase:
    | Exclude<State["state"], "failed">
    | ("pending" | "uncertain" | "halfWritten" | "overflowed" | "withdrawn");
}

/** `isFollowed`: this very run has begun the merge, or seen it begin. */
async function observe(
  context: Context,
  wanted: Inputs | State,
  { jobHasEnded = false, isFollowed = false } = {},
): Promise<Observed | undefined> {
  const all = await volumes(context);
  const [originUuid, life] = "restoreId" in wanted ? [wanted.originUuid, wanted.restoreId] : [];
  const origin =
    (await volumeOf(context, all, wanted.volumeGroup, originUuid)) ??
    named(all, wanted.volumeGroup, wanted.origin);
  if (origin === undefined) {
    await requireGroup(context, wanted.volumeGroup, all);
    return undefined;
  }
  const isOurs = (mark: RestoreMark) => mark.life === life || isRestoreOf(mark, wanted.owner);
  const marked = restoreMarksAmong(origin.tags);
  const marks = marked.filter(isOurs);
  const isBegun =
    marks.some(isUnfinishedImage) ||
    (tellsOfWriting(wanted, origin) && !marks.some((mark) => isOfSince(mark, wanted)));
  const job = isBegun && !jobHasEnded ? await runningRestore(context, origin) : undefined;
  // Between the two looks it may have ended, and changed its mark.
  if (isBegun && !jobHasEnded && job === undefined)
    return observe(context, wanted, { jobHasEnded: true, isFollowed });
  const sourceOf = ({ source }: RestoreMark) =>
    identified(all, { volumeGroup: origin.volumeGroup, uuid: source })[0];
  const ended = marks.filter(({ stage }) => stage === "restored");
  const isDoubtful = (mark: RestoreMark) =>
    !isFollowed &&
    (isWaiting(wanted, mark) || wasGivenUp(wanted, mark) || marks.some(({ stage }) => stage === "writing"));
  for (const mark of marks.filter((one) => one.stage === "merging" && sourceOf(one) === undefined))
    if (!isFailed(wanted, mark) && (await hasMerged(context, origin, mark, isDoubtful(mark))))
      ended.push(mark);
  const lost = "restoreId" in wanted ? lostMark(wanted, { origin, ended, job }, marks) : undefined;
  // A merge that was begun after an image, which keeps its mark until then; or said to have ended by hand.
  const isMerged = (mark: RestoreMark, writing: RestoreMark) =>
    mark.stage === "begun"
      ? sourceOf(mark)?.merging !== false
      : mark.stage === "merging" || mark.startedAt > writing.startedAt;
  const restore =
    lost === undefined || lost.stage === "restored"
      ? (lost ?? markThatCounts(marks, life, job, isMerged))
      : markThatCounts(
          [lost, ...marks.filter((mark) => !isOfEarlier(mark, lost, ended))],
          ...[life, job, isMerged],
        );
  if (restore === undefined) return undefined;
  const snapshot = sourceOf(restore);
  refuseSuspended(context, [origin, snapshot]);
  const told = { restore, origin, snapshot, ended, job: isMarkOf(job, restore) ? job : undefined };
  const phase =
    restore === lost
      ? await phaseOfLost(
          told,
          async () => tellsOfMerge(wanted, origin) && hasMerged(context, origin, lost, true),
        )
      : phaseOf(told);
  const healed =
    phase === "halfWritten" && restore === lost ? laterOfOthers(marked, restore, isOurs) : undefined;
  const written = [...(lost && !healed ? [lost] : []), ...marks]
    .filter(({ stage }) => stage === "writing")
    .map(({ tag }) => tag);
  return {
    mark: ownerTag + restore.owner,
    ...{ written, healed },
    halfMade: wasCut(phase) && !isHalf({ phase, written }) && !tellsOfAnother(wanted, { origin, restore }),
    removed: lost !== undefined && marks.length === 0,
    others: marked.find((mark) => mark.stage === "writing" && !isOurs(mark)),
    ...{ ...told, phase },
  };
}

/** Whether an image was begun to be written, and the volume holds neither that nor what a snapshot held. */
function isHalf({ phase, written }: Pick<Observed, "phase" | "written">): boolean {
  return written.length > 0 && !["merging", "restored", "unmarked"].includes(phase);
}

function wasCut(phase: Observed["phase"]): boolean {
  return phase === "pending" || phase === "uncertain";
}

/** Whether a restore was begun, and has not changed the volume. */
function isOnlyBegun(seen: Pick<Observed, "phase" | "restore" | "written">): boolean {
  const isChecking = seen.phase === "restoring" && seen.restore.stage === "begun";
  return (wasCut(seen.phase) || isChecking) && !isHalf(seen);
}

function hasEnded(told: Inputs | State): told is State {
  return "state" in told && (told.state === "restored" || told.state === "unmarked");
}

/** Whether the state tells of a restore of this very volume that has ended. */
function tellsOfEnd(told: Inputs | State, { uuid }: LogicalVolume): told is State {
  return hasEnded(told) && told.originUuid === uuid;
}

/** Whether the state tells of an image of which something was written to this very volume, and not all. */
function tellsOfWriting(told: Inputs | State, { uuid }: LogicalVolume): told is State {
  const isImage = "state" in told && told.state === "restoring" && told.restoredImage !== "";
  return isImage && told.originUuid === uuid;
}

/** Whether the state tells of a merge into this very volume that cannot have ended, or of which nobody knows. */
function tellsOfFailure(told: Inputs | State, { uuid }: LogicalVolume): told is State {
  return "state" in told && told.state === "failed" && told.originUuid === uuid;
}

/** Whether the state tells of a merge into this very volume that was under way, or waited. */
function tellsOfMerge(told: Inputs | State, { uuid }: LogicalVolume): told is State {
  const isMerge = "state" in told && (told.state === "merging" || told.state === "scheduled");
  return isMerge && told.originUuid === uuid;
}

/** Whether the state tells of another restore of this volume, than the one that was begun: one that has ended or failed, or of a merge. */
function tellsOfAnother(
  told: Inputs | State,
  { origin, restore }: Pick<Observed, "origin" | "restore">,
): told is State {
  const isUnended = tellsOfFailure(told, origin) || tellsOfMerge(told, origin);
  return tellsOfEnd(told, origin) || (isUnended && !isOfState(restore, told));
}

/** Whether that mark is of the very restore of which the state tells: an image's keeps the life of what was restored before it. */
function isOfState({ life, startedAt }: RestoreMark, state: State): boolean {
  return state.restoreId === life && state.startedAt === time(startedAt);
}

/**
 * The mark that an origin should have that was restored, is half-written, or is merged into or was to be, and has not: somebody removed
 * tags, or brought back older metadata of LVM's (vgcfgrestore(8)). What was written to a restored volume since is not given up for that.
 */
function lostMark(
  state: State,
  { origin, ended, job }: Pick<Observed, "origin" | "ended" | "job">,
  marks: readonly RestoreMark[],
): RestoreMark | undefined {
  const isWritten = tellsOfWriting(state, origin);
  const isMerge = tellsOfFailure(state, origin) || tellsOfMerge(state, origin);
  // A merge that may go on is none of before.
  const isAfter = (mark: RestoreMark) =>
    isOfSince(mark, state) || (isMerge && !isUnfinishedImage(mark) && !ended.includes(mark));
  if (isWritten || isMerge ? marks.some(isAfter) : !tellsOfEnd(state, origin)) return undefined;
  const told: Omit<RestoreMark, "tag"> = {
    ...{ generation: state.generation || restoreGeneration(state.triggers), life: state.restoreId },
    stage: isWritten ? "writing" : isMerge ? "merging" : "restored",
    ...{ startedAt: secondsOf(state), seconds: state.seconds, thinId: 0 },
    ...{ source: state.restoredImage || state.restoredSnapshot, owner: ownerInTag(state.owner) },
  };
  const lost = { ...told, tag: restoreTagOf(told) };
  if (isWritten || isMerge) return lost;
  // One that nobody goes on with has written nothing; an earlier stage of this very restore is older than the state. Any other that
  // began to write has taken the place of the state's own, whatever the host's clock said then.
  const isOlder = (mark: RestoreMark) =>
    !isMarkOf(job, mark) &&
    (isOfEarlier(mark, told, ended) ||
      (isUnfinishedImage(mark) &&
        (mark.stage === "begun" ||
          restoreTagOf({ ...told, owner: mark.owner, stage: mark.stage }) === mark.tag)));
  return marks.every(isOlder) ? lost : undefined;
}

/**
 * Whether a mark is of a restore that has put right, or will, what the one that the state tells of has not ended: of that itself, or of
 * a later one. One with an earlier time, though for the same triggers, may be of before: that the host's clock had gone back is not known.
 */
function isOfSince(mark: RestoreMark, state: State): boolean {
  return mark.stage === "writing" || (mark.startedAt >= secondsOf(state) && mark.stage !== "begun");
}

/** The mark of another resource's restore that was begun later than this one, and has ended. */
function laterOfOthers(
  all: readonly RestoreMark[],
  { startedAt }: RestoreMark,
  isOurs: (mark: RestoreMark) => boolean,
): RestoreMark | undefined {
  return all.find((mark) => mark.stage === "restored" && mark.startedAt > startedAt && !isOurs(mark));
}

/** What became of a volume that was left half-written. */
function healedPhrase({ origin, restore }: Observed, healed: RestoreMark): string {
  return `by Pulumi's state a restore of ${pathOf(origin)} broke off that was begun at ${time(restore.startedAt)}; ${ownerOfRestore(healed)} has restored it at ${time(healed.startedAt)}`;
}

function secondsOf({ startedAt }: State): number {
  return Date.parse(startedAt) / 1000;
}

/** Of an earlier restore of the same resource, which has ended: another may be merging now, or has left the volume half-written. */
function isOfEarlier(
  mark: RestoreMark,
  { startedAt }: Pick<RestoreMark, "startedAt">,
  ended: readonly RestoreMark[],
): boolean {
  return mark.startedAt < startedAt && ended.some(({ tag }) => tag === mark.tag);
}

/** Marks on the origin of this resource's restores. */
function ownMarks(
  { origin, restore }: Pick<Observed, "origin" | "restore">,
  { owner }: Pick<Inputs, "owner">,
): RestoreMark[] {
  return restoreMarksAmong(origin.tags).filter(
    (mark) => mark.life === restore.life || isRestoreOf(mark, owner),
  );
}

/** Those of restores from images that did not come to their end, and of those before this one. */
function isOutdated({ restore, ended }: Pick<Observed, "restore" | "ended">): (mark: RestoreMark) => boolean {
  return (mark) => isUnfinishedImage(mark) || isOfEarlier(mark, restore, ended);
}

function isUnfinishedImage(mark: RestoreMark): boolean {
  return mark.stage !== "restored" && imageOfRestore(mark) !== undefined;
}

/**
 * While nothing of an image is written, the mark of an earlier restore stays beside its own: that one counts, unless a job is
 * about to write, or something was written.
 */
function markThatCounts(
  marks: readonly RestoreMark[],
  life: string | undefined,
  job: RunningRestore | undefined,
  isMerged: (mark: RestoreMark, writing: RestoreMark) => boolean,
): RestoreMark | undefined {
  const others = marks.filter((mark) => !isUnfinishedImage(mark));
  const writing = marks.find(({ stage }) => stage === "writing");
  return (
    marks.find((mark) => isMarkOf(job, mark)) ??
    (writing && others.find((mark) => isMerged(mark, writing))) ??
    writing ??
    others.find((mark) => mark.life === life) ??
    others[0] ??
    marks[0]
  );
}

function phaseOf({
  restore,
  snapshot,
  origin,
  ended,
  job,
}: Pick<Observed, "restore" | "snapshot" | "origin" | "ended" | "job">): Observed["phase"] {
  const { stage } = restore;
  if (stage === "restored") return "restored";
  if (job !== undefined) return "restoring";
  if (imageOfRestore(restore) !== undefined) return stage === "writing" ? "halfWritten" : "pending";
  if (snapshot === undefined && stage === "begun") return "uncertain";
  if (snapshot === undefined) return ended.includes(restore) ? "restored" : "withdrawn";
  return snapshot.merging ? mergePhase(snapshot, origin) : "pending";
}

/**
 * Where only the state tells of the mark. A merge that LVM does not do any more may have been begun, and the volume been used since,
 * before somebody undid it: it is not begun anew.
 */
async function phaseOfLost(
  told: Parameters<typeof phaseOf>[0],
  isMerged: () => Promise<boolean>,
): Promise<Observed["phase"]> {
  const phase = phaseOf(told);
  if (phase === "restored") return "unmarked";
  if (told.restore.stage !== "merging") return phase;
  // Another one of this resource that has ended may have come after it, where the host's clock had gone back.
  if (phase === "withdrawn") return told.ended.length === 0 && (await isMerged()) ? "unmarked" : phase;
  return phase === "pending" ? "withdrawn" : phase;
}

/** What is merged into what. */
interface Pair {
  readonly origin: LogicalVolume;
  readonly snapshot: LogicalVolume;
}

/** Finds the two, and everything for which they must not or cannot be merged, before anything is touched. */
async function suitable(context: Context, wanted: FromSnapshot, life: string | undefined): Promise<Pair> {
  const all = await volumes(context);
  const origin = await requireOrigin(context, wanted, all);
  const group = all.filter((lv) => lv.volumeGroup === wanted.volumeGroup && lv.kind !== "internal");
  const snapshot = requireSnapshot(context, wanted, group, origin);
  refuseSuspended(context, [origin, snapshot]);
  refuseRanFull(context, group, origin);
  refuseMerging(context, wanted, { origin, snapshot });
  const isOurs = (mark: RestoreMark) => mark.life === life || isRestoreOf(mark, wanted.owner);
  refuseDone(context, wanted, all, { origin, isOurs });
  await refuseWritten(context, origin, isOurs);
  refuseUnmergeable(context, group, { origin, snapshot });
  refuseOverflows(context, group, { origin, snapshot });
  warnOfOthers(context, wanted, group, { origin, snapshot });
  return { origin, snapshot };
}

function requireSnapshot(
  context: Context,
  wanted: FromSnapshot,
  group: readonly LogicalVolume[],
  origin: LogicalVolume,
): LogicalVolume {
  const found = group.find((lv) => lv.uuid === wanted.snapshot.uuid);
  if (found === undefined) {
    const path = `${wanted.volumeGroup}/${wanted.snapshot.name}`;
    const other = named(group, wanted.volumeGroup, wanted.snapshot.name);
    if (other !== undefined) {
      throw refusal(
        context,
        "IDENTITY_MISMATCH",
        `snapshot.uuid: ${path} has the UUID ${other.uuid}, not ${wanted.snapshot.uuid}: it is another snapshot`,
        "Nothing was touched. Give the `uuid` of the snapshot that is meant; the one declared is gone.",
      );
    }
    const own = group.filter((lv) => lv.origin === origin.name && lv.originUuid === origin.uuid);
    throw refusal(
      context,
      "SNAPSHOT_NOT_FOUND",
      `snapshot: there is no ${path} (${wanted.snapshot.uuid}); snapshots of ${origin.name} are: ${listed(own.map((lv) => lv.name))}`,
    );
  }
  if (found.originUuid !== origin.uuid) {
    const of = found.origin === undefined ? "no snapshot" : `a snapshot of "${found.origin}"`;
    throw refusal(
      context,
      "IDENTITY_MISMATCH",
      `snapshot: ${pathOf(found)} is ${of}, not of "${origin.name}"`,
      "Nothing was touched. Name the `origin` of the snapshot, or another snapshot.",
    );
  }
  return found;
}

function refuseMerging(context: Context, wanted: Inputs, { origin, snapshot }: Pair): void {
  const isOrigin = origin.attr[0] === "O";
  if (!isOrigin && !snapshot.merging) return;
  const marks = restoreMarksAmong(origin.tags).filter(({ stage }) => stage !== "restored");
  const own = marks.find((mark) => mark.source === snapshot.uuid);
  if (snapshot.merging && own === undefined && wanted.adopt) return;
  const by = snapshot.merging ? own : marks[0];
  throw refusal(
    context,
    "SNAPSHOT_MERGING",
    `${snapshot.merging ? pathOf(snapshot) : "another snapshot"} is being merged into ${pathOf(origin)} already, by ${by === undefined ? "somebody" : ownerOfRestore(by)}`,
    snapshot.merging && by === undefined
      ? "Wait until that has ended: it does what is declared here. Or set `adopt: true` to follow it."
      : "Run again when that has ended.",
  );
}

/**
 * A resource that was renamed does not restore again. The snapshot tells nothing of that: an LvSnapshot takes a new one after its
 * merge.
 */
function refuseDone(
  context: Context,
  { owner, triggers }: Inputs,
  all: readonly LogicalVolume[],
  { origin, isOurs }: { readonly origin: LogicalVolume; readonly isOurs: (mark: RestoreMark) => boolean },
): void {
  const hasEnded = ({ stage, source }: RestoreMark) =>
    stage === "restored" || (stage === "merging" && all.every(({ uuid }) => uuid !== source));
  const done = restoreMarksAmong(origin.tags).find(
    (mark) =>
      mark.generation === restoreGeneration(triggers) &&
      !isOurs(mark) &&
      stackOf(ownerOfRestore(mark)) === stackOf(owner) &&
      hasEnded(mark),
  );
  if (done === undefined) return;
  throw refusal(
    context,
    "FOREIGN_RESOURCE",
    `${pathOf(origin)} was restored for these \`triggers\` already, by ${ownerOfRestore(done)}`,
    "Nothing was touched. If that is this resource under a former name, give it the `aliases` of that name. To restore once more, give it other `triggers`.",
  );
}

/** Another one's image may be written onto the origin, or about to be. */
async function refuseWritten(
  context: Context,
  origin: LogicalVolume,
  isOurs: (mark: RestoreMark) => boolean,
): Promise<void> {
  const others = restoreMarksAmong(origin.tags).filter((mark) => isUnfinishedImage(mark) && !isOurs(mark));
  refuseHalfWritten(
    context,
    origin,
    others.find(({ stage }) => stage === "writing"),
  );
  if (others.length === 0) return;
  const job = await runningRestore(context, origin);
  refuseOthers(
    context,
    origin,
    others.find((mark) => isMarkOf(job, mark)),
  );
}

function refuseUnmergeable(
  context: Context,
  all: readonly LogicalVolume[],
  { origin, snapshot }: Pair,
): void {
  const path = pathOf(snapshot);
  if (snapshot.kind === "cow") {
    if (snapshot.invalid) {
      throw refusal(
        context,
        "SNAPSHOT_OVERFLOWED",
        `${path} ran full: its content is lost, and nothing can be restored from it`,
        "Restore from another snapshot or from a backup.",
      );
    }
    if (!snapshot.active) {
      throw refusal(
        context,
        "SNAPSHOT_INACTIVE",
        `${path} is not active, so LVM cannot tell whether it is valid`,
        `Activate ${pathOf(origin)} with \`lvchange -ay ${pathOf(origin)}\` on the host, and run again. Nothing was changed.`,
      );
    }
    return;
  }
  const stored = all.filter(
    (lv) => lv.kind === "cow" && [origin.uuid, snapshot.uuid].includes(lv.originUuid ?? ""),
  );
  if (stored.length > 0) {
    throw refusal(
      context,
      "ORIGIN_UNSUITABLE",
      `LVM cannot merge the thin snapshot ${path}: it or its origin has the COW snapshots ${listed(stored.map((lv) => lv.name))}`,
      "Remove those, and run again.",
    );
  }
  const pool = named(all, snapshot.volumeGroup, snapshot.pool ?? "");
  // A pool without room for data merges all the same, and has room again then.
  const readable = pool !== undefined && (pool.health === "" || pool.health === "out_of_data");
  if (readable && (pool.metadataPercent ?? 0) < 100) return;
  throw refusal(
    context,
    "NO_SPACE",
    `the thin pool ${snapshot.pool} takes no changes: ${pool?.health || "its metadata is full"}`,
    `Extend or repair it (\`lvextend --poolmetadatasize\`, \`lvconvert --repair ${snapshot.volumeGroup}/${snapshot.pool}\`), and run again.`,
  );
}

/** The merge writes to the origin, and so into the stores of its other COW snapshots. */
function refuseOverflows(context: Context, all: readonly LogicalVolume[], { origin, snapshot }: Pair): void {
  const filling = fillingSnapshots(all, snapshot, origin);
  if (filling.length === 0) return;
  const phrase = filling.map((lv) => `"${lv.name}" (${bytesPhrase(lv.freeBytes)} free)`).join(", ");
  const writes = `the merge writes ${bytesPhrase(leftBytes(snapshot))} to ${pathOf(origin)}`;
  if (!filling.some(({ overflows }) => overflows)) {
    context.warn(`${writes}, which may overflow other snapshots of it: ${phrase}`);
    return;
  }
  throw refusal(
    context,
    "RESTORE_OVERFLOWS",
    `${writes}, which overflows other snapshots of it: ${phrase}`,
    `Extend them (\`lvextend -L +${Math.ceil(leftBytes(snapshot) / 1024 ** 2)}M ${snapshot.volumeGroup}/NAME\`), or remove them, and run again.`,
  );
}

function stackOf(owner: string): string {
  return owner.split("/").slice(0, 3).join("/");
}

function warnOfOthers(
  context: Context,
  { owner }: Inputs,
  all: readonly LogicalVolume[],
  { origin, snapshot }: Pair,
): void {
  const mark = markAmong(snapshot.tags);
  if (mark !== undefined && stackOf(ownerOfMark(mark)) !== stackOf(owner))
    context.warn(`the snapshot ${snapshot.name} belongs to ${ownerOfMark(mark)}, which will find it gone`);
  if (snapshot.kind === "cow") return;
  const siblings = all.filter(
    (lv) => lv.kind === "thin" && lv.originUuid === origin.uuid && lv.uuid !== snapshot.uuid,
  );
  if (siblings.length > 0) {
    context.warn(
      `the thin snapshots ${listed(siblings.map((lv) => lv.name))} keep their content, but LVM will no longer show that they are of ${origin.name}`,
    );
  }
  if (snapshot.sizeBytes !== origin.sizeBytes)
    context.warn(
      `${pathOf(origin)} will have the snapshot's size, ${snapshot.sizeBytes} bytes instead of ${origin.sizeBytes}`,
    );
}

/** What is restored; `validate` has seen that it is one of both. */
function fromSnapshot(wanted: Inputs): wanted is FromSnapshot {
  return wanted.snapshot !== undefined;
}

function withImage(wanted: Inputs): ImageWanted {
  const { image, overwrite, ...rest } = wanted;
  if (image !== undefined && overwrite !== undefined) return { ...rest, image, overwrite };
  const property = image === undefined ? "snapshot" : "overwrite";
  throw new LvmNbdError("INVALID_INPUT", { message: `${property}: is required`, property });
}

/** Restores. `seen`: what its own mark takes the place of; `old`: the state, if there is one. */
async function restore(context: Context, wanted: Inputs, seen?: Observed, old?: State): Promise<void> {
  const begin = () => {
    if (fromSnapshot(wanted)) return merge(context, wanted, seen?.restore);
    const life = old === undefined ? newLife() : (seen?.restore.life ?? newLife());
    return restoreImage(context, withImage(wanted), life);
  };
  if (seen?.job === undefined && seen?.phase !== "halfWritten") return begin();
  const { origin, restore: earlier, job } = seen;
  // While nothing is written there is nothing to lose by ending it.
  if (job !== undefined && earlier.stage === "writing") {
    try {
      await possible({ ...context, warn: () => undefined }, wanted, seen);
    } catch (error) {
      throw isLvmNbdError(error) ? goingOn(origin, error) : error;
    }
  }
  await endJob(context, seen);
  try {
    await begin();
  } catch (error) {
    throw isLvmNbdError(error) ? await sayingHalfWritten(context, origin, error) : error;
  }
}

/** Raises what can be known to be wrong with the declaration while an earlier job writes the volume. */
async function possible(
  context: Context,
  wanted: Inputs,
  { origin, restore: earlier }: Observed,
): Promise<void> {
  if (fromSnapshot(wanted)) await suitable(context, wanted, earlier.life);
  else await requireRestorable(context, withImage(wanted), origin);
}

/**
 * Puts the mark of an image that was written back, which keeps others from using the volume. Not where somebody has it open, or nothing can
 * be restored: it may have been put right by hand.
 */
async function markHalfWritten(context: Context, wanted: Inputs, seen: Observed): Promise<void> {
  const { origin, restore: lost, job } = seen;
  if (job === undefined) {
    try {
      await possible({ ...context, warn: () => undefined }, wanted, seen);
      await refuseOpen(
        context,
        [origin],
        "Shut the VM down, unmount the volume, remove its export, and run again.",
      );
    } catch (error) {
      if (!isLvmNbdError(error)) throw error;
      const { message, advice } = error.details;
      throw new LvmNbdError(error.code, {
        ...error.details,
        message: `${message}; by Pulumi's state ${halfWritten(origin)}`,
        advice: `${advice ?? errorCodes[error.code]} ${rightAdvice(seen)}`,
      });
    }
  }
  await mark(context, origin, lost.tag, []);
}

/** What to do where a volume whose mark is lost is half-written no more. */
function rightAdvice(seen: Observed): string {
  return `If its content was put right since, ${cameLast(seen, seen.restore)} says so.`;
}

/** The command that says which of several restores came last: by its mark alone. */
function cameLast(
  { restore, origin, written, ended }: Pick<Observed, "restore" | "origin" | "written" | "ended">,
  last: RestoreMark,
): string {
  // With a time before that of the one which the state tells of it would be of before.
  const startedAt = last === restore ? last.startedAt : Math.max(last.startedAt, restore.startedAt + 1);
  const done = restoreTagOf({ ...last, stage: "restored", startedAt });
  const others = [restore.tag, ...written, ...ended.map(({ tag }) => tag)].filter((tag) =>
    origin.tags.includes(tag),
  );
  const drop = [...new Set(others)].map((tag) => `--deltag '${tag}' `).join("");
  return `\`lvchange ${drop}--addtag '${done}' ${pathOf(origin)}\``;
}

/**
 * Raises RESTORE_UNCERTAIN where a volume that is half-written, or was merged into, by the state alone was restored for the wanted triggers
 * by an earlier mark: that may be of before, or of after, where the host's clock had gone back.
 */
function refuseRestored(context: Context, { triggers }: Inputs, seen: Observed): void {
  const { origin, restore: lost, ended, job } = seen;
  const done = ended.find(({ generation }) => generation === restoreGeneration(triggers));
  if (done === undefined || job !== undefined) return;
  const what =
    lost.stage === "writing" ? halfWritten(origin) : `a snapshot was merged into ${pathOf(origin)}`;
  throw refusal(
    context,
    "RESTORE_UNCERTAIN",
    `by Pulumi's state ${what} by a restore that was begun at ${time(lost.startedAt)}, by its mark it was restored for these \`triggers\` at ${time(done.startedAt)}: which of both came last the host's clock does not tell for sure`,
    `Nothing was touched. Look at the content of ${pathOf(origin)}. ${rightAdvice(seen)} If it is that of ${time(done.startedAt)}: ${cameLast(seen, done)}, then run again. Else change \`triggers\`: that restores it. ${leaving}`,
  );
}

/** Ends a job that writes another image than is declared now, or for earlier triggers. */
async function endJob(context: Context, seen: Observed | undefined): Promise<void> {
  if (seen?.job === undefined) return;
  context.progress(`ending an earlier restore of ${pathOf(seen.origin)}`);
  await endImageRestore(context, seen.origin, seen.job.recordDigest, [seen.job.begun]);
}

/** Merges; `earlier`: the mark that its own takes the place of. */
async function merge(
  context: Context,
  wanted: FromSnapshot,
  earlier: RestoreMark | undefined,
): Promise<void> {
  const pair = await suitable(context, wanted, earlier?.life);
  const { origin, snapshot } = pair;
  const told = {
    generation: restoreGeneration(wanted.triggers),
    life: newLife(),
    source: snapshot.uuid,
    owner: ownerInTag(wanted.owner),
  };
  const own = restoreMarksAmong(origin.tags).filter(
    (mark) => mark.life === earlier?.life || isRestoreOf(mark, wanted.owner),
  );
  const old = own.map(({ tag }) => tag);
  if (snapshot.merging) {
    // Somebody else's merge, adopted.
    const startedAt = await hostSeconds(context);
    await mark(
      context,
      origin,
      restoreTagOf({ ...told, stage: "merging", startedAt, seconds: 0, thinId: 0 }),
      own.filter(({ stage }) => stage !== "writing").map(({ tag }) => tag),
    );
    return follow(context, wanted);
  }
  if (wanted.whenOpen === "refuse") {
    await refuseOpen(
      context,
      [origin, snapshot],
      'Nothing was touched. Shut the VM down, unmount the volume, remove its export, and run again. Or set `whenOpen: "atNextActivation"`.',
    );
  }
  context.progress(`merging the snapshot ${pathOf(snapshot)} into ${pathOf(origin)}`);
  const { head, tail } = restoreTagParts(told);
  const command: RemoteCommand = {
    kind: "change",
    argv: script(
      beginMergeScript,
      ...[origin.volumeGroup, origin.name, origin.uuid, snapshot.name, snapshot.uuid],
      ...[head, tail, onlyTag(told.life), ...old],
    ),
    // It waits for its own lock first, and runs five LVM commands.
    deadlineSeconds: 3 * changeSeconds,
    graceSeconds: changeSeconds,
  };
  const result = await serially(context.host, origin.volumeGroup, () =>
    context.host.run(command, context.signal),
  );
  if (result.exitCode === changedMeanwhile) {
    const what = `${pathOf(snapshot)} was removed, or its merge begun, by somebody else in the meantime`;
    throw new ChangedMeanwhile(failure(context, command, result, what, "SNAPSHOT_MERGING"));
  }
  if (result.exitCode !== 0) {
    const what = `${pathOf(snapshot)} could not be merged into ${pathOf(origin)}`;
    throw failure(context, command, result, what, lvmFailure(result.stderr) ?? "COMMAND_FAILED");
  }
  return follow(context, wanted);
}

/** By which LVM is told which snapshot to merge. */
function onlyTag(life: string): string {
  return `${tagPrefix}restoring=${life}`;
}

async function hostSeconds(context: Context): Promise<number> {
  const command: RemoteCommand = { argv: clockCommand(), kind: "read", deadlineSeconds: 30 };
  return Number((await succeed(context, command, "the host's clock could not be read")).stdout);
}

async function mark(
  context: Context,
  origin: LogicalVolume,
  tag: string | undefined,
  old: readonly string[],
): Promise<void> {
  await changeVolume(
    context,
    origin.volumeGroup,
    tagCommand(origin, tag === undefined ? [] : [tag], old),
    `the mark of the restore on ${pathOf(origin)} could not be changed`,
  );
}

const pollSeconds = { first: 0.2, most: 2 };
/** After so long without a change a merge hangs. */
const stallSeconds = 300;
/** LVM's daemon looks every 15 s whether a merge has ended, and this long after that it cannot be running. */
const pollerSeconds = 30;
const theMerge = "the merge";

/** Waits for the end of a merge that was begun, as long as it makes progress, and marks it. */
async function follow(context: Context, wanted: Inputs): Promise<void> {
  let first: MergeSample | undefined;
  let moved = performance.now();
  let [last, polled] = [-1, moved];
  let refreshed = false;
  try {
    for (let wait = pollSeconds.first; ; wait = Math.min(wait * 2, pollSeconds.most)) {
      const asked = performance.now();
      const seen = await lookPatiently(context, theMerge, () =>
        observe(context, wanted, { isFollowed: true }),
      );
      // While the host does not answer nobody knows whether it goes on.
      moved += performance.now() - asked;
      if (seen?.phase === "restored") return await end(context, seen);
      if (seen?.phase === "withdrawn") throw uncertain(context, seen);
      if (seen?.snapshot === undefined || seen.halfMade) throw vanished(context, wanted);
      const pair = { origin: seen.origin, snapshot: seen.snapshot };
      if (seen.phase === "overflowed") throw overflowed(context, pair);
      if (seen.phase === "scheduled") {
        if (refreshed || !(await beginsNow(context, pair))) {
          if (isHalf(seen)) context.warn(halfPhrase(seen));
          return;
        }
        refreshed = true;
        continue;
      }
      if (seen.written.length > 0) await mark(context, seen.origin, undefined, seen.written);
      if (seen.origin.mergeFailed) throw failed(context, pair);
      const now = { at: performance.now() / 1000, leftBytes: leftBytes(seen.snapshot) };
      first ??= now;
      context.progress(
        `merging ${pathOf(seen.snapshot)} into ${pathOf(seen.origin)}: ${mergePhrase(first, now)}`,
      );
      if (now.leftBytes !== last) [last, moved] = [now.leftBytes, performance.now()];
      const still = (performance.now() - moved) / 1000;
      if (still > stallSeconds) throw stalled(context, pair);
      if (now.leftBytes === 0 && still > pollerSeconds && performance.now() - polled > pollerSeconds * 1000) {
        const what = `LVM could not be told to end the merge into ${pathOf(seen.origin)}`;
        await changeVolume(context, seen.origin.volumeGroup, pollCommand(seen.origin), what);
        polled = performance.now();
      }
      await pause(context, wait, `${theMerge} was followed`);
    }
  } catch (error) {
    if (!isLvmNbdError(error, "CANCELLED")) throw error;
    throw new LvmNbdError("CANCELLED", {
      ...error.details,
      message: `cancelled while the merge into ${wanted.volumeGroup}/${wanted.origin} was followed: the merge itself goes on`,
      advice: "A merge cannot be taken back half-way. The next `pulumi up` follows it to its end.",
    });
  }
}

function vanished(context: Context, { volumeGroup, origin }: Inputs): ChangedMeanwhile {
  const what = `somebody else removed the mark of the restore from ${volumeGroup}/${origin}, or undid the merge`;
  return new ChangedMeanwhile(refusal(context, "IDENTITY_MISMATCH", what));
}

/** What to do about a snapshot that ran full while its merge waited. */
function overflowAdvice({ snapshot }: Pair): string {
  return `${ranFullAdvice(snapshot)}, and change \`triggers\` to restore from another snapshot or from a backup. ${leaving}`;
}

function overflowed(context: Context, pair: Pair): LvmNbdError {
  const what = ranFullPhrase(pair.snapshot, pair.origin);
  return refusal(context, "SNAPSHOT_OVERFLOWED", what, overflowAdvice(pair));
}

function failed(context: Context, { origin, snapshot }: Pair): LvmNbdError {
  return refusal(
    context,
    "RESTORE_FAILED",
    `the kernel gave up merging ${pathOf(snapshot)} into ${pathOf(origin)}`,
    `Look at \`dmesg\` on the host: a disk that cannot be read or written is the usual reason. Put that right, then deactivate and activate ${pathOf(origin)}: the merge goes on from where it was. Until then use nothing of it.`,
  );
}

function stalled(context: Context, { origin, snapshot }: Pair): LvmNbdError {
  const device = `${origin.volumeGroup.replaceAll("-", "--")}-${origin.name.replaceAll("-", "--")}`;
  return refusal(
    context,
    "RESTORE_STALLED",
    `merging ${pathOf(snapshot)} into ${pathOf(origin)} has made no progress for ${stallSeconds} s`,
    `Look at \`dmsetup status ${device}\`, \`lvs -a -o +lv_merging,lv_merge_failed ${origin.volumeGroup}\` and \`dmesg\` on the host. If all is merged already, \`lvchange --poll y ${pathOf(origin)}\` ends it. The next \`pulumi up\` follows it on.`,
  );
}

/** Begins a merge that waits, where neither volume is open any more. False: it waits on, and that was told. */
async function beginsNow(context: Context, { origin, snapshot }: Pair): Promise<boolean> {
  const holders = origin.active ? await holdersOf(context, origin) : [];
  if (snapshot.active && snapshot.open === true) holders.push(`the snapshot ${snapshot.name} is open itself`);
  if (origin.active && holders.length === 0) {
    const what = `the merge into ${pathOf(origin)} could not be begun`;
    await changeVolume(context, origin.volumeGroup, refreshCommand(origin), what);
    return true;
  }
  const now = origin.active ? `is open: ${holders.join(", ")}` : "is not active";
  context.warn(
    `the merge is scheduled and has not begun: ${pathOf(origin)} ${now}. It begins when the origin is next activated, e.g. at a reboot, ` +
      `or after the VM was shut down by \`lvchange -an ${pathOf(origin)}\` and \`lvchange -ay ${pathOf(origin)}\`, or by \`pulumi up\`. ` +
      "What is written to the origin until then will be lost",
  );
  return false;
}

/** Marks that a restore has ended, and removes the mark of an image that was written before. */
async function end(context: Context, { restore, origin, written }: Observed): Promise<void> {
  if (restore.stage === "restored") {
    if (written.length > 0) await mark(context, origin, undefined, written);
    return;
  }
  const { head, tail } = restoreTagParts(restore);
  const argv = script(
    endMergeScript,
    ...[origin.volumeGroup, origin.name, origin.uuid, restore.tag],
    ...[String(restore.startedAt), head, tail, ...written],
  );
  await serially(context.host, origin.volumeGroup, () =>
    succeed(
      context,
      { ...changing, argv },
      `the restore of ${pathOf(origin)} could not be marked as ended`,
      (result) => lvmFailure(result.stderr),
    ),
  );
}

/** False where only the state tells of the mark. */
function isMarked({ restore, origin }: Observed): boolean {
  return origin.tags.includes(restore.tag);
}

function isStale({ restore }: Observed, { triggers }: Inputs): boolean {
  return restore.generation !== restoreGeneration(triggers);
}

/**
 * What is in force for the wanted triggers: a restore for them that has ended, also where the host's clock, which had gone back,
 * has it begin before the one that the state tells of.
 */
function inForce(seen: Observed, wanted: Inputs, old: State | undefined): Observed {
  const { phase, restore } = seen;
  // A merge that ended while nobody looked, and whose mark is lost, has that put back.
  if (phase !== "restored" && (phase !== "unmarked" || restore.stage !== "restored")) return seen;
  // Nobody asks for another, and somebody may have said that it came last.
  if (isDeclaredStill(old, wanted) && isOfState(restore, old)) return seen;
  const done = seen.ended.find(({ generation }) => generation === restoreGeneration(wanted.triggers));
  if (done === undefined || restore.generation === done.generation) return seen;
  return { ...seen, restore: done, snapshot: undefined, phase: "restored" };
}

/** Whether nobody asks for another restore than the state tells of. */
function isDeclaredStill(old: State | undefined, { triggers }: Inputs): old is State {
  return old !== undefined && restoreGeneration(old.triggers) === restoreGeneration(triggers);
}

/**
 * Whether the state, whose triggers are declared still, tells of this very restore, which was made for others: an `up` for those was
 * cancelled, or looked at by a refresh.
 */
function isKnown(seen: Observed, wanted: Inputs, old: State | undefined): boolean {
  const { restore, phase } = seen;
  return (
    (phase === "restored" || phase === "unmarked") &&
    isDeclaredStill(old, wanted) &&
    isStale(seen, wanted) &&
    isOfState(restore, old)
  );
}

/** Whether another restore than the ended one of the state is asked for, by triggers for which it was made already. */
function isSpent(seen: Observed, wanted: Inputs, old: State | undefined): boolean {
  const isDone = seen.phase === "restored" || seen.phase === "unmarked";
  const isAsked = old !== undefined && hasEnded(old) && !isDeclaredStill(old, wanted);
  return isDone && isAsked && !isStale(seen, wanted);
}

async function converge(
  context: Context,
  wanted: Inputs,
  found: Observed,
  old: State | undefined,
): Promise<void> {
  const seen = inForce(found, wanted, old);
  const { origin, snapshot, phase } = seen;
  if (phase === "overflowed" && snapshot !== undefined) throw overflowed(context, { origin, snapshot });
  await refuseUnasked(context, wanted, seen, old);
  if (seen.restore.stage === "writing" && !isMarked(seen) && seen.healed === undefined) {
    refuseRestored(context, wanted, seen);
    await markHalfWritten(context, wanted, seen);
  }
  if (phase === "withdrawn" && !isMarked(seen) && isStale(seen, wanted))
    refuseRestored(context, wanted, seen);
  if (isKnown(seen, wanted, old)) {
    context.warn(
      `${pathOf(origin)} was restored at ${time(seen.restore.startedAt)} for other \`triggers\` than these, which nobody has changed since: it is not restored again. To restore once more, change \`triggers\`: neither to these nor to those`,
    );
  } else if (isSpent(seen, wanted, old)) {
    context.warn(
      `${pathOf(origin)} was restored for these \`triggers\` already, by the host's clock at ${time(seen.restore.startedAt)}: it is not restored again. Change \`triggers\` to restore once more`,
    );
  } else if (isStale(seen, wanted)) {
    if (phase === "restoring" && !isHalf(seen) && isDeclaredStill(old, wanted)) {
      // Its triggers were taken back before it wrote anything.
      await endJob(context, seen);
      const left = await observe(context, old);
      return left === undefined ? restore(context, wanted) : converge(context, wanted, left, old);
    }
    if (phase !== "merging" && phase !== "scheduled") return restore(context, wanted, seen, old);
    throw refusal(
      context,
      "SNAPSHOT_MERGING",
      `the restore of ${pathOf(origin)} for earlier \`triggers\` has not ended: it is ${phase}`,
    );
  }
  if (phase === "uncertain" && !(await wasMerged(context, seen))) throw uncertain(context, seen);
  if (phase === "withdrawn") throw uncertain(context, seen);
  if (phase === "pending" || phase === "halfWritten") return restore(context, wanted, seen, old);
  if (seen.job !== undefined) {
    const goesOn = seen.restore.source === wanted.image?.sha256 && origin.uuid === wanted.overwrite;
    if (!goesOn) return restore(context, wanted, seen, old);
    await restoreImage(context, withImage(wanted), seen.restore.life, { ...seen.job, origin });
    // Its mark has the name that the resource had when it began.
    const ended = await observe(context, old ?? wanted);
    if (ended?.phase === "restored") await takeOver(context, wanted, ended, old);
    return;
  }
  if (phase === "unmarked") context.progress(`putting the mark of the restore back on ${pathOf(origin)}`);
  const { source } = seen.restore;
  if (old === undefined && source !== (wanted.snapshot?.uuid ?? wanted.image?.sha256)) {
    const what = imageOfRestore(seen.restore) === undefined ? "snapshot" : "image";
    context.warn(
      `${pathOf(origin)} was restored for these \`triggers\` already, from the ${what} ${source}: it is not restored again. Change \`triggers\` to restore from ${wanted.snapshot?.name ?? "the declared image"}`,
    );
  }
  await takeOver(context, wanted, seen, old);
  await follow(context, wanted);
}

/** Found by a create, a restore is this resource's from now on, and no longer goes with an earlier one of its name. */
async function takeOver(
  context: Context,
  { owner }: Inputs,
  seen: Observed,
  old: State | undefined,
): Promise<void> {
  const { restore: found, origin, phase, ended } = seen;
  const life = old === undefined ? newLife() : found.life;
  const stage = found.stage === "begun" ? "merging" : found.stage;
  const right = restoreTagOf({ ...found, life, stage, owner: ownerInTag(owner) });
  if (phase === "unmarked") {
    const outdated = ownMarks(seen, old ?? { owner }).filter(isOutdated(seen));
    const tags = outdated.map(({ tag }) => tag);
    await mark(context, origin, right, tags);
  } else {
    // Beside one that is in force there may be others that ended.
    const tags = new Set([found, ...(phase === "restored" ? ended : [])].map(({ tag }) => tag));
    if (right === found.tag && tags.size === 1 && isMarked(seen)) return;
    tags.delete(right);
    await mark(context, origin, right, [...tags]);
  }
}

async function wasMerged(context: Context, { restore, origin }: Observed): Promise<boolean> {
  const argv = script(
    wasMergedScript,
    ...[origin.volumeGroup, origin.uuid, String(restore.thinId), onlyTag(restore.life)],
  );
  const command: RemoteCommand = { argv, kind: "read", deadlineSeconds: observeSeconds };
  const what = `what became of the snapshot of ${pathOf(origin)} could not be found out`;
  return (await succeed(context, command, what)).stdout.trim() === "merged";
}

/** Whether the state tells that the snapshot of that mark was not merged, or that nobody knows. */
function isFailed(told: Inputs | State, { life }: RestoreMark): boolean {
  return "state" in told && told.state === "failed" && told.restoreId === life;
}

/** Whether the state tells that the merge of that mark had not begun. */
function isWaiting(told: Inputs | State, { life }: RestoreMark): boolean {
  return "state" in told && told.state === "scheduled" && told.restoreId === life;
}

/** Whether the state tells that the kernel gave the merge of that mark up half-way. */
function wasGivenUp(told: Inputs | State, { life }: RestoreMark): boolean {
  return "mergeFailed" in told && told.mergeFailed && told.restoreId === life;
}

/**
 * Whether the merge of that mark, whose snapshot is gone, has ended. Where LVM's archive does not tell, it has unless that is
 * `doubtful`: one that only waited or was given up may have been removed, and an origin that is half-written must not be called
 * restored for that.
 */
async function hasMerged(
  context: Context,
  origin: LogicalVolume,
  { source }: RestoreMark,
  doubtful: boolean,
): Promise<boolean> {
  const argv = script(snapshotFateScript, origin.volumeGroup, source);
  const command: RemoteCommand = { argv, kind: "read", deadlineSeconds: observeSeconds };
  const what = `what became of the snapshot of ${pathOf(origin)} could not be found out`;
  const fate = (await succeed(context, command, what)).stdout.trim();
  return fate === "ended" || (fate !== "removed" && !doubtful);
}

/** How it came that nobody knows whether a snapshot was merged. */
function wasLost(seen: Observed): string {
  const { phase, restore, origin, snapshot, ended } = seen;
  const [other] = isMarked(seen) ? [] : ended;
  if (snapshot !== undefined)
    return `the mark of the restore of ${pathOf(origin)} was removed, and ${pathOf(snapshot)} is not being merged any more: how much of it was merged before cannot be told`;
  if (other !== undefined)
    return `the merge of the restore of ${pathOf(origin)} that was begun at ${time(restore.startedAt)} was not seen to have ended, and its mark was removed; by another one the volume was restored at ${time(other.startedAt)}: which of both came last cannot be told`;
  return phase === "withdrawn"
    ? `the snapshot of the restore of ${pathOf(origin)} was removed, or may have been, before its merge was seen to have ended: how much of it was merged cannot be told`
    : `a restore of ${pathOf(origin)} was cut off in the moment in which it began, and its snapshot is gone since: whether it was merged or removed cannot be told`;
}

/** What is to be known of a volume that is half-written. */
function halfPhrase({ phase, origin }: Observed): string {
  const use = ". Use nothing of it";
  const more: Partial<Record<Observed["phase"], string>> = {
    halfWritten: `, and nobody goes on with it${use}; \`pulumi up\` does`,
    restoring: `${use}; another try is at its check`,
    scheduled: `${use} before the merge has begun`,
    uncertain: ", unless the snapshot was merged",
    withdrawn: ", unless the snapshot was merged",
  };
  return `${halfWritten(origin)}${more[phase] ?? use}`;
}

/** `isNew`: there is no state, and other `triggers` are declared than the mark's. */
function uncertain(context: Context, seen: Observed, isNew = false): LvmNbdError {
  const { restore, origin, snapshot, phase } = seen;
  const { tag } = restore;
  const path = pathOf(origin);
  const others = isMarked(seen) ? [] : seen.ended;
  const which = others.length === 0 ? "the restored one" : `that of ${time(restore.startedAt)}`;
  const ofOthers = others.map((one) => ` If it is that of ${time(one.startedAt)}: ${cameLast(seen, one)}.`);
  const again = isNew ? ": since other `triggers` are declared now, that restores it once more" : "";
  // Without its mark one that the state tells of as failed is not made again.
  const anew =
    phase === "withdrawn" && !isNew
      ? `change \`triggers\`${snapshot === undefined ? ", and name another snapshot" : ""}. ${leaving}`
      : `name another snapshot after \`lvchange --deltag '${tag}' ${path}\`.`;
  return refusal(
    context,
    "RESTORE_UNCERTAIN",
    `${wasLost(seen)}${isHalf(seen) ? `; ${halfPhrase(seen)}` : ""}`,
    `Look at the content of ${path}. If it is ${which}: ${cameLast(seen, restore)}.${ofOthers.join("")} If not, ${anew} Then run again${again}.`,
  );
}

/** How to have nothing restored. */
const leaving = "To leave the volume as it is, take this resource out of the program.";

/**
 * Raises RESTORE_UNCERTAIN where the state tells of a restore for the wanted triggers, whether or not it has ended, and the origin of
 * another one: which of both came last the host's clock does not tell for sure, and nobody has asked for one more. Also where another
 * one was cut off as it began; without a state only where nobody knows whether it was merged.
 */
async function refuseUnasked(
  context: Context,
  wanted: Inputs,
  seen: Observed,
  old: State | undefined,
): Promise<void> {
  const { restore, origin, phase } = seen;
  const stale = isStale(seen, wanted);
  const isLost = phase === "uncertain" || phase === "withdrawn";
  if (old === undefined && stale && isLost && !(phase === "uncertain" && (await wasMerged(context, seen))))
    throw uncertain(context, seen, true);
  if (!isDeclaredStill(old, wanted) || isKnown(seen, wanted, old)) return;
  if (seen.healed !== undefined) {
    throw refusal(
      context,
      "RESTORE_UNCERTAIN",
      healedPhrase(seen, seen.healed),
      `Nothing was touched. ${leaving} To restore it once more, change \`triggers\`.`,
    );
  }
  const path = pathOf(origin);
  const remove = `\`lvchange --deltag '${restore.tag}' ${path}\``;
  const restored = hasEnded(old) ? "was restored" : "began to be restored";
  const told = `by Pulumi's state ${path} ${restored} for these \`triggers\` at ${old.startedAt}`;
  if (phase === "pending" && tellsOfAnother(old, seen)) {
    throw refusal(
      context,
      "RESTORE_UNCERTAIN",
      `${told}, and by its mark another restore was begun at ${time(restore.startedAt)} and cut off before it wrote anything`,
      `Nothing was touched. To leave the volume as it is: ${remove}, then run again. To restore it, change \`triggers\`.`,
    );
  }
  if (!stale) return;
  if (isLost) throw uncertain(context, seen);
  if (phase !== "restored") return;
  throw refusal(
    context,
    "RESTORE_UNCERTAIN",
    `${told}, by its mark for others at ${time(restore.startedAt)}: which of both it holds cannot be told`,
    // Without a mark one that has not ended would be begun anew.
    `Nothing was touched. Look at the content of ${path}. If it is what it should be: ${hasEnded(old) ? remove : "`pulumi refresh`"}, then run again. If not, change \`triggers\`: that restores it.`,
  );
}

function time(seconds: number): string {
  return new Date(seconds * 1000).toISOString();
}

function toState(declared: Inputs | State, seen: Observed): State {
  const { restore, origin, snapshot, phase } = seen;
  // Nobody may ask for that one any more, and the mark of the ended one may be lost.
  if (isOnlyBegun(seen) && tellsOfAnother(declared, seen)) {
    const state = declared.state === "restored" ? "unmarked" : declared.state;
    return { ...declared, volumeGroup: origin.volumeGroup, origin: origin.name, state };
  }
  const ended = restore.stage === "restored";
  const image = imageOfRestore(restore);
  const isMerge = image === undefined && phase !== "uncertain";
  const unfinished = isMerge ? "merging" : isHalf(seen) || seen.healed ? "restoring" : "checking";
  const isFailed = phase === "overflowed" || phase === "withdrawn";
  // The mark of an image that was written before has to go.
  const isOver = phase === "restored" && seen.written.length === 0;
  const isTold = isOver || phase === "scheduled" || phase === "unmarked";
  return {
    ...declared,
    volumeGroup: origin.volumeGroup,
    origin: origin.name,
    state: isFailed ? "failed" : isTold ? phase : unfinished,
    snapshotRemoved: image === undefined && snapshot === undefined,
    restoredSnapshot: image === undefined ? restore.source : "",
    restoredImage: image ?? "",
    originUuid: origin.uuid,
    startedAt: time(restore.startedAt),
    restoredAt: ended ? time(restore.startedAt + restore.seconds) : "",
    seconds: restore.seconds,
    restoreId: restore.life,
    generation: restore.generation,
    mergeFailed: phase === "merging" && origin.mergeFailed === true,
  };
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changed = (property: keyof Inputs & string) =>
    unknown.has(property) || !isDeepStrictEqual(wanted[property], state[property]);
  const properties = (all: readonly (keyof Inputs & string)[], effect: Change["effect"]): Change[] =>
    all.filter(changed).map((property) => ({ property, effect }));
  return [
    ...properties(["volumeGroup", "origin"], "replace"),
    ...properties(["triggers", "owner"], "update"),
    // What is restored stays so: a new snapshot, as an LvSnapshot takes after its merge, is for the next `triggers`.
    ...properties(["snapshot", "image", "overwrite", "whenOpen"], "connection"),
    ...properties(["connections", "bandwidthLimit"], "connection"),
    ...(state.state === "restored" ? [] : [{ property: "state", effect: "update" } as const]),
  ];
}

function validate(
  wanted: Partial<Inputs>,
  _old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  const { snapshot, image } = wanted;
  const problems: Problem[] = [];
  const isMissing = (property: "snapshot" | "image" | "overwrite") =>
    wanted[property] === undefined && !unknown.has(property);
  if (isMissing("snapshot") && isMissing("image"))
    problems.push({
      property: "snapshot",
      reason: "is required, unless `image` is given: what is restored",
    });
  if (snapshot !== undefined && image !== undefined)
    problems.push({ property: "image", reason: "cannot go with `snapshot`: leave one out" });
  if (snapshot !== undefined && snapshot.name === wanted.origin)
    problems.push({ property: "snapshot.name", reason: `"${wanted.origin}" is the origin's own name` });
  if (snapshot !== undefined && image === undefined)
    for (const property of ["overwrite", "connections", "bandwidthLimit"] as const)
      if (wanted[property] !== undefined)
        problems.push({ property, reason: "is for an `image`: a `snapshot` is merged without it" });
  if (image === undefined) return problems;
  problems.push(...tlsProblems(image.uri, image.tls, unknown, "image.tls"));
  if (isMissing("overwrite"))
    problems.push({
      property: "overwrite",
      reason:
        "is required with `image`: the LVM UUID of the volume whose content is given up (`lvs -o lv_uuid VG/LV` prints it)",
    });
  if (wanted.whenOpen === "atNextActivation")
    problems.push({
      property: "whenOpen",
      reason:
        '"atNextActivation" is for a `snapshot`: an image is written at once, while the volume is closed',
    });
  if (wanted.adopt)
    problems.push({
      property: "adopt",
      reason: "is for a `snapshot`: of an image there is nothing to follow",
    });
  return problems;
}

/** The resource as the reconciler sees it. */
export const lvRestore: ResourceType<Inputs, State, Observed> = {
  type: "LvRestore",
  description:
    "Brings a logical volume back to the moment of one of its snapshots, or to a verified image, once.",
  example: {
    vm1Snapshot: {
      type: "LvSnapshot",
      properties: { host: "server1", volumeGroup: "VgVm", origin: "LV-VM1", size: "1G" },
    },
    vm1: {
      type: "LvRestore",
      properties: {
        host: "server1",
        volumeGroup: "VgVm",
        origin: "LV-VM1",
        snapshot: { name: new OutputOf("vm1Snapshot", "name"), uuid: new OutputOf("vm1Snapshot", "uuid") },
        whenOpen: "atNextActivation",
      },
    },
  },
  inputs,
  outputs,
  validate,
  predict: () => ({}),
  id: (wanted, hostName) => `${hostName}/${wanted.volumeGroup}/${wanted.origin}`,
  observe: (context, wanted) => observe(context, wanted),
  isSame: ({ restore }, state) => restore.life === state.restoreId,
  toState,
  diff,
  byId: {
    reason:
      "it is something that was done once, and what it was done from is not all on the volume; declared otherwise than it was, it would be done again",
    advice:
      "There is nothing to be managed after a restore: leave it out of the program. To restore again, declare an LvRestore and run `pulumi up`.",
  },
  // Made first, one on the same machine under another name finds that all is done.
  collides: () => false,
  create: (context, wanted) => restore(context, wanted),
  converge,
  isStale,
  isSuperseded: ({ restore }, state) => restore.life !== state.restoreId,
  async remove(context, { owner, volumeGroup }, seen) {
    const { restore, origin, snapshot, phase, job } = seen;
    // Beside a mark that only the state tells of none of this resource's counts.
    const isOver = isMarked(seen) ? isOutdated(seen) : () => true;
    const tags = ownMarks(seen, { owner })
      .filter((mark) => mark.tag === restore.tag || isOver(mark))
      .map(({ tag }) => tag);
    if (tags.length > 0 || job !== undefined) refuseOtherGroup(context, origin, volumeGroup);
    if (phase === "merging" || phase === "scheduled")
      context.warn(`the merge into ${pathOf(origin)} is ${phase} and goes on: LVM cannot take it back`);
    if (phase === "withdrawn") context.warn(wasLost(seen));
    if (phase === "overflowed" && snapshot !== undefined)
      context.warn(`${ranFullPhrase(snapshot, origin)}. ${ranFullAdvice(snapshot)}`);
    if (isHalf(seen))
      context.warn(
        phase === "scheduled"
          ? halfPhrase(seen)
          : `${halfWritten(origin)}, and nobody goes on with it any more`,
      );
    if (job !== undefined) await endImageRestore(context, origin, job.recordDigest, tags);
    else if (tags.length > 0) await mark(context, origin, undefined, tags);
  },
  drift(state, seen) {
    const now = toState(state, seen);
    const lines: string[] = [];
    if (pathOf(seen.origin) !== `${state.volumeGroup}/${state.origin}`)
      lines.push(`its origin is now ${pathOf(seen.origin)}`);
    if (seen.phase === "unmarked")
      lines.push(
        `the mark of the restore was removed from ${pathOf(seen.origin)}; \`pulumi up\` puts it back and writes nothing`,
      );
    else if (wasCut(seen.phase)) {
      const left =
        seen.phase === "pending"
          ? "before it wrote anything"
          : "and its snapshot is gone since: whether it was merged is not known";
      lines.push(
        `another restore of ${pathOf(seen.origin)} was begun at ${time(seen.restore.startedAt)} and cut off ${left}; \`pulumi up\` restores for other \`triggers\`, and is an error for these`,
      );
    } else if (isOnlyBegun(seen) && tellsOfAnother(state, seen))
      lines.push(
        `another restore of ${pathOf(seen.origin)} was begun at ${time(seen.restore.startedAt)} and has written nothing yet; \`pulumi up\` goes on with it for its \`triggers\`, and ends it for these`,
      );
    else if (now.state !== state.state) lines.push(`is now ${now.state}, was ${state.state}`);
    if (seen.phase === "overflowed" && seen.snapshot !== undefined) {
      const pair = { origin: seen.origin, snapshot: seen.snapshot };
      lines.push(`${ranFullPhrase(pair.snapshot, pair.origin)}. ${overflowAdvice(pair)}`);
    }
    if (seen.phase === "withdrawn") lines.push(wasLost(seen));
    if (seen.others !== undefined) lines.push(writtenBy(seen.origin, seen.others).join(". "));
    if ((seen.phase === "merging" || seen.phase === "scheduled") && !isMarked(seen))
      lines.push(
        `the mark of the restore was removed from ${pathOf(seen.origin)}; \`pulumi up\` puts it back and follows the merge`,
      );
    if (seen.healed !== undefined) lines.push(`${healedPhrase(seen, seen.healed)}. ${leaving}`);
    else if (seen.restore.stage === "writing" && !isMarked(seen))
      lines.push(
        `the mark of the restore was removed from ${pathOf(seen.origin)}; \`pulumi up\` puts it back. ${rightAdvice(seen)}`,
      );
    const isAtWork = seen.phase === "restoring" && seen.restore.stage === "writing";
    if (isHalf(seen) && !isAtWork) lines.push(halfPhrase(seen));
    return lines;
  },
};
