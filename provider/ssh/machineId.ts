/** Which machine a host is, by its machine-id(5): a name or address may have come to lead to another one. */
import { LvmNbdError } from "../core/errors.js";
import { hostProgram } from "../core/hostCommands.js";
import { displayCommand } from "./command.js";
import type { CommandResult, RemoteCommand } from "./types.js";

const argv = hostProgram("machine-id", "observe", ["cat", "/etc/machine-id"], []);

export const machineIdCommand: RemoteCommand = {
  argv: argv(),
  kind: "read",
  deadlineSeconds: 30,
  maxOutputBytes: 4096,
};

/** `undefined`: the machine has none. Raises COMMAND_FAILED, OUTPUT_UNREADABLE. */
export function parseMachineId({ exitCode, stdout, stderr }: CommandResult): string | undefined {
  if (exitCode === 1 && /machine-id.*No such file/.test(stderr)) return undefined;
  const failed = (code: "COMMAND_FAILED" | "OUTPUT_UNREADABLE", message: string) =>
    new LvmNbdError(code, { message, command: displayCommand(machineIdCommand), exitCode, stderr });
  if (exitCode !== 0) throw failed("COMMAND_FAILED", "which machine it is could not be read");
  const text = stdout.trim();
  // The second until the first boot of an image has ended.
  if (text === "" || text === "uninitialized") return undefined;
  if (!/^[\da-f]{32}$/.test(text))
    throw failed("OUTPUT_UNREADABLE", "its /etc/machine-id holds no machine-id");
  return text;
}
