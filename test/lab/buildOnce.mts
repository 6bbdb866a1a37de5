/** Programs that are built into the cache, once, by whoever wants them first. */
import { access, copyFile, mkdir, mkdtemp, rename, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { runChild } from "./child.mts";
import { withLock } from "./lock.mts";
import { elapsed } from "./wait.mts";

/** A program and how it is made. */
export interface Program {
  readonly name: string;
  /** How long that takes on 2 cores, where it takes long. */
  readonly time?: string;
  /** Puts it at `target`. `folder` is empty, and is removed afterwards. */
  make(target: string, folder: string): Promise<void>;
}

/** Makes what is missing of the programs in the folder `bin`. `what`: they, for those who wait. */
export async function buildOnce(
  bin: string,
  programs: readonly Program[],
  what: string,
  log: (line: string) => void,
): Promise<void> {
  const isThere = ({ name }: Program) => exists(join(bin, name));
  const areThere = async () => (await Promise.all(programs.map(isThere))).every(Boolean);
  if (await areThere()) return;
  await withLock(
    `${bin}.lock`,
    { timeoutSeconds: 1800, onWait: () => log(`waiting for another build of ${what}`) },
    async () => {
      await mkdir(bin, { recursive: true });
      for (const program of programs) if (!(await isThere(program))) await build(bin, program, log);
    },
  );
}

async function build(bin: string, program: Program, log: (line: string) => void): Promise<void> {
  const { name, time } = program;
  if (time !== undefined) log(`building ${name} from source (once; ${time} on 2 cores)`);
  const start = performance.now();
  const folder = await mkdtemp(join(tmpdir(), "lvm-nbd-build-"));
  try {
    const made = join(folder, "made");
    await program.make(made, folder);
    // Under another name first: a cut build must not leave half a program under the right one.
    const target = join(bin, name);
    await copyFile(made, `${target}.new`);
    await rename(`${target}.new`, target);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
  if (time !== undefined) log(`built ${name} (${elapsed(start)})`);
}

/** Runs Go. `instead`: what would do without it. */
export async function go(cwd: string, instead: string, ...args: string[]): Promise<string> {
  if (!(await isOnPath("go", process.env.PATH ?? "")))
    throw new Error(`there is no Go to build with: install Go 1.25 or later${instead}`);
  return (await runChild(["go", ...args], { cwd, timeoutSeconds: 1500, ownGroup: true })).stdout;
}

export async function isOnPath(program: string, path: string): Promise<boolean> {
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
