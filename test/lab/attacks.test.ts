/** Attacks on what the package makes, through the CLI: each is refused, named, and leaves nothing half made. */
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { exportConfigPath, exportUnitName } from "../../provider/linux/exportUnit.js";
import { nbdServers } from "../../provider/linux/nbd.js";
import { quote } from "../../provider/ssh/quoting.js";
import { startFakeServer } from "../ssh/fakeServer.js";
import { providerProgram } from "./doorNames.mts";
import { attachment, FaultStack, nbdExport, output, type Run, snapshot } from "./faults/fault-stack.mts";
import type { Guest, Lab } from "./lab.mts";
import { checksum, freshLab, makeOrigin } from "./support.mts";

vi.setConfig({ testTimeout: 600_000, hookTimeout: 600_000 });

const stranger = "10.77.0.77";
const touch = "touch pwned";
/** One for each server. Spaces, quotes, substitutions, specifiers of systemd's, comments of nbd-server's configuration. */
const hostileNames = [
  `$(${touch}) %n %i "'\\`,
  `-x \`${touch}\`;#&|<> %%`,
  `.. ${touch}; ; é ❄ \u202e $HOME`,
];
const victim = "/root/victim";

let lab: Lab;
let stack: FaultStack;
let origin: string;

/**
 * A client that asks for no leave: `perl client LOCAL SERVER PORT NAME COMMAND` sends one request, whatever the export's flags
 * say, and prints what comes back. Source: the NBD protocol's specification.
 */
const client = String.raw`
use strict; use IO::Socket::INET;
my ($local, $server, $port, $name, $command) = @ARGV;
my $socket = IO::Socket::INET->new(PeerAddr => $server, PeerPort => $port, LocalAddr => $local, Timeout => 4) or do { print "nothing: $!\n"; exit };
$SIG{ALRM} = sub { print "silence\n"; exit }; alarm 40;
sub get { my ($n, $all) = (shift, ""); while (length $all < $n) { sysread($socket, my $some, $n - length $all) or do { print "disconnected\n"; exit }; $all .= $some } $all }
get(18);
my $option = pack("N", length $name) . $name . pack("n", 0);
syswrite $socket, pack("N", 3) . "IHAVEOPT" . pack("NN", 7, length $option) . $option;
my $flags;
while (1) {
  my (undef, undef, undef, $type, $length) = unpack "N5", get(20);
  my $data = get($length);
  last if $type == 1;
  if ($type > 3) { printf "refused %x\n", $type; exit }
  $flags = unpack "x10 n", $data if unpack("n", $data) == 0;
}
my $type = { read => 0, write => 1, trim => 4, zero => 6 }->{$command};
syswrite $socket, pack("N n n a8 N N N", 0x25609513, 0, $type, "12345678", 0, 4096, 4096) . ($type == 1 ? "pwned..." x 512 : "");
my (undef, $error) = unpack "N2", get(16);
printf "%s, error %d\n", $flags & 2 ? "read-only" : "writable", $error;
`;

const asks = async (guest: Guest, port: number, name: string, command: string, from: string, as = "") => {
  const { stdout } = await guest.run(
    `cd / && ${as} perl /usr/local/lib/client ${from} ${lab.server1.privateAddress} ${port} ${quote(name)} ${command}`,
  );
  return stdout.trim();
};

/** All that a person sees; nothing in it drives his terminal. */
function harmless({ text }: Run): void {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what must not be there
  expect(text.match(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/)).toBeNull();
}

const pwned = async () => {
  for (const guest of [lab.server1, lab.server2]) {
    expect((await guest.run("find / /run /dev/shm /tmp -xdev -name 'pwned*'")).stdout).toBe("");
    expect((await guest.run(`cat ${victim}; stat -c %a-%Y ${victim}; ls /srv/victims`)).stdout).toBe(
      "precious\n644-978307200\n",
    );
  }
};

beforeAll(async () => {
  lab = await freshLab();
  [stack, origin] = await Promise.all([
    FaultStack.create(lab),
    makeOrigin(lab.server1),
    ...[lab.server1, lab.server2].map((guest) =>
      guest.run(
        `cat >/usr/local/lib/client && echo precious >${victim} && touch -d @978307200 ${victim} && mkdir /srv/victims`,
        { stdin: client },
      ),
    ),
  ]);
  await lab.server2.run(
    `ip address add ${stranger}/24 dev $(ip -o -4 address show to 10.77.0.2 | cut -d' ' -f2)`,
  );
});

