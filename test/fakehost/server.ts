/** A fake server: files, processes, LVM, systemd and NBD in memory. Several share a network and a clock. */
import { ownDirective } from "../../provider/linux/systemd.js";
import { FileTree } from "./files.js";
import { FakeLvm, type Volume } from "./lvm.js";
import { type Clock, Machine, type Process, type Running, type Tool } from "./machine.js";
import { FakeNbd } from "./nbd.js";
import type { Network } from "./network.js";
import { sh } from "./shell.js";
import { FakeSystemd } from "./systemd.js";
import { plainTools } from "./tools.js";

export class FakeServer {
  readonly files = new FileTree();
  readonly machine: Machine;
  readonly lvm: FakeLvm;
  readonly nbd: FakeNbd;
  readonly systemd: FakeSystemd;
  /** What is done in place of scripts, by their text. */
  readonly scripts = new Map<string, Tool>();

  constructor(
    readonly name: string,
    readonly address: string,
    private readonly network: Network,
    clock: Clock,
  ) {
    const tools = plainTools();
    tools.set("sh", (process) => (this.scripts.get(process.argv[2] ?? "") ?? sh)(process));
    this.machine = new Machine(this.files, tools, clock);
    this.lvm = new FakeLvm(this.machine, (volume) => this.isOpen(volume));
    this.nbd = new FakeNbd(this.machine, network, address, (pid) => {
      const unit = this.systemd.byPid(pid);
      if (unit !== undefined) this.systemd.died(unit);
    });
    this.systemd = new FakeSystemd(this.machine, network, address, this.nbd, {
      size: (path) => this.size(path),
      read: (path) => this.read(path),
    });
    for (const model of [this.lvm, this.nbd, this.systemd])
      for (const [name, tool] of model.tools()) tools.set(name, tool);
    for (const [name, tool] of this.ownTools()) tools.set(name, tool);
    for (const program of ["nbdkit", "nbd-server", "qemu-nbd"]) tools.set(program, notByHand);
    this.directories();
    this.files.write("/etc/machine-id", `${name.replace(/\D/g, "").padStart(32, "c")}\n`);
  }

  /** Everything that runs ends at once, then the server comes up again. Disks keep what they hold. */
  reboot(): void {
    this.network.of(this.address).clear();
    this.machine.processes.clear();
    this.machine.background.clear();
    for (const path of ["/run", "/sys", "/proc"]) this.files.removeTree(path);
    for (const name of this.files.list("/dev")) if (name !== "null") this.files.removeTree(`/dev/${name}`);
    this.nbd.forget();
    this.directories();
    this.lvm.boot();
    if (this.files.exists("/etc/modules-load.d/lvm-nbd.conf")) this.nbd.loadModule();
    this.systemd.boot();
  }

  /** Ends a server program or client, as `kill -9`. */
  kill(unitName: string): void {
    const unit = this.systemd.units.get(unitName);
    if (unit === undefined || unit.mainPid === 0) return;
    const link = [...this.nbd.links].find(([, { pid }]) => pid === unit.mainPid)?.[0];
    // The end of a link ends the unit whose process it was.
    if (link === undefined) this.systemd.died(unit);
    else this.nbd.disconnect(link);
  }

  size(path: string): number | undefined {
    const volume = this.volume(path);
    if (volume !== undefined)
      return volume.active ? (volume.origin?.sizeBytes ?? volume.sizeBytes) : undefined;
    return this.nbd.links.get(this.deviceName(path))?.size;
  }

  read(path: string): string | undefined {
    const volume = this.volume(path);
    return volume === undefined ? this.nbd.read(this.deviceName(path)) : this.lvm.read(volume);
  }

