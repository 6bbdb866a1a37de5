/** Expansion of words: parameters, command and arithmetic substitution, field splitting, quotes, patterns. */
import type { ArithmeticExpression, ParameterExpansionPart, ParsedScript, Word, WordPart } from "unbash";
import type { Running } from "./machine.js";
import { isPattern, matches, quotePattern, Unsupported } from "./pattern.js";

/** What expansions need of the shell. */
export interface Scope {
  readonly positional: readonly string[];
  /** A variable or special parameter but `@` and `*`. */
  get(name: string): string | undefined;
  set(name: string, value: string): void;
  substitute(script: ParsedScript): Running<string>;
  glob(pattern: string): Running<string[]>;
  /** Ends the shell with a message, as an expansion error does. */
  fail(message: string): never;
}

/** A word as fields: split and with file names. */
export function* expandFields(scope: Scope, word: Word): Running<string[]> {
  if (isPlain(word)) return [word.text];
  const fields = new Fields(scope, true);
  yield* expandWord(scope, word, fields);
  const expanded: string[] = [];
  for (const { text, pattern } of fields.all()) {
    const found = isPattern(pattern) ? yield* scope.glob(pattern) : [];
    expanded.push(...(found.length > 0 ? found : [text]));
  }
  return expanded;
}

/** A word as one text, e.g. for an assignment. */
export function* expandText(scope: Scope, word: Word): Running<string> {
  if (isPlain(word)) return word.text;
  const fields = new Fields(scope, false);
  yield* expandWord(scope, word, fields);
  return fields.all()[0]?.text ?? "";
}

/** A word as a pattern, in which what was quoted stands for itself. */
export function* expandPattern(scope: Scope, word: Word): Running<string> {
  const fields = new Fields(scope, false);
  yield* expandWord(scope, word, fields);
  return fields.all()[0]?.pattern ?? "";
}

/** Neither quotes nor expansions nor patterns. */
function isPlain(word: Word): boolean {
  return word.parts === undefined && !word.text.includes("\\");
}

/** The parts of a here-document. */
export function* expandQuoted(scope: Scope, parts: readonly WordPart[]): Running<string> {
  const fields = new Fields(scope, false);
  for (const part of parts) yield* expandPart(scope, part, fields, true);
  return fields.all()[0]?.text ?? "";
}

interface Field {
  text: string;
  pattern: string;
}

class Fields {
  private readonly done: Field[] = [];
  private current: Field | undefined;

  constructor(
    private readonly scope: Scope,
    private readonly splits: boolean,
  ) {}

  all(): readonly Field[] {
    this.end();
    return this.done;
  }

  /** Ends a field; the next text begins another. */
  end(): void {
    if (this.current !== undefined) this.done.push(this.current);
    this.current = undefined;
  }

  /** Text whose special characters stand for themselves. */
  quoted(text: string): void {
    this.add(text, quotePattern(text));
  }

  /** Text of the script, in which a backslash quotes. */
  literal(text: string): void {
    for (const [piece, escaped] of text.matchAll(/\\(.)|[^\\]+/gs)) {
      if (escaped === undefined) this.add(piece, piece);
      else if (escaped !== "\n") this.quoted(escaped);
    }
  }

  /** The value of an expansion outside quotes. */
  value(text: string): void {
    const separators = this.splits ? (this.scope.get("IFS") ?? " \t\n") : "";
    if (separators === "") {
      if (text !== "" || !this.splits) this.add(text, text);
      return;
    }
    if (/[^ \t\n]/.test(separators)) throw new Unsupported(`field splitting at IFS=${separators}`);
    for (const piece of text.match(new RegExp(`[${separators}]+|[^${separators}]+`, "g")) ?? []) {
      if (separators.includes(piece.charAt(0))) this.end();
      else this.add(piece, piece);
    }
  }

  /** `$@` and `$*`. */
  positional(name: "@" | "*", quoted: boolean): void {
    const add = (text: string) => (quoted ? this.quoted(text) : this.value(text));
    const { positional } = this.scope;
    if (!this.splits || (quoted && name === "*")) {
      const glue = name === "@" ? " " : (this.scope.get("IFS") ?? " ").slice(0, 1);
      this.quoted(positional.join(glue));
      return;
    }
    positional.forEach((text, index) => {
      if (index > 0) this.end();
      add(text);
    });
  }

