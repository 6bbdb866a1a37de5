/**
 * `npm test`: everything. Static checks, then unit tests and lab tests with coverage. Ends with a line
 * `N passed, N failed`.
 *
 *   npm test                 everything
 *   npm test -- unit         without the lab
 *   npm test -- lab [FILTER] lab tests only
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { z } from "zod";

const [part = "all", ...filters] = process.argv.slice(2);
if (!["all", "unit", "lab"].includes(part)) {
  console.error("usage: npm test [-- unit|lab [FILTER...]]");
  process.exit(2);
}

let passed = 0;
let failed = 0;

function step(what: string, command: string, args: readonly string[]): boolean {
  const start = Date.now();
  process.stdout.write(`\n== ${what}\n`);
  const { status } = spawnSync(command, args, { stdio: "inherit" });
  process.stdout.write(
    `== ${what}: ${status === 0 ? "good" : "FAILED"} after ${Math.round((Date.now() - start) / 1000)} s\n`,
  );
  return status === 0;
}

function check(what: string, command: string, ...args: string[]): void {
  if (step(what, command, args)) passed++;
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
    const good = step(what, "vitest", [
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
    failed += Math.max(counts.numFailedTests, good ? 0 : 1);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

if (part !== "lab") {
  check("format and lint", "biome", "check", ".");
  check("types", "tsc", "--noEmit");
  check("unused code and dependencies", "knip");
  check("schema.json is up to date", "node", "scripts/schema.mts", "--check");
  check("README's tables are up to date", "node", "scripts/readme.mts", "--check");
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
}
const projects = part === "all" ? ["--project=unit", "--project=lab"] : [`--project=${part}`];
tests("tests", [...projects, ...(part === "all" ? ["--coverage"] : []), ...filters]);

process.stdout.write(`\n${passed} passed, ${failed} failed\n`);
process.exit(failed === 0 ? 0 : 1);
