/** As much of Pulumi's engine as decides what the handlers are asked, in what order, and what is kept. */
import { createHandlers, type Environment, type Handlers } from "../../provider/core/handlers.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { resourceType } from "../../provider/core/registry.js";
import type { Change } from "../../provider/core/resource.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import type { Host, HostConnection, RemoteCommand } from "../../provider/ssh/types.js";

export type Values = Readonly<Record<string, unknown>>;
export type TypeName = "LvSnapshot" | "NbdExport" | "NbdAttachment" | "LvRestore";

/** An output of another resource of the program. */
export class Ref {
  constructor(
    readonly name: string,
    readonly output: string,
  ) {}
}

/** A resource of a program; what it refers to comes before it. */
export interface Declared {
  readonly type: TypeName;
  readonly name: string;
  readonly args: Values;
}

interface Kept {
  readonly declared: Declared;
  readonly inputs: Values;
  readonly state: Values;
  /** It was made or updated, but not without an error: the next `up` updates it whatever the diff says. */
  readonly incomplete: boolean;
}

export interface Report {
  readonly errors: readonly unknown[];
  readonly did: ReadonlyMap<string, string>;
}

/** Thrown at whoever waits for an operation whose process was killed. */
export class ProcessKilled extends Error {}

const never = new Promise<never>(() => undefined);

export class Stack {
  readonly kept = new Map<string, Kept>();
  /** What `lvm-nbd:hosts` configures. */
  readonly hosts = new Map<string, HostConnection>();
  /** Replaced ones that could not be removed yet. */
  private readonly leftovers: Kept[] = [];
  readonly warnings: string[] = [];
  readonly commands: (RemoteCommand & { readonly host: string })[] = [];
  private process:
    | { readonly controller: AbortController; dead: boolean; kill(): void; killed: Promise<never> }
    | undefined;

  constructor(readonly name: string) {}

  /** `pulumi up`, in a process of its own. */
  async up(program: readonly Declared[]): Promise<Report> {
    return this.inProcess((handlers) => this.deploy(program, handlers));
  }

  /** `pulumi refresh`: what is positively gone leaves the state; an error keeps it. */
  async refresh(): Promise<Report> {
    return this.inProcess(async (handlers) => {
      const errors: unknown[] = [];
      const did = new Map<string, string>();
      await Promise.all(
        [...this.kept].map(async ([name, kept]) => {
          try {
            const state = await handlers(kept.declared.type).read(kept.state);
            did.set(name, state === undefined ? "gone" : "read");
            if (state === undefined) this.kept.delete(name);
            else this.kept.set(name, { ...kept, state });
          } catch (error) {
            errors.push(error);
          }
        }),
      );
      return { errors, did };
    });
  }

  /** The process that works now is killed: nothing more is sent, and no answer is kept. */
  kill(): void {
    this.process?.kill();
  }

  /** Ctrl-C. */
  cancel(): void {
    this.process?.controller.abort();
  }

  private async inProcess(
    work: (handlers: (type: TypeName) => Handlers) => Promise<Report>,
  ): Promise<Report> {
    const pool = createHostPool({ backoff: [1, 1, 1] });
    let kill = () => undefined as undefined;
    const killed = new Promise<never>((_, reject) => {
      kill = () => {
        own.dead = true;
        pool.close();
        reject(new ProcessKilled());
      };
    });
    // Nobody waits for it in a run that nothing kills.
    killed.catch(() => undefined);
    const own = { controller: new AbortController(), dead: false, kill, killed };
    own.kill = () => kill();
    this.process = own;
    const opened = new Map<Host, Host>();
    const environment: Environment = {
      openHost: async (args) => {
        const host = await pool.get(args, this.hosts);
        const watched = opened.get(host) ?? this.watched(host, own);
        opened.set(host, watched);
        return watched;
      },
      namedHosts: () => this.hosts,
      progress: () => undefined,
      warn: (message) => this.warnings.push(message),
      signal: own.controller.signal,
    };
    const made = new Map<TypeName, Handlers>();
    const handlers = (type: TypeName) => {
      const found = made.get(type) ?? createHandlers(resourceType(type), environment);
      made.set(type, found);
      return found;
    };
    try {
      return await Promise.race([work(handlers), killed]);
    } finally {
      this.process = undefined;
      if (!own.dead) pool.close();
    }
  }

  private watched(host: Host, process: { dead: boolean }): Host {
    return {
      name: host.name,
      machineId: async (signal) => {
        if (process.dead) return never;
        const id = await host.machineId(signal);
        return process.dead ? never : id;
      },
      run: async (command, signal) => {
        if (process.dead) return never;
        this.commands.push({ ...command, host: host.name });
        try {
          const result = await host.run(command, signal);
          return process.dead ? never : result;
        } catch (error) {
          if (process.dead) return never;
          throw error;
        }
      },
    };
  }

