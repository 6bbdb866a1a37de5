/** Makes schema.json, the Pulumi package schema, from the zod objects of the resources and components. */
import { readFileSync } from "node:fs";
import { z } from "zod";
import type { AnyFunctionType } from "../provider/core/functions.ts";
import type { AnyResourceType, Described } from "../provider/core/resource.ts";
import { callSection, exampleSection } from "./exampleCode.mts";
import { writeGenerated } from "./generated.mts";
import { PackageTypes } from "./packageTypes.mts";
import {
  componentTypes,
  configuration,
  dynamicToken,
  functionTypes,
  ofTwo,
  outputsOf,
  resourceTypes,
} from "./provider.mts";

const name = "lvm-nbd";
const types = new PackageTypes(name);

const packageJson = z
  .object({
    version: z.string(),
    description: z.string(),
    license: z.string(),
    keywords: z.array(z.string()),
  })
  .parse(JSON.parse(readFileSync("package.json", "utf8")));

function resource(type: AnyResourceType) {
  const inputs = types.propertiesOf(type.inputs, "input", type.type);
  const declared = types.propertiesOf(type.inputs, "output", type.type);
  const outputs = types.propertiesOf(outputsOf(type), "output", type.type);
  const { owner: _, ...inputProperties } = inputs.properties;
  return {
    description: `${description(type)}\n\n${importSection(type)}`,
    inputProperties,
    requiredInputs: inputs.required.filter((key) => key !== "owner" && key !== type.nameInput),
    properties: { ...declared.properties, ...outputs.properties },
    required: [...new Set([...declared.required, ...outputs.required])],
    stateInputs: {
      description: "How to look up what exists already.",
      properties: { host: inputs.properties.host },
    },
    // A stack that was made with dynamic resources goes on with what it has.
    aliases: [{ type: dynamicToken(type.type) }],
  };
}

/** As Pulumi's registry has it. */
function importSection({ type, byId, isSuperseded }: AnyResourceType): string {
  const text =
    "reason" in byId
      ? `It cannot be imported: ${byId.reason}. ${byId.advice}`
      : `\`pulumi import ${name}:index:${type} RESOURCE ID\`, where RESOURCE is the name of the resource that made it, and ID is \`HOST/${byId.form}\`. ${ofTwo(isSuperseded !== undefined)}`;
  return `## Import\n\n${text}\n`;
}

function component(type: Described) {
  const inputs = types.propertiesOf(type.inputs, "input", type.type);
  return {
    description: description(type),
    isComponent: true,
    inputProperties: inputs.properties,
    requiredInputs: inputs.required,
    ...types.propertiesOf(type.outputs, "output", type.type),
  };
}

function functionOf(type: AnyFunctionType) {
  const owner = type.name.replace("get", "Get");
  const inputs = types.propertiesOf(type.inputs, "input", owner);
  return {
    description: `${type.description}\n\n${callSection(type.name, type.example, name)}`,
    inputs: { type: "object", ...inputs },
    outputs: { type: "object", ...types.propertiesOf(type.outputs, "output", owner) },
  };
}

function description({ description: text, example }: Described): string {
  return `${text}\n\n${exampleSection(example, name)}`;
}

const resources = Object.fromEntries([
  ...resourceTypes.map((type) => [`${name}:index:${type.type}`, resource(type)]),
  ...componentTypes.map((type) => [`${name}:index:${type.type}`, component(type)]),
]);

const functions = Object.fromEntries(
  functionTypes.map((type) => [`${name}:index:${type.name}`, functionOf(type)]),
);

const configured = types.propertiesOf(configuration, "input", "Provider");

const schema = {
  name,
  displayName: "LVM and NBD",
  version: packageJson.version,
  description: packageJson.description,
  keywords: packageJson.keywords,
  license: packageJson.license,
  language: {
    // Not the name of this package, which declares dynamic resources: a program may need both while it moves from one to the other.
    nodejs: { packageName: `pulumi-${name}-sdk`, respectSchemaVersion: true },
    python: { packageName: "pulumi_lvm_nbd", pyproject: { enabled: true }, respectSchemaVersion: true },
    go: { rootPackageName: "lvmnbd", generateResourceContainerTypes: true, respectSchemaVersion: true },
    csharp: { namespaces: { [name]: "LvmNbd" }, respectSchemaVersion: true },
  },
  config: {
    variables: configured.properties,
    defaults: Object.keys(configured.properties).filter((key) => !configured.required.includes(key)),
  },
  provider: {
    description:
      "What the resources that are given this provider go by, instead of the stack's configuration.",
    inputProperties: configured.properties,
    requiredInputs: configured.required,
  },
  types: types.specs(),
  resources,
  functions,
};
writeGenerated("schema.json", `${JSON.stringify(schema, null, 2)}\n`, "npm run schema");
