/** Nightly backups of a VM of two volumes, through the CLI, on days of a clock that is told: VmBackup. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { z } from "zod";
import { FaultStack, vmBackup } from "./faults/fault-stack.mts";
import type { Lab } from "./lab.mts";
import { freshLab } from "./support.mts";

vi.setConfig({ testTimeout: 1_800_000, hookTimeout: 900_000 });

const example = join(__dirname, "..", "..", "examples", "nightly-backup");

let lab: Lab;
let stack: FaultStack;

/** The VM: two file systems on its disks (loop devices, as a hypervisor has them open), and a program that writes the same number to one and then to the other, all the time. */
const startVm = `
  for volume in LV-VM1 LV-VM1-data; do
    lvcreate -qq -y -W n -L 8M -n $volume VgVm && disk=$(losetup -f --show /dev/VgVm/$volume) && mkfs.ext4 -q $disk &&
    mkdir -p /vm/$volume && mount $disk /vm/$volume || exit 1
  done
  cat >/root/writer <<'END'
while :; do
  n=$((n+1))
  for volume in LV-VM1 LV-VM1-data; do echo $n >/vm/$volume/n.new && mv /vm/$volume/n.new /vm/$volume/n && sync -f /vm/$volume; done
  sleep 0.2
done
END
  systemd-run -q --unit vm sh /root/writer`;
const quiesce = {
  freeze: "echo frozen >>/root/frozen; fsfreeze -f /vm/LV-VM1 && fsfreeze -f /vm/LV-VM1-data",
  thaw: "fsfreeze -u /vm/LV-VM1-data; fsfreeze -u /vm/LV-VM1",
};
const volumes = ["LV-VM1", "LV-VM1-data"].map((origin) => ({ origin, size: "4M" }));
const keep = { daily: 3, weekly: 2 };
const day = (number: number) => `2026-11-${String(number).padStart(2, "0")}`;

function tonight(number: number, vm = "vm1", backedUp = volumes): void {
  stack.declare(
    vmBackup(vm, { quiesce }, backedUp, { folder: "/backup", keep, now: `${day(number)}T03:00:00` }),
  );
}

/** The days of which there is an image of the VM, each with its manifest; and nothing else is there. */
async function days(vm: string): Promise<string[]> {
  const { stdout } = await lab.server2.run("ls /backup");
  const files = stdout.trim().split("\n");
  const found = [...new Set(files.map((file) => /\d{4}-\d\d-\d\d/.exec(file)?.[0] ?? file))].sort();
  const expected = found.flatMap((key) =>
    ["raw", "raw.manifest.json"].map((end) => `${vm}.VgVm.LV-VM1.${key}.${end}`),
  );
  expect(files.sort()).toEqual(expected.sort());
  return found;
}

const onSource = async () =>
  (
    await lab.server1.run(
      "lvs --noheadings -o lv_name VgVm | grep backup; ls /etc/systemd/system | grep lvm-nbd; true",
    )
  ).stdout;

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([
    FaultStack.create(lab),
    lab.server1.run(startVm),
    lab.server2.run("mkdir /backup"),
  ]);
});

afterAll(() => stack?.close());

it("the volumes of a VM are backed up as of one moment, for which it is frozen once", async () => {
  tonight(1);
  // The stack, the VM, today's backup.
  (await stack.up()).succeeded("3 created");
  expect((await lab.server1.run("cat /root/frozen")).stdout.trim()).toBe("frozen");
  const numbers = await Promise.all(
    volumes.map(async ({ origin }) => {
      const image = `/backup/vm1.VgVm.${origin}.${day(1)}.raw`;
      const { stdout } = await lab.server2.run(
        `mkdir -p /mnt/${origin} && mount -o loop,ro ${image} /mnt/${origin} && cat /mnt/${origin}/n; umount /mnt/${origin}`,
      );
      return Number(stdout);
    }),
  );
  const [first = Number.NaN, second = Number.NaN] = numbers;
  expect(second).toBeGreaterThan(0);
  // The writer was between the two volumes, or it was not.
  expect([0, 1]).toContain(first - second);
  expect(await onSource()).toBe("");
  const again = await stack.up({ refresh: true, args: ["--expect-no-changes"] });
  again.succeeded("3 unchanged");
  expect(again.text).not.toContain("warning:");
});

