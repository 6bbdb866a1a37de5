/** The SDKs that Pulumi's own code generators make of schema.json. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { z } from "zod";
import { go } from "./buildOnce.mts";
import { runChild } from "./child.mts";
import { pulumiVersion } from "./pulumi.mts";
import { ensureSdkGenerator, sdkGeneratorModule } from "./sdkGenerator.mts";

vi.setConfig({ testTimeout: 600_000, hookTimeout: 1_800_000 });

const root = join(__dirname, "..", "..");
const schemaFile = join(root, "schema.json");
const pulumiModule = "github.com/pulumi/pulumi/pkg/v3";
const described = z.record(z.string(), z.looseObject({ description: z.string() }));
const schema = z
  .looseObject({ resources: described, functions: described })
  .parse(JSON.parse(readFileSync(schemaFile, "utf8")));

let generator: string;
let folder: string;

beforeAll(async () => {
  generator = await ensureSdkGenerator((line) => process.stdout.write(`${line}\n`));
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-sdk-"));
  await runChild([generator, schemaFile, folder]);
});

afterAll(() => {
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
});

/** Writes the examples of a language into a folder, as a file each. */
function writeExamples(language: string, extension: string): string {
  const to = join(folder, "examples", language);
  mkdirSync(to, { recursive: true });
  for (const [token, { description }] of Object.entries({ ...schema.resources, ...schema.functions })) {
    const [, program] = new RegExp(`\`\`\`${language}\n(.*?)\`\`\``, "s").exec(description) ?? [];
    if (program === undefined) throw new Error(`${token} has no example in ${language}`);
    writeFileSync(join(to, `${token.replace(/.*:/, "")}${extension}`), program);
  }
  return to;
}

it("in TypeScript compiles, with the examples as programs of it", async () => {
  const sdk = join(folder, "nodejs");
  const examples = writeExamples("typescript", ".ts");
  symlinkSync(join(root, "node_modules"), join(folder, "node_modules"));
  const options = {
    ...{ strict: true, noEmit: true, skipLibCheck: true, types: ["node"] },
    ...{ target: "ES2023", module: "node20", moduleResolution: "node16" },
    paths: { "pulumi-lvm-nbd-sdk": [join(sdk, "index.ts")] },
  };
  const config = { compilerOptions: options, include: [`${sdk}/**/*.ts`, `${examples}/*.ts`] };
  writeFileSync(join(folder, "tsconfig.json"), JSON.stringify(config));
  const compiler = join(root, "node_modules", "typescript", "bin", "tsc");
  await runChild([process.execPath, compiler, "-p", join(folder, "tsconfig.json")], { timeoutSeconds: 300 });
});

it("in Python compiles, with the examples", async () => {
  const examples = writeExamples("python", ".py");
  await runChild(["python3", "-m", "compileall", "-q", join(folder, "python"), examples]);
  const inputs = readFileSync(join(folder, "python", "pulumi_lvm_nbd", "lv_snapshot.py"), "utf8");
  expect(inputs).toContain("volume_group: pulumi.Input[_builtins.str]");
});

it("in Go is Go, as its generator sees to itself", () => {
  expect(readFileSync(join(folder, "go", "lvSnapshot.go"), "utf8")).toContain("package lvmnbd");
});

it("keeps keys secret before the provider has them", () => {
  const text = readFileSync(join(folder, "nodejs", "nbdAttachment.ts"), "utf8");
  expect(text).toContain("pulumi.secret(args.tls)");
  expect(text).toContain('additionalSecretOutputs: ["tls"]');
  expect(readFileSync(join(folder, "nodejs", "provider.ts"), "utf8")).toContain("pulumi.secret(args.hosts)");
});

it("is refused where the metaschema refuses the schema, and where a type is missing", async () => {
  const refused = async (text: string) => {
    const file = join(folder, "refused.json");
    writeFileSync(file, text);
    return runChild([generator, file, join(folder, "refused")], { allowFailure: true });
  };
  const missing = await refused(JSON.stringify({ ...schema, types: {} }));
  expect(missing).toMatchObject({ exitCode: 1, stderr: expect.stringContaining("not found in package") });
  expect(await refused(JSON.stringify({ ...schema, name: "1" }))).toMatchObject({ exitCode: 1 });
});

it("is of the version of the CLI, and so is the metaschema of the unit tests", async () => {
  const version = await go(sdkGeneratorModule, "", "list", "-m", "-f", "{{.Version}}", pulumiModule);
  expect(version.trim()).toBe(pulumiVersion);
  const sources = (await go(sdkGeneratorModule, "", "list", "-m", "-f", "{{.Dir}}", pulumiModule)).trim();
  expect(readFileSync(join(root, "test", "recorded", "metaschema.json"), "utf8")).toBe(
    readFileSync(join(sources, "codegen", "schema", "pulumi.json"), "utf8"),
  );
});
