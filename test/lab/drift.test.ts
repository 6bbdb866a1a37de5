import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { nextDoor } from "./doorNames.mts";
import type { Lab } from "./lab.mts";
import { allowedInto, checksum, freshLab, LabStack, mainPid, makeOrigin } from "./support.mts";
import { waitFor } from "./wait.mts";

const exportUnit = "lvm-nbd-export-vm1.service";
const attachUnit = "lvm-nbd-attach-vm1.service";
let lab: Lab;
let stack: LabStack;
let moment: string;

const snapshot = {
  host: "server1",
  volumeGroup: "VgVm",
  origin: "LV-VM1",
  name: "vm1-snap",
  size: "32M",
  tags: ["nightly"],
};
const small = { ...snapshot, name: "small-snap", size: "4M", tags: [] };
const exported = () => ({
  host: "server1",
  exportName: "vm1",
  device: "/dev/VgVm/vm1-snap",
  listenAddress: lab.server1.privateAddress,
  clients: [lab.server2.privateAddress],
});
const attachment = () => ({
  host: "server2",
  name: "vm1",
  uri: `nbd://${lab.server1.privateAddress}:10809/vm1`,
});

beforeAll(async () => {
  lab = await freshLab();
  stack = new LabStack("drift");
  moment = await makeOrigin(lab.server1);
});

// What one door wrote into the state is the other's to go on with.
beforeEach(() => {
  stack.door = nextDoor(stack.door);
});

afterAll(() => stack?.close());

describe("a snapshot", () => {
  let uuid: unknown;

  beforeAll(async () => {
    uuid = (await stack.up("LvSnapshot", "vm1", snapshot)).state.uuid;
  });

  it("that was renamed is found by its UUID and renamed back", async () => {
    await lab.server1.run("lvrename VgVm vm1-snap elsewhere");
    const warnings = await stack.warningsDuring(() => stack.refresh("LvSnapshot", "vm1"));
    expect(warnings).toMatch(/LvSnapshot vm1 on server1: was renamed to elsewhere/);
    const healed = await stack.up("LvSnapshot", "vm1", snapshot);
    expect(healed).toMatchObject({ did: "updated", state: { name: "vm1-snap", uuid } });
    expect((await lab.server1.run("lvs --noheadings -o lv_name VgVm")).stdout).not.toContain("elsewhere");
  });

  it("that was made writable becomes read-only again", async () => {
    await lab.server1.run("lvchange -p rw VgVm/vm1-snap");
    const warnings = await stack.warningsDuring(() => stack.refresh("LvSnapshot", "vm1"));
    expect(warnings).toMatch(/was made writable/);
    expect(await stack.up("LvSnapshot", "vm1", snapshot)).toMatchObject({ did: "updated", state: { uuid } });
    expect((await lab.server1.run("blockdev --getro /dev/VgVm/vm1-snap")).stdout.trim()).toBe("1");
  });

  it("that got other tags gets its own back", async () => {
    await lab.server1.run("lvchange --deltag nightly --addtag foreign VgVm/vm1-snap");
    const warnings = await stack.warningsDuring(() => stack.refresh("LvSnapshot", "vm1"));
    expect(warnings).toMatch(/has tags \[foreign\], declared are \[nightly\]/);
    expect(await stack.up("LvSnapshot", "vm1", snapshot)).toMatchObject({ did: "updated", state: { uuid } });
    const { stdout } = await lab.server1.run("lvs --noheadings -o lv_tags VgVm/vm1-snap");
    expect(stdout).toContain("nightly");
    expect(stdout).not.toContain("foreign");
  });

  it("that lost its owner mark is still known by its UUID and marked again", async () => {
    const mark = (await lab.server1.run("lvs --noheadings -o lv_tags VgVm/vm1-snap")).stdout
      .trim()
      .split(",")
      .find((tag) => tag.startsWith("lvm-nbd.owner="));
    await lab.server1.run(`lvchange --deltag '${mark}' VgVm/vm1-snap`);
    expect(await stack.refresh("LvSnapshot", "vm1")).toMatchObject({ uuid });
    await stack.up("LvSnapshot", "vm1", { ...snapshot, tags: [] });
    await stack.up("LvSnapshot", "vm1", snapshot);
    expect((await lab.server1.run("lvs --noheadings -o lv_tags VgVm/vm1-snap")).stdout).toContain(mark);
  });

  it("that overflowed is replaced by one of now", async () => {
    const before = await stack.up("LvSnapshot", "small", small);
    await lab.server1.run(
      "dd if=/dev/urandom of=/dev/VgVm/LV-VM1 bs=1M count=16 oflag=direct status=none; sync",
    );
    const warnings = await stack.warningsDuring(() => stack.refresh("LvSnapshot", "small"));
    expect(warnings).toMatch(/LvSnapshot small on server1: is now overflowed, was valid/);
    const now = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
    const healed = await stack.up("LvSnapshot", "small", small);
    expect(healed.did).toBe("replaced");
    expect(healed.changes).toEqual([{ property: "state", effect: "replace" }]);
    expect(healed.state).toMatchObject({ state: "valid" });
    expect(healed.state.uuid).not.toBe(before.state.uuid);
    expect(await checksum(lab.server1, "/dev/VgVm/small-snap")).toBe(now);
    await stack.destroy("LvSnapshot", "small");
  });

  it("that was removed is told to be gone and made again", async () => {
    await lab.server1.run("lvremove -qq -f VgVm/vm1-snap");
    const warnings = await stack.warningsDuring(async () => {
      expect(await stack.refresh("LvSnapshot", "vm1")).toBeUndefined();
    });
    expect(warnings).toMatch(/LvSnapshot vm1 on server1: is gone from the host/);
    moment = await checksum(lab.server1, "/dev/VgVm/LV-VM1");
    expect((await stack.up("LvSnapshot", "vm1", snapshot)).did).toBe("created");
    expect(await checksum(lab.server1, "/dev/VgVm/vm1-snap")).toBe(moment);
  });

  it("whose name another volume has taken is left alone", async () => {
    await stack.up("LvSnapshot", "taken", small);
    await lab.server1.run("lvremove -qq -f VgVm/small-snap; lvcreate -qq -y -W n -L 4M -n small-snap VgVm");
    const warnings = await stack.warningsDuring(async () => {
      await stack.destroy("LvSnapshot", "taken");
    });
    expect(warnings).toMatch(/is left alone/);
    expect((await lab.server1.run("lvs --noheadings -o lv_name VgVm")).stdout).toContain("small-snap");
    await lab.server1.run("lvremove -qq -f VgVm/small-snap");
  });
});

