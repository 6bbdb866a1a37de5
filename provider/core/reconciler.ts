/**
 * Observe, then converge: the one path every create, update, delete and refresh takes.
 *
 * Nothing is done on the stored state alone. What is absent is made, what is ours is converged, what is
 * somebody else's is refused with its owner named. After a lost link nothing is repeated blindly: the host
 * is looked at again and the work goes on from what is there.
 */
import { refusal } from "./command.js";
import { briefly, firstLine, isLvmNbdError, LvmNbdError } from "./errors.js";
import { Machine } from "./machine.js";
import { type Claimant, ofTwo, organizationMissing, ownerByMark, ownerMark, ownerOfMark } from "./owner.js";
import {
  type AnyResourceType,
  type ById,
  ChangedMeanwhile,
  type CommonInputs,
  type CommonObservation,
  type CommonState,
  type Context,
} from "./resource.js";

/** How often a change goes on after it was interrupted: by a lost link, or by somebody who came in between. */
const interruptionsBorne = 3;
/** For the look at what a failed or cancelled operation left. */
const lookAfterwardsSeconds = 60;

/** A create or update that made something but did not succeed: Pulumi keeps it and goes on at the next `up`. */
export class PartialSuccess extends Error {
  constructor(
    readonly state: CommonState,
    override readonly cause: unknown,
  ) {
    super(cause instanceof Error ? cause.message : String(cause));
    this.name = "PartialSuccess";
  }
}

/** Makes the host match the declaration and returns the state. Used by create and by update alike. */
export async function converge(
  type: AnyResourceType,
  context: Context,
  wanted: CommonInputs,
  old: CommonState | undefined,
): Promise<CommonState> {
  const machine = new Machine(old?.machineId);
  let seen = false;
  try {
    return await lookingAgain(context, async () => {
      seen = false;
      const before = await machine.look(context, () => type.observe(context, found(wanted, old)));
      seen = true;
      return convergeFrom(before, machine, type, context, wanted, old);
    });
  } catch (error) {
    // A host that could not be looked at would only be waited for a second time.
    if (!seen && !isLvmNbdError(error, "CANCELLED")) throw error;
    // Also after a cancel: what is there now must be known.
    const looking = { ...context, signal: AbortSignal.timeout(lookAfterwardsSeconds * 1000) };
    const left = await leftBehind(machine, type, looking, wanted, old, error);
    if (left === undefined) throw error;
    throw new PartialSuccess(left, error);
  }
}

function afterCancel(isThere: boolean): string {
  return isThere
    ? "was cancelled; it is on the host, perhaps not all as declared, and is kept in the state: the next `pulumi up` goes on from there"
    : "was cancelled; nothing of it that can be used is on the host: the next `pulumi up` makes it";
}

/** Does the work, which begins by looking, again after an interruption. */
async function lookingAgain<T>(context: Context, work: () => Promise<T>): Promise<T> {
  let linkLost: unknown;
  for (let interruptions = 1; ; interruptions++) {
    try {
      return await work();
    } catch (error) {
      // That nothing was changed is not known after a lost link.
      if (linkLost !== undefined && isLvmNbdError(error, "HOST_UNREACHABLE")) throw linkLost;
      const lost = isLvmNbdError(error, "LINK_LOST");
      if (lost) linkLost = error;
      if (!lost && !(error instanceof ChangedMeanwhile)) throw error;
      if (interruptions > interruptionsBorne) throw error instanceof ChangedMeanwhile ? error.failure : error;
      context.progress(
        `${lost ? "the link was lost in the middle" : "somebody else changed it in the meantime"}; looking at what is there and going on`,
      );
    }
  }
}

async function convergeFrom(
  before: CommonObservation | undefined,
  machine: Machine,
  type: AnyResourceType,
  context: Context,
  wanted: CommonInputs,
  old: CommonState | undefined,
): Promise<CommonState> {
  if (before !== undefined) refuseForeign(type, context, before, wanted, old);
  const told =
    before === undefined
      ? await type.create(context, wanted, old)
      : await type.converge(context, wanted, before, old);
  const after = await machine.look(context, () => type.observe(context, wanted));
  if (after === undefined || after.halfMade) {
    throw new LvmNbdError("IDENTITY_MISMATCH", {
      message: "it was made, but a moment later it was gone again: somebody else removes it",
      host: context.host.name,
      resource: context.resource,
    });
  }
  // Another resource of the same name may have made its own in the meantime: its thing is not ours to report.
  if (after.mark !== undefined) refuseForeign(type, context, after, wanted, old);
  return { ...type.toState(wanted, after), ...told, machineId: machine.id };
}

/** The stored state knows the thing's identity (its UUID, say); the declaration knows where it should be. */
function found(wanted: CommonInputs, old: CommonInputs | undefined): CommonInputs {
  return old === undefined ? wanted : old;
}

