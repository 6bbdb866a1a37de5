/**
 * The scripts that look at a copy, start it, follow it, put it in its place and remove it. Each changing one holds the
 * host's lock, and does nothing unless everything is still as it was seen: file, manifest and record.
 */
import { hostScript } from "../core/hostCommands.js";
import { folderGuardFunctions, imageFunctions, ownFolderFunction } from "./copyJob.js";
import { emitFunctions } from "./fields.js";
import { activeExportsFunction } from "./holders.js";
import { missingFunction } from "./programs.js";
import { canHaveCertificates } from "./tls.js";
import { changedMeanwhile, unitFunctions } from "./unitScript.js";

/** Exit code: the file is open somewhere (named on stdout). */
export const fileInUse = 75;
/** Exit code: the image is not the one that was verified. */
export const imageChanged = 78;

/** Exit code: somebody who is not root may have put there where a copy goes what is there (said on stdout). */
export const inOtherHands = 79;

/** Of what `endangered` named. */
export const exposedWords =
  "can be changed by others than root, who could exchange what is written or removed there";

/** Of a path that `astray` named. */
export const turnedWords = "is a symbolic link that others than root can put there";

/** Every script on a copy takes the copy's paths first, in this order; see `CopyPaths`. */
const takePaths = `file=$1 part=$2 manifest=$3 unit=$4 run=$5; shift 5
[ "$part|$manifest" = "$file.part|$file.manifest.json" ] || exit 64`;

/** Of a copy to a file, or of one onto a volume, which has no file, part and manifest but "-". */
const takeAnyPaths = "file=$1 part=$2 manifest=$3 unit=$4 run=$5; shift 5";

/**
 * Shell functions. `astray FOLDER`: the first symbolic link on the way to it that others than root can put there, or turn. `pin`: goes
 * to the folder of the copy, from where its paths are taken then, and fails where there is none; ends the script unless it is root's
 * alone, or on a network file system and not led to by others. `guarded FOLDER`: ends the script unless it is. `enter`: goes into the folder of the unfinished copy, which is no
 * link. `others WORDS`: ends the script, and first the job if `ends_job` is set. `others_can`: so of the
 * folder of the unfinished copy, in which we are.
 */
const pinFunctions = `${folderGuardFunctions}${ownFolderFunction}
ends_job=
others() { [ -z "$ends_job" ] || stop_job "$unit"; printf '%s\\n' "$1"; exit ${inOtherHands}; }
astray() (walk "$1"; printf '%s' "$turned")
guarded() {
  danger=$(endangered "$1")
  [ -z "$danger" ] || others "$danger ${exposedWords}"
}
pin() {
  folder=\${file%/*}; folder=\${folder:-/}
  [ -d "$folder" ] || return 1
  guarded "$folder"
  cd -P "$folder" || exit 1
  here=$(pwd -P)
  if [ "$here" != "$folder" ]; then
    turned=$(astray "$folder")
    [ -z "$turned" ] && [ "$(readlink -f "$folder")" = "$here" ] || others "\${turned:-$folder} ${turnedWords}"
  fi
  here=\${here%/}
  file=./\${file##*/} part=./\${part##*/} manifest=./\${manifest##*/}
}
others_can() { others "$here/\${part##*/} ($(stat -c '%U, %A' .)) can be changed by others than root"; }
enter() { cd -P "$part" && [ "$(pwd -P)" = "$here/\${part##*/}" ] || others "$here/\${part##*/} is not the folder that was made there"; }
`;

/** `stop_job UNIT`: nothing of it runs afterwards. */
export const stopJobFunction = `
stop_job() {
  systemctl stop "$1" 2>/dev/null
  case $(systemctl show -p ActiveState --value "$1") in inactive|failed) ;; *) echo "$1 could not be stopped" >&2; return 1;; esac
  systemctl reset-failed "$1" 2>/dev/null
  return 0
}
`;

/** `start_job UNIT DESCRIPTION SECONDS`: runs `$run/job`, for so long at most. */
export const startJobFunction = `
start_job() {
  systemd-run --quiet --collect --unit="$1" --description="$2" -p CPUAccounting=yes -p NoNewPrivileges=yes \\
    -p RuntimeMaxSec="$3" -p TimeoutStopSec=10 -p UMask=0077 /bin/sh "$run/job"
}
`;

/**
 * `held FILE`: who has it open or exports it, a line each. `vacant FOLDER`: nothing is in it but what an interrupted start leaves.
 * `drop_all`: removes an unfinished copy, the record of whose it is last.
 * `require_seen FACTS DIGEST`: ends the script unless file and manifest are as they were seen.
 */
