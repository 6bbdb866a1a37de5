/** Pulumi's two doors to the handlers, as its engine goes through them, in this process. */
import type { Handlers } from "../../provider/core/handlers.js";
import { decode } from "../../provider/pulumi/codec.js";
import { toDynamicProvider } from "../../provider/pulumi/dynamicProvider.js";
import { providerProto, structOf } from "../../provider/pulumi/proto.js";
import type { Parts } from "../../provider/pulumi/service.js";
import { ask, startService, unused, urnOf } from "../support/pluginClient.js";

type Values = Readonly<Record<string, unknown>>;

/** Of what there is a state, no id is asked for. */
const anyId = "its id";

/** A resource, as the engine asks for it. */
export interface Served {
  /** Throws on a problem. */
  check(old: Values | undefined, wanted: Values): Promise<Values>;
  diff(state: Values, inputs: Values): Promise<"none" | "update" | "create first" | "delete first">;
  create(inputs: Values): Promise<Values>;
  /** `undefined`: gone. */
  read(state: Values): Promise<Values | undefined>;
  update(state: Values, inputs: Values): Promise<Values>;
  remove(state: Values): Promise<void>;
}

function difference(changed: boolean, replaces: boolean, deletesFirst: boolean) {
  if (!changed) return "none";
  if (!replaces) return "update";
  return deletesFirst ? "delete first" : "create first";
}

function refuse(problems: readonly string[]): void {
  if (problems.length > 0) throw new Error(problems.join("; "));
}

/** Through the dynamic provider, whose bags all hold the closure. */
export function dynamicDoor(handlers: Handlers, warn: (message: string) => void): Served {
  const provider = toDynamicProvider(handlers, warn);
  const closed = (values: Values) => ({ ...values, __provider: "its closure" });
  const open = ({ __provider: _, ...values }: Values): Values => values;
  const asked = <Method,>(method: Method | undefined): Method => {
    if (method === undefined) throw new Error("the dynamic provider does not have it");
    return method;
  };
  return {
    async check(old, wanted) {
      const { inputs = {}, failures = [] } = await asked(provider.check)(
        old ? closed(old) : {},
        closed(wanted),
      );
      refuse(failures.map(({ reason }) => reason));
      return open(inputs);
    },
    async diff(state, inputs) {
      const answer = await asked(provider.diff)(anyId, closed(state), closed(inputs));
      const replaces = answer.replaces ?? [];
      return difference(answer.changes === true, replaces.length > 0, answer.deleteBeforeReplace === true);
    },
    create: async (inputs) => open((await provider.create(closed(inputs))).outs),
    async read(state) {
      const { id, props = {} } = await asked(provider.read)(anyId, closed(state));
      return id === "" ? undefined : open(props);
    },
    update: async (state, inputs) =>
      open((await asked(provider.update)(anyId, closed(state), closed(inputs))).outs),
    remove: (state) => asked(provider.delete)(anyId, closed(state)),
  };
}

/** Through the plugin's service, over a link. `close` when done. */
export async function pluginDoor(handlers: Parts["handlers"]) {
  const answers = { ask: unused, compose: unused };
  const plugin = await startService({ version: "0.0.0", schema: async () => "{}", handlers, ...answers });
  const open = (values: Values = {}): Values => decode(structOf(values)).values;
  const served = (type: string, name: string): Served => {
    const urn = urnOf(type, name);
    return {
      async check(old, wanted) {
        // Pulumi's SDK leaves out what a program gives as `undefined`.
        const given = Object.entries(wanted).filter(([, value]) => value !== undefined);
        const { inputs, failures } = await plugin.check(urn, Object.fromEntries(given), old);
        refuse(failures.map(({ property, reason }) => `${property}: ${reason}`));
        return open(inputs);
      },
      async diff(state, inputs) {
        const answer = await plugin.diff(urn, state, inputs);
        const changed = answer.changes === providerProto.DiffResponse.DiffChanges.DIFF_SOME;
        return difference(changed, answer.replaces.length > 0, answer.deleteBeforeReplace);
      },
      create: async (inputs) => open((await plugin.create(urn, inputs)).properties),
      async read(state) {
        const { id, properties } = await plugin.read(urn, anyId, state);
        return id === "" ? undefined : open(properties);
      },
      update: async (state, inputs) => open(await plugin.update(urn, state, inputs)),
      remove: (state) => plugin.remove(urn, state),
    };
  };
  /** As each command of the CLI does. */
  const begin = async () => {
    const request = new providerProto.ProviderHandshakeRequest();
    await ask((answer) => plugin.client.handshake(request, answer));
  };
  return { begin, served, close: plugin.close };
}
