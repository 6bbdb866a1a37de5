/**
 * The Pulumi CLI and stacks of it: the one on PATH, else one built from Go modules into the cache, since a
 * machine may be able to reach Go's module proxy and nothing else.
 */
import { access, copyFile, mkdir, mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { runChild } from "./child.mts";
import { withLock } from "./lock.mts";
import { cacheDirectory } from "./paths.mts";
import { elapsed } from "./wait.mts";

const root = join(import.meta.dirname, "..", "..");

/** The newest SDK that carries the language host is older than the CLI: two modules, two builds. */
const parts = [
  {
    program: "pulumi",
    time: "5 to 10 minutes",
    module: "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi",
    version: "v3.259.0",
    flags: "-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=3.259.0",
  },
  {
    program: "pulumi-language-nodejs",
    time: "1 to 2 minutes",
    module: "github.com/pulumi/pulumi/sdk/v3/nodejs/cmd/pulumi-language-nodejs",
    version: "v3.68.0",
    flags: "-s -w",
  },
] as const;

/** The provider of dynamic resources, a script of the SDK. Beside the CLI; from elsewhere on PATH, each command warns of it. */
const dynamicProvider = "pulumi-resource-pulumi-nodejs";

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
      // Every run of the CLI starts Node twice, and loads the SDK each time.
      NODE_COMPILE_CACHE: join(cacheDirectory(), "node-compile-cache"),
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
  const programs = [...parts.map(({ program }) => program), dynamicProvider];
  const isMissing = async () =>
    !(await Promise.all(programs.map((program) => exists(join(bin, program))))).every(Boolean);
  if (!(await isMissing())) return bin;
  await withLock(
    `${bin}.lock`,
    { timeoutSeconds: 1800, onWait: () => log("waiting for another build of the Pulumi CLI") },
    async () => {
      if (!(await isMissing())) return;
      await mkdir(bin, { recursive: true });
      for (const part of parts) {
        if (await exists(join(bin, part.program))) continue;
        if (!(await isOnPath("go", process.env.PATH ?? ""))) {
          throw new Error(
            "Pulumi is neither on PATH nor can it be built here: install `pulumi` (pulumi.com/docs/install) or Go 1.25 or later",
          );
        }
        log(`building ${part.program} from source (once; ${part.time} on 2 cores)`);
        const start = performance.now();
        const folder = await mkdtemp(join(tmpdir(), "lvm-nbd-pulumi-"));
        try {
          await writeFile(join(folder, "go.mod"), "module build\n\ngo 1.25\n");
          await go(folder, "get", `${part.module}@${part.version}`);
          await go(folder, "build", "-o", join(folder, part.program), "-ldflags", part.flags, part.module);
          await install(join(folder, part.program), join(bin, part.program));
        } finally {
          await rm(folder, { recursive: true, force: true });
        }
        log(`built ${part.program} (${elapsed(start)})`);
      }
      await install(join(root, "node_modules/@pulumi/pulumi", dynamicProvider), join(bin, dynamicProvider));
    },
  );
  return bin;
}

/** Under another name first: a cut build must not leave half a program under the right one. */
async function install(from: string, to: string): Promise<void> {
  await copyFile(from, `${to}.new`);
  await rename(`${to}.new`, to);
}

async function go(folder: string, ...args: string[]): Promise<void> {
  await runChild(["go", ...args], { cwd: folder, timeoutSeconds: 1500, ownGroup: true });
}
