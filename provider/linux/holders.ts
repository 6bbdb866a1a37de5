/**
 * Who holds a block device: mounts in any mount namespace, swap, device-mapper and md devices on top of it
 * or of its partitions, and processes that have it open. Sources: proc(5), sysfs block documentation.
 */
import { z } from "zod";
import { hostScript } from "../core/hostCommands.js";

/** So often what reads a volume over a link, for long, says that it does, and ends where nobody is told any more. */
export const aliveSeconds = 5;

/** Shell functions. `say KIND WHO`: a line on a holder. `say_process PID [WORDS]`: one on a process, unless it is ending. */
const sayFunctions = `
say() { printf '%s\\t' "$1"; printf '%s' "$2" | base64 -w0; echo; }
say_process() {
  held=$(tr '\\0\\n' '  ' </proc/"$1"/cmdline 2>/dev/null | cut -c1-120 | sed 's/ *$//')
  # Neither a command line nor a program: it is ending, as a probe does that was killed at a dead link.
  [ -n "$held" ] || readlink /proc/"$1"/exe >/dev/null 2>&1 || return 0
  say process "$held (pid $1)\${2-}"
}
`;

/** `active_exports`: the files of the export units that are not known to be down, a line each. */
export const activeExportsFunction = `
active_exports() {
  for export_file in /etc/systemd/system/lvm-nbd-export-*.service; do
    [ -e "$export_file" ] || continue
    case $(systemctl show -p ActiveState --value "\${export_file##*/}") in
    inactive|failed) ;;
    *) printf '%s\\n' "$export_file";;
    esac
  done
}
`;

/** Prints one line a holder, `KIND<TAB>WHO` with WHO in base64. Arguments: the device, and the unit whose processes may. */
export const holdersScript = hostScript(
  "volume-users",
  "observe",
  `${sayFunctions}
device=$(readlink -f "$1") || exit 1
[ -b "$device" ] || { echo "$1 is not a block device" >&2; exit 1; }
kernel=\${device##*/}
# After a change udev itself has it open for a moment.
udevadm settle --timeout=10
names=$kernel
for part in /sys/class/block/"$kernel"/"$kernel"*; do
  [ -e "$part/dev" ] && names="$names \${part##*/}"
done
for name in $names; do
  numbers=$(cat /sys/class/block/"$name"/dev) || exit 1
  for held in /sys/class/block/"$name"/holders/*; do
    [ -e "$held" ] || continue
    say device "$(cat "$held/dm/name" 2>/dev/null || echo "\${held##*/}")"
  done
  cat /proc/[0-9]*/mountinfo 2>/dev/null | awk -v n="$numbers" '$3 == n { print $5 }' | sort -u |
    while IFS= read -r where; do say mount "$where"; done
  # btrfs mounts have a number of their own, and a loop device on a disk is opened by the kernel: both show only here.
  for held in /sys/fs/btrfs/*/devices/"$name"; do
    [ -e "$held" ] || continue
    held=\${held#/sys/fs/btrfs/}; say mount "btrfs \${held%%/*}"
  done
  for held in /sys/block/loop*/loop/backing_file; do
    [ "$(cat "$held" 2>/dev/null)" = "/dev/$name" ] || continue
    held=\${held#/sys/block/}; say device "\${held%%/*}"
  done
  awk -v d="/dev/$name" '$1 == d { print $1 }' /proc/swaps | while IFS= read -r swap; do say swap "$swap"; done
done
opened=$(for name in $names; do
  find /proc/[0-9]*/fd -lname "/dev/$name" 2>/dev/null
done | cut -d/ -f3 | sort -un | while IFS= read -r pid; do
  if [ -n "$2" ] && grep -Fqs "/$2" /proc/"$pid"/cgroup; then continue; fi
  echo "$pid"
done)
own() { grep -qsz '^LVM_NBD_RUN=' /proc/"$1"/environ; }
holds() { for name in $names; do find /proc/"$1"/fd -lname "/dev/$name" 2>/dev/null; done | grep -q .; }
# Who only looks, as a scan of LVM does, is gone a moment later.
[ -z "$opened" ] || sleep 1
# A reader of ours whose link was lost ends by itself, some seconds later. Of a link that died silently the host hears only when it gives
# up sending, after 13 to 30 minutes (tcp_retries2 in tcp(7)).
patience=${2 * aliveSeconds}
said=
for pid in $opened; do
  while [ "$patience" -gt 0 ] && holds "$pid" && own "$pid"; do
    sleep 1
    patience=$((patience - 1))
  done
  holds "$pid" || continue
  own "$pid" || { say_process "$pid"; continue; }
  # One stands for all that belong to it.
  [ -z "$said" ] || continue
  said=$(say_process "$pid" ", which is lvm-nbd's own: it ends by itself when it is done, or half an hour after its link died at the latest")
  [ -z "$said" ] || printf '%s\n' "$said"
done
exit 0
`,
  ["path"],
);

/**
 * Prints, as `holdersScript` does, who serves one of the devices over NBD: servers open a device only while a client is
 * connected, so that nobody may hold it just now. Arguments: devices.
 */
export const serversScript = hostScript(
  "volume-servers",
  "observe",
  `${sayFunctions}${activeExportsFunction}
active_exports | while IFS= read -r file; do
  served=$(readlink -f "$(sed -n '/^\\[X-LvmNbd\\]/,$s/^Device=//p' "$file")")
  for device; do
    [ "$served" != "$(readlink -f "$device")" ] || say export "\${file##*/}"
  done
done
exit 0
`,
  ["many:path"],
);

/**
 * Who uses what is mounted at a path, in lines as of `holdersScript`: processes that have a file of it open or mapped, or
 * work in a folder of it, and mounts and loop devices on top. Links are only read: a look at what they lead to would hang
 * at a dead device. Arguments: the path, the path as a pattern of find(1), and as mountinfo writes it.
 */
export const usersScript = `${sayFunctions}
users() {
  find /proc/[0-9]*/cwd /proc/[0-9]*/root /proc/[0-9]*/exe /proc/[0-9]*/fd -maxdepth 1 \\( -lname "$2" -o -lname "$2/*" \\) 2>/dev/null
  grep -Fls " $1/" /proc/[0-9]*/maps 2>/dev/null
}
users "$1" "$2" | cut -d/ -f3 | sort -un | while IFS= read -r pid; do
  say_process "$pid"
done
awk '{ print $5 }' /proc/1/mountinfo | while IFS= read -r where; do
  case $where in "$3"/*) say mount "$where";; esac
done
for held in /sys/block/loop*/loop/backing_file; do
  case $(cat "$held" 2>/dev/null) in "$1"/*) held=\${held#/sys/block/}; say device "\${held%%/*}";; esac
done
exit 0
`;

const kind = z.enum(["device", "mount", "swap", "process", "export"]);

/** A path as a pattern of find(1) that fits nothing else. */
export function findPattern(path: string): string {
  return path.replace(/[\\*?[]/g, "\\$&");
}

/** The holders in words, e.g. `mounted at /mnt`. */
export function parseHolders(stdout: string): string[] {
  const phrase = {
    device: "used by device",
    mount: "mounted at",
    swap: "swap on",
    process: "open in",
    export: "exported by",
  };
  return stdout
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => {
      const [type, who] = line.split("\t");
      return `${phrase[kind.parse(type)]} ${Buffer.from(who ?? "", "base64")
        .toString("utf8")
        .trim()}`;
    });
}
