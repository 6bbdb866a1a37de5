/**
 * A copy onto a block device that is there: its job, which runs as a transient unit, and the scripts that start, find and
 * end it. They know nothing of how the device came to be, or what becomes of it. Sources: nbdcopy(1), dd(1), open(2).
 *
 * A device holds nothing but the content, so whose copy it is and what the job found lies below `/run`: a job that a reboot
 * ended is begun anew.
 */
import { hostScript } from "../core/hostCommands.js";
import { copyName, jobFunctions, sumOf } from "./copyJob.js";
import { startJobFunction, stopJobFunction } from "./copyScripts.js";
import { emitFunctions } from "./fields.js";
import { aliveSeconds } from "./holders.js";
import { type ClientTls, jobUri } from "./tls.js";
import { changedMeanwhile, unitFunctions } from "./unitScript.js";

/** Exit code: somebody has the volume open. */
export const volumeOpen = 76;

/** Where a copy onto a device runs. */
export interface DeviceJob {
  readonly unit: string;
  /** Job, record, progress, and result or reason of a failure. */
  readonly run: string;
}

/** The job follows from the path that the content is for: two copies for one path meet. */
export function deviceJob(path: string): DeviceJob {
  const name = copyName(path);
  return { unit: `lvm-nbd-copy-${name}.service`, run: `/run/lvm-nbd-copy-${name}` };
}

/** What is copied onto a device and how. */
export interface DeviceCopyPlan {
  readonly uri: string;
  readonly tls?: ClientTls | undefined;
  readonly connections: number;
  /** Bytes a second. */
  readonly bandwidthLimit: number | undefined;
  /** Whether the source is read a second time, for its checksum. */
  readonly verify: boolean;
  /** What becomes of the bytes behind the content. */
  readonly rest: "zero" | "keep";
  /** SHA-256 that the source must have before anything is written, and the device afterwards. */
  readonly expected?: string | undefined;
}

/** The arguments of `deviceCopySteps`. */
export function deviceCopyArguments({ run }: DeviceJob, device: string, plan: DeviceCopyPlan): string[] {
  return [
    run,
    device,
    jobUri(plan.uri, plan.tls, run),
    String(plan.connections),
    // nbdkit counts bits.
    plan.bandwidthLimit === undefined ? "" : String(plan.bandwidthLimit * 8),
    plan.verify ? "yes" : "no",
    plan.rest,
    plan.expected ?? "",
  ];
}

/** The programs that a copy onto a device needs on its host. */
export function deviceCopyPrograms(plan: Pick<DeviceCopyPlan, "bandwidthLimit">): string[] {
  return [
    ...["nbdcopy", "nbdinfo", "systemd-run", "flock", "sha256sum", "blockdev"],
    ...(plan.bandwidthLimit === undefined ? [] : ["nbdkit"]),
  ];
}

/**
 * Shell functions, beside `sumOf`. `hash_device DEVICE BYTES`: SHA-256 of its first bytes, read from stdin, which it is, by direct I/O: from
 * the disk and never from the page cache. Whole sectors are read, since direct I/O reads nothing else. How far it is goes to fd 3. It
 * fails with 1 if the device cannot be read, with 2 if that cannot be told (a program is missing or was killed).
 */
const hashDevice = `
hash_device() {
  sector=$(blockdev --getss "$1") || return 2
  whole=$((($2 + sector - 1) / sector * sector))
  read_back=$({ { dd bs=4M count="$whole" iflag=direct,fullblock,count_bytes status=progress 2>&3; echo "rc $?" >&4; } |
    if [ "$whole" = "$2" ]; then sha256sum; else head -c "$2" | sha256sum; cat >/dev/null; fi; } 4>&1)
  sum_of "$read_back" && return 0
  # No code, or one of a signal: it was not the device that failed.
  case $read_back in *"rc 1"[0-9][0-9]*) return 2;; *"rc "*) return 1;; *) return 2;; esac
}
`;

