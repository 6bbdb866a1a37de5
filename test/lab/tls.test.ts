import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { makeCertificates } from "../../provider/core/certificateAuthority.js";
import { type NbdServer, nbdServers } from "../../provider/linux/nbd.js";
import { type ServerTls, serverFiles } from "../../provider/linux/tls.js";
import type { Guest, Lab } from "./lab.mts";
import {
  checksum,
  checksumSoon,
  freshLab,
  LabStack,
  leftovers,
  makeOrigin,
  type Values,
} from "./support.mts";

vi.setConfig({ testTimeout: 600_000 });

let lab: Lab;
let stack: LabStack;
let origin: string;

const exported = (more: Values = {}) => ({
  host: "server1",
  exportName: "vm1",
  device: "/dev/VgVm/LV-VM1",
  listenAddress: lab.server1.privateAddress,
  clients: [lab.server2.privateAddress],
  tls: true,
  ...more,
});

beforeAll(async () => {
  lab = await freshLab();
  stack = new LabStack("tls");
  origin = await makeOrigin(lab.server1);
});

afterAll(() => stack?.close());

/** Writes certificates as they are on a client into a folder of the server. */
async function bring(guest: Guest, folder: string, files: Readonly<Record<string, string>>): Promise<void> {
  for (const [name, text] of Object.entries(files))
    await guest.run(
      `mkdir -p ${folder} && echo ${Buffer.from(text).toString("base64")} | base64 -d >${folder}/${name}`,
    );
}

/** What a client on server2 gets to see of the export's size by that query. */
async function asks(query: string, scheme = "nbds"): Promise<string> {
  const uri = `${scheme}://${lab.server1.privateAddress}:10809/vm1${query}`;
  const { stdout, stderr } = await lab.server2.run(`timeout 30 nbdinfo --size '${uri}'`, {
    allowFailure: true,
  });
  return (stdout + stderr).trim();
}

function clientOf({ caCertificate, clientCertificate, clientPrivateKey }: ServerTls): Values {
  return { caCertificate, certificate: clientCertificate, privateKey: clientPrivateKey };
}

const made = (names: readonly string[], now = new Date()) => makeCertificates("vm1", names, now);
const daysAgo = (days: number) => new Date(Date.now() - days * 86_400_000);

describe.each(nbdServers)("an export by %s with TLS", (server: NbdServer) => {
  afterEach(async () => {
    expect(await leftovers(lab.server1)).toBe("");
    expect(await leftovers(lab.server2)).toBe("");
  });

  it("serves its own client, and refuses everybody else", async () => {
    const { state } = await stack.up("NbdExport", "vm1", exported({ server }));
    expect(state.state).toBe("serving");
    expect(state.uri).toBe(`nbds://${lab.server1.privateAddress}:10809/vm1`);
    const { stdout } = await lab.server1.run("stat -c '%U %a %n' /etc/lvm-nbd/*~*/* | sed 's,/etc.*/,,'");
    expect(stdout.trim().split("\n")).toEqual(
      ["ca-cert.pem", "client-cert.pem", "client-key.pem", "proven", "server-cert.pem", "server-key.pem"].map(
        (name) => `root 600 ${name}`,
      ),
    );

    const attached = await stack.up("NbdAttachment", "vm1", {
      host: "server2",
      name: "vm1",
      uri: state.uri,
      tls: state.clientTls,
    });
    expect(attached.state.state).toBe("attached");
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(origin);

    // Whoever they are, they come from an address that may connect.
    expect(await asks("", "nbd")).toContain("requires TLS");
    const mine = serverFiles(await made([lab.server1.privateAddress]));
    await bring(lab.server2, "/run/other", mine);
    await bring(lab.server2, "/run/none", {
      "ca-cert.pem": (state.clientTls as ServerTls).caCertificate,
    });
    expect(await asks("?tls-certificates=/run/other")).toContain("certificate verification");
    expect(await asks("?tls-certificates=/run/none")).not.toMatch(/^\d+$/);
    // The right authority, and a client's certificate of another: it is the server that refuses.
    await lab.server2.run("cp /run/none/ca-cert.pem /run/other/ca-cert.pem");
    expect(await asks("?tls-certificates=/run/other")).toMatch(/^(?!\d+$)(?!.*certificate verification)/);
    const { stderr } = await lab.server2.run(
      `timeout 30 nbd-client -N vm1 ${lab.server1.privateAddress} 10809 /dev/nbd5 -timeout 10 -certfile /run/other/client-cert.pem -keyfile /run/other/client-key.pem -cacertfile /run/other/ca-cert.pem -tlshostname ${lab.server1.privateAddress}`,
      { allowFailure: true },
    );
    expect(stderr).not.toBe("");
    expect((await lab.server2.run("cat /sys/block/nbd5/size")).stdout.trim()).toBe("0");

    expect((await stack.up("NbdExport", "vm1", exported({ server }))).did).toBe("unchanged");
    expect(await stack.drifted("NbdExport", "vm1")).toEqual([]);
    expect(await stack.drifted("NbdAttachment", "vm1")).toEqual([]);
    await stack.destroy("NbdAttachment", "vm1");
    await stack.destroy("NbdExport", "vm1");
    await lab.server2.run("rm -rf /run/other /run/none");
  });
});

