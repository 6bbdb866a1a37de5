/** File systems of attached disks, mounted through the real CLI: whole disks and partitions, with journals left unreplayed. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import {
  attachment,
  type Declared,
  FaultStack,
  mount,
  nbdExport,
  output,
  snapshot,
} from "./faults/fault-stack.mts";
import type { Lab } from "./lab.mts";
import { checksum, freshLab, leftovers, mainPid, type Values } from "./support.mts";
import { waitFor } from "./wait.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let stack: FaultStack;

/** Disks whose attachments can be written, so that a write would show. */
const disks = ["whole", "parted", "xfs", "btrfs", "twin"] as const;
const origins = { whole: "WHOLE", parted: "PARTED", xfs: "XFS", btrfs: "BTRFS", twin: "BTRFS" };

const chain = (moment: number): Declared[] =>
  disks.flatMap((name, at) => [
    snapshot(name, {
      origin: `LV-${origins[name]}`,
      name: `${name}-snap`,
      size: "8M",
      readOnly: false,
      triggers: [moment],
    }),
    nbdExport(`${name}-export`, { device: output(name, "path"), port: 10900 + at, readOnly: false }),
    attachment(`${name}-attached`, { uri: output(`${name}-export`, "uri"), readOnly: false }),
  ]);

const mountOf = (disk: string, name: string, args: Values) =>
  mount(name, { device: output(`${disk}-attached`, "path"), ...args });
const whole = mountOf("whole", "whole-files", { path: "/mnt/vm 1-backup" });
const others = [
  mountOf("parted", "boot-files", { partition: 1, path: "/srv/boot" }),
  mountOf("parted", "efi-files", { partition: 5, path: "/srv/made/efi" }),
  mountOf("xfs", "xfs-files", { path: "/mnt/xfs" }),
  mountOf("btrfs", "btrfs-files", { path: "/mnt/btrfs" }),
];

/** An image of `test/recorded`, made with mkfs.btrfs --mixed --rootdir or mkfs.vfat: the guests have neither. */
async function writeImage(name: string, device: string): Promise<void> {
  const image = readFileSync(join(__dirname, "..", "recorded", `${name}.img.gz.gz`));
  await lab.server1.run(`base64 -d | gunzip | gunzip | dd of=${device} bs=1M oflag=direct status=none`, {
    stdin: image.toString("base64"),
  });
}

/** The VMs' disks. Two of their file systems stay mounted, as a running VM has them: their journals are not closed. */
const startVms = `set -e
  for disk in WHOLE:32 PARTED:64 XFS:320 BTRFS:16; do
    lvcreate -qq -y -W n -L \${disk#*:}M -n LV-\${disk%:*} VgVm
    dd if=/dev/zero of=/dev/VgVm/LV-\${disk%:*} bs=1M count=8 oflag=direct status=none
  done
  sfdisk -q --no-tell-kernel /dev/VgVm/LV-PARTED <<TABLE
label: gpt
size=16M, type=linux, name="boot x"
size=8M, type=swap
size=16M, type=lvm
size=4M, type=linux
size=4M, type=uefi
TABLE
  kpartx -a /dev/VgVm/LV-PARTED && udevadm settle
  part=/dev/mapper/VgVm-LV--PARTED; [ -e \${part}1 ] || part=\${part}p
  mkfs.ext4 -q -L 'my "boot' \${part}1 && mkdir -p /vm/part /vm/whole /vm/xfs && mount \${part}1 /vm/part && echo "kernel of last night" >/vm/part/vmlinuz && umount /vm/part
  mkswap -q \${part}2 && vgcreate -qq -y VgGuest \${part}3 && lvcreate -qq -y -W n -l 100%FREE -n root VgGuest && vgchange -qq -an VgGuest
  kpartx -d /dev/VgVm/LV-PARTED
  losetup /dev/loop0 /dev/VgVm/LV-WHOLE && mkfs.ext4 -q -L root /dev/loop0
  losetup /dev/loop1 /dev/VgVm/LV-XFS && mkfs.xfs -q -L data /dev/loop1
  for disk in 0:whole 1:xfs; do
    # What is unmounted once is on the disk itself; what is written then is in the journal.
    mount /dev/loop\${disk%:*} /vm/\${disk#*:} && echo "a file of last night" >/vm/\${disk#*:}/file && umount /vm/\${disk#*:}
    mount /dev/loop\${disk%:*} /vm/\${disk#*:} && echo "of the last second" >/vm/\${disk#*:}/late && sync -f /vm/\${disk#*:}
  done`;

