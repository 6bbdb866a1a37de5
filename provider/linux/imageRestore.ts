/**
 * Writing an image onto the volume that it was once copied from, or another: the job, which itself keeps the mark of the
 * restore on the volume, and the scripts that start and end it. Sources: lvs(8), lvchange(8), lvmthin(7).
 *
 * What lies below `/run` is lost at a reboot, the mark is not. So it says `begun` while nothing is written, `writing` from before
 * the first byte on, and `restored` as soon as the volume was read back, whether or not anybody follows.
 */
import { hostScript } from "../core/hostCommands.js";
import { copyName } from "./copyJob.js";
import { followCopyScript, startJobFunction, stopJobFunction } from "./copyScripts.js";
import {
  type DeviceCopyPlan,
  type DeviceJob,
  deviceCopyArguments,
  deviceCopySteps,
  volumeIsFunction,
} from "./deviceCopy.js";
import { emitFunctions } from "./fields.js";
import { openLock } from "./lockFile.js";
import { type LogicalVolume, storeNeed } from "./lvm.js";
import { mergeLock, leftBytes as usedBytes } from "./merge.js";
import { missingFunction } from "./programs.js";
import { canHaveCertificates } from "./tls.js";
import { changedMeanwhile, unitFunctions } from "./unitScript.js";

/**
 * The job follows from the volume's group, and its UUID, which a clone in another group has too: two restores of it meet, and none
 * meets a copy.
 */
export function restoreJob({ volumeGroup, uuid }: Pick<LogicalVolume, "volumeGroup" | "uuid">): DeviceJob {
  const name = copyName(`${volumeGroup} ${uuid}`);
  return { unit: `lvm-nbd-restore-${name}.service`, run: `/run/lvm-nbd-restore-${name}` };
}

/** The mark in its stages, and which marks of earlier restores it takes the place of. */
export interface RestoreMarks {
  readonly begun: string;
  readonly writing: string;
  /** The last one before and after its stage; see `restoreTagParts`. */
  readonly head: string;
  readonly tail: string;
  /** Seconds since 1970. */
  readonly startedAt: number;
  readonly earlier: readonly string[];
}

/**
 * The first byte is written only while somebody follows the job: who declared it may have given it up, and the volume may be in
 * use again by then. A job that nobody has followed for so long gives up: longer than a link is waited for.
 */
export const unfollowedMinutes = 10;
/** Who follows looks every other second. */
const followedSeconds = 30;

/** How often, and every how many seconds, a job looks whether others have left it room in its thin pool: for a day. */
const roomLooks = 8640;
const roomSeconds = 10;

/**
 * Shell functions: `uptime_seconds`, and `follow FOLDER`, which writes down that somebody follows the job now. By the seconds since the
 * host's start: its clock may be set back or forward in between.
 */
const followedFunctions = `
uptime_seconds() { cut -d. -f1 /proc/uptime; }
follow() { uptime_seconds >"$1/followed.new" && mv -f "$1/followed.new" "$1/followed"; }
`;

/** The arguments of `imageRestoreJob`; `needBytes`: of the thin pool, see `poolNeed`. */
export function imageRestoreArguments(
  job: DeviceJob,
  { volumeGroup, name, uuid, path, kind, pool }: LogicalVolume,
  plan: DeviceCopyPlan,
  marks: RestoreMarks,
  needBytes: number,
): string[] {
  return [
    ...deviceCopyArguments(job, path, plan),
    ...[volumeGroup, name, uuid, marks.begun, marks.writing, marks.head, marks.tail],
    String(marks.startedAt),
    marks.earlier.map((tag) => `--deltag ${tag}`).join(" "),
    // What a cached volume has is its cache's.
    ...[(kind === "thin" && pool) || "", String(Math.ceil(needBytes))],
  ];
}

/** Bytes of the smallest chunk that a COW store can have: it needs the most for its tables. */
const leastChunkSize = 4096;

/**
 * Shell functions, beside those of a job. `store_need BYTES CHUNK`: see `storeNeed`. `require_room BYTES SIZE`: ends the job if
 * writing so many bytes may overflow a COW snapshot of the origin, which has that size; see `filledSnapshots`.
 */
