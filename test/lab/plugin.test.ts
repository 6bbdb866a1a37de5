/** What Pulumi's engine can do with the plugin, on real servers; and stacks that move from one door to the other. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { z } from "zod";
import {
  attachment,
  type Declared,
  FaultStack,
  nbdExport,
  output,
  snapshot,
  vmBackup,
  volumeCopy,
} from "./faults/fault-stack.mts";
import type { Lab } from "./lab.mts";
import { checksum, freshLab, leftovers, makeOrigin, type Values } from "./support.mts";
import { waitFor } from "./wait.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

const exportUnit = "lvm-nbd-export-vm1-export.service";
const attachUnit = "lvm-nbd-attach-vm1-attachment.service";
let lab: Lab;
let stack: FaultStack;
let moment: string;

const vm1 = (args: Values = {}) => snapshot("vm1", { origin: "LV-VM1", size: "8M", ...args });
const spare = (options: Values = {}): Declared => ({
  ...snapshot("spare", { origin: "LV-VM1", size: "4M" }),
  options,
});
const vm1Export = nbdExport("vm1-export", { device: output("vm1", "path") });
const vm1Attachment = attachment("vm1-attachment", { uri: output("vm1-export", "uri") });
const chain = (args: Values = {}): Declared[] => [vm1(args), vm1Export, vm1Attachment];

const on1 = async (command: string) => (await lab.server1.run(command)).stdout.trim();
const on2 = async (command: string) => (await lab.server2.run(command)).stdout.trim();
const uuidOf = (name: string) => on1(`lvs --noheadings -o lv_uuid VgVm/${name}`);
const volumes = () => on1("lvs --noheadings -o lv_name VgVm | xargs");
/** The moment that server2 reads. */
const attached = () => checksum(lab.server2, "/dev/lvm-nbd/vm1-attachment");

/** Changes to LVM's metadata, starts of units, writes of files, and the link of the device: the same where nothing was touched. */
async function fingerprint(): Promise<string> {
  const unit = (name: string) =>
    `systemctl show -p InvocationID ${name}; stat -c '%n %Y %i' /etc/systemd/system/${name}`;
  const one = on1(`vgs --noheadings -o vg_seqno VgVm; lvs --noheadings -o lv_uuid VgVm; ${unit(exportUnit)}`);
  const link = "ss -Htn state established dport = :10809; cat /sys/block/nbd*/pid";
  const files = "find /backup -printf '%p %i %C@\\n' | sort";
  return (await Promise.all([one, on2(`${unit(attachUnit)}; ${link}; ${files}`)])).join("\n");
}

beforeAll(async () => {
  lab = await freshLab();
  [stack, moment] = await Promise.all([
    FaultStack.create(lab),
    makeOrigin(lab.server1),
    lab.server2.run("mkdir -p /backup"),
  ]);
  stack.door = "plugin";
});

afterAll(() => stack?.close());

describe("a preview", () => {
  it("tells what will be made and what its host would refuse, and what to do about that; nothing is touched", async () => {
    const seen = await fingerprintOfVolumes();
    stack.declare(...chain(), snapshot("wrong", { origin: "LV-VM9", size: "4M" }));
    const run = await stack.preview();
    run.succeeded("5 to create");
    run.said(
      "as its host is now, this would be refused: ORIGIN_NOT_FOUND: LvSnapshot wrong on host server1",
      'no logical volume "LV-VM9" in VgVm; there are: "LV-VM1" (what to do: ',
      `nbd://${lab.server1.privateAddress}:10809/vm1-export`,
    );
    expect(await fingerprintOfVolumes()).toBe(seen);
    expect(await leftovers(lab.server1)).toBe("");
  });

  const fingerprintOfVolumes = () => on1("vgs --noheadings -o vg_seqno VgVm");
});

