/**
 * How a file system is mounted so that nothing is written to its device, not even its journal replayed. What is not
 * listed here is not mounted: some file systems write in spite of `ro`.
 */

interface ReadOnlyMount {
  /** As mount(8) and the kernel name it. */
  readonly kernelType: string;
  readonly options: readonly string[];
}

/** A journal stays unreplayed, so the file system is seen as it lay on the disk. Sources: ext4(5), xfs(5), btrfs(5). */
const mounts: ReadonlyMap<string, ReadOnlyMount> = new Map(
  Object.entries({
    // The kernel's ext4 reads all three, and `noload` of it alone is taken where there is no journal.
    ext2: { kernelType: "ext4", options: ["noload"] },
    ext3: { kernelType: "ext4", options: ["noload"] },
    ext4: { kernelType: "ext4", options: ["noload"] },
    // Two snapshots of one volume have one UUID.
    xfs: { kernelType: "xfs", options: ["norecovery", "nouuid"] },
    btrfs: { kernelType: "btrfs", options: ["rescue=nologreplay"] },
    vfat: { kernelType: "vfat", options: [] },
    exfat: { kernelType: "exfat", options: [] },
    ntfs: { kernelType: "ntfs3", options: [] },
    iso9660: { kernelType: "iso9660", options: [] },
    udf: { kernelType: "udf", options: [] },
    squashfs: { kernelType: "squashfs", options: [] },
    erofs: { kernelType: "erofs", options: [] },
  }),
);

/** What must hold of every mount, whatever the file system. */
export const alwaysOptions = ["ro", "nodev", "nosuid", "noexec"] as const;

/** The kernel's names of the file systems that can be mounted without a write. */
export const kernelTypes = [...new Set([...mounts.values()].map(({ kernelType }) => kernelType))];

/** Names of `blkid` for them. */
export const mountableTypes = [...mounts.keys()];

/** How it is mounted by a kernel of that release (`uname -r`); `undefined`: not without writing, or not known. */
export function readOnlyMount(type: string, kernelRelease: string): ReadOnlyMount | undefined {
  const found = mounts.get(type);
  if (found === undefined) return undefined;
  const options = found.options.map((option) =>
    // `rescue=` came with 5.9, which calls the old name deprecated.
    option === "rescue=nologreplay" && isBefore(kernelRelease, 5, 9) ? "nologreplay" : option,
  );
  return { kernelType: found.kernelType, options: [...alwaysOptions, ...options] };
}

function isBefore(release: string, major: number, minor: number): boolean {
  const match = /^(\d+)\.(\d+)/.exec(release);
  if (match === null) throw new Error(`"${release.slice(0, 40)}" is no kernel release`);
  const [, first, second] = match.map(Number);
  return (first ?? 0) < major || (first === major && (second ?? 0) < minor);
}
