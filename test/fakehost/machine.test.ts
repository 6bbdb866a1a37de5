/** What a real machine cannot show: cuts, kills, freezes and interleavings at every step, and virtual time. */
import { describe, expect, it } from "vitest";
import { killCommand, wireCommand } from "../../provider/ssh/command.js";
import { FileError, FileTree, type Operation } from "./files.js";
import { finish, Killed, Machine, type Running, run, type Signal, type Tool } from "./machine.js";
import { plainTools } from "./tools.js";

class Host {
  readonly files = new FileTree();
  readonly machine: Machine;
  out = "";
  err = "";

  constructor(programs: Readonly<Record<string, Tool>> = {}) {
    this.files.mkdir("/etc");
    this.machine = new Machine(this.files, new Map([...plainTools(), ...Object.entries(programs)]), {
      now: 0,
    });
  }

  start(script: string, ...args: string[]): Running<number> {
    return run(this.machine, ["sh", "-c", script, "sh", ...args], {
      out: (text) => {
        this.out += text;
      },
      err: (text) => {
        this.err += text;
      },
    });
  }

  run(script: string, ...args: string[]): number {
    return finish(this.machine, this.start(script, ...args));
  }
}

/** The commands before which it stops. */
function commands(running: Running<number>): string[] {
  return [...running].map(({ command }) => command);
}

/** Goes on until that command is next. */
function until(running: Running<number>, command: string): void {
  for (let next = running.next(); !next.done; next = running.next())
    if (next.value.command.startsWith(command)) return;
  throw new Error(`${command} was not reached`);
}

function kill(host: Host, running: Running<number>, signal: Signal): number {
  const next = running.throw(new Killed(signal));
  return next.done ? next.value : finish(host.machine, running);
}

const install =
  'umask 022; f=/etc/f; rm -f $f.new && printf %s "$1" >$f.new && sync $f.new && mv -f $f.new $f';