beforeAll(async () => {
  lab = await freshLab();
  await lab.server1.run(startVms);
  const offset = (await lab.server1.run("partx -rgo START -n 5 /dev/VgVm/LV-PARTED")).stdout.trim();
  await writeImage("btrfs", "/dev/VgVm/LV-BTRFS");
  await writeImage("vfat", "/root/efi.img");
  await lab.server1.run(
    `dd if=/root/efi.img of=/dev/VgVm/LV-PARTED bs=512 seek=${offset} oflag=direct status=none`,
  );
  await lab.server2.run("mkdir /srv/boot");
  stack = await FaultStack.create(lab);
});

afterAll(() => stack?.close());

const read = async (path: string) => (await lab.server2.run(`cat '${path}'`)).stdout.trim();
const mountsOf = async (path: string) =>
  (await lab.server2.run(`findmnt -rno SOURCE,OPTIONS -M '${path}'; true`)).stdout.trim();

let sums: Record<string, string>;
async function checksums(): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  for (const disk of ["whole", "xfs"])
    found[disk] = await checksum(lab.server2, `/dev/lvm-nbd/${disk}-attached`);
  return found;
}

it("whole disks and partitions are mounted and read, of each file system without a write", async () => {
  stack.declare(...chain(1));
  (await stack.up()).succeeded("16 created");
  sums = await checksums();
  stack.declare(...chain(1), whole, ...others);
  (await stack.up()).succeeded("5 created");
  expect(await read("/mnt/vm 1-backup/file")).toBe("a file of last night");
  expect(await read("/srv/boot/vmlinuz")).toBe("kernel of last night");
  expect(await read("/mnt/xfs/file")).toBe("a file of last night");
  expect(await read("/mnt/btrfs/file")).toBe("the file of last night");
  const state = await stack.state();
  const disk = state.get("whole-attached")?.device;
  expect(state.get("whole-files")).toMatchObject({
    state: "mounted",
    mountedDevice: disk,
    options: "ro,nosuid,nodev,noexec,relatime,norecovery",
    fileSystem: { type: "ext4", label: "root", uuid: expect.stringMatching(/^[0-9a-f-]{36}$/) },
  });
  expect(state.get("boot-files")).toMatchObject({
    state: "mounted",
    mountedDevice: `${state.get("parted-attached")?.device}p1`,
    fileSystem: { type: "ext4", label: 'my "boot' },
  });
  expect(state.get("efi-files")).toMatchObject({
    state: "mounted",
    fileSystem: { type: "vfat", label: "EFI", uuid: "1234-5678" },
  });
  expect(state.get("xfs-files")).toMatchObject({
    state: "mounted",
    options: expect.stringMatching(/^ro,.*nouuid,norecovery/),
    fileSystem: { type: "xfs", label: "data" },
  });
  expect(state.get("btrfs-files")).toMatchObject({
    state: "mounted",
    options: expect.stringMatching(/^ro,.*rescue=nologreplay/),
    fileSystem: { type: "btrfs", label: "data", uuid: "11111111-2222-3333-4444-555555555555" },
  });
  expect(await checksums()).toEqual(sums);
  await stack.isAsDeclared();
});

it("what happened behind our back is told by name, and the same up puts it right", async () => {
  await lab.server2.run(`umount '/mnt/vm 1-backup' && mount -o remount,rw /srv/boot && systemctl disable -q mnt-xfs.mount &&
    mount -t tmpfs over /mnt/btrfs && sed -i s/,noexec// '/etc/systemd/system/srv-made-efi.mount'`);
  const run = await stack.up({ refresh: true });
  run.said("whole-files on server2: is unmounted", "boot-files on server2: is remounted", "(ext4, rw,");
  run.said(
    "xfs-files on server2: is disabled",
    "btrfs-files on server2: is replaced",
    "efi-files on server2: is edited",
  );
  run.failedWith("MOUNT_POINT_UNSUITABLE", "Mount btrfs-files", "server2", "over is mounted at /mnt/btrfs");
  await lab.server2.run("umount /mnt/btrfs");
  expect(await read("/mnt/vm 1-backup/file")).toBe("a file of last night");
  expect(await mountsOf("/srv/boot")).toMatch(/^\S+p1 ro,/);
  (await stack.up({ refresh: true })).succeeded();
  await stack.isAsDeclared();
  expect(await checksums()).toEqual(sums);
});

