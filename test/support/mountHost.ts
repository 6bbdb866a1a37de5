/**
 * A host on which the scripts of a mount run in a real shell, in a folder of their own: systemd, the kernel's list of
 * mounts, blkid and partx are stand-ins of a few lines, everything else is the machine's.
 */
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { LvmNbdError } from "../../provider/core/errors.js";
import { renderAttachUnit } from "../../provider/linux/attachUnit.js";
import type { CommandResult, Host, RemoteCommand } from "../../provider/ssh/types.js";
import { type Kill, outside, ShellHost } from "./shellHost.js";

/** Their switches: `attached`, `dead`, `busy`, `refused`, `no-module`, `theirs`. */
const standIns: Readonly<Record<string, string>> = {
  // A mount unit is active while its path is in the list of mounts. "loaded" is systemd's view of the files.
  systemctl: `
    verb=$1; shift; asked= value=no unit=
    while [ $# -gt 0 ]; do case $1 in -p) asked="$asked $2"; shift;; --value) value=yes;; -*) ;; *) unit=$1;; esac; shift; done
    units=$ROOT/etc/systemd/system file=$ROOT/etc/systemd/system/$unit loaded=$SANDBOX/loaded
    reload() { rm -rf "$loaded"; mkdir "$loaded"; for one in "$units"/*.mount; do [ ! -e "$one" ] || cp "$one" "$loaded"; done; }
    where=$(sed -n 's/^Where=//p' "$loaded/$unit" "$file" 2>/dev/null | head -n 1)
    [ -n "$where" ] || where=$(cat "$SANDBOX/where")
    mounted() { awk -v w="$where" '$5 == w { f = 1 } END { exit !f }' "$ROOT/proc/1/mountinfo"; }
    case $verb in
      daemon-reload) reload;;
      enable) reload; for target in $(sed -n 's/^WantedBy=//p' "$file"); do mkdir -p "$units/$target.wants"; ln -sf "$file" "$units/$target.wants/$unit"; done;;
      disable) rm -f "$units"/*.wants/"$unit"; find "$units" -name '*.wants' -empty -delete;;
      # As systemd, which waits for the unit of a device that it knows to be mounted.
      start) mounted && { echo "A dependency job for $unit failed." >&2; exit 1; }
        [ ! -e "$SANDBOX/refused" ] || { echo "Job for $unit failed." >&2; exit 1; }
        mkdir -p "$where"
        echo "1 1 0:1 / $where ro,nosuid,nodev,noexec - $(sed -n 's/^Type=//p' "$loaded/$unit") $(sed -n 's/^MountedDevice=//p' "$loaded/$unit") ro" >>"$ROOT/proc/1/mountinfo";;
      stop) mounted || exit 0
        [ ! -e "$SANDBOX/busy" ] || { echo "umount: target is busy" >&2; exit 1; }
        awk -v w="$where" '{ l[NR] = $0; if ($5 == w) last = NR } END { for (i = 1; i <= NR; i++) if (i != last) print l[i] }' "$ROOT/proc/1/mountinfo" >"$SANDBOX/mountinfo"
        cat "$SANDBOX/mountinfo" >"$ROOT/proc/1/mountinfo";;
      show) for property in $asked; do
          case $property:$unit in
            ActiveState:lvm-nbd-attach-*) answer=$(cat "$SANDBOX/attached");;
            ActiveState:*) answer=inactive; mounted && answer=active;;
            UnitFileState:*) answer=disabled; [ ! -L "$units/multi-user.target.wants/$unit" ] || answer=enabled;;
            NeedDaemonReload:*) answer=no; [ ! -e "$loaded/$unit" ] || cmp -s "$loaded/$unit" "$file" || answer=yes;;
            DropInPaths:*) answer=; [ ! -d "$file.d" ] || answer="$file.d";;
            FragmentPath:*) answer=; [ ! -e "$loaded/$unit" ] || answer=$file;;
          esac
          if [ $value = yes ]; then echo "$answer"; else echo "$property=$answer"; fi
        done;;
    esac`,
  blkid: `
    offset=; for last; do [ "$previous" != -O ] || offset=@$last; previous=$last; done
    [ -e "$SANDBOX/content/\${last##*/}$offset" ] || exit 2
    cat "$SANDBOX/content/\${last##*/}$offset"`,
  partx: `cat "$SANDBOX/table" 2>/dev/null`,
  dd: `[ ! -e "$SANDBOX/dead" ]`,
  // Root's are all folders but the one that this switch names.
  stat: `
    for folder; do :; done
    if [ "$folder" = "$(cat "$SANDBOX/theirs" 2>/dev/null)" ]; then owner="1000 alice,"; else owner="0 root,"; fi
    case $2 in %u*) echo "\${owner%% *} drwxr-xr-x";; *) echo "\${owner#* } drwxr-xr-x";; esac`,
  journalctl: "echo 'what the unit said'",
  modprobe: "[ ! -e $SANDBOX/no-module ]",
};

/** Programs before and after which a script can be killed. */
const steps = ["cat", "mkdir", "mv", "rm", "rmdir", "sync", "systemctl"];

/** Paths of the host that lie in the folder. */
const inside =
  /(?<![\w/.])\/(?=etc\/systemd\/system|etc\/fstab|proc\/1\/mountinfo|proc\/filesystems|run\/lvm-nbd|dev\/nbd|dev\/lvm-nbd|sys\/class\/block|sys\/fs\/btrfs|mnt|srv)/g;