/**
 * Checks the source if its checksum is known, copies, flushes, reads the copy back, and the source where that is to be
 * verified. What its user does right before the first byte is written and after the last one was read is `before_write` and `at_end`, which may `fail`. nbdcopy writes the source's zeros too (by BLKZEROOUT where the device can): a volume
 * holds what was there before it, so nothing is known to be zero. It ends with `result` or `failure` below /run.
 */
export const deviceCopySteps = `
# qemu-img writes past the page cache, which takes half of nbdcopy's time, and pushes nothing out that is the VMs'. But it may zero the
# whole device first, so that must be new; and it has one connection, on which all of TLS would wait for one processor.
past_cache() {
  [ -n "\${new-}" ] && command -v qemu-img >/dev/null || return 1
  case $uri in nbds:*) [ -n "$bits$mapped" ];; esac
}
${sumOf}${jobFunctions}${hashDevice}
undo() { :; }
cd "$1" || exit 1
run=$1 device=$2 uri=$3 connections=$4 bits=$5 verify=$6 rest=$7 expected=$8
umask 077
export LC_ALL=C uri connections run device
began=$(date +%s)
size=$(nbdinfo --size "$uri") || fail "the source does not answer"
printf '%s\\n' "$size" >"$run/size"
room=$(blockdev --getsize64 "$device") || fail "$device cannot be opened"
[ "$room" -ge "$size" ] || fail "$device has $room bytes, fewer than the source with $size"
if [ -n "$expected" ]; then
  phase check
  read_source
  await_source || fail "the source could not be read"
  [ "$source_sum" = "$expected" ] || fail "corrupt: what is served reads as $source_sum, not as $expected"
  rm -f "$run/progress"
fi
before_write
phase copy
map_source
if past_cache; then
  with_source 'qemu-img convert -p -n -t none -f raw -O raw "$source" "$device" >"$run/progress"' plain
else
  with_source 'nbdcopy --flush --progress=3 --connections="$connections" "$source" "$device" 3>"$run/progress"'
fi || fail "the copy broke off"
mapped=
if [ "$rest" = zero ] && [ "$room" -gt "$size" ]; then
  dd if=/dev/zero of="$device" bs=64K seek="$size" count=$((room - size)) oflag=seek_bytes iflag=count_bytes conv=notrunc,nocreat,fsync status=none ||
    fail "what lies behind the content could not be written"
fi
sync "$device" || fail "what was copied could not be written to the disk"
rm -f "$run/progress"
phase verify
read_again
sum=$(hash_device "$device" "$size" 3>"$run/read" <"$device") || fail "the device could not be read back"
require_same "$sum"
[ -z "$expected" ] || [ "$sum" = "$expected" ] || fail "mismatch: the device reads back as $sum, not as $expected"
{
  printf '{"sizeBytes":%s,"sha256":"%s","facts":"%s",' "$size" "$sum" "$room"
  printf '"verified":%s,' "$([ "$verify" = yes ] && echo true || echo false)"
  printf '"startedAt":%s,"endedAt":%s,' "$began" "$(date +%s)"
  printf '"tools":"%s"}\\n' "$({ nbdcopy --version; uname -sr; } | tr -d '"\\\\' | paste -sd, -)"
} >result.new || fail "the result could not be written"
at_end
mv -f result.new result || fail "the result could not be written"
`;

/** The job of a copy that nobody waits upon: its device is new, and its own. */
export const deviceCopyJob = `
new=yes
before_write() { :; }
at_end() { :; }
${deviceCopySteps}`;

/**
 * Shell function. `volume_is GROUP NAME UUID [SNAPSHOTS]`: ends the script with `changedMeanwhile` unless the volume of that name
 * has that UUID, with `volumeOpen` if somebody has it open, or it has snapshots and they are not "kept": they would go with it.
 */
