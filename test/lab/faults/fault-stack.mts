/**
 * A stack for the fault tests: any resources, driven by the real CLI, and errors that are held to what a person
 * needs to read in them.
 */
import { chmodSync, cpSync, mkdirSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect } from "vitest";
import { z } from "zod";
import type { ErrorCode } from "../../../provider/core/errors.js";
import { type ChildResult, runChild } from "../child.mts";
import { type Door, labDoor } from "../doorNames.mts";
import { GUESTS } from "../image-contents.mts";
import type { Lab } from "../lab.mts";
import { ensurePulumi, PulumiStack } from "../pulumi.mts";
import type { PulumiOptions, RefreshableOptions } from "../pulumi-stack.mts";
import type { Values } from "../support.mts";

const root = join(import.meta.dirname, "..", "..", "..");

const typeName = z.enum([
  ...(["LvSnapshot", "NbdExport", "NbdAttachment", "Mount", "VolumeCopy", "BackupImage"] as const),
  ...(["VmBackup", "LvRestore", "HostSetup"] as const),
]);

/** A resource as the program of these tests declares it. Names are unique in a stack. */
export interface Declared {
  readonly type: z.infer<typeof typeName>;
  readonly name: string;
  readonly args: Values;
  readonly dependsOn?: readonly string[];
  /** Further options of Pulumi's. */
  readonly options?: Values;
}

/** For `args`: that output of a resource which is declared before. */
export function output(name: string, property: string): unknown {
  return { $output: [name, property] };
}

/** A host that is made ready. */
export function hostSetup(name: string, host: "server1" | "server2", args: Values): Declared {
  return { type: "HostSetup", name, args: { host, ...args } };
}

/** A snapshot on server1, of an origin in VgVm, unless `args` say otherwise. */
export function snapshot(name: string, args: Values): Declared {
  return { type: "LvSnapshot", name, args: { host: "server1", volumeGroup: "VgVm", ...args } };
}

/** An export of server1 to server2, unless `args` say otherwise. */
export function nbdExport(name: string, args: Values): Declared {
  const [listenAddress, client] = GUESTS.map(({ privateAddress }) => privateAddress);
  return { type: "NbdExport", name, args: { host: "server1", listenAddress, clients: [client], ...args } };
}

/** An attachment to server2, unless `args` say otherwise. */
export function attachment(name: string, args: Values): Declared {
  return { type: "NbdAttachment", name, args: { host: "server2", ...args } };
}

/** A mount on server2. */
export function mount(name: string, args: Values): Declared {
  return { type: "Mount", name, args: { host: "server2", ...args } };
}

/** A copy on server2 of a snapshot of server1 that is exported under the same name. */
export function volumeCopy(name: string, source: string, args: Values): Declared {
  const snapshotOf = { host: "server1", volumeGroup: "VgVm", name: source, uuid: output(source, "uuid") };
  const uri = output(`${source}-export`, "uri");
  return { type: "VolumeCopy", name, args: { host: "server2", uri, snapshot: snapshotOf, ...args } };
}

/** A backup on server2 of a volume of server1. */
export function backupImage(name: string, source: Values, volumes: Values[], args: Values): Declared {
  const from = { host: "server1", listenAddress: GUESTS[0].privateAddress, ...source };
  const inGroup = volumes.map((volume) => ({ volumeGroup: "VgVm", ...volume }));
  return { type: "BackupImage", name, args: { host: "server2", source: from, volumes: inGroup, ...args } };
}

/** The backups on server2 of a VM of server1. */
export function vmBackup(name: string, source: Values, volumes: Values[], args: Values): Declared {
  return { ...backupImage(name, source, volumes, args), type: "VmBackup" };
}

/** A restore on server1 from a snapshot that is declared before. */
export function lvRestore(name: string, from: string, args: Values): Declared {
  const source = { name: output(from, "name"), uuid: output(from, "uuid") };
  return {
    type: "LvRestore",
    name,
    args: { host: "server1", volumeGroup: "VgVm", snapshot: source, ...args },
  };
}

/** What a command of the CLI did and said. */
export class Run {
  readonly exitCode: number;
  readonly text: string;

  constructor({ exitCode, stdout, stderr }: ChildResult) {
    this.exitCode = exitCode;
    this.text = `${stdout}\n${stderr}`;
  }