export const roomFunctions = `
store_need() { chunks=$((($1 + $2 - 1) / $2)); echo $(((chunks + chunks / ($2 / 16) + 2) * $2)); }
require_room() {
  stores=$(lvs --noheadings --units b --nosuffix --separator : -o lv_name,lv_attr,lv_size,snap_percent,chunk_size \\
    -S "origin_uuid=\\"$uuid\\" && lv_attr=~\\"^s\\"" "$group" 9>&-) || fail "LVM does not tell of the snapshots of $group/$name"
  written=$1 whole=$2 overflowing=
  for store in $stores; do
    IFS=:; set -- $store; unset IFS
    case $2 in ????I*) continue;; esac
    # How full it is, in hundredths of a percent: without leading zeros, which would make it octal.
    case $4 in *.??) full=$((100 * \${4%.*} + 1\${4#*.} - 100));; *) full=10000;; esac
    [ "\${5:-0}" -ge ${leastChunkSize} ] && chunk=$5 || chunk=${leastChunkSize}
    [ "$3" -ge "$(store_need "$whole" "$chunk")" ] || [ $(($3 - $3 * full / 10000)) -ge "$(store_need "$written" "$chunk")" ] ||
      overflowing="$overflowing $1"
  done
  [ -z "$overflowing" ] || fail "overflows: writing $written bytes to $group/$name may overflow snapshots of it:$overflowing"
}
`;

/**
 * Shell functions, beside those of a job. `used_bytes BYTES PERCENT`: as `lvs` rounds it, like the need: see `poolNeed`.
 * `require_pool`: ends the job unless the thin pool of the volume has room for it beside what other restores that run may still take
 * of it; from then on it is one of these. It fails where only the others take that room and `waited` allows another look. A thin
 * snapshot that was taken since the need was reckoned shares all that the volume has.
 */
export const poolFunctions = `
used_bytes() {
  case $2 in *.??) echo $(($1 * (100 * \${2%.*} + 1\${2#*.} - 100) / 10000));; *) echo "$1";; esac
}
require_pool() {
  [ -n "$pool" ] || return 0
  ${openLock(8, `"${mergeLock("$pool")}"`)} && flock -w 120 8 || fail "the thin pool $group/$pool is being looked at for more than 120 s"
  sharing=$(lvs --noheadings -o lv_name -S "origin_uuid=\\"$uuid\\" && lv_attr=~\\"^......t\\"" "$group" 8>&- 9>&-) &&
    found=$(lvs --noheadings --units b --nosuffix --separator : -o lv_size,data_percent,lv_health_status "$group/$pool" 8>&- 9>&-) &&
    thin=$(lvs --noheadings --units b --nosuffix --separator : -o lv_uuid,lv_size,data_percent -S "pool_lv=\\"$pool\\"" "$group" 8>&- 9>&-) ||
    fail "LVM does not tell of the thin pool $group/$pool"
  found=$(echo $found)
  IFS=:; set -- $found; unset IFS
  [ -z "$sharing" ] || need=$((size + $1 / 10000))
  [ -z "\${3-}" ] || fail "full: the thin pool $group/$pool takes no changes: $3"
  free=$(($1 - $(used_bytes "$1" "$2"))) held=0 others=0
  for volume in $thin; do
    IFS=:; set -- $volume; unset IFS
    # One that is not active is not being written.
    holds=0
    [ -z "\${3-}" ] || holds=$(used_bytes "$2" "$3")
    [ "$1" != "$uuid" ] || held=$holds
    for taking in /run/lvm-nbd-restore-*/pool; do
      [ -e "$taking" ] && read -r of_group of_uuid of_need of_held <"$taking" || continue
      [ "$of_group $of_uuid" = "$group $1" ] || continue
      of_unit=\${taking%/pool}
      # It has written all that it writes.
      case $(cat "$of_unit/phase" 2>/dev/null) in verify*) continue;; esac
      case $(systemctl show -p ActiveState --value "\${of_unit##*/}.service" 8>&- 9>&-) in inactive|failed) continue;; esac
      # What lvs rounds off is not taken for written.
      written=$((holds - of_held - $2 / 10000))
      [ "$written" -ge 0 ] || written=0
      [ "$of_need" -le "$written" ] || others=$((others + of_need - written))
    done
  done
  if [ "$free" -lt $((need + others)) ]; then
    # What others have written over blocks that snapshots share counts as still to be written: LVM does not tell of it.
    [ "$free" -ge "$need" ] && [ "$waited" -lt ${roomLooks} ] ||
      fail "full: the thin pool $group/$pool has $free bytes free, the restore may need $need, others that run $others"
    exec 8>&-
    return 1
  fi
  printf '%s\\n' "$group $uuid $need $held" >"$run/pool" || fail "what the restore takes of its pool could not be written down"
  exec 8>&-
}
`;