  private add(text: string, pattern: string): void {
    this.current ??= { text: "", pattern: "" };
    this.current.text += text;
    this.current.pattern += pattern;
  }
}

function* expandWord(scope: Scope, word: Word, fields: Fields): Running<void> {
  if (word.parts === undefined) fields.literal(word.text);
  else for (const part of word.parts) yield* expandPart(scope, part, fields, false);
}

function* expandPart(scope: Scope, part: WordPart, fields: Fields, quoted: boolean): Running<void> {
  switch (part.type) {
    case "Literal":
      if (quoted) fields.quoted(part.value);
      else fields.literal(part.text);
      return;
    case "Glob":
      if (part.kind !== "bracket" || part.parts.every(({ type }) => type === "Literal")) {
        fields.literal(part.text);
        return;
      }
      fields.literal("[");
      for (const inner of part.parts) yield* expandPart(scope, inner, fields, false);
      fields.literal("]");
      return;
    case "SingleQuoted":
      fields.quoted(part.value);
      return;
    case "DoubleQuoted":
      if (!part.parts.every(isAllParameters)) fields.quoted("");
      for (const inner of part.parts) yield* expandPart(scope, inner, fields, true);
      return;
    case "SimpleExpansion":
      addParameter(scope, part.text.slice(1), fields, quoted);
      return;
    case "ParameterExpansion":
      yield* expandParameter(scope, part, fields, quoted);
      return;
    case "CommandExpansion": {
      const output = part.script === undefined ? "" : yield* scope.substitute(part.script);
      add(fields, output.replaceAll("\0", "").replace(/\n+$/, ""), quoted);
      return;
    }
    case "ArithmeticExpansion":
      add(fields, String(yield* evaluate(scope, part.expression, part.text.slice(3, -2))), quoted);
      return;
    default:
      throw new Unsupported(part.text);
  }
}

function isAllParameters(part: WordPart): boolean {
  return /^\$(@|\{@\})$/.test(part.text);
}

function add(fields: Fields, text: string, quoted: boolean): void {
  if (quoted) fields.quoted(text);
  else fields.value(text);
}

function addParameter(scope: Scope, name: string, fields: Fields, quoted: boolean): void {
  if (name === "@" || name === "*") fields.positional(name, quoted);
  else add(fields, scope.get(name) ?? "", quoted);
}

function* expandParameter(
  scope: Scope,
  part: ParameterExpansionPart,
  fields: Fields,
  quoted: boolean,
): Running<void> {
  const { parameter, operation, prefix } = part;
  if (operation === undefined && prefix === undefined) {
    addParameter(scope, parameter, fields, quoted);
    return;
  }
  if (parameter === "@" || parameter === "*") throw new Unsupported(part.text);
  const value = scope.get(parameter);
  if (operation === undefined) {
    add(fields, String(Buffer.byteLength(value ?? "")), quoted);
    return;
  }
  if (operation.type === "Remove") {
    const pattern = yield* expandPattern(scope, operation.operand);
    add(fields, remove(value ?? "", pattern, operation.operator), quoted);
    return;
  }
  if (operation.type !== "Default") throw new Unsupported(part.text);
  const given = value !== undefined && !(operation.operator.startsWith(":") && value === "");
  const operator = operation.operator.replace(":", "");
  if (operator === "+" ? !given : given) {
    if (operator !== "+") add(fields, value ?? "", quoted);
    else if (quoted) fields.quoted("");
    return;
  }
  const unset = `parameter not set${operation.operator === ":?" ? " or null" : ""}`;
  if (operator === "?") scope.fail(`${parameter}: ${(yield* expandText(scope, operation.operand)) || unset}`);
  if (operator === "=") {
    const assigned = yield* expandText(scope, operation.operand);
    scope.set(parameter, assigned);
    add(fields, assigned, quoted);
    return;
  }
  yield* expandOperand(scope, operation.operand, fields, quoted);
}

