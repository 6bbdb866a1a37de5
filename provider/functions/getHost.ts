/** What a host is: its system, and the programs that are there. */
import { z } from "zod";
import type { FunctionType } from "../core/functions.js";
import { hostInput } from "../core/inputs.js";
import { hostFacts, lookAtHost } from "../resources/hostSetup.js";

const inputs = z.object({ host: hostInput });
const outputs = z.object(hostFacts);

/** What `getHost` is asked. */
export type GetHostArgs = z.input<typeof inputs>;
/** What `getHost` tells. */
export type GetHostResult = z.infer<typeof outputs>;

export const getHost: FunctionType<z.infer<typeof inputs>> = {
  name: "getHost",
  description: "What a host is: its system, and the versions of the tools that are there. It only looks.",
  example: { host: "server1" },
  inputs,
  outputs,
  ask: (context): Promise<GetHostResult> => lookAtHost(context),
};
