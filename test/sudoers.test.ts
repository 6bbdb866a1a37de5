import { spawn, spawnSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Writable } from "node:stream";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { main } from "../provider/cli.js";
import {
  type ArgumentRule,
  certificatesPlace,
  hostCommandOf,
  hostCommands,
} from "../provider/core/hostCommands.js";
import { clockCommand, groupCommand } from "../provider/linux/looks.js";
import { lvsCommand, removeCommand } from "../provider/linux/lvm.js";
import { killCommand, takePid, wireCommand } from "../provider/ssh/command.js";
import { commandFile, commandFolder, commandPath, stopArgv } from "../provider/ssh/keptCommands.js";
import { machineIdCommand } from "../provider/ssh/machineId.js";
import { commandsOf, sudoers, sudoersInstallation, userProblem } from "../provider/sudoers.js";

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-kept-"));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** The file of a kept command. */
function fileOf(argv: readonly string[]): string {
  const found = hostCommandOf(argv);
  if (found === undefined) throw new Error(`${argv[0]} has no name`);
  const file = join(folder, found.name);
  writeFileSync(file, commandFile(found));
  chmodSync(file, 0o755);
  return file;
}

/** A kept command, run as sudo runs it. */
function kept(argv: readonly string[], ...args: string[]) {
  const file = fileOf(argv);
  const { status, stdout, stderr } = spawnSync(file, args, { encoding: "utf8", env: {} });
  return { status, stdout, stderr };
}

function cli(...args: string[]) {
  const [out, err] = [[], []] as [string[], string[]];
  const into = (lines: string[]) =>
    new Writable({
      write(chunk: Buffer, _encoding, done) {
        lines.push(chunk.toString());
        done();
      },
    });
  const exitCode = main(args, into(out), into(err));
  return { exitCode, out: out.join(""), err: err.join("") };
}

