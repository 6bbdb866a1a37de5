/** A command as it goes over the wire, and as it is shown. */
import { LvmNbdError } from "../core/errors.js";
import { hostCommandOf } from "../core/hostCommands.js";
import { commandPath, environment, stopArgv } from "./keptCommands.js";
import { quote, quoteAll } from "./quoting.js";
import type { RemoteCommand } from "./types.js";

export const defaultGraceSeconds = 5;

/**
 * Prints its process id first, so that an abort can end it with all its children, then becomes `timeout`,
 * which leads a process group of that id and ends it when the deadline passes, whatever happens to the link.
 */
const wrapper = `echo "$1 $$" >&2; shift; exec timeout "$@"`;

/** Uses the kept command if there is one. Arguments: its path, mark, grace, deadline, how many words stand for it, argv. */
const chooser = `path=$1 mark=$2 grace=$3 deadline=$4 words=$5; shift 5
if [ -x "$path" ]; then shift "$words"; exec sudo -n -- "$path" "$mark" "$grace" "$deadline" "$@"; fi
exec sudo -n -- env ${quoteAll(environment)} "LVM_NBD_RUN=$mark" sh -c ${quote(wrapper)} sh "$mark" -k "$grace" "$deadline" "$@"`;

/**
 * The one line that the host's login shell gets. `marker` begins the first line of stderr, see `takePid`.
 * Raises INVALID_INPUT for a NUL, and for a deadline or grace of 0, which `timeout` takes for none at all.
 */
export function wireCommand(command: RemoteCommand, sudo: boolean, marker: string): string {
  const grace = command.graceSeconds ?? defaultGraceSeconds;
  for (const seconds of [command.deadlineSeconds, grace]) {
    if (!(seconds > 0 && Number.isFinite(seconds))) {
      throw new LvmNbdError("INVALID_INPUT", {
        message: `a deadline and a grace are more than 0 s and end, not ${seconds} s`,
        command: displayCommand(command),
      });
    }
  }
  const limits = [String(grace), String(command.deadlineSeconds)] as const;
  const known = sudo ? hostCommandOf(command.argv) : undefined;
  if (known !== undefined) {
    const words = String(known.argv.length);
    return quoteAll([
      "sh",
      "-c",
      chooser,
      "sh",
      commandPath(known),
      marker,
      ...limits,
      words,
      ...command.argv,
    ]);
  }
  return quoteAll([
    ...(sudo ? ["sudo", "-n", "--"] : []),
    ...["env", ...environment, `LVM_NBD_RUN=${marker}`],
    ...["sh", "-c", wrapper, "sh", marker, "-k", ...limits],
    ...command.argv,
  ]);
}

/** What ends a command whose process id and `marker` are known, with all it started. */
export function killCommand(pid: number, graceSeconds: number, sudo: boolean, marker: string): string {
  const command: RemoteCommand = {
    kind: "change",
    argv: stopArgv(pid, graceSeconds, marker),
    deadlineSeconds: graceSeconds + 10,
  };
  return wireCommand(command, sudo, `${marker}-stop`);
}

/** What follows the marker. Only there: a host may send it without end. */
const pidLine = / (\d+)\n/y;

/**
 * Takes the marked line out of stderr, with what sudo or the login shell said before it. Without the line the
 * command was never started (sudo refused, no shell).
 */
export function takePid(stderr: string, marker: string): { pid: number | undefined; stderr: string } {
  for (let at = stderr.indexOf(marker); at >= 0; at = stderr.indexOf(marker, at + 1)) {
    pidLine.lastIndex = at + marker.length;
    const [, pid] = pidLine.exec(stderr) ?? [];
    if (pid !== undefined) return { pid: Number(pid), stderr: stderr.slice(pidLine.lastIndex) };
  }
  return { pid: undefined, stderr };
}

/** The command as one could paste it. Scripts are shortened; stdin, which may hold secrets, is never shown. */
export function displayCommand(command: Pick<RemoteCommand, "argv">): string {
  return quoteAll(
    command.argv.map((argument) => {
      const lines = argument.trim().split("\n");
      return lines.length > 1 || argument.length > 300 ? `${(lines[0] ?? "").slice(0, 60)}...` : argument;
    }),
  );
}
