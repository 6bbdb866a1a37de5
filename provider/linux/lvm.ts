/**
 * LVM: the commands that are run and what they print, as pure functions.
 * Sources: lvs(8), lvcreate(8), lvconvert(8), lvmsystemid(7); states were recorded on real servers.
 */
import { z } from "zod";
import { hostProgram } from "../core/hostCommands.js";

const MiB = 1024 * 1024;

/** What is asked of every logical volume; one report answers for all resources of a host. */
const reportFields = [
  "lv_uuid",
  "vg_name",
  "lv_name",
  "lv_path",
  "lv_dm_path",
  "origin",
  "origin_uuid",
  "lv_size",
  "origin_size",
  "lv_attr",
  "lv_active",
  "lv_device_open",
  "lv_snapshot_invalid",
  "lv_merge_failed",
  "lv_merging",
  "snap_percent",
  "data_percent",
  "metadata_percent",
  "pool_lv",
  "lv_health_status",
  "lv_role",
  "lv_permissions",
  "lv_tags",
  "lv_time",
  "vg_extent_size",
  "vg_free",
] as const;

/** Reads all logical volumes of a host. Takes LVM's shared lock: it waits while another command changes. */
export const lvsCommand = hostProgram(
  "logical-volumes",
  "observe",
  [
    "lvs",
    ...["-a", "--reportformat", "json", "--units", "b", "--nosuffix", "--binary"],
    ...["--config", 'report{time_format="%s" mark_hidden_devices=0}'],
    ...["-o", reportFields.join(",")],
  ],
  [],
);

/** The programs of LVM that change. */
export const lvcreate = hostProgram("lvcreate", "change", ["lvcreate"]);
export const lvchange = hostProgram("lvchange", "change", ["lvchange"]);
const lvremove = hostProgram("lvremove", "change", ["lvremove"]);
const lvextend = hostProgram("lvextend", "change", ["lvextend"]);
const lvrename = hostProgram("lvrename", "change", ["lvrename"]);

/** One logical volume as LVM and the kernel have it. Sizes in bytes. */
export interface LogicalVolume {
  readonly uuid: string;
  readonly volumeGroup: string;
  readonly name: string;
  /** `/dev/VG/LV`. */
  readonly path: string;
  readonly origin: string | undefined;
  readonly originUuid: string | undefined;
  /** For a COW snapshot the size of its store, else the visible size. */
  readonly sizeBytes: number;
  /** For a COW snapshot or an origin of one: the origin's size. */
  readonly originSizeBytes: number | undefined;
  readonly attr: string;
  readonly active: boolean;
  /** Its users stand still: an LVM command that was killed half-way leaves that. */
  readonly suspended: boolean;
  /** `undefined` when LVM cannot tell (inactive). */
  readonly open: boolean | undefined;
  readonly kind: "cow" | "thin" | "pool" | "internal" | "other";
  readonly invalid: boolean;
  readonly merging: boolean;
  /** Whether the kernel gave up a merge; `undefined` where it tells nothing of one (inactive, or none is loaded). */
  readonly mergeFailed: boolean | undefined;
  /** Fill level of a COW store, a thin volume or a pool. */
  readonly usedPercent: number | undefined;
  readonly metadataPercent: number | undefined;
  readonly pool: string | undefined;
  readonly health: string;
  readonly readOnly: boolean;
  readonly tags: readonly string[];
  /** Seconds since 1970. */
  readonly createdAt: number;
  readonly extentSizeBytes: number;
  readonly volumeGroupFreeBytes: number;
}

type Row = Readonly<Record<(typeof reportFields)[number], string>>;

