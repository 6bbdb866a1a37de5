/**
 * What a host that is made ready has of ours, and the scripts that look at it, write it and take it back. Each HostSetup has a record
 * of its own below /etc/lvm-nbd; the file for the module and the filter are shared by all of a host, and go with the last one
 * that wants them. Sources: modules-load.d(5), lvm.conf(5), os-release(5).
 */
import { hostScript } from "../core/hostCommands.js";
import { digest } from "../core/owner.js";
import { emitFunctions } from "./fields.js";
import { lvmLocal } from "./lvmFilter.js";
import { missingFunction } from "./programs.js";
import { changedMeanwhile, unitFunctions } from "./unitScript.js";
import { mendedPattern } from "./versions.js";

/** The record of a HostSetup. */
export function setupRecord(owner: string): string {
  return `/etc/lvm-nbd/host-${digest(owner, 16)}.json`;
}

/** Loads the module at boot. Not the file of the attachments: that one goes with the last of them. */
export const hostModules = {
  path: "/etc/modules-load.d/lvm-nbd-host.conf",
  text: "# Made by HostSetup of lvm-nbd.\nnbd\n",
};

/** lvmlocal.conf as it was before, with its mode; missing if there was none. */
export const filterBackup = "/etc/lvm-nbd/lvmlocal.conf.before";
/** Checksums of what was written there: while it still reads so, nobody has touched it. */
const filterWritten = "/etc/lvm-nbd/lvmlocal.conf.written";

/** Exit code: a symbolic link, or no regular file, is in the way (named on stdout). */
export const linkInTheWay = 78;
/** Exit code: LVM does not take the configuration as it was to be (its words on stdout). */
export const filterRefused = 79;
/** Exit code: with the filter LVM would no longer see physical volumes of the host (named on stdout). */
export const filterHides = 80;
/** Exit code: with the filter LVM would see physical volumes that it does not see now (named on stdout). */
export const filterShows = 82;
/** Exit code: the module could not be loaded (modprobe's words on stderr). */
export const moduleRefused = 81;

/**
 * Shell functions. `sum FILE`: its checksum, "absent" if there is none. `ours`: whether lvmlocal.conf still reads as it was written.
 * `effective FOLDER`: LVM's word on its filter by the configuration in that folder. `copy_lvm FOLDER`: the configuration, a
 * file for each link.
 */
const lvmFunctions = `
conf=${lvmLocal} kept=${filterBackup} written=${filterWritten}
sum() { if [ -e "$1" ]; then sha256sum <"$1" | cut -d' ' -f1; else echo absent; fi; }
ours() { [ -e "$written" ] && grep -qsx "$(sum "$conf")" "$written"; }
effective() { LVM_SYSTEM_DIR=$1 timeout 30 lvmconfig --type full devices/global_filter 2>&1 | grep -e '^ *global_filter=' -e rror; }
# A new file has the label of where it was made, and LVM, confined, could not read it.
label() { ! command -v restorecon >/dev/null || restorecon "$1"; }
copy_lvm() {
  for copied in /etc/lvm/*.conf; do [ ! -e "$copied" ] || cp -aL "$copied" "$1" || return 1; done
  [ ! -d /etc/lvm/profile ] || cp -aL /etc/lvm/profile "$1"
}
`;

/** How programs tell their version. */
export const versionCommands: Readonly<Record<string, string>> = {
  nbdkit: "nbdkit --version",
  nbdcopy: "nbdcopy --version",
  nbdinfo: "nbdinfo --version",
  "nbd-server": "nbd-server -V",
  "nbd-client": "nbd-client -V",
  "qemu-img": "qemu-img --version",
  lvm: "lvm version",
  systemd: "systemctl --version",
};

/** The field of what is told of a program: names of fields have letters only. */
export function fieldOf(kind: "version" | "mended", program: string): string {
  return `${kind}.${program.replaceAll("-", "")}`;
}

