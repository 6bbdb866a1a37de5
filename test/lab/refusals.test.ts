import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { clientsProof } from "../../provider/resources/clientsProof.js";
import type { Lab } from "./lab.mts";
import { checksum, freshLab, LabStack, leftovers, mainPid, makeOrigin, type Values } from "./support.mts";

let lab: Lab;
let stack: LabStack;
let origin: string;

const snapshot = { host: "server1", volumeGroup: "VgVm", origin: "LV-VM1", name: "vm1-snap", size: "8M" };
const exported = (more: Values = {}) => ({
  host: "server1",
  exportName: "vm1",
  device: "/dev/VgVm/LV-VM1",
  listenAddress: lab.server1.privateAddress,
  clients: [lab.server2.privateAddress],
  ...more,
});
const attachment = () => ({
  host: "server2",
  name: "vm1",
  uri: `nbd://${lab.server1.privateAddress}:10809/vm1`,
});
const volumes = async () =>
  (await lab.server1.run("lvs --noheadings -o lv_name VgVm")).stdout.trim().split(/\s+/).sort();

beforeAll(async () => {
  lab = await freshLab();
  stack = new LabStack("refusals");
  origin = await makeOrigin(lab.server1);
});

afterAll(() => stack?.close());

/** The work fails with that code and every one of the texts, and sent no changing command. */
async function refused(work: Promise<unknown>, code: string, ...texts: string[]): Promise<void> {
  const before = stack.commands.length;
  const failure = await work.then(
    () => new Error("it was not refused"),
    (error: unknown) => (error instanceof Error ? error : new Error(String(error))),
  );
  for (const text of [code, ...texts]) expect(failure.message).toContain(text);
  const changes = stack.commands.slice(before).filter(({ kind }) => kind === "change");
  expect(changes.map(({ argv }) => argv.join(" "))).toEqual([]);
}