it("a busy mount is not removed, nor what cannot be mounted mounted: each says why", async () => {
  await lab.server2.run(`
    mkdir -p /srv/full /srv/tmp /srv/tab && touch /srv/full/letter && ln -s tab /srv/link && mount -t tmpfs over /srv/tmp
    echo '/dev/vdz /srv/tab ext4 noauto 0 0' >>/etc/fstab
    systemd-run -q --unit reader --working-directory '/mnt/vm 1-backup' tail -f file`);
  const bad: [name: string, disk: string, args: Values][] = [
    ["no-partition", "parted", { path: "/srv/a" }],
    ["swap", "parted", { partition: 2, path: "/srv/a" }],
    ["guest-lvm", "parted", { partition: 3, path: "/srv/a" }],
    ["nothing", "parted", { partition: 4, path: "/srv/a" }],
    ["ninth", "parted", { partition: 9, path: "/srv/a" }],
    ["no-table", "whole", { partition: 1, path: "/srv/a" }],
    ["second-btrfs", "twin", { path: "/srv/a" }],
    ["full", "parted", { partition: 1, path: "/srv/full" }],
    ["taken", "parted", { partition: 1, path: "/srv/tmp" }],
    ["in-fstab", "parted", { partition: 1, path: "/srv/tab" }],
    ["linked", "parted", { partition: 1, path: "/srv/link/deep" }],
  ];
  const before = await leftovers(lab.server2);
  stack.declare(...chain(1), ...others, ...bad.map(([name, disk, args]) => mountOf(disk, name, args)));
  const run = await stack.up();
  const said = (name: string, code: Parameters<typeof run.failedWith>[0], ...texts: string[]) =>
    run.failedWith(code, `Mount ${name}`, "server2", ...texts);
  const pid = await mainPid(lab.server2, "reader");
  said("whole-files", "MOUNT_IN_USE", "/mnt/vm 1-backup is in use", `tail -f file (pid ${pid})`);
  said(
    "no-partition",
    "NOT_MOUNTABLE",
    "a partition table (gpt)",
    '1 (16 MiB, ext4 "my \\"boot")',
    "2 (8.0 MiB, swap space)",
    "3 (16 MiB, a physical volume of LVM)",
    '5 (4.0 MiB, vfat "EFI")',
    "by `partition`",
  );
  said("swap", "NOT_MOUNTABLE", "swap space");
  said("guest-lvm", "NOT_MOUNTABLE", "a physical volume of LVM", "never activated on a host");
  said("nothing", "NOT_MOUNTABLE", "nothing that blkid recognises");
  said("ninth", "PARTITION_NOT_FOUND", "no partition 9; there are: 1 (16 MiB");
  said("no-table", "PARTITION_NOT_FOUND", 'no partition table; the whole of it is ext4 "root"');
  said(
    "second-btrfs",
    "NOT_MOUNTABLE",
    "11111111-2222-3333-4444-555555555555",
    "is mounted on the host already",
  );
  said("full", "MOUNT_POINT_UNSUITABLE", "not empty: it holds letter");
  said("taken", "MOUNT_POINT_UNSUITABLE", "over (tmpfs) is mounted at /srv/tmp");
  said("in-fstab", "MOUNT_POINT_UNSUITABLE", "/etc/fstab mounts /dev/vdz");
  said("linked", "MOUNT_POINT_UNSUITABLE", "/srv/link is a symbolic link: give /srv/tab/deep");
  expect(await leftovers(lab.server2)).toBe(before);
  expect(await read("/mnt/vm 1-backup/file")).toBe("a file of last night");
  expect((await lab.server2.run("ls /srv; dmsetup ls")).stdout).not.toMatch(/^a$|VgGuest/m);
  await lab.server2.run(
    `systemctl stop reader; umount /srv/tmp; rm -r /srv/full /srv/tab /srv/tmp /srv/link; : >/etc/fstab`,
  );
});

it("a link that dies takes the mount with it when nobody uses it, and brings it back", async () => {
  const isMounted = async () => (await mountsOf("/mnt/xfs")) !== "";
  await lab.server1.run("systemctl stop lvm-nbd-export-xfs-export");
  await waitFor(async () => !(await isMounted()) || undefined, {
    timeoutSeconds: 60,
    what: "the mount of a dead link to be gone",
  });
  await lab.server1.run("systemctl start lvm-nbd-export-xfs-export");
  await waitFor(async () => (await isMounted()) || undefined, {
    timeoutSeconds: 90,
    what: "the mount to be back with its link",
  });
  expect(await read("/mnt/xfs/file")).toBe("a file of last night");
});

it("a new moment replaces the chain and what is mounted of it", async () => {
  await lab.server1.run("fsfreeze -f /vm/whole && fsfreeze -u /vm/whole && sync -f /vm/whole");
  stack.declare(...chain(2), whole, ...others);
  (await stack.up()).succeeded("20 replaced");
  expect(await read("/mnt/vm 1-backup/late")).toBe("of the last second");
  await stack.isAsDeclared();
});

it("everything is removed afterwards, folders that were made included", async () => {
  (await stack.destroy()).succeeded();
  expect(await leftovers(lab.server1)).toBe("");
  expect(await leftovers(lab.server2)).toBe("");
  expect((await lab.server2.run("ls /mnt /srv; dmsetup ls")).stdout.trim()).toMatch(
    /^\/mnt:\n\n\/srv:\nboot\n/,
  );
});