/**
 * Looks at a host. Arguments: the record; programs, and packages of Debian's and of RPM's names, in one word each. A second
 * configuration of LVM is laid out below /run where ours is in effect, to see what it would be without.
 */
export const lookScript = hostScript(
  "look-at-setup",
  "observe",
  `${emitFunctions}${missingFunction}${lvmFunctions}
record=$1 programs=$2 debs=$3 rpms=$4
links=
# emit_plain NAME FILE: a file that is ours to write must be no link.
emit_plain() {
  if [ -L "$2" ]; then links="$links $2"; elif [ -f "$2" ]; then emit_file "$1" "$2"; elif [ -e "$2" ]; then links="$links $2"; fi
}
for folder in /etc/lvm-nbd /etc/modules-load.d /etc/lvm; do [ ! -L "$folder" ] || links="$links $folder"; done
emit_plain record "$record"
for osrelease in /etc/os-release /usr/lib/os-release; do
  if [ -e "$osrelease" ]; then emit_file osrelease "$osrelease"; break; fi
done
emit kernel "$(uname -r)"
emit_missing $programs
version() { command -v "$2" >/dev/null || return 0; name=$1; shift; emit "$name" "$(timeout 10 "$@" 2>&1 | head -n 2)"; }
${Object.entries(versionCommands)
  .map(([program, command]) => `version ${fieldOf("version", program)} ${command}`)
  .join("\n")}
mended() { grep -ohE '${mendedPattern}' | sort -u; }
if command -v dpkg-query >/dev/null; then
  emit packages "$(dpkg-query -W -f='\${db:Status-Status} \${Package} \${Version}\\n' $debs 2>/dev/null | sed -n 's/^installed //p')"
  emit mended.nbdcopy "$(gzip -dcf /usr/share/doc/libnbd-bin/changelog.Debian.gz 2>/dev/null | mended)"
  emit mended.nbdserver "$(gzip -dcf /usr/share/doc/nbd-server/changelog.Debian.gz 2>/dev/null | mended)"
elif command -v rpm >/dev/null; then
  emit packages "$(for package in $rpms; do
    rpm -q --whatprovides --qf "$package %{VERSION}-%{RELEASE}\\n" "$package" 2>/dev/null | grep "^$package "
  done)"
  emit mended.nbdcopy "$(rpm -q --changelog libnbd 2>/dev/null | mended)"
  emit mended.nbdserver "$(rpm -q --changelog nbd 2>/dev/null | mended)"
fi
if [ -d /sys/module/nbd ]; then
  emit loaded ""
  if [ -e /sys/module/nbd/parameters/nbds_max ]; then emit nbdsmax "$(cat /sys/module/nbd/parameters/nbds_max)"; fi
else
  emit_output modprobe modprobe -n nbd
fi
emit_plain modules ${hostModules.path}
if command -v lvmconfig >/dev/null; then
  emit filter "$(effective /etc/lvm)"
  use=$(timeout 30 lvmconfig --type full devices/use_devicesfile 2>/dev/null)
  list=$(timeout 30 lvmconfig --type full devices/devicesfile 2>/dev/null | sed -n 's/^devicesfile="\\(.*\\)"$/\\1/p')
  if [ "$use" = use_devicesfile=1 ] && [ -n "$list" ] && [ -e "/etc/lvm/devices/$list" ]; then emit devicesfile "/etc/lvm/devices/$list"; fi
  emit_plain local "$conf"
  emit sum "$(sum "$conf")"
  if ours; then
    emit ours ""
    if [ -e "$kept" ]; then emit_file kept "$kept"; fi
    without=$(mktemp -d /run/lvm-nbd-lvm.XXXXXX) || exit 1
    trap 'rm -rf "$without"' EXIT
    trap 'exit 1' HUP INT TERM
    copy_lvm "$without" && rm -f "$without/lvmlocal.conf" && { [ ! -e "$kept" ] || cp "$kept" "$without/lvmlocal.conf"; } || exit 1
    emit base "$(effective "$without")"
  fi
fi
emit links "$links"
emit cgroup "$(stat -f -c %T /sys/fs/cgroup 2>/dev/null)"
emit bpf "$({ cat "/boot/config-$(uname -r)" "/lib/modules/$(uname -r)/config" || zcat /proc/config.gz; } 2>/dev/null | grep -m 1 'CONFIG_CGROUP_BPF[= ]')"
emit end ""
`,
  ["record", "words", "words", "words"],
);