afterAll(() => stack?.close());

it("a name that would write a unit's directive is refused before any host is asked", async () => {
  const all = "find /etc /run/systemd /dev/VgVm | sort | sha256sum; lvs";
  const before = await lab.server1.run(all);
  const exportName = "a\nExecStartPre=/bin/touch /root/pwned";
  stack.declare(nbdExport("vm1", { device: "/dev/VgVm/LV-VM1", exportName }));
  const refused = await stack.up();
  expect(refused.exitCode).not.toBe(0);
  refused.said("exportName: must not hold control characters, brackets or slashes");
  expect((await lab.server1.run(all)).stdout).toBe(before.stdout);
  await pwned();
});

describe("exports with hostile names beside planted links", () => {
  const open = nbdServers.map((server, n) => ({
    ...{ server, name: `open-${server}`, exportName: hostileNames[n] ?? "" },
    ...{ port: 10809 + n, device: "/dev/VgVm/LV-VM1" },
  }));
  const secured = { exportName: `-r ${hostileNames[0]}`, port: 10812 };
  const nobody = "setpriv --reuid=nobody --regid=nogroup --clear-groups";

  it("come up, write through no link, and refuse by name where one leads their work elsewhere", async () => {
    const planted = [
      `/etc/systemd/system/${exportUnitName("linked")}`,
      `/etc/systemd/system/${exportUnitName(hostileNames[0] ?? "")}.new`,
      exportConfigPath(hostileNames[1] ?? ""),
      `${exportConfigPath(hostileNames[1] ?? "")}.new`,
    ];
    await lab.server1.run(`set -e
      truncate -s 64M /root/pv; vgcreate -qq -y Vg+odd.1_x-y $(losetup -f --show /root/pv)
      lvcreate -qq -y -W n -L 16M -n 0a+b..c--d --addtag 'x=!:&#/-y' Vg+odd.1_x-y
      mkdir -p /etc/lvm-nbd
      ${planted.map((path) => `ln -s ${victim} ${quote(path)}`).join("\n")}`);
    await lab.server2.run(`set -e
      ln -s /srv/victims /etc/lvm-nbd; mkdir /srv/images; install -d -o nobody /srv/mallory; ln -s images /srv/link
      cd /srv/images; ln -s /srv/victims part.raw.part; ln -s ${victim} file.raw; ln -s ${victim} manifest.raw.manifest.json
      mkfifo pipe.raw.manifest.json; install -d -o nobody theirs.raw.part
      cd /srv/mallory; ln -s /srv/victims folder; install -d -o nobody theirs.raw.part`);
    const copy = (name: string, file: string) => ({
      ...{ type: "VolumeCopy" as const, name },
      args: { host: "server2", uri: output("open-nbdkit", "uri"), file: `/srv/${file}` },
    });
    // LVM's own names at their strangest, and one of Pulumi's that becomes a tag.
    const odd = `odd $(${touch})`;
    stack.declare(
      snapshot(odd, {
        ...{ volumeGroup: "Vg+odd.1_x-y", origin: "0a+b..c--d", name: "s+n..a_p--x", size: "8M" },
        tags: ["x=!:&#/-y", "+.-_"],
      }),
      ...open.map(({ name, ...args }) => nbdExport(name, args)),
      nbdExport("secured", { ...secured, device: output(odd, "path"), tls: true }),
      ...open.map(({ name }) => attachment(`at-${name}`, { uri: output(name, "uri") })),
      attachment("led", { uri: output("secured", "uri"), tls: output("secured", "clientTls") }),
      nbdExport("linked", { port: 10820, device: "/dev/VgVm/LV-VM1" }),
      ...["part", "file", "manifest", "pipe", "theirs"].map((name) => copy(name, `images/${name}.raw`)),
      // What is in a folder of his, or behind a link of his, he could exchange at any moment.
      copy("folder", "mallory/folder/vm1"),
      copy("his", "mallory/theirs.raw"),
      // A link that root alone can change may well lead there.
      copy("fine", "link/fine.raw"),
    );
    const run = await stack.up();
    harmless(run);
    run.failedWith("COMMAND_FAILED", "NbdAttachment led", "server2", "/etc/lvm-nbd is a symbolic link");
    run.failedWith("FOREIGN_RESOURCE", "NbdExport linked", "server1", "carries no owner mark");
    for (const name of ["part", "file"])
      run.failedWith("FOREIGN_RESOURCE", `VolumeCopy ${name}`, "server2", `${name}.raw exists already`);
    for (const name of ["manifest", "pipe"])
      run.failedWith("FOREIGN_RESOURCE", `VolumeCopy ${name}`, "server2", `${name}.raw.manifest.json is not`);
    for (const name of ["folder", "his"])
      run.failedWith(
        ...(["FILE_UNSUITABLE", `VolumeCopy ${name}`, "server2"] as const),
        "/srv/mallory (nobody, drwxr-xr-x) can be changed by others than root",
      );
    const theirs = "/srv/images/theirs.raw.part (nobody, drwxr-xr-x) can be changed by others than root";
    run.failedWith("FILE_UNSUITABLE", "VolumeCopy theirs", "server2", theirs);
    const state = await stack.state();
    const made = [odd, "secured", "fine", ...open.flatMap(({ name }) => [name, `at-${name}`])];
    expect([...state.keys()].sort()).toEqual([...made].sort());
    // Of what was refused there is nothing, and of what was not no link.
    const { stdout } = await lab.server2.run(
      "ls /srv/images; ls /srv/mallory; systemctl list-units --all --plain --no-legend 'lvm-nbd-*' | cut -d' ' -f1; ls /etc/systemd/system | grep led",
      { allowFailure: true },
    );
    expect(stdout.trim().split("\n")).toEqual([
      ...[
        "file.raw",
        "fine.raw",
        "fine.raw.manifest.json",
        "manifest.raw.manifest.json",
        "part.raw.part",
        "pipe.raw.manifest.json",
      ],
      ...["folder", "theirs.raw.part"],
      ...open.map(({ name }) => `lvm-nbd-attach-at-${name}.service`).sort(),
    ]);
    const links = await lab.server1.run(
      "find /etc/systemd/system /etc/lvm-nbd -maxdepth 1 -lname '*victim*'",
    );
    expect(links.stdout.trim()).toBe(planted[0]);
    expect((await lab.server1.run("systemctl list-units --failed --no-legend 'lvm-nbd-*'")).stdout).toBe("");
    await pwned();
  });

  it("serve under those very names", async () => {
    for (const { name } of open)
      expect(await checksum(lab.server2, `/dev/lvm-nbd/at-${name}`), name).toBe(origin);
  });

  it("answer their clients, and nobody from another address", async () => {
    const { privateAddress } = lab.server2;
    const read = (from: string) =>
      Promise.all(open.map(({ port, exportName }) => asks(lab.server2, port, exportName, "read", from)));
    expect(await read(privateAddress)).toEqual(open.map(() => "read-only, error 0"));
    expect(await read(stranger)).toEqual(open.map(() => expect.stringMatching(/^nothing: /)));
  });

  it("with TLS give nothing to another user of their own host, who gets all without it", async () => {
    const from = lab.server1.privateAddress;
    for (const { port, exportName } of open)
      expect(await asks(lab.server1, port, exportName, "read", from, nobody)).toBe("read-only, error 0");
    const { port, exportName } = secured;
    // NBD_REP_ERR_TLS_REQD
    expect(await asks(lab.server1, port, exportName, "read", from, nobody)).toBe("refused 80000005");
    const keys = await lab.server1.run(
      `cd / && ${nobody} sh -c 'cat /etc/lvm-nbd/*/*; ls /etc/lvm-nbd/*~*'`,
      {
        allowFailure: true,
      },
    );
    expect(keys.stdout).toBe("");
    expect(keys.stderr).toContain("Permission denied");
  });

  it("take no write from a client that does not ask whether it may", async () => {
    for (const { port, exportName, name } of open)
      for (const command of ["write", "trim", "zero"])
        expect(
          await asks(lab.server2, port, exportName, command, lab.server2.privateAddress),
          `${command} to ${name}`,
        ).toMatch(/^(read-only, error [1-9]\d*|disconnected)$/);
    expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).toBe(origin);
  });
});