describe("a snapshot", () => {
  it("is not removed while its device is open", async () => {
    await stack.up("LvSnapshot", "vm1", snapshot);
    await lab.server1.run(
      "systemd-run -q --unit reader sh -c 'exec 3</dev/VgVm/vm1-snap; exec sleep infinity'; until pgrep -x -f 'sleep infinity'; do sleep 0.1; done",
    );
    await refused(stack.destroy("LvSnapshot", "vm1"), "VOLUME_IN_USE", "sleep infinity");
    expect(await volumes()).toContain("vm1-snap");
    await lab.server1.run("systemctl stop reader");
    await stack.destroy("LvSnapshot", "vm1");
    expect(await volumes()).toEqual(["LV-VM1"]);
  });

  it("of that name without a mark is refused, and taken over with adopt", async () => {
    await lab.server1.run("lvcreate -qq -s -y -p r -c 64k -L 8M -n vm1-snap VgVm/LV-VM1");
    await refused(stack.up("LvSnapshot", "vm1", snapshot), "FOREIGN_RESOURCE", "no owner mark", "adopt");
    const { stdout } = await lab.server1.run("lvs --noheadings -o lv_uuid VgVm/vm1-snap");
    const adopted = await stack.up("LvSnapshot", "vm1", { ...snapshot, adopt: true });
    expect(adopted.state.uuid).toBe(stdout.trim());
    await stack.destroy("LvSnapshot", "vm1");
  });

  it("of another stack is refused with its owner, adopt or not", async () => {
    const other = new LabStack("other");
    try {
      await other.up("LvSnapshot", "theirs", snapshot);
      for (const adopt of [false, true]) {
        await refused(
          stack.up("LvSnapshot", "vm1", { ...snapshot, adopt }),
          "FOREIGN_RESOURCE",
          "organization/lab-tests/other/theirs",
        );
      }
      await other.destroy("LvSnapshot", "theirs");
    } finally {
      other.close();
    }
  });

  it("is never made of a plain volume by adopt", async () => {
    await lab.server1.run("lvcreate -qq -y -W n -L 32M -n vm1-snap VgVm");
    const { stdout } = await lab.server1.run("lvs --noheadings -o lv_uuid,lv_tags VgVm/vm1-snap");
    await refused(
      stack.up("LvSnapshot", "vm1", { ...snapshot, adopt: true }),
      "FOREIGN_RESOURCE",
      "is not a snapshot",
    );
    expect((await lab.server1.run("lvs --noheadings -o lv_uuid,lv_tags VgVm/vm1-snap")).stdout).toBe(stdout);
    await lab.server1.run("lvremove -qq -f VgVm/vm1-snap");
  });

  it("of an unfit origin is refused before anything is made", async () => {
    const { size: _, ...sizeless } = snapshot;
    await refused(stack.up("LvSnapshot", "vm1", sizeless), "ORIGIN_UNSUITABLE", "needs a size");
    await refused(
      stack.up("LvSnapshot", "vm1", { ...snapshot, origin: "nothing" }),
      "ORIGIN_NOT_FOUND",
      '"LV-VM1"',
    );
    await refused(
      stack.up("LvSnapshot", "vm1", { ...snapshot, volumeGroup: "VgNone" }),
      "VOLUME_GROUP_NOT_FOUND",
      '"VgVm"',
    );
    await stack.up("LvSnapshot", "first", { ...snapshot, name: "first" });
    await refused(
      stack.up("LvSnapshot", "vm1", { ...snapshot, origin: "first" }),
      "ORIGIN_UNSUITABLE",
      "itself a snapshot",
    );
    await stack.destroy("LvSnapshot", "first");
  });

  it("that finds no space says so and leaves nothing", async () => {
    await lab.server1.run("lvcreate -qq -y -W n -l 100%FREE -n filler VgVm");
    await expect(stack.up("LvSnapshot", "vm1", snapshot)).rejects.toThrow("NO_SPACE: ");
    expect(await volumes()).toEqual(["LV-VM1", "filler"]);
    await lab.server1.run("lvremove -qq -f VgVm/filler");
  });

  it("of a thin origin needs no size", async () => {
    await lab.server1.run(`
      lvcreate -qq -y -L 128M -T VgVm/pool && lvcreate -qq -y -V 16M -T VgVm/pool -n thin &&
      dd if=/dev/urandom of=/dev/VgVm/thin bs=1M count=4 oflag=direct status=none`);
    const before = await checksum(lab.server1, "/dev/VgVm/thin");
    const thin = { host: "server1", volumeGroup: "VgVm", origin: "thin", name: "thin-snap" };
    const { state } = await stack.up("LvSnapshot", "thin", thin);
    expect(state).toMatchObject({ state: "valid", sizeBytes: 16 * 1024 ** 2 });
    await lab.server1.run("dd if=/dev/urandom of=/dev/VgVm/thin bs=1M count=1 oflag=direct status=none");
    expect(await checksum(lab.server1, "/dev/VgVm/thin-snap")).toBe(before);
    expect(await stack.drifted("LvSnapshot", "thin")).toEqual([]);
    expect((await stack.up("LvSnapshot", "thin", thin)).did).toBe("unchanged");
    await stack.destroy("LvSnapshot", "thin");
    expect(await volumes()).toEqual(["LV-VM1", "pool", "thin"]);
    await lab.server1.run("lvremove -qq -f VgVm/thin VgVm/pool");
  });
});

