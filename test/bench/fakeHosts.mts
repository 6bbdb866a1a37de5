/**
 * Many fake hosts as a process of its own, two and two on one network, as the origin's and the other of an attachment. Arguments: the
 * compiled module, how many hosts, and how many volumes each has to take snapshots of. Prints, as a line of JSON, how each is reached;
 * for each line of its stdin, `Counts` since the one before; ends with its stdin.
 */
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import type { FakeWorld } from "../fakehost/world.js";

/** A host as another process reaches it. */
export interface FakeHost {
  /** Of its SSH server on 127.0.0.1. */
  readonly port: number;
  readonly hostKey: string;
  /** On its network. */
  readonly address: string;
}

export interface Counts {
  readonly commands: number;
  readonly connections: number;
  /** To the host that has most of them. */
  readonly mostConnections: number;
  /** At this moment. */
  readonly open: number;
}

const [compiled = "", hosts, volumes] = process.argv.slice(2);
const made: { FakeWorld: typeof FakeWorld } = createRequire(import.meta.url)(compiled);

let commands = 0;
const worlds: FakeWorld[] = [];
const reached: FakeHost[] = [];
for (let n = 0; n < Number(hosts); n += 2) {
  const world = new made.FakeWorld();
  world.hooks = {
    arrived: () => {
      commands++;
      return true;
    },
    // What has ended is kept for tests alone.
    ended: () => world.commands.splice(0),
  };
  await world.open();
  worlds.push(world);
  for (const [at, server] of world.servers.entries()) {
    server.files.write("/etc/machine-id", `${process.pid.toString(16)}${n + at}`.padStart(32, "0"));
    server.lvm.addGroup("VgVm", 100_000);
    for (let vm = 0; vm < Number(volumes); vm++)
      server.lvm.addVolume("VgVm", `vm${vm}`, 64 * 1024 ** 2, `volume ${vm} of ${n + at}`);
    const { port, hostKey } = world.host(server);
    reached.push({ port: Number(port), hostKey: String(hostKey), address: server.address });
  }
}
process.stdout.write(`${JSON.stringify(reached)}\n`);

/** Connections that were counted already, by host. */
const before = new Map<object, number>();
for await (const _ of createInterface({ input: process.stdin })) {
  const all = worlds.flatMap((world) =>
    world.servers.map((server) => ({ server, sockets: world.sockets(server) })),
  );
  const since = all.map(({ server, sockets }) => sockets.length - (before.get(server) ?? 0));
  for (const { server, sockets } of all) before.set(server, sockets.length);
  const counts: Counts = {
    commands,
    connections: since.reduce((sum, one) => sum + one, 0),
    mostConnections: Math.max(...since),
    open: all.reduce((sum, { sockets }) => sum + sockets.filter(({ destroyed }) => !destroyed).length, 0),
  };
  commands = 0;
  process.stdout.write(`${JSON.stringify(counts)}\n`);
}
process.exit();
