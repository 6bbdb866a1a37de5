import { spawn } from "node:child_process";
import { mkdir } from "node:fs/promises";
import { dirname } from "node:path";

/**
 * Runs `action` while holding an exclusive lock on a file. The kernel's lock is held by a child `flock`
 * which ends when our end of its stdin closes, so a crashed holder never leaves a stale lock.
 */
export async function withLock<T>(
  path: string,
  options: { timeoutSeconds: number; onWait?: () => void },
  action: () => Promise<T>,
): Promise<T> {
  await mkdir(dirname(path), { recursive: true });
  const holder = spawn(
    "flock",
    ["--wait", String(options.timeoutSeconds), path, "sh", "-c", "echo locked; exec cat"],
    {
      stdio: ["pipe", "pipe", "ignore"],
      // Its own group: an interrupt at the terminal is for us to handle while still holding the lock.
      detached: true,
    },
  );
  const ended = new Promise<void>((resolve) => holder.on("close", () => resolve()));
  const waiting = options.onWait ? setTimeout(options.onWait, 1000) : undefined;
  try {
    await new Promise<void>((resolve, reject) => {
      holder.on("error", reject);
      holder.stdout.once("data", () => resolve());
      holder.on("close", () => reject(new Error(`no lock on ${path} within ${options.timeoutSeconds} s`)));
    });
    clearTimeout(waiting);
    return await action();
  } finally {
    clearTimeout(waiting);
    holder.stdin.end();
    await ended;
  }
}
