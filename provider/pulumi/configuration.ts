/**
 * The provider's own configuration, `lvm-nbd:...` of a stack or the properties of an explicit provider. What it consists of is loaded
 * when there is some: the engine waits for the first answer.
 */
import type { Problem } from "../core/resource.js";
import type { NamedHosts } from "../ssh/types.js";
import { asSecret } from "./codec.js";
import { type providerProto, type Struct, structOf } from "./proto.js";
import { unknownProperties, withoutProperties } from "./unknowns.js";

type Bag = Readonly<Record<string, unknown>>;

/** What the engine adds. Source: pkg/resource/deploy/providers of pulumi. */
const ofEngine = new Set(["version", "pluginDownloadURL", "pluginChecksums", "__internal", "__defaults"]);

export async function problemsOfConfiguration(values: Bag): Promise<Problem[]> {
  const known = withoutProperties(values, new Set([...ofEngine, ...unknownProperties(values)]));
  if (Object.keys(known).length === 0) return [];
  return (await import("../core/configuration.js")).configurationProblems(known);
}

/** The organisation that owner marks name; `undefined`: none is configured. */
export function organizationIn({ organization }: Bag): string | undefined {
  return typeof organization === "string" && /^[^/]+$/.test(organization) ? organization : undefined;
}

/** The hosts that are configured. Raises INVALID_INPUT. */
export async function hostsIn({ hosts }: Bag): Promise<NamedHosts> {
  return hosts === undefined ? new Map() : (await import("../core/configuration.js")).namedHosts(hosts);
}

/** The configuration as it came, with what may hold keys as a secret: the engine keeps it so in the state. */
export function withSecretHosts(news: Struct | undefined): Struct | undefined {
  const values: Bag = news?.toJavaScript() ?? {};
  const { hosts } = values;
  const isToBeMarked = hosts !== undefined && hosts !== null && !unknownProperties(values).has("hosts");
  return isToBeMarked ? structOf({ ...values, hosts: asSecret(hosts) }) : news;
}

/** As texts, by names such as `lvm-nbd:config:hosts`: so an engine configures that knows of no values. */
export function variablesOf(request: providerProto.ConfigureRequest): Bag {
  const values: Record<string, string> = {};
  request.getVariablesMap().forEach((value, key) => {
    values[key.replace(/^.*:/, "")] = value;
  });
  return values;
}