export class MountHost extends ShellHost implements Host {
  readonly name = "server2";
  readonly commands: RemoteCommand[] = [];
  /** Called when a command has run; may throw. */
  afterCommand: (command: RemoteCommand, index: number) => void = () => undefined;
  #down = false;
  readonly #root: string;

  /** `path`: the mount point that is tested. vm1 is attached as /dev/nbd0. */
  constructor(path = "/mnt/vm1") {
    super("mount", standIns, steps);
    this.#root = join(this.folder, "root");
    for (const folder of ["content", "loaded"]) mkdirSync(join(this.folder, folder));
    this.set("attached", "active\n");
    this.set("where", join(this.#root, path));
    for (const folder of ["mnt", "srv", "run", "sys/fs/btrfs"])
      mkdirSync(join(this.#root, folder), { recursive: true });
    this.write("/proc/1/mountinfo", "1 1 0:1 / / rw - ext4 /dev/vda rw\n");
    this.write("/proc/filesystems", "nodev\ttmpfs\n\text4\n\txfs\n\tbtrfs\n");
    this.attach("vm1", "/dev/nbd0");
  }

  attach(name: string, device: string): void {
    const [disk, where] = [join(this.#root, device), join(this.#root, "/dev/lvm-nbd", name)];
    this.write(device, "");
    mkdirSync(dirname(where), { recursive: true });
    rmSync(where, { force: true });
    symlinkSync(disk, where);
    const plan = { owner: "o/p/s/a", name, server: "10.0.0.1", port: 10809, exportName: name, device };
    const options = { readOnly: true, connections: 1, timeoutSeconds: 30, blockSize: 512 };
    this.write(
      `/etc/systemd/system/lvm-nbd-attach-${name}.service`,
      renderAttachUnit({ ...plan, ...options }),
    );
  }

  /** What blkid says of a device, e.g. `nbd0`, or of what lies at an offset of it, e.g. `nbd0@1048576`. */
  holds(what: string, content: string | undefined): void {
    this.set(join("content", what), content);
  }

  /** Partitions: number, start and sectors; `known` to the kernel as well. */
  partitions(table: string | undefined, known = true): void {
    this.set("table", table);
    for (const line of known ? (table ?? "").trim().split("\n") : []) {
      const [number, start, sectors] = line.split(" ");
      this.write(`/dev/nbd0p${number}`, "");
      this.write(`/sys/class/block/nbd0p${number}/start`, `${start}\n`);
      this.write(`/sys/class/block/nbd0p${number}/size`, `${sectors}\n`);
    }
  }

  /** Where a path of the host really lies. */
  real(path: string): string {
    return join(this.#root, path);
  }

  write(path: string, text: string): void {
    const file = this.real(path);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, this.inside(text));
  }

  read(path: string): string | undefined {
    const file = this.real(path);
    return existsSync(file) ? readFileSync(file, "utf8").replaceAll(this.#root, "") : undefined;
  }

  /** Mounts behind the provider's back. */
  mount(path: string, source: string, options = "rw"): void {
    this.write(
      "/proc/1/mountinfo",
      `${this.read("/proc/1/mountinfo")}1 1 0:1 / ${path} ${options} - ext4 ${source} ${options.split(",")[0]}\n`,
    );
  }

  unmount(path: string): void {
    const lines = (this.read("/proc/1/mountinfo") ?? "").split("\n");
    const last = lines.findLastIndex((line) => line.includes(` / ${path} `));
    this.write("/proc/1/mountinfo", lines.filter((_, at) => at !== last).join("\n"));
  }

  /** What is mounted, but the root: `SOURCE PATH OPTIONS`. */
  get mounts(): string[] {
    return (this.read("/proc/1/mountinfo") ?? "")
      .trim()
      .split("\n")
      .slice(1)
      .map((line) => line.replace(/^1 1 0:1 \/ (\S+) (\S+) - \S+ (\S+) \S+$/, "$3 $1 $2"));
  }

  /** All that a mount leaves on the host: units, links, folders. */
  left(): string[] {
    const units = readdirSync(this.real("/etc/systemd/system"), { recursive: true }).map(String);
    const folders = ["mnt", "srv"].flatMap((top) =>
      readdirSync(join(this.#root, top), { recursive: true }).map((name) => `/${top}/${name}`),
    );
    return [...units.filter((name) => !/^lvm-nbd-attach-[^/]*\.service$/.test(name)), ...folders].sort();
  }

  /** From now on a script is killed there, and the host is gone after that; `undefined`: none, and it is there again. */
  override kill(at: Kill | undefined): void {
    this.#down = false;
    super.kill(at);
  }

  async run(command: RemoteCommand): Promise<CommandResult> {
    if (this.#down) throw new LvmNbdError("HOST_UNREACHABLE", { message: "it is gone" });
    const index = this.commands.push(command) - 1;
    const result = await this.execute(command);
    this.#down = result === undefined;
    if (result === undefined) throw new LvmNbdError("LINK_LOST", { message: "the script was killed" });
    this.afterCommand(command, index);
    return { ...result, stdout: outside(result.stdout, this.#root) };
  }

  protected inside(text: string): string {
    return text.replace(inside, `${this.#root}/`);
  }

  protected override environment(stepping: boolean): NodeJS.ProcessEnv {
    return { ...super.environment(stepping), ROOT: this.#root };
  }
}
