import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { copyPaths } from "../../provider/linux/copyJob.js";
import {
  checkDeviceScript,
  deviceCopyArguments,
  deviceCopyJob,
  deviceCopyPrograms,
  deviceJob,
  deviceNodeFunction,
} from "../../provider/linux/deviceCopy.js";
import { aliveSeconds } from "../../provider/linux/holders.js";
import { withExtents } from "../../provider/linux/zeroRanges.js";
import { CopyHost } from "../support/copyHost.js";

it("a job follows from the path alone, and is none of a file's", () => {
  const job = deviceJob("/dev/VgVm/vm1");
  expect(job.unit).toMatch(/^lvm-nbd-copy-[0-9a-f]{16}\.service$/);
  expect(deviceJob("/dev/VgVm/vm1")).toEqual(job);
  expect(deviceJob("/dev/VgVm/vm2")).not.toEqual(job);
  expect(copyPaths("/backup/vm1").unit).not.toBe(job.unit);
});

it("nbdkit is told bits, and needed only for a limit", () => {
  const plan = {
    uri: "nbd://a/b",
    connections: 2,
    verify: false,
    rest: "zero",
    bandwidthLimit: 1000,
  } as const;
  expect(deviceCopyArguments({ unit: "u", run: "/run/x" }, "/dev/VgVm/part", plan)).toEqual([
    "/run/x",
    "/dev/VgVm/part",
    "nbd://a/b",
    "2",
    "8000",
    "no",
    "zero",
    "",
  ]);
  expect(deviceCopyPrograms(plan)).toContain("nbdkit");
  expect(deviceCopyPrograms({ bandwidthLimit: undefined })).not.toContain("nbdkit");
});

it("nothing of a volume is taken for zero that was not written", () => {
  expect(deviceCopyJob).not.toContain("--destination-is-zero");
  expect(deviceCopyJob).toContain("iflag=direct,");
});

describe("reading a device back", () => {
  let folder: string;
  const device = () => join(folder, "device");
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "lvm-nbd-device-"));
    mkdirSync(join(folder, "bin"));
    writeFileSync(join(folder, "bin", "blockdev"), "#!/bin/sh\necho 512\n", { mode: 0o755 });
    // As a device's: part of a sector cannot be read; every request is counted.
    const dd = `#!/bin/sh
      for arg; do case $arg in count=*) [ $((\${arg#count=} % 512)) = 0 ] || { echo "Invalid argument" >&2; exit 1; };; esac; done
      for arg; do shift; case $arg in iflag=direct,*) arg=iflag=\${arg#iflag=direct,};; iflag=*) exit 9;; esac; set -- "$@" "$arg"; done
      PATH=\${PATH#*:} exec dd "$@"\n`;
    writeFileSync(join(folder, "bin", "dd"), dd, { mode: 0o755 });
    writeFileSync(device(), "content".repeat(1000).padEnd(8192, "#"));
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  // The device is a file here.
  const onFiles = checkDeviceScript.replace(deviceNodeFunction, "device_node() { node=$1; }\n");
  const check = (path: string, bytes: number, programs = process.env.PATH, script: string = onFiles) => {
    const argv = ["-c", script, "sh", path, String(bytes)];
    const env = { PATH: `${join(folder, "bin")}:${programs}` };
    const { status, stdout } = spawnSync("/bin/sh", argv, { env, encoding: "utf8" });
    return { status, stdout: stdout.trim() };
  };

  it.each([7000, 512, 1, 8192])("gives the checksum of its first %d bytes", (bytes) => {
    const content = "content".repeat(1000).padEnd(8192, "#").slice(0, bytes);
    const stdout = createHash("sha256").update(content).digest("hex");
    expect(check(device(), bytes)).toEqual({ status: 0, stdout });
  });

  it("fails as unreadable where reading fails", () => {
    expect(check(folder, 512)).toEqual({ status: 70, stdout: "" });
  });

  it.each([
    ["a device that is no block device", () => "/dev/null"],
    ["a link to one", () => join(folder, "link")],
    ["a file", device],
    ["what is not there", () => "/dev/VgVm/gone"],
  ])("opens nothing but a block device: not %s", (_what, path) => {
    symlinkSync("/dev/null", join(folder, "link"));
    const opened = join(folder, "opened");
    writeFileSync(join(folder, "bin", "blockdev"), `#!/bin/sh\necho 512; echo "$@" >>${opened}\n`);
    try {
      expect(check(path(), 512, process.env.PATH, checkDeviceScript)).toEqual({ status: 71, stdout: "" });
      expect(existsSync(opened)).toBe(false);
    } finally {
      writeFileSync(join(folder, "bin", "blockdev"), "#!/bin/sh\necho 512\n");
      rmSync(join(folder, "link"));
    }
  });

  it("does not call it readable where it cannot even be opened", () => {
    expect(check(join(folder, "gone"), 512)).toEqual({ status: 70, stdout: "" });
  });

  it("says meanwhile how far it is, and ends when it is done", async () => {
    const programs = join(folder, "halting");
    mkdirSync(programs);
    const dd = `#!/bin/sh\nhead -c 4096; while [ ! -e ${folder}/go ]; do sleep 0.02; done; exec cat\n`;
    writeFileSync(join(programs, "dd"), dd, { mode: 0o755 });
    const quick = onFiles.replace(`sleep ${aliveSeconds} `, "sleep 0.05 ");
    const env = { PATH: `${programs}:${join(folder, "bin")}:${process.env.PATH}` };
    const child = spawn("/bin/sh", ["-c", quick, "sh", device(), "8192"], { env, detached: true });
    let [told, ended] = ["", false];
    child.stdout.on("data", (chunk) => {
      told += String(chunk);
    });
    child.once("close", () => {
      ended = true;
    });
    try {
      await vi.waitFor(() => expect(told).toMatch(/^(0\n)*(4096\n)+$/), { timeout: 10_000 });
      writeFileSync(join(folder, "go"), "");
      await vi.waitFor(() => expect(ended).toBe(true), { timeout: 10_000 });
      const sum = createHash("sha256").update(readFileSync(device())).digest("hex");
      expect(told.split("\n").filter((line) => !/^\d{0,20}$/.test(line))).toEqual([sum]);
    } finally {
      if (child.pid !== undefined && !ended) process.kill(-child.pid, "SIGKILL");
    }
  });

  it("ends with all it started where nobody is told any more that it reads", async () => {
    const programs = join(folder, "slow");
    const reader = join(folder, "reader");
    mkdirSync(programs);
    writeFileSync(join(programs, "dd"), `#!/bin/sh\necho $$ >${reader}; exec sleep 1000\n`, { mode: 0o755 });
    const quick = onFiles.replace(`sleep ${aliveSeconds} `, "sleep 0.05 ");
    expect(quick).not.toBe(onFiles);
    const env = { PATH: `${programs}:${join(folder, "bin")}:${process.env.PATH}` };
    const child = spawn("/bin/sh", ["-c", quick, "sh", device(), "512"], { env, detached: true });
    let ended = false;
    child.once("exit", () => {
      ended = true;
    });
    const alive = () => existsSync(`/proc/${readFileSync(reader, "utf8").trim()}`);
    try {
      // As long as somebody listens it goes on.
      for (let told = 0; told < 3; told++) await new Promise((resolve) => child.stdout.once("data", resolve));
      expect(alive()).toBe(true);
      child.stdout.destroy();
      await vi.waitFor(() => expect([ended, alive()]).toEqual([true, false]), { timeout: 10_000 });
    } finally {
      if (child.pid !== undefined && !ended) process.kill(-child.pid, "SIGKILL");
    }
  });

  it("does not call it unreadable for want of a program", () => {
    expect(check(device(), 512, "/nowhere")).toEqual({ status: 71, stdout: "" });
  });
});

