/**
 * Restores from an image on a fake server: what the scripts of provider/linux/imageRestore.ts and their job do, step by step, in place of
 * those; they themselves run in test/resources/imageRestore.test.ts. Every image reads as what was declared, and has room.
 */
import { digest } from "../../provider/core/owner.js";
import {
  type RestoreMark,
  restoreMarksAmong,
  restoreTag,
  restoreTagOf,
} from "../../provider/core/restoreMark.js";
import { observeDeviceCopyScript, volumeOpen } from "../../provider/linux/deviceCopy.js";
import {
  endImageRestoreScript,
  followImageRestoreScript,
  preflightRestoreScript,
  startImageRestoreScript,
  unfollowedMinutes,
} from "../../provider/linux/imageRestore.js";
import { mergeLock } from "../../provider/linux/merge.js";
import { changedMeanwhile } from "../../provider/linux/unitScript.js";
import { fields } from "../support/fields.js";
import type { Volume } from "./lvm.js";
import { type Process, type Running, Step, type Tool } from "./machine.js";
import type { FakeServer } from "./server.js";

const imageBytes = 1024 ** 2;
/** What each of the job's steps takes, unless somebody who follows looks before. */
const stepSeconds = 20;

interface Job {
  readonly running: Running<number>;
  phase: string;
  followedAt: number;
  /** By those who follow. */
  looks: number;
  failure: string | undefined;
  result: string | undefined;
}

/** `written`: its first byte; `ended`: it was read back. */
type OnWrite = (what: "written" | "ended", mark: RestoreMark) => void;

export class ImageJobs {
  /** By the folder of their files. */
  private readonly jobs = new Map<string, Job>();

  constructor(
    private readonly server: FakeServer,
    private readonly onWrite: OnWrite,
  ) {
    const tools: readonly (readonly [
      string,
      (process: Process, args: readonly string[]) => Running<number> | number,
    ])[] = [
      [preflightRestoreScript, (process) => this.preflight(process)],
      [startImageRestoreScript, (process, args) => this.start(process, args)],
      [observeDeviceCopyScript, (process, args) => this.observe(process, args)],
      [followImageRestoreScript, (process, args) => this.follow(process, args)],
      [endImageRestoreScript, (process, args) => this.end(process, args)],
    ];
    for (const [script, work] of tools) {
      const tool: Tool = (process) => work(process, process.argv.slice(4));
      server.scripts.set(script, tool);
    }
  }

  /** Ends all of them at once. */
  kill(): void {
    for (const run of this.jobs.keys()) this.stop(run);
  }

  private preflight(process: Process): number {
    const now = String(this.seconds());
    process.out(fields({ missing: "", chunks: "", now, size: String(imageBytes), "size.rc": "0", end: "" }));
    return 0;
  }

  private *start(process: Process, args: readonly string[]): Running<number> {
    const [, run = "", group = "", name = "", uuid = "", record = "", , , mark = "", ...more] = args;
    const seen = more.slice(0, -1);
    yield process.wait({});
    const marks = this.volume(group, uuid)?.tags.filter((tag) => tag.startsWith(restoreTag)) ?? [];
    if (!marks.every((tag) => seen.includes(tag))) return changedMeanwhile;
    this.stop(run);
    yield process.wait({});
    const volume = this.server.lvm.find(group, name);
    if (volume?.uuid !== uuid) return changedMeanwhile;
    if (this.server.isOpen(volume)) return volumeOpen;
    const { files } = this.server;
    this.clear(run);
    files.mkdirs(run);
    files.write(`${run}/record.json`, record);
    yield process.wait({});
    this.server.lvm.retag(group, volume, [], [mark]);
    yield process.wait({});
    const job: Job = {
      running: this.job(run, group, uuid, mark, seen),
      phase: "start",
      followedAt: this.seconds(),
      looks: 0,
      failure: undefined,
      result: undefined,
    };
    this.jobs.set(run, job);
    this.server.machine.background.add(job.running);
    return 0;
  }

  private observe(process: Process, [, run = ""]: readonly string[]): number {
    const record = this.record(run);
    const job = this.jobs.get(run);
    process.out(
      fields({
        active: this.isRunning(job) ? "active" : "inactive",
        recordDigest: record === undefined ? "" : digest(record, 64),
        ...(record === undefined ? {} : { record }),
        ...(job?.result === undefined ? {} : { result: job.result }),
        end: "",
      }),
    );
    return 0;
  }

  private follow(process: Process, [, , , , run = ""]: readonly string[]): number {
    const record = this.record(run);
    const job = this.jobs.get(run);
    if (job !== undefined && record !== undefined) {
      job.followedAt = this.seconds();
      job.looks += 1;
    }
    const isRunning = this.isRunning(job);
    const { result, failure } = job ?? {};
    process.out(
      fields({
        show: `ActiveState=${isRunning ? "active" : "inactive"}\nCPUUsageNSec=1\n`,
        now: String(this.seconds()),
        ...(job === undefined || record === undefined ? {} : { phase: `${job.phase} ${this.seconds()}` }),
        ...(isRunning || result === undefined ? {} : { result }),
        ...(isRunning ? {} : { recordDigest: record === undefined ? "" : digest(record, 64) }),
        ...(isRunning || failure === undefined ? {} : { failure }),
        end: "",
      }),
    );
    return 0;
  }

