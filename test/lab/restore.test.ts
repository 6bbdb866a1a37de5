/** Volumes brought back to a snapshot's moment, or from a copy, through the CLI: what they hold then, and that it is done once. */
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import {
  type Declared,
  FaultStack,
  lvRestore,
  nbdExport,
  output,
  snapshot,
  volumeCopy,
} from "./faults/fault-stack.mts";
import { GUESTS } from "./image-contents.mts";
import type { Lab } from "./lab.mts";
import { freshLab } from "./support.mts";
import { waitFor } from "./wait.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let stack: FaultStack;

const run = async (command: string) => (await lab.server1.run(command)).stdout.trim();
const on2 = async (command: string) => (await lab.server2.run(command)).stdout.trim();
const fileSystems = ["thick", "thin", "open", "backed"] as const;
/** Every file of the volume's file system, with its mode and content. */
const files = (volume: string) =>
  run(`mount -o ro /dev/VgVm/${volume} /check && cd /check && find . -type f -printf '%p %m ' -exec sha256sum {} \\; | sort
    rc=$?; cd /; umount /check; exit $rc`);
const onVolume = (volume: string, commands: string) =>
  run(
    `mount /dev/VgVm/${volume} /check && cd /check && { ${commands}; }; rc=$?; cd /; umount /check; exit $rc`,
  );
/** Files changed, removed, and made anew. */
const spoiled = (volume: string) =>
  onVolume(
    volume,
    "rm docs/2; dd if=/dev/urandom of=docs/1 bs=1M count=3 conv=notrunc status=none; echo new >new; chmod 600 docs/3",
  );
const sum = (volume: string) => run(`dd if=/dev/VgVm/${volume} bs=1M iflag=direct status=none | sha256sum`);
const slowSum = () => sum("slow");
const attributes = (volume: string) => run(`lvs -a --noheadings -o lv_attr -S lv_name=${volume} VgVm`);
const uuidOf = (volume: string) => run(`lvs --noheadings -o lv_uuid VgVm/${volume}`);
const tags = (volume: string) => run(`lvs --noheadings -o lv_tags VgVm/${volume}`);
/** How many merges LVM was ever told to make; it archives its metadata before each. */
const merges = async () => Number(await run("grep -l 'lvconvert .*--merge' /etc/lvm/archive/* | wc -l"));
/** Percent of its time that the kernel may copy chunks of snapshots. */
const copyThrottle = (percent: number) =>
  run(`echo ${percent} >/sys/module/dm_snapshot/parameters/snapshot_copy_throttle`);
/** Writes every other chunk of the slow volume, so that the kernel merges each by itself. */
const scatter = () =>
  run(
    `perl -e 'open(F, "+<", "/dev/VgVm/slow") or die; for (0..2999) { seek(F, $_ * 8192, 0); print F "x" x 4096 } close(F) or die'; sync`,
  );
const isMerging = (volume: string) =>
  waitFor(async () => ((await attributes(volume)).startsWith("S") ? true : undefined), {
    timeoutSeconds: 120,
    what: `the merge of ${volume} to be under way`,
  });
/** LVM shows a merge before the script that begins it has ended, which marks that and lets go of its lock. */
const hasBegun = (volume: string) =>
  waitFor(
    async () => {
      const told = await run(
        `lvs --noheadings -o lv_tags VgVm/${volume}; flock -n /run/lvm-nbd-restore.VgVm.${volume} echo free; true`,
      );
      return /:m\d+\+0:.*\sfree$/s.test(told) ? true : undefined;
    },
    { timeoutSeconds: 60, what: `the merge into ${volume} to be marked` },
  );
const state = async (name: string) => (await stack.state()).get(name) ?? {};

/** The copy of a volume, as the loop device that its server exports. */
const copyFile = "/root/backed.raw";
/** The copy's time stays, so that only reading it tells. */
const flipByte = `touch -r ${copyFile} /root/when; byte=$(dd if=${copyFile} bs=1 skip=7000000 count=1 status=none | od -An -tu1)
  printf "\\\\$(printf %03o $((255 - byte)))" | dd of=${copyFile} bs=1 seek=7000000 conv=notrunc,fsync status=none; touch -r /root/when ${copyFile}`;
const attachLoop = `losetup -r /dev/loop7 ${copyFile}`;
const imageExport: Declared = {
  type: "NbdExport",
  name: "image-export",
  args: {
    ...{ host: "server2", device: "/dev/loop7" },
    ...{ listenAddress: GUESTS[1].privateAddress, clients: [GUESTS[0].privateAddress] },
  },
};
const imageRestore = (volume: string): Declared => ({
  type: "LvRestore",
  name: volume,
  args: {
    ...{ host: "server1", volumeGroup: "VgVm", origin: volume, overwrite: uuids[volume] },
    image: { uri: output("image-export", "uri"), sha256: output("backed-copy", "sha256") },
  },
});
/** How often a job was begun that writes an image onto the volume. */
const imageJobs = (volume: string) =>
  run(`journalctl -q _PID=1 -o cat | grep -c 'Started .*restore of VgVm/${volume} from'; true`);

