/** Faults of what lies below: LVM, devices, programs and files of the servers. */
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import type { ErrorCode } from "../../../provider/core/errors.js";
import type { Guest, Lab } from "../lab.mts";
import {
  allowedInto,
  checksum,
  checksumSoon,
  freshLab,
  leftovers,
  makeOrigin,
  originBytes,
} from "../support.mts";
import { attachment, type Declared, FaultStack, nbdExport, output, snapshot } from "./fault-stack.mts";
import { asDeclaredAndUp, type Fault, together, up } from "./together.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let stack: FaultStack;
const the = () => stack;

const vm1 = snapshot("vm1", { origin: "LV-VM1", size: "8M" });
const grown = snapshot("vm1", { origin: "LV-VM1", size: "12M" });
const exportOfVm1 = nbdExport("vm1-export", { device: output("vm1", "path") });
const attached = attachment("vm1-attached", { uri: output("vm1-export", "uri") });
const kept = snapshot("kept", { origin: "LV-VM2", size: "8M" });
const exportOfKept = nbdExport("kept-export", { device: output("kept", "path"), port: 10810 });
const lone = snapshot("lone", { origin: "LV-VM3", size: "8M" });
/** On the other server. */
const far = snapshot("far", { host: "server2", origin: "LV-FAR", size: "8M" });
const base: readonly Declared[] = [vm1, exportOfVm1, attached, kept, exportOfKept, lone, far];
const second: readonly Declared[] = [grown, exportOfVm1, attached, kept, exportOfKept, lone, far];

const field = async (server: Guest, volume: string, name: string) =>
  (await server.run(`lvs --noheadings --nosuffix --units b -o ${name} VgVm/${volume}`)).stdout.trim();
const uuid = (volume: string) => field(lab.server1, volume, "lv_uuid");
const volumes = async () =>
  (await lab.server1.run("lvs --noheadings -o lv_name VgVm")).stdout.trim().split(/\s+/).sort();
const files = async (server: Guest, pattern: string) =>
  (await server.run(`ls -d ${pattern} 2>/dev/null; true`)).stdout.trim();
/** What a client of the export reads. */
const served = async (port: number, name: string) =>
  (
    await lab.server1.run(
      `set -o pipefail; nbdcopy nbd://${lab.server1.privateAddress}:${port}/${name} - | sha256sum`,
    )
  ).stdout.split(" ")[0];

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([
    FaultStack.create(lab),
    (async () => {
      for (const name of ["LV-VM1", "LV-VM2", "LV-VM3"]) await makeOrigin(lab.server1, name);
      await makeOrigin(lab.server2, "LV-FAR");
      await lab.server1.run(`
        lvcreate -qq -y -L 32M --errorwhenfull y -T VgVm/pool && lvcreate -qq -y -V 48M -T VgVm/pool -n thin &&
        dd if=/dev/urandom of=/dev/VgVm/thin bs=1M count=4 oflag=direct status=none`);
    })(),
  ]);
  stack.declare(...base);
  (await stack.up()).succeeded(`${base.length + 1} created`);
});

afterAll(() => stack?.close());