/** Prints the records of all HostSetups of the host, base64, one a line, and at its end "end". */
export const setupRecordsScript = hostScript(
  "list-setups",
  "observe",
  `
for record in /etc/lvm-nbd/host-*.json; do
  [ -f "$record" ] && [ ! -L "$record" ] || continue
  text=$(base64 -w0 <"$record") || exit 1
  printf '%s\\n' "$text"
done
echo end
`,
  [],
);

/** Shell functions: `put FILE TEXT` writes a file whole, on the disk, through no link; `refuse_link PATH...`. */
const putFunctions = `
refuse_link() {
  for refused; do
    if [ -L "$refused" ] || { [ -e "$refused" ] && [ ! -f "$refused" ] && [ ! -d "$refused" ]; }; then
      printf '%s\\n' "$refused"; exit ${linkInTheWay}
    fi
  done
}
put() {
  [ -f "$1" ] && [ "$(cat "$1"; echo x)" = "$(printf %s "$2"; echo x)" ] && return 0
  mkdir -p "\${1%/*}" && rm -f "$1.new" && printf %s "$2" >"$1.new" && sync "$1.new" && mv -fT "$1.new" "$1" && sync "\${1%/*}" || exit 1
}
`;

/**
 * Shell functions that take back what no record but ours wants. `wanted WORD`: whether another one wants it. `restore_filter` prints
 * "touched" where lvmlocal.conf was changed since and is left as it is.
 */
const takeBackFunctions = `
wanted() {
  for other in /etc/lvm-nbd/host-*.json; do
    [ "$other" = "$record" ] || [ "$other" = "$old" ] || [ ! -e "$other" ] || ! grep -qs "\\"$1\\":true" "$other" || return 0
  done
  return 1
}
restore_filter() {
  ! wanted filter || return 0
  if [ -e "$written" ]; then
    refuse_link "$conf" "$kept"
    if ours; then
      if [ -e "$kept" ]; then
        rm -f "$conf.new" && cp -a "$kept" "$conf.new" && label "$conf.new" && sync "$conf.new" && mv -fT "$conf.new" "$conf" && sync "\${conf%/*}" || exit 1
      else
        rm -f "$conf" && sync "\${conf%/*}" || exit 1
      fi
    elif [ "$(sum "$conf")" != "$(sum "$kept")" ]; then
      echo touched
    fi
    # Before what was kept: without that, what was restored would read as touched.
    rm -f "$written" || exit 1
  fi
  # Restored, never written, or put back by hand.
  [ "$(sum "$conf")" != "$(sum "$kept")" ] || rm -f "$kept" || exit 1
}
remove_modules() { wanted module || rm -f ${hostModules.path} || exit 1; }
`;

/**
 * Writes the record, and makes module and filter as wanted. Arguments: record, its text, the record of an earlier owner ("" for
 * none), module ("yes", "no"), filter ("yes", "no", or "keep" where it is right), checksum of lvmlocal.conf as seen, the line that
 * LVM is to say on its filter, length of the new lvmlocal.conf (stdin). Whatever it refuses but the module, it refuses before it
 * writes anything.
 */
