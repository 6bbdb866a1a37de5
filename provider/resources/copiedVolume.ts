/**
 * A copied volume: the content of a source in a logical volume of another host.
 *
 * The copy runs onto a volume of another name, made for it alone. That gets the wanted name only when it has been read back,
 * compared with its source, and the source's snapshot was seen to be valid after the last byte; an earlier copy keeps the name
 * until then. From the moment its tags call it verified, a cut changes nothing but who finishes the rest.
 */
import { randomUUID } from "node:crypto";
import { z } from "zod";
import { parseOutput, refusal, succeed } from "../core/command.js";
import { isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import { refusing } from "../core/inputs.js";
import { generationMark, markAmong, ownerMark } from "../core/owner.js";
import { ChangedMeanwhile, type CommonObservation, type Context, type Problem } from "../core/resource.js";
import {
  asideOf,
  type CopyFacts,
  copyIdAmong,
  copyTags,
  createVolumeCommand,
  devicePath,
  discardVolumeScript,
  extentsFor,
  factsAmong,
  type GroupRoom,
  isAsTagged,
  nameVolumeScript,
  outdatedTags,
  ownPrefixes,
  ownTags,
  parseRoom,
  partOf,
  preflightVolumeScript,
  readOnlyTag,
  removeVolumeScript,
  renameVolumeScript,
  runTagAmong,
  runTagOf,
  type VolumeName,
  volumeWritable,
} from "../linux/copiedVolume.js";
import { bytesPhrase, type CopyResult, parseRate } from "../linux/copyJob.js";
import { type DeviceCopyPlan, deviceCopyPrograms, deviceJob } from "../linux/deviceCopy.js";
import { parseFields } from "../linux/fields.js";
import {
  deviceMapperNameProblem,
  type LogicalVolume,
  logicalVolumeNameProblem,
  lvmFailure,
  tagCommand,
  volumeGroupNameProblem,
} from "../linux/lvm.js";
import { withoutTls } from "../linux/nbd.js";
import { missingPrograms } from "../linux/programs.js";
import { type CopyIdentity, runCopy } from "./copyRun.js";
import {
  asReadable,
  begunWith,
  type CopySource,
  certifySize,
  comparedBy,
  emptyRanges,
  explained,
  isRefusedNow,
  isVerifiable,
  refused,
  sourceSize,
  sourceSumOf,
} from "./copySource.js";
import {
  changeVolumeByScript,
  type DeviceCopyRecord,
  type DeviceJobObservation,
  deviceSum,
  followingOf,
  observeDeviceJob,
  requireClosed,
  startDeviceCopy,
} from "./deviceCopy.js";
import type { copyOutputs } from "./image.js";
import { asking } from "./tls.js";
import {
  changeVolume,
  listed,
  named,
  pathOf,
  refuseSuspended,
  requireGroup,
  serversOf,
  volumes,
} from "./volumes.js";

/** Which volume a copy goes to. */
export const volumeInput = z.strictObject({
  volumeGroup: z
    .string()
    .superRefine(refusing(volumeGroupNameProblem))
    .describe("Volume group, with room for the copy; for its renewal with room for two."),
  name: z.string().superRefine(refusing(nameProblem)).describe("Name of the volume. It must not exist yet."),
});

function nameProblem(name: string): string | undefined {
  const own = ownPrefixes.find((prefix) => name.startsWith(prefix));
  return own === undefined
    ? logicalVolumeNameProblem(name)
    : `"${name}" must not begin with "${own}", as what a copy makes beside its volume does`;
}

/** Whether the names fit, of the unfinished copy's too, which is longer than that of one put aside. */
export function volumeProblems(volume: VolumeName): Problem[] {
  return [volume, partOf(volume)].flatMap(({ volumeGroup, name }) => {
    const reason = deviceMapperNameProblem(volumeGroup, name);
    return reason === undefined ? [] : [{ property: "volume", reason: `"${name}" ${reason}` }];
  });
}

/** What is copied to where, for whom. */
export interface VolumeWanted extends CopySource {
  readonly owner: string;
  readonly volume: VolumeName;
  readonly connections: number;
  readonly bandwidthLimit?: string | number | undefined;
  readonly verify: boolean;
}

/** What was seen of a copied volume and of an unfinished copy. */
export interface VolumeObservation extends CommonObservation {
  readonly mark: string | undefined;
  readonly halfMade: boolean;
  /** What bears the name, a copy or not. */
  readonly lv: LogicalVolume | undefined;
  /** What its tags say, if they say it of this very volume. */
  readonly facts: CopyFacts | undefined;
  readonly copyId: string | undefined;
  readonly part: LogicalVolume | undefined;
  /** An earlier copy that was to be removed. */
  readonly aside: LogicalVolume | undefined;
  readonly job: DeviceJobObservation | undefined;
  /** COW snapshots of the volume would be removed with it. */
  readonly all: readonly LogicalVolume[];
  /** What reading the whole copy showed. */
  readonly content: "unread" | "good" | "bad";
}

/** Of a volume that is not there. */
export const noVolume: VolumeObservation = {
  ...{ mark: undefined, halfMade: false, adoptable: false, lv: undefined, facts: undefined },
  ...{ copyId: undefined, part: undefined, aside: undefined, job: undefined, all: [], content: "unread" },
};

/** Looks at the volume and at what an unfinished copy has left. */
export async function observeVolume(
  context: Context,
  volume: VolumeName,
): Promise<VolumeObservation | undefined> {
  const all = await volumes(context);
  const find = ({ volumeGroup, name }: VolumeName) => named(all, volumeGroup, name);
  const [lv, part, other] = [find(volume), find(partOf(volume)), find(asideOf(volume))];
  const aside = other !== undefined && isAsTagged(other, all) ? other : undefined;
  // What lies there and is no unfinished copy says nothing of the copy; `makePart` refuses it.
  const isBegun = part !== undefined && runTagAmong(part.tags) !== undefined;
  if (lv === undefined && aside === undefined && !isBegun) {
    await requireGroup(context, volume.volumeGroup, all);
    return undefined;
  }
  refuseSuspended(context, [lv, part, aside]);
  if (lv?.health.includes("partial")) throw diskMissing(context, lv);
  // Another resource of this name has the same mark: without our tags it is no copy. Nor is one that took our tags along.
  const facts = lv !== undefined && isAsTagged(lv, all) ? factsAmong(lv.tags) : undefined;
  // What is verified is bound to have the name; until then the earlier copy stands for it.
  const nameless = part !== undefined && isAsTagged(part, all) ? part : aside;
  const copy = lv === undefined ? nameless : facts && lv;
  const marked = lv === undefined ? (copy ?? part) : copy;
  return {
    mark: marked && copyIdAmong(marked.tags) === undefined ? undefined : markAmong(marked?.tags ?? []),
    halfMade: lv === undefined && copy === undefined,
    adoptable: false,
    ...{ lv, facts, part, aside, all },
    copyId: copy && copyIdAmong(copy.tags),
    job: part && (await observeDeviceJob(context, deviceJob(devicePath(volume)))),
    content: "unread",
  };
}

function diskMissing(context: Context, lv: LogicalVolume): LvmNbdError {
  return refusal(
    context,
    "DEVICE_UNREADABLE",
    `a disk of ${pathOf(lv)} is missing, so that nothing can be told of its content`,
    `Bring the disk back (\`pvs\`, \`vgs -o +vg_missing_pv_count ${lv.volumeGroup}\`). If it is lost for good, take the copy out of the state (\`pulumi state delete URN\`) and remove the volume by hand.`,
  );
}

/** True for a copy that somebody made writable: it is a disk of its own by now. */
export function isHandedOver(seen: VolumeObservation): boolean {
  return isWritable(seen) && seen.facts?.readOnly === 1;
}

function isWritable({ lv, facts }: VolumeObservation): boolean {
  return lv !== undefined && facts !== undefined && !lv.readOnly;
}

/** What was written to a copy since is nobody's to give up. */
function refuseWritable(context: Context, volume: VolumeName, seen: VolumeObservation): void {
  if (isWritable(seen)) throw madeWritable(context, volume);
}

function madeWritable(context: Context, volume: VolumeName): LvmNbdError {
  const path = pathOf(volume);
  return refusal(
    context,
    "VOLUME_IN_USE",
    `${path} was made writable since it was copied: what was written to it would be lost`,
    `Nothing was touched. If it is a disk of its own now, take the resource out of the program: the volume stays, without its tags. If it is not, \`lvchange -p r ${path}\`, and run again.`,
  );
}

/** Reads the whole copy. */
export async function inspectVolume(
  context: Context,
  volume: VolumeName,
  seen: VolumeObservation,
): Promise<VolumeObservation> {
  if (seen.lv === undefined || seen.facts === undefined || !isVolumeAsMade(seen) || isHandedOver(seen))
    return seen;
  const path = devicePath(volume);
  if (!seen.lv.active) {
    throw refusal(
      context,
      "DEVICE_NOT_FOUND",
      `${path} is not active, so it cannot be read for \`deepCheck\``,
      `Activate it (\`lvchange -ay ${pathOf(volume)}\`) and run again.`,
    );
  }
  context.progress(`reading ${path} to check its content (deepCheck)`);
  const sum = await deviceSum(context, path, seen.facts.sizeBytes);
  return { ...seen, content: sum === seen.facts.sha256 ? "good" : "bad" };
}

/** True if the volume has the size that it was made with. */
export function isVolumeAsMade({ lv, facts }: VolumeObservation): boolean {
  return lv !== undefined && lv.sizeBytes === facts?.volumeBytes;
}

/** Of a copy that has lost its name to a cut the one that it has; `undefined` for one that has its own. */
export function otherName({ lv, part, aside }: VolumeObservation): string | undefined {
  return lv === undefined ? (aside ?? part)?.name : undefined;
}

/** For which declaration the copy was made. */
export function isOfGeneration({ lv }: VolumeObservation, generation: string): boolean {
  return lv?.tags.includes(generation) === true;
}

/** Makes the volume there is into the declared one; see `bring` of image.ts. */
export async function bringVolume(
  context: Context,
  wanted: VolumeWanted,
  seen: VolumeObservation,
  {
    isRight,
    copyId,
    generation,
  }: { readonly isRight: boolean; readonly copyId: string | undefined; readonly generation: string },
): Promise<void> {
  refuseOthers(context, wanted, seen);
  refuseWritable(context, wanted.volume, seen);
  if (!isRight) return copyToVolume(context, wanted, seen, { copyId: copyId ?? randomUUID(), generation });
  const begun = ownRun(wanted.owner, seen);
  if (begun !== undefined) await discard(context, wanted.volume, begun);
  await removeAside(context, wanted.owner, seen);
  const own = ownerMark(wanted.owner);
  // Taken over by a create, it is this resource's from now on, and no longer goes with the one that made it.
  if (seen.lv === undefined || seen.facts === undefined || (copyId !== undefined && seen.mark === own))
    return;
  const right = [own, generation, ...copyTags(copyId ?? randomUUID(), seen.facts)];
  await changeVolume(
    context,
    seen.lv.volumeGroup,
    tagCommand(seen.lv, missingTags(seen.lv, right), outdatedTags(seen.lv.tags, right)),
    `the tags of ${seen.lv.name} could not be changed`,
  );
}

function missingTags({ tags }: LogicalVolume, right: readonly string[]): string[] {
  return right.filter((tag) => !tags.includes(tag));
}

/**
 * True for what a copy has made beside its volume, if it was this resource, or the one whose copy is there. Renamed since, the
 * resource has another mark, but the same id.
 */
function isOurs(owner: string, { mark, copyId }: VolumeObservation, { tags }: LogicalVolume): boolean {
  const own = markAmong(tags);
  if (own === undefined) return false;
  return own === ownerMark(owner) || own === mark || (copyId !== undefined && copyIdAmong(tags) === copyId);
}

/** The tag of the job on an unfinished copy of ours. */
function ownRun(owner: string, seen: VolumeObservation): string | undefined {
  const { part } = seen;
  return part !== undefined && isOurs(owner, seen, part) ? runTagAmong(part.tags) : undefined;
}

/**
 * Removes the earlier copy, if it is ours and the new one has its name. One that was made writable is left alone. Returns what
 * is there then.
 */
async function removeAside(
  context: Context,
  owner: string,
  seen: VolumeObservation,
): Promise<VolumeObservation> {
  const { lv, aside, all } = seen;
  if (lv === undefined || aside === undefined || !isOurs(owner, seen, aside)) return seen;
  if (aside.readOnly) {
    await removeClosed(context, aside, all);
    return { ...seen, aside: undefined, all: all.filter((one) => one !== aside) };
  }
  context.warn(
    `${pathOf(aside)}, the earlier copy, was made writable and is left alone: give the disk that it is now another name (\`lvrename\`), or, if it is none, \`lvchange -p r ${pathOf(aside)}\` and run again`,
  );
  return seen;
}

/** An earlier copy could not be put aside where something lies. */
function refuseAside(context: Context, volume: VolumeName, { lv, all }: VolumeObservation): void {
  const aside = asideOf(volume);
  if (lv === undefined || named(all, aside.volumeGroup, aside.name) === undefined) return;
  throw new LvmNbdError("FOREIGN_RESOURCE", {
    message: `volume: ${pathOf(aside)} exists, and is no earlier copy that could be removed; ${volume.name} would have that name while it is replaced`,
    host: context.host.name,
    resource: context.resource,
    property: "volume",
    advice: `Give it another name (\`lvrename ${aside.volumeGroup} ${aside.name} NAME\`), or remove it by hand, and run again.`,
  });
}

/** Removes a volume of ours that nobody uses. */
async function removeClosed(
  context: Context,
  lv: LogicalVolume,
  all: readonly LogicalVolume[],
): Promise<void> {
  const path = pathOf(lv);
  await requireUnused(context, lv, all);
  context.progress(`removing the copy ${path}`);
  const argv = script(removeVolumeScript, lv.volumeGroup, lv.name, lv.uuid);
  await giveUp(context, lv, `${path} could not be removed`, argv, [lv]);
}

/** Runs a script that gives up a copy. One that was made writable since it was seen is looked at again. */
async function giveUp(
  context: Context,
  lv: LogicalVolume,
  what: string,
  argv: string[],
  closed: readonly LogicalVolume[],
): Promise<void> {
  try {
    await changeVolumeByScript(context, lv.volumeGroup, what, argv, closed);
  } catch (error) {
    if (!isLvmNbdError(error) || error.details.exitCode !== volumeWritable) throw error;
    throw new ChangedMeanwhile(madeWritable(context, lv));
  }
}

/** Raises VOLUME_IN_USE if somebody has the volume open or serves it, or if something would go with it. */
async function requireUnused(
  context: Context,
  lv: LogicalVolume,
  all: readonly LogicalVolume[],
): Promise<void> {
  await requireClosed(context, lv, all);
  const servers = await serversOf(context, [lv]);
  if (servers.length > 0)
    throw refusal(context, "VOLUME_IN_USE", `${pathOf(lv)} is in use: ${servers.join(", ")}`);
}

/** An unfinished copy of somebody else's is refused. */
function refuseOthers(
  context: Context,
  { volume, owner }: Pick<VolumeWanted, "volume" | "owner">,
  seen: VolumeObservation,
): void {
  if (seen.part !== undefined && ownRun(owner, seen) === undefined) throw foreignPart(context, volume);
}

function foreignPart(context: Context, volume: VolumeName): LvmNbdError {
  return new LvmNbdError("FOREIGN_RESOURCE", {
    message: `volume: ${pathOf(partOf(volume))} exists and is not an unfinished copy of this resource to ${volume.name}`,
    host: context.host.name,
    resource: context.resource,
    property: "volume",
    advice: "Choose another `volume`, or remove what is there by hand.",
  });
}

/** Makes the copy, or goes on with one of ours that runs, has ended or is verified already. */
export async function copyToVolume(
  context: Context,
  wanted: VolumeWanted,
  found: VolumeObservation,
  identity: CopyIdentity,
): Promise<void> {
  const { volume, uri, snapshot, verify } = wanted;
  const [path, job] = [devicePath(volume), deviceJob(devicePath(volume))];
  const verifiedPart = found.part !== undefined && isAsTagged(found.part, found.all) ? found.part : undefined;
  const verifiedFacts = verifiedPart && factsAmong(verifiedPart.tags);
  if (
    verifiedPart?.tags.includes(identity.generation) &&
    verifiedFacts !== undefined &&
    (verifiedFacts.verified || !verify)
  ) {
    context.progress(`the copy ${verifiedPart.name} is verified already: giving it its name`);
    const seen = await removeAside(context, wanted.owner, found);
    refuseAside(context, volume, seen);
    await giveName(context, wanted, seen, verifiedPart, identityTags(wanted, identity, verifiedFacts));
    return;
  }
  const renamed = await withName(context, wanted, found, verifiedPart);
  refuseWritable(context, volume, renamed);
  const isRight = isVolumeAsMade(renamed) && (renamed.facts?.verified === true || !verify);
  if (found.lv === undefined && isRight && isOfGeneration(renamed, identity.generation)) return;
  const seen = await removeAside(context, wanted.owner, renamed);
  // Also of a known snapshot another `uri` is another source: that it serves the snapshot is the program's word alone.
  const generation = generationMark([identity.generation, withoutTls(uri), snapshot?.uuid ?? ""]);
  let { part } = seen;
  const facts = part && factsAmong(part.tags);
  const { running, record, recordDigest, result } = seen.job ?? {};
  // Of a source without identity, what a job read some time ago may be another moment.
  const goesOn = running === true || (result !== undefined && snapshot !== undefined);
  const asDeclared = record?.generation === generation && isVerifiable(record, wanted);
  const writesIt = part?.tags.includes(runTagOf(recordDigest ?? "")) === true;
  const isWanted = goesOn && asDeclared && writesIt && facts === undefined;
  const runTag = ownRun(wanted.owner, seen);
  if (runTag !== undefined && (!isWanted || (await isRefusedNow(context, record, wanted)))) {
    context.progress(`removing an unfinished copy to ${path}`);
    await discard(context, volume, runTag);
    part = undefined;
  }
  let compared = comparedBy(part && record, wanted);
  let sizeBytes = 0;
  let extents = 0;
  let empty = "";
  const [verified, told] = await runCopy(context, {
    target: path,
    unfinished: partOf(volume).name,
    whenFull: undefined,
    going: part && recordDigest,
    following: followingOf(job),
    prepare: async () => {
      // Found only when the copy is complete, this would have cost hours.
      refuseAside(context, volume, seen);
      if (seen.lv !== undefined) await requireUnused(context, seen.lv, seen.all);
      [sizeBytes, extents] = await preflight(context, wanted, seen);
      compared = await asReadable(context, compared);
      empty = await emptyRanges(context, compared, sizeBytes);
      const told: DeviceCopyRecord = { generation, ...begunWith(compared) };
      return `${JSON.stringify({ ...told, started: randomUUID() })}\n`;
    },
    start: async (newRecord, newDigest) => {
      const tags = [
        ownerMark(wanted.owner),
        identity.generation,
        ...copyTags(identity.copyId),
        runTagOf(newDigest),
      ];
      part = await makePart(context, volume, extents, tags);
      context.progress(`copying ${uri} to ${path}`);
      try {
        await startDeviceCopy(context, job, part, planOf(compared), newRecord, sizeBytes, empty);
      } catch (error) {
        if (isLvmNbdError(error, "COMMAND_FAILED")) await discard(context, volume, runTagOf(newDigest));
        throw error;
      }
    },
    // As it comes out when the copy is prepared.
    get sourceSum() {
      return sourceSumOf(compared);
    },
    certify: async (done) => {
      const lv = await certifySize(context, wanted, done.sizeBytes, compared);
      if (part === undefined) throw new Error("a copy without its volume");
      return [part, factsOf(part, done, snapshot?.uuid, lv?.createdAt)] as const;
    },
    discard: (to, digest) => discard(to, volume, runTagOf(digest)),
    explain: (error, progress) => explained(context, wanted, error, progress),
  });
  context.progress(`the copy is complete: giving it its name ${path}`);
  await giveName(context, wanted, seen, verified, identityTags(wanted, identity, told));
}

/** A copy that lost its name to a cut has it again before anything else is tried: it may be the only one. */
async function withName(
  context: Context,
  wanted: VolumeWanted,
  seen: VolumeObservation,
  verifiedPart: LogicalVolume | undefined,
): Promise<VolumeObservation> {
  const { lv, aside } = seen;
  if (lv !== undefined || (verifiedPart === undefined && aside === undefined)) return seen;
  const { volumeGroup, name } = wanted.volume;
  context.progress(`an earlier copy has lost its name to a cut: giving it ${name} again`);
  if (verifiedPart !== undefined) await giveName(context, wanted, seen, verifiedPart, verifiedPart.tags);
  else if (aside !== undefined) {
    const argv = script(renameVolumeScript, volumeGroup, aside.name, aside.uuid, name);
    const what = `${aside.name} could not get its name ${volumeGroup}/${name} again`;
    await changeVolumeByScript(context, volumeGroup, what, argv, [aside]);
  }
  return (await observeVolume(context, wanted.volume)) ?? noVolume;
}

/** The tags of a verified copy. */
function identityTags(
  { owner }: VolumeWanted,
  { copyId, generation }: CopyIdentity,
  facts: CopyFacts,
): string[] {
  return [ownerMark(owner), generation, ...copyTags(copyId, facts)];
}

function planOf(wanted: VolumeWanted): DeviceCopyPlan {
  const { uri, tls, connections, bandwidthLimit } = wanted;
  const limit = bandwidthLimit === undefined ? undefined : parseRate(bandwidthLimit);
  // What is read on its own host the job does not read again.
  const { verify } = begunWith(wanted);
  // What an earlier volume left there is nobody's to read.
  return { uri, tls, connections, verify, bandwidthLimit: limit, rest: "zero" };
}

function factsOf(
  { uuid, volumeGroup, sizeBytes: volumeBytes }: LogicalVolume,
  { sha256, sizeBytes, verified, startedAt, endedAt }: CopyResult,
  snapshotUuid = "",
  takenAt = 0,
): CopyFacts {
  const seconds = endedAt - startedAt;
  return {
    ...{ uuid, volumeGroup, volumeBytes, sha256, sizeBytes, verified, seconds },
    ...{ completedAt: endedAt, snapshotUuid, takenAt, readOnly: 0 },
  };
}

/** Finds out before anything is made what would make the copy fail. Returns the source's size and the volume's extents. */
async function preflight(
  context: Context,
  wanted: VolumeWanted,
  seen: VolumeObservation,
): Promise<[sizeBytes: number, extents: number]> {
  const { uri, volume } = wanted;
  const programs = deviceCopyPrograms(planOf(wanted));
  const asked = asking(uri, wanted.tls);
  const looking = asked.command(preflightVolumeScript, volume.volumeGroup, asked.uri, ...programs);
  const command = { ...looking, kind: "read", deadlineSeconds: 60 } as const;
  const result = await succeed(context, command, "the host could not be looked at");
  const fields = parseOutput(context, command, result, parseFields);
  const missing = missingPrograms(fields);
  if (missing !== undefined) throw refused(context, "PROGRAM_MISSING", "host", missing);
  const group = fields.get("group") ?? "";
  if (fields.get("group.rc") !== "0") {
    const all = await volumes(context);
    const there = listed(all.map((lv) => lv.volumeGroup));
    const message = `the volume group "${volume.volumeGroup}" could not be looked at; there are: ${there}`;
    throw refused(context, lvmFailure(group) ?? "COMMAND_FAILED", "volume", message, group);
  }
  const room = parseOutput(context, command, { ...result, stdout: group }, parseRoom);
  const sizeBytes = await sourceSize(context, wanted, {
    exitCode: fields.get("size.rc"),
    text: fields.get("size") ?? "",
  });
  const extents = extentsFor(sizeBytes, room.extentBytes);
  requireRoom(context, wanted, room, extents, seen.lv);
  return [sizeBytes, extents];
}

function requireRoom(
  context: Context,
  { volume }: VolumeWanted,
  { freeBytes, extentBytes }: GroupRoom,
  extents: number,
  earlier: LogicalVolume | undefined,
): void {
  const needed = extents * extentBytes;
  if (freeBytes >= needed) return;
  const number = (bytes: number) => `${bytesPhrase(bytes)} (${bytes} bytes)`;
  const both =
    earlier === undefined
      ? ""
      : `; the earlier copy with its ${bytesPhrase(earlier.sizeBytes)} is kept until the new one is verified, so there must be room for both`;
  throw new LvmNbdError("NO_SPACE", {
    message: `volume: ${volume.volumeGroup} has ${number(freeBytes)} free, the copy needs ${number(needed)}${both}`,
    host: context.host.name,
    resource: context.resource,
    property: "volume",
    advice: `Nothing was made. Give the group at least ${number(needed - freeBytes)} more (\`vgextend\`), remove volumes that are not needed, or choose another \`volume\`.`,
  });
}

/** Makes the volume of an unfinished copy, whose name is free. */
async function makePart(
  context: Context,
  volume: VolumeName,
  extents: number,
  tags: readonly string[],
): Promise<LogicalVolume> {
  const part = partOf(volume);
  const path = pathOf(part);
  let failed: unknown;
  try {
    await changeVolume(
      context,
      part.volumeGroup,
      createVolumeCommand(part, extents, tags),
      `the volume ${path} for the unfinished copy could not be made`,
    );
  } catch (error) {
    const taken = isLvmNbdError(error) && /already exists in volume group/.test(error.details.stderr ?? "");
    if (!taken) throw error;
    failed = error;
  }
  const there = named(await volumes(context), part.volumeGroup, part.name);
  if (there !== undefined && tags.every((tag) => there.tags.includes(tag))) return there;
  if (there !== undefined && runTagAmong(there.tags) === undefined) throw foreignPart(context, volume);
  throw new ChangedMeanwhile(
    isLvmNbdError(failed)
      ? failed
      : refusal(context, "COPY_FAILED", `somebody else removed ${path} right after it was made`),
  );
}

/** Makes the unfinished copy read-only, calls it verified by `right`, its tags, gives it its name, and removes the earlier one that had it. */
async function giveName(
  context: Context,
  wanted: VolumeWanted,
  seen: VolumeObservation,
  part: LogicalVolume,
  right: readonly string[],
): Promise<void> {
  const { volume, owner } = wanted;
  const { lv } = seen;
  const { unit, run } = deviceJob(devicePath(volume));
  const all = [...right, readOnlyTag];
  const tags = [
    ...missingTags(part, all).flatMap((tag) => ["--addtag", tag]),
    ...outdatedTags(part.tags, all).flatMap((tag) => ["--deltag", tag]),
  ];
  const { volumeGroup, name } = volume;
  const what = `the verified copy ${part.name} could not get its name ${volumeGroup}/${name}`;
  if (lv !== undefined) await requireUnused(context, lv, seen.all);
  const names = [volumeGroup, name, lv?.uuid ?? "-", asideOf(volume).name, part.name, part.uuid];
  const argv = script(nameVolumeScript, unit, run, ...names, ...tags);
  if (lv === undefined) await changeVolumeByScript(context, volumeGroup, what, argv, [part]);
  else await giveUp(context, lv, what, argv, [lv, part]);
  if (lv !== undefined || seen.aside === undefined) return;
  const now = await observeVolume(context, volume);
  if (now !== undefined) await removeAside(context, owner, now);
}

/** Ends the job of that tag and removes the volume that it writes. */
async function discard(context: Context, volume: VolumeName, runTag: string): Promise<void> {
  const { unit, run } = deviceJob(devicePath(volume));
  const { volumeGroup, name } = partOf(volume);
  const what = `the unfinished copy ${volumeGroup}/${name} could not be removed`;
  const argv = script(discardVolumeScript, unit, run, volumeGroup, name, runTag);
  await changeVolumeByScript(context, volumeGroup, what, argv, []);
}

/** Leaves a volume that was made writable to whoever uses it: it is no copy any more. */
async function release(context: Context, lv: LogicalVolume): Promise<void> {
  const path = pathOf(lv);
  context.warn(
    `${path} was made writable since it was copied: it is taken for a disk of its own and NOT removed, only its tags are. If it is none, \`lvremove ${path}\``,
  );
  await changeVolume(
    context,
    lv.volumeGroup,
    tagCommand(lv, [], ownTags(lv.tags)),
    `the tags of ${path} could not be removed`,
  );
}

/** Removes the volume, and what is unfinished of ours. What was made writable stays. */
export async function removeVolume(
  context: Context,
  { volume, owner }: { readonly volume: VolumeName; readonly owner: string },
  seen: VolumeObservation,
): Promise<void> {
  const { lv, aside, all } = seen;
  if (lv?.readOnly === true) await requireUnused(context, lv, all);
  // What another resource has begun there is left alone.
  const runTag = ownRun(owner, seen);
  if (runTag !== undefined) await discard(context, volume, runTag);
  const earlier = aside !== undefined && isOurs(owner, seen, aside) ? [aside] : [];
  for (const one of [...earlier, ...(lv === undefined ? [] : [lv])]) {
    if (one.readOnly) await removeClosed(context, one, all);
    else await release(context, one);
  }
}

/** What is added to the state of a copied volume. */
export const volumeOutputs = {
  path: z.string().describe("The file, or the device `/dev/VG/LV` of the volume."),
  uuid: z.string().describe("LVM UUID of the volume."),
} as const;

type VolumeState = z.infer<z.ZodObject<typeof copyOutputs & typeof volumeOutputs>>;

/** The outputs of a copied volume; `before`: those of the state. */
export function volumeState(
  volume: VolumeName,
  before: (Omit<VolumeState, "uuid"> & { readonly uuid?: string | undefined }) | undefined,
  { lv, facts, copyId }: VolumeObservation,
): VolumeState {
  const seconds = facts?.seconds ?? before?.seconds ?? 0;
  const sizeBytes = facts?.sizeBytes ?? before?.sizeBytes ?? 0;
  return {
    path: devicePath(volume),
    uuid: lv?.uuid ?? before?.uuid ?? "",
    sha256: facts?.sha256 ?? before?.sha256 ?? "",
    sizeBytes,
    allocatedBytes: lv?.sizeBytes ?? before?.allocatedBytes ?? 0,
    seconds,
    bytesPerSecond: Math.round(sizeBytes / Math.max(1, seconds)),
    completedAt:
      facts === undefined ? (before?.completedAt ?? "") : new Date(facts.completedAt * 1000).toISOString(),
    verified: facts?.verified ?? before?.verified ?? false,
    copyId: copyId ?? before?.copyId ?? "",
  };
}
