import { describe, expect, it } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { generationMark, ownerMark } from "../../provider/core/owner.js";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { restoreTagOf } from "../../provider/core/restoreMark.js";
import type { RemoteCommand } from "../../provider/ssh/types.js";
import { type Answer, fakeHost, handlersOn, untouchedHost } from "../support/fakeHost.js";
import { machineId } from "../support/machineId.js";
import { recordedLvs, suitableOrigins } from "../support/recorded.js";

const MiB = 1024 ** 2;
const host = {
  address: "192.0.2.1",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const declared = {
  host,
  owner: "o/p/s/vm1",
  volumeGroup: "VgVm",
  origin: "vm1",
  name: "vm1-snap",
  size: "16M",
  tags: ["mine"],
};
const none: ReadonlySet<string> = new Set();

async function problems(change: object, old?: object): Promise<string[]> {
  const asked = untouchedHost();
  const checked = await handlersOn("LvSnapshot", asked).check(
    old === undefined ? undefined : { adopt: false, readOnly: true, chunkSize: 65536, ...declared, ...old },
    { ...declared, ...change },
    none,
  );
  expect(asked.commands).toEqual([]);
  return checked.problems.map(({ property, reason }) => `${property}: ${reason}`);
}

describe("bad input is refused before any host is asked", () => {
  it.each([
    ["a name with a character LVM refuses", { name: "a b" }, /^name: .*letters, digits/],
    ["a name that begins with a dash", { name: "-a" }, /^name: .*begin with "-"/],
    ["a name that begins with snapshot", { name: "snapshot1" }, /^name: .*reserved/],
    ["a name that begins with pvmove", { name: "pvmove1" }, /^name: .*reserved/],
    ["a name with a reserved part", { name: "a_tmeta" }, /^name: .*"_tmeta"/],
    ["a name that is ..", { name: ".." }, /^name: .*not a name/],
    [
      "a name whose device-mapper name would not fit",
      { name: "-".repeat(0) + "a-".repeat(45) },
      /^name: .*127 fit/,
    ],
    ["the origin's name as the snapshot's", { name: "vm1" }, /^name: .*origin's name/],
    ["a volume group name LVM refuses", { volumeGroup: "Vg/Vm" }, /^volumeGroup: /],
    ["an empty origin", { origin: "" }, /^origin: must not be empty/],
    ["a size without a unit that cannot be meant", { size: 10 }, /^size: .*write a unit, e\.g\. "10G"/],
    ["a size that is none", { size: "big" }, /^size: .*not a size/],
    ["a share of 0 %", { size: "0%ORIGIN" }, /^size: .*at least 1/],
    ["a chunk size that is no power of 2", { chunkSize: 5000 }, /^chunkSize: .*power of 2/],
    ["a chunk size that is none", { chunkSize: "big" }, /^chunkSize: .*"big".*e\.g\. "64K"/],
    ["a chunk size that is too large", { chunkSize: "1M" }, /^chunkSize: .*512K/],
    ["a tag LVM refuses", { tags: ["a b"] }, /^tags\.0: .*refuses in tags/],
    ["a tag with the provider's own mark", { tags: ["lvm-nbd.owner=me"] }, /^tags: .*mark of this provider/],
    ["an unknown property", { sizee: "1G" }, /^sizee: is no property/],
    ["an unknown property of the host", { host: { ...host, adress: "x" } }, /^host\.adress: is no property/],
    ["a host's port out of range", { host: { ...host, port: 70000 } }, /^host\.port: /],
    ["quiesce without thaw", { quiesce: { freeze: "true" } }, /^quiesce\.thaw: is required/],
    [
      "an unreadable key",
      { host: { address: "192.0.2.1", privateKeyPath: "/nonexistent/key" } },
      /^host\.privateKeyPath: .*KEY_UNREADABLE/,
    ],
    ["an unknown host alias", { host: "no-such-host.invalid" }, /^host: .*HOST_UNKNOWN/],
    [
      "a malformed pin",
      { host: { address: "192.0.2.1", password: "x", hostKey: "abc" } },
      /^host\.hostKey: .*not a host key/,
    ],
  ])("%s", async (_what, change, message) => {
    expect(await problems(change)).toEqual([expect.stringMatching(message)]);
  });

  it.each(["host", "volumeGroup", "origin"])("a missing %s", async (property) => {
    expect(await problems({ [property]: undefined })).toContain(`${property}: is required`);
  });

  it("a shrinking size at preview, unless a new snapshot is asked for by triggers", async () => {
    expect(await problems({ size: "8M" }, { triggers: [] })).toEqual([
      expect.stringMatching(/^size: .*cannot shrink.*`triggers`/),
    ]);
    expect(await problems({ size: "10%ORIGIN" }, { size: "20%ORIGIN", triggers: [] })).toEqual([
      expect.stringMatching(/cannot shrink/),
    ]);
    expect(await problems({ size: "8M", triggers: ["new"] }, { triggers: [] })).toEqual([]);
    expect(await problems({ size: "32M" }, { triggers: [] })).toEqual([]);
  });

  it.each([
    ["other credentials", { host: { ...host, password: "rotated" } }],
    ["the chunk size written otherwise", { chunkSize: "64K" }],
    ["another name", { name: "vm1-other" }],
  ])("a shrinking size also beside %s, which takes no new snapshot by itself", async (_what, change) => {
    expect(await problems({ size: "8M", ...change }, { triggers: [] })).toEqual([
      expect.stringMatching(/^size: .*cannot shrink/),
    ]);
  });

  it.each([
    ["another host", { host: { ...host, address: "192.0.2.9" } }],
    ["another volume group", { volumeGroup: "VgOther" }],
    ["another origin", { origin: "vm2" }],
    ["another chunk size", { chunkSize: "4K" }],
  ])("not a smaller size beside %s, which takes a new snapshot anyway", async (_what, change) => {
    expect(await problems({ size: "8M", ...change }, { triggers: [] })).toEqual([]);
  });

  it("not a smaller size while it is not known yet whether the triggers change", async () => {
    const { problems: found } = await handlersOn("LvSnapshot", untouchedHost()).check(
      { ...declared, adopt: false, readOnly: true, chunkSize: 65536 },
      { ...declared, size: "8M" },
      new Set(["triggers"]),
    );
    expect(found).toEqual([]);
  });

  it("nothing of it holds for good input, and defaults are filled in", async () => {
    const checked = await handlersOn("LvSnapshot", untouchedHost()).check(undefined, declared, none);
    expect(checked.problems).toEqual([]);
    expect(checked.inputs).toMatchObject({ readOnly: true, chunkSize: 65536, triggers: [], adopt: false });
    expect(checked.predicted).toEqual({ path: "/dev/VgVm/vm1-snap" });
  });

  it("what is not known yet is not judged", async () => {
    const { origin: _, ...rest } = declared;
    const { problems: found } = await handlersOn("LvSnapshot", untouchedHost()).check(
      undefined,
      rest,
      new Set(["origin"]),
    );
    expect(found).toEqual([]);
  });
});

/** A host whose volumes are as recorded; changing commands succeed and change nothing. */
function recordedHost(
  state: Parameters<typeof recordedLvs>[0],
  edit: (report: string) => string = (report) => report,
) {
  return fakeHost(({ kind, argv }) => {
    const report = edit(recordedLvs(state));
    if (argv[0] === "vgs") return vgs(report, argv.at(-1));
    return kind === "read" ? report : "";
  });
}

/** What vgs tells of a group: it is there unless there are volumes, all of others. */
function vgs(report: string, group: string | undefined): Answer {
  if (!report.includes('"vg_name"') || report.includes(`"vg_name":"${group}"`)) return `  ${group}\n`;
  return { exitCode: 5, stderr: `  Volume group "${group}" not found\n` };
}

/** Beside what is there, its clone: what vgimportclone(8) makes of a copy of the disk, listed first. */
function withClone(report: string): string {
  const own: { report: [{ lv: Record<string, string>[] }] } = JSON.parse(report);
  const [{ lv }] = own.report;
  const clones = lv.map((row) => ({
    ...row,
    vg_name: "VgClone",
    lv_path: row.lv_path?.replace("VgVm", "VgClone"),
    lv_dm_path: row.lv_dm_path?.replace("VgVm", "VgClone"),
  }));
  return JSON.stringify({ report: [{ lv: [...clones, ...lv] }] });
}

const complete = { adopt: false, readOnly: true, chunkSize: 65536, triggers: [], ...declared };

/** The state that a read of the recorded snapshot gives. */
async function stateOf(state: Parameters<typeof recordedLvs>[0], edit?: (report: string) => string) {
  const uuid = /"lv_uuid":"([^"]+)"[^}]*"lv_name":"(?:vm1|thin1)-snap"/.exec(
    recordedLvs(state === "empty" ? "valid" : state),
  )?.[1];
  const kept = {
    ...complete,
    uuid,
    path: "/dev/VgVm/vm1-snap",
    sizeBytes: 16 * MiB,
    originSizeBytes: 64 * MiB,
    originUuid: "",
    createdAt: "",
    usedPercent: 0,
    state: "valid",
  };
  const handlers = handlersOn("LvSnapshot", recordedHost(state, edit));
  return { read: await handlers.read(kept), warnings: handlers.warnings, kept };
}