/** Brings up that resource alone. */
const alone = (name: string, ...args: string[]) => ["--target", `**::${name}`, ...args];

it("a man in the middle of the SSH port is told by his key, and neither greeted nor given a command", async () => {
  const middle = await startFakeServer();
  const { hostKey } = lab.server1;
  const knownHosts = join(lab.directory, "attacks_known_hosts");
  writeFileSync(knownHosts, `[127.0.0.1]:${middle.port} ${hostKey}\n`);
  const host = { address: "127.0.0.1", port: middle.port, user: "root", privateKeyPath: lab.privateKeyPath };
  const wanted = { origin: "LV-VM1", size: "8M" };
  try {
    stack.declare(
      snapshot("pinned", { ...wanted, host: { ...host, hostKey } }),
      snapshot("known", { ...wanted, host: { ...host, knownHostsPath: knownHosts } }),
    );
    const run = await stack.up({ args: [...alone("pinned"), ...alone("known")] });
    for (const name of ["pinned", "known"])
      run.failedWith("HOST_KEY_MISMATCH", `LvSnapshot ${name}`, `127.0.0.1:${middle.port}`);
    expect([middle.logins, middle.lines]).toEqual([[], []]);
    expect(middle.sockets.length).toBeGreaterThan(0);
  } finally {
    await middle.close();
  }
});

