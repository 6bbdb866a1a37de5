import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  bytesPhrase,
  type CopyPlan,
  copyArguments,
  copyPaths,
  copyPrograms,
  parseProgress,
  parseRate,
  progressPhrase,
  secondsPhrase,
} from "../../provider/linux/copyJob.js";
import { checkImageScript } from "../../provider/linux/copyScripts.js";

const plan: CopyPlan = {
  ...{ uri: "nbd://10.0.0.1:10809/vm1", format: "raw", compress: false, connections: 4, verify: true },
  bandwidthLimit: undefined,
};
const GiB = 1024 ** 3;
const fields = (values: Readonly<Record<string, string>>) => new Map(Object.entries(values));

describe("the paths of a copy", () => {
  it("follow from the file alone, and hold nothing that systemd or a shell would read", () => {
    const paths = copyPaths("/backup/a b%$(reboot).raw");
    expect(paths).toEqual(copyPaths("/backup/a b%$(reboot).raw"));
    expect(paths.unit).toMatch(/^lvm-nbd-copy-[0-9a-f]{16}\.service$/);
    expect(paths.run).toMatch(/^\/run\/lvm-nbd-copy-[0-9a-f]{16}$/);
    expect(paths.part).toBe("/backup/a b%$(reboot).raw.part");
    expect(copyPaths("/backup/other").unit).not.toBe(paths.unit);
  });
});

describe("the arguments of a job", () => {
  it("count bits where nbdkit does, and say nothing where there is no limit", () => {
    const paths = copyPaths("/backup/vm1");
    expect(copyArguments(paths, plan).at(-2)).toBe("");
    expect(copyArguments(paths, { ...plan, bandwidthLimit: 1000 }).at(-2)).toBe("8000");
  });

  it.each([
    [plan, [], ["qemu-img", "nbdkit"]],
    [{ ...plan, format: "qcow2" as const }, ["qemu-img", "qemu-nbd"], ["nbdkit"]],
    [{ ...plan, bandwidthLimit: 1 }, ["nbdkit"], ["qemu-img"]],
  ])("need only the programs that are used", (wanted, some, others) => {
    const programs = copyPrograms(wanted);
    for (const one of ["nbdcopy", "nbdinfo", "systemd-run", ...some]) expect(programs).toContain(one);
    for (const one of others) expect(programs).not.toContain(one);
  });
});

describe("a rate", () => {
  it.each([
    ["20M", 20 * 1024 ** 2],
    ["1.5 GiB/s", 1.5 * GiB],
    ["512K", 512 * 1024],
    ["1000000", 1_000_000],
    [1_000_000, 1_000_000],
    ["100000 B/s", 100_000],
  ])("%s", (text, bytes) => {
    expect(parseRate(text)).toBe(bytes);
  });

  it.each(["fast", "", "20%", "-5M", 20, "20", 1.5, Number.POSITIVE_INFINITY])("%s is refused", (text) => {
    expect(() => parseRate(text)).toThrow(/write/);
  });
});

describe("the progress", () => {
  const copying = { phase: "copy 1000\n", size: `${8 * GiB}\n` };
  const verifying = { phase: "verify 1000\n", size: `${8 * GiB}\n` };

  it("is what nbdcopy wrote last", () => {
    expect(parseProgress(fields({ ...copying, progress: "24/100\n25/100\n" }))).toEqual({
      ...{ phase: "copy", done: 0.25, since: 1000, sizeBytes: 8 * GiB },
    });
  });

  it("is what qemu-img wrote last", () => {
    const progress = "    (24.00/100%)\r    (25.50/100%)\r";
    expect(parseProgress(fields({ ...copying, progress })).done).toBeCloseTo(0.255);
  });

  it("of reading both ends back is that of the slower one", () => {
    const read = `${4 * GiB} bytes (4.3 GB, 4.0 GiB) copied, 12 s, 358 MB/s\r`;
    expect(parseProgress(fields({ ...verifying, read })).done).toBe(0.5);
    expect(parseProgress(fields({ ...verifying, read, progress: "20/100\n" })).done).toBe(0.2);
    expect(parseProgress(fields({ ...verifying, read, progress: "80/100\n" })).done).toBe(0.5);
  });

  it("of a job that has not begun is its start", () => {
    expect(progressPhrase(parseProgress(fields({})), 1000)).toBe("starting the copy");
  });

  it("tells rate and time left", () => {
    const progress = parseProgress(fields({ ...copying, progress: "25/100\n" }));
    expect(progressPhrase(progress, 1020)).toBe("copying: 25 % of 8.0 GiB, 102 MiB/s, 60 s left");
    expect(progressPhrase({ ...progress, done: 0 }, 1020)).toBe("copying: 0 % of 8.0 GiB, 0 B/s");
    expect(progressPhrase({ ...progress, phase: "verify" }, 1020)).toMatch(/^reading both ends back: 25 %/);
  });
});

it.each([
  [0, "0 B"],
  [1023, "1023 B"],
  [1536, "1.5 KiB"],
  [20 * 1024 ** 2, "20 MiB"],
  [1024 ** 6, "1024 PiB"],
])("%d bytes are %s", (bytes, text) => {
  expect(bytesPhrase(bytes)).toBe(text);
});

it.each([
  [-1, "0 s"],
  [99, "99 s"],
  [150, "3 min"],
  [7500, "2 h 5 min"],
])("%d seconds are %s", (seconds, text) => {
  expect(secondsPhrase(seconds)).toBe(text);
});

describe("reading an image back", () => {
  let folder: string;
  let image: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "lvm-nbd-image-"));
    image = join(folder, "vm1.raw");
    writeFileSync(image, "content");
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  const check = (format: string, file: string, path = process.env.PATH) => {
    const argv = ["-c", checkImageScript, "sh", format, file];
    const { status, stdout } = spawnSync("/bin/sh", argv, { env: { PATH: path }, encoding: "utf8" });
    return { status, stdout: stdout.trim() };
  };

  it("gives its checksum", () => {
    const stdout = createHash("sha256").update("content").digest("hex");
    expect(check("raw", image)).toEqual({ status: 0, stdout });
  });

  it("fails as unreadable where reading fails", () => {
    expect(check("raw", folder)).toEqual({ status: 70, stdout: "" });
  });

  it.each([
    ["a program that is not there", "qcow2", () => image, "/nowhere"],
    ["not even dd", "raw", () => image, "/nowhere"],
    ["a file that has gone meanwhile", "raw", () => join(folder, "gone"), process.env.PATH],
  ])("does not call it unreadable for want of %s", (_what, format, file, path) => {
    expect(check(format, file(), path)).toEqual({ status: 71, stdout: "" });
  });
});
