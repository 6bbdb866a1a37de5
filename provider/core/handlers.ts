/**
 * What a door of Pulumi asks of a resource: check, diff, create, read, update, delete. Plain values in, plain
 * values out; the handlers know neither door.
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import {
  hostAddress,
  hostName,
  hostOfName,
  hostRoute,
  isConfigured,
  isKnownElsewhere,
  validateHostArgs,
} from "../ssh/config.js";
import type { Host, HostArgs, NamedHosts } from "../ssh/types.js";
import { contextOn, named } from "./context.js";
import { isLvmNbdError, LvmNbdError, printable } from "./errors.js";
import { outputsOf } from "./outputs.js";
import { type Claimant, organizationMissing, ownerOf } from "./owner.js";
import { PartialFailure } from "./partialFailure.js";
import { problemsOf } from "./problems.js";
import { converge, find, foresee, PartialSuccess, refresh, remove } from "./reconciler.js";
import type { AnyResourceType, Change, CommonInputs, CommonState, Context, Problem } from "./resource.js";

type Values = Readonly<Record<string, unknown>>;

/** For a refresh and a preview, which change nothing: those of many resources are one picture of a host. */
const recentSeconds = 20;

/** What the handlers need of the world. */
export interface Environment {
  openHost(host: HostArgs): Promise<Host>;
  /** The hosts that are configured, as `openHost` knows them. Raises INVALID_INPUT. Default: none. */
  readonly namedHosts?: () => NamedHosts;
  /** Shows what is being done now. */
  progress(message: string): void;
  /** Shows what a person should know. */
  warn(message: string): void;
  readonly signal: AbortSignal;
}

export interface CheckResult {
  /** The inputs with defaults; what is unknown is left out. */
  readonly inputs: Values;
  /** Outputs that follow from them. */
  readonly predicted: Values;
  readonly problems: readonly Problem[];
}

export interface DiffResult {
  readonly changes: readonly Change[];
  readonly deleteBeforeReplace: boolean;
}

export interface PreviewResult {
  /** The state as far as it is known. */
  readonly state: Values;
  /** Outputs that are only known later. */
  readonly unknown: readonly string[];
}

/** What an id alone leads to. */
export interface Found {
  readonly id: string;
  /** What to declare, those of their default left out. */
  readonly inputs: Values;
  readonly state: Values;
}

/** Who reads by an id alone. */
export interface Finder extends Claimant {
  /** How to reach the host, where the id does not tell it all. */
  readonly host: unknown;
  /** Whether it is only read, whoever owns it, and not taken into the state to be managed. */
  readonly readsOnly: boolean;
}

/** The handlers of one resource type. */
export interface Handlers {
  readonly nameInput: string | undefined;
  /** The id of what the state tells of, as it is now. */
  id(state: Values): string;
  /** `unknown`: properties whose values are only known later; they are in neither `old` nor `wanted`. */
  check(old: Values | undefined, wanted: Values, unknown: ReadonlySet<string>): Promise<CheckResult>;
  diff(state: Values, wanted: Values, unknown: ReadonlySet<string>): Promise<DiffResult>;
  /** What a create, or an update of `state`, would make. Looks at the host for a create of which all is known; changes nothing. */
  preview(state: Values | undefined, wanted: Values, unknown: ReadonlySet<string>): Promise<PreviewResult>;
  create(wanted: Values): Promise<{ id: string; state: Values }>;
  /** `undefined`: positively gone. */
  read(state: Values): Promise<Values | undefined>;
  /** Reads by the id alone. `undefined`: positively not there. */
  find(id: string, finder: Finder): Promise<Found | undefined>;
  update(state: Values, wanted: Values): Promise<Values>;
  remove(state: Values): Promise<void>;
}