/** The word of `${x:-word}`; its bare text is split like a value. */
function* expandOperand(scope: Scope, word: Word, fields: Fields, quoted: boolean): Running<void> {
  if (word.text.includes("\\")) throw new Unsupported(word.text);
  if (word.parts === undefined) add(fields, word.text, quoted);
  for (const part of word.parts ?? []) {
    if (part.type === "Literal") add(fields, part.text, quoted);
    else yield* expandPart(scope, part, fields, quoted);
  }
}

function remove(value: string, pattern: string, operator: "#" | "##" | "%" | "%%"): string {
  const lengths = Array.from({ length: value.length + 1 }, (_, length) => length);
  if (operator.length === 2) lengths.reverse();
  for (const length of lengths) {
    const cut = operator.startsWith("#") ? value.slice(0, length) : value.slice(value.length - length);
    if (!matches(pattern, cut)) continue;
    return operator.startsWith("#") ? value.slice(length) : value.slice(0, value.length - length);
  }
  return value;
}

const binary: Readonly<Record<string, (a: bigint, b: bigint) => bigint | boolean>> = {
  "+": (a, b) => a + b,
  "-": (a, b) => a - b,
  "*": (a, b) => a * b,
  "/": (a, b) => a / b,
  "%": (a, b) => a % b,
  "<": (a, b) => a < b,
  "<=": (a, b) => a <= b,
  ">": (a, b) => a > b,
  ">=": (a, b) => a >= b,
  "==": (a, b) => a === b,
  "!=": (a, b) => a !== b,
};

/** `$((...))`, 64 bits wide. `source` is for messages. */
function* evaluate(
  scope: Scope,
  expression: ArithmeticExpression | undefined,
  source: string,
): Running<bigint> {
  switch (expression?.type) {
    case undefined:
      return scope.fail(`arithmetic expression: expecting primary: "${source}"`);
    case "ArithmeticGroup":
      return yield* evaluate(scope, expression.expression, source);
    case "ArithmeticUnary": {
      const operand = yield* evaluate(scope, expression.operand, source);
      if (expression.operator === "-") return BigInt.asIntN(64, -operand);
      if (expression.operator === "!") return operand === 0n ? 1n : 0n;
      break;
    }
    case "ArithmeticBinary": {
      const operate = binary[expression.operator];
      if (operate === undefined) break;
      const left = yield* evaluate(scope, expression.left, source);
      const right = yield* evaluate(scope, expression.right, source);
      if (right === 0n && /[/%]/.test(expression.operator))
        return scope.fail(`arithmetic expression: division by zero: "${source}"`);
      return BigInt.asIntN(64, BigInt(operate(left, right)));
    }
    case "ArithmeticCommandExpansion": {
      const output = expression.script === undefined ? "" : yield* scope.substitute(expression.script);
      return number(scope, output.replace(/\n+$/, ""), source);
    }
    case "ArithmeticWord":
      return number(scope, yield* arithmeticText(scope, expression.value, expression.parts), source);
  }
  throw new Unsupported(`$((${source}))`);
}

function* arithmeticText(
  scope: Scope,
  value: string,
  parts: readonly WordPart[] | undefined,
): Running<string> {
  if (parts !== undefined) return yield* expandQuoted(scope, parts);
  const name = /^\$(\w+|[#?$])$/.exec(value)?.[1];
  if (name !== undefined) return scope.get(name) ?? "";
  if (!/^[A-Za-z_]\w*$/.test(value)) return value;
  const variable = scope.get(value) || "0";
  if (!/^[+-]?\d+$/.test(variable)) scope.fail(`Illegal number: ${variable}`);
  return variable;
}

function number(scope: Scope, text: string, source: string): bigint {
  const match = /^\s*([+-]?)(0x[0-9a-f]+|\d+)\s*$/i.exec(text);
  if (match?.[2] === undefined) {
    if (text.trim() === "") scope.fail(`arithmetic expression: expecting primary: "${source}"`);
    throw new Unsupported(`${text} in $((${source}))`);
  }
  const magnitude = BigInt(match[2].replace(/^0(?=\d)/, "0o"));
  return match[1] === "-" ? -magnitude : magnitude;
}
