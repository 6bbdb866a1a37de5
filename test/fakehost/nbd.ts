/** NBD on a fake server: the kernel's devices, the client's tools, and what a server program makes of its arguments. */
import { parseNbdUri } from "../../provider/linux/nbd.js";
import type { Machine, Process, Running, Tool } from "./machine.js";
import type { Answer, Endpoint, Listener, Network } from "./network.js";

const deviceCount = 16;

/** A connected device. */
interface Link {
  readonly pid: number;
  readonly listener: Listener;
  readonly readOnly: boolean;
  readonly size: number;
}

export class FakeNbd {
  /** By kernel name, e.g. `nbd0`. */
  readonly links = new Map<string, Link>();
  /** Devices that somebody else has connected. */
  readonly others = new Set<string>();

  constructor(
    private readonly machine: Machine,
    private readonly network: Network,
    private readonly address: string,
    /** Told when a link has ended. */
    private readonly ended: (pid: number) => void,
  ) {}

  loadModule(): void {
    const { files } = this.machine;
    if (files.exists("/sys/module/nbd")) return;
    files.mkdirs("/sys/module/nbd");
    for (let index = 0; index < deviceCount; index++) {
      const name = `nbd${index}`;
      files.block(`/dev/${name}`, name);
      for (const folder of [`/sys/block/${name}`, `/sys/class/block/${name}`]) {
        files.mkdirs(`${folder}/holders`);
        files.write(`${folder}/dev`, `43:${index * 16}\n`);
        files.write(`${folder}/size`, "0\n");
        files.write(`${folder}/ro`, "0\n");
      }
    }
  }

  /** Connects a device; false when the device is busy or the export does not answer. */
  connect(name: string, pid: number, endpoint: Endpoint, readOnly: boolean, blockSize: number): boolean {
    const { files } = this.machine;
    if (this.links.has(name) || this.others.has(name) || !files.exists(`/sys/block/${name}`)) return false;
    const answer = this.network.connect(this.address, endpoint);
    if (!("listener" in answer)) return false;
    const { listener } = answer;
    const size = listener.size() ?? 0;
    const whole = size - (size % blockSize);
    this.network.readers.add(listener);
    this.links.set(name, { pid, listener, readOnly: readOnly || listener.readOnly, size: whole });
    files.write(`/sys/block/${name}/size`, `${whole / 512}\n`);
    files.write(`/sys/block/${name}/ro`, readOnly || listener.readOnly ? "1\n" : "0\n");
    files.write(`/sys/block/${name}/pid`, `${pid}\n`);
    return true;
  }

  /** Somebody else's client takes a device. */
  connectAnother(name: string): void {
    this.loadModule();
    this.others.add(name);
    this.machine.files.write(`/sys/block/${name}/size`, "2048\n");
    this.machine.files.write(`/sys/block/${name}/pid`, "99\n");
  }

  /** Mounts what is on a device, or unmounts it. */
  mount(name: string, mounted: boolean): void {
    const { files } = this.machine;
    const numbers = files.read(`/sys/block/${name}/dev`).trim();
    const line = `36 35 ${numbers} / /mnt/${name} ro - ext4 /dev/${name} ro\n`;
    const others = files.read("/proc/1/mountinfo").replace(line, "");
    files.write("/proc/1/mountinfo", mounted ? others + line : others);
  }

  isMounted(name: string): boolean {
    return this.machine.files.read("/proc/1/mountinfo").includes(` /mnt/${name} `);
  }

  disconnect(name: string): void {
    const link = this.links.get(name);
    if (link === undefined) return;
    this.links.delete(name);
    this.network.readers.delete(link.listener);
    const { files } = this.machine;
    files.write(`/sys/block/${name}/size`, "0\n");
    files.write(`/sys/block/${name}/ro`, "0\n");
    files.remove(`/sys/block/${name}/pid`);
    this.ended(link.pid);
  }

  /** The power goes: nothing is told to anybody. */
  forget(): void {
    for (const { listener } of this.links.values()) this.network.readers.delete(listener);
    this.links.clear();
    this.others.clear();
  }

  /** Ends the links whose server has gone. */
  settle(): void {
    for (const [name, { listener }] of [...this.links]) {
      const answer = this.network.connect(this.address, {
        address: listener.address,
        port: listener.port,
        exportName: listener.exportName,
      });
      if (!("listener" in answer) ? answer.failure === "refused" : answer.listener !== listener)
        this.disconnect(name);
    }
  }

