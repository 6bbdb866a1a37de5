/**
 * A logical volume that is a copy: how it is made under another name, gets its own, and says in its tags what it is, without
 * any Pulumi state. Sources: lvcreate(8), lvrename(8), lvm(8).
 */
import { hostScript } from "../core/hostCommands.js";
import { generationTag, ownerTag, tagPrefix } from "../core/owner.js";
import { copyName } from "./copyJob.js";
import { stopJobFunction } from "./copyScripts.js";
import { volumeIsFunction, volumeOpen } from "./deviceCopy.js";
import { emitFunctions } from "./fields.js";
import { identified, type LogicalVolume, lvcreate } from "./lvm.js";
import { missingFunction } from "./programs.js";
import { canHaveCertificates } from "./tls.js";
import { changedMeanwhile, unitFunctions } from "./unitScript.js";

/** Exit code: somebody has made the volume writable, so that it is a disk of its own. */
export const volumeWritable = 79;

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
  /** The very volume that was verified, and its group; "" of a copy that was made before that was told. */
  readonly uuid: string;
  readonly volumeGroup: string;
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
  /** 1 if it had its name only once it was read-only, so that somebody else made a writable one that; 0 if not. */
  readonly readOnly: number;
}

const factTag = `${tagPrefix}fact.`;
/** Tag of a copy that was made read-only before it had its name. */
export const readOnlyTag = `${factTag}readOnly=1`;

/** The tags of a copy: whose it is and, once it is verified, what it is. Each is short enough for every LVM. */
export function copyTags(copyId: string, facts?: CopyFacts): string[] {
  const told = Object.entries(facts ?? {}).filter(([, value]) => value !== "" && value !== 0);
  return [copyTag + copyId, ...told.map(([name, value]) => `${factTag}${name}=${value}`)];
}

/** Which of a copy's tags are to go for others. Those of the job stay. */
export function outdatedTags(tags: readonly string[], right: readonly string[]): string[] {
  return tags.filter((tag) => tag.startsWith(tagPrefix) && !tag.startsWith(runTag) && !right.includes(tag));
}

/** A copy's tags: what goes from a volume that is to be none any more. What a restore has marked stays. */
export function ownTags(tags: readonly string[]): string[] {
  const beginnings = [ownerTag, generationTag, copyTag, runTag, factTag];
  return tags.filter((tag) => beginnings.some((beginning) => tag.startsWith(beginning)));
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
    volumeGroup: told.get("volumeGroup") ?? "",
    readOnly: number("readOnly"),
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
  return lvcreate("-y", "-Wn", "-Zn", "-ay", "-l", String(extents), "-n", name, ...marked, volumeGroup);
}

/** Whether a copy can be made. Arguments: volume group, uri, programs. */
export const preflightVolumeScript = hostScript(
  "preflight-volume-copy",
  "observe",
  `${emitFunctions}${missingFunction}
group=$1 uri=$2; shift 2
emit_missing "$@"
emit_output group vgs --noheadings --units b --nosuffix --separator ' ' -o vg_free,vg_extent_size "$group"
if command -v nbdinfo >/dev/null; then emit_output size timeout 30 nbdinfo --size "$uri"; fi
emit end ""
`,
  ["name", "uri?", "many:word"],
);

canHaveCertificates(preflightVolumeScript);

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
 * Shell functions. `refuse_writable GROUP UUID`: ends the script with `volumeWritable` if it is that. lv_attr tells it of an
 * inactive volume too. `remove_volume GROUP NAME UUID [UNFINISHED]`: what would go with it, who has it open, and whether it can be
 * written to, as an "unfinished" one can, LVM sees under its own lock. A snapshot that somebody took a moment ago keeps it, and so
 * does `lvchange -p rw`.
 */
const removeVolumeFunction = `
refuse_writable() {
  volume_attr=$(lvs --noheadings -o lv_attr -S "lv_uuid=\\"$2\\"" "$1" 9>&-) || exit 1
  case $(echo $volume_attr) in ?w*) exit ${volumeWritable};; esac
}
remove_volume() {
  volume_is "$1" "$2" "$3"
  volume_finished=" && lv_attr=~\\"^.[rR]\\""
  [ "\${4-}" != unfinished ] || volume_finished=
  lvremove -y -S "lv_uuid=\\"$3\\"$volume_finished && !(lv_role={\\"origin\\"})" "$1/$2" </dev/null 9>&- || return 1
  [ -z "$volume_finished" ] || refuse_writable "$1" "$3"
  volume_left=$(lvs --noheadings -o lv_name -S "lv_uuid=\\"$3\\"" "$1" 9>&-) || return 1
  [ -z "$volume_left" ] || exit ${volumeOpen}
}
`;

