import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Lab } from "./lab.mts";
import { checksum, freshLab, LabStack, leftovers, makeOrigin, originBytes, spoil } from "./support.mts";

let lab: Lab;
let stack: LabStack;

beforeAll(async () => {
  lab = await freshLab();
});

afterAll(() => stack?.close());

describe.each([
  ["nbdkit", "server1", "server2"],
  ["nbd-server", "server1", "server2"],
  ["qemu-nbd", "server1", "server2"],
  ["nbdkit", "server1-operator", "server2-operator"],
])("the chain over %s on %s and %s", (server, source, client) => {
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
    stack = new LabStack(`${server}-${source}`);
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

  it("adopts what a create left whose answer was lost, and changes nothing", async () => {
    const again = new LabStack(`${server}-${source}`);
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
