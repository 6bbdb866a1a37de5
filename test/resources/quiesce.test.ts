/** The script around a quiesced snapshot, run by a real shell with an lvcreate of ours. */
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Context } from "../../provider/core/resource.js";
import { lvSnapshotInputs, takeTogether } from "../../provider/resources/lvSnapshot.js";
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
  return (asked.changes[0]?.argv ?? []).map((argument) => argument.replace("/run/", `${folder}/`));
}

/** The same for two snapshots of one moment. */
async function commandOfTwo(freeze: string, thaw: string): Promise<readonly string[]> {
  const asked = fakeHost(() => ({}));
  const one = { host: "server1", owner: "o/p/s/vm1", volumeGroup: "VgVm", origin: "vm1", size: "16M" };
  const snapshots = ["a", "b"].map((name) => lvSnapshotInputs.parse({ ...one, name }));
  const context: Context = {
    ...{ host: asked, resource: "BackupImage vm1", signal: new AbortController().signal },
    ...{ progress: () => undefined, warn: () => undefined, open: async () => asked },
  };
  await takeTogether(context, snapshots, { freeze, thaw, timeoutSeconds: 5 });
  return (asked.changes[0]?.argv ?? []).map((argument) => argument.replace("/run/", `${folder}/`));
}

function start(
  argv: readonly string[],
  lvcreate: string,
  lvs = "exit 5",
  originTags = "exit 0",
): ChildProcess {
  for (const [name, text] of Object.entries({
    lvcreate,
    lvs: `case " $* " in *" lv_tags "*) ${originTags};; *) ${lvs};; esac`,
    vgs: "exit 0",
    lvchange: "exit 0",
    lvremove: note('"lvremove $*"'),
  })) {
    const program = join(folder, name);
    writeFileSync(program, `#!/bin/sh\n${text}\n`);
    chmodSync(program, 0o755);
  }
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
  expect(log()).toEqual(["freeze", expect.stringMatching(/^lvcreate -s .*VgVm\/vm1 --config /), "thaw"]);
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

it("says that the snapshot is made also where only the thaw fails", async () => {
  const argv = await command(note("freeze"), `${note("thaw")}; false`);
  const child = start(argv, note("lvcreate"));
  writeFileSync(join(folder, "lvchange"), `#!/bin/sh\n${note('"lvchange $*"')}\n`);
  expect(await ended(child)).toBe(91);
  const said = expect.stringMatching(/^lvchange .*--deltag lvm-nbd\.making VgVm\/vm1-snap$/);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw", said]);
});

it("takes back what was taken while a restore had begun to write an image onto the origin", async () => {
  const argv = await commandOfTwo(note("freeze"), note("thaw"));
  const mark = `lvm-nbd.restore=${"0".repeat(12)}:0123abcd:w1000+0:${"a".repeat(64)}:o/p/s/r`;
  const child = start(argv, note("lvcreate"), "exit 5", `echo "  mine,${mark}"`);
  expect(await ended(child)).toBe(77);
  expect(log().slice(0, 4)).toEqual(["freeze", "lvcreate", "lvcreate", "thaw"]);
  expect(log().slice(4)).toEqual(
    ["a", "b"].map((name) => expect.stringMatching(`^lvremove .* VgVm/${name}$`)),
  );
});

it("tells of a failed look at the origin's marks, and takes back what it has made", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  expect(await ended(start(argv, making(":"), isMade(), "exit 3"))).toBe(3);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw", takenBack]);
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

/** An lvcreate that has made its snapshot when it ends, and the lvs that tells of it. */
const making = (how: string) => `${note("lvcreate")}; ${how}; touch '${folder}/made'`;
const isMade = () => `test -e '${folder}/made' || exit 5`;
const takenBack = expect.stringMatching(/^lvremove -y -S lv_tags=\{"lvm-nbd.making"\} VgVm\/vm1-snap$/);

it("takes back, thawed, what lvcreate has made all the same when it is stopped", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  const child = start(argv, making("trap '' TERM; sleep 0.5"), isMade());
  const end = ended(child);
  await vi.waitFor(() => expect(log()).toContain("lvcreate"), { timeout: 10_000 });
  execFileSync("kill", ["-s", "TERM", "--", `-${child.pid}`]);
  expect(await end).toBe(143);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw", takenBack]);
});

it("leaves alone what somebody else has made by that name meanwhile", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  const exists = `echo 'Logical Volume "vm1-snap" already exists in volume group "VgVm"' >&2; exit 5`;
  expect(await ended(start(argv, `${making(":")}; ${exists}`, isMade()))).toBe(5);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw"]);
});

/** An lvcreate that a TERM does not end. */
const stubborn = () => `${note("lvcreate")}; trap '' TERM; while :; do sleep 0.1; done`;

