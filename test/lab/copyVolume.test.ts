/** Copies into logical volumes, through the CLI, on a group whose extents are larger than the source's and hold old data. */
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { script } from "../../provider/core/hostCommands.js";
import { checkDeviceScript } from "../../provider/linux/deviceCopy.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import {
  type Declared,
  FaultStack,
  nbdExport,
  output,
  type Run,
  snapshot,
  volumeCopy,
} from "./faults/fault-stack.mts";
import type { Lab } from "./lab.mts";
import { freshLab, LabStack } from "./support.mts";
import { waitFor } from "./wait.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

const MiB = 1024 ** 2;
const size = 20 * MiB;
let lab: Lab;
let stack: FaultStack;
const on2 = async (command: string) => (await lab.server2.run(command)).stdout.trim();
const volumes = () => on2("lvs --noheadings -o lv_name VgCopy | sort | xargs");
const uuidOf = (name: string) => on2(`lvs --noheadings -o lv_uuid VgCopy/${name} 2>/dev/null | xargs`);
/** What a reader of the disk sees of the copy's content. */
const sum = async (name: string) =>
  (await on2(`dd if=/dev/VgCopy/${name} bs=1M count=20 iflag=direct status=none | sha256sum`)).split(" ")[0];
const originSum = async () =>
  (await lab.server1.run("dd if=/dev/VgVm/LV-VM1 bs=1M iflag=direct status=none | sha256sum")).stdout.split(
    " ",
  )[0];
const state = async (name: string) => (await stack.state()).get(name) ?? {};
/** The systemd invocation of the job that runs onto an unfinished volume; "" for none. */
const job = () =>
  on2(
    `unit=$(systemctl list-units --plain --no-legend 'lvm-nbd-copy-*' | head -n 1 | cut -d' ' -f1); [ -z "$unit" ] || systemctl show -p InvocationID --value "$unit"`,
  );
const started = () => on2("journalctl -q _PID=1 -o cat | grep -c 'Started .*onto /dev/VgCopy/'; true");

const source = (generation: number): Declared[] => [
  snapshot("vm1", { origin: "LV-VM1", size: "100%ORIGIN", triggers: [generation] }),
  nbdExport("vm1-export", { device: output("vm1", "path") }),
];
const copy = (name: string, args: Readonly<Record<string, unknown>> = {}, group = "VgCopy") =>
  volumeCopy(name, "vm1", { volume: { volumeGroup: group, name }, ...args });

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([
    FaultStack.create(lab),
    lab.server1.run(`
      lvcreate -qq -y -W n -L 20M -n LV-VM1 VgVm && mkfs.ext4 -q /dev/VgVm/LV-VM1 && mkdir /vm && mount /dev/VgVm/LV-VM1 /vm
      dd if=/dev/urandom of=/vm/kept bs=1M count=4 status=none && umount /vm`),
    lab.server2.run(`
      for disk in VgCopy:176 VgTiny:30; do
        tr '\\0' '#' </dev/zero | head -c \${disk#*:}M >/root/\${disk%:*}
        vgcreate -qq -s 16M \${disk%:*} $(losetup -f --show /root/\${disk%:*})
      done
      lvcreate -qq -y -W n -l 1 -n theirs VgCopy && echo mine | dd of=/dev/VgCopy/theirs conv=fsync status=none`),
  ]);
});

afterAll(() => stack?.close());

let met: Run;

it("Pulumi is killed in the middle of a copy: the next up finds its job, and the volume holds what the source served", async () => {
  stack.declare(...source(1), copy("slow", { bandwidthLimit: "2M" }));
  const { pid, end } = stack.startUp();
  const first = await waitFor(async () => (await job()) || undefined, {
    timeoutSeconds: 300,
    what: "the copy to run",
  });
  expect(await volumes()).toMatch(/^lvmnbd-part-[0-9a-f]{16} theirs$/);
  process.kill(-pid, "SIGKILL");
  await end;
  await stack.cancel();
  expect(await job()).toBe(first);
  stack.declare(
    ...source(1),
    copy("slow", { bandwidthLimit: "2M" }),
    copy("LV-VM1", { deepCheck: true }),
    copy("theirs"),
    copy("full", {}, "VgTiny"),
  );
  met = await stack.up();
  expect(met.text).not.toMatch(/error: .*VolumeCopy (slow|LV-VM1)/);
  expect(await started()).toBe("2");
  expect(await volumes()).toBe("LV-VM1 slow theirs");
  for (const name of ["slow", "LV-VM1"]) {
    expect(await sum(name)).toBe(await originSum());
    expect(await state(name)).toMatchObject({
      ...{ sha256: await originSum(), sizeBytes: size, allocatedBytes: 32 * MiB, state: "complete" },
      ...{ path: `/dev/VgCopy/${name}`, uuid: await uuidOf(name), verified: true },
    });
  }
  // What the extents held before is nobody's to read.
  expect(
    await on2("dd if=/dev/VgCopy/LV-VM1 bs=1M skip=20 iflag=direct status=none | tr -d '\\0' | wc -c"),
  ).toBe("0");
  expect(await on2("ls -d /run/lvm-nbd-copy-* 2>/dev/null; true")).toBe("");
});

