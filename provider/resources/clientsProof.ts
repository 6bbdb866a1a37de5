/** The proof that the host's kernel lets in nobody but an export's clients: somebody who may not tries. */
import { dirname } from "node:path/posix";
import { failure } from "../core/command.js";
import type { ErrorCode, LvmNbdError } from "../core/errors.js";
import { hostScript, script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { isLoopback } from "../linux/addresses.js";
import { askedUri, type ExportPlan, exportUnitName } from "../linux/exportUnit.js";
import { changedMeanwhile, cutOffFunction, unitFunctions } from "../linux/unitScript.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import { writtenMeanwhile } from "./unit.js";

/** Of a host: the kernel with which it was seen, and its command line. Booted with others, it is looked at again. */
export const clientsProof = "/var/lib/lvm-nbd/clients-enforced";

/** What to do about an export that lets others in and goes on. */
export const stopIt =
  "Stop it on the host, now: `systemctl stop UNIT; systemctl disable UNIT`, with the unit that the command names. Then run again.";

const proofFolder = dirname(clientsProof);

/** Exit codes of `prove_clients`, and what they mean. */
const outcomes: Readonly<Record<number, readonly [what: string, code: ErrorCode, advice?: string]>> = {
  71: ["the host does not enforce them; the export was stopped", "CLIENTS_NOT_ENFORCED"],
  72: ["whether the host enforces them cannot be told; the export was stopped", "COMMAND_FAILED"],
  73: [
    "whether the host enforces them cannot be told; the export goes on serving, since a client is connected or may be",
    "COMMAND_FAILED",
  ],
  74: [
    "the host does not enforce them, or that cannot be told, and the export could NOT be stopped",
    "CLIENTS_NOT_ENFORCED",
    stopIt,
  ],
};

/** Seconds that `prove_clients` takes at most. */
export const clientsProofSeconds = 840;

/** The argument of `prove_clients` for an export: whether it needs the proof, and what if there is none. */
export function clientsGuard(
  { listenAddress }: Pick<ExportPlan, "listenAddress">,
  elsewhere: boolean,
): "none" | "elsewhere" | "refuse" {
  if (isLoopback(listenAddress)) return "none";
  return elsewhere ? "elsewhere" : "refuse";
}

/**
 * For looks. `clients_proven`: it was seen that the kernel which runs enforces them. `show_with_slices UNIT OPTION...`: what `systemctl
 * show` tells of the unit (`shown`), and of the slices above it (`above`); fails where it does not. `clients_allowed FILE`: what is `shown`
 * of a unit's IPAddressAllow= and IPAddressDeny= lets in nobody but those that its file names (as systemd shows them), nor do the slices
 * above it; 1 if they do, 2 if that cannot be told. One question for all: each costs as much as half of a sudo.
 */
export const clientsLookFunctions = `
clients_proven() { [ -e ${clientsProof} ] && [ "$(cat /proc/version /proc/cmdline)" = "$(cat ${clientsProof})" ]; }
show_with_slices() {
  show_unit=$1; shift
  shown=$(systemctl show "$@" -p IPAddressAllow -p IPAddressDeny -- "$show_unit" system.slice -.slice) || return 1
  above=\${shown#*"

"}
  [ "$above" != "$shown" ] || return 1
  shown=\${shown%%"

"*}
}
clients_allowed() {
  # Nothing is what a sed that failed tells, too.
  denied=$(printf '%s\\n' "$shown" | sed -n 's/^IPAddressDeny=//p') &&
    allowed=$(printf '%s\\n' "$shown" | sed -n 's/^IPAddressAllow=//p') &&
    wider=$(printf '%s\\n' "$above" | sed -n 's/^IPAddressAllow=//p') || { why="sed does not tell what systemctl shows"; return 2; }
  declared=$(sed -n 's/^IPAddressAllow=//p' "$1") || { why="$1 cannot be read"; return 2; }
  case $above in *IPAddressAllow=*IPAddressAllow=*) ;; *) why="systemctl does not tell what the slices above the unit allow"; return 2;; esac
  case " $denied " in
  *" 0.0.0.0/0 "*"::/0 "*|*" ::/0 "*"0.0.0.0/0 "*) ;;
  *) why="what the unit denies (IPAddressDeny=) is overridden on this host"; return 1;;
  esac
  for one in $allowed; do
    case $one in *:*) one=\${one%/128};; *) one=\${one%/32};; esac
    case $one:" $declared " in
    *" $one "*|127.0.0.0/8:*" localhost "*|::1:*" localhost "*) ;;
    *) why="what the unit allows (IPAddressAllow=) is overridden on this host: $one"; return 1;;
    esac
  done
  for one in $wider; do why="a slice above the unit allows more (IPAddressAllow= of system.slice or -.slice): $one"; return 1; done
}
`;

/**
 * `prove_clients UNIT URI GUARD [PORT]`. systemd starts a unit whose address filter it cannot apply. So the unit that runs must have one,
 * and once for a kernel a process under such a filter must be seen to be kept out, and one without it to get in. The filter drops what is
 * sent: who is kept out waits, and waits for longer than who gets in takes on this host, with this server and with TLS, before and
 * after: a server that has become slow keeps nobody out. `clients_enforced UNIT URI SECONDS` (those that are waited in addition)
 * returns 1 where they are not, 2 where it cannot be told: that is tried again, more patiently. `PORT`: of an export
 * that serves already, or did until now; a disk in use is not cut off for what cannot be told, nor is one of which `ss` cannot tell
 * whether it is. With `unitFunctions`, and the unit's file is watched. `end_unproven CODE`: ends the script and says why, last of all: where
 * nobody listens any more, that kills it.
 */
export const clientsFunctions = `${clientsLookFunctions}${cutOffFunction}
clients_enforced() {
  show_with_slices "$1" || { why="systemctl does not tell what the unit allows and denies, nor the slices above it"; return 2; }
  # Also while somebody else's is written, of which systemd shows nothing yet.
  clients_allowed "/etc/systemd/system/$1" ||
    { known=$?; same "/etc/systemd/system/$1" && return "$known"; why="the unit is being written anew"; return 2; }
  ! clients_proven || return 0
  began=$(date +%s)
  answer=$(systemd-run -q --collect --wait --pipe timeout 75 nbdinfo --size "$2" 2>&1) ||
    { why="a process without an address filter does not get in, so one with it proves nothing: $answer"; return 2; }
  limit=$(( ($(date +%s) - began) * 2 + $3 ))
  # The clock may be set meanwhile.
  [ "$limit" -ge "$3" ] && [ "$limit" -le 170 ] || limit=170
  answer=$(systemd-run -q --collect --wait --pipe -p IPAddressDeny=any timeout "$limit" nbdinfo --size "$2" 2>&1)
  case $?:$answer in
  1:*nbdinfo:*"Operation not permitted"*|124:*) ;;
  0:*) why="a process that may reach no address (IPAddressDeny=any) got in"; return 1;;
  *) why="whether a process that may reach no address gets in cannot be told: $answer"; return 2;;
  esac
  answer=$(systemd-run -q --collect --wait --pipe timeout "$limit" nbdinfo --size "$2" 2>&1) ||
    { why="a process without an address filter does not always get in within $limit s, so one with it proves nothing: $answer"; return 2; }
  # Seen is seen, whether it can be noted or not.
  if [ ! -L ${proofFolder} ] && mkdir -p ${proofFolder} && rm -f ${clientsProof}.new && cat /proc/version /proc/cmdline >${clientsProof}.new &&
    sync ${clientsProof}.new && mv -fT ${clientsProof}.new ${clientsProof}; then :
  else echo "it could not be noted that they are" >&2; fi
}
end_unproven() { printf '%s\\n' "$why" >&2; exit "$1"; }
prove_clients() {
  [ "$3" != none ] || return 0
  clients_enforced "$1" "$2" 3
  known=$?
  [ "$known" != 2 ] || { sleep 2; clients_enforced "$1" "$2" 20; known=$?; }
  case $known in 0) return 0;; 1) known=unenforced code=71;; *) known=untold code=72;; esac
  if [ "$3" = elsewhere ]; then printf '%s: %s\\n' "$known" "$why"; return 0; fi
  if [ "$code" = 72 ] && [ -n "\${4-}" ]; then
    connected=$(ss -Htn state established "( sport = :$4 )") && [ -z "$connected" ] || end_unproven 73
  fi
  # Not what somebody else has begun to start meanwhile, for which this one did not answer.
  [ "$code" = 71 ] || same "/etc/systemd/system/$1" || end_unproven ${changedMeanwhile}
  cut_off "$1" || end_unproven 74
  end_unproven "$code"
}
`;

/** What a script with `prove_clients` told, for a person. */
export function warnOfClients(context: Context, { stdout }: CommandResult): void {
  const [, known, why] = /^(unenforced|untold): (.*)$/m.exec(stdout) ?? [];
  if (known === undefined) return;
  const what =
    known === "untold"
      ? "whether this host's kernel enforces `clients` cannot be told"
      : "this host's kernel does not enforce `clients`";
  context.warn(`${what} (${why}): by \`clientsEnforcedElsewhere\`, something else keeps all others out`);
}

/** The failure that an exit code of `prove_clients` means; `undefined` for another one. */
export function clientsFailure(
  context: Context,
  command: RemoteCommand,
  result: CommandResult,
): LvmNbdError | undefined {
  const outcome = outcomes[result.exitCode];
  return outcome && failure(context, command, result, `clients: ${outcome[0]}`, outcome[1], outcome[2]);
}

const proveScript = hostScript(
  "prove-clients",
  "change",
  `${unitFunctions}${clientsFunctions}
watch "/etc/systemd/system/$1" "$5"
prove_clients "$1" "$2" "$3" "$4"
`,
);

/**
 * Looks at an export that serves. Where its clients are not enforced it is stopped, and CLIENTS_NOT_ENFORCED is raised. Where that cannot
 * be told it is COMMAND_FAILED, and the export is stopped unless it was proven before (`wasProven`) and a client is connected: one that
 * never was may be connected just because nobody is kept out.
 */
export async function proveClients(
  context: Context,
  plan: ExportPlan,
  elsewhere: boolean,
  wasProven: boolean,
): Promise<void> {
  const command: RemoteCommand = {
    argv: script(
      proveScript,
      ...[exportUnitName(plan.exportName), askedUri(plan), clientsGuard(plan, elsewhere)],
      ...[wasProven ? String(plan.port) : "", JSON.stringify(plan)],
    ),
    kind: "change",
    deadlineSeconds: clientsProofSeconds,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode !== 0) {
    const what = "clients: whether the host enforces them could not be found out";
    throw (
      clientsFailure(context, command, result) ?? failure(context, command, result, what, "COMMAND_FAILED")
    );
  }
  warnOfClients(context, result);
}