export function createHandlers(type: AnyResourceType, environment: Environment): Handlers {
  const { state: stateShape, outputs: outputsShape, place: placeShape, known: knownShape } = shapesOf(type);

  const attempt = async <T>(
    values: CommonInputs,
    work: (context: Context) => Promise<T>,
    recent = 0,
  ): Promise<T> => {
    const opened = await contextOn(environment, values.host, label(type, values), recent);
    try {
      return await work(opened);
    } catch (error) {
      if (!(error instanceof PartialSuccess)) throw named(error, opened.resource);
      const id = type.id(error.state, hostName(error.state.host));
      const state = harmless(defined(error.state), values);
      throw new PartialFailure(id, state, named(error.cause, opened.resource));
    }
  };

  const parse = (values: Values, shape: z.ZodObject): CommonState => {
    const own = picked(values, shape.shape);
    const parsed = shape.safeParse(own);
    if (parsed.success) return parsed.data as unknown as CommonState;
    const reasons = problemsOf(parsed.error.issues, own).map(
      ({ property, reason }) => `${property}: ${reason}`,
    );
    throw new LvmNbdError("INVALID_INPUT", {
      message: `the ${type.type} cannot be read: ${reasons.join("; ")}`,
    });
  };

  const changed = async (oldValues: Values, wanted: Values, unknown: ReadonlySet<string>) => {
    const state = parse(oldValues, stateShape);
    const changes = [...type.diff(state, wanted, unknown)];
    if (unknown.has("host")) changes.push({ property: "host", effect: "replace" });
    else if (!isDeepStrictEqual(wanted.host, oldValues.host)) {
      const host = wanted.host as HostArgs;
      const configured = environment.namedHosts?.();
      const sameHost = await isSameHost(state.host, host, configured);
      if (!sameHost) await refuseRenamed(state.host, host, configured);
      if (!sameHost) type.refuseMove?.(state, wanted);
      changes.push({ property: "host", effect: sameHost ? "connection" : "replace" });
    }
    if (wanted.adopt !== undefined && wanted.adopt !== state.adopt)
      changes.push({ property: "adopt", effect: "connection" });
    return { state, changes };
  };

  /** Outputs that an update does not change. */
  const staying = async (
    oldValues: Values | undefined,
    wanted: Values,
    unknown: ReadonlySet<string>,
  ): Promise<Values> => {
    if (oldValues === undefined) return {};
    const { state, changes } = await changed(oldValues, wanted, unknown);
    const outputs = picked(state, outputsShape);
    if (areOfConnection(changes)) return outputs;
    const lasting = new Set<string>(type.lasting?.(state, new Set(changes.map(({ property }) => property))));
    lasting.add("machineId");
    return Object.fromEntries(Object.entries(outputs).filter(([key]) => lasting.has(key)));
  };

  /** Inputs that are known as far as an id tells them. */
  const placed = (values: Values): CommonInputs => parse(values, placeShape);

  return {
    nameInput: type.nameInput,

    id(values) {
      const state = parse(values, stateShape);
      return type.id(state, hostName(state.host));
    },

    async check(old, wanted, unknown) {
      const parsed = knownShape(unknown).safeParse(wanted);
      if (!parsed.success)
        return { inputs: wanted, predicted: {}, problems: problemsOf(parsed.error.issues, wanted) };
      const inputs = defined(parsed.data);
      const { host } = inputs as unknown as CommonInputs;
      const ofHost = unknown.has("host") ? [] : await hostProblems(host, environment);
      // A wrong configuration is a problem of the host, and told as one.
      const named = unknown.has("host") || ofHost.length > 0 ? undefined : environment.namedHosts?.();
      const problems = [...type.validate(inputs, old, unknown, named), ...ofHost];
      return { inputs, predicted: type.predict(inputs, unknown, named), problems };
    },

    async diff(oldValues, wanted, unknown) {
      const { state, changes } = await changed(oldValues, wanted, unknown);
      // Also for another host: if it is the same machine under another name, a create first would take over what
      // is there, and the delete after it would remove just that.
      const deleteBeforeReplace = type.collides(state, wanted);
      const { suitable } = type;
      const removesFirst = deleteBeforeReplace && changes.some(({ effect }) => effect === "replace");
      if (suitable !== undefined && removesFirst && unknown.size === 0) {
        // The old is removed before the new is tried: what cannot succeed must fail here.
        const inputs = parse(wanted, type.inputs);
        await attempt(inputs, (opened) => suitable(opened, inputs));
      }
      return { changes, deleteBeforeReplace };
    },

    async preview(oldValues, wanted, unknown) {
      const predicted = type.predict(wanted, unknown, environment.namedHosts?.());
      const known = { ...(await staying(oldValues, wanted, unknown)), ...wanted, ...predicted };
      const outputs = Object.keys(outputsShape).filter((key) => !(key in known) && !unknown.has(key));
      if (oldValues === undefined && unknown.size === 0) {
        const inputs = parse(wanted, type.inputs);
        await attempt(inputs, (opened) => foresee(type, opened, inputs), recentSeconds);
      }
      return { state: known, unknown: outputs };
    },

    async create(values) {
      const wanted = parse(values, type.inputs);
      const state = await attempt(wanted, (opened) => converge(type, opened, wanted, undefined));
      return { id: type.id(wanted, hostName(wanted.host)), state: harmless(defined(state), wanted) };
    },

    async read(values) {
      const state = parse(values, stateShape);
      const seen = await attempt(state, (opened) => refresh(type, opened, state), recentSeconds);
      return seen === undefined ? undefined : harmless(defined(seen), state);
    },

    async find(id, finder) {
      const { byId } = type;
      if ("reason" in byId) {
        const message = `a ${type.type} cannot be read by its id alone: ${byId.reason}`;
        throw new LvmNbdError("INVALID_INPUT", { message, property: "id", advice: byId.advice });
      }
      const at = id.indexOf("/");
      const place = at < 1 ? undefined : byId.place(id.slice(at + 1));
      if (place === undefined) {
        const message = `"${id}" is no id of a ${type.type}: that is HOST/${byId.form}`;
        throw new LvmNbdError("INVALID_INPUT", { message, property: "id" });
      }
      if (byId.ofOwner && finder.organization === undefined)
        throw new LvmNbdError("INVALID_INPUT", { message: organizationMissing, property: "id" });
      const { organization = "", project, stack, name } = finder;
      const owner = ownerOf(organization, project, stack, name);
      const host = finder.host ?? hostOfName(id.slice(0, at));
      const looked = placed({ host, owner, ...place });
      return attempt(looked, async (opened) => {
        const found = await find(type, byId, opened, looked, finder.readsOnly ? undefined : finder);
        if (found === undefined) return undefined;
        const wanted = parse(defined({ host, ...found.declared }), type.inputs);
        const { machineId } = found;
        const state = type.toState(wanted, found.seen);
        for (const line of type.drift(state, found.seen)) opened.warn(line);
        const inputs = defined(declaredBeside(placeShape.parse({}), wanted));
        return {
          id: type.id(wanted, hostName(wanted.host)),
          inputs,
          state: harmless(defined({ ...state, machineId }), wanted),
        };
      });
    },

    async update(oldValues, values) {
      const state = parse(oldValues, stateShape);
      const wanted = parse(values, type.inputs);
      const { changes } = await this.diff(oldValues, values, new Set());
      if (areOfConnection(changes)) {
        // What was seen stays; what was declared and no longer is does not.
        return defined({ ...picked(state, outputsShape), ...wanted });
      }
      const now = await attempt(wanted, (opened) => converge(type, opened, wanted, state));
      return harmless(defined(now), wanted);
    },

    async remove(values) {
      const state = parse(values, stateShape);
      await attempt(state, (opened) => remove(type, opened, state));
    },
  };
}