  /**
   * It failed, and for this resource it says all that a person needs: code, host, resource, what failed, what to do.
   * Returns what it says.
   */
  failedWith(code: ErrorCode, resource: string, host: string, ...texts: string[]): string {
    expect(this.exitCode, this.text).not.toBe(0);
    // Before its end the CLI shows the first line of each error as it happens.
    const diagnostics = this.text.slice(this.text.indexOf("\nDiagnostics:\n"));
    const begin = `${code}: ${resource} on host ${host}: `;
    // With a star where the resource is kept in the state all the same.
    const error = ["error: ", "* "]
      .map((mark) => diagnostics.split(mark + begin)[1])
      .find((rest) => rest !== undefined);
    if (error === undefined) throw new Error(`no "${begin}" in:\n${this.text}`);
    const end = /^ *what to do: \S.{10,}$/m.exec(error);
    expect(end, `no advice in:\n${error}`).not.toBeNull();
    const told = error.slice(0, (end?.index ?? 0) + (end?.[0].length ?? 0));
    // The advice is this error's own, not that of one which is told after it.
    expect(told).not.toMatch(/^\s*(error: |\* )[A-Z][A-Z_]+: /m);
    expect(told.split("\n")[0]?.trim()).toMatch(/\S{3,}/);
    for (const text of texts) expect(told).toContain(text);
    return told;
  }

  /** It went through, and its summary has these lines, e.g. "2 updated". */
  succeeded(...summary: string[]): void {
    expect(this.exitCode, this.text).toBe(0);
    for (const line of summary) expect(this.text).toContain(line);
  }

  /** It showed this line, as of drift. */
  said(...texts: string[]): void {
    for (const text of texts) expect(this.text).toContain(text);
  }
}

const exported = z.object({
  deployment: z.object({
    resources: z
      .array(
        z.object({
          urn: z.string(),
          type: z.string(),
          inputs: z.record(z.string(), z.unknown()).optional(),
          outputs: z.record(z.string(), z.unknown()).optional(),
        }),
      )
      .default([]),
  }),
});

export class FaultStack {
  #resources: readonly Declared[] = [];
  /** Through which the program's resources go from now on. */
  door: Door = labDoor;
  readonly #stack: PulumiStack;
  readonly #folder: string;

  private constructor(stack: PulumiStack, folder: string) {
    this.#stack = stack;
    this.#folder = folder;
  }

  /** A stack of the program beside this file, or of one of the examples, with the package as this checkout builds it. */
  static async create(
    lab: Lab,
    program: { readonly from: string; readonly config?: Readonly<Record<string, string>> } = {
      from: join(import.meta.dirname, "program"),
    },
  ): Promise<FaultStack> {
    const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-faults-"));
    const { env } = await ensurePulumi((line) => process.stdout.write(`${line}\n`));
    const built = join(folder, "package");
    const projectDir = join(folder, "program");
    mkdirSync(built);
    for (const name of ["package.json", "schema.json"]) cpSync(join(root, name), join(built, name));
    symlinkSync(join(root, "node_modules"), join(built, "node_modules"));
    await runChild(["tsc", "-p", "tsconfig.build.json", "--outDir", join(built, "dist")], { cwd: root, env });
    cpSync(program.from, projectDir, {
      recursive: true,
      filter: (source) => !source.includes("node_modules"),
    });
    mkdirSync(join(projectDir, "node_modules"));
    for (const name of ["@pulumi", "@types", "typescript"])
      symlinkSync(join(root, "node_modules", name), join(projectDir, "node_modules", name));
    symlinkSync(built, join(projectDir, "node_modules", "pulumi-lvm-nbd"));
    // As npm does.
    const plugin = join(built, "dist", "plugin.js");
    chmodSync(plugin, 0o755);
    mkdirSync(join(projectDir, "node_modules", ".bin"));
    symlinkSync(plugin, join(projectDir, "node_modules", ".bin", "pulumi-resource-lvm-nbd"));
    const stack = await PulumiStack.create({
      ...{ projectDir, stackName: "faults", backendDir: join(folder, "backend") },
      env: { ...env, LVM_NBD_SSH_CONFIG: lab.operatorConfigPath },
      config: { "lvm-nbd:organization": "organization", ...program.config },
    });
    return new FaultStack(stack, folder);
  }

