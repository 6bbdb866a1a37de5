/**
 * The job of a copy: a script that runs on the destination host as a transient systemd unit, so that it outlives the
 * SSH link. Sources: nbdcopy(1), qemu-img(1), nbdkit-rate-filter(1), systemd-run(1).
 *
 * What it makes lies in the folder `FILE.part`, beside the file it will become: `record.json` (whose copy it is),
 * `image` and, at the end, `result`. What is of no use after a reboot lies below `/run`.
 */
import { createHash } from "node:crypto";
import { z } from "zod";
import { imageGuardFunctions } from "./imageFile.js";
import { type ClientTls, jobUri } from "./tls.js";

/** Where the parts of a copy lie. */
export interface CopyPaths {
  readonly file: string;
  /** Folder of the unfinished copy. */
  readonly part: string;
  /** Says what the file is, also without any Pulumi state. */
  readonly manifest: string;
  readonly unit: string;
  /** Job, progress and reason of a failure. */
  readonly run: string;
}

/** The folder of an absolute path. */
export function folderOf(file: string): string {
  return file.slice(0, file.lastIndexOf("/")) || "/";
}

/** What tells copies to one file from all others, in names: 16 hexadecimal digits. */
export function copyName(file: string): string {
  return createHash("sha256").update(file).digest("hex").slice(0, 16);
}

/** The paths follow from the file alone: two copies to one file meet, whatever they are called. */
export function copyPaths(file: string): CopyPaths {
  const name = copyName(file);
  return {
    file,
    part: `${file}.part`,
    manifest: `${file}.manifest.json`,
    unit: `lvm-nbd-copy-${name}.service`,
    run: `/run/lvm-nbd-copy-${name}`,
  };
}

/** What is copied and how. */
export interface CopyPlan {
  readonly uri: string;
  readonly tls?: ClientTls | undefined;
  readonly format: "raw" | "qcow2";
  readonly compress: boolean;
  readonly connections: number;
  /** Bytes a second. */
  readonly bandwidthLimit: number | undefined;
  /** Whether the source is read a second time, for its checksum. */
  readonly verify: boolean;
}

/** The arguments of `copyJob`. `recordDigest`: SHA-256 of the record whose job it is. */
export function copyArguments(paths: CopyPaths, plan: CopyPlan, recordDigest: string): string[] {
  return [
    paths.part,
    paths.run,
    jobUri(plan.uri, plan.tls, paths.run),
    plan.format,
    plan.compress ? "yes" : "no",
    String(plan.connections),
    // nbdkit counts bits.
    plan.bandwidthLimit === undefined ? "" : String(plan.bandwidthLimit * 8),
    plan.verify ? "yes" : "no",
    recordDigest,
  ];
}

/**
 * Bytes a second: a number, or e.g. `"20M"`, `"1.5 GiB/s"` (1024-based). Throws an error whose message says what would be
 * right.
 */
export function parseRate(value: string | number): number {
  const match = /^(\d+(?:\.\d+)?) ?(?:([kmg])(?:i?b)?|b)?(?:\/s)?$/i.exec(String(value));
  const power = { k: 1, m: 2, g: 3 }[match?.[2]?.toLowerCase() ?? ""] ?? 0;
  const bytes = match === null ? Number.NaN : Math.round(Number(match[1]) * 1024 ** power);
  if (!Number.isSafeInteger(bytes))
    throw new Error(`"${value}" is no rate: write e.g. "20M" (bytes a second, 1024-based)`);
  if (bytes < 64 * 1024) {
    throw new Error(
      `${value} would be ${bytes} bytes a second, too few to be meant: write a unit, e.g. "20M"`,
    );
  }
  return bytes;
}

/** The programs that a plan needs on the destination host. */
export function copyPrograms(plan: Pick<CopyPlan, "format" | "bandwidthLimit" | "tls">): string[] {
  const viaNbdkit = plan.bandwidthLimit !== undefined || (plan.tls !== undefined && plan.format === "qcow2");
  return [
    ...["nbdcopy", "nbdinfo", "systemd-run", "flock", "findmnt", "sha256sum"],
    ...(plan.format === "qcow2" ? ["qemu-img", "qemu-nbd"] : []),
    ...(viaNbdkit ? ["nbdkit"] : []),
  ];
}

/**
 * Shell function. `sum_of TEXT`: the checksum in it; fails unless the text also says `rc 0`. The exit code of what was
 * read travels with the checksum: a note of it in a file would be lost on a full disk.
 */
export const sumOf = `
sum_of() {
  case $1 in *"rc 0"*) ;; *) return 1;; esac
  printf '%s\\n' "$1" | sed -n 's/^\\([0-9a-f]\\{64\\}\\) .*/\\1/p' | grep .
}
`;