  read(name: string): string | undefined {
    const link = this.links.get(name);
    if (link === undefined) return undefined;
    const answer = this.network.connect(this.address, {
      address: link.listener.address,
      port: link.listener.port,
      exportName: link.listener.exportName,
    });
    return "listener" in answer ? link.listener.read() : undefined;
  }

  tools(): [string, Tool][] {
    return [
      ["nbdinfo", (process) => this.nbdinfo(process)],
      ["nbdcopy", (process) => this.nbdcopy(process)],
      ["nbd-client", (process) => this.nbdClient(process)],
      ["modprobe", (process) => this.modprobe(process)],
    ];
  }

  private modprobe({ argv }: Process): number {
    if (argv.at(-1) !== "nbd") throw new Error(`modprobe ${argv.join(" ")}`);
    if (!argv.includes("-n")) this.loadModule();
    return 0;
  }

  private *ask(process: Process, uri: string): Running<Answer> {
    const answer = this.network.connect(this.address, endpointOf(uri));
    if ("failure" in answer && answer.failure === "timeout")
      yield process.wait({ until: process.machine.now() + 120_000 });
    return answer;
  }

  private *nbdinfo(process: Process): Running<number> {
    const { argv } = process;
    const answer = yield* this.ask(process, argv.at(-1) ?? "");
    if (!("listener" in answer)) {
      process.err(`nbdinfo: nbd_connect_uri: ${answer.failure}\n`);
      return 1;
    }
    if (argv[1] === "--size") {
      process.out(`${answer.listener.size()}\n`);
      return 0;
    }
    if (argv[1] === "--is" && argv[2] === "read-only") return answer.listener.readOnly ? 0 : 2;
    throw new Error(`nbdinfo ${argv.join(" ")}`);
  }

  private *nbdcopy(process: Process): Running<number> {
    const answer = yield* this.ask(process, process.argv.at(-2) ?? "");
    const data = "listener" in answer ? answer.listener.read() : undefined;
    if (data === undefined) {
      process.err("nbdcopy: read: Input/output error\n");
      return 1;
    }
    process.out(data.padEnd(4096, "."));
    return 0;
  }

  private nbdClient({ argv }: Process): number {
    if (argv[1] !== "-d") throw new Error(`nbd-client ${argv.join(" ")}`);
    const name = (argv[2] ?? "").replace("/dev/", "");
    // Nothing on a server may do either, whatever it was told.
    if (this.others.has(name)) throw new Error(`somebody else's link ${name} was cut`);
    if (this.isMounted(name)) throw new Error(`${name} was cut beneath a mount`);
    this.disconnect(name);
    return 0;
  }
}

function endpointOf(uri: string): Endpoint {
  const { server, port, exportName } = parseNbdUri(uri);
  return { address: server, port, exportName };
}

/** What a server program is asked to serve. `readFile` reads nbd-server's configuration. */
export function parseServer(
  argv: readonly string[],
  readFile: (path: string) => string,
): (Endpoint & { readonly device: string; readonly readOnly: boolean }) | undefined {
  const after = (option: string) => argv[argv.indexOf(option) + 1] ?? "";
  const setting = (name: string) =>
    argv.find((argument) => argument.startsWith(`${name}=`))?.slice(name.length + 1) ?? "";
  switch (argv[0]) {
    case "nbdkit":
      return {
        address: after("-i"),
        port: Number(after("-p")),
        exportName: setting("exportname"),
        device: setting("file"),
        readOnly: argv.includes("-r"),
      };
    case "qemu-nbd":
      return {
        address: after("-b"),
        port: Number(after("-p")),
        exportName: after("-x"),
        device: argv.at(-1) ?? "",
        readOnly: argv.includes("-r"),
      };
    case "nbd-server": {
      const config = readFile(after("-C"));
      const line = (name: string) => new RegExp(`^${name}=(.*)$`, "m").exec(config)?.[1] ?? "";
      return {
        address: line("listenaddr"),
        port: Number(line("port")),
        exportName: /^\[(?!generic\])(.*)\]$/m.exec(config)?.[1] ?? "",
        device: line("exportname"),
        readOnly: line("readonly") === "true",
      };
    }
    default:
      return undefined;
  }
}