export const volumeIsFunction = `
volume_is() {
  # After a change udev itself has it open for a moment, and so has whoever only looks at all devices.
  udevadm settle --timeout=10
  for volume_look in 1 2 3 4; do
    volume_seen=$(lvs --noheadings --binary -o lv_uuid,lv_device_open -S "lv_name=\\"$2\\"" "$1" 9>&-) || exit 1
    case $(echo $volume_seen) in "$3 1") sleep 1;; *) break;; esac
  done
  volume_snapshots=$(lvs --noheadings -o lv_name -S "origin_uuid=\\"$3\\"" "$1" 9>&-) || exit 1
  case $(echo $volume_seen) in "$3 1") exit ${volumeOpen};; "$3 "*) ;; *) exit ${changedMeanwhile};; esac
  [ "\${4-}" = kept ] || [ -z "$volume_snapshots" ] || exit ${volumeOpen}
}
`;

/**
 * Starts the job (stdin). Arguments: unit, folder, volume group, name and UUID of the volume, the record, a description of the
 * unit, after how many seconds it is ended, the job's length in bytes.
 */
export const startDeviceCopyScript = hostScript(
  "start-volume-copy",
  "change",
  `${unitFunctions}${stopJobFunction}${startJobFunction}${volumeIsFunction}
unit=$1 run=$2 group=$3 name=$4 uuid=$5 record=$6 description=$7 runtime=$8 bytes=$9
lock
stop_job "$unit" || exit 1
volume_is "$group" "$name" "$uuid"
umask 077
rm -rf "$run" && mkdir "$run" && receive "$run/job" "$bytes" && printf %s "$record" >"$run/record.json" || { rm -rf "$run"; exit 1; }
start_job "$unit" "$description" "$runtime" || { stop_job "$unit" && rm -rf "$run"; exit 1; }
`,
);

/** Looks at the job. Arguments: unit, folder. */
export const observeDeviceCopyScript = hostScript(
  "observe-volume-copy",
  "observe",
  `${emitFunctions}
unit=$1 run=$2
emit active "$(systemctl show -p ActiveState --value "$unit")"
emit recordDigest "$(if [ -e "$run/record.json" ]; then sha256sum <"$run/record.json" | cut -d' ' -f1; fi)"
if [ -e "$run/record.json" ]; then emit_file record "$run/record.json"; fi
if [ -e "$run/result" ]; then emit_file result "$run/result"; fi
emit end ""
`,
  ["unit", "run"],
);

/**
 * Shell function. `device_node PATH`: `node` is the block device that it leads to. Fails for anything else, before that is opened, which
 * alone starts a watchdog that resets the host; and outside the folders of /dev that are root's alone, where it could be exchanged.
 */
export const deviceNodeFunction = `
device_node() {
  node=$(readlink -f "$1") || return 1
  case \${node%/*} in /dev|/dev/mapper) ;; *) return 1;; esac
  [ -b "$node" ]
}
`;

/**
 * Reads the checksum again. Arguments: device, bytes. Exit code 70: it cannot be read. 71: that cannot be told. Lines before it say how
 * many bytes are read, or nothing where that cannot be told (fdinfo in proc(5)): what reads a volume holds it, and it shows only in what is
 * said in vain that nobody waits for it any more.
 */
export const checkDeviceScript = hostScript(
  "check-volume",
  "observe",
  `${sumOf}${hashDevice}${deviceNodeFunction}
device_node "$1" || { echo "$1 is not a block device" >&2; exit 71; }
rc=1
{
  (
    trap '' PIPE
    while sleep ${aliveSeconds} >/dev/null 5<&-; do
      # Where it is read is one place for all who have it from here.
      position=
      read -r name position </proc/self/fdinfo/5
      # Not this process alone: it waits for those that read. timeout leads their group.
      echo "$position" || kill -s TERM 0
    done
  ) 2>/dev/null &
  alive=$!
  hash_device "$node" "$2" 3>/dev/null <&5
  rc=$?
  kill "$alive" 2>/dev/null
} 5<"$node"
case $rc in 0) exit 0;; 1) exit 70;; *) exit 71;; esac
`,
  ["path", "number"],
);