/** As while a script takes the snapshot, or as one that was killed has left it. */
const making = recordedLvs("valid").replace(
  ',mine"',
  `,mine,${generationMark(["vm1", 65536, []])},lvm-nbd.making"`,
);
const quiesce = { freeze: "true", thaw: "true", timeoutSeconds: 5 };

describe("what is left of a quiesced snapshot that was cut off", () => {
  const asked = () => fakeHost(({ kind }) => (kind === "read" ? making : { exitCode: 143 }));
  const wanted = { ...complete, quiesce };

  it("stays in the state, through a refresh too, and the next up takes it anew", async () => {
    const failure = await handlersOn("LvSnapshot", asked())
      .create(wanted)
      .catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(PartialFailure);
    const { state } = failure as PartialFailure;
    expect(state).toMatchObject({ state: "unfinished", name: "vm1-snap" });
    const read = await handlersOn("LvSnapshot", asked()).read(state);
    expect(read).toEqual(state);
    const { changes } = await handlersOn("LvSnapshot", asked()).diff(state, wanted, none);
    expect(changes).toEqual([{ property: "state", effect: "update" }]);
  });

  it("is kept, and no VM frozen again, where the script that takes it goes on and says that it is made", async () => {
    let waited = false;
    const host = fakeHost(({ kind }) => {
      if (kind === "change") waited = true;
      return waited ? making.replace(",lvm-nbd.making", "") : making;
    });
    const { state } = await handlersOn("LvSnapshot", host).create(wanted);
    expect(state).toMatchObject({ state: "valid" });
    expect(host.changes.map(({ argv }) => argv[4])).toEqual(["/run/lvm-nbd-quiesce.VgVm.vm1"]);
  });

  it("is left as it is while a script that does not end has it locked", async () => {
    const host = fakeHost(({ kind }) =>
      kind === "read" ? making : { exitCode: 1, stderr: "is being taken" },
    );
    await expect(handlersOn("LvSnapshot", host).create(wanted)).rejects.toThrow(/is being taken/);
    expect(host.changes).toHaveLength(1);
  });

  it("is removed with the resource", async () => {
    const { lv_uuid: uuid } = JSON.parse(making).report[0].lv.find(
      (lv: { lv_name: string }) => lv.lv_name === "vm1-snap",
    );
    let removed = false;
    const host = fakeHost(({ kind }) => {
      if (kind === "change") removed = true;
      return removed ? recordedLvs("empty") : making;
    });
    const { kept } = await stateOf("valid");
    await handlersOn("LvSnapshot", host).remove({ ...kept, ...wanted, uuid, state: "unfinished" });
    expect(host.changes.map(programOf)).toEqual(["lvremove"]);
  });
});

