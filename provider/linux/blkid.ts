/**
 * What lies on a device, by low-level probing: blkid(8) with `-p`, which asks no cache, and partx(8), which reads the
 * partition table without telling the kernel of it.
 */
import { printable } from "../core/errors.js";
import { bytesPhrase } from "./copyJob.js";

/** What `blkid -p -o udev` found. All is missing where it recognises nothing. */
export interface Content {
  /** e.g. `ext4`, `LVM2_member`, `crypto_LUKS`. */
  readonly type?: string | undefined;
  readonly uuid?: string | undefined;
  readonly label?: string | undefined;
  /** e.g. `gpt`, `dos`. */
  readonly partitionTable?: string | undefined;
  /** Several things are on it at once, and which of them holds cannot be told. */
  readonly ambivalent?: string | undefined;
}

/** A partition as the table has it. */
export interface Partition {
  readonly number: number;
  /** In sectors of 512 bytes, as `sectors`. */
  readonly start: number;
  readonly sectors: number;
  /** GUID of its type, or e.g. `0x83`. */
  readonly type: string;
  readonly content: Content;
}

/** Exit codes of `blkid -p`: found, nothing recognised, ambivalent. Others tell nothing. */
const answers = ["0", "2", "8"];

/** Reads the output of `blkid -p -o udev`. Throws where it failed. A label is the guest's own: made harmless for terminals. */
export function parseContent(stdout: string, exitCode: string): Content {
  if (!answers.includes(exitCode))
    throw new Error(`blkid ended with exit code ${exitCode}: ${stdout.slice(0, 200)}`);
  const found = new Map<string, string>();
  for (const line of stdout.split("\n")) {
    const match = /^(ID_[A-Z_]+)=(.*)$/.exec(line);
    if (match?.[1] !== undefined) found.set(match[1], printable(decoded(match[2] ?? "")));
  }
  return {
    type: found.get("ID_FS_TYPE"),
    uuid: found.get("ID_FS_UUID_ENC"),
    label: found.get("ID_FS_LABEL_ENC"),
    partitionTable: found.get("ID_PART_TABLE_TYPE"),
    ambivalent: found.get("ID_FS_AMBIVALENT"),
  };
}

/** `\xHH` are bytes that udev does not take in a value. */
function decoded(text: string): string {
  const bytes = text.replace(/[^\0-\x7f]|\\x([0-9a-f]{2})/g, (whole, hex?: string) =>
    hex === undefined
      ? Buffer.from(whole, "utf8").toString("latin1")
      : String.fromCharCode(Number.parseInt(hex, 16)),
  );
  return Buffer.from(bytes, "latin1").toString("utf8");
}

/**
 * Shell function `emit_partitions DISK`, for scripts with `emitFunctions`: emits `partitions`, a line each with number,
 * start, sectors, type, and of what lies there blkid's exit code and, in base64, its words. `partitions.rc` is not 0
 * where there is no table.
 */
export const partitionsFunction = `
emit_partitions() {
  emit_output partitions timeout 60 partx -rgo NR,START,SECTORS,TYPE "$1"
  [ "$emit_rc" = 0 ] || return 0
  emit partitions "$(printf '%s\\n' "$emit_text" | while read -r number start sectors type; do
    content=$(timeout 30 blkid -p -o udev -O $((start * 512)) -S $((sectors * 512)) "$1" 2>&1)
    printf '%s %s %s %s %s ' "$number" "$start" "$sectors" "$type" "$?"
    printf %s "$content" | base64 -w0; echo
  done)"
}
`;

/** Reads what `emit_partitions` printed. */
export function parsePartitions(text: string): Partition[] {
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => {
      const match = /^(\d+) (\d+) (\d+) (\S+) (\d+) ([A-Za-z0-9+/=]*)$/.exec(line);
      if (match === null) throw new Error(`unexpected line "${line.slice(0, 80)}"`);
      const [, number, start, sectors, type = "", exitCode = "", content = ""] = match;
      return {
        number: Number(number),
        start: Number(start),
        sectors: Number(sectors),
        type,
        content: parseContent(Buffer.from(content, "base64").toString("utf8"), exitCode),
      };
    });
}

const names: Readonly<Record<string, string>> = {
  LVM2_member: "a physical volume of LVM",
  LVM1_member: "a physical volume of LVM",
  crypto_LUKS: "an encrypted volume (LUKS)",
  swap: "swap space",
  linux_raid_member: "a member of an md array",
};

/** What it is, for people: `ext4 "root"`, `swap space`, `nothing that blkid recognises`. */
export function contentPhrase({ type, label, partitionTable, ambivalent }: Content): string {
  if (ambivalent !== undefined) return `several things at once (${ambivalent})`;
  if (type !== undefined)
    return `${names[type] ?? type}${label === undefined ? "" : ` ${JSON.stringify(label)}`}`;
  if (partitionTable !== undefined) return `a partition table (${partitionTable})`;
  return "nothing that blkid recognises";
}

/** `1 (512 MiB, vfat "EFI"), 2 (15 GiB, ext4)`. */
export function partitionsPhrase(partitions: readonly Partition[]): string {
  if (partitions.length === 0) return "none";
  return partitions
    .map(({ number, sectors, type, content }) => {
      const what =
        content.type === undefined && !content.ambivalent ? `type ${type}` : contentPhrase(content);
      return `${number} (${bytesPhrase(sectors * 512)}, ${what})`;
    })
    .join(", ");
}