  private directories(): void {
    for (const path of [
      "/run/lock",
      "/etc/systemd/system",
      "/etc/udev/rules.d",
      "/proc/1/fd",
      "/sys/block",
      "/sys/class/block",
    ])
      this.files.mkdirs(path);
    this.files.write("/proc/1/mountinfo", "");
    this.files.write("/proc/version", "Linux version 6.1\n");
    this.files.write("/proc/cmdline", "quiet\n");
    this.files.write("/proc/swaps", "Filename Type Size Used Priority\n");
  }

  private deviceName(path: string): string {
    return this.files.kind(path) === "block" ? this.files.blockId(path) : "";
  }

  private volume(path: string): Volume | undefined {
    return this.lvm.device(this.deviceName(path));
  }

  /** A volume is open while a client reads its export: the servers open it for each connection. */
  isOpen(volume: Volume): boolean {
    const device = `dm-${volume.minor}`;
    if (this.files.read("/proc/1/mountinfo").includes(` 253:${volume.minor} `)) return true;
    return [...this.network.of(this.address)].some((listener) => {
      if (!this.network.readers.has(listener)) return false;
      const unit = this.systemd.byPid(listener.pid);
      return unit !== undefined && this.deviceName(ownDirective(unit.text ?? "", "Device") ?? "") === device;
    });
  }

  private ownTools(): [string, Tool][] {
    return [
      ["blockdev", (process) => this.blockdev(process)],
      ["dmsetup", (process) => this.dmsetup(process)],
      ["dd", (process) => this.dd(process)],
      ["ss", (process) => this.ss(process)],
      ["ip", (process) => this.ip(process)],
      ["udevadm", () => 0],
      [
        "seq",
        (process) => {
          const [from = 0, to = 0] = process.argv.slice(1).map(Number);
          for (let number = from; number <= to; number++) process.out(`${number}\n`);
          return 0;
        },
      ],
    ];
  }

  private blockdev(process: Process): number {
    const path = process.argv.at(-1) ?? "";
    const size = this.size(path);
    if (size === undefined) {
      process.err(`blockdev: cannot open ${path}: No such device or address\n`);
      return 1;
    }
    if (process.argv[1] === "--getsize64") process.out(`${size}\n`);
    else if (process.argv[1] === "--getro") process.out(this.volume(path)?.readOnly ? "1\n" : "0\n");
    else throw new Error(`blockdev ${process.argv.join(" ")}`);
    return 0;
  }

  private dmsetup(process: Process): number {
    const volume = this.volume(process.argv.at(-1) ?? "");
    const found = this.lvm.all().find((one) => one.volume === volume);
    if (found === undefined) return 1;
    process.out(`${found.group}/${found.volume.name}\n`);
    return 0;
  }

  private *dd(process: Process): Running<number> {
    const path = process.argv.find((argument) => argument.startsWith("if="))?.slice(3) ?? "";
    if (this.read(path) !== undefined) return 0;
    yield process.wait({});
    process.err(`dd: error reading '${path}': Input/output error\n`);
    return 1;
  }

  private ss(process: Process): number {
    const port = Number(/:(\d+)/.exec(process.argv.at(-1) ?? "")?.[1]);
    const there = [...this.network.of(this.address)].filter((listener) => listener.port === port);
    if (process.argv.includes("established")) {
      for (const listener of there)
        if (this.network.readers.has(listener))
          process.out(`0 0 ${listener.address}:${port} 10.0.0.9:41234\n`);
      return 0;
    }
    for (const { address, pid, program } of there)
      process.out(`0 16 ${address}:${port} 0.0.0.0:* users:(("${program}",pid=${pid},fd=3))\n`);
    return 0;
  }

  private ip(process: Process): number {
    const address = process.argv.at(-1) ?? "";
    const own = address === this.address || address.startsWith("127.");
    if (process.argv.includes("addr") && own) process.out(`2: eth0 inet ${address}/24 scope global eth0\n`);
    if (process.argv.includes("route")) process.out(`local ${address} dev lo src ${address} uid 0\n`);
    return 0;
  }
}

function notByHand({ argv }: Process): number {
  throw new Error(`only units run ${argv.join(" ")}`);
}
