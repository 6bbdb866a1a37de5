import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { GuestMachine, type MachineSetting } from "./guest-machine.mts";
import { GUESTS, type GuestName } from "./image-contents.mts";
import { instancesDirectory } from "./paths.mts";

/** What an instance's directory says about it (instance.json), for other processes. */
export interface InstanceRecord {
  /** Directory of the saved state its guests were restored from. */
  state: string;
  /** Forwarded SSH port of each guest. */
  ports: Readonly<Record<GuestName, number>>;
  /** Process that brought it up; a lab that is not kept is swept when this one is gone. */
  owner: { pid: number; startTime: string };
  keep: boolean;
}

/** Where an instance's files lie. Its sockets have a short path of their own, since a socket's must be short. */
export function instancePlace(name: string): { directory: string; socketDirectory: string } {
  if (!/^[a-z0-9][a-z0-9-]{0,30}$/.test(name)) {
    throw new Error(`lab: "${name}" is no name for a lab: up to 31 of a-z, 0-9 and -, not starting with -`);
  }
  const directory = join(instancesDirectory(), name);
  const hash = createHash("sha256").update(directory).digest("hex").slice(0, 12);
  return { directory, socketDirectory: join(tmpdir(), `lvm-nbd-lab-${hash}`) };
}

/** The instance's record, or `undefined` if there is none (never brought up, or cut half-way). */
export async function readRecord(directory: string): Promise<InstanceRecord | undefined> {
  const text = await readFile(join(directory, "instance.json"), "utf8").catch(() => undefined);
  return text === undefined ? undefined : (JSON.parse(text) as InstanceRecord);
}

/** Writes the record in one step: another process reads all of it or none. */
export async function writeRecord(directory: string, record: InstanceRecord): Promise<void> {
  const path = join(directory, "instance.json");
  await writeFile(`${path}.new`, `${JSON.stringify(record, undefined, 2)}\n`);
  await rename(`${path}.new`, path);
}

/** This process, as an owner. */
export async function thisOwner(): Promise<InstanceRecord["owner"]> {
  return { pid: process.pid, startTime: (await startTime(process.pid)) ?? "" };
}

/** Ends the guests of an instance and removes its files. Touches only QEMU processes that are its own. */
export async function removeInstance(name: string): Promise<boolean> {
  const { directory, socketDirectory } = instancePlace(name);
  const machines = instanceMachines({ directory, socketDirectory });
  const running = await Promise.all(machines.map((machine) => machine.pid()));
  await Promise.all(machines.map((machine) => machine.powerOff()));
  await rm(directory, { recursive: true, force: true });
  await rm(socketDirectory, { recursive: true, force: true });
  return running.some((pid) => pid !== undefined);
}

/** The names of the instances that have a directory. */
export async function instanceNames(): Promise<string[]> {
  const names = await readdir(instancesDirectory()).catch(() => []);
  return names.filter((name) => !name.endsWith(".lock"));
}

/** Did the owner of an instance that was not to be kept end without taking it down? */
export async function isOrphan(record: InstanceRecord): Promise<boolean> {
  return !record.keep && (await startTime(record.owner.pid)) !== record.owner.startTime;
}

/** The lock that bringing an instance up, down or back takes. */
export async function instanceLock(name: string): Promise<string> {
  await mkdir(instancesDirectory(), { recursive: true });
  return join(instancesDirectory(), `${name}.lock`);
}

/** Machines that can be looked at and ended, though not started, without knowing image and accelerator. */
function instanceMachines(place: { directory: string; socketDirectory: string }): GuestMachine[] {
  const unknown = { kernel: "", initramfs: "", root: "", privateKey: "", directory: "", hostKeys: {} };
  const setting: MachineSetting = {
    ...place,
    image: unknown,
    accelerator: { name: "tcg", args: [], key: "" },
  };
  return GUESTS.map((guest) => new GuestMachine(guest.name, setting));
}

/** Start time of a process (field 22 of proc(5)'s stat): with its id it names one process for ever. */
async function startTime(pid: number): Promise<string | undefined> {
  const stat = await readFile(`/proc/${pid}/stat`, "utf8").catch(() => undefined);
  return stat?.slice(stat.lastIndexOf(")") + 2).split(" ")[19];
}
