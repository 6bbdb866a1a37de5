/** Faults of whole hosts: reboots, power, silence, a missing module; and guests' own LVM on the disks. */
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import type { Lab } from "../lab.mts";
import { checksum, checksumSoon, freshLab, leftovers, makeOrigin } from "../support.mts";
import { waitFor } from "../wait.mts";
import { attachment, type Declared, FaultStack, nbdExport, output, snapshot } from "./fault-stack.mts";
import { together, up } from "./together.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let stack: FaultStack;
let moment: string;
const the = () => stack;

const base: readonly Declared[] = [
  snapshot("vm1", { origin: "LV-VM1", size: "8M" }),
  nbdExport("vm1-export", { device: output("vm1", "path") }),
  attachment("vm1-attached", { uri: output("vm1-export", "uri") }),
  // Disks of guests that use LVM themselves: a group on the whole disk, and one on a partition.
  snapshot("whole", { origin: "LV-WHOLE", size: "8M" }),
  nbdExport("whole-export", { device: output("whole", "path"), port: 10810 }),
  attachment("whole-attached", { uri: output("whole-export", "uri") }),
  nbdExport("part-export", { device: "/dev/VgVm/LV-PART", port: 10811, readOnly: false }),
  attachment("part-attached", { uri: output("part-export", "uri"), readOnly: false }),
];

beforeAll(async () => {
  lab = await freshLab();
  [stack, moment] = await Promise.all([
    FaultStack.create(lab),
    makeOrigin(lab.server1),
    // Made where nothing of the guests' groups stays active.
    lab.server1.run(`set -e
      for disk in WHOLE PART; do lvcreate -qq -y -W n -L 32M -n LV-$disk VgVm; done
      printf 'label: dos\\n2048,,8e\\n' | sfdisk -q /dev/VgVm/LV-PART
      whole=$(losetup -f --show /dev/VgVm/LV-WHOLE); part=$(losetup -f --show -o 1048576 /dev/VgVm/LV-PART)
      vgcreate -qq -y VgGuestWhole $whole; vgcreate -qq -y VgGuestPart $part
      for group in VgGuestWhole VgGuestPart; do lvcreate -qq -y -W n -l 100%FREE -n root $group; vgchange -qq -an $group; done
      losetup -d $whole; losetup -d $part`),
  ]);
});

afterAll(() => stack?.close());

/** No volume of a guest is active on server2, though its disk is there with LVM's label on it. */
async function guestStaysAsleep(device: string, labelled: string): Promise<void> {
  await lab.server2.run("udevadm settle");
  const { stdout } = await lab.server2.run(`
    dmsetup ls; blkid -p -o value -s TYPE ${labelled.replace("DEVICE", `$(readlink -f ${device})`)}`);
  expect(stdout.trim().split("\n").at(-1)).toBe("LVM2_member");
  expect(stdout).not.toContain("VgGuest");
}

const wholeSleeps = () => guestStaysAsleep("/dev/lvm-nbd/whole-attached", "DEVICE");
const partSleeps = () => guestStaysAsleep("/dev/lvm-nbd/part-attached", "DEVICEp1");

together(
  "the first up of a chain to a host without the nbd module:",
  {
    met: () => {
      stack.declare(...base);
      return stack.up();
    },
    next: up(the),
  },
  [
    {
      name: "nbd module missing: it is said, the other host goes on",
      broken: () =>
        lab.server2.run("modprobe -r nbd; mkdir /root/nbd && mv $(modinfo -n nbd) /root/nbd/ && depmod"),
      told: async (run) => {
        for (const name of ["vm1", "whole", "part"])
          run.failedWith("MODULE_MISSING", `NbdAttachment ${name}-attached`, "server2", "nbd");
        expect(await leftovers(lab.server2)).toBe("");
        const state = await stack.state();
        for (const name of ["vm1", "whole", "part"])
          expect(state.get(`${name}-export`)).toMatchObject({ state: "serving" });
      },
      mended: () =>
        lab.server2.run(
          "mv /root/nbd/* /lib/modules/$(uname -r)/kernel/drivers/block/ && depmod && rmdir /root/nbd",
        ),
      healed: async (run) => {
        run.succeeded("3 created");
        expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1-attached")).toBe(moment);
      },
    },
    {
      name: "a guest's LVM on the whole disk: its group is not activated on the attaching host",
      broken: async () => {},
      told: () => undefined,
      healed: wholeSleeps,
    },
    {
      name: "a guest's LVM on a partition: its group is not activated on the attaching host",
      broken: async () => {},
      told: () => undefined,
      healed: partSleeps,
    },
  ],
);