/**
 * Writes the image. Nothing is written, and nothing called restored, unless the volume is closed, nothing is merged into it, and
 * its mark is there. From before its first byte on no merge begins: see `beginMergeScript`.
 */
export const imageRestoreJob = `${roomFunctions}${poolFunctions}${followedFunctions}
# Whoever follows clears all away; nobody may. Not the file itself: it is being read. Its time is when the job was started.
forget_certificates() {
  [ -n "\${run-}" ] && [ -d "$run/tls" ] || return 0
  rm -rf "$run/tls"
  : >"$run/job.new" && touch -r "$run/job" "$run/job.new" && mv -f "$run/job.new" "$run/job"
}
trap forget_certificates EXIT
# As a stop of the unit sends it: dash alone would end without the above.
trap 'exit 143' TERM
group=$9 name=\${10} uuid=\${11} begun=\${12} writing=\${13} head=\${14} tail=\${15} started=\${16} earlier=\${17} pool=\${18} need=\${19}
# Reading its end, udev itself has it open for a moment.
look() {
  for try in 1 2 3 4 5; do
    udevadm settle --timeout=10
    seen=$(lvs --noheadings --binary -o lv_uuid,lv_device_open,lv_attr,lv_tags -S "lv_name=\\"$name\\"" "$group" 9>&-) || fail "LVM does not tell of $group/$name"
    set -- $seen
    [ "$2" = 1 ] || break
    sleep 0.2
  done
  [ -n "$1" ] || fail "there is no $group/$name any more"
  [ "$1" = "$uuid" ] || fail "another volume is called $group/$name by now"
  [ "$2" = 0 ] || fail "open: $group/$name was opened meanwhile"
  case $3 in O*) fail "merging: a snapshot is being merged into $group/$name";; esac
  marks=",$4,"
}
change() {
  look
  case $marks in *",$1,"*) ;; *) fail "the mark of the restore was removed from $group/$name";; esac
  gone=$1; shift
  lvchange -y --deltag "$gone" "$@" -S "lv_uuid=\\"$uuid\\"" "$group/$name" </dev/null 9>&- || fail "the mark of the restore could not be changed"
}
before_write() {
  waited=0
  while :; do
    require_followed
    ${openLock(9, `"${mergeLock("$name")}"`)} && flock -w 120 9 || fail "a merge into $group/$name is being begun for more than 120 s"
    require_room "$size" "$room"
    ! require_pool || break
    exec 9>&-
    [ "$waited" != 0 ] || phase wait
    waited=$((waited + 1))
    sleep ${roomSeconds}
  done
  change "$begun" $earlier --addtag "$writing"
  exec 9>&-
}
require_followed() {
  while :; do
    followed=$(cat "$run/followed") && now=$(uptime_seconds) || fail "when the restore was last followed cannot be told"
    since=$((now-followed))
    [ "$since" -gt ${followedSeconds} ] || break
    [ "$since" -le ${60 * unfollowedMinutes} ] || fail "nobody had followed the restore for ${unfollowedMinutes} min when it was about to write, so it was given up"
    sleep 1
  done
}
at_end() {
  seconds=$(($(date +%s)-started))
  [ "$seconds" -ge 0 ] || seconds=0
  change "$writing" --addtag "$head"r"$started+$seconds:$tail"
}
${deviceCopySteps}`;

