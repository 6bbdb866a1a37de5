/**
 * LvSnapshot: a moment of a logical volume, as a COW snapshot (with `size`) or a thin one (without).
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, parseOutput, refusal, succeed } from "../core/command.js";
import { type ErrorCode, LvmNbdError } from "../core/errors.js";
import { hostScript, script } from "../core/hostCommands.js";
import { commonInputs, readableBy, refusing, replaces, triggersInput } from "../core/inputs.js";
import {
  digest,
  generationMark,
  isOfAnotherGeneration,
  makingMark,
  markAmong,
  ownerMark,
  tagPrefix,
  userTags,
} from "../core/owner.js";
import {
  type Change,
  ChangedMeanwhile,
  type Context,
  type Problem,
  type ResourceType,
} from "../core/resource.js";
import { restoreDuring, restoreTag, writingAmong } from "../core/restoreMark.js";
import { serially } from "../core/serial.js";
import { openLock } from "../linux/lockFile.js";
import {
  activateCommand,
  createSnapshotCommand,
  deviceMapperNameProblem,
  extendCommand,
  type LogicalVolume,
  logicalVolumeNameProblem,
  lvmFailure,
  lvmSilence,
  parseSize,
  permissionCommand,
  removeCommand,
  renameCommand,
  type Size,
  sizeInBytes,
  storeNeed,
  tagCommand,
  tagProblem,
  volumeGroupNameProblem,
} from "../linux/lvm.js";
import { ranFullAdvice, ranFullPhrase } from "../linux/merge.js";
import { changedMeanwhile } from "../linux/unitScript.js";
import { hostName } from "../ssh/config.js";
import { quoteAll } from "../ssh/quoting.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
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
  refuseOtherGroup,
  refuseSuspended,
  requireGroup,
  volumeOf,
  volumes,
} from "./volumes.js";

const KiB = 1024;

const name = (problem: (value: string) => string | undefined) => z.string().superRefine(refusing(problem));

const size = z.union([z.string(), z.number()]).superRefine(readableBy(parseSize));

const chunkSize = z.union([z.string(), z.number()]).superRefine(
  refusing((value) => {
    const bytes = chunkSizeBytes(value);
    return bytes === undefined || bytes < 4 * KiB || bytes > 512 * KiB || !Number.isInteger(Math.log2(bytes))
      ? `"${value}" is not a chunk size: a power of 2 from 4K to 512K, e.g. "64K" or 65536`
      : undefined;
  }),
);

/** Declared properties. */
export const lvSnapshotInputs = z.strictObject({
  ...commonInputs,
  volumeGroup: name(volumeGroupNameProblem)
    .describe("Volume group of the origin and the snapshot.")
    .meta(replaces),
  origin: name((value) => (value === "" ? "must not be empty" : volumeGroupNameProblem(value)))
    .describe("Logical volume of which the snapshot is taken.")
    .meta(replaces),
  name: name(logicalVolumeNameProblem).describe("Name of the snapshot. Default: the resource's name."),
  size: size
    .optional()
    .describe(
      'Size of the COW store: `"1G"` (1024-based), bytes, or `"20%ORIGIN"`; `"100%ORIGIN"` cannot overflow. ' +
        "Leave out for a thin snapshot of a thin origin.",
    ),
  readOnly: z.boolean().default(true).describe("Whether the snapshot may not be written."),
  chunkSize: chunkSize
    .default(64 * KiB)
    .describe('Chunk of the COW store in bytes (or `"64K"`): a power of 2 from 4 KiB to 512 KiB.')
    .meta(replaces),
  tags: z.array(name(tagProblem)).default([]).describe("LVM tags of your own."),
  quiesce: z
    .strictObject({
      freeze: z
        .string()
        .min(1)
        .describe("Shell command on the host that brings the VM's file systems to rest."),
      thaw: z
        .string()
        .min(1)
        .describe("Shell command that lets them go on; it is ALWAYS run, also after failures."),
      timeoutSeconds: z
        .number()
        .int()
        .min(1)
        .max(600)
        .default(30)
        .describe("Seconds after which either command is stopped."),
    })
    .meta({ title: "Quiesce" })
    .optional()
    .describe(
      "Commands run around the taking of the snapshot, as root. They are shown in errors: let them name no secret.",
    ),
  triggers: triggersInput.describe("Any values; a change of one takes a new snapshot.").meta(replaces),
});

const outputs = z.object({
  uuid: z.string().describe("LVM UUID of the snapshot."),
  path: z.string().describe("Device path, `/dev/VG/LV`."),
  sizeBytes: z.number().describe("Size of the COW store, or of the thin snapshot, in bytes."),
  originSizeBytes: z.number().describe("Size of the origin (what a reader sees) in bytes."),
  originUuid: z.string().describe("LVM UUID of the origin."),
  createdAt: z.string().describe("When the snapshot was taken (ISO 8601, by the host's clock)."),
  usedPercent: z.number().describe("Fill level of the COW store, or of the thin snapshot; informational."),
  state: z
    .enum(["valid", "overflowed", "merging", "unfinished", "inactive", "poolFull"])
    .describe(
      "`valid`; `overflowed` (store ran full, content lost); `merging`; `unfinished` (cut off before it was known to be good: the next " +
        "`pulumi up` takes it anew); `inactive`; `poolFull`.",
    ),
});

type Inputs = z.infer<typeof lvSnapshotInputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type LvSnapshotDeclaration = z.input<typeof lvSnapshotInputs>;
/** What a program can read of it. */
export type LvSnapshotOutputs = State;

