/** Looks at a host that several resources take at about the same time travel once, as `RemoteCommand.shared` allows. */
import { setImmediate } from "node:timers/promises";
import type { CommandResult, Host, RemoteCommand } from "../ssh/types.js";
import { unlessCancelled } from "./cancel.js";

/** The changes that this process makes, on any host: an attachment on one opens a volume of another. */
const changes = { begun: 0, running: 0 };

async function changing<T>(work: () => Promise<T>): Promise<T> {
  changes.begun++;
  changes.running++;
  try {
    return await work();
  } finally {
    changes.running--;
  }
}

const sharing = new WeakMap<Host, Host>();

/** That host; one for each, so that all who open it share. */
export function sharingLooks(host: Host): Host {
  let made = sharing.get(host);
  if (made === undefined) {
    made = new SharingHost(host);
    sharing.set(host, made);
  }
  return made;
}

/** The looks by one command: one runs at a time, and all who ask meanwhile have the next one. */
interface Queue {
  latest?: Look;
  next?: Look | undefined;
}

class SharingHost implements Host {
  readonly #queues = new Map<string, Queue>();

  constructor(private readonly host: Host) {}

  get name(): string {
    return this.host.name;
  }

  machineId(signal?: AbortSignal): Promise<string | undefined> {
    return this.host.machineId(signal);
  }

  run(command: RemoteCommand, signal?: AbortSignal): Promise<CommandResult> {
    if (command.kind === "change") return changing(() => this.host.run(command, signal));
    const { shared } = command;
    return shared === undefined
      ? this.host.run(command, signal)
      : this.#look(command, shared.oldestSeconds, signal);
  }

  async #look(command: RemoteCommand, oldestSeconds: number, signal?: AbortSignal): Promise<CommandResult> {
    const machine = oldestSeconds > 0 ? await this.host.machineId(signal) : undefined;
    const key = JSON.stringify([command.argv, command.stdin]);
    const queue = this.#queues.get(key) ?? {};
    this.#queues.set(key, queue);
    const { latest } = queue;
    if (machine !== undefined && latest?.isOf(machine, oldestSeconds)) return latest.share(signal);
    const next = queue.next ?? new Look(this.host, command, queue);
    next.machine ??= machine;
    return next.share(signal);
  }
}

class Look {
  /** That it is told of, if that was asked before it began. */
  machine: string | undefined;
  readonly #result: Promise<CommandResult>;
  readonly #stop = new AbortController();
  #askers = 0;
  #begun: { readonly at: number; readonly changes: number } | undefined;
  #failed = false;

  constructor(
    private readonly host: Host,
    command: RemoteCommand,
    private readonly queue: Queue,
  ) {
    queue.next = this;
    this.#result = this.#run(command, queue.latest);
    this.#result.catch(() => {
      // Told to all who wait for it; those who were cancelled want to know nothing.
      this.#failed = true;
    });
  }

  async #run(command: RemoteCommand, before: Look | undefined): Promise<CommandResult> {
    await before?.ended();
    // All who were waiting for the same thing ask in this turn.
    await setImmediate();
    this.#stop.signal.throwIfAborted();
    if (this.queue.next === this) this.queue.next = undefined;
    this.queue.latest = this;
    if (changes.running === 0) this.#begun = { at: performance.now(), changes: changes.begun };
    const result = await this.host.run(command, this.#stop.signal);
    // It may pass, as a lock of LVM's does.
    if (result.exitCode !== 0) this.#failed = true;
    if (this.machine !== undefined && (await this.host.machineId(this.#stop.signal)) !== this.machine)
      this.machine = undefined;
    return result;
  }

  /** Whether it is, or will be, an answer of that machine of at most that age, and nothing was changed since. */
  isOf(machine: string, oldestSeconds: number): boolean {
    return (
      this.machine === machine &&
      !this.#failed &&
      !this.#stop.signal.aborted &&
      this.#begun?.changes === changes.begun &&
      performance.now() - this.#begun.at <= oldestSeconds * 1000
    );
  }

  /** Its answer for one more; it is stopped when all of them were cancelled. */
  async share(signal: AbortSignal | undefined): Promise<CommandResult> {
    this.#askers++;
    try {
      return await unlessCancelled(this.#result, signal, this.host.name);
    } finally {
      this.#askers--;
      if (this.#askers === 0 && signal?.aborted) this.#leave();
    }
  }

  #leave(): void {
    this.#stop.abort();
    if (this.queue.next === this) this.queue.next = undefined;
  }

  async ended(): Promise<void> {
    await this.#result.catch(() => undefined);
  }
}