// Not an object of zod's: that would be a copy of each of many.
const row = z.custom<Row>(
  (value) =>
    typeof value === "object" &&
    value !== null &&
    reportFields.every((field) => typeof Reflect.get(value, field) === "string"),
  "is no row of lvs with all the fields that were asked for",
);
/** An object of strings. */
const flatObject = /\{\s*(?:"[^"\\]*(?:\\.[^"\\]*)*"[\s:,]*)+\}/g;
/** With the place of each row instead of it, in brackets: two that no comma divides are no JSON. */
const report = z.object({ report: z.array(z.object({ lv: z.array(z.tuple([z.number()])) })) });

/** Parses the output of `lvsCommand`. Throws an ordinary error on anything unexpected: never "no volumes". */
export function parseLvs(stdout: string): LogicalVolume[] {
  // Row by row: what is read of one is gone before the next, while all rows at once of thousands of volumes would be kept until V8
  // looks through all that it has.
  const rows: string[] = [];
  const frame = stdout.replace(flatObject, (found) => `[${rows.push(found) - 1}]`);
  const parsed = report.parse(JSON.parse(frame));
  if (parsed.report.length === 0) throw new Error("lvs printed no report");
  const places = parsed.report.flatMap(({ lv }) => lv.flat());
  if (new Set(places).size < places.length) throw new Error("lvs printed no rows alone");
  return places.map((at) => toLogicalVolume(row.parse(JSON.parse(rows[at] ?? "null"))));
}

function toLogicalVolume(lv: Row): LogicalVolume {
  const roles = lv.lv_role.split(",");
  const type = lv.lv_attr[0] ?? "-";
  return {
    uuid: lv.lv_uuid,
    volumeGroup: lv.vg_name,
    name: lv.lv_name,
    path: lv.lv_path === "" ? `/dev/${lv.vg_name}/${lv.lv_name}` : lv.lv_path,
    origin: text(lv.origin),
    originUuid: text(lv.origin_uuid),
    sizeBytes: bytes(lv.lv_size, "lv_size"),
    originSizeBytes: lv.origin_size === "" ? undefined : bytes(lv.origin_size, "origin_size"),
    attr: lv.lv_attr,
    active: lv.lv_active !== "" && lv.lv_active !== "0" && lv.lv_attr[4] !== "-",
    suspended: lv.lv_attr[4] === "s" || lv.lv_attr[4] === "S",
    open:
      lv.lv_device_open === "open" || lv.lv_device_open === "1"
        ? true
        : lv.lv_device_open === "" || lv.lv_device_open === "0"
          ? false
          : undefined,
    kind: kindOf(lv.lv_attr, roles),
    invalid: lv.lv_snapshot_invalid === "1" || lv.lv_attr[4] === "I" || overfull(lv.snap_percent),
    merging: lv.lv_merging === "1" || type === "S",
    mergeFailed: { "0": false, "1": true }[lv.lv_merge_failed],
    usedPercent: percent(lv.snap_percent) ?? percent(lv.data_percent),
    metadataPercent: percent(lv.metadata_percent),
    pool: text(lv.pool_lv),
    health: lv.lv_health_status,
    readOnly: lv.lv_attr[1] === "r" || lv.lv_attr[1] === "R",
    tags: lv.lv_tags === "" ? [] : lv.lv_tags.split(","),
    createdAt: lv.lv_time === "" ? 0 : bytes(lv.lv_time, "lv_time"),
    extentSizeBytes: bytes(lv.vg_extent_size, "vg_extent_size"),
    volumeGroupFreeBytes: bytes(lv.vg_free, "vg_free"),
  };
}

/**
 * The volumes that may be the one of that UUID, which was in that group: it itself, if it is there. One elsewhere only where nothing
 * is left of that group, as after vgrename(8): vgimportclone(8) of a copied disk keeps the UUIDs of volumes, and their tags, and
 * changes but the group's.
 */
export function identified(
  all: readonly LogicalVolume[],
  { volumeGroup, uuid }: Pick<LogicalVolume, "volumeGroup" | "uuid">,
): LogicalVolume[] {
  const group = all.filter((lv) => lv.volumeGroup === volumeGroup);
  return (group.length > 0 ? group : all).filter((lv) => lv.uuid === uuid);
}

/**
 * A pool's role is "private" too, but it is a volume people know. A thin volume is told by the target type: with
 * COW snapshots of its own the volume type is "o", while it is merged "S". Source: lv_attr_dup in lvm2's lv.c.
 */
function kindOf(attr: string, roles: readonly string[]): LogicalVolume["kind"] {
  if (attr[0] === "t") return "pool";
  if (roles.includes("private")) return "internal";
  if (attr[6] === "t") return "thin";
  return attr[0] === "s" || attr[0] === "S" ? "cow" : "other";
}

/** A percentage above 100 means a broken store (lvm2 issue 164). */
function overfull(value: string): boolean {
  return (percent(value) ?? 0) > 100;
}

function text(value: string): string | undefined {
  return value === "" ? undefined : value;
}

function percent(value: string): number | undefined {
  return value === "" || Number.isNaN(Number(value)) ? undefined : Number(value);
}

function bytes(value: string, field: string): number {
  const number = Number(value);
  if (value === "" || !Number.isSafeInteger(number)) throw new Error(`lvs: ${field} is "${value}"`);
  return number;
}

/** A size as declared: bytes, or a share of the origin (COW stores only). */
export type Size = { readonly bytes: number } | { readonly percentOfOrigin: number };

const units: Readonly<Record<string, number>> = {
  b: 1,
  k: 1024,
  m: MiB,
  g: 1024 * MiB,
  t: 1024 * 1024 * MiB,
  p: 1024 ** 5,
};

/** Reads `"1G"`, `"1.5GiB"`, `1073741824`, `"20%ORIGIN"`. Throws an error whose message says what would be right. */
export function parseSize(value: string | number): Size {
  if (typeof value === "number" || /^\d+$/.test(value)) {
    const number = Number(value);
    if (!Number.isSafeInteger(number) || number < MiB) {
      throw new Error(`${value} would be bytes, too few to be meant: write a unit, e.g. "${value}G"`);
    }
    return { bytes: wholeSectors(number) };
  }
  const share = /^(\d+(?:\.\d+)?)%ORIGIN$/i.exec(value);
  if (share) {
    const percentOfOrigin = Number(share[1]);
    if (percentOfOrigin < 1 || !Number.isInteger(percentOfOrigin)) {
      throw new Error(`"${value}" must be a whole number of percent, at least 1, e.g. "20%ORIGIN"`);
    }
    return { percentOfOrigin };
  }
  const match = /^(\d+(?:\.\d+)?) ?([bkmgtp])(?:i?b)?$/i.exec(value);
  const unit = units[match?.[2]?.toLowerCase() ?? ""];
  if (!match || unit === undefined) {
    throw new Error(`"${value}" is not a size: write e.g. "1G", "512M" (1024-based), bytes, or "20%ORIGIN"`);
  }
  const number = Math.ceil(Number(match[1]) * unit);
  if (!Number.isSafeInteger(number)) throw new Error(`"${value}" is larger than any volume`);
  if (number < MiB) throw new Error(`"${value}" is less than 1M, too small for a snapshot`);
  return { bytes: wholeSectors(number) };
}

/** LVM refuses a size in bytes that is no multiple of 512. */
function wholeSectors(number: number): number {
  return Math.ceil(number / 512) * 512;
}

/** The bytes a size means for an origin of that many bytes; `undefined` where the origin's size is not known. */
export function sizeInBytes(size: Size, originSizeBytes: number | undefined): number | undefined {
  if ("bytes" in size) return size.bytes;
  return originSizeBytes === undefined
    ? undefined
    : Math.floor((originSizeBytes * size.percentOfOrigin) / 100);
}

/**
 * Bytes that a COW store needs to hold `bytes` of its origin: a header, and to each area of chunks a table with 16 bytes for each
 * of them, the table behind the last area too. Source: dm-snap-persistent.c, and `_cow_max_size` of lvm2's snapshot_manip.c.
 */
export function storeNeed(bytes: number, chunkSize: number): number {
  const chunks = Math.ceil(bytes / chunkSize);
  return (chunks + Math.floor(chunks / (chunkSize / 16)) + 2) * chunkSize;
}

const reservedInside = [
  "_cdata",
  "_cmeta",
  "_corig",
  "_cpool",
  "_cvol",
  "_wcorig",
  "_mimage",
  "_mlog",
  "_rimage",
  "_rmeta",
  "_tdata",
  "_tmeta",
  "_vdata",
  "_imeta",
  "_iorig",
  "_pmspare",
  "_vorigin",
];

/** Why LVM would refuse this volume group name; `undefined` when it is good. */
export function volumeGroupNameProblem(name: string): string | undefined {
  if (name === "") return "must not be empty";
  if (!/^[A-Za-z0-9+_.-]+$/.test(name)) {
    return `"${name}" holds characters LVM refuses: letters, digits and + _ . - are right`;
  }
  if (name.startsWith("-")) return `"${name}" must not begin with "-"`;
  if (name === "." || name === "..") return `"${name}" is not a name`;
  if (name.length > 127) return `is ${name.length} characters long, LVM allows 127`;
  return undefined;
}

/** Why LVM would refuse this logical volume name; `undefined` when it is good. */
export function logicalVolumeNameProblem(name: string): string | undefined {
  const problem = volumeGroupNameProblem(name);
  if (problem) return problem;
  if (/^(snapshot|pvmove)/.test(name)) {
    return `"${name}" must not begin with "snapshot" or "pvmove" (reserved by LVM): e.g. "vm1-snapshot"`;
  }
  const reserved = reservedInside.find((part) => name.includes(part));
  return reserved ? `"${name}" must not contain "${reserved}" (reserved by LVM)` : undefined;
}

/**
 * Why the device-mapper name would not fit; `undefined` when it does. Device-mapper allows 127 characters,
 * doubles every "-" and a COW store appends "-cow". Found out late, lvcreate leaves a plain volume behind.
 */
export function deviceMapperNameProblem(volumeGroup: string, name: string): string | undefined {
  const length = `${double(volumeGroup)}-${double(name)}-cow`.length;
  return length > 127
    ? `with volume group "${volumeGroup}" makes a device-mapper name of ${length} characters ("-" counts twice), 127 fit: shorten it`
    : undefined;
}

function double(name: string): string {
  return name.replaceAll("-", "--");
}

/** Why LVM would refuse this tag; `undefined` when it is good. */
export function tagProblem(tag: string): string | undefined {
  if (tag === "") return "a tag must not be empty";
  if (tag.length > 1024) return "a tag has at most 1024 characters";
  if (!/^[A-Za-z0-9_+.\-/=!:&#]+$/.test(tag)) {
    return `"${tag}" holds characters LVM refuses in tags: letters, digits and . _ - + / = ! : & # are right`;
  }
  if (tag.startsWith("-")) return `"${tag}" must not begin with "-"`;
  return undefined;
}

/** What a new snapshot is made of. */
export interface SnapshotPlan {
  readonly volumeGroup: string;
  readonly origin: string;
  readonly name: string;
  /** `undefined`: a thin snapshot of a thin origin. */
  readonly size: Size | undefined;
  readonly readOnly: boolean;
  /** Bytes; COW only. */
  readonly chunkSize: number;
  readonly tags: readonly string[];
}

/** `lvcreate` for a COW (with `size`) or thin snapshot. */
export function createSnapshotCommand(plan: SnapshotPlan): string[] {
  const common = ["-y", "-p", plan.readOnly ? "r" : "rw", "-n", plan.name];
  const tags = plan.tags.flatMap((tag) => ["--addtag", tag]);
  const origin = `${plan.volumeGroup}/${plan.origin}`;
  if (plan.size === undefined) {
    // Without -kn a later activation silently does nothing; without -ay the snapshot has no device.
    return lvcreate("-s", ...common, "-kn", "-ay", ...tags, origin);
  }
  const size =
    "bytes" in plan.size ? ["-L", `${plan.size.bytes}b`] : ["-l", `${plan.size.percentOfOrigin}%ORIGIN`];
  return lvcreate("-s", ...common, "-c", `${plan.chunkSize}b`, ...size, ...tags, origin);
}

/** Selects one volume by UUID, checked by LVM under its lock: a name that changed hands is not touched. */
function select(uuid: string): string[] {
  return ["-S", `lv_uuid="${uuid}"`];
}

/** `lvremove` of exactly the volume with this UUID; without `-f`, so one in use is refused. */
export function removeCommand(lv: Pick<LogicalVolume, "volumeGroup" | "name" | "uuid">): string[] {
  return lvremove("-y", ...select(lv.uuid), `${lv.volumeGroup}/${lv.name}`);
}

/** `lvextend` of a COW store. Its percentages of the origin, other than lvcreate's, leave no room for the tables. */
export function extendCommand(lv: Pick<LogicalVolume, "volumeGroup" | "name">, size: Size): string[] {
  const amount = "bytes" in size ? ["-L", `${size.bytes}b`] : ["-l", `${size.percentOfOrigin}%ORIGIN`];
  return lvextend("-y", ...amount, `${lv.volumeGroup}/${lv.name}`);
}

export function renameCommand(lv: Pick<LogicalVolume, "volumeGroup" | "name">, name: string): string[] {
  return lvrename("-y", lv.volumeGroup, lv.name, name);
}

export function permissionCommand(
  lv: Pick<LogicalVolume, "volumeGroup" | "name" | "uuid">,
  readOnly: boolean,
): string[] {
  return lvchange("-y", "-p", readOnly ? "r" : "rw", ...select(lv.uuid), `${lv.volumeGroup}/${lv.name}`);
}

export function activateCommand(lv: Pick<LogicalVolume, "volumeGroup" | "name" | "uuid">): string[] {
  return lvchange("-y", "-ay", "-K", ...select(lv.uuid), `${lv.volumeGroup}/${lv.name}`);
}

export function tagCommand(
  lv: Pick<LogicalVolume, "volumeGroup" | "name" | "uuid">,
  add: readonly string[],
  remove: readonly string[],
): string[] {
  return lvchange(
    "-y",
    ...add.flatMap((tag) => ["--addtag", tag]),
    ...remove.flatMap((tag) => ["--deltag", tag]),
    ...select(lv.uuid),
    `${lv.volumeGroup}/${lv.name}`,
  );
}

/** What to look at when LVM fails without a reason, as it does where it cannot write its archive to the end. */
export function lvmSilence(stderr: string): string | undefined {
  return /^\s*Command failed with status code \d+\.$/m.test(stderr)
    ? "LVM gives no reason; a full disk is the usual one, since LVM archives its metadata below /etc/lvm: look at `df /etc/lvm`, make room and run again."
    : undefined;
}

/** What a failed LVM command's stderr says, where it can be told apart. */
export function lvmFailure(
  stderr: string,
): "LVM_LOCKED" | "NO_SPACE" | "VOLUME_GROUP_NOT_FOUND" | "ORIGIN_NOT_FOUND" | "VOLUME_IN_USE" | undefined {
  if (/Can't get lock for/.test(stderr)) return "LVM_LOCKED";
  if (
    /insufficient free space|Insufficient suitable allocatable extents|not enough free space|free space in (the )?thin pool/i.test(
      stderr,
    )
  )
    return "NO_SPACE";
  if (/Volume group "[^"]*" not found/.test(stderr)) return "VOLUME_GROUP_NOT_FOUND";
  if (/Snapshot origin LV \S+ not found/.test(stderr)) return "ORIGIN_NOT_FOUND";
  if (/contains a filesystem in use|is used by another device|Logical volume \S+ in use/.test(stderr)) {
    return "VOLUME_IN_USE";
  }
  return undefined;
}