it("server2 reboots while attached: the attachments are there again, the guests' groups still sleep", async () => {
  await lab.server2.reboot();
  for (const name of ["whole", "part"]) await checksumSoon(lab.server2, `/dev/lvm-nbd/${name}-attached`);
  expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1-attached")).toBe(moment);
  await stack.isAsDeclared();
  await wholeSleeps();
  await partSleeps();
});

it("server1 reboots between operations: the exports are there again, and the attachments connect to them", async () => {
  await lab.server1.reboot();
  for (const name of ["whole", "part"]) await checksumSoon(lab.server2, `/dev/lvm-nbd/${name}-attached`);
  expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1-attached")).toBe(moment);
  await stack.isAsDeclared();
});

it("a host accepts connections and answers nothing: refresh fails for it alone, and its state stays", async () => {
  await lab.server2.run("systemctl disable -q lvm-nbd-attach-part-attached");
  const before = await stack.state();
  await lab.server1.freeze();
  const run = await stack.refresh().finally(() => lab.server1.thaw());
  for (const name of ["vm1", "whole"]) run.failedWith("HOST_UNREACHABLE", `LvSnapshot ${name}`, "server1");
  for (const name of ["vm1", "whole", "part"])
    run.failedWith("HOST_UNREACHABLE", `NbdExport ${name}-export`, "server1");
  expect(run.text).toMatch(/NbdAttachment part-attached on server2: is (disabled|dead|detached)/);
  expect([...(await stack.state()).keys()].sort()).toEqual([...before.keys()].sort());
  // The guests' reads had no answer for a while: what died of it connects again by itself.
  for (const name of ["vm1", "whole", "part"])
    await checksumSoon(lab.server2, `/dev/lvm-nbd/${name}-attached`);
  (await stack.up({ refresh: true })).succeeded();
  await lab.server2.run("systemctl is-enabled lvm-nbd-attach-part-attached");
});

it("server1 loses power in the middle of a create: the create fails and says why", async () => {
  stack.declare(
    ...base,
    snapshot("cut", {
      origin: "LV-PART",
      size: "8M",
      quiesce: { freeze: "touch /run/frozen; sleep 20", thaw: "true" },
    }),
  );
  const { end } = stack.startUp();
  await waitFor(
    async () =>
      (await lab.server1.run("test -e /run/frozen", { allowFailure: true })).exitCode === 0 || undefined,
    { timeoutSeconds: 60, what: "the create to begin" },
  );
  await lab.server1.kill();
  (await end).failedWith("LINK_LOST", "LvSnapshot cut", "server1");
});

it("server1 is down during a refresh: nothing of it is taken for gone, and the next up makes what was cut off", async () => {
  await lab.server1.kill();
  await lab.server2.run("systemctl disable -q lvm-nbd-attach-whole-attached");
  const down = await stack.refresh();
  for (const name of ["vm1", "whole"]) down.failedWith("HOST_UNREACHABLE", `LvSnapshot ${name}`, "server1");
  expect(down.text).toMatch(/NbdAttachment whole-attached on server2: is (disabled|dead|detached)/);
  expect([...(await stack.state()).keys()]).toEqual(expect.arrayContaining(base.map(({ name }) => name)));

  await lab.server1.start();
  for (const name of ["whole", "part"]) await checksumSoon(lab.server2, `/dev/lvm-nbd/${name}-attached`);
  expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/vm1-attached")).toBe(moment);
  (await stack.up({ refresh: true })).succeeded();
  expect((await stack.state()).get("cut")).toMatchObject({ state: "valid" });
  await stack.isAsDeclared();
});

it("everything is removed afterwards, and the origins are untouched", async () => {
  (await stack.destroy()).succeeded();
  expect(await leftovers(lab.server1)).toBe("");
  expect(await leftovers(lab.server2)).toBe("");
  expect(await checksum(lab.server1, "/dev/VgVm/LV-VM1")).toBe(moment);
  expect((await lab.server2.run("dmsetup ls")).stdout).not.toContain("VgGuest");
});
