/** The proof that the host's kernel lets in nobody but an export's clients: somebody who may not tries. */
import { failure } from "../core/command.js";
import type { ErrorCode, LvmNbdError } from "../core/errors.js";
import { hostScript, script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { isLoopback } from "../linux/addresses.js";
import { askedUri, type ExportPlan, exportUnitName } from "../linux/exportUnit.js";
import { unitFunctions } from "../linux/unitScript.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";

/** Of a host, since its last boot. */
export const clientsProof = "/run/lvm-nbd-clients-enforced";

/** Exit code of `prove_clients`: they are not enforced, and the export was stopped. */
const clientsNotEnforced = 71;
/** Exit code of `prove_clients`: whether they are enforced cannot be told, and the export was stopped. */
const clientsUntold = 72;
/** Exit code of `prove_clients`: that cannot be told, and the export goes on serving. */
const clientsUntoldInUse = 73;

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
 * `prove_clients UNIT URI GUARD [PORT]`. systemd starts a unit whose address filter it cannot apply. So the unit that runs must have one,
 * and once a boot a process under such a filter must be seen to be kept out, and one without it to get in. The filter drops what is
 * sent: who is kept out waits, and waits for longer than who gets in takes on this host, with this server and with TLS, before and
 * after: a server that has become slow keeps nobody out. `clients_enforced UNIT URI SECONDS` (those that are waited in addition)
 * returns 1 where they are not, 2 where it cannot be told: that is tried again, more patiently. `PORT`: of an export
 * that serves already; a disk in use is not cut off for what cannot be told, nor is one of which `ss` cannot tell whether it is.
 */
export const clientsFunctions = `
clients_enforced() {
  case " $(systemctl show -p IPAddressDeny --value "$1") " in
  *" 0.0.0.0/0 "*"::/0 "*|*" ::/0 "*"0.0.0.0/0 "*) ;;
  *) why="what the unit denies (IPAddressDeny=) is overridden on this host"; return 1;;
  esac
  declared=" $(sed -n 's/^IPAddressAllow=//p' "/etc/systemd/system/$1") "
  for allowed in $(systemctl show -p IPAddressAllow --value "$1"); do
    case $allowed:$declared in
    0.0.0.0/0:*" 0.0.0.0/0 "*|::/0:*" ::/0 "*) ;;
    0.0.0.0/0:*|::/0:*) why="what the unit allows (IPAddressAllow=) is overridden on this host"; return 1;;
    esac
  done
  [ ! -e ${clientsProof} ] || return 0
  began=$(date +%s)
  answer=$(systemd-run -q --wait --pipe timeout 75 nbdinfo --size "$2" 2>&1) ||
    { why="a process without an address filter does not get in, so one with it proves nothing: $answer"; return 2; }
  limit=$(( ($(date +%s) - began) * 2 + $3 ))
  answer=$(systemd-run -q --wait --pipe -p IPAddressDeny=any timeout "$limit" nbdinfo --size "$2" 2>&1)
  case $?:$answer in
  1:*"Operation not permitted"*) : >${clientsProof};;
  124:*)
    answer=$(systemd-run -q --wait --pipe timeout "$limit" nbdinfo --size "$2" 2>&1) ||
      { why="a process without an address filter does not always get in within $limit s, so one with it proves nothing: $answer"; return 2; }
    : >${clientsProof};;
  0:*) why="a process that may reach no address (IPAddressDeny=any) got in"; return 1;;
  *) why="whether a process that may reach no address gets in cannot be told: $answer"; return 2;;
  esac
}
prove_clients() {
  [ "$3" != none ] || return 0
  clients_enforced "$1" "$2" 3
  known=$?
  [ "$known" != 2 ] || { sleep 2; clients_enforced "$1" "$2" 20; known=$?; }
  case $known in 0) return 0;; 1) known=unenforced code=${clientsNotEnforced};; *) known=untold code=${clientsUntold};; esac
  if [ "$3" = elsewhere ]; then printf '%s: %s\\n' "$known" "$why"; return 0; fi
  printf '%s\\n' "$why" >&2
  if [ "$code" = ${clientsUntold} ] && [ -n "\${4-}" ]; then
    connected=$(ss -Htn state established "( sport = :$4 )") && [ -z "$connected" ] || exit ${clientsUntoldInUse}
  fi
  systemctl disable --quiet --now "$1"
  exit "$code"
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
  const raised = (what: string, code: ErrorCode) => failure(context, command, result, what, code);
  if (result.exitCode === clientsNotEnforced)
    return raised("clients: the host does not enforce them", "CLIENTS_NOT_ENFORCED");
  if (result.exitCode === clientsUntold)
    return raised(
      "clients: whether the host enforces them cannot be told; the export was stopped",
      "COMMAND_FAILED",
    );
  return undefined;
}

const proveScript = hostScript(
  "prove-clients",
  "change",
  `${unitFunctions}${clientsFunctions}
prove_clients "$1" "$2" "$3" "$4"
`,
);

/**
 * Looks at an export that serves. Where its clients are not enforced it is stopped, and CLIENTS_NOT_ENFORCED is raised. Where that cannot
 * be told it is COMMAND_FAILED, and the export is stopped unless a client is connected.
 */
export async function proveClients(context: Context, plan: ExportPlan, elsewhere: boolean): Promise<void> {
  const command: RemoteCommand = {
    argv: script(
      proveScript,
      ...[exportUnitName(plan.exportName), askedUri(plan), clientsGuard(plan, elsewhere)],
      String(plan.port),
    ),
    kind: "change",
    deadlineSeconds: clientsProofSeconds,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode !== 0) {
    const inUse = result.exitCode === clientsUntoldInUse ? ", since a client is connected or may be" : "";
    const what = `clients: whether the host enforces them cannot be told; the export goes on serving${inUse}`;
    throw (
      clientsFailure(context, command, result) ?? failure(context, command, result, what, "COMMAND_FAILED")
    );
  }
  warnOfClients(context, result);
}
