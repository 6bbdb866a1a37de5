/**
 * Two fake servers that are reached by SSH, as the provider reaches real ones. Everything that runs on them is
 * driven from here, one step after the other, and a test may cut in at any of them.
 */
import type { Socket } from "node:net";
import type { HostConnection } from "../../provider/ssh/types.js";
import {
  type Arrived,
  connection,
  type FakeServer as SshServer,
  startFakeServer,
} from "../ssh/fakeServer.js";
import { FileError } from "./files.js";
import { type Process, type Running, type Step, spawn } from "./machine.js";
import { Network } from "./network.js";
import { FakeServer } from "./server.js";

/** A command of the provider that has arrived at a server. */
export interface Command {
  readonly server: FakeServer;
  readonly line: string;
  /** Counts all commands of this world, from 0. */
  readonly index: number;
  readonly socket: Socket;
  /** Steps it has made. */
  steps: number;
  readonly process: Process;
  readonly running: Running<number>;
  exitCode: number | undefined;
  frozen: boolean;
  readonly channel: Arrived["channel"];
  /** Sends what it has written to its standard output. */
  flush(): void;
}

/** Where a test may cut in. */
export interface Hooks {
  /** Before a command with input begins. `true`: the link breaks before any of the input has arrived. */
  input?(index: number): boolean;
  /** Before a command runs. `false`: it does not, since the link was cut before it was read. */
  arrived?(command: Command): boolean;
  /** Before each of its steps. */
  step?(command: Command, step: Step): unknown;
  /** After it has ended, before its answer is sent. */
  ended?(command: Command): unknown;
}

export class FakeWorld {
  readonly clock = { now: Date.UTC(2026, 0, 1) };
  readonly network = new Network();
  readonly servers: readonly [FakeServer, FakeServer];
  readonly commands: Command[] = [];
  hooks: Hooks = {};
  /** Which of so many commands goes on next. Default: one after the other. */
  choose: ((count: number) => number) | undefined;
  private readonly ssh: SshServer[] = [];
  private active: Command[] = [];
  private readonly defects: unknown[] = [];
  /** What each command is about to do, or waits for. */
  private readonly waits = new WeakMap<Command, Step>();
  private pumping = false;
  private turn = 0;
  private skipped = 0;

  constructor() {
    // What `pass` lets pass, the provider's own clock shows as well.
    const real = performance.now.bind(performance);
    performance.now = () => real() + this.skipped;
    this.servers = [
      new FakeServer("server1", "10.0.0.1", this.network, this.clock),
      new FakeServer("server2", "10.0.0.2", this.network, this.clock),
    ];
  }

  get server1(): FakeServer {
    return this.servers[0];
  }

  get server2(): FakeServer {
    return this.servers[1];
  }

  /** Starts to listen. */
  async open(): Promise<void> {
    for (const server of this.servers) {
      this.ssh.push(
        await startFakeServer({
          run: (arrived) => this.receive(server, arrived),
          kill: (arrived) => this.receive(server, arrived),
        }),
      );
    }
  }

  async close(): Promise<void> {
    // Its own property hides the real one.
    Reflect.deleteProperty(performance, "now");
    for (const server of this.ssh) await server.close();
    if (this.defects.length > 0) throw this.defects[0];
  }

  /** How a declaration names the server. */
  host(server: FakeServer): HostConnection {
    const ssh = this.ssh[this.servers.indexOf(server)];
    if (ssh === undefined) throw new Error("the world is not open");
    const { address, port, user, password } = connection({ port: ssh.port });
    return { address, port, user, password, hostKey: ssh.publicKey };
  }

  /** Every connection to the server so far. */
  sockets(server: FakeServer): readonly Socket[] {
    return this.ssh[this.servers.indexOf(server)]?.sockets ?? [];
  }

  /** Cuts every connection to the server. */
  cut(server: FakeServer): void {
    for (const socket of this.sockets(server)) socket.destroy();
  }

  /** The power of a server goes, and comes back. */
  reboot(server: FakeServer): void {
    this.active = this.active.filter((command) => command.server !== server);
    this.cut(server);
    server.reboot();
    this.pump();
  }

