import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Lab } from "./lab.mts";
import {
  checksum,
  freshLab,
  LabStack,
  leftovers,
  mainPid,
  makeOrigin,
  originBytes,
  spoil,
  type Values,
} from "./support.mts";
import { waitFor } from "./wait.mts";

let lab: Lab;
let stack: LabStack;

beforeAll(async () => {
  lab = await freshLab();
});

afterAll(() => stack?.close());

describe.each([
  ["nbdkit", "server1", "server2", "dynamic"],
  ["nbd-server", "server1", "server2", "plugin"],
  ["qemu-nbd", "server1", "server2", "dynamic"],
  ["nbdkit", "server1-root", "server2-root", "plugin"],
] as const)("the chain over %s on %s and %s, by the door %s", (server, source, client, door) => {
  let moment: string;
  let origin: string;

  const snapshot = { host: source, volumeGroup: "VgVm", origin: "LV-VM1", name: "vm1-snap", size: "8M" };
  const exported = () => ({
    host: source,
    exportName: "vm1",
    device: "/dev/VgVm/vm1-snap",
    listenAddress: lab.server1.privateAddress,
    clients: [lab.server2.privateAddress],
    server,
  });
  const attachment = () => ({
    host: client,
    name: "vm1",
    uri: `nbd://${lab.server1.privateAddress}:10809/vm1`,
  });

  beforeAll(async () => {
    stack = new LabStack(`${server}-${source}`, door);
    moment = await makeOrigin(lab.server1);
  });

  afterAll(async () => {
    stack.close();
    await lab.server1.run("lvremove -qq -f VgVm/LV-VM1");
  });

  it("makes snapshot, export and attachment", async () => {
    const taken = await stack.up("LvSnapshot", "vm1", snapshot);
    expect(taken.state).toMatchObject({
      path: "/dev/VgVm/vm1-snap",
      state: "valid",
      sizeBytes: 8 * 1024 ** 2,
      originSizeBytes: originBytes,
      readOnly: true,
    });
    const serving = await stack.up("NbdExport", "vm1", exported());
    expect(serving.state).toMatchObject({
      state: "serving",
      uri: `nbd://${lab.server1.privateAddress}:10809/vm1`,
      sizeBytes: originBytes,
    });
    const attached = await stack.up("NbdAttachment", "vm1", attachment());
    expect(attached.state).toMatchObject({
      state: "attached",
      device: expect.stringMatching(/^\/dev\/nbd\d+$/),
      path: "/dev/lvm-nbd/vm1",
      sizeBytes: originBytes,
    });
  });

  it("shows the other server the origin's moment after the origin was changed", async () => {
    await spoil(lab.server1, "/dev/VgVm/LV-VM1");
    origin = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
    expect(origin).not.toBe(moment);
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
  });

  it("finds no drift", async () => {
    const warnings = await stack.warningsDuring(async () => {
      expect(await stack.drifted("LvSnapshot", "vm1")).toEqual([]);
      expect(await stack.drifted("NbdExport", "vm1")).toEqual([]);
      expect(await stack.drifted("NbdAttachment", "vm1")).toEqual([]);
    });
    expect(warnings).toBe("");
  });

  it("is refreshed by one look at each host, as by looks at each thing", async () => {
    const types = ["LvSnapshot", "NbdExport", "NbdAttachment"] as const;
    const states = () => types.map((type) => ({ ...stack.state(type, "vm1"), usedPercent: undefined }));
    const before = states();
    const began = stack.commands.length;
    await stack.refreshAll();
    expect(states()).toEqual(before);
    const hosts = stack.commands.slice(began).map(({ host }) => host);
    expect(hosts.sort()).toEqual([source, client]);
  });

  it("adopts what a create left whose answer was lost, and changes nothing", async () => {
    const again = new LabStack(`${server}-${source}`, door);
    try {
      const changes = await again.changesDuring(async () => {
        const taken = await again.up("LvSnapshot", "vm1", snapshot);
        expect(taken.state.uuid).toBe(stack.state("LvSnapshot", "vm1").uuid);
        await again.up("NbdExport", "vm1", exported());
        const attached = await again.up("NbdAttachment", "vm1", attachment());
        expect(attached.state.device).toBe(stack.state("NbdAttachment", "vm1").device);
      });
      expect(changes).toEqual([]);
    } finally {
      again.close();
    }
  });

  it("changes nothing when it runs again", async () => {
    const changes = await stack.changesDuring(async () => {
      expect((await stack.up("LvSnapshot", "vm1", snapshot)).did).toBe("unchanged");
      expect((await stack.up("NbdExport", "vm1", exported())).did).toBe("unchanged");
      expect((await stack.up("NbdAttachment", "vm1", attachment())).did).toBe("unchanged");
    });
    expect(changes).toEqual([]);
  });

  it("removes all of it and leaves the origin as it is", async () => {
    expect(await leftovers(lab.server1)).toContain("nbd");
    expect(await leftovers(lab.server2)).toContain("in use");
    await stack.destroy("NbdAttachment", "vm1");
    await stack.destroy("NbdExport", "vm1");
    await stack.destroy("LvSnapshot", "vm1");
    expect(await leftovers(lab.server1)).toBe("");
    expect(await leftovers(lab.server2)).toBe("");
    expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).toBe(origin);
  });
});

