/** The one place where arguments become shell text. Source: POSIX.1-2017, Shell Command Language, 2.2.2. */
import { LvmNbdError } from "../core/errors.js";

/** An argument as one word of a POSIX shell. A NUL cannot be passed to any program: INVALID_INPUT. */
export function quote(argument: string): string {
  if (argument.includes("\0")) {
    throw new LvmNbdError("INVALID_INPUT", { message: "an argument must not hold a NUL character" });
  }
  // No leading `=`: zsh, as a login shell, would look for a program of that name.
  return /^[A-Za-z0-9_./:@%+,-][A-Za-z0-9_./:@%+=,-]*$/.test(argument)
    ? argument
    : `'${argument.replaceAll("'", "'\\''")}'`;
}

/** An argument array as shell text. */
export function quoteAll(argv: readonly string[]): string {
  return argv.map(quote).join(" ");
}
