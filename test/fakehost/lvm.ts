/**
 * A small model of LVM. What it prints was recorded on the lab's servers (lvm2 2.03.16); a lab test compares the
 * two. The data of a volume is a short text: a snapshot keeps the one its origin had at the moment it was taken.
 */
import { makingMark } from "../../provider/core/owner.js";
import type { Machine, Process, Running, Tool } from "./machine.js";

const extent = 4 * 1024 ** 2;

export interface Volume {
  readonly uuid: string;
  name: string;
  readonly kind: "plain" | "cow" | "thin" | "pool";
  sizeBytes: number;
  origin: Volume | undefined;
  readonly pool: string;
  readOnly: boolean;
  active: boolean;
  tags: string[];
  readonly createdAt: number;
  /** What a reader sees. */
  data: string;
  /** Of a COW store, in bytes; "0" of another. */
  readonly chunkSize: string;
  /** Fill level of a COW store. */
  usedPercent: number;
  /** `waits`: for its origin to be activated while nobody has it open. */
  merging: "no" | "waits" | "runs";
  /** The kernel has given its merge up: it goes on at the next activation. */
  mergeFailed: boolean;
  /** Of a thin volume in its pool. */
  thinId: number;
  /** Of its device: `/dev/dm-MINOR`. */
  readonly minor: number;
}

export interface Group {
  readonly name: string;
  readonly extents: number;
  readonly volumes: Set<Volume>;
  lockedBy: Process | "another" | undefined;
}

class LvmFailure extends Error {
  constructor(
    message: string,
    readonly exitCode = 5,
  ) {
    super(message);
  }
}

/** Options and operands of an LVM command line. */
interface Parsed {
  readonly options: ReadonlyMap<string, readonly string[]>;
  readonly operands: readonly string[];
}

const withValue = new Set([
  "-n",
  "-p",
  "-c",
  "-L",
  "-l",
  "-k",
  "-a",
  "-S",
  "-o",
  "--addtag",
  "--deltag",
  "--config",
  "--units",
  "--reportformat",
  "-i",
  "--merge",
  "--poll",
]);
const flags = new Set(["-s", "-y", "-a", "-b", "-K", "--nosuffix", "--binary", "--noheadings", "--refresh"]);

function parseArguments(argv: readonly string[]): Parsed {
  const options = new Map<string, string[]>();
  const operands: string[] = [];
  const [command, ...rest] = argv;
  for (let at = 0; at < rest.length; at++) {
    const argument = rest[at] ?? "";
    const [name, joined] = /^-[ak][yn]$/.test(argument)
      ? [argument.slice(0, 2), argument.slice(2)]
      : [argument, undefined];
    if (!argument.startsWith("-")) operands.push(argument);
    else if (joined === undefined && flags.has(name) && !(name === "-a" && command !== "lvs"))
      options.set(name, []);
    else if (withValue.has(name)) {
      options.set(name, [...(options.get(name) ?? []), joined ?? rest[++at] ?? ""]);
    } else throw new LvmFailure(`${command}: unrecognized option '${argument}'`, 3);
  }
  return { options, operands };
}

export class FakeLvm {
  readonly groups = new Map<string, Group>();
  /** How many merges were begun or put off. */
  merges = 0;
  /** `told`: LVM was told to merge it; `begun`: a reader of the origin sees its content; `ended`: all of it is merged. */
  onMerge: ((what: "told" | "begun" | "ended", snapshot: Volume) => void) | undefined;
  private archived = 0;
  private made = 0;

  constructor(
    private readonly machine: Machine,
    /** Whether somebody has the volume open. */
    private readonly isOpen: (volume: Volume) => boolean,
  ) {}

  addGroup(name: string, extents = 2047): Group {
    const group: Group = { name, extents, volumes: new Set(), lockedBy: undefined };
    this.groups.set(name, group);
    return group;
  }

  /** A plain volume with data. */
  addVolume(group: string, name: string, sizeBytes: number, data: string): Volume {
    return this.insert(this.group(group), { name, sizeBytes, data, kind: "plain" });
  }

  /** A thin pool. */
  addPool(group: string, name: string, sizeBytes: number): Volume {
    return this.insert(this.group(group), { name, sizeBytes, data: "", kind: "pool" });
  }

