/** A POSIX shell as dash is one, on a machine in memory. */
import type {
  Assignment,
  Case,
  Command,
  CommandNode,
  CompoundCommand,
  For,
  If,
  ParsedScript,
  PipelineNode,
  Redirected,
  Redirection,
  Statement,
  While,
} from "unbash";
import { builtins, Exit, isSpecial, LeaveLoop, Replaced, Return, touchesMachine } from "./builtins.js";
import { FileError } from "./files.js";
import { Pipe, type Process, type Running, type Signal, Step, type Tool } from "./machine.js";
import { matches, Unsupported } from "./pattern.js";
import { parseScript } from "./syntax.js";
import { expandFields, expandPattern, expandQuoted, expandText, type Scope } from "./words.js";

type Node = PipelineNode | Statement["command"] | CommandNode;
type FunctionBody = CompoundCommand | Redirected;

interface OpenRequest {
  readonly fd: number;
  readonly operator: string;
  readonly target: string;
}

/** `sh -c SCRIPT [NAME ARGUMENT...]` */
export const sh: Tool = function* (process) {
  const [, option, text, name = "sh", ...args] = process.argv;
  if (option !== "-c" || text === undefined) throw new Unsupported(process.argv.join(" "));
  const shell = new Shell(process, name);
  shell.positional = args;
  return yield* shell.toEnd(shell.evaluate(text));
};

export class Shell implements Scope {
  status = 0;
  positional: readonly string[] = [];
  /** How many loops one is in. */
  loops = 0;
  /** Whether patterns become names of files. */
  globs = true;
  readonly traps = new Map<Signal | "EXIT", string>();
  readonly functions: Map<string, FunctionBody>;
  private readonly variables: Map<string, string>;
  private readonly shellPid: number;
  /** Exit code of the last command substitution. */
  private substituted = 0;
  private source = "";
  private position = 0;

  constructor(
    readonly process: Process,
    readonly name: string,
    parent?: Shell,
  ) {
    this.variables = new Map(parent?.variables ?? process.env);
    this.functions = new Map(parent?.functions);
    this.shellPid = parent?.shellPid ?? process.pid;
    if (parent === undefined) return;
    this.positional = parent.positional;
    this.status = parent.status;
    this.globs = parent.globs;
    this.source = parent.source;
  }

  get(name: string): string | undefined {
    if (/^[1-9]\d*$/.test(name)) return this.positional[Number(name) - 1];
    switch (name) {
      case "#":
        return String(this.positional.length);
      case "?":
        return String(this.status);
      case "$":
        return String(this.shellPid);
      case "0":
        return this.name;
      default:
        return this.variables.get(name);
    }
  }

  set(name: string, value: string | undefined): void {
    if (value === undefined) this.variables.delete(name);
    else this.variables.set(name, value);
  }

  *substitute(script: ParsedScript): Running<string> {
    const output = new Pipe();
    this.substituted = yield* this.subshell(
      (shell) => shell.list(script.commands),
      (child) => child.fds.set(1, output),
    );
    return output.read();
  }

  *glob(pattern: string): Running<string[]> {
    if (!this.globs) return [];
    yield new Step(["glob", pattern]);
    return this.process.machine.files.glob(pattern, this.process.cwd);
  }

  fail(message: string): never {
    this.complain(message);
    throw new Exit(2);
  }

  complain(message: string): void {
    this.process.err(`${this.located(message)}\n`);
  }

  /** Parses and runs a text in this shell. */
  *evaluate(text: string): Running<void> {
    const outer = this.source;
    this.source = text;
    yield* this.list(parseScript(text).commands);
    this.source = outer;
  }

  /** Runs the body and then the EXIT trap; returns the exit code. */
  *toEnd(body: Running<void>): Running<number> {
    try {
      yield* this.untilExit(body);
      const trap = this.traps.get("EXIT");
      if (trap === undefined) return this.status;
      this.traps.delete("EXIT");
      const { status } = this;
      return (yield* this.untilExit(this.evaluate(trap))) ? this.status : status;
    } catch (error) {
      if (error instanceof Replaced) return error.status;
      throw error;
    }
  }

