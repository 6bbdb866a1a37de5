/**
 * zod objects as properties of a Pulumi package, by way of their JSON schema. Its objects and enumerations become types of the package,
 * named by their `title`, else by the property that has them. Source: the metaschema, pkg/codegen/schema/pulumi.json of Pulumi.
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";

/** Which values: as a program declares them, or as they are in the state. */
export type Side = "input" | "output";

/** A property of JSON schema, with the marks of `provider/core/inputs.ts`. */
const nodeShape = z.looseObject({
  title: z.string().optional(),
  description: z.string().optional(),
  default: z.unknown().optional(),
  secret: z.boolean().optional(),
  willReplaceOnChanges: z.boolean().optional(),
  plain: z.boolean().optional(),
  type: z.union([z.string(), z.array(z.string())]).optional(),
  enum: z.array(z.string()).optional(),
  anyOf: z.array(z.unknown()).optional(),
  items: z.unknown().optional(),
  properties: z.record(z.string(), z.unknown()).optional(),
  required: z.array(z.string()).optional(),
  additionalProperties: z.unknown().optional(),
});
type Node = z.infer<typeof nodeShape>;

type Spec = { readonly [key: string]: unknown };

/** Properties with the names of those that must be given, or are always there. */
export interface Properties {
  readonly properties: Readonly<Record<string, Spec>>;
  readonly required: readonly string[];
}

interface ObjectType {
  readonly properties: Properties["properties"];
  /** By side, where the type is used there. */
  readonly required: Readonly<Partial<Record<Side, readonly string[]>>>;
}

/** The types of a package, as they are found in its properties. */
export class PackageTypes {
  readonly #package: string;
  readonly #objects = new Map<string, ObjectType>();
  readonly #enums = new Map<string, Spec>();

  constructor(name: string) {
    this.#package = name;
  }

  /** Of a resource, a component or the provider. `owner` begins the names of the types that have none. */
  propertiesOf(shape: z.ZodObject, side: Side, owner: string): Properties {
    const node = nodeShape.parse(z.toJSONSchema(shape, { io: side, unrepresentable: "any" }));
    const entries = Object.entries(node.properties ?? {}).map(([key, value]) => {
      const property = nodeShape.parse(value);
      const replaces = side === "input" && property.willReplaceOnChanges;
      return [
        key,
        {
          ...this.#property(property, side, typeName(owner, key)),
          ...(replaces ? { willReplaceOnChanges: true } : {}),
        },
      ] as const;
    });
    return { properties: Object.fromEntries(entries), required: node.required ?? [] };
  }

  /** The package's `types`. */
  specs(): Readonly<Record<string, Spec>> {
    const objects = [...this.#objects].map(([name, type]) => [name, objectSpec(type)] as const);
    const all = [...objects, ...this.#enums].sort(([one], [other]) => (one < other ? -1 : 1));
    return Object.fromEntries(all.map(([name, spec]) => [this.#token(name), spec]));
  }

  #token(name: string): string {
    return `${this.#package}:index:${name}`;
  }

  #property(node: Node, side: Side, name: string): Spec {
    const spec = this.#type(node, side, name, node.plain === true);
    const { description = "", secret } = node;
    const value = side === "input" && typeof node.default !== "object" ? node.default : undefined;
    // Of a default of what can be of several types Go's generator makes no Go.
    const isTold = value !== undefined && alternatives(node).length > 1;
    return {
      ...spec,
      description: isTold ? `${description} Default: \`${value}\`.` : description,
      ...(value !== undefined && !isTold ? { default: value } : {}),
      ...(secret ? { secret } : {}),
    };
  }

  #type(node: Node, side: Side, name: string, plain: boolean): Spec {
    const mark = plain ? { plain } : {};
    const options = alternatives(node);
    if (options.length > 1)
      return { oneOf: options.map((option) => this.#type(option, side, name, plain)), ...mark };
    if (node.enum !== undefined) return { ...this.#reference(this.#enum(node, name)), ...mark };
    switch (node.type) {
      case "string":
      case "number":
      case "integer":
      case "boolean":
        return { type: node.type, ...mark };
      case "array":
        return {
          type: "array",
          items: this.#type(nodeShape.parse(node.items), side, singular(name), plain),
          ...mark,
        };
      case "object":
        if (node.properties !== undefined)
          return { ...this.#reference(this.#object(node, side, name)), ...mark };
        return {
          type: "object",
          additionalProperties: this.#type(nodeShape.parse(node.additionalProperties), side, name, plain),
          ...mark,
        };
      default:
        throw new Error(`${name} can be of any type, and a program would not know of which`);
    }
  }

  #reference(name: string): Spec {
    return { $ref: `#/types/${this.#token(name)}` };
  }

  #enum({ title, type, enum: values = [] }: Node, inherited: string): string {
    const name = title ?? inherited;
    const spec = { type, enum: values.map((value) => ({ value })) };
    refuseOther(name, this.#enums.get(name), spec);
    this.#enums.set(name, spec);
    return name;
  }

  #object(node: Node, side: Side, inherited: string): string {
    const name = node.title ?? inherited;
    const entries = Object.entries(node.properties ?? {}).map(
      ([key, value]) => [key, this.#property(nodeShape.parse(value), "input", typeName(name, key))] as const,
    );
    const properties = Object.fromEntries(entries);
    const known = this.#objects.get(name);
    refuseOther(name, known?.properties, properties);
    this.#objects.set(name, {
      properties,
      required: { ...known?.required, [side]: node.required ?? [] },
    });
    return name;
  }
}

/** What a program must give is less than what it gets where there are defaults; only some languages can be told so. */
function objectSpec({ properties, required: { input, output } }: ObjectType): Spec {
  const differ = input !== undefined && output !== undefined && !isDeepStrictEqual(input, output);
  return {
    type: "object",
    properties,
    required: input ?? output,
    ...(differ ? { language: { nodejs: { requiredInputs: input, requiredOutputs: output } } } : {}),
  };
}

/** What a value can be. A union of unions is one. */
function alternatives(node: Node): readonly Node[] {
  if (Array.isArray(node.type)) return node.type.map((type) => ({ type }));
  return node.anyOf?.flatMap((option) => alternatives(nodeShape.parse(option))) ?? [node];
}

function refuseOther(name: string, known: unknown, found: unknown): void {
  if (known === undefined || isDeepStrictEqual(known, found)) return;
  throw new Error(`there are two types ${name}: give one of them a \`title\` of its own`);
}

/** Go's generator calls what a resource is looked up by `RESOURCEState`. */
function typeName(owner: string, key: string): string {
  const property = key === "state" ? "status" : key;
  return owner + property.slice(0, 1).toUpperCase() + property.slice(1);
}

function singular(name: string): string {
  return name.replace(/s$/, "");
}
