/** schema.json, as GetSchema serves it and Pulumi's generators read it. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, expectTypeOf, it } from "vitest";
import { z } from "zod";
import type { RetentionPolicy } from "../../provider/backup/generations.js";
import type { VmBackupArgs, VmBackupVolume } from "../../provider/components/vmBackup.js";
import type { vmBackupInputs } from "../../provider/components/vmBackupType.js";
import { OutputOf } from "../../provider/core/example.js";
import { componentTypes, resourceTypes } from "../../provider/core/registry.js";
import { functionTypes } from "../../provider/functions/registry.js";
import { dynamicToken } from "../../provider/pulumi/urn.js";

const read = (...path: string[]): unknown =>
  JSON.parse(readFileSync(join(__dirname, "..", "..", ...path), "utf8"));

const property = z.looseObject({ secret: z.boolean().optional(), description: z.string().optional() });
const properties = z.record(z.string(), property).default({});
const text = read("schema.json");
const schema = z
  .looseObject({
    config: z.object({ variables: properties, defaults: z.array(z.string()) }),
    provider: z.looseObject({ inputProperties: properties }),
    functions: z.record(
      z.string(),
      z.object({
        description: z.string(),
        inputs: z.looseObject({ properties }),
        outputs: z.looseObject({ properties }),
      }),
    ),
    types: z.record(z.string(), z.looseObject({ properties, enum: z.array(z.unknown()).optional() })),
    resources: z.record(
      z.string(),
      z.looseObject({ description: z.string(), inputProperties: properties, properties }),
    ),
  })
  .parse(text);

/** Pulumi's own, of `codegen/schema` of github.com/pulumi/pulumi/pkg/v3 v3.259.0 (Apache-2.0). A format asserts nothing in its draft. */
const metaschema = z.fromJSONSchema(
  JSON.parse(JSON.stringify(read("test", "recorded", "metaschema.json")), (key, value) =>
    key === "format" ? undefined : value,
  ),
);

/** A copy with a value set, or removed. */
function withValue(path: readonly string[], value: unknown): unknown {
  const copy: unknown = structuredClone(text);
  const holder = path.slice(0, -1).reduce<unknown>((at, key) => Reflect.get(Object(at), key), copy);
  Reflect.set(Object(holder), path.at(-1) ?? "", value);
  return JSON.parse(JSON.stringify(copy));
}

it("has each resource go on with what was made as a dynamic one, and no component", () => {
  const aliases = Object.entries(schema.resources).map(([token, { aliases }]) => [token, aliases]);
  expect(Object.fromEntries(aliases)).toEqual({
    ...Object.fromEntries(
      resourceTypes.map(({ type }) => [`lvm-nbd:index:${type}`, [{ type: dynamicToken(type) }]]),
    ),
    ...Object.fromEntries(componentTypes.map(({ type }) => [`lvm-nbd:index:${type}`, undefined])),
  });
});

describe("the metaschema", () => {
  const snapshot = ["resources", "lvm-nbd:index:LvSnapshot", "inputProperties"];

  it("takes schema.json", () => {
    expect(metaschema.safeParse(text).error?.issues).toBeUndefined();
  });

  it.each([
    ["a property of the package that there is not", ["enums"], {}],
    ["a type's name with a space", ["types", "lvm-nbd:index:Host Role"], { type: "object" }],
    ["a property without a type", [...snapshot, "name", "type"], undefined],
    ["a type that there is not", [...snapshot, "name", "type"], "text"],
    ["a list of what is not said", [...snapshot, "tags", "items"], undefined],
    ["a union of one", [...snapshot, "host", "oneOf"], [{ type: "string" }]],
    ["a default that is a list", [...snapshot, "tags", "default"], []],
    ["a mark that is no boolean", [...snapshot, "name", "secret"], "yes"],
    ["an enumeration of bare values", ["types", "lvm-nbd:index:HostRole", "enum"], ["source"]],
  ])("refuses %s", (_what, path, value) => {
    expect(metaschema.safeParse(withValue(path, value)).success).toBe(false);
  });
});