const snapshots: readonly Declared[] = [
  snapshot("backed-snap", { origin: "backed", size: "100%ORIGIN" }),
  nbdExport("backed-snap-export", { device: output("backed-snap", "path") }),
  volumeCopy("backed-copy", "backed-snap", { file: copyFile }),
  snapshot("thick-snap", { origin: "thick", size: "20M" }),
  snapshot("thin-snap", { origin: "thin" }),
  snapshot("open-snap", { origin: "open", size: "12M" }),
  snapshot("slow-snap", { origin: "slow", size: "24M", chunkSize: "4K" }),
];
const restores = (thickTriggers: string[] = []): Declared[] => [
  lvRestore("thick", "thick-snap", { origin: "thick", triggers: thickTriggers }),
  lvRestore("thin", "thin-snap", { origin: "thin" }),
  lvRestore("open", "open-snap", { origin: "open", whenOpen: "atNextActivation" }),
  imageExport,
  imageRestore("backed"),
];
const slowRestore = lvRestore("slow", "slow-snap", { origin: "slow" });

const before: Record<string, string> = {};
const uuids: Record<string, string> = {};
let slowBefore: string;

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([
    FaultStack.create(lab),
    run(`
      mkdir /check /vm1 /vm2 /vm3
      lvcreate -qq -y -W n -L 32M -n thick VgVm && lvcreate -qq -y -W n -L 16M -n open VgVm &&
      lvcreate -qq -y -W n -L 16M -n backed VgVm && lvcreate -qq -y -W n -L 20M -n sound VgVm
      lvcreate -qq -y -L 64M -T VgVm/pool && lvcreate -qq -y -V 32M -T VgVm/pool -n thin
      for volume in ${fileSystems.join(" ")}; do
        mkfs.ext4 -q /dev/VgVm/$volume && mount /dev/VgVm/$volume /check && mkdir /check/docs
        for file in 1 2 3; do dd if=/dev/urandom of=/check/docs/$file bs=1M count=2 status=none; done
        umount /check || exit 1
      done
      lvcreate -qq -y -W n -L 32M -n slow VgVm && dd if=/dev/urandom of=/dev/VgVm/slow bs=1M count=32 oflag=direct status=none`),
  ]);
  for (const volume of fileSystems) before[volume] = await files(volume);
  slowBefore = await slowSum();
});

afterAll(() => stack?.close());

it("a volume that is mounted or exported is not restored, and one that may wait is scheduled", async () => {
  stack.declare(...snapshots);
  (await stack.up()).succeeded("8 created");
  for (const volume of fileSystems) {
    uuids[volume] = await uuidOf(volume);
    await spoiled(volume);
    expect(await files(volume)).not.toBe(before[volume]);
  }
  await scatter();
  await run("mount /dev/VgVm/thick /vm1; mount /dev/VgVm/open /vm2; mount /dev/VgVm/backed /vm3");
  uuids.sound = await uuidOf("sound");
  const soundBefore = await sum("sound");
  await on2(`${flipByte}; ${attachLoop}`);
  // The export comes first: nobody is connected to it.
  stack.declare(
    ...snapshots,
    nbdExport("thin-export", { device: output("thin-snap", "path"), port: 10810 }),
    ...[...restores(), imageRestore("sound")].map((one) => ({ ...one, dependsOn: ["thin-export"] })),
  );
  const met = await stack.up();
  met.failedWith("VOLUME_IN_USE", "LvRestore thick", "server1", "VgVm/thick is open", "mounted at /vm1");
  met.failedWith(
    "VOLUME_IN_USE",
    "LvRestore thin",
    "server1",
    "VgVm/thin-snap is open",
    "exported by lvm-nbd-export-thin-export.service",
  );
  met.said("LvRestore open on server1: the merge is scheduled", "mounted at /vm2", "lvchange -an VgVm/open");
  expect(await state("open")).toMatchObject({ state: "scheduled", snapshotRemoved: false, restoredAt: "" });
  for (const volume of ["thick", "thin"]) {
    expect(await tags(volume)).toBe("");
    expect(await attributes(`${volume}-snap`)).toMatch(/^[sV]/);
  }
  expect(await merges()).toBe(1);
  met.failedWith("VOLUME_IN_USE", "LvRestore backed", "server1", "VgVm/backed is open: mounted at /vm3");
  // The copy has a flipped byte.
  met.failedWith("IMAGE_CORRUPT", "LvRestore sound", "server1", "nothing was written to VgVm/sound");
  expect(await sum("sound")).toBe(soundBefore);
  for (const volume of ["backed", "sound"]) expect(await tags(volume)).toBe("");
  expect([await imageJobs("backed"), await imageJobs("sound")]).toEqual(["0", "1"]);
});

