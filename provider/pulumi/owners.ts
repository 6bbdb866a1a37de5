/** The owner of a resource where no program names it. The protocol tells the URN, and of the organisation nothing. */
import { organizationOf, ownerOf } from "../core/owner.js";
import type { Urn } from "./urn.js";

export class Owners {
  /** Of the resources that were asked about: one that is to be replaced is asked about again, without its past. */
  private readonly seen = new Map<string, string>();
  /** As the provider's configuration has it. */
  organization: string | undefined;

  /** `old`: the owner in the state. `undefined`: the organisation is not known, and is not guessed. */
  of(urn: string, { project, stack, name }: Urn, old: unknown): string | undefined {
    const organization =
      this.organization ?? (typeof old === "string" ? organizationOf(old) : undefined) ?? this.seen.get(urn);
    if (organization === undefined) return undefined;
    this.seen.set(urn, organization);
    return ownerOf(organization, project, stack, name);
  }
}
