/** Running a command on a host and turning its failure into an error a person can use. */
import { displayCommand } from "../ssh/command.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import { type ErrorCode, LvmNbdError } from "./errors.js";
import type { Context } from "./resource.js";

/** Runs a command; a non-zero exit code is an error with the code that `explain` finds for it. */
export async function succeed(
  context: Context,
  command: RemoteCommand,
  what: string,
  explain: (result: CommandResult) => ErrorCode | undefined = () => undefined,
): Promise<CommandResult> {
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === 0) return result;
  throw failure(context, command, result, what, explain(result) ?? "COMMAND_FAILED");
}

/** The error for a command that ended with a non-zero exit code. */
export function failure(
  context: Context,
  command: RemoteCommand,
  result: CommandResult,
  what: string,
  code: ErrorCode,
  advice?: string,
): LvmNbdError {
  return new LvmNbdError(code, {
    message: what,
    host: context.host.name,
    resource: context.resource,
    command: displayCommand(command),
    exitCode: result.exitCode,
    stderr: result.stderr,
    advice,
  });
}

/** The error for what is refused by looking alone. */
export function refusal(context: Context, code: ErrorCode, message: string, advice?: string): LvmNbdError {
  return new LvmNbdError(code, { message, advice, host: context.host.name, resource: context.resource });
}

/** Reads a command's output, or what another one told of it, with a parser; what it cannot read is `OUTPUT_UNREADABLE`, never "absent". */
export function parseOutput<T>(
  context: Context,
  command: RemoteCommand,
  result: CommandResult | string,
  parse: (stdout: string) => T,
): T {
  const { stdout, stderr } = typeof result === "string" ? { stdout: result, stderr: "" } : result;
  try {
    return parse(stdout);
  } catch (cause) {
    throw new LvmNbdError("OUTPUT_UNREADABLE", {
      message: `its output could not be read: ${cause instanceof Error ? cause.message.slice(0, 300) : String(cause)}`,
      host: context.host.name,
      resource: context.resource,
      command: displayCommand(command),
      stderr,
      cause,
    });
  }
}
