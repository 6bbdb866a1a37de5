/**
 * `npm test`: everything. Static checks, then unit tests and lab tests. Ends with a line
 * `N passed, N failed`.
 *
 *   npm test                 everything
 *   npm test -- unit         without the lab
 *   npm test -- lab [FILTER] lab tests only
 *   npm test -- coverage     unit tests, and which lines they run: it takes them 1.7 times the processor
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { z } from "zod";

const [part = "all", ...filters] = process.argv.slice(2);
if (!["all", "unit", "lab", "coverage"].includes(part)) {
  console.error("usage: npm test [-- unit|lab|coverage [FILTER...]]");
  process.exit(2);
}

let passed = 0;
let failed = 0;

/** Exit code of a step that could not find out what it was to: neither good nor failed, and said at the end. */
const noAnswer = 3;
const unanswered: string[] = [];
const outcomes: Readonly<Record<number, string>> = { 0: "good", [noAnswer]: "COULD NOT BE ASKED" };

function step(what: string, command: string, args: readonly string[]): number {
  const start = Date.now();
  process.stdout.write(`\n== ${what}\n`);
  const status = spawnSync(command, args, { stdio: "inherit" }).status ?? 1;
  process.stdout.write(
    `== ${what}: ${outcomes[status] ?? "FAILED"} after ${Math.round((Date.now() - start) / 1000)} s\n`,
  );
  return status;
}

function check(what: string, command: string, ...args: string[]): void {
  if (step(what, command, args) === 0) passed++;
  else failed++;
}

/** A question to somebody else, who may not answer. */
function inquiry(what: string, command: string, ...args: string[]): void {
  const status = step(what, command, args);
  if (status === noAnswer) unanswered.push(what);
  else if (status === 0) passed++;
  else failed++;
}

const report = z.object({
  numPassedTests: z.number(),
  numFailedTests: z.number(),
  numFailedTestSuites: z.number(),
});

function tests(what: string, args: readonly string[]): void {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-test-"));
  try {
    const json = join(folder, "report.json");
    const status = step(what, "vitest", [
      "run",
      "--reporter=default",
      "--reporter=json",
      `--outputFile.json=${json}`,
      ...args,
    ]);
    if (!existsSync(json)) {
      process.stdout.write(`== ${what}: ended before its report was written\n`);
      failed++;
      return;
    }
    const counts = report.parse(JSON.parse(readFileSync(json, "utf8")));
    passed += counts.numPassedTests;
    // A run can also fail without a failed test: an unhandled error, or a file that does not load.
    failed += Math.max(counts.numFailedTests, status === 0 ? 0 : 1);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

if (part === "all" || part === "unit") {
  check("format and lint", "biome", "check", ".");
  check("types", "tsc", "--noEmit");
  check("unused code and dependencies", "knip");
  check("schema.json is up to date", "node", "scripts/schema.mts", "--check");
  check("README's tables are up to date", "node", "scripts/readme.mts", "--check");
  check("examples in other languages are up to date", "node", "scripts/examples.mts", "--check");
  check("package shape", "publint", "--strict");
  check(
    "package types",
    "attw",
    "--pack",
    ".",
    "--profile",
    "node16",
    "--exclude-entrypoints",
    "./schema.json",
  );
  inquiry("dependency audit", "node", "scripts/audit.mts");
}
const projects: Readonly<Record<string, readonly string[]>> = {
  all: ["--project=unit", "--project=lab"],
  coverage: ["--project=unit", "--coverage"],
};
tests("tests", [...(projects[part] ?? [`--project=${part}`]), ...filters]);

for (const what of unanswered) process.stdout.write(`\n${what}: could not be asked, so it is not known\n`);
process.stdout.write(`\n${passed} passed, ${failed} failed\n`);
process.exit(failed === 0 ? 0 : 1);
