import { describe, expect, it } from "vitest";
import { parseLvs } from "../../provider/linux/lvm.js";
import { recordedLvs } from "../support/recorded.js";

const named = (state: Parameters<typeof recordedLvs>[0], name: string) =>
  parseLvs(recordedLvs(state)).find((lv) => lv.name === name);

describe("the recorded report", () => {
  it("of a volume group without volumes is an empty list", () => {
    expect(parseLvs(recordedLvs("empty"))).toEqual([]);
  });

  it("tells a valid COW snapshot: its store's size, its origin, its tags", () => {
    expect(named("valid", "vm1-snap")).toMatchObject({
      kind: "cow",
      origin: "vm1",
      active: true,
      open: false,
      invalid: false,
      merging: false,
      readOnly: true,
      sizeBytes: 16 * 1024 ** 2,
      originSizeBytes: 64 * 1024 ** 2,
      tags: ["lvm-nbd.owner=o/p/s/vm1", "mine"],
      path: "/dev/VgVm/vm1-snap",
    });
    expect(named("valid", "vm1")).toMatchObject({ kind: "other", readOnly: false });
    expect(named("valid", "vm1-snap")?.originUuid).toBe(named("valid", "vm1")?.uuid);
  });

  it("tells an overflowed snapshot though LVM calls it active", () => {
    expect(named("overflowed", "vm1-snap")).toMatchObject({ invalid: true, usedPercent: 100, active: true });
  });

  it("tells a merge that waits for its origin to be closed", () => {
    expect(named("merging", "vm1-snap")).toMatchObject({ kind: "cow", merging: true });
    expect(named("merging", "vm1")).toMatchObject({ open: true, attr: expect.stringMatching(/^O/) });
  });

  it("does not claim to know whether an inactive volume is open or broken", () => {
    expect(named("inactive", "vm1-snap")).toMatchObject({
      active: false,
      open: undefined,
      invalid: false,
      readOnly: true,
    });
  });

  it("tells a thin snapshot and keeps a pool's inner volumes apart", () => {
    expect(named("thin", "thin1-snap")).toMatchObject({ kind: "thin", origin: "thin1", pool: "pool" });
    expect(named("thin", "pool")).toMatchObject({ kind: "pool", health: "" });
    expect(named("thin", "pool_tdata")).toMatchObject({ kind: "internal" });
  });

  it.each([
    ["has a COW snapshot of its own", "owi-aotz--"],
    ["is merged into", "Owi-aotz--"],
    ["is inactive", "Vwi---tz--"],
  ])("tells a thin volume that %s from others", (_what, attr) => {
    const report = recordedLvs("thin").replace('"lv_attr":"Vwi-a-tz--"', `"lv_attr":"${attr}"`);
    expect(parseLvs(report).find((lv) => lv.name === "thin1")).toMatchObject({ attr, kind: "thin" });
  });

  it("tells a thin snapshot that is being merged from a COW one", () => {
    const report = recordedLvs("thin").replace('"lv_attr":"Vri-a-tz--"', '"lv_attr":"Sri-a-tz--"');
    expect(parseLvs(report).find((lv) => lv.name === "thin1-snap")).toMatchObject({
      kind: "thin",
      merging: true,
    });
  });

  it("tells a full pool by the pool's own row", () => {
    expect(named("poolFull", "pool")).toMatchObject({ health: "out_of_data" });
  });
});

describe("a report that holds more than rows", () => {
  const plain = recordedLvs("valid");

  it("is read past LVM's log beside it (log/report_command_log=1), whatever that says", () => {
    const log =
      '"log": [{"log_seq_num":"1", "log_message":"{\\"a\\":\\"}{\\"}"}, {"log_seq_num":"2", "log_message":""}]';
    const end = plain.lastIndexOf("}");
    expect(parseLvs(`${plain.slice(0, end)}, ${log} }`)).toEqual(parseLvs(plain));
    expect(parseLvs(plain.replace("{", `{ ${log},`))).toEqual(parseLvs(plain));
  });

  it("is read in one line, and with braces and quotes in a value", () => {
    const one = plain.replaceAll("\n", " ");
    expect(parseLvs(one)).toEqual(parseLvs(plain));
    const odd = plain.replace('"lv_health_status":""', '"lv_health_status":"{\\"lv_uuid\\":\\"}"');
    expect(parseLvs(odd)[0]?.health).toBe('{"lv_uuid":"}');
    expect(parseLvs(odd)).toHaveLength(parseLvs(plain).length);
  });
});

describe("anything else", () => {
  it.each([
    ["nothing", ""],
    ["no JSON", "Segmentation fault"],
    ["another shape", '{"report":[{"vg":[]}]}'],
    ["no report", '{"report":[]}'],
    ["a cut answer", recordedLvs("valid").slice(0, 400)],
    ["a number for a row", recordedLvs("valid").replace(/\{"lv_uuid[^}]*\}/, "0")],
    ["a list for a row", recordedLvs("valid").replace(/\{"lv_uuid[^}]*\}/, "[0]")],
    ["rows that nothing divides", recordedLvs("valid").replace(/\}\s*,/, "}")],
    ["something before a row", recordedLvs("valid").replace('{"lv_uuid', '1{"lv_uuid')],
    ["a missing field", recordedLvs("valid").replaceAll('"lv_attr"', '"attr"')],
    ["a size that is none", recordedLvs("valid").replaceAll('"lv_size":"', '"lv_size":"x')],
  ])("is an error, never an absence: %s", (_what, stdout) => {
    expect(() => parseLvs(stdout)).toThrow();
  });
});