describe("create looks first", () => {
  const create = (state: Parameters<typeof recordedLvs>[0], change: object) => {
    const asked = recordedHost(state);
    return { asked, made: handlersOn("LvSnapshot", asked).create({ ...complete, ...change }) };
  };

  it.each([
    [
      "an origin that is itself a snapshot",
      "valid",
      { origin: "vm1-snap", name: "x" },
      /ORIGIN_UNSUITABLE.*itself a snapshot, of "vm1"/s,
    ],
    [
      "an origin that does not exist",
      "valid",
      { origin: "vm2", name: "x" },
      /ORIGIN_NOT_FOUND.*there are: "vm1"/s,
    ],
    [
      "a volume group that does not exist",
      "valid",
      { volumeGroup: "VgX", name: "x" },
      /VOLUME_GROUP_NOT_FOUND.*there are: "VgVm"/s,
    ],
    [
      "a COW size missing for a thick origin",
      "valid",
      { name: "x", size: undefined },
      /ORIGIN_UNSUITABLE.*needs a size, e\.g\. size: "20%ORIGIN"/s,
    ],
    ["an origin that is being merged into", "merging", { name: "x" }, /ORIGIN_UNSUITABLE.*being merged/s],
    [
      "an origin that is a thin pool",
      "thin",
      { origin: "pool", name: "x", size: undefined },
      /ORIGIN_UNSUITABLE.*thin pool/s,
    ],
  ] as const)("%s is refused and nothing is changed", async (_what, state, change, message) => {
    const { asked, made } = create(state, change);
    await expect(made).rejects.toThrow(message);
    expect(asked.changes).toEqual([]);
  });

  it("an origin that somebody's restore from an image has left half-written is refused, also to adopt", async () => {
    const mark = restoreTagOf({
      ...{ generation: "0123456789ab", life: "0123abcd", stage: "writing", startedAt: 1000, seconds: 0 },
      ...{ thinId: 0, source: "a".repeat(64), owner: "o/p/other/r" },
    });
    const marked = (report: string) => report.replace('"lv_tags":""', `"lv_tags":"theirs,${mark}"`);
    const message =
      /ORIGIN_UNSUITABLE.*VgVm\/vm1 is HALF-WRITTEN by o\/p\/other\/r, .*Use nothing of it until .* `pulumi up`/s;
    for (const [state, change] of [
      ["valid", { name: "x" }],
      ["overflowed", {}],
      ["inactive", { adopt: true }],
    ] as const) {
      const asked = recordedHost(state, marked);
      const made = handlersOn("LvSnapshot", asked).create({ ...complete, ...change });
      await expect(made, state).rejects.toThrow(message);
      expect(asked.changes).toEqual([]);
    }
    // What was taken before that is good, also where its resource was renamed.
    await handlersOn("LvSnapshot", recordedHost("valid", marked)).create(complete);
    const { kept } = await stateOf("valid");
    const asked = recordedHost("valid", marked);
    await handlersOn("LvSnapshot", asked)
      .update(kept, { ...complete, owner: "o/p/s/renamed" })
      .catch(() => undefined);
    expect(asked.changes.map(({ argv }) => argv.join(" ")).join()).toContain(ownerMark("o/p/s/renamed"));
  });

  it("an origin that does not exist among many is told with a few of them", async () => {
    const asked = fakeHost(() => {
      const report: { report: { lv: { lv_name: string }[] }[] } = JSON.parse(recordedLvs("valid"));
      for (const { lv } of report.report)
        lv.push(
          ...lv.flatMap((row) => [1, 2, 3, 4, 5].map((n) => ({ ...row, lv_name: `${row.lv_name}-${n}` }))),
        );
      return JSON.stringify(report);
    });
    await expect(
      handlersOn("LvSnapshot", asked).create({ ...complete, origin: "vm9", name: "x" }),
    ).rejects.toThrow(/ORIGIN_NOT_FOUND.*"vm1", "vm1-1", .* and 4 more/s);
    expect(asked.changes).toEqual([]);
  });

  it("another owner's snapshot of that name is refused with its owner named", async () => {
    const { asked, made } = create("valid", { owner: "o/p/s/other" });
    await expect(made).rejects.toThrow(/FOREIGN_RESOURCE.*belongs to o\/p\/s\/vm1/s);
    expect(asked.changes).toEqual([]);
  });

  it("adopt does not take another owner's", async () => {
    const { asked, made } = create("valid", { owner: "o/p/s/other", adopt: true });
    await expect(made).rejects.toThrow(/FOREIGN_RESOURCE/);
    expect(asked.changes).toEqual([]);
  });

  it("an unmarked one is refused, and taken over with adopt", async () => {
    const { asked, made } = create("inactive", {});
    await expect(made).rejects.toThrow(/FOREIGN_RESOURCE.*no owner mark.*adopt: true/s);
    expect(asked.changes).toEqual([]);
    const adopted = create("inactive", { adopt: true });
    await adopted.made;
    expect(adopted.asked.changes.map(({ argv }) => argv.join(" "))).toEqual([
      expect.stringContaining(`--addtag ${ownerMark("o/p/s/vm1")}`),
    ]);
  });

  it("a volume that is no snapshot is never taken over", async () => {
    const { asked, made } = create("valid", { name: "vm1", origin: "x", adopt: true });
    await expect(made).rejects.toThrow(/FOREIGN_RESOURCE.*not a snapshot/s);
    expect(asked.changes).toEqual([]);
  });

  it("its own of an interrupted run is found and nothing is changed where all is right", async () => {
    const generation = generationMark(["vm1", 65536, []]);
    const asked = recordedHost("valid", (report) => report.replace(',mine"', `,mine,${generation}"`));
    const { state } = await handlersOn("LvSnapshot", asked).create(complete);
    expect(asked.changes).toEqual([]);
    expect(state).toMatchObject({ state: "valid", sizeBytes: 16 * MiB, tags: ["mine"] });
  });

  it("its own that lvcreate left half made, a plain volume, is taken anew", async () => {
    const asked = recordedHost("valid", (report) => asPlain(report, ",mine,lvm-nbd.making"));
    await expect(handlersOn("LvSnapshot", asked).create(complete)).rejects.toThrow(/it was made, but/);
    expect(asked.changes.map(programOf).slice(0, 2)).toEqual(["lvremove", "lvcreate"]);
  });

  it("its own that was cut off before it was known to be of a frozen VM is taken anew", async () => {
    const changesOf = async (more: Record<string, unknown>) => {
      const asked = fakeHost(({ kind }) => (kind === "read" ? making : {}));
      await handlersOn("LvSnapshot", asked)
        .create({ ...complete, ...more })
        .catch(() => undefined);
      return asked.changes;
    };
    const [wait, first, second] = await changesOf({ quiesce });
    expect(wait?.argv.slice(4)).toEqual(["/run/lvm-nbd-quiesce.VgVm.vm1", "150"]);
    expect(first?.argv.slice(0, 1)).toEqual(["lvremove"]);
    expect(second?.argv).toContain("VgVm");
    expect((await changesOf({})).map(({ argv }) => argv[0])).toEqual(["lvchange"]);
  });

  it("a plain volume that carries its marks, as of a snapshot that was split off, is left alone", async () => {
    const marks = `,mine,${generationMark(["vm1", 65536, []])}`;
    const asked = recordedHost("valid", (report) => asPlain(report, marks));
    await expect(handlersOn("LvSnapshot", asked).create(complete)).rejects.toThrow(
      /FOREIGN_RESOURCE.*not a snapshot/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("its own of other triggers stays when a new one could not be taken", async () => {
    const stale = generationMark(["vm1", 65536, ["yesterday"]]);
    const asked = recordedHost("valid", (report) =>
      // A merge into the origin is running.
      report.replace(',mine"', `,mine,${stale}"`).replace('"owi-a-s---"', '"Owi-a-s---"'),
    );
    await expect(handlersOn("LvSnapshot", asked).create(complete)).rejects.toThrow(/ORIGIN_UNSUITABLE/);
    expect(asked.changes).toEqual([]);
  });

  it.each([
    ["the origin", '"owi-a-s---"', '"owi-s-s---"', "VgVm/vm1"],
    ["the snapshot", '"sri-a-s---"', '"sri-s-s---"', "VgVm/vm1-snap"],
  ])(
    "%s that stands still, since an LVM command was killed, is an error that says how to go on",
    async (_, from, to, path) => {
      const asked = recordedHost("valid", (report) => report.replace(from, to));
      await expect(handlersOn("LvSnapshot", asked).create(complete)).rejects.toThrow(
        new RegExp(`VOLUME_SUSPENDED.*lvchange --refresh ${path}\\b.* NOW`, "s"),
      );
      expect(asked.changes).toEqual([]);
    },
  );

  it("its own of other triggers is taken anew", async () => {
    const stale = generationMark(["vm1", 65536, ["yesterday"]]);
    const asked = recordedHost("valid", (report) => report.replace(',mine"', `,mine,${stale}"`));
    await handlersOn("LvSnapshot", asked).create(complete);
    expect(asked.changes.map(programOf)).toEqual(["lvremove", "lvcreate"]);
  });

  it("its own of other triggers that cannot be taken anew is never kept as what was just declared", async () => {
    const stale = generationMark(["vm1", 65536, ["yesterday"]]);
    const seen = recordedHost("valid", (report) => report.replace(',mine"', `,mine,${stale}"`));
    const run: typeof seen.run = async (command, signal) =>
      programOf(command) === "lvremove"
        ? { exitCode: 5, stdout: "", stderr: "Logical volume VgVm/vm1-snap in use." }
        : seen.run(command, signal);
    const failure = await handlersOn("LvSnapshot", { ...seen, run })
      .create(complete)
      .catch((error: unknown) => error);
    expect(failure).not.toBeInstanceOf(PartialFailure);
    expect(String(failure)).toMatch(/VOLUME_IN_USE/);
  });
});

/** The program that a command is about: a script that takes a snapshot runs lvcreate. */
function programOf({ argv }: RemoteCommand): string | undefined {
  return argv.map((argument) => /^'?(lv[a-z]+)\b/.exec(argument)?.[1]).find((program) => program);
}

/** The recorded snapshot as a plain volume, with these tags beside its owner's. */
function asPlain(report: string, tags: string): string {
  const parsed: { report: { lv: Record<string, string>[] }[] } = JSON.parse(
    report.replace(',mine"', `${tags}"`),
  );
  const row = parsed.report[0]?.lv.find(({ lv_name }) => lv_name === "vm1-snap");
  Object.assign(row ?? {}, {
    lv_attr: "-wi-a-----",
    origin: "",
    origin_uuid: "",
    origin_size: "",
    lv_role: "public",
  });
  return JSON.stringify(parsed);
}

describe("refresh", () => {
  it("a snapshot that was split off is an error, and not gone", async () => {
    const { kept } = await stateOf("valid");
    const asked = recordedHost("valid", (report) => asPlain(report, ",mine"));
    await expect(handlersOn("LvSnapshot", asked).read(kept)).rejects.toThrow(
      /IDENTITY_MISMATCH.*split off.*lvconvert -s/s,
    );
  });

  it("finds no drift in a fill level", async () => {
    const { read, kept, warnings } = await stateOf("valid");
    expect(warnings).toEqual([]);
    const { changes } = await handlersOn("LvSnapshot", untouchedHost()).diff(
      { ...read, usedPercent: 55 },
      complete,
      none,
    );
    expect(changes).toEqual([]);
    expect(read).toMatchObject({ ...kept, originUuid: expect.any(String), createdAt: expect.any(String) });
  });

  it.each([
    ["overflowed", "overflowed", "replace"],
    ["inactive", "inactive", undefined],
  ] as const)("tells %s and what up will do", async (recorded, state, effect) => {
    const { read, warnings } = await stateOf(recorded);
    expect(read).toMatchObject({ state });
    expect(warnings).toContainEqual(expect.stringContaining(`is now ${state}`));
    const { changes } = await handlersOn("LvSnapshot", recordedHost(recorded)).diff(
      { ...read },
      { ...complete, tags: read?.tags },
      none,
    );
    // An inactive COW snapshot is inactive with its origin, and activating the VM's volume is not ours to do.
    expect(changes).toEqual(effect === undefined ? [] : [{ property: "state", effect }]);
  });

  it("tells a merge", async () => {
    expect((await stateOf("merging")).read).toMatchObject({ state: "merging" });
  });

  it("tells a full pool", async () => {
    const uuid = /"lv_uuid":"([^"]+)"[^}]*"lv_name":"thin1-snap"/.exec(recordedLvs("poolFull"))?.[1];
    const { read } = await stateOf("poolFull");
    expect(uuid).toBeDefined();
    expect(read).toMatchObject({ state: "poolFull", uuid });
  });

  it("tells a renamed volume group, in which it is found by its UUID", async () => {
    const { read, warnings } = await stateOf("valid", (report) =>
      report.replaceAll('"vg_name":"VgVm"', '"vg_name":"VgElse"'),
    );
    expect(read).toMatchObject({ volumeGroup: "VgElse" });
    expect(warnings).toEqual([expect.stringContaining("its volume group is now VgElse")]);
  });

  describe("beside a clone of the group's disk", () => {
    const cloned = (edit: (report: string) => string = (report) => report) =>
      edit(withClone(recordedLvs("valid")));
    const withoutOwn = (report: string) => {
      const {
        report: [{ lv }],
      }: { report: [{ lv: Record<string, string>[] }] } = JSON.parse(report);
      const left = lv.filter(({ vg_name, lv_name }) => vg_name !== "VgVm" || lv_name !== "vm1-snap");
      return JSON.stringify({ report: [{ lv: left }] });
    };

    it("is the one in its own group, and only that is removed", async () => {
      const { read, warnings, kept } = await stateOf("valid", () => cloned());
      expect(read).toMatchObject({ volumeGroup: "VgVm" });
      expect(warnings).toEqual([]);
      const asked = recordedHost("valid", (report) =>
        asked.changes.length > 0 ? withoutOwn(withClone(report)) : withClone(report),
      );
      await handlersOn("LvSnapshot", asked).remove(kept);
      expect(asked.changes.map(({ argv }) => argv.at(-1))).toEqual(["VgVm/vm1-snap"]);
    });

    it("is gone when it is gone from its own group, and the clone's is left alone", async () => {
      const { read, kept } = await stateOf("valid", () => cloned(withoutOwn));
      expect(read).toBeUndefined();
      const asked = recordedHost("valid", () => cloned(withoutOwn));
      await handlersOn("LvSnapshot", asked).remove(kept);
      expect(asked.changes).toEqual([]);
    });

    it("is gone, and the clone's left alone, also where its group has no volume any more", async () => {
      const clone = cloned((report) => withClone(report).replaceAll('"VgVm"', '"VgClone"'));
      const { kept } = await stateOf("valid");
      const asked = fakeHost(({ argv }) => (argv[0] === "vgs" ? "  VgVm\n" : clone));
      await handlersOn("LvSnapshot", asked).remove(kept);
      expect(asked.changes).toEqual([]);
    });

    it("is not removed where nothing of its group is there: that may be renamed, or its disk away", async () => {
      const { kept } = await stateOf("valid");
      const clone = (report: string) => report.replaceAll('"vg_name":"VgVm"', '"vg_name":"VgClone"');
      const asked = recordedHost("valid", clone);
      await expect(handlersOn("LvSnapshot", asked).remove(kept)).rejects.toThrow(
        /IDENTITY_MISMATCH.*VgClone\/vm1-snap has the UUID of what was in VgVm.*disk is away.*`pulumi refresh`/s,
      );
      expect(asked.changes).toEqual([]);
      // A refresh has told of it.
      const again = recordedHost("valid", clone);
      const { read } = await stateOf("valid", clone);
      await expect(handlersOn("LvSnapshot", again).remove({ ...read })).rejects.toThrow(/is still there/);
      expect(again.changes.map(({ argv }) => argv.at(-1))).toEqual(["VgClone/vm1-snap"]);
    });

    it("is neither, and that is an error, where its own group is gone and two others have it", async () => {
      const elsewhere = cloned((report) => report.replaceAll('"vg_name":"VgVm"', '"vg_name":"VgElse"'));
      await expect(stateOf("valid", () => elsewhere)).rejects.toThrow(
        /IDENTITY_MISMATCH.*of VgClone\/vm1-snap and of VgElse\/vm1-snap.*none of them is in VgVm.*vgrename/s,
      );
    });
  });

  it("tells renamed, re-tagged and made writable, each by name", async () => {
    const { read, warnings } = await stateOf("valid", (report) =>
      report
        .replaceAll("vm1-snap", "moved")
        .replace(',mine"', ',theirs"')
        .replace('"lv_attr":"sri', '"lv_attr":"swi'),
    );
    expect(read).toMatchObject({ name: "moved", tags: ["theirs"], readOnly: false });
    expect(warnings.join("\n")).toMatch(/renamed to moved[\s\S]*writable[\s\S]*theirs/);
    const { changes } = await handlersOn("LvSnapshot", untouchedHost()).diff({ ...read }, complete, none);
    expect(changes).toEqual([
      { property: "name", effect: "update" },
      { property: "readOnly", effect: "update" },
      { property: "tags", effect: "update" },
    ]);
  });

  it("says gone only of what is positively absent", async () => {
    const { read, warnings } = await stateOf("empty");
    expect(read).toBeUndefined();
    expect(warnings).toEqual([expect.stringContaining("is gone")]);
  });

  it("does not take a volume group that has vanished for the absence of its snapshots", async () => {
    const { kept } = await stateOf("valid");
    const vanished = fakeHost(({ argv }) =>
      argv[0] === "vgs" ? { exitCode: 5, stderr: '  Volume group "VgVm" not found' } : recordedLvs("empty"),
    );
    await expect(handlersOn("LvSnapshot", vanished).read(kept)).rejects.toThrow(/VOLUME_GROUP_NOT_FOUND/);
    await expect(handlersOn("LvSnapshot", vanished).remove(kept)).rejects.toThrow(/VOLUME_GROUP_NOT_FOUND/);
    expect(vanished.changes).toEqual([]);
  });

  it("takes what it cannot read for an error", async () => {
    await expect(stateOf("valid", (report) => report.slice(0, 300))).rejects.toThrow(/OUTPUT_UNREADABLE/);
    const failing = fakeHost(() => ({ exitCode: 5, stderr: "  Can't get lock for VgVm" }));
    const { kept } = await stateOf("valid");
    await expect(handlersOn("LvSnapshot", failing).read(kept)).rejects.toThrow(/LVM_LOCKED/);
    await expect(handlersOn("LvSnapshot", failing).remove(kept)).rejects.toThrow(/LVM_LOCKED/);
    expect(failing.changes).toEqual([]);
  });
});

describe("diff", () => {
  const state = async () => ({ ...(await stateOf("valid")).read });
  const diff = async (change: object, unknown: ReadonlySet<string> = none) =>
    handlersOn(
      "LvSnapshot",
      fakeHost(() => suitableOrigins()),
    ).diff(await state(), { ...complete, ...change }, unknown);

  it("refuses a replacement that cannot succeed, before the old snapshot is removed for it", async () => {
    const refused = (change: object) =>
      state().then((old) =>
        handlersOn("LvSnapshot", recordedHost("valid")).diff(old, { ...complete, ...change }, none),
      );
    await expect(refused({ origin: "vm9" })).rejects.toThrow(/ORIGIN_NOT_FOUND/);
    await expect(refused({ origin: "vm1-snap" })).rejects.toThrow(/ORIGIN_UNSUITABLE/);
    await expect(refused({ size: undefined })).rejects.toThrow(/needs a size/);
  });

  it.each([
    ["growing", { size: "32M" }, "size"],
    ["renaming", { name: "other" }, "name"],
    ["tags", { tags: ["mine", "more"] }, "tags"],
    ["readOnly", { readOnly: false }, "readOnly"],
    ["another owner after a rename of the resource", { owner: "o/p/s/vm2" }, "owner"],
  ])("in place: %s", async (_what, change, property) => {
    expect((await diff(change)).changes).toEqual([{ property, effect: "update" }]);
  });

  it.each([
    ["volume group", { volumeGroup: "VgOther" }, "volumeGroup", true],
    ["origin", { origin: "vm2" }, "origin", true],
    ["chunk size", { chunkSize: "4K" }, "chunkSize", true],
    ["triggers", { triggers: ["tuesday"] }, "triggers", true],
    ["a thin snapshot instead of a COW one", { size: undefined }, "size", true],
    ["host", { host: { ...host, address: "192.0.2.2" } }, "host", true],
  ])("replacement: %s, the old removed first where names collide", async (_what, change, property, first) => {
    const { changes, deleteBeforeReplace } = await diff(change);
    expect(changes).toEqual([{ property, effect: "replace" }]);
    expect(deleteBeforeReplace).toBe(first);
  });

  it("replacement: shrinking, asked for by other triggers as well", async () => {
    const { changes } = await diff({ size: "8M", triggers: ["smaller"] });
    expect(changes).toEqual([
      { property: "triggers", effect: "replace" },
      { property: "size", effect: "replace" },
    ]);
  });

  it.each(["8M", "12%ORIGIN"])("shrinking alone to %s, in whatever units, is refused", async (size) => {
    await expect(diff({ size })).rejects.toThrow(/cannot shrink from 16M.*triggers/);
  });

  it("the same size written otherwise is no change", async () => {
    expect((await diff({ size: "16384k" })).changes).toEqual([]);
    expect((await diff({ size: 16 * MiB })).changes).toEqual([]);
    expect((await diff({ chunkSize: "64K" })).changes).toEqual([]);
    expect((await diff({ chunkSize: "65536" })).changes).toEqual([]);
    expect((await diff({ size: "25%ORIGIN" })).changes).toEqual([]);
  });

  it("an unknown origin means a replacement, an unknown tag a change in place", async () => {
    const unknown = new Set(["origin", "tags"]);
    const { origin: _o, tags: _t, ...rest } = complete;
    const { changes } = await handlersOn("LvSnapshot", untouchedHost()).diff(await state(), rest, unknown);
    expect(changes).toEqual([
      { property: "origin", effect: "replace" },
      { property: "tags", effect: "update" },
    ]);
  });

  it("other credentials change the stored connection and run nothing", async () => {
    const rotated = { ...complete, host: { ...host, password: "new" } };
    const before = await state();
    const asked = untouchedHost();
    const handlers = handlersOn("LvSnapshot", asked);
    expect((await handlers.diff(before, rotated, none)).changes).toEqual([
      { property: "host", effect: "connection" },
    ]);
    expect(await handlers.update(before, rotated)).toEqual({ ...before, host: rotated.host });
    expect(asked.commands).toEqual([]);
  });
});

describe("remove", () => {
  it("removes by UUID, and only when nobody has it open", async () => {
    const { kept } = await stateOf("valid");
    let removed = false;
    const asked = fakeHost(({ argv, kind }) => {
      if (kind === "change") removed = true;
      return argv[0] === "lvs" ? recordedLvs(removed ? "empty" : "valid") : "";
    });
    await handlersOn("LvSnapshot", asked).remove(kept);
    expect(asked.changes.map(({ argv }) => argv)).toEqual([
      ["lvremove", "-y", "-S", `lv_uuid="${kept.uuid}"`, "VgVm/vm1-snap"],
    ]);
  });

  it("refuses an open one and names who holds it", async () => {
    const { kept } = await stateOf("valid");
    const open = recordedLvs("valid").replaceAll('"lv_device_open":"0"', '"lv_device_open":"1"');
    const asked = fakeHost(({ argv }) =>
      argv[0] === "lvs" ? open : `mount\t${Buffer.from("/mnt").toString("base64")}\n`,
    );
    await expect(handlersOn("LvSnapshot", asked).remove(kept)).rejects.toThrow(
      /VOLUME_IN_USE.*mounted at \/mnt/s,
    );
    expect(asked.changes).toEqual([]);
  });

  it("refuses one that is itself the origin of a snapshot, which LVM would remove with it", async () => {
    const { kept } = await stateOf("valid");
    const report: { report: { lv: Record<string, string>[] }[] } = JSON.parse(recordedLvs("valid"));
    const rows = report.report[0]?.lv ?? [];
    const snapshot = rows.find((row) => row.lv_name === "vm1-snap");
    rows.push({ ...snapshot, lv_uuid: "other", lv_name: "overlay", origin: "vm1-snap" });
    const asked = fakeHost(() => JSON.stringify(report));
    await expect(handlersOn("LvSnapshot", asked).remove(kept)).rejects.toThrow(/VOLUME_IN_USE.*"overlay"/s);
    expect(asked.changes).toEqual([]);
  });

  it("leaves alone what has taken the name of one that is gone", async () => {
    const { kept } = await stateOf("valid");
    const asked = recordedHost("inactive");
    const handlers = handlersOn("LvSnapshot", asked);
    await handlers.remove(kept);
    expect(asked.changes).toEqual([]);
    expect(handlers.warnings).toEqual([expect.stringMatching(/not what was made here.*left alone/)]);
  });

  it("does nothing where it is gone already", async () => {
    const { kept } = await stateOf("valid");
    const asked = recordedHost("empty");
    await handlersOn("LvSnapshot", asked).remove(kept);
    expect(asked.changes).toEqual([]);
  });
});

describe("a change in place", () => {
  const generation = generationMark(["vm1", 65536, []]);
  const marked = (report: string) => report.replace(',mine"', `,mine,${generation}"`);
  const update = async (change: object, edit: (report: string) => string = (report) => report) => {
    const asked = recordedHost("valid", (report) => {
      const renamed = asked.changes.find(({ argv }) => argv[0] === "lvrename")?.argv.at(-1);
      return edit(marked(report)).replaceAll("vm1-snap", renamed ?? "vm1-snap");
    });
    const state = { ...(await stateOf("valid", marked)).read };
    await handlersOn("LvSnapshot", asked).update(state, { ...complete, ...change });
    return asked.changes.map(({ argv }) => argv.join(" "));
  };
  const chosen = async () => `-S lv_uuid="${(await stateOf("valid")).kept.uuid}" VgVm`;

  it("of nothing runs no changing command", async () => {
    expect(await update({})).toEqual([]);
  });

  it("never takes anew what was imported, of which only the mark knows the triggers", async () => {
    const made = generationMark(["vm1", 65536, ["yesterday"]]);
    const changes = await update({ size: "32M" }, (report) => report.replace(generation, made));
    expect(changes).toEqual([
      `lvchange -y --addtag ${generation} --deltag ${made} ${await chosen()}/vm1-snap`,
      "lvextend -y -L 33554432b VgVm/vm1-snap",
    ]);
  });

  it("grows the store", async () => {
    expect(await update({ size: "32M" })).toEqual(["lvextend -y -L 33554432b VgVm/vm1-snap"]);
    expect(await update({ size: "50%ORIGIN" })).toEqual(["lvextend -y -l 50%ORIGIN VgVm/vm1-snap"]);
  });

  it("grows a store for all of its origin with its tables, which lvextend's own 100 % leaves out", async () => {
    const need = `${64 * MiB + 2 * 64 * 1024}b`;
    expect(await update({ size: "100%ORIGIN" })).toEqual([`lvextend -y -L ${need} VgVm/vm1-snap`]);
    const grown = (bytes: number) => (report: string) =>
      report.replace(`"lv_size":"${16 * MiB}"`, `"lv_size":"${bytes}"`);
    expect(await update({ size: "100%ORIGIN" }, grown(64 * MiB))).toEqual([
      `lvextend -y -L ${need} VgVm/vm1-snap`,
    ]);
    expect(await update({ size: "100%ORIGIN" }, grown(68 * MiB))).toEqual([]);
  });

  it("does not grow a store that LVM rounded to its extents, or that is as large as it can be", async () => {
    expect(await update({ size: 16 * MiB + 1024 })).toEqual([]);
    const full = (report: string) => report.replace(`"lv_size":"${16 * MiB}"`, `"lv_size":"${64 * MiB}"`);
    expect(await update({ size: "1G" }, full)).toEqual([]);
  });

  it("renames, and does all else by the new name", async () => {
    expect(await update({ name: "other", readOnly: false })).toEqual([
      "lvrename -y VgVm vm1-snap other",
      `lvchange -y -p rw ${await chosen()}/other`,
    ]);
  });

  it("adds and drops tags", async () => {
    expect(await update({ tags: ["yours"] })).toEqual([
      `lvchange -y --addtag yours --deltag mine ${await chosen()}/vm1-snap`,
    ]);
  });

  it("makes it writable", async () => {
    expect(await update({ readOnly: false })).toEqual([`lvchange -y -p rw ${await chosen()}/vm1-snap`]);
  });

  it("hands it to the resource's new name", async () => {
    expect(await update({ owner: "o/p/s/vm2" })).toEqual([
      `lvchange -y --addtag ${ownerMark("o/p/s/vm2")} --deltag ${ownerMark("o/p/s/vm1")} ${await chosen()}/vm1-snap`,
    ]);
  });

  it.each([
    ["is being merged", "merging", "SNAPSHOT_MERGING"],
    ["is a snapshot of something else", "valid", "IDENTITY_MISMATCH"],
  ] as const)("is refused and runs nothing while the volume %s", async (_what, recorded, code) => {
    const asked = recordedHost(recorded, (report) =>
      code === "IDENTITY_MISMATCH" ? report.replaceAll('"origin":"vm1"', '"origin":"vm9"') : report,
    );
    const uuid = /"lv_uuid":"([^"]+)"[^}]*"lv_name":"vm1-snap"/.exec(recordedLvs(recorded))?.[1];
    const { kept } = await stateOf(recorded);
    await expect(
      handlersOn("LvSnapshot", asked).update({ ...kept, uuid }, { ...complete, size: "32M" }),
    ).rejects.toThrow(new RegExp(code));
    expect(asked.changes).toEqual([]);
  });

  it("that LVM refuses is an error with LVM's words, and what is there stays in the state", async () => {
    const asked = fakeHost(({ kind }) =>
      kind === "read"
        ? marked(recordedLvs("valid"))
        : { exitCode: 5, stderr: "  Insufficient free space: 4 extents needed, but only 1 available" },
    );
    const { read } = await stateOf("valid", marked);
    await expect(
      handlersOn("LvSnapshot", asked).update({ ...read }, { ...complete, size: "32M" }),
    ).rejects.toMatchObject({
      cause: { code: "NO_SPACE", details: { stderr: expect.stringContaining("4 extents needed") } },
      state: { size: "16M", sizeBytes: 16 * MiB },
    });
  });
});