describe("commands that a host keeps", () => {
  it("are all of them shell text without an error, and each has a name of its own", () => {
    const all = hostCommands();
    expect(all.length).toBeGreaterThan(60);
    expect(new Set(all.map(commandPath)).size).toBe(all.length);
    for (const command of all) {
      const { status, stderr } = spawnSync("sh", ["-n"], { input: commandFile(command), encoding: "utf8" });
      expect([command.name, status, stderr]).toEqual([command.name, 0, ""]);
    }
  });

  it("run as a sent one does: its process id after the mark, its deadline, its exit code", () => {
    const done = kept(clockCommand(), "lvm-nbd-1", "5", "30");
    expect(done).toMatchObject({ status: 0, stdout: expect.stringMatching(/^\d+\n$/) });
    expect(takePid(done.stderr, "lvm-nbd-1")).toEqual({ pid: expect.any(Number), stderr: "" });
  });

  it.each([
    ["no argument at all", []],
    ["a deadline that is an option", ["lvm-nbd-1", "5", "--foreground"]],
    ["a grace that is none", ["lvm-nbd-1", "", "30"]],
    ["a deadline that timeout takes for no end", ["lvm-nbd-1", "5", "0.0"]],
    ["more arguments than it has", ["lvm-nbd-1", "5", "30", "-s", "2020-01-01"]],
  ])("refuse %s before anything is run", (_what, args) => {
    expect(kept(clockCommand(), ...args)).toMatchObject({ status: 64, stdout: "" });
  });

  it("tell which machine it is, and no other file's content", () => {
    expect(kept(machineIdCommand.argv, "lvm-nbd-1", "5", "30", "/etc/passwd")).toMatchObject({
      status: 64,
      stdout: "",
    });
  });

  it("take no option in an operand's place", () => {
    expect(kept(groupCommand(), "lvm-nbd-1", "5", "30", "--config=log{file=/etc/x}")).toMatchObject({
      status: 64,
    });
  });

  it("whatever only looks is held to its arguments", () => {
    for (const { name, rules } of commandsOf("observe"))
      expect([name, rules]).toEqual([name, expect.any(Array)]);
  });

  it.each<[ArgumentRule, string[], string[]]>([
    ["unit", ["lvm-nbd-export-vm1.service", "mnt-a\\x20b.mount"], ["", "--host=evil", "../../shadow", "a b"]],
    ["run", ["/run/lvm-nbd-copy-1"], ["/run/lvm-nbd-x/y", "/run/x", "/tmp/lvm-nbd-1", "/run/lvm-nbd-"]],
    ["record", ["/etc/lvm-nbd/a.conf"], ["/etc/lvm-nbd/../shadow", "/etc/passwd", "/etc/lvm-nbd/..", ""]],
    ["path", ["/", "/a b/c..d", "/dev/VgVm/vm1"], ["", "a", "-x", "/a/../b", "/a/..", "/a\nb"]],
    ["word", ["qemu-nbd", "/usr/bin/x"], ["", "-x", "a b", "$(id)", "a\n"]],
    ["words", ["a b", "a"], ["", "-a", "a --pipe=x", "a;b", "a\nb"]],
    ["name", ["VgVm", "vm1.a+b"], ["", "--config=x", "a/b", "a b"]],
    ["uuid", ["92jG0U-S4d0"], ["", "-S", 'a"b']],
    ["tag", ["lvm-nbd.restoring=7f10acfa"], ["", "-f/etc/x", "a b"]],
    ["number", ["0", "17"], ["", "-1", "a[$(id)0]", "1 "]],
    [
      "uri",
      ["nbd://10.0.0.1:10809/vm1", "nbds://[::1]/a%20b"],
      [
        "",
        "nbd+unix:///?socket=/x",
        "nbd://-oX/x",
        "nbds://a/b?tls-certificates=/root",
        `nbds://a/b?tls-certificates=${certificatesPlace}`,
        "nbd+ssh://a/b",
        "[ id ]",
      ],
    ],
    ["address", ["10.0.0.1", "fe80::1"], ["", "-batch", "localhost"]],
    [
      "filter",
      ["( sport = :10809 )", "( sport = :80 )"],
      ["", "-D/x", "( sport = :1 or dport = :2 )", "( sport = :x1 )", "( sport = : )"],
    ],
    ["format", ["raw", "qcow2"], ["", "vmdk"]],
    ["mark", ["lvm-nbd-1a-b"], ["", "x", "lvm-nbd-", "lvm-nbd-a\nPATH=/bin"]],
    ["uri?", ["", "nbd://a/b"], ["x"]],
    ["certificates", [], ["-1", "x", "999"]],
  ])("an argument that is %s", (rule, good, bad) => {
    const file = join(folder, "rule");
    const run = (argument: string) => {
      writeFileSync(file, commandFile({ name: "rule", class: "observe", argv: ["true"], rules: [rule] }));
      chmodSync(file, 0o755);
      return spawnSync(file, ["lvm-nbd-1", "5", "30", argument]).status;
    };
    for (const argument of good) expect([argument, run(argument)]).toEqual([argument, 0]);
    // The last two end as an optional rule does.
    for (const argument of [...bad, "--config=x?:", "x\n?:"])
      expect([argument, run(argument)]).toEqual([argument, 64]);
  });

  it("a rule is no pattern for the files where the login is", () => {
    const file = join(folder, "optional");
    writeFileSync(
      file,
      commandFile({ name: "optional", class: "observe", argv: ["true"], rules: ["path?"] }),
    );
    chmodSync(file, 0o755);
    writeFileSync(join(folder, "paths"), "");
    expect(spawnSync(file, ["lvm-nbd-1", "5", "30", "/a"], { cwd: folder }).status).toBe(0);
  });

  it("many arguments, and those of certificates", () => {
    const file = join(folder, "rules");
    const rules = ["certificates", "path", "many:word"] as const;
    writeFileSync(file, commandFile({ name: "rules", class: "observe", argv: ["true"], rules }));
    chmodSync(file, 0o755);
    const run = (...args: string[]) => spawnSync(file, ["lvm-nbd-1", "5", "30", ...args]).status;
    expect(run("2", "ca-cert.pem", "17", "/a", "b", "c")).toBe(0);
    expect(run("0", "/a")).toBe(0);
    for (const args of [["2", "../x", "1", "/a"], ["2", "a"], ["0"], ["0", "/a", "-x"], []]) {
      expect([args, run(...args)]).toEqual([args, 64]);
    }
  });

  it("the folder of its certificates is in the URI of a command that is given them", () => {
    const file = join(folder, "certified");
    const rules = ["certificates", "uri"] as const;
    writeFileSync(file, commandFile({ name: "certified", class: "observe", argv: ["true"], rules }));
    chmodSync(file, 0o755);
    const run = (...args: string[]) => spawnSync(file, ["lvm-nbd-1", "5", "30", ...args]).status;
    expect(run("1", "ca-cert.pem", `nbds://a/b?tls-certificates=${certificatesPlace}`)).toBe(0);
    for (const other of ["", "/root", `${certificatesPlace}/..`])
      expect([other, run("0", `nbds://a/b?tls-certificates=${other}`)]).toEqual([other, 64]);
  });

  it.each([
    ["/dev/nbd0", true],
    ["/dev/nbd0p1", false],
    ["/dev/nbd", false],
    ["/dev/sda", false],
    ["/tmp/y/nbd0", false],
    ["/tmp/y/sda", false],
    ["nbd0", false],
  ])("look at an attachment whose path leads to %s: that is opened: %s", (device, opened) => {
    const observe = hostCommands().find(({ name }) => name === "observe-attachment");
    const host = mkdtempSync(join(folder, "host-"));
    for (const name of ["nbd0", "nbd", "sda"]) {
      spawnSync("mkdir", ["-p", `${host}/sys/${name}`, `${host}/bin`]);
      for (const file of ["size", "ro"]) writeFileSync(`${host}/sys/${name}/${file}`, "8\n");
    }
    symlinkSync(device, `${host}/path`);
    writeFileSync(`${host}/bin/dd`, `#!/bin/sh\necho "$@" >${host}/opened\n`, { mode: 0o755 });
    writeFileSync(`${host}/bin/systemctl`, "#!/bin/sh\necho ActiveState=inactive\n", { mode: 0o755 });
    const text = observe?.argv[2]
      ?.replaceAll("/sys/block", `${host}/sys`)
      .replaceAll("/etc/systemd/system", host);
    const env = { PATH: `${host}/bin:/usr/bin:/bin` };
    const { status } = spawnSync("sh", ["-c", `${text}`, "sh", "x.service", `${host}/path`], { env });
    expect(status).toBe(0);
    expect(existsSync(`${host}/opened`)).toBe(opened);
  });

  it("end what runs under their mark, and no other process", async () => {
    const start = (mark: string) =>
      spawn("sleep", ["60"], {
        detached: true,
        stdio: "ignore",
        env: { LVM_NBD_RUN: mark, PATH: process.env.PATH },
      });
    const ours = start("lvm-nbd-7");
    const theirs = start("lvm-nbd-8");
    const ended = new Promise<string | null>((resolve) =>
      ours.on("exit", (_code, signal) => resolve(signal)),
    );
    let theirEnd: string | null | undefined;
    theirs.on("exit", (_code, signal) => {
      theirEnd = signal;
    });
    const stop = (pid: number | undefined, mark: string) => {
      const argv = stopArgv(pid ?? 0, 1, mark);
      const stopping = spawn(fileOf(argv), ["lvm-nbd-2", "5", "30", ...argv.slice(4)], { stdio: "ignore" });
      return new Promise((resolve) => stopping.on("exit", resolve));
    };
    try {
      expect(await stop(theirs.pid, "lvm-nbd-7")).toBe(0);
      expect(await stop(ours.pid, "lvm-nbd-7")).toBe(0);
      expect(await ended).toBe("SIGTERM");
      expect(theirEnd).toBeUndefined();
      for (const group of ["0", "1", "-1", "", "7; reboot"]) {
        expect(kept(stopArgv(1, 1, "x"), "lvm-nbd-1", "5", "30", group, "5", "lvm-nbd-7").status).toBe(64);
      }
    } finally {
      theirs.kill("SIGKILL");
    }
  });

  it("are used where they are, and sent where not", () => {
    const command = {
      argv: removeCommand({ volumeGroup: "vg", name: "a b", uuid: "u" }),
      kind: "change",
      deadlineSeconds: 9,
    } as const;
    const line = wireCommand(command, true, "mark");
    const known = hostCommandOf(command.argv);
    const path = known && commandPath(known);
    writeFileSync(join(folder, "sudo"), '#!/bin/sh\nprintf "%s\\n" "$@"\n');
    chmodSync(join(folder, "sudo"), 0o755);
    const sent = (text: string) =>
      spawnSync("sh", ["-c", text], {
        encoding: "utf8",
        env: { PATH: `${folder}:/usr/bin:/bin` },
      }).stdout.split("\n");
    expect(path).toMatch(new RegExp(`^${commandFolder}/lvremove-[0-9a-f]{12}$`));
    expect(sent(line).slice(0, 3)).toEqual(["-n", "--", "env"]);
    const here = join(folder, "sudo");
    expect(sent(line.replace(path ?? "", here))).toEqual([
      ...["-n", "--", here, "mark", "5", "9", "-y", "-S", 'lv_uuid="u"', "vg/a b", ""],
    ]);
    expect(killCommand(7, 5, true, "mark")).toContain(`${commandFolder}/stop-`);
  });
});

