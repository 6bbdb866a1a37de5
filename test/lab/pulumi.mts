/**
 * The Pulumi CLI and stacks of it: the one on PATH, else one built from Go modules into the cache, since a
 * machine may be able to reach Go's module proxy and nothing else.
 */
import { copyFile, writeFile } from "node:fs/promises";
import { delimiter, join } from "node:path";
import { buildOnce, go, isOnPath, type Program } from "./buildOnce.mts";
import { cacheDirectory } from "./paths.mts";

const root = join(import.meta.dirname, "..", "..");

/** Of the CLI, and of the code generators. */
export const pulumiVersion = "v3.259.0";

/** The newest SDK that carries the language host is older than the CLI: two modules, two builds. */
const parts = [
  {
    program: "pulumi",
    time: "5 to 10 minutes",
    module: "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi",
    version: pulumiVersion,
    flags: `-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=${pulumiVersion.slice(1)}`,
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

/** Builds what is missing into the cache; returns its folder. */
async function build(log: (line: string) => void): Promise<string> {
  const bin = join(cacheDirectory(), "pulumi", parts.map(({ version }) => version).join("-"), "bin");
  const programs: Program[] = parts.map((part) => ({
    name: part.program,
    time: part.time,
    async make(target, folder) {
      const instead = ", or `pulumi` (pulumi.com/docs/install)";
      await writeFile(join(folder, "go.mod"), "module build\n\ngo 1.25\n");
      await go(folder, instead, "get", `${part.module}@${part.version}`);
      await go(folder, instead, "build", "-o", target, "-ldflags", part.flags, part.module);
    },
  }));
  programs.push({
    name: dynamicProvider,
    make: (target) => copyFile(join(root, "node_modules/@pulumi/pulumi", dynamicProvider), target),
  });
  await buildOnce(bin, programs, "the Pulumi CLI", log);
  return bin;
}
