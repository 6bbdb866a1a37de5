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
import { freshLab, leftovers, mainPid, type Values } from "./support.mts";
import { waitFor } from "./wait.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let stack: FaultStack;

/** Attached so that they can be written: a write would show. */
const chain = (moment: number): Declared[] =>
  (["whole", "parted"] as const).flatMap((name, at) => [
    snapshot(name, {
      origin: `LV-${name.toUpperCase()}`,
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
  mountOf("parted", "btrfs-files", { partition: 6, path: "/mnt/btrfs" }),
  mountOf("parted", "xfs-files", { partition: 8, path: "/mnt/xfs" }),
];

/** An image of `test/recorded`, made with mkfs.btrfs --mixed --rootdir or mkfs.vfat: the guests have neither. */
async function writeImage(name: string, device: string): Promise<void> {
  const image = readFileSync(join(__dirname, "..", "recorded", `${name}.img.gz.gz`));
  await lab.server1.run(`base64 -d | gunzip | gunzip | dd of=${device} bs=1M oflag=direct status=none`, {
    stdin: image.toString("base64"),
  });
}

const part = "/dev/mapper/VgVm-LV--PARTED";

/** The VM's disks. Two of their file systems stay mounted, as a running VM has them: their journals are not closed. */
const startVm = `set -e
  for disk in WHOLE:32 PARTED:416; do
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
size=16M, type=linux
size=16M, type=linux
size=320M, type=linux
TABLE
  kpartx -a -p '' /dev/VgVm/LV-PARTED && udevadm settle
  mkfs.ext4 -q -L 'my "boot' ${part}1 && mkdir -p /vm/part /vm/whole /vm/xfs && mount ${part}1 /vm/part && echo "kernel of last night" >/vm/part/vmlinuz && umount /vm/part
  mkswap -q ${part}2 && vgcreate -qq -y VgGuest ${part}3 && lvcreate -qq -y -W n -l 100%FREE -n root VgGuest && vgchange -qq -an VgGuest
  losetup /dev/loop0 /dev/VgVm/LV-WHOLE && mkfs.ext4 -q -L root /dev/loop0 && mkfs.xfs -q -L data ${part}8
  for disk in /dev/loop0:whole ${part}8:xfs; do
    # What is unmounted once is on the disk itself; what is written then is in the journal.
    mount \${disk%:*} /vm/\${disk#*:} && echo "a file of last night" >/vm/\${disk#*:}/file && umount /vm/\${disk#*:}
    mount \${disk%:*} /vm/\${disk#*:} && echo "of the last second" >/vm/\${disk#*:}/late && sync -f /vm/\${disk#*:}
  done`;

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([FaultStack.create(lab), lab.server1.run(startVm)]);
  await writeImage("vfat", `${part}5`);
  // A disk and its copy, as after a migration.
  for (const number of [6, 7]) await writeImage("btrfs", `${part}${number}`);
  await lab.server2.run("mkdir /srv/boot");
});

afterAll(() => stack?.close());

const read = async (path: string) => (await lab.server2.run(`cat '${path}'`)).stdout.trim();
const mountsOf = async (path: string) =>
  (await lab.server2.run(`findmnt -rno SOURCE,OPTIONS -M '${path}'; true`)).stdout.trim();

/** Sectors that were written to each NBD device, by its name: since it was first attached, to whatever. */
async function writes(): Promise<ReadonlyMap<string, string>> {
  const { stdout } = await lab.server2.run(`awk '{ print FILENAME, $7 }' /sys/block/nbd*/stat`);
  const lines = stdout.trim().split("\n");
  return new Map(lines.map((line) => [line.split("/")[3] ?? "", line.split(" ")[1] ?? ""]));
}

async function deviceOf(disk: string): Promise<string> {
  return (await lab.server2.run(`basename $(readlink /dev/lvm-nbd/${disk}-attached)`)).stdout.trim();
}

it("whole disks and partitions are mounted and read, of each file system without a write", async () => {
  stack.declare(...chain(1), whole, ...others);
  (await stack.up()).succeeded("12 created");
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
  for (const disk of ["whole", "parted"]) expect((await writes()).get(await deviceOf(disk))).toBe("0");
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
  (await stack.up()).succeeded("1 updated");
  await stack.isAsDeclared();
});

it("what cannot be mounted is refused before anything is touched: each says why", async () => {
  await lab.server2.run(`
    mkdir -p /srv/full /srv/tmp /srv/tab && touch /srv/full/letter && ln -s tab /srv/link && mount -t tmpfs over /srv/tmp
    echo '/dev/vdz /srv/tab ext4 noauto 0 0' >>/etc/fstab`);
  const bad: [name: string, disk: string, args: Values][] = [
    ["no-partition", "parted", { path: "/srv/a" }],
    ["swap", "parted", { partition: 2, path: "/srv/a" }],
    ["guest-lvm", "parted", { partition: 3, path: "/srv/a" }],
    ["nothing", "parted", { partition: 4, path: "/srv/a" }],
    ["ninth", "parted", { partition: 9, path: "/srv/a" }],
    ["no-table", "whole", { partition: 1, path: "/srv/a" }],
    ["second-btrfs", "parted", { partition: 7, path: "/srv/a" }],
    ["full", "parted", { partition: 1, path: "/srv/full" }],
    ["taken", "parted", { partition: 1, path: "/srv/tmp" }],
    ["in-fstab", "parted", { partition: 1, path: "/srv/tab" }],
    ["linked", "parted", { partition: 1, path: "/srv/link/deep" }],
  ];
  const before = await leftovers(lab.server2);
  stack.declare(...chain(1), whole, ...others, ...bad.map(([name, disk, args]) => mountOf(disk, name, args)));
  const run = await stack.up();
  const said = (name: string, code: Parameters<typeof run.failedWith>[0], ...texts: string[]) =>
    run.failedWith(code, `Mount ${name}`, "server2", ...texts);
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
  expect((await lab.server2.run("ls /srv; dmsetup ls")).stdout).not.toMatch(/^a$|VgGuest/m);
  await lab.server2.run("umount /srv/tmp; rm -r /srv/full /srv/tab /srv/tmp /srv/link; : >/etc/fstab");
});

it("a mount in use is not removed: the process is named", async () => {
  await lab.server2.run("systemd-run -q --unit reader --working-directory '/mnt/vm 1-backup' tail -f file");
  const pid = await mainPid(lab.server2, "reader");
  stack.declare(...chain(1), ...others);
  const run = await stack.up().finally(() => lab.server2.run("systemctl stop reader"));
  run.failedWith(
    "MOUNT_IN_USE",
    "Mount whole-files",
    "server2",
    `/mnt/vm 1-backup is in use: open in /usr/bin/tail -f file (pid ${pid})`,
  );
  expect(await read("/mnt/vm 1-backup/file")).toBe("a file of last night");
});

it("a link that dies takes the mounts with it as soon as nobody uses them, and brings them back", async () => {
  const isMounted = async (path: string) => (await mountsOf(path)) !== "";
  await lab.server2.run(
    "(cd /srv/boot; exec setsid sleep 1000 >/dev/null 2>&1 </dev/null) & echo $! >/root/reader",
  );
  await lab.server1.run("systemctl stop lvm-nbd-export-parted-export");
  await waitFor(async () => !(await isMounted("/mnt/xfs")) || undefined, {
    timeoutSeconds: 60,
    what: "the mount of a dead link to be gone",
  });
  expect(await isMounted("/srv/boot")).toBe(true);
  await lab.server1.run("systemctl start lvm-nbd-export-parted-export");
  await lab.server2.run("kill $(cat /root/reader)");
  const readAgain = (path: string) =>
    waitFor(async () => (await lab.server2.run(`cat ${path}; true`)).stdout.trim() || undefined, {
      timeoutSeconds: 120,
      what: `${path} to be back with its link`,
      detail: async () =>
        (
          await lab.server2.run(
            "systemctl list-jobs; ls /sys/block/nbd*/*/partition; journalctl -q -n 200 -o short-precise --no-pager -u 'lvm-nbd-attach-*' -u '*.mount'",
            { allowFailure: true },
          )
        ).stdout,
    });
  expect(await readAgain("/mnt/xfs/file")).toBe("a file of last night");
  expect(await readAgain("/srv/boot/vmlinuz")).toBe("kernel of last night");
});

it("a new moment replaces the chain and what is mounted of it", async () => {
  await lab.server1.run("fsfreeze -f /vm/whole && fsfreeze -u /vm/whole && sync -f /vm/whole");
  const written = await writes();
  stack.declare(...chain(2), whole, ...others);
  (await stack.up()).succeeded("11 replaced");
  expect(await read("/mnt/vm 1-backup/late")).toBe("of the last second");
  const device = await deviceOf("whole");
  expect((await writes()).get(device)).toBe(written.get(device));
});

it("everything is removed afterwards, folders that were made included", async () => {
  (await stack.destroy()).succeeded();
  expect(await leftovers(lab.server1)).toBe("");
  expect(await leftovers(lab.server2)).toBe("");
  expect((await lab.server2.run("ls /mnt /srv; dmsetup ls")).stdout.trim()).toMatch(
    /^\/mnt:\n\n\/srv:\nboot\n/,
  );
});