describe("schema.json", () => {
  const all = [
    ...Object.entries(schema.types).flatMap(([token, type]) =>
      Object.entries(type.properties).map(([name, spec]) => ({ path: `${token}.${name}`, spec })),
    ),
    ...Object.entries(schema.provider.inputProperties).map(([name, spec]) => ({
      path: `Provider.${name}`,
      spec,
    })),
    ...Object.entries(schema.functions).flatMap(([token, { inputs, outputs }]) =>
      Object.entries({ ...inputs.properties, ...outputs.properties }).map(([name, spec]) => ({
        path: `${token}.${name}`,
        spec,
      })),
    ),
    ...Object.entries(schema.resources).flatMap(([token, resource]) =>
      Object.entries({ ...resource.properties, ...resource.inputProperties }).map(([name, spec]) => ({
        path: `${token}.${name}`,
        spec,
      })),
    ),
  ];

  it("has every type that it refers to, and refers to every type that it has", () => {
    const references = [...JSON.stringify(text).matchAll(/"#\/types\/([^"]+)"/g)].map((match) => match[1]);
    expect(new Set(references)).toEqual(new Set(Object.keys(schema.types)));
  });

  it("describes every property", () => {
    expect(all.filter(({ spec }) => !spec.description).map(({ path }) => path)).toEqual([]);
  });

  it("marks what is encrypted in the state, as a whole and inside", () => {
    const secrets = all.filter(({ spec }) => spec.secret).map(({ path }) => path.replace(/^.*:/, ""));
    expect(secrets.sort()).toEqual([
      "ClientTls.privateKey",
      ...["HostConnection.passphrase", "HostConnection.password", "HostConnection.privateKey"],
      ...["JumpHost.passphrase", "JumpHost.password", "JumpHost.privateKey"],
      "LvRestoreImage.tls",
      "NbdAttachment.tls",
      ...["NbdExport.clientTls", "NbdExport.tls"],
      ...["NbdExportTls.clientPrivateKey", "NbdExportTls.privateKey"],
      "Provider.hosts",
      "VolumeCopy.tls",
    ]);
    const told = all.filter(({ spec }) => /encrypted in the state/i.test(spec.description ?? ""));
    expect(told.filter(({ spec }) => !spec.secret).map(({ path }) => path)).toEqual([]);
  });

  it("asks a program for nothing that has a default, and promises it in the state", () => {
    expect(schema.types["lvm-nbd:index:Quiesce"]).toMatchObject({
      required: ["freeze", "thaw"],
      language: { nodejs: { requiredOutputs: ["freeze", "thaw", "timeoutSeconds"] } },
    });
  });

  it("knows a list's values where they are enumerated", () => {
    expect(schema.resources["lvm-nbd:index:HostSetup"]?.inputProperties.roles).toMatchObject({
      type: "array",
      items: { $ref: "#/types/lvm-nbd:index:HostRole" },
    });
    expect(schema.types["lvm-nbd:index:HostRole"]?.enum).toContainEqual({ value: "source" });
  });

  it("makes one of nested alternatives", () => {
    expect(schema.types["lvm-nbd:index:HostConnection"]?.properties.proxyJump).toMatchObject({
      oneOf: [
        { type: "string" },
        { $ref: "#/types/lvm-nbd:index:JumpHost" },
        { type: "array", items: { oneOf: [{ type: "string" }, { $ref: "#/types/lvm-nbd:index:JumpHost" }] } },
      ],
    });
  });
});

describe("the configuration", () => {
  it("is that of the stack and of a provider alike", () => {
    expect(schema.config.variables).toEqual(schema.provider.inputProperties);
    expect(schema.config.variables.hosts).toMatchObject({
      additionalProperties: { $ref: "#/types/lvm-nbd:index:HostConnection" },
    });
    expect(schema.config.defaults).toEqual(["organization", "hosts"]);
  });
});

