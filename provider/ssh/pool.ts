/**
 * The hosts of a run: one connection each, opened at first use, opened again when it was lost, and those that a long read has to itself.
 * Reads are run again after a lost link; a change never is, once it may have reached the host.
 */
import { hash } from "node:crypto";
import { unlessCancelled } from "../core/cancel.js";
import { isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { type Queue, queueOf } from "../core/serial.js";
import { displayCommand } from "./command.js";
import { hostName, type ResolvedHost, resolveHost } from "./config.js";
import { Connection, DialFailed, LinkLost } from "./connection.js";
import { digestOf } from "./knownHosts.js";
import { machineIdCommand, parseMachineId } from "./machineId.js";
import type { CommandResult, Host, HostArgs, NamedHosts, RemoteCommand } from "./types.js";

/** What the pool needs of a connection. */
export type OpenConnection = Pick<Connection, "run" | "end" | "lost">;

export interface HostPool {
  /** The host, not yet connected. Raises HOST_UNKNOWN, KEY_UNREADABLE, INVALID_INPUT. */
  get(args: HostArgs, named?: NamedHosts): Promise<Host>;
  /** Ends all connections. */
  close(): void;
}

export interface PoolOptions {
  readonly connect?: (host: ResolvedHost) => Promise<OpenConnection>;
  /** Milliseconds to wait before each further attempt. */
  readonly backoff?: readonly number[];
}

/**
 * Dials at once to one address, e.g. to a host that many others are reached through: sshd drops connections when
 * ten of them have not yet logged in (MaxStartups in sshd_config(5)).
 */
const dialsAtOnce = 5;

export function createHostPool(options: PoolOptions = {}): HostPool {
  const open = options.connect ?? ((host) => Connection.open(host));
  const queues = new Map<string, Queue>();
  const connect = (host: ResolvedHost) => {
    const { address, port } = host.jumps[0] ?? host;
    const first = `${address}:${port}`;
    const queue = queues.get(first) ?? queueOf(dialsAtOnce);
    queues.set(first, queue);
    return queue(() => open(host));
  };
  const backoff = options.backoff ?? [500, 2000, 5000];
  const hosts = new Map<string, PooledHost>();
  return {
    async get(args, named) {
      // By what it resolves to: rotated credentials connect anew, and the order of properties means nothing.
      const resolved = await resolveHost(args, named);
      const key = keyOf(resolved);
      let host = hosts.get(key);
      if (host === undefined) {
        host = new PooledHost(hostName(args), resolved, connect, backoff);
        hosts.set(key, host);
      }
      return host;
    },
    close() {
      for (const host of hosts.values()) host.close();
      hosts.clear();
    },
  };
}

/** The same for what is reached, by whom and how, in the same way. */
function keyOf(resolved: ResolvedHost): string {
  return hash("sha256", JSON.stringify(briefly(resolved)));
}

/** With the texts of known_hosts, in which all hosts may be, by their digests. */
function briefly(host: ResolvedHost): object {
  const { trust, jumps } = host;
  const brief = "pins" in trust ? trust : { ...trust, knownHosts: trust.knownHosts.map(digestOf) };
  return { ...host, trust: brief, jumps: jumps.map(briefly) };
}

class PooledHost implements Host {
  private connection: Promise<OpenConnection> | undefined;
  /** Those that one command has to itself. */
  private readonly own = new Set<Promise<OpenConnection>>();
  private closed = false;
  /** By connection: the next one may lead to another machine. */
  private readonly machineIds = new WeakMap<OpenConnection, Promise<string | undefined>>();

  constructor(
    readonly name: string,
    private readonly resolved: ResolvedHost,
    private readonly connect: (host: ResolvedHost) => Promise<OpenConnection>,
    private readonly backoff: readonly number[],
  ) {}

  run(command: RemoteCommand, signal?: AbortSignal): Promise<CommandResult> {
    return this.untilAnswered(command, signal, () =>
      command.ownConnection ? this.runApart(command, signal) : this.runShared(command, signal),
    );
  }

  machineId(signal?: AbortSignal): Promise<string | undefined> {
    return this.untilAnswered(machineIdCommand, signal, async () => {
      const connection = await this.connected(signal);
      let id = this.machineIds.get(connection);
      if (id === undefined) {
        // Shared by all who ask: none of their signals ends it.
        id = connection.run(machineIdCommand, undefined).then(parseMachineId);
        this.machineIds.set(connection, id);
        id.catch(() => this.machineIds.delete(connection));
      }
      return unlessCancelled(id, signal, this.name);
    });
  }

  close(): void {
    this.closed = true;
    const { connection } = this;
    this.connection = undefined;
    if (connection !== undefined) end(connection);
    for (const one of this.own) end(one);
  }

  private async runShared(command: RemoteCommand, signal: AbortSignal | undefined): Promise<CommandResult> {
    const connection = await this.connected(signal);
    return connection.run(command, signal);
  }

  private async runApart(command: RemoteCommand, signal: AbortSignal | undefined): Promise<CommandResult> {
    this.refuseEnded(signal);
    const dialled = this.connect(this.resolved);
    this.own.add(dialled);
    try {
      const connection = await unlessCancelled(dialled, signal, this.name).catch((error: unknown) =>
        this.sharedAfter(error),
      );
      return await connection.run(command, signal);
    } finally {
      this.own.delete(dialled);
      // Also one that comes about after a cancel.
      end(dialled);
    }
  }

  /** A certificate or an agent that let us in once may not do so hours later, nor a firewall that counts. Nobody logs in again for it. */
  private async sharedAfter(error: unknown): Promise<OpenConnection> {
    if (!(error instanceof DialFailed) && !isLvmNbdError(error, "AUTH_FAILED")) throw error;
    const shared = await this.connection?.catch(() => undefined);
    if (shared === undefined || shared.lost) throw error;
    return shared;
  }

  private async untilAnswered<T>(
    command: RemoteCommand,
    signal: AbortSignal | undefined,
    work: () => Promise<T>,
  ): Promise<T> {
    for (let attempt = 0; ; attempt++) {
      try {
        return await work();
      } catch (error) {
        const repeatable =
          (error instanceof DialFailed && error.mayPass) ||
          (error instanceof LinkLost && (!error.sent || command.kind === "read"));
        const pause = this.backoff[attempt];
        if (!repeatable || pause === undefined) throw this.named(error, command);
        // A cancel ends the pause, and the next round is told of it.
        await sleep(pause * (0.5 + Math.random()), signal);
      }
    }
  }

  /** The open connection; all who ask while it is being dialled share the dial. A failed one is not kept. */
  private async connected(signal: AbortSignal | undefined): Promise<OpenConnection> {
    for (;;) {
      this.refuseEnded(signal);
      this.connection ??= this.dial();
      const current = this.connection;
      const open = await unlessCancelled(current, signal, this.name);
      if (!open.lost) return open;
      if (this.connection === current) this.connection = undefined;
    }
  }

  /** Raises CANCELLED for who is cancelled, and for all once the host is closed. */
  private refuseEnded(signal: AbortSignal | undefined): void {
    const why = this.closed ? "its connection was ended" : "cancelled before it began";
    if (this.closed || signal?.aborted) throw new LvmNbdError("CANCELLED", { host: this.name, message: why });
  }

  private dial(): Promise<OpenConnection> {
    const dialled = this.connect(this.resolved);
    dialled.catch(() => {
      if (this.connection === dialled) this.connection = undefined;
    });
    return dialled;
  }

  private named(error: unknown, command: RemoteCommand): unknown {
    if (error instanceof DialFailed) {
      return new LvmNbdError("HOST_UNREACHABLE", {
        host: this.name,
        message: `it cannot be reached: ${error.message}`,
      });
    }
    if (error instanceof LinkLost) {
      return new LvmNbdError(error.sent && command.kind === "change" ? "LINK_LOST" : "HOST_UNREACHABLE", {
        host: this.name,
        message: `the link was lost: ${error.message}`,
        command: displayCommand(command),
      });
    }
    return isLvmNbdError(error) ? error.with({ host: this.name }) : error;
  }
}

function end(dialled: Promise<OpenConnection>): void {
  dialled.then(
    (open) => open.end(),
    // A dial that failed left nothing to end; whoever asked for it has its error.
    () => undefined,
  );
}

function sleep(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal?.addEventListener("abort", done);
    if (signal?.aborted) done();
  });
}