export const applySetupScript = hostScript(
  "apply-setup",
  "setup",
  `${unitFunctions}${lvmFunctions}${putFunctions}${takeBackFunctions}
record=$1 text=$2 old=$3 module=$4 filter=$5 seen=$6 expected=$7 bytes=$8
lock
umask 022
refuse_link /etc/lvm-nbd "$record" ${hostModules.path} ${hostModules.path.replace(/\/[^/]*$/, "")}
if [ "$filter" = yes ]; then
  refuse_link /etc/lvm "$conf" "$kept" "$written"
  [ "$(sum "$conf")" = "$seen" ] || exit ${changedMeanwhile}
  new=$(mktemp -d /run/lvm-nbd-lvm.XXXXXX) || exit 1
  trap 'rm -rf "$new" "$conf.new"' EXIT
  trap 'exit 1' HUP INT TERM
  copy_lvm "$new" && receive "$new/lvmlocal.conf" "$bytes" || exit 1
  said=$(LVM_SYSTEM_DIR=$new timeout 30 lvmconfig --validate 2>&1) && line=$(effective "$new") && [ "$line" = "$expected" ] ||
    { printf '%s\\n' "$said" "$line"; exit ${filterRefused}; }
  volumes() {
    LVM_SYSTEM_DIR=$1 timeout 120 pvs --noheadings -o pv_major,pv_uuid,pv_name 9>&- >"$2.all" && awk '$1 != 43 { print $2, $3 }' "$2.all" >"$2"
  }
  # What LVM cannot list it is not said to see as before.
  volumes /etc/lvm "$new/before" && volumes "$new" "$new/after" || { echo "LVM does not list its physical volumes" >&2; exit 1; }
  hidden=$(awk 'NR == FNR { there[$1] = 1; next } !($1 in there) { print $2 }' "$new/after" "$new/before")
  # An empty file is no file to awk.
  [ -s "$new/after" ] || hidden=$(awk '{ print $2 }' "$new/before")
  [ -z "$hidden" ] || { printf '%s\\n' "$hidden"; exit ${filterHides}; }
  shown=$(awk 'NR == FNR { there[$1] = 1; next } !($1 in there) { print $2 }' "$new/before" "$new/after")
  [ -s "$new/before" ] || shown=$(awk '{ print $2 }' "$new/after")
  [ -z "$shown" ] || { printf '%s\\n' "$shown"; exit ${filterShows}; }
fi
# Whoever removes this resource must find it from here on.
put "$record" "$text"
if [ -n "$old" ]; then rm -f "$old" || exit 1; fi
if [ "$filter" = yes ]; then
  before=$(sum "$conf")
  if ours; then
    put "$written" "$(sum "$new/lvmlocal.conf")
$before
"
  else
    if [ -e "$conf" ]; then
      rm -f "$kept.new" && cp -a "$conf" "$kept.new" && sync "$kept.new" && mv -fT "$kept.new" "$kept" || exit 1
    else
      rm -f "$kept" || exit 1
    fi
    put "$written" "$(sum "$new/lvmlocal.conf")
"
  fi
  rm -f "$conf.new" && cp -a "$new/lvmlocal.conf" "$conf.new" && label "$conf.new" && sync "$conf.new" && mv -fT "$conf.new" "$conf" && sync "\${conf%/*}" || exit 1
elif [ "$filter" = no ]; then
  restore_filter
fi
if [ "$module" = yes ]; then
  modprobe nbd || exit ${moduleRefused}
  put ${hostModules.path} "${hostModules.text}"
else
  remove_modules
fi
`,
);

/** Takes back what no other record wants, and the record last. Argument: the record. */
export const removeSetupScript = hostScript(
  "remove-setup",
  "setup",
  `${unitFunctions}${lvmFunctions}${putFunctions}${takeBackFunctions}
record=$1 old=
lock
refuse_link /etc/lvm-nbd "$record"
restore_filter
remove_modules
rm -f "$record.new" "$record" || exit 1
rmdir /etc/lvm-nbd 2>/dev/null
exit 0
`,
);
