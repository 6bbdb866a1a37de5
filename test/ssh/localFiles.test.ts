import { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { readText } from "../../provider/ssh/localFiles.js";

const reads = vi.hoisted(() => ({ count: 0 }));
vi.mock("node:fs/promises", async (original) => {
  const real = await original<typeof import("node:fs/promises")>();
  const open = async (path: string) => {
    const file = await real.open(path);
    const readFile = file.readFile.bind(file);
    return Object.assign(file, {
      readFile: (encoding: "utf8") => {
        reads.count++;
        return readFile(encoding);
      },
    });
  };
  return { ...real, open };
});

const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-files-"));
afterAll(() => rmSync(folder, { recursive: true }));
beforeEach(() => {
  reads.count = 0;
  // Written some time ago.
  vi.useFakeTimers({ toFake: ["Date"], now: Date.now() + 60_000 });
});
afterEach(() => {
  vi.useRealTimers();
});

describe("a file", () => {
  test("is read once, however often it is asked for", async () => {
    const path = join(folder, "once");
    writeFileSync(path, "one");
    for (let n = 0; n < 5; n++) expect(await readText(path)).toBe("one");
    expect(reads.count).toBe(1);
  });

  test("that was written just now is read each time: its next content may look the same", async () => {
    vi.useRealTimers();
    const path = join(folder, "new");
    writeFileSync(path, "one");
    for (let n = 0; n < 3; n++) expect(await readText(path)).toBe("one");
    expect(reads.count).toBe(3);
  });

  test("that is made while it is read is read each time", async () => {
    const path = "/proc/sys/kernel/random/uuid";
    expect(await readText(path)).not.toBe(await readText(path));
  });

  test("is read again when it was written to, or another took its place", async () => {
    const path = join(folder, "changed");
    writeFileSync(path, "one");
    expect(await readText(path)).toBe("one");
    writeFileSync(path, "three");
    expect(await readText(path)).toBe("three");
    writeFileSync(`${path}.new`, "seven");
    renameSync(`${path}.new`, path);
    expect(await readText(path)).toBe("seven");
  });

  test("that is not there is looked for again", async () => {
    const path = join(folder, "absent");
    await expect(readText(path)).rejects.toMatchObject({ code: "ENOENT" });
    writeFileSync(path, "there");
    expect(await readText(path)).toBe("there");
    rmSync(path);
    await expect(readText(path)).rejects.toMatchObject({ code: "ENOENT" });
  });

  test("that cannot be read, as a folder, is an error each time", async () => {
    for (let n = 0; n < 2; n++) await expect(readText(folder)).rejects.toMatchObject({ code: "EISDIR" });
  });
});