/** The most memory, in MiB, that a provider's process of that session ever had so far. */
function peak(session: number): number {
  const program = providerProgram[stack.door];
  const peaks = readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map((pid) => {
      try {
        const inSession =
          readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]?.split(" ")[3] === String(session);
        if (!inSession || !readFileSync(`/proc/${pid}/cmdline`, "utf8").includes(program)) return 0;
        return Number(/^VmHWM:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? 0) / 1024;
      } catch {
        // It has ended meanwhile.
        return 0;
      }
    });
  return Math.max(...peaks);
}

it("what a host prints that was taken over costs bounded memory, and never drives a terminal", async () => {
  const escapes = "\\033]0;owned\\007\\033[2J\\033[31m\\302\\2331m\\000\\377";
  const instead = (text: string) =>
    lab.server1.run("cat >/usr/local/sbin/lvs && chmod +x /usr/local/sbin/lvs", {
      stdin: `#!/bin/sh\n${text}\n`,
    });
  stack.declare(snapshot("taken", { origin: "LV-VM1", size: "8M" }));
  const up = async (...args: string[]): Promise<{ run: Run; memory: number }> => {
    const { pid, end } = stack.startUp(["--continue-on-error", ...alone("taken", ...args)]);
    let memory = 0;
    const watching = setInterval(() => {
      memory = Math.max(memory, peak(pid));
    }, 50);
    const run = await end.finally(() => clearInterval(watching));
    harmless(run);
    return { run, memory };
  };
  await instead(`printf '${escapes}\\n'; printf 'words ${escapes}\\n' >&2; exit 5`);
  const failed = await up();
  failed.run.failedWith("COMMAND_FAILED", "LvSnapshot taken", "server1", "stderr: words ?]0;owned??[2J");
  await instead(`printf '${escapes}' >&2; yes "$(printf '${escapes}')"`);
  const endless = await up();
  endless.run.failedWith("OUTPUT_TOO_LARGE", "LvSnapshot taken", "server1");
  expect(failed.memory).toBeGreaterThan(20);
  expect(endless.memory - failed.memory).toBeLessThan(300);
  expect((await lab.server1.run("pgrep -x yes", { allowFailure: true })).stdout).toBe("");
  await instead(`/usr/sbin/lvs "$@" | sed 's,"lv_path":"/dev/VgVm/taken,&\\\\u001b[2J,'`);
  (await up("--diff")).run.succeeded("1 created");
  expect((await stack.state()).get("taken")).toMatchObject({ path: "/dev/VgVm/taken?[2J" });
  await lab.server1.run("rm /usr/local/sbin/lvs");
  await pwned();
});
