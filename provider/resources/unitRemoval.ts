/** Units of ours that are to go from a host at about the same time go by one command, each with an outcome of its own. */
import { failure, parseOutput, refusal } from "../core/command.js";
import { Gathering } from "../core/gathering.js";
import { hostScript, script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { tidyFunction } from "../linux/attachUnit.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import { holdersScript, parseHolders } from "../linux/holders.js";
import { certificatesFolders, certificatesFunctions } from "../linux/tls.js";
import { changedMeanwhile, endUnitFunction, unitFunctions } from "../linux/unitScript.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import { writtenMeanwhile } from "./unit.js";

/** Exit code of one whose device is held, by whom is named. */
const held = 75;

/** Others wait for the lock of units for 120 s: what was not begun after so many seconds is left to the next command. */
const lockedSeconds = 30;

/**
 * Arguments: the script that names who holds a device, and for each unit: unit, its configuration or, of an attachment, its path, the
 * mark that was seen, what its folders of certificates begin with, and the device that must not be held or "". Prints, by the unit's name,
 * an exit code, and as `UNIT.said` what was said; nothing of those that it had no time for. A unit's file goes last: until then what a cut leaves is found by its mark, and removed
 * by the next run. By then systemd has forgotten what was to start it: while it remembers, it would start it when its device appears
 * again. It reads all units once for all of them, and once more where another unit, as a mount that needs one, has kept one in its memory.
 */
const takeDownScript = hostScript(
  "take-down-units",
  "change",
  `${emitFunctions}${unitFunctions}${endUnitFunction}${tidyFunction}${certificatesFunctions}
holders=$1; shift
failed=' '
each() {
  each_do=$1; shift
  while [ $# -gt 0 ]; do
    case $failed in *" $1 "*) ;; *) "$each_do" "$1" "$2" "$3" "$4" "$5";; esac
    shift 5
  done
}
tell_failed() { failed="$failed$1 "; emit "$1" "$rc"; emit "$1.said" "$said"; }
# What one of them cannot do is told of that one, and the others go on.
attempt() {
  attempt_unit=$1; shift
  said=$("$@" 2>&1) || { rc=$?; tell_failed "$attempt_unit"; }
}
is_attachment() { case $1 in lvm-nbd-attach-*) ;; *) return 1;; esac; }
see() {
  if [ "$(date +%s)" -lt "$end" ]; then attempt "$1" see_unit "$1" "/etc/systemd/system/$1" "$3" "$5"; else failed="$failed$1 "; fi
}
see_unit() {
  guard "$2" "$3"
  is_attachment "$1" || return 0
  if [ -b "$4" ]; then
    held=$(exec 3>&1; noise=$(sh -c "$holders" sh "$4" "$1" 2>&1 >&3) || { printf '%s\n' "$noise" >&2; exit 1; }) || return 1
    [ -z "$held" ] || { printf '%s\n' "$held"; return ${held}; }
  fi
  # At once, so that nobody slips in while others are looked at.
  end_unit "$1" "$2"
}
collect() {
  ended="$ended $1"
  if is_attachment "$1"; then attached=yes; elif [ -e "/etc/systemd/system/$1" ]; then units="$units $1"; else end "$1"; fi
}
end() { is_attachment "$1" || attempt "$1" end_unit "$1" "/etc/systemd/system/$1"; }
remove() { attempt "$1" remove_files "$1" "/etc/systemd/system/$1" "$2" "$4"; }
remove_files() {
  if is_attachment "$1"; then
    # A mount that needs it may have had it started again since.
    case $(systemctl show -p ActiveState --value "$1") in inactive|failed) ;; *) echo "it was started again meanwhile" >&2; return 1;; esac
    rm -f "$3" && tidy "$2"
  else rm -f "$3" "$3.new"; fi &&
    rm -rf "$2.d" && tidy_certificates "$4" && rm -f "$2.new" "$2"
}
gone() { removed="$removed $1"; }
is_remembered() {
  load_states=$(systemctl show -p LoadState --value -- "$@") || return 0
  for load_state in $load_states; do [ "$load_state" = not-found ] || return 0; done
  return 1
}
tell_failed_attachment() { ! is_attachment "$1" || tell_failed "$1"; }
done_with() { emit "$1" 0; }
lock
end=$(( $(date +%s) + ${lockedSeconds} ))
each see "$@"
units= ended= attached=
each collect "$@"
# One question for all; where that fails, each is asked for.
[ -z "$units" ] || systemctl disable --quiet --now --no-reload $units >/dev/null 2>&1 || each end "$@"
[ -z "$ended" ] || said=$(systemctl daemon-reload 2>&1) || { rc=1; each tell_failed "$@"; }
[ -z "$ended" ] || systemctl reset-failed $ended >/dev/null 2>&1
each remove "$@"
removed=
each gone "$@"
[ -z "$removed" ] || ! is_remembered $removed || said=$(systemctl daemon-reload 2>&1) || { rc=1; each tell_failed "$@"; }
[ -z "$attached" ] || said=$(udevadm control --reload 2>&1) || { rc=1; each tell_failed_attachment "$@"; }
each done_with "$@"
emit end ""
`,
);

const mostAtOnce = 8;
/** Each command does at least the first of those that it was given. */
const mostCommands = 2 * mostAtOnce;

const removals = new Gathering<{ readonly command: RemoteCommand; readonly result: CommandResult }>();

/** A unit that is to go. */
export interface UnwantedUnit {
  readonly unit: string;
  /** Its configuration, or an attachment's stable path. */
  readonly path: string;
  /** What its file carries, "" for none. */
  readonly mark: string;
  /** What must not be held. */
  readonly device?: string | undefined;
}

/** Returns who holds its device: then nothing was done. */
export async function removeUnit(
  context: Context,
  { unit, path, mark, device = "" }: UnwantedUnit,
): Promise<readonly string[]> {
  const item = [unit, path, mark, certificatesFolders(unit), device] as const;
  const looks = {
    together: (items: readonly string[], signal: AbortSignal) => removeTogether(context, items, signal),
    most: mostAtOnce,
  };
  const ask = () => removals.ask(context.host, "removed units", JSON.stringify(item), looks, context.signal);
  let done = await ask();
  for (let commands = 1; done === undefined && commands < mostCommands; commands++) done = await ask();
  if (done === undefined)
    throw refusal(context, "OUTPUT_UNREADABLE", `the host did not tell whether ${unit} was removed`);
  const { command, result } = done;
  if (result.exitCode === 0) return [];
  if (result.exitCode === held) return parseOutput(context, command, result, parseHolders);
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  throw failure(context, command, result, `the unit ${unit} could not be removed`, "COMMAND_FAILED");
}

async function removeTogether(context: Context, items: readonly string[], signal: AbortSignal) {
  const all: string[][] = items.map((one) => JSON.parse(one));
  const command: RemoteCommand = {
    argv: script(takeDownScript, holdersScript, ...all.flat()),
    kind: "change",
    // The lock (120 s) and the units read anew; for each who holds it, and the stop (10 s, or 60 of an attachment) by itself.
    deadlineSeconds: 300 + 80 * all.length,
  };
  const result = await context.host.run(command, signal);
  const told = result.exitCode === 0 ? parseOutput(context, command, result, parseFields) : undefined;
  return new Map(
    items.flatMap((one, at) => {
      const name = all[at]?.[0] ?? "";
      if (told === undefined) return [[one, { command, result }] as const];
      const exitCode = told.get(name);
      if (exitCode === undefined) return [];
      const said = told.get(`${name}.said`) ?? "";
      return [
        [one, { command, result: { exitCode: Number(exitCode), stdout: said, stderr: said } }] as const,
      ];
    }),
  );
}
