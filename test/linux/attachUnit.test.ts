import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { ownerMark } from "../../provider/core/owner.js";
import {
  type AttachPlan,
  attachPath,
  attachUnitName,
  modulesLoad,
  renderAttachUnit,
  udevRule,
} from "../../provider/linux/attachUnit.js";
import { unitMark } from "../../provider/linux/exportUnit.js";
import { ownDirective } from "../../provider/linux/systemd.js";
import { directives } from "../support/units.js";

const plan: AttachPlan = {
  owner: "o/p/s/vm1",
  name: "vm1",
  server: "10.0.0.1",
  port: 10809,
  exportName: "vm1",
  device: "/dev/nbd0",
  readOnly: true,
  connections: 1,
  timeoutSeconds: 30,
  blockSize: 512,
};
const unit = (change: Partial<AttachPlan> = {}) => directives(renderAttachUnit({ ...plan, ...change }));

describe("the service", () => {
  it("connects the declared export to the declared device, always with a timeout", () => {
    expect(unit().get("Service.ExecStart")).toEqual([
      "nbd-client -N vm1 10.0.0.1 10809 /dev/nbd0 -timeout 30 -b 512 -readonly -nofork -nonetlink",
    ]);
  });

  it("comes back after a reboot and after a lost link, for ever", () => {
    expect(unit().get("Install.WantedBy")).toEqual(["multi-user.target"]);
    expect(unit().get("Unit.After")).toEqual(["network-online.target"]);
    expect(unit().get("Service.Restart")).toEqual(["always"]);
    expect(unit().get("Unit.StartLimitIntervalSec")).toEqual(["0"]);
  });

  it("loads the module and looks whether the device is free before it connects", () => {
    const [before] = unit().get("Service.ExecStartPre") ?? [];
    expect(before).toMatch(/^\/bin\/sh -c ".*modprobe nbd.*" \/dev\/nbd0$/);
    for (const look of ["/pid", "holders", "mountinfo"]) expect(before).toContain(look);
  });

  it("makes the stable path when the device has its size, and takes it away at the end", () => {
    expect(unit().get("Service.ExecStartPost")?.[0]).toMatch(/ \/dev\/nbd0 \/dev\/lvm-nbd\/vm1 \$MAINPID$/);
    expect(unit().get("Service.ExecStopPost")).toEqual(["/bin/rm -f /dev/lvm-nbd/vm1"]);
    expect(attachPath("vm1")).toBe("/dev/lvm-nbd/vm1");
  });

  it("cuts only a link that its own process made", () => {
    const [stop] = unit().get("Service.ExecStop") ?? [];
    expect(stop).toMatch(/\/pid\)\\" = \\"\$\$1\\" \] \|\| exit 0; .*nbd-client -d .*\/dev\/nbd0 \$MAINPID$/);
  });

  it("bounds its waits and its rights", () => {
    const text = unit();
    expect(text.get("Service.TimeoutStartSec")).toEqual(["60"]);
    expect(text.get("Service.TimeoutStopSec")).toEqual(["60"]);
    expect(text.get("Service.NoNewPrivileges")).toEqual(["yes"]);
    expect(text.get("Service.ProtectSystem")).toEqual(["yes"]);
    expect(text.get("Service.ProtectHome")).toEqual(["yes"]);
  });
});

describe("what the unit tells about itself", () => {
  it("is its owner, its device, and all that it was made from", () => {
    const text = renderAttachUnit(plan);
    expect(unitMark(text)).toBe(ownerMark("o/p/s/vm1"));
    expect(ownDirective(text, "Device")).toBe("/dev/nbd0");
    expect(JSON.parse(ownDirective(text, "Plan") ?? "")).toEqual(plan);
    expect(attachUnitName("vm1")).toBe("lvm-nbd-attach-vm1.service");
  });

  it("is the same text for the same plan, and another for every other", () => {
    const text = renderAttachUnit(plan);
    expect(renderAttachUnit(structuredClone(plan))).toBe(text);
    const others: Partial<AttachPlan>[] = [
      { owner: "o/p/s/vm2" },
      { name: "vm2" },
      { server: "10.0.0.2" },
      { port: 10810 },
      { exportName: "vm2" },
      { device: "/dev/nbd1" },
      { readOnly: false },
      { connections: 2 },
      { timeoutSeconds: 31 },
      { blockSize: 4096 },
    ];
    const texts = others.map((other) => renderAttachUnit({ ...plan, ...other }));
    expect(new Set([text, ...texts]).size).toBe(others.length + 1);
  });
});

it("a hostile export name adds no directive and no section, and the mark is still found", () => {
  const hostile = fc.array(
    fc.oneof(
      fc.string({ unit: "binary" }),
      fc.constantFrom(
        "[",
        "]",
        "\u2028",
        "\u2029",
        "\\",
        '"',
        "'",
        "%n",
        "$x",
        ";",
        "#",
        "Mark=",
        "X-LvmNbd",
      ),
    ),
    { minLength: 1 },
  );
  const expected = [...unit().keys()];
  fc.assert(
    fc.property(hostile, (parts) => {
      // What the input's check lets through, and what an NBD URI can hold.
      const exportName =
        Buffer.from(parts.join(""))
          .toString()
          .replace(/\p{Cc}/gu, "") || "x";
      const text = renderAttachUnit({ ...plan, exportName });
      expect([...directives(text).keys()]).toEqual(expected);
      expect(unitMark(text)).toBe(ownerMark("o/p/s/vm1"));
      expect(JSON.parse(ownDirective(text, "Plan") ?? "")).toEqual({ ...plan, exportName });
    }),
  );
});

describe("beside the unit", () => {
  it("the module is loaded at boot", () => {
    expect(modulesLoad.text.split("\n").filter((line) => !line.startsWith("#"))).toEqual(["nbd", ""]);
  });

  it("a rule before LVM's keeps a guest's volume groups from being activated on this host", () => {
    expect(udevRule.path).toMatch(/\/59-/);
    expect(udevRule.text).toContain('ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1"');
  });
});