describe("a job onto a volume that is there", () => {
  let host: CopyHost;
  beforeAll(() => {
    host = new CopyHost();
    host.serve("content".repeat(1000));
  });
  afterAll(() => host.close());

  const run = async (device: string, rest: "zero" | "keep", extents = "", bandwidthLimit?: number) => {
    const folder = join(host.disk, "job");
    rmSync(folder, { recursive: true, force: true });
    mkdirSync(folder);
    mkdirSync(dirname(host.device("old")), { recursive: true });
    writeFileSync(host.device("old"), device);
    const plan = { uri: "nbd://a/b", connections: 1, verify: true, bandwidthLimit, rest };
    const args = deviceCopyArguments({ unit: "-", run: folder }, "/dev/VgVm/old", plan);
    const argv = ["sh", "-c", withExtents(extents, deviceCopyJob), "sh", ...args];
    const { exitCode } = await host.run({ argv, kind: "read", deadlineSeconds: 30 });
    const told = (name: string) => readFileSync(join(folder, name), "utf8");
    return { exitCode, told, held: readFileSync(host.device("old"), "utf8") };
  };

  it.each([
    ["zero", "\0"],
    ["keep", "#"],
  ] as const)("makes what lies behind the content %s", async (rest, behind) => {
    const { exitCode, told, held } = await run("#".repeat(8192), rest);
    expect(exitCode).toBe(0);
    expect(held).toBe("content".repeat(1000).padEnd(8192, behind));
    expect(JSON.parse(told("result"))).toMatchObject({ sizeBytes: 7000, facts: "8192", verified: true });
  });

  describe("of which a part is empty", () => {
    const source = "\0".repeat(4096).padEnd(7000, "#");
    beforeAll(() => host.serve(source));

    it("is read through one nbdkit that knows that, and the limit", async () => {
      const { exitCode, held } = await run("old".repeat(4096), "zero", "0 4096 hole,zero\n4096 2904\n", 1000);
      expect([exitCode, held]).toEqual([0, source.padEnd(12288, "\0")]);
      expect(host.bytesAsked).toBe(2904);
      const copying = host.nbdkitCalls.filter(
        (call) => call.includes(" nbd ") && call.includes("extentlist"),
      );
      expect(copying).toEqual([
        expect.stringMatching(
          /^-U - -r --exit-with-parent --filter=extentlist --filter=rate nbd uri=nbd:\/\/a\/b rate=8000 extentlist=\S+\/extents --run /,
        ),
      ]);
      // The second reading is of all of it: nothing that was believed of the source passes for read.
      expect(host.nbdkitCalls.at(-1)).toMatch(/ --filter=rate nbd .* rate=8000 --run /);
      expect(host.nbdkitCalls.at(-1)).not.toContain("extentlist");
    });

    it("is read whole by a list of another size, which would leave out the rest", async () => {
      const calls = host.nbdkitCalls.length;
      const { exitCode, held } = await run("old".repeat(4096), "zero", "0 4096 hole,zero\n4096 1000\n");
      expect([exitCode, held]).toEqual([0, source.padEnd(12288, "\0")]);
      expect(host.nbdkitCalls.slice(calls)).toEqual(["--dump-plugin nbd"]);
    });
  });

  it("does not begin on one that is too small", async () => {
    const { exitCode, told, held } = await run("#".repeat(6999), "keep");
    expect(exitCode).toBe(1);
    expect(told("failure")).toMatch(/has 6999 bytes, fewer than the source with 7000/);
    expect(held).toBe("#".repeat(6999));
  });
});
