/**
 * One moment of the volumes of a VM, kept as snapshots on their host and served to one other host while it is copied.
 *
 * Snapshots and exports carry the mark of all backups of the stack to that host, and in their names a volume's series:
 * what a killed run has left is so found by the next backup of the volume, whatever generation that makes.
 */
import { parseOutput, succeed } from "../core/command.js";
import { firstLine, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import { backupsMark, digest, markAmong, ownerMark, ownerOf } from "../core/owner.js";
import { converge as convergeOn, PartialSuccess, remove as removeFrom } from "../core/reconciler.js";
import type { Context } from "../core/resource.js";
import { serially } from "../core/serial.js";
import { copyName, folderOf } from "../linux/copyJob.js";
import { livingCopiesScript, unfinishedCopiesScript } from "../linux/copyScripts.js";
import { clockCommand, connectionsCommand } from "../linux/looks.js";
import type { LogicalVolume } from "../linux/lvm.js";
import type { nbdServers } from "../linux/nbd.js";
import { serverOf } from "../ssh/config.js";
import type { HostArgs } from "../ssh/types.js";
import type { CopySource } from "./copySource.js";
import { type LvSnapshotOutputs, lvSnapshot, lvSnapshotInputs, takeTogether } from "./lvSnapshot.js";
import { type NbdExportOutputs, nbdExport, nbdExportInputs, requireServing, uriOf } from "./nbdExport.js";
import { named, pathOf, requireGroup, volumes } from "./volumes.js";

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
    readonly clientsEnforcedElsewhere?: boolean | undefined;
    readonly server: (typeof nbdServers)[number];
    readonly tls?: boolean | undefined;
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
  /** Where the copies go. */
  readonly files: readonly string[];
  readonly quiesce: SnapshotInputs["quiesce"];
  /** What all snapshots of the stack's backups carry, to whatever host. */
  readonly ofStack: string;
}

const portsTried = 10;

/** A name of a snapshot of a moment, for checks of its length. */
export const snapshotNameSample = `backup-${"0".repeat(12)}-${"0".repeat(8)}-${"0".repeat(16)}`;

export function isSnapshotOfMoment(name: string): boolean {
  return /^backup-[0-9a-f]{12}-[0-9a-f]{8}-[0-9a-f]{16}$/.test(name);
}

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
  // Whatever their order.
  const ofSet = copyName(declared.map(({ file }) => file).sort()[0] ?? "").slice(0, 8);
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
  const ofStack = backupsMark(organization, project, stack);
  return {
    context: { ...context, host },
    parts: declared.map(({ file, volumeGroup, origin, size, chunkSize }) => {
      const series = `backup-${digestOf({ volumeGroup, origin }).slice(0, 12)}-`;
      const name = `${series}${ofSet}-${copyName(file)}`;
      return {
        snapshot: lvSnapshotInputs.parse({
          ...common,
          ...{ volumeGroup, origin, name, size, chunkSize, triggers },
          // What a cut left before it was known to be of a frozen VM is not gone on with.
          quiesce: source.quiesce,
          tags: [ofStack],
        }),
        exported: nbdExportInputs.parse({
          ...common,
          ...{
            device: `/dev/${volumeGroup}/${name}`,
            exportName: name,
            server: source.server,
            tls: source.tls,
            clientsEnforcedElsewhere: source.clientsEnforcedElsewhere,
          },
          ...{ listenAddress: source.listenAddress, clients: clientAddress === "" ? [] : [clientAddress] },
          port: ports[0],
        }),
        series,
      };
    }),
    ports,
    files: declared.map(({ file }) => file),
    quiesce: source.quiesce,
    ofStack,
  };
}

function consecutive(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, index) => first + index);
}

/** One backup of a volume at a time in this process, by whatever credentials its hosts are reached. */
const queue = {};

/** How many backups of this process are at work on a series, or wait for that. */
const busy = new Map<string, number>();

/** Runs the work while no other one on a volume of the moment runs. */
export function alone<T>({ parts }: Moment, work: () => Promise<T>): Promise<T> {
  // Always in the same order: two of them never wait for each other.
  const keys = [...new Set(parts.map(({ series }) => series))].sort();
  return keys.reduceRight((inner, key) => () => aloneOn(key, inner), work)();
}

async function aloneOn<T>(series: string, work: () => Promise<T>): Promise<T> {
  busy.set(series, (busy.get(series) ?? 0) + 1);
  try {
    return await serially(queue, series, work);
  } finally {
    const others = (busy.get(series) ?? 1) - 1;
    if (others > 0) busy.set(series, others);
    else busy.delete(series);
  }
}

/**
 * Runs the work, within `alone`, where no other backup is at work on the snapshots' volumes, or about to be. It does not wait for
 * one, which may wait for ours.
 */