it("is thawed where lvcreate ignores that it is stopped and all are killed; nobody freezes meanwhile", async () => {
  const argv = await command(note("freeze"), `sleep 0.5; ${note("thaw")}`);
  const child = start(argv, stubborn());
  const end = ended(child);
  await vi.waitFor(() => expect(log()).toContain("lvcreate"), { timeout: 10_000 });
  for (const signal of ["TERM", "KILL"]) execFileSync("kill", ["-s", signal, "--", `-${child.pid}`]);
  expect(await end).toBe(null);
  expect(await ended(start(argv, note("lvcreate")))).toBe(0);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw", "freeze", "lvcreate", "thaw"]);
  await vi.waitFor(() => expect(readdirSync(folder).filter((name) => /\.\d+\.\d/.test(name))).toEqual([]));
});

/** Kills the whole group as soon as this is in the log. */
async function killAt(child: ChildProcess, line: string): Promise<void> {
  const end = ended(child);
  await vi.waitFor(() => expect(log()).toContain(line), { timeout: 10_000 });
  execFileSync("kill", ["-s", "KILL", "--", `-${child.pid}`]);
  expect(await end).toBe(null);
}
const nothingLeft = { timeout: 10_000, interval: 50 };

it("thaws after a freeze that outlives the script, not beneath it", async () => {
  const argv = await command(`${note("freezing")}; sleep 1; ${note("frozen")}`, note("thaw"));
  await killAt(start(argv, note("lvcreate")), "freezing");
  await vi.waitFor(() => expect(log()).toEqual(["freezing", "frozen", "thaw"]), nothingLeft);
});

it("waits for no program that the freeze leaves running", async () => {
  const argv = await command(`sleep 12 >/dev/null 2>&1 & ${note("freeze")}`, note("thaw"));
  await killAt(start(argv, stubborn()), "lvcreate");
  await vi.waitFor(() => expect(log()).toEqual(["freeze", "lvcreate", "thaw"]), nothingLeft);
});

it("tries a thaw again that fails after the script was killed", async () => {
  const argv = await command(
    note("freeze"),
    `${note("thaw")}; test -e '${folder}/n' || { : >'${folder}/n'; exit 1; }`,
  );
  await killAt(start(argv, stubborn()), "lvcreate");
  await vi.waitFor(() => expect(log()).toEqual(["freeze", "lvcreate", "thaw", "thaw"]), nothingLeft);
  await vi.waitFor(() => expect(readdirSync(folder).filter((name) => /\.\d+\.\d/.test(name))).toEqual([]));
});

it("thaws when the snapshots take too long, and keeps none of them", async () => {
  const argv = (await commandOfTwo(note("freeze"), note("thaw"))).map((one) => (one === "130" ? "1" : one));
  const lvcreate = `case "$*" in *"-n a"*) ${note("a")}; exit 0;; esac; until grep -q thaw '${folder}/log'; do sleep 0.05; done; ${note("b")}`;
  expect(await ended(start(argv, lvcreate))).toBe(93);
  const removed = (name: string) => expect.stringMatching(new RegExp(`^lvremove .* VgVm/${name}$`));
  expect(log()).toEqual(["freeze", "a", "thaw", "b", removed("a"), removed("b")]);
});

it("thaws itself what took too long where the watch could not", async () => {
  const thaw = `test -e '${folder}/created'; rc=$?; ${note("thaw")}; exit "$rc"`;
  const argv = (await command(note("freeze"), thaw)).map((one) => (one === "130" ? "1" : one));
  const lvcreate = `until grep -q thaw '${folder}/log'; do sleep 0.05; done; touch '${folder}/created'`;
  expect(await ended(start(argv, lvcreate))).toBe(93);
  expect(log().slice(0, 3)).toEqual(["freeze", "thaw", "thaw"]);
});

it("freezes nothing while another snapshot of the origin is being taken, and then finds it made", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  const first = ended(
    start(
      argv,
      `${note("lvcreate")}; sleep 0.5; ${note("made")}; touch '${folder}/made'`,
      `test -e '${folder}/made' || exit 5`,
    ),
  );
  await vi.waitFor(() => expect(log()).toContain("lvcreate"), { timeout: 10_000 });
  const second = ended(start(argv, note("again"), `test -e '${folder}/made' || exit 5`));
  expect(await first).toBe(0);
  expect(await second).toBe(77);
  expect(log()).toEqual(["freeze", "lvcreate", "made", "thaw"]);
});

/** An lvcreate that does not get LVM's lock so many times. */
const busy = (times: number) =>
  `n=$(cat '${folder}/tries' 2>/dev/null || echo 0); echo $((n+1)) >'${folder}/tries'; ` +
  `if [ "$n" -lt ${times} ]; then echo "Can't get lock for VgVm" >&2; exit 5; fi; ${note('"lvcreate $*"')}`;
