import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { verdictOf } from "../../scripts/audit.mts";

const root = join(__dirname, "..", "..");

/** As `npm audit --json` of npm 11 prints it, shortened. */
function report(vulnerabilities: Readonly<Record<string, unknown>>): string {
  const counts = { info: 0, low: 0, moderate: 0, high: 0, critical: 0, total: 0 };
  const dependencies = { prod: 120, dev: 240, optional: 30, peer: 0, peerOptional: 0, total: 366 };
  return JSON.stringify({
    auditReportVersion: 2,
    vulnerabilities,
    metadata: { vulnerabilities: counts, dependencies },
  });
}
const flaw = (severity: string, via: unknown) => ({
  ...{ name: "ws", severity, isDirect: false, via: [via], effects: [], range: "8.0.0 - 8.17.0" },
  ...{ nodes: ["node_modules/ws"], fixAvailable: true },
});
const advisory = {
  source: 1098392,
  name: "ws",
  title: "DoS by many headers",
  url: "https://github.com/advisories/GHSA-3h5v-q93c-6h6q",
};

describe("the dependency audit", () => {
  it.each([false, true])("is good where nothing grave is known (on GitHub: %s)", (isOnGitHub) => {
    expect(verdictOf(report({ ws: flaw("moderate", advisory) }), isOnGitHub)).toEqual({
      exitCode: 0,
      text: "none of severity high or critical in 120 packages",
    });
  });

  it.each(["high", "critical"])("names a vulnerability of severity %s", (severity) => {
    const { exitCode, text } = verdictOf(
      report({ ws: flaw(severity, advisory), jsdom: flaw(severity, "ws") }),
      false,
    );
    expect(exitCode).toBe(1);
    expect(text.split("\n")).toEqual([
      `ws 8.0.0 - 8.17.0: ${severity}: DoS by many headers https://github.com/advisories/GHSA-3h5v-q93c-6h6q`,
      `jsdom 8.0.0 - 8.17.0: ${severity}`,
    ]);
  });

  it.each([
    [
      "refuses",
      '{"method":"POST","uri":"https://r/-/npm/v1/security/advisories/bulk","statusCode":405,"body":"","error":{"summary":"","detail":""}}',
      "HTTP 405",
    ],
    ["cannot be reached", '{"error":{"summary":"getaddrinfo ENOTFOUND r","detail":""}}', "ENOTFOUND"],
    ["says nothing", "", "no report"],
  ])("is no answer where the registry %s, and fails on GitHub", (_what, stdout, reason) => {
    const asked = verdictOf(stdout, false);
    expect(asked.exitCode).toBe(3);
    expect(asked.text).toMatch(/could not be asked .*NOT known/);
    expect(asked.text).toContain(reason);
    expect(verdictOf(stdout, true)).toEqual({ ...asked, exitCode: 1 });
  });
});

describe("the publishing workflow", () => {
  const workflow = readFileSync(join(root, ".github/workflows/publish.yml"), "utf8");

  it("takes every action by its commit", () => {
    const uses = workflow.split("\n").filter((line) => line.includes("uses:"));
    expect(uses.length).toBeGreaterThan(0);
    for (const line of uses) expect(line).toMatch(/uses: [\w-]+\/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$/);
  });

  it("gives its identity to the job that publishes alone, and leaves no token to the others", () => {
    const [, ...jobs] = workflow.split(/^ {2}(?=\w+:\n {4})/m).filter((part) => !part.startsWith("push:"));
    const withIdentity = jobs.filter((job) => job.includes("id-token"));
    expect(withIdentity.map((job) => job.split(":")[0])).toEqual(["publish"]);
    expect(withIdentity[0]).toContain("npm publish ./*.tgz --ignore-scripts --provenance --access public");
    expect(withIdentity[0]).not.toMatch(/npm (test|ci|install|run|exec)|checkout@/);
    expect(workflow).toMatch(/^permissions: \{\}$/m);
    expect(workflow).not.toMatch(/secrets\.|NODE_AUTH_TOKEN/);
    expect(workflow.match(/persist-credentials: false/g)).toHaveLength(
      workflow.match(/actions\/checkout@/g)?.length ?? 0,
    );
  });
});
