/** The plain programs that the provider's scripts use, with the options that they use: any other is refused. */
import { byBytes, FileError, OpenFile } from "./files.js";
import { type Process, type Running, type Signal, Step, type Tool } from "./machine.js";
import { matches, Unsupported } from "./pattern.js";
import { sh } from "./shell.js";

/** The tools by name; a model adds its own programs to the map. */
export function plainTools(): Map<string, Tool> {
  return new Map(Object.entries(tools));
}

const tools: Readonly<Record<string, Tool>> = {
  awk,
  base64,
  cat: (process) => {
    const { operands } = options(process, "");
    const { text, failed } = contents(process, operands);
    process.out(text);
    return failed ? 1 : 0;
  },
  cut,
  date: (process) => {
    if (process.argv[1] !== "+%s" || process.argv.length > 2) throw unsupported(process);
    process.out(`${Math.floor(process.machine.now() / 1000)}\n`);
    return 0;
  },
  env,
  false: () => 1,
  find,
  flock,
  grep,
  head: (process) => {
    const { values, operands } = options(process, "", "c");
    const count = values.get("c");
    if (count === undefined || operands.length > 0) throw unsupported(process);
    process.out(Buffer.from(process.read()).subarray(0, wholeNumber(process, count)).toString());
    return 0;
  },
  ln,
  mkdir: (process) => {
    const { flags, operands } = options(process, "p");
    const { files } = process.machine;
    const make = (path: string) => (flags.has("p") ? files.mkdirs(path) : files.mkdir(path));
    return attempt(process, operands, make, "cannot create directory ");
  },
  mv,
  readlink,
  rm,
  rmdir: (process) => {
    const { operands } = options(process, "");
    return attempt(process, operands, (path) => process.machine.files.rmdir(path), "failed to remove ");
  },
  sed,
  setsid: (process) => {
    const [, option, ...argv] = process.argv;
    if (option !== "-f") throw unsupported(process);
    process.leave(argv);
    return 0;
  },
  sh,
  sleep: function* (process) {
    const until = process.machine.now() + seconds(process, process.argv[1]) * 1000;
    yield process.wait({ until });
    return 0;
  },
  sort,
  sudo: function* (process) {
    const { flags, operands } = options(process, "n", "", true);
    if (!flags.has("n")) throw unsupported(process);
    return yield* process.run(operands);
  },
  sync: (process) => {
    const { operands } = options(process, "");
    if (operands.length === 0) throw unsupported(process);
    return attempt(process, operands, (path) => process.machine.files.sync(path), "error opening ");
  },
  /** `tail -n 1` */
  tail: (process) => {
    const { values, operands } = options(process, "", "n");
    if (operands.length > 0 || values.get("n") !== "1") throw unsupported(process);
    printLines(process, linesOf(process.read()).slice(-1));
    return 0;
  },
  timeout,
  tr: (process) => {
    const [, from = "", to, ...rest] = process.argv;
    const character = new Map([
      ["\\0", "\0"],
      ["\\n", "\n"],
      [",", ","],
    ]).get(from);
    if (character === undefined || to?.length !== 1 || rest.length > 0) throw unsupported(process);
    process.out(process.read().replaceAll(character, to));
    return 0;
  },
  true: () => 0,
  wc: (process) => {
    const { flags, operands } = options(process, "c");
    if (!flags.has("c") || operands.length > 0) throw unsupported(process);
    process.out(`${Buffer.byteLength(process.read())}\n`);
    return 0;
  },
};

function unsupported(process: Process): Unsupported {
  return new Unsupported(process.argv.join(" "));
}

interface Options {
  readonly flags: ReadonlySet<string>;
  readonly values: ReadonlyMap<string, string>;
  readonly operands: readonly string[];
}

/** Options of one letter as getopt(3) reads them; `valued` take a value. */
function options(process: Process, allowed: string, valued = "", endsAtOperand = false): Options {
  const flags = new Set<string>();
  const values = new Map<string, string>();
  const operands: string[] = [];
  const rest = process.argv.slice(1);
  for (let argument = rest.shift(); argument !== undefined; argument = rest.shift()) {
    if (argument === "--" || (endsAtOperand && !/^-./.test(argument))) {
      operands.push(...(argument === "--" ? [] : [argument]), ...rest);
      break;
    }
    if (!/^-./.test(argument)) {
      operands.push(argument);
      continue;
    }
    for (let at = 1; at < argument.length; at += 1) {
      const letter = argument.charAt(at);
      if (valued.includes(letter)) {
        const value = argument.slice(at + 1) || rest.shift();
        if (value === undefined) throw unsupported(process);
        values.set(letter, value);
        break;
      }
      if (!allowed.includes(letter)) throw unsupported(process);
      flags.add(letter);
    }
  }
  return { flags, values, operands };
}