const taken = expect.stringMatching(/^lvcreate .* --config global\{wait_for_locks=0\}$/);

it("tries again while the VM stands still, where somebody only looks at the group just then", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  expect(await ended(start(argv, busy(3)))).toBe(0);
  expect(log()).toEqual(["freeze", taken, "thaw"]);
});

it("thaws when somebody else keeps LVM's lock, waits for it and freezes once more", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  expect(await ended(start(argv, busy(10)))).toBe(0);
  expect(log()).toEqual(["freeze", "thaw", "freeze", taken, "thaw"]);
});

it("freezes no second time what could not be thawed, and says that it stands still", async () => {
  const argv = await command(note("freeze"), `${note("thaw")}; false`);
  expect(await ended(start(argv, busy(100)))).toBe(92);
  expect(log()).toEqual(["freeze", "thaw"]);
});

it("that could not say that it is made tells so, and takes back what it has made", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  const child = start(argv, making(":"), isMade());
  writeFileSync(join(folder, "lvchange"), "#!/bin/sh\nexit 5\n");
  expect(await ended(child)).toBe(5);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw", takenBack]);
});

it("that said that it is made is kept, also where it is thawed with an error", async () => {
  const argv = await command(note("freeze"), `${note("thaw")}; false`);
  expect(await ended(start(argv, making(":"), isMade()))).toBe(91);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw"]);
});

it("gives up when LVM's lock is taken from it again and again, thawed", async () => {
  const argv = await command(note("freeze"), note("thaw"));
  expect(await ended(start(argv, `echo "Can't get lock for VgVm" >&2; exit 5`))).toBe(5);
  expect(log()).toEqual(["freeze", "thaw", "freeze", "thaw", "freeze", "thaw"]);
});

it("takes the snapshots of one moment while the VM stands still once", async () => {
  const argv = await commandOfTwo(note("freeze"), note("thaw"));
  expect(await ended(start(argv, note('"lvcreate $*"')))).toBe(0);
  const of = (name: string) => expect.stringMatching(new RegExp(`^lvcreate -s .*-n ${name} .* --config `));
  expect(log()).toEqual(["freeze", of("a"), of("b"), "thaw"]);
});

it("takes no second snapshot after a first that failed, thaws, and tells its exit code", async () => {
  const argv = await commandOfTwo(note("freeze"), note("thaw"));
  expect(await ended(start(argv, `${note("lvcreate")}; exit 5`))).toBe(5);
  expect(log()).toEqual(["freeze", "lvcreate", "thaw"]);
});

describe("where LVM's lock is taken before a later snapshot of a moment,", () => {
  const later = (busyTimes: number) =>
    `case "$*" in *"-n b"*) ;; *) ${note("a")}; exit 0;; esac; ${busy(busyTimes)}`;

  it("what was taken is removed once the VM runs again, and all are taken anew as of one moment", async () => {
    const argv = await commandOfTwo(note("freeze"), note("thaw"));
    expect(await ended(start(argv, later(10)))).toBe(0);
    const removed = expect.stringMatching(/^lvremove -y -S lv_tags=\{"lvm-nbd.making"\} VgVm\/a$/);
    expect(log()).toEqual(["freeze", "a", "thaw", removed, "freeze", "a", taken, "thaw"]);
  });

  it("it gives up in the end, thawed", async () => {
    const argv = await commandOfTwo(note("freeze"), note("thaw"));
    expect(await ended(start(argv, later(100)))).toBe(5);
    expect(log().filter((line) => !line.startsWith("lvremove"))).toEqual([
      "freeze",
      "a",
      "thaw",
      "freeze",
      "a",
      "thaw",
      "freeze",
      "a",
      "thaw",
    ]);
  });
});

it("freezes nothing where one of the snapshots is there already", async () => {
  const argv = await commandOfTwo(note("freeze"), note("thaw"));
  const lvs = 'case "$*" in VgVm/b) exit 0;; esac; exit 5';
  expect(await ended(start(argv, note("lvcreate"), lvs))).toBe(77);
  expect(log()).toEqual([]);
});

it("freezes one VM once at a time, whichever of its volumes is snapshotted", async () => {
  const freeze = note("freeze");
  const one = await commandOfTwo(freeze, note("thaw"));
  const other = (await command(freeze, note("thaw"))).map((argument) =>
    argument.replace("quiesce.VgVm.vm1", "quiesce.VgVm.other"),
  );
  const first = ended(start(one, `${note("lvcreate")}; sleep 0.3`));
  await vi.waitFor(() => expect(log()).toContain("lvcreate"), { timeout: 10_000 });
  expect(await ended(start(other, note("lvcreate")))).toBe(0);
  expect(await first).toBe(0);
  expect(log()).toEqual(["freeze", "lvcreate", "lvcreate", "thaw", "freeze", "lvcreate", "thaw"]);
});