describe.each([...resourceTypes, ...componentTypes])("the example of $type", ({ type, example }) => {
  it("uses it, and is what the provider takes", () => {
    expect(Object.values(example).map((resource) => resource.type)).toContain(type);
    for (const [name, resource] of Object.entries(example)) {
      const known = resourceTypes.find((one) => one.type === resource.type);
      const described = known ?? componentTypes.find((one) => one.type === resource.type);
      const named = known?.nameInput === undefined ? {} : { [known.nameInput]: name };
      const declared = { ...named, ...resource.properties, ...(known && { owner: "o/p/s/r" }) };
      const later = new Set(
        Object.entries(declared).flatMap(([key, value]) => (outputsIn(value).length > 0 ? [key] : [])),
      );
      const shape = Object.fromEntries(
        Object.entries(described?.inputs.shape ?? {}).filter(([key]) => !later.has(key)),
      );
      const inputs = z
        .strictObject(shape)
        .parse(Object.fromEntries(Object.entries(declared).filter(([key]) => !later.has(key))));
      expect(known?.validate(inputs, undefined, later) ?? []).toEqual([]);
    }
  });

  it("names outputs that there are", () => {
    const names = Object.keys(example);
    for (const [name, { properties: declared }] of Object.entries(example))
      for (const { resource, output } of outputsIn(declared)) {
        expect(names.indexOf(resource)).toBeLessThan(names.indexOf(name));
        const token = `lvm-nbd:index:${example[resource]?.type}`;
        expect(Object.keys(schema.resources[token]?.properties ?? {})).toContain(output);
      }
  });

  it("is in its description in each language", () => {
    const { description } = schema.resources[`lvm-nbd:index:${type}`] ?? { description: "" };
    expect(description).toContain(`new lvm_nbd.${type}("`);
    expect(description).toContain(`lvm_nbd.${type}(\n`);
    expect(description).toContain(`type: lvm-nbd:${type}\n`);
  });
});

describe.each(functionTypes)("the example of $name", ({ name, example, inputs }) => {
  it("is what it can be asked, and is in its description in each language", () => {
    expect(z.strictObject(inputs.shape).safeParse(example).error?.issues).toBeUndefined();
    const { description } = schema.functions[`lvm-nbd:index:${name}`] ?? { description: "" };
    expect(description).toContain(`lvm_nbd.${name}Output({`);
    expect(description).toContain(
      `lvm_nbd.${name.replace(/[A-Z]/, (letter) => `_${letter.toLowerCase()}`)}(`,
    );
    expect(description).toContain(`function: lvm-nbd:${name}\n`);
  });
});

function outputsIn(value: unknown): OutputOf[] {
  if (value instanceof OutputOf) return [value];
  return typeof value === "object" && value !== null ? Object.values(value).flatMap(outputsIn) : [];
}

describe("VmBackup in other languages", () => {
  type Declared = z.input<typeof vmBackupInputs>;

  it("has the arguments of the class, but for what the component asks for itself", () => {
    expectTypeOf<Exclude<keyof VmBackupArgs, "made">>().toEqualTypeOf<keyof Declared>();
    expectTypeOf<VmBackupVolume>().toExtend<Declared["volumes"][number]>();
    expectTypeOf<keyof VmBackupVolume>().toEqualTypeOf<keyof Declared["volumes"][number]>();
    expectTypeOf<RetentionPolicy>().toExtend<Declared["keep"]>();
    expectTypeOf<keyof RetentionPolicy>().toEqualTypeOf<keyof Declared["keep"]>();
  });

  it("takes only known values for what becomes part of the images' names", () => {
    const inputProperties = schema.resources["lvm-nbd:index:VmBackup"]?.inputProperties ?? {};
    const plain = Object.entries(inputProperties).filter(([, spec]) => spec.plain === true);
    expect(plain.map(([name]) => name)).toEqual(["folder", "volumes", "keep", "format", "now"]);
    expect(inputProperties.volumes).toMatchObject({ items: { plain: true } });
  });
});
