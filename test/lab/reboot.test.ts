import { afterAll, beforeAll, expect, it } from "vitest";
import type { Lab } from "./lab.mts";
import { checksum, checksumSoon, freshLab, LabStack, leftovers, makeOrigin, spoil } from "./support.mts";

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

beforeAll(async () => {
  lab = await freshLab();
  stack = new LabStack("reboot");
  moment = await makeOrigin(lab.server1);
  await stack.up("LvSnapshot", "vm1", snapshot);
  await stack.up("NbdExport", "vm1", exported());
  await stack.up("NbdAttachment", "vm1", attachment());
  await spoil(lab.server1, "/dev/VgVm/LV-VM1");
});

afterAll(() => stack?.close());

/** No drift, nothing to do, and the moment is what server2 reads. */
async function asBefore(): Promise<void> {
  expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
  const warnings = await stack.warningsDuring(async () => {
    expect(await stack.drifted("LvSnapshot", "vm1")).toEqual([]);
    expect(await stack.drifted("NbdExport", "vm1")).toEqual([]);
    expect(await stack.drifted("NbdAttachment", "vm1")).toEqual([]);
  });
  expect(warnings).toBe("");
  const changes = await stack.changesDuring(async () => {
    expect((await stack.up("LvSnapshot", "vm1", snapshot)).did).toBe("unchanged");
    expect((await stack.up("NbdExport", "vm1", exported())).did).toBe("unchanged");
    expect((await stack.up("NbdAttachment", "vm1", attachment())).did).toBe("unchanged");
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

it("removes all of it afterwards", async () => {
  await stack.destroy("NbdAttachment", "vm1");
  await stack.destroy("NbdExport", "vm1");
  await stack.destroy("LvSnapshot", "vm1");
  expect(await leftovers(lab.server1)).toBe("");
  expect(await leftovers(lab.server2)).toBe("");
  expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).not.toBe(moment);
});
