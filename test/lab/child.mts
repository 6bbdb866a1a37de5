import { spawn } from "node:child_process";
import { constants } from "node:os";

/** What a finished child process left. A child ended by signal N has exit code 128 + N. */
export interface ChildResult {
  exitCode: number;
  stdout: string;
  stderr: string;
}

/** How to run a child process. */
export interface ChildOptions {
  cwd?: string;
  env?: NodeJS.ProcessEnv;
  /** Written to the child's stdin, which is otherwise closed. */
  stdin?: string;
  /** After this the child is ended and the call fails. Default 120. */
  timeoutSeconds?: number;
  /** What the child has to end in after the time limit, before it is killed. Default 5. */
  graceSeconds?: number;
  /** Return a non-zero exit code instead of throwing. */
  allowFailure?: boolean;
  /** Put the child at the head of its own process group; a timeout then ends the whole group. */
  ownGroup?: boolean;
}

const GRACE_SECONDS = 5;

/** Runs a program to its end. Throws with its output when it fails (unless allowed to) or takes too long. */
export async function runChild(argv: readonly string[], options: ChildOptions = {}): Promise<ChildResult> {
  const [program, ...args] = argv;
  if (program === undefined) throw new Error("runChild: an empty argument list");
  const timeoutSeconds = options.timeoutSeconds ?? 120;
  const child = spawn(program, args, {
    cwd: options.cwd,
    env: options.env,
    detached: options.ownGroup ?? false,
    stdio: [options.stdin === undefined ? "ignore" : "pipe", "pipe", "pipe"],
  });
  const stdout: Buffer[] = [];
  const stderr: Buffer[] = [];
  child.stdout?.on("data", (chunk: Buffer) => stdout.push(chunk));
  child.stderr?.on("data", (chunk: Buffer) => stderr.push(chunk));
  // A child that ends without reading its input is judged by its exit code.
  child.stdin?.on("error", () => {});
  child.stdin?.end(options.stdin);

  const end = (signal: NodeJS.Signals): void => {
    try {
      if (options.ownGroup && child.pid !== undefined) process.kill(-child.pid, signal);
      else child.kill(signal);
    } catch {
      // It has ended in the meantime.
    }
  };
  let timedOut = false;
  let killTimer: NodeJS.Timeout | undefined;
  const timer = setTimeout(() => {
    timedOut = true;
    end("SIGTERM");
    killTimer = setTimeout(
      () => {
        end("SIGKILL");
        // A grandchild that kept the pipes must not keep us.
        child.stdout?.destroy();
        child.stderr?.destroy();
      },
      (options.graceSeconds ?? GRACE_SECONDS) * 1000,
    );
  }, timeoutSeconds * 1000);

  try {
    const exitCode = await new Promise<number>((resolve, reject) => {
      child.on("error", reject);
      child.on("close", (code, signal) => resolve(code ?? 128 + (signal ? constants.signals[signal] : 0)));
    });
    const result = {
      exitCode,
      stdout: Buffer.concat(stdout).toString("utf8"),
      stderr: Buffer.concat(stderr).toString("utf8"),
    };
    if (timedOut) throw new Error(describe(argv, `took longer than ${timeoutSeconds} s`, result));
    if (exitCode !== 0 && !options.allowFailure) {
      throw new Error(describe(argv, `ended with exit code ${exitCode}`, result));
    }
    return result;
  } finally {
    clearTimeout(timer);
    clearTimeout(killTimer);
  }
}

/** PATH and the system directories, which an ordinary user's PATH may lack. */
export function programSearchPath(): string {
  return `${process.env.PATH ?? ""}:/usr/local/sbin:/usr/sbin:/sbin`;
}

function describe(argv: readonly string[], what: string, result: ChildResult): string {
  const output = [result.stdout, result.stderr].map((text) => text.trim().slice(-3000)).filter(Boolean);
  return [`${argv.join(" ")} ${what}`, ...output].join("\n");
}
