/** Worlds and programs that the tests share, and what must hold of them. */
import { isDeepStrictEqual } from "node:util";
import { expect } from "vitest";
import { ownerMark } from "../../provider/core/owner.js";
import { attachUnitName } from "../../provider/linux/attachUnit.js";
import { exportUnitName } from "../../provider/linux/exportUnit.js";
import type { FakeServer } from "./server.js";
import { type Declared, Ref, type Stack, type TypeName, type Values } from "./stack.js";
import { FakeWorld } from "./world.js";

const MiB = 1024 ** 2;
const units = "/etc/systemd/system";

/** What the origins hold before anything is made. */
export const before = "as it was";
/** What they hold after somebody has gone on writing. */
export const later = "written since";

/** Origins of each kind on both servers, and things of somebody else's. */
export function furnish(world: FakeWorld): void {
  world.server2.nbd.connectAnother("nbd0");
  for (const { lvm, files } of world.servers) {
    lvm.addGroup("VgVm");
    for (const name of ["vm1", "vm2"]) lvm.addVolume("VgVm", name, 64 * MiB, before);
    lvm.addPool("VgVm", "pool", 256 * MiB);
    lvm.addThin("VgVm", "pool", "thin1", 128 * MiB, before);
    lvm.addVolume("VgVm", "theirs", 16 * MiB, "somebody else's").tags.push("important");
    files.write(`${units}/theirs.service`, "[Service]\nExecStart=/bin/theirs\n");
  }
}

/** Open, and furnished. */
export async function furnishedWorld(): Promise<FakeWorld> {
  const world = new FakeWorld();
  furnish(world);
  await world.open();
  return world;
}

/** Goes on writing on every origin. */
export function writeOrigins(world: FakeWorld): void {
  for (const { lvm } of world.servers)
    for (const name of ["vm1", "vm2", "thin1"]) {
      const volume = lvm.find("VgVm", name);
      if (volume !== undefined) volume.data = later;
    }
}

/** The chain of a snapshot, its export and its attachment; `changes` go into the arguments of each. */
export function chain(
  world: FakeWorld,
  changes: { readonly snapshot?: Values; readonly export?: Values; readonly attachment?: Values } = {},
  n = 1,
): Declared[] {
  return [
    {
      type: "LvSnapshot",
      name: `snapshot${n}`,
      args: {
        host: world.host(world.server1),
        volumeGroup: "VgVm",
        origin: "vm1",
        name: `vm1-snap${n}`,
        size: "16M",
        ...changes.snapshot,
      },
    },
    {
      type: "NbdExport",
      name: `export${n}`,
      args: {
        host: world.host(world.server1),
        device: new Ref(`snapshot${n}`, "path"),
        exportName: `vm1-${n}`,
        listenAddress: world.server1.address,
        clients: [world.server2.address],
        port: 10808 + n,
        ...changes.export,
      },
    },
    {
      type: "NbdAttachment",
      name: `attachment${n}`,
      args: {
        host: world.host(world.server2),
        name: `vm1-${n}`,
        uri: new Ref(`export${n}`, "uri"),
        ...changes.attachment,
      },
    },
  ];
}

/** The units of `chain`'s first export and attachment, with their servers. */
export function unitsOf(world: FakeWorld): (readonly [server: FakeServer, unit: string])[] {
  return [
    [world.server1, exportUnitName("vm1-1")],
    [world.server2, attachUnitName("vm1-1")],
  ];
}

/** As `systemctl disable` by hand. */
export function disable({ files }: FakeServer, unit: string): void {
  for (const link of files.glob(`${units}/*.wants/${unit}`)) files.remove(link);
}

/** All that carries a mark or a name of the provider on a server, a line each. */
export function ours({ files, lvm, nbd, systemd }: FakeServer): string[] {
  const volumes = lvm
    .all()
    .filter(({ volume }) => volume.tags.some((tag) => tag.startsWith("lvm-nbd.")))
    .map(({ group, volume }) => `${volume.kind === "plain" ? "PLAIN" : "snapshot"} ${group}/${volume.name}`);
  const paths = Object.entries(files.snapshot("/etc"))
    .filter(([path, { kind }]) => kind !== "directory" && path.includes("lvm-nbd"))
    .map(([path]) => `file ${path}`);
  const links = [...nbd.links.keys()].map((name) => `link ${name}`);
  const running = [...systemd.units.values()]
    .filter(({ state }) => state !== "inactive")
    .map(({ name, state }) => `unit ${name} ${state}`);
  const aliases = files.exists("/dev/lvm-nbd")
    ? files.list("/dev/lvm-nbd").map((name) => `alias ${name}`)
    : [];
  return [...volumes, ...paths, ...links, ...running, ...aliases].sort();
}

/** A stack and the program that it has brought up. */
export interface Deployed {
  readonly stack: Stack;
  readonly program: readonly Declared[];
}