/**
 * Shell functions. `hash_file FORMAT FILE`: SHA-256 of what the image holds, read from the disk and not from the
 * cache where the file system lets one; how far it is goes to fd 3. It fails with 1 if the file cannot be read, with 2
 * if that cannot be told (a program is missing or was killed). `facts FILE`: what changes when somebody writes the
 * file: inode, size in bytes, time of modification. "-" where there is none. `plain FILE`: it is a regular file and no link. `digest FILE`: SHA-256
 * of a small one; "other" of anything else, which may be a pipe that never ends; "-" where there is none. For scripts
 * with `imageGuardFunctions`.
 */
export const imageFunctions = `${sumOf}
facts() { if [ -e "$1" ] || [ -L "$1" ]; then stat -c '%i %s %.9Y' "$1" || exit 1; else echo -; fi; }
plain() { [ -f "$1" ] && [ ! -L "$1" ]; }
digest() {
  if plain "$1"; then timeout 10 sha256sum "$1" | sed 's/^\\\\//' | cut -d' ' -f1
  elif [ -e "$1" ] || [ -L "$1" ]; then echo other; else echo -; fi
}
hash_file() (
  # Looked at and read is one file: another could be put in its place meanwhile.
  plain "$2" && exec 5<"$2" && [ -f /proc/self/fd/5 ] || exit 2
  set -- "$1" /proc/self/fd/5
  # qemu would open the files that it names, even to write to them.
  [ "$1" != qcow2 ] || alone "$2" || exit
  if dd if="$2" of=/dev/null iflag=direct bs=4096 count=1 status=none 2>/dev/null; then direct="direct," cache=none
  else direct='' cache=writeback; sync "$2"; dd of="$2" oflag=nocache conv=notrunc,nocreat,fdatasync count=0 status=none; fi
  if [ "$1" = qcow2 ]; then
    command -v nbdcopy >/dev/null && command -v qemu-nbd >/dev/null || exit 2
    read_back=$({ { nbdcopy --progress=3 -- [ qemu-nbd -r -f qcow2 --cache="$cache" "$2" ] -; echo "rc $?" >&4; } | sha256sum; } 4>&1)
  else
    read_back=$({ { dd if="$2" bs=4M iflag="$direct"fullblock status=progress 2>&3; echo "rc $?" >&4; } | sha256sum; } 4>&1)
  fi
  sum_of "$read_back" && exit 0
  # No code, or one of a signal: it was not the file that failed. Of qcow2 programs between may have.
  [ "$1" != qcow2 ] || exit 2
  case $read_back in *"rc 1"[0-9][0-9]*) exit 2;; *"rc "*) exit 1;; *) exit 2;; esac
)
`;

/**
 * Shell functions, and those of `imageGuardFunctions`. `endangered FOLDER`: what `exposed` tells of it, unless that is on a network file system, where owners and modes say
 * little of who can change what. What is above that is root's alone, so that nobody else can turn the folder to such a one. `open_to_all
 * FOLDER`: its owner and mode, where its mount gives every folder a mode that lets others than root write.
 */
export const folderGuardFunctions = `${imageGuardFunctions}
endangered() {
  endangered_by=$(exposed "$1")
  [ -n "$endangered_by" ] || return 0
  case $(stat -f -c %T "\${endangered_by% (*}" 2>/dev/null) in
  nfs*|cifs|smb*|*0xfe534d42*|fuse|fuseblk|v9fs|9p|ceph|gluster*|afs|coda|lustre|gpfs|panfs|vboxsf|vmhgfs|prl_fs) ;;
  *) printf '%s' "$endangered_by";;
  esac
}
open_to_all() {
  case $(stat -f -c %T "$1" 2>/dev/null) in
  fuseblk|vboxsf|vmhgfs|prl_fs) ;;
  cifs|smb*|*0xfe534d42*) case ,$(findmnt -n -o OPTIONS -T "$1"), in *,cifsacl,*|*,modefromsid,*) return 0;; *,dir_mode=*) ;; *) return 0;; esac;;
  *) return 0;;
  esac
  case $(stat -c %A "$1") in ?????-??-?) ;; *) printf '%s' "$1 ($(stat -c '%U, %A' "$1"))";; esac
}
`;

/**
 * Shell function. `own_folder FILE`: whether the folder we are in is of whoever made that file in it, and nobody else can change it;
 * if not, the file goes. Not "root's": on a network file system what root makes may be somebody's.
 */
export const ownFolderFunction = `
own_folder() {
  case $(stat -c '%u %A' .) in "$(stat -c %u "$1") "?????-??-?) ;; *) rm -f "$1"; return 1;; esac
}
`;