it("somebody else's volume has the name: it is left alone", async () => {
  met.failedWith(
    "FOREIGN_RESOURCE",
    "VolumeCopy theirs",
    "server2",
    "carries no owner mark",
    "never taken over",
  );
  expect(await on2("head -n 1 /dev/VgCopy/theirs")).toBe("mine");
});

it("the group is too small: said with the numbers, before anything is made", async () => {
  met.failedWith(
    "NO_SPACE",
    "VolumeCopy full",
    "server2",
    "VgTiny has 16 MiB (16777216 bytes) free, the copy needs 32 MiB",
    "vgextend",
  );
  expect(await on2("lvs --noheadings -o lv_name VgTiny")).toBe("");
});

it("a flipped byte is found by deepCheck, and a copy that is mounted is neither replaced nor removed", async () => {
  await on2(`
    for copy in LV-VM1 slow; do
      lvchange -qq -p rw VgCopy/$copy && printf X | dd of=/dev/VgCopy/$copy bs=1 seek=9000000 conv=notrunc,fsync status=none &&
        lvchange -qq -p r VgCopy/$copy || exit 1
    done
    mount -o ro,noload /dev/VgCopy/slow /mnt`);
  stack.declare(...source(1), copy("LV-VM1", { deepCheck: true }));
  const run = await stack.up({ refresh: true });
  run.said("/dev/VgCopy/LV-VM1 does not read back as it was copied");
  expect(run.text).not.toContain("/dev/VgCopy/slow does not");
  run.failedWith("VOLUME_IN_USE", "VolumeCopy slow", "server2", "mounted at /mnt");
  expect(await sum("LV-VM1")).toBe(await originSum());
  expect(await volumes()).toBe("LV-VM1 slow theirs");
  await on2("umount /mnt");
});

it("renewed, the earlier copy keeps the name until the new one is verified", async () => {
  const [before, earlier] = [await uuidOf("LV-VM1"), await sum("LV-VM1")];
  await lab.server1.run(
    "mount /dev/VgVm/LV-VM1 /vm && dd if=/dev/urandom of=/vm/kept bs=1M count=4 status=none && umount /vm",
  );
  stack.declare(...source(2), copy("LV-VM1", { deepCheck: true, bandwidthLimit: "2M" }));
  const { end } = stack.startUp();
  await waitFor(async () => (await job()) || undefined, { timeoutSeconds: 300, what: "the copy to run" });
  expect(await volumes()).toMatch(/^LV-VM1 lvmnbd-part-/);
  expect([await uuidOf("LV-VM1"), await sum("LV-VM1")]).toEqual([before, earlier]);
  (await end).succeeded();
  expect(await volumes()).toBe("LV-VM1 theirs");
  expect(await sum("LV-VM1")).toBe(await originSum());
  expect(await sum("LV-VM1")).not.toBe(earlier);
  expect(await uuidOf("LV-VM1")).not.toBe(before);
  await stack.isAsDeclared();
});

it("handed over to a VM it stays, open, without its tags; all else goes with the stack", async () => {
  await on2("lvchange -qq -p rw VgCopy/LV-VM1 && mount /dev/VgCopy/LV-VM1 /mnt");
  const run = await stack.destroy();
  run.succeeded();
  run.said("VgCopy/LV-VM1 was made writable since it was copied");
  expect(await volumes()).toBe("LV-VM1 theirs");
  expect(await on2("lvs --noheadings -o lv_tags VgCopy/LV-VM1 | xargs; cat /mnt/kept | wc -c")).toBe(
    `${4 * MiB}`,
  );
  expect(await on2("ls -d /run/lvm-nbd-copy-* 2>/dev/null; true")).toBe("");
  await on2("umount /mnt");
});