/** What `ours` must be for programs that are up. */
function declaredThings(server: FakeServer, { stack, program }: Deployed, world: FakeWorld): string[] {
  return program
    .filter(({ args }) => isDeepStrictEqual(args.host, world.host(server)))
    .flatMap(({ type, name, args }) => {
      if (type === "LvSnapshot") return [`snapshot ${args.volumeGroup}/${args.name}`];
      const unit =
        type === "NbdExport" ? exportUnitName(String(args.exportName)) : attachUnitName(String(args.name));
      const wants = /^WantedBy=(.*)$/m.exec(server.files.read(`${units}/${unit}`))?.[1] ?? "";
      const things = [
        `file ${units}/${unit}`,
        `unit ${unit} active`,
        ...wants.split(" ").map((target) => `file ${units}/${target}.wants/${unit}`),
      ];
      if (type === "NbdExport") {
        const config = `file /etc/lvm-nbd/${unit.replace(".service", ".conf")}`;
        return args.server === "nbd-server" ? [...things, config] : things;
      }
      const device = String(stack.kept.get(name)?.state.device).replace("/dev/", "");
      return [...things, `link ${device}`, `alias ${args.name}`, ...sharedByAttachments];
    });
}

const sharedByAttachments = [
  "file /etc/udev/rules.d/59-lvm-nbd.rules",
  "file /etc/modules-load.d/lvm-nbd.conf",
];

/** Nothing that is not ours was touched. */
export function expectOthersUntouched(world: FakeWorld, data: string): void {
  for (const { lvm, files } of world.servers) {
    for (const name of ["vm1", "vm2", "thin1"])
      expect(lvm.find("VgVm", name), `${name} is as it was`).toMatchObject({
        data,
        tags: [],
        readOnly: false,
      });
    expect(lvm.find("VgVm", "theirs")).toMatchObject({ data: "somebody else's", tags: ["important"] });
    expect(files.read(`${units}/theirs.service`)).toBe("[Service]\nExecStart=/bin/theirs\n");
  }
}

/**
 * The world is as the programs declare it, the states tell it so, and another `up` has nothing to do. `moments`:
 * what the snapshots must hold, by the resource's name.
 */
export async function expectConverged(
  world: FakeWorld,
  deployed: readonly Deployed[],
  moments: Readonly<Record<string, string>> = {},
): Promise<void> {
  for (const server of world.servers) {
    const things = deployed.flatMap((one) => declaredThings(server, one, world));
    expect(ours(server), server.name).toEqual([...new Set(things)].sort());
  }
  for (const { stack, program } of deployed) {
    expect([...stack.kept.keys()].sort()).toEqual(program.map(({ name }) => name).sort());
    for (const declared of program) expectDeclared(world, { stack, program }, declared, moments);
    await expectNothingToDo(stack, program);
  }
}

const good: Readonly<Record<TypeName, string>> = {
  LvSnapshot: "valid",
  NbdExport: "serving",
  NbdAttachment: "attached",
  LvRestore: "restored",
};

function expectDeclared(
  world: FakeWorld,
  { stack, program }: Deployed,
  { type, name, args }: Declared,
  moments: Readonly<Record<string, string>>,
): void {
  const state = stack.kept.get(name)?.state;
  expect(state?.state, name).toBe(good[type]);
  if (type === "LvSnapshot") {
    const volume = world.server1.lvm.find(String(args.volumeGroup), String(args.name));
    expect(volume, name).toMatchObject({ readOnly: args.readOnly ?? true, uuid: state?.uuid });
    if (moments[name] !== undefined) expect(volume?.data, name).toBe(moments[name]);
    const owner = ownerMark(`organization/project/${stack.name}/${name}`);
    const declared = Array.isArray(args.tags) ? args.tags : [];
    const tags = volume?.tags.filter((tag) => !tag.startsWith("lvm-nbd.generation"));
    expect(tags?.sort(), name).toEqual([owner, ...declared].sort());
  }
  if (type === "NbdAttachment") {
    // What server2 reads is what the snapshot holds.
    const exported = program.find((other) => args.uri instanceof Ref && other.name === args.uri.name);
    const device = exported?.args.device;
    const snapshot = device instanceof Ref ? stack.kept.get(device.name)?.state : undefined;
    const volume = world.server1.lvm.find("VgVm", String(snapshot?.name));
    expect(world.server2.read(`/dev/lvm-nbd/${args.name}`), name).toBe(volume?.data);
  }
}

async function expectNothingToDo(stack: Stack, program: readonly Declared[]): Promise<void> {
  const kept = new Map(stack.kept);
  const from = stack.commands.length;
  const again = await stack.up(program);
  expect(again.errors).toEqual([]);
  expect([...again.did].filter(([, did]) => did !== "unchanged")).toEqual([]);
  const read = await stack.refresh();
  expect(read.errors).toEqual([]);
  expect(stack.kept).toEqual(kept);
  expect(stack.commands.slice(from).filter(({ kind }) => kind === "change")).toEqual([]);
}