interface Observed {
  readonly mark: string | undefined;
  readonly lv: LogicalVolume;
  readonly origin: LogicalVolume | undefined;
  readonly poolFull: boolean;
  /** lvcreate makes a plain volume first, and leaves that when it is killed or cut by a reboot. */
  readonly halfMade: boolean;
  /** What was taken may be half of an image, or of a VM that ran again, and it was cut off before that was looked at. */
  readonly unfinished: boolean;
  /** COW snapshots of this (thin) snapshot itself: lvremove would take them along. */
  readonly dependents: readonly string[];
}

function chunkSizeBytes(value: string | number): number | undefined {
  if (typeof value === "number") return value;
  const match = /^(\d+)(?:([km])(?:i?b)?)?$/i.exec(value);
  if (!match) return undefined;
  return Number(match[1]) * ({ k: KiB, m: KiB * KiB }[match[2]?.toLowerCase() ?? ""] ?? 1);
}

/** Marks of ours for a declaration: whose it is, and for which declared moment it was taken. */
function marks(wanted: Inputs): string[] {
  return [ownerMark(wanted.owner), generationOf(wanted)];
}

function generationOf(wanted: Inputs): string {
  return generationMark([
    wanted.origin,
    wanted.size === undefined ? "thin" : chunkSizeBytes(wanted.chunkSize),
    wanted.triggers,
  ]);
}

/** How often a VM is frozen when somebody else takes LVM's lock just then. */
const quiesceTries = 3;

async function observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined> {
  const all = await volumes(context);
  const uuid = "uuid" in wanted ? wanted.uuid : undefined;
  const lv =
    (await volumeOf(context, all, wanted.volumeGroup, uuid)) ?? named(all, wanted.volumeGroup, wanted.name);
  if (lv === undefined) {
    await requireGroup(context, wanted.volumeGroup, all);
    return undefined;
  }
  const inGroup = (name: string | undefined) =>
    all.find((candidate) => candidate.volumeGroup === lv.volumeGroup && candidate.name === name);
  const pool = inGroup(lv.pool);
  refuseSuspended(context, [lv, inGroup(lv.origin)]);
  const mark = markAmong(lv.tags);
  if (lv.kind === "other" && lv.uuid === uuid) {
    throw new LvmNbdError("IDENTITY_MISMATCH", {
      message: `${lv.volumeGroup}/${lv.name} is no snapshot any more: it was split off`,
      host: context.host.name,
      resource: context.resource,
      advice: `Nothing was touched. Make it a snapshot again with \`lvconvert -s ${wanted.volumeGroup}/${wanted.origin} ${lv.volumeGroup}/${lv.name}\`, or remove it, and run again.`,
    });
  }
  const origin = inGroup(lv.origin);
  const perhapsHalf = origin !== undefined && restoreDuring(origin.tags, lv.createdAt) !== undefined;
  const isMaking = mark === ownerMark(wanted.owner) && lv.tags.includes(makingMark);
  return {
    mark,
    halfMade: isMaking && lv.kind === "other",
    unfinished: isMaking && lv.kind !== "other" && (perhapsHalf || wanted.quiesce !== undefined),
    ...{ lv, origin },
    dependents: all
      .filter(
        (other) => other.kind === "cow" && other.volumeGroup === lv.volumeGroup && other.origin === lv.name,
      )
      .map((other) => other.name),
    poolFull: pool !== undefined && (pool.health !== "" || (pool.usedPercent ?? 0) >= 100),
  };
}

function stateOf({ lv, poolFull, unfinished }: Observed): State["state"] {
  if (lv.kind === "cow" && lv.invalid) return "overflowed";
  if (lv.merging) return "merging";
  if (unfinished) return "unfinished";
  if (!lv.active) return "inactive";
  return poolFull ? "poolFull" : "valid";
}

/** Everything that would make lvcreate fail, or make something else than meant, is found before it runs. */
async function suitableOrigin(context: Context, wanted: Inputs): Promise<LogicalVolume> {
  const all = await volumes(context);
  const refuse = (
    code: "ORIGIN_UNSUITABLE" | "ORIGIN_NOT_FOUND" | "VOLUME_GROUP_NOT_FOUND",
    message: string,
  ) =>
    new LvmNbdError(code, {
      message,
      host: context.host.name,
      resource: context.resource,
      property: "origin",
    });
  const group = all.filter((lv) => lv.volumeGroup === wanted.volumeGroup && lv.kind !== "internal");
  if (group.length === 0) {
    throw refuse(
      "VOLUME_GROUP_NOT_FOUND",
      `volumeGroup: no volume group "${wanted.volumeGroup}" with logical volumes; there are: ${listed(all.map((lv) => lv.volumeGroup))}`,
    );
  }
  const origin = group.find((lv) => lv.name === wanted.origin);
  if (origin === undefined) {
    throw refuse(
      "ORIGIN_NOT_FOUND",
      `origin: no logical volume "${wanted.origin}" in ${wanted.volumeGroup}; there are: ${listed(group.map((lv) => lv.name))}`,
    );
  }
  if (origin.kind === "cow") {
    throw refuse(
      "ORIGIN_UNSUITABLE",
      `origin: "${origin.name}" is itself a snapshot, of "${origin.origin}": name that`,
    );
  }
  if (origin.kind === "pool")
    throw refuse("ORIGIN_UNSUITABLE", `origin: "${origin.name}" is a thin pool, not a volume`);
  if (origin.attr[0] === "O") {
    const merging = group.find((lv) => lv.merging && lv.originUuid === origin.uuid);
    if (merging !== undefined) refuseRunFull(context, merging, origin);
    throw refuse(
      "ORIGIN_UNSUITABLE",
      `origin: a snapshot is being merged into "${origin.name}"; wait until that has ended`,
    );
  }
  refuseHalfWritten(context, origin, writingAmong(origin.tags));
  if (wanted.size === undefined && origin.kind !== "thin") {
    throw refuse(
      "ORIGIN_UNSUITABLE",
      `size: "${origin.name}" is not a thin volume, so its snapshot needs a size, e.g. size: "20%ORIGIN"`,
    );
  }
  return origin;
}

