/** Names of resources. Source: sdk/go/common/resource/urn of pulumi. */

export interface Urn {
  readonly stack: string;
  readonly project: string;
  /** The resource's own, e.g. `lvm-nbd:index:LvSnapshot`. */
  readonly type: string;
  readonly name: string;
}

export const packageName = "lvm-nbd";

const start = "urn:pulumi:";

/** Throws for what is no URN. A name may hold `::`. */
export function parseUrn(text: string): Urn {
  const [stack, project, qualifiedType, ...name] = text.slice(start.length).split("::");
  const type = qualifiedType?.split("$").at(-1);
  if (!text.startsWith(start) || !stack || !project || !type || name.length === 0)
    throw new Error(`"${text.slice(0, 200)}" is no URN`);
  return { stack, project, type, name: name.join("::") };
}

/** The name of a resource type of this package, e.g. `LvSnapshot`. Throws for a type of another. */
export function typeName(token: string): string {
  return nameIn(token, "type");
}

/** The name of a function of this package, e.g. `getVolumes`. Throws for one of another. */
export function functionName(token: string): string {
  return nameIn(token, "function");
}

function nameIn(token: string, what: string): string {
  const name = /^lvm-nbd:index:(\w+)$/.exec(token)?.[1];
  if (name === undefined) throw new Error(`"${token.slice(0, 200)}" is no ${what} of lvm-nbd`);
  return name;
}

/** The type of a resource that the plugin serves, as a stack's state names it. */
export function pluginToken(type: string): string {
  return `${packageName}:index:${type}`;
}

/** The type of the same as a dynamic resource. Source: dynamic/index.ts of @pulumi/pulumi. */
export function dynamicToken(type: string): string {
  return `pulumi-nodejs:dynamic/${packageName}:${type}`;
}