describe("quiesce", () => {
  const quiesced = (freeze: string, thaw: string, more: Values = {}) => ({
    ...snapshot,
    ...more,
    quiesce: { freeze, thaw, timeoutSeconds: 20 },
  });
  const log = async () => (await lab.server1.run("cat /run/quiesce.log")).stdout.trim().split("\n");
  const noted = (what: string) =>
    `echo ${what} $(lvs --noheadings -o lv_name -S lv_name=vm1-snap) >>/run/quiesce.log`;

  beforeEach(async () => {
    await lab.server1.run("rm -f /run/quiesce.log");
  });

  it("freezes before the snapshot is there and thaws after it", async () => {
    await stack.up("LvSnapshot", "vm1", quiesced(noted("freeze"), noted("thaw")));
    expect(await log()).toEqual(["freeze", "thaw vm1-snap"]);
    await stack.destroy("LvSnapshot", "vm1");
  });

  it("takes no snapshot when freeze fails, and thaws", async () => {
    await expect(
      stack.up(
        "LvSnapshot",
        "vm1",
        quiesced(`${noted("freeze")}; echo no guest agent >&2; exit 3`, noted("thaw")),
      ),
    ).rejects.toThrow(/QUIESCE_FAILED: [\s\S]*no guest agent/);
    expect(await log()).toEqual(["freeze", "thaw"]);
    expect(await volumes()).toEqual(["LV-VM1"]);
  });

  it("takes no snapshot when freeze takes too long, and thaws", async () => {
    await expect(
      stack.up("LvSnapshot", "vm1", {
        ...snapshot,
        quiesce: { freeze: "sleep 300", thaw: noted("thaw"), timeoutSeconds: 2 },
      }),
    ).rejects.toThrow("QUIESCE_FAILED: ");
    expect(await log()).toEqual(["thaw"]);
    expect(await volumes()).toEqual(["LV-VM1"]);
  });

  it("thaws when lvcreate fails", async () => {
    await lab.server1.run("lvcreate -qq -y -W n -l 100%FREE -n filler VgVm");
    await expect(stack.up("LvSnapshot", "vm1", quiesced(noted("freeze"), noted("thaw")))).rejects.toThrow(
      "NO_SPACE: ",
    );
    expect(await log()).toEqual(["freeze", "thaw"]);
    await lab.server1.run("lvremove -qq -f VgVm/filler");
  });

  it("keeps the snapshot in the state when only thaw fails, and says so", async () => {
    const failure = await stack
      .handlers("LvSnapshot")
      .create(await stack.checked("LvSnapshot", "vm1", quiesced("true", "echo still frozen >&2; exit 1")))
      .catch((error: unknown) => error);
    expect(failure).toMatchObject({
      name: "PartialFailure",
      id: "server1/VgVm/vm1-snap",
      cause: { code: "THAW_FAILED" },
      message: expect.stringContaining("still frozen"),
      state: { state: "valid", name: "vm1-snap" },
    });
    expect(await volumes()).toEqual(["LV-VM1", "vm1-snap"]);
    await stack.up("LvSnapshot", "vm1", snapshot);
    await stack.destroy("LvSnapshot", "vm1");
  });
});

describe("an export is refused, before anything is changed, with", () => {
  const refusedExport = (more: Values, code: string, ...texts: string[]) =>
    refused(stack.up("NbdExport", "vm1", exported(more)), code, ...texts);

  afterEach(async () => {
    const { stdout } = await lab.server1.run("ls /etc/systemd/system | grep lvm-nbd; true");
    expect(stdout).toBe("");
  });

  it("a port that another program has", async () => {
    await lab.server1.run(
      `systemd-run -q --unit other nbdkit -f -i ${lab.server1.privateAddress} -p 10809 null 1M; until ss -Hltn 'sport = :10809' | grep -q .; do sleep 0.1; done`,
    );
    await refusedExport({}, "PORT_IN_USE", "nbdkit", "10.77.0.1:10809");
    await lab.server1.run("systemctl stop other");
  });

  it("a device that is not there, is none, or cannot be read", async () => {
    await refusedExport({ device: "/dev/VgVm/nothing" }, "DEVICE_NOT_FOUND", "/dev/VgVm/nothing");
    await refusedExport({ device: "/dev/null" }, "DEVICE_NOT_BLOCK", "/dev/null");
    await lab.server1.run("dmsetup create broken --table '0 131072 error'");
    await refusedExport({ device: "/dev/mapper/broken" }, "DEVICE_UNREADABLE", "Input/output error");
    await lab.server1.run("dmsetup remove --retry broken");
  });

  it("a program that is not installed", async () => {
    const program = (await lab.server1.run("command -v qemu-nbd")).stdout.trim();
    await lab.server1.run(`mv ${program} ${program}.away`);
    await refusedExport({ server: "qemu-nbd" }, "PROGRAM_MISSING", "qemu-nbd", "qemu-utils");
    await lab.server1.run(`mv ${program}.away ${program}`);
  });

  it("an address that is not the host's", async () => {
    await refusedExport({ listenAddress: "10.77.0.99" }, "ADDRESS_NOT_LOCAL", "10.77.0.99");
  });

  it("the unit of another stack", async () => {
    const other = new LabStack("other");
    try {
      await other.up("NbdExport", "theirs", exported());
      await refusedExport({ adopt: true }, "FOREIGN_RESOURCE", "organization/lab-tests/other/theirs");
      await other.destroy("NbdExport", "theirs");
    } finally {
      other.close();
    }
  });
});

