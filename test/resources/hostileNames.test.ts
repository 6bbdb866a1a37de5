/** Names that would be shell text, directives of units, paths elsewhere or escape codes: refused before any host is asked. */
import { describe, expect, it } from "vitest";
import { handlersOn, untouchedHost } from "../support/fakeHost.js";

type Values = Readonly<Record<string, unknown>>;

const host = {
  address: "192.0.2.1",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const declared: Readonly<Record<string, Values>> = {
  LvSnapshot: { volumeGroup: "VgVm", origin: "vm1", name: "vm1-snap", size: "8M" },
  NbdExport: { device: "/dev/VgVm/vm1", exportName: "vm1", listenAddress: "10.0.0.1", clients: ["10.0.0.2"] },
  NbdAttachment: { name: "vm1", uri: "nbd://10.0.0.1/vm1" },
  Mount: { device: "/dev/lvm-nbd/vm1", path: "/mnt/vm1" },
  VolumeCopy: { uri: "nbd://10.0.0.1/vm1", file: "/backup/vm1.raw" },
};

/** Each is refused wherever LVM, systemd or a path would take it for something else. */
const never = ["", "..", "../vm1", "a\nb", "a\0b", "\u001b[2J", "\u009b1m"];
const onlyPlain = [...never, "-n", "$(id)", "`id`", "a;b", "a b", "a'b", 'a"b', "%n", "a/b", "é", "\ud800"];

const refused: readonly [type: string, property: string, values: readonly string[]][] = [
  ["LvSnapshot", "volumeGroup", onlyPlain],
  ["LvSnapshot", "origin", onlyPlain],
  ["LvSnapshot", "name", [...onlyPlain, "snapshot1", "pvmove0", "a_cow_mlog", "x".repeat(130)]],
  ["NbdExport", "exportName", ["", "a\nb", "a\0b", "\u001b[2J", "\u009b1m", "a/b", "a]b", "[b", "\ud800"]],
  ["NbdExport", "device", [...never, "/dev/../etc/passwd", "/dev/a b", "/dev/%n", "/dev/a\\", '/dev/a"b']],
  ["NbdExport", "listenAddress", onlyPlain],
  ["NbdAttachment", "name", onlyPlain],
  [
    "NbdAttachment",
    "uri",
    [...never, "nbd://-x/vm1", "nbd://a b/vm1", "nbd://$(id)/vm1", "nbd://h/%ED%A0%80"],
  ],
  ["Mount", "path", ["", "mnt", "/mnt/../etc", "/mnt/a\nb", "/mnt/a\0b", "/mnt/\u001b[2J"]],
  ["VolumeCopy", "file", ["", "a", "/a/../b", "/a\nb", "/a\0b", "/\u001b[2J", "/dev/sda", "/a/b.part"]],
];

describe.each(refused)("a %s's %s", (type, property, values) => {
  const problemsOf = async (value: unknown) => {
    const asked = untouchedHost();
    const inputs = { host, owner: "o/p/s/vm1", ...declared[type], [property]: value };
    const { problems } = await handlersOn(type, asked).check(undefined, inputs, new Set());
    expect(asked.commands).toEqual([]);
    return problems.map((problem) => problem.property);
  };

  it("is taken as declared", async () => {
    expect(await problemsOf(declared[type]?.[property])).toEqual([]);
  });

  it.each(values.map((value) => [JSON.stringify(value), value]))("cannot be %s", async (_shown, value) => {
    expect(await problemsOf(value)).toContain(property);
  });
});

it.each(["$(id)", "`id`", "a b", "%n", "", "a\nb", "\u001b[2J", "é", "lvm-nbd.owner=o/p/s/other"])(
  "a tag cannot be %j",
  async (tag) => {
    const inputs = { host, owner: "o/p/s/vm1", ...declared.LvSnapshot, tags: [tag] };
    const { problems } = await handlersOn("LvSnapshot", untouchedHost()).check(undefined, inputs, new Set());
    expect(problems.map(({ property }) => property)).toEqual([expect.stringMatching(/^tags\b/)]);
  },
);
