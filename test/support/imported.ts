/** What `pulumi import` does with a thing, by its id alone. */
import { expect } from "vitest";
import type { Finder, Found, Handlers } from "../../provider/core/handlers.js";

/** Who imports: a resource of that name, where the organisation is configured. */
export const importer = {
  ...{ organization: "o", project: "p", stack: "s", name: "vm1" },
  ...{ host: undefined, readsOnly: false },
} satisfies Finder;

/** What is found. State and declaration are such that nothing is to change, and a refresh finds the same. */
export async function imported(handlers: Handlers, id: string, finder: Finder): Promise<Found> {
  const found = await handlers.find(id, finder);
  if (found === undefined) throw new Error(`${id} was not found`);
  expect(found.id).toBe(id);
  const none: ReadonlySet<string> = new Set();
  const { inputs, problems } = await handlers.check(undefined, found.inputs, none);
  expect(problems).toEqual([]);
  expect((await handlers.diff(found.state, inputs, none)).changes).toEqual([]);
  expect(await handlers.read(found.state)).toEqual(found.state);
  return found;
}
