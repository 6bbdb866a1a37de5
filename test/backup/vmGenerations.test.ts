import { describe, expect, it } from "vitest";
import type { Image } from "../../provider/backup/listImages.js";
import { type VmGeneration, type VmWanted, vmGenerations } from "../../provider/backup/vmGenerations.js";

const disk = { volumeGroup: "VgVm", origin: "LV-VM1", size: "20%ORIGIN" };
const data = { volumeGroup: "VgVm", origin: "LV-VM1-data", size: "1G" };
type Volume = typeof disk;

const day = (number: number) => new Date(2026, 10, number, 3);
const file = (key: string, { volumeGroup, origin }: Pick<Volume, "volumeGroup" | "origin">, vm = "vm1") =>
  `/backup/${vm}.${volumeGroup}.${origin}.${key}.raw`;

/** Images of a moment, as `listImages` tells them. */
function moment(
  key: string,
  volumes: readonly Volume[] = [disk, data],
  change: Partial<Image> = {},
): Image[] {
  const together = volumes.map((volume) => file(key, volume));
  return volumes.map(({ volumeGroup, origin }) => ({
    ...{
      file: file(key, { volumeGroup, origin }),
      generation: key,
      format: "raw",
      sha256: "0",
      sizeBytes: 1,
    },
    ...{ completedAt: `${key}T02:00:00Z`, takenAt: `${key}T01:00:00Z`, verified: true, sound: true },
    ...{ volumeGroup, origin, together, moment: key },
    ...change,
  }));
}

const wanted = (change: Partial<VmWanted<Volume>> = {}) =>
  vmGenerations<Volume>({
    ...{ name: "vm1", folder: "/backup", volumes: [disk, data], format: "raw" },
    ...{ keep: { daily: 2 }, now: day(20), made: [] },
    ...change,
  });
const keys = (generations: readonly VmGeneration<Volume>[]) => generations.map(({ key }) => key);

