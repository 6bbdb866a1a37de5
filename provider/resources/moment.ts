/**
 * One moment of the volumes of a VM, kept as snapshots on their host and served to one other host while it is copied.
 *
 * Snapshots and exports carry the mark of all backups of the stack to that host, and in their names a volume's series:
 * what a killed run has left is so found by the next backup of the volume, whatever generation that makes.
 */
import { script, succeed } from "../core/command.js";
import { firstLine, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { digest, markAmong, ownerMark, ownerOf, ownerOfMark } from "../core/owner.js";
import { converge as convergeOn, PartialSuccess, remove as removeFrom } from "../core/reconciler.js";
import type { Context } from "../core/resource.js";
import { serially } from "../core/serial.js";
import { copyName } from "../linux/copyJob.js";
import { livingCopiesScript } from "../linux/copyScripts.js";
import type { LogicalVolume } from "../linux/lvm.js";
import type { nbdServers } from "../linux/nbd.js";
import type { HostArgs } from "../ssh/types.js";
import { type LvSnapshotOutputs, lvSnapshot, lvSnapshotInputs, takeTogether } from "./lvSnapshot.js";
import { type NbdExportOutputs, nbdExport, nbdExportInputs } from "./nbdExport.js";
import { pathOf, volumes } from "./volumes.js";

type SnapshotInputs = ReturnType<typeof lvSnapshotInputs.parse>;
type ExportInputs = ReturnType<typeof nbdExportInputs.parse>;

/** What is backed up. */
export interface MomentWanted {
  /** Of the resource. */
  readonly owner: string;
  readonly source: {
    readonly host: HostArgs;
    readonly listenAddress: string;
    readonly port?: number | undefined;
    readonly server: (typeof nbdServers)[number];
    readonly quiesce?: SnapshotInputs["quiesce"];
  };
  readonly volumes: readonly (Pick<SnapshotInputs, "volumeGroup" | "origin" | "size" | "chunkSize"> & {
    /** Where the copy goes. */
    readonly file: string;
  })[];
  readonly triggers: SnapshotInputs["triggers"];
}

/** A volume of a moment. */
export interface MomentPart {
  readonly snapshot: SnapshotInputs;
  /** Its port, where none is declared, is found by trying. */
  readonly exported: ExportInputs;
  /** What the names of all snapshots of the volume begin with. */
  readonly series: string;
}

/** What a backup makes on the source, and takes down again. */
export interface Moment {
  /** Of the source. */
  readonly context: Context;
  readonly parts: readonly MomentPart[];
  readonly ports: readonly number[];
  readonly quiesce: SnapshotInputs["quiesce"];
  /** What the marks of all backups of the stack begin with, to whatever host. */
  readonly ofStack: string;
}

const portsTried = 10;

/** A name of a snapshot of a moment, for checks of its length. */
export const snapshotNameSample = `backup-${"0".repeat(12)}-${"0".repeat(8)}-${"0".repeat(16)}`;

/**
 * What is to be made. `destination`: what tells the host of the copies from all others, however it is reached.
 * `clientAddress`: "" where it does not matter.
 */
export async function momentOf(
  context: Context,
  { owner, source, volumes: declared, triggers }: MomentWanted,
  destination: string,
  clientAddress: string,
): Promise<Moment> {
  const [organization = "", project = "", stack = ""] = owner.split("/");
  const ofSet = copyName(declared[0]?.file ?? "").slice(0, 8);
  const digestOf = ({ volumeGroup, origin }: Pick<SnapshotInputs, "volumeGroup" | "origin">) =>
    digest(`${organization}/${project}/${stack} ${volumeGroup}/${origin} to ${destination}`, 48);
  const [first = { volumeGroup: "", origin: "" }] = declared;
  const base = 20_000 + (Number.parseInt(digestOf(first).slice(-8), 16) % 999) * portsTried;
  const ports = source.port === undefined ? consecutive(base, portsTried) : [source.port];
  const common = {
    host: source.host,
    owner: ownerOf(organization, project, stack, `backups to ${destination}`),
  };
  const host = await context.open(source.host);
  return {
    context: { ...context, host },
    parts: declared.map(({ file, volumeGroup, origin, size, chunkSize }) => {
      const series = `backup-${digestOf({ volumeGroup, origin }).slice(0, 12)}-`;
      const name = `${series}${ofSet}-${copyName(file)}`;
      return {
        snapshot: lvSnapshotInputs.parse({
          ...common,
          ...{ volumeGroup, origin, name, size, chunkSize, triggers },
        }),
        exported: nbdExportInputs.parse({
          ...common,
          ...{ device: `/dev/${volumeGroup}/${name}`, exportName: name, server: source.server },
          ...{ listenAddress: source.listenAddress, clients: clientAddress === "" ? [] : [clientAddress] },
          port: ports[0],
        }),
        series,
      };
    }),
    ports,
    quiesce: source.quiesce,
    ofStack: ownerMark(ownerOf(organization, project, stack, "backups to ")),
  };
}

function consecutive(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, index) => first + index);
}

