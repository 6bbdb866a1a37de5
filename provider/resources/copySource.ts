/**
 * The source of a copy: an export, and the snapshot behind it where that is known. It is asked for its size before
 * anything is changed, and its snapshot is seen to be valid after the last byte.
 */
import { unlessCancelled } from "../core/cancel.js";
import { parseOutput, succeed } from "../core/command.js";
import { briefly, type ErrorCode, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { atMost } from "../core/serial.js";
import { bytesPhrase, type CopyProgress, ratePhrase } from "../linux/copyJob.js";
import { clockCommand } from "../linux/looks.js";
import { identified, type LogicalVolume } from "../linux/lvm.js";
import type { ClientTls } from "../linux/tls.js";
import { extentList, parseZeroRanges, zeroDeadline, zeroRangesScript } from "../linux/zeroRanges.js";
import type { RemoteCommand } from "../ssh/types.js";
import type { SourceSum } from "./copyRun.js";
import { deviceSum } from "./deviceCopy.js";
import { certify, type SnapshotReference, volumes } from "./volumes.js";

/** What is copied. */
export interface CopySource {
  readonly uri: string;
  readonly tls?: ClientTls | undefined;
  readonly snapshot?: SnapshotReference | undefined;
}

/** How a source is read. */
interface Reading extends Pick<CopySource, "snapshot"> {
  /** Its host is to be read no faster. */
  readonly bandwidthLimit?: string | number | undefined;
  /** Whether what was copied is compared with it. */
  readonly verify: boolean;
  /** Its host lets nobody read it, or it may be written to: see `asReadable`. */
  readonly refusedThere?: boolean;
}

/**
 * Whether what was copied is compared with the snapshot itself, which is read on its own host for that, at the speed of its disk. Only
 * then is anything believed of what that snapshot holds: see `emptyRanges`.
 */
function isReadThere({ snapshot, bandwidthLimit, verify, refusedThere }: Reading): boolean {
  return verify && snapshot !== undefined && bandwidthLimit === undefined && refusedThere !== true;
}

/** What an unfinished copy was begun with. */
interface Begun {
  /** Its job compares what it copied with the source. */
  readonly verify: boolean;
  /**
   * Its job leaves that to who reads the source on its own host, and may have left out what is empty there. `verify` is false then:
   * earlier versions, which know of no such job, take it for one that compares nothing.
   */
  readonly readThere: boolean;
}

/** As it is recorded of a copy that is begun now. */
export function begunWith(source: Reading): Begun {
  const readThere = isReadThere(source);
  return { verify: source.verify && !readThere, readThere };
}

/** Whether an unfinished copy can still become one as it is wanted: what was left to be read on the source's host still may be. */
export function isVerifiable(begun: Begun, wanted: Reading): boolean {
  if (wanted.verify && !begun.verify && !begun.readThere) return false;
  return !begun.readThere || isReadThere(comparedBy(begun, wanted));
}

/**
 * How the source is read: as the unfinished copy that is gone on with was begun, whatever is wanted by now. `begun`: `undefined` for one
 * that is begun anew.
 */
export function comparedBy<T extends Reading>(begun: Begun | undefined, wanted: T): T {
  return begun === undefined ? wanted : { ...wanted, verify: begun.readThere };
}

/** What the export answered when it was asked for its size on the destination's host. */
export interface SizeAnswer {
  readonly exitCode: string | undefined;
  readonly text: string;
}

/** The source's size in bytes, from its answer. Raises EXPORT_UNREACHABLE, or what `certifySize` raises. */
export async function sourceSize(
  context: Context,
  source: CopySource,
  { exitCode, text }: SizeAnswer,
): Promise<number> {
  const sizeBytes = Number(text);
  if (exitCode !== "0" || !Number.isSafeInteger(sizeBytes))
    throw refused(context, "EXPORT_UNREACHABLE", "uri", `${source.uri} does not answer here`, text);
  if (source.snapshot !== undefined) await certifySize(context, source, sizeBytes);
  return sizeBytes;
}

/** What a look at the host shows to be impossible; `property`: the input at fault. */
export function refused(
  context: Context,
  code: ErrorCode,
  property: string,
  message: string,
  stderr?: string,
): LvmNbdError {
  return new LvmNbdError(code, {
    message: `${property}: ${message}`,
    host: context.host.name,
    resource: context.resource,
    property,
    stderr,
  });
}

/**
 * Sees that the snapshot is valid, and that it has the size of what is served under its name. `reading`: how the copy was compared with
 * it. Raises COPY_UNCERTIFIED for one that may have been written to meanwhile, of which two readings beside each other prove nothing.
 */
export async function certifySize(
  context: Context,
  { snapshot, uri }: CopySource,
  sizeBytes: number,
  reading?: Reading,
): Promise<LogicalVolume | undefined> {
  if (snapshot === undefined) return undefined;
  const lv = await certify(context, snapshot);
  if (reading !== undefined && isReadThere(reading)) requireReadOnly(context, lv);
  const size = visibleBytes(lv);
  if (size === sizeBytes) return lv;
  throw new LvmNbdError("COPY_MISMATCH", {
    message: `uri: ${uri} serves ${sizeBytes} bytes, the snapshot ${lv.volumeGroup}/${lv.name} has ${size}: it is not what this export serves`,
    host: context.host.name,
    resource: context.resource,
    property: "uri",
    advice: "Give the `uri` of the NbdExport whose `device` is that snapshot's `path`.",
  });
}

function requireReadOnly(context: Context, { path, readOnly }: LogicalVolume): void {
  if (readOnly) return;
  throw new LvmNbdError("COPY_UNCERTIFIED", {
    message: `the snapshot ${path} was made writable while it was copied, so whether all that was read is one moment cannot be told`,
    host: context.host.name,
    resource: context.resource,
    advice: "Run `pulumi up` again: what is writable is read a second time once it is copied.",
  });
}

/** Bytes that a reader of it sees. A thin snapshot has a size of its own, and its origin may have grown since. */
function visibleBytes({ kind, originSizeBytes, sizeBytes }: LogicalVolume): number {
  return kind === "cow" ? (originSizeBytes ?? sizeBytes) : sizeBytes;
}

/** So many sources of a host are read at once for one purpose. One alone would keep all others waiting behind a large one. */
const mostReadings = 4;

/**
 * Reads a source of the context's host for one purpose. For each so many at a time: it has a connection of its own for as long as it reads,
 * and all read one host's disks. Who is cancelled does not wait for the others, but for what he has begun.
 */
async function inTurn<T>({ host, signal }: Context, purpose: string, read: () => Promise<T>): Promise<T> {
  let begin = () => {};
  const begun = new Promise<void>((resolve) => {
    begin = resolve;
  });
  const reading = atMost(host, purpose, mostReadings, () => {
    begin();
    return read();
  });
  // Of one that was cancelled before its turn nobody hears that it was then not read.
  reading.catch(() => undefined);
  await unlessCancelled(begun, signal, host.name);
  return reading;
}

/** How a snapshot is read on its own host; `undefined` for a source that is not to be read there. */
export function sourceSumOf(source: Reading): SourceSum | undefined {
  const { snapshot } = source;
  if (snapshot === undefined || !isReadThere(source)) return undefined;
  return async (context, tell) => {
    const there = { ...context, host: await context.open(snapshot.host) };
    tell(`waiting until other sources are read on ${there.host.name}`);
    return inTurn(there, "checksums of sources", async () => {
      // Not before its turn: that may come hours later.
      const lv = await certify(context, snapshot);
      requireReadOnly(context, lv);
      const [sizeBytes, began] = [visibleBytes(lv), performance.now()];
      const watch = (bytes: number) => {
        const seconds = (performance.now() - began) / 1000;
        tell(
          ratePhrase(
            "reading the source on its own host",
            Math.min(1, bytes / sizeBytes),
            sizeBytes,
            seconds,
          ),
        );
      };
      const sum = await deviceSum(there, lv.path, sizeBytes, { ownConnection: true, watch });
      if (sum !== undefined) return sum;
      throw new LvmNbdError("COPY_FAILED", {
        message: `the source ${lv.path} could not be read a second time`,
        host: there.host.name,
        resource: context.resource,
      });
    });
  };
}

/**
 * How the source is read for a copy that is begun now: by its job, over the network, where the snapshot's host refuses what would be run
 * there, which is found out by the first sector: what is refused at once is not to be told when the copy is complete. Also where it may be
 * written to: only a second reading after the copy shows that nothing was.
 */
export async function asReadable<T extends Reading>(context: Context, source: T): Promise<T> {
  const { snapshot } = source;
  if (snapshot === undefined || !isReadThere(source)) return source;
  const lv = await certify(context, snapshot);
  if (!lv.readOnly) return { ...source, refusedThere: true };
  let reason = "its first sector cannot be read";
  try {
    if ((await firstSector(context, snapshot, lv)) !== undefined) return source;
  } catch (error) {
    if (!isLvmNbdError(error, ...untold)) throw error;
    reason = briefly(error);
  }
  const { name } = await context.open(snapshot.host);
  context.warn(`${lv.path} is read a second time over the network, not on ${name}: ${reason}`);
  return { ...source, refusedThere: true };
}

/**
 * Whether its host refuses by now what a copy was begun with, as after an update of what it is allowed to run: then the copy could never be
 * compared. What may pass is no refusal.
 */
export async function isRefusedNow(
  context: Context,
  begun: Begun | undefined,
  wanted: Reading,
): Promise<boolean> {
  const source = comparedBy(begun, wanted);
  const { snapshot } = source;
  if (begun === undefined || snapshot === undefined || !isReadThere(source)) return false;
  try {
    await firstSector(context, snapshot, await certify(context, snapshot));
    return false;
  } catch (error) {
    // Whatever else keeps it from being read is told by the reading itself.
    if (!isLvmNbdError(error)) throw error;
    return error.code === "SUDO_DENIED";
  }
}

/** Its checksum; `undefined` if it cannot be read. */
async function firstSector(
  context: Context,
  snapshot: SnapshotReference,
  { path }: LogicalVolume,
): Promise<string | undefined> {
  const there = { ...context, host: await context.open(snapshot.host) };
  return inTurn(there, "first sectors of sources", () =>
    deviceSum(there, path, 512, { watch: () => undefined }),
  );
}

/**
 * What of the source is known to be zero, for a job; "" where nothing is. Only a read-only snapshot's: of another one that may be
 * written to before it is copied. It is looked for right at the snapshot, so that only what is not zero crosses the network. That the
 * `uri` serves this snapshot is the program's word, and of another one this would leave data out: so nothing is told of a source with
 * which the copy is not compared afterwards.
 */
export async function emptyRanges(context: Context, source: Reading, sizeBytes: number): Promise<string> {
  const { snapshot } = source;
  if (snapshot === undefined || !isReadThere(source)) return "";
  const there = { ...context, host: await context.open(snapshot.host) };
  try {
    // Not behind a checksum, which may take hours: the copy waits for this.
    return await inTurn(there, "what of sources is empty", async () => {
      const lv = await certify(context, snapshot);
      if (!lv.readOnly || !lv.active) return "";
      context.progress(`looking on ${there.host.name} for what of ${lv.path} is empty`);
      const command: RemoteCommand = {
        argv: script(zeroRangesScript, lv.path, String(sizeBytes)),
        kind: "read",
        deadlineSeconds: zeroDeadline(sizeBytes),
        ownConnection: true,
      };
      const result = await succeed(there, command, `${lv.path} could not be read`);
      return parseOutput(there, command, result, (text) =>
        extentList(parseZeroRanges(text, sizeBytes), sizeBytes),
      );
    });
  } catch (error) {
    if (!isLvmNbdError(error, ...untold)) throw error;
    context.progress(`what is empty is sent as well: ${briefly(error)}`);
    return "";
  }
}

/** With which codes a source cannot be read on its own host, which a copy does without. */
const untold = [
  ...(["SUDO_DENIED", "COMMAND_FAILED", "COMMAND_TIMED_OUT", "OUTPUT_UNREADABLE"] as const),
  // As a read tells of a link that is lost again and again; and the host may let nobody connect a second time.
  ...(["HOST_UNREACHABLE", "AUTH_FAILED"] as const),
] as const;

/** An overflowed snapshot shows as a read error first; what to do about it is to make it larger. */
export async function explained(
  context: Context,
  source: CopySource,
  error: LvmNbdError,
  progress: CopyProgress | undefined,
): Promise<LvmNbdError> {
  const { snapshot } = source;
  if (snapshot === undefined || !isLvmNbdError(error, "COPY_FAILED", "SNAPSHOT_OVERFLOWED")) return error;
  let overflow = error;
  if (error.code === "COPY_FAILED") {
    try {
      await certify(context, snapshot);
      return error;
    } catch (reason) {
      // Whatever else is wrong with the snapshot, the copy's own failure is what the person must see.
      if (!isLvmNbdError(reason, "SNAPSHOT_OVERFLOWED")) return error;
      overflow = reason;
    }
  }
  let advice: string | undefined;
  try {
    advice = await sizeAdvice(context, snapshot, progress);
  } catch (reason) {
    // The code's own advice has to do; the overflow is what the person must see.
    if (!isLvmNbdError(reason)) throw reason;
  }
  return new LvmNbdError("SNAPSHOT_OVERFLOWED", { ...overflow.details, advice });
}

const clock = { argv: clockCommand(), kind: "read", deadlineSeconds: 60 } as const;

async function sizeAdvice(
  context: Context,
  snapshot: SnapshotReference,
  progress: CopyProgress | undefined,
): Promise<string> {
  const again = "Give the snapshot a larger `size` and run `pulumi up --refresh`, which takes it anew";
  const never = '`"100%ORIGIN"` cannot overflow';
  const host = await context.open(snapshot.host);
  const [lv] = identified(await volumes({ ...context, host }), snapshot);
  const now = Number((await host.run(clock, context.signal)).stdout);
  const [store, origin] = [lv?.sizeBytes, lv?.originSizeBytes];
  const lived = now - (lv?.createdAt ?? Number.NaN);
  if (store === undefined || origin === undefined || !(lived > 0) || progress === undefined)
    return `${again}; ${never}.`;
  const wanted = suggestedStore({ store, origin, lived, ...progress, now });
  const rate = `it filled ${bytesPhrase(store)} in ${Math.round(lived)} s at most`;
  return wanted >= origin
    ? `${again}: ${rate}, too fast for a smaller one than \`"100%ORIGIN"\`.`
    : `${again}: ${rate}, so about \`"${Math.ceil(wanted / 1024 ** 2)}M"\` lasts for such a copy; ${never}.`;
}

/**
 * Bytes of a store that lasts for the whole copy, twice over: its writes went on at the rate seen, and the copy would
 * have gone on at its own. Reading both ends back takes as long again.
 */
export function suggestedStore(seen: {
  readonly store: number;
  readonly origin: number;
  /** Seconds since the snapshot was taken. */
  readonly lived: number;
  readonly phase: CopyProgress["phase"];
  readonly done: number;
  readonly since: number;
  readonly now: number;
}): number {
  const inPhase = Math.max(1, Math.min(seen.now - seen.since, seen.lived));
  const share = Math.max(0.01, seen.done);
  const rest = (inPhase / share) * (1 - share) + (seen.phase === "verify" ? 0 : inPhase / share);
  return Math.min(seen.origin, 2 * seen.store * ((seen.lived + rest) / seen.lived));
}