/** A merge that waits does not end by itself where its snapshot has run full. */
function refuseRunFull(context: Context, merging: LogicalVolume, origin: Pick<LogicalVolume, "name">): void {
  if (merging.kind !== "cow" || !merging.invalid) return;
  throw refusal(
    context,
    "SNAPSHOT_OVERFLOWED",
    ranFullPhrase(merging, origin),
    `${ranFullAdvice(merging)}, and run again: LVM never ends that merge.`,
  );
}

/**
 * `each COMMAND GROUP NAME LVCREATE ORIGIN...`: the command for each snapshot. `whole`: whether what was taken cannot be half
 * of an image; a restore marks its volume before it writes. `say_made`: that what lvcreate made is a snapshot by now.
 * `take_back`: removes it.
 */
const eachFunction = `
each() {
  each_do=$1; shift
  while [ $# -gt 0 ]; do "$each_do" "$1" "$2" "$3" "$4" || return; shift 4; done
}
whole() {
  origin_tags=$(lvs --noheadings -o lv_tags "$1/$4") || return
  case ",$(echo $origin_tags)" in *,${restoreTag}????????????:????????:w*) return ${changedMeanwhile};; esac
}
say_made() { lvchange -y --deltag ${makingMark} "$1/$2" </dev/null; }
take_back() { lvremove -y -S 'lv_tags={"${makingMark}"}' "$1" </dev/null >&2; }
`;

/** Arguments, for each snapshot: its group, its name, the command that takes it, its origin. */
const takeScript = hostScript(
  "take-snapshots",
  "change",
  `${eachFunction}
take() {
  sh -c "$3" </dev/null || return
  whole "$@" || { rc=$?; [ "$rc" != ${changedMeanwhile} ] || take_back "$1/$2"; return "$rc"; }
  say_made "$1" "$2"
}
each take "$@"
`,
);

/**
 * Ends with the script's thaw. Where the script is killed first, as by a KILL while lvcreate ignores TERM, or has not come to
 * its thaw in time, it thaws in its place, once the freeze, which has the file locked and outlives a killed script, has ended.
 * Arguments: seconds, the file that is there until the thaw, the script's pid, seconds for freeze and thaw, the thaw. While it thaws
 * the file is `FILE.late`, and `FILE.failed` where that fails: then the script thaws, and without one it is tried again.
 */
const watchScript = `
tenths=$(($1*10))
while [ "$tenths" -gt 0 ] && [ -e "$2" ] && kill -s 0 -- "$3" 2>/dev/null; do tenths=$((tenths-2)); sleep 0.2; done
mv "$2" "$2.late" 2>/dev/null || exit 0
flock -w $(($4+10)) 7 7<"$2.late"
for pause in 1 5 30 0; do
  if timeout -k 5 "$4" sh -c "$5" 8>&- 9>&-; then rm -f "$2.late"; exit 0; fi
  if kill -s 0 -- "$3" 2>/dev/null; then break; fi
  sleep "$pause"
done
mv -f "$2.late" "$2.failed"
`;

/**
 * Freezes, takes each snapshot, thaws. The thaw is a trap of the script on the host, and a watch stands by in a session of its
 * own, so it is run whatever happens to the commands, to the link or to Pulumi. One of them at a time for an origin, and for a freeze: a script whose link was
 * lost goes on, and a second freeze beside it would thaw beneath its snapshot. LVM's lock is waited for before the freeze
 * and never for more than two seconds during it. Exit code 90: freeze failed; 91: thaw failed; 92: it failed and no
 * snapshot was taken, or none can be used; 93: the watch thawed before all were taken, and none is kept; 77: one of the snapshots is there already.
 */
