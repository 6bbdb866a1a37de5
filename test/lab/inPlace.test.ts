import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Lab } from "./lab.mts";
import {
  allowedInto,
  checksum,
  checksumSoon,
  freshLab,
  LabStack,
  makeOrigin,
  originBytes,
  spoil,
  type Values,
} from "./support.mts";

const attached = "/dev/lvm-nbd/vm1";
let lab: Lab;
let stack: LabStack;
let moment: string;

const snapshot = {
  host: "server1",
  volumeGroup: "VgVm",
  origin: "LV-VM1",
  name: "vm1-snap",
  size: "32M",
  readOnly: false,
};
const spare = { ...snapshot, name: "spare-snap", size: "8M", readOnly: true };
const exported = (more: Values = {}) => ({
  host: "server1",
  exportName: "vm1",
  device: "/dev/VgVm/vm1-snap",
  listenAddress: lab.server1.privateAddress,
  clients: [lab.server2.privateAddress],
  ...more,
});
const attachment = (more: Values = {}) => ({
  host: "server2",
  name: "vm1",
  uri: `nbd://${lab.server1.privateAddress}:10809/vm1`,
  ...more,
});

beforeAll(async () => {
  lab = await freshLab();
  stack = new LabStack("inPlace");
  moment = await makeOrigin(lab.server1);
  await stack.up("LvSnapshot", "vm1", snapshot);
  await stack.up("LvSnapshot", "spare", spare);
  await stack.up("NbdExport", "vm1", exported());
  await stack.up("NbdAttachment", "vm1", attachment());
  await spoil(lab.server1, "/dev/VgVm/LV-VM1");
});

afterAll(() => stack?.close());

/** Changes one property, which must go in place, be all that is seen to change, and leave no drift. */
async function change(
  type: "LvSnapshot" | "NbdExport" | "NbdAttachment",
  name: string,
  property: string,
  args: Values,
) {
  const outcome = await stack.up(type, name, args);
  expect(outcome.did).toBe("updated");
  expect(outcome.changes).toEqual([{ property, effect: "update" }]);
  expect(await stack.drifted(type, name)).toEqual([]);
  return outcome.state;
}

/** The export was restarted: the attachment is back by itself and shows the moment. */
async function attachmentIsBack(): Promise<void> {
  expect(await checksumSoon(lab.server2, attached)).toBe(moment);
  expect(await stack.drifted("NbdAttachment", "vm1")).toEqual([]);
}

const lvs = async (field: string, name: string) =>
  (await lab.server1.run(`lvs --noheadings --nosuffix --units b -o ${field} VgVm/${name}`)).stdout.trim();

describe("a snapshot", () => {
  it("grows", async () => {
    const { uuid } = stack.state("LvSnapshot", "spare");
    const state = await change("LvSnapshot", "spare", "size", { ...spare, size: "16M" });
    expect(state).toMatchObject({ sizeBytes: 16 * 1024 ** 2, uuid });
    expect(await lvs("lv_size", "spare-snap")).toBe(String(16 * 1024 ** 2));
  });

  it("is renamed", async () => {
    const { uuid } = stack.state("LvSnapshot", "spare");
    const state = await change("LvSnapshot", "spare", "name", {
      ...spare,
      size: "16M",
      name: "renamed-snap",
    });
    expect(state).toMatchObject({ uuid, path: "/dev/VgVm/renamed-snap" });
    expect(await lvs("lv_uuid", "renamed-snap")).toBe(uuid);
  });

  it("gets and loses tags", async () => {
    const now = { ...spare, size: "16M", name: "renamed-snap" };
    await change("LvSnapshot", "spare", "tags", { ...now, tags: ["nightly", "vm=1"] });
    expect(await lvs("lv_tags", "renamed-snap")).toMatch(/nightly.*vm=1/);
    await change("LvSnapshot", "spare", "tags", now);
    expect(await lvs("lv_tags", "renamed-snap")).not.toMatch(/nightly|vm=1/);
  });

  it("becomes writable and read-only again", async () => {
    const now = { ...spare, size: "16M", name: "renamed-snap" };
    const readOnly = async () =>
      (await lab.server1.run("blockdev --getro /dev/VgVm/renamed-snap")).stdout.trim();
    expect(await readOnly()).toBe("1");
    await change("LvSnapshot", "spare", "readOnly", { ...now, readOnly: false });
    expect(await readOnly()).toBe("0");
    await change("LvSnapshot", "spare", "readOnly", now);
    expect(await readOnly()).toBe("1");
  });
});

