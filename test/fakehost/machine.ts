/**
 * A machine in memory: processes that run as generators, signals, file locks and virtual time. A process stops
 * before each of its effects, so that a test can cut, kill, freeze or interleave it there.
 */
import { quoteAll } from "../../provider/ssh/quoting.js";
import { type Entry, FileError, type FileTree, type OpenFile, Stream } from "./files.js";

const signalNumbers = { HUP: 1, INT: 2, QUIT: 3, KILL: 9, PIPE: 13, TERM: 15 } as const;
export type Signal = keyof typeof signalNumbers;

export function isSignal(name: string): name is Signal {
  return Object.hasOwn(signalNumbers, name);
}

/** Thrown into a running generator it signals the process group; thrown by a process it ends that process. */
export class Killed extends Error {
  constructor(readonly signal: Signal) {
    super(`killed by ${signal}`);
  }
}

/** Until when a process waits: it goes on when the time has come or when `ready`, whichever is first. */
export interface Wait {
  /** Virtual milliseconds. */
  readonly until?: number | undefined;
  readonly ready?: (() => boolean) | undefined;
  /** As state D: not even KILL ends the wait. */
  readonly uninterruptible?: boolean | undefined;
}

/** What a process is about to do, or waits for. */
export class Step {
  readonly until: number | undefined;
  readonly ready: (() => boolean) | undefined;
  readonly uninterruptible: boolean;

  constructor(
    readonly argv: readonly string[],
    wait: Wait = {},
  ) {
    this.until = wait.until;
    this.ready = wait.ready;
    this.uninterruptible = wait.uninterruptible ?? false;
  }

  /** The command, quoted for a shell, at most 200 characters. */
  get command(): string {
    const [first = "", ...rest] = this.argv.map((argument) => argument.slice(0, 200));
    const shown = /^[<>]+$/.test(first) ? first + quoteAll(rest) : quoteAll([first, ...rest]);
    return shown.slice(0, 200);
  }

  get waits(): boolean {
    return this.until !== undefined || this.ready !== undefined;
  }

  /** Whether it can go on at that time. */
  canGoOn(now: number): boolean {
    return !this.waits || (this.until !== undefined && now >= this.until) || this.ready?.() === true;
  }
}

export type Running<T> = Generator<Step, T, void>;

/** A program; it returns its exit code. */
export type Tool = (process: Process) => Running<number> | number;

/** Text between processes of this machine. */
export class Pipe extends Stream {
  constructor(private content = "") {
    super();
  }

  protected text(): string {
    return this.content;
  }

  write(text: string): void {
    this.content += text;
  }
}

class Sink extends Stream {
  constructor(readonly write: (text: string) => void) {
    super();
  }

  protected text(): string {
    return "";
  }
}

/** What a session hands to its first process. `out` and `err` may throw `FileError("EPIPE")`: nobody reads any more. */
export interface Session {
  readonly stdin?: string | undefined;
  readonly out: (text: string) => void;
  readonly err: (text: string) => void;
  readonly env?: Readonly<Record<string, string>> | undefined;
  readonly cwd?: string | undefined;
}

/** Virtual time in milliseconds since 1970; machines may share it. */
export interface Clock {
  now: number;
}

export class Machine {
  readonly processes = new Map<number, Process>();
  /** What goes on although its parent has died, or was put here by a model. `finish` runs it along. */
  readonly background = new Set<Running<number>>();
  private readonly locks = new Map<Entry, OpenFile>();
  private lastPid = 100;

  constructor(
    readonly files: FileTree,
    readonly tools: Map<string, Tool>,
    readonly clock: Clock = { now: Date.UTC(2026, 0, 1) },
  ) {}

  now(): number {
    return this.clock.now;
  }

  nextPid(): number {
    this.lastPid += 1;
    return this.lastPid;
  }