const quiesceScript = hostScript(
  "take-snapshots-quiesced",
  "change",
  `${eachFunction}
freeze=$1 thaw=$2 limit=$3 origin_lock=$4 freeze_lock=$5 longest=$6 watch=$7; shift 7
trap '' PIPE
thawed=yes thaw_rc=0 late=no
thaw() {
  [ "$thawed" = no ] || return 0
  thawed=yes
  if [ ! -e "$frozen" ]; then
    late=yes tenths=$(((limit+5)*10))
    while [ "$tenths" -gt 0 ] && [ -e "$frozen.late" ]; do tenths=$((tenths-2)); sleep 0.2; done
    [ -e "$frozen.late" ] || [ -e "$frozen.failed" ] || return 0
  fi
  timeout -k 5 "$limit" sh -c "$thaw" </dev/null >&2 8>&- 9>&- || thaw_rc=$?
  rm -f "$frozen" "$frozen.late" "$frozen.failed"
}
# It keeps the locks, so that nobody freezes what it is about to thaw.
stand_by() {
  frozen=$freeze_lock.$$.$tries
  rm -f "$frozen" && ${openLock(7, '"$frozen"')} && flock -n 7 && setsid -f sh -c "$watch" watch "$longest" "$frozen" "$$" "$limit" "$thaw" </dev/null >/dev/null 2>&1 7>&-
}
# With the locks kept. What is not known to be whole, and of a VM that stood still, nobody can use.
leave() {
  thaw
  for one in $begun; do ! lvs "$one" >/dev/null 2>&1 8>&- 9>&- || take_back "$one" 8>&- 9>&-; done
}
begun=''
trap 'leave' EXIT
trap 'exit 143' HUP INT TERM
${openLock(9, '"$origin_lock"')} && flock -w 120 9 && ${openLock(8, '"$freeze_lock"')} && flock -w 120 8 ||
  { echo "another snapshot of the origin is being taken for more than 120 s" >&2; exit 1; }
refuse_there() { if lvs "$1/$2" >/dev/null 2>&1 8>&- 9>&-; then exit ${changedMeanwhile}; fi; }
await_lock() { vgs "$1" >/dev/null 8>&- 9>&-; }
# Whoever only looks has the lock for a moment: that is worth a second or two of standing still.
take() {
  short=0 begun="$begun $1/$2"
  while :; do
    said_now=$(sh -c "$3" 2>&1 </dev/null 8>&- 9>&-)
    rc=$?
    case $said_now in *"Can't get lock for"*) locked=yes;; *) locked=no;; esac
    short=$((short+1))
    [ "$locked" = yes ] && [ "$short" -lt 8 ] || break
    sleep 0.2
  done
  said="$said$said_now
"
  # Somebody else's.
  case $said_now in *"already exists in volume group"*) begun=\${begun% *};; esac
  [ "$rc" = 0 ] || return "$rc"
  taken="$taken $1/$2"
}
# What was taken before another one that could not be is of a moment that is given up.
take_all_back() { for one in $taken; do take_back "$one" 8>&- 9>&- || exit 1; done; }
each refuse_there "$@"
tries=0
while :; do
  each await_lock "$@" && stand_by || exit 1
  thawed=no said='' taken='' begun=''
  # What the freeze leaves running does not keep the lock: its end is that of timeout.
  timeout -k 5 "$limit" sh -c "exec 7>&-
$freeze" </dev/null >&2 8>&- 9>&- || exit 90
  exec 7>&-
  each take "$@"
  thaw
  printf '%s' "$said" >&2
  tries=$((tries+1))
  [ "$locked$late" = yesno ] && [ "$tries" -lt ${quiesceTries} ] && [ "$thaw_rc" = 0 ] || break
  take_all_back
done
[ "$rc$late" != 0yes ] || { take_all_back; rc=93; }
# With the locks kept: until it is said, another run takes it for half made, and takes it anew.
[ "$rc" != 0 ] || each whole "$@" 8>&- 9>&- || { rc=$?; [ "$rc" != ${changedMeanwhile} ] || take_all_back; }
[ "$rc" != 0 ] || each say_made "$@" 8>&- 9>&- || rc=$?
[ "$rc" != 0 ] || begun=''
[ "$thaw_rc" = 0 ] || { [ "$rc" = 0 ] && exit 91; exit 92; }
exit "$rc"
`,
);

/** Waits until no quiescing script is at work on the origin. Arguments: its lock, seconds. */
const awaitScript = hostScript(
  "await-snapshots-quiesced",
  "change",
  `
${openLock(9, '"$1"')} && flock -w "$2" 9 ||
  { echo "a snapshot of the origin is being taken for more than $2 s" >&2; exit 1; }
`,
);

async function create(context: Context, wanted: Inputs): Promise<void> {
  await suitableOrigin(context, wanted);
  await take(context, wanted);
}

/** Of an origin that was found suitable. */
async function take(context: Context, wanted: Inputs): Promise<void> {
  await takeTogether(context, [wanted], wanted.quiesce);
}

/**
 * Takes several snapshots as one moment: frozen once, all taken, thawed at once. Without `quiesce` they are taken one
 * after the other. Of a failure some may be left, with their marks.
 */
export async function takeTogether(
  context: Context,
  wanted: readonly Inputs[],
  quiesce: Inputs["quiesce"],
): Promise<void> {
  const [first] = wanted;
  if (first === undefined) return;
  const names = wanted.map(({ volumeGroup, name }) => `${volumeGroup}/${name}`).join(", ");
  const what =
    wanted.length === 1 ? `the snapshot ${names} of ${first.origin}` : `${wanted.length} snapshots, ${names}`;
  context.progress(quiesce === undefined ? `taking ${what}` : `freezing, taking ${what}, thawing`);
  const command = takeCommand(wanted, first, quiesce);
  // Always in the same order: two of them never wait for each other.
  const groups = [...new Set(wanted.map(({ volumeGroup }) => volumeGroup))].sort();
  const result = await groups.reduceRight(
    (inner, group) => () => serially(context.host, group, inner),
    () => context.host.run(command, context.signal),
  )();
  if (result.exitCode !== 0) throw takeFailure(context, wanted, quiesce, command, result);
}

/** Seconds from the start of a freeze to when it is thawed also if no snapshot is there. */
function longestFrozen(timeoutSeconds: number): number {
  return timeoutSeconds + 5 + changeSeconds;
}

/** What a quiescing script has locked as long as it, or its watch, runs. */
function originLock({ volumeGroup, origin }: Pick<Inputs, "volumeGroup" | "origin">): string {
  return `/run/lvm-nbd-quiesce.${volumeGroup}.${origin}`;
}

/** Seconds from when lvcreate runs to the end of the thaw and of what follows that. */
function afterTaking({ timeoutSeconds }: NonNullable<Inputs["quiesce"]>): number {
  return changeSeconds + 2 * (timeoutSeconds + 10);
}

function takeCommand(wanted: readonly Inputs[], first: Inputs, quiesce: Inputs["quiesce"]): RemoteCommand {
  const unlocked = quiesce === undefined ? [] : ["--config", "global{wait_for_locks=0}"];
  const snapshots = wanted.flatMap((one) => {
    const { volumeGroup, origin, name, readOnly } = one;
    const argv = createSnapshotCommand({
      ...{ volumeGroup, origin, name, readOnly },
      size: one.size === undefined ? undefined : parseSize(one.size),
      chunkSize: chunkSizeBytes(one.chunkSize) ?? 64 * KiB,
      tags: [...marks(one), makingMark, ...one.tags],
    });
    return [volumeGroup, name, quoteAll([...argv, ...unlocked]), origin];
  });
  const most = wanted.length * changeSeconds;
  if (quiesce === undefined)
    return { ...changing, deadlineSeconds: most, argv: script(takeScript, ...snapshots) };
  const { freeze, thaw, timeoutSeconds } = quiesce;
  const freezeLock = `/run/lvm-nbd-freeze.${digest(freeze, 16)}`;
  return {
    kind: "change",
    argv: script(
      quiesceScript,
      ...[
        freeze,
        thaw,
        String(timeoutSeconds),
        originLock(first),
        freezeLock,
        String(longestFrozen(timeoutSeconds)),
      ],
      watchScript,
      ...snapshots,
    ),
    deadlineSeconds: 2 * changeSeconds + most + quiesceTries * 2 * timeoutSeconds,
    graceSeconds: afterTaking(quiesce) + changeSeconds,
  };
}