describe("what is there already", () => {
  it("and overflowed is taken anew", async () => {
    const asked = recordedHost("overflowed");
    await handlersOn("LvSnapshot", asked).create(complete);
    expect(asked.changes.map(programOf)).toEqual(["lvremove", "lvcreate"]);
  });

  it("and overflowed, but still open, is not removed", async () => {
    const asked = fakeHost(({ argv }) =>
      argv[0] === "lvs"
        ? recordedLvs("overflowed").replaceAll('"lv_device_open":"0"', '"lv_device_open":"1"')
        : "",
    );
    await expect(handlersOn("LvSnapshot", asked).create(complete)).rejects.toThrow(/VOLUME_IN_USE/);
    expect(asked.changes).toEqual([]);
  });

  it("and smaller than declared is told by a refresh and grown by up", async () => {
    const handlers = handlersOn("LvSnapshot", recordedHost("valid"));
    const { kept } = await stateOf("valid");
    const read = await handlers.read({ ...kept, size: "32M", sizeBytes: 32 * MiB });
    expect(read).toMatchObject({ size: 16 * MiB, sizeBytes: 16 * MiB });
    expect(handlers.warnings).toEqual([expect.stringContaining("less than declared")]);
    const { changes } = await handlers.diff({ ...read }, { ...complete, size: "32M" }, none);
    expect(changes).toEqual([{ property: "size", effect: "update" }]);
  });

  it("and being merged is not removed", async () => {
    const asked = recordedHost("merging");
    const uuid = /"lv_uuid":"([^"]+)"[^}]*"lv_name":"vm1-snap"/.exec(recordedLvs("merging"))?.[1];
    const { kept } = await stateOf("merging");
    await expect(handlersOn("LvSnapshot", asked).remove({ ...kept, uuid })).rejects.toThrow(
      /SNAPSHOT_MERGING.*Wait until the merge has ended/s,
    );
    expect(asked.changes).toEqual([]);
  });
});