  /** A thin volume. */
  addThin(group: string, pool: string, name: string, sizeBytes: number, data: string): Volume {
    return this.insert(this.group(group), { name, sizeBytes, data, kind: "thin", pool });
  }

  find(group: string, name: string): Volume | undefined {
    return [...(this.groups.get(group)?.volumes ?? [])].find((volume) => volume.name === name);
  }

  all(): { readonly group: string; readonly volume: Volume }[] {
    return [...this.groups.values()].flatMap(({ name, volumes }) =>
      [...volumes].map((volume) => ({ group: name, volume })),
    );
  }

  /** The volume that the device is, if it is active. */
  device(id: string): Volume | undefined {
    return this.all().find(({ volume }) => `dm-${volume.minor}` === id && volume.active)?.volume;
  }

  /** What a read through its device gives; `undefined`: an I/O error. */
  read(volume: Volume): string | undefined {
    return volume.active && !isInvalid(volume) ? volume.data : undefined;
  }

  /** Takes a volume away with its snapshots, as `lvremove -f` by hand. */
  delete(volume: Volume): void {
    for (const { volume: other } of this.all())
      if (other.kind === "cow" && other.origin === volume) this.delete(other);
    for (const group of this.groups.values()) {
      if (!group.volumes.delete(volume)) continue;
      this.unlink(group, volume);
      for (const other of group.volumes) if (other.origin === volume) other.origin = undefined;
    }
  }

  rename(groupName: string, volume: Volume, name: string): void {
    const group = this.group(groupName);
    this.unlink(group, volume);
    volume.name = name;
    if (volume.active) this.link(group, volume);
  }

  /** Activates what a boot activates, and forgets who held locks. */
  boot(): void {
    for (const group of this.groups.values()) {
      group.lockedBy = undefined;
      for (const volume of group.volumes) {
        volume.active = true;
        this.link(group, volume);
        volume.mergeFailed = false;
        if (volume.merging === "waits") this.beginMerge(group, volume);
      }
    }
  }

  /**
   * Removes a snapshot, as `lvremove -y` by hand, or with `-An` as well. False: LVM refuses that.
   * One that is being merged goes only if it ran full, its merge failed, or it is not active.
   */
  removeByHand(groupName: string, volume: Volume, archives: boolean): boolean {
    const isDead = isInvalid(volume) || volume.mergeFailed || !volume.active;
    if (this.isOpen(volume) || (volume.merging !== "no" && !isDead)) return false;
    if (archives) this.archive(this.group(groupName), `lvremove -y ${groupName}/${volume.name}`);
    this.delete(volume);
    return true;
  }

  /** Changes tags, as `lvchange`. */
  retag(groupName: string, volume: Volume, drop: readonly string[], add: readonly string[]): void {
    if (drop.length === 0 && add.length === 0) return;
    const words = [...drop.map((tag) => `--deltag ${tag}`), ...add.map((tag) => `--addtag ${tag}`)];
    this.archive(this.group(groupName), `lvchange -y ${words.join(" ")} ${groupName}/${volume.name}`);
    volume.tags = [...new Set([...volume.tags.filter((tag) => !drop.includes(tag)), ...add])];
  }

  /** Whether one of its snapshots is being merged into it, or is to be. */
  isMergedInto(origin: Volume): boolean {
    return this.all().some(({ volume }) => volume.origin === origin && volume.merging !== "no");
  }

  /** All of it is merged while nobody looks. */
  finishMerge(groupName: string, volume: Volume): void {
    this.endMerge(this.group(groupName), volume);
  }

  /** Activates an origin with its snapshots, as `lvchange -ay` by hand. */
  activate(groupName: string, origin: Volume): void {
    const group = this.group(groupName);
    for (const volume of group.volumes) {
      if (volume !== origin && (volume.kind !== "cow" || volume.origin !== origin)) continue;
      volume.active = true;
      volume.mergeFailed = false;
      this.link(group, volume);
    }
    this.beginMerges(group, origin);
  }

  /** The metadata as LVM keeps it before it changes it. */
  private archive(group: Group, command: string): void {
    const { files } = this.machine;
    this.archived += 1;
    files.mkdirs("/etc/lvm/archive");
    const volumes = [...group.volumes].map(
      ({ name, uuid }) => `\t\t${name} {\n\t\t\tid = "${uuid}"\n\t\t}\n`,
    );
    files.write(
      `/etc/lvm/archive/${group.name}_${String(this.archived).padStart(5, "0")}-1.vg`,
      `description = "Created *before* executing '${command}'"\n${group.name} {\n\tlogical_volumes {\n${volumes.join("")}\t}\n}\n`,
    );
  }

