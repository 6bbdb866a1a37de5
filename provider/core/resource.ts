/**
 * The contract of a resource. A file in `provider/resources/` says what a thing is, how to look at it and
 * how to bring it to its declared form; when that is done, and what is refused, is the reconciler's.
 */
import type { z } from "zod";
import type { Host, HostArgs, NamedHosts } from "../ssh/types.js";
import type { LvmNbdError } from "./errors.js";
import type { Example } from "./example.js";

/** What every resource declares beside its own properties. */
export interface CommonInputs {
  readonly host: HostArgs;
  /** Organisation, project, stack and resource that own the thing; filled in by the program's side. */
  readonly owner: string;
  readonly adopt: boolean;
}

/** What the state of every resource may hold beside. */
export interface CommonState extends CommonInputs {
  /** machine-id(5) of the host; a state of an earlier version has none, until it is read again. */
  readonly machineId?: string | undefined;
}

/** What every observation tells beside its own facts. */
export interface CommonObservation {
  /** The owner mark on the thing (`ownerMark`); `undefined` if it carries none. */
  readonly mark: string | undefined;
  /** True for what an interrupted create of ours left that is not yet the thing: it counts as not there. */
  readonly halfMade?: boolean;
  /** True for what only the state tells of any more, and an update can bring back: nothing of it is left to be removed, though there may be something to say. */
  readonly removed?: boolean;
  /** What of the resource the mark is on, where it is several things. */
  readonly what?: string | undefined;
  /** False for what `adopt` does not take over. */
  readonly adoptable?: boolean;
}

/** Where an operation runs and how it reports. */
export interface Context {
  readonly host: Host;
  /** The hosts that are configured. Default: none. */
  readonly namedHosts?: NamedHosts | undefined;
  /** Type and name, e.g. `LvSnapshot vm1`, for messages. */
  readonly resource: string;
  readonly signal: AbortSignal;
  /** How old the answer of a look may be that was given to another resource, for what only tells how the host is. Default: 0. */
  readonly recentSeconds?: number;
  /** True where a thing is looked at only to be removed: how well it works need not be found out. */
  readonly forRemoval?: boolean;
  /** A short line on what is being done now. */
  progress(message: string): void;
  /** Something a person should know though nothing failed. */
  warn(message: string): void;
  /** Another host that the resource names beside its own. */
  open(host: HostArgs): Promise<Host>;
}

/** One property that is not as declared, and what `pulumi up` will do about it. */
export interface Change {
  readonly property: string;
  /** `update`: in place; `replace`: the thing is made anew; `connection`: only how to reach the host. */
  readonly effect: "update" | "replace" | "connection";
}

/** An argument that cannot be right. */
export interface Problem {
  readonly property: string;
  /** What is wrong and what would be right, as a sentence that can follow the property's name. */
  readonly reason: string;
}

/**
 * The host was no longer as it had been seen: somebody came in between. Raised by a resource that has changed
 * nothing; the reconciler looks again and goes on from there. `failure` is told when that does not help.
 */
export class ChangedMeanwhile extends Error {
  constructor(readonly failure: LvmNbdError) {
    super(failure.message);
    this.name = "ChangedMeanwhile";
  }
}

/** How a thing is found by its id alone, as an import does, and declared so that nothing is to change. */
export interface ById<Inputs, Observed> {
  /** The form of the id behind the host, for messages, e.g. `VOLUMEGROUP/NAME`. */
  readonly form: string;
  /** What that part of an id tells; `undefined` if it is not of the form. */
  place(path: string): Readonly<Record<string, unknown>> | undefined;
  /** Declared properties as they are seen at that place. Looks only. Raises INVALID_INPUT for what no look can tell. */
  declared(context: Context, seen: Observed, place: Inputs): Promise<Partial<Inputs>>;
  /** True if it is the owner's name that it lies under, and what is seen of it depends on the declaration. */
  readonly ofOwner?: boolean;
  /** Where it lies under its owner's name and is not there: the owner marks of those that are. Looks only. */
  marksOfOthers?(context: Context): Promise<readonly string[]>;
}

/** Why a thing is not found by its id. */
export interface NotById {
  readonly reason: string;
  /** What to do. */
  readonly advice: string;
}

/** Outputs that only the work itself can tell, and no look at the thing; they stay in the state until the next work. */
// biome-ignore lint/suspicious/noConfusingVoidType: most have nothing to tell
export type Told<State> = Partial<State> | void;

