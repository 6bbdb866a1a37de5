/** Files of the machine that Pulumi runs on, which each resource on a host has read again: keys, certificates, known_hosts. */
import type { BigIntStats } from "node:fs";
import { open } from "node:fs/promises";

interface Kept {
  readonly stamp: string;
  readonly text: string;
}

const kept = new Map<string, Kept>();

/** A file system may tell times in steps of two seconds: within one, another content of the same size looks the same. */
const settledMs = 3000;

/** The text of a file as it is now. Read again only when it is another, or was written to. Raises as `readFile`. */
export async function readText(path: string): Promise<string> {
  // Opened first: a network file system asks its server only then.
  const file = await open(path);
  try {
    const stamp = stampOf(await file.stat({ bigint: true }), Date.now());
    const before = kept.get(path);
    if (stamp !== undefined && before?.stamp === stamp) return before.text;
    const text = await file.readFile("utf8");
    // What is written to while it is read has another stamp the next time.
    if (stamp === undefined) kept.delete(path);
    else kept.set(path, { stamp, text });
    return text;
  } finally {
    await file.close();
  }
}

/**
 * What tells one content of a regular file from another; `undefined` where nothing does: of a pipe, of a file that is made while it is
 * read (/proc, with size 0), and of what was written just now.
 */
function stampOf(seen: BigIntStats, now: number): string | undefined {
  const { dev, ino, size, mtimeNs, ctimeNs, ctimeMs } = seen;
  if (!seen.isFile() || size === 0n || Math.abs(now - Number(ctimeMs)) < settledMs) return undefined;
  return [dev, ino, size, mtimeNs, ctimeNs].join();
}