  /** Everything that still runs on the servers runs to its end, and units settle. */
  async settle(seconds = 10): Promise<void> {
    const until = this.clock.now + seconds * 1000;
    while (this.clock.now < until || this.active.some(({ frozen }) => !frozen)) {
      if (this.round()) continue;
      if (!this.advance(until)) this.clock.now = until;
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  /** Goes on where something waits for what a test has changed. */
  pump(): void {
    if (this.pumping) return;
    this.pumping = true;
    const tick = () => {
      for (let rounds = 0; rounds < 200; rounds++) {
        if (this.active.length === 0 || !(this.round() || this.advance())) {
          this.pumping = false;
          return;
        }
      }
      setImmediate(tick);
    };
    setImmediate(tick);
  }

  private receive(server: FakeServer, arrived: Arrived): void {
    let stdin = "";
    arrived.channel.on("data", (data: Buffer) => {
      stdin += data.toString();
    });
    arrived.channel.on("end", () => this.start(server, arrived, stdin));
  }

  private start(server: FakeServer, { line, channel, socket }: Arrived, stdin: string): void {
    const say = (write: (text: string) => void) => (text: string) => {
      // What goes on alone writes for nobody.
      if (socket.destroyed || command.exitCode !== undefined) throw new FileError("EPIPE", "the session");
      write(text);
    };
    // Sent together: each packet is encrypted and decrypted here.
    let pending = "";
    const flush = () => {
      if (pending !== "" && !socket.destroyed) channel.write(pending);
      pending = "";
    };
    const unfed = stdin !== "" && this.hooks.input?.(this.commands.length) === true;
    const { process, running } = spawn(server.machine, ["sh", "-c", line], {
      stdin: unfed ? "" : stdin,
      out: say((text) => {
        pending += text;
      }),
      err: say((text) => {
        channel.stderr.write(text);
        // The first that comes is the wrapper's: by then it runs, and what follows does not notice.
        if (unfed) this.cut(server);
      }),
    });
    const command: Command = {
      server,
      line,
      index: this.commands.length,
      socket,
      steps: 0,
      process,
      running,
      exitCode: undefined,
      frozen: false,
      channel,
      flush,
    };
    this.commands.push(command);
    if (this.hooks.arrived?.(command) === false) return;
    this.active.push(command);
    this.pump();
  }

  /** One command, and whatever runs beside them, makes a step. False: nothing could. */
  private round(): boolean {
    const moved = this.oneCommand();
    return [...this.servers].map((server) => this.background(server)).includes(true) || moved;
  }

  private oneCommand(): boolean {
    const count = this.active.length;
    const at = count === 0 ? 0 : (this.choose?.(count) ?? this.turn++ % count);
    for (let offset = 0; offset < count; offset++) {
      const command = this.active[(at + offset) % count];
      if (command !== undefined && !command.frozen && this.advanceCommand(command)) return true;
    }
    return false;
  }

  private background(server: FakeServer): boolean {
    let moved = false;
    server.nbd.settle();
    for (const running of [...server.machine.background]) {
      const next = this.next(running);
      if (next.done) server.machine.background.delete(running);
      if (next.done || !next.value.waits) moved = true;
    }
    return moved;
  }

  private next(running: Running<number>): IteratorResult<Step, number> {
    try {
      return running.next();
    } catch (error) {
      // What the models do not know or what must never happen: the test fails of it, whatever becomes of its answer.
      this.defects.push(error);
      return { done: true, value: 255 };
    }
  }

  private advanceCommand(command: Command): boolean {
    const next = this.next(command.running);
    if (next.done) {
      this.active = this.active.filter((other) => other !== command);
      command.exitCode = next.value;
      this.hooks.ended?.(command);
      command.flush();
      if (!command.socket.destroyed) {
        command.channel.exit(next.value);
        command.channel.end();
      }
      return true;
    }
    this.waits.set(command, next.value);
    if (next.value.waits) command.flush();
    if (next.value.waits && !next.value.canGoOn(this.clock.now)) return false;
    command.steps += 1;
    this.hooks.step?.(command, next.value);
    return true;
  }

  /** Lets the time pass until the next one can go on. */
  private advance(limit = Number.POSITIVE_INFINITY): boolean {
    const times = this.active.flatMap((command) => this.waits.get(command)?.until ?? []);
    for (const { machine } of this.servers) {
      for (const running of machine.background) {
        const next = this.next(running);
        if (!next.done && next.value.until !== undefined) times.push(next.value.until);
      }
    }
    const until = Math.min(...times, limit);
    if (!Number.isFinite(until) || until <= this.clock.now) return false;
    this.clock.now = until;
    return true;
  }

  /** Time passes for servers and provider alike. */
  pass(seconds: number): void {
    this.clock.now += seconds * 1000;
    this.skipped += seconds * 1000;
  }

  /** Kills a command with all that it runs, as SIGKILL to its process group. */
  killCommand(command: Command): void {
    for (const process of command.server.machine.processes.values())
      if (process.group === command.process.group) process.receive("KILL");
  }
}
