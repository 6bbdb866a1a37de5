/**
 * Merging a snapshot into its origin: the scripts that begin and end it, and what `lvs` tells of it. Sources:
 * lvconvert(8), lvmthin(7), the kernel's snapshot documentation; states were recorded on real servers.
 */
import { hostScript } from "../core/hostCommands.js";
import { bytesPhrase, secondsPhrase } from "./copyJob.js";
import { openLock } from "./lockFile.js";
import { type LogicalVolume, lvchange } from "./lvm.js";
import { changedMeanwhile } from "./unitScript.js";

/** Held while a merge into that volume of `$group` is begun, and while an image's first byte is about to be written to it. */
export function mergeLock(name: string): string {
  return `/run/lvm-nbd-restore.$group.${name}`;
}

/**
 * Marks the origin, and then begins the merge. For that LVM selects no volume by UUID, but by tag: the snapshot, given by
 * UUID, gets one of its own first, so that a name which changed hands is never merged. Arguments: group; origin and
 * snapshot, name and UUID each; the mark before and after its stage; the snapshot's tag; marks to replace, but that of an image
 * which has left the origin half-written: so it is until the merge has begun. One of them at a time for an origin. Exit code 77: the snapshot is gone or is being merged already, or another one's image is written onto
 * the origin, and nothing was changed.
 */
export const beginMergeScript = hostScript(
  "begin-merge",
  "change",
  `
group=$1 origin=$2 originUuid=$3 snapshot=$4 uuid=$5 head=$6 tail=$7 only=$8; shift 8
${openLock(9, `"${mergeLock("$origin")}"`)} && flock -w 120 9 || { echo "another restore of the origin is being begun for more than 120 s" >&2; exit 1; }
attributes() { lvs -a --noheadings -o lv_attr -S "lv_uuid=\\"$uuid\\"" "$group" 9>&-; }
change() { changed=$1; shift; lvchange -y "$@" -S "lv_uuid=\\"$changed\\"" </dev/null 9>&-; }
attr=$(attributes) || exit 1
case $(echo $attr) in ""|S*) exit ${changedMeanwhile};; esac
tags=$(lvs --noheadings -o lv_tags -S "lv_uuid=\\"$originUuid\\"" "$group" 9>&-) || exit 1
for tag in $(echo $tags | tr , ' '); do
  case $tag in "\${head%%=*}="????????????:????????:w*) ;; *) continue;; esac
  case " $* " in *" $tag "*) ;; *) exit ${changedMeanwhile};; esac
done
now=$(date +%s)
thin=$(lvs -a --noheadings -o thin_id -S "lv_uuid=\\"$uuid\\"" "$group" 9>&-) || exit 1
thin=$(echo $thin)
begun="$head"b"$now+\${thin:-0}:$tail"
drop= again=
for old; do
  case $old in "\${head%%=*}="????????????:????????:w*) continue;; esac
  drop="$drop --deltag $old" again="$again --addtag $old"
done
change "$originUuid" --addtag "$begun" $drop "$group/$origin" || exit 1
# Without lvmpolld a process of LVM's own goes on for as long as the merge: it must not keep the lock.
change "$uuid" --addtag "$only" "$group/$snapshot" && lvconvert -y -b -i 1 --merge "@$only" </dev/null 9>&-
rc=$?
attr=$(attributes) || exit 1
case $(echo $attr) in ""|S*)
  change "$originUuid" --deltag "$begun" --addtag "$head"m"$now+0:$tail" "$group/$origin"
  exit;;
esac
change "$uuid" --deltag "$only" "$group/$snapshot"
change "$originUuid" --deltag "$begun" $again "$group/$origin"
[ "$rc" = 0 ] && exit ${changedMeanwhile}
exit "$rc"
`,
);

/**
 * Tells whether LVM was ever told to merge a snapshot that is gone, where the script above was cut off between that and its
 * mark: prints "merged" if so. The origin has taken over a thin snapshot's device in its pool; before any other merge LVM has
 * archived its metadata with the command (unless that is switched off in lvm.conf, or the power failed just then).
 * Arguments: group, origin's UUID, the snapshot's thin device or 0, the snapshot's tag.
 */