function unlessBusy({ parts }: Moment, left: readonly Left[], work: () => Promise<void>): Promise<void> {
  const own = new Set(parts.map(({ series }) => series));
  const others = new Set(left.map(({ series }) => series).filter((series) => !own.has(series)));
  const within = async ([first, ...rest]: readonly string[]): Promise<void> => {
    if (first === undefined) return work();
    if (!busy.has(first)) await aloneOn(first, () => within(rest));
  };
  return within([...others]);
}

const hour = 3600;
/** So many seconds a moment waits for the next run of a backup whose copy is complete, or broke off unseen. */
const longestWait = 12 * hour;
/** So old, in seconds, is what another host certainly copies no more unless it is seen to read: see `longestSeconds`. */
const longestElsewhere = 7 * 24 * hour;

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
  /** Whether the copies' host is the one to which a backup is made now. */
  readonly isToThisHost: boolean;
  /** Whether a volume of that moment is backed up now, to the same host: its backups never run beside each other. */
  readonly ofVolumes: boolean;
}

/**
 * Takes down what other backups of the stack have left, of whatever volumes and to whatever host: whole moments, of no volume
 * of which a copy runs, is about to, or waits to be gone on with. `context`: of the copies' host. Returns whether anything by the
 * name of a snapshot of this moment is there.
 */
export async function sweep(context: Context, moment: Moment): Promise<boolean> {
  const all = await volumes(moment.context);
  const left = leftBy(moment, all);
  if (left.length > 0) await takeDownUnwanted(context, moment, left);
  return moment.parts.some(({ snapshot }) => named(all, snapshot.volumeGroup, snapshot.name) !== undefined);
}

async function takeDownUnwanted(context: Context, moment: Moment, left: readonly Left[]): Promise<void> {
  const now = await clockOf(moment.context);
  const copies = await copiesOf(context, left);
  const isWanted = ({ lv, copy, isToThisHost, ofVolumes }: Left) => {
    const age = now - lv.createdAt;
    const waits = copies.get(copy);
    if (waits === "runs") return true;
    if (!isToThisHost) return age < longestElsewhere;
    if (waits !== undefined) return waits < longestWait;
    // Of another volume the copy may be about to be started.
    return !ofVolumes && age < longestWait;
  };
  const givenUp = new Set<string>();
  for (const set of new Set(left.map((one) => one.set))) {
    const members = left.filter((one) => one.set === set);
    if (members.some(isWanted) || !(await takeDownSet(moment, members))) continue;
    for (const { copy, isToThisHost } of members) if (isToThisHost) givenUp.add(copy);
  }
  await warnOfUnfinished(context, moment, givenUp);
}

/** What a copy has made of a moment that was given up has no manifest: nobody would see it. `copies`: by their names. */
async function warnOfUnfinished(
  context: Context,
  { files }: Moment,
  copies: ReadonlySet<string>,
): Promise<void> {
  if (copies.size === 0) return;
  const folders = [...new Set(files.map(folderOf))];
  const command = {
    argv: script(unfinishedCopiesScript, ...folders),
    ...({ kind: "read", deadlineSeconds: 60 } as const),
  };
  const result = await succeed(context, command, "the unfinished copies could not be listed");
  for (const part of result.stdout.split("\n")) {
    const file = part.replace(/\.part$/, "");
    if (file === part || !copies.has(copyName(file)) || files.includes(file)) continue;
    context.warn(
      `${part} is left of an earlier backup that was given up: \`pulumi up\` of that backup removes it; where none is declared any more, remove it by hand`,
    );
  }
}

/** Seconds since 1970 by the host's clock, which also dates its snapshots. */
async function clockOf(context: Context): Promise<number> {
  const command = { argv: clockCommand(), kind: "read", deadlineSeconds: 60 } as const;
  const result = await succeed(context, command, "the host could not be asked for its time");
  return parseOutput(context, command, result, secondsIn);
}

/** The copies on the context's host, by their names: whether one runs, or for how many seconds it has waited. */
async function copiesOf(context: Context, left: readonly Left[]): Promise<Map<string, number | "runs">> {
  const command = {
    argv: script(livingCopiesScript, ...left.map(({ copy }) => copy)),
    ...({ kind: "read", deadlineSeconds: 60 } as const),
  };
  const result = await succeed(context, command, "the copies under way could not be listed");
  return parseOutput(context, command, result, (stdout) => {
    const lines = stdout.split("\n").filter((line) => line !== "");
    return new Map(
      lines.map((line) => {
        const [state, copy = "", seconds] = line.split(" ");
        return [copy, state === "runs" ? state : secondsIn(seconds)];
      }),
    );
  });
}

function secondsIn(text = ""): number {
  if (/^-?\d+$/.test(text.trim())) return Number(text);
  throw new Error(`"${text}" is no number of seconds`);
}

