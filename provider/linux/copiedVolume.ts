/**
 * A logical volume that is a copy: how it is made under another name, gets its own, and says in its tags what it is, without
 * any Pulumi state. Sources: lvcreate(8), lvrename(8), lvm(8).
 */
import { tagPrefix } from "../core/owner.js";
import { copyName } from "./copyJob.js";
import { stopJobFunction } from "./copyScripts.js";
import { volumeIsFunction, volumeOpen } from "./deviceCopy.js";
import { emitFunctions } from "./fields.js";
import type { LogicalVolume } from "./lvm.js";
import { missingFunction } from "./programs.js";
import { changedMeanwhile, unitFunctions } from "./unitScript.js";

/** A volume by its name. */
export interface VolumeName {
  readonly volumeGroup: string;
  readonly name: string;
}

/** With this the names of unfinished copies begin. */
export const partPrefix = "lvmnbd-part-";
const asidePrefix = "lvmnbd-old-";
/** With one of these begins what a copy makes beside its volume. */
export const ownPrefixes = [partPrefix, asidePrefix];

/** The volume that an unfinished copy lies in: it follows from the name alone, so that two copies to one name meet. */
export function partOf(volume: VolumeName): VolumeName {
  return { volumeGroup: volume.volumeGroup, name: partPrefix + copyName(devicePath(volume)) };
}

/** The name that an earlier copy has from when its own is given to the new one until it is removed. */
export function asideOf(volume: VolumeName): VolumeName {
  return { volumeGroup: volume.volumeGroup, name: asidePrefix + copyName(devicePath(volume)) };
}

/** `/dev/VG/LV`. */
export function devicePath({ volumeGroup, name }: VolumeName): string {
  return `/dev/${volumeGroup}/${name}`;
}

const copyTag = `${tagPrefix}copy=`;
const runTag = `${tagPrefix}run=`;

/** Which resource's life a copy belongs to; `undefined` for a volume that is no copy. */
export function copyIdAmong(tags: readonly string[]): string | undefined {
  return tags.find((tag) => tag.startsWith(copyTag))?.slice(copyTag.length);
}

/** Tag of the job that writes, or wrote, a volume: it follows from the digest of the job's record. */
export function runTagOf(recordDigest: string): string {
  return runTag + recordDigest.slice(0, 16);
}

/** The tag of its job on an unfinished copy; `undefined` for what is none of ours. */
export function runTagAmong(tags: readonly string[]): string | undefined {
  return tags.find((tag) => tag.startsWith(runTag));
}

/** What is known of a verified copy. */
export interface CopyFacts {
  /** UUID of the very volume that was verified. */
  readonly uuid: string;
  /** Size of that volume. */
  readonly volumeBytes: number;
  readonly sha256: string;
  readonly sizeBytes: number;
  /** Whether the source was read a second time and was the same. */
  readonly verified: boolean;
  readonly seconds: number;
  /** Seconds since 1970. */
  readonly completedAt: number;
  /** LVM UUID of the snapshot that was copied, and when it was taken; "" and 0 where that is not known. */
  readonly snapshotUuid: string;
  readonly takenAt: number;
}

const factTag = `${tagPrefix}fact.`;

/** The tags of a copy: whose it is and, once it is verified, what it is. Each is short enough for every LVM. */
export function copyTags(copyId: string, facts?: CopyFacts): string[] {
  const told = Object.entries(facts ?? {}).filter(([, value]) => value !== "" && value !== 0);
  return [copyTag + copyId, ...told.map(([name, value]) => `${factTag}${name}=${value}`)];
}

/** Which of a copy's tags are to go for others. Those of the job stay. */
export function outdatedTags(tags: readonly string[], right: readonly string[]): string[] {
  return tags.filter((tag) => tag.startsWith(tagPrefix) && !tag.startsWith(runTag) && !right.includes(tag));
}

/** What the tags say of a verified copy; `undefined` where they do not say all. */
export function factsAmong(tags: readonly string[]): CopyFacts | undefined {
  const told = new Map(
    tags
      .filter((tag) => tag.startsWith(factTag))
      .map((tag) => {
        const at = tag.indexOf("=");
        return [tag.slice(factTag.length, at), tag.slice(at + 1)] as const;
      }),
  );
  const number = (name: string) => Number(told.get(name) ?? 0);
  const [uuid, sha256] = [told.get("uuid"), told.get("sha256")];
  if (uuid === undefined || sha256 === undefined || !told.has("sizeBytes")) return undefined;
  return {
    ...{ uuid, sha256, sizeBytes: number("sizeBytes"), volumeBytes: number("volumeBytes") },
    ...{ verified: told.get("verified") === "true", seconds: number("seconds") },
    ...{ completedAt: number("completedAt"), takenAt: number("takenAt") },
    snapshotUuid: told.get("snapshotUuid") ?? "",
  };
}

/** How many extents hold that many bytes. */
export function extentsFor(sizeBytes: number, extentBytes: number): number {
  return Math.ceil(sizeBytes / extentBytes);
}

/**
 * `lvcreate` of a plain volume. It neither zeroes the beginning (`-Zn`) nor looks for signatures to wipe (`-Wn`): the job writes
 * every byte, and an old volume's file system where the extents lie is what LVM would ask about. With `-y` it asks nothing else.
 */
export function createVolumeCommand(
  { volumeGroup, name }: VolumeName,
  extents: number,
  tags: readonly string[],
): string[] {
  const marked = tags.flatMap((tag) => ["--addtag", tag]);
  return ["lvcreate", "-y", "-Wn", "-Zn", "-ay", "-l", String(extents), "-n", name, ...marked, volumeGroup];
}

