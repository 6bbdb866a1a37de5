/**
 * What a door of Pulumi asks of a resource: check, diff, create, read, update, delete. Plain values in, plain
 * values out; the handlers know neither door.
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { hostAddress, hostName, validateHostArgs } from "../ssh/config.js";
import type { Host, HostArgs } from "../ssh/types.js";
import { isLvmNbdError, LvmNbdError, printable } from "./errors.js";
import { converge, PartialSuccess, refresh, remove } from "./reconciler.js";
import type { AnyResourceType, Change, CommonInputs, Context, Problem } from "./resource.js";

type Values = Readonly<Record<string, unknown>>;

/** What the handlers need of the world. */
export interface Environment {
  openHost(host: HostArgs): Promise<Host>;
  /** Shows what is being done now. */
  progress(message: string): void;
  /** Shows what a person should know. */
  warn(message: string): void;
  readonly signal: AbortSignal;
}

export interface CheckResult {
  /** The inputs with defaults; what is unknown is left out. */
  readonly inputs: Values;
  readonly problems: readonly Problem[];
}

export interface DiffResult {
  readonly changes: readonly Change[];
  readonly deleteBeforeReplace: boolean;
}

/** The handlers of one resource type. */
export interface Handlers {
  /** `unknown`: properties whose values are only known later; they are in neither `old` nor `wanted`. */
  check(old: Values | undefined, wanted: Values, unknown: ReadonlySet<string>): Promise<CheckResult>;
  diff(state: Values, wanted: Values, unknown: ReadonlySet<string>): Promise<DiffResult>;
  create(wanted: Values): Promise<{ id: string; state: Values }>;
  /** `undefined`: positively gone. */
  read(state: Values): Promise<Values | undefined>;
  update(state: Values, wanted: Values): Promise<Values>;
  remove(state: Values): Promise<void>;
}

/** An operation that failed after it made something. Pulumi keeps `state`; the next `up` goes on from it. */
export class PartialFailure extends Error {
  constructor(
    readonly id: string,
    readonly state: Values,
    override readonly cause: unknown,
  ) {
    super(cause instanceof Error ? cause.message : String(cause));
    this.name = "PartialFailure";
  }
}