{
  let origin: string;
  let before: string;
  let foreignUnit: string;
  const foreignFile = "/etc/systemd/system/lvm-nbd-export-theirs.service";
  const thin = snapshot("thin-snap", { origin: "thin" });

  together(
    "what cannot be made is refused, the rest goes on, and the next up makes it:",
    {
      met: async () => {
        origin = await checksum(lab.server1, "/dev/VgVm/LV-VM3");
        before = await uuid("vm1");
        stack.declare(
          ...second,
          thin,
          snapshot("full", { origin: "LV-VM3", size: "8M" }),
          snapshot("denied", { host: "server2-operator", origin: "LV-FAR", size: "8M" }),
          nbdExport("taken", { device: "/dev/VgVm/LV-VM3", port: 10811, server: "qemu-nbd" }),
          nbdExport("missing", { device: "/dev/VgVm/LV-VM3", port: 10812 }),
          nbdExport("theirs", { device: "/dev/VgVm/LV-VM3", port: 10813, server: "qemu-nbd" }),
          attachment("busy", { uri: output("kept-export", "uri"), device: "/dev/nbd7" }),
          attachment("good", { uri: output("kept-export", "uri") }),
        );
        return stack.up();
      },
      next: up(the),
    },
    [
      {
        name: "volume group full: no snapshot is taken",
        broken: () => lab.server1.run("lvcreate -qq -y -W n -l 100%FREE -n filler VgVm"),
        told: async (run) => {
          run.failedWith("NO_SPACE", "LvSnapshot full", "server1", 'Volume group "VgVm"', "lvcreate");
          expect(await volumes()).not.toContain("full");
        },
        mended: () => lab.server1.run("lvremove -qq -f VgVm/filler"),
        healed: async () => {
          expect(await checksum(lab.server1, "/dev/VgVm/full")).toBe(origin);
        },
      },
      {
        name: "volume group full: a snapshot that cannot grow stays as it is",
        broken: async () => {},
        told: async (run) => {
          run.failedWith("NO_SPACE", "LvSnapshot vm1", "server1", "could not be grown", "lvextend");
          expect(await uuid("vm1")).toBe(before);
          expect((await stack.state()).get("vm1")).toMatchObject({ size: "8M", state: "valid" });
        },
        healed: async () => {
          expect(await uuid("vm1")).toBe(before);
          expect(await field(lab.server1, "vm1", "lv_size")).toBe(String(12 * 1024 ** 2));
        },
      },
      {
        name: "thin pool full: no snapshot is taken",
        broken: () =>
          lab.server1.run(
            "! dd if=/dev/urandom of=/dev/VgVm/thin bs=1M seek=4 oflag=direct status=none 2>/dev/null",
          ),
        told: async (run) => {
          run.failedWith("NO_SPACE", "LvSnapshot thin-snap", "server1", "pool");
          expect(await volumes()).not.toContain("thin-snap");
        },
        mended: () => lab.server1.run("lvextend -qq -y -L +32M VgVm/pool"),
        healed: async () => {
          expect(await checksum(lab.server1, "/dev/VgVm/thin-snap")).toBe(
            await checksum(lab.server1, "/dev/VgVm/thin"),
          );
          expect((await stack.state()).get("thin-snap")).toMatchObject({ state: "valid" });
        },
      },
      {
        name: "port taken by another program: it is named and goes on",
        broken: () =>
          lab.server1.run(
            `systemd-run -q --unit other nbdkit -f -i ${lab.server1.privateAddress} -p 10811 null 1M
             until ss -Hltn 'sport = :10811' | grep -q .; do sleep 0.1; done`,
          ),
        told: async (run) => {
          run.failedWith("PORT_IN_USE", "NbdExport taken", "server1", "10811", "nbdkit (pid ");
          expect(await files(lab.server1, "/etc/systemd/system/lvm-nbd-export-taken*")).toBe("");
          await lab.server1.run("systemctl is-active other");
        },
        mended: () => lab.server1.run("systemctl stop other"),
        healed: async () => {
          expect(await served(10811, "taken")).toBe(origin);
        },
      },
      {
        name: "nbdkit not installed: the package is named",
        broken: () => lab.server1.run("mv $(command -v nbdkit) /root/"),
        told: async (run) => {
          run.failedWith("PROGRAM_MISSING", "NbdExport missing", "server1", "nbdkit, from package nbdkit");
          expect(await files(lab.server1, "/etc/systemd/system/lvm-nbd-export-missing*")).toBe("");
        },
        mended: () => lab.server1.run("mv /root/nbdkit /usr/bin/"),
        healed: async () => {
          expect(await served(10812, "missing")).toBe(origin);
        },
      },
      {
        name: "somebody else's unit of the same name: it is left alone",
        broken: async () => {
          await lab.server1.run(
            `printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >${foreignFile}; systemctl daemon-reload; systemctl start lvm-nbd-export-theirs`,
          );
          foreignUnit = (await lab.server1.run(`stat -c %i%Y ${foreignFile}`)).stdout;
        },
        told: async (run) => {
          run.failedWith("FOREIGN_RESOURCE", "NbdExport theirs", "server1", "no owner mark", "adopt: true");
          const now = await lab.server1.run(
            `stat -c %i%Y ${foreignFile}; systemctl is-active lvm-nbd-export-theirs`,
          );
          expect(now.stdout).toBe(`${foreignUnit}active\n`);
        },
        mended: () =>
          lab.server1.run(`systemctl stop lvm-nbd-export-theirs; rm ${foreignFile}; systemctl daemon-reload`),
        healed: async () => {
          expect(await served(10813, "theirs")).toBe(origin);
        },
      },
      {
        name: "device busy: somebody else's link is not cut",
        broken: () =>
          lab.server2.run(
            `modprobe nbd; nbd-client -N kept-export ${lab.server1.privateAddress} 10810 /dev/nbd7 -timeout 30 -readonly`,
          ),
        told: async (run) => {
          run.failedWith("DEVICE_IN_USE", "NbdAttachment busy", "server2", "/dev/nbd7");
          expect(await files(lab.server2, "/etc/systemd/system/lvm-nbd-attach-busy*")).toBe("");
          expect((await lab.server2.run("cat /sys/block/nbd7/size")).stdout.trim()).toBe(
            String(originBytes / 512),
          );
        },
        mended: () => lab.server2.run("nbd-client -d /dev/nbd7"),
        healed: async () => {
          expect((await stack.state()).get("busy")).toMatchObject({ device: "/dev/nbd7", state: "attached" });
        },
      },
      {
        name: "sudo denied: nothing is run, the other user's resources go on",
        broken: () =>
          lab.server2.run(
            "cp /etc/sudoers.d/lvm-nbd-operator /root/ && sed -i '/take-snapshots-[0-9a-f]*,/d' /etc/sudoers.d/lvm-nbd-operator",
          ),
        told: (run) => {
          run.failedWith("SUDO_DENIED", "LvSnapshot denied", "server2-operator", "operator", "sudo -n");
          run.said("NbdAttachment good created");
        },
        mended: () => lab.server2.run("mv /root/lvm-nbd-operator /etc/sudoers.d/"),
        healed: async () => {
          expect(await checksum(lab.server2, "/dev/VgVm/denied")).toBe(
            await checksum(lab.server2, "/dev/VgVm/LV-FAR"),
          );
        },
      },
    ],
  );
}

