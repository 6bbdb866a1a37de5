import { execFileSync, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { emitFunctions, parseFields } from "../../provider/linux/fields.js";
import {
  aliveSeconds,
  findPattern,
  holdersScript,
  parseHolders,
  usersScript,
} from "../../provider/linux/holders.js";

const line = (kind: string, who: string) => `${kind}\t${Buffer.from(who).toString("base64")}\n`;

describe("holders of a device", () => {
  it("are named in words", () => {
    expect(
      parseHolders(
        line("mount", "/mnt/vm 1") +
          line("device", "vg-guest") +
          line("swap", "/dev/nbd0p2") +
          line("process", "qemu-system-x86_64 -name vm1 (pid 412)"),
      ),
    ).toEqual([
      "mounted at /mnt/vm 1",
      "used by device vg-guest",
      "swap on /dev/nbd0p2",
      "open in qemu-system-x86_64 -name vm1 (pid 412)",
    ]);
  });

  it("are none where nothing is printed", () => {
    expect(parseHolders("")).toEqual([]);
  });

  it("cannot be made up or hidden by a name that holds line breaks and tabs", () => {
    expect(parseHolders(line("mount", "/mnt\nprocess\teA=="))).toEqual(["mounted at /mnt\nprocess\teA=="]);
  });

  it.each(["noise", "mounted\tL21udA==", "\tL21udA=="])("are not guessed from %j", (stdout) => {
    expect(() => parseHolders(stdout)).toThrow();
  });

  it("are not said to be none of what is no block device", () => {
    const run = () =>
      execFileSync("sh", ["-c", holdersScript, "sh", "/etc/passwd", ""], {
        stdio: ["ignore", "pipe", "pipe"],
      });
    expect(run).toThrow(/not a block device/);
  });
});

describe("processes that have a device open", () => {
  let folder: string;
  const begun: ReturnType<typeof spawn>[] = [];
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "lvm-nbd-holders-"));
    mkdirSync(join(folder, "class", "disk"), { recursive: true });
    writeFileSync(join(folder, "class", "disk", "dev"), "254:9\n");
    writeFileSync(join(folder, "disk"), "x\n");
  });
  afterEach(() => {
    for (const process of begun.splice(0)) process.kill("SIGKILL");
    rmSync(folder, { recursive: true, force: true });
  });

  async function opens(environment: NodeJS.ProcessEnv = {}): Promise<number | undefined> {
    const reader = spawn("tail", ["-f", join(folder, "disk")], { env: { ...process.env, ...environment } });
    begun.push(reader);
    await new Promise((resolve) => reader.stdout.once("data", resolve));
    return reader.pid;
  }

  /** A file stands for the device. */
  function holders(): string[] {
    const text = holdersScript
      .replace('[ -b "$device" ]', "true")
      .replaceAll("/sys/class/block/", `${folder}/class/`)
      .replaceAll('"/dev/$name"', `"${folder}/$name"`)
      .replace(`patience=${2 * aliveSeconds}`, "patience=1");
    const argv = ["-c", text, "sh", join(folder, "disk"), ""];
    return parseHolders(execFileSync("sh", argv, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }));
  }

  it("are named; of what lvm-nbd itself reads there it is said once that it ends by itself, and when", async () => {
    const ours = { LVM_NBD_RUN: "lvm-nbd-1" };
    const [other, ...own] = [await opens(), await opens(ours), await opens(ours)];
    const seen = holders();
    expect(seen).toHaveLength(2);
    expect(seen).toContain(`open in tail -f ${join(folder, "disk")} (pid ${other})`);
    expect(seen.find((line) => own.some((pid) => line.includes(`(pid ${pid})`)))).toMatch(
      /\), which is lvm-nbd's own: it ends by itself .* half an hour after its link died at the latest$/,
    );
  });
});

describe("users of a mount", () => {
  const users = (path: string) =>
    parseHolders(
      execFileSync("sh", ["-c", usersScript, "sh", path, findPattern(path), path.replaceAll(" ", "\\040")], {
        encoding: "utf8",
      }),
    );

  it("are the processes that have a file of it open or work in it, and no others", async () => {
    const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-users-"));
    // A path that is a pattern of find, and one that it fits.
    const [mine, other] = [join(folder, "a [x]*"), join(folder, "a x")];
    for (const one of [mine, other]) {
      mkdirSync(join(one, "sub"), { recursive: true });
      writeFileSync(join(one, "file"), "x\n");
    }
    const said = (process: ReturnType<typeof spawn>) =>
      new Promise((resolve) => process.stdout?.once("data", resolve));
    const processes = [
      spawn("tail", ["-f", join(mine, "file")]),
      spawn("sh", ["-c", "echo; read never"], { cwd: join(mine, "sub") }),
      spawn("tail", ["-f", join(other, "file")]),
    ];
    try {
      await Promise.all(processes.map(said));
      const [opened, works] = processes.map(({ pid }) => `(pid ${pid})`);
      expect(users(mine).sort()).toEqual(
        [`open in tail -f ${mine}/file ${opened}`, `open in sh -c echo; read never ${works}`].sort(),
      );
      expect(users(join(folder, "none"))).toEqual([]);
    } finally {
      for (const process of processes) process.kill("SIGKILL");
      rmSync(folder, { recursive: true, force: true });
    }
  });
});

it("a script's fields come out of a real shell as they went in", () => {
  const script = `${emitFunctions}\nemit a "$1"; emit_output b printf '%s' "$2"; emit_output c sh -c 'exit 3'; emit end ""`;
  fc.assert(
    fc.property(fc.string({ unit: "binary" }), fc.string({ unit: "binary" }), (one, two) => {
      const [a, b] = [one, two].map((text) => Buffer.from(text).toString().replaceAll("\0", ""));
      const parsed = parseFields(
        execFileSync("sh", ["-c", script, "sh", a ?? "", b ?? ""], { encoding: "utf8" }),
      );
      expect(parsed.get("a")).toBe(a);
      // $(...) takes line breaks at the end away.
      expect(parsed.get("b")).toBe(b?.replace(/\n+$/, ""));
      expect([parsed.get("b.rc"), parsed.get("c.rc")]).toEqual(["0", "3"]);
    }),
    { numRuns: 30 },
  );
});
