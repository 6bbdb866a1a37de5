/** Scripts as syntax trees. What bash reads otherwise than a POSIX shell, or the fake shell cannot do, is refused. */
import { forEachChild, type ParsedScript, parse, type SyntaxNode } from "unbash";
import { Unsupported } from "./pattern.js";

const scripts = new Map<string, ParsedScript>();

/** Parses a script; the same text always gives the same tree. Throws `Unsupported` for any construct in it. */
export function parseScript(text: string): ParsedScript {
  let script = scripts.get(text);
  if (script === undefined) {
    script = parse(text);
    check(script, text);
    scripts.set(text, script);
  }
  return script;
}

const plain: ReadonlySet<SyntaxNode["type"]> = new Set([
  "AndOr",
  "ArithmeticCommandExpansion",
  "ArithmeticExpansion",
  "ArithmeticGroup",
  "ArithmeticWord",
  "BraceGroup",
  "Case",
  "CommandExpansion",
  "CompoundList",
  "DoubleQuoted",
  "Elif",
  "FileDescriptor",
  "For",
  "Glob",
  "HereDocBody",
  "HereDocDelimiter",
  "If",
  "Literal",
  "Negation",
  "Redirected",
  "SingleQuoted",
  "Subshell",
  "While",
]);

function check(node: SyntaxNode, source: string): void {
  if (!isSupported(node))
    throw new Unsupported(`${node.type} in ${source.slice(node.pos, node.end) || source}`);
  const text = node.type === "Script" ? (node.source ?? source) : source;
  forEachChild(node, (child) => check(child, text));
}

function isSupported(node: SyntaxNode): boolean {
  switch (node.type) {
    case "Script":
      return node.errors === undefined || node.errors.length === 0;
    case "Statement":
      return node.background !== true;
    case "Pipeline":
      return node.operators.every((operator) => operator === "|");
    case "CaseItem":
      return node.terminator === undefined || node.terminator === ";;";
    case "Function":
      return node.name.pos === node.pos;
    case "Command":
      return node.suffix.every(({ type }) => type !== "Assignment");
    case "Word":
      return !node.text.startsWith("~");
    case "Assignment":
      return node.append !== true && node.index === undefined && !/^[^=]*=~/.test(node.text);
    case "Redirect":
      return [">", ">>", "<", "<&", ">&", ">|"].includes(node.operator) && node.target !== undefined;
    case "HereDoc":
      return node.operator === "<<";
    case "SimpleExpansion":
      return /^\$(\w+|[@*#?$])$/.test(node.text);
    case "ParameterExpansion":
      return node.prefix !== "!" && node.index === undefined && isSupportedOperation(node.operation?.type);
    case "Default":
    case "Remove":
      return true;
    case "ArithmeticBinary":
      return ["+", "-", "*", "/", "%", "<", "<=", ">", ">=", "==", "!="].includes(node.operator);
    case "ArithmeticUnary":
      return node.prefix && ["-", "!"].includes(node.operator);
    default:
      return plain.has(node.type);
  }
}

function isSupportedOperation(type: string | undefined): boolean {
  return type === undefined || type === "Default" || type === "Remove";
}