/**
 * Ends the job and removes the unfinished volume. Arguments: unit, folder, volume group, the volume's name, the tag of its job.
 * Does nothing to a volume of that name that another job writes.
 */
export const discardVolumeScript = hostScript(
  "discard-volume-copy",
  "change",
  `${unitFunctions}${stopJobFunction}${volumeIsFunction}${removeVolumeFunction}
unit=$1 run=$2 group=$3 name=$4 tag=$5
lock
seen=$(lvs --noheadings -o lv_uuid,lv_tags -S "lv_name=\\"$name\\"" "$group" 9>&-) || exit 1
# UUID and tags; neither where it is gone.
set -- $seen
case "$1:,$2," in :,,|*:*,"$tag",*) ;; *) exit ${changedMeanwhile};; esac
stop_job "$unit" || exit 1
rm -rf "$run"
[ -n "$1" ] || exit 0
remove_volume "$group" "$name" "$1" unfinished
`,
);

/**
 * Gives a verified volume its name, once nobody can write to it any more and its tags say that it is verified: from then on
 * this is only ever finished. An earlier copy of that name is put aside, and removed at last: at no moment neither is there. One
 * that was made writable meanwhile keeps its name.
 * Arguments: unit, folder, volume group, name, the earlier copy's UUID ("-" for none), the name for it, name and UUID of the
 * verified volume, options of lvchange for its tags.
 */
export const nameVolumeScript = hostScript(
  "name-volume-copy",
  "change",
  `${unitFunctions}${stopJobFunction}${volumeIsFunction}${removeVolumeFunction}
unit=$1 run=$2 group=$3 name=$4 old=$5 aside=$6 part=$7 uuid=$8; shift 8
lock
stop_job "$unit" || exit 1
volume_is "$group" "$part" "$uuid"
# Of an inactive volume lv_permissions tells nothing, and one that is read-only already is refused.
permission=$(lvs --noheadings -o lv_attr -S "lv_uuid=\\"$uuid\\"" "$group" 9>&-) || exit 1
case $(echo $permission) in ?r*) ;; *) lvchange -y -p r -S "lv_uuid=\\"$uuid\\"" "$group/$part" </dev/null 9>&- || exit 1;; esac
if [ "$#" != 0 ]; then lvchange -y "$@" -S "lv_uuid=\\"$uuid\\"" "$group/$part" </dev/null 9>&- || exit 1; fi
# What it held is in the tags now.
rm -rf "$run"
if [ "$old" = - ]; then
  taken=$(lvs --noheadings -o lv_uuid -S "lv_name=\\"$name\\"" "$group" 9>&-) || exit 1
  [ -z "$taken" ] || exit ${changedMeanwhile}
  lvrename -y "$group" "$part" "$name" </dev/null 9>&-
  exit
fi
volume_is "$group" "$name" "$old"
refuse_writable "$group" "$old"
lvrename -y "$group" "$name" "$aside" </dev/null 9>&- || exit 1
lvrename -y "$group" "$part" "$name" </dev/null 9>&- || { lvrename -y "$group" "$aside" "$name" </dev/null 9>&-; exit 1; }
remove_volume "$group" "$aside" "$old"
`,
);

/** Removes a volume that is closed. Arguments: volume group, name, UUID. */
export const removeVolumeScript = hostScript(
  "remove-volume-copy",
  "change",
  `${unitFunctions}${volumeIsFunction}${removeVolumeFunction}
lock
remove_volume "$1" "$2" "$3"
`,
);

/** Gives a volume its name back, open or not. Arguments: volume group, the name it has, its UUID, its name. */
export const renameVolumeScript = hostScript(
  "rename-volume",
  "change",
  `${unitFunctions}
lock
seen=$(lvs --noheadings -o lv_uuid -S "lv_name=\\"$2\\"" "$1" 9>&-) || exit 1
[ "$(echo $seen)" = "$3" ] || exit ${changedMeanwhile}
lvrename -y "$1" "$2" "$4" </dev/null 9>&-
`,
);

/**
 * True if the tags are those of this very volume, among all of the host: those of another tell nothing of it. What vgimportclone(8)
 * has copied has its UUID too, but is in another group.
 */
export function isAsTagged(lv: LogicalVolume, all: readonly LogicalVolume[]): boolean {
  const facts = factsAmong(lv.tags);
  const meant = facts === undefined ? [] : identified(all, facts);
  return meant.length === 1 && meant[0] === lv;
}
