/**
 * The handlers as Pulumi's dynamic provider calls them. Facts of that door: `check` and `diff` get the string
 * `unknownValue` for what is not known yet; every bag of values carries `__provider`, which must come back;
 * a blank id from `read` removes the resource; an error with `id`, `properties` and `reasons` is a partial
 * success.
 */
import type * as pulumi from "@pulumi/pulumi";
import { isLvmNbdError } from "../core/errors.js";
import type { Handlers } from "../core/handlers.js";
import { keptInstead } from "../core/owner.js";
import { PartialFailure } from "../core/partialFailure.js";
import { unknownProperties, withoutProperties } from "./unknowns.js";

type Bag = Record<string, unknown>;

/** What Pulumi's dynamic provider asks of one. */
export type DynamicProvider = Required<Omit<pulumi.dynamic.ResourceProvider, "configure">>;

const providerKey = "__provider";

/** `warn`: shows what a person should know. */
export function toDynamicProvider(handlers: Handlers, warn: (message: string) => void): DynamicProvider {
  /** The ids of what this run of Pulumi made, by owner. */
  const made = new Map<unknown, string>();
  return {
    async check(olds: Bag, news: Bag) {
      const unknown = unknownProperties(news);
      const old = Object.keys(olds).length === 0 ? undefined : known(olds, unknown);
      const { inputs, predicted, problems } = await plainly(
        handlers.check(old, known(news, unknown), unknown),
      );
      const later = Object.fromEntries(Object.entries(news).filter(([key]) => unknown.has(key)));
      return {
        // Pulumi takes the inputs for the outputs of a preview: what can be known of them already is put there.
        inputs: { ...inputs, ...predicted, ...later, [providerKey]: news[providerKey] },
        // Of a property that is named the engine prints the value, secret or not.
        failures: problems.map(({ property, reason }) => ({
          property: "",
          reason: `${property}: ${reason}`,
        })),
      };
    },

    async diff(_id: string, olds: Bag, news: Bag) {
      const unknown = unknownProperties(news);
      const { changes, deleteBeforeReplace } = await plainly(
        handlers.diff(known(olds, new Set()), known(news, unknown), unknown),
      );
      const replaces = changes.filter(({ effect }) => effect === "replace").map(({ property }) => property);
      // A state that the plugin wrote has no closure, which a refresh and a delete need: an update that finds all as declared adds it.
      return {
        changes: changes.length > 0 || !(providerKey in olds),
        replaces,
        deleteBeforeReplace: replaces.length > 0 && deleteBeforeReplace,
      };
    },

    async create(inputs: Bag) {
      try {
        const { id, state } = await handlers.create(known(inputs, new Set()));
        made.set(state.owner, id);
        return { id, outs: state };
      } catch (error) {
        throw partial(error, inputs);
      }
    },

    async read(id: string, props?: Bag) {
      const bag = props ?? {};
      const state = await plainly(handlers.read(known(bag, new Set())));
      return state === undefined
        ? { id: "", props: {} }
        : { id, props: { ...state, [providerKey]: bag[providerKey] } };
    },

    async update(_id: string, olds: Bag, news: Bag) {
      try {
        return { outs: await handlers.update(known(olds, new Set()), known(news, new Set())) };
      } catch (error) {
        throw partial(error, news);
      }
    },

    async delete(_id: string, props: Bag) {
      const state = known(props, new Set());
      // `pulumi up --replace` and a tainted resource: the create found what was there by its mark.
      const own = made.get(state.owner);
      if (own !== undefined && own === handlers.id(state)) warn(keptInstead(own));
      else await plainly(handlers.remove(state));
    },
  };
}

function known(bag: Bag, unknown: ReadonlySet<string>): Bag {
  return withoutProperties(bag, new Set([...unknown, providerKey]));
}

/** What check, diff, read and delete throw is printed with its stack, which tells a person nothing that the message does not. */
async function plainly<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    if (isLvmNbdError(error)) error.stack = "";
    throw error;
  }
}

/** The engine saves `properties` as the resource's whole state: what is declared and was not reached has no place in it. */
function partial(error: unknown, inputs: Bag): unknown {
  if (!(error instanceof PartialFailure)) return error;
  return Object.assign(new Error(error.message, { cause: error.cause }), {
    id: error.id,
    properties: { ...error.state, [providerKey]: inputs[providerKey] },
    reasons: [error.message],
  });
}