/** What tells a moment from others, by the name of one of its snapshots. */
function setOf(mark: string, name: string): string {
  return `${mark} ${nameParts.exec(name)?.[2] ?? ""}`;
}

function leftBy({ parts, ofStack }: Moment, all: readonly LogicalVolume[]): Left[] {
  const toThisHost = new Set(parts.map(({ snapshot }) => ownerMark(snapshot.owner)));
  const ours = all.flatMap((lv) => {
    const mark = markAmong(lv.tags);
    const [, series = "", set = "", copy = ""] = nameParts.exec(lv.name) ?? [];
    if (mark === undefined || set === "") return [];
    // An earlier version did not tell whose the backups to other hosts are.
    const isToThisHost = toThisHost.has(mark);
    const isOfStack = lv.tags.includes(ofStack) || isToThisHost;
    return isOfStack ? [{ lv, mark, series, set: setOf(mark, lv.name), copy, isToThisHost }] : [];
  });
  const isOfVolume = ({ mark, series }: (typeof ours)[number]) =>
    parts.some((part) => part.series === series && ownerMark(part.snapshot.owner) === mark);
  // Of a moment of more volumes, those that are backed up now may be taken down already.
  const ownSets = parts.map(({ snapshot }) => setOf(ownerMark(snapshot.owner), snapshot.name));
  const sets = new Set([...ownSets, ...ours.filter(isOfVolume).map(({ set }) => set)]);
  const own = new Set(parts.map(({ snapshot }) => snapshot.name));
  return ours.filter(({ lv }) => !own.has(lv.name)).map((one) => ({ ...one, ofVolumes: sets.has(one.set) }));
}

/** As `takeDownUnread`. A failure, which is told, keeps no backup from being made. */
async function takeDownSet(moment: Moment, members: readonly Left[]): Promise<boolean> {
  let isDown = false;
  try {
    await unlessBusy(moment, members, async () => {
      isDown = await takeDownUnread(moment, members);
    });
  } catch (error) {
    if (isLvmNbdError(error, "CANCELLED", "HOST_UNREACHABLE", "LINK_LOST")) throw error;
    const paths = members.map(({ lv }) => pathOf(lv)).join(", ");
    moment.context.warn(
      `${paths}, which an earlier backup has left, could not be taken down: ${firstLine(error)}`,
    );
  }
  return isDown;
}

/** Takes down a moment unless one of its volumes is read, which a host that cannot be asked may do. Returns whether it did. */
async function takeDownUnread(moment: Moment, members: readonly Left[]): Promise<boolean> {
  const sets = new Set(members.map(({ set }) => set));
  const now = leftBy(moment, await volumes(moment.context)).filter(({ set }) => sets.has(set));
  // One that was taken meanwhile is of a backup on its way.
  if (now.some(({ lv }) => !members.some((was) => was.lv.uuid === lv.uuid))) return false;
  for (const one of now) if (!one.ofVolumes && (await isRead(moment, one))) return false;
  for (const one of now) await takeDownLeft(moment, one);
  return true;
}

