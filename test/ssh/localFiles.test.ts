import { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, test, vi } from "vitest";
import { readText } from "../../provider/ssh/localFiles.js";

vi.mock("node:fs/promises", async (original) => {
  const real = await original<typeof import("node:fs/promises")>();
  return { ...real, readFile: vi.fn(real.readFile) };
});

const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-files-"));
afterAll(() => rmSync(folder, { recursive: true }));
afterEach(() => vi.mocked(readFile).mockClear());

describe("a file", () => {
  test("is read once, however often it is asked for", async () => {
    const path = join(folder, "once");
    writeFileSync(path, "one");
    for (let n = 0; n < 5; n++) expect(await readText(path)).toBe("one");
    expect(readFile).toHaveBeenCalledTimes(1);
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