/** What exists now after a failed operation, if it is ours and can be seen; its state keeps it from being lost. */
async function leftBehind(
  machine: Machine,
  type: AnyResourceType,
  context: Context,
  wanted: CommonInputs,
  old: CommonState | undefined,
  failure: unknown,
): Promise<CommonState | undefined> {
  if (isLvmNbdError(failure, "FOREIGN_RESOURCE", "IDENTITY_MISMATCH", "INVALID_INPUT", "HOST_CHANGED"))
    return undefined;
  try {
    const seen = await machine.look(
      context,
      async () => (await type.observe(context, found(wanted, old))) ?? type.observe(context, wanted),
    );
    const ours = seen !== undefined && !seen.halfMade && isOurs(type, seen, wanted, old);
    if (isLvmNbdError(failure, "CANCELLED")) context.warn(afterCancel(ours));
    // Kept as what was just declared, an earlier one would pass for it. Its mark lets the next `up` find it.
    if (ours && old === undefined && type.isStale?.(seen, wanted)) return undefined;
    return ours ? { ...type.toState(old ?? wanted, seen), machineId: machine.id } : undefined;
  } catch (error) {
    // The first failure is what the person must see. The owner mark lets the next `up` find what was made.
    context.warn(`what the failed operation left could not be looked at: ${firstLine(error)}`);
    return undefined;
  }
}

/**
 * For a preview: looks at what a create would find, changes nothing, and tells as a warning what it would refuse now, or that it
 * cannot be told. Not as an error: another resource of the same program may put it right before.
 */
export async function foresee(type: AnyResourceType, context: Context, wanted: CommonInputs): Promise<void> {
  try {
    const before = await type.observe(context, wanted);
    if (before !== undefined) refuseForeign(type, context, before, wanted, undefined);
    else await (type.foresee ?? type.suitable)?.(context, wanted);
  } catch (error) {
    if (!isLvmNbdError(error) || isLvmNbdError(error, "CANCELLED")) throw error;
    const known = !isLvmNbdError(error, ...unseen);
    context.warn(
      `${known ? "as its host is now, this would be refused" : "whether this can be made could not be told"}: ${briefly(error)}`,
    );
  }
}

/** Codes of a look that tells nothing of what was looked for. */
const unseen = [
  ...(["HOST_UNKNOWN", "HOST_UNREACHABLE", "HOST_KEY_UNKNOWN", "HOST_KEY_MISMATCH", "AUTH_FAILED"] as const),
  ...(["KEY_UNREADABLE", "SUDO_DENIED", "LINK_LOST", "COMMAND_FAILED", "COMMAND_TIMED_OUT"] as const),
  ...(["OUTPUT_UNREADABLE", "OUTPUT_TOO_LARGE", "LVM_LOCKED"] as const),
];

/**
 * Reads what is at a place, for who asks for it by its id alone. `undefined`: positively not there. `claimant`: who takes it into
 * its state, of which nothing of another's is; `undefined`: somebody who only reads it.
 */
export async function find(
  type: AnyResourceType,
  byId: ById<CommonInputs, CommonObservation>,
  context: Context,
  place: CommonInputs,
  claimant: Claimant | undefined,
): Promise<
  | {
      readonly declared: Readonly<Record<string, unknown>>;
      readonly seen: CommonObservation;
      readonly machineId: string | undefined;
    }
  | undefined
> {
  const machine = new Machine(undefined);
  const seen = await machine.look(context, () => type.observe(context, place));
  if (seen === undefined || seen.halfMade) {
    const marks = (await byId.marksOfOthers?.(context)) ?? [];
    if (marks.length === 0) return undefined;
    throw ofOthers(context, marks.map(ownerOfMark).join(", "), claimant === undefined);
  }
  const { mark } = seen;
  const owner =
    claimant === undefined ? mark : mark === undefined ? place.owner : ownerByMark(mark, claimant);
  if (owner === undefined && mark !== undefined) {
    throw new LvmNbdError("FOREIGN_RESOURCE", {
      message: `${seen.what ?? type.id(place, context.host.name)} belongs to ${ownerOfMark(mark)}`,
      host: context.host.name,
      resource: context.resource,
      advice: "Import it under that name into that stack; nothing of another's is taken over.",
    });
  }
  if (mark === undefined && claimant !== undefined && claimant.organization === undefined)
    throw refusal(context, "INVALID_INPUT", organizationMissing);
  const declared = { ...(await byId.declared(context, seen, place)), owner: owner ?? place.owner };
  if (claimant !== undefined) context.warn(`is imported. ${ofTwo(type.isSuperseded !== undefined)}`);
  const now = byId.ofOwner
    ? await machine.look(context, () => type.observe(context, { ...place, ...declared }))
    : seen;
  return now === undefined ? undefined : { declared, seen: now, machineId: machine.id };
}

