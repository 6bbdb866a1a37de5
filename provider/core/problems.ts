/** What zod finds wrong, by the properties that a person knows. */
import type { z } from "zod";
import type { Problem } from "./resource.js";

/**
 * zod's issues as problems of properties. `values` are what was checked: what is not there is missing, not wrong. `whole`: what has
 * the properties, for messages.
 */
export function problemsOf(
  issues: readonly z.core.$ZodIssue[],
  values: unknown,
  whole = "this resource",
  base: readonly PropertyKey[] = [],
): Problem[] {
  return issues.flatMap((issue): Problem[] => {
    const path = [...base, ...issue.path];
    const property = path.join(".");
    if (issue.code === "unrecognized_keys") {
      return issue.keys.map((key) => ({
        property: [...path, key].join("."),
        reason: `is no property of ${whole}`,
      }));
    }
    if (path.length > 0 && valueAt(values, path) === undefined) return [{ property, reason: "is required" }];
    if (issue.code === "invalid_union") {
      // Of the alternatives, the one whose type fits tells what is wrong.
      const fitting = issue.errors.find(fits);
      if (fitting !== undefined) return problemsOf(fitting, values, whole, path);
      return [{ property, reason: `must be ${[...new Set(issue.errors.flatMap(typesOf))].join(" or ")}` }];
    }
    const [first] = issue.code === "invalid_key" ? issue.issues : [];
    return [{ property, reason: first?.message ?? issue.message }];
  });
}

/** True for the issues of an alternative that has the value's type, whatever is wrong inside. */
function fits(issues: readonly z.core.$ZodIssue[]): boolean {
  return issues.every(
    (issue) =>
      issue.path.length > 0 ||
      (issue.code === "invalid_union" ? issue.errors.some(fits) : issue.code !== "invalid_type"),
  );
}

function typesOf(issues: readonly z.core.$ZodIssue[]): string[] {
  return issues.flatMap((issue) => {
    if (issue.code === "invalid_union") return issue.errors.flatMap(typesOf);
    return issue.code === "invalid_type" ? [issue.expected] : [];
  });
}

function valueAt(values: unknown, path: readonly PropertyKey[]): unknown {
  return path.reduce<unknown>(
    (value, key) => (typeof value === "object" && value !== null ? Reflect.get(value, key) : undefined),
    values,
  );
}