/** Whether an image can be restored. Arguments: volume group and UUID of the volume, uri, programs. */
export const preflightRestoreScript = hostScript(
  "preflight-image-restore",
  "observe",
  `${emitFunctions}${missingFunction}
group=$1 uuid=$2 uri=$3; shift 3
emit_missing "$@"
chunks=$(lvs --noheadings --units b --nosuffix -o lv_uuid,chunk_size -S "origin_uuid=\\"$uuid\\"" "$group") || exit 1
emit chunks "$chunks"
emit now "$(date +%s)"
if command -v nbdinfo >/dev/null; then emit_output size timeout 30 nbdinfo --size "$uri"; fi
emit end ""
`,
  ["name", "uuid", "uri", "many:word"],
);

canHaveCertificates(preflightRestoreScript);

/**
 * Marks the volume and starts the job (stdin). Arguments: unit, folder, volume group, name and UUID of the volume, the record, a
 * description of the unit, after how many seconds it is ended, the mark, the marks of restores that were seen on it, the job's
 * length in bytes.
 */
export const startImageRestoreScript = hostScript(
  "start-image-restore",
  "change",
  `${unitFunctions}${stopJobFunction}${startJobFunction}${volumeIsFunction}${followedFunctions}
unit=$1 run=$2 group=$3 name=$4 uuid=$5 record=$6 description=$7 runtime=$8 mark=$9; shift 9
lock
# Before anything is stopped: the job may be another one's.
tags=$(lvs --noheadings -o lv_tags -S "lv_uuid=\\"$uuid\\"" "$group" 9>&-) || exit 1
for tag in $(echo $tags | tr , ' '); do
  case $tag in "\${mark%%=*}="*) ;; *) continue;; esac
  case " $* " in *" $tag "*) ;; *) exit ${changedMeanwhile};; esac
done
stop_job "$unit" || exit 1
volume_is "$group" "$name" "$uuid" kept
for bytes; do :; done
umask 077
rm -rf "$run" && mkdir "$run" && receive "$run/job" "$bytes" && printf %s "$record" >"$run/record.json" && follow "$run" || { rm -rf "$run"; exit 1; }
change() { lvchange -y "$1" "$mark" -S "lv_uuid=\\"$uuid\\"" "$group/$name" </dev/null 9>&-; }
change --addtag || { rm -rf "$run"; exit 1; }
start_job "$unit" "$description" "$runtime" || { stop_job "$unit" && change --deltag && rm -rf "$run"; exit 1; }
`,
);

/** How the job is, as `followCopyScript` tells it to somebody who goes on following. */
export const followImageRestoreScript = hostScript(
  "follow-image-restore",
  "change",
  `${followedFunctions}
if [ -d "$5" ] && [ ! -L "$5/followed.new" ]; then follow "$5"; fi
${followCopyScript}`,
);

/**
 * Ends the job of that record and removes marks, each a tag. Arguments: unit, folder, volume group, name and UUID of the
 * volume, digest of the record, marks.
 */
export const endImageRestoreScript = hostScript(
  "end-image-restore",
  "change",
  `${unitFunctions}${stopJobFunction}
unit=$1 run=$2 group=$3 name=$4 uuid=$5 digest=$6; shift 6
lock
[ ! -e "$run/record.json" ] || [ "$(sha256sum <"$run/record.json" | cut -d' ' -f1)" = "$digest" ] || exit ${changedMeanwhile}
stop_job "$unit" || exit 1
drop=
for mark; do drop="$drop --deltag $mark"; done
[ -z "$drop" ] || lvchange -y $drop -S "lv_uuid=\\"$uuid\\"" "$group/$name" </dev/null 9>&- || exit 1
rm -rf "$run"
`,
);

