/** Values that are not known before other resources are made. */

/**
 * What Pulumi sends in place of a string that is only known later. Source: sdk/nodejs/runtime/rpc.ts of
 * @pulumi/pulumi; not imported, so that the provider's start does not load the whole SDK. A test compares.
 */
export const unknownValue = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";

/** Also of other types. Source: sdk/go/common/resource/plugin/rpc.go of pulumi. */
const unknownValues = new Set([
  unknownValue,
  "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",
  "3eeb2bf0-c639-47a8-9e75-3b44932eb421",
  "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",
  "030794c1-ac77-496b-92df-f27374a8bd58",
  "e48ece36-62e2-4504-bad9-02848725956a",
  "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",
]);

/** Top-level properties that hold an unknown value anywhere inside. */
export function unknownProperties(bag: Readonly<Record<string, unknown>>): ReadonlySet<string> {
  return new Set(
    Object.entries(bag)
      .filter(([key, value]) => key !== "__provider" && holdsUnknown(value))
      .map(([key]) => key),
  );
}

/** True for what stands in the place of a value that is only known later. */
export function isUnknown(value: unknown): boolean {
  return typeof value === "string" && unknownValues.has(value);
}

/** Why a property cannot be gone on with that should be known by now. */
export function notKnown(property: string): string {
  return `${property} is not known, and only a preview can do with that`;
}

function holdsUnknown(value: unknown): boolean {
  if (isUnknown(value)) return true;
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
