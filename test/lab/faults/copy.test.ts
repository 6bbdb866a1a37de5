/** Copies of volumes that are written to all the while, through the CLI: what they hold, and what may cut them. */
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { listImages } from "../../../provider/backup/listImages.js";
import type { Guest, Lab } from "../lab.mts";
import { freshLab } from "../support.mts";
import { waitFor } from "../wait.mts";
import {
  backupImage,
  type Declared,
  FaultStack,
  nbdExport,
  output,
  type Run,
  snapshot,
  volumeCopy,
} from "./fault-stack.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

const MiB = 1024 ** 2;
let lab: Lab;
let stack: FaultStack;
/** SHA-256 of LV-VM1 while its writer stood still, as the quiesce commands took it. */
const momentOf = async () => (await lab.server1.run("cat /root/moment")).stdout.split(" ")[0];
const sum = async (file: string) => (await lab.server2.run(`sha256sum ${file}`)).stdout.split(" ")[0];
const files = async () => (await lab.server2.run("ls /backup | sort | xargs")).stdout.trim();
const copyState = async (name: string) => (await stack.state()).get(name) ?? {};
/** How many jobs of copies run whose file is like that. */
const running = async (pattern: string) =>
  (
    await lab.server2.run(
      `systemctl list-units --plain --no-legend 'lvm-nbd-copy-*' | grep -cE '${pattern}'; true`,
    )
  ).stdout.trim();

/** The VM: a file system on its disk (a loop device, as a hypervisor has it open), and a program that writes all the time. */
const startVm = `
  lvcreate -qq -y -W n -L 16M -n LV-VM1 VgVm && dd if=/dev/zero of=/dev/VgVm/LV-VM1 bs=1M oflag=direct status=none count=16
  losetup /dev/loop0 /dev/VgVm/LV-VM1 && mkfs.ext4 -q /dev/loop0 && mkdir -p /vm && mount /dev/loop0 /vm
  dd if=/dev/urandom of=/vm/kept bs=1M count=4 status=none && sync -f /vm
  systemd-run -q --unit vm fio --name=vm --directory=/vm --size=2M --rw=randwrite --bs=4k --rate=128k --time_based --runtime=1h --fsync=8`;
const quiesce = {
  freeze:
    "fsfreeze -f /vm && dd if=/dev/VgVm/LV-VM1 bs=1M iflag=direct status=none | sha256sum >/root/moment",
  thaw: "fsfreeze -u /vm",
  timeoutSeconds: 60,
};

const taken = (generation: number) =>
  snapshot("vm1", { origin: "LV-VM1", size: "16M", quiesce, triggers: [generation] });
const vm1Export = nbdExport("vm1-export", { device: output("vm1", "path") });
const raw = volumeCopy("raw", "vm1", { file: "/backup/vm1.raw", deepCheck: true });
const packed = volumeCopy("packed", "vm1", { file: "/backup/vm1.qcow2", format: "qcow2", compress: true });
const limited = volumeCopy("limited", "vm1", { file: "/backup/limited.raw", bandwidthLimit: "16M" });
const base: readonly Declared[] = [vm1Export, raw, packed, limited];

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([
    FaultStack.create(lab),
    lab.server1.run(startVm),
    // The disk of the backups.
    lab.server2.run(
      "lvcreate -qq -y -L 512M -n backup VgVm && mkfs.ext4 -q /dev/VgVm/backup && mkdir /backup && mount /dev/VgVm/backup /backup && rmdir /backup/lost+found",
    ),
  ]);
});

afterAll(() => stack?.close());

/** The image holds the moment, its file system is sound, and it takes no more room than its data. */
async function holdsTheMoment(): Promise<void> {
  const moment = await momentOf();
  expect(await sum("/backup/vm1.raw")).toBe(moment);
  expect(await sum("/backup/limited.raw")).toBe(moment);
  await lab.server2.run("qemu-img convert -f qcow2 -O raw /backup/vm1.qcow2 /root/unpacked");
  expect(await sum("/root/unpacked")).toBe(moment);
  for (const name of ["raw", "packed", "limited"])
    expect(await copyState(name)).toMatchObject({ sha256: moment, sizeBytes: 16 * MiB, state: "complete" });
  // A journal that was never closed is replayed, as after a power cut; then nothing is left to repair.
  await lab.server2.run(
    "cp --sparse=always /backup/vm1.raw /root/checked && e2fsck -fp /root/checked; [ $? -le 1 ] && e2fsck -fn /root/checked",
  );
}