/** Whether somebody has it open: qemu-nbd does also without a client. */
async function isRead({ context, parts }: Moment, left: Left): Promise<boolean> {
  if (!left.lv.active || left.lv.open === false) return false;
  const [part] = parts;
  const seen = part && (await nbdExport.observe(context, partOf(part, left).exported));
  if (seen?.plan === undefined) return true;
  const command = {
    argv: connectionsCommand(`( sport = :${seen.plan.port} )`),
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
function partOf(part: MomentPart, { lv: { volumeGroup, name }, mark: owner }: Left): MomentPart {
  return {
    ...part,
    snapshot: { ...part.snapshot, owner, volumeGroup, name },
    exported: { ...part.exported, owner, exportName: name, device: `/dev/${volumeGroup}/${name}` },
  };
}

/** The snapshots of the moment as it is kept, all of them; `undefined` if one is missing, unfinished, or of another moment. */
export async function keptMoment({ context, parts }: Moment): Promise<LvSnapshotOutputs[] | undefined> {
  const kept: LvSnapshotOutputs[] = [];
  for (const { snapshot } of parts) {
    const seen = await lvSnapshot.observe(context, snapshot);
    if (seen === undefined || seen.halfMade || seen.unfinished) return undefined;
    if (seen.mark !== ownerMark(snapshot.owner)) return undefined;
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

/** Refuses, by looking only, where the moment could not be served, of which nothing may be there. */
export async function requireServable({ context, parts, ports }: Moment): Promise<void> {
  const [part] = parts;
  if (part !== undefined)
    await onFreePort(ports, (port) => requireServing(context, { ...part.exported, port } as ExportInputs));
}

/** The first attempt that meets no other program on its port. */
async function onFreePort<T>(ports: readonly number[], attempt: (port: number) => Promise<T>): Promise<T> {
  let taken: unknown;
  for (const port of ports) {
    try {
      return await attempt(port);
    } catch (error) {
      const reason = error instanceof PartialSuccess ? error.cause : error;
      if (!isLvmNbdError(reason, "PORT_IN_USE")) throw reason;
      taken = reason;
    }
  }
  throw taken;
}

/** Serves a part to the copies' host. Returns what a copy needs to read it. */
export async function exportPart(
  { context, ports }: Moment,
  { exported }: MomentPart,
): Promise<Pick<CopySource, "uri" | "tls">> {
  const plan = (await nbdExport.observe(context, exported))?.plan;
  const tried = plan !== undefined && ports.length > 1 ? [plan.port, ...ports] : ports;
  return onFreePort(tried, async (port) => {
    const made = await convergeOn(nbdExport, context, { ...exported, port } as ExportInputs, undefined);
    const { uri, clientTls: tls } = made as NbdExportOutputs;
    return { uri, tls };
  });
}

/**
 * By what a copy reads a part, or has read it: that is left as it is, whatever is declared by now. A restart would cut the copy off,
 * and what is complete needs no export.
 */
export async function partAsServed(
  { context }: Moment,
  { exported }: MomentPart,
): Promise<Pick<CopySource, "uri" | "tls">> {
  const seen = await nbdExport.observe(context, exported);
  if (seen?.plan === undefined || seen.mark !== ownerMark(exported.owner))
    return { uri: uriOf(exported, serverOf(exported.host, context.namedHosts)) };
  const { uri, clientTls: tls } = nbdExport.toState(exported, seen);
  return { uri, tls };
}

/** Ends the serving of a part. */
export async function endExport({ context }: Moment, { exported }: MomentPart): Promise<void> {
  await removeFrom(nbdExport, context, exported);
}

/** Takes down what is left of the moment. */
export async function takeDown({ context, parts }: Moment): Promise<void> {
  for (const part of parts) await takeDownPart(context, part);
}

/**
 * As `takeDown`, and so what is known to be left of other moments (`before`, as `GROUP/NAME`). What cannot be taken down is told,
 * and returned: what was seen, and of `before` also what was not seen to be gone.
 */
export async function takeDownPossible(moment: Moment, before: readonly string[]): Promise<string[]> {
  const { context, parts } = moment;
  const failures = new Map<string, unknown>();
  const attempt = async (path: string, work: () => Promise<void>) => {
    try {
      await work();
    } catch (error) {
      // That nobody answers tells nothing of what is left, and of what was interrupted the reconciler looks again.
      if (!isLvmNbdError(error) || isLvmNbdError(error, "CANCELLED", "HOST_UNREACHABLE", "LINK_LOST"))
        throw error;
      failures.set(path, error);
    }
  };
  for (const part of parts) await attempt(pathOf(part.snapshot), () => takeDownPart(context, part));
  const own = new Set(parts.map(({ snapshot }) => pathOf(snapshot)));
  const unsure = new Set([...failures.keys(), ...before.filter((path) => !own.has(path))]);
  if (unsure.size === 0) return [];
  for (const other of leftBy(moment, await volumes(context)).filter(({ lv }) => unsure.has(pathOf(lv))))
    await unlessBusy(moment, [other], () => attempt(pathOf(other.lv), () => takeDownLeft(moment, other)));
  const all = await volumes(context);
  const there = new Set(leftBy(moment, all).map(({ lv }) => pathOf(lv)));
  const left: string[] = [];
  for (const path of unsure) {
    const failure = failures.has(path) ? `: ${firstLine(failures.get(path))}` : "";
    if (own.has(path) ? all.some((lv) => pathOf(lv) === path) : there.has(path)) {
      left.push(path);
      context.warn(`${path} is left, the next \`pulumi up\` takes it down${failure}`);
    } else if (before.includes(path) && !(await isGroupThere(context, path, all))) {
      left.push(path);
      context.warn(
        `whether ${path}, which a backup has left, is gone cannot be told: its volume group is not on ${context.host.name} now. If it never comes back, say \`forgetLeft: true\` in \`source\``,
      );
    } else if (failure !== "")
      context.warn(`nothing of ${path} is there, but it was not taken down${failure}`);
  }
  return left;
}

/** False only where LVM says that there is no such group: its disk may come back. */
async function isGroupThere(context: Context, path: string, all: readonly LogicalVolume[]): Promise<boolean> {
  const [group = ""] = path.split("/");
  try {
    await requireGroup(context, group, all);
    return true;
  } catch (error) {
    if (isLvmNbdError(error, "VOLUME_GROUP_NOT_FOUND")) return false;
    throw error;
  }
}

async function takeDownPart(context: Context, { exported, snapshot }: MomentPart): Promise<void> {
  await removeFrom(nbdExport, context, exported);
  await removeFrom(lvSnapshot, context, snapshot);
}
