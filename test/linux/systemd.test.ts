import { describe, expect, it } from "vitest";
import { parseFields } from "../../provider/linux/fields.js";
import {
  deviceUnit,
  execLine,
  hasDropIns,
  ownDirective,
  parseShow,
  pathUnit,
  renderUnit,
} from "../../provider/linux/systemd.js";
import { unitName } from "../../provider/linux/unitName.js";
import { fields } from "../support/fields.js";

it.each([
  ["", false],
  ["/usr/lib/systemd/system/service.d/10-timeout-abort.conf", false],
  ["/etc/systemd/system/lvm-nbd-export-vm1.service.d/override.conf", true],
  ["/usr/lib/systemd/system/service.d/10-timeout-abort.conf /run/systemd/system/mnt.mount.d/x.conf", true],
  ["/etc/systemd/system/lvm-nbd-.service.d/a.conf", true],
])("the drop-ins %j are of this unit: %s", (DropInPaths, expected) => {
  expect(hasDropIns({ DropInPaths })).toBe(expected);
});

describe("unit text", () => {
  it("quotes arguments and neutralises specifiers and variables", () => {
    expect(execLine(["/bin/sh", "-c", 'echo "$1" 100% \\n', "a b"])).toBe(
      '/bin/sh -c "echo \\"$$1\\" 100%% \\\\n" "a b"',
    );
  });

  it("refuses a value that would begin another directive", () => {
    expect(() => renderUnit({ Service: [["Description", "a\nExecStart=/bin/evil"]] })).toThrow(/line break/);
  });

  it("names a device's unit as systemd-escape does", () => {
    expect(deviceUnit("/dev/VgVm/LV-VM1")).toBe("dev-VgVm-LV\\x2dVM1.device");
    expect(deviceUnit("/dev/mapper/a+b")).toBe("dev-mapper-a\\x2bb.device");
  });

  it("names the unit of a path as systemd-escape does", () => {
    expect(pathUnit("/mnt/.vm 1/a-b", "mount")).toBe("mnt-.vm\\x201-a\\x2db.mount");
    expect(pathUnit("/.hidden", "mount")).toBe("\\x2ehidden.mount");
  });

  it("reads only our own section", () => {
    const text = renderUnit({ Service: [["Device", "wrong"]], "X-LvmNbd": [["Device", "/dev/nbd0"]] });
    expect(ownDirective(text, "Device")).toBe("/dev/nbd0");
    expect(ownDirective("[Service]\nDevice=x\n", "Device")).toBeUndefined();
  });

  it("escapes in unit names what they may not hold", () => {
    expect(unitName("export", "vm 1+a")).toBe("lvm-nbd-export-vm\\x201\\x2ba.service");
  });
});

it("reads systemctl show, values with = included", () => {
  expect(parseShow("A=1\nB=x=y\nC=\n")).toEqual({ A: "1", B: "x=y", C: "" });
});

describe("fields of a script's output", () => {
  it("carries any content", () => {
    const parsed = parseFields(fields({ a: "x\ny unit Zg==\n", end: "" }));
    expect(parsed.get("a")).toBe("x\ny unit Zg==\n");
  });

  it("does not take a cut output for an absence", () => {
    expect(() => parseFields(fields({ show: "ActiveState=inactive" }))).toThrow(/cut short/);
    expect(() => parseFields("")).toThrow(/cut short/);
  });

  it("refuses noise between the fields", () => {
    expect(() => parseFields(`motd!\n${fields({ end: "" })}`)).toThrow(/unexpected line/);
  });
});
