/** Which backups of a VM a program should declare. */
import { folderOf } from "../linux/copyJob.js";
import { generations, type RetentionPolicy } from "./generations.js";
import { type Image, withoutSlash } from "./listImages.js";

/** A volume of a VM. */
export interface NamedVolume {
  readonly volumeGroup: string;
  readonly origin: string;
}

/** A backup of a VM that should exist. */
export interface VmGeneration<Volume extends NamedVolume> {
  /** The day, `YYYY-MM-DD`. */
  readonly key: string;
  /** Whether it may be made: it is today's. Any other is kept as it is. */
  readonly isToday: boolean;
  readonly format: "raw" | "qcow2";
  /** With the file of the image of each. */
  readonly volumes: readonly ((Volume | NamedVolume) & { readonly file: string })[];
}

/** What is declared of a VM. */
export interface VmWanted<Volume extends NamedVolume> {
  /** Name of the VM, which begins the names of its images. */
  readonly name: string;
  /** Absolute path. */
  readonly folder: string;
  readonly volumes: readonly Volume[];
  readonly format: "raw" | "qcow2";
  readonly keep: RetentionPolicy;
  readonly now: Date;
  /** What is in the folder; see `listImages`. */
  readonly made: readonly Image[];
}

/**
 * The backups of a VM that should exist now, the newest first: today's, and of those in `made` what `keep` tells. Pure.
 *
 * An image that is not sound, or whose moment is not whole, makes no other one superfluous, and goes when it would go
 * were it good. The last good one stays until today's is good. A volume that is new is part of the first moment that is taken with it; a volume that is gone stays in those
 * that hold it.
 *
 * @throws Error that says what is wrong with the name or the policy
 */
export function vmGenerations<Volume extends NamedVolume>(wanted: VmWanted<Volume>): VmGeneration<Volume>[] {
  const { name, volumes, keep, now } = wanted;
  if (!/^[A-Za-z0-9][A-Za-z0-9_.+-]*$/.test(name))
    throw new Error(`"${name}" becomes part of file names: it may hold letters, digits and _ . + -`);
  const folder = folderOf(`${withoutSlash(wanted.folder)}/`);
  const elsewhere = wanted.made.find(({ file }) => folderOf(file) !== folder);
  if (elsewhere !== undefined)
    throw new Error(
      `made: ${elsewhere.file} is not in ${wanted.folder}: give what listImages told of that very folder`,
    );
  const sets = found(wanted);
  const [today = ""] = generations({ daily: 1 }, now, []);
  const whole = [...sets].filter(([, images]) => isWhole(images)).map(([key]) => key);
  const kept = new Set([...generations(keep, now, whole), ...generations(keep, now, [...sets.keys()])]);
  // Of a night that fails the last good one is still there, whatever the policy.
  const [newest] = whole.sort().reverse();
  if (newest !== undefined && !whole.includes(today)) kept.add(newest);
  return [...kept]
    .sort()
    .reverse()
    .map((key) => {
      const images = sets.get(key) ?? [];
      const isToday = key === today;
      const format = formatOf(images[0]?.format) ?? wanted.format;
      const file = (volume: NamedVolume) => fileOf(wanted, volume, key, format);
      const files = new Set(images.flatMap(({ file, together }) => [file, ...together]));
      // Of today's moment what is not there yet is still to come; a volume that was not part of it is in the next one.
      const own = volumes.filter((volume) => (isToday && images.length === 0) || files.has(file(volume)));
      const there = own.filter((volume) => isToday || images.some((image) => image.file === file(volume)));
      const dropped = images.flatMap(({ file: path, volumeGroup, origin }) =>
        volumeGroup === undefined || origin === undefined || there.some((volume) => file(volume) === path)
          ? []
          : [{ volumeGroup, origin, file: path }],
      );
      return {
        ...{ key, isToday, format },
        volumes: [...there.map((volume) => ({ ...volume, file: file(volume) })), ...dropped],
      };
    });
}

/** The images of the VM by their day. Whose it is, the name of the file and the manifest must tell alike. */
function found(wanted: VmWanted<NamedVolume>): Map<string, Image[]> {
  const sets = new Map<string, Image[]>();
  for (const image of wanted.made) {
    const [, key] = /\.(\d{4}-\d\d-\d\d)\.[^.]+$/.exec(image.file) ?? [];
    const { volumeGroup, origin, format } = image;
    if (key === undefined || volumeGroup === undefined || origin === undefined) continue;
    if (image.file !== fileOf(wanted, { volumeGroup, origin }, key, format)) continue;
    sets.set(key, [...(sets.get(key) ?? []), image]);
  }
  return sets;
}

function isWhole(images: readonly Image[]): boolean {
  const files = images.map(({ file }) => file);
  const isOne = images.every(({ moment }) => moment === images[0]?.moment);
  return (
    isOne && images.every(({ sound, together }) => sound && together.every((file) => files.includes(file)))
  );
}

function formatOf(format: string | undefined): "raw" | "qcow2" | undefined {
  return format === "raw" || format === "qcow2" ? format : undefined;
}

/** `FOLDER/NAME.GROUP.VOLUME.DAY.FORMAT` */
function fileOf(
  { folder, name }: Pick<VmWanted<NamedVolume>, "folder" | "name">,
  { volumeGroup, origin }: NamedVolume,
  key: string,
  format: string,
): string {
  return `${withoutSlash(folder)}/${name}.${volumeGroup}.${origin}.${key}.${format}`;
}
