/**
 * VolumeCopy: what an export serves, verified, in a file or in a logical volume of another host.
 */
import { randomUUID } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { refusal } from "../core/command.js";
import { LvmNbdError } from "../core/errors.js";
import { OutputOf } from "../core/example.js";
import { commonInputs, hostInput, readableBy, replaces, triggersInput } from "../core/inputs.js";
import { declareInstead, generationMark } from "../core/owner.js";
import type { Change, Context, Problem, ResourceType } from "../core/resource.js";
import { devicePath } from "../linux/copiedVolume.js";
import { parseNbdUri, withoutTls } from "../linux/nbd.js";
import { hostOfName } from "../ssh/config.js";
import {
  bringVolume,
  copyToVolume,
  inspectVolume,
  isHandedOver,
  isOfGeneration,
  isVolumeAsMade,
  noVolume,
  observeVolume,
  otherName,
  removeVolume,
  type VolumeObservation,
  volumeInput,
  volumeOutputs,
  volumeProblems,
  volumeState,
} from "./copiedVolume.js";
import {
  bring,
  compressProblems,
  copyImage,
  copyOutputs,
  type ImageObservation,
  imageInputs,
  imageOutputs,
  imageResource,
  imageState,
  inspectImage,
  isAsMade,
  isRotten,
  mountPointProblems,
  noImage,
  observeImage,
  removeImage,
} from "./image.js";
import { sourceTlsInput, tlsProblems } from "./tls.js";

const inputs = z.strictObject({
  ...commonInputs,
  uri: z
    .string()
    .superRefine(readableBy(parseNbdUri))
    .describe("What is copied, e.g. the `uri` of an NbdExport that lets this host in."),
  tls: sourceTlsInput,
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
  file: imageInputs.file
    .optional()
    .describe(
      "Absolute path of the image on the host, in a folder of root's alone, which must exist. Either this or `volume`.",
    )
    .meta(replaces),
  volume: volumeInput
    .optional()
    .describe(
      "Logical volume `{ volumeGroup, name }` of the host that the copy is made into, instead of a file. It must not exist yet.",
    )
    .meta(replaces),
  triggers: triggersInput.describe(
    "Any values; a change of one copies anew. The earlier copy is kept until the new one is verified.",
  ),
});

const outputs = z.object({
  ...copyOutputs,
  path: volumeOutputs.path,
  manifest: imageOutputs.manifest.optional(),
  filesystem: imageOutputs.filesystem.optional(),
  uuid: volumeOutputs.uuid.optional(),
  state: z
    .enum(["complete", "changed", "corrupt", "stale", "handedOver"])
    .describe(
      "`complete`; `changed` (of a file, size or time of modification differ from the manifest; of a volume, the size); `corrupt` " +
        "(`deepCheck` read something else); `stale` (a copy of an earlier declaration, or one that a cut has left with another name); `handedOver` (a volume that was made writable: it is neither replaced nor " +
        "removed).",
    ),
});

type Inputs = z.infer<typeof inputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type VolumeCopyDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type VolumeCopyOutputs = State;

/** Also of a known snapshot another `uri` is another source: that it serves this snapshot is the program's word alone. */
function generationOf({
  uri,
  snapshot,
  format,
  compress,
  triggers,
}: Pick<Inputs, "uri" | "format" | "compress" | "triggers"> & {
  readonly snapshot?: { readonly uuid: string } | undefined;
}): string {
  return generationMark([withoutTls(uri), snapshot?.uuid ?? "", format, compress, triggers]);
}

type Observed = ImageObservation | VolumeObservation;

function isVolume(seen: Observed): seen is VolumeObservation {
  return "lv" in seen;
}

/** Where the copy is to be; `validate` has seen that it is one of both. */
function toVolume<T extends { readonly file?: unknown; readonly volume?: unknown }>(
  wanted: T,
): wanted is T & { readonly volume: NonNullable<T["volume"]> } {
  return wanted.volume !== undefined;
}

function fileOf({ file }: { readonly file?: string | undefined }): string {
  if (file !== undefined) return file;
  throw new LvmNbdError("INVALID_INPUT", { message: "file: is required, or `volume`", property: "file" });
}

function withFile<T extends { readonly file?: string | undefined }>(
  wanted: T,
): T & { readonly file: string } {
  return { ...wanted, file: fileOf(wanted) };
}

function placeOf({ file, volume }: Partial<Inputs>): string | undefined {
  return volume === undefined ? file : devicePath(volume);
}

function stateOf(seen: Observed, declared: Inputs): State["state"] {
  const generation = generationOf(declared);
  const [asMade, verified, asDeclared] = isVolume(seen)
    ? [isVolumeAsMade(seen), seen.facts?.verified, isOfGeneration(seen, generation)]
    : [isAsMade(seen), seen.manifest?.image.verified, seen.manifest?.generation === generation];
  if (isVolume(seen) && isHandedOver(seen)) return "handedOver";
  if (isVolume(seen) && otherName(seen) !== undefined) return "stale";
  if (!asMade) return "changed";
  if (seen.content === "bad") return "corrupt";
  return asDeclared && (verified || !declared.verify) ? "complete" : "stale";
}