/** One backup of a volume at a time in this process, by whatever credentials its hosts are reached. */
const queue = {};

/** The series of the volumes that this process backs up just now. */
const busy = new Set<string>();

/** Runs the work while no other one on a volume of the moment runs. */
export function alone<T>({ parts }: Moment, work: () => Promise<T>): Promise<T> {
  // Always in the same order: two of them never wait for each other.
  const keys = [...new Set(parts.map(({ series }) => series))].sort();
  return keys.reduceRight((inner, key) => () => aloneOn(key, inner), work)();
}

function aloneOn<T>(series: string, work: () => Promise<T>): Promise<T> {
  return serially(queue, series, async () => {
    busy.add(series);
    try {
      return await work();
    } finally {
      busy.delete(series);
    }
  });
}

/** So long a snapshot waits for the next run of a backup whose copy is complete, or broke off unseen. */
const waitingHours = 12;

/** `backup-SERIES-SET-COPY` */
const nameParts = /^(backup-[0-9a-f]{12}-)([0-9a-f]{8})-([0-9a-f]{16})$/;

/** A snapshot of a backup of the stack. */
interface Left {
  readonly lv: LogicalVolume;
  readonly mark: string;
  readonly series: string;
  readonly copy: string;
  /** What tells its moment from others. */
  readonly set: string;
  /** Whether a volume of that moment is backed up now, to the same host: its backups never run beside each other. */
  readonly ofVolumes: boolean;
}

/**
 * Takes down what other backups of the stack have left, of whatever volumes and to whatever host: moments for which no copy
 * runs, and none has waited for less than `waitingHours` to be gone on with. `context`: of the copies' host.
 */
export async function sweep(context: Context, moment: Moment): Promise<void> {
  const left = leftBy(moment, await volumes(moment.context));
  if (left.length === 0) return;
  const command = {
    argv: script(livingCopiesScript, ...left.map(({ copy }) => copy)),
    ...({ kind: "read", deadlineSeconds: 60 } as const),
  };
  const { stdout } = await succeed(context, command, "the copies under way could not be listed");
  const living = new Set(stdout.split("\n"));
  const isWanted = ({ lv, copy, ofVolumes }: Left) => {
    const isYoung = Date.now() / 1000 - lv.createdAt < waitingHours * 3600;
    // Of another volume the copy may be about to be started.
    return living.has(`runs ${copy}`) || (isYoung && (!ofVolumes || living.has(`waits ${copy}`)));
  };
  const wanted = new Set(left.filter(isWanted).map(({ set }) => set));
  const own = new Set(moment.parts.map(({ series }) => series));
  for (const one of left) {
    if (wanted.has(one.set)) continue;
    if (own.has(one.series)) await takeDownLeft(moment, one);
    // One of that volume that is on its way looks by itself at what is left.
    else if (!busy.has(one.series)) await aloneOn(one.series, () => takeDownOther(moment, one));
  }
}

function leftBy({ parts, ofStack }: Moment, all: readonly LogicalVolume[]): Left[] {
  const ours = all.flatMap((lv) => {
    const mark = markAmong(lv.tags);
    const [, series = "", set = "", copy = ""] = nameParts.exec(lv.name) ?? [];
    return mark?.startsWith(ofStack) && set !== "" ? [{ lv, mark, series, set: `${mark} ${set}`, copy }] : [];
  });
  const isOfVolume = ({ mark, series }: (typeof ours)[number]) =>
    parts.some((part) => part.series === series && ownerMark(part.snapshot.owner) === mark);
  const sets = new Set(ours.filter(isOfVolume).map(({ set }) => set));
  const own = new Set(parts.map(({ snapshot }) => snapshot.name));
  return ours.filter(({ lv }) => !own.has(lv.name)).map((one) => ({ ...one, ofVolumes: sets.has(one.set) }));
}

/** What another VM's backup has left, or one to another host, which cannot be asked: nobody may be reading it. */
async function takeDownOther(moment: Moment, left: Left): Promise<void> {
  const { context } = moment;
  const path = `${left.lv.volumeGroup}/${left.lv.name}`;
  try {
    if (left.lv.active && left.lv.open !== false && (await isRead(moment, left))) return;
    await takeDownLeft(moment, left);
  } catch (error) {
    if (isLvmNbdError(error, "CANCELLED", "HOST_UNREACHABLE", "LINK_LOST")) throw error;
    context.warn(`${path}, which an earlier backup has left, could not be taken down: ${firstLine(error)}`);
  }
}