it("that ran full while it waited to be merged is not waited for: an error says what to do", async () => {
  const full = recordedLvs("merging").replace(
    /"Swi-a-s---"(.*?)"lv_snapshot_invalid":"0"/,
    '"Swi-I-s---"$1"lv_snapshot_invalid":"1"',
  );
  const uuid = /"lv_uuid":"([^"]+)"[^}]*"lv_name":"vm1-snap"/.exec(full)?.[1];
  const asked = fakeHost(() => full);
  const { kept } = await stateOf("merging");
  const handlers = handlersOn("LvSnapshot", asked);
  const seen = { ...(await handlers.read({ ...kept, uuid })) };
  expect(seen).toMatchObject({ state: "overflowed" });
  const stuck =
    /SNAPSHOT_OVERFLOWED.*VgVm\/vm1-snap ran full before its merge into VgVm\/vm1 began.*lvremove VgVm\/vm1-snap.*never ends/s;
  await expect(handlers.remove(seen)).rejects.toThrow(stuck);
  await expect(handlers.update(seen, complete)).rejects.toThrow(stuck);
  await expect(handlers.create({ ...complete, name: "x" })).rejects.toThrow(stuck);
  expect(asked.changes).toEqual([]);
});

describe("a thin snapshot that waits to be merged", () => {
  // Its origin is mounted.
  const report = recordedLvs("thinMergeScheduled");
  const uuid = /"lv_uuid":"([^"]+)"[^}]*"lv_name":"ts"/.exec(report)?.[1];
  const { size: _, ...rest } = complete;
  const read = (lvs: string) =>
    handlersOn(
      "LvSnapshot",
      fakeHost(() => lvs),
    ).read({
      ...rest,
      ...{
        origin: "t",
        name: "ts",
        uuid,
        path: "/dev/VgVm/ts",
        sizeBytes: 64 * MiB,
        originSizeBytes: 64 * MiB,
      },
      ...{ originUuid: "", createdAt: "2026-11-26T11:58:46.000Z", usedPercent: 0, state: "valid" },
    });

  it("is told to be merging, and is neither changed nor replaced", async () => {
    const state = await read(report);
    expect(state).toMatchObject({ state: "merging", origin: "t", name: "ts", uuid });
    const { changes } = await handlersOn("LvSnapshot", untouchedHost()).diff(
      { ...state },
      { ...rest, origin: "t", name: "ts", tags: ["tstag"] },
      none,
    );
    expect(changes).toEqual([]);
  });

  it("is not removed, and nobody is asked who has it open", async () => {
    const open = report.replace(
      /("lv_name":"ts".*?)"Sri---tz--"(.*?)"lv_active":""/,
      '$1"Sri-aotz--"$2"lv_active":"active"',
    );
    const asked = fakeHost(({ argv }) => (argv[0] === "lvs" ? open : new Error("its device is hidden")));
    await expect(handlersOn("LvSnapshot", asked).remove({ ...(await read(open)) })).rejects.toThrow(
      /SNAPSHOT_MERGING/,
    );
    expect(asked.changes).toEqual([]);
  });
});

