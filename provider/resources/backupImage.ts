/**
 * BackupImage: one moment of the volumes of a VM, as verified images on another host.
 *
 * The volumes are snapshotted as one moment (frozen by `quiesce`), each snapshot is exported to the images' host alone and
 * copied, all are verified, then all get their names, and everything on the source is taken down again. An image once made
 * is history: nothing but `triggers` ever makes `pulumi up` put another moment in its place.
 */
import { randomUUID } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { refusal, succeed } from "../core/command.js";
import { firstLine, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import { commonInputs, hostInput, readableBy, refusing, triggersInput } from "../core/inputs.js";
import { declareInstead, digest, generationMark, ownerMark, ownerOfMark } from "../core/owner.js";
import { ownerPhrase } from "../core/reconciler.js";
import {
  type Change,
  ChangedMeanwhile,
  type CommonObservation,
  type Context,
  type Problem,
  type ResourceType,
} from "../core/resource.js";
import { clientProblem } from "../linux/addresses.js";
import { identityScript, routeCommand } from "../linux/looks.js";
import { deviceMapperNameProblem } from "../linux/lvm.js";
import { parseNbdUri } from "../linux/nbd.js";
import { hostName, hostOfName } from "../ssh/config.js";
import {
  commitCopy,
  compressProblems,
  discardUnfinished,
  type ImageObservation,
  imageInputs,
  imageOutputs,
  imageState,
  inspectImage,
  isAsMade,
  isDecided,
  isFinalFailure,
  isGoneOnWith,
  isRotten,
  keepImage,
  mountPointProblems,
  noImage,
  observeImage,
  refuseHeldImages,
  removeImage,
  requireDestination,
  snapshotOf,
  takenAtOf,
  type VerifiedCopy,
  verifiedCopy,
} from "./image.js";
import { type LvSnapshotOutputs, lvSnapshotInputs } from "./lvSnapshot.js";
import {
  alone,
  endExport,
  exportPart,
  isSnapshotOfMoment,
  keptMoment,
  type Moment,
  momentOf,
  partAsServed,
  requireServable,
  snapshotNameSample,
  sweep,
  takeDown,
  takeDownPossible,
  takeMoment,
} from "./moment.js";
import { clientsElsewhereInput, nbdExportInputs, nbdServerInput } from "./nbdExport.js";
import { pathOf } from "./volumes.js";

const { volumeGroup, origin, size, chunkSize, quiesce } = lvSnapshotInputs.shape;
const { listenAddress, port } = nbdExportInputs.shape;
const { file, ...copyInputs } = imageInputs;

/** Declared properties. */
export const backupImageInputs = z.strictObject({
  ...commonInputs,
  source: z
    .strictObject({
      host: hostInput,
      quiesce: quiesce.describe(
        "Commands run around the taking of all snapshots, as root: the volumes are then of one moment. Without them each is " +
          "as after a power failure, and several are taken one after the other. They are shown in errors: let them name no secret.",
      ),
      listenAddress: listenAddress.describe(
        "Address of the source at which the images' host reaches it. The moment is exported there, to that host alone, while " +
          "it is copied.",
      ),
      clientAddress: z
        .string()
        .superRefine(refusing(clientProblem))
        .optional()
        .describe(
          "Address with which the images' host comes to the source. Default: the one that its routes give.",
        ),
      port: port
        .unwrap()
        .optional()
        .describe(
          "TCP port of the export. Default: the first free one of ten, from one between 20000 and 29980 that follows from the names.",
        ),
      clientsEnforcedElsewhere: clientsElsewhereInput.optional(),
      server: nbdServerInput.describe("Program that serves."),
      tls: z
        .boolean()
        .optional()
        .describe(
          "Whether the moment travels encrypted, by certificates of its own (`tls` of an NbdExport). Default: no.",
        ),
      forgetLeft: z
        .boolean()
        .optional()
        .describe(
          "Whether what earlier backups could not take down (`leftOnSource`) is forgotten: for when its volume group, or the host, " +
            "is gone for good, which nobody can tell but you.",
        ),
    })
    .describe("Where the volumes are, how they are brought to rest and how they are served."),
  volumes: z
    .array(
      z.strictObject({
        volumeGroup: volumeGroup.describe("Volume group of the volume."),
        origin: origin.describe("Logical volume that is backed up."),
        ...{ size, chunkSize },
        file: file.describe("Absolute path of its image on the host. The folder must exist."),
      }),
    )
    .min(1)
    .describe("The volumes of the VM, how the moment of each is kept (as of an LvSnapshot), and its image."),
  ...copyInputs,
  existing: z
    .boolean()
    .default(false)
    .describe(
      "Whether only images that exist are meant, e.g. of a day that has passed: nothing is ever backed up, and an image that is not there is an error.",
    ),
  triggers: triggersInput.describe(
    "Any values; a change of one backs up anew. The earlier images are kept until all new ones are verified.",
  ),
});

const imageStates = ["complete", "changed", "corrupt", "missing"] as const;
/** Of a set, the worst last. */
const setStates = ["complete", "changed", "corrupt", "mixed", "missing"] as const;
type ImageState = (typeof imageStates)[number];

const { copyId, ...factsOfImage } = imageOutputs;

const outputs = z.object({
  images: z
    .array(
      z.object({
        file: z.string().describe("Absolute path of the image."),
        volumeGroup: z.string().describe("Volume group of the volume."),
        origin: z.string().describe("Logical volume that was backed up."),
        ...factsOfImage,
        takenAt: z.string().describe("The moment that the image holds (ISO 8601, by the source's clock)."),
        state: z
          .enum(imageStates)
          .describe(
            "`complete`; `changed` (size or time of modification differ from the manifest); `corrupt` (`deepCheck` read something " +
              "else); `missing`.",
          ),
      }),
    )
    .describe("The image of each volume, in the order of `volumes`."),
  takenAt: z.string().describe("The moment of the volumes (ISO 8601, by the source's clock)."),
  copyId,
  leftOnSource: z
    .array(z.string())
    .default([])
    .describe(
      "Snapshots (`GROUP/NAME`, on an earlier source `GROUP/NAME on HOST`) that could not be taken down when the images were " +
        "complete; `pulumi up` tries again until they are gone, or `source.forgetLeft` is true.",
    ),
  unfinished: z
    .boolean()
    .default(false)
    .describe(
      "Whether an unfinished copy of ours lies beside an image, as after an update that was cut; `pulumi up` removes it, with what " +
        "is left of its moment on the source, or goes on with it if that is still declared.",
    ),
  state: z
    .enum(setStates)
    .describe(
      "The worst state of an image; `mixed` if the images are not of one moment, as after a backup that was cut while they got their names.",
    ),
});

type Inputs = z.infer<typeof backupImageInputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type BackupImageDeclaration = z.input<typeof backupImageInputs>;
/** What a program can read of it. */
export type BackupImageOutputs = State;

/** What was seen of the images, by their files: of those of which anything is there. */
interface Observed extends CommonObservation {
  readonly images: ReadonlyMap<string, ImageObservation>;
}

/** Of the declaration only this makes another moment of images there are. */
function generationOf(wanted: Pick<Inputs, "triggers">): string {
  return generationMark(["backup", wanted.triggers]);
}

async function observe(context: Context, declared: Inputs | State): Promise<Observed | undefined> {
  const before = "images" in declared ? declared : undefined;
  const images = await observeFiles(context, declared.volumes, before);
  const present = [...images];
  if (present.length === 0) return undefined;
  const own = present.filter(([, image]) => isOwn(image, declared, before));
  const others = present.filter(([, image]) => !isOwn(image, declared, before));
  // A create is refused by anything of somebody else's; an image that is ours stays so whatever lies beside it.
  const [decisive] = before === undefined ? [...others, ...own] : [...own, ...others];
  return {
    images,
    what: decisive?.[0],
    mark: decisive?.[1].mark,
    halfMade: present.every(([, image]) => image.halfMade),
  };
}

async function observeFiles(
  context: Context,
  files: readonly { readonly file: string }[],
  before: State | undefined,
): Promise<Map<string, ImageObservation>> {
  const seen = await Promise.all(
    files.map(async ({ file }) => {
      const filesystem = before?.images.find((image) => image.file === file)?.filesystem || undefined;
      return [file, await observeImage(context, { file, ...(filesystem && { filesystem }) })] as const;
    }),
  );
  return new Map(seen.flatMap(([file, image]) => (image === undefined ? [] : [[file, image] as const])));
}

function isOwn(image: ImageObservation, { owner }: Inputs, before: State | undefined): boolean {
  return (
    image.mark === ownerMark(owner) ||
    (before !== undefined &&
      (image.mark === ownerMark(before.owner) || image.manifest?.copyId === before.copyId))
  );
}

/** What tells the images' host from all others, however it is reached: for names on the source. */
async function destinationOf(context: Context): Promise<string> {
  const result = await succeed(
    context,
    {
      argv: script(identityScript),
      kind: "read",
      deadlineSeconds: 30,
    },
    "the host could not be asked for its name",
  );
  const [name = "", id = ""] = result.stdout.trim().split("\n");
  return `${name} ${id.slice(0, 12)}`.trim();
}

/** With which address the images' host comes to the source. */
async function clientAddressOf(context: Context, { source }: Inputs): Promise<string> {
  if (source.clientAddress !== undefined) return source.clientAddress;
  const result = await succeed(
    context,
    { argv: routeCommand(source.listenAddress), kind: "read", deadlineSeconds: 30 },
    `source.listenAddress: there is no way from here to ${source.listenAddress}`,
  );
  const address = /\bsrc (\S+)/.exec(result.stdout)?.[1];
  if (address !== undefined) return address;
  throw new LvmNbdError("INVALID_INPUT", {
    message: `source.clientAddress: with which address this host comes to ${source.listenAddress} cannot be told: name it`,
    host: context.host.name,
    resource: context.resource,
    property: "source",
  });
}

type Left = Pick<State, "leftOnSource">;

async function backUp(
  context: Context,
  wanted: Inputs,
  seen: ReadonlyMap<string, ImageObservation>,
  copyId: string,
  before: readonly string[],
): Promise<Left> {
  const images = new Map(seen);
  // What cannot end well is refused before the VM is frozen for it.
  for (const { file } of wanted.volumes)
    await requireDestination(context, { ...wanted, file }, images.get(file) ?? noImage);
  const clientAddress = await clientAddressOf(context, wanted);
  const moment = await momentOf(context, wanted, await destinationOf(context), clientAddress);
  return alone(moment, async () => {
    let [isBegun, committing] = [false, false];
    try {
      const isThere = await sweep(context, moment);
      let snapshots = isThere ? await goesOn(moment, wanted, images) : undefined;
      isBegun = snapshots !== undefined;
      if (snapshots === undefined) {
        await giveUp(context, wanted, images, copyId);
        await takeDown(moment);
        await requireServable(moment);
        snapshots = await takeMoment(moment);
      }
      const verified = await copyAll(context, moment, wanted, images, snapshots, copyId);
      committing = true;
      // Between the first name and the last the set is of two moments: nothing foreseeable is to come between.
      await refuseHeldImages(context, [...verified.keys()]);
      for (const { file } of wanted.volumes) {
        const [image, copy] = [images.get(file) ?? noImage, verified.get(file)];
        if (copy === undefined) await keepImage(context, { ...wanted, file }, image, copyId);
        else await commitCopy(context, { file }, image, copy);
      }
    } catch (error) {
      if (!(await mayGoOn(context, wanted, error, isBegun, committing))) {
        for (const { file } of wanted.volumes) await discardUnfinished(context, { ...wanted, file });
        await takeDownAfter(moment);
      }
      throw error;
    }
    // That these were there is known.
    const left = [...new Set([...moment.parts.map(({ snapshot }) => pathOf(snapshot)), ...before])];
    try {
      return { leftOnSource: await takeDownPossible(moment, left) };
    } catch (error) {
      if (isLvmNbdError(error, "CANCELLED")) await takeDownAfter(moment);
      if (!isLvmNbdError(error, "HOST_UNREACHABLE")) throw error;
      context.warn(`${left.join(", ")}: left, the next \`pulumi up\` takes it down: ${firstLine(error)}`);
      return { leftOnSource: left };
    }
  });
}

/**
 * The moment that is kept for copies of ours that are under way or done; `undefined` if there is none. A moment that was
 * left for no copy is too old to be meant.
 */
async function goesOn(
  moment: Moment,
  wanted: Inputs,
  images: ReadonlyMap<string, ImageObservation>,
): Promise<LvSnapshotOutputs[] | undefined> {
  const kept = await keptMoment(moment);
  if (kept === undefined) return undefined;
  // All of them are of one moment.
  const isOther = wanted.volumes.some(({ file }, index) => {
    const image = images.get(file) ?? noImage;
    return (
      isDecided(image) &&
      image.manifest !== undefined &&
      snapshotOf(image.manifest)?.uuid !== kept[index]?.uuid
    );
  });
  if (isOther) return undefined;
  const isBegun = wanted.volumes.some(({ file }, index) => {
    const image = images.get(file);
    return isOwnPart(image, wanted) || isCopyOf(image, wanted, kept[index]);
  });
  return isBegun ? kept : undefined;
}

function isOwnPart(image: ImageObservation | undefined, { owner }: Inputs): boolean {
  return image?.part?.record?.mark === ownerMark(owner);
}

/** True if the image has its name already, of this very snapshot. */
function isCopyOf(
  image: ImageObservation | undefined,
  wanted: Inputs,
  snapshot: LvSnapshotOutputs | undefined,
): boolean {
  if (image?.file === undefined || image.manifest === undefined || !isAsMade(image)) return false;
  if (snapshot === undefined || image.manifest.generation !== generationOf(wanted)) return false;
  return snapshotOf(image.manifest)?.uuid === snapshot.uuid;
}

/** Gives up what was begun on another moment. An image that only lacks its name gets it: it is good until all are anew. */
async function giveUp(
  context: Context,
  wanted: Inputs,
  images: Map<string, ImageObservation>,
  copyId: string,
): Promise<void> {
  for (const { file } of wanted.volumes) {
    const image = images.get(file);
    if (image === undefined || !isOwnPart(image, wanted)) continue;
    if (isDecided(image)) await keepImage(context, { ...wanted, file }, image, copyId);
    else await discardUnfinished(context, { ...wanted, file });
    images.set(file, (await observeImage(context, { file })) ?? noImage);
  }
}

/** Copies and verifies what does not have its name yet. */
async function copyAll(
  context: Context,
  moment: Moment,
  wanted: Inputs,
  images: ReadonlyMap<string, ImageObservation>,
  snapshots: readonly LvSnapshotOutputs[],
  copyId: string,
): Promise<Map<string, VerifiedCopy>> {
  const verified = new Map<string, VerifiedCopy>();
  const files = wanted.volumes.map(({ file }) => file);
  const uuids = snapshots.map(({ uuid }) => uuid).sort();
  const together = files.length > 1 ? { together: files, moment: digest(uuids.join(" "), 16) } : {};
  for (const [index, part] of moment.parts.entries()) {
    const [file, snapshot] = [files[index], snapshots[index]];
    if (file === undefined || snapshot === undefined || isCopyOf(images.get(file), wanted, snapshot))
      continue;
    const image = images.get(file) ?? noImage;
    const copied = { ...wanted, file, snapshot, ...together };
    const identity = { copyId, generation: generationOf(wanted) };
    const served = isGoneOnWith(copied, image, identity)
      ? await partAsServed(moment, part)
      : await exportPart(moment, part);
    verified.set(file, await verifiedCopy(context, { ...copied, ...served }, image, identity));
    await endExport(moment, part);
  }
  return verified;
}

/**
 * True if a copy goes on without us, or waits for its name, or if that cannot be told: then the moment stays, and the next
 * run goes on from there.
 */
async function mayGoOn(
  context: Context,
  wanted: Inputs,
  error: unknown,
  isBegun: boolean,
  committing: boolean,
): Promise<boolean> {
  if (isLvmNbdError(error, "LINK_LOST")) return true;
  // While they get their names, verified images are kept.
  if (committing ? isLvmNbdError(error, "COPY_FAILED") : isFinalFailure(error, isBegun)) return false;
  try {
    const looking = { ...context, signal: AbortSignal.timeout(60_000) };
    const images = [...(await observeFiles(looking, wanted.volumes, undefined)).values()];
    // The same run looks again and goes on, unless it will find somebody else's there.
    if (error instanceof ChangedMeanwhile) return images.every((image) => isOwn(image, wanted, undefined));
    return images.some((image) => isOwnPart(image, wanted));
  } catch (reason) {
    context.warn(
      `whether the copy goes on cannot be told (${firstLine(reason)}): its snapshot and export stay for the next \`pulumi up\``,
    );
    return true;
  }
}

/** After a failure, or a cancel, whose signal is aborted already. */
async function takeDownAfter(moment: Moment): Promise<void> {
  const { context } = moment;
  try {
    await takeDown({ ...moment, context: { ...context, signal: AbortSignal.timeout(180_000) } });
  } catch (error) {
    context.warn(
      `a snapshot or an export is left on the source, the next backup takes it down: ${firstLine(error)}`,
    );
  }
}

async function create(context: Context, wanted: Inputs, old: State | undefined): Promise<Left> {
  requireMaking(context, wanted, []);
  if (old !== undefined && generationOf(old) === generationOf(wanted))
    context.warn(`no image of ${old.takenAt} is there any more: a backup of now is made in their place`);
  const [here, elsewhere] = await leftBefore(context, wanted, old);
  const { leftOnSource } = await backUp(context, wanted, new Map(), randomUUID(), here);
  return { leftOnSource: [...leftOnSource, ...elsewhere] };
}

/** `there`: files whose images exist. */
function requireMaking(context: Context, wanted: Inputs, there: readonly string[]): void {
  const missing = wanted.volumes.map(({ file }) => file).filter((file) => !there.includes(file));
  if (!wanted.existing || missing.length === 0) return;
  throw new LvmNbdError("INVALID_INPUT", {
    message: `existing: ${missing.join(", ")} is not there, and a backup of now would not be what it was`,
    host: context.host.name,
    resource: context.resource,
    property: "existing",
    advice:
      "Bring the image back with its manifest, or remove the resource (of a VmBackup: the manifest) so that it is no longer meant.",
  });
}

async function converge(
  context: Context,
  wanted: Inputs,
  seen: Observed,
  old: State | undefined,
): Promise<Left> {
  const images = new Map(seen.images);
  // What was seen is what the state tells of, or else the declaration.
  for (const [file, image] of await observeFiles(context, without(wanted, old ?? wanted), undefined))
    images.set(file, image);
  for (const { file } of wanted.volumes) refuseForeign(context, wanted, file, images.get(file), old);
  const copyId = old?.copyId ?? randomUUID();
  const there = wanted.volumes
    .map(({ file }) => file)
    .filter((file) => {
      const image = images.get(file) ?? noImage;
      return image.file !== undefined || isDecided(image);
    });
  const [here, elsewhere] = await leftBefore(context, wanted, old);
  let left: Left;
  if (isKept(wanted, images, there, old)) {
    for (const { file } of wanted.volumes) {
      const image = images.get(file);
      if (image === undefined) continue;
      if (old === undefined && !isAsMade(image) && !isDecided(image))
        context.warn(`${file} was changed since it was made; it is kept as it is`);
      await keepImage(context, { ...wanted, file }, image, copyId);
    }
    left = { leftOnSource: await takeDownLeft(context, wanted, here) };
  } else {
    requireMaking(context, wanted, there);
    left = await backUp(context, wanted, images, copyId, here);
  }
  if (old !== undefined) {
    const dropped = without(old, wanted);
    for (const { file } of dropped) await removeOwn(context, file, images.get(file), old);
    // A moment of more volumes than now stays while a copy of one of them is there.
    if (dropped.length > 0) await takeDownLeft(context, wanted, []);
  }
  return { leftOnSource: [...left.leftOnSource, ...elsewhere] };
}

/** What is known to be left: on the source, as `GROUP/NAME`, and on earlier ones, as `GROUP/NAME on HOST`. */
async function leftBefore(
  context: Context,
  { source }: Inputs,
  old: State | undefined,
): Promise<[here: string[], elsewhere: string[]]> {
  if (old === undefined) return [[], []];
  if (source.forgetLeft) {
    if (old.leftOnSource.length > 0)
      context.warn(`${old.leftOnSource.join(", ")}: forgotten, as \`source.forgetLeft\` says`);
    return [[], []];
  }
  const [now, then] = [hostName(source.host), hostName(old.source.host)];
  const onEach = old.leftOnSource.map((path) => (path.includes(" on ") ? path : `${path} on ${then}`));
  const on = (host: string) =>
    onEach.flatMap((path) => (path.endsWith(` on ${host}`) ? path.slice(0, -` on ${host}`.length) : []));
  if (now === then) return [on(now), onEach.filter((path) => !path.endsWith(` on ${now}`))];
  // Nothing need be known of it: a run that was cut, of which the state tells nothing, may have left something there.
  const left = (await takeDownLeft(context, old, on(then))).map((path) => `${path} on ${then}`);
  const others = onEach.filter((path) => ![now, then].some((host) => path.endsWith(` on ${host}`)));
  return [on(now), [...others, ...left]];
}

/** The volumes of one declaration whose images are not of the other. */
function without(one: Inputs, other: Inputs): Inputs["volumes"] {
  const files = new Set(other.volumes.map(({ file }) => file));
  return one.volumes.filter(({ file }) => !files.has(file));
}

/** True if what is there is what is meant, or is history. */
function isKept(
  wanted: Inputs,
  images: ReadonlyMap<string, ImageObservation>,
  there: readonly string[],
  old: State | undefined,
): boolean {
  if (old !== undefined && generationOf(old) === generationOf(wanted)) return there.length > 0;
  if (there.length < wanted.volumes.length) return false;
  if (wanted.existing) return true;
  return wanted.volumes.every(({ file }) => {
    const image = images.get(file) ?? noImage;
    if (image.manifest?.generation !== generationOf(wanted)) return false;
    // What is ours is history also where no state tells of it any more, whatever has become of it.
    return old === undefined || isAsMade(image) || isDecided(image);
  });
}

function refuseForeign(
  context: Context,
  wanted: Inputs,
  file: string,
  image: ImageObservation | undefined,
  old: State | undefined,
): void {
  if (image === undefined || isOwn(image, wanted, old)) return;
  if (wanted.adopt && image.mark === undefined) return;
  throw new LvmNbdError("FOREIGN_RESOURCE", {
    message: `${file} exists already ${ownerPhrase(image)}`,
    host: context.host.name,
    resource: context.resource,
    property: "volumes",
    advice: "Nothing was touched. Choose another `file`, or move away what is there.",
  });
}

/**
 * Takes down what a broken backup has left; returns what it could not. A source that is gone for good must not keep its
 * images from being managed. `before`: what is known to be left there, as `GROUP/NAME`.
 */
async function takeDownLeft(context: Context, wanted: Inputs, before: readonly string[]): Promise<string[]> {
  try {
    const moment = await momentOf(context, wanted, await destinationOf(context), "");
    return await alone(moment, async () => {
      const left = await takeDownPossible(moment, before);
      try {
        // Of these volumes, but of another set of them, as it was declared before.
        await sweep(context, moment);
      } catch (error) {
        if (isInterruption(error)) throw error;
        context.warn(
          `whether other backups left snapshots on ${hostName(wanted.source.host)} cannot be told: ${firstLine(error)}`,
        );
      }
      return left;
    });
  } catch (error) {
    if (isInterruption(error)) throw error;
    context.warn(
      `whether a broken backup left a snapshot on ${hostName(wanted.source.host)} cannot be told: ${firstLine(error)}`,
    );
    if (before.length > 0)
      context.warn(
        `${before.join(", ")}: remembered as left there. If the host never comes back, say \`forgetLeft: true\` in \`source\``,
      );
    return [...before];
  }
}

function isInterruption(error: unknown): boolean {
  return isLvmNbdError(error, "CANCELLED", "LINK_LOST") || error instanceof ChangedMeanwhile;
}

async function remove(context: Context, state: State, { images }: Observed): Promise<void> {
  // The images last: while one is there, an interrupted removal is gone on with.
  const [here, elsewhere] = await leftBefore(context, state, state);
  if (elsewhere.length > 0)
    context.warn(
      `${elsewhere.join(", ")}: left by a backup, and with this removal nothing tells of it any more`,
    );
  await takeDownLeft(context, state, here);
  for (const { file } of state.volumes) await removeOwn(context, file, images.get(file), state);
}

/** What has become somebody else's, or another resource's of ours, is left alone. */
async function removeOwn(
  context: Context,
  file: string,
  image: ImageObservation | undefined,
  state: State,
): Promise<void> {
  if (image === undefined) return;
  const isSuperseded = image.manifest !== undefined && image.manifest.copyId !== state.copyId;
  if (isOwn(image, state, state) && !isSuperseded) return removeImage(context, { ...state, file }, image);
  context.warn(`${file} is not what was made here; it is left alone`);
}

function toState(declared: Inputs | State, { images: seen }: Observed): State {
  const before = "images" in declared ? declared : undefined;
  const images = declared.volumes.map(({ file, volumeGroup, origin }) => {
    const image = seen.get(file) ?? noImage;
    const was = before?.images.find((one) => one.file === file);
    const { copyId: _, ...facts } = imageState(file, was && { ...was, copyId: "" }, image);
    return {
      ...{ file, volumeGroup, origin, ...facts },
      filesystem: facts.filesystem || (was?.filesystem ?? ""),
      takenAt: (image.manifest && takenAtOf(image.manifest)) ?? was?.takenAt ?? "",
      state: stateOf(image, was),
    };
  });
  const takenAt = images.map((image) => image.takenAt).filter((time) => time !== "");
  const made = [...seen.values()].find(({ manifest }) => manifest !== undefined)?.manifest;
  const states: State["state"][] = [
    ...images.map(({ state }) => state),
    ...(isMixed(seen) ? ["mixed" as const] : []),
  ];
  return {
    ...declared,
    images,
    takenAt: takenAt.sort()[0] ?? "",
    copyId: before?.copyId ?? made?.copyId ?? "",
    leftOnSource: before?.leftOnSource ?? [],
    unfinished: unfinishedOf(declared, seen).length > 0,
    state: setStates.findLast((state) => states.includes(state)) ?? "complete",
  };
}

/** The images beside which an unfinished copy of ours lies. */
function unfinishedOf(declared: Inputs, images: ReadonlyMap<string, ImageObservation>): string[] {
  return [...images].flatMap(([file, image]) => (isOwnPart(image, declared) ? [file] : []));
}

/** True if the images are not of one moment. */
function isMixed(images: ReadonlyMap<string, ImageObservation>): boolean {
  const moments = [...images.values()].flatMap(({ manifest }) =>
    manifest === undefined ? [] : [manifest.moment],
  );
  return new Set(moments).size > 1;
}

function stateOf(
  image: ImageObservation,
  before: { readonly state: string; readonly completedAt: string } | undefined,
): ImageState {
  if (image.file === undefined) return "missing";
  if (!isAsMade(image)) return "changed";
  return isRotten(before, image) ? "corrupt" : "complete";
}

async function inspect(context: Context, state: State, seen: Observed): Promise<Observed> {
  const images = new Map(seen.images);
  for (const [file, image] of images)
    images.set(file, await inspectImage(context, { file, deepCheck: state.deepCheck }, image));
  return { ...seen, images };
}

function twice(values: readonly string[]): string | undefined {
  return values.find((value, index) => values.indexOf(value) < index);
}

type Volumes = Partial<Inputs>["volumes"];

function filesOf(volumes: Volumes): string[] {
  return (volumes ?? []).map(({ file }) => file).sort();
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  const changed = (property: keyof Inputs & string) =>
    unknown.has(property) || !isDeepStrictEqual(wanted[property], state[property]);
  for (const property of ["triggers", "owner"] as const)
    if (changed(property)) changes.push({ property, effect: "update" });
  if (changed("volumes")) {
    const sameFiles =
      !unknown.has("volumes") && isDeepStrictEqual(filesOf(wanted.volumes), filesOf(state.volumes));
    changes.push({ property: "volumes", effect: sameFiles ? "connection" : "update" });
  }
  // How the next one is to be made.
  const later = ["source", "mountPoint", "format", "compress", "connections", "bandwidthLimit", "verify"];
  for (const property of [...later, "deepCheck", "existing"] as (keyof Inputs)[])
    if (changed(property)) changes.push({ property, effect: "connection" });
  if (state.unfinished) changes.push({ property: "unfinished", effect: "update" });
  if (state.leftOnSource.length > 0) changes.push({ property: "leftOnSource", effect: "update" });
  return changes;
}

function validate(
  wanted: Partial<Inputs>,
  old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  const problems = compressProblems(wanted, unknown);
  const { volumes = [] } = wanted;
  for (const [index, { volumeGroup, file }] of volumes.entries()) {
    problems.push(...mountPointProblems({ ...wanted, file }, `volumes.${index}.file`));
    const reason = deviceMapperNameProblem(volumeGroup, snapshotNameSample);
    if (reason !== undefined)
      problems.push({
        property: `volumes.${index}.volumeGroup`,
        reason: `with the name of a backup's snapshot ${reason}`,
      });
  }
  const file = twice(volumes.map((volume) => volume.file));
  if (file !== undefined)
    problems.push({ property: "volumes", reason: `two of them have the image ${file}` });
  const volume = twice(volumes.map(nameOf));
  if (volume !== undefined) problems.push({ property: "volumes", reason: `${volume} is there twice` });
  if (old === undefined || unknown.has("triggers") || unknown.has("volumes")) return problems;
  if (!isDeepStrictEqual(old.triggers ?? [], wanted.triggers ?? [])) {
    if (wanted.existing === true)
      problems.push({
        property: "triggers",
        reason: "would back up anew, which `existing: true` forbids: leave them as they were",
      });
    return problems;
  }
  // A moment that is kept is not given up for one of now without a word, nor is another one put beside it.
  for (const one of volumes) {
    if ((old.volumes ?? []).some((other) => other.file === one.file)) continue;
    const before = (old.volumes ?? []).find((other) => nameOf(other) === nameOf(one));
    const reason =
      before === undefined
        ? `${nameOf(one)} was not part of this moment: declare another resource for it, or change \`triggers\` as well to back up all of them anew`
        : `would give up the moment in ${before.file} for one of now in ${one.file}: declare another resource for that, or change \`triggers\` as well`;
    problems.push({ property: "volumes", reason });
  }
  return problems;
}

function nameOf({ volumeGroup, origin }: { readonly volumeGroup: string; readonly origin: string }): string {
  return `${volumeGroup}/${origin}`;
}

const sourceShape = z.object({
  uri: z.string().superRefine(readableBy(parseNbdUri)),
  snapshot: z.object({ host: z.string(), volumeGroup: z.string(), origin: z.string(), name: z.string() }),
});

/**
 * Which moment of which volumes is there, as the manifests have it. How it was made they do not tell all of, so that it is declared as
 * one of which nothing is ever made.
 */
async function declared(context: Context, seen: Observed, place: Inputs): Promise<Partial<Inputs>> {
  const files = place.volumes.map(({ file }) => file);
  const told = files.map((file) => {
    const image = seen.images.get(file);
    const manifest = image?.manifest;
    const source = sourceShape.safeParse(manifest?.source).data;
    const format = backupImageInputs.shape.format.safeParse(manifest?.image.format).data;
    if (manifest === undefined || source === undefined || format === undefined || !isOfMoment(source))
      throw refusal(context, "INVALID_INPUT", `${file} has no manifest of a backup`, declareInstead);
    if (manifest.mark !== seen.mark)
      throw refusal(context, "FOREIGN_RESOURCE", `${file} belongs to ${ownerOfMark(manifest.mark)}`);
    if (image?.file === undefined)
      throw refusal(
        context,
        "INVALID_INPUT",
        `${file} is not there, though its manifest is`,
        "Bring it back, or import the others of its moment without it.",
      );
    if (manifest.generation !== generationOf({ triggers: [] }))
      throw refusal(
        context,
        "INVALID_INPUT",
        `triggers: ${file} was made for some, and which is not kept`,
        declareInstead,
      );
    return { file, manifest, ...source, format };
  });
  const [first] = told;
  if (first === undefined) throw refusal(context, "INVALID_INPUT", "it names no image");
  const others = told
    .flatMap(({ manifest }) => manifest.together ?? [])
    .filter((file) => !files.includes(file));
  if (others.length > 0)
    context.warn(
      `of the same moment there was also ${[...new Set(others)].join(", ")}, which this id does not name`,
    );
  const { server, tls } = parseNbdUri(first.uri);
  return {
    source: backupImageInputs.shape.source.parse({
      ...{ host: hostOfName(first.snapshot.host), listenAddress: server, ...(tls ? { tls } : {}) },
    }),
    volumes: told.map(({ file, snapshot: { volumeGroup, origin } }) =>
      backupImageInputs.shape.volumes.element.parse({ volumeGroup, origin, file }),
    ),
    ...{
      format: first.format,
      verify: told.every(({ manifest }) => manifest.image.verified),
      existing: true,
    },
  };
}

/** True for what a moment was exported as. */
function isOfMoment({ uri, snapshot }: z.infer<typeof sourceShape>): boolean {
  return parseNbdUri(uri).exportName === snapshot.name && isSnapshotOfMoment(snapshot.name);
}

/** The resource as the reconciler sees it. */
export const backupImage: ResourceType<Inputs, State, Observed> = {
  type: "BackupImage",
  description: "One moment of the volumes of a VM, as verified images in files of another host.",
  example: {
    vm1: {
      type: "BackupImage",
      properties: {
        host: "backup1",
        source: {
          host: "server1",
          listenAddress: "10.0.0.1",
          quiesce: { freeze: "virsh domfsfreeze vm1", thaw: "virsh domfsthaw vm1" },
        },
        volumes: [
          { volumeGroup: "VgVm", origin: "LV-VM1", size: "20%ORIGIN", file: "/var/backups/vm1.raw" },
          { volumeGroup: "VgVm", origin: "LV-VM1-data", size: "1G", file: "/var/backups/vm1-data.raw" },
        ],
        triggers: ["2026-11-30"],
      },
    },
  },
  inputs: backupImageInputs,
  outputs,
  validate,
  predict: () => ({}),
  id: ({ volumes }, name) => `${name}${volumes.map(({ file }) => file).join(",")}`,
  observe,
  inspect,
  isSame: ({ images }, state) =>
    [...images.values()].some(({ manifest }) => manifest !== undefined && manifest.copyId === state.copyId),
  isSuperseded({ images }, state) {
    const manifests = [...images.values()].flatMap(({ manifest }) => manifest ?? []);
    return manifests.length > 0 && manifests.every((manifest) => manifest.copyId !== state.copyId);
  },
  isStale: ({ images }, wanted) =>
    wanted.volumes.some(({ file }) => {
      const image = images.get(file) ?? noImage;
      return !isAsMade(image) || image.manifest?.generation !== generationOf(wanted);
    }),
  // New images are verified under names of their own before they take the old ones'.
  collides: () => false,
  toState,
  diff,
  byId: {
    form: "PATH/OF/IMAGE[,/PATH/OF/NEXT...]",
    // Where the volumes are no look at the files asks for.
    place(path) {
      const files = `/${path}`.split(/,(?=\/)/);
      const again = twice(files);
      if (again !== undefined)
        throw new LvmNbdError("INVALID_INPUT", { message: `it names ${again} twice`, property: "id" });
      return { volumes: files.map((file) => ({ volumeGroup: "unknown", origin: "unknown", file })) };
    },
    declared,
  },
  refuseMove(state, wanted) {
    if (!isDeepStrictEqual(state.triggers, wanted.triggers ?? [])) return;
    const host = wanted.host === undefined ? "another host" : hostName(wanted.host);
    throw new LvmNbdError("INVALID_INPUT", {
      message: `host: would give up the moment on ${hostName(state.host)} for one of now on ${host}`,
      property: "host",
      advice:
        "Nothing was changed. Declare another resource for that, or change `triggers` as well; if it is the same machine with another address, refresh first.",
    });
  },
  create,
  converge,
  remove,
  drift(state, seen) {
    const now = toState(state, seen);
    const mixed = `the images are of different moments: ${now.images.map(({ file, takenAt }) => `${file} of ${takenAt}`).join(", ")}. Each is good by itself; change \`triggers\` to back up all of them as of one moment`;
    const ofImages = now.images.flatMap(({ file, state: now }) => {
      if (now === "complete") return [];
      const what = {
        changed: "was changed: its size or time of modification are not those of the manifest",
        corrupt: "does not read back as it was made",
        missing: "is not there any more",
      }[now];
      return [
        `${file} ${what}. It is left as it is, since a backup of now would not be what it was: remove the resource, or change \`triggers\` to put one of now in its place`,
      ];
    });
    const unfinished = unfinishedOf(state, seen.images).map(
      (file) =>
        `an unfinished copy to ${file} was left, as by an update that was cut: \`pulumi up\` ends that`,
    );
    return [...(now.state === "mixed" ? [mixed] : []), ...ofImages, ...unfinished];
  },
};