/** Does it to every path; what fails is said, and makes the exit code 1. */
function attempt(
  process: Process,
  operands: readonly string[],
  act: (path: string) => void,
  failure: string,
): number {
  if (operands.length === 0) throw unsupported(process);
  let code = 0;
  for (const operand of operands) {
    try {
      act(process.path(operand));
    } catch (error) {
      code = complain(process, `${failure}'${operand}'`, error);
    }
  }
  return code;
}

function complain(process: Process, what: string, error: unknown): number {
  if (!(error instanceof FileError)) throw error;
  process.err(`${process.argv[0]}: ${what}: ${error.reason}\n`);
  return 1;
}

/** The files one after the other, or stdin. */
function contents(process: Process, operands: readonly string[]): { text: string; failed: boolean } {
  let text = operands.length === 0 ? process.read() : "";
  let failed = false;
  for (const operand of operands) {
    try {
      text += operand === "-" ? process.read() : process.machine.files.read(process.path(operand));
    } catch (error) {
      complain(process, operand, error);
      failed = true;
    }
  }
  return { text, failed };
}

function linesOf(text: string): string[] {
  return text === "" ? [] : text.replace(/\n$/, "").split("\n");
}

function printLines(process: Process, lines: readonly string[]): void {
  if (lines.length > 0) process.out(`${lines.join("\n")}\n`);
}

function seconds(process: Process, text: string | undefined): number {
  if (text === undefined || !/^\d+(\.\d+)?$/.test(text)) throw unsupported(process);
  return Number(text);
}

function wholeNumber(process: Process, text: string): number {
  if (!/^\d+$/.test(text)) throw unsupported(process);
  return Number(text);
}

/** `awk -v NAME=VALUE '$N == NAME { print $M }' [FILE]`, compared as texts. */
function awk(process: Process): number {
  const { values, operands } = options(process, "", "v");
  const [program = "", ...files] = operands;
  const [, column, variable, printed] = /^\$(\d) == (\w+) \{ print \$(\d) \}$/.exec(program) ?? [];
  const [, name, value = ""] = /^(\w+)=([^\\]*)$/.exec(values.get("v") ?? "") ?? [];
  const isNumber = /^\s*[+-]?\d+(\.\d*)?\s*$/.test(value);
  if (column === undefined || printed === undefined || name !== variable || isNumber)
    throw unsupported(process);
  const { text, failed } = contents(process, files);
  const rows = linesOf(text).map((line) => line.split(/[ \t]+/).filter((field) => field !== ""));
  const found = rows.filter((fields) => (fields[Number(column) - 1] ?? "") === value);
  printLines(
    process,
    found.map((fields) => fields[Number(printed) - 1] ?? ""),
  );
  return failed ? 2 : 0;
}

function base64(process: Process): number {
  const { flags, values, operands } = options(process, "d", "w");
  if (operands.length > 0 || (!flags.has("d") && values.get("w") !== "0")) throw unsupported(process);
  const text = process.read();
  const alphabet = /^[A-Za-z0-9+/\n]*={0,2}\n*$/;
  if (flags.has("d") && !alphabet.test(text)) throw new Unsupported(`base64 -d of ${text}`);
  process.out(flags.has("d") ? Buffer.from(text, "base64").toString() : Buffer.from(text).toString("base64"));
  return 0;
}

function cut(process: Process): number {
  const { values, operands } = options(process, "", "dfc");
  if (operands.length > 0) throw unsupported(process);
  const delimiter = values.get("d");
  const field = values.get("f");
  const range = /^1-(\d+)$/.exec(values.get("c") ?? "")?.[1];
  let select: (line: string) => string;
  if (delimiter?.length === 1 && field !== undefined && range === undefined) {
    const index = wholeNumber(process, field) - 1;
    select = (line) => (line.includes(delimiter) ? (line.split(delimiter)[index] ?? "") : line);
  } else if (range !== undefined && field === undefined) {
    select = (line) => Buffer.from(line).subarray(0, Number(range)).toString();
  } else throw unsupported(process);
  printLines(process, linesOf(process.read()).map(select));
  return 0;
}

