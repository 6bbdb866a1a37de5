/** A chain as each side of the comparison makes it: a snapshot of an origin of its own on server1, exported by nbdkit, attached to server2. */
import { attachment, type Declared, nbdExport, output, snapshot } from "../lab/faults/fault-stack.mts";
import type { Guest, Lab } from "../lab/lab.mts";

export const volumeGroup = "VgVm";
export const storeMiB = 8;
const originMiB = 16;

/** The chain's names, where its export listens, and to what it is attached by who chooses that himself. */
export interface Chain {
  readonly origin: string;
  readonly name: string;
  readonly port: number;
  readonly device: string;
}

export function chains(count: number): readonly Chain[] {
  return Array.from({ length: count }, (_, n) => ({
    origin: `vm${n}`,
    name: `bench${n}`,
    port: 10_809 + n,
    device: `/dev/nbd${n}`,
  }));
}

/** As a program of Pulumi has it. */
export function declared({ origin, name, port }: Chain): Declared[] {
  return [
    snapshot(name, { origin, size: `${storeMiB}M` }),
    nbdExport(`${name}-export`, { device: output(name, "path"), port, server: "nbdkit" }),
    attachment(`${name}-attachment`, { uri: output(`${name}-export`, "uri") }),
  ];
}

export async function makeOrigins({ server1 }: Lab, all: readonly Chain[]): Promise<void> {
  const made = all.map(
    ({ origin }) => `lvcreate -qq -y -W n -L ${originMiB}M -n ${origin} ${volumeGroup} || exit`,
  );
  await server1.run(made.join("\n"), { timeoutSeconds: 300 });
}

/** How much of the chains stands on the servers, whoever made it. */
export async function standing({ server1, server2 }: Lab): Promise<Readonly<Record<string, number>>> {
  const count = async (guest: Guest, command: string) => Number((await guest.run(command)).stdout);
  return {
    snapshots: await count(server1, `lvs --noheadings -S 'origin!=""' ${volumeGroup} | wc -l`),
    exports: await count(server1, "pgrep -c -x nbdkit || true"),
    attachments: await count(server2, "ls -d /sys/block/nbd*/pid 2>/dev/null | wc -l"),
  };
}