  tools(): [string, Tool][] {
    return [
      ["lvs", (process) => this.command(process, (parsed) => this.lvs(process, parsed))],
      ["vgs", (process) => this.command(process, (parsed) => this.vgs(process, parsed))],
      ["lvcreate", (process) => this.command(process, (parsed) => this.lvcreate(process, parsed))],
      ["lvremove", (process) => this.command(process, (parsed) => this.lvremove(process, parsed))],
      ["lvextend", (process) => this.command(process, (parsed) => this.lvextend(process, parsed))],
      ["lvrename", (process) => this.command(process, (parsed) => this.lvrename(process, parsed))],
      ["lvconvert", (process) => this.command(process, (parsed) => this.lvconvert(process, parsed))],
      ["lvchange", (process) => this.command(process, (parsed) => this.lvchange(process, parsed))],
    ];
  }

  private *command(process: Process, run: (parsed: Parsed) => Running<number>): Running<number> {
    try {
      return yield* run(parseArguments(process.argv));
    } catch (error) {
      if (!(error instanceof LvmFailure)) throw error;
      process.err(error.message.replace(/^/gm, "  ").concat("\n"));
      return error.exitCode;
    } finally {
      for (const group of this.groups.values()) if (group.lockedBy === process) group.lockedBy = undefined;
    }
  }

  private group(name: string): Group {
    const group = this.groups.get(name);
    if (group === undefined) {
      throw new LvmFailure(`Volume group "${name}" not found\nCannot process volume group ${name}`);
    }
    return group;
  }

  private *lock(process: Process, group: Group, { options }: Parsed): Running<void> {
    const free = () =>
      group.lockedBy === undefined ||
      (group.lockedBy !== "another" && !this.machine.processes.has(group.lockedBy.pid));
    if (!free() && options.get("--config")?.[0]?.includes("wait_for_locks=0")) {
      throw new LvmFailure(
        `/run/lock/lvm/V_${group.name}: flock failed: Resource temporarily unavailable\nCan't get lock for ${group.name}.\nCannot process volume group ${group.name}`,
      );
    }
    while (!free()) yield process.wait({ ready: free });
    group.lockedBy = process;
  }

  /** `VG/LV`, chosen by `-S lv_uuid="..."` or `-S lv_tags={"..."}` as well if that is given: then nothing at all may be chosen. */
  private *selected(process: Process, parsed: Parsed): Running<{ group: Group; volume: Volume } | undefined> {
    const [groupName = "", name = ""] = (parsed.operands[0] ?? "").split("/");
    const group = this.group(groupName);
    yield* this.lock(process, group, parsed);
    const volume = this.find(groupName, name);
    if (volume === undefined) throw new LvmFailure(`Failed to find logical volume "${groupName}/${name}"`);
    const selection = parsed.options.get("-S")?.[0];
    const selecting = [`lv_uuid="${volume.uuid}"`, ...volume.tags.map((tag) => `lv_tags={"${tag}"}`)];
    return selection === undefined || selecting.includes(selection) ? { group, volume } : undefined;
  }

  private *lvs(process: Process, parsed: Parsed): Running<number> {
    for (const group of this.groups.values()) {
      yield* this.lock(process, group, parsed);
      // Who only looks has the lock for a moment, too.
      yield process.wait({});
      group.lockedBy = undefined;
    }
    for (const { group, volume } of this.all())
      if (volume.merging === "runs") this.goOnMerging(this.group(group), volume);
    const selection = parsed.options.get("-S")?.[0];
    if (selection !== undefined) {
      const field = parsed.options.get("-o")?.[0] ?? "";
      for (const { group, volume } of this.all()) {
        if (group !== parsed.operands[0] || selection !== `lv_uuid="${volume.uuid}"`) continue;
        const thin_id = volume.kind === "thin" ? String(volume.thinId) : "";
        const row: Record<string, string> = { ...this.row(this.group(group), volume), thin_id };
        process.out(`  ${row[field]}\n`);
      }
      return 0;
    }
    if (parsed.operands.length > 0) {
      const chosen = yield* this.selected(process, parsed);
      const field = parsed.options.get("-o")?.[0];
      if (chosen !== undefined && field !== undefined)
        process.out(
          `  ${field === "chunk_size" ? chosen.volume.chunkSize : this.row(chosen.group, chosen.volume)[field]}\n`,
        );
      return 0;
    }
    const rows = this.all().map(({ group, volume }) => this.row(this.group(group), volume));
    process.out(`${JSON.stringify({ report: [{ lv: rows }] })}\n`);
    return 0;
  }

