/** Patterns of the shell: `*`, `?`, `[...]`; a backslash makes the next character an ordinary one. */

/** The fake host was asked for something it does not imitate: it never guesses. */
export class Unsupported extends Error {
  constructor(what: string) {
    super(`the fake host does not support: ${what.slice(0, 300)}`);
  }
}

const expressions = new Map<string, RegExp>();

/** Whether the whole text fits the pattern. */
export function matches(pattern: string, text: string): boolean {
  if (/[?[]/.test(pattern) && /[^\0-\x7f]/.test(text))
    throw new Unsupported(`${pattern} on bytes of ${text}`);
  let expression = expressions.get(pattern);
  if (expression === undefined) {
    expression = new RegExp(`^(?:${translate(pattern)})$`, "s");
    expressions.set(pattern, expression);
  }
  return expression.test(text);
}

function translate(pattern: string): string {
  return pattern.replace(/\\(.)|\[(!?)(\]?(?:\\.|[^\]\\])*)\]|./gs, (whole, quoted, negated, members) => {
    if (quoted !== undefined) return literally(quoted);
    if (members !== undefined) return `[${negated === "!" ? "^" : ""}${membersOf(members)}]`;
    if (whole === "*") return ".*";
    return whole === "?" ? "." : literally(whole);
  });
}

function membersOf(members: string): string {
  if (/^\^|\[[:.=]/.test(members)) throw new Unsupported(`the pattern [${members}]`);
  return members.replace(/\\(.)|./gs, (whole, quoted) =>
    whole === "-" ? "-" : (quoted ?? whole).replace(/\W/, "\\$&"),
  );
}

function literally(text: string): string {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
}

/** Whether a pattern could fit anything but one text. */
export function isPattern(pattern: string): boolean {
  return /[*?]|\[.+\]/.test(pattern.replace(/\\./gs, ""));
}

/** The text as a pattern that fits it alone. */
export function quotePattern(text: string): string {
  return text.replace(/[*?[\]\\!^-]/g, "\\$&");
}

/** The text that a pattern without special characters fits. */
export function unquotePattern(pattern: string): string {
  return pattern.replace(/\\(.)/gs, "$1");
}
