/**
 * BackupImage: one moment of a volume as a verified image on another host.
 *
 * The volume is snapshotted (frozen by `quiesce`), the snapshot is exported to the image's host alone, copied, verified, and
 * everything on the source is taken down again. Snapshot and export carry the mark of a series, all backups of this volume to
 * this folder, so that what a killed run has left is found by the next one, whatever generation that makes. An image once
 * made is history: nothing but `triggers` ever makes `pulumi up` put another moment in its place.
 */
import { createHash, randomUUID } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { script, succeed } from "../core/command.js";
import { firstLine, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { commonInputs, hostInput, refusing, triggersInput } from "../core/inputs.js";
import { generationMark, ownerMark, ownerOf } from "../core/owner.js";
import { converge as convergeOn, PartialSuccess, remove as removeFrom } from "../core/reconciler.js";
import {
  type AnyResourceType,
  type Change,
  ChangedMeanwhile,
  type CommonInputs,
  type Context,
  type Problem,
  type ResourceType,
} from "../core/resource.js";
import { serially } from "../core/serial.js";
import { clientProblem } from "../linux/addresses.js";
import { copyName, folderOf } from "../linux/copyJob.js";
import { livingCopiesScript } from "../linux/copyScripts.js";
import { nbdServers } from "../linux/nbd.js";
import { hostName } from "../ssh/config.js";
import {
  compressProblems,
  copyImage,
  type ImageObservation,
  imageInputs,
  imageOutputs,
  imageResource,
  imageState,
  isAsMade,
  isDecided,
  isRotten,
  keepImage,
  noImage,
  observeImage,
  removeImage,
  requireDestination,
  takenAtOf,
} from "./image.js";
import { type LvSnapshotOutputs, lvSnapshot, lvSnapshotInputs } from "./lvSnapshot.js";
import { type NbdExportOutputs, nbdExport, nbdExportInputs } from "./nbdExport.js";
import { volumes } from "./volumes.js";

const { volumeGroup, origin, size, chunkSize, quiesce } = lvSnapshotInputs.shape;
const { listenAddress, port } = nbdExportInputs.shape;

const inputs = z.strictObject({
  ...commonInputs,
  source: z
    .strictObject({
      host: hostInput,
      volumeGroup: volumeGroup.describe("Volume group of the volume."),
      origin: origin.describe("Logical volume that is backed up."),
      ...{ size, chunkSize, quiesce },
      listenAddress: listenAddress.describe(
        "Address of the source at which the image's host reaches it. The moment is exported there, to that host alone, while " +
          "it is copied.",
      ),
      clientAddress: z
        .string()
        .superRefine(refusing(clientProblem))
        .optional()
        .describe(
          "Address with which the image's host comes to the source. Default: the one that its routes give.",
        ),
      port: port
        .unwrap()
        .optional()
        .describe(
          "TCP port of the export. Default: the first free one of ten, from one between 20000 and 29980 that follows from the names.",
        ),
      server: z.enum(nbdServers).default("nbdkit").describe("Program that serves."),
    })
    .describe("The volume, how its moment is kept (as of an LvSnapshot) and how it is served."),
  ...imageInputs,
  triggers: triggersInput.describe(
    "Any values; a change of one backs up anew. The earlier image is kept until the new one is verified.",
  ),
});

const outputs = z.object({
  ...imageOutputs,
  takenAt: z.string().describe("The moment that the image holds (ISO 8601, by the source's clock)."),
  state: z
    .enum(["complete", "changed", "corrupt"])
    .describe(
      "`complete`; `changed` (size or time of modification differ from the manifest); `corrupt` (`deepCheck` read something else).",
    ),
});

type Inputs = z.infer<typeof inputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type BackupImageDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type BackupImageOutputs = State;

/** Of the declaration only this makes another moment of an image there is. */
function generationOf(wanted: Inputs): string {
  return generationMark(["backup", wanted.triggers]);
}

/** What a backup makes on the source, and takes down again. */
interface Parts {
  readonly context: Context;
  readonly snapshot: CommonInputs & { readonly name: string };
  /** Its port, where none is declared, is found by trying. */
  readonly exported: CommonInputs & { readonly port: number };
  readonly ports: readonly number[];
  /** What the names of all snapshots of the series begin with. */
  readonly series: string;
}

const portsTried = 10;

/** `clientAddress`: "" where it does not matter. */
async function partsOf(context: Context, wanted: Inputs, clientAddress: string): Promise<Parts> {
  const { source, file, owner } = wanted;
  const [organization = "", project = "", stack = ""] = owner.split("/");
  const volume = `${source.volumeGroup}/${source.origin}`;
  const what = `${hostName(source.host)} ${volume} to ${context.host.name}:${folderOf(file)}`;
  const digest = createHash("sha256").update(`${organization}/${project}/${stack} ${what}`).digest();
  const series = `backup-${digest.toString("hex").slice(0, 16)}-`;
  const name = `${series}${copyName(file)}`;
  const common = { host: source.host, owner: ownerOf(organization, project, stack, `backups of ${what}`) };
  const first = 20_000 + (digest.readUInt32BE(20) % 999) * portsTried;
  const ports = source.port === undefined ? consecutive(first, portsTried) : [source.port];
  const host = await context.open(source.host);
  return {
    context: { ...context, host },
    snapshot: lvSnapshotInputs.parse({
      ...common,
      ...{ volumeGroup: source.volumeGroup, origin: source.origin, name },
      ...{ size: source.size, chunkSize: source.chunkSize, quiesce: source.quiesce },
      triggers: wanted.triggers,
    }),
    exported: nbdExportInputs.parse({
      ...common,
      ...{ device: `/dev/${source.volumeGroup}/${name}`, exportName: name, server: source.server },
      ...{ listenAddress: source.listenAddress, clients: clientAddress === "" ? [] : [clientAddress] },
      port: ports[0],
    }),
    ports,
    series,
  };
}

function consecutive(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, index) => first + index);
}

