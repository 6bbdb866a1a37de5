/**
 * Property values as they cross the wire, and as plain ones. Source: sdk/go/common/resource/plugin/rpc.go and
 * sdk/proto of pulumi. A value with a signature key is none of the user's objects.
 */
import type { Problem } from "../core/resource.js";
import { isSecret } from "../core/secrets.js";
import { type Struct, structOf, type Value } from "./proto.js";
import { unknownValue } from "./unknowns.js";

const signature = "4dabf18193072939515e22adb298388d";
const secretSignature = "1b47061264138c4ac30d75fd1eb44270";
const outputSignature = "d0e6a833031e9bbcd3f4e8bde6ca49a4";
/** What no property of this package takes. */
const refusedSignatures: Readonly<Record<string, string>> = {
  c44067f5952c0a294b673a41bacd8c17: "is an asset; give its text, or a path on the host, as a string",
  "0def7320c3a5731c473e5ecbe6d01bc7": "is an archive; give a path on the host as a string",
  "5cf8f73096256a8f31e491e813e4eb8e": "is a resource; give its properties instead",
};

export interface Decoded {
  /** Secrets are open, unknown values are in their places, what is null in an object is not there. */
  readonly values: Record<string, unknown>;
  /** Paths of what was a secret (`pathKey`). */
  readonly secrets: ReadonlySet<string>;
  /** What has no plain value, by its path. */
  readonly refused: readonly Problem[];
  /** URNs of the resources that a property was made of, as far as its values tell. */
  readonly dependencies: ReadonlyMap<string, ReadonlySet<string>>;
}

type Path = readonly (string | number)[];

/** Paths are compared as texts, in which no key can be taken for two. */
function pathKey(path: Path): string {
  return JSON.stringify(path);
}

/** The plain values of a message; of none, no values. */
export function decode(struct: Struct | undefined): Decoded {
  const secrets = new Set<string>();
  const refused: Problem[] = [];
  const dependencies = new Map<string, Set<string>>();

  const depend = ([property]: Path, urns: readonly Value[]) => {
    const known = dependencies.get(String(property)) ?? new Set<string>();
    for (const urn of urns) known.add(urn.getStringValue());
    dependencies.set(String(property), known);
  };

  const plain = (value: Value, path: Path): unknown => {
    if (value.hasStructValue()) return plainObject(value.getStructValue(), path);
    const list = value.getListValue();
    if (list !== undefined) return list.getValuesList().map((item, index) => plain(item, [...path, index]));
    if (value.hasStringValue()) return value.getStringValue();
    if (value.hasNumberValue()) return value.getNumberValue();
    return value.hasBoolValue() ? value.getBoolValue() : null;
  };

  const plainObject = (object: Struct | undefined, path: Path): unknown => {
    const fields = fieldsOf(object);
    const kind = fields.get(signature)?.getStringValue();
    if (kind === undefined) return properties(fields, path);
    const content = fields.get("value");
    if (kind === secretSignature || fields.get("secret")?.getBoolValue()) secrets.add(pathKey(path));
    if (kind === secretSignature) return content === undefined ? null : plain(content, path);
    if (kind === outputSignature)
      depend(path, fields.get("dependencies")?.getListValue()?.getValuesList() ?? []);
    if (kind === outputSignature) return content === undefined ? unknownValue : plain(content, path);
    const reason = refusedSignatures[kind] ?? "is of a kind that this version of the provider does not know";
    refused.push({ property: path.join("."), reason });
    return null;
  };

  const properties = (fields: ReadonlyMap<string, Value>, path: Path): Record<string, unknown> =>
    Object.fromEntries(
      [...fields]
        .map(([key, value]) => [key, plain(value, [...path, key])] as const)
        .filter(([, value]) => value !== null),
    );

  const values = properties(fieldsOf(struct), []);
  return { values, secrets, refused, dependencies };
}

function fieldsOf(struct: Struct | undefined): ReadonlyMap<string, Value> {
  const fields = new Map<string, Value>();
  struct?.getFieldsMap().forEach((value, key) => {
    fields.set(key, value);
  });
  return fields;
}

/** A message of plain values: those at the paths of `secrets` are secrets again, and those that always are. */
export function encode(values: Readonly<Record<string, unknown>>, secrets: ReadonlySet<string>): Struct {
  const holders = new Set([...secrets].flatMap((key) => pathsAbove(JSON.parse(key))));

  const marked = (value: unknown, path: Path): unknown => {
    const key = path.at(-1);
    // Where a list has a secret, the whole is one: what comes back may be in another order.
    const secret =
      secrets.has(pathKey(path)) ||
      (typeof key === "string" && isSecret(key, value)) ||
      (Array.isArray(value) && holders.has(pathKey(path)));
    if (secret) return asSecret(withoutUndefined(value));
    if (Array.isArray(value)) return value.map((item, index) => marked(item, [...path, index]));
    if (typeof value !== "object" || value === null) return value;
    return entries(value, path);
  };

  const entries = (object: object, path: Path) =>
    Object.fromEntries(
      Object.entries(object)
        .filter(([, value]) => value !== undefined)
        .map(([key, value]) => [key, marked(value, [...path, key])]),
    );

  return structOf(entries(values, []));
}

/** A value as a secret, in a message. */
export function asSecret(value: unknown): object {
  return { [signature]: secretSignature, value };
}

function pathsAbove(path: Path): string[] {
  return path.map((_, length) => pathKey(path.slice(0, length)));
}

function withoutUndefined(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutUndefined);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([, inner]) => inner !== undefined)
      .map(([key, inner]) => [key, withoutUndefined(inner)]),
  );
}

/** True if the value of a property is a secret, or holds one. */
export function holdsSecret(property: string, value: unknown, secrets: ReadonlySet<string>): boolean {
  const start = pathKey([property]).slice(0, -1);
  const marked = [...secrets].some((key) => key === `${start}]` || key.startsWith(`${start},`));
  return marked || isSecret(property, value) || holdsSecretByName(value);
}

function holdsSecretByName(value: unknown): boolean {
  if (typeof value !== "object" || value === null) return false;
  return Object.entries(value).some(([key, inner]) => isSecret(key, inner) || holdsSecretByName(inner));
}
