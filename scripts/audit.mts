/**
 * The dependency audit: what users install holds no vulnerability of severity high or critical that npm's registry knows.
 * Exit code 0: none. 1: some. 3: the registry could not be asked, which is no answer; on GitHub, where it can be, that is 1.
 */
import { spawnSync } from "node:child_process";
import { z } from "zod";

export interface Verdict {
  readonly exitCode: 0 | 1 | 3;
  readonly text: string;
}

const grave = ["high", "critical"];

const report = z.object({
  vulnerabilities: z.record(
    z.string(),
    z.object({ severity: z.string(), range: z.string(), via: z.array(z.unknown()) }),
  ),
  metadata: z.object({ dependencies: z.object({ prod: z.number() }) }),
});
const advisory = z.object({ title: z.string(), url: z.string() });
const refusal = z.object({
  message: z.string().optional(),
  statusCode: z.number().optional(),
  error: z.object({ summary: z.string() }).optional(),
});

/** Of what `npm audit --json` printed. */
export function verdictOf(stdout: string, isOnGitHub: boolean): Verdict {
  const printed = parsed(stdout);
  const found = report.safeParse(printed).data;
  if (found === undefined) {
    const why = refusal.safeParse(printed).data;
    const reason =
      why?.message ?? (why?.error?.summary || (why?.statusCode && `HTTP ${why.statusCode}`) || "no report");
    return {
      exitCode: isOnGitHub ? 1 : 3,
      text: `the registry could not be asked (${reason}): whether the dependencies hold known vulnerabilities is NOT known`,
    };
  }
  const bad = Object.entries(found.vulnerabilities).filter(([, { severity }]) => grave.includes(severity));
  if (bad.length === 0)
    return {
      exitCode: 0,
      text: `none of severity high or critical in ${found.metadata.dependencies.prod} packages`,
    };
  const lines = bad.map(([name, { severity, range, via }]) => {
    const advisories = via.flatMap((one) => advisory.safeParse(one).data ?? []);
    const texts = advisories.map(({ title, url }) => `${title} ${url}`);
    return `${name} ${range}: ${severity}${texts.length === 0 ? "" : `: ${texts.join("; ")}`}`;
  });
  return { exitCode: 1, text: lines.join("\n") };
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

if (process.argv[1] === import.meta.filename) {
  const { stdout, error } = spawnSync(
    "npm",
    ["audit", "--omit=dev", "--audit-level=high", "--json", "--fetch-retries=1", "--fetch-timeout=20000"],
    { encoding: "utf8", timeout: 90_000 },
  );
  if (error !== undefined) console.log(error.message);
  const { exitCode, text } = verdictOf(stdout ?? "", process.env.GITHUB_ACTIONS === "true");
  console.log(text);
  process.exit(exitCode);
}
