/**
 * The contract of a component: which resources it is made of follows from what is declared, and from a look at a host. How they are
 * registered is the door's.
 */

import { z } from "zod";
import type { HostArgs } from "../ssh/types.js";
import { contextOn, named } from "./context.js";
import { LvmNbdError } from "./errors.js";
import type { Environment } from "./handlers.js";
import { problemsOf } from "./problems.js";
import type { Context, Described, Problem } from "./resource.js";

type Values = Readonly<Record<string, unknown>>;

/** A resource of a component. */
export interface Part {
  readonly type: string;
  readonly name: string;
  /** Names of the component's inputs that are its own too, as they were declared. */
  readonly handedOn: readonly string[];
  /** Inputs beside them. */
  readonly inputs: Values;
}

/** What a component consists of. */
export interface Composition {
  readonly parts: readonly Part[];
  /** Those of the component that are known. */
  readonly outputs: Values;
  /** What cannot be told yet, for a person to know. */
  readonly unsure?: string;
}

/** The same, of a component that was told what is known. */
export interface Composed extends Composition {
  /** Outputs that are only known later. */
  readonly unknown: readonly string[];
  /** Names of the inputs that the others, and the inputs of the parts, were made of. */
  readonly madeOf: readonly string[];
}

export interface ComponentType<Inputs = Values> extends Described {
  /** Names of the inputs that may be known later only: they are handed on, or left out. All others must be known. */
  readonly handsOn: readonly string[];
  /** Looks only. `host`: how to look at a host of the component; of one that is not known yet, `undefined`. */
  compose(name: string, inputs: Inputs, host: Context | undefined): Promise<Composition>;
}

/** Any component, for code that handles all of them alike. */
// biome-ignore lint/suspicious/noExplicitAny: the type parameter is contravariant; callers go through `composeAs`
export type AnyComponentType = ComponentType<any>;

/** What a component of that name and those inputs consists of. `unknown`: inputs that are known later; they are not in `wanted`. */
export async function composeAs(
  type: AnyComponentType,
  environment: Environment,
  name: string,
  wanted: Values,
  unknown: ReadonlySet<string>,
): Promise<Composed> {
  const resource = `${type.type} ${name}`;
  const known = Object.entries(type.inputs.shape).filter(([key]) => !unknown.has(key));
  const parsed = z.strictObject(Object.fromEntries(known)).safeParse(wanted);
  const problems = [
    ...unexpected(type, unknown),
    ...(parsed.success ? [] : problemsOf(parsed.error.issues, wanted, "this component")),
  ];
  if (!parsed.success || problems.length > 0) {
    const reasons = problems.map(({ property, reason }) => `${property}: ${reason}`.replace(/^: /, ""));
    throw new LvmNbdError("INVALID_INPUT", { message: reasons.join("; "), resource });
  }
  try {
    const host = parsed.data.host as HostArgs | undefined;
    const context = host === undefined ? undefined : await contextOn(environment, host, resource);
    const composition = await type.compose(name, parsed.data, context);
    const later = Object.keys(type.outputs.shape).filter((key) => !(key in composition.outputs));
    const madeOf = Object.keys(wanted).filter((key) => !type.handsOn.includes(key));
    return { ...composition, unknown: later, madeOf };
  } catch (error) {
    throw named(error, resource);
  }
}

/** Inputs that are known too late. */
function unexpected({ inputs, handsOn }: AnyComponentType, unknown: ReadonlySet<string>): Problem[] {
  return [...unknown]
    .filter((property) => !handsOn.includes(property))
    .map((property) => ({
      property,
      reason:
        property in inputs.shape
          ? "must be known to the program, at a preview too"
          : "is no property of this component",
    }));
}
