/**
 * A host whose commands run in a real shell, in a folder of their own: some programs are stand-ins of a few lines, everything
 * else is the machine's. A script can be killed before or after any program that it starts.
 */
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { CommandResult, RemoteCommand } from "../../provider/ssh/types.js";

export interface Kill {
  /** The how-many-th program that the host's changes start, from 1. */
  readonly step: number;
  readonly when: "before" | "after";
}

export abstract class ShellHost {
  protected readonly folder: string;

  /** `standIns`: programs as shell text. `steps`: programs before and after which a script can be killed. */
  protected constructor(
    what: string,
    private readonly standIns: Readonly<Record<string, string>>,
    steps: readonly string[],
  ) {
    this.folder = mkdtempSync(join(tmpdir(), `lvm-nbd-${what}-`));
    for (const part of ["bin", "steps.bin"]) mkdirSync(join(this.folder, part));
    for (const [program, text] of Object.entries(standIns)) this.#program("bin", program, text);
    for (const program of steps) this.#stepping(program);
  }

  async machineId(): Promise<string | undefined> {
    return undefined;
  }

  /** A text of the provider's with the paths of the host where they really lie. */
  protected abstract inside(text: string): string;

  /** A switch of the stand-ins. */
  set(name: string, content: string | undefined): void {
    if (content === undefined) rmSync(join(this.folder, name), { force: true });
    else writeFileSync(join(this.folder, name), content);
  }

  /** From now on a script is killed there; `undefined`: none. */
  kill(at: Kill | undefined): void {
    this.set("steps", "");
    this.set("kill", at && `${at.step} ${at.when}\n`);
  }

  /** Steps since `kill` was called. */
  get stepsTaken(): number {
    return readFileSync(join(this.folder, "steps"), "utf8").length;
  }

  close(): void {
    rmSync(this.folder, { recursive: true, force: true });
  }

  /** What the command did; `undefined` if its script was killed. `cutInput`: half of its input arrives. */
  protected execute(command: RemoteCommand, cutInput = false): Promise<CommandResult | undefined> {
    const input = this.inside(command.stdin ?? "");
    // Scripts are told how long their input is.
    const lengths = [command.stdin ?? "", input].map((text) => String(Buffer.byteLength(text)));
    const [program = "", ...args] = command.argv.map(
      (arg) => (arg === lengths[0] ? lengths[1] : this.inside(arg)) ?? "",
    );
    return new Promise((resolve, reject) => {
      const env = this.environment(command.kind === "change");
      const child = spawn(program, args, { env, detached: true });
      let [stdout, stderr] = ["", ""];
      child.stdout.on("data", (chunk) => {
        stdout += chunk;
      });
      child.stderr.on("data", (chunk) => {
        stderr += chunk;
      });
      child.on("error", reject);
      child.on("close", (exitCode) => resolve(exitCode === null ? undefined : { exitCode, stdout, stderr }));
      // A script that was killed reads no more.
      child.stdin.on("error", () => undefined);
      child.stdin.end(cutInput ? input.slice(0, input.length / 2) : input);
    });
  }

  /** `stepping`: whether its programs are counted. */
  protected environment(stepping: boolean): NodeJS.ProcessEnv {
    const path = `${this.folder}/bin:${process.env.PATH ?? ""}`;
    // Without a kill nobody asks for the steps: a shell less for each program.
    const counted = stepping && existsSync(join(this.folder, "kill"));
    return {
      ...{ LC_ALL: "C", SANDBOX: this.folder },
      PATH: counted ? `${this.folder}/steps.bin:${path}` : path,
    };
  }

  #program(folder: "bin" | "steps.bin", name: string, text: string): void {
    writeFileSync(join(this.folder, folder, name), `#!/bin/sh\n${text}\n`, { mode: 0o755 });
  }

  /** Puts a program in front of the real one that counts the steps of a change, and kills its script at one. */
  #stepping(name: string): void {
    const real = name in this.standIns ? join(this.folder, "bin", name) : installed(name);
    this.#program(
      "steps.bin",
      name,
      `
      printf . >>"$SANDBOX/steps"; n=$(wc -c <"$SANDBOX/steps")
      read -r step when <"$SANDBOX/kill"
      if [ "$n" = "$step" ] && [ "$when" = before ]; then kill -KILL 0; fi
      PATH=\${PATH#*:} ${real} "$@"; rc=$?
      if [ "$n" = "$step" ]; then kill -KILL 0; fi
      exit $rc`,
    );
  }
}

/** An answer as of a host whose root is that folder; fields are in base64. */
export function outside(text: string, root: string): string {
  return text
    .replace(/^(\S+[ \t])([A-Za-z0-9+/]+=*)$/gm, (_, name: string, value: string) => {
      const plain = Buffer.from(value, "base64").toString("utf8").replaceAll(root, "");
      return name + Buffer.from(plain).toString("base64");
    })
    .replaceAll(root, "");
}

const found = new Map<string, string>();

/** The path of a program of this machine. */
function installed(name: string): string {
  const path =
    found.get(name) ??
    spawnSync("sh", ["-c", `command -v ${name}`])
      .stdout.toString()
      .trim();
  found.set(name, path);
  return path;
}
