/** The provider's own configuration, `lvm-nbd:...` of a stack or the properties of an explicit provider. */
import type { Problem } from "../core/resource.js";
import { isUnknown } from "./unknowns.js";

type Bag = Readonly<Record<string, unknown>>;

/** What the engine adds. Source: pkg/resource/deploy/providers of pulumi. */
const ofEngine = new Set(["version", "pluginDownloadURL", "pluginChecksums", "__internal", "__defaults"]);

export function configurationProblems(values: Bag): Problem[] {
  const { organization, ...rest } = values;
  const others = Object.keys(rest).filter((key) => !ofEngine.has(key));
  return [
    ...(organization === undefined || isUnknown(organization) || isOrganization(organization)
      ? []
      : [{ property: "organization", reason: 'must be the name of an organisation, without "/"' }]),
    ...others.map((property) => ({ property, reason: "is no configuration of lvm-nbd" })),
  ];
}

/** The organisation that owner marks name; `undefined`: none is configured. */
export function organizationIn({ organization }: Bag): string | undefined {
  return isOrganization(organization) ? organization : undefined;
}

function isOrganization(value: unknown): value is string {
  return typeof value === "string" && /^[^/]+$/.test(value);
}
