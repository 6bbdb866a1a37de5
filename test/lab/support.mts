/** What the lab tests share: clean servers, and as much of Pulumi's engine as drives the handlers. */
import { isDeepStrictEqual } from "node:util";
import { inject } from "vitest";
import { createHandlers, type Environment, type Handlers } from "../../provider/core/handlers.js";
import { resourceType } from "../../provider/core/registry.js";
import type { Change } from "../../provider/core/resource.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import type { Host, RemoteCommand } from "../../provider/ssh/types.js";
import { type LoginRole, sudoersInstallation } from "../../provider/sudoers.js";
import { dynamicDoor, pluginDoor, type Served } from "./door.mts";
import { type Door, labDoor } from "./doorNames.mts";
import { OPERATOR } from "./image-contents.mts";
import { type Guest, type Lab, labUp } from "./lab.mts";
import { waitFor } from "./wait.mts";

/**
 * This worker's lab in the clean state. Guests that a test process (re)started end with it; what is not there any
 * more comes up anew here.
 */
export async function freshLab(): Promise<Lab> {
  const lab = await labUp({ name: `${inject("labName")}-${process.env.VITEST_POOL_ID}` });
  const used = await lab.server1.run("test -e /run/lab-used", { allowFailure: true });
  if (used.exitCode === 0) await lab.reset();
  await lab.server1.run("touch /run/lab-used");
  // Every test works as a user who may run what `lvm-nbd sudoers` lists, and nothing else.
  await Promise.all([lab.server1, lab.server2].map((guest) => mayRun(guest, "setup")));
  process.env.LVM_NBD_SSH_CONFIG = lab.operatorConfigPath;
  return lab;
}

/** Gives the guests' ordinary user that role, and no other right. */
export async function mayRun(guest: Guest, role: LoginRole): Promise<void> {
  await guest.run("rm -f /etc/sudoers.d/operator && sh", {
    stdin: sudoersInstallation(OPERATOR.user, role, "of this checkout"),
  });
}

export type Values = Readonly<Record<string, unknown>>;
type TypeName =
  | ("LvSnapshot" | "NbdExport" | "NbdAttachment" | "Mount")
  | ("VolumeCopy" | "BackupImage" | "LvRestore");

/** What `up` did to a resource. */
export interface Outcome {
  readonly did: "created" | "updated" | "replaced" | "unchanged";
  readonly state: Values;
  readonly changes: readonly Change[];
}

/** A stack in this process: check, diff and then create, update or replace, as Pulumi's engine orders it. */
export class LabStack {
  readonly warnings: string[] = [];
  /** Every command that reached a host, with what it said it was. */
  readonly commands: (RemoteCommand & { readonly host: string })[] = [];
  readonly #pool = createHostPool();
  /** By this operation. */
  readonly #opened = new Map<Host, Host>();
  readonly #environment: Environment;
  readonly #states = new Map<string, Values>();
  #plugin: ReturnType<typeof pluginDoor> | undefined;
  /** What the handlers found to differ at the last diff, of which a door tells less. */
  #changes: readonly Change[] = [];

