import { spawn } from "node:child_process";
import { mkdir, open, readFile, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { join, relative } from "node:path";
import type { Accelerator } from "./accelerator.mts";
import { runChild } from "./child.mts";
import type { GuestImage } from "./image.mts";
import { GUESTS, type GuestName, macAddress } from "./image-contents.mts";
import { qmp } from "./qmp.mts";
import { Fatal, waitFor } from "./wait.mts";

/** What every guest machine of an instance has in common. */
export interface MachineSetting {
  image: GuestImage;
  accelerator: Accelerator;
  /** Disks, logs and pid files. */
  directory: string;
  /** Sockets: apart from the directory, since their paths may have no more than 107 bytes. */
  socketDirectory: string;
}

/** Disks and memory of a guest that was stopped in a known state: `<name>.root.qcow2` and so on. */
export interface SavedState {
  directory: string;
}

const MEMORY_MIB = 512;
const DATA_SIZE = "8G";
const SHUTDOWN_LIMIT_SECONDS = 120;
const QUIT_LIMIT_SECONDS = 15;
const LOAD_LIMIT_SECONDS = 60;
const SAVE_LIMIT_SECONDS = 120;

/** One guest's QEMU process and disks. Holds no state of its own: another process sees the same machine. */
export class GuestMachine {
  readonly name: GuestName;
  readonly #setting: MachineSetting;

  constructor(name: GuestName, setting: MachineSetting) {
    this.name = name;
    this.#setting = setting;
  }

  get consoleLog(): string {
    return join(this.#setting.directory, `${this.name}.console.log`);
  }

  /** Fresh copy-on-write disks: over a saved state's, or over the image with an empty data disk. */
  async createDisks(state?: SavedState): Promise<void> {
    const { directory, image } = this.#setting;
    await mkdir(directory, { recursive: true });
    const root = join(directory, `${this.name}.root.qcow2`);
    const data = join(directory, `${this.name}.data.qcow2`);
    await rm(root, { force: true });
    await rm(data, { force: true });
    const create = ["qemu-img", "create", "-q", "-f", "qcow2"];
    // Backing files by relative paths: the cache may be moved.
    const over = (file: string): string => relative(directory, file);
    if (state) {
      const saved = (disk: string): string => over(join(state.directory, `${this.name}.${disk}.qcow2`));
      await runChild([...create, "-b", saved("root"), "-F", "qcow2", root]);
      await runChild([...create, "-b", saved("data"), "-F", "qcow2", data]);
    } else {
      await runChild([...create, "-b", over(image.root), "-F", "raw", root]);
      await runChild([...create, data, DATA_SIZE]);
    }
  }

  /**
   * Starts QEMU, and returns when the processor runs: from power on, or from the saved state's memory. With
   * `endWithParent` the kernel ends QEMU when the thread that called this ends, crash or not.
   */
  async start(options: { port: number; endWithParent: boolean; state?: SavedState }): Promise<void> {
    const { directory, socketDirectory } = this.#setting;
    await mkdir(socketDirectory, { recursive: true, mode: 0o700 });
    await rm(this.#qmpSocket, { force: true });
    const logPath = join(directory, `${this.name}.qemu.log`);
    const log = await open(logPath, "w");
    const memory = options.state && (await open(join(options.state.directory, `${this.name}.memory`), "r"));
    try {
      const argv = [
        ...(options.endWithParent ? ["setpriv", "--pdeathsig", "KILL"] : []),
        "qemu-system-x86_64",
        ...this.#arguments(options.port),
        ...(memory ? ["-incoming", "fd:3"] : []),
      ];
      const [program = "", ...args] = argv;
      const child = spawn(program, args, {
        cwd: directory,
        detached: true,
        stdio: ["ignore", log.fd, log.fd, ...(memory ? [memory.fd] : [])],
      });
      let ended: string | undefined;
      child.on("error", (error) => {
        ended = error.message;
      });
      child.on("exit", (code, signal) => {
        ended = `exit code ${code ?? signal}`;
      });
      child.unref();
      await waitFor(
        async () => {
          if (ended !== undefined) {
            throw new Fatal(
              `lab: QEMU of ${this.name} ended (${ended}): ${(await readFile(logPath, "utf8")).trim()}`,
            );
          }
          const status = await this.#status();
          // A state is saved from a stopped machine, and so it is loaded into one.
          if (status === "paused") await qmp(this.#qmpSocket, "cont");
          return status === "running" ? true : undefined;
        },
        { timeoutSeconds: LOAD_LIMIT_SECONDS, intervalMs: 50, what: `QEMU of ${this.name} to run` },
      );
      child.removeAllListeners();
    } finally {
      await log.close();
      await memory?.close();
    }
  }

  /** Ends QEMU at once, as a power cut ends a server: what the guest had written to its disk stays. */
  async powerOff(): Promise<void> {
    const pid = await this.pid();
    if (pid === undefined) return;
    await qmp(this.#qmpSocket, "quit").catch(() => {});
    const gone = async (): Promise<true | undefined> => ((await this.pid()) === undefined ? true : undefined);
    try {
      await waitFor(gone, { timeoutSeconds: QUIT_LIMIT_SECONDS, intervalMs: 20, what: "QEMU to quit" });
    } catch {
      // pid() has just made sure that this process is still this guest's QEMU.
      const still = await this.pid();
      if (still !== undefined) process.kill(still, "SIGKILL");
      await waitFor(gone, {
        timeoutSeconds: QUIT_LIMIT_SECONDS,
        what: `QEMU of ${this.name} (${pid}) to end`,
      });
    }
  }

  /**
   * Waits until the guest has shut down for a reboot. QEMU ends then and is started anew by `start()`: a machine
   * that resets itself under TCG now and then never comes to its first instruction again.
   */
  async waitForReset(): Promise<void> {
    const done = async (): Promise<true | undefined> => {
      if ((await this.pid()) === undefined) return true;
      return (await this.lastWords()).includes("reboot: Restarting system") ? true : undefined;
    };
    await waitFor(done, {
      timeoutSeconds: SHUTDOWN_LIMIT_SECONDS,
      what: `${this.name} to go down`,
      detail: () => this.lastWords(),
    });
    // Its file systems are unmounted by now: if the reset itself hangs, the power may go.
    await this.powerOff();
  }

  /** Stops or lets run the guest's processors: a host that is there and does not answer. */
  async setFrozen(frozen: boolean): Promise<void> {
    await qmp(this.#qmpSocket, frozen ? "stop" : "cont");
  }

  /** Cuts or joins the private network on this guest's side. */
  async setLink(up: boolean): Promise<void> {
    await qmp(this.#qmpSocket, "set_link", { name: "private-card", up });
  }

  /** Stops the guest, writes its memory beside its disks and ends QEMU: the directory is then a `SavedState`. */
  async save(): Promise<void> {
    await qmp(this.#qmpSocket, "stop");
    await qmp(this.#qmpSocket, "migrate-set-parameters", { "max-bandwidth": 8 * 1024 ** 3 });
    // QEMU's working directory is the machine's.
    await qmp(this.#qmpSocket, "migrate", { uri: `exec:cat > ${this.name}.memory` });
    await waitFor(
      async () => {
        const status = statusOf(await qmp(this.#qmpSocket, "query-migrate"));
        if (status === "failed") throw new Fatal(`lab: ${this.name}'s memory could not be saved`);
        return status === "completed" ? true : undefined;
      },
      { timeoutSeconds: SAVE_LIMIT_SECONDS, what: `${this.name}'s memory to be saved` },
    );
    await this.powerOff();
  }

  /** Process id of this guest's QEMU. A pid file alone proves nothing: the command line must be this guest's too. */
  async pid(): Promise<number | undefined> {
    const text = await readFile(join(this.#setting.directory, `${this.name}.pid`), "utf8").catch(() => "");
    const pid = Number.parseInt(text, 10);
    if (!Number.isInteger(pid) || pid <= 1) return undefined;
    const commandLine = await readFile(`/proc/${pid}/cmdline`, "utf8").catch(() => "");
    return commandLine.split("\0").includes(this.#label) ? pid : undefined;
  }

  /** The end of the guest's console and of QEMU's own messages, for errors. */
  async lastWords(): Promise<string> {
    const tail = async (path: string): Promise<string> =>
      (await readFile(path, "utf8").catch(() => "")).trim().split("\n").slice(-15).join("\n");
    const console = await tail(this.consoleLog);
    const qemu = await tail(join(this.#setting.directory, `${this.name}.qemu.log`));
    return `--- console of ${this.name}\n${console}\n--- its QEMU\n${qemu}`;
  }

  get #qmpSocket(): string {
    return join(this.#setting.socketDirectory, `${this.name}.qmp`);
  }

  /** Tells this guest's QEMU from every other process of the machine. */
  get #label(): string {
    return `lvm-nbd-lab:${this.name}:${this.#setting.directory}`.replaceAll(",", ",,");
  }

  async #status(): Promise<string | undefined> {
    return statusOf(await qmp(this.#qmpSocket, "query-status"));
  }

  #arguments(port: number): string[] {
    const { image, accelerator, socketDirectory } = this.#setting;
    const index = GUESTS.findIndex((guest) => guest.name === this.name);
    const peer = GUESTS[1 - index]?.name;
    const suffix = GUESTS[index]?.macSuffix ?? "";
    const link = (name: string | undefined): string => join(socketDirectory, `${name}.link`);
    // norandmaps: QEMU keeps translated code by its address, and programs of random addresses are translated anew
    // each time they start: 16 ms instead of 3 for /bin/true. The rest of that line is work that no test looks at. Nobody listens to the
    // kernel's audit; without it (audit=0) each sudo would have the kernel look for its module, three times.
    const kernelCommandLine = [
      "console=ttyS0 quiet mitigations=off tsc=reliable no_timer_check random.trust_cpu=on",
      "norandmaps random_kstack_offset=off init_on_alloc=0 hardened_usercopy=off apparmor=0",
      "systemd.mask=systemd-journald-audit.socket nowatchdog cryptomgr.notests rcupdate.rcu_expedited=1 8250.nr_uarts=1",
      `systemd.hostname=${this.name} systemd.machine_id=${suffix.padStart(32, "c")}`,
    ].join(" ");
    // One processor: two wait for one another in the kernel, which is a fifth of what a guest takes of the machine's.
    return [
      ...["-name", this.#label, "-pidfile", `${this.name}.pid`],
      ...["-no-reboot", "-M", "pc", ...accelerator.args, "-m", String(MEMORY_MIB), "-smp", "1"],
      ...["-nodefaults", "-no-user-config", "-display", "none"],
      ...["-kernel", image.kernel, "-initrd", image.initramfs, "-append", kernelCommandLine],
      // Begun anew at each start: what it holds is of this boot.
      ...["-chardev", `file,id=console,path=${this.name}.console.log`, "-serial", "chardev:console"],
      ...[
        "-chardev",
        `socket,id=qmp,path=${this.#qmpSocket},server=on,wait=off`,
        "-mon",
        "chardev=qmp,mode=control",
      ],
      // cache=unsafe: the disks live as long as the instance, and powerOff() lets QEMU close them.
      ...["-drive", `if=none,id=root,file=${this.name}.root.qcow2,format=qcow2,cache=unsafe`],
      ...["-device", "virtio-blk-pci,drive=root,serial=root"],
      ...["-drive", `if=none,id=data,file=${this.name}.data.qcow2,format=qcow2,cache=unsafe`],
      ...["-device", "virtio-blk-pci,drive=data,serial=data"],
      ...["-netdev", `user,id=management,restrict=on,hostfwd=tcp:127.0.0.1:${port}-:22`],
      ...["-device", `virtio-net-pci,netdev=management,mac=${macAddress(suffix, "management")},romfile=`],
      // Datagrams between two socket files: nothing is lost while both run, and either may restart.
      ...[
        "-netdev",
        "dgram,id=private,local.type=unix,remote.type=unix".concat(
          `,local.path=${link(this.name)},remote.path=${link(peer)}`,
        ),
      ],
      ...[
        "-device",
        `virtio-net-pci,id=private-card,netdev=private,mac=${macAddress(suffix, "private")},romfile=`,
      ],
      ...["-device", "virtio-rng-pci"],
    ];
  }
}

function statusOf(answer: unknown): string | undefined {
  if (typeof answer !== "object" || answer === null || !("status" in answer)) return undefined;
  return typeof answer.status === "string" ? answer.status : undefined;
}

/** A TCP port of 127.0.0.1 that is free now. */
export async function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.on("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const address = server.address();
      server.close(() => {
        if (typeof address === "object" && address !== null) resolve(address.port);
        else reject(new Error("no free port"));
      });
    });
  });
}