describe("a thin snapshot", () => {
  const { size: _, ...rest } = complete;
  const thin = { ...rest, origin: "thin1", name: "thin1-snap" };

  it("is made without a size", async () => {
    let made = false;
    const asked = fakeHost(({ kind }) => {
      if (kind === "change") made = true;
      return made
        ? recordedLvs("thin")
        : recordedLvs("thin").replaceAll('"lv_name":"thin1-snap"', '"lv_name":"other"');
    });
    const { state } = await handlersOn("LvSnapshot", asked).create(thin);
    expect(asked.changes.map(programOf)).toEqual(["lvcreate"]);
    expect(asked.changes[0]?.argv).not.toContain("-L");
    expect(state).toMatchObject({ sizeBytes: 128 * MiB, originSizeBytes: 128 * MiB, state: "valid" });
    expect(state).not.toHaveProperty("size");
  });

  it("is not replaced for a chunk size, which only a COW store has", async () => {
    const state = { ...(await stateOf("thin")).kept, ...thin, size: undefined };
    const { changes } = await handlersOn("LvSnapshot", untouchedHost()).diff(
      state,
      { ...thin, chunkSize: "4K" },
      none,
    );
    expect(changes).toEqual([]);
  });

  it("is replaced for a size, which makes it a COW one", async () => {
    const state = { ...(await stateOf("thin")).kept, ...thin, size: undefined };
    const { changes } = await handlersOn("LvSnapshot", recordedHost("thin")).diff(
      state,
      { ...thin, size: "16M" },
      none,
    );
    expect(changes).toEqual([{ property: "size", effect: "replace" }]);
  });
});