/** With which address the image's host comes to the source. */
async function clientAddressOf(context: Context, { source }: Inputs): Promise<string> {
  if (source.clientAddress !== undefined) return source.clientAddress;
  const result = await succeed(
    context,
    { argv: ["ip", "-o", "route", "get", source.listenAddress], kind: "read", deadlineSeconds: 30 },
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

/** One backup of a series at a time in this process, by whatever credentials its hosts are reached. */
const queue = {};

async function backUp(
  context: Context,
  wanted: Inputs,
  seen: ImageObservation,
  copyId: string | undefined,
): Promise<void> {
  // What cannot end well is refused before the VM is frozen for it.
  await requireDestination(context, wanted, seen);
  const parts = await partsOf(context, wanted, await clientAddressOf(context, wanted));
  await serially(queue, parts.series, async () => {
    try {
      await sweep(context, parts);
      if (!(await goesOn(parts, wanted, seen))) await takeDown(parts);
      const snapshot = (await made(lvSnapshot, parts.context, parts.snapshot)) as LvSnapshotOutputs;
      const uri = await exportMoment(parts);
      const copied = { ...wanted, uri, snapshot };
      await copyImage(context, copied, seen, {
        copyId: copyId ?? randomUUID(),
        generation: generationOf(wanted),
      });
    } catch (error) {
      if (!(await mayGoOn(context, wanted, error))) await takeDownAfter(parts);
      throw error;
    }
    try {
      await takeDown(parts);
    } catch (error) {
      if (isLvmNbdError(error, "CANCELLED")) await takeDownAfter(parts);
      throw error;
    }
  });
}

/** So long a snapshot waits for the next run of a backup whose copy is complete, or broke off unseen. */
const waitingHours = 12;

/**
 * Takes down what other backups of the series have left: for which no copy runs, and none has waited for less than
 * `waitingHours` to be gone on with.
 */
async function sweep(context: Context, parts: Parts): Promise<void> {
  const mark = ownerMark(parts.snapshot.owner);
  const left = (await volumes(parts.context)).filter(
    ({ name, tags }) => name.startsWith(parts.series) && name !== parts.snapshot.name && tags.includes(mark),
  );
  if (left.length === 0) return;
  const copyOf = (name: string) => name.slice(parts.series.length);
  const command = {
    argv: script(livingCopiesScript, ...left.map(({ name }) => copyOf(name))),
    ...({ kind: "read", deadlineSeconds: 60 } as const),
  };
  const { stdout } = await succeed(context, command, "the copies under way could not be listed");
  const living = new Set(stdout.split("\n"));
  for (const { name, volumeGroup, createdAt } of left) {
    const waits = living.has(`waits ${copyOf(name)}`) && Date.now() / 1000 - createdAt < waitingHours * 3600;
    if (living.has(`runs ${copyOf(name)}`) || waits) continue;
    context.progress(`taking down ${volumeGroup}/${name}, which an earlier backup has left`);
    const device = `/dev/${volumeGroup}/${name}`;
    await takeDown({
      ...parts,
      snapshot: { ...parts.snapshot, name },
      exported: { ...parts.exported, exportName: name, device } as Parts["exported"],
    });
  }
}

/** True if a copy of ours is under way, from the moment that is kept for it. Any other moment left is too old to be meant. */
async function goesOn(parts: Parts, wanted: Inputs, seen: ImageObservation): Promise<boolean> {
  if (seen.part?.record?.mark !== ownerMark(wanted.owner)) return false;
  const snapshot = lvSnapshotInputs.parse(parts.snapshot);
  const kept = await lvSnapshot.observe(parts.context, snapshot);
  return kept?.mark === ownerMark(parts.snapshot.owner) && lvSnapshot.isStale?.(kept, snapshot) === false;
}

/** A part by its own handlers: what a cut left is found by its mark and finished. */
async function made(type: AnyResourceType, context: Context, wanted: CommonInputs): Promise<CommonInputs> {
  try {
    return await convergeOn(type, context, wanted, undefined);
  } catch (error) {
    throw error instanceof PartialSuccess ? error.cause : error;
  }
}

/** Returns the uri. */
async function exportMoment(parts: Parts): Promise<string> {
  const kept = await nbdExport.observe(parts.context, nbdExportInputs.parse(parts.exported));
  const ports = kept?.plan !== undefined && parts.ports.length > 1 ? [kept.plan.port] : [];
  let taken: unknown;
  for (const port of [...ports, ...parts.ports]) {
    try {
      const exported = await made(nbdExport, parts.context, { ...parts.exported, port } as CommonInputs);
      return (exported as NbdExportOutputs).uri;
    } catch (error) {
      if (!isLvmNbdError(error, "PORT_IN_USE")) throw error;
      taken = error;
    }
  }
  throw taken;
}

/**
 * True if the copy goes on without us, or if that cannot be told: then its snapshot and its export stay, and the next run
 * goes on from there.
 */
async function mayGoOn(context: Context, wanted: Inputs, error: unknown): Promise<boolean> {
  // The same run looks again and goes on.
  if (error instanceof ChangedMeanwhile || isLvmNbdError(error, "LINK_LOST")) return true;
  try {
    const looking = { ...context, signal: AbortSignal.timeout(60_000) };
    const seen = await observeImage(looking, wanted);
    return seen?.part?.record?.mark === ownerMark(wanted.owner);
  } catch (reason) {
    context.warn(
      `whether the copy goes on cannot be told (${firstLine(reason)}): its snapshot and export stay for the next \`pulumi up\``,
    );
    return true;
  }
}

async function takeDown({ context, exported, snapshot }: Parts): Promise<void> {
  await removeFrom(nbdExport, context, exported);
  await removeFrom(lvSnapshot, context, snapshot);
}

/** After a failure, or a cancel, whose signal is aborted already. */
async function takeDownAfter(parts: Parts): Promise<void> {
  try {
    await takeDown({ ...parts, context: { ...parts.context, signal: AbortSignal.timeout(180_000) } });
  } catch (error) {
    parts.context.warn(
      `the snapshot or the export is left on the source, the next backup takes it down: ${firstLine(error)}`,
    );
  }
}

async function converge(
  context: Context,
  wanted: Inputs,
  seen: ImageObservation,
  old: State | undefined,
): Promise<void> {
  const asDeclared = seen.manifest?.generation === generationOf(wanted);
  // A create over an image that somebody has changed is no history.
  const isHistory = seen.file !== undefined && (old !== undefined || isAsMade(seen));
  if (!asDeclared || !(isHistory || isDecided(seen))) return backUp(context, wanted, seen, old?.copyId);
  await keepImage(context, wanted, seen, old?.copyId);
  await takeDownLeft(context, wanted);
}

/** What a broken backup of this image has left. A source that is gone for good must not keep its images from being managed. */
async function takeDownLeft(context: Context, wanted: Inputs): Promise<void> {
  try {
    const parts = await partsOf(context, wanted, "");
    await serially(queue, parts.series, () => takeDown(parts));
  } catch (error) {
    context.warn(
      `whether a broken backup left a snapshot on ${hostName(wanted.source.host)} cannot be told: ${firstLine(error)}`,
    );
  }
}

async function remove(context: Context, state: State, seen: ImageObservation): Promise<void> {
  await removeImage(context, state, seen);
  await takeDownLeft(context, state);
}

function toState(declared: Inputs | State, seen: ImageObservation): State {
  const before = "sha256" in declared ? declared : undefined;
  const rotten = isRotten(before, seen) ? "corrupt" : "complete";
  return {
    ...declared,
    ...imageState(declared.file, before, seen),
    takenAt: (seen.manifest && takenAtOf(seen.manifest)) ?? before?.takenAt ?? "",
    state: isAsMade(seen) ? rotten : "changed",
  };
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  const changed = (property: keyof Inputs & string) =>
    unknown.has(property) || !isDeepStrictEqual(wanted[property], state[property]);
  if (changed("file")) changes.push({ property: "file", effect: "replace" });
  for (const property of ["triggers", "owner"] as const)
    if (changed(property)) changes.push({ property, effect: "update" });
  // How the next one is to be made.
  const later = ["source", "format", "compress", "connections", "bandwidthLimit", "verify", "deepCheck"];
  for (const property of later as (keyof Inputs)[])
    if (changed(property)) changes.push({ property, effect: "connection" });
  return changes;
}

function validate(
  wanted: Partial<Inputs>,
  old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  const problems = compressProblems(wanted, unknown);
  const moves = old?.file !== undefined && wanted.file !== undefined && old.file !== wanted.file;
  // A moment that is kept is not given up for one of now without a word.
  if (moves && !unknown.has("triggers") && isDeepStrictEqual(old.triggers ?? [], wanted.triggers ?? [])) {
    const reason = `would give up the moment in ${old.file} for one of now in ${wanted.file}: declare another resource for that, or change \`triggers\` as well`;
    problems.push({ property: "file", reason });
  }
  return problems;
}

/** The resource as the reconciler sees it. */
export const backupImage: ResourceType<Inputs, State, ImageObservation> = {
  type: "BackupImage",
  description: "One moment of a volume, as a verified image in a file of another host.",
  inputs,
  outputs,
  validate,
  ...imageResource,
  isStale: (seen, wanted) => !isAsMade(seen) || seen.manifest?.generation !== generationOf(wanted),
  toState,
  diff,
  create: (context, wanted) => backUp(context, wanted, noImage, undefined),
  converge,
  remove,
  drift(state, seen) {
    const now = toState(state, seen).state;
    if (now === "complete") return [];
    const what =
      now === "changed"
        ? "was changed: its size or time of modification are not those of the manifest"
        : "does not read back as it was made";
    return [
      `${state.file} ${what}. It is left as it is, since a backup of now would not be what it was: remove the resource, or change \`triggers\` to put one of now in its place`,
    ];
  },
};