/** A snapshot that is there already is another one's, or that of a command which ended after its link was lost. */
function takeFailure(
  context: Context,
  wanted: readonly Inputs[],
  quiesce: Inputs["quiesce"],
  command: RemoteCommand,
  result: CommandResult,
): LvmNbdError | ChangedMeanwhile {
  const { exitCode, stderr } = result;
  const quiesceFailure = (what: string, code: ErrorCode) => failure(context, command, result, what, code);
  if (quiesce !== undefined) {
    if (exitCode === 90) return quiesceFailure(`freeze failed: ${quiesce.freeze}`, "QUIESCE_FAILED");
    if (exitCode === 91) return quiesceFailure(`thaw failed: ${quiesce.thaw}`, "THAW_FAILED");
    if (exitCode === 92)
      return quiesceFailure(`no snapshot was taken, and thaw failed: ${quiesce.thaw}`, "THAW_FAILED");
    if (exitCode === 93)
      return quiesceFailure(
        `freezing and taking took longer than ${longestFrozen(quiesce.timeoutSeconds)} s, so the VM was thawed before`,
        "QUIESCE_FAILED",
      );
  }
  const error = failure(
    context,
    command,
    result,
    `no snapshot of ${wanted.map(({ volumeGroup, origin }) => `${volumeGroup}/${origin}`).join(", ")} could be taken`,
    lvmFailure(stderr) ?? "COMMAND_FAILED",
    lvmSilence(stderr),
  );
  const exists = exitCode === changedMeanwhile || /already exists in volume group/.test(stderr);
  return exists ? new ChangedMeanwhile(error) : error;
}

function isSame({ lv }: Observed, { uuid }: State): boolean {
  return lv.uuid === uuid;
}

function isStale({ lv }: Observed, wanted: Inputs): boolean {
  return isOfAnotherGeneration(lv.tags, generationOf(wanted));
}

/** Takes the snapshot anew where an interrupted run left one of an earlier declaration; else mends it in place. */
async function converge(
  context: Context,
  wanted: Inputs,
  seen: Observed,
  old: State | undefined,
): Promise<void> {
  let { lv } = seen;
  if (seen.halfMade || seen.unfinished) {
    if (wanted.quiesce !== undefined) await awaitScriptOf(context, wanted, wanted.quiesce, seen, old);
    // It may be whole all the same, and all that is left of what a restore has begun to write over.
    await suitableOrigin(context, wanted);
    context.progress(`${lv.name} was left half made by an interrupted run: taking it anew`);
    await removeVolume(context, seen);
    await take(context, wanted);
    return;
  }
  const own = seen.mark === ownerMark(wanted.owner);
  // A thin snapshot outlives its origin, and is then the only thing that holds its data.
  const originGone = lv.kind === "thin" && lv.origin === undefined && own;
  if (originGone) context.warn(originGonePhrase(wanted.origin));
  if (lv.kind !== "cow" && !(lv.kind === "thin" && lv.origin !== undefined) && !originGone) {
    throw new LvmNbdError("FOREIGN_RESOURCE", {
      message: `${lv.volumeGroup}/${lv.name} exists and is not a snapshot`,
      host: context.host.name,
      resource: context.resource,
      advice: "Choose another name: a volume that is not a snapshot is never taken over.",
    });
  }
  if (lv.origin !== wanted.origin && !originGone) {
    throw new LvmNbdError("IDENTITY_MISMATCH", {
      message: `${lv.volumeGroup}/${lv.name} is a snapshot of "${lv.origin}", not of "${wanted.origin}"`,
      host: context.host.name,
      resource: context.resource,
    });
  }
  if (stateOf(seen) === "merging") {
    throw new LvmNbdError("SNAPSHOT_MERGING", {
      message: `${lv.volumeGroup}/${lv.name} is being merged into "${lv.origin}"`,
      host: context.host.name,
      resource: context.resource,
    });
  }
  // The state's own was not of another declaration when it came there, as by an import, which cannot tell the triggers.
  const kept = old !== undefined && isSame(seen, old) && generationOf(old) === generationOf(wanted);
  const stale = own && !kept && isStale(seen, wanted);
  if (!stale && (lv.kind === "thin") !== (wanted.size === undefined)) {
    throw new LvmNbdError("IDENTITY_MISMATCH", {
      message: `size: ${lv.volumeGroup}/${lv.name} is a ${lv.kind === "thin" ? "thin snapshot, which has no" : "COW snapshot, which has a"} size of its own`,
      host: context.host.name,
      resource: context.resource,
      property: "size",
      advice:
        lv.kind === "thin"
          ? "Leave `size` out to keep it, or choose another name."
          : `Declare \`size: ${lv.sizeBytes}\` to keep it, or choose another name.`,
    });
  }
  if (stale || stateOf(seen) === "overflowed") {
    // What cannot be taken anew is not given up.
    await suitableOrigin(context, wanted);
    context.progress(`${lv.name} is ${stale ? "of an earlier declaration" : "overflowed"}: taking it anew`);
    await removeVolume(context, seen);
    await take(context, wanted);
    return;
  }
  // Of one of ours it was seen before it was taken.
  if (!own && old === undefined && seen.origin !== undefined)
    refuseHalfWritten(context, seen.origin, writingAmong(seen.origin.tags));
  if (lv.name !== wanted.name) {
    context.progress(`renaming ${lv.name} to ${wanted.name}`);
    await changeVolume(
      context,
      lv.volumeGroup,
      renameCommand(lv, wanted.name),
      `${lv.name} could not be renamed to ${wanted.name}`,
    );
    lv = { ...lv, name: wanted.name };
  }
  const right = [...marks(wanted), ...wanted.tags];
  const add = right.filter((tag) => !lv.tags.includes(tag));
  const drop = lv.tags.filter((tag) => !right.includes(tag));
  if (add.length > 0 || drop.length > 0) {
    await changeVolume(
      context,
      lv.volumeGroup,
      tagCommand(lv, add, drop),
      `the tags of ${lv.name} could not be changed`,
    );
  }
  if (lv.readOnly !== wanted.readOnly) {
    await changeVolume(
      context,
      lv.volumeGroup,
      permissionCommand(lv, wanted.readOnly),
      `the permission of ${lv.name} could not be changed`,
    );
  }
  if (!lv.active && lv.kind === "thin")
    await changeVolume(context, lv.volumeGroup, activateCommand(lv), `${lv.name} could not be activated`);
  const size = missingSize(lv, wanted);
  if (size !== undefined) {
    context.progress(`growing ${lv.name} to ${wanted.size}`);
    await changeVolume(context, lv.volumeGroup, extendCommand(lv, size), `${lv.name} could not be grown`);
  }
}