const copyFunctions = `${unitFunctions}${imageFunctions}${stopJobFunction}${activeExportsFunction}${pinFunctions}
held() {
  [ -e "$1" ] || return 0
  held_by=$(losetup -n -O NAME -j "$1") || return 1
  [ -z "$held_by" ] || printf '%s\\n' "$held_by" | sed 's/^/device /'
  # A server may open the file only while a client is connected.
  active_exports | while IFS= read -r held_by; do
    held_file=$(own File "$held_by")
    [ -z "$held_file" ] || [ ! "$held_file" -ef "$1" ] || echo "export \${held_by##*/}"
  done
  # Not -samefile: find itself would have it open.
  find -L /proc/[0-9]*/fd -maxdepth 1 -inum "$(stat -c %i "$1")" -printf '%D %p\\n' 2>/dev/null |
    sed -n "s|^$(stat -c %d "$1") /proc/\\([0-9]*\\)/.*|\\1|p" | sort -un | while IFS= read -r held_by; do
    echo "$(tr '\\0' ' ' </proc/"$held_by"/cmdline 2>/dev/null | cut -c1-120 | sed 's/ *$//') (pid $held_by)"
  done
}
refuse_held() {
  held_now=$(held "$1") || exit 1
  [ -z "$held_now" ] || { printf '%s\\n' "$held_now"; exit ${fileInUse}; }
}
vacant() {
  inside=$(ls -A "$1") || exit 1
  case $inside in ''|record.json.new) return 0;; *) return 1;; esac
}
drop_all() {
  rm -rf "$run" || return 1
  [ -d "$part" ] || return 0
  (enter && find . -mindepth 1 -maxdepth 1 ! -name record.json -exec rm -rf {} +) && rm -rf "$part"
}
require_seen() { [ "$(facts "$file")" = "$1" ] && [ "$(digest "$manifest")" = "$2" ] || exit ${changedMeanwhile}; }
`;

/** Looks at everything that a copy to this file could have left. */
export const observeCopyScript = hostScript(
  "observe-copy",
  "observe",
  `${emitFunctions}${copyFunctions}
${takePaths}
parent=\${file%/*}; [ -n "$parent" ] || parent=/
near=$parent
while [ ! -d "$near" ]; do near=\${near%/*}; [ -n "$near" ] || near=/; done
[ "$near" != "$parent" ] || emit parent yes
filesystem=$(findmnt -n -o UUID -T "$near") || exit 1
if [ -z "$filesystem" ]; then
  filesystem=$(findmnt -n -o SOURCE -T "$near") || exit 1
  # A device's name is another one after the next boot.
  case $filesystem in /dev/*) uuid=$(blkid -o value -s UUID "$filesystem") && [ -n "$uuid" ] && filesystem=$uuid;; esac
fi
emit filesystem "$filesystem"
# Before what it made: the job's last work is its result, so that one which runs no more has no other to come.
emit active "$(systemctl show -p ActiveState --value "$unit")"
emit facts "$(facts "$file")"
if [ -e "$file" ] || [ -L "$file" ]; then
  emit kind "$(stat -c %F "$file")"
  emit blocks "$(stat -c '%b %B' "$file")"
fi
emit manifestDigest "$(digest "$manifest")"
# Another's link would have any file of root's read and told.
if [ -e "$manifest" ] || [ -e "$part" ]; then guarded "$parent"; fi
if plain "$manifest"; then emit_file manifest "$manifest"; fi
emit recordDigest "$(digest "$part/record.json")"
if [ -d "$part" ] && [ ! -L "$part" ]; then
  if vacant "$part"; then emit part vacant; else
    emit part yes
    if plain "$part/record.json"; then emit_file record "$part/record.json"; fi
    if plain "$part/result"; then emit_file result "$part/result"; fi
    emit image "$(facts "$part/image")"
  fi
elif [ -e "$part" ] || [ -L "$part" ]; then emit part other; fi
emit end ""
`,
  ["path", "path", "path", "unit", "run"],
);

