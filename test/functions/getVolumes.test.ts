import { describe, expect, it } from "vitest";
import { askFunction } from "../../provider/core/functions.js";
import { getVolumes } from "../../provider/functions/getVolumes.js";
import { type Answer, fakeHost } from "../support/fakeHost.js";
import { recordedLvs } from "../support/recorded.js";

const host = {
  address: "192.0.2.1",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};

async function ask(lvs: Answer, args: object = {}, group: Answer = "  VgVm\n") {
  const asked = fakeHost(({ argv }) => (argv[0] === "lvs" ? lvs : group));
  const answer = await askFunction(
    getVolumes,
    { host, ...args },
    {
      openHost: async () => asked,
      progress: () => undefined,
      warn: () => undefined,
      signal: new AbortController().signal,
    },
  );
  expect(asked.changes).toEqual([]);
  return "values" in answer ? answer.values.volumes : answer.problems;
}

describe("the volumes of a host", () => {
  it("are told with what they are, a snapshot with its origin", async () => {
    expect(await ask(recordedLvs("valid"))).toEqual([
      expect.objectContaining({ name: "vm1", volumeGroup: "VgVm", kind: "other" }),
      {
        ...{ name: "vm1-snap", volumeGroup: "VgVm", uuid: "ua3XsD-JfZg-sm4f-mixX-TEqj-5JCI-nnYZE4" },
        ...{ sizeBytes: 16777216, origin: "vm1", kind: "cow" },
      },
    ]);
  });

  it("are told without the parts of a pool", async () => {
    const volumes = (await ask(recordedLvs("thin"))) as { name: string; kind: string }[];
    expect(new Set(volumes.map(({ kind }) => kind))).toEqual(new Set(["pool", "thin"]));
    expect(volumes.map(({ name }) => name).join()).not.toMatch(/_t(data|meta)/);
  });

  it("are told of one group alone where that is asked", async () => {
    const [first] = (JSON.parse(recordedLvs("valid")) as { report: { lv: object[] }[] }).report;
    const other = { ...first?.lv[0], vg_name: "VgOther", lv_name: "data" };
    const both = JSON.stringify({ report: [{ lv: [...(first?.lv ?? []), other] }] });
    expect(await ask(both)).toHaveLength(3);
    expect(await ask(both, { volumeGroup: "VgOther" })).toEqual([
      expect.objectContaining({ volumeGroup: "VgOther", name: "data" }),
    ]);
  });

  it("are none in a group without any, and an error in a group that is not there", async () => {
    expect(await ask(recordedLvs("empty"), { volumeGroup: "VgVm" })).toEqual([]);
    const gone = { exitCode: 5, stderr: '  Volume group "VgVm" not found\n' };
    await expect(ask(recordedLvs("empty"), { volumeGroup: "VgVm" }, gone)).rejects.toThrow(
      /VOLUME_GROUP_NOT_FOUND: getVolumes on host server1/,
    );
  });

  it("are an error where LVM's answer cannot be read, and no empty list", async () => {
    await expect(ask("{}")).rejects.toThrow(/OUTPUT_UNREADABLE: getVolumes/);
    const answer = { stdout: "{}", stderr: "  WARNING: a metadata area is damaged" };
    await expect(ask(answer)).rejects.toThrow(/metadata area is damaged/);
  });

  it("are not asked of what is no group", async () => {
    expect(await ask(recordedLvs("valid"), { volumeGroup: "-a" })).toEqual([
      { property: "volumeGroup", reason: expect.stringContaining('must not begin with "-"') },
    ]);
  });
});
