/** All functions by name. */
import { LvmNbdError } from "../core/errors.js";
import type { AnyFunctionType } from "../core/functions.js";
import { getHost } from "./getHost.js";
import { getVolumes } from "./getVolumes.js";

export const functionTypes: readonly AnyFunctionType[] = [getHost, getVolumes];

/** The function of that name. Raises INVALID_INPUT for a name that this version of the package does not know. */
export function functionType(name: string): AnyFunctionType {
  const found = functionTypes.find((candidate) => candidate.name === name);
  if (found !== undefined) return found;
  const message = `lvm-nbd has no function "${name}"; there are: ${functionTypes.map((one) => one.name).join(", ")}`;
  throw new LvmNbdError("INVALID_INPUT", { message });
}