describe("clients", () => {
  const uri = () => `nbd://${lab.server1.privateAddress}:10809/vm1`;
  const fromServer2 = async () =>
    (await lab.server2.run(`timeout 10 nbdinfo --size ${uri()}`, { allowFailure: true })).exitCode;

  it.each(["nbdkit", "nbd-server", "qemu-nbd"])("are enforced for %s", async (server) => {
    await stack.up("NbdExport", "vm1", exported({ server, clients: ["10.77.0.3"] }));
    expect(await fromServer2()).not.toBe(0);
    await refused(stack.up("NbdAttachment", "vm1", attachment()), "EXPORT_UNREACHABLE", uri());
    await stack.up("NbdExport", "vm1", exported({ server, clients: ["10.77.0.2"] }));
    expect(await fromServer2()).toBe(0);
    await stack.destroy("NbdExport", "vm1");
  });

  it("that the kernel does not enforce are refused, and told where something else does", async () => {
    const { server1 } = lab;
    // Stands in for a kernel that ignores the filter: what systemd starts is under none.
    await server1.run(
      `rm -f ${clientsProof}; cat >/usr/local/bin/systemd-run && chmod +x /usr/local/bin/systemd-run`,
      {
        stdin:
          '#!/bin/sh\nfor word; do shift; case $word in IPAddressDeny=any) word=Nice=0;; esac; set -- "$@" "$word"; done\nexec /usr/bin/systemd-run "$@"\n',
      },
    );
    await expect(stack.up("NbdExport", "vm1", exported())).rejects.toThrow(
      /CLIENTS_NOT_ENFORCED.*may reach no address \(IPAddressDeny=any\) got in.*clientsEnforcedElsewhere/s,
    );
    expect(await leftovers(server1)).toBe("");

    const elsewhere = exported({ clientsEnforcedElsewhere: true });
    const told = await stack.warningsDuring(() => stack.up("NbdExport", "vm1", elsewhere));
    expect(told).toContain("kernel does not enforce `clients`");
    const pid = await mainPid(server1, "lvm-nbd-export-vm1.service");

    await server1.run("rm /usr/local/bin/systemd-run");
    const proven = await stack.warningsDuring(() => stack.up("NbdExport", "vm1", exported()));
    expect(proven).toBe("");
    expect(await mainPid(server1, "lvm-nbd-export-vm1.service")).toBe(pid);

    // Seen with another kernel.
    await server1.run(`test -s ${clientsProof} && echo "Linux version 5.10" >${clientsProof}`);
    expect(await stack.refresh("NbdExport", "vm1")).toMatchObject({ state: "unproven" });
    expect((await stack.up("NbdExport", "vm1", exported())).state).toMatchObject({ state: "serving" });
    expect(await mainPid(server1, "lvm-nbd-export-vm1.service")).toBe(pid);
    await stack.destroy("NbdExport", "vm1");
  });
});

