/** Pulumi's own code generators as a program, built from `test/schema/sdk` into the cache. */
import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { buildOnce, go } from "./buildOnce.mts";
import { cacheDirectory } from "./paths.mts";

/** Its sources. */
export const sdkGeneratorModule = join(import.meta.dirname, "..", "schema", "sdk");

/** Path of the program: `sdk SCHEMA FOLDER`. */
export async function ensureSdkGenerator(log: (line: string) => void): Promise<string> {
  const sources = ["main.go", "go.mod", "go.sum"].map((name) => readFile(join(sdkGeneratorModule, name)));
  const hash = createHash("sha256");
  for (const source of await Promise.all(sources)) hash.update(source);
  const bin = join(cacheDirectory(), "sdk", hash.digest("hex").slice(0, 16), "bin");
  await buildOnce(
    bin,
    [
      {
        name: "sdk",
        time: "up to 5 minutes",
        make: async (target) => {
          await go(
            sdkGeneratorModule,
            "",
            "build",
            "-buildvcs=false",
            "-o",
            target,
            "-ldflags",
            "-s -w",
            ".",
          );
        },
      },
    ],
    "Pulumi's code generators",
    log,
  );
  return join(bin, "sdk");
}