  /** The program of that name or path. */
  tool(name: string): Tool | undefined {
    return this.tools.get(name.replace(/^(\/usr)?(\/local)?\/s?bin\//, ""));
  }

  /** As kill(2): a negative target is a process group, signal 0 only looks. False: there is no such process. */
  kill(target: number, signal: Signal | 0): boolean {
    const hit = [...this.processes.values()].filter(({ pid, group }) =>
      target < 0 ? group === -target : pid === target,
    );
    if (signal !== 0) for (const process of hit) process.receive(signal);
    return hit.length > 0;
  }

  /** As flock(2) with LOCK_EX|LOCK_NB. The lock is that of the open description: it ends with the last process that has it. */
  lock(file: OpenFile): boolean {
    if (!this.canLock(file)) return false;
    this.locks.set(file.entry, file);
    return true;
  }

  canLock(file: OpenFile): boolean {
    const holder = this.locks.get(file.entry);
    return (
      holder === undefined ||
      holder === file ||
      ![...this.processes.values()].some(({ fds }) => [...fds.values()].includes(holder))
    );
  }
}

/** What a signal does: nothing; interrupt the body, which takes it; wait until the body takes it. Else it kills. */
type Disposition = "ignored" | "caught" | "deferred";

export class Process {
  readonly pid: number;
  readonly fds: Map<number, Stream>;
  readonly dispositions = new Map<Signal, Disposition>();
  readonly pending = new Set<Signal>();
  group: number;
  cwd: string;
  private child: { readonly process: Process; readonly running: Running<number> } | undefined;
  private step: Step | undefined;

  constructor(
    readonly machine: Machine,
    public argv: readonly string[],
    public env: ReadonlyMap<string, string>,
    inherited: { cwd: string; fds: ReadonlyMap<number, Stream>; group?: number },
  ) {
    this.pid = machine.nextPid();
    this.group = inherited.group ?? this.pid;
    this.cwd = inherited.cwd;
    this.fds = new Map(inherited.fds);
  }

  out(text: string): void {
    this.write(1, text);
  }

  err(text: string): void {
    this.write(2, text);
  }

  /** All that is left on stdin. */
  read(): string {
    return this.fds.get(0)?.read() ?? "";
  }

  /** An argument as an absolute path. */
  path(argument: string): string {
    if (argument === "" || argument.startsWith("/")) return argument;
    return `${this.cwd === "/" ? "" : this.cwd}/${argument}`;
  }

  /** A step of this process: `yield process.wait({ until })`. A step resumed too early is yielded again. */
  wait(wait: Wait): Step {
    return new Step(this.argv, wait);
  }

  /** From now on the signal is left to the body, which must `take` it after each wait. */
  catch(signal: Signal): void {
    this.dispositions.set(signal, "caught");
  }

  /** The next signal that the body has to handle. */
  take(): Signal | undefined {
    const signal = [...this.pending].find((one) => this.dispositions.has(one));
    if (signal !== undefined) this.pending.delete(signal);
    return signal;
  }

  receive(signal: Signal): void {
    if (signal === "KILL" || this.dispositions.get(signal) !== "ignored") this.pending.add(signal);
  }

  fork(): Process {
    const child = new Process(this.machine, this.argv, this.env, this);
    for (const [signal, disposition] of this.dispositions)
      if (disposition === "ignored") child.dispositions.set(signal, disposition);
    return child;
  }

  /** Runs a program as a child in a group of its own, and does not wait for it. */
  leave(argv: readonly string[]): void {
    const child = this.fork();
    child.group = child.pid;
    this.machine.background.add(supervise(child, child.exec(argv)));
  }

  /** Runs a program as a child and waits for it. */
  *run(argv: readonly string[]): Running<number> {
    const child = this.fork();
    return yield* this.waitFor(child, child.exec(argv));
  }

  /** Runs the body as that child. `guard` stands between the child and those who drive it. */
  *waitFor(
    child: Process,
    body: Running<number>,
    guard: (running: Running<number>) => Running<number> = (running) => running,
  ): Running<number> {
    const running = supervise(child, body);
    this.child = { process: child, running };
    const code = yield* guard(running);
    this.child = undefined;
    return code;
  }

  /** Becomes that program. Without it `missing` is said, and the exit code is 127. */
  *exec(argv: readonly string[], missing = () => `${argv[0]}: not found`): Running<number> {
    this.argv = argv;
    for (const [signal, disposition] of this.dispositions)
      if (disposition !== "ignored") this.dispositions.delete(signal);
    yield new Step(argv);
    const tool = this.machine.tool(argv[0] ?? "");
    try {
      if (tool === undefined) {
        this.err(`${missing()}\n`);
        return 127;
      }
      const result = tool(this);
      return typeof result === "number" ? result : yield* result;
    } catch (error) {
      if (!(error instanceof FileError)) throw error;
      this.err(`${argv[0]}: ${error.message}\n`);
      return 1;
    }
  }

  private write(fd: number, text: string): void {
    try {
      this.fds.get(fd)?.write(text);
    } catch (error) {
      if (!(error instanceof FileError) || error.code !== "EPIPE") throw error;
      if (this.dispositions.get("PIPE") !== "ignored") throw new Killed("PIPE");
      if (fd !== 2) throw error;
    }
  }

  /** The pending signal that ends this process now. */
  get fatal(): Signal | undefined {
    if (this.pending.size === 0 || (this.child === undefined && this.step?.uninterruptible)) return undefined;
    return this.pending.has("KILL")
      ? "KILL"
      : [...this.pending].find((signal) => !this.dispositions.has(signal));
  }

  /** Whether a signal makes it go on before its wait has ended. */
  private get interrupted(): boolean {
    if (this.fatal !== undefined) return true;
    return [...this.pending].some((signal) => this.dispositions.get(signal) === "caught");
  }

  /** Stops for a step until it can go on. */
  *stop(step: Step): Running<void> {
    this.step = step;
    const shown = step.waits
      ? new Step(step.argv, { ...step, ready: () => this.interrupted || step.ready?.() === true })
      : step;
    do {
      try {
        yield shown;
      } catch (error) {
        if (!(error instanceof Killed)) throw error;
        this.machine.kill(-this.group, error.signal);
      }
    } while (!shown.canGoOn(this.machine.now()));
    this.step = undefined;
  }

  /** Dies of a signal. What it waited for dies too if it was hit as well; else it goes on alone. */
  die(signal: Signal): number {
    this.machine.processes.delete(this.pid);
    if (this.child !== undefined) {
      const { process, running } = this.child;
      if (process.fatal !== undefined) process.die(process.fatal);
      else this.machine.background.add(running);
    }
    return 128 + signalNumbers[signal];
  }
}

/** Runs a body as a process: registered while it lives, and subject to signals at each step. */
function* supervise(process: Process, body: Running<number>): Running<number> {
  const { processes } = process.machine;
  processes.set(process.pid, process);
  try {
    for (let next = body.next(); ; next = body.next()) {
      if (next.done) {
        processes.delete(process.pid);
        return next.value;
      }
      yield* process.stop(next.value);
      const { fatal } = process;
      if (fatal !== undefined) return process.die(fatal);
    }
  } catch (error) {
    if (error instanceof Killed) return process.die(error.signal);
    throw error;
  }
}

/** A new process with a group of its own, as sshd or systemd start them, and what runs it. */
export function spawn(
  machine: Machine,
  argv: readonly string[],
  { stdin = "", out, err, env = {}, cwd = "/" }: Session,
): { readonly process: Process; readonly running: Running<number> } {
  const fds = new Map<number, Stream>([
    [0, new Pipe(stdin)],
    [1, new Sink(out)],
    [2, new Sink(err)],
  ]);
  const process = new Process(machine, argv, new Map(Object.entries(env)), { cwd, fds });
  return { process, running: supervise(process, process.exec(argv)) };
}

/**
 * Runs a command; the generator stops before every effect, and to leave it there is a host that froze or died. `throw(new Killed("TERM"))` signals its process group:
 * it goes on with traps, or is done with 128 and the signal's number. Call `next()` at least once before.
 */
export function run(machine: Machine, argv: readonly string[], session: Session): Running<number> {
  return spawn(machine, argv, session).running;
}

/** Runs it to its end, with what is in the background; where all wait, virtual time goes on to the first that can. */
export function finish(machine: Machine, running: Running<number>): number {
  for (;;) {
    const next = running.next();
    if (next.done) return next.value;
    if (!next.value.waits) continue;
    const steps = [next.value, ...advanceBackground(machine)];
    if (steps.some((step) => step.canGoOn(machine.now()))) continue;
    const until = Math.min(...steps.map((step) => step.until ?? Number.POSITIVE_INFINITY));
    if (until === Number.POSITIVE_INFINITY)
      throw new Error(`nothing can go on: ${steps.map(({ command }) => command).join("; ")}`);
    machine.clock.now = until;
  }
}

function advanceBackground({ background }: Machine): Step[] {
  return [...background].flatMap((running) => {
    const next = running.next();
    if (!next.done) return [next.value];
    background.delete(running);
    return [];
  });
}