it("a scheduled restore begins when its origin is next activated, and a refresh tells", async () => {
  await run("umount /vm2 && lvchange -an VgVm/open && lvchange -ay VgVm/open");
  await waitFor(async () => ((await attributes("open-snap")) === "" ? true : undefined), {
    timeoutSeconds: 120,
    what: "LVM to end the merge",
  });
  const told = await stack.refresh();
  told.succeeded();
  told.said(
    "LvRestore open on server1: is now restored, was scheduled",
    "LvSnapshot open-snap on server1: is gone from the host",
  );
  expect(await state("open")).toMatchObject({ state: "restored", snapshotRemoved: true });
  expect(await files("open")).toBe(before.open);
});

it("closed volumes are restored file by file, thick and thin; what was restored already is not again", async () => {
  // Pulumi removes what is no longer declared at its end.
  await run("umount /vm1 /vm3; systemctl stop lvm-nbd-export-thin-export");
  await on2(`losetup -d /dev/loop7; ${flipByte}; ${attachLoop}`);
  stack.declare(...snapshots, ...restores());
  const { restoredSnapshot } = await state("open");
  (await stack.up()).succeeded();
  for (const volume of fileSystems) {
    expect(await files(volume)).toBe(before[volume]);
    expect(await uuidOf(volume)).toBe(uuids[volume]);
    expect(await state(volume)).toMatchObject({ state: "restored", snapshotRemoved: volume !== "backed" });
  }
  expect(await state("backed")).toMatchObject({ restoredImage: (await state("backed-copy")).sha256 });
  // Its LvSnapshot was taken anew, and that restored nothing.
  expect((await state("open-snap")).uuid).not.toBe(restoredSnapshot);
  expect(await state("open")).toMatchObject({ restoredSnapshot });
  expect(await attributes("thick-snap")).toBe("");
  expect(await merges()).toBe(3);
});

it("up again takes the consumed snapshots anew and restores nothing; then all is quiet", async () => {
  for (const volume of ["thick", "backed"]) await onVolume(volume, "echo written since >since");
  (await stack.up({ refresh: true })).succeeded("2 created");
  for (const volume of ["thick", "backed"]) expect(await onVolume(volume, "cat since")).toBe("written since");
  expect(await imageJobs("backed")).toBe("1");
  await stack.isAsDeclared();
  expect(await merges()).toBe(3);
});

it("a provider that is killed in mid-merge: the next up follows it to its end, and changed triggers restore again", async () => {
  const moment = await files("thick");
  expect(moment).toContain("./since ");
  await spoiled("thick");
  await copyThrottle(1);
  stack.declare(...snapshots, ...restores(["again"]), slowRestore);
  const { pid, end } = stack.startUp();
  await isMerging("slow-snap");
  process.kill(-pid, "SIGKILL");
  await end;
  await stack.cancel();
  expect(await attributes("slow-snap")).toMatch(/^S/);
  // As fast as it can, but not before the next up has seen it.
  await run(
    "systemd-run -q sh -c 'sleep 12; echo 100 >/sys/module/dm_snapshot/parameters/snapshot_copy_throttle'",
  );
  (await stack.up()).succeeded();
  expect(await state("slow")).toMatchObject({ state: "restored", snapshotRemoved: true });
  expect(await slowSum()).toBe(slowBefore);
  expect(await files("thick")).toBe(moment);
  expect(await merges()).toBe(5);
});

it("the power fails in mid-merge: the same up waits for the host, and follows the merge that LVM goes on with", async () => {
  (await stack.up({ refresh: true })).succeeded("2 created");
  await scatter();
  await copyThrottle(1);
  stack.declare(...snapshots, ...restores(["again"]), {
    ...slowRestore,
    args: { ...slowRestore.args, triggers: [2] },
  });
  const { end } = stack.startUp();
  await isMerging("slow-snap");
  // Before that nobody knows whether it was begun, and up rightly ends with LINK_LOST.
  await hasBegun("slow");
  await lab.server1.kill();
  await lab.server1.start();
  (await end).succeeded("1 updated");
  expect(await state("slow")).toMatchObject({ state: "restored", snapshotRemoved: true });
  expect(await slowSum()).toBe(slowBefore);
  await run("mkdir -p /check");
});

it("destroy removes the marks and changes no data", async () => {
  await on2("losetup -d /dev/loop7");
  (await stack.destroy()).succeeded();
  expect(await run("lvs -a --noheadings -o lv_tags VgVm")).toBe("");
  expect(await slowSum()).toBe(slowBefore);
  expect(await files("thin")).toBe(before.thin);
});