  private *vgs(process: Process, parsed: Parsed): Running<number> {
    const group = this.group(parsed.operands[0] ?? "");
    yield* this.lock(process, group, parsed);
    process.out(`  ${group.name}\n`);
    return 0;
  }

  private *lvcreate(process: Process, parsed: Parsed): Running<number> {
    const { options, operands } = parsed;
    const [groupName = "", originName = ""] = (operands[0] ?? "").split("/");
    const group = this.group(groupName);
    yield* this.lock(process, group, parsed);
    const name = options.get("-n")?.[0] ?? "";
    if (this.find(groupName, name) !== undefined)
      throw new LvmFailure(`Logical Volume "${name}" already exists in volume group "${groupName}"`);
    const origin = this.find(groupName, originName);
    if (origin === undefined)
      throw new LvmFailure(`Snapshot origin LV ${originName} not found in Volume group ${groupName}.`);
    if ([...group.volumes].some((other) => other.origin === origin && other.merging !== "no"))
      throw new LvmFailure("Snapshots of an origin that has a merging snapshot are not supported.");
    const size = declaredSize(options, origin);
    const common = {
      name,
      readOnly: options.get("-p")?.[0] === "r",
      tags: [...(options.get("--addtag") ?? [])],
    };
    if (size === undefined) {
      if (origin.kind !== "thin")
        throw new LvmFailure("Please specify either size or extents with snapshots.");
      const { sizeBytes, data, pool } = origin;
      this.archive(group, process.argv.join(" "));
      this.insert(group, { ...common, kind: "thin", sizeBytes, data, pool, origin });
    } else {
      const sizeBytes = Math.min(roundUp(size), largestStore(origin));
      if (sizeBytes > this.freeBytes(group)) {
        const [free, needed] = [this.freeBytes(group) / extent, sizeBytes / extent];
        throw new LvmFailure(
          `Volume group "${groupName}" has insufficient free space (${free} extents): ${needed} required.`,
        );
      }
      this.archive(group, process.argv.join(" "));
      // The store is made and written as a plain volume first; only then it becomes a snapshot.
      const plain = this.insert(group, { ...common, kind: "plain", sizeBytes, data: "" });
      yield process.wait({});
      group.volumes.delete(plain);
      this.unlink(group, plain);
      const chunkSize = options.get("-c")?.[0]?.replace("b", "") ?? "4096";
      this.insert(group, { ...plain, kind: "cow", data: origin.data, origin, chunkSize });
    }
    yield process.wait({});
    process.out(`  Logical volume "${name}" created.\n`);
    return 0;
  }

  private *lvremove(process: Process, parsed: Parsed): Running<number> {
    const chosen = yield* this.selected(process, parsed);
    if (chosen === undefined) return 0;
    const { group, volume } = chosen;
    if (volume.merging !== "no")
      throw new LvmFailure(`Can't remove merging snapshot logical volume ${group.name}/${volume.name}.`);
    if (this.isOpen(volume)) throw new LvmFailure(`Logical volume ${group.name}/${volume.name} in use.`);
    if (volume.kind === "plain" && !volume.tags.includes(makingMark))
      throw new Error(`the origin ${volume.name} was about to be removed`);
    const { name } = volume;
    yield process.wait({});
    this.archive(group, process.argv.join(" "));
    this.delete(volume);
    yield process.wait({});
    process.out(`  Logical volume "${name}" successfully removed.\n`);
    return 0;
  }

