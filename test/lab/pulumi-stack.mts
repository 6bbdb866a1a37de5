import { type ChildProcess, spawn } from "node:child_process";
import { mkdir } from "node:fs/promises";
import { join, resolve } from "node:path";
import { type ChildResult, runChild } from "./child.mts";

/** How to run one command of Pulumi. */
export interface PulumiOptions {
  /** Return a non-zero exit code instead of throwing. */
  allowFailure?: boolean;
  /** Beside the stack's environment, for this command only. */
  env?: NodeJS.ProcessEnv;
  /** Default 900; then the command and everything it started is ended. */
  timeoutSeconds?: number;
  /** More arguments. */
  args?: readonly string[];
}

/** As `PulumiOptions`, for the commands that can refresh first. */
export interface RefreshableOptions extends PulumiOptions {
  refresh?: boolean;
}

const COMMAND_LIMIT_SECONDS = 900;

/** A stack of a Pulumi project, its state in a directory of its own, its secrets under a passphrase. */
export class PulumiStack {
  readonly name: string;
  readonly projectDir: string;
  /** The environment of every command of this stack. */
  readonly env: NodeJS.ProcessEnv;

  private constructor(name: string, projectDir: string, env: NodeJS.ProcessEnv) {
    this.name = name;
    this.projectDir = projectDir;
    this.env = env;
  }

  /**
   * Makes a new stack in `backendDir` and sets its configuration; a key without a namespace is the project's.
   * `env` is what `ensurePulumi` returned, with what the program needs.
   */
  static async create(options: {
    projectDir: string;
    stackName: string;
    backendDir: string;
    env: NodeJS.ProcessEnv;
    config?: Readonly<Record<string, string>>;
  }): Promise<PulumiStack> {
    const backend = resolve(options.backendDir);
    await mkdir(backend, { recursive: true });
    const stack = new PulumiStack(options.stackName, options.projectDir, {
      PULUMI_HOME: join(backend, "home"),
      PULUMI_CONFIG_PASSPHRASE: "lab",
      ...options.env,
      PULUMI_BACKEND_URL: `file://${backend}`,
    });
    await stack.run(["stack", "init", options.stackName]);
    const config = Object.entries(options.config ?? {}).flatMap(([key, value]) => [
      "--plaintext",
      `${key}=${value}`,
    ]);
    if (config.length > 0) await stack.run(["config", "set-all", ...stack.#select, ...config]);
    return stack;
  }

  async up(options: RefreshableOptions = {}): Promise<ChildResult> {
    return this.run(this.#upArguments(options), options);
  }

  async preview(options: RefreshableOptions = {}): Promise<ChildResult> {
    const refresh = options.refresh ? ["--refresh"] : [];
    return this.run(["preview", ...this.#select, "--diff", ...refresh, ...(options.args ?? [])], options);
  }

  async refresh(options: PulumiOptions = {}): Promise<ChildResult> {
    return this.run(["refresh", ...this.#change, ...(options.args ?? [])], options);
  }

  async destroy(options: RefreshableOptions = {}): Promise<ChildResult> {
    const refresh = options.refresh ? ["--refresh"] : [];
    return this.run(["destroy", ...this.#change, ...refresh, ...(options.args ?? [])], options);
  }

  /** The stack's state, as `pulumi stack export` gives it. Secrets stay encrypted. */
  async exportState(): Promise<unknown> {
    return JSON.parse((await this.run(["stack", "export", ...this.#select])).stdout);
  }

  /** The stack's outputs, secret ones in plain text. */
  async outputs(): Promise<Record<string, unknown>> {
    const { stdout } = await this.run(["stack", "output", ...this.#select, "--json", "--show-secrets"]);
    const outputs: unknown = JSON.parse(stdout);
    return typeof outputs === "object" && outputs !== null ? { ...outputs } : {};
  }

  /** Removes the lock which a killed command left on the stack. */
  async cancel(): Promise<ChildResult> {
    return this.run(["cancel", "--yes", this.name]);
  }

  /**
   * Starts `up` and returns the process, for a test to signal. It leads its own process group: a signal to
   * `-child.pid` goes to Pulumi and all its plugins, as an interrupt at a terminal does.
   */
  spawnUp(options: RefreshableOptions = {}): ChildProcess {
    return spawn("pulumi", this.#arguments(this.#upArguments(options)), {
      cwd: this.projectDir,
      env: { ...this.env, ...options.env },
      detached: true,
      stdio: ["ignore", "pipe", "pipe"],
    });
  }

  /** Runs any command of Pulumi in the project. */
  async run(args: readonly string[], options: PulumiOptions = {}): Promise<ChildResult> {
    return runChild(["pulumi", ...this.#arguments(args)], {
      cwd: this.projectDir,
      env: { ...this.env, ...options.env },
      timeoutSeconds: options.timeoutSeconds ?? COMMAND_LIMIT_SECONDS,
      allowFailure: options.allowFailure ?? false,
      ownGroup: true,
    });
  }

  #upArguments(options: RefreshableOptions): string[] {
    return ["up", ...this.#change, ...(options.refresh ? ["--refresh"] : []), ...(options.args ?? [])];
  }

  #arguments(args: readonly string[]): string[] {
    return [...args, "--non-interactive", "--color", "never"];
  }

  get #select(): string[] {
    return ["--stack", this.name];
  }

  /** For commands that change something: no question, and no preview before it. */
  get #change(): string[] {
    return [...this.#select, "--yes", "--skip-preview"];
  }
}