describe("an export", () => {
  const file = `/etc/systemd/system/${exportUnit}`;

  beforeAll(async () => {
    await stack.up("NbdExport", "vm1", exported());
  });

  it.each([
    ["stopped", `systemctl stop ${exportUnit}`, "stopped"],
    ["disabled", `systemctl disable --quiet ${exportUnit}`, "disabled"],
    [
      "edited by hand",
      `sed -i 's/^IPAddressAllow=.*/IPAddressAllow=any/' ${file}; systemctl daemon-reload; systemctl restart ${exportUnit}`,
      "edited",
    ],
    [
      "overridden by a drop-in",
      `mkdir ${file}.d; printf '[Service]\\nIPAddressAllow=any\\n' >${file}.d/more.conf; systemctl daemon-reload`,
      "edited",
    ],
    ["without its unit file", `rm ${file}; systemctl daemon-reload`, "edited"],
  ])("that is %s is named and put right", async (_, spoilIt, state) => {
    const before = await mainPid(lab.server1, exportUnit);
    await lab.server1.run(spoilIt);
    const warnings = await stack.warningsDuring(() => stack.refresh("NbdExport", "vm1"));
    expect(warnings).toContain(`NbdExport vm1 on server1: is ${state}`);
    expect(await stack.up("NbdExport", "vm1", exported())).toMatchObject({
      did: "updated",
      state: { state: "serving" },
    });
    const { stdout } = await lab.server1.run(
      `systemctl is-active ${exportUnit}; systemctl is-enabled ${exportUnit}; ls -d ${file}*`,
    );
    expect(stdout).toBe(`active\nenabled\n${file}\n`);
    expect(await allowedInto(lab.server1, exportUnit)).toEqual(
      [lab.server1, lab.server2].map(({ privateAddress }) => `${privateAddress}/32`),
    );
    // For what a boot would do nobody is cut off.
    if (state === "disabled") expect(await mainPid(lab.server1, exportUnit)).toBe(before);
  });

  it("whose recorded port was changed in the unit is told by that property", async () => {
    await lab.server1.run(
      `sed -i 's/10809/10810/g' ${file}; systemctl daemon-reload; systemctl restart ${exportUnit}`,
    );
    const warnings = await stack.warningsDuring(() => stack.refresh("NbdExport", "vm1"));
    expect(warnings).toContain("port is 10810, declared is 10809");
    expect(await stack.up("NbdExport", "vm1", exported())).toMatchObject({
      did: "updated",
      state: { state: "serving", port: 10809 },
    });
  });

  it("that was removed by hand is told to be gone and made again", async () => {
    await lab.server1.run(
      `systemctl disable --now --quiet ${exportUnit}; rm ${file}; systemctl daemon-reload`,
    );
    const warnings = await stack.warningsDuring(async () => {
      expect(await stack.refresh("NbdExport", "vm1")).toBeUndefined();
    });
    expect(warnings).toContain("NbdExport vm1 on server1: is gone from the host");
    expect((await stack.up("NbdExport", "vm1", exported())).did).toBe("created");
  });
});