export function createHandlers(type: AnyResourceType, environment: Environment): Handlers {
  const stateShape = z.object({ ...type.inputs.shape, ...type.outputs.shape });

  const context = async (values: CommonInputs): Promise<Context> => {
    const resource = label(type, values);
    const host = await openHost(values.host, resource);
    return {
      host,
      resource,
      signal: environment.signal,
      // A message may hold what a host wrote, e.g. the owner named in a tag.
      progress: (message) => environment.progress(printable(`${resource} on ${host.name}: ${message}`)),
      warn: (message) => environment.warn(printable(`${resource} on ${host.name}: ${message}`)),
      open: (other) => openHost(other, resource),
    };
  };

  const openHost = async (host: HostArgs, resource: string): Promise<Host> => {
    try {
      return await environment.openHost(host);
    } catch (error) {
      throw named(error, resource);
    }
  };

  const attempt = async <T>(values: CommonInputs, work: (context: Context) => Promise<T>): Promise<T> => {
    const opened = await context(values);
    try {
      return await work(opened);
    } catch (error) {
      if (!(error instanceof PartialSuccess)) throw named(error, opened.resource);
      const id = type.id(error.state, hostName(error.state.host));
      const state = harmless(defined(error.state), values);
      throw new PartialFailure(id, state, named(error.cause, opened.resource));
    }
  };

  const parse = (values: Values, shape: z.ZodObject): CommonInputs => {
    const own = picked(values, shape.shape);
    const parsed = shape.safeParse(own);
    if (parsed.success) return parsed.data as unknown as CommonInputs;
    const reasons = problemsOf(parsed.error.issues, own).map(
      ({ property, reason }) => `${property}: ${reason}`,
    );
    throw new LvmNbdError("INVALID_INPUT", {
      message: `the ${type.type} cannot be read: ${reasons.join("; ")}`,
    });
  };

  return {
    async check(old, wanted, unknown) {
      const shape = Object.fromEntries(
        Object.entries(type.inputs.shape).filter(([key]) => !unknown.has(key)),
      );
      const parsed = z.strictObject(shape).safeParse(wanted);
      if (!parsed.success) return { inputs: wanted, problems: problemsOf(parsed.error.issues, wanted) };
      const inputs = defined(parsed.data);
      const problems = [...type.validate(inputs, old, unknown)];
      if (!unknown.has("host"))
        problems.push(...(await hostProblems((inputs as unknown as CommonInputs).host)));
      // Pulumi takes the inputs for the outputs of a preview: what can be known of them already is put there.
      return { inputs: { ...inputs, ...type.predict(inputs, unknown) }, problems };
    },

    async diff(oldValues, wanted, unknown) {
      const state = parse(oldValues, stateShape);
      const changes = [...type.diff(state, wanted, unknown)];
      if (unknown.has("host")) changes.push({ property: "host", effect: "replace" });
      else if (!isDeepStrictEqual(wanted.host, oldValues.host)) {
        const sameHost = await isSameHost(state.host, wanted.host as HostArgs);
        if (!sameHost) type.refuseMove?.(state, wanted);
        changes.push({ property: "host", effect: sameHost ? "connection" : "replace" });
      }
      if (wanted.adopt !== undefined && wanted.adopt !== state.adopt)
        changes.push({ property: "adopt", effect: "connection" });
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

    async create(values) {
      const wanted = parse(values, type.inputs);
      const state = await attempt(wanted, (opened) => converge(type, opened, wanted, undefined));
      return { id: type.id(wanted, hostName(wanted.host)), state: harmless(defined(state), wanted) };
    },

    async read(values) {
      const state = parse(values, stateShape);
      const seen = await attempt(state, (opened) => refresh(type, opened, state));
      return seen === undefined ? undefined : harmless(defined(seen), state);
    },

    async update(oldValues, values) {
      const state = parse(oldValues, stateShape);
      const wanted = parse(values, type.inputs);
      const { changes } = await this.diff(oldValues, values, new Set());
      if (changes.length > 0 && changes.every(({ effect }) => effect === "connection")) {
        // What was seen stays; what was declared and no longer is does not.
        return defined({ ...picked(state, type.outputs.shape), ...wanted });
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

async function hostProblems(host: HostArgs): Promise<Problem[]> {
  try {
    await validateHostArgs(host);
    return [];
  } catch (error) {
    if (!isLvmNbdError(error)) throw error;
    return [{ property: error.details.property ?? "host", reason: error.message }];
  }
}

async function isSameHost(old: HostArgs, wanted: HostArgs): Promise<boolean> {
  return hostName(old) === hostName(wanted) || (await hostAddress(old)) === (await hostAddress(wanted));
}

function label(type: AnyResourceType, values: CommonInputs): string {
  return `${type.type} ${values.owner.split("/").slice(3).join("/") || values.owner}`;
}

function named(error: unknown, resource: string): unknown {
  return isLvmNbdError(error) ? error.with({ resource }) : error;
}

function picked(values: object, shape: object): Values {
  return Object.fromEntries(Object.entries(values).filter(([key]) => key in shape));
}

/** Pulumi's states hold no `undefined`. */
function defined(values: object): Record<string, unknown> {
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

function printableIn(value: unknown): unknown {
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

/** zod's issues as problems of properties. `values` are what was checked: what is not there is missing, not wrong. */
function problemsOf(
  issues: readonly z.core.$ZodIssue[],
  values: Values,
  base: readonly PropertyKey[] = [],
): Problem[] {
  return issues.flatMap((issue): Problem[] => {
    const path = [...base, ...issue.path];
    const property = path.join(".");
    if (issue.code === "unrecognized_keys") {
      return issue.keys.map((key) => ({
        property: [...path, key].join("."),
        reason: "is no property of this resource",
      }));
    }
    if (path.length > 0 && valueAt(values, path) === undefined) return [{ property, reason: "is required" }];
    if (issue.code === "invalid_union") {
      // Of the alternatives, the one whose type fits tells what is wrong.
      const fitting = issue.errors.find(fits);
      if (fitting !== undefined) return problemsOf(fitting, values, path);
      return [{ property, reason: `must be ${[...new Set(issue.errors.flatMap(typesOf))].join(" or ")}` }];
    }
    return [{ property, reason: issue.message }];
  });
}

/** True for the issues of an alternative that has the value's type, whatever is wrong inside. */
function fits(issues: readonly z.core.$ZodIssue[]): boolean {
  return issues.every(
    (issue) =>
      issue.path.length > 0 ||
      (issue.code === "invalid_union" ? issue.errors.some(fits) : issue.code !== "invalid_type"),
  );
}

function typesOf(issues: readonly z.core.$ZodIssue[]): string[] {
  return issues.flatMap((issue) => {
    if (issue.code === "invalid_union") return issue.errors.flatMap(typesOf);
    return issue.code === "invalid_type" ? [issue.expected] : [];
  });
}

function valueAt(values: unknown, path: readonly PropertyKey[]): unknown {
  return path.reduce<unknown>(
    (value, key) => (typeof value === "object" && value !== null ? Reflect.get(value, key) : undefined),
    values,
  );
}