  private *end(process: Process, args: readonly string[]): Running<number> {
    const [, run = "", group = "", , uuid = "", seen, ...marks] = args;
    const record = this.record(run);
    if (record !== undefined && digest(record, 64) !== seen) return changedMeanwhile;
    this.stop(run);
    yield process.wait({});
    const volume = this.volume(group, uuid);
    if (marks.length > 0 && volume === undefined) return 5;
    if (volume !== undefined) this.server.lvm.retag(group, volume, marks, []);
    yield process.wait({});
    this.clear(run);
    this.jobs.delete(run);
    return 0;
  }

  /** A failure is told in a file of its own. */
  private *job(
    run: string,
    group: string,
    uuid: string,
    begun: string,
    seen: readonly string[],
  ): Running<number> {
    const [mark] = restoreMarksAmong([begun]);
    const job = () => this.jobs.get(run);
    const fail = (why: string) => {
      const failed = job();
      if (failed !== undefined) failed.failure = why;
      return 1;
    };
    if (mark === undefined) return fail("no mark");
    yield* this.wait("check", run);
    const since = () => this.seconds() - (job()?.followedAt ?? 0);
    while (since() > 30) {
      if (since() > 60 * unfollowedMinutes) return fail("nobody had followed the restore");
      yield* this.until(1, () => since() <= 30);
    }
    const writing = restoreTagOf({ ...mark, stage: "writing" });
    const name = this.volume(group, uuid)?.name ?? "";
    const lock = this.server.files.open(mergeLock(name).replace("$group", group), "append");
    const isFree = () => this.server.machine.canLock(lock);
    while (!isFree()) yield* this.until(1, isFree);
    const volume = this.volume(group, uuid);
    const refused = this.refusal(volume, begun);
    if (volume === undefined || refused !== undefined) return fail(refused ?? "");
    this.server.lvm.retag(group, volume, [begun, ...seen.filter((tag) => tag !== writing)], [writing]);
    volume.data = `half of image ${mark.source}`;
    this.onWrite("written", mark);
    yield* this.wait("copy", run);
    yield* this.wait("verify", run);
    const then = this.refusal(this.volume(group, uuid), writing);
    if (then !== undefined) return fail(then);
    volume.data = `image ${mark.source}`;
    this.onWrite("ended", mark);
    this.server.lvm.retag(group, volume, [writing], [this.restored(mark)]);
    const ended = job();
    if (ended !== undefined) ended.result = this.resultOf(mark);
    return 0;
  }

  private restored(mark: RestoreMark): string {
    const seconds = Math.max(0, this.seconds() - mark.startedAt);
    return restoreTagOf({ ...mark, stage: "restored", seconds });
  }

  private resultOf({ source, startedAt }: RestoreMark): string {
    const common = { sizeBytes: imageBytes, sha256: source, facts: "", verified: true, tools: "" };
    return JSON.stringify({ ...common, startedAt, endedAt: this.seconds() });
  }

  /** As `look` and `change` of the job fail. */
  private refusal(volume: Volume | undefined, mark: string): string | undefined {
    if (volume === undefined) return "there is no such volume any more";
    if (this.server.isOpen(volume)) return "open: it was opened meanwhile";
    if (this.server.lvm.isMergedInto(volume)) return "merging: a snapshot is being merged into it";
    return volume.tags.includes(mark) ? undefined : "the mark of the restore was removed";
  }

  private *wait(phase: string, run: string): Running<void> {
    const job = this.jobs.get(run);
    if (job !== undefined) job.phase = phase;
    const looks = job?.looks ?? 0;
    yield* this.until(stepSeconds, () => (job?.looks ?? 0) > looks);
  }

  private *until(seconds: number, ready: () => boolean): Running<void> {
    const { machine } = this.server;
    const step = new Step(["the job of a restore"], { until: machine.now() + seconds * 1000, ready });
    while (!step.canGoOn(machine.now())) yield step;
  }

  private stop(run: string): void {
    const job = this.jobs.get(run);
    if (job !== undefined) this.server.machine.background.delete(job.running);
  }

  private isRunning(job: Job | undefined): boolean {
    return job !== undefined && this.server.machine.background.has(job.running);
  }

  private clear(run: string): void {
    if (this.server.files.exists(run)) this.server.files.removeTree(run);
  }

  private record(run: string): string | undefined {
    const path = `${run}/record.json`;
    return this.server.files.exists(path) ? this.server.files.read(path) : undefined;
  }

  private volume(group: string, uuid: string): Volume | undefined {
    const all = this.server.lvm.all();
    return all.find((one) => one.group === group && one.volume.uuid === uuid)?.volume;
  }

  private seconds(): number {
    return Math.floor(this.server.machine.now() / 1000);
  }
}
