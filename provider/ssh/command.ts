/** A command as it goes over the wire, and as it is shown. */
import { LvmNbdError } from "../core/errors.js";
import { quoteAll } from "./quoting.js";
import type { RemoteCommand } from "./types.js";

export const defaultGraceSeconds = 5;

/**
 * Prints its process id first, so that an abort can end it with all its children, then becomes `timeout`,
 * which leads a process group of that id and ends it when the deadline passes, whatever happens to the link.
 */
const wrapper = `echo "$1 $$" >&2; shift; exec timeout "$@"`;

const environment = [
  "LC_ALL=C",
  "LVM_SUPPRESS_FD_WARNINGS=1",
  "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
];

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
  return quoteAll([
    ...(sudo ? ["sudo", "-n", "--"] : []),
    "env",
    ...environment,
    "sh",
    "-c",
    wrapper,
    "sh",
    marker,
    "-k",
    String(grace),
    String(command.deadlineSeconds),
    ...command.argv,
  ]);
}

/**
 * Ends a process group on the host: TERM, and KILL for what is still there after the grace. Done when nothing is,
 * or 2 s later (what hangs in the kernel cannot be killed). `-s`, since dash takes no group after `kill -TERM --`.
 */
export function killCommand(pid: number, graceSeconds: number, sudo: boolean): string {
  const script =
    'kill -s TERM -- "-$1" 2>/dev/null; i=0; while kill -s 0 -- "-$1" 2>/dev/null; do ' +
    'i=$((i+1)); [ "$i" -le "$2" ] || kill -s KILL -- "-$1"; [ "$i" -le "$(($2+10))" ] || exit 1; sleep 0.2; done';
  return quoteAll([
    ...(sudo ? ["sudo", "-n", "--"] : []),
    "sh",
    "-c",
    script,
    "sh",
    String(pid),
    String(Math.ceil(graceSeconds * 5)),
  ]);
}

/**
 * Takes the marked line out of stderr, with what sudo or the login shell said before it. Without the line the
 * command was never started (sudo refused, no shell).
 */
export function takePid(stderr: string, marker: string): { pid: number | undefined; stderr: string } {
  const match = new RegExp(`${marker} (\\d+)\\n`).exec(stderr);
  if (match === null) return { pid: undefined, stderr };
  return { pid: Number(match[1]), stderr: stderr.slice(match.index + match[0].length) };
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