/** Whether a client is connected to the export: qemu-nbd has its device open also without one. */
async function isRead({ context, parts }: Moment, left: Left): Promise<boolean> {
  const [part] = parts;
  const seen = part && (await nbdExport.observe(context, partOf(part, left).exported));
  if (seen?.plan === undefined) return false;
  const command = {
    argv: ["ss", "-Htn", "state", "established", `( sport = :${seen.plan.port} )`],
    ...({ kind: "read", deadlineSeconds: 60 } as const),
  };
  const result = await succeed(context, command, "the clients of an export could not be listed");
  return result.stdout.trim() !== "";
}

async function takeDownLeft({ context, parts }: Moment, left: Left): Promise<void> {
  const [part] = parts;
  if (part === undefined) return;
  context.progress(`taking down ${left.lv.volumeGroup}/${left.lv.name}, which an earlier backup has left`);
  await takeDownPart(context, partOf(part, left));
}

/** What was left, by what is made now. */
function partOf(part: MomentPart, { lv: { volumeGroup, name }, mark }: Left): MomentPart {
  const owner = ownerOfMark(mark);
  return {
    ...part,
    snapshot: { ...part.snapshot, owner, volumeGroup, name },
    exported: { ...part.exported, owner, exportName: name, device: `/dev/${volumeGroup}/${name}` },
  };
}

/** The snapshots of the moment as it is kept, all of them; `undefined` if one is missing, half made, or of another moment. */
export async function keptMoment({ context, parts }: Moment): Promise<LvSnapshotOutputs[] | undefined> {
  const kept: LvSnapshotOutputs[] = [];
  for (const { snapshot } of parts) {
    const seen = await lvSnapshot.observe(context, snapshot);
    if (seen === undefined || seen.halfMade || seen.mark !== ownerMark(snapshot.owner)) return undefined;
    if (lvSnapshot.isStale?.(seen, snapshot) !== false) return undefined;
    const state = lvSnapshot.toState(snapshot, seen);
    if (state.state === "overflowed") return undefined;
    kept.push(state);
  }
  return kept;
}

/** Takes the moment, of which nothing may be there. */
export async function takeMoment(moment: Moment): Promise<LvSnapshotOutputs[]> {
  const { context, parts, quiesce } = moment;
  for (const { snapshot } of parts) await lvSnapshot.suitable?.(context, snapshot);
  await takeTogether(
    context,
    parts.map(({ snapshot }) => snapshot),
    quiesce,
  );
  const taken = await keptMoment(moment);
  if (taken !== undefined) return taken;
  throw new LvmNbdError("IDENTITY_MISMATCH", {
    message:
      "the snapshots were taken, but a moment later one of them was gone or full: somebody else removes it, or it is far too small",
    host: context.host.name,
    resource: context.resource,
    advice: "Give the volume a larger `size` if it is written that fast, and run again.",
  });
}

/** Serves a part to the copies' host. Returns the uri. */
export async function exportPart({ context, ports }: Moment, { exported }: MomentPart): Promise<string> {
  const plan = (await nbdExport.observe(context, exported))?.plan;
  const tried = plan !== undefined && ports.length > 1 ? [plan.port, ...ports] : ports;
  let taken: unknown;
  for (const port of tried) {
    try {
      const made = await convergeOn(nbdExport, context, { ...exported, port } as ExportInputs, undefined);
      return (made as NbdExportOutputs).uri;
    } catch (error) {
      const reason = error instanceof PartialSuccess ? error.cause : error;
      if (!isLvmNbdError(reason, "PORT_IN_USE")) throw reason;
      taken = reason;
    }
  }
  throw taken;
}

/** Ends the serving of a part. */
export async function endExport({ context }: Moment, { exported }: MomentPart): Promise<void> {
  await removeFrom(nbdExport, context, exported);
}

/** Takes down what is left of the moment. */
export async function takeDown({ context, parts }: Moment): Promise<void> {
  for (const part of parts) await takeDownPart(context, part);
}

/** As `takeDown`. What cannot be taken down is told, and returned as `GROUP/NAME` of its snapshots. */
export async function takeDownPossible({ context, parts }: Moment): Promise<string[]> {
  const left: string[] = [];
  for (const part of parts) {
    try {
      await takeDownPart(context, part);
    } catch (error) {
      // That nobody answers tells nothing of what is left, and of what was interrupted the reconciler looks again.
      if (!isLvmNbdError(error) || isLvmNbdError(error, "CANCELLED", "HOST_UNREACHABLE", "LINK_LOST"))
        throw error;
      left.push(pathOf(part.snapshot));
      context.warn(
        `${pathOf(part.snapshot)} is left, the next \`pulumi up\` takes it down: ${firstLine(error)}`,
      );
    }
  }
  return left;
}

async function takeDownPart(context: Context, { exported, snapshot }: MomentPart): Promise<void> {
  await removeFrom(nbdExport, context, exported);
  await removeFrom(lvSnapshot, context, snapshot);
}
