/** One look at the servers of a stack: Pulumi is run, and its report is written. */
import { spawn } from "node:child_process";
import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { z } from "zod";
import { type Ended, type Look, readPreview } from "./parse.ts";
import { exitStatus, metricsOf, reportOf, textOf } from "./report.ts";

/** What Pulumi has to end in after the deadline, before it is killed. */
const graceMs = 20_000;
const usage =
  "usage: main.ts --project DIR --stack NAME --out DIR [--max-age-hours N] [--deadline-seconds N]";

const count = (fallback: string) => z.coerce.number().positive().default(Number(fallback));
const options = z.object({
  project: z.string(),
  stack: z.string(),
  out: z.string(),
  "max-age-hours": count("26"),
  "deadline-seconds": count("900"),
});

/** `pulumi preview` against the real servers: it refreshes in memory, so neither they nor the state are changed. */
function preview(project: string, stack: string, stop: AbortSignal): Promise<Ended> {
  const args = ["preview", "--refresh", "--json", "--stack", stack, "--non-interactive", "--color", "never"];
  const child = spawn("pulumi", args, {
    cwd: project,
    env: {
      ...process.env,
      PULUMI_ENABLE_STREAMING_JSON_PREVIEW: "true",
      PULUMI_SKIP_UPDATE_CHECK: "true",
    },
    stdio: ["ignore", "pipe", "pipe"],
    // A group of its own, so that all of it can be ended.
    detached: true,
  });
  const stdout: Buffer[] = [];
  const stderr: Buffer[] = [];
  child.stdout.on("data", (chunk: Buffer) => stdout.push(chunk));
  child.stderr.on("data", (chunk: Buffer) => stderr.push(chunk));
  let killing: NodeJS.Timeout | undefined;
  const onStop = () => {
    endGroup(child.pid, "SIGTERM");
    killing = setTimeout(() => {
      endGroup(child.pid, "SIGKILL");
      // What has left the group must not keep us.
      child.stdout.destroy();
      child.stderr.destroy();
    }, graceMs);
  };
  if (stop.aborted) onStop();
  else stop.addEventListener("abort", onStop, { once: true });
  return new Promise<Ended>((resolve) => {
    child.on("error", (error) =>
      resolve({
        exitCode: -1,
        stdout: "",
        stderr: `pulumi could not be started in ${project}: ${error.message}`,
      }),
    );
    child.on("close", (code, signal) =>
      resolve({
        exitCode: code ?? -1,
        stdout: Buffer.concat(stdout).toString("utf8"),
        stderr: `${Buffer.concat(stderr).toString("utf8")}${signal === null ? "" : `\nended by ${signal}`}`,
      }),
    );
  }).finally(() => {
    clearTimeout(killing);
    stop.removeEventListener("abort", onStop);
  });
}

function endGroup(pid: number | undefined, signal: NodeJS.Signals): void {
  if (pid === undefined) return;
  try {
    process.kill(-pid, signal);
  } catch (error) {
    // It has ended in the meantime.
    if (!isCode(error, "ESRCH")) throw error;
  }
}

function isCode(error: unknown, code: string): boolean {
  return error instanceof Error && "code" in error && error.code === code;
}

/** After a stop it cannot be told how things are, whatever Pulumi said until then. */
async function look(project: string, stack: string, deadlineSeconds: number): Promise<Look> {
  const stop = new AbortController();
  const stopFor = (why: string) => () => stop.abort(why);
  const timer = setTimeout(
    stopFor(`pulumi took longer than ${deadlineSeconds} s and was stopped`),
    deadlineSeconds * 1000,
  );
  const onSignal = stopFor("the watch was stopped by a signal");
  process.on("SIGTERM", onSignal).on("SIGINT", onSignal);
  try {
    const seen = readPreview(await preview(project, stack, stop.signal));
    return stop.signal.aborted ? { ...seen, errors: [String(stop.signal.reason), ...seen.errors] } : seen;
  } finally {
    clearTimeout(timer);
    process.off("SIGTERM", onSignal).off("SIGINT", onSignal);
  }
}

/** Of the report that is there. A report that cannot be read tells nothing. */
function lastSuccess(path: string): string | undefined {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    if (isCode(error, "ENOENT")) return undefined;
    throw error;
  }
  const report = z
    .string()
    .transform((json, context) => {
      try {
        return JSON.parse(json) as unknown;
      } catch {
        context.addIssue("is no JSON");
        return z.NEVER;
      }
    })
    .pipe(z.object({ lastSuccessAt: z.iso.datetime().optional() }))
    .safeParse(text);
  return report.data?.lastSuccessAt;
}

/** Whoever reads it meanwhile sees the old or the new file, whole. */
function writeWhole(path: string, text: string): void {
  const part = `${path}.${process.pid}.part`;
  try {
    writeFileSync(part, text, { flush: true });
    renameSync(part, path);
  } finally {
    rmSync(part, { force: true });
  }
}

/** Returns the exit status. */
export async function watch(argv: readonly string[]): Promise<number> {
  const { values } = parseArgs({
    args: [...argv],
    options: {
      ...{ project: { type: "string" }, stack: { type: "string" }, out: { type: "string" } },
      ...{ "max-age-hours": { type: "string" }, "deadline-seconds": { type: "string" } },
    },
  });
  const given = options.safeParse(values);
  if (!given.success) {
    console.error(`${z.prettifyError(given.error)}\n${usage}`);
    return exitStatus.unknown;
  }
  const { project, stack, out, "max-age-hours": maxAgeHours, "deadline-seconds": deadline } = given.data;
  mkdirSync(out, { recursive: true });
  const lastSuccessAt = lastSuccess(join(out, "report.json"));
  const startedAt = new Date();
  const seen = await look(project, stack, deadline);
  const report = reportOf(seen, { stack, startedAt, endedAt: new Date(), lastSuccessAt, maxAgeHours });
  const text = textOf(report);
  writeWhole(join(out, "lvm_nbd.prom"), metricsOf(report));
  writeWhole(join(out, "report.json"), `${JSON.stringify(report, null, 2)}\n`);
  writeWhole(join(out, "report.txt"), text);
  process.stdout.write(text);
  return exitStatus[report.outcome];
}