/** Whether a copy can be made. Arguments: uri ("" while nothing is exported yet), programs. */
export const preflightCopyScript = hostScript(
  "preflight-copy",
  "observe",
  `${emitFunctions}${missingFunction}${pinFunctions}
${takePaths}
parent=\${file%/*} uri=$1 mount=$2; shift 2
[ -n "$parent" ] || parent=/
emit_missing "$@"
if [ -n "$mount" ] && mountpoint -q "$mount"; then emit mounted yes; fi
if [ -d "$parent" ]; then emit parent yes; fi
if [ -d "$parent" ]; then
  danger=$(endangered "$parent")
  emit exposed "\${danger:-$(open_to_all "$parent")}"
fi
emit astray "$(astray "$parent")"
if [ -d "$parent" ] && [ -w "$parent" ]; then emit writable yes; fi
if [ -e "$manifest" ] || [ -L "$manifest" ]; then emit manifest yes; fi
if [ -n "$uri" ] && command -v nbdinfo >/dev/null; then emit_output size timeout 30 nbdinfo --size "$uri"; fi
emit end ""
`,
  ["path", "path", "path", "unit", "run", "uri?", "path?", "many:word"],
);

canHaveCertificates(preflightCopyScript);

/**
 * Starts the job (stdin). Arguments: the file's facts and the manifest's digest as they were seen, the record, a
 * description of the unit, after how many seconds it is ended, the job's length in bytes.
 */
export const startCopyScript = hostScript(
  "start-copy",
  "change",
  `${copyFunctions}${startJobFunction}
${takePaths}
seen=$1 seen_manifest=$2 record=$3 description=$4 runtime=$5 bytes=$6
lock
pin || exit ${changedMeanwhile}
require_seen "$seen" "$seen_manifest"
if [ -e "$part" ] || [ -L "$part" ]; then
  [ -d "$part" ] && [ ! -L "$part" ] && vacant "$part" || exit ${changedMeanwhile}
fi
refuse_held "$file"
# A job whose folder somebody has removed still runs.
stop_job "$unit" || exit 1
umask 077
rm -rf "$run" && mkdir "$run" && receive "$run/job" "$bytes" || { rm -rf "$run"; exit 1; }
write_record() {
  enter && rm -f record.json.new && (set -C; printf %s "$record" >record.json.new) || { rm -f record.json.new; exit 1; }
  own_folder record.json.new || others_can
  sync record.json.new && mv -fT record.json.new record.json || { rm -f record.json.new; exit 1; }
}
# Its mode is said, else a default ACL of the folder above would decide.
[ -d "$part" ] || mkdir -m 700 "$part" || { rm -rf "$run"; exit 1; }
(write_record) || { rc=$?; rmdir "$part"; rm -rf "$run"; exit "$rc"; }
start_job "$unit" "$description" "$runtime" || { stop_job "$unit" && drop_all; exit 1; }
`,
);

/** How the job is. */
export const followCopyScript = hostScript(
  "follow-copy",
  "change",
  `${emitFunctions}
${takeAnyPaths}
show=$(systemctl show -p ActiveState -p CPUUsageNSec "$unit") || exit 1
emit show "$show"
emit now "$(date +%s)"
for name in phase size; do if [ -e "$run/$name" ]; then emit "$name" "$(cat "$run/$name")"; fi; done
for name in progress read; do if [ -e "$run/$name" ]; then emit "$name" "$(tail -c 300 "$run/$name")"; fi; done
case $show in *ActiveState=inactive*|*ActiveState=failed*)
  # Looked at once nothing runs any more: what is not there now will not come.
  if [ -f "$part/result" ]; then emit_file result "$part/result"; fi
  emit recordDigest "$(if [ -f "$part/record.json" ]; then sha256sum <"$part/record.json" | cut -d' ' -f1; fi)"
  if [ -e "$run/failure" ]; then emit_file failure "$run/failure"; fi
  # Only of this job: an earlier one had the same unit.
  began=$(stat -c %Y "$run/job" 2>/dev/null) && emit log "$(journalctl -q -n 15 -o cat --no-pager --since "@$began" -u "$unit" 2>&1)";;
esac
emit end ""
`,
);

/** Ends the job and removes what it made. Argument: digest of the record ("-" for none). */
export const discardCopyScript = hostScript(
  "discard-copy",
  "change",
  `${copyFunctions}
${takePaths}
seen_record=$1
lock
ends_job=yes
pin || { stop_job "$unit" && rm -rf "$run"; exit; }
# A start that was cancelled may not have come to its record.
[ "$(digest "$part/record.json")" = "$seen_record" ] || [ ! -e "$part" ] || vacant "$part" || exit ${changedMeanwhile}
stop_job "$unit" && drop_all
`,
);

/**
 * Puts the verified image in its place, its manifest (stdin) first. Arguments: the file's facts and the manifest's digest as
 * seen, the record's digest, the image's facts, the manifest's length in bytes.
 */