  private *lvextend(process: Process, parsed: Parsed): Running<number> {
    const chosen = yield* this.selected(process, parsed);
    if (chosen === undefined) return 0;
    const { group, volume } = chosen;
    if (volume.origin === undefined) throw new LvmFailure("not a snapshot");
    const size = Math.min(
      roundUp(declaredSize(parsed.options, volume.origin) ?? 0),
      largestStore(volume.origin),
    );
    if (size <= volume.sizeBytes) {
      const extents = volume.sizeBytes / extent;
      throw new LvmFailure(`New size (${extents} extents) matches existing size (${extents} extents).`);
    }
    if (size - volume.sizeBytes > this.freeBytes(group)) {
      const needed = (size - volume.sizeBytes) / extent;
      throw new LvmFailure(
        `Insufficient free space: ${needed} extents needed, but only ${this.freeBytes(group) / extent} available`,
      );
    }
    yield process.wait({});
    this.archive(group, process.argv.join(" "));
    volume.sizeBytes = size;
    yield process.wait({});
    process.out(`  Logical volume ${group.name}/${volume.name} successfully resized.\n`);
    return 0;
  }

  private *lvrename(process: Process, parsed: Parsed): Running<number> {
    const [groupName = "", from = "", to = ""] = parsed.operands;
    const group = this.group(groupName);
    yield* this.lock(process, group, parsed);
    const volume = this.find(groupName, from);
    if (this.find(groupName, to) !== undefined)
      throw new LvmFailure(`Logical Volume "${to}" already exists in volume group "${groupName}"`);
    if (volume === undefined)
      throw new LvmFailure(`Existing logical volume "${from}" not found in volume group "${groupName}"`);
    yield process.wait({});
    this.archive(group, process.argv.join(" "));
    this.rename(groupName, volume, to);
    yield process.wait({});
    process.out(`  Renamed "${from}" to "${to}" in volume group "${groupName}"\n`);
    return 0;
  }

  /** Merges the snapshots with a tag, or puts that off while they or their origins are open. */
  private *lvconvert(process: Process, { options }: Parsed): Running<number> {
    const tag = options.get("--merge")?.[0] ?? "";
    if (!tag.startsWith("@")) throw new LvmFailure("only a tag tells which snapshot is merged", 3);
    for (const { group: name, volume } of this.all()) {
      if (!volume.tags.includes(tag.slice(1))) continue;
      const group = this.group(name);
      yield* this.lock(process, group, { options, operands: [] });
      if (volume.origin === undefined || volume.merging !== "no")
        throw new LvmFailure(`Command not permitted on LV ${name}/${volume.name}.`);
      if (isInvalid(volume))
        throw new LvmFailure(`Unable to merge invalidated snapshot LV ${name}/${volume.name}.`);
      yield process.wait({});
      this.archive(group, process.argv.join(" "));
      yield process.wait({});
      this.merges += 1;
      volume.merging = "waits";
      this.onMerge?.("told", volume);
      if (!this.isOpen(volume) && !this.isOpen(volume.origin)) this.beginMerge(group, volume);
      yield process.wait({});
      process.out(`  Merging of volume ${name}/${volume.name} started.\n`);
    }
    return 0;
  }

  /** From then on a reader of the origin sees the snapshot's content. A thin merge is over with that. */
  private beginMerge(group: Group, volume: Volume): void {
    const { origin } = volume;
    if (origin === undefined) throw new Error(`${volume.name} has no origin`);
    // The kernel refuses that.
    if (isInvalid(volume)) return;
    origin.data = volume.data;
    this.onMerge?.("begun", volume);
    if (volume.kind === "cow") {
      volume.merging = "runs";
      return;
    }
    origin.thinId = volume.thinId;
    this.endMerge(group, volume);
    for (const other of group.volumes)
      if (other.kind === "thin" && other.origin === origin) other.origin = undefined;
  }

  /** What the kernel has copied until somebody looks again. */
  private goOnMerging(group: Group, volume: Volume): void {
    if (volume.mergeFailed || !volume.active) return;
    volume.usedPercent = Math.max(0, volume.usedPercent - 20);
    if (volume.usedPercent === 0) this.endMerge(group, volume);
  }

  /** Which LVM does not archive. */
  private endMerge(group: Group, volume: Volume): void {
    this.unlink(group, volume);
    group.volumes.delete(volume);
    this.onMerge?.("ended", volume);
  }

  /** Those that waited, if neither volume is open. */
  private beginMerges(group: Group, origin: Volume): void {
    if (this.isOpen(origin)) return;
    for (const other of group.volumes)
      if (other.origin === origin && other.merging === "waits" && !this.isOpen(other))
        this.beginMerge(group, other);
  }