it("a volume under steady writes is copied as it was at the moment of the snapshot", async () => {
  stack.declare(taken(1), ...base);
  (await stack.up()).succeeded("6 created");
  await holdsTheMoment();
  expect(await files()).toBe(
    "limited.raw limited.raw.manifest.json vm1.qcow2 vm1.qcow2.manifest.json vm1.raw vm1.raw.manifest.json",
  );
  // 16 MiB, of which the file system uses a part: what is empty takes no room.
  expect(Number((await copyState("raw")).allocatedBytes)).toBeLessThan(10 * MiB);
  expect(await momentOf()).not.toBe(
    (await lab.server1.run("dd if=/dev/VgVm/LV-VM1 bs=1M iflag=direct status=none | sha256sum")).stdout.split(
      " ",
    )[0],
  );
  const manifest = JSON.parse((await lab.server2.run("cat /backup/vm1.raw.manifest.json")).stdout);
  expect(manifest).toMatchObject({
    image: { format: "raw", sha256: await momentOf(), verified: true },
    source: { snapshot: { host: "server1", volumeGroup: "VgVm", name: "vm1", origin: "LV-VM1" } },
    tools: expect.stringMatching(/^nbdcopy \d.*,Linux \d/),
  });
  await stack.isAsDeclared();
});

it("drift is found and put right: a flipped byte, a removed image, one that was written to", async () => {
  await lab.server2.run(`
    cd /backup; before=$(stat -c %.9Y vm1.raw)
    byte=$(dd if=vm1.raw bs=1 skip=9000000 count=1 status=none | od -An -tu1); printf "\\\\$(printf %o $(( (byte + 1) % 256 )))" | dd of=vm1.raw bs=1 seek=9000000 conv=notrunc status=none
    touch -d @$before vm1.raw; rm limited.raw; echo more >>vm1.qcow2`);
  const run = await stack.up({ refresh: true });
  run.succeeded("1 created", "2 updated");
  run.said(
    "/backup/vm1.raw does not read back as it was copied",
    "/backup/vm1.qcow2 was changed",
    "VolumeCopy limited on server2: is gone from the host",
  );
  await holdsTheMoment();
});

describe("what breaks a copy on its way:", () => {
  let met: Run;
  let healed: Run;
  let job: string;
  const small = (size: string) => snapshot("small", { origin: "LV-VM2", size });
  const broken = (size: string, slow: { readonly bandwidthLimit?: string } = {}): Declared[] => [
    small(size),
    nbdExport("small-export", { device: output("small", "path"), port: 10810 }),
    volumeCopy("overflow", "small", { file: "/backup/overflow.raw", ...slow }),
    snapshot("other", { origin: "LV-VM2", size: "16M" }),
    nbdExport("other-export", { device: output("other", "path"), port: 10811 }),
    volumeCopy("killed", "other", { file: "/backup/killed.raw", ...slow }),
    volumeCopy("full", "vm1", { file: "/full/vm1.raw" }),
    volumeCopy("foreign", "vm1", { file: "/backup/theirs" }),
    volumeCopy("nowhere", "vm1", { file: "/nowhere/vm1.raw" }),
    // When its neighbours begin, so that all are on their way at once.
    {
      ...volumeCopy("cut", "vm1", { file: "/backup/cut.raw", bandwidthLimit: "768K" }),
      dependsOn: ["small-export", "other-export"],
    },
  ];

  beforeAll(async () => {
    await lab.server1.run(
      "lvcreate -qq -y -W n -L 16M -n LV-VM2 VgVm && dd if=/dev/urandom of=/dev/VgVm/LV-VM2 bs=1M count=16 oflag=direct status=none",
    );
    // Room for half of what the file system on LV-VM1 holds.
    await lab.server2.run(`
      echo mine >/backup/theirs
      truncate -s 4M /root/small-disk && mkfs.ext4 -q -O ^has_journal /root/small-disk && mkdir /full && mount -o loop /root/small-disk /full`);
    stack.declare(taken(1), ...base, ...broken("4M", { bandwidthLimit: "512K" }));
    const { end } = stack.startUp(["--continue-on-error"]);
    await waitFor(async () => ((await running("overflow|killed|cut")) === "3" ? true : undefined), {
      timeoutSeconds: 300,
      what: "three copies to run",
    });
    job = await jobOf("cut.raw");
    // The origin is written until the snapshot's store is full; the server of the other export is killed.
    await lab.server1.run(`
      dd if=/dev/urandom of=/dev/VgVm/LV-VM2 bs=1M count=6 oflag=direct status=none
      systemctl kill -s KILL lvm-nbd-export-other-export; systemctl stop lvm-nbd-export-other-export`);
    // The SSH link to the destination is cut, both ways, while the copy goes on.
    await lab.server2.run(
      "systemd-run -q sh -c 'iptables -I INPUT -p tcp --dport 22 -j DROP; sleep 20; iptables -D INPUT 1'",
    );
    met = await end;
  });

  it("the snapshot overflows: nothing is certified, and a size is suggested", async () => {
    const text = met.failedWith(
      "SNAPSHOT_OVERFLOWED",
      "VolumeCopy overflow",
      "server1",
      "ran full",
      "larger `size`",
    );
    expect(text).toMatch(/"\d+M"|"100%ORIGIN"/);
  });

  it("the source is killed: what was copied is removed", () => {
    met.failedWith("COPY_FAILED", "VolumeCopy killed", "server2", "broke off");
  });

  it("the destination's disk fills: there is room again, and a reason", async () => {
    met.failedWith("NO_SPACE", "VolumeCopy full", "server2", "No space left on device", "make room");
    expect((await lab.server2.run("ls -A /full | grep -v lost+found; true")).stdout).toBe("");
  });

  it("somebody else's file has the name: it is left alone", async () => {
    met.failedWith(
      "FOREIGN_RESOURCE",
      "VolumeCopy foreign",
      "server2",
      "carries no owner mark",
      "adopt: true",
    );
    expect((await lab.server2.run("cat /backup/theirs")).stdout).toBe("mine\n");
  });

  it("there is no such folder: said before anything is copied", () => {
    met.failedWith("DIRECTORY_NOT_FOUND", "VolumeCopy nowhere", "server2", "/nowhere");
  });

  it("the SSH link is cut for 20 s: the copy goes on and ends well, without starting again", async () => {
    expect(met.text).not.toMatch(/error: .*VolumeCopy cut/);
    expect(job).toMatch(/^[0-9a-f]{32}$/);
    expect(await sum("/backup/cut.raw")).toBe(await momentOf());
    expect(await lastJobsOf("cut.raw")).toEqual([job]);
  });

  it("nothing of the failed ones is left, and the next up succeeds", async () => {
    expect(await files()).toBe(
      "cut.raw cut.raw.manifest.json limited.raw limited.raw.manifest.json theirs vm1.qcow2 vm1.qcow2.manifest.json vm1.raw vm1.raw.manifest.json",
    );
    await lab.server2.run(
      "rm /backup/theirs && umount /full && truncate -s 64M /root/small-disk && e2fsck -fp /root/small-disk; resize2fs /root/small-disk 2>&1 && mount -o loop /root/small-disk /full && mkdir /nowhere",
    );
    stack.declare(taken(1), ...base, ...broken("100%ORIGIN"));
    healed = await stack.up({ refresh: true });
    healed.succeeded();
    const second = (
      await lab.server1.run("dd if=/dev/VgVm/LV-VM2 bs=1M iflag=direct status=none | sha256sum")
    ).stdout.split(" ")[0];
    expect(await sum("/backup/overflow.raw")).toBe(second);
    expect(await sum("/full/vm1.raw")).toBe(await momentOf());
    expect(await sum("/nowhere/vm1.raw")).toBe(await momentOf());
    expect(await sum("/backup/theirs")).toBe(await momentOf());
  });
});