{
  let inUse: string[];
  const devicesInUse = async () =>
    (await lab.server2.run("cd /sys/block; grep -lv '^0$' nbd*/size; true")).stdout.trim().split("\n");
  const third = [
    ...second,
    nbdExport("etc-full", { device: "/dev/VgVm/LV-VM3", port: 10814 }),
    snapshot("etc-full-snap", { origin: "LV-VM3", size: "8M" }),
    attachment("etc-read-only", { uri: output("kept-export", "uri") }),
  ];

  together(
    "/etc that cannot be written:",
    {
      met: () => {
        stack.declare(...third);
        return stack.up();
      },
      next: up(the),
    },
    [
      {
        name: "disk full in /etc: an export is not started, and no piece of its unit is left",
        // Blocks reserved for root are taken as well.
        broken: () =>
          lab.server1.run(
            "fallocate -l $(($(stat -f -c '%a * %S' /))) /root/filler; ! dd if=/dev/zero of=/root/filler2 bs=4k status=none 2>/dev/null",
          ),
        told: async (run) => {
          run.failedWith("COMMAND_FAILED", "NbdExport etc-full", "server1", "No space left on device");
          expect(await files(lab.server1, "/etc/systemd/system/lvm-nbd-export-etc-full*")).toBe("");
        },
        mended: () => lab.server1.run("rm -f /root/filler /root/filler2"),
        healed: async () => {
          expect(await served(10814, "etc-full")).toBe(await checksum(lab.server1, "/dev/VgVm/LV-VM3"));
        },
      },
      {
        name: "disk full in /etc: LVM cannot archive its metadata, and no snapshot is taken",
        broken: async () => {},
        told: async (run) => {
          // LVM itself names the reason or not, by whether the last block of its archive was begun: then we do.
          const told = run.failedWith("COMMAND_FAILED", "LvSnapshot etc-full-snap", "server1");
          expect(told).toMatch(/No space left on device|what to do: LVM gives no reason; a full disk/);
          expect(await volumes()).not.toContain("etc-full-snap");
        },
        healed: async () => {
          expect(await volumes()).toContain("etc-full-snap");
        },
      },
      {
        name: "read-only /etc: an attachment is not made, and its device stays free",
        broken: async () => {
          inUse = await devicesInUse();
          await lab.server2.run("mount --bind /etc /etc && mount -o remount,bind,ro /etc");
        },
        told: async (run) => {
          run.failedWith("COMMAND_FAILED", "NbdAttachment etc-read-only", "server2", "Read-only file system");
          expect(await files(lab.server2, "/etc/systemd/system/lvm-nbd-attach-etc*")).toBe("");
          expect(inUse).toEqual(expect.arrayContaining(await devicesInUse()));
        },
        mended: () => lab.server2.run("umount /etc"),
        healed: async () => {
          expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/etc-read-only")).toBe(
            await checksum(lab.server1, "/dev/VgVm/kept"),
          );
        },
      },
    ],
  );
}

