import { afterAll, beforeAll, expect, it } from "vitest";
import type { Lab } from "./lab.mts";
import { checksum, checksumSoon, freshLab, LabStack, leftovers, makeOrigin, spoil } from "./support.mts";
import { waitFor } from "./wait.mts";

let lab: Lab;
let stack: LabStack;
let moment: string;

const snapshot = { host: "server1", volumeGroup: "VgVm", origin: "LV-VM1", name: "vm1-snap", size: "8M" };
const exported = () => ({
  host: "server1",
  exportName: "vm1",
  device: "/dev/VgVm/vm1-snap",
  listenAddress: lab.server1.privateAddress,
  clients: [lab.server2.privateAddress],
  server: "nbd-server",
});
const attachment = () => ({
  host: "server2",
  name: "vm1",
  uri: `nbd://${lab.server1.privateAddress}:10809/vm1`,
});

const files = { host: "server2", device: "/dev/lvm-nbd/vm1", path: "/mnt/vm1" };

beforeAll(async () => {
  lab = await freshLab();
  stack = new LabStack("reboot");
  await makeOrigin(lab.server1);
  await lab.server1.run(
    "mkfs.ext4 -q -F /dev/VgVm/LV-VM1 && mount /dev/VgVm/LV-VM1 /mnt && echo kept >/mnt/file && umount /mnt",
  );
  moment = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
  await stack.up("LvSnapshot", "vm1", snapshot);
  await stack.up("NbdExport", "vm1", exported());
  await stack.up("NbdAttachment", "vm1", attachment());
  await stack.up("Mount", "vm1", files);
  await spoil(lab.server1, "/dev/VgVm/LV-VM1");
});

afterAll(() => stack?.close());

/** No drift, nothing to do, and the moment is what server2 reads. */
async function asBefore(): Promise<void> {
  expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
  // The mount follows its attachment.
  const read = async () => (await lab.server2.run("cat /mnt/vm1/file; true")).stdout.trim() || undefined;
  expect(await waitFor(read, { timeoutSeconds: 60, what: "the file system to be mounted again" })).toBe(
    "kept",
  );
  const warnings = await stack.warningsDuring(async () => {
    expect(await stack.drifted("LvSnapshot", "vm1")).toEqual([]);
    expect(await stack.drifted("NbdExport", "vm1")).toEqual([]);
    expect(await stack.drifted("NbdAttachment", "vm1")).toEqual([]);
    expect(await stack.drifted("Mount", "vm1")).toEqual([]);
  });
  expect(warnings).toBe("");
  const changes = await stack.changesDuring(async () => {
    expect((await stack.up("LvSnapshot", "vm1", snapshot)).did).toBe("unchanged");
    expect((await stack.up("NbdExport", "vm1", exported())).did).toBe("unchanged");
    expect((await stack.up("NbdAttachment", "vm1", attachment())).did).toBe("unchanged");
    expect((await stack.up("Mount", "vm1", files)).did).toBe("unchanged");
  });
  expect(changes).toEqual([]);
}

it("brings the export back when its host reboots, and the attachment connects again", async () => {
  await lab.server1.reboot();
  await asBefore();
});

it("brings the attachment back when its host reboots", async () => {
  await lab.server2.reboot();
  await asBefore();
});

it("brings everything back when both hosts lose power", async () => {
  await lab.server1.run("sync");
  await lab.server2.run("sync");
  await Promise.all([lab.server1.kill(), lab.server2.kill()]);
  await Promise.all([lab.server1.start(), lab.server2.start()]);
  await asBefore();
});

it("an attachment is not removed while it is mounted: where is said", async () => {
  await expect(stack.destroy("NbdAttachment", "vm1")).rejects.toThrow(
    /DEVICE_IN_USE.*is in use: mounted at \/mnt\/vm1\n/s,
  );
  await asBefore();
});

it("removes all of it afterwards", async () => {
  await stack.destroy("Mount", "vm1");
  await stack.destroy("NbdAttachment", "vm1");
  await stack.destroy("NbdExport", "vm1");
  await stack.destroy("LvSnapshot", "vm1");
  expect(await leftovers(lab.server1)).toBe("");
  expect(await leftovers(lab.server2)).toBe("");
  expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).not.toBe(moment);
});