  constructor(
    readonly name = "lab",
    public door: Door = labDoor,
  ) {
    this.#environment = {
      openHost: async (args) => {
        const host = await this.#pool.get(args);
        const watched = this.#opened.get(host) ?? this.#watched(host);
        this.#opened.set(host, watched);
        return watched;
      },
      progress: () => undefined,
      warn: (message) => this.warnings.push(message),
      signal: new AbortController().signal,
    };
  }

  /** Those behind the door. */
  handlers(type: string, { signal }: Pick<Environment, "signal"> = this.#environment): Handlers {
    const handlers = createHandlers(resourceType(type), { ...this.#environment, signal });
    return {
      ...handlers,
      diff: async (...args) => {
        const result = await handlers.diff(...args);
        this.#changes = result.changes;
        return result;
      },
    };
  }

  async #served(type: TypeName, resource: string): Promise<Served> {
    if (this.door === "dynamic") return dynamicDoor(this.handlers(type), this.#environment.warn);
    this.#plugin ??= pluginDoor(async (name, environment) => this.handlers(name, environment));
    const plugin = await this.#plugin;
    await plugin.begin();
    return plugin.served(type, resource);
  }

  /** What the program declares, with its owner and defaults, as `check` passes it on. Throws on a problem. */
  async checked(type: TypeName, resource: string, args: Values): Promise<Values> {
    const kept = this.#states.get(`${type} ${resource}`);
    return (await this.#served(type, resource)).check(kept, this.declared(resource, args));
  }

  declared(resource: string, args: Values): Values {
    return { ...args, owner: `organization/lab-tests/${this.name}/${resource}` };
  }

  async up(type: TypeName, resource: string, args: Values): Promise<Outcome> {
    this.#begin();
    const key = `${type} ${resource}`;
    const served = await this.#served(type, resource);
    const wanted = await this.checked(type, resource, args);
    const kept = this.#states.get(key);
    const create = async (): Promise<Values> => {
      const state = await served.create(wanted);
      this.#states.set(key, state);
      return state;
    };
    if (kept === undefined) return { did: "created", state: await create(), changes: [] };
    const difference = await served.diff(kept, wanted);
    const changes = this.#changes;
    if (difference === "none") return { did: "unchanged", state: kept, changes };
    if (difference === "update") {
      const state = await served.update(kept, wanted);
      this.#states.set(key, state);
      return { did: "updated", state, changes };
    }
    if (difference === "delete first") await this.destroy(type, resource);
    const state = await create();
    if (difference === "create first") await served.remove(kept);
    return { did: "replaced", state, changes };
  }

  /** Each operation of Pulumi is a process of its own, which knows of no look of another one. */
  #begin(): void {
    this.#opened.clear();
  }

  /** Reads all, as a refresh does, and keeps what it saw. */
  async refreshAll(): Promise<void> {
    this.#begin();
    await Promise.all(
      [...this.#states.keys()].map((key) => {
        const [type, resource] = key.split(" ") as [TypeName, string];
        return this.#refresh(type, resource);
      }),
    );
  }

  /** Reads, as a refresh does, and keeps what it saw; `undefined` when the resource is gone. */
  async refresh(type: TypeName, resource: string): Promise<Values | undefined> {
    this.#begin();
    return this.#refresh(type, resource);
  }

  async #refresh(type: TypeName, resource: string): Promise<Values | undefined> {
    const seen = await this.#read(type, resource);
    if (seen === undefined) this.#states.delete(`${type} ${resource}`);
    else this.#states.set(`${type} ${resource}`, seen);
    return seen;
  }

  /** The properties in which the world differs from the kept state, the fill level aside. */
  async drifted(type: TypeName, resource: string): Promise<string[]> {
    this.#begin();
    const kept = this.state(type, resource);
    const seen = await this.#read(type, resource);
    if (seen === undefined) return ["absent"];
    return Object.keys({ ...kept, ...seen }).filter(
      (property) => property !== "usedPercent" && !isDeepStrictEqual(seen[property], kept[property]),
    );
  }

  async #read(type: TypeName, resource: string): Promise<Values | undefined> {
    return (await this.#served(type, resource)).read(this.state(type, resource));
  }

  async destroy(type: TypeName, resource: string): Promise<void> {
    this.#begin();
    await (await this.#served(type, resource)).remove(this.state(type, resource));
    this.#states.delete(`${type} ${resource}`);
  }

  state(type: TypeName, resource: string): Values {
    const state = this.#states.get(`${type} ${resource}`);
    if (state === undefined) throw new Error(`${type} ${resource} is not in the stack`);
    return state;
  }

  /** Runs the work and returns the changing commands it sent to hosts. */
  async changesDuring(work: () => Promise<unknown>): Promise<string[]> {
    const before = this.commands.length;
    await work();
    return this.commands
      .slice(before)
      .filter(({ kind }) => kind === "change")
      .map(({ argv }) => argv.join(" "));
  }

  /** Runs the work and returns the warnings it gave, in one text. */
  async warningsDuring(work: () => Promise<unknown>): Promise<string> {
    const before = this.warnings.length;
    await work();
    return this.warnings.slice(before).join("\n");
  }

  close(): void {
    this.#pool.close();
    this.#plugin?.then((plugin) => plugin.close());
  }

  #watched(host: Host): Host {
    return {
      name: host.name,
      machineId: (signal) => host.machineId(signal),
      run: (command, signal) => {
        this.commands.push({ ...command, host: host.name });
        return host.run(command, signal);
      },
    };
  }
}