/**
 * A script whose link was lost goes on, and may be about to say that its snapshot is made. Raises ChangedMeanwhile where it is not as it
 * was seen any more once no script runs.
 */
async function awaitScriptOf(
  context: Context,
  wanted: Inputs,
  quiesce: NonNullable<Inputs["quiesce"]>,
  seen: Observed,
  old: State | undefined,
): Promise<void> {
  const seconds = afterTaking(quiesce);
  await succeed(
    context,
    {
      argv: script(awaitScript, originLock(wanted), String(seconds)),
      ...({ kind: "change", deadlineSeconds: seconds + 30 } as const),
    },
    `whether ${pathOf(seen.lv)} is still being taken could not be found out`,
  );
  const now = await observe(context, old ?? wanted);
  if (now?.lv.uuid === seen.lv.uuid && now.halfMade === seen.halfMade && now.unfinished === seen.unfinished)
    return;
  throw new ChangedMeanwhile(
    refusal(
      context,
      "IDENTITY_MISMATCH",
      `${pathOf(seen.lv)} is changed again and again while it is looked at`,
    ),
  );
}

function originGonePhrase(origin: string): string {
  return `its origin ${origin} was removed or replaced; it still holds the old one's data and is left as it is: change \`triggers\` to give that up and take a snapshot of now`;
}

/**
 * The size to which a store grows that is smaller than declared by at least one extent, and can still grow. One for all of the
 * origin has room for the tables too: it cannot overflow.
 */
function missingSize(lv: LogicalVolume, { size: declared, chunkSize }: Inputs): Size | undefined {
  if (declared === undefined || lv.kind !== "cow" || lv.originSizeBytes === undefined) return undefined;
  const size = parseSize(declared);
  if ("percentOfOrigin" in size && size.percentOfOrigin >= 100) {
    const bytes = storeNeed(lv.originSizeBytes, chunkSizeBytes(chunkSize) ?? 64 * KiB);
    return lv.sizeBytes < bytes ? { bytes } : undefined;
  }
  const bytes = sizeInBytes(size, lv.originSizeBytes) ?? 0;
  return lv.sizeBytes < Math.min(bytes, largestUsefulStore(lv)) - lv.extentSizeBytes + 1 ? size : undefined;
}

/** LVM clamps a COW store to what a complete copy of the origin and its exception table need; a lower bound of that. */
function largestUsefulStore(lv: LogicalVolume): number {
  return lv.originSizeBytes ?? Number.MAX_SAFE_INTEGER;
}

async function removeVolume(context: Context, seen: Observed): Promise<void> {
  const { lv, dependents } = seen;
  if (dependents.length > 0) {
    throw new LvmNbdError("VOLUME_IN_USE", {
      message: `${lv.volumeGroup}/${lv.name} is the origin of ${listed(dependents)}, which would be removed with it`,
      host: context.host.name,
      resource: context.resource,
    });
  }
  if (lv.merging) {
    refuseRunFull(context, lv, { name: lv.origin ?? "its origin" });
    throw new LvmNbdError("SNAPSHOT_MERGING", {
      message: `${lv.volumeGroup}/${lv.name} is being merged into "${lv.origin}" and cannot be removed`,
      host: context.host.name,
      resource: context.resource,
      advice: "Wait until the merge has ended: LVM removes the snapshot by itself then.",
    });
  }
  if (lv.open !== false && lv.active) await refuseOpen(context, lv);
  context.progress(`removing the snapshot ${lv.volumeGroup}/${lv.name}`);
  await changeVolume(
    context,
    lv.volumeGroup,
    removeCommand(lv),
    `${lv.volumeGroup}/${lv.name} could not be removed`,
  );
}

async function refuseOpen(context: Context, lv: LogicalVolume): Promise<void> {
  const holders = await holdersOf(context, lv);
  if (holders.length === 0) return;
  throw new LvmNbdError("VOLUME_IN_USE", {
    message: `${lv.volumeGroup}/${lv.name} is open: ${holders.join(", ")}`,
    host: context.host.name,
    resource: context.resource,
  });
}

