/** Pulumi's language host of YAML, built from its Go module into the cache. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { buildOnce, go } from "./buildOnce.mts";
import { cacheDirectory } from "./paths.mts";

const program = "pulumi-language-yaml";
const repository = "github.com/pulumi/pulumi-yaml";
const version = "v1.25.0";

/** The folder that holds it, for the PATH of `pulumi`. */
export async function ensureYamlLanguage(log: (line: string) => void): Promise<string> {
  const bin = join(cacheDirectory(), program, version, "bin");
  const make = async (target: string, folder: string) => {
    await writeFile(join(folder, "go.mod"), "module build\n\ngo 1.25\n");
    await go(folder, "", "get", `${repository}/cmd/${program}@${version}`);
    await go(folder, "", "build", "-o", target, "-ldflags", "-s -w", `${repository}/cmd/${program}`);
  };
  await buildOnce(bin, [{ name: program, time: "1 to 3 minutes", make }], program, log);
  return bin;
}