describe("the chain", () => {
  let made: string;

  it("is made, and does what it is for", async () => {
    stack.declare(...chain(), spare({ protect: true }));
    (await stack.up()).succeeded("5 created");
    expect(await attached()).toBe(moment);
    expect((await stack.state()).get("vm1")).toMatchObject({
      ...{ state: "valid", path: "/dev/VgVm/vm1", originSizeBytes: 16 * 1024 ** 2 },
      owner: "organization/faults/faults/vm1",
    });
  });

  it("is left alone by the next up, which finds nothing to do", async () => {
    made = await fingerprint();
    (await stack.up({ args: ["--expect-no-changes"] })).succeeded("5 unchanged");
    expect(await fingerprint()).toBe(made);
  });

  it("that drifted is told to have, and is put right", async () => {
    await on1(`lvchange -p rw VgVm/vm1; lvremove -qq -f VgVm/spare; systemctl stop ${exportUnit}`);
    const run = await stack.up({ refresh: true });
    run.said(
      "LvSnapshot vm1 on server1: was made writable",
      "LvSnapshot spare on server1: is gone from the host",
      "NbdExport vm1-export on server1: is stopped",
    );
    run.succeeded("1 created");
    await stack.isAsDeclared();
    expect(await attached()).toBe(moment);
  });

  it("changes in place where that is enough, which the preview tells by the property", async () => {
    const uuid = await uuidOf("vm1");
    stack.declare(...chain({ size: "12M" }), spare({ protect: true }));
    const preview = await stack.preview();
    preview.succeeded("1 to update", "4 unchanged");
    expect(preview.text).toMatch(/~ size *: "8M" => "12M"/);
    (await stack.up()).succeeded("1 updated", "4 unchanged");
    expect(await uuidOf("vm1")).toBe(uuid);
    expect((await stack.state()).get("vm1")).toMatchObject({ sizeBytes: 12 * 1024 ** 2 });
  });

  it("is made anew for a new moment, from its end and to its end", async () => {
    const uuid = await uuidOf("vm1");
    await on1("dd if=/dev/urandom of=/dev/VgVm/LV-VM1 bs=1M count=1 oflag=direct status=none");
    moment = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
    stack.declare(...chain({ size: "12M", triggers: ["new"] }), spare({ protect: true }));
    const run = await stack.up();
    run.succeeded("3 replaced", "2 unchanged");
    const order = (what: string) => run.text.match(new RegExp(`\\w+(?= \\S+ ${what} )`, "g"));
    expect(order("deleted")).toEqual(["NbdAttachment", "NbdExport", "LvSnapshot"]);
    expect(await uuidOf("vm1")).not.toBe(uuid);
    expect(await attached()).toBe(moment);
  });
});

describe("what is no longer declared", () => {
  it("stays while it is protected", async () => {
    stack.declare(...chain({ size: "12M", triggers: ["new"] }));
    const run = await stack.up();
    expect(run.exitCode).not.toBe(0);
    run.said("cannot be deleted", "protected");
    expect(await volumes()).toContain("spare");
    expect([...(await stack.state()).keys()]).toContain("spare");
  });

  it("stays on the host, and is forgotten, where that is declared", async () => {
    const retained = { retainOnDelete: true };
    const declared = [...chain({ size: "12M", triggers: ["new"] }), spare()];
    stack.declare(...declared.map((one) => ({ ...one, options: retained })));
    (await stack.up()).succeeded("5 unchanged");
    const before = await fingerprint();
    stack.declare();
    (await stack.up()).succeeded("4 deleted");
    expect(await fingerprint()).toBe(before);
    expect((await stack.state()).size).toBe(0);
  });
});

describe("an import", () => {
  const imports = (resources: readonly [type: string, name: string, id: string][]) => {
    const file = join(stack.cli.projectDir, "import.json");
    const listed = resources.map(([type, name, id]) => ({ type: `lvm-nbd:index:${type}`, name, id }));
    writeFileSync(file, JSON.stringify({ resources: listed }));
    const options = ["--yes", "--skip-preview", "--protect=false", "--generate-code=false"];
    const args = ["import", "--file", file, "--stack", stack.cli.name, ...options];
    return stack.cli.run(args, { allowFailure: true });
  };

  it("of what others own is refused, and what is not there is told to be not there", async () => {
    const foreign = await imports([["LvSnapshot", "another", "server1/VgVm/vm1"]]);
    expect(foreign.exitCode).not.toBe(0);
    expect(foreign.stdout).toMatch(/FOREIGN_RESOURCE: .*belongs to organization\/faults\/faults\/vm1/);
    const missing = await imports([["NbdExport", "missing", "server1/missing"]]);
    expect(missing.exitCode).not.toBe(0);
    expect(missing.stdout).toContain("resource 'server1/missing' does not exist");
  });

  it("by id alone tells all there is to declare: with that nothing is to change", async () => {
    await on1("lvcreate -qq -s -y -p r -c 16k -L 4M -n by-hand VgVm/LV-VM1");
    const before = await fingerprint();
    const imported = await imports([
      ["LvSnapshot", "vm1", "server1/VgVm/vm1"],
      ["LvSnapshot", "spare", "server1/VgVm/spare"],
      ["LvSnapshot", "by-hand", "server1/VgVm/by-hand"],
      ["NbdExport", "vm1-export", "server1/vm1-export"],
      ["NbdAttachment", "vm1-attachment", "server2/vm1-attachment"],
    ]);
    expect(imported.exitCode, imported.stdout).toBe(0);
    stack.declare(...(await stack.inputs()));
    (await stack.preview({ args: ["--expect-no-changes"] })).succeeded("6 unchanged");
    await stack.isAsDeclared();
    expect(await fingerprint()).toBe(before);
  });
});

