import { describe, expect, it } from "vitest";
import { escapedMountPoint, fstabSources, parseMountinfo } from "../../provider/linux/mountinfo.js";

/** Recorded in the lab (Linux 6.1). */
const recorded = `23 1 254:0 / / rw,noatime shared:1 - ext4 /dev/vda rw
314 23 43:0 / /mnt/vm\\0401 ro,nosuid,nodev,noexec,relatime shared:160 - ext4 /dev/nbd0 ro,norecovery
449 23 0:38 / /mnt/btrfs ro,nosuid,nodev,noexec,relatime shared:233 - btrfs /dev/nbd3 ro,ssd,rescue=nologreplay,space_cache=v2,subvolid=5,subvol=/
450 449 0:39 / /mnt/btrfs rw,relatime shared:233 - tmpfs over rw
26 23 0:5 / /dev rw,nosuid - devtmpfs devtmpfs rw,size=4k
`;

describe("mounts", () => {
  it("are told with device and options, of the mount and of the file system", () => {
    const entries = parseMountinfo(recorded);
    expect(entries).toHaveLength(5);
    expect(entries[1]).toEqual({
      mountPoint: "/mnt/vm 1",
      source: "/dev/nbd0",
      type: "ext4",
      options: ["ro", "nosuid", "nodev", "noexec", "relatime"],
      superOptions: ["ro", "norecovery"],
    });
    expect(entries.filter(({ mountPoint }) => mountPoint === "/mnt/btrfs").at(-1)?.source).toBe("over");
  });

  it("are not guessed from a line that is none", () => {
    expect(() => parseMountinfo("314 23 43:0 / /mnt ro shared:160 ext4 /dev/nbd0 ro\n")).toThrow(
      /unexpected/,
    );
  });

  it("at a path with blanks are found as the kernel writes them", () => {
    expect(recorded).toContain(` ${escapedMountPoint("/mnt/vm 1")} `);
  });
});

describe("fstab", () => {
  const text = `# /dev/sdz /srv ext4 defaults 0 0
UUID=1 / ext4 errors=remount-ro 0 1
/dev/sdb1\t/srv/my\\040files/  ext4 noauto
LABEL=x none swap sw 0 0
`;

  it.each([
    ["/", ["UUID=1"]],
    ["/srv/my files", ["/dev/sdb1"]],
    ["/srv", []],
    ["/mnt", []],
  ])("has at %s: %j", (mountPoint, sources) => {
    expect(fstabSources(text, mountPoint)).toEqual(sources);
  });
});
