/** The builtin commands of the shell. */
import { isSignal, Killed, Pipe, type Process, type Running, type Signal } from "./machine.js";
import { Unsupported } from "./pattern.js";
import type { Shell } from "./shell.js";
import { test } from "./testCommand.js";

/** Thrown to leave the shell, or its subshell. */
export class Exit {
  constructor(readonly status: number) {}
}

/** Thrown to leave a function; outside of one it leaves the shell. */
export class Return extends Exit {}

/** Thrown when another program has taken the shell's place, with that program's exit code: no trap is run. */
export class Replaced {
  constructor(readonly status: number) {}
}

/** Thrown to leave that many loops; the outermost of them may go on. */
export class LeaveLoop {
  constructor(
    readonly levels: number,
    readonly goesOn: boolean,
  ) {}
}

type Builtin = (shell: Shell, args: readonly string[]) => number | Running<number>;

/** By name. */
export const builtins: Readonly<Record<string, Builtin>> = {
  ":": () => 0,
  true: () => 0,
  false: () => 1,
  "[": (shell, args) => {
    if (args.at(-1) !== "]") throw new Unsupported("[ without ]");
    return test(shell, "[", args.slice(0, -1));
  },
  test: (shell, args) => test(shell, "test", args),
  echo,
  printf,
  read,
  cd,
  kill,
  trap,
  command,
  exec: (shell, args) => (args.length === 0 ? 0 : replace(shell, args)),
  exit: (shell, args) => {
    throw new Exit(count(args, shell.status));
  },
  return: (shell, args) => {
    throw new Return(count(args, shell.status));
  },
  break: (shell, args) => leave(shell, args, false),
  continue: (shell, args) => leave(shell, args, true),
  shift: (shell, args) => {
    const by = count(args, 1);
    if (by > shell.positional.length) shell.fail("shift: can't shift that many");
    shell.positional = shell.positional.slice(by);
    return 0;
  },
  set: (shell, [option, ...args]) => {
    if (option === "-f" && args.length === 0) {
      shell.globs = false;
      return 0;
    }
    if (option !== "--") throw new Unsupported(`set ${option}`);
    shell.positional = args;
    return 0;
  },
  umask: (_shell, [mask, ...rest]) => {
    if (mask === undefined || !/^[0-7]+$/.test(mask) || rest.length > 0)
      throw new Unsupported(`umask ${mask}`);
    return 0;
  },
  eval: function* (shell, args) {
    yield* shell.evaluate(args.join(" "));
    return shell.status;
  },
};

for (const name of [
  "alias",
  "bg",
  "export",
  "fg",
  "getopts",
  "hash",
  "jobs",
  "local",
  "pwd",
  "readonly",
].concat(["times", "type", "ulimit", "unalias", "unset", "wait", "."])) {
  Object.assign(builtins, {
    [name]: () => {
      throw new Unsupported(`the builtin ${name}`);
    },
  });
}

const specials = new Set([
  ":",
  "break",
  "continue",
  "eval",
  "exec",
  "exit",
  "return",
  "set",
  "shift",
  "trap",
]);

/** Whether its variables stay and its failed redirections end the shell. */
export function isSpecial(name: string): boolean {
  return specials.has(name);
}

/** Whether a builtin sees or changes anything outside the shell. */
export function touchesMachine(process: Process, [name = "", ...args]: readonly string[]): boolean {
  if (name === "echo" || name === "printf") return !(process.fds.get(1) instanceof Pipe);
  if (name === "[" || name === "test") return args.some((argument) => /^-([bdefhLrswx]|ef)$/.test(argument));
  return name === "cd" || name === "kill";
}

function count([argument, ...rest]: readonly string[], otherwise: number): number {
  if (argument === undefined) return otherwise;
  if (!/^\d+$/.test(argument) || rest.length > 0) throw new Unsupported(`the number ${argument}`);
  return Number(argument);
}

function leave(shell: Shell, args: readonly string[], goesOn: boolean): number {
  if (shell.loops === 0) throw new Unsupported("break or continue outside a loop");
  throw new LeaveLoop(count(args, 1), goesOn);
}

function* replace(shell: Shell, argv: readonly string[]): Running<number> {
  const name = argv[0] ?? "";
  const missing = () => shell.located(`exec: ${name}: not found`);
  throw new Replaced(yield* shell.process.exec(argv, missing));
}

function echo({ process }: Shell, args: readonly string[]): number {
  const end = args[0] === "-n" ? "" : "\n";
  const { text, stopped } = withEscapes((args[0] === "-n" ? args.slice(1) : args).join(" "));
  process.out(stopped ? text : text + end);
  return 0;
}

const escapes: Readonly<Record<string, string>> = {
  a: "\x07",
  b: "\b",
  f: "\f",
  n: "\n",
  r: "\r",
  t: "\t",
  v: "\v",
  "\\": "\\",
};

/** The escapes of echo and of `%b`; `\c` stops the output. */
function withEscapes(text: string): { text: string; stopped: boolean } {
  const end = /^(?:[^\\]|\\[^c])*?\\c/.exec(text)?.[0];
  const shown = (end === undefined ? text : end.slice(0, -2)).replace(
    /\\(?:0([0-7]{0,3})|([abfnrtv\\]))/g,
    (_whole, octal, letter) => (octal === undefined ? (escapes[letter] ?? "") : byte(octal)),
  );
  return { text: shown, stopped: end !== undefined };
}

