/**
 * The Pulumi CLI and stacks of it: the one on PATH, else one built from Go modules into the cache, since a
 * machine may be able to reach Go's module proxy and nothing else.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { access, copyFile, mkdir, mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { z } from "zod";
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

export type Environment = Readonly<Record<string, string>>;

/** An environment in which `pulumi` works offline, with the Node and the dynamic provider of this checkout. */
export async function ensurePulumi(log: (line: string) => void): Promise<{ env: Environment }> {
  const own = [join(root, "node_modules", ".bin"), join(root, "node_modules", "@pulumi", "pulumi")];
  const path = process.env.PATH ?? "";
  const onPath = (await Promise.all(parts.map(({ program }) => isOnPath(program, path)))).every(Boolean);
  const built = onPath ? [] : [await build(log)];
  return {
    env: {
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
    result = await runChild(["go", ...args], { cwd: folder, timeoutSeconds: 1500 });
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

/** How a Pulumi command is run. */
export interface PulumiOptions {
  /** Return a non-zero exit code instead of throwing. */
  readonly allowFailure?: boolean;
  /** Look at the servers first. */
  readonly refresh?: boolean;
  readonly timeoutSeconds?: number;
  readonly env?: Environment;
  readonly args?: readonly string[];
}

/** A stack in a state folder of its own, run by the real CLI. */
export class PulumiStack {
  readonly projectDir: string;
  readonly stackName: string;
  readonly env: Environment;

  private constructor(projectDir: string, stackName: string, env: Environment) {
    this.projectDir = projectDir;
    this.stackName = stackName;
    this.env = env;
  }

  static async create(options: {
    readonly projectDir: string;
    readonly stackName: string;
    readonly backendDir: string;
    readonly env: Environment;
    readonly config: Readonly<Record<string, string>>;
  }): Promise<PulumiStack> {
    await mkdir(options.backendDir, { recursive: true });
    const stack = new PulumiStack(options.projectDir, options.stackName, {
      ...options.env,
      PULUMI_BACKEND_URL: `file://${options.backendDir}`,
      PULUMI_CONFIG_PASSPHRASE: "lab",
      PULUMI_HOME: join(options.backendDir, "home"),
    });
    await stack.run(["stack", "init", options.stackName]);
    await stack.configure(options.config);
    return stack;
  }

  async configure(config: Readonly<Record<string, string>>): Promise<void> {
    const pairs = Object.entries(config).flatMap(([key, value]) => ["--plaintext", `${key}=${value}`]);
    if (pairs.length > 0) await this.run(["config", "set-all", ...pairs]);
  }

  up(options: PulumiOptions = {}): Promise<ChildResult> {
    return this.run(["up", "--yes", "--skip-preview", ...flags(options)], options);
  }

  preview(options: PulumiOptions = {}): Promise<ChildResult> {
    return this.run(["preview", "--diff", ...flags(options)], options);
  }

  refresh(options: PulumiOptions = {}): Promise<ChildResult> {
    return this.run(["refresh", "--yes", "--skip-preview", ...flags(options)], options);
  }

  destroy(options: PulumiOptions = {}): Promise<ChildResult> {
    return this.run(["destroy", "--yes", "--skip-preview", ...flags(options)], options);
  }

  /** The state as text, secrets encrypted. */
  async exportState(): Promise<string> {
    return (await this.run(["stack", "export"])).stdout;
  }

  async outputs(): Promise<Readonly<Record<string, unknown>>> {
    const { stdout } = await this.run(["stack", "output", "--json"]);
    return z.record(z.string(), z.unknown()).parse(JSON.parse(stdout));
  }

  /** Starts `pulumi up` for a test that interrupts it. */
  spawnUp(): ChildProcess {
    return spawn("pulumi", ["up", "--yes", "--skip-preview", ...this.common()], {
      cwd: this.projectDir,
      env: { ...process.env, ...this.env },
      stdio: ["ignore", "pipe", "pipe"],
      detached: true,
    });
  }

  private common(): string[] {
    return ["--non-interactive", "--color", "never", "--stack", this.stackName];
  }

  private async run(args: readonly string[], options: PulumiOptions = {}): Promise<ChildResult> {
    const common =
      args[0] === "stack" && args[1] === "init" ? ["--non-interactive", "--color", "never"] : this.common();
    const result = await runChild(["pulumi", ...args, ...common], {
      cwd: this.projectDir,
      env: { ...process.env, ...this.env, ...options.env },
      timeoutSeconds: options.timeoutSeconds ?? 600,
    });
    if (result.exitCode !== 0 && options.allowFailure !== true) {
      throw new Error(
        `pulumi ${args.join(" ")} ended with ${result.exitCode}:\n${result.stdout}\n${result.stderr}`,
      );
    }
    return result;
  }
}

function flags({ refresh, args }: PulumiOptions): string[] {
  return [...(refresh === true ? ["--refresh"] : []), ...(args ?? [])];
}