  private *lvchange(process: Process, parsed: Parsed): Running<number> {
    const chosen = yield* this.selected(process, parsed);
    if (chosen === undefined) return 0;
    const { group, volume } = chosen;
    const { options } = parsed;
    if (options.has("--refresh")) this.beginMerges(group, volume);
    const permission = options.get("-p")?.[0];
    const readOnly = permission === "r";
    if (permission !== undefined && readOnly === volume.readOnly) {
      throw new LvmFailure(
        `Logical volume ${group.name}/${volume.name} is already ${readOnly ? "read-only" : "writable"}.`,
      );
    }
    yield process.wait({});
    if (options.has("--addtag") || options.has("--deltag") || permission !== undefined)
      this.archive(group, process.argv.join(" "));
    const drop = options.get("--deltag") ?? [];
    volume.tags = [
      ...new Set([...volume.tags.filter((tag) => !drop.includes(tag)), ...(options.get("--addtag") ?? [])]),
    ];
    if (permission !== undefined) volume.readOnly = readOnly;
    if (options.get("-a")?.[0] === "y") {
      volume.active = true;
      this.link(group, volume);
    }
    yield process.wait({});
    process.out(`  Logical volume ${group.name}/${volume.name} changed.\n`);
    return 0;
  }

  private insert(
    group: Group,
    made: Pick<Volume, "name" | "sizeBytes" | "data" | "kind"> & Partial<Volume>,
  ): Volume {
    this.made += 1;
    const volume: Volume = {
      origin: undefined,
      chunkSize: "0",
      pool: "",
      readOnly: false,
      active: true,
      tags: [],
      createdAt: Math.floor(this.machine.now() / 1000),
      usedPercent: 0,
      merging: "no",
      mergeFailed: false,
      ...made,
      thinId: this.made,
      uuid: made.uuid ?? uuid(this.made),
      minor: made.minor ?? this.made,
    };
    group.volumes.add(volume);
    this.link(group, volume);
    return volume;
  }

  private link(group: Group, volume: Volume): void {
    const { files } = this.machine;
    const device = `dm-${volume.minor}`;
    if (!files.exists(`/dev/${device}`)) files.block(`/dev/${device}`, device);
    files.mkdirs(`/sys/class/block/${device}/holders`);
    files.write(`/sys/class/block/${device}/dev`, `253:${volume.minor}\n`);
    files.mkdirs(`/dev/${group.name}`);
    if (files.kind(`/dev/${group.name}/${volume.name}`, false) === undefined)
      files.link(`/dev/${device}`, `/dev/${group.name}/${volume.name}`);
  }

  private unlink(group: Group, volume: Volume): void {
    const { files } = this.machine;
    const path = `/dev/${group.name}/${volume.name}`;
    if (files.kind(path, false) !== undefined) files.remove(path);
    const device = `dm-${volume.minor}`;
    if (files.exists(`/dev/${device}`)) files.remove(`/dev/${device}`);
    if (files.exists(`/sys/class/block/${device}`)) files.removeTree(`/sys/class/block/${device}`);
  }

  /** Puts a volume out of use, as `lvchange -an` by hand. */
  deactivate(groupName: string, volume: Volume): void {
    volume.active = false;
    this.unlink(this.group(groupName), volume);
  }

  freeBytes(group: Group): number {
    const stored = [...group.volumes].filter(({ kind }) => kind !== "thin");
    return group.extents * extent - stored.reduce((sum, { sizeBytes }) => sum + roundUp(sizeBytes), 0);
  }