/** What lies under its owner's name is there, but not under that of who asks. */
function ofOthers(context: Context, owners: string, readsOnly: boolean): LvmNbdError {
  const what = `what is there is of ${owners}`;
  return readsOnly
    ? refusal(context, "INVALID_INPUT", what, "Read it under the name of the resource that made it.")
    : refusal(
        context,
        "FOREIGN_RESOURCE",
        what,
        "Import it under that name into that stack; nothing of another's is taken over.",
      );
}

/** Observes for a refresh. `undefined`: positively gone, or something that is not ours has taken its place. */
export async function refresh(
  type: AnyResourceType,
  context: Context,
  state: CommonState,
): Promise<CommonState | undefined> {
  const machine = new Machine(state.machineId);
  const seen = await machine.look(
    context,
    async (): Promise<CommonObservation | undefined> => {
      const observed = await type.observe(context, state);
      return observed && type.inspect ? type.inspect(context, state, observed) : observed;
    },
    (it) => it !== undefined && !it.halfMade && type.isSame(it, state),
  );
  if (seen === undefined || (seen.halfMade && isOurs(type, seen, state, state))) {
    context.warn("is gone from the host; `pulumi up` will make it again");
    return undefined;
  }
  if (!isOurs(type, seen, state, state)) {
    context.warn(`was replaced by something of the same name ${ownerPhrase(seen)}; it is left alone`);
    return undefined;
  }
  for (const line of type.drift(state, seen)) context.warn(line);
  return { ...type.toState(state, seen), machineId: machine.id };
}

/** Removes the thing of the state, if it is there and still the one we made. */
export async function remove(type: AnyResourceType, context: Context, state: CommonState): Promise<void> {
  const machine = new Machine(state.machineId);
  try {
    await lookingAgain(context, () => removeOnce(machine, type, context, state));
  } catch (error) {
    if (isLvmNbdError(error, "CANCELLED"))
      context.warn(
        "was cancelled; what is left of it is kept in the state: the next run goes on removing it",
      );
    throw error;
  }
}

async function removeOnce(
  machine: Machine,
  type: AnyResourceType,
  context: Context,
  state: CommonInputs,
): Promise<void> {
  const looking = { ...context, forRemoval: true };
  const look = () => machine.look(looking, () => type.observe(looking, state));
  const seen = await look();
  if (seen === undefined) return;
  if (!isOurs(type, seen, state, state)) {
    context.warn(`what now bears its name is not what was made here ${ownerPhrase(seen)}; it is left alone`);
    return;
  }
  if (type.isSuperseded?.(seen, state)) {
    context.warn("is another resource's by now; it is left alone");
    return;
  }
  await type.remove(context, state, seen);
  const left = await look();
  if (
    left === undefined ||
    left.removed ||
    !isOurs(type, left, state, state) ||
    type.isSuperseded?.(left, state)
  )
    return;
  throw new LvmNbdError("COMMAND_FAILED", {
    message: "it was removed without an error and is still there",
    host: context.host.name,
    resource: context.resource,
  });
}

function isOurs(
  type: AnyResourceType,
  seen: CommonObservation,
  wanted: CommonInputs,
  old: CommonInputs | undefined,
): boolean {
  if (old !== undefined && type.isSame(seen, old)) return true;
  if (seen.mark === undefined) return false;
  return seen.mark === ownerMark(wanted.owner) || (old !== undefined && seen.mark === ownerMark(old.owner));
}

function refuseForeign(
  type: AnyResourceType,
  context: Context,
  seen: CommonObservation,
  wanted: CommonInputs,
  old: CommonInputs | undefined,
): void {
  if (isOurs(type, seen, wanted, old)) return;
  if (wanted.adopt && seen.mark === undefined && seen.adoptable !== false) {
    context.warn("exists without a mark and is taken over (adopt: true)");
    return;
  }
  throw new LvmNbdError("FOREIGN_RESOURCE", {
    message: `${seen.what ?? type.id(wanted, context.host.name)} exists already ${ownerPhrase(seen)}`,
    host: context.host.name,
    resource: context.resource,
    advice:
      seen.mark === undefined
        ? seen.adoptable === false
          ? "Choose another name, or remove it by hand: it is never taken over."
          : "Choose another name, remove it by hand, or set `adopt: true` to take it over."
        : `It belongs to ${ownerOfMark(seen.mark)}: choose another name, or remove it there.`,
  });
}

/** Whose it is, in words that follow "exists already". */
export function ownerPhrase(seen: Pick<CommonObservation, "mark">): string {
  return seen.mark === undefined ? "and carries no owner mark" : `and belongs to ${ownerOfMark(seen.mark)}`;
}