  /** For what runs Pulumi by itself on the stack as it was last brought up. */
  get cli(): PulumiStack {
    return this.#stack;
  }

  /** What the program declares from now on. */
  declare(...resources: Declared[]): void {
    this.#resources = resources;
  }

  /** `up`, failing or not: `Run` tells. One resource's failure does not keep the others from being tried. */
  async up(options: RefreshableOptions = {}): Promise<Run> {
    return new Run(await this.#stack.up(this.#tolerant(options, this.#config)));
  }

  async preview(options: RefreshableOptions = {}): Promise<Run> {
    const args = [...this.#config, ...(options.args ?? [])];
    return new Run(
      await this.#stack.preview({ ...options, env: this.#env(options), args, allowFailure: true }),
    );
  }

  async refresh(options: RefreshableOptions = {}): Promise<Run> {
    return new Run(await this.#stack.refresh({ ...options, env: this.#env(options), allowFailure: true }));
  }

  async destroy(options: RefreshableOptions = {}): Promise<Run> {
    return new Run(await this.#stack.destroy(this.#tolerant(options, [])));
  }

  /** Starts `up` for a test to disturb; `end` is what it did and said. */
  startUp(args: readonly string[] = []): { readonly pid: number; readonly end: Promise<Run> } {
    const child = this.#stack.spawnUp({ env: this.#env({}), args: [...this.#config, ...args] });
    let stdout = "";
    let stderr = "";
    child.stdout?.on("data", (chunk: Buffer) => {
      stdout += chunk.toString("utf8");
    });
    child.stderr?.on("data", (chunk: Buffer) => {
      stderr += chunk.toString("utf8");
    });
    const end = new Promise<Run>((resolve, reject) => {
      child.on("error", reject);
      child.on("close", (code) => resolve(new Run({ exitCode: code ?? 1, stdout, stderr })));
    });
    return { pid: child.pid ?? 0, end };
  }

  async cancel(): Promise<void> {
    await this.#stack.cancel();
  }

  /**
   * The world is as declared: a refresh sees no drift, and `up` after it has nothing to do. `composed`: how many resources components
   * made beside what is declared.
   */
  async isAsDeclared({ composed = 0 } = {}): Promise<void> {
    const run = await this.up({ refresh: true, args: ["--expect-no-changes"] });
    run.succeeded(`${this.#resources.length + composed + 1} unchanged`);
    expect(run.text).not.toContain("warning:");
  }

  /** The outputs of each resource in the state, by the resource's name. */
  async state(): Promise<ReadonlyMap<string, Values>> {
    return new Map((await this.#kept()).map(({ name, outputs }) => [name, outputs ?? {}]));
  }

  /** The type of each resource in the state, by the resource's name. */
  async types(): Promise<ReadonlyMap<string, string>> {
    return new Map((await this.#kept()).map(({ name, type }) => [name, type]));
  }

  /** The resources in the state, as a program that has their inputs declares them. */
  async inputs(): Promise<Declared[]> {
    return (await this.#kept()).map(({ type, name, inputs = {} }) => {
      const { owner: _, ...args } = inputs;
      return { type: typeName.parse(type.split(":").at(-1)), name, args };
    });
  }

  async #kept() {
    const { resources } = exported.parse(await this.#stack.exportState()).deployment;
    return resources
      .filter(({ type }) => type.includes("lvm-nbd:"))
      .map((one) => ({ ...one, name: one.urn.split("::").at(-1) ?? "" }));
  }

  /** Removes the stack's folder. What it made on the servers is for the test to destroy. */
  close(): void {
    rmSync(this.#folder, { recursive: true, force: true });
  }

  get #config(): string[] {
    return ["--config", `resources=${JSON.stringify(this.#resources)}`];
  }

  #env({ env }: PulumiOptions): NodeJS.ProcessEnv {
    return { LAB_DOOR: this.door, ...env };
  }

  #tolerant(options: RefreshableOptions, more: readonly string[]): RefreshableOptions {
    return {
      ...options,
      env: this.#env(options),
      args: ["--continue-on-error", ...more, ...(options.args ?? [])],
      allowFailure: true,
    };
  }
}