describe("an attachment", () => {
  const device = () => String(stack.state("NbdAttachment", "vm1").device);

  beforeAll(async () => {
    await lab.server1.run("mkfs.ext4 -q -F /dev/VgVm/LV-VM1");
    origin = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
    await stack.up("NbdExport", "vm1", exported());
    await stack.up("NbdAttachment", "vm1", attachment());
  });

  // The device still answers: a refusal detaches nothing.
  afterEach(async () => {
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(origin);
  });

  /** Neither the detach nor a change that needs one goes through; both name the holder. */
  const detachRefused = async (holder: string) => {
    const failure = await stack.destroy("NbdAttachment", "vm1").catch((error: unknown) => error);
    for (const text of ["DEVICE_IN_USE: ", holder]) expect(String(failure)).toContain(text);
    const changed = stack.up("NbdAttachment", "vm1", { ...attachment(), blockSize: 4096 });
    await refused(changed, "DEVICE_IN_USE", holder);
  };

  it("is not detached while it is mounted", async () => {
    await lab.server2.run(
      "mkdir -p '/mnt/old letters' && mount -o ro,noload /dev/lvm-nbd/vm1 '/mnt/old letters'",
    );
    // The kernel writes a space in a mount point as \040.
    await detachRefused("mounted at /mnt/old\\040letters");
    await lab.server2.run("umount '/mnt/old letters'");
  });

  it("is not detached while it is mounted in another mount namespace only", async () => {
    await lab.server2.run(
      "systemd-run -q --unit apart unshare -m sh -c 'mount -o ro,noload /dev/lvm-nbd/vm1 /mnt && touch /run/mounted && exec sleep infinity'; until [ -e /run/mounted ]; do sleep 0.1; done",
    );
    await detachRefused("mounted at /mnt");
    await lab.server2.run("systemctl stop apart");
  });

  it("is not detached while a process holds it", async () => {
    await lab.server2.run(
      "systemd-run -q --unit reader sh -c 'exec 3</dev/lvm-nbd/vm1; exec sleep 86399'; until pgrep -x -f 'sleep 86399'; do sleep 0.1; done",
    );
    await detachRefused("open in sleep 86399 (pid ");
    await lab.server2.run("systemctl stop reader");
  });

  it("is not detached while a device-mapper table holds it", async () => {
    await lab.server2.run(`dmsetup create over --readonly --table "0 1024 linear ${device()} 0"`);
    await detachRefused("used by device over");
    await lab.server2.run("dmsetup remove --retry over");
  });
});

describe("a guest's volume group on an attached disk", () => {
  it("is not activated on the attaching server, and the device is free after the detach", async () => {
    await stack.destroy("NbdAttachment", "vm1");
    await stack.destroy("NbdExport", "vm1");
    // The guest's disk: one partition, a PV of its volume group, made where nothing of it stays behind.
    await lab.server1.run(`set -e
      printf 'label: dos\\n2048,,8e\\n' | sfdisk -q /dev/VgVm/LV-VM1
      loop=$(losetup -f --show -o 1048576 /dev/VgVm/LV-VM1)
      vgcreate -qq -y VgGuest $loop; lvcreate -qq -y -W n -l 100%FREE -n root VgGuest
      vgchange -qq -an VgGuest; losetup -d $loop`);
    await stack.up("NbdExport", "vm1", exported({ readOnly: false }));
    await stack.up("NbdAttachment", "vm1", { ...attachment(), readOnly: false });
    const { device } = stack.state("NbdAttachment", "vm1");
    await lab.server2.run("udevadm settle");
    // It is a disk with that very PV on it: the partition is there and bears LVM's label.
    expect((await lab.server2.run(`blkid -p -o value -s TYPE ${device}p1`)).stdout.trim()).toBe(
      "LVM2_member",
    );
    expect((await lab.server2.run("dmsetup ls")).stdout).not.toContain("VgGuest");
    await stack.destroy("NbdAttachment", "vm1");
    const { stdout } = await lab.server2.run(
      `cat /sys/block/${String(device).slice(5)}/size; ls /sys/block/${String(device).slice(5)}/pid 2>/dev/null; dmsetup ls`,
    );
    expect(stdout).toMatch(/^0\n/);
    expect(stdout).not.toContain("pid");
    await stack.destroy("NbdExport", "vm1");
  });
});