export const wasMergedScript = hostScript(
  "was-merged",
  "observe",
  `
group=$1 originUuid=$2 thin=$3 only=$4
if [ "$thin" != 0 ]; then
  now=$(lvs -a --noheadings -o thin_id -S "lv_uuid=\\"$originUuid\\"" "$group") || exit 1
  [ "$(echo $now)" != "$thin" ] || echo merged
elif grep -Fqs "merge @$only" /etc/lvm/archive/"$group"_*.vg /etc/lvm/backup/"$group"; then
  echo merged
fi
`,
  ["name", "uuid", "number", "tag"],
);

/**
 * Tells what became of a snapshot that was being merged, or was to be, and is gone: prints "ended" if its merge was, "removed" if somebody
 * has removed it, and else "unknown". Before each command LVM has
 * archived its metadata with it (unless lvm.conf or `-An` says otherwise, and until lvm.conf has the archive removed), but not before it
 * ends a merge (lvmpolld runs lvpoll with `-An`). So the last archive that holds the snapshot is of before its removal, or before anything
 * else that was run while it was merged: only a command that names the snapshot has removed it, or one of which its words do not tell which
 * volumes it removes. LVM removes a merging one where it overflowed, is inactive, or failed to be merged. Arguments: group, the snapshot's
 * UUID.
 */
export const snapshotFateScript = hostScript(
  "snapshot-fate",
  "observe",
  `
group=$1 uuid=$2
tell() { echo "$1"; exit 0; }
found=$(grep -lFs "id = \\"$uuid\\"" /etc/lvm/archive/"$group"_[0-9]*.vg)
[ -n "$found" ] || tell unknown
last=$(echo "$found" | sort -V | tail -n 1)
command=$(sed -n "s/^description = .*before. executing '//p" "$last") || exit 1
name=$(grep -FB1 "id = \\"$uuid\\"" "$last" | sed -n 's/^[[:space:]]*\\([^ ]*\\) {$/\\1/p')
[ -n "$command" ] && [ -n "$name" ] || tell unknown
double() { echo "$1" | sed 's/-/--/g'; }
of_group="$(double "$group")-"
# Run by lvm(8) it is the second word.
case "/$command" in
  *[/\\ ]vgreduce\\ *) case $command in *--removem*) tell removed;; esac;;
  *[/\\ ]lvremove\\ *)
    case $command in
      *"/$name"[!A-Za-z0-9+_.-]*|*"/$of_group$(double "$name")"[!A-Za-z0-9+_.-]*|*"$uuid"*) tell removed;;
    esac
    set -f
    named=
    # The description ends with a quote.
    for word in \${command%\\'*}; do
      case $word in
        --s*|*@*|"$name"|"$group"|*/"$group") tell unknown;;
        --*) ;;
        -*S*) tell unknown;;
        "$group"/?*|*/"$group"/?*|*/"$of_group"?*) named=1;;
      esac
    done
    [ -n "$named" ] || tell unknown;;
esac
tell ended
`,
  ["name", "uuid"],
);

/**
 * Marks a restore as ended. Arguments: group, origin's name and UUID, its mark; when it began; the new mark before and after its stage;
 * marks that this takes the place of too.
 */
export const endMergeScript = hostScript(
  "end-merge",
  "change",
  `
group=$1 origin=$2 originUuid=$3 old=$4 started=$5 head=$6 tail=$7; shift 7
drop=
for more; do drop="$drop --deltag $more"; done
seconds=$(($(date +%s)-started))
[ "$seconds" -ge 0 ] || seconds=0
lvchange -y --deltag "$old" $drop --addtag "$head"r"$started+$seconds:$tail" -S "lv_uuid=\\"$originUuid\\"" "$group/$origin" </dev/null
`,
);

/** Lets LVM's daemon look after a merge again: one whose poller was killed is never ended. Does nothing else. */
export function pollCommand(origin: Pick<LogicalVolume, "volumeGroup" | "name">): string[] {
  return lvchange("-y", "--poll", "y", `${origin.volumeGroup}/${origin.name}`);
}

