/** A host whose answers a test decides, and that remembers what was run on it. */
import { createHandlers, type Handlers } from "../../provider/core/handlers.js";
import { resourceType } from "../../provider/core/registry.js";
import type { CommandResult, Host, NamedHosts, RemoteCommand } from "../../provider/ssh/types.js";

/** An answer: stdout, or a whole result, or an error to throw. */
export type Answer = string | Partial<CommandResult> | Error;

export interface FakeHost extends Host {
  readonly commands: RemoteCommand[];
  /** The commands that may have changed something. */
  readonly changes: RemoteCommand[];
}

/** `machineId`: which machine it tells to be, if it tells that. */
export function fakeHost(
  answer: (command: RemoteCommand, index: number) => Answer,
  machineId?: string,
): FakeHost {
  const commands: RemoteCommand[] = [];
  return {
    name: "server1",
    commands,
    get changes() {
      return commands.filter(({ kind }) => kind === "change");
    },
    machineId: async () => machineId,
    async run(command) {
      commands.push(command);
      const given = answer(command, commands.length - 1);
      if (given instanceof Error) throw given;
      const result = typeof given === "string" ? { stdout: given } : given;
      return { exitCode: 0, stdout: "", stderr: "", ...result };
    },
  };
}

/** The handlers of a type on that host, with what they showed. */
export function handlersOn(
  type: string,
  host: Host,
  namedHosts: NamedHosts = new Map(),
): Handlers & { readonly warnings: string[]; readonly lines: string[] } {
  const warnings: string[] = [];
  const lines: string[] = [];
  const handlers = createHandlers(resourceType(type), {
    openHost: async () => host,
    namedHosts: () => namedHosts,
    progress: (message) => lines.push(message),
    warn: (message) => warnings.push(message),
    signal: new AbortController().signal,
  });
  return Object.assign(handlers, { warnings, lines });
}

/** A host that must not be asked anything. */
export function untouchedHost(): FakeHost {
  return fakeHost((command) => new Error(`nothing may run, but ${command.argv.join(" ")} did`));
}
