import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { ownerMark } from "../../provider/core/owner.js";
import { unitMark } from "../../provider/linux/exportUnit.js";
import {
  type MountPlan,
  mountedDevice,
  mountUnitName,
  renderMountUnit,
} from "../../provider/linux/mountUnit.js";
import { ownDirective } from "../../provider/linux/systemd.js";
import { directives } from "../support/units.js";

const plan: MountPlan = {
  owner: "o/p/s/vm1",
  device: "/dev/lvm-nbd/vm1",
  path: "/mnt/vm1",
  attachment: "lvm-nbd-attach-vm1.service",
  disk: "/dev/nbd0",
  fileSystem: { type: "ext4", uuid: "1-2" },
  kernelType: "ext4",
  options: ["ro", "nodev", "nosuid", "noexec", "noload"],
};
const unit = (change: Partial<MountPlan> = {}) => directives(renderMountUnit({ ...plan, ...change }));

describe("the mount unit", () => {
  it("mounts the device read-only at the path whose name it bears", () => {
    expect(unit().get("Mount.Where")).toEqual(["/mnt/vm1"]);
    expect(unit().get("Mount.Type")).toEqual(["ext4"]);
    expect(unit().get("Mount.Options")).toEqual(["ro,nodev,nosuid,noexec,noload,_netdev,nofail"]);
    expect(mountUnitName("/mnt/vm1")).toBe("mnt-vm1.mount");
    // As systemd-escape --path --suffix=mount names it.
    expect(mountUnitName("/mnt/vm 1-ä")).toBe("mnt-vm\\x201\\x2d\\xc3\\xa4.mount");
  });

  it("names the device so that systemd waits for no device unit, of a partition too", () => {
    expect(unit().get("Mount.What")).toEqual(["/proc/1/root/dev/nbd0"]);
    expect(unit({ partition: 2 }).get("Mount.What")).toEqual(["/proc/1/root/dev/nbd0p2"]);
    expect(mountedDevice({ disk: "/dev/nbd12", partition: 2 })).toBe("/dev/nbd12p2");
  });

  it("goes and comes with its attachment, and comes back after a reboot", () => {
    expect(unit().get("Unit.BindsTo")).toEqual([plan.attachment]);
    expect(unit().get("Unit.After")).toEqual([plan.attachment]);
    expect(unit().get("Install.WantedBy")).toEqual([`multi-user.target ${plan.attachment}`]);
  });

  it("is never unmounted lazily or by force", () => {
    expect([...unit().keys()].filter((name) => /Lazy|Force/.test(name))).toEqual([]);
  });
});

it("the unit tells its owner and all that it was made from, and every change of that shows", () => {
  const text = renderMountUnit(plan);
  expect(unitMark(text)).toBe(ownerMark("o/p/s/vm1"));
  expect(ownDirective(text, "MountedDevice")).toBe("/dev/nbd0");
  expect(ownDirective(text, "Attachment")).toBe(plan.attachment);
  expect(JSON.parse(ownDirective(text, "Plan") ?? "")).toEqual(plan);
  expect(renderMountUnit(structuredClone(plan))).toBe(text);
  const others: Partial<MountPlan>[] = [
    { owner: "o/p/s/vm2" },
    { device: "/dev/nbd0" },
    { partition: 1 },
    { path: "/mnt/vm2" },
    { attachment: "lvm-nbd-attach-vm2.service" },
    { disk: "/dev/nbd1" },
    { fileSystem: { type: "ext4", uuid: "1-3" } },
    { kernelType: "xfs" },
    { options: ["ro"] },
    { made: "/mnt/vm1" },
  ];
  const texts = others.map((other) => renderMountUnit({ ...plan, ...other }));
  expect(new Set([text, ...texts]).size).toBe(others.length + 1);
});

it("a hostile label or path adds no directive and no section", () => {
  const hostile = fc.string({ unit: "binary" }).map((text) => text.replace(/\p{Cc}/gu, "") || "x");
  fc.assert(
    fc.property(hostile, hostile, (label, name) => {
      const change = { path: `/mnt/${name}`, fileSystem: { type: "ext4", label: `\n[Mount]\n${label}` } };
      expect([...unit(change).keys()]).toEqual([...unit().keys()]);
    }),
  );
});