it("of a volume that is mostly empty little more than its data crosses the network, and the copies hold it to the last byte", async () => {
  await lab.server1.run(`
    lvcreate -qq -y -W n -L 64M -n LV-VM2 VgVm && dd if=/dev/zero of=/dev/VgVm/LV-VM2 bs=1M count=64 oflag=direct status=none
    put() { dd of=/dev/VgVm/LV-VM2 bs=1 seek="$1" conv=notrunc status=none; }
    printf f | put 0 && printf x | put ${10 * MiB + 12_345} && printf last | put ${64 * MiB - 512} &&
      dd if=/dev/urandom of=/dev/VgVm/LV-VM2 bs=1M seek=20 count=2 conv=notrunc,fsync status=none && blockdev --flushbufs /dev/VgVm/LV-VM2`);
  await on2("mkdir -m 700 /backup");
  const received = async () => Number(await on2("cat /sys/class/net/private0/statistics/rx_bytes"));
  const before = await received();
  stack.declare(
    snapshot("vm2", { origin: "LV-VM2", size: "16M" }),
    nbdExport("vm2-export", { device: output("vm2", "path") }),
    volumeCopy("mostly-empty", "vm2", { volume: { volumeGroup: "VgCopy", name: "vm2" } }),
    volumeCopy("image", "vm2", { file: "/backup/vm2.raw" }),
    volumeCopy("qcow2", "vm2", { file: "/backup/vm2.qcow2", format: "qcow2" }),
  );
  (await stack.up()).succeeded();
  // Three times the 5 MiB in which there is anything, the random ones among them.
  const crossed = (await received()) - before;
  expect(crossed).toBeGreaterThan(3 * 2 * MiB);
  expect(crossed).toBeLessThan(3 * 8 * MiB);
  const read = "bs=1M iflag=direct status=none | sha256sum";
  const source = (await lab.server1.run(`dd if=/dev/VgVm/LV-VM2 ${read}`)).stdout.split(" ")[0];
  expect((await on2(`dd if=/dev/VgCopy/vm2 count=64 ${read}`)).split(" ")[0]).toBe(source);
  expect((await on2("sha256sum /backup/vm2.raw")).split(" ")[0]).toBe(source);
  await on2("qemu-img convert -f qcow2 -O raw /backup/vm2.qcow2 /root/unpacked");
  expect((await on2("sha256sum /root/unpacked")).split(" ")[0]).toBe(source);
  for (const name of ["mostly-empty", "image", "qcow2"])
    expect(await state(name)).toMatchObject({ sha256: source, sizeBytes: 64 * MiB, verified: true });
  (await stack.destroy()).succeeded();
});

it("what reads a snapshot on its own host ends when its link is lost, and that can be removed at once", async () => {
  // It is read for a minute and more.
  await lab.server1.run("lvcreate -qq -y -W n -L 5G -n LV-VM3 VgVm");
  const snapshots = new LabStack("lost");
  const taken = { host: "server1", volumeGroup: "VgVm", origin: "LV-VM3", name: "vm3", size: "16M" };
  await snapshots.up("LvSnapshot", "vm3", taken);
  const pool = createHostPool();
  const host = await pool.get("server1");
  const argv = script(checkDeviceScript, "/dev/VgVm/vm3", String(5 * 1024 * MiB));
  const reading = host.run({ argv, kind: "read", deadlineSeconds: 600 });
  const reads = async () => (await lab.server1.run("pgrep -x dd; true")).stdout.trim();
  const lost = expect(reading).rejects.toThrow();
  try {
    await waitFor(async () => (await reads()) || undefined, { timeoutSeconds: 60, what: "it to be read" });
  } finally {
    pool.close();
  }
  await lost;
  expect(await reads()).not.toBe("");
  await snapshots.destroy("LvSnapshot", "vm3");
  snapshots.close();
  expect(await reads()).toBe("");
  expect((await lab.server1.run("lvs --noheadings -o lv_name VgVm | xargs")).stdout).not.toContain("vm3");
});
