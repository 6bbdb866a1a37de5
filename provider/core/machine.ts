/**
 * Whether a host is still the machine that the state tells of. On another one a thing is not there, or is a clone's: neither
 * says anything of ours.
 */
import { refusal } from "./command.js";
import type { LvmNbdError } from "./errors.js";
import type { Context } from "./resource.js";

/** Names machines that are accepted in another's place, for one run. */
const acceptVariable = "LVM_NBD_ACCEPT_MACHINE";

/** The looks of one operation, all at one machine: that of the state; where that tells of none, the first that is looked at. */
export class Machine {
  /** `id`: its machine-id(5), if the state tells it. */
  constructor(public id: string | undefined) {}

  /**
   * Looks, on that machine alone. Raises HOST_CHANGED. `suffices`: true of what is known for ours also where the host does not tell
   * which machine it is.
   */
  async look<T>(
    context: Context,
    observe: () => Promise<T>,
    suffices: (seen: T) => boolean = () => false,
  ): Promise<T> {
    const before = await this.#now(context);
    const seen = await observe();
    // A look goes on after a lost link, which may lead elsewhere then.
    const after = await this.#now(context);
    if (this.id !== undefined && (before === undefined || after === undefined) && !suffices(seen))
      throw untold(context, this.id);
    return seen;
  }

  async #now(context: Context): Promise<string | undefined> {
    const now = await context.host.machineId(context.signal);
    if (now === undefined) return undefined;
    if (this.id !== undefined && this.id !== now && !isAccepted(now)) throw another(context, this.id, now);
    this.id = now;
    return now;
  }
}

function isAccepted(id: string): boolean {
  return (process.env[acceptVariable] ?? "").split(/[\s,]+/).includes(id);
}

function another(context: Context, known: string, now: string): LvmNbdError {
  return refusal(
    context,
    "HOST_CHANGED",
    `\`${context.host.name}\` is another machine than the one ${context.resource} was made on (machine-id ${known}, now ${now})`,
    `Nothing was touched or concluded. Put the address right in ~/.ssh/config, \`lvm-nbd:hosts\` or the program, and run again. If it is the right machine, reinstalled or with another machine-id, and no clone of it, run \`${acceptVariable}=${now} pulumi refresh\` once: what is still there stays, the rest leaves the state, and \`pulumi up\` makes it anew.`,
  );
}

function untold(context: Context, known: string): LvmNbdError {
  return refusal(
    context,
    "HOST_CHANGED",
    `whether \`${context.host.name}\` is still the machine that ${context.resource} was made on (machine-id ${known}) cannot be told: it has no /etc/machine-id`,
    `Nothing was touched or concluded. If it is that machine, write \`${known}\` back into its /etc/machine-id and run again; else put the address right in ~/.ssh/config, \`lvm-nbd:hosts\` or the program.`,
  );
}
