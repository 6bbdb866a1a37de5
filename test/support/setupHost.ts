/**
 * A host on which the scripts of a HostSetup run in a real shell, in a folder of their own: packages, LVM, the kernel and systemd
 * are stand-ins of a few lines, as are all programs of ours; of the machine's only those of `tools` are there.
 */

import { spawnSync } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { LvmNbdError } from "../../provider/core/errors.js";
import type { CommandResult, Host, RemoteCommand } from "../../provider/ssh/types.js";
import { type Kill, outside, ShellHost } from "./shellHost.js";

const says = (text: string) => `printf '%s\\n' '${text}'`;

/** Their switches: `refused`, `stale`, `no-module`, `hides`, `broken`, `use_devicesfile`. */
const standIns: Readonly<Record<string, string>> = {
  // Of the two files the later one counts, and in a file the last setting; a list of one is written as one string.
  lvmconfig: `
    dir=\${LVM_SYSTEM_DIR:-$ROOT/etc/lvm}
    case "$*" in
      --validate) if grep -qs BROKEN "$dir"/*.conf; then echo "  Parse error at byte 1"; exit 5; fi; echo "  LVM configuration valid.";;
      *use_devicesfile) echo "use_devicesfile=$(cat "$SANDBOX/use_devicesfile" 2>/dev/null || echo 0)";;
      *devices/devicesfile) echo 'devicesfile="system.devices"';;
      *global_filter)
        list=
        for file in "$dir/lvm.conf" "$dir/lvmlocal.conf"; do
          found=$(grep -sE '^[[:space:]]*(devices/)?global_filter' "$file" | tail -n 1)
          [ -z "$found" ] || list=$(printf '%s\\n' "$found" | grep -oE '"([^"\\]|\\\\.)*"')
        done
        [ -n "$list" ] || list='"a|.*|"'
        joined=
        for one in $list; do joined="$joined,$one"; done
        joined=\${joined#,}
        case $joined in '"a|.*|"'|*,*) joined="[$joined]";; esac
        echo "global_filter=$joined";;
    esac`,
  pvs: `
    [ -e "$SANDBOX/hides" ] && [ "$LVM_SYSTEM_DIR" != "$ROOT/etc/lvm" ] || echo "  254 Dx3k5p-Nj11 /dev/vdb"`,
  modprobe: `
    [ ! -e "$SANDBOX/no-module" ] || { echo "modprobe: FATAL: Module nbd not found in directory /lib/modules/6.1.0" >&2; exit 1; }
    [ "$1" != -n ] || exit 0
    mkdir -p "$ROOT/sys/module/nbd/parameters" && echo 16 >"$ROOT/sys/module/nbd/parameters/nbds_max"`,
  "dpkg-query": `
    for package; do sed -n "s/^\\($package .*\\)/installed \\1/p" "$SANDBOX/installed"; done`,
  "apt-get": `
    echo "apt-get $*" >>"$SANDBOX/log"
    echo "$DEBIAN_FRONTEND $NEEDRESTART_MODE" >>"$SANDBOX/log"
    case " $* " in
      *" update "*) [ ! -e "$SANDBOX/stale" ]; exit;;
    esac
    [ ! -e "$SANDBOX/refused" ] || { echo "E: Unable to locate package x" >&2; exit 100; }
    while [ "$1" != install ]; do shift; done; shift
    for package; do
      echo "$package 1.0-1" >>"$SANDBOX/installed"
      for program in $(cat "$SANDBOX/shelf/$package" 2>/dev/null); do cp "$SANDBOX/shelf/bin/$program" "$SANDBOX/bin/$program"; done
    done`,
  "apt-cache": `
    shift; for package; do echo "$package:"; echo "  Installed: (none)"; echo "  Candidate: $(cat "$SANDBOX/candidate.$package" 2>/dev/null || echo '(none)')"; done`,
  "systemd-run": `
    log=/dev/null
    while :; do case $1 in
      --setenv=*) export "\${1#--setenv=}"; shift;;
      -p) case $2 in StandardOutput=file:*) log=\${2#*:};; esac; shift 2;;
      --*) shift;;
      *) break;;
    esac; done
    "$@" >"$log" 2>&1`,
  systemctl: `
    case $1 in --version) echo "systemd 252 (252.39-1~deb12u2)";; is-active) exit 3;; mask) echo "$2" >>"$SANDBOX/masked";; esac`,
  // What is on the disk is not looked at here.
  sync: ":",
  stat: says("cgroup2fs"),
  uname: says("6.1.0-56-cloud-amd64"),
  lvm: says("  LVM version:     2.03.16(2) (2022-05-18)"),
  nbdkit: says("nbdkit 1.32.5"),
  nbdcopy: `cat "$SANDBOX/nbdcopy.version" 2>/dev/null || echo "nbdcopy 1.14.2"`,
  nbdinfo: says("nbdinfo 1.14.2"),
  "nbd-client": says("This is nbd-client, from nbd 3.24"),
  "qemu-img": says("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)"),
  ...Object.fromEntries(
    ["lvs", "ss", "ip", "setpriv", "blockdev", "udevadm", "blkid", "partx", "findmnt", "qemu-nbd"].map(
      (program) => [program, ":"],
    ),
  ),
};

