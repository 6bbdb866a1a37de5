/** An example as programs of several languages: for descriptions, as Pulumi's documentation and generators take them, and whole ones. */
import type { Example, OutputOf as Reference } from "../provider/core/example.ts";
import { OutputOf } from "./provider.mts";

type Values = Readonly<Record<string, unknown>>;

/** Section of a description. `packageName`: of the package, e.g. `lvm-nbd`. */
export function exampleSection(example: Example, packageName: string): string {
  return section({
    typescript: typescript(example, packageName),
    python: python(example, packageName),
    yaml: yaml(example, packageName),
  });
}

/** The same for a function that is asked so. */
export function callSection(name: string, args: Values, packageName: string): string {
  const module = snakeCase(packageName);
  return section({
    typescript: `${typescriptStart(packageName)}const told = ${module}.${name}Output(${literal(args, "", typescriptWords)});\n`,
    python: `${pythonStart(packageName)}told = ${module}.${snakeCase(name)}(\n${pythonArgs(args)})\n`,
    yaml: `variables:\n  told:\n    fn::invoke:\n      function: ${packageName}:${name}\n      arguments:\n${yamlMap(args, "        ")}`,
  });
}

function section(programs: Readonly<Record<string, string>>): string {
  const blocks = Object.entries(programs).map(([language, text]) => `\`\`\`${language}\n${text}\`\`\`\n`);
  return [
    "{{% examples %}}\n## Example Usage\n\n{{% example %}}",
    ...blocks,
    "{{% /example %}}\n{{% /examples %}}",
  ].join("\n");
}

/** A setting of the stack's configuration, in place of a value. */
export class Setting {
  readonly name: string;

  constructor(name: string) {
    this.name = name;
  }
}

/** A program with all that it needs to be run. */
export interface Program {
  readonly resources: Example;
  /** Descriptions of the settings, by their names. */
  readonly settings: Readonly<Record<string, string>>;
  readonly outputs: Readonly<Record<string, Reference>>;
}

/** `__main__.py`. */
export function pythonProgram({ resources, outputs }: Program, packageName: string): string {
  const exports = Object.entries(outputs).map(
    ([name, output]) => `pulumi.export("${name}", ${pythonWords.output(output)})\n`,
  );
  const program = python(resources, packageName).replace("\n\n", "\n\nconfig = pulumi.Config()\n\n");
  return `import pulumi\n${program}\n${exports.join("")}`;
}

/** What follows the head of a `Pulumi.yaml`. */
export function yamlProgram(program: Program, packageName: string): string {
  const outputs = `outputs:\n${yamlMap(program.outputs, "  ")}`;
  return `${yamlSettings(program)}${yaml(program.resources, packageName)}${outputs}`;
}

/** The settings in a `Pulumi.yaml` of whatever language: a program in YAML is warned of their descriptions. */
export function yamlSettings({ settings }: Program): string {
  const described = Object.entries(settings).map(
    ([name, description]) => `  # ${description}\n  ${name}:\n    type: string\n`,
  );
  return `config:\n${described.join("")}`;
}

function typescript(example: Example, packageName: string): string {
  const alias = snakeCase(packageName);
  const resources = Object.entries(example).map(
    ([name, { type, properties }]) =>
      `const ${name} = new ${alias}.${type}("${name}", ${literal(properties, "", typescriptWords)});\n`,
  );
  return `${typescriptStart(packageName)}${resources.join("")}`;
}

function typescriptStart(packageName: string): string {
  return `import * as ${snakeCase(packageName)} from "pulumi-${packageName}-sdk";\n\n`;
}

function python(example: Example, packageName: string): string {
  const module = snakeCase(packageName);
  const resources = Object.entries(example).map(([name, { type, properties }]) => {
    return `${snakeCase(name)} = ${module}.${type}(\n    "${name}",\n${pythonArgs(properties)})\n`;
  });
  return `${pythonStart(packageName)}${resources.join("")}`;
}

function pythonStart(packageName: string): string {
  const module = snakeCase(packageName);
  return `import pulumi_${module} as ${module}\n\n`;
}

function pythonArgs(values: Values): string {
  return Object.entries(values)
    .map(([key, value]) => `    ${snakeCase(key)}=${literal(value, "    ", pythonWords)},\n`)
    .join("");
}

function yaml(example: Example, packageName: string): string {
  const resources = Object.entries(example).map(
    ([name, { type, properties }]) =>
      `  ${name}:\n    type: ${packageName}:${type}\n    properties:\n${yamlMap(properties, "      ")}`,
  );
  return `resources:\n${resources.join("")}`;
}

/** How a language writes what differs. */
interface Words {
  readonly key: (name: string) => string;
  readonly output: (of: Reference) => string;
  readonly setting: (name: string) => string;
  readonly boolean: (value: boolean) => string;
}

const typescriptWords: Words = {
  key: (name) => name,
  output: ({ resource, output }) => `${resource}.${output}`,
  setting: (name) => `config.require("${name}")`,
  boolean: String,
};

const pythonWords: Words = {
  key: (name) => `"${snakeCase(name)}"`,
  output: ({ resource, output }) => `${snakeCase(resource)}.${snakeCase(output)}`,
  setting: (name) => `config.require("${name}")`,
  boolean: (value) => (value ? "True" : "False"),
};

function literal(value: unknown, indent: string, words: Words): string {
  if (value instanceof OutputOf) return words.output(value);
  if (value instanceof Setting) return words.setting(value.name);
  if (typeof value === "boolean") return words.boolean(value);
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  const inner = `${indent}    `;
  if (Array.isArray(value)) {
    const isShort = value.every((item) => typeof item !== "object" || item instanceof Setting);
    const items = value.map((item) => literal(item, inner, words));
    return isShort
      ? `[${items.join(", ")}]`
      : `[\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}]`;
  }
  const entries = Object.entries(value).map(
    ([key, item]) => `${inner}${words.key(key)}: ${literal(item, inner, words)},\n`,
  );
  return `{\n${entries.join("")}${indent}}`;
}

function yamlMap(values: object, indent: string): string {
  return Object.entries(values)
    .map(([key, value]) => `${indent}${key}:${yamlValue(value, indent)}`)
    .join("");
}

/** What comes behind a key, or behind the dash of an item. */
function yamlValue(value: unknown, indent: string): string {
  if (value instanceof OutputOf) return ` \${${value.resource}.${value.output}}\n`;
  if (value instanceof Setting) return ` \${${value.name}}\n`;
  // JSON's strings are YAML's.
  if (typeof value !== "object" || value === null) return ` ${JSON.stringify(value)}\n`;
  if (!Array.isArray(value)) return `\n${yamlMap(value, `${indent}  `)}`;
  const items = value.map((item) => `${indent}  -${yamlItem(item, `${indent}    `)}`);
  return `\n${items.join("")}`;
}

/** The first entry of a map stands beside the dash. */
function yamlItem(item: unknown, indent: string): string {
  const isMap = typeof item === "object" && item?.constructor === Object;
  return isMap ? ` ${yamlMap(item, indent).trimStart()}` : yamlValue(item, indent);
}

function snakeCase(name: string): string {
  return name.replaceAll("-", "_").replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
