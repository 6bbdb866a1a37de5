/** Files of the machine that Pulumi runs on, which each resource on a host has read again: keys, certificates, known_hosts. */
import { statSync } from "node:fs";
import { readFile } from "node:fs/promises";

interface Kept {
  readonly stamp: string;
  readonly text: string;
}

const kept = new Map<string, Kept>();

/** The text of a file as it is now. Read again only when it is another, or was written to. Raises as `readFile`. */
export async function readText(path: string): Promise<string> {
  const stamp = stampOf(path);
  const before = kept.get(path);
  if (stamp !== undefined && before?.stamp === stamp) return before.text;
  const text = await readFile(path, "utf8");
  // What is written to while it is read has another stamp the next time.
  if (stamp === undefined) kept.delete(path);
  else kept.set(path, { stamp, text });
  return text;
}

/** What tells one content of a regular file from another; `undefined` for anything else, e.g. a pipe. Raises ENOENT. */
function stampOf(path: string): string | undefined {
  const seen = statSync(path, { bigint: true, throwIfNoEntry: false });
  if (seen === undefined)
    throw Object.assign(new Error(`ENOENT: no such file or directory, open '${path}'`), { code: "ENOENT" });
  if (!seen.isFile()) return undefined;
  const { dev, ino, size, mtimeNs, ctimeNs } = seen;
  return [dev, ino, size, mtimeNs, ctimeNs].join();
}