/** The objects that values of a type are read with. Each is compiled at its first use, which costs more than many uses. */
interface Shapes {
  readonly state: z.ZodObject;
  /** What of it are no inputs. */
  readonly outputs: z.ZodObject["shape"];
  /** Inputs of which some are not known. */
  readonly place: z.ZodObject;
  /** Inputs without those. */
  known(unknown: ReadonlySet<string>): z.ZodObject;
}

const shapes = new WeakMap<AnyResourceType, Shapes>();

function shapesOf(type: AnyResourceType): Shapes {
  let own = shapes.get(type);
  if (own === undefined) {
    own = makeShapes(type);
    shapes.set(type, own);
  }
  return own;
}

function makeShapes(type: AnyResourceType): Shapes {
  const { inputs } = type;
  const outputs = outputsOf(type).shape;
  const known = new Map<string, z.ZodObject>();
  return {
    state: z.object({ ...inputs.shape, ...outputs }),
    outputs,
    place: inputs.partial(),
    known(unknown) {
      const entries = Object.entries(inputs.shape).filter(([key]) => !unknown.has(key));
      const name = entries.map(([key]) => key).join();
      const shape = known.get(name) ?? z.strictObject(Object.fromEntries(entries));
      known.set(name, shape);
      return shape;
    },
  };
}