export const commitCopyScript = hostScript(
  "commit-copy",
  "change",
  `${copyFunctions}
${takePaths}
seen=$1 seen_manifest=$2 seen_record=$3 image=$4 bytes=$5
lock
pin || exit ${changedMeanwhile}
require_seen "$seen" "$seen_manifest"
[ "$(digest "$part/record.json")" = "$seen_record" ] || exit ${changedMeanwhile}
refuse_held "$file"
umask 077
enter
[ "$(digest record.json)" = "$seen_record" ] || exit ${changedMeanwhile}
[ "$(facts image)" = "$image" ] || exit ${imageChanged}
rm -f manifest.json && (set -C; receive manifest.json "$bytes") || exit 1
own_folder manifest.json || others_can
mv -fT manifest.json "../\${manifest##*/}" && mv -fT image "../\${file##*/}" && sync .. && cd -P .. && drop_all
`,
);

/** Ends with `fileInUse` if the file is open. */
export const heldImageScript = hostScript(
  "image-users",
  "observe",
  `${copyFunctions}
${takePaths}
refuse_held "$file"
`,
  ["path", "path", "path", "unit", "run"],
);

/** Writes a manifest (stdin) anew. Arguments: facts and digest as seen, the manifest's length in bytes. */
export const claimCopyScript = hostScript(
  "claim-copy",
  "change",
  `${copyFunctions}
${takePaths}
seen=$1 seen_manifest=$2 bytes=$3
lock
pin || exit ${changedMeanwhile}
require_seen "$seen" "$seen_manifest"
umask 077
rm -f "$manifest.new" && (set -C; receive "$manifest.new" "$bytes") && mv -fT "$manifest.new" "$manifest"
`,
);

/**
 * Removes file and manifest, and the unfinished copy whose record's digest is given ("-": none of ours). Arguments: as of
 * the commit, without the image's.
 */
export const removeCopyScript = hostScript(
  "remove-copy",
  "change",
  `${copyFunctions}
${takePaths}
seen=$1 seen_manifest=$2 seen_record=$3
lock
# Only one that is known to be ours.
[ "$seen_record" = - ] || ends_job=yes
if ! pin; then
  stop_job "$unit" && rm -rf "$run" || exit 1
  [ "$seen $seen_manifest" = "- -" ] || exit ${changedMeanwhile}
  exit 0
fi
require_seen "$seen" "$seen_manifest"
[ "$seen_record" = - ] || [ "$(digest "$part/record.json")" = "$seen_record" ] || exit ${changedMeanwhile}
refuse_held "$file"
if [ "$seen_record" != - ] || [ ! -e "$part" ]; then stop_job "$unit" && drop_all || exit; fi
# The manifest last: with it alone the next run still knows whose this was.
rm -f "$file" && rm -f "$manifest" "$manifest.new" && sync "\${file%/*}/"
`,
);

/**
 * Prints `runs NAME` or `waits NAME SECONDS` (since its job did anything) for each copy that is of use still. Arguments: names
 * of their units without `lvm-nbd-copy-` and `.service`.
 */
export const livingCopiesScript = hostScript(
  "living-copies",
  "observe",
  `
for name in "$@"; do
  state=$(systemctl show -p ActiveState --value "lvm-nbd-copy-$name.service") || exit 1
  case $state in inactive|failed) ;; *) echo "runs $name"; continue;; esac
  last=$(stat -c %Y "/run/lvm-nbd-copy-$name" "/run/lvm-nbd-copy-$name"/* 2>/dev/null | sort -n | tail -n 1)
  [ -z "$last" ] || echo "waits $name $(($(date +%s) - last))"
done
`,
  ["many:word"],
);

/** Prints the unfinished copies in folders, a line each. Arguments: the folders. */
export const unfinishedCopiesScript = hostScript(
  "unfinished-copies",
  "observe",
  `
for folder in "$@"; do
  for part in "\${folder%/}"/*.part; do [ ! -d "$part" ] || printf '%s\\n' "$part"; done
done
`,
  ["many:path"],
);

/** Reads the image's checksum again. Arguments: format, file. Exit code 70: it cannot be read. 71: that cannot be told. `inOtherHands`. */
export const checkImageScript = hostScript(
  "check-image",
  "observe",
  `${imageFunctions}${pinFunctions}
# What a qcow2 image names can be changed after the look at it by who can write it.
if [ "$1" = qcow2 ]; then guarded "$2"; else guarded "\${2%/*}/"; fi
hash_file "$1" "$2" 3>/dev/null && exit 0
case $? in 1) exit 70;; *) exit 71;; esac
`,
  ["format", "path"],
);