/** `env NAME=VALUE... COMMAND...` */
function* env(process: Process): Running<number> {
  const args = process.argv.slice(1);
  const at = args.findIndex((argument) => !/^\w+=/.test(argument));
  const command = at === -1 ? [] : args.slice(at);
  if (command.length === 0 || command[0]?.startsWith("-")) throw unsupported(process);
  const pairs = args.slice(0, at).map((pair) => {
    const end = pair.indexOf("=");
    return [pair.slice(0, end), pair.slice(end + 1)] as const;
  });
  process.env = new Map([...process.env, ...pairs]);
  return yield* process.exec(command, () => `env: '${command[0]}': No such file or directory`);
}

/** `find PATH... -lname PATTERN` */
function find(process: Process): number {
  const args = process.argv.slice(1);
  const pattern = args.pop();
  if (args.pop() !== "-lname" || pattern === undefined || args.some((path) => path.startsWith("-")))
    throw unsupported(process);
  const { files } = process.machine;
  const found: string[] = [];
  const visit = (shown: string) => {
    const path = process.path(shown);
    const kind = files.kind(path, false);
    if (kind === undefined) throw new FileError("ENOENT", path);
    if (kind === "link" && matches(pattern, files.readlink(path))) found.push(shown);
    if (kind === "directory") for (const name of files.list(path)) visit(`${shown}/${name}`);
  };
  const code = args.map((path) => {
    try {
      visit(path);
      return 0;
    } catch (error) {
      return complain(process, `'${path}'`, error);
    }
  });
  printLines(process, found);
  return Math.max(0, ...code);
}

/** `flock [-n | -w SECONDS] FD` */
function* flock(process: Process): Running<number> {
  const { flags, values, operands } = options(process, "n", "w");
  const file = process.fds.get(Number(operands[0] ?? "none"));
  if (!(file instanceof OpenFile) || operands.length !== 1) throw unsupported(process);
  const { machine } = process;
  if (machine.lock(file)) return 0;
  if (flags.has("n")) return 1;
  const limit = values.get("w");
  yield process.wait({
    until: limit === undefined ? undefined : machine.now() + seconds(process, limit) * 1000,
    ready: () => machine.canLock(file),
  });
  return machine.lock(file) ? 0 : 1;
}