/**
 * Shell functions of a job, beside `sumOf`; its `uri`, `bits`, `connections`, `verify` and `run` are set, `undo` drops what it
 * made. `phase NAME`: what it does now. `fail REASON`: ends it. `with_source COMMAND [plain]`: runs that with the source's uri in
 * `source`, for a program that knows no TLS a "plain" one. `map_source`: of what is in `extents` (see `extentList`) nothing is asked that is
 * a hole, until `mapped` is empty again; where nbdkit cannot do that, all is. `read_source`, then `await_source`: the source is read meanwhile, its checksum is in `source_sum` then. `read_again`,
 * then `require_same SUM`: so it is read a second time, and must have this checksum.
 */
export const jobFunctions = `
mapped=
phase() { printf '%s %s\\n' "$1" "$(date +%s)" >"$run/phase.new" && mv -f "$run/phase.new" "$run/phase"; }
fail() { undo; printf '%s' "$1" >"$run/failure.new" && mv -f "$run/failure.new" "$run/failure"; exit 1; }
with_source() {
  command=$1; export command
  case $uri in nbds:*) secured="tls-certificates=\${uri#*\\?tls-certificates=}";; *) secured=;; esac
  if [ -z "$bits$mapped" ] && { [ -z "$secured" ] || [ "\${2-}" != plain ]; }; then source=$uri; export source; sh -c "$command"; return; fi
  source=
  nbdkit -U - -r --exit-with-parent \${mapped:+--filter=extentlist} \${bits:+--filter=rate} nbd uri="\${uri%%\\?*}" $secured \\
    \${bits:+rate="$bits"} \${mapped:+extentlist="$mapped"} \\
    --run 'source=$uri; export source; sh -c "$command"'
}
map_source() {
  [ -n "\${extents-}" ] && nbdkit --dump-plugin nbd >/dev/null 2>&1 && printf %s "$extents" >"$run/extents" || return 0
  # What it does not tell of would pass for a hole.
  set -- $(tail -n 1 "$run/extents")
  [ "$((\${1:-0} + \${2:-0}))" = "$size" ] || return 0
  nbdkit -U - -r --filter=extentlist null "$size" extentlist="$run/extents" --run true 2>/dev/null && mapped=$run/extents
  return 0
}
read_source() {
  with_source '{ { nbdcopy --progress=3 "$source" - 3>"$run/progress"; echo "rc $?" >&4; } | sha256sum; } 4>&1' >"$run/sum" &
  reading=$!
}
await_source() { wait "$reading" && source_sum=$(sum_of "$(cat "$run/sum")"); }
read_again() { [ "$verify" != yes ] || read_source; }
require_same() {
  [ "$verify" = yes ] || return 0
  await_source || fail "the source could not be read a second time"
  [ "$1" = "$source_sum" ] || fail "mismatch: the copy reads back as $1, the source as $source_sum"
}
`;

/**
 * Copies, flushes, reads the copy back, and the source where that is to be verified. It ends with `result` in the folder, or with `failure` below /run and no image:
 * what a full disk needs most is room.
 */
export const copyJob = `${imageFunctions}${jobFunctions}${folderGuardFunctions}${ownFolderFunction}
undo() { :; }
run=$2 uri=$3 format=$4 compress=$5 connections=$6 bits=$7 verify=$8 record=$9
umask 077
export LC_ALL=C uri connections run
above=\${1%/*}; above=$(endangered "\${above:-/}")
[ -z "$above" ] || fail "others than root can change $above, and so what is copied to $1"
# On a network file system who can write there may have put another one in its place, or a link.
cd -P "$1" && [ "$(digest record.json)" = "$record" ] && rm -f result.new && (set -C; : >result.new) && own_folder result.new ||
  fail "the folder of the unfinished copy, $1 ($(stat -c '%U, %A' .)), is not the one that was made for it, or others can change it"
undo() { rm -f image; }
began=$(date +%s)
size=$(nbdinfo --size "$uri") || fail "the source does not answer"
printf '%s\\n' "$size" >"$run/size"
phase copy
map_source
if [ "$format" = raw ]; then
  with_source 'nbdcopy --flush --progress=3 --connections="$connections" "$source" image 3>"$run/progress"'
elif [ "$compress" = yes ]; then
  with_source 'qemu-img convert -p -c -f raw -O qcow2 "$source" image >"$run/progress"' plain
else
  with_source 'qemu-img convert -p -f raw -O qcow2 "$source" image >"$run/progress"' plain
fi || fail "the copy broke off"
mapped=
sync image || fail "what was copied could not be written to the disk"
rm -f "$run/progress"
phase verify
read_again
sum=$(hash_file "$format" image 3>"$run/read") || fail "the image could not be read back"
require_same "$sum"
[ "$format" = qcow2 ] || [ "$(stat -c %s image)" = "$size" ] || fail "the image is smaller than the source"
{
  printf '{"sizeBytes":%s,"sha256":"%s","facts":"%s",' "$size" "$sum" "$(facts image)"
  printf '"verified":%s,' "$([ "$verify" = yes ] && echo true || echo false)"
  printf '"startedAt":%s,"endedAt":%s,' "$began" "$(date +%s)"
  printf '"tools":"%s"}\\n' "$({ nbdcopy --version; [ "$format" = raw ] || qemu-img --version | head -n 1; uname -sr; } | tr -d '"\\\\' | paste -sd, -)"
} >result.new && sync result.new && mv -f result.new result && sync . || fail "the result could not be written"
`;

