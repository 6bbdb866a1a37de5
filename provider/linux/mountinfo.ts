/** What is mounted, and what fstab(5) would mount. Source of the first: proc(5), `/proc/PID/mountinfo`. */

/** One mount. */
export interface MountEntry {
  readonly mountPoint: string;
  /** As the kernel names the device, e.g. `/dev/nbd0p1`. */
  readonly source: string;
  readonly type: string;
  /** Of this mount: `ro`, `nosuid`, ... */
  readonly options: readonly string[];
  /** Of the file system, wherever it is mounted. */
  readonly superOptions: readonly string[];
}

/** All mounts; of those at one path the last is on top. */
export function parseMountinfo(text: string): MountEntry[] {
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => {
      const [left = "", right] = line.split(" - ");
      const [, , , , mountPoint, options] = left.split(" ");
      const [type, source, superOptions] = right?.split(" ") ?? [];
      if (mountPoint === undefined || options === undefined || type === undefined || source === undefined)
        throw new Error(`unexpected line in mountinfo: "${line.slice(0, 80)}"`);
      return {
        mountPoint: unescaped(mountPoint),
        source: unescaped(source),
        type,
        options: options.split(","),
        superOptions: (superOptions ?? "").split(","),
      };
    });
}

/** The sources that fstab has for that mount point. */
export function fstabSources(text: string, mountPoint: string): string[] {
  return text.split("\n").flatMap((line) => {
    const [source, where] = line.trim().split(/[ \t]+/);
    if (source === undefined || where === undefined || source.startsWith("#")) return [];
    return unescaped(where).replace(/(.)\/+$/, "$1") === mountPoint ? [source] : [];
  });
}

/** Blanks, tabs, line breaks and backslashes are written as octal numbers. */
function unescaped(text: string): string {
  const bytes = Buffer.from(text, "utf8")
    .toString("latin1")
    .replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
  return Buffer.from(bytes, "latin1").toString("utf8");
}

/** A path without control characters and backslashes as mountinfo writes it. */
export function escapedMountPoint(path: string): string {
  return path.replaceAll(" ", "\\040");
}
