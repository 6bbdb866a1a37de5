/**
 * A host on which the scripts of a copy run in a real shell, in a folder of their own: systemd, the NBD tools and
 * findmnt are stand-ins of a few lines, everything else is the machine's. For cuts that a lab cannot make one by one.
 */
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { LvmNbdError } from "../../provider/core/errors.js";
import { checkDeviceScript, deviceNodeFunction } from "../../provider/linux/deviceCopy.js";
import { holdersScript } from "../../provider/linux/holders.js";
import { zeroRangesScript } from "../../provider/linux/zeroRanges.js";
import type { CommandResult, Host, RemoteCommand } from "../../provider/ssh/types.js";
import { lvmStandIns } from "./lvmStandIns.js";
import { ShellHost } from "./shellHost.js";

/**
 * Their switches: `hold` (copying waits), `ends-meanwhile` (until the next look at a unit), `broken` (copying fails with these words), `reread` (what the source serves the
 * second time), `broken-reread` (it breaks off then), `hold-reread` (it waits then), `filesystem`, `type` (the file system's), `name` (the host's),
 * `no-nbd-plugin` and `no-extentlist` (nbdkit is without them). Of a copy onto a device the
 * second time is the first.
 */
const standIns: Readonly<Record<string, string>> = {
  // Units are process groups; their pids lie in units/.
  "systemd-run": `
    unit=; while :; do case $1 in --unit=*) unit=\${1#--unit=}; shift;; -p) shift 2;; -*) shift;; *) break;; esac; done
    [ ! -e "$SANDBOX/no-units" ] || { echo "Failed to start transient service unit" >&2; exit 1; }
    echo "$unit" >>"$SANDBOX/started"
    setsid "$@" >"$SANDBOX/units/$unit.log" 2>&1 </dev/null 9>&- &
    echo $! >"$SANDBOX/units/$unit.pid"`,
  systemctl: `
    verb=$1; shift; value=no; what=
    while :; do case $1 in -p) what="$what $2"; shift 2;; --value) value=yes; shift;; *) unit=$1; break;; esac; done
    pid=$(cat "$SANDBOX/units/$unit.pid" 2>/dev/null)
    alive() { [ -n "$pid" ] && grep -qs '^State:[^Z]*$' "/proc/$pid/status"; }
    case $verb in
      show) if [ -e "$SANDBOX/ends-meanwhile" ]; then rm -f "$SANDBOX/hold" "$SANDBOX/ends-meanwhile"; while alive; do sleep 0.02; done; fi
        if alive; then state=active; else state=inactive; fi
        if [ $value = yes ]; then echo $state; else echo ActiveState=$state; echo CPUUsageNSec=1; fi;;
      stop) alive && kill -KILL "-$pid"; for try in $(seq 250); do alive || break; sleep 0.02; done; rm -f "$SANDBOX/units/$unit.pid";;
    esac`,
  journalctl: `cat "$SANDBOX"/units/*.log 2>/dev/null; exit 0`,
  losetup: ``,
  uname: `
    if [ "$1" = -n ] && [ -e "$SANDBOX/name" ]; then exec cat "$SANDBOX/name"; fi
    PATH=\${PATH#*:} exec uname "$@"`,
  // All is root's, and nobody else can change the folders down to that of the images, whoever runs this.
  stat: `
    case "$1 $2" in
      "-c %u") echo 0; exit;;
      "-c %u %A") case $3 in "$SANDBOX"/disk/*|.) set -- "$1" "0 %A" "$3";; *) echo "0 drwxr-xr-x"; exit;; esac;;
      "-f "*) if [ -e "$SANDBOX/type" ]; then exec cat "$SANDBOX/type"; fi;;
    esac
    PATH=\${PATH#*:} exec stat "$@"`,
  // Nothing here loses its power.
  sync: `for file; do [ -e "$file" ] || exit 1; done`,
  ip: `echo "10.0.0.1 dev eth0 src 10.0.0.2 uid 0"`,
  findmnt: `cat "$SANDBOX/filesystem"`,
  nbdinfo: `[ -e "$SANDBOX/source" ] || { echo "cannot connect" >&2; exit 1; }; stat -c %s "$SANDBOX/source"`,
  nbdcopy: `
    for target; do :; done
    [ "$target" != --version ] || { echo "nbdcopy 1.14.2"; exit; }
    [ -e "$SANDBOX/source" ] || { echo "cannot connect" >&2; exit 1; }
    if [ "$target" = - ]; then while [ -e "$SANDBOX/hold-reread" ]; do sleep 0.02; done; fi
    if [ "$target" = - ] && [ -e "$SANDBOX/broken-reread" ]; then head -c 100 "$SANDBOX/source"; exit 1; fi
    if [ "$target" = - ]; then cat "$SANDBOX/$([ -e "$SANDBOX/reread" ] && echo reread || echo source)"; exit; fi
    source=\${SERVED:-$SANDBOX/source}
    echo 50/100 >&3
    while [ -e "$SANDBOX/hold" ]; do sleep 0.02; done
    [ ! -e "$SANDBOX/broken" ] || { cat "$SANDBOX/broken" >&2; echo half | dd of="$target" conv=notrunc status=none; exit 1; }
    case $target in
      */dev/*) [ "$(stat -c %s "$source")" -le "$(stat -c %s "$target")" ] && dd if="$source" of="$target" bs=64K conv=notrunc status=none;;
      *) cp --sparse=always "$source" "$target";;
    esac`,
  // What the list of extents calls a hole, or does not tell of, nobody asks the source for, and takes for zero.
  nbdkit: `
    printf '%s\\n' "$*" >>"$SANDBOX/nbdkit"
    if [ "$1" = --dump-plugin ]; then [ ! -e "$SANDBOX/no-nbd-plugin" ]; exit; fi
    list= inner= uri=nbd+unix:///stand-in
    while [ $# -gt 0 ]; do
      case $1 in
        --filter=extentlist) [ ! -e "$SANDBOX/no-extentlist" ] || { echo "nbdkit: no such filter" >&2; exit 1; };;
        extentlist=*) list=\${1#extentlist=};;
        --run) inner=$2;;
      esac
      shift
    done
    if [ -n "$list" ] && [ "$inner" != true ]; then
      cp "$list" "$SANDBOX/list" || exit 1
      SERVED=$SANDBOX/served; export SERVED
      rm -f "$SERVED"; truncate -s "$(stat -c %s "$SANDBOX/source")" "$SERVED"
      while read -r at length hole; do
        [ -n "$hole" ] || dd if="$SANDBOX/source" of="$SERVED" bs=64K iflag=skip_bytes,count_bytes oflag=seek_bytes skip="$at" seek="$at" count="$length" conv=notrunc status=none || exit
      done <"$list"
    fi
    export uri; exec sh -c "$inner"`,
  "qemu-img": `
    [ "$1" != --version ] || { echo "qemu-img version 7.2.22"; exit; }
    echo "    (50.00/100%)"
    for target; do :; done
    exec nbdcopy "$target" 3>/dev/null`,
  ...lvmStandIns,
};