function toState(declared: Inputs | State, seen: Observed): State {
  const { lv, origin } = seen;
  const before = "uuid" in declared ? declared : undefined;
  const shrunk =
    before !== undefined && lv.sizeBytes < before.sizeBytes && missingSize(lv, declared) !== undefined;
  return {
    ...declared,
    volumeGroup: lv.volumeGroup,
    origin: lv.origin ?? declared.origin,
    name: lv.name,
    readOnly: lv.readOnly,
    tags: sameMembers(userTags(lv.tags), declared.tags) ? declared.tags : userTags(lv.tags),
    ...(shrunk ? { size: lv.sizeBytes } : {}),
    uuid: lv.uuid,
    path: lv.path,
    sizeBytes: lv.sizeBytes,
    originSizeBytes: lv.originSizeBytes ?? origin?.sizeBytes ?? lv.sizeBytes,
    originUuid: lv.originUuid ?? before?.originUuid ?? "",
    createdAt: new Date(lv.createdAt * 1000).toISOString(),
    usedPercent: lv.usedPercent ?? 0,
    state: stateOf(seen),
  };
}

function sameMembers(a: readonly string[], b: readonly string[]): boolean {
  return JSON.stringify([...new Set(a)].sort()) === JSON.stringify([...new Set(b)].sort());
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  const update = (property: keyof State) => changes.push({ property, effect: "update" });
  const replace = (property: keyof State) => changes.push({ property, effect: "replace" });
  for (const property of ["volumeGroup", "origin"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property]) replace(property);
  }
  const thin = state.size === undefined;
  if (unknown.has("triggers") || JSON.stringify(wanted.triggers) !== JSON.stringify(state.triggers))
    replace("triggers");
  if (!thin && (unknown.has("chunkSize") || differentChunks(state.chunkSize, wanted.chunkSize)))
    replace("chunkSize");
  if (unknown.has("size")) update("size");
  else if ((wanted.size === undefined) !== thin) replace("size");
  else if (wanted.size !== undefined && state.size !== undefined) {
    const order = compareSizes(state, wanted.size);
    if (order > 0) update("size");
    if (order < 0) replace("size");
  }
  const shrinks = changes.length === 1 && changes[0]?.effect === "replace" && changes[0].property === "size";
  if (
    shrinks &&
    !thin &&
    wanted.size !== undefined &&
    state.state !== "overflowed" &&
    sameHost(state, wanted)
  ) {
    throw new LvmNbdError("INVALID_INPUT", {
      message: shrinkingReason(state.size, wanted.size),
      property: "size",
      advice: `This snapshot's origin has ${state.originSizeBytes} bytes. Nothing was changed.`,
    });
  }
  for (const property of ["name", "readOnly"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property]) update(property);
  }
  if (unknown.has("tags") || !sameMembers(wanted.tags ?? [], state.tags)) update("tags");
  if (wanted.owner !== undefined && wanted.owner !== state.owner) update("owner");
  if (!isDeepStrictEqual(wanted.quiesce, state.quiesce))
    changes.push({ property: "quiesce", effect: "connection" });
  if (state.state === "overflowed") replace("state");
  // A COW snapshot is inactive with its origin: activating it would activate the VM's volume, maybe on a second host.
  if (state.state === "unfinished" || (state.state === "inactive" && thin)) update("state");
  return changes;
}

function sameHost(state: State, wanted: Partial<Inputs>): boolean {
  return wanted.host !== undefined && hostName(wanted.host) === hostName(state.host);
}

function differentChunks(a: string | number, b: string | number | undefined): boolean {
  return b === undefined || chunkSizeBytes(a) !== chunkSizeBytes(b);
}

/** Positive: the declaration wants more than the state tells; negative: less. */
function compareSizes(state: Pick<State, "size" | "originSizeBytes">, wanted: string | number): number {
  if (state.size === undefined || wanted === state.size) return 0;
  const now = sizeInBytes(parseSize(state.size), state.originSizeBytes);
  const then = sizeInBytes(parseSize(wanted), state.originSizeBytes);
  return now === undefined || then === undefined ? 0 : then - now;
}

function validate(
  wanted: Partial<Inputs>,
  old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  const problems: Problem[] = [];
  if (wanted.volumeGroup !== undefined && wanted.name !== undefined) {
    const reason = deviceMapperNameProblem(wanted.volumeGroup, wanted.name);
    if (reason !== undefined) problems.push({ property: "name", reason: `"${wanted.name}" ${reason}` });
  }
  if (wanted.name !== undefined && wanted.name === wanted.origin) {
    problems.push({
      property: "name",
      reason: `"${wanted.name}" is the origin's name: choose another for the snapshot`,
    });
  }
  for (const tag of wanted.tags ?? []) {
    if (tag.startsWith(tagPrefix)) {
      problems.push({
        property: "tags",
        reason: `"${tag}" must not begin with "${tagPrefix}", the mark of this provider`,
      });
    }
  }
  const shrinks = old !== undefined && shrinking(old, wanted, unknown);
  if (shrinks) problems.push({ property: "size", reason: shrinks });
  return problems;
}

/** A smaller store means another snapshot, of now: that loses the moment that was kept, so it must be asked for. */
function shrinking(
  old: Partial<Inputs>,
  wanted: Partial<Inputs>,
  unknown: ReadonlySet<string>,
): string | undefined {
  if (old.size === undefined || wanted.size === undefined) return undefined;
  const decisive = ["host", "volumeGroup", "origin", "chunkSize", "triggers"];
  if (decisive.some((property) => unknown.has(property))) return undefined;
  // Other credentials, or a chunk size written otherwise, take no new snapshot.
  const moment = ({ host, volumeGroup, origin, chunkSize, triggers }: Partial<Inputs>) => [
    host === undefined ? undefined : hostName(host),
    volumeGroup,
    origin,
    chunkSize === undefined ? undefined : chunkSizeBytes(chunkSize),
    triggers,
  ];
  if (!isDeepStrictEqual(moment(old), moment(wanted))) return undefined;
  const before = parseSize(old.size);
  const after = parseSize(wanted.size);
  const smaller =
    "bytes" in before && "bytes" in after
      ? after.bytes < before.bytes
      : "percentOfOrigin" in before &&
        "percentOfOrigin" in after &&
        after.percentOfOrigin < before.percentOfOrigin;
  return smaller ? shrinkingReason(old.size, wanted.size) : undefined;
}