/** Chunk sizes of snapshots, by UUID, as `preflightRestoreScript` prints them. */
export function parseChunkSizes(text: string): Map<string, number> {
  const rows = text.split("\n").map((line) => line.trim().split(/\s+/));
  return new Map(rows.map(([uuid = "", bytes]): [string, number] => [uuid, Number(bytes)]));
}

/** A COW snapshot whose store writing an image onto its origin fills. */
export interface FilledSnapshot {
  readonly name: string;
  readonly freeBytes: number;
  /** Its store is smaller than all that is written. */
  readonly overflows: boolean;
}

/**
 * COW snapshots of the volume into which `bytes` are copied before they are written, with their tables. One with a store for all
 * of its origin cannot overflow by that: `lvcreate -l 100%ORIGIN` makes such a one, and `lvextend` only by `101%ORIGIN`, since it
 * forgets the tables.
 */
export function filledSnapshots(
  all: readonly LogicalVolume[],
  origin: LogicalVolume,
  bytes: number,
  chunkSizes: ReadonlyMap<string, number>,
): FilledSnapshot[] {
  return all
    .filter(({ kind, originUuid, invalid }) => kind === "cow" && originUuid === origin.uuid && !invalid)
    .map((snapshot) => {
      const { sizeBytes, usedPercent } = snapshot;
      const chunkSize = chunkSizes.get(snapshot.uuid) || leastChunkSize;
      const freeBytes = usedPercent === undefined ? 0 : sizeBytes - usedBytes(snapshot);
      const holdsAll = sizeBytes >= storeNeed(origin.sizeBytes, chunkSize);
      const overflows = !holdsAll && freeBytes < storeNeed(bytes, chunkSize);
      return { name: snapshot.name, freeBytes, overflows };
    });
}

/** What lvs rounds off a percentage, as a share of the whole. */
const percentRounding = 0.0001;

/** What writing onto a thin volume takes of its pool. */
export interface PoolNeed {
  readonly bytes: number;
  /** Inactive volumes of the pool, of which LVM does not tell how much they hold: all may be the volume's too, and is counted so. */
  readonly untold: readonly string[];
}

/**
 * Bytes that writing `bytes` onto a thin volume may take from its pool: what the volume has already is written in place, unless
 * another shares it, or it lies behind them. Zeros take room as everything does.
 *
 * A snapshot that LVM shows to be of it may share everything. Others may as well: with the merge of one of several snapshots LVM
 * forgets whose the rest are, and such a one looks like any VM's volume. So names and sizes tell nothing, but what all hold together
 * does: more than the pool has given away is held by several, and that much of this volume's may be. Where nothing is shared, as
 * with volumes of many VMs in one pool, nothing is added but what `lvs` rounds off; and not even that to a volume that is alone in a
 * pool as large as the image, which has room for it whatever is written already.
 */
export function poolNeed(all: readonly LogicalVolume[], origin: LogicalVolume, bytes: number): PoolNeed {
  const group = all.filter(({ volumeGroup }) => volumeGroup === origin.volumeGroup);
  const thin = group.filter(({ pool }) => pool === origin.pool);
  const pool = group.find(({ name }) => name === origin.pool);
  const hasSnapshots = thin.some(({ originUuid }) => originUuid === origin.uuid);
  if (pool === undefined) return { bytes, untold: [] };
  if (hasSnapshots) return { bytes: bytes + percentRounding * pool.sizeBytes, untold: [] };
  const untold = thin.filter(({ usedPercent }) => usedPercent === undefined);
  const held = thin.reduce(
    (sum, volume) => sum + (untold.includes(volume) ? volume.sizeBytes : usedBytes(volume)),
    0,
  );
  const rounded = percentRounding * [...thin, pool].reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const isAlone = thin.length === 1 && bytes <= pool.sizeBytes;
  const shared = isAlone ? 0 : Math.max(0, held + rounded - usedBytes(pool));
  // All that the image does not reach may be what it has.
  const behind = Math.max(0, origin.sizeBytes - bytes);
  const own = Math.max(0, usedBytes(origin) - shared - behind);
  return { bytes: Math.max(0, bytes - own), untold: untold.map(({ name }) => name) };
}