/** What a program sees of a type: documentation and schema.json are made from it. */
export interface Described {
  /** Name of the type, e.g. `LvSnapshot`. */
  readonly type: string;
  /** One sentence on what it is. */
  readonly description: string;
  /** A program that uses it. */
  readonly example: Example;
  /** Declared properties: types, defaults, checks of one property and documentation. */
  readonly inputs: z.ZodObject;
  /** What is added to them in the state, beside what all share (`outputsOf`). */
  readonly outputs: z.ZodObject;
}

/** What a resource consists of. `Inputs` are as declared with defaults filled in, `State` is what Pulumi keeps. */
export interface ResourceType<
  Inputs extends CommonInputs = CommonInputs,
  State extends CommonInputs = Inputs,
  Observed extends CommonObservation = CommonObservation,
> extends Described {
  /** The input that takes the resource's name when it is not given, if there is one. */
  readonly nameInput?: keyof Inputs & string;

  /** Checks across properties. Properties that are not known yet (preview) are missing from `inputs`. `named`: the configured hosts. */
  validate(
    inputs: Partial<Inputs>,
    old: Partial<Inputs> | undefined,
    unknown: ReadonlySet<string>,
    named?: NamedHosts,
  ): Problem[];
  /** Outputs that follow from the inputs alone, so that a preview knows them; `{}` while those are not known. */
  predict(
    inputs: Partial<Inputs>,
    unknown: ReadonlySet<string>,
    named?: NamedHosts,
  ): Readonly<Record<string, unknown>>;
  /** Enough to find the thing again: `HOST/...`. */
  id(inputs: Inputs, hostName: string): string;
  /** Looks, changes nothing. `undefined` means positively absent; what cannot be told is an error. */
  observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined>;
  /** True if this is the very thing the state tells of (by UUID, say), whatever marks it carries now. */
  isSame(observed: Observed, state: State): boolean;
  /** The state: what is declared, overridden by what was seen to differ, and the outputs. */
  toState(declared: Inputs | State, observed: Observed): State;
  /** What differs between the state and the declaration, `host` aside. `unknown` are properties only known later. */
  diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[];
  /** Refuses, with INVALID_INPUT, a declaration for another host that would lose what is kept. */
  refuseMove?(state: State, wanted: Partial<Inputs>): void;
  /** True if, were they on one host, old and new could not exist beside one another, so that the old is removed first. */
  collides(state: State, wanted: Partial<Inputs>): boolean;
  /** Refuses, by looking only, what `create` would refuse: asked before an old thing is removed for a new one. */
  suitable?(context: Context, wanted: Inputs): Promise<void>;
  /**
   * Makes the absent thing. After an error it must leave nothing half made that a second call would trip over. `old`: the state of an
   * update that found it gone.
   */
  create(context: Context, wanted: Inputs, old?: State): Promise<Told<State>>;
  /** For a refresh, what `observe` is too quick to see. Looks only. */
  inspect?(context: Context, state: State, observed: Observed): Promise<Observed>;
  /**
   * Brings an existing thing of ours to its declared form; does nothing to what is right already. `old`: the state, if
   * there is one.
   */
  converge(context: Context, wanted: Inputs, observed: Observed, old?: State): Promise<Told<State>>;
  /** For a preview: refuses, by looking only, what `create` would refuse of a host as it is now. Default: `suitable`. */
  foresee?(context: Context, wanted: Inputs): Promise<void>;
  /** Outputs that an update in place of these properties leaves as they are, so that a preview knows them. */
  lasting?(state: State, changed: ReadonlySet<string>): readonly (keyof State & string)[];
  /** Reading by the id alone. */
  readonly byId: ById<Inputs, Observed> | NotById;
  /** True if the thing was made for another declaration than this one, and is to be made anew for it. */
  isStale?(observed: Observed, wanted: Inputs): boolean;
  /** True if the thing has become another resource's since the state was saved: it is not removed with this one. */
  isSuperseded?(observed: Observed, state: State): boolean;
  /** Removes the thing, which was just observed and found ours. Refuses while it is in use. */
  remove(context: Context, state: State, observed: Observed): Promise<void>;
  /** In words, what a refresh found changed behind our back; for the log. */
  drift(state: State, observed: Observed): string[];
}

/** Any resource type, for code that handles all of them alike. */
// biome-ignore lint/suspicious/noExplicitAny: the type parameters are contravariant; callers go through the reconciler
export type AnyResourceType = ResourceType<any, any, any>;
