/** What a program asks of a host without declaring anything: plain values in, plain values out; nothing is changed. */
import { z } from "zod";
import type { HostArgs } from "../ssh/types.js";
import { contextOn, named } from "./context.js";
import { defined, type Environment, hostProblems, printableIn } from "./handlers.js";
import { problemsOf } from "./problems.js";
import type { Context, Problem } from "./resource.js";

type Values = Readonly<Record<string, unknown>>;

/** A function of the package. */
export interface FunctionType<Inputs extends { readonly host: HostArgs } = { readonly host: HostArgs }> {
  readonly name: string;
  /** One sentence on what it tells. */
  readonly description: string;
  /** Arguments with which it could be asked. */
  readonly example: Values;
  readonly inputs: z.ZodObject;
  readonly outputs: z.ZodObject;
  /** Looks, changes nothing. */
  ask(context: Context, inputs: Inputs): Promise<Values>;
}

/** Any function, for code that handles all of them alike. */
// biome-ignore lint/suspicious/noExplicitAny: the type parameter is contravariant; the values are parsed before
export type AnyFunctionType = FunctionType<any>;

/** What it tells, or why it cannot be asked so. */
export type Answer =
  | { readonly values: Values; readonly problems?: never }
  | { readonly problems: readonly Problem[] };

/** Asks a function. Raises what its look at the host raises. */
export async function askFunction(
  type: AnyFunctionType,
  args: Values,
  environment: Environment,
): Promise<Answer> {
  const parsed = z.strictObject(type.inputs.shape).safeParse(args);
  if (!parsed.success) return { problems: problemsOf(parsed.error.issues, args, "this function") };
  const inputs = parsed.data as { readonly host: HostArgs };
  const problems = await hostProblems(inputs.host, environment);
  if (problems.length > 0) return { problems };
  const context = await contextOn(environment, inputs.host, type.name);
  try {
    return { values: printableIn(defined(await type.ask(context, inputs))) as Values };
  } catch (error) {
    throw named(error, type.name);
  }
}