  private *untilExit(body: Running<void>): Running<boolean> {
    try {
      yield* body;
      return false;
    } catch (error) {
      if (!(error instanceof Exit)) throw error;
      this.status = error.status;
      return true;
    }
  }

  private *list(statements: readonly Statement[]): Running<void> {
    for (const { command } of statements) yield* this.execute(command);
  }

  private *execute(node: Node): Running<void> {
    switch (node.type) {
      case "Command":
        yield* this.simple(node);
        return yield* this.runTraps();
      case "AndOr":
        for (const [index, command] of node.commands.entries()) {
          const operator = node.operators[index - 1];
          if (operator === undefined || (operator === "&&") === (this.status === 0))
            yield* this.execute(command);
        }
        return;
      case "Pipeline":
        yield* this.pipe(node.commands);
        if (node.prefixes.length % 2 === 1) this.status = this.status === 0 ? 1 : 0;
        return;
      case "If":
        return yield* this.choose(node);
      case "For":
        return yield* this.forEach(node);
      case "While":
        return yield* this.loop(node);
      case "Case":
        return yield* this.match(node);
      case "BraceGroup":
        return yield* this.list(node.body.commands);
      case "Subshell":
        this.status = yield* this.subshell((shell) => shell.list(node.body.commands));
        return yield* this.runTraps();
      case "Redirected":
        yield* this.redirected(node.redirects, () => this.execute(node.command));
        return;
      case "Function":
        if (node.body.type === "CompoundList") break;
        this.functions.set(node.name.text, node.body);
        this.status = 0;
        return;
    }
    throw new Unsupported(node.type);
  }

  /** The actions of signals that came while a command ran. */
  private *runTraps(): Running<void> {
    for (let signal = this.process.take(); signal !== undefined; signal = this.process.take()) {
      const { status } = this;
      yield* this.evaluate(this.traps.get(signal) ?? "");
      this.status = status;
    }
  }

  private *subshell(
    body: (shell: Shell) => Running<void>,
    prepare: (child: Process) => void = () => undefined,
  ): Running<number> {
    const child = this.process.fork();
    prepare(child);
    const shell = new Shell(child, this.name, this);
    return yield* this.process.waitFor(child, shell.toEnd(body(shell)));
  }

  /** One after the other: each reads what the one before it wrote. */
  private *pipe(commands: readonly CommandNode[]): Running<void> {
    const [only] = commands;
    if (commands.length === 1 && only !== undefined) return yield* this.execute(only);
    let input: Pipe | undefined;
    for (const [index, command] of commands.entries()) {
      const from = input;
      const to = index + 1 < commands.length ? new Pipe() : undefined;
      this.status = yield* this.subshell(
        (shell) => shell.execute(command),
        ({ fds }) => {
          if (from !== undefined) fds.set(0, from);
          if (to !== undefined) fds.set(1, to);
        },
      );
      input = to;
    }
    yield* this.runTraps();
  }

  private *choose(node: If): Running<void> {
    for (const { clause, then } of [node, ...node.elif]) {
      yield* this.list(clause.commands);
      if (this.status === 0) return yield* this.list(then.commands);
    }
    this.status = 0;
    yield* this.list(node.else?.commands ?? []);
  }

  private *forEach({ name, wordlist, body }: For): Running<void> {
    const values: string[] = wordlist === undefined ? [...this.positional] : [];
    for (const word of wordlist ?? []) values.push(...(yield* expandFields(this, word)));
    this.status = 0;
    for (const value of values) {
      this.set(name.text, value);
      if (!(yield* this.iterate(this.list(body.commands)))) return;
    }
  }

  private *loop({ kind, clause, body }: While): Running<void> {
    let status = 0;
    let holds = true;
    const round = function* (shell: Shell): Running<void> {
      yield* shell.list(clause.commands);
      holds = (shell.status === 0) === (kind === "while");
      if (!holds) return;
      yield* shell.list(body.commands);
      status = shell.status;
    };
    while (holds) {
      if (!(yield* this.iterate(round(this)))) return;
    }
    this.status = status;
  }