/** Begins a merge that waited, if neither volume is open; does nothing otherwise. Nothing is deactivated. */
export function refreshCommand(origin: Pick<LogicalVolume, "volumeGroup" | "name" | "uuid">): string[] {
  return lvchange(
    "-y",
    "--refresh",
    "-S",
    `lv_uuid="${origin.uuid}"`,
    `${origin.volumeGroup}/${origin.name}`,
  );
}

/**
 * How far a snapshot that LVM calls merging is: the origin's own status tells of a COW merge only while the kernel
 * does it; a thin one that has begun is over. One that ran full while it waited is never merged: the kernel refuses it at the activation,
 * and does not call that a failed merge.
 */
export function mergePhase(
  snapshot: LogicalVolume,
  origin: LogicalVolume,
): "merging" | "scheduled" | "overflowed" {
  if (snapshot.kind === "cow" && snapshot.invalid) return "overflowed";
  return snapshot.kind === "cow" && origin.mergeFailed !== undefined ? "merging" : "scheduled";
}

/** What became of a snapshot that is `overflowed`, and what is lost with it. */
export function ranFullPhrase(snapshot: LogicalVolume, origin: Pick<LogicalVolume, "name">): string {
  const { volumeGroup, name } = snapshot;
  return `${volumeGroup}/${name} ran full before its merge into ${volumeGroup}/${origin.name} began: its content is lost, and nothing is restored from it`;
}

/** Nothing else ends its merge. */
export function ranFullAdvice({ volumeGroup, name }: Pick<LogicalVolume, "volumeGroup" | "name">): string {
  return `Remove it (\`lvremove ${volumeGroup}/${name}\`)`;
}

/** Bytes that are still to be written to the origin. */
export function leftBytes({ sizeBytes, usedPercent }: LogicalVolume): number {
  return Math.round((sizeBytes * (usedPercent ?? 0)) / 100);
}

/** What was left at a time (seconds, by any clock). */
export interface MergeSample {
  readonly at: number;
  readonly leftBytes: number;
}

/** The progress as a person reads it, from when it was first looked at. */
export function mergePhrase(first: MergeSample, now: MergeSample): string {
  const done = first.leftBytes - now.leftBytes;
  const percent = first.leftBytes === 0 ? 100 : Math.floor((100 * done) / first.leftBytes);
  const left = `${percent} % merged, ${bytesPhrase(now.leftBytes)} left`;
  const spent = now.at - first.at;
  if (done <= 0 || spent <= 0) return left;
  const rate = done / spent;
  return `${left} at ${bytesPhrase(rate)}/s, about ${secondsPhrase(now.leftBytes / rate)}`;
}

/** A COW snapshot whose store a merge into its origin fills. */
export interface FillingSnapshot {
  readonly name: string;
  readonly freeBytes: number;
  /** Too small for what will be written, whatever it holds already. */
  readonly overflows: boolean;
}

/**
 * Other COW snapshots of the origin whose stores do not surely hold what the merge writes. One that is older has kept those chunks
 * already, unless its chunks are smaller or the merged one was written to itself; and which is older a host's clock that was set back
 * does not tell. But a store that is smaller than what is written cannot have kept it, however old it is.
 */
export function fillingSnapshots(
  all: readonly LogicalVolume[],
  snapshot: LogicalVolume,
  origin: LogicalVolume,
): FillingSnapshot[] {
  if (snapshot.kind !== "cow") return [];
  const written = leftBytes(snapshot);
  return all
    .filter(
      (other) =>
        other.kind === "cow" &&
        other.originUuid === origin.uuid &&
        other.uuid !== snapshot.uuid &&
        !other.invalid,
    )
    .map((other) => ({
      name: other.name,
      freeBytes: other.sizeBytes - leftBytes(other),
      // A hundredth may be the store's own tables.
      overflows: written * 0.99 > other.sizeBytes,
    }))
    .filter(({ freeBytes }) => written > freeBytes);
}