{
  let old: string;
  let now: string;
  let remade: string;

  together(
    "drift that a refresh names and the next up puts right:",
    { met: () => stack.refresh(), next: up(the) },
    [
      {
        name: "the snapshot overflows while it is attached: a new one of now takes its place in the whole chain",
        broken: async () => {
          old = await uuid("vm1");
          await lab.server1.run(
            "dd if=/dev/urandom of=/dev/VgVm/LV-VM1 bs=1M count=16 oflag=direct status=none; mkfs.ext4 -q -F /dev/VgVm/LV-VM1",
          );
          now = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
        },
        told: (run) => run.said("LvSnapshot vm1 on server1: is now overflowed, was valid"),
        healed: async () => {
          expect(await uuid("vm1")).not.toBe(old);
          expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1-attached")).toBe(now);
          expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).toBe(now);
        },
      },
      {
        name: "a snapshot is removed by hand while it is exported: both are there again",
        broken: async () => {
          await lab.server2.run("systemctl stop lvm-nbd-attach-etc-read-only");
          await lab.server1.run("lvremove -qq -f VgVm/kept");
        },
        told: (run) =>
          run.said(
            "LvSnapshot kept on server1: is gone from the host",
            "NbdExport kept-export on server1: is notServing",
          ),
        healed: async () => {
          const origin = await checksum(lab.server1, "/dev/VgVm/LV-VM2");
          expect(await served(10810, "kept-export")).toBe(origin);
          expect(await checksum(lab.server2, "/dev/lvm-nbd/etc-read-only")).toBe(origin);
        },
      },
      {
        name: "an origin is removed and made anew under its name: the snapshot is told to be gone, and taken of the new one",
        broken: async () => {
          // Exports of the origin itself have it open only while somebody reads.
          await lab.server1.run("lvremove -qq -f VgVm/LV-VM3");
          remade = await makeOrigin(lab.server1, "LV-VM3");
        },
        told: (run) =>
          run.said(
            "LvSnapshot lone on server1: is gone from the host",
            "LvSnapshot etc-full-snap on server1: is gone from the host",
          ),
        healed: async () => {
          expect(await checksum(lab.server1, "/dev/VgVm/lone")).toBe(remade);
          expect(await served(10814, "etc-full")).toBe(remade);
        },
      },
      {
        name: "a unit is edited by hand: it is written and started as declared",
        broken: () =>
          lab.server1.run(
            `sed -i 's/^IPAddressAllow=.*/IPAddressAllow=any/' /etc/systemd/system/lvm-nbd-export-vm1-export.service
             systemctl daemon-reload; systemctl restart lvm-nbd-export-vm1-export`,
          ),
        told: (run) => run.said("NbdExport vm1-export on server1: is edited"),
        healed: async () => {
          expect(await allowedInto(lab.server1, "lvm-nbd-export-vm1-export.service")).toEqual(
            [lab.server1, lab.server2].map(({ privateAddress }) => `${privateAddress}/32`),
          );
        },
      },
    ],
  );
}

