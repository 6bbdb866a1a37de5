/** The configuration of the stack, as its program has it. */
import * as pulumi from "@pulumi/pulumi";
import { namedHosts, refuseUnknown } from "../core/configuration.js";
import type { NamedHosts } from "../ssh/types.js";

/** The hosts that are configured. Raises INVALID_INPUT. */
export function configuredHosts(): NamedHosts {
  requireKnownNames();
  // Not `pulumi.Config`, which warns of each secret that is read: none is given to the program.
  return namedHosts(pulumi.runtime.getConfig("lvm-nbd:hosts"));
}

/** Raises INVALID_INPUT for a misspelt name. A project that is called as this package has names of its own there. */
export function requireKnownNames(): void {
  if (pulumi.getProject() !== "lvm-nbd") refuseUnknown(Object.keys(pulumi.runtime.allConfig()));
}