describe("what cannot be told is never absence", () => {
  const answers: [string, Answer, RegExp][] = [
    ["an unparsable report", "not JSON", /OUTPUT_UNREADABLE/],
    ["a cut report", recordedLvs("valid").slice(0, 700), /OUTPUT_UNREADABLE/],
    ["no output", "", /OUTPUT_UNREADABLE/],
    ["a failed lvs", { exitCode: 5, stdout: recordedLvs("empty") }, /COMMAND_FAILED/],
    ["a crashed lvs", { exitCode: 139, stdout: recordedLvs("empty") }, /COMMAND_FAILED/],
    ["an unreachable host", new LvmNbdError("HOST_UNREACHABLE", { message: "no route" }), /HOST_UNREACHABLE/],
    ["a hanging lvs", new LvmNbdError("COMMAND_TIMED_OUT", { message: "60 s" }), /COMMAND_TIMED_OUT/],
  ];
  it.each(answers)(
    "%s fails read, create, update and remove, and changes nothing",
    async (_what, answer, message) => {
      const { kept } = await stateOf("valid");
      const asked = fakeHost(() => answer);
      const handlers = handlersOn("LvSnapshot", asked);
      await expect(handlers.read(kept)).rejects.toThrow(message);
      await expect(handlers.create(complete)).rejects.toThrow(message);
      await expect(handlers.update(kept, { ...complete, name: "other" })).rejects.toThrow(message);
      await expect(handlers.remove(kept)).rejects.toThrow(message);
      expect(asked.changes).toEqual([]);
    },
  );
});