{
  let before: ReadonlyMap<string, unknown>;
  let seqno: string;
  const metadata = async () => (await lab.server1.run("vgs --noheadings -o vg_seqno VgVm")).stdout;
  const unreachable = async () => {
    expect([...(await stack.state()).keys()].sort()).toEqual([...before.keys()].sort());
  };
  const remembered = async () => {
    before = await stack.state();
    seqno = await metadata();
  };

  /** No snapshot of server1 can be looked at: all are told so with that code, and nothing was changed meanwhile. */
  const unseen = (
    {
      afterwards,
      ...fault
    }: Pick<Fault, "name" | "broken" | "mended"> & { afterwards?: () => Promise<void> },
    code: ErrorCode,
    ...texts: string[]
  ): Fault => ({
    ...fault,
    told: async (run) => {
      for (const name of ["vm1", "kept", "lone"])
        run.failedWith(code, `LvSnapshot ${name}`, "server1", ...texts);
      await unreachable();
      await afterwards?.();
    },
    healed: async () => {
      expect(await metadata()).toBe(seqno);
    },
  });

  /** server2's `lvs` is another program: its snapshot's error holds these texts. */
  const stubbed = (name: string, program: string, code: ErrorCode, ...texts: string[]): Fault => ({
    name,
    broken: () =>
      lab.server2.run(
        `printf '#!/bin/sh\\n${program}\\n' >/usr/local/sbin/lvs; chmod 755 /usr/local/sbin/lvs`,
      ),
    told: async (run) => {
      run.failedWith(code, "LvSnapshot far", "server2", "lvs", ...texts);
      await unreachable();
      expect((await lab.server2.run("pgrep -f /usr/local/sbin/[l]vs; true")).stdout).toBe("");
    },
    mended: () => lab.server2.run("rm /usr/local/sbin/lvs"),
    healed: async () => {
      expect((await stack.state()).get("far")).toMatchObject({ state: "valid" });
    },
  });

  together(
    "what cannot be told is not gone; the state stays, other resources are refreshed:",
    { met: () => stack.refresh(), next: up(the) },
    [
      unseen(
        {
          name: "somebody holds LVM's lock for good",
          broken: async () => {
            await remembered();
            await lab.server1.run(
              "systemd-run -q --unit holder flock /run/lock/lvm/V_VgVm sleep infinity; until fuser -s /run/lock/lvm/V_VgVm; do sleep 0.1; done",
            );
          },
          afterwards: async () => {
            expect((await lab.server1.run("pgrep -x lvs; true")).stdout).toBe("");
          },
          mended: () => lab.server1.run("systemctl stop holder"),
        },
        "COMMAND_TIMED_OUT",
        "lvs",
        "lock",
      ),
      stubbed(
        "a command hangs and is deaf to TERM: it is ended on the host",
        'trap "" TERM\\nwhile :; do sleep 0.5; done',
        "COMMAND_TIMED_OUT",
        "stopped after 60 s",
      ),
      {
        name: "the other resources of these hosts are refreshed all the same",
        broken: () => lab.server1.run("systemctl stop lvm-nbd-export-etc-full"),
        told: (run) => run.said("NbdExport etc-full on server1: is stopped"),
        healed: async () => {
          await lab.server1.run("systemctl is-active lvm-nbd-export-etc-full");
        },
      },
    ],
  );

  together(
    "what cannot be read is not gone; the state stays:",
    {
      met: () => stack.refresh(),
      next: asDeclaredAndUp(the),
    },
    [
      unseen(
        {
          name: "the volume group's disk is not there",
          broken: () =>
            lab.server1.run("printf 'devices {\\n global_filter=[\"r|.*|\"]\\n}\\n' >/etc/lvm/lvmlocal.conf"),
          mended: () => lab.server1.run("rm /etc/lvm/lvmlocal.conf"),
        },
        "VOLUME_GROUP_NOT_FOUND",
        "VgVm",
      ),
      stubbed("a command's output cannot be parsed", 'echo {\\\\"report\\\\": nonsense', "OUTPUT_UNREADABLE"),
    ],
  );
}