const tools = [
  ..."sh cat sed grep sort head tail awk base64 sha256sum cut wc mktemp rm cp mv mkdir rmdir ls timeout date flock".split(
    " ",
  ),
  ..."sleep gzip touch".split(" "),
];

/** Programs after which a script can be killed. */
const steps = ["cp", "mkdir", "mv", "rm", "rmdir", "sync", "modprobe", "systemd-run"];

const inside =
  /(?<![\w/.])\/(?=etc\/(?:lvm|modules-load\.d|os-release)|usr\/lib\/os-release|usr\/share\/doc|sys\/module\/nbd|boot\/config|run\/lvm-nbd|var\/lib\/dpkg|proc\/config|lib\/modules)/g;

export const debian =
  'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n';

export class SetupHost extends ShellHost implements Host {
  readonly name = "server2";
  readonly commands: RemoteCommand[] = [];
  #down = false;
  readonly #root: string;

  constructor() {
    super("setup", standIns, steps);
    this.#root = join(this.folder, "root");
    for (const folder of ["shelf/bin", "tools"]) mkdirSync(join(this.folder, folder), { recursive: true });
    for (const folder of ["run", "etc/modules-load.d", "var/lib/dpkg/updates"])
      mkdirSync(join(this.#root, folder), { recursive: true });
    for (const tool of tools) this.#tool(tool);
    this.set("installed", "lvm2 2.03.16-2\nlibnbd-bin 1.14.2-1\n");
    this.write("/etc/os-release", debian);
    this.write("/boot/config-6.1.0-56-cloud-amd64", "CONFIG_CGROUP_BPF=y\n");
    this.write("/etc/lvm/lvm.conf", 'devices {\n\t# global_filter = [ "a|.*|" ]\n}\n');
    this.write("/etc/lvm/lvmlocal.conf", 'local {\n\t# system_id = ""\n}\n');
  }

  /** Takes programs off the host; installing the package brings them back. */
  shelve(packageName: string, ...programs: string[]): void {
    for (const program of programs)
      renameSync(join(this.folder, "bin", program), join(this.folder, "shelf", "bin", program));
    this.set(join("shelf", packageName), programs.join(" "));
  }

  /** A program of the host, as shell text. */
  program(name: string, text: string): void {
    writeFileSync(join(this.folder, "bin", name), `#!/bin/sh\n${text}\n`, { mode: 0o755 });
  }

  /** Where a path of the host really lies. */
  real(path: string): string {
    return join(this.#root, path);
  }

  write(path: string, text: string): void {
    const file = this.real(path);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, text);
  }

  read(path: string): string | undefined {
    const file = this.real(path);
    return existsSync(file) ? readFileSync(file, "utf8") : undefined;
  }

  delete(path: string): void {
    rmSync(this.real(path), { recursive: true });
  }

  mode(path: string): number {
    return statSync(this.real(path)).mode & 0o777;
  }

  /** A file of the stand-ins. */
  told(name: string): string {
    const file = join(this.folder, name);
    return existsSync(file) ? readFileSync(file, "utf8") : "";
  }

  /** All that a setup leaves on the host. */
  left(): string[] {
    const below = (top: string) =>
      existsSync(this.real(top)) && statSync(this.real(top)).isDirectory()
        ? readdirSync(this.real(top)).map((name) => `${top}/${name}`)
        : [];
    return ["/etc/lvm-nbd", "/etc/modules-load.d", "/etc/lvm", "/run"]
      .flatMap(below)
      .filter((path) => !/^\/(etc\/lvm\/lvm(local)?\.conf|run\/lvm-nbd(-packages)?\.lock)$/.test(path))
      .sort();
  }

  get changes(): RemoteCommand[] {
    return this.commands.filter(({ kind }) => kind === "change");
  }

  override kill(at: Kill | undefined): void {
    this.#down = false;
    super.kill(at);
  }

  async run(command: RemoteCommand): Promise<CommandResult> {
    if (this.#down) throw new LvmNbdError("HOST_UNREACHABLE", { message: "it is gone" });
    this.commands.push(command);
    const result = await this.execute(command);
    this.#down = result === undefined;
    if (result === undefined) throw new LvmNbdError("LINK_LOST", { message: "the script was killed" });
    return { ...result, stdout: outside(result.stdout, this.#root) };
  }

  protected inside(text: string): string {
    return text.replace(inside, `${this.#root}/`);
  }

  protected override environment(stepping: boolean): NodeJS.ProcessEnv {
    const { PATH, ...rest } = super.environment(stepping);
    const own = (PATH ?? "").split(":").filter((folder) => folder.startsWith(this.folder));
    return { ...rest, PATH: [...own, join(this.folder, "tools")].join(":"), ROOT: this.#root };
  }

  #tool(name: string): void {
    const found = spawnSync("sh", ["-c", `command -v ${name}`])
      .stdout.toString()
      .trim();
    symlinkSync(found, join(this.folder, "tools", name));
  }
}
