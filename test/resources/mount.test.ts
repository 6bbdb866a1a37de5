import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, rmSync, symlinkSync } from "node:fs";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { handlersOn, untouchedHost } from "../support/fakeHost.js";
import { imported, importer } from "../support/imported.js";
import { MountHost } from "../support/mountHost.js";
import type { Kill } from "../support/shellHost.js";

type Values = Readonly<Record<string, unknown>>;

const connection = {
  address: "192.0.2.2",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const path = "/mnt/vm1";
const unit = "mnt-vm1.mount";
const declared = { host: connection, owner: "o/p/s/vm1", device: "/dev/lvm-nbd/vm1", path };
const wanted = { adopt: false, ...declared };
const ext4 = "ID_FS_TYPE=ext4\nID_FS_UUID_ENC=1111-22\nID_FS_LABEL_ENC=root\\x20fs\n";
const table = "1 2048 32768 0x83\n2 34816 16384 0x82\n";
const none: ReadonlySet<string> = new Set();
const asDeclared = ["/dev/nbd0 /mnt/vm1 ro,nosuid,nodev,noexec"];
const units = [
  unit,
  "lvm-nbd-attach-vm1.service.wants",
  `lvm-nbd-attach-vm1.service.wants/${unit}`,
  "multi-user.target.wants",
  `multi-user.target.wants/${unit}`,
].sort();

let host: MountHost;
let processes: ChildProcess[] = [];
beforeEach(() => {
  host = new MountHost();
  host.holds("nbd0", ext4);
});
afterEach(() => {
  for (const process of processes) process.kill("SIGKILL");
  processes = [];
  host.close();
});

const handlers = () => handlersOn("Mount", host);
const create = async (more: Values = {}) => (await handlers().create({ ...wanted, ...more })).state;

async function refused(more: Values, ...texts: (string | RegExp)[]): Promise<void> {
  const before = [host.left(), host.mounts];
  for (const text of texts) await expect(create(more)).rejects.toThrow(text);
  expect([host.left(), host.mounts]).toEqual(before);
  expect(host.commands.filter(({ kind }) => kind === "change")).toEqual([]);
}

describe("arguments", () => {
  const problems = async (change: object) => {
    const asked = untouchedHost();
    const checked = await handlersOn("Mount", asked).check(undefined, { ...declared, ...change }, none);
    expect(asked.commands).toEqual([]);
    return checked.problems.map(({ property, reason }) => `${property}: ${reason}`);
  };

  it("that are right are taken", async () => {
    expect(await problems({})).toEqual([]);
    expect(await problems({ device: "/dev/nbd12", partition: 1, path: "/mnt/vm 1/ä%n" })).toEqual([]);
  });

  it.each([
    [{ device: "/dev/sda" }, /^device: must be the `path` of an NbdAttachment/],
    [{ device: "/dev/lvm-nbd/../sda" }, /^device: must be/],
    [{ partition: 0 }, /^partition: must be 1 or more/],
    [{ partition: 1.5 }, /^partition: must be a whole number/],
    [{ path: "mnt" }, /^path: must be an absolute path/],
    [{ path: "/" }, /^path: must be an absolute path and not "\/"/],
    [{ path: "/mnt/" }, /^path: must hold no/],
    [{ path: "/mnt/../etc" }, /^path: must hold no/],
    [{ path: "/mnt/a\nb" }, /^path: must not hold control/],
    [{ path: "/mnt/a\\" }, /^path: must not hold control characters or backslashes/],
    [{ path: "/mnt/a " }, /^path: must not end with a blank/],
    [{ path: "/proc/x" }, /^path: must not be below/],
    [{ path: `/${"ä".repeat(60)}` }, /^path: is too long/],
  ])("%j are a problem before anything is asked", async (change, message) => {
    expect(await problems(change)).toEqual([expect.stringMatching(message)]);
  });
});

describe("create", () => {
  it("mounts the whole disk, makes the folder, and tells what is there", async () => {
    const { id, state } = await handlers().create(wanted);
    expect(id).toBe("192.0.2.2/mnt/vm1");
    expect(state).toEqual({
      ...wanted,
      fileSystem: { type: "ext4", uuid: "1111-22", label: "root fs" },
      options: "ro,nosuid,nodev,noexec",
      mountedDevice: "/dev/nbd0",
      state: "mounted",
    });
    expect(host.mounts).toEqual(asDeclared);
    expect(host.left()).toEqual([path, ...units].sort());
  });

  it("mounts a partition by the kernel's own device of it", async () => {
    host.holds("nbd0", "ID_PART_TABLE_TYPE=dos\n");
    host.partitions(table);
    host.holds("nbd0@1048576", ext4);
    host.holds("nbd0p1", ext4);
    expect(await create({ partition: 1 })).toMatchObject({
      mountedDevice: "/dev/nbd0p1",
      partition: 1,
      state: "mounted",
    });
    expect(host.mounts).toEqual(["/dev/nbd0p1 /mnt/vm1 ro,nosuid,nodev,noexec"]);
  });

  it("finds the attachment of a kernel's device", async () => {
    expect(await create({ device: "/dev/nbd0" })).toMatchObject({ mountedDevice: "/dev/nbd0" });
    expect(host.read(`/etc/systemd/system/${unit}`)).toContain("BindsTo=lvm-nbd-attach-vm1.service");
  });

  it("its own of an interrupted run is found and left as it is", async () => {
    await create();
    const before = host.commands.length;
    expect(await create()).toMatchObject({ state: "mounted" });
    expect(host.commands.slice(before).filter(({ kind }) => kind === "change")).toEqual([]);
  });

  it("what cannot be mounted is taken down again, and the unit's words are in the error", async () => {
    host.set("refused", "");
    await expect(create()).rejects.toThrow(/MOUNT_FAILED.*ext4 of \/dev\/nbd0.*what the unit said/s);
    expect([host.left(), host.mounts]).toEqual([[], []]);
  });

  it("another owner's is refused with its owner named, an unmarked one unless it is adopted", async () => {
    await create({ owner: "o/p/s/other" });
    await expect(create()).rejects.toThrow(/FOREIGN_RESOURCE.*o\/p\/s\/other/s);
    await expect(create({ adopt: true })).rejects.toThrow(/FOREIGN_RESOURCE.*o\/p\/s\/other/s);
    host.unmount(path);
    host.write(`/etc/systemd/system/${unit}`, `[Mount]\nWhere=${path}\n`);
    await expect(create()).rejects.toThrow(/FOREIGN_RESOURCE.*no owner mark.*adopt: true/s);
    expect(host.mounts).toEqual([]);
    expect(await create({ adopt: true })).toMatchObject({ state: "mounted" });
  });
});

describe("is refused before anything is touched", () => {
  it.each([
    ["a guest's LVM", "ID_FS_TYPE=LVM2_member\n", /NOT_MOUNTABLE.*physical volume of LVM.*never activated/s],
    ["LUKS", "ID_FS_TYPE=crypto_LUKS\n", /NOT_MOUNTABLE.*LUKS.*has its key/s],
    ["swap", "ID_FS_TYPE=swap\n", /NOT_MOUNTABLE.*swap space.*no files/s],
    [
      "an md member",
      "ID_FS_TYPE=linux_raid_member\n",
      /NOT_MOUNTABLE.*member of an md array.*never activated/s,
    ],
    ["one that may write", "ID_FS_TYPE=f2fs\n", /NOT_MOUNTABLE.*f2fs.*by hand/s],
    ["nothing", undefined, /NOT_MOUNTABLE.*nothing that blkid recognises.*right disk/s],
    [
      "two at once",
      "ID_FS_AMBIVALENT=filesystem:ext2 filesystem:btrfs\nID_FS_TYPE=ext2\n",
      /NOT_MOUNTABLE.*several/s,
    ],
  ])("what holds %s", async (_what, content, message) => {
    host.holds("nbd0", content);
    await refused({}, message);
  });

  it("a partitioned disk without a partition: they are listed", async () => {
    host.holds("nbd0", "ID_PART_TABLE_TYPE=dos\n");
    host.partitions(table);
    host.holds("nbd0@1048576", ext4);
    await refused(
      {},
      /NOT_MOUNTABLE.*1 \(16 MiB, ext4 "root fs"\), 2 \(8\.0 MiB, type 0x82\).*by `partition`/s,
    );
    await refused({ partition: 3 }, /PARTITION_NOT_FOUND.*no partition 3; there are: 1 \(16 MiB/s);
    await refused({ partition: 2 }, /NOT_MOUNTABLE.*partition 2 of .* nothing that blkid recognises/s);
  });

  it("a partition of a disk that has none, or of which the kernel has no device", async () => {
    await refused({ partition: 1 }, /PARTITION_NOT_FOUND.*no partition table; the whole of it is ext4/s);
    host.partitions(table, false);
    host.holds("nbd0@1048576", ext4);
    await refused({ partition: 1 }, /PARTITION_NOT_FOUND.*has no device of it.*max_part=15/s);
    host.partitions(table);
    host.partitions("1 4096 32768 0x83\n", false);
    host.holds("nbd0@2097152", ext4);
    await refused({ partition: 1 }, /PARTITION_NOT_FOUND.*has it elsewhere/s);
  });

  it("a device that is no attachment, or that cannot be read", async () => {
    await refused({ device: "/dev/nbd5" }, /DEVICE_NOT_FOUND.*no NbdAttachment has \/dev\/nbd5/s);
    await refused({ device: "/dev/lvm-nbd/other" }, /DEVICE_NOT_FOUND/);
    host.set("dead", "");
    await refused({}, /ATTACHMENT_DEAD.*cannot be read/s);
  });

  it("a file system that the kernel does not know", async () => {
    host.holds("nbd0", "ID_FS_TYPE=erofs\n");
    host.set("no-module", "");
    await refused({}, /MODULE_MISSING.*has no erofs/s);
  });

  it("a btrfs of which another copy is mounted", async () => {
    host.holds("nbd0", "ID_FS_TYPE=btrfs\nID_FS_UUID_ENC=b-1\n");
    host.write("/sys/fs/btrfs/b-2/devices/nbd7", "");
    host.write("/sys/fs/btrfs/b-1/devices/nbd3", "");
    await refused({}, /NOT_MOUNTABLE.*btrfs b-1, of which \/dev\/nbd3 is mounted/s);
  });

  it.each(["/srv/alice", "/srv/alice/made"])(
    "%s below a folder that others than root can change",
    async (below) => {
      mkdirSync(host.real("/srv/alice"));
      // A folder of somebody's own may well be mounted on, but for what is above it.
      host.set("theirs", host.real("/srv/alice"));
      if (below === "/srv/alice") host.set("theirs", host.real("/srv"));
      await refused(
        { path: below },
        /MOUNT_POINT_UNSUITABLE.*\/srv(\/alice)? \(alice, drwxr-xr-x\) can be changed by others than root/s,
      );
    },
  );

  it("a mount point that holds files, is none, is mounted on, or in fstab", async () => {
    host.write("/srv/full/letter", "");
    await refused({ path: "/srv/full" }, /MOUNT_POINT_UNSUITABLE.*not empty: it holds letter/s);
    await refused(
      { path: "/srv/full/letter/x" },
      /MOUNT_POINT_UNSUITABLE.*\/srv\/full\/letter is not a folder/s,
    );
    symlinkSync(host.real("/srv/full"), host.real("/srv/link"));
    await refused(
      { path: "/srv/link/a" },
      /MOUNT_POINT_UNSUITABLE.*\/srv\/link is a symbolic link: give \/srv\/full\/a/s,
    );
    host.mount(path, "/dev/sdb1");
    await refused({}, /MOUNT_POINT_UNSUITABLE.*\/dev\/sdb1 \(ext4\) is mounted at \/mnt\/vm1/s);
    host.unmount(path);
    host.write("/etc/fstab", "/dev/sdb2 /mnt/vm1/ ext4 noauto\n");
    await refused({}, /MOUNT_POINT_UNSUITABLE.*\/etc\/fstab mounts \/dev\/sdb2/s);
  });
});

describe("drift", () => {
  let state: Values;
  beforeEach(async () => {
    state = await create();
  });

  const drifts: [what: string, how: () => void, state: string, said: RegExp][] = [
    ["an unmount", () => host.unmount(path), "unmounted", /is unmounted; `pulumi up` will mount it/],
    [
      "other options",
      () => {
        host.unmount(path);
        host.mount(path, "/dev/nbd0", "rw,nosuid,nodev,noexec");
      },
      "remounted",
      /\/dev\/nbd0 is mounted there \(ext4, rw,nosuid/,
    ],
    [
      "an edited unit",
      () => host.write(`/etc/systemd/system/${unit}`, `${host.read(`/etc/systemd/system/${unit}`)}#\n`),
      "edited",
      /is edited/,
    ],
    [
      "a drop-in",
      () => host.write(`/etc/systemd/system/${unit}.d/x.conf`, "[Mount]\n"),
      "edited",
      /is edited/,
    ],
    [
      "a disabled unit",
      () => rmSync(host.real(`/etc/systemd/system/lvm-nbd-attach-vm1.service.wants/${unit}`)),
      "disabled",
      /is disabled; `pulumi up` will let it start at boot again/,
    ],
    [
      "a unit whose file was deleted",
      () => rmSync(host.real(`/etc/systemd/system/${unit}`)),
      "edited",
      /is edited/,
    ],
    [
      "another file system",
      () => host.holds("nbd0", "ID_FS_TYPE=xfs\nID_FS_UUID_ENC=x-1\n"),
      "replaced",
      /the device holds xfs x-1, it was ext4 1111-22 root fs/,
    ],
    ["an attachment that moved", () => moveAttachment(), "replaced", /is replaced/],
  ];
  const moveAttachment = () => {
    host.attach("vm1", "/dev/nbd1");
    host.holds("nbd1", ext4);
  };

  it.each(drifts)(
    "of %s is told by a refresh and put right by the next up",
    async (_what, how, seen, said) => {
      how();
      const asked = handlers();
      const read = await asked.read(state);
      expect(read).toMatchObject({ state: seen });
      expect(asked.warnings.join("\n")).toMatch(said);
      const { changes } = await handlersOn("Mount", untouchedHost()).diff({ ...read }, wanted, none);
      expect(changes).toEqual([{ property: "state", effect: "update" }]);
      const after = await handlers().update({ ...read }, wanted);
      expect(after).toMatchObject({ state: "mounted" });
      expect(host.mounts).toHaveLength(1);
      expect(host.mounts[0]).toMatch(/^\/dev\/nbd[01] \/mnt\/vm1 ro,nosuid,nodev,noexec$/);
      expect(await handlers().read(after)).toEqual(after);
      // And all of it goes, the folder that was made included.
      await handlers().remove(after);
      expect(host.mounts).toEqual([]);
      expect(host.left().filter((name) => name !== path)).toEqual([]);
    },
  );

  it("of another device is told, and never unmounted by us", async () => {
    host.mount(path, "/dev/sdb1");
    const asked = handlers();
    const read = { ...(await asked.read(state)) };
    expect(read).toMatchObject({ state: "replaced", mountedDevice: "/dev/nbd0" });
    expect(asked.warnings.join("\n")).toMatch(/\/dev\/sdb1 is mounted there/);
    await expect(handlers().update(read, wanted)).rejects.toThrow(/MOUNT_POINT_UNSUITABLE.*\/dev\/sdb1/s);
    await expect(handlers().remove(read)).rejects.toThrow(/MOUNT_POINT_UNSUITABLE.*\/dev\/sdb1/s);
    expect(host.mounts).toEqual([...asDeclared, "/dev/sdb1 /mnt/vm1 rw"]);
    // Where it has taken the place of ours, only the unit is removed.
    host.unmount(path);
    host.unmount(path);
    host.mount(path, "/dev/sdb1");
    await handlers().remove(read);
    expect(host.mounts).toEqual(["/dev/sdb1 /mnt/vm1 rw"]);
    expect(host.left().filter((name) => name !== path)).toEqual([]);
  });

  it("of a text that was edited is put right without an unmount: nobody is cut off", async () => {
    host.write(`/etc/systemd/system/${unit}`, `${host.read(`/etc/systemd/system/${unit}`)}#\n`);
    host.set("busy", "");
    expect(await handlers().update(state, wanted)).toMatchObject({ state: "mounted" });
  });

  it("of a dead link is told as degraded; the up says why it cannot be put right", async () => {
    host.set("dead", "");
    const read = { ...(await handlers().read(state)) };
    expect(read).toMatchObject({ state: "degraded", fileSystem: { uuid: "1111-22" } });
    await expect(handlers().update(read, wanted)).rejects.toThrow(/ATTACHMENT_DEAD/);
    expect(host.mounts).toEqual(asDeclared);
  });

  it("of what is gone with its unit is a mount that is gone", async () => {
    host.unmount(path);
    rmSync(host.real(`/etc/systemd/system/${unit}`));
    expect(await handlers().read(state)).toBeUndefined();
    host.mount(path, "/dev/sdb1");
    expect(await handlers().read(state)).toBeUndefined();
  });

  it("cannot be told where blkid fails: an error, and no other file system", async () => {
    host.holds("nbd0", "");
    host.set("content/nbd0", undefined);
    mkdirSync(host.real("../content/nbd0"));
    await expect(handlers().read(state)).rejects.toThrow(/OUTPUT_UNREADABLE.*blkid/s);
  });
});

describe("in use", () => {
  let state: Values;
  let user: string;
  beforeEach(async () => {
    state = await create();
    const process = spawn("sh", ["-c", "echo; read never"], { cwd: host.real(path) });
    processes.push(process);
    await new Promise((resolve) => process.stdout?.once("data", resolve));
    user = `open in sh -c echo; read never (pid ${process.pid})`;
  });

  it("it is not removed: who uses it is named", async () => {
    await expect(handlers().remove(state)).rejects.toThrow(
      `MOUNT_IN_USE: Mount vm1 on host server2: /mnt/vm1 is in use: ${user}`,
    );
    expect(host.mounts).toEqual(asDeclared);
    expect(host.left()).toEqual([path, ...units].sort());
  });

  it("it is not mounted anew", async () => {
    host.holds("nbd0", "ID_FS_TYPE=xfs\nID_FS_UUID_ENC=x-1\n");
    await expect(handlers().update(state, wanted)).rejects.toThrow(user);
    expect(host.mounts).toEqual(asDeclared);
    expect(host.left()).toEqual([path, ...units].sort());
  });
});

it("in use by something that cannot be named it stays too, with umount's words", async () => {
  const state = await create();
  host.set("busy", "");
  await expect(handlers().remove(state)).rejects.toThrow(
    /MOUNT_IN_USE.*could not be unmounted.*target is busy/s,
  );
  expect(host.mounts).toEqual(asDeclared);
});

describe("what was made is removed", () => {
  it("with every folder that was made for it, and no other", async () => {
    const state = await create({ path: "/mnt/a/b/c" });
    expect(host.left()).toContain("/mnt/a/b/c");
    await handlers().remove(state);
    expect([host.left(), host.mounts]).toEqual([[], []]);
  });

  it("but not a folder that was there, nor one that somebody uses by now", async () => {
    mkdirSync(host.real(path));
    await handlers().remove(await create());
    expect(host.left()).toEqual([path]);
    const state = await create({ path: "/mnt/a/b" });
    host.write("/mnt/a/note", "");
    await handlers().remove(state);
    expect(host.left()).toEqual(["/mnt/a", "/mnt/a/note", path].sort());
  });
});

describe("a change", () => {
  it.each([
    ["device", "/dev/lvm-nbd/vm2"],
    ["partition", 2],
    ["path", "/mnt/other"],
  ])("of %s makes it anew, the old one being unmounted first", async (property, value) => {
    const state = await create();
    host.attach("vm2", "/dev/nbd2");
    host.holds("nbd2", ext4);
    host.partitions(table);
    host.holds("nbd0@17825792", ext4);
    const { changes, deleteBeforeReplace } = await handlers().diff(
      state,
      { ...wanted, [property]: value },
      none,
    );
    expect({ changes, deleteBeforeReplace }).toEqual({
      changes: [{ property, effect: "replace" }],
      deleteBeforeReplace: true,
    });
  });

  it("that cannot succeed is refused while the old one is still mounted", async () => {
    const state = await create();
    await expect(handlers().diff(state, { ...wanted, partition: 7 }, none)).rejects.toThrow(
      /PARTITION_NOT_FOUND/,
    );
    expect(host.mounts).toEqual(asDeclared);
  });

  it("of a device that is only known later makes it anew", async () => {
    const state = await create();
    const { device: _, ...rest } = wanted;
    const { changes } = await handlersOn("Mount", untouchedHost()).diff(state, rest, new Set(["device"]));
    expect(changes).toEqual([{ property: "device", effect: "replace" }]);
  });

  it("of the host's credentials runs nothing", async () => {
    const state = await create();
    const changed = { ...wanted, host: { ...connection, password: "y" } };
    const updated = await handlersOn("Mount", untouchedHost()).update(state, changed);
    expect(updated).toEqual({ ...state, host: changed.host });
  });
});

// A shell for each step: seconds, and many times that where others work on the machine too.
describe("whatever cuts it, the next up finishes the work", { timeout: 240_000 }, () => {
  /** Kills the scripts at each of their steps in turn; `work` runs once per kill. */
  async function atEachStep(
    prepare: () => Promise<Values>,
    work: (state: Values) => Promise<unknown>,
    check: (state: Values) => Promise<void>,
  ) {
    // After a step is before the next one, but for what the shell itself does in between.
    for (const when of ["before", "after"] as const) {
      for (let step = 1; ; step += when === "after" ? 3 : 1) {
        host.close();
        host = new MountHost();
        host.holds("nbd0", ext4);
        const state = await prepare();
        const at: Kill = { step, when };
        host.kill(at);
        const ended = await work(state).then(
          () => "well",
          () => "cut",
        );
        const reached = host.stepsTaken >= step;
        host.kill(undefined);
        if (!reached) {
          expect(step).toBeGreaterThan(4);
          break;
        }
        expect([at, ended]).toEqual([at, "cut"]);
        await check(state);
      }
    }
  }

  it("a create", async () => {
    await atEachStep(
      async () => ({}),
      () => create(),
      async () => {
        expect(await create()).toMatchObject({ state: "mounted" });
        expect(host.mounts).toEqual(asDeclared);
        expect(host.left()).toEqual([path, ...units].sort());
      },
    );
  });

  it("a mount anew", async () => {
    await atEachStep(
      async () => {
        const state = await create();
        host.holds("nbd0", "ID_FS_TYPE=xfs\nID_FS_UUID_ENC=x-1\n");
        return state;
      },
      (state) => handlers().update(state, wanted),
      async (state) => {
        const after = await handlers().update(state, wanted);
        expect(after).toMatchObject({ state: "mounted", fileSystem: { type: "xfs", uuid: "x-1" } });
        expect(host.mounts).toEqual(asDeclared);
        expect(host.left()).toEqual([path, ...units].sort());
      },
    );
  });

  it("a removal", async () => {
    await atEachStep(
      () => create(),
      (state) => handlers().remove(state),
      async (state) => {
        await handlers().remove(state);
        expect([host.left(), host.mounts]).toEqual([[], []]);
      },
    );
  });

  it("a link that is lost after the change: the same run goes on", async () => {
    let lost = false;
    host.afterCommand = ({ kind }) => {
      if (kind !== "change" || lost) return;
      lost = true;
      throw new LvmNbdError("LINK_LOST", { message: "lost" });
    };
    const state = await create();
    expect(state).toMatchObject({ state: "mounted" });
    lost = false;
    await handlers().remove(state);
    expect([host.left(), host.mounts]).toEqual([[], []]);
  });

  it("a create whose look afterwards fails keeps the state of what is there", async () => {
    let fail = false;
    host.afterCommand = ({ kind }) => {
      if (kind === "change") fail = true;
      else if (fail) {
        fail = false;
        throw new LvmNbdError("COMMAND_TIMED_OUT", { message: "hung" });
      }
    };
    const error = await create().catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(PartialFailure);
    expect(error).toMatchObject({ id: "192.0.2.2/mnt/vm1", state: { state: "mounted" } });
  });
});

describe("read by its id alone", () => {
  it.each([
    ["the whole disk", {}],
    ["a partition", { partition: 1 }],
  ])("%s is declared as its unit has it, so that nothing is to change", async (_what, more) => {
    host.partitions(table);
    for (const device of ["nbd0@1048576", "nbd0p1"]) host.holds(device, ext4);
    const made = await create(more);
    const changes = host.commands.filter(({ kind }) => kind === "change").length;
    const found = await imported(handlers(), `192.0.2.2${path}`, importer);
    expect(found.inputs).toEqual({ ...declared, ...more, host: "192.0.2.2" });
    expect(found.state).toEqual({ ...made, host: "192.0.2.2" });
    expect(host.commands.filter(({ kind }) => kind === "change")).toHaveLength(changes);
  });

  it("of another's, of a unit that is none of ours, and of a path that cannot be one, is refused", async () => {
    await create();
    const id = `192.0.2.2${path}`;
    const of = (name: string) => handlers().find(id, { ...importer, name });
    await expect(of("vm2")).rejects.toThrow(/FOREIGN_RESOURCE.*belongs to o\/p\/s\/vm1/s);
    const text = host.read(`/etc/systemd/system/${unit}`) ?? "";
    host.write(`/etc/systemd/system/${unit}`, text.replace(/\[X-LvmNbd\][^[]*/, ""));
    await expect(of("vm1")).rejects.toThrow(/INVALID_INPUT.*no record of what is mounted/s);
    await expect(handlers().find("192.0.2.2/mnt/../etc", importer)).rejects.toThrow(/INVALID_INPUT.*path: /s);
  });

  it("where nothing is mounted, nothing is found", async () => {
    expect(await handlers().find(`192.0.2.2${path}`, importer)).toBeUndefined();
  });
});
