import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  globalFilterLine,
  hidesNbd,
  parseGlobalFilter,
  withGlobalFilter,
  withoutNbd,
} from "../../provider/linux/lvmFilter.js";

const aliases = "r#^/dev/(lvm-nbd/|block/43:|disk/by-(diskseq|partuuid|partlabel|id/lvm-pv-uuid-))#";

describe("what lvmconfig says", () => {
  // As LVM 2.03.16 printed them.
  it.each([
    ['global_filter=["a|.*|"]\n', ["a|.*|"]],
    ['global_filter="r|^/dev/nbd|"\n', ["r|^/dev/nbd|"]],
    [
      '  WARNING: Ignoring duplicate config value: global_filter\nglobal_filter=["r|^/dev/slash|","a|.*|"]\n',
      ["r|^/dev/slash|", "a|.*|"],
    ],
    ['global_filter=["r|^/dev/nbd|","a|/dev/a\\"b\\\\|"]\n', ["r|^/dev/nbd|", 'a|/dev/a"b\\|']],
  ])("%j", (stdout, patterns) => {
    expect(parseGlobalFilter(stdout)).toEqual(patterns);
  });

  it("is an error where it says nothing of the filter", () => {
    for (const stdout of ["", "  Parse error at byte 45 (line 3): expected a value\n", "global_filter=[x]\n"])
      expect(() => parseGlobalFilter(stdout)).toThrow(/does not tell/);
  });

  it("is written as LVM prints it", () => {
    const pattern = fc.string({ minLength: 1 }).filter((text) => !/[\r\n\u2028\u2029]/.test(text));
    fc.assert(
      fc.property(fc.array(pattern, { minLength: 1 }), (patterns) => {
        expect(parseGlobalFilter(globalFilterLine(patterns))).toEqual(patterns);
      }),
    );
    expect(globalFilterLine(["r|^/dev/nbd|"])).toBe('global_filter="r|^/dev/nbd|"');
  });
});

describe("NBD devices are hidden", () => {
  it.each([
    [["r|^/dev/nbd|"], true],
    [["r|^/dev/nbd.*|"], true],
    [["r/nbd/", "r/disk/", "r/block/", "a|^/dev/sd|"], true],
    [["a|^/dev/vd|", "r|.*|"], true],
    [["a{^/dev/vd}", "r{.*}"], true],
    [["a|.*|"], false],
    [[], false],
    // As was seen with LVM 2.03.16: an alias is accepted, so the device is.
    [["r|^/dev/nbd|", "a|.*|"], false],
    [["r|^/dev/nbd|", "a|/dev/disk/by-id/|"], false],
    [["r|^/dev/nbd0$|"], false],
    // What cannot be read here decides nothing.
    [["r|^/dev/(nbd|", "r|x"], false],
  ])("%j: %j", (patterns, hidden) => {
    expect(hidesNbd(patterns)).toBe(hidden);
  });

  it.each([
    [["a|.*|"], ["r|^/dev/nbd|"]],
    [["r|^/dev/sdz|"], ["r|^/dev/nbd|", "r|^/dev/sdz|"]],
    [
      ["r|^/dev/sdz|", "a|.*|"],
      ["r|^/dev/nbd|", "r|^/dev/sdz|", aliases, "a|.*|"],
    ],
    // A name that is accepted before stays so.
    [
      ["a|/dev/disk/by-partuuid/0a|", "a|/dev/disk/|", "r|.*|"],
      ["r|^/dev/nbd|", "a|/dev/disk/by-partuuid/0a|", aliases, "a|/dev/disk/|", "r|.*|"],
    ],
    [
      ["a|^/dev/vd|", "r|.*|"],
      ["a|^/dev/vd|", "r|.*|"],
    ],
  ])("%j becomes %j", (patterns, merged) => {
    expect(withoutNbd(patterns)).toEqual(merged);
    expect(hidesNbd(merged)).toBe(true);
    expect(withoutNbd(merged)).toEqual(merged);
  });
});

describe("lvmlocal.conf", () => {
  const filter = ["r|^/dev/nbd|", 'a|"\\|'];
  const list = '[ "r|^/dev/nbd|", "a|\\"\\\\|" ]';
  const section = `devices {\n\tglobal_filter = ${list}\n}\n`;

  it("gets a section at its end, on a line of its own, with a word on whose it is", () => {
    for (const text of ["", "local {\n}\n", "# without a newline"]) {
      const written = withGlobalFilter(text, filter);
      expect(written.startsWith(text)).toBe(true);
      expect(written).toMatch(/(^|\n)# Written by HostSetup of lvm-nbd/);
      expect(written.endsWith(section)).toBe(true);
    }
  });

  it.each([
    [
      'devices {\n\tglobal_filter = [ "a|x|" ] # mine\n}\n',
      `devices {\n\tglobal_filter = ${list} # mine\n}\n`,
    ],
    ['devices/global_filter="a|x|"\n', `devices/global_filter=${list}\n`],
    [
      'devices { # global_filter = [ "no" ]\nglobal_filter=[\n "a|]|", # ] not yet\n "r|y|"\n]}\n',
      `devices { # global_filter = [ "no" ]\nglobal_filter=${list}}\n`,
    ],
    // The last one counts.
    [
      'devices { global_filter = "a" global_filter = "b" }',
      `devices { global_filter = "a" global_filter = ${list} }`,
    ],
  ])("has the setting of its own replaced: %j", (text, expected) => {
    expect(withGlobalFilter(text, filter)).toBe(expected);
  });

  it("in a comment or a string the setting is none", () => {
    for (const text of ['# global_filter = [ "a" ]\n', 'tags { x = "global_filter = \\"a\\"" }\n'])
      expect(withGlobalFilter(text, filter)).toMatch(/\ndevices \{/);
  });
});