it("volume group renamed: no snapshot is lost, and all is as declared once it has its name again", async () => {
  const before = await uuid("vm1");
  await lab.server1.run("vgrename -qq VgVm VgElse");
  const run = await stack.up({ refresh: true });
  run.said("LvSnapshot vm1 on server1: its volume group is now VgElse");
  for (const name of ["vm1", "kept", "lone"])
    run.failedWith("VOLUME_GROUP_NOT_FOUND", `LvSnapshot ${name}`, "server1", '"VgVm"', '"VgElse"');
  const { stdout } = await lab.server1.run("lvs --noheadings -o lv_uuid VgElse/vm1");
  expect(stdout.trim()).toBe(before);
  await lab.server1.run("vgrename -qq VgElse VgVm");
  (await stack.up({ refresh: true })).succeeded();
  expect(await uuid("vm1")).toBe(before);
  expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1-attached")).toBe(
    await checksum(lab.server1, "/dev/VgVm/LV-VM1"),
  );
});

it("somebody holds LVM's lock for 20 s: up waits and goes on", async () => {
  await lab.server1.run(
    "systemd-run -q --unit holder flock /run/lock/lvm/V_VgVm sleep 20; until fuser -s /run/lock/lvm/V_VgVm; do sleep 0.1; done",
  );
  const started = performance.now();
  stack.declare(...second, snapshot("late", { origin: "LV-VM3", size: "8M" }));
  (await stack.up()).succeeded("1 created");
  expect(performance.now() - started).toBeGreaterThan(15_000);
  expect(await volumes()).toContain("late");
});

{
  let origins: string[];
  const checksums = async () => {
    const found: string[] = [];
    for (const name of ["LV-VM1", "LV-VM2", "LV-VM3"])
      found.push(await checksum(lab.server1, `/dev/VgVm/${name}`));
    return found;
  };

  together(
    "what is in use at destroy stays, with its state, and the next destroy takes it:",
    {
      met: async () => {
        origins = await checksums();
        return stack.destroy();
      },
      next: async () => {
        const run = await stack.destroy();
        run.succeeded();
        return run;
      },
    },
    [
      {
        name: "the attachment is mounted",
        broken: () =>
          lab.server2.run("mkdir -p /mnt/vm1 && mount -o ro,noload /dev/lvm-nbd/vm1-attached /mnt/vm1"),
        told: async (run) => {
          run.failedWith("DEVICE_IN_USE", "NbdAttachment vm1-attached", "server2", "mounted at /mnt/vm1");
          await lab.server2.run("ls /mnt/vm1/lost+found");
          const left = [...(await stack.state()).keys()];
          expect(left).toEqual(expect.arrayContaining(["vm1", "vm1-export", "vm1-attached"]));
        },
        mended: () => lab.server2.run("umount /mnt/vm1"),
        healed: async () => {
          expect(await leftovers(lab.server2)).toBe("");
        },
      },
      {
        name: "the snapshot is open",
        broken: () =>
          lab.server1.run(
            "systemd-run -q --unit reader sh -c 'exec 3</dev/VgVm/lone; exec sleep 86399'; until pgrep -x -f 'sleep 86399'; do sleep 0.1; done",
          ),
        told: async (run) => {
          run.failedWith("VOLUME_IN_USE", "LvSnapshot lone", "server1", "VgVm/lone", "sleep 86399 (pid ");
          expect(await volumes()).toContain("lone");
          // The others are gone.
          expect([...(await stack.state()).keys()].sort()).toEqual([
            "lone",
            "vm1",
            "vm1-attached",
            "vm1-export",
          ]);
        },
        mended: () => lab.server1.run("systemctl stop reader"),
        healed: async () => {
          expect(await leftovers(lab.server1)).toBe("");
          expect(await checksums()).toEqual(origins);
        },
      },
    ],
  );
}