function byte(octal: string): string {
  const code = Number.parseInt(`0${octal}`, 8);
  if (code > 127) throw new Unsupported(`the byte \\${octal}`);
  return String.fromCharCode(code);
}

function printf(shell: Shell, [format, ...args]: readonly string[]): number {
  if (format === undefined || format.startsWith("-")) throw new Unsupported(`printf ${format}`);
  let status = 0;
  let text = "";
  let used = 0;
  do {
    const before = used;
    text += format.replace(/%(.)|\\([0-7]{1,3})|\\(.)/gs, (whole, conversion, octal, letter) => {
      if (conversion === "%") return "%";
      if (conversion === "s") return args[used++] ?? "";
      if (conversion === "d") {
        const given = args[used++] ?? "0";
        if (/^\s*[+-]?0\d/.test(given)) throw new Unsupported(`the octal number ${given}`);
        if (/^\s*[+-]?\d+$/.test(given)) return String(BigInt(given));
        shell.complain(`printf: ${given}: expected numeric value`);
        status = 1;
        return "0";
      }
      if (octal !== undefined) return byte(octal);
      if (letter !== undefined && letter in escapes) return escapes[letter] ?? "";
      throw new Unsupported(`printf ${whole}`);
    });
    if (used === before) break;
  } while (used < args.length);
  shell.process.out(text);
  return status;
}

function read(shell: Shell, args: readonly string[]): number {
  const [option, ...names] = args;
  if (option !== "-r" || names.length === 0) throw new Unsupported(`read ${args.join(" ")}`);
  const separators = shell.get("IFS") ?? " \t\n";
  if (/[^ \t\n]/.test(separators)) throw new Unsupported(`read with IFS=${separators}`);
  const line = shell.process.fds.get(0)?.readLine() ?? "";
  let rest = line.replace(/\n$/, "");
  const trim = (text: string) =>
    separators === "" ? text : text.replace(new RegExp(`^[${separators}]+`), "");
  rest = trim(rest);
  for (const name of names.slice(0, -1)) {
    const field = separators === "" ? rest : (new RegExp(`^[^${separators}]*`).exec(rest)?.[0] ?? "");
    shell.set(name, field);
    rest = trim(rest.slice(field.length));
  }
  if (separators !== "") rest = rest.replace(new RegExp(`[${separators}]+$`), "");
  shell.set(names.at(-1) ?? "", rest);
  return line.endsWith("\n") ? 0 : 1;
}

function cd(shell: Shell, [folder, ...rest]: readonly string[]): number {
  if (folder === undefined || folder === "-" || rest.length > 0) throw new Unsupported(`cd ${folder}`);
  const { process } = shell;
  const path = process.path(folder);
  if (process.machine.files.kind(path) !== "directory") {
    shell.complain(`cd: can't cd to ${folder}`);
    return 2;
  }
  process.cwd = path;
  return 0;
}

function kill(shell: Shell, args: readonly string[]): number {
  const [option, name = "", ...rest] = args;
  const [target, ...more] = rest[0] === "--" ? rest.slice(1) : rest;
  const signal = name === "0" ? 0 : name;
  const known = signal === 0 || isSignal(signal);
  if (option !== "-s" || !known || target === undefined || !/^-?\d+$/.test(target) || more.length > 0)
    throw new Unsupported(`kill ${args.join(" ")}`);
  const { process } = shell;
  if (!process.machine.kill(Number(target), signal)) {
    shell.complain("kill: No such process\n");
    return 1;
  }
  if (process.fatal !== undefined) throw new Killed(process.fatal);
  return 0;
}

function trap({ traps, process }: Shell, [action, ...conditions]: readonly string[]): number {
  if (action === undefined || conditions.length === 0) throw new Unsupported(`trap ${action}`);
  for (const condition of conditions) {
    if (condition !== "EXIT" && (!isSignal(condition) || condition === "KILL"))
      throw new Unsupported(`trap ${condition}`);
    setTrap(traps, process, condition, action);
  }
  return 0;
}

function setTrap(
  traps: Map<Signal | "EXIT", string>,
  process: Process,
  condition: Signal | "EXIT",
  action: string,
): void {
  if (action === "-" || action === "") traps.delete(condition);
  else traps.set(condition, action);
  if (condition === "EXIT") return;
  if (action === "-") process.dispositions.delete(condition);
  else process.dispositions.set(condition, action === "" ? "ignored" : "deferred");
}

function command(shell: Shell, [option, name, ...rest]: readonly string[]): number {
  if (option !== "-v" || name === undefined || rest.length > 0) throw new Unsupported(`command ${option}`);
  const { machine } = shell.process;
  if (shell.functions.has(name) || Object.hasOwn(builtins, name)) shell.process.out(`${name}\n`);
  else if (machine.tool(name) !== undefined)
    shell.process.out(name.startsWith("/") ? `${name}\n` : `/usr/bin/${name}\n`);
  else return 127;
  return 0;
}
