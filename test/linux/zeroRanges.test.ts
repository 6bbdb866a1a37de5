import { spawn, spawnSync } from "node:child_process";
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync, writeFileSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { deviceNodeFunction } from "../../provider/linux/deviceCopy.js";
import { aliveSeconds } from "../../provider/linux/holders.js";
import {
  extentList,
  parseZeroRanges,
  withExtents,
  zeroRangesScript,
} from "../../provider/linux/zeroRanges.js";

const MiB = 1024 ** 2;

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-zeros-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** What the script prints of a file of that size with these bytes at these places, and what it left with. */
function zerosOf(
  sizeBytes: number,
  bytes: Readonly<Record<number, string>>,
  environment: NodeJS.ProcessEnv = {},
  [from, to]: readonly [string, string] = ["", ""],
) {
  const file = join(folder, "device");
  writeFileSync(file, "");
  truncateSync(file, sizeBytes);
  const open = openSync(file, "r+");
  for (const [at, text] of Object.entries(bytes)) writeSync(open, text, Number(at));
  closeSync(open);
  // A file stands for the device.
  const text = zeroRangesScript
    .replace(deviceNodeFunction, "\ndevice_node() { node=$1; }\n")
    .replace(from, to);
  const { stdout, status } = spawnSync("/bin/sh", ["-c", text, "sh", file, String(sizeBytes)], {
    encoding: "utf8",
    env: { ...process.env, ...environment },
  });
  return { stdout, status };
}

describe("what of a device is zero", () => {
  it.each([
    ["an empty one, the last step of which is not whole", 3 * MiB + 512, {}, [[0, 3 * MiB + 512]]],
    [
      "bytes at both ends of a step",
      4 * MiB,
      { [MiB]: "x", [3 * MiB - 1]: "x" },
      [
        [0, MiB],
        [3 * MiB, MiB],
      ],
    ],
    ["the first and the last byte", 3 * MiB, { 0: "x", [3 * MiB - 1]: "x" }, [[MiB, MiB]]],
    ["a byte in the middle of a step", 2 * MiB, { [MiB + 500_000]: "x" }, [[0, MiB]]],
    ["one without an empty step", 2 * MiB, { 5000: "x", [2 * MiB - 5000]: "x" }, []],
  ])("%s", (_what, sizeBytes, bytes, ranges) => {
    const { stdout, status } = zerosOf(sizeBytes, bytes);
    expect(status).toBe(0);
    expect(parseZeroRanges(stdout, sizeBytes)).toEqual(
      ranges.map(([offset, length]) => ({ offset, length })),
    );
  });

  it("is not told of bytes that are not there to be read", () => {
    const file = join(folder, "short");
    writeFileSync(file, Buffer.alloc(MiB + 100));
    const text = zeroRangesScript.replace(deviceNodeFunction, "\ndevice_node() { node=$1; }\n");
    const { stdout } = spawnSync("/bin/sh", ["-c", text, "sh", file, String(3 * MiB)], { encoding: "utf8" });
    expect(parseZeroRanges(stdout, 3 * MiB)).toEqual([{ offset: 0, length: MiB }]);
  });

  it("is told only where that is worth a line: so many at most, however large the device", () => {
    const { stdout } = zerosOf(12 * MiB, { 0: "x", [2 * MiB]: "x", [6 * MiB]: "x" }, {}, [
      "$size / 4096",
      "$size / 4",
    ]);
    expect(parseZeroRanges(stdout, 12 * MiB)).toEqual([
      { offset: 3 * MiB, length: 3 * MiB },
      { offset: 7 * MiB, length: 5 * MiB },
    ]);
  });

  it("is looked for no longer than somebody listens, who is told so meanwhile", async () => {
    const file = join(folder, "endless");
    writeFileSync(file, "");
    truncateSync(file, 2 ** 42);
    const text = zeroRangesScript
      .replace(deviceNodeFunction, "\ndevice_node() { node=$1; }\n")
      .replace(`$told >= ${aliveSeconds}`, "$told >= 0");
    const child = spawn("/bin/sh", ["-c", text, "sh", file, String(2 ** 42)]);
    let [told, ended] = ["", false];
    child.stdout.once("data", (chunk) => {
      told = String(chunk);
    });
    child.once("exit", () => {
      ended = true;
    });
    try {
      await vi.waitFor(() => expect(told).toMatch(/^\n+$/), { timeout: 10_000 });
      child.stdout.destroy();
      await vi.waitFor(() => expect(ended).toBe(true), { timeout: 10_000 });
    } finally {
      child.kill("SIGKILL");
    }
  });

  it("is nothing where there is no perl", () => {
    expect(zerosOf(MiB, {}, { PATH: folder })).toEqual({ stdout: "", status: 0 });
    expect(parseZeroRanges("", MiB)).toEqual([]);
  });

  it("is looked for on a block device alone", () => {
    const { status, stderr } = spawnSync("/bin/sh", ["-c", zeroRangesScript, "sh", "/dev/null", "1"], {
      encoding: "utf8",
    });
    expect(status).toBe(1);
    expect(stderr).toContain("/dev/null is not a block device");
  });

  it.each([
    ["one that was cut", "0 1048576\n"],
    ["one that was cut before anything was found", "\n\n"],
    ["one that was cut in its last line", "0 1048576\nend"],
    ["one that was cut in a number", "0 10485"],
    ["ranges that overlap", "0 2097152\n1048576 1048576\nend\n"],
    ["a range behind the end", "3145728 1048577\nend\n"],
    ["an empty range", "0 0\nend\n"],
    ["another script's words", "no such device\nend\n"],
  ])("is not read from %s", (_what, text) => {
    expect(() => parseZeroRanges(text, 4 * MiB)).toThrow();
  });
});

describe("the list of extents", () => {
  it("has every byte once: what is not listed would pass for a hole", () => {
    const list = extentList(
      [
        { offset: MiB, length: MiB },
        { offset: 3 * MiB, length: MiB },
      ],
      5 * MiB,
    );
    expect(list).toBe(
      "0 1048576\n1048576 1048576 hole,zero\n2097152 1048576\n3145728 1048576 hole,zero\n4194304 1048576\n",
    );
  });

  it("of what is empty has no data", () => {
    expect(extentList([{ offset: 0, length: 4 * MiB }], 4 * MiB)).toBe("0 4194304 hole,zero\n");
  });

  it("is not made for a little", () => {
    expect(extentList([{ offset: 0, length: MiB }], 5 * MiB)).toBe("");
    expect(extentList([], 5 * MiB)).toBe("");
  });

  it("stands before the job", () => {
    expect(withExtents("", "job\n")).toBe("job\n");
    expect(withExtents("0 512\n", "job\n")).toBe("extents='0 512\n'\njob\n");
  });
});
