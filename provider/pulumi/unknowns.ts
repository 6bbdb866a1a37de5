/** Values that are not known before other resources are made. */

/**
 * What Pulumi sends in place of a value that is only known later. Source: sdk/nodejs/runtime/rpc.ts of
 * @pulumi/pulumi; not imported, so that the provider's start does not load the whole SDK. A test compares.
 */
export const unknownValue = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";

/** Top-level properties that hold an unknown value anywhere inside. */
export function unknownProperties(bag: Readonly<Record<string, unknown>>): ReadonlySet<string> {
  return new Set(
    Object.entries(bag)
      .filter(([key, value]) => key !== "__provider" && holdsUnknown(value))
      .map(([key]) => key),
  );
}

function holdsUnknown(value: unknown): boolean {
  if (value === unknownValue) return true;
  return typeof value === "object" && value !== null && Object.values(value).some(holdsUnknown);
}

/** A copy without some properties, and without what is not given: an output that is `undefined` arrives as null if it is secret. */
export function withoutProperties(
  bag: Readonly<Record<string, unknown>>,
  properties: ReadonlySet<string>,
): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(bag).filter(
      ([key, value]) => !properties.has(key) && value !== undefined && value !== null,
    ),
  );
}