describe("quiesce", () => {
  const quiesce = { freeze: "freeze-it", thaw: "thaw-it", timeoutSeconds: 7 };
  const run = (exitCode: number) => {
    let made = false;
    const asked = fakeHost(({ kind }) => {
      if (kind === "read")
        return recordedLvs(made ? "valid" : "thin")
          .replaceAll('"thin1"', '"vm1"')
          .replaceAll('"lv_attr":"Vwi-a-tz--"', '"lv_attr":"-wi-a-----"');
      made = exitCode === 91;
      return { exitCode, stderr: exitCode === 5 ? "  VgVm has insufficient free space" : "" };
    });
    return { asked, made: handlersOn("LvSnapshot", asked).create({ ...complete, quiesce }) };
  };

  it("a failed freeze is QUIESCE_FAILED", async () => {
    await expect(run(90).made).rejects.toMatchObject({
      message: expect.stringMatching(/QUIESCE_FAILED.*freeze-it/s),
    });
  });

  it("a failed snapshot is told by LVM's own words, as without quiesce", async () => {
    await expect(run(5).made).rejects.toThrow(
      /NO_SPACE.*no snapshot of VgVm\/vm1 could be taken.*insufficient/s,
    );
  });

  it("a failed thaw is THAW_FAILED, and the snapshot that was taken is kept in the state", async () => {
    const { asked, made } = run(91);
    await expect(made).rejects.toMatchObject({
      message: expect.stringMatching(/THAW_FAILED.*thaw-it.*by hand NOW/s),
      id: "192.0.2.1/VgVm/vm1-snap",
      state: expect.objectContaining({ uuid: expect.any(String) }),
    });
    expect(asked.changes[0]?.graceSeconds).toBeGreaterThan(14);
  });
});

describe("read by its id alone", () => {
  const finder = {
    organization: "o",
    project: "p",
    stack: "s",
    name: "vm1",
    host: undefined,
    readsOnly: false,
  };
  const hostOf = (state: "valid" | "thin" | "empty", edit: (report: string) => string = (report) => report) =>
    fakeHost(({ argv }) => {
      if (argv.join().includes("chunk_size")) return "  4096\n  4096\n";
      return argv[0] === "vgs" ? "  VgVm\n" : edit(recordedLvs(state));
    });

  it.each([
    ["a COW one", "valid", "vm1", { size: 16 * MiB, chunkSize: 4096, tags: ["mine"] }],
    ["a thin one without a mark", "thin", "thin1", {}],
  ] as const)(
    "%s is declared as it is seen, so that nothing is to change",
    async (_what, at, origin, more) => {
      const asked = hostOf(at);
      const handlers = handlersOn("LvSnapshot", asked);
      const id = `192.0.2.1/VgVm/${origin}-snap`;
      const found = await handlers.find(id, finder);
      expect(found).toMatchObject({ id, state: { state: "valid" } });
      expect(found?.inputs).toEqual({
        ...{
          host: "192.0.2.1",
          owner: "o/p/s/vm1",
          volumeGroup: "VgVm",
          origin,
          name: `${origin}-snap`,
          ...more,
        },
      });
      const { inputs, problems: left } = await handlers.check(undefined, found?.inputs ?? {}, none);
      expect(left).toEqual([]);
      expect((await handlers.diff(found?.state ?? {}, inputs, none)).changes).toEqual([]);
      expect(await handlers.read(found?.state ?? {})).toEqual(found?.state);
      expect(asked.commands.filter(({ kind }) => kind === "change")).toEqual([]);
    },
  );

  it.each([
    [
      "another form",
      "192.0.2.1/vm1-snap",
      /"192\.0\.2\.1\/vm1-snap" is no id of a LvSnapshot: that is HOST\/VOLUMEGROUP\/NAME/,
    ],
    ["a name that none can have", "192.0.2.1/VgVm/..", /INVALID_INPUT.*name: /s],
    ["a volume that is no snapshot", "192.0.2.1/VgVm/vm1", /VgVm\/vm1 is not a snapshot/],
  ])("of %s is refused", async (_what, id, message) => {
    await expect(handlersOn("LvSnapshot", hostOf("valid")).find(id, finder)).rejects.toThrow(message);
  });

  it("of what is positively not there is nothing; of a host that cannot be reached it is an error", async () => {
    expect(
      await handlersOn("LvSnapshot", hostOf("empty")).find("192.0.2.1/VgVm/vm1-snap", finder),
    ).toBeUndefined();
    const failing = fakeHost(() => ({ exitCode: 5, stderr: "  Internal error" }));
    await expect(handlersOn("LvSnapshot", failing).find("192.0.2.1/VgVm/vm1-snap", finder)).rejects.toThrow(
      /COMMAND_FAILED/,
    );
  });

  it("without a mark asks for the organisation where that is not known, and guesses none", async () => {
    const unknown = { ...finder, organization: undefined };
    await expect(
      handlersOn("LvSnapshot", hostOf("thin")).find("192.0.2.1/VgVm/thin1-snap", unknown),
    ).rejects.toThrow(/INVALID_INPUT.*lvm-nbd:organization/s);
  });
});

describe("a preview", () => {
  const warningsOf = async (
    state: Parameters<typeof recordedLvs>[0],
    change: object,
    edit?: (report: string) => string,
  ) => {
    const asked = recordedHost(state, edit);
    const handlers = handlersOn("LvSnapshot", asked);
    const seen = await handlers.preview(undefined, { ...complete, ...change }, none);
    expect(asked.changes).toEqual([]);
    return { warnings: handlers.warnings, seen };
  };

  it("of a snapshot that can be taken knows its path, and warns of nothing", async () => {
    const { warnings, seen } = await warningsOf("valid", { name: "vm1-other" });
    expect(warnings).toEqual([]);
    expect(seen.state.path).toBe("/dev/VgVm/vm1-other");
    expect(seen.unknown).toEqual(
      expect.arrayContaining(["uuid", "sizeBytes", "originUuid", "createdAt", "state"]),
    );
  });

  it.each([
    ["an origin that is not there", { name: "x", origin: "gone" }, /refused: ORIGIN_NOT_FOUND/],
    [
      "a store that the group has no room for",
      { name: "x", size: "100%ORIGIN" },
      /refused: NO_SPACE: .*1024 free/,
    ],
    [
      "a name that is somebody's",
      { owner: "o/p/s/other" },
      /refused: FOREIGN_RESOURCE: .*belongs to o\/p\/s\/vm1/,
    ],
  ])("warns of %s", async (_what, change, message) => {
    const full = (report: string) => report.replaceAll(/"vg_free":"\d+"/g, '"vg_free":"1024"');
    const { warnings } = await warningsOf("valid", change, full);
    expect(warnings).toEqual([expect.stringMatching(message)]);
  });

  it("says of a host that cannot be looked at that nothing is known", async () => {
    const handlers = handlersOn(
      "LvSnapshot",
      fakeHost(() => ({ exitCode: 5, stderr: "  Internal error" })),
    );
    await handlers.preview(undefined, complete, none);
    expect(handlers.warnings).toEqual([
      expect.stringMatching(/whether this can be made could not be told: COMMAND_FAILED/),
    ]);
  });

  it("asks no host while something is only known later", async () => {
    const { origin: _, ...rest } = complete;
    const seen = await handlersOn("LvSnapshot", untouchedHost()).preview(
      undefined,
      rest,
      new Set(["origin"]),
    );
    expect(seen.state.path).toBe("/dev/VgVm/vm1-snap");
  });

  it("of an update keeps what identifies the snapshot, unless that is taken anew", async () => {
    const handlers = handlersOn("LvSnapshot", untouchedHost());
    const kept = { ...(await stateOf("valid")).kept, machineId };
    const grown = await handlers.preview(kept, { ...complete, size: "32M" }, none);
    expect(grown.state).toMatchObject({ uuid: kept.uuid, size: "32M", path: "/dev/VgVm/vm1-snap" });
    expect(grown.unknown).toEqual(["sizeBytes", "usedPercent", "state"]);
    const anew = await handlers.preview({ ...kept, state: "unfinished" }, complete, none);
    expect(anew.unknown).toContain("uuid");
  });
});