  private async deploy(
    program: readonly Declared[],
    handlers: (type: TypeName) => Handlers,
  ): Promise<Report> {
    const errors: unknown[] = [];
    const did = new Map<string, string>();
    const removals: Kept[] = [];
    for (const left of this.leftovers.splice(0)) await this.remove(left, handlers, errors, this.leftovers);
    const running = new Map<string, Promise<boolean>>();
    const gone = new Set<string>();
    for (const declared of program) {
      const needs = references(declared.args).map((name) => running.get(name));
      running.set(
        declared.name,
        (async () => {
          if ((await Promise.all(needs)).includes(false)) return false;
          try {
            did.set(declared.name, await this.step(declared, handlers, removals, gone));
            return true;
          } catch (error) {
            errors.push(error);
            return false;
          }
        })(),
      );
    }
    const all = await Promise.all(running.values());
    if (all.includes(false)) {
      this.leftovers.push(...removals);
      return { errors, did };
    }
    for (const old of removals.reverse()) await this.remove(old, handlers, errors, this.leftovers);
    const declared = new Set(program.map(({ name }) => name));
    const surplus = new Map([...this.kept].filter(([name]) => !declared.has(name)));
    // Those that others depend on come after these, and stay when these could not be removed.
    for (;;) {
      const next = [...surplus].find(([name]) => !this.isNeeded(name));
      if (next === undefined) break;
      const [name, kept] = next;
      surplus.delete(name);
      if (await this.remove(kept, handlers, errors, [])) {
        this.kept.delete(name);
        did.set(name, "removed");
      }
    }
    return { errors, did };
  }

  /** True while something in the state refers to it. */
  private isNeeded(name: string): boolean {
    return [...this.kept.values()].some(({ declared }) => references(declared.args).includes(name));
  }

  private async remove(
    { declared, state }: Kept,
    handlers: (type: TypeName) => Handlers,
    errors: unknown[],
    again: Kept[],
  ): Promise<boolean> {
    try {
      await handlers(declared.type).remove(state);
      return true;
    } catch (error) {
      errors.push(error);
      again.push({ declared, state, inputs: {}, incomplete: false });
      return false;
    }
  }

  private async step(
    declared: Declared,
    handlers: (type: TypeName) => Handlers,
    removals: Kept[],
    gone: Set<string>,
  ): Promise<string> {
    const own = handlers(declared.type);
    const kept = this.kept.get(declared.name);
    const args = {
      ...this.resolved(declared.args),
      owner: `organization/project/${this.name}/${declared.name}`,
    };
    const { inputs, problems } = await own.check(kept?.inputs, args, new Set());
    if (problems.length > 0)
      throw new Error(problems.map(({ property, reason }) => `${property}: ${reason}`).join("; "));
    if (kept === undefined || gone.has(declared.name)) return this.create(declared, own, inputs);
    const { changes, deleteBeforeReplace } = await own.diff(kept.state, inputs, new Set());
    if (isReplacement(changes)) {
      if (!deleteBeforeReplace) {
        const did = await this.create(declared, own, inputs);
        removals.push(kept);
        return did === "created" ? "replaced" : did;
      }
      await this.removeWithDependents(kept, handlers, gone);
      await this.create(declared, own, inputs);
      return "replaced";
    }
    if (changes.length === 0 && !kept.incomplete) return "unchanged";
    try {
      this.kept.set(declared.name, {
        declared,
        inputs,
        state: await own.update(kept.state, inputs),
        incomplete: false,
      });
    } catch (error) {
      if (error instanceof PartialFailure)
        this.kept.set(declared.name, { declared, inputs, state: error.state, incomplete: true });
      throw error;
    }
    return "updated";
  }

  private async create(declared: Declared, handlers: Handlers, inputs: Values): Promise<string> {
    try {
      const { state } = await handlers.create(inputs);
      this.kept.set(declared.name, { declared, inputs, state, incomplete: false });
      return "created";
    } catch (error) {
      if (error instanceof PartialFailure)
        this.kept.set(declared.name, { declared, inputs, state: error.state, incomplete: true });
      throw error;
    }
  }

  /** What would be replaced if the outputs of the removed one were unknown is removed before it. */
  private async removeWithDependents(
    kept: Kept,
    handlers: (type: TypeName) => Handlers,
    gone: Set<string>,
  ): Promise<void> {
    for (const dependent of [...this.kept.values()].reverse()) {
      const { declared } = dependent;
      const properties = Object.entries(declared.args)
        .filter(([property, value]) => references({ [property]: value }).includes(kept.declared.name))
        .map(([property]) => property);
      if (properties.length === 0 || !this.kept.has(declared.name)) continue;
      const known = Object.fromEntries(
        Object.entries(dependent.inputs).filter(([property]) => !properties.includes(property)),
      );
      const { changes } = await handlers(declared.type).diff(dependent.state, known, new Set(properties));
      if (isReplacement(changes)) await this.removeWithDependents(dependent, handlers, gone);
    }
    await handlers(kept.declared.type).remove(kept.state);
    this.kept.delete(kept.declared.name);
    gone.add(kept.declared.name);
  }

  private resolved(args: Values): Values {
    return Object.fromEntries(
      Object.entries(args).map(([key, value]) => {
        if (value instanceof Ref) return [key, this.kept.get(value.name)?.state[value.output]];
        return [key, isGroup(value) ? this.resolved(value) : value];
      }),
    );
  }
}

function references(args: Values): string[] {
  return Object.values(args).flatMap((value) => {
    if (value instanceof Ref) return [value.name];
    return isGroup(value) ? references(value) : [];
  });
}

/** Properties within a property. */
function isGroup(value: unknown): value is Values {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isReplacement(changes: readonly Change[]): boolean {
  return changes.some(({ effect }) => effect === "replace");
}