describe("steps", () => {
  it("come before every effect, and between the opening of a file and the writing", () => {
    expect(commands(new Host().start(install, "it's new"))).toEqual([
      expect.stringMatching(/^sh -c 'umask/),
      "rm -f /etc/f.new",
      ">/etc/f.new",
      "printf %s 'it'\\''s new'",
      "sync /etc/f.new",
      "mv -f /etc/f.new /etc/f",
    ]);
  });

  it("come before what another script could change: file tests, patterns, inputs", () => {
    const script =
      "[ -e /a ]; [ a = a ]; for f in /etc/*; do :; done; read -r x </dev/null; x=$(echo a | cat); cat </etc/f";
    expect(commands(new Host().start(script)).slice(1)).toEqual([
      "'[' -e /a ']'",
      "glob '/etc/*'",
      "cat",
      "</etc/f",
    ]);
  });

  it("are cut at most once per change: a file is old or new, whenever the host dies", () => {
    const seen = new Set<string>();
    for (let steps = 1; steps <= 6; steps += 1) {
      const host = new Host();
      host.files.write("/etc/f", "old");
      const running = host.start(install, "new");
      for (let step = 0; step < steps; step += 1) running.next();
      expect(kill(host, running, "KILL")).toBe(137);
      seen.add(JSON.stringify([host.files.read("/etc/f"), host.files.kind("/etc/f.new")]));
      if (host.files.exists("/etc/f.new")) seen.add(host.files.read("/etc/f.new"));
    }
    expect([...seen]).toEqual(['["old",null]', '["old","file"]', "", "new"]);
  });

  it("between removals of one rm", () => {
    const host = new Host();
    host.files.write("/etc/a", "");
    host.files.write("/etc/b", "");
    const running = host.start("rm -f /etc/a /etc/b");
    until(running, "rm -f /etc/b");
    expect(host.files.list("/etc")).toEqual(["b"]);
  });
});

describe("signals", () => {
  it("without a trap kill, and no EXIT trap is run", () => {
    const host = new Host();
    const running = host.start("trap 'echo bye' EXIT; cat /etc/none");
    until(running, "cat");
    expect([kill(host, running, "TERM"), host.out]).toEqual([143, ""]);
  });

  it.each(["HUP", "INT", "TERM"] as const)("%s runs its trap once, and the EXIT trap", (signal) => {
    const host = new Host();
    const running = host.start("trap 'echo bye' EXIT; trap 'exit 143' HUP INT TERM; sleep 100; echo never");
    until(running, "sleep");
    expect([kill(host, running, signal), host.out, host.machine.now()]).toEqual([143, "bye\n", 0]);
    expect(host.machine.processes.size).toBe(0);
  });

  it("wait for the child when only the shell is hit, or the child is in another group", () => {
    const host = new Host();
    const running = host.start("trap 'echo trap' TERM; timeout 10 sleep 3; echo then");
    until(running, "sleep");
    expect(kill(host, running, "TERM")).toBe(0);
    expect([host.out, host.machine.now()]).toEqual(["trap\nthen\n", 3000]);
  });

  it("leave a child of another group alone when the parent dies: it goes on in the background", () => {
    const host = new Host();
    const running = host.start("timeout 10 sh -c 'sleep 3; echo late >/etc/late'");
    until(running, "sleep");
    expect(kill(host, running, "KILL")).toBe(137);
    expect(host.machine.background.size).toBe(1);
    expect(host.run("sleep 5; cat /etc/late")).toBe(0);
    expect(host.out).toBe("late\n");
  });

  it("reach a group through the provider's own kill command", () => {
    const host = new Host();
    const argv = ["sh", "-c", "trap 'echo cleaned; exit 1' TERM; sleep 100", "sh"];
    const running = host.start(wireCommand({ argv, kind: "change", deadlineSeconds: 50 }, true, "mark"));
    until(running, "sleep");
    const pid = Number(/^mark (\d+)$/m.exec(host.err)?.[1]);
    const killing = host.start(killCommand(pid, 5, true, "mark"));
    host.machine.background.add(running);
    expect(finish(host.machine, killing)).toBe(0);
    expect([host.out, host.machine.now()]).toEqual(["cleaned\n", 200]);
  });

  it("are left to a program that catches them", () => {
    const host = new Host({
      *lvcreate(process) {
        process.catch("TERM");
        yield process.wait({ ready: () => false });
        process.out(`got ${process.take()}\n`);
        return 5;
      },
    });
    const running = host.start("lvcreate; exit $?");
    until(running, "lvcreate");
    running.next();
    host.machine.kill(Math.max(...host.machine.processes.keys()), "TERM");
    expect([finish(host.machine, running), host.out]).toEqual([5, "got TERM\n"]);
  });

  it("end no uninterruptible wait, whose process outlives its parents", () => {
    const host = new Host({
      *dd(process) {
        yield process.wait({ until: 60_000, uninterruptible: true });
        process.machine.files.write("/etc/done", "");
        return 0;
      },
    });
    expect(host.run("timeout -k 2 10 dd")).toBe(137);
    expect([host.machine.now(), host.machine.background.size]).toEqual([12_000, 1]);
    host.run("sleep 100");
    expect(host.files.exists("/etc/done")).toBe(false);
    expect([...host.machine.processes.values()]).toEqual([]);
  });
});

describe("time is virtual", () => {
  it("sleep and date", () => {
    const host = new Host();
    expect(host.run("date +%s; sleep 90; sleep 0.5; date +%s")).toBe(0);
    expect([host.out, host.machine.now()]).toEqual(["0\n90\n", 90_500]);
  });

  it.each([
    ["timeout 10 sleep 5", 0, 5_000],
    ["timeout 10 sleep 50", 124, 10_000],
    ["timeout -k 5 10 sleep 50", 124, 10_000],
    ["timeout -k 5 10 sh -c 'trap \"\" TERM; sleep 50'", 137, 15_000],
    ["timeout -k 5 10 sh -c 'trap \"exit 3\" TERM; sleep 50'", 124, 10_000],
    ["timeout 10 sh -c 'timeout 20 sleep 30'", 124, 10_000],
    ["timeout 20 sh -c 'timeout 10 sleep 30; exit $?'", 124, 10_000],
    ["timeout 10 nonesuch", 127, 0],
  ])("%s", (script, code, now) => {
    const host = new Host();
    expect([host.run(script), host.machine.now()]).toEqual([code, now]);
  });

  it("a command that can never go on is an error, not a hang", () => {
    const host = new Host({
      *hang(process) {
        yield process.wait({ ready: () => false });
        return 0;
      },
    });
    expect(() => host.run("hang")).toThrow("nothing can go on: hang");
  });
});

describe("flock", () => {
  const script = 'exec 9>/etc/lock && flock -w 10 9 || exit 1; echo "$1 has it"; sleep "$2"; echo "$1 ends"';

  it("lets one script in at a time", () => {
    const host = new Host();
    const first = host.start(script, "first", "3");
    until(first, "sleep");
    host.machine.background.add(first);
    expect(host.run(script, "second", "0")).toBe(0);
    expect([host.out, host.machine.now()]).toEqual([
      "first has it\nfirst ends\nsecond has it\nsecond ends\n",
      3000,
    ]);
  });

  it("gives up after its time", () => {
    const host = new Host();
    until(host.start(script, "first", "3"), "sleep");
    expect([host.run(script, "second", "0"), host.machine.now()]).toEqual([1, 10_000]);
  });

  it("is free when its holder was killed", () => {
    const host = new Host();
    const first = host.start(script, "first", "3");
    until(first, "sleep");
    kill(host, first, "KILL");
    expect([host.run(script, "second", "0"), host.machine.now()]).toEqual([0, 0]);
  });

  it("is held on by a child that outlives its holder", () => {
    const host = new Host();
    const first = host.start("exec 9>/etc/lock; flock 9; timeout 4 sleep 100");
    until(first, "sleep");
    kill(host, first, "KILL");
    expect([host.run(script, "second", "0"), host.machine.now()]).toEqual([0, 4000]);
  });
});

describe("failing disks and links", () => {
  function failing(code: "ENOSPC" | "EROFS", on: Operation): Host {
    const host = new Host();
    host.files.onWrite = (path, operation) => {
      if (operation === on) throw new FileError(code, path);
    };
    return host;
  }

  it("a full disk leaves an empty file, and both builtin and program fail", () => {
    const host = failing("ENOSPC", "write");
    expect(host.run("echo x >/etc/a; echo $?; echo x | cat >/etc/b; echo $?")).toBe(0);
    expect([host.out, host.err, host.files.read("/etc/a")]).toEqual([
      "1\n1\n",
      "sh: 1: echo: echo: I/O error\ncat: /etc/b: No space left on device\n",
      "",
    ]);
  });

  it("a read-only disk opens no file for writing", () => {
    const host = failing("EROFS", "create");
    expect(host.run(": >/etc/a; echo never")).toBe(2);
    expect(host.err).toBe("sh: 1: cannot create /etc/a: Read-only file system\n");
  });

  it.each([
    ["rename", "mv -f /etc/a /etc/b", "mv: cannot move '/etc/a' to '/etc/b': Read-only file system\n"],
    ["remove", "rm -f /etc/a", "rm: cannot remove '/etc/a': Read-only file system\n"],
    ["mkdir", "mkdir -p /etc/d", "mkdir: cannot create directory '/etc/d': Read-only file system\n"],
    ["link", "ln -sfn x /etc/l", "ln: failed to create symbolic link '/etc/l': Read-only file system\n"],
    ["sync", "sync /etc/a", "sync: error opening '/etc/a': Read-only file system\n"],
  ] as const)("a failed %s", (operation, script, message) => {
    const host = failing("EROFS", operation);
    host.files.write("/etc/a", "");
    expect([host.run(script), host.err]).toEqual([1, message]);
    expect(host.files.exists("/etc/a")).toBe(true);
  });

  it.each([
    ["", 141, ""],
    ["trap '' PIPE; ", 0, "went on"],
  ])('a link that nobody reads any more, after "%s"', (trap, code, left) => {
    const host = new Host();
    const running = run(host.machine, ["sh", "-c", `${trap}echo x; printf 'went on' >/etc/left`], {
      out: () => {
        throw new FileError("EPIPE", "stdout");
      },
      err: () => undefined,
    });
    expect(finish(host.machine, running)).toBe(code);
    expect(host.files.exists("/etc/left") ? host.files.read("/etc/left") : "").toBe(left);
  });
});

describe("the file tree", () => {
  it.each([
    ["ENOENT", (files: FileTree) => files.read("/a")],
    ["ENOENT", (files: FileTree) => files.write("/a/b", "")],
    ["ENOENT", (files: FileTree) => files.rename("/a", "/b")],
    ["ENOENT", (files: FileTree) => files.read("")],
    ["EISDIR", (files: FileTree) => files.read("/d")],
    ["EISDIR", (files: FileTree) => files.write("/d", "")],
    ["EISDIR", (files: FileTree) => files.remove("/d")],
    ["EISDIR", (files: FileTree) => files.rename("/f", "/d")],
    ["EEXIST", (files: FileTree) => files.mkdir("/d")],
    ["EEXIST", (files: FileTree) => files.mkdirs("/f")],
    ["EEXIST", (files: FileTree) => files.link("x", "/f")],
    ["ENOTDIR", (files: FileTree) => files.read("/f/x")],
    ["ENOTDIR", (files: FileTree) => files.list("/f")],
    ["ENOTDIR", (files: FileTree) => files.rename("/d", "/f")],
    ["ENOTEMPTY", (files: FileTree) => files.rmdir("/d")],
    ["EINVAL", (files: FileTree) => files.readlink("/f")],
    ["EINVAL", (files: FileTree) => files.rename("/d", "/d/e/g")],
    ["ELOOP", (files: FileTree) => files.read("/loop")],
    ["EIO", (files: FileTree) => files.read("/dev/dm-0")],
  ])("raises %s: %s", (code, act) => {
    const files = new FileTree();
    files.mkdirs("/d/e");
    files.write("/f", "x");
    files.link("loop", "/loop");
    files.block("/dev/dm-0", "id");
    expect(() => act(files)).toThrow(expect.objectContaining({ code }));
  });

  it("shows all there is, for comparisons", () => {
    const files = new FileTree();
    files.mkdir("/dev/VgVm");
    files.block("/dev/dm-0", "uuid");
    files.link("../dm-0", "/dev/VgVm/vm1");
    files.write("/f", "x");
    files.append("/f", "y");
    expect(files.blockId("/dev/VgVm/vm1")).toBe("uuid");
    expect(files.realpath("/dev/VgVm/vm1")).toBe("/dev/dm-0");
    expect(files.snapshot()).toEqual({
      "/": { kind: "directory" },
      "/dev": { kind: "directory" },
      "/dev/VgVm": { kind: "directory" },
      "/dev/VgVm/vm1": { kind: "link", target: "../dm-0" },
      "/dev/dm-0": { kind: "block", id: "uuid" },
      "/dev/null": { kind: "null" },
      "/f": { kind: "file", content: "xy" },
    });
    files.removeTree("/dev");
    expect(Object.keys(files.snapshot())).toEqual(["/", "/f"]);
  });

  it("keeps an open file that was replaced", () => {
    const host = new Host();
    host.run(
      "echo old >/etc/f; exec 3</etc/f 4>>/etc/f; echo new >/etc/g; mv -f /etc/g /etc/f; echo more >&4; cat <&3; cat /etc/f",
    );
    expect(host.out).toBe("old\nmore\nnew\n");
  });
});
