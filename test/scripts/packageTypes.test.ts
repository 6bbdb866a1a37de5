import { describe, expect, it } from "vitest";
import { z } from "zod";
import { replaces, secret } from "../../provider/core/inputs.js";
import { PackageTypes } from "../../scripts/packageTypes.mts";

const host = z.strictObject({ port: z.number().int().default(22).describe("Port.") }).describe("Host.");

describe("types of a package", () => {
  it("are named by their title, else by the property that has them", () => {
    const types = new PackageTypes("p");
    const shape = z.object({ hosts: z.array(host), first: host.meta({ title: "First" }) });
    types.propertiesOf(shape, "input", "Thing");
    expect(Object.keys(types.specs())).toEqual(["p:index:First", "p:index:ThingHost"]);
  });

  it("ask of a program what has no default, where they are both given and got", () => {
    const types = new PackageTypes("p");
    for (const side of ["input", "output"] as const) types.propertiesOf(z.object({ host }), side, "Thing");
    expect(types.specs()["p:index:ThingHost"]).toMatchObject({
      required: [],
      language: { nodejs: { requiredInputs: [], requiredOutputs: ["port"] } },
    });
  });

  it("are refused where two of a name differ", () => {
    const one = z.strictObject({ a: z.string() }).meta({ title: "Same" });
    const other = z.strictObject({ b: z.string() }).meta({ title: "Same" });
    expect(() => new PackageTypes("p").propertiesOf(z.object({ one, other }), "input", "Thing")).toThrow(
      "there are two types Same",
    );
  });

  it("are refused where a value can be of any", () => {
    expect(() => new PackageTypes("p").propertiesOf(z.object({ x: z.unknown() }), "input", "Thing")).toThrow(
      "ThingX can be of any type",
    );
  });
});

describe("properties of a package", () => {
  const of = (value: z.ZodType, side: "input" | "output" = "input") =>
    new PackageTypes("p").propertiesOf(z.object({ value }), side, "Thing").properties.value;

  it("have a default as a program gives them, and none as it gets them", () => {
    expect(of(z.boolean().default(true))).toMatchObject({ type: "boolean", default: true });
    expect(of(z.boolean().default(true), "output")).not.toHaveProperty("default");
  });

  it("tell in words a default of what can be of several types", () => {
    const size = z.union([z.string(), z.number()]).default(65536).describe("Size.");
    expect(of(size)).toEqual({
      oneOf: [{ type: "string" }, { type: "number" }],
      description: "Size. Default: `65536`.",
    });
  });

  it("bear the marks of their own alone: what is inside makes nothing anew", () => {
    const inner = z.strictObject({ key: z.string().meta(secret).meta(replaces) });
    const types = new PackageTypes("p");
    types.propertiesOf(z.object({ value: inner }), "input", "Thing");
    const spec = types.specs()["p:index:ThingValue"];
    expect(spec).toMatchObject({ properties: { key: { secret: true } } });
    expect(JSON.stringify(spec)).not.toContain("willReplaceOnChanges");
    expect(of(z.string().meta(replaces))).toMatchObject({ willReplaceOnChanges: true });
    expect(of(z.string().meta(replaces), "output")).not.toHaveProperty("willReplaceOnChanges");
  });
});