describe("a copy", () => {
  const running = async () =>
    (await on2("systemctl list-units --plain --no-legend 'lvm-nbd-copy-*' | grep -c vm1.raw; true")) === "1";

  it("that is cancelled in the middle ends on the host, and the next up finishes it", async () => {
    const rest = await stack.inputs();
    stack.declare(...rest, volumeCopy("copy", "vm1", { file: "/backup/vm1.raw", bandwidthLimit: "1M" }));
    const { pid, end } = stack.startUp();
    await waitFor(async () => (await running()) || undefined, {
      timeoutSeconds: 300,
      what: "the copy to run",
    });
    process.kill(-pid, "SIGINT");
    const run = await end;
    expect(run.exitCode, run.text).not.toBe(0);
    run.failedWith("CANCELLED", "VolumeCopy copy", "server2");
    expect(await running()).toBe(false);
    stack.declare(...rest, volumeCopy("copy", "vm1", { file: "/backup/vm1.raw" }));
    (await stack.up()).succeeded("1 created", "6 unchanged");
    expect(await on2("sha256sum </backup/vm1.raw | cut -d' ' -f1")).toBe(moment);
  });
});

const backups = (day: number) =>
  vmBackup("nightly", {}, [{ origin: "LV-VM1", size: "4M" }], {
    ...{ folder: "/backup", keep: { daily: 2 }, now: `2026-11-0${day}T03:00:00` },
  });

it("a VM's backups are composed and made, and the next up finds nothing to do", async () => {
  stack.declare(...(await stack.inputs()), backups(1));
  (await stack.up()).succeeded("2 created", "7 unchanged");
  expect(await on2("sha256sum </backup/nightly.VgVm.LV-VM1.2026-11-01.raw | cut -d' ' -f1")).toBe(moment);
  await stack.isAsDeclared({ composed: 1 });
});

describe("a stack that moves", () => {
  /** Whose the resources are. A component is of the same type in both. */
  const types = async () => {
    const resources = [...(await stack.types()).values()].filter((type) => !type.endsWith(":VmBackup"));
    return new Set(resources.map((type) => type.split(":")[0]));
  };
  const keepsSecrets = async () => {
    const { clientTls } = (await stack.state()).get("secured") ?? {};
    z.object({ ciphertext: z.string() }).parse(clientTls);
  };
  let before: string;

  it("to dynamic resources touches no server", async () => {
    const secured = nbdExport("secured", { device: output("vm1", "path"), port: 10810, tls: true });
    const copy = volumeCopy("copy", "vm1", { file: "/backup/vm1.raw" });
    stack.declare(...chain({ size: "16M" }), secured, copy, backups(2));
    const uuid = await uuidOf("vm1");
    // Of what was imported only its mark knows the triggers: it is no other moment.
    (await stack.up()).succeeded("2 created", "1 updated", "2 deleted");
    expect(await uuidOf("vm1")).toBe(uuid);
    expect(await types()).toEqual(new Set(["lvm-nbd"]));
    before = await fingerprint();
    await keepsSecrets();
    stack.door = "dynamic";
    const preview = await stack.preview();
    preview.succeeded("7 to update");
    (await stack.up()).succeeded("7 updated");
    expect(await types()).toEqual(new Set(["pulumi-nodejs"]));
    await keepsSecrets();
    await stack.isAsDeclared({ composed: 2 });
    expect(await fingerprint()).toBe(before);
  });

  it("and back to the plugin neither", async () => {
    stack.door = "plugin";
    (await stack.up({ args: ["--expect-no-changes"] })).succeeded("9 unchanged");
    expect(await types()).toEqual(new Set(["lvm-nbd"]));
    await keepsSecrets();
    await stack.isAsDeclared({ composed: 2 });
    expect(await fingerprint()).toBe(before);
    expect(await attached()).toBe(moment);
  });
});

it("is removed with all it made, and nothing else", async () => {
  const origin = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
  (await stack.destroy()).succeeded("9 deleted");
  for (const server of [lab.server1, lab.server2]) expect(await leftovers(server)).toBe("");
  expect(await on2("ls /backup")).toBe("");
  expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).toBe(origin);
});
