import { describe, expect, it } from "vitest";
import { compareVersions, holesOf, mendedPattern, versionIn } from "../../provider/linux/versions.js";

it.each([
  ["nbdcopy 1.14.2\nlibnbd 1.14.2", "1.14.2"],
  ["This is nbd-server version 3.24", "3.24"],
  ["This is nbd-client, from nbd 3.24", "3.24"],
  ["qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", "7.2.22"],
  ["  LVM version:     2.03.16(2) (2022-05-18)\n  Library version: 1.02.185 (2022-05-18)", "2.03.16"],
  ["systemd 252 (252.39-1~deb12u2)", "252"],
  ["sh: 0: not found", "0"],
  ["", undefined],
])("%j is version %j", (text, version) => {
  expect(versionIn(text)).toBe(version);
});

it("versions are compared by number, part by part", () => {
  expect(compareVersions("1.10.4", "1.9.12")).toBeGreaterThan(0);
  expect(compareVersions("3.5", "3.24")).toBeLessThan(0);
  expect(compareVersions("3.26.1", "3.26")).toBeGreaterThan(0);
  expect(compareVersions("3.25", "3.25.0")).toBe(0);
});

describe("known holes", () => {
  const none: ReadonlySet<string> = new Set();
  const names = (program: string, version: string, mended = none) =>
    holesOf(program, version, mended).map((hole) => /(CVE-\d+-\d+|issue \d+)/.exec(hole)?.[0]);

  // As the tags of libnbd have them.
  it.each(["1.6.0", "1.6.5", "1.8.5", "1.10.3", "1.11.7", "1.5.6"])(
    "nbdcopy %s copies wrongly in silence",
    (version) => {
      expect(names("nbdcopy", version)).toEqual(["CVE-2022-0485"]);
    },
  );

  it.each(["1.6.6", "1.8.7", "1.10.4", "1.10.5", "1.11.8", "1.12.0", "1.14.2", "1.20.3"])(
    "nbdcopy %s does not",
    (version) => {
      expect(names("nbdcopy", version)).toEqual([]);
    },
  );

  it.each([
    ["3.26.1", []],
    ["3.25", []],
    ["3.24", ["issue 137"]],
    ["3.22", ["CVE-2022-26495", "issue 137"]],
    ["3.21", ["CVE-2022-26495"]],
    ["3.4", ["CVE-2022-26495", "CVE-2013-6410"]],
  ])("nbd-server %s: %j", (version, expected) => {
    expect(names("nbd-server", version)).toEqual(expected);
    for (const hole of holesOf("nbd-server", version, none)) expect(hole).toMatch(/fixed in nbd 3\.\d+$/);
  });

  it("that a distribution has mended are none, if all of one are", () => {
    expect(names("nbdcopy", "1.6.0", new Set(["CVE-2022-0485"]))).toEqual([]);
    expect(names("nbd-server", "3.21", new Set(["CVE-2022-26495"]))).toEqual(["CVE-2022-26495"]);
    expect(names("nbd-server", "3.21", new Set(["CVE-2022-26495", "CVE-2022-26496"]))).toEqual([]);
    expect(mendedPattern.split("|")).toContain("CVE-2022-0485");
  });

  it("of other programs are not known", () => {
    expect(names("nbd-client", "3.24")).toEqual([]);
  });
});
