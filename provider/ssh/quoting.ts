/** The one place where arguments become shell text. Source: POSIX.1-2017, Shell Command Language, 2.2.2. */

/** An argument as one word of a POSIX shell. A NUL cannot be passed to any program and is refused. */
export function quote(argument: string): string {
  if (argument.includes("\0")) throw new Error("an argument must not hold a NUL character");
  return /^[A-Za-z0-9_./:@%+=,-]+$/.test(argument) ? argument : `'${argument.replaceAll("'", "'\\''")}'`;
}

/** An argument array as shell text. */
export function quoteAll(argv: readonly string[]): string {
  return argv.map(quote).join(" ");
}