/** Small, since a guest's emulated processor checksums it again and again. */
export const originBytes = 16 * 1024 ** 2;

/** `LV-VM1`, random bytes, in VgVm of the server; returns its checksum. */
export async function makeOrigin(server: Guest, name = "LV-VM1"): Promise<string> {
  await server.run(
    `lvcreate -qq -y -W n -L ${originBytes}b -n ${name} VgVm && dd if=/dev/urandom of=/dev/VgVm/${name} bs=1M count=16 oflag=direct status=none`,
  );
  return checksum(server, `/dev/VgVm/${name}`);
}

/** Writes something else over the beginning of a device. */
export async function spoil(server: Guest, device: string): Promise<void> {
  await server.run(`dd if=/dev/urandom of=${device} bs=1M count=2 oflag=direct status=none`);
}

/** SHA-256 of a device's whole content, read past every cache. A detached NBD device, of no size, has none. */
export async function checksum(server: Guest, device: string): Promise<string> {
  const { stdout } = await server.run(
    `[ "$(blockdev --getsize64 ${device})" != 0 ] && blockdev --flushbufs ${device} && set -o pipefail && dd if=${device} bs=1M iflag=direct status=none | sha256sum`,
  );
  return stdout.split(" ")[0] ?? "";
}

/** As `checksum`, of a device that may be on its way back: an attachment connects again by itself. */
export async function checksumSoon(server: Guest, device: string): Promise<string> {
  return waitFor(async () => checksum(server, device), {
    timeoutSeconds: 90,
    intervalMs: 500,
    what: `${device} on ${server.name} to be readable`,
  });
}

/** All that the provider could have left on a server, a line each; empty when it left nothing. */
export async function leftovers(server: Guest): Promise<string> {
  const { stdout } = await server.run(`
    systemctl list-units --all --no-legend --plain 'lvm-nbd-*' | awk '{ print "unit " $1 " " $3 }'
    grep -ls lvm-nbd /etc/systemd/system/*.mount
    find /etc/systemd/system /run/systemd/system /etc/lvm-nbd /etc/modules-load.d /etc/udev/rules.d /dev/lvm-nbd \
      2>/dev/null | grep lvm-nbd
    for size in /sys/block/nbd*/size; do
      [ -e "$size" ] && [ "$(cat "$size")" != 0 ] && echo "in use: $size"
    done
    for pid in /sys/block/nbd*/pid; do [ -e "$pid" ] && echo "in use: $pid"; done
    lvs --noheadings -o lv_name,lv_tags | grep -e lvm-nbd -e snap
    pgrep -a 'nbdkit|nbd-server|qemu-nbd|nbd-client'
    true`);
  return stdout.trim();
}

/** The process of a unit, which stays the same while nobody restarts it. */
export function mainPid(guest: Guest, unit: string): Promise<string> {
  return shown(guest, unit, "MainPID");
}

/** The addresses that the kernel lets into a unit, sorted: systemd lists them in an order that each boot shuffles. */
export async function allowedInto(guest: Guest, unit: string): Promise<string[]> {
  return (await shown(guest, unit, "IPAddressAllow")).split(" ").sort();
}

async function shown(guest: Guest, unit: string, property: string): Promise<string> {
  return (await guest.run(`systemctl show -p ${property} --value '${unit}'`)).stdout.trim();
}