describe("lvm-nbd sudoers", () => {
  it("names each command by its path, and for a login that only looks none that changes", () => {
    const text = sudoers("backup", "observe", "1.2.3");
    expect(text).toContain("backup ALL = (root) NOPASSWD: \\\n    /usr/local/libexec/lvm-nbd/");
    expect(text.match(/libexec/g)).toHaveLength(commandsOf("observe").length);
    expect(text).not.toMatch(/ALL\s*$|lvremove|apply-|\*/m);
    expect(commandsOf("operate").map(({ name }) => name)).toContain("lvremove");
    expect(commandsOf("operate").map(({ name }) => name)).not.toContain("apply-setup");
    expect(commandsOf("setup")).toHaveLength(hostCommands().length);
    const looks = commandsOf("observe").map(({ argv }) => argv);
    expect(looks).toEqual(expect.arrayContaining([lvsCommand(), machineIdCommand.argv]));
  });

  it.each([
    "",
    "a b",
    "ALL,x",
    "x\ny",
    "root",
    "#1000",
    "-x",
    "ALL",
    "%ADMINS",
    "DB_2",
    "Defaults",
    "User_Alias",
  ])("refuses the user %j", (user) => {
    expect(userProblem(user)).toBeDefined();
    expect(cli("sudoers", "--", user).exitCode).toBe(2);
  });

  it.each([
    ["no command", [], /unknown command/],
    ["another command", ["install", "x"], /unknown command "install x"/],
    ["no user", ["sudoers"], /A user is missing/],
    ["an unknown role", ["sudoers", "x", "--role", "all"], /there is no role "all"/],
    ["an unknown option", ["sudoers", "x", "--force"], /--force/],
  ])("refuses %s, and says how it is used", (_what, args, said) => {
    const { exitCode, out, err } = cli(...args);
    expect([exitCode, out]).toEqual([2, ""]);
    expect(err).toMatch(said);
    expect(err).toContain("lvm-nbd sudoers USER");
  });

  it("prints the file, or what installs it", () => {
    expect(cli("sudoers", "%backup.ops", "--role", "observe").out).toMatch(/^%backup\.ops ALL = /m);
    const { out, exitCode } = cli("sudoers", "%backup.ops", "--install");
    expect(exitCode).toBe(0);
    expect(out).toContain("sudoers=/etc/sudoers.d/lvm-nbd-%backup,ops");
    expect(spawnSync("sh", ["-n"], { input: out }).status).toBe(0);
    expect(cli("--help").out).toContain("Roles:");
  });

  it("is installed whole: commands that everybody can read and root alone change, a file that sudo takes", () => {
    const [kept, etc, bin] = ["kept", "etc", "bin"].map((name) => join(folder, name));
    spawnSync("mkdir", ["-p", `${etc}`, `${bin}`]);
    writeFileSync(
      `${bin}/visudo`,
      '#!/bin/sh\n[ "$1" = -cqf ] && grep -q "NOPASSWD" "$2" && [ ! -e "$0.refuses" ]\n',
    );
    writeFileSync(`${bin}/getent`, "#!/bin/sh\n[ $2 = backup ]\n");
    writeFileSync(`${bin}/id`, "#!/bin/sh\necho 0\n");
    writeFileSync(`${bin}/find`, '#!/bin/sh\n[ -e "$0.exposed" ] || echo "$1"\n');
    for (const name of ["visudo", "getent", "id", "find"]) chmodSync(`${bin}/${name}`, 0o755);
    const install = (user: string) => {
      const text = sudoersInstallation(user, "observe", "1")
        .replaceAll(commandFolder, `${kept}`)
        .replaceAll("/etc/sudoers.d", `${etc}`);
      const env = { PATH: `${bin}:/usr/sbin:/usr/bin:/bin` };
      return spawnSync("sh", { input: text, encoding: "utf8", env });
    };
    expect(install("nobody-here")).toMatchObject({
      status: 1,
      stderr: "there is no nobody-here on this host\n",
    });
    // Of an earlier version: one that another login may run, and one that nobody may any more.
    spawnSync("mkdir", ["-p", `${kept}`]);
    for (const name of ["shown-1", "shown-2"]) writeFileSync(`${kept}/${name}`, "");
    writeFileSync(`${etc}/lvm-nbd-other`, `other ALL = (root) NOPASSWD: \\\n    ${kept}/shown-1\n`);
    for (let times = 0; times < 2; times++) {
      const { status, stdout, stderr } = install("backup");
      expect([status, stderr]).toEqual([0, ""]);
      expect(stdout).toContain(`backup may now run ${commandsOf("observe").length} commands as root on`);
    }
    expect(statSync(`${etc}/lvm-nbd-backup`).mode & 0o777).toBe(0o440);
    expect(readdirSync(`${kept}`).filter((name) => name.startsWith("shown"))).toEqual(["shown-1"]);
    rmSync(`${etc}/lvm-nbd-other`);
    for (const command of commandsOf("observe")) {
      const path = commandPath(command).replace(commandFolder, `${kept}`);
      expect(statSync(path).mode & 0o777).toBe(0o755);
    }
    writeFileSync(`${bin}/find.exposed`, "");
    expect(install("backup").stderr).toContain("can be changed by others than root");
    rmSync(`${bin}/find.exposed`);
    writeFileSync(`${bin}/visudo.refuses`, "");
    expect(install("backup").status).toBe(1);
    expect(statSync(`${etc}/lvm-nbd-backup`).isFile()).toBe(true);
    expect(spawnSync("ls", [`${etc}`], { encoding: "utf8" }).stdout).toBe("lvm-nbd-backup\n");
  });
});