describe("an attachment", () => {
  const file = `/etc/systemd/system/${attachUnit}`;

  beforeAll(async () => {
    await stack.up("NbdAttachment", "vm1", attachment());
  });

  it.each([
    ["stopped", `systemctl stop ${attachUnit}`, "detached"],
    ["disabled", `systemctl disable --quiet ${attachUnit}`, "disabled"],
    ["edited by hand", `sed -i s/RestartSec=2/RestartSec=20/ ${file}; systemctl daemon-reload`, "edited"],
    ["without its path", "rm /dev/lvm-nbd/vm1", "edited"],
    ["without its unit file", `rm ${file}; systemctl daemon-reload`, "edited"],
  ])("that is %s is named and put right", async (_, spoilIt, state) => {
    const before = await mainPid(lab.server2, attachUnit);
    await lab.server2.run(spoilIt);
    const warnings = await stack.warningsDuring(() => stack.refresh("NbdAttachment", "vm1"));
    expect(warnings).toContain(`NbdAttachment vm1 on server2: is ${state}`);
    expect(await stack.up("NbdAttachment", "vm1", attachment())).toMatchObject({
      did: "updated",
      state: { state: "attached" },
    });
    const { stdout } = await lab.server2.run(
      `systemctl is-active ${attachUnit}; systemctl is-enabled ${attachUnit}; grep RestartSec ${file}`,
    );
    expect(stdout).toBe("active\nenabled\nRestartSec=2\n");
    if (state === "disabled") expect(await mainPid(lab.server2, attachUnit)).toBe(before);
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
  });

  it("whose link is cut behind its back connects again by itself", async () => {
    const link = async () => (await lab.server2.run("cat /sys/block/nbd*/pid")).stdout.trim();
    const before = await link();
    await lab.server2.run("nbd-client -d $(readlink -f /dev/lvm-nbd/vm1)");
    await waitFor(async () => ((await link()) === before ? undefined : true), {
      timeoutSeconds: 60,
      what: "the attachment to connect again",
    });
    expect(await stack.drifted("NbdAttachment", "vm1")).toEqual([]);
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
  });

  it("whose device somebody else has taken is told to be replaced, and takes another", async () => {
    const { device } = stack.state("NbdAttachment", "vm1");
    await lab.server2.run(
      `systemctl stop ${attachUnit}; nbd-client -N vm1 ${lab.server1.privateAddress} 10809 ${device} -timeout 30 -readonly`,
    );
    const foreign = async () =>
      (await lab.server2.run(`cat /sys/block/${String(device).slice(5)}/size`)).stdout.trim();
    const size = await foreign();
    const warnings = await stack.warningsDuring(() => stack.refresh("NbdAttachment", "vm1"));
    expect(warnings).toMatch(/NbdAttachment vm1 on server2: is (replaced|detached)/);
    const healed = await stack.up("NbdAttachment", "vm1", attachment());
    expect(healed.state).toMatchObject({ state: "attached" });
    expect(healed.state.device).not.toBe(device);
    expect(await foreign()).toBe(size);
    await lab.server2.run(`nbd-client -d ${device}`);
  });

  it("whose export has stopped is dead or detached, and heals when the export is back", async () => {
    await lab.server1.run(`systemctl stop ${exportUnit}`);
    await waitFor(
      async () =>
        /is (dead|detached)/.test(await stack.warningsDuring(() => stack.drifted("NbdAttachment", "vm1"))) ||
        undefined,
      { timeoutSeconds: 120, what: "the refresh to see that the link is dead" },
    );
    await lab.server1.run(`systemctl start ${exportUnit}`);
    await waitFor(
      async () => ((await stack.drifted("NbdAttachment", "vm1")).length === 0 ? true : undefined),
      {
        timeoutSeconds: 120,
        what: "the attachment to be back",
      },
    );
    expect(await checksum(lab.server2, "/dev/lvm-nbd/vm1")).toBe(moment);
  });
});

describe("a host that does not answer", () => {
  it("fails the refresh, is not told to be absent, and nothing is changed", async () => {
    await lab.server1.freeze();
    try {
      await expect(stack.refresh("LvSnapshot", "vm1")).rejects.toThrow(/HOST_UNREACHABLE|COMMAND_TIMED_OUT/);
    } finally {
      await lab.server1.thaw();
    }
    expect(await stack.drifted("LvSnapshot", "vm1")).toEqual([]);
    const changes = await stack.changesDuring(() => stack.up("LvSnapshot", "vm1", snapshot));
    expect(changes).toEqual([]);
  });
});