describe("an export", () => {
  const sizeFrom = (guest: "server1" | "server2", address: string, port = 10809) =>
    lab[guest].run(`timeout 30 nbdinfo --size nbd://${address}:${port}/vm1`, { allowFailure: true });

  it("lets other clients in", async () => {
    await change(
      "NbdExport",
      "vm1",
      "clients",
      exported({ clients: [lab.server2.privateAddress, "10.9.0.0/16"] }),
    );
    expect(await allowedInto(lab.server1, "lvm-nbd-export-vm1.service")).toContain("10.9.0.0/16");
    await attachmentIsBack();
    await change("NbdExport", "vm1", "clients", exported());
    await attachmentIsBack();
  });

  it("listens on another address", async () => {
    await lab.server1.run("ip address add 10.77.0.11/24 dev private0");
    const state = await change(
      "NbdExport",
      "vm1",
      "listenAddress",
      exported({ listenAddress: "10.77.0.11" }),
    );
    expect(state.uri).toBe("nbd://10.77.0.11:10809/vm1");
    expect((await sizeFrom("server2", "10.77.0.11")).stdout.trim()).toBe(String(originBytes));
    expect((await sizeFrom("server2", lab.server1.privateAddress)).exitCode).not.toBe(0);
    await change("NbdExport", "vm1", "listenAddress", exported());
    await attachmentIsBack();
  });

  it("listens on another port", async () => {
    const state = await change("NbdExport", "vm1", "port", exported({ port: 12_000 }));
    expect(state.uri).toBe(`nbd://${lab.server1.privateAddress}:12000/vm1`);
    expect((await sizeFrom("server2", lab.server1.privateAddress, 12_000)).stdout.trim()).toBe(
      String(originBytes),
    );
    await change("NbdExport", "vm1", "port", exported());
    await attachmentIsBack();
  });

  it.each([
    ["nbdkit", "nbd-server"],
    ["nbd-server", "qemu-nbd"],
    ["qemu-nbd", "nbdkit"],
    ["nbdkit", "qemu-nbd"],
    ["qemu-nbd", "nbd-server"],
    ["nbd-server", "nbdkit"],
  ])("goes from %s to %s", async (from, to) => {
    expect(stack.state("NbdExport", "vm1").server).toBe(from);
    await change("NbdExport", "vm1", "server", exported({ server: to }));
    const { stdout } = await lab.server1.run(
      "ps -eo comm= | grep -xE 'nbdkit|nbd-server|qemu-nbd' | sort -u",
    );
    expect(stdout.trim()).toBe(to);
    const config = await lab.server1.run("ls /etc/lvm-nbd/*.conf", { allowFailure: true });
    expect(config.exitCode === 0).toBe(to === "nbd-server");
    await attachmentIsBack();
  });

  it("lets clients write, and no longer", async () => {
    const readOnly = () =>
      lab.server2.run(`nbdinfo --is read-only nbd://${lab.server1.privateAddress}:10809/vm1`, {
        allowFailure: true,
      });
    expect((await readOnly()).exitCode).toBe(0);
    await change("NbdExport", "vm1", "readOnly", exported({ readOnly: false }));
    expect((await readOnly()).exitCode).toBe(2);
    await attachmentIsBack();
    await change("NbdExport", "vm1", "readOnly", exported());
    expect((await readOnly()).exitCode).toBe(0);
    await attachmentIsBack();
  });
});

describe("an attachment", () => {
  it("takes two connections", async () => {
    await change("NbdAttachment", "vm1", "connections", attachment({ connections: 2 }));
    const { stdout } = await lab.server1.run(
      "ss -Htn state established '( sport = :10809 )' | grep -c 10.77.0.2",
    );
    expect(stdout.trim()).toBe("2");
    expect(await checksum(lab.server2, attached)).toBe(moment);
    await change("NbdAttachment", "vm1", "connections", attachment());
  });

  it("takes another timeout", async () => {
    await change("NbdAttachment", "vm1", "timeoutSeconds", attachment({ timeoutSeconds: 45 }));
    const { stdout } = await lab.server2.run(
      `cat /sys/block/$(basename $(readlink -f ${attached}))/queue/io_timeout`,
    );
    expect(stdout.trim()).toBe("45000");
    expect(await checksum(lab.server2, attached)).toBe(moment);
    await change("NbdAttachment", "vm1", "timeoutSeconds", attachment());
  });

  it("takes blocks of 4096 bytes", async () => {
    await change("NbdAttachment", "vm1", "blockSize", attachment({ blockSize: 4096 }));
    expect((await lab.server2.run(`blockdev --getss ${attached}`)).stdout.trim()).toBe("4096");
    expect(await checksum(lab.server2, attached)).toBe(moment);
    await change("NbdAttachment", "vm1", "blockSize", attachment());
  });

  it("moves to another device", async () => {
    const before = stack.state("NbdAttachment", "vm1").device;
    const state = await change("NbdAttachment", "vm1", "device", attachment({ device: "/dev/nbd5" }));
    expect(state.device).toBe("/dev/nbd5");
    expect((await lab.server2.run(`readlink -f ${attached}`)).stdout.trim()).toBe("/dev/nbd5");
    expect((await lab.server2.run(`cat /sys/block/${String(before).slice(5)}/size`)).stdout.trim()).toBe("0");
    expect(await checksum(lab.server2, attached)).toBe(moment);
  });

  it("becomes writable and read-only again", async () => {
    const now = { device: "/dev/nbd5" };
    await stack.up("NbdExport", "vm1", exported({ readOnly: false }));
    await attachmentIsBack();
    await change("NbdAttachment", "vm1", "readOnly", attachment({ ...now, readOnly: false }));
    await spoil(lab.server2, attached);
    const written = await checksum(lab.server1, "/dev/VgVm/vm1-snap");
    expect(written).not.toBe(moment);
    expect(await checksum(lab.server2, attached)).toBe(written);
    await change("NbdAttachment", "vm1", "readOnly", attachment(now));
    await expect(spoil(lab.server2, attached)).rejects.toThrow(/not permitted|Read-only/);
    expect(await checksum(lab.server2, attached)).toBe(written);
  });
});
