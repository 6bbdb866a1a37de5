import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  bytesPhrase,
  type CopyPlan,
  copyArguments,
  copyPaths,
  copyPrograms,
  folderGuardFunctions,
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
    expect(copyArguments(paths, plan, "0f").at(-3)).toBe("");
    expect(copyArguments(paths, { ...plan, bandwidthLimit: 1000 }, "0f").at(-3)).toBe("8000");
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
      ...{ phase: "copy", readsSource: false, done: 0.25, since: 1000, sizeBytes: 8 * GiB },
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
    expect(progressPhrase(parseProgress(fields({ ...copying, phase: "wait 990" })), 1000)).toMatch(
      /^waiting for room in the thin pool/,
    );
  });

  it("tells rate and time left", () => {
    const progress = parseProgress(fields({ ...copying, progress: "25/100\n" }));
    expect(progressPhrase(progress, 1020)).toBe("copying: 25 % of 8.0 GiB, 102 MiB/s, 60 s left");
    expect(progressPhrase({ ...progress, done: 0 }, 1020)).toBe("copying: 0 % of 8.0 GiB, 0 B/s");
  });

  it("tells which ends are read back: the source only where it is to be verified", () => {
    const read = `${2 * GiB} bytes (2.1 GB, 2.0 GiB) copied, 12 s, 179 MB/s\r`;
    const phrase = (more: Readonly<Record<string, string>>) =>
      progressPhrase(parseProgress(fields({ ...verifying, read, ...more })), 1020);
    expect(phrase({})).toMatch(/^reading the copy back: 25 % /);
    expect(phrase({ progress: "" })).toMatch(/^reading both ends back: 25 % /);
    expect(phrase({ progress: "20/100\n" })).toMatch(/^reading both ends back: 20 % /);
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

describe("the folder of an image", () => {
  /** What is told of /a/b/c where /a/b is somebody's, and on that file system. What is below it is on another one. */
  const endangered = (type: string, below = type) => {
    const stat = `stat() {
      case "$1 $2 $3" in
        "-c %u %A /a/b") echo "1000 drwxr-xr-x";;
        "-c %u %A "*) echo "0 drwxr-xr-x";;
        "-c %U, %A "*) echo "mallory, drwxr-xr-x";;
        *) case $4 in /a/b) echo '${type}';; *) echo '${below}';; esac;;
      esac
    }`;
    const text = `${stat}\n${folderGuardFunctions}\nendangered /a/b/c`;
    return spawnSync("sh", ["-c", text], { encoding: "utf8" }).stdout;
  };

  it.each(["ext2/ext3", "xfs", "btrfs", "exfat", "msdos", "overlayfs", "tmpfs", "UNKNOWN (0x1234)", ""])(
    "is told to be others' on a local file system, or an unknown one: %j",
    (type) => expect(endangered(type)).toBe("/a/b (mallory, drwxr-xr-x)"),
  );

  it.each(["nfs", "nfs4", "cifs", "smb2", "UNKNOWN (0xfe534d42)", "fuseblk", "v9fs", "ceph"])(
    "is not asked whose it is on a network file system: %s",
    (type) => expect(endangered(type)).toBe(""),
  );

  const open = (type: string, options: string, mode: string) => {
    const tools = `stat() { case "$1 $3" in "-f %T") echo '${type}';; *) echo '${mode}';; esac; }`;
    const text = `${tools}\nfindmnt() { echo '${options}'; }\n${folderGuardFunctions}\nopen_to_all /a/b`;
    return spawnSync("sh", ["-c", text], { encoding: "utf8" }).stdout;
  };

  it.each([
    ["fuseblk", "rw", "drwxrwxrwx"],
    ["cifs", "rw,vers=3.1.1,file_mode=0777,dir_mode=0777,soft", "drwxrwxrwx"],
  ])("is told where the mount makes every folder of it so: %s, %s", (...mount) => {
    expect(open(...mount)).toBe("/a/b (drwxrwxrwx)");
  });

  it.each([
    ["nfs", "rw", "drwxrwxrwx"],
    ["ext2/ext3", "rw", "drwxrwxrwx"],
    ["cifs", "rw,vers=1.0,unix", "drwxrwxrwx"],
    ["cifs", "rw,cifsacl,dir_mode=0755", "drwxrwxrwx"],
    ["cifs", "rw,dir_mode=0700", "drwx------"],
    ["fuseblk", "rw", "drwxr-xr-x"],
  ])("is not told so where modes are each folder's own, or good: %s, %s, %s", (...mount) => {
    expect(open(...mount)).toBe("");
  });

  it("is told where others could have it lead to a network file system, or elsewhere", () => {
    expect(endangered("xfs", "nfs")).toBe("/a/b (mallory, drwxr-xr-x)");
  });
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

  const check = (format: string, file: string, path = process.env.PATH, folderIs = "0 drwxr-xr-x") => {
    const stat = `stat() { case $3 in /) echo '${folderIs}';; *) echo '0 -rw-------';; esac; }`;
    const argv = ["-c", `${stat}\n${checkImageScript}`, "sh", format, file];
    const { status, stdout } = spawnSync("/bin/sh", argv, { env: { PATH: path }, encoding: "utf8" });
    return { status, stdout: stdout.trim() };
  };

  it("gives its checksum", () => {
    const stdout = createHash("sha256").update("content").digest("hex");
    expect(check("raw", image)).toEqual({ status: 0, stdout });
  });

  it("fails as unreadable where reading fails", () => {
    // A regular file, of which no byte can be read.
    expect(check("raw", "/proc/self/mem")).toEqual({ status: 70, stdout: "" });
  });

  it.each(["backing file", "data file"])(
    "a qcow2 image that names a %s is bad, and not opened by qemu",
    (needs) => {
      const header = Buffer.alloc(104);
      header.write("QFI\xfb\0\0\0\x03", "latin1");
      header.writeUInt8(needs === "backing file" ? 112 : 0, 15);
      header.writeUInt8(needs === "data file" ? 4 : 0, 79);
      const bin = join(folder, needs);
      mkdirSync(bin);
      for (const name of ["nbdcopy", "qemu-nbd"])
        writeFileSync(join(bin, name), `#!/bin/sh\ntouch '${bin}/ran'\n`, { mode: 0o755 });
      const named = join(folder, `${needs}.qcow2`);
      writeFileSync(named, header);
      expect(check("qcow2", named, `${bin}:${process.env.PATH}`)).toEqual({ status: 70, stdout: "" });
      writeFileSync(named, header.fill(0, 8, 16).fill(0, 79, 80));
      expect(readdirSync(bin)).not.toContain("ran");
      check("qcow2", named, `${bin}:${process.env.PATH}`);
      expect(readdirSync(bin)).toContain("ran");
    },
  );

  it("is refused where others can change the file's folder", () => {
    const { status, stdout } = check("raw", image, undefined, "0 drwxrwxrwx");
    expect(status).toBe(79);
    expect(stdout).toContain("can be changed by others than root");
  });

  it.each([
    ["a program that is not there", "qcow2", () => image, "/nowhere"],
    ["not even dd", "raw", () => image, "/nowhere"],
    ["a folder in its place", "raw", () => folder, process.env.PATH],
    ["a file that has gone meanwhile", "raw", () => join(folder, "gone"), process.env.PATH],
  ])("does not call it unreadable for want of %s", (_what, format, file, path) => {
    expect(check(format, file(), path)).toEqual({ status: 71, stdout: "" });
  });
});