  /** One round of a loop; false: it was left. */
  private *iterate(round: Running<void>): Running<boolean> {
    this.loops += 1;
    try {
      yield* round;
      return true;
    } catch (error) {
      if (!(error instanceof LeaveLoop)) throw error;
      this.status = 0;
      if (error.levels > 1 && this.loops > 1) throw new LeaveLoop(error.levels - 1, error.goesOn);
      return error.goesOn;
    } finally {
      this.loops -= 1;
    }
  }

  private *match({ word, items }: Case): Running<void> {
    const text = yield* expandText(this, word);
    for (const { pattern: alternatives, body } of items) {
      for (const alternative of alternatives) {
        if (!matches(yield* expandPattern(this, alternative), text)) continue;
        this.status = 0;
        return yield* this.list(body.commands);
      }
    }
    this.status = 0;
  }

  private *simple(node: Command): Running<void> {
    this.position = node.pos;
    this.substituted = 0;
    const argv: string[] = [];
    for (const word of node.name === undefined ? [] : [node.name, ...node.args]) {
      if (word.type === "Assignment") throw new Unsupported(word.text);
      argv.push(...(yield* expandFields(this, word)));
    }
    const assignments = node.prefix.filter((part) => part.type === "Assignment");
    const [name] = argv;
    const body = this.functions.get(name ?? "");
    if (name === undefined) yield* this.assignOnly(assignments, node.redirects);
    else if (body !== undefined) {
      if (assignments.length > 0) throw new Unsupported(`a variable for the function ${name}`);
      yield* this.redirected(node.redirects, () => this.call(body, argv.slice(1)));
    } else if (Object.hasOwn(builtins, name)) yield* this.builtin(argv, assignments, node.redirects);
    else yield* this.external(argv, assignments, node.redirects);
  }

  private *assignOnly(assignments: readonly Assignment[], redirects: readonly Redirection[]): Running<void> {
    if (!(yield* this.redirected(redirects, () => this.assign(assignments)))) return;
    this.status = this.substituted;
  }

  private *assign(assignments: readonly Assignment[]): Running<void> {
    for (const assignment of assignments) this.set(assignment.name, yield* this.valueOf(assignment));
  }

  private *valueOf({ value, text }: Assignment): Running<string> {
    if (value.type === "ArrayValue") throw new Unsupported(text);
    return yield* expandText(this, value);
  }

  private *call(body: FunctionBody, args: readonly string[]): Running<void> {
    const { positional, loops } = this;
    this.positional = args;
    this.loops = 0;
    try {
      yield* this.execute(body);
    } catch (error) {
      if (!(error instanceof Return)) throw error;
      this.status = error.status;
    } finally {
      this.positional = positional;
      this.loops = loops;
    }
  }

  private *builtin(
    argv: readonly string[],
    assignments: readonly Assignment[],
    redirects: readonly Redirection[],
  ): Running<void> {
    const [name = ""] = argv;
    const special = isSpecial(name);
    const before = assignments.map(({ name }) => [name, this.get(name)] as const);
    yield* this.assign(assignments);
    const done = yield* this.redirected(redirects, () => this.runBuiltin(argv), name === "exec");
    if (!done && special) throw new Exit(2);
    if (!special) for (const [variable, value] of before) this.set(variable, value);
  }

  private *runBuiltin(argv: readonly string[]): Running<void> {
    const [name = ""] = argv;
    if (touchesMachine(this.process, argv)) yield new Step(argv);
    try {
      const result = builtins[name]?.(this, argv.slice(1)) ?? 127;
      this.status = typeof result === "number" ? result : yield* result;
    } catch (error) {
      if (!(error instanceof FileError)) throw error;
      this.complain(`${name}: ${name}: I/O error`);
      this.status = 1;
    }
  }

