/** Makes schema.json, the Pulumi package schema, from the zod objects of the resources. */
import { readFileSync } from "node:fs";
import { z } from "zod";
import { writeGenerated } from "./generated.mts";
import { resourceTypes } from "./provider.mts";

type Json = { readonly [key: string]: unknown };

const packageJson = z
  .object({
    version: z.string(),
    description: z.string(),
    license: z.string(),
    keywords: z.array(z.string()),
  })
  .parse(JSON.parse(readFileSync("package.json", "utf8")));

const types: Record<string, Json> = {};

/** A JSON schema node as a Pulumi property; nested objects become named types. */
function property(node: Json, typeName: string): Json {
  const extra = {
    ...(typeof node.description === "string" ? { description: node.description } : {}),
    ...(["string", "number", "boolean"].includes(typeof node.default) ? { default: node.default } : {}),
  };
  const options = node.anyOf as Json[] | undefined;
  if (options !== undefined) {
    return { oneOf: options.map((option) => property(option, typeName)), ...extra };
  }
  if (Array.isArray(node.type)) return { oneOf: node.type.map((type) => ({ type })), ...extra };
  if (node.type === "array")
    return { type: "array", items: property((node.items ?? {}) as Json, typeName), ...extra };
  if (node.type === "object" && node.properties === undefined) {
    return {
      type: "object",
      additionalProperties: property((node.additionalProperties ?? {}) as Json, typeName),
      ...extra,
    };
  }
  if (node.type === "object") {
    const token = `lvm-nbd:index:${typeName}`;
    const secrets = ["privateKey", "passphrase", "password"];
    const properties = Object.entries(node.properties as Record<string, Json>).map(([key, value]) => [
      key,
      { ...property(value, propertyType(key, typeName)), ...(secrets.includes(key) ? { secret: true } : {}) },
    ]);
    types[token] = {
      type: "object",
      properties: Object.fromEntries(properties),
      required: node.required ?? [],
    };
    return { $ref: `#/types/${token}`, ...extra };
  }
  return { type: node.type, ...extra };
}

/** Hosts are of one type, wherever they are named. */
function propertyType(key: string, typeName: string): string {
  return key === "host" ? "HostConnection" : typeName + capital(key);
}

function capital(text: string): string {
  return text.slice(0, 1).toUpperCase() + text.slice(1);
}

function properties(
  shape: z.ZodObject,
  io: "input" | "output",
  typeName: string,
): [Record<string, Json>, string[]] {
  const json = z.toJSONSchema(shape, { io, unrepresentable: "any", reused: "inline" }) as Json;
  const entries = Object.entries(json.properties as Record<string, Json>).map(
    ([key, value]) => [key, property(value, propertyType(key, typeName))] as const,
  );
  return [Object.fromEntries(entries), (json.required ?? []) as string[]];
}

const resources = Object.fromEntries(
  resourceTypes.map((type) => {
    const [inputs, required] = properties(type.inputs, "input", type.type);
    const [declared, always] = properties(type.inputs, "output", type.type);
    const [outputs, given] = properties(type.outputs, "output", type.type);
    const { owner: _, ...inputProperties } = inputs;
    return [
      `lvm-nbd:index:${type.type}`,
      {
        description: type.description,
        inputProperties,
        requiredInputs: required.filter((key) => key !== "owner" && key !== type.nameInput),
        properties: { ...declared, ...outputs },
        required: [...new Set([...always, ...given])],
      },
    ];
  }),
);

const schema = {
  name: "lvm-nbd",
  displayName: "LVM and NBD",
  version: packageJson.version,
  description: packageJson.description,
  keywords: packageJson.keywords,
  license: packageJson.license,
  language: { nodejs: { packageName: "pulumi-lvm-nbd" } },
  config: {},
  types,
  resources,
};
writeGenerated("schema.json", `${JSON.stringify(schema, null, 2)}\n`, "npm run schema");
