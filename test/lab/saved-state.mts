import { createHash } from "node:crypto";
import { mkdir, readdir, rename, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Accelerator } from "./accelerator.mts";
import { freePort, GuestMachine, type MachineSetting, type SavedState } from "./guest-machine.mts";
import type { GuestImage } from "./image.mts";
import { GUESTS } from "./image-contents.mts";
import { withLock } from "./lock.mts";
import { GuestSsh, sshGreets } from "./ssh.mts";
import { elapsed, waitFor } from "./wait.mts";

/** Raise it when `PREPARE` or the machine's hardware or kernel command line changes. */
const STATE_VERSION = 6;
const PREPARE_LIMIT_SECONDS = 600;
const BOOT_LIMIT_SECONDS = 240;

/**
 * Runs in each guest before its state is saved: the volume group, empty. A snapshot is made and removed so that
 * the tools and the kernel's modules for it are in memory already.
 */
const PREPARE = `set -eu
systemctl is-system-running --wait || systemctl --failed
systemctl is-active network-online.target
vgcreate -y VgVm /dev/disk/by-id/virtio-data
lvcreate -y -L 16m -n warm VgVm
lvcreate -y -s -L 8m -n warm2 VgVm/warm
lvremove -y VgVm/warm
modprobe dm-thin-pool
rm -f /etc/lvm/archive/*
sync`;

/**
 * Both guests, booted and prepared, saved beside the image: made once, and restored in seconds ever after. Keyed
 * by what a saved state depends on.
 */
export async function ensureSavedState(
  image: GuestImage,
  accelerator: Accelerator,
  log: (line: string) => void,
): Promise<SavedState> {
  const key = createHash("sha256")
    .update(`${STATE_VERSION} ${accelerator.key} ${PREPARE}`)
    .digest("hex")
    .slice(0, 16);
  const directory = join(image.directory, `state-${key}`);
  if (!(await exists(directory))) {
    const onWait = (): void => log("lab: waiting for another first boot of the guests ...");
    const lock = join(image.directory, "state.lock");
    await withLock(lock, { timeoutSeconds: PREPARE_LIMIT_SECONDS, onWait }, async () => {
      if (!(await exists(directory))) await prepare(directory, image, accelerator, log);
    });
  }
  return { directory };
}

async function prepare(
  target: string,
  image: GuestImage,
  accelerator: Accelerator,
  log: (line: string) => void,
): Promise<void> {
  const started = performance.now();
  for (const name of await readdir(image.directory)) {
    if (name.startsWith(".state-")) await rm(join(image.directory, name), { recursive: true, force: true });
  }
  log(
    `lab: first boot of the guests (once, about ${accelerator.name === "kvm" ? "20 seconds" : "1 minute"}) ...`,
  );
  const directory = join(image.directory, `.state-${process.pid}`);
  const socketDirectory = join(tmpdir(), `lvm-nbd-lab-state-${process.pid}`);
  await mkdir(socketDirectory, { recursive: true, mode: 0o700 });
  const setting: MachineSetting = { image, accelerator, directory, socketDirectory };
  const machines = GUESTS.map((guest) => new GuestMachine(guest.name, setting));
  const ssh = new GuestSsh(directory, socketDirectory);
  try {
    const ports: number[] = [];
    for (const machine of machines) {
      await machine.createDisks();
      const port = await freePort();
      ports.push(port);
      await machine.start({ port, endWithParent: true });
    }
    const guests = machines.map(({ name }, index) => ({
      name,
      port: ports[index] ?? 0,
      hostKey: image.hostKeys[name] ?? "",
    }));
    await ssh.writeFiles(guests, image.privateKey);
    await Promise.all(
      machines.map(async (machine, index) => {
        await waitFor(async () => ((await sshGreets(ports[index] ?? 0)) ? true : undefined), {
          timeoutSeconds: BOOT_LIMIT_SECONDS,
          what: `${machine.name} to boot`,
          detail: () => machine.lastWords(),
        });
        await ssh.run(machine.name, PREPARE, { timeoutSeconds: BOOT_LIMIT_SECONDS });
        await ssh.disconnect(machine.name);
        await machine.save();
        await rm(machine.consoleLog, { force: true });
      }),
    );
    await rename(directory, target);
  } finally {
    for (const machine of machines) await machine.powerOff();
    await rm(socketDirectory, { recursive: true, force: true });
    await rm(directory, { recursive: true, force: true });
  }
  log(`lab: the guests' clean state is saved (${elapsed(started)})`);
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}
