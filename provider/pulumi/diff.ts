/** What differs, as the engine wants to be told. Source: provider.proto of pulumi (DiffResponse). */
import { isDeepStrictEqual } from "node:util";
import type { DiffResult } from "../core/handlers.js";
import type { Change } from "../core/resource.js";
import { providerProto } from "./proto.js";

type Bag = Readonly<Record<string, unknown>>;

/**
 * What is declared with the properties of `ignoreChanges` as they are: the engine has set them back to what was declared before, and
 * the thing may have drifted from that. Of parts of a property only that.
 */
export function ignoring<T extends Bag>(ignored: readonly string[], state: Bag, wanted: T): T {
  const all = ignored.includes("*") ? Object.keys(wanted) : ignored;
  const reset = all.filter((property) => property in state && property in wanted);
  return { ...wanted, ...Object.fromEntries(reset.map((property) => [property, state[property]])) };
}

export function diffResponse(
  { changes, deleteBeforeReplace }: DiffResult,
  old: Bag,
  news: Bag,
): providerProto.DiffResponse {
  const response = new providerProto.DiffResponse();
  const { DIFF_SOME, DIFF_NONE } = providerProto.DiffResponse.DiffChanges;
  response.setChanges(changes.length === 0 ? DIFF_NONE : DIFF_SOME);
  response.setHasdetaileddiff(true);
  const properties = new Set(changes.map(({ property }) => property));
  response.setDiffsList([...properties]);
  const replaces = changes.filter(({ effect }) => effect === "replace");
  response.setReplacesList([...new Set(replaces.map(({ property }) => property))]);
  // Also where none is to be replaced: `replaceOnChanges` may have it so, and a create first would take over what is there.
  response.setDeletebeforereplace(deleteBeforeReplace);
  const detailed = response.getDetaileddiffMap();
  for (const property of properties) {
    const diff = new providerProto.PropertyDiff();
    diff.setKind(kindOf(property, replaces, old, news));
    // What only drifted is shown against the outputs.
    diff.setInputdiff(!isDeepStrictEqual(old[property], news[property]));
    detailed.set(property, diff);
  }
  return response;
}

function kindOf(
  property: string,
  replaces: readonly Change[],
  old: Bag,
  news: Bag,
): providerProto.PropertyDiff.Kind {
  const kinds = providerProto.PropertyDiff.Kind;
  const replace = replaces.some((change) => change.property === property);
  if (property in news && !(property in old)) return replace ? kinds.ADD_REPLACE : kinds.ADD;
  if (property in old && !(property in news)) return replace ? kinds.DELETE_REPLACE : kinds.DELETE;
  return replace ? kinds.UPDATE_REPLACE : kinds.UPDATE;
}