/** Only Pulumi's side is concerned: nothing runs. */
function areOfConnection(changes: readonly Change[]): boolean {
  return changes.length > 0 && changes.every(({ effect }) => effect === "connection");
}

/** Why a host cannot be right, as far as that can be told without connecting. */
export async function hostProblems(
  host: HostArgs,
  { namedHosts }: Pick<Environment, "namedHosts">,
): Promise<Problem[]> {
  try {
    await validateHostArgs(host, namedHosts?.());
    return [];
  } catch (error) {
    if (!isLvmNbdError(error)) throw error;
    return [{ property: error.details.property ?? "host", reason: error.message }];
  }
}

async function isSameHost(old: HostArgs, wanted: HostArgs, named: NamedHosts = new Map()): Promise<boolean> {
  const configured = [old, wanted].filter((host) => isConfigured(host, named));
  // A configured name is no address, though it may look like one.
  if (configured.length === 0 && hostName(old) === hostName(wanted)) return true;
  // Two names stand for two machines more often than for two ways to one.
  if (configured.length === 2)
    return isDeepStrictEqual(await hostRoute(old, named), await hostRoute(wanted, named));
  return (await hostAddress(old, named)) === (await hostAddress(wanted, named));
}

/** Refuses what may be the same machine under a new name: its things would be removed there, to be made anew. */
async function refuseRenamed(old: HostArgs, wanted: HostArgs, named: NamedHosts = new Map()): Promise<void> {
  if (typeof old !== "string" || isConfigured(old, named) || !isConfigured(wanted, named)) return;
  if (await isKnownElsewhere(old)) return;
  throw new LvmNbdError("INVALID_INPUT", {
    message: `host: ${JSON.stringify(old)} of the state is configured no more, so that it may be ${JSON.stringify(wanted)} by now: keep both names for one \`pulumi up\``,
    property: "host",
    advice:
      "Nothing was touched. Set both in `lvm-nbd:hosts` (or the old one as an alias of the SSH configuration), each as its machine is reached, " +
      "and run `pulumi up`: of one machine nothing is made anew. Then the old one can go.",
  });
}

function label(type: AnyResourceType, values: CommonInputs): string {
  return `${type.type} ${values.owner.split("/").slice(3).join("/") || values.owner}`;
}

function picked(values: object, shape: object): Values {
  return Object.fromEntries(Object.entries(values).filter(([key]) => key in shape));
}

/** What has another value than its default. */
function declaredBeside(defaults: object, values: object): Values {
  return Object.fromEntries(
    Object.entries(values).filter(([key, value]) => !isDeepStrictEqual(value, Reflect.get(defaults, key))),
  );
}

/** Pulumi's states hold no `undefined`. */
export function defined(values: object): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(values)
      .filter(([, value]) => value !== undefined)
      .map(([key, value]) => [key, isPlainObject(value) ? defined(value) : value]),
  );
}

/** The state with what a host told made harmless for the terminal that Pulumi shows it on. `declared`: whose values stay as they are. */
function harmless(state: Values, declared: object): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(state).map(([key, value]) => [
      key,
      isDeepStrictEqual(value, Reflect.get(declared, key)) ? value : printableIn(value),
    ]),
  );
}

/** A value with all texts in it as they can be shown on a terminal. */
export function printableIn(value: unknown): unknown {
  if (typeof value === "string") return printable(value);
  if (Array.isArray(value)) return value.map(printableIn);
  if (!isPlainObject(value)) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, inner]) => [printable(key), printableIn(inner)]),
  );
}

function isPlainObject(value: unknown): value is object {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
