/**
 * The run of a copy: its job is started, or found and gone on with, followed, and what it made is put in its place once its
 * source is certified. What a copy into a file and one onto a block device share.
 */
import type { z } from "zod";
import { failure, parseOutput, succeed } from "../core/command.js";
import { type ErrorCode, firstLine, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { pause } from "../core/following.js";
import { digest } from "../core/owner.js";
import { ChangedMeanwhile, type Context } from "../core/resource.js";
import {
  type CopyProgress,
  type CopyResult,
  copyResult,
  parseProgress,
  progressPhrase,
} from "../linux/copyJob.js";
import { parseFields } from "../linux/fields.js";
import { parseShow } from "../linux/systemd.js";
import { changedMeanwhile } from "../linux/unitScript.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";

/** Whose life a copy belongs to, and the mark of what it was made for. */
export interface CopyIdentity {
  readonly copyId: string;
  readonly generation: string;
}

/** Reads the SHA-256 of a source; `tell` is given its progress, as a person reads it. Raises SOURCE_STALLED. */
export type SourceSum = (context: Context, tell: (progress: string) => void) => Promise<string>;

/** One copy: what differs by what it is made into. */
export interface CopyRun<T> {
  /** What is made, for messages. */
  readonly target: string;
  /** What a cut run leaves on the host, for messages. */
  readonly unfinished: string;
  /** What that does; `undefined`: it lies there until the next `pulumi up` removes it. */
  readonly whenLeft?: string | undefined;
  /** What to do when its disk is full; `undefined`: what the code advises. */
  readonly whenFull: string | undefined;
  /** Digest of the record of a job that runs or has ended; `undefined`: none is of use. */
  readonly going: string | undefined;
  /** Prints how the job is; see `followCopyScript`. */
  readonly following: readonly string[];
  /** Refuses what would fail, by looking only. Returns the record of the job that is to be started. */
  prepare(): Promise<string>;
  /** Starts the job of the record, which has this digest. */
  start(record: string, recordDigest: string): Promise<void>;
  /**
   * SHA-256 of the source, read on its own host while the job runs: bytes that never cross the network, and a processor that is not the
   * one that copies. `undefined`: the job itself reads the source again, if anybody does.
   */
  readonly sourceSum?: SourceSum | undefined;
  /** Certifies what the job has read. Returns the verified copy, which has yet to get its name. */
  certify(result: CopyResult, recordDigest: string): Promise<T>;
  /** Ends the job of the record and removes what it made. */
  discard(context: Context, recordDigest: string): Promise<void>;
  /** The failure as a person can use it. `isDiscarded`: false where the host could not be told to. */
  explain(error: LvmNbdError, progress: CopyProgress | undefined, isDiscarded: boolean): Promise<LvmNbdError>;
}

/**
 * After these nothing of the copy is of use. After any other failure, of a look at it above all, its job goes on, or waits to
 * be put in its place.
 */
export const copyFailures: readonly ErrorCode[] = [
  ...(["CANCELLED", "COPY_FAILED", "COPY_MISMATCH", "COPY_STALLED", "COPY_UNCERTIFIED"] as const),
  ...(["NO_SPACE", "SNAPSHOT_OVERFLOWED"] as const),
];

/** What a copy onto a volume of somebody else's can meet beside them. */
const volumeFailures: readonly ErrorCode[] = [
  ...(["IMAGE_CORRUPT", "RESTORE_OVERFLOWS", "SNAPSHOT_MERGING", "VOLUME_IN_USE"] as const),
];

/** Makes the copy, or goes on with one of ours that runs or has ended. What has failed for good is removed. */
export async function runCopy<T>(context: Context, run: CopyRun<T>): Promise<T> {
  let recordDigest = run.going;
  let progress: CopyProgress | undefined;
  try {
    if (recordDigest === undefined) {
      const record = await run.prepare();
      recordDigest = digest(record, 64);
      await run.start(record, recordDigest);
    } else context.progress(`a copy to ${run.target} is on its way: going on with it`);
    const result = await followed(context, run, recordDigest, (now) => {
      progress = now;
    });
    return await run.certify(result, recordDigest);
  } catch (error) {
    if (recordDigest === undefined || !isLvmNbdError(error, ...copyFailures, ...volumeFailures)) throw error;
    const failed = recordDigest;
    const isDiscarded = await discardAfter(
      context,
      run.unfinished,
      (to) => run.discard(to, failed),
      run.whenLeft,
    );
    throw await run.explain(error, progress, isDiscarded);
  }
}

/**
 * After a failure or a cancel, whose signal is aborted already. `unfinished`: what is removed, for messages. False: it could not
 * be, and that was told.
 */
export async function discardAfter(
  context: Context,
  unfinished: string,
  discard: (context: Context) => Promise<void>,
  whenLeft = "is left on the host, the next `pulumi up` removes it",
): Promise<boolean> {
  try {
    await discard({ ...context, signal: AbortSignal.timeout(90_000) });
    return true;
  } catch (error) {
    context.warn(`${unfinished} ${whenLeft}: ${firstLine(error)}`);
    return false;
  }
}

/** After which a job is ended that nobody follows: a week, and for what is copied slowly twice what both readings take. */
export function longestSeconds(sizeBytes: number, bandwidthLimit: number | undefined): number {
  const slowest = Math.min(bandwidthLimit ?? Number.POSITIVE_INFINITY, 5 * 1024 ** 2);
  return Math.max(7 * 24 * 3600, Math.ceil((4 * sizeBytes) / slowest));
}

/**
 * What the job found, compared with the source where that is read on its own host. Raises COPY_MISMATCH, and at once what keeps the source
 * from being read.
 */
async function followed(
  context: Context,
  run: Pick<CopyRun<unknown>, "target" | "following" | "whenFull" | "sourceSum">,
  recordDigest: string,
  report: (progress: CopyProgress) => void,
): Promise<CopyResult> {
  const { sourceSum } = run;
  const [ended, refused] = [new AbortController(), new AbortController()];
  const signal = AbortSignal.any([context.signal, ended.signal]);
  // Until then it is the job's progress that is told.
  let isLast = false;
  let last = "";
  const tell = (progress: string) => {
    last = progress;
    if (isLast) context.progress(progress);
  };
  const reading = Promise.allSettled(
    sourceSum === undefined ? [] : [sourceSum({ ...context, signal }, tell)],
  ).then(([read]) => {
    if (read?.status === "rejected" && isFinal(read.reason)) refused.abort();
    return read;
  });
  const following = { ...context, signal: AbortSignal.any([context.signal, refused.signal]) };
  try {
    const result = await follow(following, run, recordDigest, report);
    if (sourceSum === undefined || result.verified) return result;
    context.progress(`the copy was read back; waiting for the checksum of its source${last && `: ${last}`}`);
    isLast = true;
    const read = await reading;
    // What failed long ago is tried again, now that nothing else is left to do.
    if (read?.status === "rejected" && isFinal(read.reason)) throw read.reason;
    const source = read?.status === "fulfilled" ? read.value : await sourceSum(context, tell);
    if (source === result.sha256) return { ...result, verified: true };
    throw new LvmNbdError("COPY_MISMATCH", {
      message: `mismatch: the copy reads back as ${result.sha256}, the source, where it lies, as ${source}`,
      host: context.host.name,
      resource: context.resource,
      advice:
        "Nothing of the copy is kept; an earlier one is untouched. See that `uri` serves the snapshot that `snapshot` names, and look at the " +
        "destination's disk and memory; then run again.",
    });
  } catch (error) {
    const read = refused.signal.aborted && !context.signal.aborted ? await reading : undefined;
    if (read?.status !== "rejected" || !isLvmNbdError(error, "CANCELLED")) throw error;
    if (!isLvmNbdError(read.reason, ...copyFailures))
      context.warn(`the copy to ${run.target} goes on: the next \`pulumi up\` goes on with it`);
    throw read.reason;
  } finally {
    ended.abort();
    // What reads the snapshot holds it.
    await reading;
  }
}

/** With these the copy cannot be compared, whatever comes of it. Any other failure may pass until it is complete. */
function isFinal(error: unknown): boolean {
  return !isLvmNbdError(error) || isLvmNbdError(error, ...copyFailures, "SOURCE_STALLED", "SUDO_DENIED");
}

const pollSeconds = { first: 0.2, most: 2 };
/** How long a host that does not answer is waited for: its job goes on. */
const patienceSeconds = 300;
/** After so long without a byte or a tick of work the copy hangs. */
export const stallSeconds = 300;

/** Waits for the job's end and returns what it found. */
async function follow(
  context: Context,
  run: Pick<CopyRun<unknown>, "following" | "whenFull">,
  recordDigest: string,
  report: (progress: CopyProgress) => void,
): Promise<CopyResult> {
  const command: RemoteCommand = {
    argv: run.following,
    kind: "read",
    deadlineSeconds: 30,
  };
  let unansweredSince: number | undefined;
  let [signature, changedAt] = ["", performance.now()];
  for (let wait = pollSeconds.first; ; wait = Math.min(wait * 2, pollSeconds.most)) {
    let fields: ReadonlyMap<string, string>;
    try {
      const result = await succeed(context, command, "the copy could not be followed");
      fields = parseOutput(context, command, result, parseFields);
      unansweredSince = undefined;
    } catch (error) {
      if (!isLvmNbdError(error, "HOST_UNREACHABLE", "LINK_LOST", "COMMAND_TIMED_OUT")) throw error;
      unansweredSince ??= performance.now();
      const seconds = Math.round((performance.now() - unansweredSince) / 1000);
      if (seconds > patienceSeconds) throw error;
      context.progress(`the host has not answered for ${seconds} s; the copy goes on there`);
      changedAt = performance.now();
      await pause(context, wait, "the copy ran");
      continue;
    }
    const show = parseShow(fields.get("show") ?? "");
    if (["inactive", "failed"].includes(show.ActiveState ?? "")) {
      // How far it came, where nothing has removed what tells of it.
      if (fields.has("phase")) report(parseProgress(fields));
      return jobEnd(context, run, command, fields, recordDigest);
    }
    const progress = parseProgress(fields);
    report(progress);
    context.progress(progressPhrase(progress, Number(fields.get("now"))));
    const now = [show.CPUUsageNSec, ...["phase", "progress", "read"].map((name) => fields.get(name))].join();
    if (now !== signature) [signature, changedAt] = [now, performance.now()];
    if (performance.now() - changedAt > stallSeconds * 1000) {
      throw new LvmNbdError("COPY_STALLED", {
        message: `no progress for ${stallSeconds} s at ${Math.floor(progress.done * 100)} %`,
        host: context.host.name,
        resource: context.resource,
      });
    }
    await pause(context, wait, "the copy ran");
  }
}

/** With which words a job tells of which failure. */
const reasons = {
  ...({ mismatch: "COPY_MISMATCH", corrupt: "IMAGE_CORRUPT", full: "NO_SPACE" } as const),
  ...({ open: "VOLUME_IN_USE", merging: "SNAPSHOT_MERGING", overflows: "RESTORE_OVERFLOWS" } as const),
};

function jobEnd(
  context: Context,
  run: Pick<CopyRun<unknown>, "following" | "whenFull">,
  command: RemoteCommand,
  fields: ReadonlyMap<string, string>,
  recordDigest: string,
): CopyResult {
  const text = fields.get("result");
  const log = fields.get("log")?.trim() ?? "";
  const where = { host: context.host.name, resource: context.resource };
  if (fields.get("recordDigest") !== recordDigest) {
    const message = "somebody else removed the copy while it ran";
    throw new ChangedMeanwhile(new LvmNbdError("COPY_FAILED", { ...where, message }));
  }
  if (text !== undefined)
    return parseOutput(context, command, { exitCode: 0, stdout: text, stderr: "" }, (stdout) =>
      copyResult.parse(JSON.parse(stdout)),
    );
  const reason = fields.get("failure");
  const told = Object.entries(reasons).find(([word]) => reason?.startsWith(`${word}: `));
  if (reason !== undefined && told !== undefined)
    throw new LvmNbdError(told[1], { ...where, message: reason });
  throw new LvmNbdError(noSpace(log) ? "NO_SPACE" : "COPY_FAILED", {
    ...where,
    message:
      reason ??
      "the job ended without a word: it was killed, memory ran out, or the host was rebooted meanwhile",
    stderr: log,
    advice: noSpace(log) ? run.whenFull : undefined,
  });
}

/** `systemctl stop` may have to wait for a disk, the lock for another script. */
const changing = { deadlineSeconds: 240, kind: "change" } as const;

/** What a changing script needs beside its arguments. */
interface ScriptOptions {
  /** Its length follows as the last argument, so that the script sees whether all has arrived. */
  readonly stdin?: string | undefined;
  /** Seconds between TERM and KILL. */
  readonly graceSeconds?: number;
  /** The failure, where more can be said of it. */
  readonly explain?: (command: RemoteCommand, result: CommandResult) => LvmNbdError | undefined;
}

/** Runs one of the changing scripts. */
export async function changeByScript(
  context: Context,
  what: string,
  argv: string[],
  { stdin, explain = () => undefined, ...limits }: ScriptOptions = {},
): Promise<void> {
  const length = stdin === undefined ? [] : [String(Buffer.byteLength(stdin))];
  const command: RemoteCommand = { ...changing, ...limits, argv: [...argv, ...length], stdin };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === 0) return;
  if (result.exitCode === changedMeanwhile)
    throw new ChangedMeanwhile(
      failure(context, command, result, "somebody else changed it in the meantime", "FOREIGN_RESOURCE"),
    );
  throw (
    explain(command, result) ??
    failure(context, command, result, what, noSpace(result.stderr) ? "NO_SPACE" : "COMMAND_FAILED")
  );
}

function noSpace(text: string): boolean {
  return /No space left on device|Disk quota exceeded/.test(text);
}

/** What is not of our making, or was spoiled, is not ours. */
export function parsed<T>(text: string | undefined, shape: z.ZodType<T>): T | undefined {
  if (text === undefined) return undefined;
  try {
    return shape.safeParse(JSON.parse(text)).data;
  } catch {
    return undefined;
  }
}