/** Whether a copy can be made. Arguments: volume group, uri, programs. */
export const preflightVolumeScript = `${emitFunctions}${missingFunction}
group=$1 uri=$2; shift 2
emit_missing "$@"
emit_output group vgs --noheadings --units b --nosuffix --separator ' ' -o vg_free,vg_extent_size "$group"
if command -v nbdinfo >/dev/null; then emit_output size timeout 30 nbdinfo --size "$uri"; fi
emit end ""
`;

/** Room in a volume group, in bytes. */
export interface GroupRoom {
  readonly freeBytes: number;
  readonly extentBytes: number;
}

/** Reads what `preflightVolumeScript` says of the group. Warnings of LVM's may stand around it. */
export function parseRoom(text: string): GroupRoom {
  const match = /^\s*(\d+) (\d+)\s*$/m.exec(text);
  if (match === null) throw new Error(`vgs printed "${text.slice(0, 200)}"`);
  return { freeBytes: Number(match[1]), extentBytes: Number(match[2]) };
}

/**
 * Shell function. `remove_volume GROUP NAME UUID`: what would go with it, and who has it open, LVM sees under its own lock. A
 * snapshot that somebody took a moment ago keeps it.
 */
const removeVolumeFunction = `
remove_volume() {
  volume_is "$1" "$2" "$3"
  lvremove -y -S "lv_uuid=\\"$3\\" && !(lv_role={\\"origin\\"})" "$1/$2" </dev/null 9>&- || return 1
  volume_left=$(lvs --noheadings -o lv_name -S "lv_uuid=\\"$3\\"" "$1" 9>&-) || return 1
  [ -z "$volume_left" ] || exit ${volumeOpen}
}
`;

/**
 * Ends the job and removes the unfinished volume. Arguments: unit, folder, volume group, the volume's name, the tag of its job.
 * Does nothing to a volume of that name that another job writes.
 */
export const discardVolumeScript = `${unitFunctions}${stopJobFunction}
unit=$1 run=$2 group=$3 name=$4 tag=$5
lock
seen=$(lvs --noheadings -o lv_uuid,lv_tags -S "lv_name=\\"$name\\"" "$group" 9>&-) || exit 1
# UUID and tags; neither where it is gone.
set -- $seen
case "$1:,$2," in :,,|*:*,"$tag",*) ;; *) exit ${changedMeanwhile};; esac
stop_job "$unit" || exit 1
rm -rf "$run"
[ -n "$1" ] || exit 0
udevadm settle --timeout=10
lvremove -y -S "lv_uuid=\\"$1\\"" "$group/$name" </dev/null 9>&-
`;

/**
 * Gives a verified volume its name, once its tags say that it is verified and nobody can write to it any more: from then on
 * this is only ever finished. An earlier copy of that name is put aside, and removed at last: at no moment neither is there.
 * Arguments: unit, folder, volume group, name, the earlier copy's UUID ("-" for none), the name for it, name and UUID of the
 * verified volume, options of lvchange for its tags.
 */
export const nameVolumeScript = `${unitFunctions}${stopJobFunction}${volumeIsFunction}${removeVolumeFunction}
unit=$1 run=$2 group=$3 name=$4 old=$5 aside=$6 part=$7 uuid=$8; shift 8
lock
stop_job "$unit" || exit 1
volume_is "$group" "$part" "$uuid"
if [ "$#" != 0 ]; then lvchange -y "$@" -S "lv_uuid=\\"$uuid\\"" "$group/$part" </dev/null 9>&- || exit 1; fi
# What it held is in the tags now.
rm -rf "$run"
permission=$(lvs --noheadings -o lv_permissions -S "lv_uuid=\\"$uuid\\"" "$group" 9>&-) || exit 1
case $permission in
*writeable*) lvchange -y -p r -S "lv_uuid=\\"$uuid\\"" "$group/$part" </dev/null 9>&- || exit 1;;
esac
if [ "$old" = - ]; then
  taken=$(lvs --noheadings -o lv_uuid -S "lv_name=\\"$name\\"" "$group" 9>&-) || exit 1
  [ -z "$taken" ] || exit ${changedMeanwhile}
  lvrename -y "$group" "$part" "$name" </dev/null 9>&-
  exit
fi
volume_is "$group" "$name" "$old"
lvrename -y "$group" "$name" "$aside" </dev/null 9>&- || exit 1
lvrename -y "$group" "$part" "$name" </dev/null 9>&- || { lvrename -y "$group" "$aside" "$name" </dev/null 9>&-; exit 1; }
remove_volume "$group" "$aside" "$old"
`;

/** Removes a volume that is closed. Arguments: volume group, name, UUID. */
export const removeVolumeScript = `${unitFunctions}${volumeIsFunction}${removeVolumeFunction}
lock
remove_volume "$1" "$2" "$3"
`;

/** Gives a volume its name back. Arguments: volume group, the name it has, its UUID, its name. */
export const renameVolumeScript = `${unitFunctions}${volumeIsFunction}
lock
volume_is "$1" "$2" "$3"
lvrename -y "$1" "$2" "$4" </dev/null 9>&-
`;

/** True if the tags are those of this very volume: those of another, copied along by vgimportclone(8), tell nothing of it. */
export function isAsTagged({ uuid, tags }: Pick<LogicalVolume, "uuid" | "tags">): boolean {
  return factsAmong(tags)?.uuid === uuid;
}
