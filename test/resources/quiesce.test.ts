/** The script around a quiesced snapshot, run by a real shell with an lvcreate of ours. */
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { chmodSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { fakeHost, handlersOn } from "../support/fakeHost.js";
import { recordedLvs } from "../support/recorded.js";

let folder = "";
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "quiesce-"));
});
afterEach(() => rmSync(folder, { recursive: true }));

const log = () => {
  const path = join(folder, "log");
  return existsSync(path) ? readFileSync(path, "utf8").trimEnd().split("\n") : [];
};
const note = (what: string) => `echo ${what} >>'${join(folder, "log")}'`;

/** What the provider would run on the host for these commands. */
async function command(freeze: string, thaw: string, timeoutSeconds = 5): Promise<readonly string[]> {
  const asked = fakeHost(({ kind }) =>
    kind === "read"
      ? recordedLvs("valid").replaceAll('"lv_name":"vm1-snap"', '"lv_name":"another"')
      : { exitCode: 90 },
  );
  const made = handlersOn("LvSnapshot", asked).create({
    host: { address: "192.0.2.1", password: "x" },
    owner: "o/p/s/vm1",
    volumeGroup: "VgVm",
    origin: "vm1",
    name: "vm1-snap",
    size: "16M",
    quiesce: { freeze, thaw, timeoutSeconds },
  });
  await expect(made).rejects.toThrow(/QUIESCE_FAILED/);
  return asked.changes[0]?.argv ?? [];
}

function start(argv: readonly string[], lvcreate: string): ChildProcess {
  const program = join(folder, "lvcreate");
  writeFileSync(program, `#!/bin/sh\n${lvcreate}\n`);
  chmodSync(program, 0o755);
  const [shell = "", ...rest] = argv;
  return spawn(shell, rest, {
    stdio: "ignore",
    detached: true,
    env: { ...process.env, PATH: `${folder}:${process.env.PATH}` },
  });
}

const ended = (child: ChildProcess) =>
  new Promise<number | null>((resolve) => {
    child.on("close", (code) => resolve(code));
  });

it("freezes, takes the snapshot, thaws", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  expect(await ended(start(argv, note('"lvcreate $*"')))).toBe(0);
  expect(log()).toEqual(["freeze", expect.stringMatching(/^lvcreate -s .*VgVm\/vm1$/), "thaw"]);
});

it("thaws when freeze fails, and takes no snapshot", async () => {
  const argv = await command(`${note("freeze")}; false`, note("thaw"));
  expect(await ended(start(argv, note("lvcreate")))).toBe(90);
  expect(log()).toEqual(["freeze", "thaw"]);
});

it("thaws when the snapshot fails, and tells lvcreate's exit code", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  expect(await ended(start(argv, `${note("lvcreate")}; exit 5`))).toBe(5);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw"]);
});

it("tells a failed thaw of a snapshot that was taken", async () => {
  const argv = await command(note("freeze"), `${note("thaw")}; false`);
  expect(await ended(start(argv, note("lvcreate")))).toBe(91);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw"]);
});

it("stops a freeze that hangs, and thaws", async () => {
  const argv = await command(`${note("freeze")}; sleep 100`, note("thaw"), 1);
  expect(await ended(start(argv, note("lvcreate")))).toBe(90);
  expect(log()).toEqual(["freeze", "thaw"]);
});

it.each(["SIGTERM", "SIGHUP", "SIGINT"] as const)(
  "thaws once when it is stopped by %s while lvcreate hangs",
  async (signal) => {
    const argv = await command(note("freeze"), note("thaw"));
    const child = start(argv, `${note("lvcreate")}; exec sleep 100`);
    const end = ended(child);
    await vi.waitFor(() => expect(log()).toContain("lvcreate"), { timeout: 10_000 });
    // The whole group, as a cancel or a deadline does.
    execFileSync("kill", ["-s", signal.slice(3), "--", `-${child.pid}`]);
    expect(await end).toBe(143);
    expect(log()).toEqual(["freeze", "lvcreate", "thaw"]);
  },
);