describe("the backups of a VM", () => {
  it("begin with today's, of all its volumes", () => {
    expect(wanted()).toEqual([
      {
        ...{ key: "2026-11-20", isToday: true, format: "raw" },
        volumes: [
          { ...disk, file: "/backup/vm1.VgVm.LV-VM1.2026-11-20.raw" },
          { ...data, file: "/backup/vm1.VgVm.LV-VM1-data.2026-11-20.raw" },
        ],
      },
    ]);
  });

  it("of which the images are of two moments are no whole one: the last good one stays", () => {
    const [vm, records] = [moment("2026-11-19"), moment("2026-11-19", [disk, data], { moment: "another" })];
    const mixed = [...vm.slice(0, 1), ...records.slice(1)];
    const made = [...mixed, ...moment("2026-11-18"), ...moment("2026-11-17")];
    const kept = keys(wanted({ keep: { daily: 1 }, made }));
    expect(kept).toContain("2026-11-18");
    expect(kept).not.toContain("2026-11-17");
  });

  it("are, after thirty nights, each night exactly those that the policy keeps", () => {
    const keep = { daily: 7, weekly: 4, monthly: 2 };
    let made: Image[] = [];
    for (let night = 1; night <= 30; night++) {
      const now = keys(wanted({ keep, now: day(night), made }));
      const kept = new Set(now);
      const name = (number: number) => `2026-11-${String(number).padStart(2, "0")}`;
      for (let back = 0; back < 7; back++) if (night - back >= 1) expect(kept).toContain(name(night - back));
      // Sundays end the weeks; the newest of November is today's.
      const sundays = [1, 8, 15, 22, 29].filter((sunday) => sunday < night).slice(-3);
      for (const sunday of sundays) expect(kept).toContain(name(sunday));
      const last7 = Array.from({ length: Math.min(7, night) }, (_, back) => name(night - back));
      expect([...kept].sort()).toEqual([...new Set([...last7, ...sundays.map(name)])].sort());
      // What Pulumi does then: makes today's, and removes what is no longer declared.
      made = now.flatMap((key) => moment(key));
    }
  });

  it("are the same when a run takes place twice", () => {
    const made = [...moment("2026-11-19"), ...moment("2026-11-20")];
    const once = wanted({ made: moment("2026-11-19") });
    expect(wanted({ made })).toEqual(once);
  });

  it("are kept as they are but today's, each volume of which may still be made", () => {
    const [one, other] = moment("2026-11-20");
    const [yesterday] = moment("2026-11-19");
    if (!one || !other || !yesterday) throw new Error("no image");
    const generations = wanted({ made: [one, yesterday] });
    expect(generations.map(({ isToday, volumes }) => [isToday, volumes.map(({ file }) => file)])).toEqual([
      [true, [one.file, other.file]],
      [false, [yesterday.file]],
    ]);
  });

  it("that are not sound, or not whole, make no good one superfluous", () => {
    const good = moment("2026-11-10");
    const rotten = [...moment("2026-11-18", [disk], { sound: false }), ...moment("2026-11-19").slice(1)];
    expect(keys(wanted({ made: [...good, ...rotten] }))).toEqual(["2026-11-20", "2026-11-19", "2026-11-10"]);
    expect(keys(wanted({ made: [...moment("2026-11-17"), ...moment("2026-11-18"), ...good] }))).toEqual([
      "2026-11-20",
      "2026-11-18",
    ]);
  });

  it("take a new volume in from the next day on, and keep one that is gone in those that hold it", () => {
    const made = [...moment("2026-11-19", [disk, data]), ...moment("2026-11-20", [disk])];
    const files = (volumes: readonly Volume[], now: Date) =>
      wanted({ volumes, now, made }).map((generation) => generation.volumes.map(({ file }) => file));
    expect(files([disk, data], day(20))[0]).toEqual([file("2026-11-20", disk)]);
    expect(files([disk, data], day(21))[0]).toHaveLength(2);
    const [today, yesterday] = files([disk], day(20));
    expect(today).toEqual([file("2026-11-20", disk)]);
    expect(yesterday).toEqual([file("2026-11-19", disk), file("2026-11-19", data)]);
  });

  it("keep the format in which they were made", () => {
    const [older, newer] = wanted({ format: "qcow2", made: moment("2026-11-19") }).toReversed();
    expect(older).toMatchObject({ format: "raw", volumes: [{ file: file("2026-11-19", disk) }, {}] });
    expect(newer?.volumes[0]?.file).toBe("/backup/vm1.VgVm.LV-VM1.2026-11-20.qcow2");
  });

  it("are not those of another VM, whatever it is called, nor files that only look like them", () => {
    const other = { volumeGroup: "VgVm", origin: "LV-VM1" };
    const made: Image[] = moment("2026-11-19", [disk]).flatMap((image) => [
      { ...image, file: file("2026-11-19", other, "vm1.VgVm") },
      { ...image, file: "/backup/vm1.raw" },
      { ...image, volumeGroup: undefined, origin: undefined },
    ]);
    expect(keys(wanted({ made }))).toEqual(["2026-11-20"]);
  });

  it("are found also where the folder ends with a slash", () => {
    expect(wanted({ folder: "/backup/", made: moment("2026-11-19") })).toEqual(
      wanted({ made: moment("2026-11-19") }),
    );
  });

  it("are not told by a list of another folder: else all of them would be removed", () => {
    const made = moment("2026-11-19");
    for (const folder of ["/backup/vms", "/", "/elsewhere"])
      expect(() => wanted({ folder, made })).toThrow(/backup\/vm1.* is not in/);
  });

  it("that is the last good one stays until today's is good, whatever the policy", () => {
    const keep = { daily: 1 };
    const [yesterday, today] = ["2026-11-19", "2026-11-20"];
    const older = [...moment("2026-11-18"), ...moment(yesterday)];
    expect(keys(wanted({ keep, made: older }))).toEqual([today, yesterday]);
    const unsound = moment(today, [disk, data], { sound: false });
    expect(keys(wanted({ keep, made: [...older, ...unsound] }))).toEqual([today, yesterday]);
    expect(keys(wanted({ keep, made: [...older, ...moment(today)] }))).toEqual([today]);
  });

  it.each(["", "a/b", "../x", "-x", "a b"])("cannot be of a VM called %j", (name) => {
    expect(() => wanted({ name })).toThrow(/part of file names/);
  });
});