function grep(process: Process): number {
  if (process.argv[1] === "-FB1") return grepWithLineBefore(process, process.argv.slice(2));
  const { flags, operands } = options(process, "Fqsxlv");
  const [pattern, ...paths] = operands;
  if (flags.has("v")) return grepOthers(process, [...flags].sort().join(""), operands);
  if (pattern === undefined || pattern === "" || paths.length === 0) throw unsupported(process);
  if (!flags.has("F") && /[\\.*^$[\n]/.test(pattern)) throw unsupported(process);
  if (!flags.has("q") && !flags.has("l")) throw unsupported(process);
  const fits = (line: string) => (flags.has("x") ? line === pattern : line.includes(pattern));
  let failed = false;
  const found = paths.filter((path) => {
    try {
      return linesOf(process.machine.files.read(process.path(path))).some(fits);
    } catch (error) {
      if (!(error instanceof FileError)) throw error;
      failed = true;
      if (!flags.has("s")) process.err(`grep: ${path}: ${error.reason}\n`);
      return false;
    }
  });
  if (!flags.has("q")) printLines(process, found);
  if (failed && !(flags.has("q") && found.length > 0)) return 2;
  return found.length > 0 ? 0 : 1;
}

/** `grep -FB1 TEXT FILE`, of a file in which one line has it. */
function grepWithLineBefore(process: Process, [text, path, ...rest]: readonly string[]): number {
  if (text === undefined || path === undefined || rest.length > 0) throw unsupported(process);
  const lines = linesOf(process.machine.files.read(process.path(path)));
  const found = lines.flatMap((line, at) => (line.includes(text) ? [at] : []));
  if (found.length > 1) throw unsupported(process);
  const [at] = found;
  if (at === undefined) return 1;
  printLines(process, lines.slice(Math.max(0, at - 1), at + 1));
  return 0;
}

/** `grep -vFx LINE`: all lines of stdin but those. */
function grepOthers(process: Process, flags: string, [line, ...paths]: readonly string[]): number {
  if (flags !== "Fvx" || line === undefined || paths.length > 0) throw unsupported(process);
  const others = linesOf(process.read()).filter((one) => one !== line);
  printLines(process, others);
  return others.length > 0 ? 0 : 1;
}

/** `ln -sfn TARGET PATH`: the new link takes the place of the old one at once, as in coreutils. */
function ln(process: Process): number {
  const { flags, operands } = options(process, "sfn");
  const [target, shown, ...rest] = operands;
  const { files } = process.machine;
  const path = process.path(shown ?? "");
  if (flags.size !== 3 || target === undefined || shown === undefined || rest.length > 0)
    throw unsupported(process);
  if (files.kind(path, false) === "directory") throw unsupported(process);
  try {
    if (files.kind(path, false) === undefined) files.link(target, path);
    else {
      const temporary = `${path.slice(0, path.lastIndexOf("/"))}/Cu${process.pid}`;
      files.link(target, temporary);
      files.rename(temporary, path);
    }
    return 0;
  } catch (error) {
    return complain(process, `failed to create symbolic link '${shown}'`, error);
  }
}

function mv(process: Process): number {
  const { flags, operands } = options(process, "fT");
  const [from, to, ...rest] = operands;
  if (from === undefined || to === undefined || rest.length > 0) throw unsupported(process);
  const { files } = process.machine;
  const into = !flags.has("T") && files.kind(process.path(to)) === "directory";
  const target = into ? `${to}/${from.slice(from.lastIndexOf("/") + 1)}` : to;
  if (files.kind(process.path(from), false) === undefined)
    return complain(process, `cannot stat '${from}'`, new FileError("ENOENT", from));
  try {
    files.rename(process.path(from), process.path(target));
    return 0;
  } catch (error) {
    return complain(process, `cannot move '${from}' to '${target}'`, error);
  }
}

function readlink(process: Process): number {
  const { flags, operands } = options(process, "f");
  const [shown, ...rest] = operands;
  if (shown === undefined || rest.length > 0) throw unsupported(process);
  const { files } = process.machine;
  try {
    const path = process.path(shown);
    process.out(`${flags.has("f") ? files.realpath(path) : files.readlink(path)}\n`);
    return 0;
  } catch (error) {
    if (error instanceof FileError) return 1;
    throw error;
  }
}

function* rm(process: Process): Running<number> {
  const { flags, operands } = options(process, "rf");
  const { files } = process.machine;
  let code = 0;
  for (const [index, operand] of operands.entries()) {
    if (index > 0)
      yield new Step(["rm", ...process.argv.slice(1).filter((one) => one.startsWith("-")), operand]);
    const path = process.path(operand);
    if (files.kind(path, false) === undefined && flags.has("f")) continue;
    const remove = () => (flags.has("r") ? files.removeTree(path) : files.remove(path));
    code = Math.max(code, attempt(process, [operand], remove, "cannot remove "));
  }
  return code;
}

/** What `s` of a script does to each line; `undefined`: it is not printed. */
const edits: Readonly<Record<string, (line: string) => string | undefined>> = {
  "s/-/--/g": (line) => line.replaceAll("-", "--"),
  "s/^description = .*before. executing '//p": (line) =>
    /^description = .*before. executing '(.*)$/.exec(line)?.[1],
  "s/^[[:space:]]*\\([^ ]*\\) {$/\\1/p": (line) => /^\s*([^ ]*) \{$/.exec(line)?.[1],
};

/** `sed 's/ *$//'`, `sed -n '/^\[SECTION\]/,$s/^NAME=//p' FILE`, and those edits */
function sed(process: Process): number {
  const { flags, operands } = options(process, "n");
  const [program = "", ...files] = operands;
  const [, , section, name] = /^(\/\^\\\[([\w-]+)\\\]\/,\$)?s\/\^(\w+)=\/\/p$/.exec(program) ?? [];
  const { text, failed } = contents(process, files);
  const lines = linesOf(text);
  const edit = edits[program];
  if (edit !== undefined && flags.has("n") === program.endsWith("p")) {
    printLines(
      process,
      lines.flatMap((line) => edit(line) ?? []),
    );
  } else if (!flags.has("n") && program === "s/ *$//") {
    const ended = text.endsWith("\n");
    const trimmed = lines.map((line) => line.replace(/ *$/, "")).join("\n");
    process.out(ended ? `${trimmed}\n` : trimmed);
  } else if (flags.has("n") && name !== undefined) {
    const start = section === undefined ? 0 : lines.findIndex((line) => line.startsWith(`[${section}]`));
    const inside = start === -1 ? [] : lines.slice(start);
    printLines(
      process,
      inside.filter((line) => line.startsWith(`${name}=`)).map((line) => line.slice(`${name}=`.length)),
    );
  } else throw unsupported(process);
  return failed ? 2 : 0;
}

function sort(process: Process): number {
  const { flags, operands } = options(process, "nuV");
  if (operands.length > 0 || (flags.has("V") && flags.size > 1)) throw unsupported(process);
  const value = (line: string) => Number(/^[ \t]*(-?\d+(?:\.\d+)?)/.exec(line)?.[1] ?? 0);
  const compare = (a: string, b: string) =>
    flags.has("V") ? byVersion(process, a, b) : flags.has("n") ? value(a) - value(b) : byBytes(a, b);
  const lines = linesOf(process.read());
  if (flags.has("u")) {
    // Of those that compare equal the first stays.
    const ordered = lines.sort(compare);
    printLines(
      process,
      ordered.filter((line, index) => index === 0 || compare(ordered[index - 1] ?? "", line) !== 0),
    );
  } else
    printLines(
      process,
      lines.sort((a, b) => compare(a, b) || byBytes(a, b)),
    );
  return 0;
}

/** Names that are alike but for their numbers. */
function byVersion(process: Process, a: string, b: string): number {
  const alike = (name: string) => name.replace(/\d+/g, "0");
  if (alike(a) !== alike(b)) throw unsupported(process);
  const numbers = (name: string) => (name.match(/\d+/g) ?? []).map(Number);
  const others = numbers(b);
  const differences = numbers(a).map((number, at) => number - (others[at] ?? 0));
  return differences.find((difference) => difference !== 0) ?? 0;
}

/** `timeout [-k SECONDS] SECONDS COMMAND...`: leads a process group, to which it hands on TERM, HUP and INT too. */
function* timeout(process: Process): Running<number> {
  const { values, operands } = options(process, "", "k", true);
  const [duration, ...command] = operands;
  if (command.length === 0) throw unsupported(process);
  const alarm = new Alarm(process, seconds(process, duration), seconds(process, values.get("k") ?? "0"));
  process.group = process.pid;
  const child = process.fork();
  alarm.child = child.pid;
  for (const signal of ["TERM", "HUP", "INT"] as const) process.catch(signal);
  const missing = () => `timeout: failed to run command '${command[0]}': No such file or directory`;
  const code = yield* process.waitFor(child, child.exec(command, missing), (running) => alarm.guard(running));
  if (!alarm.rang) return code;
  return alarm.killed ? 137 : 124;
}

/** When `timeout` signals its child; see cleanup() in its source. */
class Alarm {
  child = 0;
  rang = false;
  killed = false;
  private at: number;
  private signal: Signal = "TERM";

  constructor(
    private readonly process: Process,
    limit: number,
    private killAfter: number,
  ) {
    this.at = limit === 0 ? Number.POSITIVE_INFINITY : process.machine.now() + limit * 1000;
  }

  /** Lets the child's waits end when the time is over. */
  *guard(running: Running<number>): Running<number> {
    for (let next = running.next(); ; next = running.next()) {
      if (next.done) return next.value;
      const { value: step } = next;
      yield step.waits
        ? new Step(step.argv, { ...step, until: Math.min(step.until ?? this.at, this.at) })
        : step;
      for (let signal = this.process.take(); signal !== undefined; signal = this.process.take())
        this.send(signal);
      if (this.process.machine.now() >= this.at) this.ring();
    }
  }

  private ring(): void {
    this.rang = true;
    this.killed = this.signal === "KILL";
    this.at = Number.POSITIVE_INFINITY;
    this.send(this.signal);
  }

  private send(signal: Signal): void {
    const { machine } = this.process;
    if (this.killAfter > 0) {
      this.at = machine.now() + this.killAfter * 1000;
      this.signal = "KILL";
      this.killAfter = 0;
    }
    machine.kill(this.child, signal);
    // It ignores what it sends to its own group, but for KILL.
    for (const other of machine.processes.values())
      if (other.group === this.process.group && (other !== this.process || signal === "KILL"))
        other.receive(signal);
  }
}
