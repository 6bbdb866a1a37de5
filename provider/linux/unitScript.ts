/** What the scripts that write units share. */
import { vanished } from "./fields.js";
import { openLock } from "./lockFile.js";

/** Exit code of a script that found another unit than the one that was seen, and changed nothing. */
export const changedMeanwhile = 77;

/** Exit code of a script that saw what a unit was to prove, and could not do what follows: note that, enable it, tidy up. */
export const provenOnly = 75;

/**
 * Shell functions for scripts. `no_link PATH`: ends the script if that is a symbolic link. `lock [CODE]`: one of them at a time on the host; ends the script with
 * the exit code (1) where it takes too long. `own NAME FILE`: a directive of our own
 * section. `guard FILE MARK...`: ends the script with `changedMeanwhile` unless there is no such file or it
 * carries one of the marks ("" for none). `watch FILE [PLAN]`: from now on `same FILE` tells whether it is still the one that is there now;
 * ends the script with `changedMeanwhile` if none is, or one with another record. `receive FILE BYTES`: stdin as that file, on the disk; fails if a link that
 * broke has cut it short. `read_anew UNIT new|"" enabled|disabled`: systemd has the unit as it is on
 * the disk. Reading all units again costs most of what a change does, and a new one it reads by itself; whether it has an older one, a clock
 * that went back would hide. `is_read SHOWN enabled|disabled`: by what it shows, systemd has it so.
 * `boot_links UNIT FILE`: it starts at boot, by all that is to start it, 1 if not, 2 where that cannot be told; systemd itself only
 * remembers how that was when it read the unit.
 * `tell_boots UNIT FILE`, with `emit`: tells whether it does; ends the script where it cannot.
 * `outdated SHOWN`, with `emit`: tells where `NeedDaemonReload=yes` says nothing of the unit: since systemd 255 all have it once any was
 * enabled.
 * `last_words UNIT LINES`: what its journal ends with, to stderr.
 */
export const unitFunctions = `
no_link() { [ ! -L "$1" ] || { echo "$1 is a symbolic link, and nothing was written through it: put what it leads to in its place, or remove it" >&2; exit 1; }; }
lock() {
  no_link /run/lvm-nbd.lock
  ${openLock(9, "/run/lvm-nbd.lock")} && flock -w 120 9 || { echo "another unit is being written for more than 120 s" >&2; exit "\${1-1}"; }
}
own() { sed -n '/^\\[X-LvmNbd\\]/,$s/^'"$1"'=//p' "$2"; }
guard() {
  [ -e "$1" ] || return 0
  guard_mark=$(own Mark "$1"); shift
  for guard_one in "$@"; do [ "$guard_mark" != "$guard_one" ] || return 0; done
  exit ${changedMeanwhile}
}
watch() {
  [ -e "$1" ] && exec 8<"$1" || exit ${changedMeanwhile}
  [ -z "\${2-}" ] || [ "$(own Plan "$1")" = "$2" ] && same "$1" || exit ${changedMeanwhile}
}
same() { [ /proc/self/fd/8 -ef "$1" ]; }
receive() {
  cat >"$1" && [ "$(wc -c <"$1")" -eq "$2" ] && sync "$1" && return 0
  rm -f "$1"; echo "what was to be written did not arrive whole" >&2; return 1
}
is_read() {
  for read_line in LoadState=loaded NeedDaemonReload=no "UnitFileState=$2"; do
    case "
$1
" in *"
$read_line
"*) ;; *) return 1;; esac
  done
}
read_anew() {
  [ "$2" = new ] && is_read "$(systemctl show -p LoadState -p NeedDaemonReload -p UnitFileState "$1")" "$3" || systemctl daemon-reload
}
boot_links() {
  boot_targets=$(sed -n 's/^WantedBy=//p' "$2") || return 2
  [ -n "$boot_targets" ] || return 1
  for boot_target in $boot_targets; do [ -L "/etc/systemd/system/$boot_target.wants/$1" ] || return 1; done
}
tell_boots() {
  boot_links "$1" "$2"
  case $? in 0) emit boots yes;; 1) ;; *) [ -e "$2" ] || exit ${vanished}; exit 1;; esac
}
outdated() {
  case $1 in *NeedDaemonReload=yes*) ;; *) return 0;; esac
  [ "$(systemctl show -p NeedDaemonReload --value -- -.slice)" != yes ] || emit outdated yes
}
last_words() { journalctl --sync 2>/dev/null; journalctl -q -n "$2" -o cat --no-pager -u "$1" >&2; }
`;

/**
 * Shell functions. `cut_off UNIT`: it stops, and starts at no boot; fails where it may go on. `give_up UNIT FILE`, with `unitFunctions`,
 * of what is watched and was never proven: that, unless it is another's by now, and the script ends. It is stopped before the lock: whoever
 * waits for that may be killed.
 */
export const cutOffFunction = `
cut_off() {
  systemctl disable --quiet --now "$1" && return
  systemctl stop "$1"
  systemctl disable --quiet "$1"
  case $(systemctl show -p ActiveState --value "$1") in inactive|failed) ;; *) return 1;; esac
}
give_up() {
  trap '' HUP INT TERM
  ! same "$2" || systemctl stop --no-block "$1"
  lock
  ! same "$2" || cut_off "$1"
  exit 1
}
`;

/** Seconds that `give_up` takes: the lock, and the stop of an export (10 s). */
export const giveUpSeconds = 150;

/**
 * Shell function, with `unitFunctions`. `reload_units`: systemd has seen what was done before this was called. Who was waiting while
 * another read all units anew, which costs it most of a change, and then a second one did, has been seen by that: it counts those that
 * have ended. Without the lock of the units.
 */
export const reloadFunction = `
reloads() { if [ -e /run/lvm-nbd.reloads ]; then cat /run/lvm-nbd.reloads; else echo 0; fi; }
reload_units() {
  exec 9>&-
  before=$(reloads) || return
  ${openLock(7, "/run/lvm-nbd-reload.lock")} && flock -w 120 7 || { echo "systemd reads its units for more than 120 s" >&2; return 1; }
  now=$(reloads) || return
  if [ "$now" -lt "$((before + 2))" ]; then
    systemctl daemon-reload || return
    # One that is not counted, as where /run is full, only spares nobody another.
    if echo "$((now + 1))" >/run/lvm-nbd.reloads.new; then mv -fT /run/lvm-nbd.reloads.new /run/lvm-nbd.reloads; fi
  fi
  exec 7>&-
}
`;

/** Shell function. `end_unit UNIT FILE`: it neither runs nor starts at boot; one that never was is no failure. */
export const endUnitFunction = `
end_unit() {
  if [ -e "$2" ]; then systemctl disable --quiet --now --no-reload "$1" >/dev/null
  else [ "$(systemctl show -p ActiveState --value "$1")" = inactive ] || systemctl stop "$1"; fi
}
`;

/**
 * The marks that `guard` lets pass: ours and what was seen. For what was not there nothing passes: what has
 * appeared since, even of our own (a script whose link was lost goes on), must be looked at first.
 */
export function expectedMarks(
  own: string,
  seen: { readonly mark: string | undefined } | undefined,
): [string, string] {
  return seen === undefined ? ["absent", "absent"] : [own, seen.mark ?? ""];
}
