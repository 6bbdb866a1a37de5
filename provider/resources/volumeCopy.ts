/**
 * VolumeCopy: what an export serves, as a verified image in a file of another host.
 */
import { randomUUID } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { commonInputs, hostInput, readableBy, triggersInput } from "../core/inputs.js";
import { generationMark } from "../core/owner.js";
import type { Change, Context, Problem, ResourceType } from "../core/resource.js";
import { parseNbdUri } from "../linux/nbd.js";
import {
  bring,
  compressProblems,
  copyImage,
  type ImageObservation,
  imageInputs,
  imageOutputs,
  imageResource,
  imageState,
  isAsMade,
  isRotten,
  noImage,
  removeImage,
} from "./image.js";

const inputs = z.strictObject({
  ...commonInputs,
  uri: z
    .string()
    .superRefine(readableBy(parseNbdUri))
    .describe("What is copied, e.g. the `uri` of an NbdExport that lets this host in."),
  snapshot: z
    .strictObject({
      host: hostInput,
      volumeGroup: z.string().min(1).describe("Volume group of the snapshot."),
      name: z.string().min(1).describe("Name of the snapshot."),
      uuid: z.string().min(1).describe("LVM UUID of the snapshot."),
    })
    .optional()
    .describe(
      "The LvSnapshot behind the export: it is seen to be valid after the last byte and to have the size that was copied, and " +
        "another snapshot is copied anew.",
    ),
  ...imageInputs,
  triggers: triggersInput.describe(
    "Any values; a change of one copies anew. The earlier image is kept until the new one is verified.",
  ),
});

const outputs = z.object({
  ...imageOutputs,
  state: z
    .enum(["complete", "changed", "corrupt", "stale"])
    .describe(
      "`complete`; `changed` (size or time of modification differ from the manifest); `corrupt` (`deepCheck` read something else); " +
        "`stale` (a copy of an earlier declaration).",
    ),
});

type Inputs = z.infer<typeof inputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type VolumeCopyDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type VolumeCopyOutputs = State;

/** Also of a known snapshot another `uri` is another source: that it serves this snapshot is the program's word alone. */
function generationOf({ uri, snapshot, format, compress, triggers }: Inputs): string {
  return generationMark([uri, snapshot?.uuid ?? "", format, compress, triggers]);
}

function stateOf(seen: ImageObservation, declared: Inputs): State["state"] {
  if (!isAsMade(seen)) return "changed";
  if (seen.content === "bad") return "corrupt";
  const verified = seen.manifest?.image.verified || !declared.verify;
  return seen.manifest?.generation === generationOf(declared) && verified ? "complete" : "stale";
}

async function converge(
  context: Context,
  wanted: Inputs,
  seen: ImageObservation,
  old: State | undefined,
): Promise<void> {
  const isRight = seen.file !== undefined && stateOf(seen, wanted) === "complete" && old?.state !== "corrupt";
  await bring(context, wanted, seen, { isRight, copyId: old?.copyId, generation: generationOf(wanted) });
}

function toState(declared: Inputs | State, seen: ImageObservation): State {
  const before = "sha256" in declared ? declared : undefined;
  const state = stateOf(seen, declared);
  return {
    ...declared,
    ...imageState(declared.file, before, seen),
    state: state !== "changed" && isRotten(before, seen) ? "corrupt" : state,
  };
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  const changed = (property: keyof Inputs & string) =>
    unknown.has(property) || !isDeepStrictEqual(wanted[property], state[property]);
  if (changed("file")) changes.push({ property: "file", effect: "replace" });
  for (const property of ["uri", "format", "compress", "triggers", "owner"] as const) {
    if (changed(property)) changes.push({ property, effect: "update" });
  }
  // The same snapshot, reached in another way, is the same content.
  const same = !unknown.has("snapshot") && wanted.snapshot?.uuid === state.snapshot?.uuid;
  if (changed("snapshot")) changes.push({ property: "snapshot", effect: same ? "connection" : "update" });
  // An image that is verified is so also where that is no longer asked for.
  if (changed("verify"))
    changes.push({ property: "verify", effect: wanted.verify === false ? "connection" : "update" });
  for (const property of ["connections", "bandwidthLimit", "deepCheck"] as const) {
    if (changed(property)) changes.push({ property, effect: "connection" });
  }
  if (state.state !== "complete") changes.push({ property: "state", effect: "update" });
  return changes;
}

function validate(
  wanted: Partial<Inputs>,
  _old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  return compressProblems(wanted, unknown);
}

/** The resource as the reconciler sees it. */
export const volumeCopy: ResourceType<Inputs, State, ImageObservation> = {
  type: "VolumeCopy",
  description: "What an export serves, as a verified image in a file of another host.",
  inputs,
  outputs,
  validate,
  ...imageResource,
  isStale: (seen, wanted) => stateOf(seen, wanted) !== "complete",
  toState,
  diff,
  create: (context, wanted) =>
    copyImage(context, wanted, noImage, { copyId: randomUUID(), generation: generationOf(wanted) }),
  converge,
  remove: removeImage,
  drift(state, seen) {
    const now = toState(state, seen);
    if (now.state === "complete") return [];
    const what = {
      changed: "was changed: its size or time of modification are not those of the manifest",
      corrupt: "does not read back as it was copied",
      stale: "is a copy of an earlier declaration",
    }[now.state];
    return [`${state.file} ${what}; \`pulumi up\` will copy anew, and replace it when that is verified`];
  },
};