describe("certificates", () => {
  it("are made anew for other triggers, and the attachment goes over to them", async () => {
    const first = (await stack.up("NbdExport", "vm1", exported())).state;
    const attachment = (state: Values) => ({
      host: "server2",
      name: "vm1",
      uri: state.uri,
      tls: state.clientTls,
    });
    await stack.up("NbdAttachment", "vm1", attachment(first));
    const second = await stack.up("NbdExport", "vm1", exported({ triggers: [1] }));
    expect(second.changes.map(({ property }) => property)).toEqual(["triggers"]);
    expect(second.state.clientTls).not.toEqual(first.clientTls);
    const { changes } = await stack.up("NbdAttachment", "vm1", attachment(second.state));
    expect(changes.map(({ property }) => property)).toContain("tls");
    expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1")).toBe(origin);
    expect((await lab.server1.run("ls -d /etc/lvm-nbd/*~*")).stdout.trim().split("\n")).toHaveLength(1);
    expect((await lab.server2.run("ls -d /etc/lvm-nbd/*~*")).stdout.trim().split("\n")).toHaveLength(1);

    // Spoiled by hand, on either side.
    await lab.server1.run("chmod 644 /etc/lvm-nbd/*~*/server-key.pem");
    await lab.server2.run("echo >>$(ls /etc/lvm-nbd/*~*/client-key.pem)");
    expect((await stack.refresh("NbdExport", "vm1"))?.state).toBe("edited");
    expect((await stack.refresh("NbdAttachment", "vm1"))?.state).toBe("edited");
    const third = (await stack.up("NbdExport", "vm1", exported({ triggers: [1] }))).state;
    expect(third.state).toBe("serving");
    const again = await stack.up("NbdAttachment", "vm1", attachment(third));
    expect(again.state.state).toBe("attached");

    // Without it from now on: the same export, and the same attachment.
    const open = await stack.up("NbdExport", "vm1", exported({ tls: undefined, triggers: [1] }));
    expect(open.did).toBe("updated");
    const plain = await stack.up("NbdAttachment", "vm1", {
      host: "server2",
      name: "vm1",
      uri: open.state.uri,
    });
    expect(plain.did).toBe("updated");
    expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1")).toBe(origin);
    expect((await lab.server1.run("ls /etc/lvm-nbd", { allowFailure: true })).stdout).toBe("");
    expect((await lab.server2.run("ls /etc/lvm-nbd", { allowFailure: true })).stdout).toBe("");
    await stack.destroy("NbdAttachment", "vm1");
    await stack.destroy("NbdExport", "vm1");
  });

  it("of one's own serve, expire, and are refused where they do not fit", async () => {
    const address = lab.server1.privateAddress;
    const good = await made([address]);
    const { state } = await stack.up("NbdExport", "vm1", exported({ tls: good }));
    expect(state.clientTls).toEqual(clientOf(good));
    const refused = async (tls: unknown, reason: string) =>
      expect(stack.up("NbdExport", "vm1", exported({ tls }))).rejects.toThrow(reason);
    await refused(await made(["10.77.0.99"]), `is not for ${address}`);
    await refused(
      { ...good, privateKey: (await made([address])).privateKey },
      "is not the key of `certificate`",
    );
    await refused(
      { ...good, ...(await made([address])), caCertificate: good.caCertificate },
      "is not signed by",
    );

    // A man in the middle, who has a certificate for that address by another authority, and lets everybody in.
    const attachment = { host: "server2", name: "vm1", uri: state.uri };
    await expect(
      stack.up("NbdAttachment", "vm1", { ...attachment, tls: clientOf(await made([address])) }),
    ).rejects.toThrow("EXPORT_UNREACHABLE");
    await expect(stack.up("NbdAttachment", "vm1", attachment)).rejects.toThrow(
      "nbds:// export lets nobody in",
    );
    expect(await leftovers(lab.server2)).toBe("");

    const soon = await made([address], daysAgo(380));
    await stack.up("NbdExport", "vm1", exported({ tls: soon }));
    expect(await stack.warningsDuring(() => stack.refresh("NbdExport", "vm1"))).toMatch(
      /its certificates expire on .*, in \d+ days: give new ones/,
    );
    const late = await made([address], daysAgo(500));
    await expect(stack.up("NbdExport", "vm1", exported({ tls: late }))).rejects.toThrow(/expired/);
    await stack.destroy("NbdExport", "vm1");
    expect(await leftovers(lab.server1)).toBe("");
  });

  it("keep a man in the middle of the NBD port out", async () => {
    const address = lab.server1.privateAddress;
    const { state } = await stack.up("NbdExport", "vm1", exported());
    const uri = String(state.uri).replace(":10809", ":10888");
    const middle = serverFiles(await made([address]));
    await bring(lab.server1, "/run/middle", middle);
    await lab.server1.run(
      `systemd-run -q -u middle nbdkit -f -i ${address} -p 10888 --tls=require --tls-certificates=/run/middle memory 16M && sleep 1`,
    );
    // He serves, to whoever takes him for the right one.
    await bring(lab.server2, "/run/middle", middle);
    const blind = await lab.server2.run(
      `nbdinfo --size 'nbds://${address}:10888/vm1?tls-certificates=/run/middle'`,
    );
    expect(blind.stdout.trim()).toBe(String(16 * 1024 ** 2));
    await expect(
      stack.up("NbdAttachment", "vm1", { host: "server2", name: "vm1", uri, tls: state.clientTls }),
    ).rejects.toThrow(/EXPORT_UNREACHABLE[\s\S]*certificate verification/);
    // nbd-client looks for itself.
    const folder = "/run/client";
    await bring(lab.server2, folder, {
      "ca-cert.pem": (state.clientTls as ServerTls).caCertificate,
      "client-cert.pem": (state.clientTls as ServerTls).certificate,
      "client-key.pem": (state.clientTls as ServerTls).privateKey,
    });
    const client = `-certfile ${folder}/client-cert.pem -keyfile ${folder}/client-key.pem -cacertfile ${folder}/ca-cert.pem`;
    for (const [port, name] of [
      [10888, address],
      [10809, "10.77.0.99"],
    ] as const) {
      await lab.server2.run(
        `modprobe nbd; timeout 30 nbd-client -N vm1 ${address} ${port} /dev/nbd5 -timeout 10 ${client} -tlshostname ${name}`,
        { allowFailure: true },
      );
      expect((await lab.server2.run("cat /sys/block/nbd5/size")).stdout.trim()).toBe("0");
    }
    await stack.destroy("NbdExport", "vm1");
    await lab.server1.run("systemctl stop middle; rm -rf /run/middle");
    await lab.server2.run("rm -rf /run/client /run/middle");
  });
});

