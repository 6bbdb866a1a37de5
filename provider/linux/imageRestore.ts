/**
 * Writing an image onto the volume that it was once copied from, or another: the job, which itself keeps the mark of the
 * restore on the volume, and the scripts that start and end it. Sources: lvs(8), lvchange(8), lvmthin(7).
 *
 * What lies below `/run` is lost at a reboot, the mark is not. So it says `begun` while nothing is written, `writing` from before
 * the first byte on, and `restored` as soon as the volume was read back, whether or not anybody follows.
 */
import { copyName } from "./copyJob.js";
import { startJobFunction, stopJobFunction } from "./copyScripts.js";
import {
  type DeviceCopyPlan,
  type DeviceJob,
  deviceCopyArguments,
  deviceCopySteps,
  volumeIsFunction,
} from "./deviceCopy.js";
import { emitFunctions } from "./fields.js";
import type { LogicalVolume } from "./lvm.js";
import { leftBytes as usedBytes } from "./merge.js";
import { missingFunction } from "./programs.js";
import { changedMeanwhile, unitFunctions } from "./unitScript.js";

/** The job follows from the volume's UUID: two restores of it meet, and none meets a copy. */
export function restoreJob(originUuid: string): DeviceJob {
  const name = copyName(originUuid);
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

/** The arguments of `imageRestoreJob`. */
export function imageRestoreArguments(
  job: DeviceJob,
  { volumeGroup, name, uuid, path }: LogicalVolume,
  plan: DeviceCopyPlan,
  marks: RestoreMarks,
): string[] {
  return [
    ...deviceCopyArguments(job, path, plan),
    ...[volumeGroup, name, uuid, marks.begun, marks.writing, marks.head, marks.tail],
    String(marks.startedAt),
    marks.earlier.map((tag) => `--deltag ${tag}`).join(" "),
  ];
}

/** Writes the image. Nothing is written, and nothing called restored, unless the volume is closed and its mark is there. */
export const imageRestoreJob = `
group=$9 name=\${10} uuid=\${11} begun=\${12} writing=\${13} head=\${14} tail=\${15} started=\${16} earlier=\${17}
# Reading its end, udev itself has it open for a moment.
look() {
  for try in 1 2 3 4 5; do
    udevadm settle --timeout=10
    seen=$(lvs --noheadings --binary -o lv_uuid,lv_device_open,lv_tags -S "lv_name=\\"$name\\"" "$group") || fail "LVM does not tell of $group/$name"
    set -- $seen
    [ "$2" = 1 ] || break
    sleep 0.2
  done
  [ "$1" = "$uuid" ] || fail "another volume is called $group/$name by now"
  [ "$2" = 0 ] || fail "open: $group/$name was opened meanwhile"
  marks=",$3,"
}
change() {
  look
  case $marks in *",$1,"*) ;; *) fail "the mark of the restore was removed from $group/$name";; esac
  gone=$1; shift
  lvchange -y --deltag "$gone" "$@" -S "lv_uuid=\\"$uuid\\"" "$group/$name" </dev/null || fail "the mark of the restore could not be changed"
}
before_write() { change "$begun" $earlier --addtag "$writing"; }
at_end() {
  seconds=$(($(date +%s)-started))
  [ "$seconds" -ge 0 ] || seconds=0
  change "$writing" --addtag "$head"r"$started+$seconds:$tail"
}
${deviceCopySteps}`;

/** Whether an image can be restored. Arguments: uri, programs. */
export const preflightRestoreScript = `${emitFunctions}${missingFunction}
uri=$1; shift
emit_missing "$@"
emit now "$(date +%s)"
if command -v nbdinfo >/dev/null; then emit_output size timeout 30 nbdinfo --size "$uri"; fi
emit end ""
`;

/**
 * Marks the volume and starts the job (stdin). Arguments: unit, folder, volume group, name and UUID of the volume, the record, a
 * description of the unit, after how many seconds it is ended, the mark, the marks of restores that were seen on it, the job's
 * length in bytes.
 */
export const startImageRestoreScript = `${unitFunctions}${stopJobFunction}${startJobFunction}${volumeIsFunction}
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
rm -rf "$run" && mkdir "$run" && receive "$run/job" "$bytes" && printf %s "$record" >"$run/record.json" || { rm -rf "$run"; exit 1; }
change() { lvchange -y "$1" "$mark" -S "lv_uuid=\\"$uuid\\"" "$group/$name" </dev/null 9>&-; }
change --addtag || { rm -rf "$run"; exit 1; }
start_job "$unit" "$description" "$runtime" || { stop_job "$unit" && change --deltag && rm -rf "$run"; exit 1; }
`;

/**
 * Ends the job of that record and removes marks, each a tag. Arguments: unit, folder, volume group, name and UUID of the
 * volume, digest of the record, marks.
 */
export const endImageRestoreScript = `${unitFunctions}${stopJobFunction}
unit=$1 run=$2 group=$3 name=$4 uuid=$5 digest=$6; shift 6
lock
[ ! -e "$run/record.json" ] || [ "$(sha256sum <"$run/record.json" | cut -d' ' -f1)" = "$digest" ] || exit ${changedMeanwhile}
stop_job "$unit" || exit 1
drop=
for mark; do drop="$drop --deltag $mark"; done
[ -z "$drop" ] || lvchange -y $drop -S "lv_uuid=\\"$uuid\\"" "$group/$name" </dev/null 9>&- || exit 1
rm -rf "$run"
`;

/** A COW snapshot whose store writing an image onto its origin fills. */
export interface FilledSnapshot {
  readonly name: string;
  readonly freeBytes: number;
  /** Its store is smaller than all that is written. */
  readonly overflows: boolean;
}

/**
 * COW snapshots of the volume into which `bytes` are copied before they are written. One with a store for all of its origin
 * (`100%ORIGIN`) cannot overflow by that.
 */
export function filledSnapshots(
  all: readonly LogicalVolume[],
  origin: LogicalVolume,
  bytes: number,
): FilledSnapshot[] {
  return all
    .filter(({ kind, originUuid, invalid }) => kind === "cow" && originUuid === origin.uuid && !invalid)
    .map((snapshot) => {
      const freeBytes = snapshot.sizeBytes - usedBytes(snapshot);
      const holdsAll = snapshot.sizeBytes >= origin.sizeBytes;
      return { name: snapshot.name, freeBytes, overflows: !holdsAll && freeBytes < bytes };
    });
}

/**
 * Bytes that writing `bytes` onto a thin volume may take from its pool: what the volume has already is written in place, unless
 * one of its snapshots shares it. Zeros take room as everything does.
 */
export function poolNeed(all: readonly LogicalVolume[], origin: LogicalVolume, bytes: number): number {
  const isShared = all.some(
    ({ kind, originUuid, pool }) => kind === "thin" && originUuid === origin.uuid && pool === origin.pool,
  );
  return isShared ? bytes : Math.max(0, bytes - usedBytes(origin));
}