  private *external(
    argv: readonly string[],
    assignments: readonly Assignment[],
    redirects: readonly Redirection[],
  ): Running<void> {
    const requests = yield* this.requests(redirects);
    const child = this.process.fork();
    const env = new Map([...this.process.env.keys()].map((name) => [name, this.get(name) ?? ""]));
    for (const assignment of assignments) env.set(assignment.name, yield* this.valueOf(assignment));
    child.env = env;
    this.status = yield* this.process.waitFor(child, this.become(child, argv, requests));
  }

  private *become(
    child: Process,
    argv: readonly string[],
    requests: readonly OpenRequest[],
  ): Running<number> {
    if (!(yield* this.open(child, requests))) return 2;
    return yield* child.exec(argv, () => this.located(`${argv[0]}: not found`));
  }

  /** Runs the body with redirections; false: one of them failed, and the body was not run. */
  private *redirected(
    redirects: readonly Redirection[],
    body: () => Running<void>,
    stays = false,
  ): Running<boolean> {
    const requests = yield* this.requests(redirects);
    const { fds } = this.process;
    const before = requests.map(({ fd }) => [fd, fds.get(fd)] as const);
    try {
      if (yield* this.open(this.process, requests)) {
        yield* body();
        return true;
      }
      this.status = 2;
      return false;
    } finally {
      for (const [fd, stream] of stays ? [] : before) {
        if (stream === undefined) fds.delete(fd);
        else fds.set(fd, stream);
      }
    }
  }

  private *requests(redirects: readonly Redirection[]): Running<OpenRequest[]> {
    const requests: OpenRequest[] = [];
    for (const redirect of redirects) {
      const { descriptor, operator } = redirect;
      if (descriptor?.type === "FileDescriptorVariable") throw new Unsupported(descriptor.name);
      const fd = descriptor?.value ?? (operator.startsWith("<") ? 0 : 1);
      if (redirect.type === "HereDoc") {
        const { parts, text } = redirect.body;
        requests.push({
          fd,
          operator,
          target: parts === undefined ? text : yield* expandQuoted(this, parts),
        });
      } else if (redirect.target !== undefined)
        requests.push({ fd, operator, target: yield* expandText(this, redirect.target) });
    }
    return requests;
  }

  /** Opens them for the process, which stops before each; false: one failed, and that was said. */
  private *open(process: Process, requests: readonly OpenRequest[]): Running<boolean> {
    for (const { fd, operator, target } of requests) {
      try {
        if (operator === "<<") process.fds.set(fd, new Pipe(target));
        else if (operator.endsWith("&")) this.duplicate(process, fd, target);
        else yield* this.openFile(process, fd, operator, target);
      } catch (error) {
        if (!(error instanceof FileError)) throw error;
        process.err(`${this.located(openFailure(operator, target, error))}\n`);
        return false;
      }
    }
    return true;
  }

  private duplicate({ fds }: Process, fd: number, target: string): void {
    if (target === "-") fds.delete(fd);
    else {
      const stream = /^\d$/.test(target) ? fds.get(Number(target)) : undefined;
      if (stream === undefined) throw new FileError("EBADF", target);
      fds.set(fd, stream);
    }
  }

  private *openFile(process: Process, fd: number, operator: string, target: string): Running<void> {
    const path = process.path(target);
    const { files } = process.machine;
    if (files.kind(path) !== "null") yield new Step([operator, path]);
    const mode = operator === "<" ? "read" : operator === ">>" ? "append" : "write";
    process.fds.set(fd, files.open(path, mode));
  }

  located(message: string): string {
    const line = this.source.slice(0, this.position).split("\n").length;
    return `${this.name}: ${line}: ${message}`;
  }
}

function openFailure(operator: string, target: string, { code, reason }: FileError): string {
  if (operator.endsWith("&")) return `${target}: ${reason}`;
  const absent = code === "ENOENT" || code === "ENOTDIR";
  if (operator === "<") return `cannot open ${target}: ${absent ? "No such file" : reason}`;
  return `cannot create ${target}: ${absent ? "Directory nonexistent" : reason}`;
}
