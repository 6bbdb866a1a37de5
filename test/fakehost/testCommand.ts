/** `test` and `[`. */
import { OpenFile } from "./files.js";
import { Unsupported } from "./pattern.js";
import type { Shell } from "./shell.js";

/** Exit code of a test: 0 true, 1 false, 2 nonsense. */
export function test(shell: Shell, name: string, args: readonly string[]): number {
  try {
    return evaluate(shell, args) ? 0 : 1;
  } catch (error) {
    if (!(error instanceof Nonsense)) throw error;
    shell.complain(`${name}: ${error.message}`);
    return 2;
  }
}

class Nonsense extends Error {}

/** By the number of arguments, as POSIX has it. */
function evaluate(shell: Shell, args: readonly string[]): boolean {
  const [first = "", second = "", third = ""] = args;
  if (args.length <= 1) return first !== "";
  const compare = comparisons[second];
  if (args.length === 3 && compare !== undefined) return compare(first, third);
  if (args.length === 3 && second === "-ef") return isSameFile(shell, first, third);
  for (const [operator, joins] of connectives) {
    const at = args.indexOf(operator, 1);
    if (at < 1 || at === args.length - 1) continue;
    return joins(evaluate(shell, args.slice(0, at)), evaluate(shell, args.slice(at + 1)));
  }
  if (first === "!") return !evaluate(shell, args.slice(1));
  if (args.length === 2) return unary(shell, first, second);
  if (first === "(" && args.at(-1) === ")") return evaluate(shell, args.slice(1, -1));
  throw new Unsupported(`[ ${args.join(" ")} ]`);
}

const connectives: readonly [string, (a: boolean, b: boolean) => boolean][] = [
  ["-o", (a, b) => a || b],
  ["-a", (a, b) => a && b],
];

const numeric = (compare: (a: bigint, b: bigint) => boolean) => (a: string, b: string) =>
  compare(integer(a), integer(b));

const comparisons: Readonly<Record<string, (a: string, b: string) => boolean>> = {
  "=": (a, b) => a === b,
  "!=": (a, b) => a !== b,
  "-eq": numeric((a, b) => a === b),
  "-ne": numeric((a, b) => a !== b),
  "-lt": numeric((a, b) => a < b),
  "-le": numeric((a, b) => a <= b),
  "-gt": numeric((a, b) => a > b),
  "-ge": numeric((a, b) => a >= b),
};

function integer(text: string): bigint {
  if (!/^\s*[+-]?\d+\s*$/.test(text)) throw new Nonsense(`Illegal number: ${text}`);
  return BigInt(text.trim().replace(/^\+/, ""));
}

function isSameFile({ process }: Shell, first: string, second: string): boolean {
  const entryAt = (operand: string) => {
    const own = /^\/proc\/self\/fd\/(\d+)$/.exec(operand)?.[1];
    if (own === undefined) return process.machine.files.entry(process.path(operand));
    const open = process.fds.get(Number(own));
    return open instanceof OpenFile ? open.entry : undefined;
  };
  const entry = entryAt(first);
  return entry !== undefined && entry === entryAt(second);
}

function unary({ process }: Shell, operator: string, operand: string): boolean {
  if (operator === "-n") return operand !== "";
  if (operator === "-z") return operand === "";
  const { files } = process.machine;
  const path = process.path(operand);
  const kind = files.kind(path);
  switch (operator) {
    case "-e":
    case "-r":
    case "-w":
      return kind !== undefined;
    case "-f":
      return kind === "file";
    case "-d":
      return kind === "directory";
    case "-b":
      return kind === "block";
    case "-h":
    case "-L":
      return files.kind(path, false) === "link";
    case "-s":
      return kind === "directory" || (kind === "file" && files.read(path) !== "");
    case "-x":
      if (kind === "file") throw new Unsupported("modes of files");
      return kind === "directory";
    default:
      throw new Unsupported(`[ ${operator} ${operand} ]`);
  }
}