function shrinkingReason(old: string | number | undefined, wanted: string | number): string {
  return (
    `a COW snapshot cannot shrink from ${old} to ${wanted}: keep at least ${old}, or change ` +
    "`triggers` as well to have this moment given up and a new, smaller snapshot taken"
  );
}

/** Also that the group has room for the store, which LVM makes no larger than it can ever need. */
async function foresee(context: Context, wanted: Inputs): Promise<void> {
  const origin = await suitableOrigin(context, wanted);
  if (wanted.size === undefined) return;
  const most = storeNeed(origin.sizeBytes, chunkSizeBytes(wanted.chunkSize) ?? 64 * KiB);
  const bytes = Math.min(sizeInBytes(parseSize(wanted.size), origin.sizeBytes) ?? most, most);
  if (bytes <= origin.volumeGroupFreeBytes) return;
  throw refusal(
    context,
    "NO_SPACE",
    `size: the snapshot needs ${bytes} bytes, and ${wanted.volumeGroup} has ${origin.volumeGroupFreeBytes} free`,
  );
}

/** The chunk of a COW store, in bytes; a line for each of its segments. Arguments: group, name. */
const chunkSizeScript = hostScript(
  "snapshot-chunk-size",
  "observe",
  'lvs --noheadings --units b --nosuffix -o chunk_size "$1/$2"',
  ["name", "name"],
);

async function declared(context: Context, { lv }: Observed): Promise<Partial<Inputs>> {
  const { volumeGroup, name, origin, readOnly } = lv;
  if ((lv.kind !== "cow" && lv.kind !== "thin") || origin === undefined)
    throw refusal(context, "INVALID_INPUT", `${pathOf(lv)} is not a snapshot, or of nothing that is there`);
  const both = { volumeGroup, name, origin, readOnly, tags: userTags(lv.tags) };
  if (lv.kind === "thin") return both;
  const command: RemoteCommand = {
    argv: script(chunkSizeScript, volumeGroup, name),
    ...({ kind: "read", deadlineSeconds: observeSeconds } as const),
  };
  const what = `the chunk size of ${pathOf(lv)} could not be read`;
  const result = await succeed(context, command, what, ({ stderr }) => lvmFailure(stderr));
  const chunk = parseOutput(context, command, result, (stdout) =>
    z.coerce.number().int().positive().parse(stdout.trim().split(/\s+/)[0]),
  );
  return { ...both, size: lv.sizeBytes, chunkSize: chunk };
}

/** The resource as the reconciler sees it. */
export const lvSnapshot: ResourceType<Inputs, State, Observed> = {
  type: "LvSnapshot",
  description: "A moment of a logical volume: a COW snapshot (with `size`) or a thin one (without).",
  example: {
    vm1: {
      type: "LvSnapshot",
      properties: {
        host: "server1",
        volumeGroup: "VgVm",
        origin: "LV-VM1",
        size: "20%ORIGIN",
        quiesce: { freeze: "virsh domfsfreeze vm1", thaw: "virsh domfsthaw vm1" },
      },
    },
  },
  inputs: lvSnapshotInputs,
  outputs,
  nameInput: "name",
  validate,
  predict: ({ volumeGroup, name }) =>
    volumeGroup === undefined || name === undefined ? {} : { path: `/dev/${volumeGroup}/${name}` },
  id: (wanted, hostName) => `${hostName}/${wanted.volumeGroup}/${wanted.name}`,
  observe,
  isSame,
  toState,
  diff,
  // Whatever the group: a renamed one (vgrename) holds the very snapshot that the delete would remove.
  collides: (state, wanted) => state.name === wanted.name,
  async suitable(context, wanted) {
    await suitableOrigin(context, wanted);
  },
  foresee,
  // An overflowed or unfinished one is taken anew.
  lasting: ({ state }) => (state === "valid" ? ["uuid", "originUuid", "originSizeBytes", "createdAt"] : []),
  byId: {
    form: "VOLUMEGROUP/NAME",
    place(path) {
      const [volumeGroup, name, ...more] = path.split("/");
      return volumeGroup && name && more.length === 0 ? { volumeGroup, name } : undefined;
    },
    declared,
  },
  create,
  converge,
  isStale,
  async remove(context, { volumeGroup }, seen) {
    refuseOtherGroup(context, seen.lv, volumeGroup);
    await removeVolume(context, seen);
  },
  drift(state, seen) {
    const now = toState(state, seen);
    const lines: string[] = [];
    if (now.volumeGroup !== state.volumeGroup) lines.push(`its volume group is now ${now.volumeGroup}`);
    if (now.name !== state.name) lines.push(`was renamed to ${now.name}; \`pulumi up\` will rename it back`);
    if (now.readOnly !== state.readOnly) lines.push(`was made ${now.readOnly ? "read-only" : "writable"}`);
    if (!sameMembers(now.tags, state.tags))
      lines.push(`has tags [${now.tags.join(", ")}], declared are [${state.tags.join(", ")}]`);
    if (seen.lv.kind === "thin" && seen.lv.origin === undefined) {
      lines.push(originGonePhrase(state.origin));
    }
    if (now.size !== state.size) lines.push(`its store has ${now.sizeBytes} bytes, less than declared`);
    if (now.state !== state.state) lines.push(`is now ${now.state}, was ${state.state}`);
    return lines;
  },
};
