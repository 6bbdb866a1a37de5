/**
 * Two real servers on this machine: QEMU guests with their own kernel, LVM and NBD, for tests and the demo.
 *
 * @example
 * const lab = await labUp({ name: "tests" });
 * await lab.server1.run("lvcreate -y -L 64m -n disk VgVm");
 * await lab.reset();
 * await lab.down();
 */
import { randomBytes } from "node:crypto";
import { copyFile, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { type Accelerator, chooseAccelerator } from "./accelerator.mts";
import type { ChildResult } from "./child.mts";
import { freePort, GuestMachine, type SavedState } from "./guest-machine.mts";
import { ensureImage, type GuestImage } from "./image.mts";
import { GUESTS, type GuestName } from "./image-contents.mts";
import {
  type InstanceRecord,
  instanceLock,
  instanceNames,
  instancePlace,
  isOrphan,
  readRecord,
  removeInstance,
  thisOwner,
  writeRecord,
} from "./instance.mts";
import { withLock } from "./lock.mts";
import { ensureSavedState } from "./saved-state.mts";
import { GuestSsh, sshGreets } from "./ssh.mts";
import { elapsed, waitFor } from "./wait.mts";

/** How to run a command in a guest. */
export interface GuestRunOptions {
  /** Default 120. */
  timeoutSeconds?: number;
  /** "root" (default) or the ordinary user, "operator". */
  user?: string;
  stdin?: string;
  /** Return a non-zero exit code instead of throwing. */
  allowFailure?: boolean;
}

/** One of the two servers. */
export interface Guest {
  name: GuestName;
  /** Where its SSH server is reached from this machine. */
  address: string;
  port: number;
  /** Its address on the network between the two servers. */
  privateAddress: string;
  /** "ssh-ed25519 AAAA..." */
  hostKey: string;
  /** Runs a shell command over SSH; throws with the output if it fails. */
  run(command: string, options?: GuestRunOptions): Promise<ChildResult>;
  /** Reboots in the orderly way and waits until it answers again. */
  reboot(options?: { timeoutSeconds?: number }): Promise<void>;
  /** Cuts the power. */
  kill(): Promise<void>;
  /** Gives it power again and waits until it answers. */
  start(options?: { timeoutSeconds?: number }): Promise<void>;
  /** Stops its processors: connections to it are accepted, nothing is answered. */
  freeze(): Promise<void>;
  /** Lets its processors run again and sets its clock. */
  thaw(): Promise<void>;
  /** Waits until it answers on SSH. */
  waitUntilUp(options?: { timeoutSeconds?: number }): Promise<void>;
}

/** A running lab. */
export interface Lab {
  name: string;
  directory: string;
  /** ssh_config(5) with the hosts server1, server2 (root), server1-operator and server2-operator. */
  sshConfigPath: string;
  /** The same with server1 and server2 as the ordinary user, and server1-root and server2-root. */
  operatorConfigPath: string;
  knownHostsPath: string;
  privateKeyPath: string;
  server1: Guest;
  server2: Guest;
  /** Cuts or joins the network between the two servers. */
  setLink(up: boolean): Promise<void>;
  /** Brings both servers back to the clean state: just booted, an empty volume group `VgVm` of 8 GiB. */
  reset(): Promise<void>;
  /** Ends the servers and removes everything of this lab. */
  down(): Promise<void>;
}

/** How to bring up a lab. */
export interface LabOptions {
  /** Labs of different names run beside each other. */
  name: string;
  /**
   * Let the lab outlive this process. Otherwise the kernel ends its servers when the thread that called `labUp`
   * ends, and what is left of it is swept by the next `labUp`.
   */
  keep?: boolean;
  /** Told what goes on and how long it took. */
  log?: (line: string) => void;
}

const BOOT_LIMIT_SECONDS = 240;
const ANSWER_LIMIT_SECONDS = 30;
const LOCK_LIMIT_SECONDS = 1800;

/**
 * A lab of this name: the running one if there is one in good order (whoever brought it up), else a new one in
 * the clean state. Builds the guest image and the saved state first if the cache does not hold them.
 */
export async function labUp(options: LabOptions): Promise<Lab> {
  const log = options.log ?? (() => {});
  const started = performance.now();
  const { directory, socketDirectory } = instancePlace(options.name);
  await sweepOrphans(options.name, log);
  const image = await ensureImage(log);
  const accelerator = await chooseAccelerator(image, log);
  const state = await ensureSavedState(image, accelerator, log);
  return withLock(
    await instanceLock(options.name),
    {
      timeoutSeconds: LOCK_LIMIT_SECONDS,
      onWait: () => log(`lab: waiting for another up of "${options.name}" ...`),
    },
    async () => {
      const parts = { name: options.name, directory, socketDirectory, image, accelerator, state };
      const record = await readRecord(directory);
      if (record?.state === state.directory && !(await isOrphan(record))) {
        const running = new RunningLab(parts, record);
        if (await running.answers()) {
          log(`lab: "${options.name}" is up already`);
          if (options.keep && !record.keep) log("lab: ... and ends with the process that brought it up");
          return running;
        }
      }
      if (record) log(`lab: "${options.name}" is not as it should be now and is made anew`);
      await removeInstance(options.name);
      await mkdir(directory, { recursive: true, mode: 0o700 });
      const fresh: InstanceRecord = {
        state: state.directory,
        ports: { server1: await freePort(), server2: await freePort() },
        owner: await thisOwner(),
        keep: options.keep ?? false,
      };
      await writeRecord(directory, fresh);
      const lab = new RunningLab(parts, fresh);
      try {
        await lab.restore();
      } catch (error) {
        await removeInstance(options.name);
        throw error;
      }
      log(`lab: "${options.name}" is up (${elapsed(started)}; ${accelerator.name})`);
      return lab;
    },
  );
}

/** Takes down the lab of this name, whoever brought it up. Says whether anything was running. */
export async function labDown(name: string): Promise<boolean> {
  return withLock(await instanceLock(name), { timeoutSeconds: LOCK_LIMIT_SECONDS }, () =>
    removeInstance(name),
  );
}

async function sweepOrphans(except: string, log: (line: string) => void): Promise<void> {
  for (const name of await instanceNames()) {
    if (name === except || !(await isOrphaned(name))) continue;
    await withLock(await instanceLock(name), { timeoutSeconds: LOCK_LIMIT_SECONDS }, async () => {
      // Somebody may have brought it up anew while we waited for the lock.
      if (!(await isOrphaned(name))) return;
      log(`lab: sweeping "${name}", whose process is gone`);
      await removeInstance(name);
    });
  }
}

async function isOrphaned(name: string): Promise<boolean> {
  const record = await readRecord(instancePlace(name).directory);
  return record !== undefined && (await isOrphan(record));
}

interface LabParts {
  name: string;
  directory: string;
  socketDirectory: string;
  image: GuestImage;
  accelerator: Accelerator;
  state: SavedState;
}

class RunningLab implements Lab {
  readonly name: string;
  readonly directory: string;
  readonly privateKeyPath: string;
  readonly server1: RunningGuest;
  readonly server2: RunningGuest;
  readonly #parts: LabParts;
  readonly #ssh: GuestSsh;

  constructor(parts: LabParts, record: InstanceRecord) {
    this.name = parts.name;
    this.directory = parts.directory;
    this.privateKeyPath = join(parts.directory, "id_ed25519");
    this.#parts = parts;
    this.#ssh = new GuestSsh(parts.directory, parts.socketDirectory);
    const guest = (name: GuestName): RunningGuest =>
      new RunningGuest(new GuestMachine(name, parts), this.#ssh, {
        port: record.ports[name],
        hostKey: parts.image.hostKeys[name] ?? "",
        endWithParent: !record.keep,
      });
    this.server1 = guest("server1");
    this.server2 = guest("server2");
  }

  get sshConfigPath(): string {
    return this.#ssh.configPath;
  }

  get operatorConfigPath(): string {
    return this.#ssh.operatorConfigPath;
  }

  get knownHostsPath(): string {
    return this.#ssh.knownHostsPath;
  }

  /** Are both servers there and well? */
  async answers(): Promise<boolean> {
    const answers = await Promise.all(
      this.#guests.map((guest) =>
        guest.run("true", { timeoutSeconds: ANSWER_LIMIT_SECONDS }).then(
          () => true,
          () => false,
        ),
      ),
    );
    return answers.every(Boolean);
  }

  async restore(): Promise<void> {
    await mkdir(this.#parts.socketDirectory, { recursive: true, mode: 0o700 });
    await copyFile(this.#parts.image.privateKey, this.privateKeyPath);
    await this.#ssh.writeFiles(this.#guests, this.privateKeyPath);
    await Promise.all(this.#guests.map((guest) => guest.restore(this.#parts.state)));
  }

  async setLink(up: boolean): Promise<void> {
    await Promise.all(this.#guests.map((guest) => guest.setLink(up)));
  }

  async reset(): Promise<void> {
    await withLock(await instanceLock(this.name), { timeoutSeconds: LOCK_LIMIT_SECONDS }, () =>
      this.restore(),
    );
  }

  async down(): Promise<void> {
    for (const guest of this.#guests) await this.#ssh.disconnect(guest.name);
    await labDown(this.name);
  }

  get #guests(): RunningGuest[] {
    return [this.server1, this.server2];
  }
}

class RunningGuest implements Guest {
  readonly name: GuestName;
  readonly address = "127.0.0.1";
  readonly port: number;
  readonly privateAddress: string;
  readonly hostKey: string;
  readonly #endWithParent: boolean;
  readonly #machine: GuestMachine;
  readonly #ssh: GuestSsh;

  constructor(
    machine: GuestMachine,
    ssh: GuestSsh,
    options: { port: number; hostKey: string; endWithParent: boolean },
  ) {
    this.name = machine.name;
    this.port = options.port;
    this.hostKey = options.hostKey;
    this.privateAddress = GUESTS.find((guest) => guest.name === machine.name)?.privateAddress ?? "";
    this.#endWithParent = options.endWithParent;
    this.#machine = machine;
    this.#ssh = ssh;
  }

  async run(command: string, options: GuestRunOptions = {}): Promise<ChildResult> {
    return this.#ssh.run(this.name, command, options);
  }

  async reboot(options: { timeoutSeconds?: number } = {}): Promise<void> {
    const before = await this.#bootId();
    // In the background, so that the command has ended before the connection does.
    await this.run("systemctl --no-block reboot");
    await this.#ssh.disconnect(this.name);
    await this.#machine.waitForReset();
    await this.#machine.start({ port: this.port, endWithParent: this.#endWithParent });
    await this.#waitForBoot(before, options.timeoutSeconds);
  }

  async kill(): Promise<void> {
    await this.#ssh.disconnect(this.name);
    await this.#machine.powerOff();
  }

  async start(options: { timeoutSeconds?: number } = {}): Promise<void> {
    if ((await this.#machine.pid()) !== undefined) return;
    await this.#machine.start({ port: this.port, endWithParent: this.#endWithParent });
    await this.waitUntilUp(options);
  }

  async freeze(): Promise<void> {
    await this.#machine.setFrozen(true);
  }

  async thaw(): Promise<void> {
    await this.#machine.setFrozen(false);
    // The kept connection may have timed out while nothing answered.
    await this.#ssh.disconnect(this.name);
    await this.#setClock();
  }

  async waitUntilUp(options: { timeoutSeconds?: number } = {}): Promise<void> {
    await this.#waitForBoot(undefined, options.timeoutSeconds);
  }

  async setLink(up: boolean): Promise<void> {
    await this.#machine.setLink(up);
  }

  /** Throws away this guest's disks and memory and takes the saved ones. */
  async restore(state: SavedState): Promise<void> {
    await this.kill();
    await this.#machine.createDisks(state);
    await this.#machine.start({ port: this.port, endWithParent: this.#endWithParent, state });
    await this.waitUntilUp();
    await this.#setClock();
    // The saved state holds the state of the random numbers too: without this, every restored guest would draw
    // the same ones. (0x5207 is RNDRESEEDCRNG of random(4).)
    const reseed = 'open(F,"+>","/dev/random") or die; print F <STDIN>; F->flush; ioctl(F,0x5207,0) or die';
    await this.run(`perl -MIO::Handle -e '${reseed}'`, { stdin: randomBytes(64).toString("hex") });
  }

  async #setClock(): Promise<void> {
    // The connection first: opening it takes longer than the precision wanted.
    await this.run("true");
    await this.run(`date --utc --set=@${(Date.now() / 1000).toFixed(3)}`);
  }

  async #bootId(): Promise<string> {
    const options = { timeoutSeconds: ANSWER_LIMIT_SECONDS };
    return (await this.run("cat /proc/sys/kernel/random/boot_id", options)).stdout.trim();
  }

  async #waitForBoot(before: string | undefined, timeoutSeconds = BOOT_LIMIT_SECONDS): Promise<void> {
    await waitFor(
      async () => {
        if (!(await sshGreets(this.port))) return undefined;
        await this.#ssh.disconnect(this.name);
        return (await this.#bootId()) === before ? undefined : true;
      },
      { timeoutSeconds, what: `${this.name} to answer on SSH`, detail: () => this.#machine.lastWords() },
    );
  }
}