describe("what is copied over TLS", () => {
  const sha = async (guest: Guest, command: string) =>
    (await guest.run(`${command} | sha256sum`)).stdout.slice(0, 64);

  it("is what the export serves, in files, volumes and backups, and comes back by a restore", async () => {
    const { state } = await stack.up("NbdExport", "vm1", exported());
    const source = { host: "server2", uri: state.uri, tls: state.clientTls };
    const copies: [name: string, how: Values, read: string][] = [
      ["raw", { file: "/root/vm1.raw" }, "cat /root/vm1.raw"],
      ["limited", { file: "/root/limited.raw", bandwidthLimit: "100M" }, "cat /root/limited.raw"],
      [
        "qcow2",
        { file: "/root/vm1.qcow2", format: "qcow2" },
        "nbdcopy -- [ qemu-nbd -r -f qcow2 /root/vm1.qcow2 ] -",
      ],
      ["volume", { volume: { volumeGroup: "VgVm", name: "vm1" } }, "cat /dev/VgVm/vm1"],
    ];
    for (const [name, how, read] of copies) {
      const made = await stack.up("VolumeCopy", name, { ...source, ...how });
      expect([name, made.state.state, made.state.sha256]).toEqual([name, "complete", origin]);
      expect(await sha(lab.server2, read)).toBe(origin);
    }
    // Other certificates, or none, are no reason to copy again.
    const renewed = await stack.up("NbdExport", "vm1", exported({ triggers: [2] }));
    const again = { host: "server2", uri: renewed.state.uri, tls: renewed.state.clientTls };
    const silent = await stack.changesDuring(() =>
      stack.up("VolumeCopy", "raw", { ...again, file: "/root/vm1.raw" }),
    );
    expect(silent).toEqual([]);
    expect(
      (await lab.server2.run("find /run /etc/lvm-nbd /root -name '*key.pem*' 2>/dev/null || true")).stdout,
    ).toBe("");
    await stack.destroy("NbdExport", "vm1");
    for (const [name] of copies) await stack.destroy("VolumeCopy", name);

    const backup = await stack.up("BackupImage", "vm1", {
      host: "server2",
      source: { host: "server1", listenAddress: lab.server1.privateAddress, tls: true },
      volumes: [{ volumeGroup: "VgVm", origin: "LV-VM1", size: "8M", file: "/root/backup.raw" }],
    });
    expect(backup.state.state).toBe("complete");
    expect(await sha(lab.server2, "cat /root/backup.raw")).toBe(origin);
    expect(stack.warnings.filter((line) => line.includes("unencrypted"))).toHaveLength(1);
    expect(await leftovers(lab.server1)).toBe("");

    const served = await stack.up("NbdExport", "image", {
      ...{ host: "server2", exportName: "image", file: "/root/backup.raw", tls: true },
      ...{ listenAddress: lab.server2.privateAddress, clients: [lab.server1.privateAddress] },
    });
    await lab.server1.run("dd if=/dev/urandom of=/dev/VgVm/LV-VM1 bs=1M count=1 oflag=direct status=none");
    const { stdout } = await lab.server1.run("lvs --noheadings -o lv_uuid VgVm/LV-VM1");
    const restored = await stack.up("LvRestore", "vm1", {
      ...{ host: "server1", volumeGroup: "VgVm", origin: "LV-VM1", overwrite: stdout.trim() },
      image: { uri: served.state.uri, sha256: origin, tls: served.state.clientTls },
    });
    expect(restored.state.state).toBe("restored");
    expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).toBe(origin);
    await stack.destroy("LvRestore", "vm1");
    await stack.destroy("NbdExport", "image");
    await stack.destroy("BackupImage", "vm1");
    for (const server of [lab.server1, lab.server2]) expect(await leftovers(server)).toBe("");
  });
});