/** Programs before and after which a script can be killed. */
const steps = [
  ...["cat", "ls", "mkdir", "mv", "rm", "rmdir", "sync", "systemctl", "systemd-run"],
  ...["lvchange", "lvcreate", "lvremove", "lvrename"],
];

/** What a host keeps, as opposed to what it is. */
const savedParts = ["disk", "run", "units", "source", "started", "filesystem", "lvm", "dev", "extents"];

function isAlive(pid: string): boolean {
  try {
    return /^State:\s*[^Z\s]/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch (error) {
    if (error instanceof Error && "code" in error && (error.code === "ENOENT" || error.code === "ESRCH"))
      return false;
    throw error;
  }
}

export class CopyHost extends ShellHost implements Host {
  readonly commands: RemoteCommand[] = [];
  /** Called with each command before it runs; may throw. What it returns is called when the command has run. */
  onCommand: (command: RemoteCommand, index: number) => undefined | (() => void) = () => undefined;
  /** Called before the source is read on its own host; may throw. */
  onSource: () => void = () => undefined;
  /** What reading the first sector there comes to, before a copy is begun; may throw. */
  onFirstSector: () => string | Partial<CommandResult> = () => `${"0".repeat(64)}\n`;
  /** What the look there for what is empty comes to; may throw. Unless set as where there is no perl. */
  onScan: () => string | Partial<CommandResult> = () => "";
  /** Where images go. */
  readonly disk: string;
  /** What `holdersScript` prints. */
  holders = "";
  #cutInput = false;

  constructor(readonly name = "server2") {
    super("copy", standIns, steps);
    this.disk = join(this.folder, "disk");
    for (const part of ["units", "etc", "run", "disk", "lvm", "dev"]) mkdirSync(join(this.folder, part));
    this.set("filesystem", "1111-2222\n");
    this.set("extents", "100\n");
  }

  /** What the export serves; `undefined` when nothing answers. */
  serve(content: string | undefined): void {
    this.set("source", content);
  }

  /** What the source's host prints for a script that only a copy from a snapshot runs there; `undefined` of any other. */
  sourceAnswer({ argv }: RemoteCommand): string | Partial<CommandResult> | undefined {
    if (argv[2] === zeroRangesScript) return this.onScan();
    if (argv[2] !== checkDeviceScript) return undefined;
    if (argv[5] === "512") return this.onFirstSector();
    this.onSource();
    return this.servedSum();
  }

  /** What is really found where a snapshot has this content. */
  scanOf(content: string): string {
    const file = join(this.folder, "scanned");
    writeFileSync(file, content);
    const argv = ["-c", this.inside(zeroRangesScript), "sh", file, String(Buffer.byteLength(content))];
    const { status, stdout, stderr } = spawnSync("sh", argv, { encoding: "utf8" });
    if (status !== 0) throw new Error(stderr);
    return stdout;
  }

  /** Each call of nbdkit. */
  get nbdkitCalls(): string[] {
    const list = join(this.folder, "nbdkit");
    return existsSync(list) ? readFileSync(list, "utf8").trim().split("\n") : [];
  }

  /** Of how many bytes the source was asked by the last copy that knew what of it is empty; `undefined` if none did. */
  get bytesAsked(): number | undefined {
    const list = join(this.folder, "list");
    if (!existsSync(list)) return undefined;
    const data = readFileSync(list, "utf8")
      .trim()
      .split("\n")
      .map((line) => line.split(" "));
    return data.reduce((sum, [, length, hole]) => sum + (hole === undefined ? Number(length) : 0), 0);
  }

  /** SHA-256 of what is served, the second time where that is another, as a script prints it. */
  servedSum(): string {
    const [again = "", first = ""] = ["reread", "source"].map((file) => join(this.folder, file));
    const served = readFileSync(existsSync(again) ? again : first);
    return `${createHash("sha256").update(served).digest("hex")}\n`;
  }

  /** An export of an image is up, to which no client is connected. */
  exportImage(unit: string, file: string): void {
    writeFileSync(join(this.folder, "etc", unit), `[Unit]\n\n[X-LvmNbd]\nMark=m\nFile=${file}\n`);
    const { pid } = spawn("sleep", ["1000"], { detached: true, stdio: "ignore" });
    writeFileSync(join(this.folder, "units", `${unit}.pid`), `${pid}`);
  }

  /** The link breaks while the next command's input is on its way. */
  cutInput(): void {
    this.#cutInput = true;
  }

  /** How many jobs were started. */
  get started(): number {
    const list = join(this.folder, "started");
    return existsSync(list) ? readFileSync(list, "utf8").trim().split("\n").length : 0;
  }

  /** Waits until no job runs but those that `hold` keeps. */
  async jobsEnd(): Promise<void> {
    const units = join(this.folder, "units");
    const pids = () => readdirSync(units).filter((file) => file.endsWith(".pid"));
    const runs = (file: string) => isAlive(readFileSync(join(units, file), "utf8").trim());
    while (!existsSync(join(this.folder, "hold")) && pids().some(runs)) await delay(5);
  }

  /** So many hours have passed since any job did something. */
  waited(hours: number): void {
    const then = Date.now() / 1000 - hours * 3600;
    const run = join(this.folder, "run");
    for (const file of readdirSync(run, { recursive: true })) utimesSync(join(run, String(file)), then, then);
  }

  /** The volumes of the group, by name. */
  volumes(): string[] {
    return readdirSync(join(this.folder, "lvm"))
      .filter((name) => !name.startsWith("."))
      .sort();
  }

  /** A file of a volume's: `tags`, a line each; `uuid`; `extents`; `open` if somebody has it open; `inactive`; `merging` if a snapshot is merged into it. */
  volume(
    name: string,
    part: "tags" | "uuid" | "extents" | "open" | "ro" | "origin" | "inactive" | "merging",
  ): string {
    return join(this.folder, "lvm", name, part);
  }

  /** The file that is a volume's device. */
  device(name: string): string {
    return join(this.folder, "dev", "VgVm", name);
  }

  /** All that lies where copies are made, as paths from there. */
  left(): string[] {
    const files = readdirSync(this.disk, { recursive: true }).map(String);
    const runs = readdirSync(join(this.folder, "run")).filter(
      // Locks.
      (file) => file !== "lvm-nbd.lock" && !file.startsWith("lvm-nbd-restore."),
    );
    return [...files, ...runs.map((file) => `/run/${file}`)].sort();
  }

  /** Keeps what is there, for `restore`; nothing may run. */
  save(): void {
    rmSync(join(this.folder, "saved"), { recursive: true, force: true });
    mkdirSync(join(this.folder, "saved"));
    this.#copy(this.folder, join(this.folder, "saved"));
  }

  /** Ends what runs, and brings back what `save` kept, as if nothing had happened since. */
  restore(): void {
    this.#stopUnits();
    for (const part of savedParts) rmSync(join(this.folder, part), { recursive: true, force: true });
    for (const name of ["hold", "broken", "reread", "broken-reread", "hold-reread"])
      this.set(name, undefined);
    this.#copy(join(this.folder, "saved"), this.folder);
    this.kill(undefined);
    this.commands.length = 0;
    this.onCommand = () => undefined;
    this.holders = "";
  }

  #copy(from: string, to: string): void {
    const parts = savedParts.map((part) => join(from, part)).filter((path) => existsSync(path));
    const { status, stderr } = spawnSync("cp", ["-a", ...parts, to]);
    if (status !== 0) throw new Error(`cp: ${stderr}`);
  }

  /** Ends what runs, and what does not outlive that. */
  reboot(): void {
    this.#stopUnits();
    rmSync(join(this.folder, "run"), { recursive: true });
    mkdirSync(join(this.folder, "run"));
  }

  override close(): void {
    this.#stopUnits();
    super.close();
  }

  #stopUnits(): void {
    for (const file of readdirSync(join(this.folder, "units")).filter((one) => one.endsWith(".pid"))) {
      const unit = file.slice(0, -".pid".length);
      spawnSync(join(this.folder, "bin", "systemctl"), ["stop", unit], { env: this.environment(false) });
    }
  }

  async run(command: RemoteCommand, signal?: AbortSignal): Promise<CommandResult> {
    const after = this.onCommand(command, this.commands.push(command) - 1);
    if (signal?.aborted) throw new LvmNbdError("CANCELLED", { message: "cancelled" });
    // It looks at the kernel's devices, of which there are none here.
    if (command.argv[2] === holdersScript) return { exitCode: 0, stdout: this.holders, stderr: "" };
    const isCut = this.#cutInput;
    this.#cutInput = false;
    const result = await this.execute(command, isCut);
    after?.();
    if (result === undefined) throw new LvmNbdError("LINK_LOST", { message: "the script was killed" });
    return result;
  }

  protected inside(text: string): string {
    return (
      text
        .replaceAll("/etc/systemd/system", `${this.folder}/etc`)
        .replaceAll("/run/lvm-nbd", `${this.folder}/run/lvm-nbd`)
        .replaceAll("/dev/VgVm/", `${this.folder}/dev/VgVm/`)
        // Its volumes are files.
        .replaceAll(deviceNodeFunction, "device_node() { node=$1; }\n")
    );
  }
}