// Past a Sunday. Thirty nights of another policy are in the test of vmGenerations, which tells what is declared.
it("after each of six nights exactly the backups are there that are to be kept", async () => {
  await lab.server1.run("systemctl stop vm");
  // A Saturday, and the Sunday, which ends a week.
  const [first, sunday] = [7, 8];
  for (let night = first; night <= first + 5; night++) {
    // With what the first night removes: the backup of the VM of two volumes.
    tonight(night, "vm2", volumes.slice(0, 1));
    const run = await stack.up();
    run.succeeded(night === first ? "2 created" : "1 created");
    const daily = [night - 2, night - 1, night].filter((number) => number >= first);
    // The newest of this week is today's; of the last one it is its Sunday's.
    const weekly = night > sunday ? [sunday] : [];
    const expected = [...new Set([...weekly, ...daily])].sort((one, other) => one - other).map(day);
    expect(await days("vm2"), `after night ${night}`).toEqual(expected);
  }
  expect(await onSource()).toBe("");
});

describe("examples/nightly-backup", () => {
  const fleetOf20 = z
    .array(z.object({ name: z.string(), volumes: z.array(z.looseObject({ origin: z.string() })) }))
    .length(20)
    .parse(JSON.parse(readFileSync(join(example, "vms.json"), "utf8")));
  // The lab's emulated servers would take minutes for all of them.
  const vms = fleetOf20.slice(0, 3);
  const origins = vms.flatMap(({ volumes }) => volumes.map(({ origin }) => origin));
  let fleet: FaultStack;
  let folder: string;

  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), "lvm-nbd-fleet-"));
    // All of them on the lab's one source.
    const here = vms.map((vm) => ({ ...vm, host: "server1", listenAddress: lab.server1.privateAddress }));
    writeFileSync(join(folder, "vms.json"), JSON.stringify(here));
    const config = { backupHost: "server2", folder: "/fleet", vms: join(folder, "vms.json") };
    // A stand-in for the hypervisor, which notes who was brought to rest.
    const virsh = '#!/bin/sh\necho "$*" >>/root/virsh';
    [fleet] = await Promise.all([
      FaultStack.create(lab, { from: example, config: { ...config, today: `${day(1)}T03:00:00` } }),
      lab.server1.run(
        `printf '${virsh.replaceAll("\n", "\\n")}\\n' >/usr/local/bin/virsh && chmod +x /usr/local/bin/virsh
        systemctl stop vm 2>/dev/null; umount /vm/* && losetup -D && lvremove -qq -y VgVm/LV-VM1 VgVm/LV-VM1-data || exit 1
        for origin in ${origins.join(" ")}; do
          lvcreate -qq -y -W n -L 4M -n $origin VgVm && dd if=/dev/zero of=/dev/VgVm/$origin bs=4M count=1 status=none && echo $origin | dd of=/dev/VgVm/$origin conv=notrunc status=none
        done`,
      ),
      lab.server2.run("mkdir /fleet"),
    ]);
  });

  afterAll(() => {
    fleet?.close();
    rmSync(folder, { recursive: true });
  });

  it("backs up the VMs of a list, each frozen once, and leaves nothing on their server", async () => {
    (await fleet.up()).succeeded("7 created");
    const { stdout } = await lab.server2.run(
      "cd /fleet && for image in *.raw; do echo $image $(head -n 1 $image); done",
    );
    const made = vms.flatMap(({ name, volumes }) =>
      volumes.map(({ origin }) => `${name}.VgVm.${origin}.${day(1)}.raw ${origin}`),
    );
    expect(stdout.trim().split("\n").sort()).toEqual(made.sort());
    const asked = (await lab.server1.run("sort /root/virsh")).stdout.trim().split("\n");
    expect(asked).toEqual(vms.flatMap(({ name }) => [`domfsfreeze ${name}`, `domfsthaw ${name}`]).sort());
    expect(await onSource()).toBe("");
  });
});