async function create(context: Context, wanted: Inputs): Promise<void> {
  const identity = { copyId: randomUUID(), generation: generationOf(wanted) };
  if (toVolume(wanted)) return copyToVolume(context, wanted, noVolume, identity);
  return copyImage(context, withFile(wanted), noImage, identity);
}

async function converge(
  context: Context,
  wanted: Inputs,
  seen: Observed,
  old: State | undefined,
): Promise<void> {
  const isThere = isVolume(seen) ? seen.lv !== undefined : seen.file !== undefined;
  const isRight = isThere && stateOf(seen, wanted) === "complete" && old?.state !== "corrupt";
  const how = { isRight, copyId: old?.copyId, generation: generationOf(wanted) };
  if (!isVolume(seen)) return bring(context, withFile(wanted), seen, how);
  if (toVolume(wanted)) await bringVolume(context, wanted, seen, how);
}

function toState(declared: Inputs | State, seen: Observed): State {
  const before = "sha256" in declared ? declared : undefined;
  const state = stateOf(seen, declared);
  const outcome =
    isVolume(seen) && toVolume(declared)
      ? volumeState(declared.volume, before, seen)
      : { ...imageState(fileOf(declared), before, isVolume(seen) ? noImage : seen), path: fileOf(declared) };
  const isBad =
    state !== "changed" &&
    state !== "handedOver" &&
    isRotten(before, { content: seen.content, manifest: outcome });
  return { ...declared, ...outcome, state: isBad ? "corrupt" : state };
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  const changed = (property: keyof Inputs & string) =>
    unknown.has(property) || !isDeepStrictEqual(wanted[property], state[property]);
  for (const property of ["file", "volume"] as const)
    if (changed(property)) changes.push({ property, effect: "replace" });
  for (const property of ["uri", "format", "compress", "triggers", "owner"] as const) {
    if (changed(property)) changes.push({ property, effect: "update" });
  }
  // The same snapshot, reached in another way, is the same content.
  const same = !unknown.has("snapshot") && wanted.snapshot?.uuid === state.snapshot?.uuid;
  if (changed("snapshot")) changes.push({ property: "snapshot", effect: same ? "connection" : "update" });
  // An image that is verified is so also where that is no longer asked for.
  if (changed("verify"))
    changes.push({ property: "verify", effect: wanted.verify === false ? "connection" : "update" });
  for (const property of ["tls", "mountPoint", "connections", "bandwidthLimit", "deepCheck"] as const) {
    if (changed(property)) changes.push({ property, effect: "connection" });
  }
  if (state.state !== "complete" && state.state !== "handedOver")
    changes.push({ property: "state", effect: "update" });
  return changes;
}

function validate(
  wanted: Partial<Inputs>,
  _old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  const { file, volume } = wanted;
  const problems = [
    ...compressProblems(wanted, unknown),
    ...mountPointProblems(wanted, "file"),
    ...tlsProblems(wanted.uri, wanted.tls, unknown),
  ];
  const known = !unknown.has("file") && !unknown.has("volume");
  if (known && file === undefined && volume === undefined)
    problems.push({ property: "file", reason: "is required, unless `volume` is given: where the copy goes" });
  if (file !== undefined && volume !== undefined)
    problems.push({
      property: "volume",
      reason: "cannot go with `file`: a copy has one place, leave one out",
    });
  if (volume === undefined) return problems;
  problems.push(...volumeProblems(volume));
  if (wanted.mountPoint !== undefined)
    problems.push({ property: "mountPoint", reason: "is of a `file`: leave it out for a `volume`" });
  if (!unknown.has("format") && wanted.format !== undefined && wanted.format !== "raw")
    problems.push({
      property: "format",
      reason: '"qcow2" is a format of files: leave it out for a `volume`',
    });
  if (wanted.adopt)
    problems.push({
      property: "adopt",
      reason: "takes over no `volume`: its content would be given up. Remove it by hand, or choose another",
    });
  return problems;
}

const sourceShape = z.object({
  uri: inputs.shape.uri,
  snapshot: z
    .object({ host: z.string(), volumeGroup: z.string(), name: z.string(), uuid: z.string() })
    .optional(),
});