  private row(group: Group, volume: Volume): Record<string, string> {
    const { kind, active, origin } = volume;
    const merging = volume.merging !== "no";
    const merged = [...group.volumes].find((other) => other.origin === volume && other.merging !== "no");
    const snapshots = [...group.volumes].filter((other) => other.kind === "cow" && other.origin === volume);
    const known = active && kind === "cow";
    const percent = active && kind !== "plain" ? volume.usedPercent.toFixed(2) : "";
    const hasThin = [...group.volumes].some(({ kind: other, active: up }) => other === "thin" && up);
    const open = active && (kind === "pool" ? hasThin : this.isOpen(volume));
    return {
      lv_uuid: volume.uuid,
      vg_name: group.name,
      lv_name: volume.name,
      lv_path: kind === "pool" || merging ? "" : `/dev/${group.name}/${volume.name}`,
      lv_dm_path: `/dev/mapper/${group.name}-${volume.name.replaceAll("-", "--")}`,
      origin: origin?.name ?? "",
      origin_uuid: origin?.uuid ?? "",
      lv_size: String(volume.sizeBytes),
      origin_size:
        kind === "cow" ? String(origin?.sizeBytes) : snapshots.length > 0 ? String(volume.sizeBytes) : "",
      lv_attr: attributes(volume, merged, snapshots, open),
      lv_active: active ? "active" : "",
      lv_device_open: active ? (open ? "1" : "0") : "-1",
      lv_snapshot_invalid: known ? (isInvalid(volume) ? "1" : "0") : "-1",
      lv_merge_failed: known || (active && merged?.merging === "runs") ? mergeFailed(merged ?? volume) : "-1",
      lv_merging: merging || (merged !== undefined && kind !== "thin") ? "1" : "0",
      snap_percent: percent,
      data_percent: percent,
      metadata_percent: kind === "pool" ? "10.94" : "",
      pool_lv: volume.pool,
      lv_health_status: kind === "pool" && volume.usedPercent >= 100 ? "out_of_data" : "",
      lv_role: role(volume, snapshots, group),
      lv_permissions: volume.readOnly ? "read-only" : active ? "writeable" : "unknown",
      lv_tags: [...volume.tags].sort().join(","),
      lv_time: String(volume.createdAt),
      vg_extent_size: String(extent),
      vg_free: String(this.freeBytes(group)),
    };
  }
}

function mergeFailed(volume: Volume): string {
  return volume.mergeFailed ? "1" : "0";
}

/** A full store: what is in it is lost. */
export function isInvalid({ kind, usedPercent }: Volume): boolean {
  return kind === "cow" && usedPercent >= 100;
}

function attributes(
  volume: Volume,
  merged: Volume | undefined,
  snapshots: readonly Volume[],
  open: boolean,
): string {
  const { kind, active } = volume;
  const merging = volume.merging !== "no";
  const type = {
    plain: merged ? "O" : snapshots.length > 0 ? "o" : "-",
    cow: merging ? "S" : "s",
    thin: merging ? "S" : merged ? "O" : snapshots.length > 0 ? "o" : "V",
    pool: "t",
  }[kind];
  const state = !active ? "-" : isInvalid(volume) ? "I" : "a";
  const target =
    kind === "thin" || kind === "pool" ? "t" : kind === "cow" || snapshots.length > 0 ? "s" : "-";
  const full = kind === "pool" && volume.usedPercent >= 100;
  return `${type}${volume.readOnly ? "r" : "w"}i-${state}${open ? "o" : "-"}${target}${target === "t" ? "z" : "-"}${full ? "D" : "-"}-`;
}

function role(volume: Volume, snapshots: readonly Volume[], group: Group): string {
  if (volume.kind === "pool") return "private";
  if (volume.kind === "cow") return "public,snapshot,thicksnapshot";
  if (volume.origin !== undefined) return "public,snapshot,thinsnapshot";
  if (snapshots.length > 1) return "public,origin,thickorigin,multithickorigin";
  if (snapshots.length > 0) return "public,origin,thickorigin";
  const thinOrigin = [...group.volumes].some(({ kind, origin }) => kind === "thin" && origin === volume);
  return thinOrigin ? "public,origin,thinorigin" : "public";
}

function declaredSize(options: Parsed["options"], origin: Volume): number | undefined {
  const bytes = /^(\d+)b$/.exec(options.get("-L")?.[0] ?? "")?.[1];
  if (bytes !== undefined) return Number(bytes);
  const percent = /^(\d+)%ORIGIN$/.exec(options.get("-l")?.[0] ?? "")?.[1];
  return percent === undefined ? undefined : (origin.sizeBytes * Number(percent)) / 100;
}

/** LVM clamps a store to what a copy of the whole origin and its table need. */
function largestStore(origin: Volume): number {
  return roundUp(origin.sizeBytes) + extent;
}

function roundUp(bytes: number): number {
  return Math.ceil(bytes / extent) * extent;
}

function uuid(count: number): string {
  const digits = String(count).padStart(6, "0");
  return `${digits}-fake-fake-fake-fake-fake-${digits}`;
}