/** The systemd invocation of the job that makes this file. */
async function jobOf(file: string): Promise<string> {
  const { stdout } = await lab.server2.run(
    `unit=$(systemctl list-units --plain --no-legend 'lvm-nbd-copy-*' | grep '${file}' | cut -d' ' -f1); systemctl show -p InvocationID --value "$unit"`,
  );
  return stdout.trim();
}

/** The invocations of all jobs that ever made this file. */
async function lastJobsOf(file: string): Promise<string[]> {
  const { stdout } = await lab.server2.run(
    `journalctl -q -o json --output-fields=INVOCATION_ID,MESSAGE _PID=1 | grep 'Started .*to /backup/${file}' | sed 's/.*"INVOCATION_ID":"\\([0-9a-f]*\\)".*/\\1/'`,
  );
  return stdout.trim().split("\n");
}

describe("a run that is cut:", () => {
  const interrupted = (generation: number) => [
    taken(1),
    ...base,
    volumeCopy("interrupted", "vm1", {
      file: "/backup/interrupted.raw",
      bandwidthLimit: "1M",
      triggers: [generation],
    }),
  ];
  const started = async (): Promise<{ pid: number; end: Promise<Run> }> => {
    const run = stack.startUp();
    await waitFor(async () => ((await running("interrupted.raw")) === "1" ? true : undefined), {
      timeoutSeconds: 300,
      what: "the copy to run",
    });
    return run;
  };

  it("Ctrl-C stops the job, and leaves nothing of it", async () => {
    stack.declare(...interrupted(1));
    const { pid, end } = await started();
    process.kill(-pid, "SIGINT");
    const run = await end;
    expect(run.exitCode, run.text).not.toBe(0);
    expect(run.text).toMatch(/CANCELLED: VolumeCopy interrupted/);
    expect(await running("interrupted.raw")).toBe("0");
    expect(await files()).not.toContain("interrupted");
  });

  it("Pulumi is killed: the job goes on, and the next up finds it instead of starting another", async () => {
    const { pid, end } = await started();
    const job = await jobOf("interrupted.raw");
    process.kill(-pid, "SIGKILL");
    await end;
    await stack.cancel();
    (await stack.up()).succeeded("1 created");
    expect((await lastJobsOf("interrupted.raw")).at(-1)).toBe(job);
    expect(await sum("/backup/interrupted.raw")).toBe(await momentOf());
  });
});

