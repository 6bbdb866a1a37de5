/** Outputs that all resources share. */
import { z } from "zod";
import type { Described } from "./resource.js";

const commonOutputs = {
  machineId: z
    .string()
    .optional()
    .describe(
      "machine-id(5) of the host. Another machine under its name or address is refused with `HOST_CHANGED`.",
    ),
} as const;

/** All that is added to the inputs of a resource in its state. */
export function outputsOf({ outputs }: Pick<Described, "outputs">): z.ZodObject {
  return z.object({ ...outputs.shape, ...commonOutputs });
}
