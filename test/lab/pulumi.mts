/**
 * The Pulumi CLI and stacks of it: the one on PATH, else one built from Go modules into the cache, since a
 * machine may be able to reach Go's module proxy and nothing else.
 */
import { access, copyFile, mkdir, mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, delimiter, join } from "node:path";
import { type ChildResult, runChild } from "./child.mts";
import { withLock } from "./lock.mts";
import { cacheDirectory } from "./paths.mts";
import { elapsed } from "./wait.mts";

const root = join(import.meta.dirname, "..", "..");

/** The newest SDK that carries the language host is older than the CLI: two modules, two builds. */
const parts = [
  {
    program: "pulumi",
    module: "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi",
    version: "v3.259.0",
    flags: "-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=3.259.0",
  },
  {
    program: "pulumi-language-nodejs",
    module: "github.com/pulumi/pulumi/sdk/v3/nodejs/cmd/pulumi-language-nodejs",
    version: "v3.68.0",
    flags: "-s -w",
  },
] as const;

export { PulumiStack } from "./pulumi-stack.mts";

/** An environment in which `pulumi` works offline, with the Node and the dynamic provider of this checkout. */
export async function ensurePulumi(log: (line: string) => void): Promise<{ env: NodeJS.ProcessEnv }> {
  const own = [join(root, "node_modules", ".bin"), join(root, "node_modules", "@pulumi", "pulumi")];
  const path = process.env.PATH ?? "";
  const onPath = (await Promise.all(parts.map(({ program }) => isOnPath(program, path)))).every(Boolean);
  const built = onPath ? [] : [await build(log)];
  return {
    env: {
      ...process.env,
      PATH: [...built, ...own, path].join(delimiter),
      PULUMI_SKIP_UPDATE_CHECK: "true",
      PULUMI_AUTOMATION_API_SKIP_VERSION_CHECK: "true",
      PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION: "true",
    },
  };
}

async function isOnPath(program: string, path: string): Promise<boolean> {
  for (const folder of path.split(delimiter)) {
    if (await exists(join(folder, program))) return true;
  }
  return false;
}

async function exists(path: string): Promise<boolean> {
  try {
    await access(path);
    return true;
  } catch {
    return false;
  }
}

/** Builds what is missing into the cache; returns its folder. */
async function build(log: (line: string) => void): Promise<string> {
  const bin = join(cacheDirectory(), "pulumi", parts.map(({ version }) => version).join("-"), "bin");
  const isMissing = async () =>
    !(await Promise.all(parts.map(({ program }) => exists(join(bin, program))))).every(Boolean);
  if (!(await isMissing())) return bin;
  await withLock(
    `${bin}.lock`,
    { timeoutSeconds: 1800, onWait: () => log("waiting for another build of the Pulumi CLI") },
    async () => {
      if (!(await isMissing())) return;
      await mkdir(bin, { recursive: true });
      log("building the Pulumi CLI from source (once; 5 to 10 minutes on 2 cores)");
      for (const part of parts) {
        if (await exists(join(bin, part.program))) continue;
        const start = Date.now();
        const folder = await mkdtemp(join(tmpdir(), "lvm-nbd-pulumi-"));
        try {
          await writeFile(join(folder, "go.mod"), "module build\n\ngo 1.25\n");
          await go(folder, "get", `${part.module}@${part.version}`);
          await go(folder, "build", "-o", join(folder, part.program), "-ldflags", part.flags, part.module);
          // Under another name first: a cut build must not leave half a program under the right one.
          await copyFile(join(folder, part.program), join(bin, `${part.program}.new`));
          await rename(join(bin, `${part.program}.new`), join(bin, part.program));
        } finally {
          await rm(folder, { recursive: true, force: true });
        }
        log(`built ${part.program} (${elapsed(start)})`);
      }
    },
  );
  return bin;
}

async function go(folder: string, ...args: string[]): Promise<void> {
  let result: ChildResult;
  try {
    result = await runChild(["go", ...args], {
      cwd: folder,
      timeoutSeconds: 1500,
      allowFailure: true,
      ownGroup: true,
    });
  } catch (cause) {
    throw new Error(
      "Pulumi is neither on PATH nor can it be built here: install `pulumi` (pulumi.com/docs/install) or Go 1.25 or later",
      {
        cause,
      },
    );
  }
  if (result.exitCode !== 0) throw new Error(`go ${args.join(" ")} failed:\n${result.stderr.slice(-2000)}`);
}