describe("a whole backup:", () => {
  const backup = (day: string, slow: { readonly bandwidthLimit?: string } = {}) =>
    backupImage(day, { quiesce }, [{ origin: "LV-VM1", size: "16M", file: `/backup/${day}.raw` }], slow);
  const days = (...backups: Declared[]) => stack.declare(taken(1), ...base, ...backups);
  /** What backups could have left on their source. */
  const onSource = async () =>
    (
      await lab.server1.run(
        "lvs --noheadings -o lv_name VgVm | grep backup; systemctl list-units --all --plain --no-legend 'lvm-nbd-export-backup-*'; ls /etc/systemd/system | grep lvm-nbd-export-backup; true",
      )
    ).stdout.trim();
  const running = async (day: string) =>
    waitFor(async () => ((await jobOf(`${day}.raw`)) === "" ? undefined : true), {
      timeoutSeconds: 300,
      what: "the copy to run",
    });
  const frozen = async () => (await lab.server1.run("stat -c %y /root/moment")).stdout;

  it("the VM is frozen, its moment is copied, and nothing is left on its server", async () => {
    days(backup("monday"));
    (await stack.up()).succeeded("1 created");
    expect(await sum("/backup/monday.raw")).toBe(await momentOf());
    expect(await copyState("monday")).toMatchObject({
      ...{ state: "complete", takenAt: expect.stringMatching(/^\d{4}-\d\d-\d\dT/) },
      images: [{ sha256: await momentOf(), state: "complete" }],
    });
    expect(await onSource()).toBe("");
    expect((await lab.server1.run("fsfreeze -u /vm", { allowFailure: true })).exitCode).not.toBe(0);
    await stack.isAsDeclared();
  });

  it("Pulumi is killed: the next up goes on from the same moment, and takes everything down", async () => {
    days(backup("monday"), backup("tuesday", { bandwidthLimit: "1M" }));
    const { pid, end } = stack.startUp();
    await running("tuesday");
    const job = await jobOf("tuesday.raw");
    process.kill(-pid, "SIGKILL");
    await end;
    await stack.cancel();
    const at = await frozen();
    (await stack.up()).succeeded("1 created");
    expect((await lastJobsOf("tuesday.raw")).at(-1)).toBe(job);
    expect(await frozen()).toBe(at);
    expect(await sum("/backup/tuesday.raw")).toBe(await momentOf());
    expect(await onSource()).toBe("");
  });

  it("the images are listed by their manifests, for a program to choose from", async () => {
    const images = await listImages("server2", "/backup");
    expect(images.map(({ generation }) => generation)).toEqual(
      expect.arrayContaining(["tuesday", "monday", "vm1", "limited"]),
    );
    const [newest] = images;
    expect(newest).toMatchObject({
      generation: "tuesday",
      sha256: await momentOf(),
      verified: true,
      sound: true,
    });
    expect(newest?.takenAt).toBe((await copyState("tuesday")).takenAt);
  });

  it("Ctrl-C stops it, and leaves nothing of it on either server", async () => {
    days(backup("monday"), backup("tuesday"), backup("wednesday", { bandwidthLimit: "1M" }));
    const { pid, end } = stack.startUp();
    await running("wednesday");
    process.kill(-pid, "SIGINT");
    const run = await end;
    expect(run.text).toMatch(/CANCELLED: BackupImage wednesday/);
    expect(await files()).not.toContain("wednesday");
    expect(await onSource()).toBe("");
  });
});

it("the disk of the backups is not mounted: nothing is taken for gone; mounted again, all goes with the stack", async () => {
  await lab.server2.run("umount /backup");
  const before = await stack.state();
  const run = await stack.refresh();
  run.failedWith("ANOTHER_FILE_SYSTEM", "VolumeCopy raw", "server2", "/backup/vm1.raw is not there");
  expect((await stack.state()).get("raw")).toEqual(before.get("raw"));
  await lab.server2.run("mount /dev/VgVm/backup /backup");
  const destroyed = await stack.destroy();
  destroyed.succeeded();
  expect(await files()).toBe("");
  for (const server of [lab.server1, lab.server2]) expect(await leftOf(server)).toBe("");
});

/** What copies could have left on a server. */
async function leftOf(server: Guest): Promise<string> {
  const { stdout } = await server.run(
    "ls -d /run/lvm-nbd-copy-* 2>/dev/null; systemctl list-units --all --plain --no-legend 'lvm-nbd-copy-*'",
  );
  return stdout.trim();
}