/** What a finished job found. Times in seconds since 1970, by the destination's clock. */
export const copyResult = z.object({
  sizeBytes: z.number().int().positive(),
  sha256: z.string().regex(/^[0-9a-f]{64}$/),
  facts: z.string(),
  /** Whether the source was read a second time and was the same. */
  verified: z.boolean(),
  startedAt: z.number(),
  endedAt: z.number(),
  /** Versions of the programs that copied, and of the kernel. */
  tools: z.string(),
});
export type CopyResult = z.infer<typeof copyResult>;

/** How far a job is. */
export interface CopyProgress {
  /** `wait`: until others have left it room. */
  readonly phase: "start" | "check" | "wait" | "copy" | "verify";
  /** Whether the source is read a second time. */
  readonly readsSource: boolean;
  /** From 0 to 1, of this phase. */
  readonly done: number;
  /** Seconds since 1970 at which the phase began. */
  readonly since: number;
  readonly sizeBytes: number | undefined;
}

/** Reads what the job and the programs in it say of their progress. */
export function parseProgress(fields: ReadonlyMap<string, string>): CopyProgress {
  const [phase, since] = (fields.get("phase") ?? "").trim().split(" ");
  const sizeBytes = Number(fields.get("size") ?? "") || undefined;
  const served = lastShare(fields.get("progress") ?? "");
  const readsSource = phase === "verify" && fields.has("progress");
  const common = { readsSource, since: Number(since), sizeBytes };
  if (phase === "check" || phase === "copy") return { phase, done: served ?? 0, ...common };
  if (phase !== "verify") return { ...common, phase: phase === "wait" ? phase : "start", done: 0, since: 0 };
  // Both ends are read at once: the slower one counts. A source that is not read again says nothing.
  const read = fields.get("read") ?? "";
  const bytes = Number([...read.matchAll(/(\d+) bytes?\b/g)].at(-1)?.[1] ?? 0);
  const held = lastShare(read) ?? (sizeBytes === undefined ? 0 : bytes / sizeBytes);
  return { phase, done: Math.min(held, served ?? held, 1), ...common };
}

/** The last `N/100`, as nbdcopy and qemu-img write it. */
function lastShare(text: string): number | undefined {
  const last = [...text.matchAll(/(\d+(?:\.\d+)?)\/100/g)].at(-1)?.[1];
  return last === undefined ? undefined : Number(last) / 100;
}

const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** `1.5 GiB`. */
export function bytesPhrase(bytes: number): string {
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(bytes, 1)) / 10));
  const value = bytes / 1024 ** power;
  return `${value < 10 && power > 0 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/** `1 h 12 min`, `40 s`. */
export function secondsPhrase(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 100) return `${whole} s`;
  const minutes = Math.round(whole / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** The progress as a person reads it. `now`: seconds since 1970, by the destination's clock. */
export function progressPhrase(progress: CopyProgress, now: number): string {
  const { phase, readsSource, done, since, sizeBytes } = progress;
  if (phase === "wait")
    return "waiting for room in the thin pool, which other restores into it may still take";
  if (phase === "start" || sizeBytes === undefined) return "starting the copy";
  const verifying = readsSource ? "reading both ends back" : "reading the copy back";
  const what = { check: "checking the source", copy: "copying", verify: verifying }[phase];
  return ratePhrase(what, done, sizeBytes, now - since);
}

/** How far something is, from 0 to 1, how fast it goes and how long it still takes. `seconds`: since it began. */
export function ratePhrase(what: string, done: number, sizeBytes: number, seconds: number): string {
  const spent = Math.max(1, seconds);
  const bytes = Math.floor(done * sizeBytes);
  const rate = `${what}: ${Math.floor(done * 100)} % of ${bytesPhrase(sizeBytes)}, ${bytesPhrase(bytes / spent)}/s`;
  return done <= 0 ? rate : `${rate}, ${secondsPhrase((spent * (1 - done)) / done)} left`;
}