/** What was copied and how, as the manifest has it. */
async function declared(context: Context, seen: Observed, place: Inputs): Promise<Partial<Inputs>> {
  const refuse = (message: string) => refusal(context, "INVALID_INPUT", message, declareInstead);
  if (isVolume(seen)) throw refuse("uri: what a volume was copied from is not kept on it");
  const { manifest } = seen;
  const source = sourceShape.safeParse(manifest?.source).data;
  const format = inputs.shape.format.safeParse(manifest?.image.format).data;
  if (manifest === undefined || source === undefined || format === undefined)
    throw refuse(`${fileOf(place)} has no manifest that tells what it was copied from`);
  const { uri, snapshot } = source;
  if (parseNbdUri(uri).tls) throw refuse("tls: the certificates that it was copied with are not kept");
  const compress = [false, true].find(
    (compress) => generationOf({ uri, snapshot, format, compress, triggers: [] }) === manifest.generation,
  );
  if (compress === undefined)
    throw refuse("triggers: it was copied for some, or by a resource of another type, and which is not kept");
  if (!isAsMade(seen)) {
    const [, time = ""] = manifest.image.facts.split(" ");
    throw refusal(
      context,
      "INVALID_INPUT",
      `size or time of ${fileOf(place)} are not those of its manifest: declared, it would be copied anew`,
      `Where only the time is another, as after a restore, \`touch -d @${time}\` on it puts that back; or leave it out of the program.`,
    );
  }
  return {
    ...{ file: fileOf(place), uri, format, compress, verify: manifest.image.verified },
    snapshot: snapshot && inputs.shape.snapshot.parse({ ...snapshot, host: hostOfName(snapshot.host) }),
  };
}

/** The resource as the reconciler sees it. */
export const volumeCopy: ResourceType<Inputs, State, Observed> = {
  type: "VolumeCopy",
  description: "What an export serves, verified, in a file or in a logical volume of another host.",
  example: {
    vm1Snapshot: {
      type: "LvSnapshot",
      properties: { host: "server1", volumeGroup: "VgVm", origin: "LV-VM1", size: "1G" },
    },
    vm1Export: {
      type: "NbdExport",
      properties: {
        host: "server1",
        device: new OutputOf("vm1Snapshot", "path"),
        listenAddress: "10.0.0.1",
        clients: ["10.0.0.3"],
      },
    },
    vm1: {
      type: "VolumeCopy",
      properties: {
        host: "backup1",
        uri: new OutputOf("vm1Export", "uri"),
        snapshot: {
          host: "server1",
          volumeGroup: "VgVm",
          name: new OutputOf("vm1Snapshot", "name"),
          uuid: new OutputOf("vm1Snapshot", "uuid"),
        },
        file: "/var/backups/vm1.qcow2",
        format: "qcow2",
      },
    },
  },
  inputs,
  outputs,
  validate,
  predict: (wanted) => {
    const path = placeOf(wanted);
    return path === undefined
      ? {}
      : { ...(toVolume(wanted) ? {} : imageResource.predict({ file: path })), path };
  },
  id: (wanted, name) => `${name}${placeOf(wanted) ?? ""}`,
  observe: (context, wanted) =>
    toVolume(wanted) ? observeVolume(context, wanted.volume) : observeImage(context, withFile(wanted)),
  async inspect(context, state, seen) {
    if (!isVolume(seen)) return inspectImage(context, withFile(state), seen);
    return toVolume(state) && state.deepCheck ? inspectVolume(context, state.volume, seen) : seen;
  },
  isSame: (seen, state) => copyIdOf(seen) === state.copyId,
  isSuperseded: (seen, state) => copyIdOf(seen) !== undefined && copyIdOf(seen) !== state.copyId,
  collides: imageResource.collides,
  isStale: (seen, wanted) => stateOf(seen, wanted) !== "complete",
  toState,
  diff,
  byId: {
    form: "PATH/OF/IMAGE",
    place(path) {
      const [, volumeGroup, name] = /^dev\/([^/]+)\/([^/]+)$/.exec(path) ?? [];
      return volumeGroup === undefined ? { file: `/${path}` } : { volume: { volumeGroup, name } };
    },
    declared,
  },
  create,
  converge,
  async remove(context, state, seen) {
    if (!isVolume(seen)) return removeImage(context, withFile(state), seen);
    if (toVolume(state)) await removeVolume(context, state, seen);
  },
  drift(state, seen) {
    const now = toState(state, seen);
    if (now.state === "complete") return [];
    if (now.state === "handedOver")
      return [
        `${now.path} was made writable: it is taken for a disk of its own, and neither replaced nor removed. Take the resource out of the program: the volume stays`,
      ];
    const other = isVolume(seen) ? otherName(seen) : undefined;
    if (other !== undefined)
      return [`${now.path} has lost its name to a cut, and is ${other} now; \`pulumi up\` will finish that`];
    const what = {
      changed: isVolume(seen)
        ? `was changed: it has ${now.allocatedBytes} bytes, not the ${seen.facts?.volumeBytes} that it was made with`
        : "was changed: its size or time of modification are not those of the manifest",
      corrupt: "does not read back as it was copied",
      stale: "is a copy of an earlier declaration",
    }[now.state];
    return [`${now.path} ${what}; \`pulumi up\` will copy anew, and replace it when that is verified`];
  },
};

function copyIdOf(seen: Observed): string | undefined {
  return isVolume(seen) ? seen.copyId : seen.manifest?.copyId;
}
