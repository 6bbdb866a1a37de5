/** examples/yaml and examples/python: one program, held against schema.json and sent to the plugin. */
import { readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { z } from "zod";
import type { OutputOf as Reference } from "../../provider/core/example.js";
import { createHandlers } from "../../provider/core/handlers.js";
import { componentTypes, resourceType } from "../../provider/core/registry.js";
import { unknownValue } from "../../provider/pulumi/unknowns.js";
import { Setting } from "../../scripts/exampleCode.mts";
import { examplePrograms, program } from "../../scripts/examplePrograms.mts";
import { OutputOf } from "../../scripts/provider.mts";
import { untouchedHost } from "../support/fakeHost.js";
import { startService, unused, urnOf } from "../support/pluginClient.js";

const spec = z.looseObject({
  type: z.string().optional(),
  $ref: z.string().optional(),
  items: z.unknown().optional(),
  oneOf: z.array(z.unknown()).optional(),
});
const specs = z.record(z.string(), spec);
const schema = z
  .object({
    types: z.record(
      z.string(),
      z.looseObject({ properties: specs.optional(), required: z.array(z.string()).default([]) }),
    ),
    resources: z.record(
      z.string(),
      z.looseObject({ inputProperties: specs, requiredInputs: z.array(z.string()), properties: specs }),
    ),
  })
  .parse(JSON.parse(readFileSync("schema.json", "utf8")));

const token = (name: string) => `lvm-nbd:index:${name}`;
const resourceOf = (name: string) => schema.resources[token(name)];
const outputSpec = ({ resource, output }: Reference) =>
  resourceOf(program.resources[resource]?.type ?? "")?.properties[output];

/** What the schema says against a value. */
function objections(value: unknown, of: unknown, path: string): string[] {
  const { type, $ref, items, oneOf } = spec.parse(of);
  if (oneOf !== undefined) {
    const each = oneOf.map((option) => objections(value, option, path));
    return each.some((found) => found.length === 0) ? [] : each.flat();
  }
  if (value instanceof Setting) return type === "string" ? [] : [`${path} is no string`];
  if (value instanceof OutputOf)
    return outputSpec(value)?.type === type
      ? []
      : [`${path} is not what ${value.resource}.${value.output} is`];
  if (Array.isArray(value)) {
    if (type !== "array") return [`${path} is no list`];
    return value.flatMap((item, at) => objections(item, items, `${path}.${at}`));
  }
  if (typeof value !== "object" || value === null) {
    const actual = typeof value === "number" && type === "integer" ? "integer" : typeof value;
    return actual === type ? [] : [`${path} is no ${type ?? $ref}`];
  }
  const object = schema.types[$ref?.replace("#/types/", "") ?? ""];
  if (object?.properties === undefined) return [`${path} is no object`];
  return objectionsIn(value, object.properties, object.required, path);
}

function objectionsIn(
  values: object,
  properties: z.infer<typeof specs>,
  required: readonly string[],
  path: string,
): string[] {
  const missing = required.filter((key) => !(key in values)).map((key) => `${path}.${key} is missing`);
  const found = Object.entries(values).flatMap(([key, value]) => {
    const known = properties[key];
    return known === undefined ? [`${path}.${key} is not known`] : objections(value, known, `${path}.${key}`);
  });
  return [...missing, ...found];
}

function objectionsTo(name: string, type: string, properties: object): string[] {
  const resource = resourceOf(type);
  if (resource === undefined) return [`${name} is of no type`];
  return objectionsIn(properties, resource.inputProperties, resource.requiredInputs, name);
}

const addresses: Readonly<Record<string, string>> = {
  ...{ source: "192.0.2.1", client: "192.0.2.2", backups: "192.0.2.3" },
  ...{ listenAddress: "10.0.0.1", clientAddress: "10.0.0.2", volumeGroup: "VgVm", origin: "LV-VM1" },
};

/** As a program would send it: settings have values, outputs of others are only known later. */
function sent(value: unknown): unknown {
  if (value instanceof Setting) return addresses[value.name];
  if (value instanceof OutputOf) return unknownValue;
  if (Array.isArray(value)) return value.map(sent);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, sent(inner)]));
}

it.each(Object.entries(examplePrograms))("%s is as it is written", (path, text) => {
  expect(readFileSync(path, "utf8")).toBe(text);
});

it("every setting is described, and used", () => {
  const used = Object.values(program.resources).flatMap(({ properties }) => settingsIn(properties));
  expect(new Set(used)).toEqual(new Set(Object.keys(program.settings)));
});

function settingsIn(value: unknown): string[] {
  if (value instanceof Setting) return [value.name];
  return typeof value === "object" && value !== null ? Object.values(value).flatMap(settingsIn) : [];
}

it.each(Object.entries(program.outputs))("the output %s is one that there is", (_name, output) => {
  expect(outputSpec(output)).toBeDefined();
});

describe.each(Object.entries(program.resources))("%s", (name, { type, properties }) => {
  let plugin: Awaited<ReturnType<typeof startService>>;
  beforeAll(async () => {
    plugin = await startService({
      ...{ version: "1.0.0", schema: async () => "{}", compose: unused, ask: unused },
      handlers: async (wanted, environment) =>
        createHandlers(resourceType(wanted), { ...environment, openHost: async () => untouchedHost() }),
    });
    await plugin.configure({ organization: "o" });
  });
  afterAll(() => plugin.close());

  it("has what the schema asks for, and nothing else", () => {
    expect(objectionsTo(name, type, properties)).toEqual([]);
  });

  it.each([
    ["a property that there is not", { frmt: "raw" }, /frmt is not known/],
    ["one of another type", { host: 7 }, /host is no/],
  ])("with %s would not", (_what, more, message) => {
    expect(objectionsTo(name, type, { ...properties, ...more }).join()).toMatch(message);
    expect(objectionsTo(name, type, {}).join()).toMatch(/host is missing/);
  });

  it("is taken by the plugin", async () => {
    const component = componentTypes.find((one) => one.type === type);
    if (component !== undefined) expect(component.inputs.safeParse(sent(properties)).success).toBe(true);
    else {
      const values = sent(properties) as Readonly<Record<string, unknown>>;
      expect((await plugin.check(urnOf(type, name), values)).failures).toEqual([]);
    }
  });
});
