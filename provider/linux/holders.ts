/**
 * Who holds a block device: mounts in any mount namespace, swap, device-mapper and md devices on top of it
 * or of its partitions, and processes that have it open. Sources: proc(5), sysfs block documentation.
 */
import { z } from "zod";

/** Prints one line a holder, `KIND<TAB>WHO` with WHO in base64. Arguments: the device, and the unit whose processes may. */
export const holdersScript = `
device=$(readlink -f "$1") || exit 1
[ -b "$device" ] || { echo "$1 is not a block device" >&2; exit 1; }
kernel=\${device##*/}
# After a change udev itself has it open for a moment.
udevadm settle --timeout=10
say() { printf '%s\\t' "$1"; printf '%s' "$2" | base64 -w0; echo; }
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
for name in $names; do
  find /proc/[0-9]*/fd -lname "/dev/$name" 2>/dev/null
done | cut -d/ -f3 | sort -un | while IFS= read -r pid; do
  if [ -n "$2" ] && grep -Fqs "/$2" /proc/"$pid"/cgroup; then continue; fi
  held=$(tr '\\0' ' ' </proc/"$pid"/cmdline 2>/dev/null | cut -c1-120 | sed 's/ *$//')
  # Neither a command line nor a program: it is ending, as a probe does that was killed at a dead link.
  [ -n "$held" ] || readlink /proc/"$pid"/exe >/dev/null 2>&1 || continue
  say process "$held (pid $pid)"
done
exit 0
`;

/**
 * Prints, as `holdersScript` does, who serves one of the devices over NBD: servers open a device only while a client is
 * connected, so that nobody may hold it just now. Arguments: devices.
 */
export const serversScript = `
say() { printf '%s\\t' "$1"; printf '%s' "$2" | base64 -w0; echo; }
for file in /etc/systemd/system/lvm-nbd-export-*.service; do
  [ -e "$file" ] || continue
  unit=\${file##*/}
  case $(systemctl show -p ActiveState --value "$unit") in active|activating|reloading) ;; *) continue;; esac
  served=$(readlink -f "$(sed -n '/^\\[X-LvmNbd\\]/,$s/^Device=//p' "$file")")
  for device; do
    [ "$served" != "$(readlink -f "$device")" ] || say export "$unit"
  done
done
exit 0
`;

const kind = z.enum(["device", "mount", "swap", "process", "export"]);

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