describe("images of a backup, exported to fetch files from", () => {
  const folder = "/srv/back ups";
  const on1 = async (command: string) => (await lab.server1.run(command)).stdout.trim();
  const on2 = async (command: string) => (await lab.server2.run(command)).stdout.trim();
  const exported = (exportName: string, port: number, args: Values) => ({
    ...{ host: "server1", listenAddress: lab.server1.privateAddress, clients: [lab.server2.privateAddress] },
    ...{ exportName, port, ...args, file: `${folder}/${args.file}` },
  });
  const exportRaw = () => stack.up("NbdExport", "raw", exported("raw", 10811, { file: "vm1.raw" }));
  const qcow2 = { format: "qcow2", server: "qemu-nbd" };
  const exportQcow2 = () =>
    stack.up("NbdExport", "qcow2", exported("qcow2", 10812, { file: "vm1.qcow2", ...qcow2 }));
  const exportCopy = () =>
    stack.up("NbdExport", "copy", exported("copy", 10813, { file: "copy.raw", server: "nbd-server" }));
  const fileOf = { raw: "vm1.raw", qcow2: "vm1.qcow2", copy: "copy.raw" };
  const names = ["raw", "qcow2", "copy"] as const;
  const units = names.map((name) => `lvm-nbd-export-${name}.service`);
  const active = () => on1(`systemctl is-active ${units.join(" ")} | xargs; true`);
  const changed = (what: string, wanted: string) =>
    waitFor(async () => (await active()) === wanted || undefined, { timeoutSeconds: 60, what });

  beforeAll(async () => {
    stack = new LabStack("images");
    // The backups have a disk of their own.
    await on1(`set -e; mkdir -p '${folder}' /root/files; echo 'of last night' >/root/files/letter
      lvcreate -qq -y -W n -L 64M -n LV-BACKUPS VgVm && mkfs.ext4 -q /dev/VgVm/LV-BACKUPS && mount /dev/VgVm/LV-BACKUPS '${folder}'
      cd '${folder}' && umask 077 && truncate -s ${originBytes} vm1.raw && mkfs.ext4 -q -d /root/files vm1.raw && qemu-img convert -O qcow2 vm1.raw vm1.qcow2`);
  });

  afterAll(() => stack.close());

  it("are served by each server, by a root without a right that sees nothing else; the files stay root's alone", async () => {
    await Promise.all([exportRaw(), exportQcow2()]);
    const uri = stack.state("NbdExport", "raw").uri;
    await stack.up("VolumeCopy", "copy", { host: "server1", uri, file: `${folder}/copy.raw`, verify: false });
    await exportCopy();
    for (const name of names)
      expect(stack.state("NbdExport", name)).toMatchObject({ state: "serving", sizeBytes: originBytes });
    for (const name of names) {
      const pid = await mainPid(lab.server1, `lvm-nbd-export-${name}.service`);
      expect(
        await on1(
          `xargs </proc/${pid}/uid_map; grep -e Uid -e CapEff /proc/${pid}/status | xargs; find /proc/${pid}/root/srv -type f`,
        ),
      ).toBe(`0 0 1\nUid: 0 0 0 0 CapEff: 0000000000000000\n/proc/${pid}/root${folder}/${fileOf[name]}`);
    }
    await on1(`systemd-analyze security --no-pager --threshold=20 ${units.join(" ")} >/dev/null`);
    expect(await on1(`stat -c '%a %U' '${folder}'/*.raw '${folder}'/*.qcow2 | uniq`)).toBe("600 root");
  });

  it("are held though no client is connected: the export is named", async () => {
    await expect(stack.destroy("VolumeCopy", "copy")).rejects.toThrow(
      /FILE_IN_USE: .*held by export lvm-nbd-export-copy\.service/,
    );
    expect(await on1(`ls '${folder}'`)).toContain("copy.raw");
  });

  it("are mounted on another server, and files of them read", async () => {
    const moments = (["raw", "qcow2"] as const).map(async (name) => {
      const uri = stack.state("NbdExport", name).uri;
      const { state } = await stack.up("NbdAttachment", name, { host: "server2", name, uri });
      await stack.up("Mount", name, { host: "server2", device: state.path, path: `/mnt/${name}` });
      const letter = await on2(`cat /mnt/${name}/letter`);
      await stack.destroy("Mount", name);
      await stack.destroy("NbdAttachment", name);
      return letter;
    });
    expect(await Promise.all(moments)).toEqual(["of last night", "of last night"]);
  });

  it("are let go when their disk is unmounted, and come back with it", async () => {
    await on1(`umount '${folder}'`);
    await changed("the exports to end", "inactive inactive inactive");
    await on1(`! fuser -s /dev/VgVm/LV-BACKUPS && mount /dev/VgVm/LV-BACKUPS '${folder}'`);
    await changed("the exports to be back", "active active active");
    expect(await stack.drifted("NbdExport", "raw")).toEqual([]);
    // Another file of the name, though of the same size and content.
    await on1(`cd '${folder}' && cp vm1.raw new && mv new vm1.raw`);
    expect(await stack.drifted("NbdExport", "raw")).toEqual(["state"]);
  });

  it("are not served once something else is in their place, nor from a folder of others; then as before", async () => {
    const starts = (name: string) =>
      on1(
        `systemctl restart lvm-nbd-export-${name} 2>&1; journalctl --sync; journalctl -q -o cat --no-pager -n 20 -u lvm-nbd-export-${name}`,
      );
    const told = (name: (typeof names)[number]) =>
      stack.warningsDuring(async () => {
        expect(await stack.drifted("NbdExport", name)).toEqual(["state"]);
      });
    await on1(`cd '${folder}' && mv vm1.raw kept.raw && ln -s /root/files/letter vm1.raw && mv vm1.qcow2 kept.qcow2
      qemu-img create -q -f qcow2 -o data_file=ext vm1.qcow2 ${originBytes} && chmod 1777 .`);
    // The folder alone is enough; then each by itself.
    expect(await starts("copy")).toMatch(/others than root can change \/srv\/back ups \(root, drwxrwxrwt\)/);
    expect(await told("copy")).toMatch(/others than root can change \/srv\/back ups/);
    await on1(`chmod 755 '${folder}'`);
    expect(await starts("raw")).toMatch(/vm1\.raw is no regular file/);
    expect(await told("raw")).toMatch(/is failed(.|\n)*vm1\.raw is a symbolic link/);
    expect(await starts("qcow2")).toMatch(/vm1\.qcow2 is no qcow2 image, or one that needs another file/);
    expect(await told("qcow2")).toMatch(/names a data file/);
    await on1(`cd '${folder}' && mv kept.raw vm1.raw && mv kept.qcow2 vm1.qcow2`);
    // The one came back by itself; the other is not the file that was examined.
    await stack.refresh("NbdExport", "raw");
    expect((await exportRaw()).state.state).toBe("serving");
    await changed("the exports to be back", "active active active");
    for (const name of ["raw", "qcow2"] as const) expect(await stack.drifted("NbdExport", name)).toEqual([]);
  });

  it("are refused, by looking alone, where more or less than their content would be served", async () => {
    await on1(`cd '${folder}' && ln -s vm1.raw link && truncate -s 1M theirs && chown nobody theirs && chmod 600 theirs && mkdir -m 1777 open && cp vm1.raw open && truncate -s 1000 odd
      qemu-img create -q -f qcow2 -F raw -b /etc/shadow backed && qemu-img create -q -f qcow2 -o data_file=ext data 1M`);
    const bad: [file: string, args: Values, said: RegExp][] = [
      ["none", {}, /FILE_NOT_FOUND: .*does not exist/],
      ["link", {}, /FILE_UNSUITABLE: .*symbolic link: give \/srv\/back ups\/vm1\.raw/],
      ["theirs", {}, /FILE_UNSUITABLE: .*others than root can change \S+ ups\/theirs \(nobody, -rw-------\)/],
      [
        "open/vm1.raw",
        {},
        /FILE_UNSUITABLE: .*others than root can change \S+ ups\/open \(root, drwxrwxrwt\)/,
      ],
      ["odd", {}, /FILE_UNSUITABLE: .*1000 bytes/],
      ["backed", qcow2, /FILE_UNSUITABLE: .*names a backing file/],
      ["data", qcow2, /FILE_UNSUITABLE: .*names a data file/],
      ["vm1.raw", qcow2, /FILE_UNSUITABLE: .*is no qcow2 image/],
    ];
    const changes = await stack.changesDuring(() =>
      Promise.all(
        bad.map(([file, args, said]) =>
          expect(stack.up("NbdExport", file, exported("bad", 10814, { file, ...args }))).rejects.toThrow(
            said,
          ),
        ),
      ),
    );
    expect(changes).toEqual([]);
  });

  it("are as they were when nothing is left of that", async () => {
    await Promise.all(names.map((name) => stack.destroy("NbdExport", name)));
    await stack.destroy("VolumeCopy", "copy");
    expect(await on1(`cd '${folder}' && ls copy.raw 2>&1; qemu-img compare vm1.raw vm1.qcow2`)).toMatch(
      /No such file(.|\n)*Images are identical/,
    );
    expect(await Promise.all([leftovers(lab.server1), leftovers(lab.server2)])).toEqual(["", ""]);
    await on1(`umount '${folder}' && lvremove -qq -f VgVm/LV-BACKUPS`);
  });
});
