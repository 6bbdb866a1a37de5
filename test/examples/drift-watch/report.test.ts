import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { type Look, type Resource, readPreview } from "../../../examples/drift-watch/parse.ts";
import { metricsOf, type Report, type Run, reportOf, textOf } from "../../../examples/drift-watch/report.ts";
import { recordedPreview } from "../../support/recorded.js";

/** The images of the recordings were taken at about 13:09. */
const run: Run = {
  stack: "watch",
  startedAt: new Date("2026-11-26T14:08:55Z"),
  endedAt: new Date("2026-11-26T14:09:00Z"),
  lastSuccessAt: "2026-11-25T00:00:00.000Z",
  maxAgeHours: 26,
};

function recorded(state: Parameters<typeof recordedPreview>[0], how: Partial<Run> = {}): Report {
  const exitCode = state === "unreachable" ? 1 : 0;
  const seen = readPreview({ exitCode, stdout: recordedPreview(state), stderr: "" });
  return reportOf(seen, { ...run, ...how });
}

const image = (
  more: object = {},
  { file = "/backup/vm1/monday.raw", ...declared }: { readonly file?: string; readonly source?: object } = {},
): Resource => ({
  ...{ type: "BackupImage", name: "monday", host: "backup1", drift: [], pending: undefined },
  declared: {
    volumes: [{ volumeGroup: "VgVm", origin: "LV-VM1", file }],
    source: { host: "server1" },
    ...declared,
  },
  seen: {
    images: [
      {
        ...{ file, takenAt: "2026-11-26T12:09:00.000Z", sizeBytes: 7, verified: true, state: "complete" },
        ...more,
      },
    ],
  },
});
const of = (...resources: Resource[]): Look => ({ resources, errors: [] });

describe("the outcome", () => {
  it("is good when nothing has drifted, also when the program was changed", () => {
    expect(recorded("asDeclared").outcome).toBe("good");
    expect(recorded("programChanged").outcome).toBe("good");
  });

  it("is attention for drift, and for nothing but an old backup", () => {
    expect(recorded("driftedAndProgramChanged").outcome).toBe("attention");
    expect(recorded("asDeclared", { maxAgeHours: 0.5 }).outcome).toBe("attention");
  });

  it("is unknown whatever else was seen, when not all could be", () => {
    const report = recorded("unreachable");
    expect(report).toMatchObject({ outcome: "unknown", backups: undefined, snapshots: undefined });
    expect(report.drifted.map(({ name }) => name).sort()).toEqual(["monday", "tuesday"]);
    expect(report.lastSuccessAt).toBe(run.lastSuccessAt);
  });

  it("is unknown when outputs are not those that are known", () => {
    const strange = reportOf(of(image({ takenAt: 5 })), run);
    expect(strange).toMatchObject({
      outcome: "unknown",
      errors: [expect.stringContaining("BackupImage monday")],
    });
    expect(reportOf(of(image({ takenAt: "" })), run).outcome).toBe("unknown");
  });
});

describe("the newest image of a VM", () => {
  it("is the one of the latest moment, of those that are verified and sound", () => {
    const { backups } = reportOf(
      of(
        image(),
        image({ takenAt: "2026-11-26T13:09:00.000Z", sizeBytes: 8 }, { file: "/backup/vm1/tuesday.raw" }),
        image({ takenAt: "2026-11-26T13:10:00.000Z", state: "changed" }),
        image({ takenAt: "2026-11-26T13:11:00.000Z", verified: false }),
      ),
      run,
    );
    expect(backups).toEqual([
      {
        vm: "server1:VgVm/LV-VM1",
        soundImages: 2,
        newest: {
          ...{ host: "backup1", file: "/backup/vm1/tuesday.raw", sizeBytes: 8 },
          ...{ takenAt: "2026-11-26T13:09:00.000Z", ageHours: 1 },
        },
        problem: undefined,
      },
    ]);
  });

  it.each([
    ["is older than it may be", image({ takenAt: "2026-11-25T12:08:59.000Z" }), /older than 26 hours/],
    ["is unsound, and there is no other", image({ state: "corrupt" }), /no verified and sound/],
    ["was not verified, and there is no other", image({ verified: false }), /no verified and sound/],
    ["is gone, and there is no other", { ...image(), seen: undefined }, /no verified and sound/],
    ["is of the future", image({ takenAt: "2026-11-26T14:20:00.000Z" }), /a clock is wrong/],
  ])("that %s needs attention", (_, resource, problem) => {
    const report = reportOf(of(resource), run);
    expect(report.outcome).toBe("attention");
    expect(report.backups?.[0]?.problem).toMatch(problem);
    expect(textOf(report)).toMatch(problem);
  });

  it("just young enough is good", () => {
    expect(reportOf(of(image({ takenAt: "2026-11-25T12:09:00.000Z" })), run).outcome).toBe("good");
  });

  it("is told apart by its folder where the source is a secret", () => {
    const secret = { "4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270" };
    const { backups } = reportOf(of(image({}, { source: secret })), run);
    expect(backups?.map(({ vm }) => vm)).toEqual(["backup1:/backup/vm1/"]);
  });
});

describe("the metrics", () => {
  it("are those of Prometheus' text format, each with its help and type", () => {
    const lines = metricsOf(recorded("driftedAndProgramChanged")).split("\n");
    expect(lines.pop()).toBe("");
    let name = "";
    for (const line of lines) {
      name = /^# HELP (lvm_nbd_[a-z_]+) \S.*\.$/.exec(line)?.[1] ?? name;
      expect([
        `# TYPE ${name} gauge`,
        expect.stringMatching(`^# HELP ${name} |^${name}\\{.*\\} \\S+$`),
      ]).toContainEqual(line);
    }
    expect(lines).toContain('lvm_nbd_watch_up{stack="watch"} 1');
    expect(lines).toContain('lvm_nbd_drifted_resources{stack="watch"} 6');
    expect(lines).toContain('lvm_nbd_pending_changes{stack="watch"} 4');
    expect(lines).toContain(
      'lvm_nbd_resource_drifted{stack="watch",type="NbdExport",resource="e-a",host="server1"} 1',
    );
    expect(lines).toContain(
      'lvm_nbd_snapshot_used_ratio{stack="watch",host="server1",volume_group="VgVm",snapshot="s-a"} 0.2656',
    );
    expect(lines).toContain('lvm_nbd_backup_sound_images{stack="watch",vm="server1:VgVm/LV-VM1"} 0');
    expect(lines.join("\n")).not.toMatch(/newest_image\S*vm="server1:/);
  });

  it("tell moment and size of the newest image", () => {
    const text = metricsOf(reportOf(of(image()), run));
    const moment = Date.UTC(2026, 10, 26, 12, 9) / 1000;
    expect(text).toContain(
      `lvm_nbd_backup_newest_image_timestamp_seconds{stack="watch",vm="server1:VgVm/LV-VM1"} ${moment}\n`,
    );
    expect(text).toContain(
      'lvm_nbd_backup_newest_image_size_bytes{stack="watch",vm="server1:VgVm/LV-VM1"} 7\n',
    );
  });

  it("pass no earlier figure off as fresh when it cannot be told how things are", () => {
    const names = [...metricsOf(recorded("unreachable")).matchAll(/^(\w+)\{/gm)].map(([, name]) => name);
    expect(names).toEqual([
      "lvm_nbd_watch_up",
      "lvm_nbd_watch_last_run_timestamp_seconds",
      "lvm_nbd_watch_last_success_timestamp_seconds",
      "lvm_nbd_watch_duration_seconds",
    ]);
    expect(metricsOf(recorded("unreachable"))).toContain('lvm_nbd_watch_up{stack="watch"} 0\n');
  });

  it("escape what a name may hold", () => {
    const report = reportOf({ resources: [], errors: [] }, { ...run, stack: 'a"b\\c\nd' });
    expect(metricsOf(report)).toContain('lvm_nbd_watch_up{stack="a\\"b\\\\c\\nd"} 1\n');
  });

  it("have each series once, since the collector would refuse the file otherwise", () => {
    const text = metricsOf(reportOf(of({ ...image(), drift: ["is gone"] }, image()), run));
    expect(text.match(/^lvm_nbd_resource_drifted.*/gm)).toEqual([expect.stringMatching(/ 1$/)]);
  });

  it("are all that the alert rules ask for", () => {
    const rules = readFileSync(join(process.cwd(), "examples", "drift-watch", "alerts.yml"), "utf8");
    const known = metricsOf(recorded("asDeclared"));
    const asked = new Set(rules.match(/lvm_nbd_[a-z_]+/g));
    expect(asked.size).toBeGreaterThan(5);
    for (const name of asked) expect(known).toContain(`# TYPE ${name} gauge\n`);
  });
});

describe("the text", () => {
  it("names what drifted, with its host and the reason", () => {
    const text = textOf(recorded("driftedAndProgramChanged"));
    expect(text).toContain("6 of 8 resources drifted, 1 of 2 VMs without a fresh backup");
    expect(text).toContain("  LvSnapshot s-a on server1\n    was made writable\n");
    expect(text).toContain("(no drift)\n  LvSnapshot s-b on server1: create\n");
  });

  it("says first that it cannot be told, and why", () => {
    const text = textOf(recorded("unreachable"));
    expect(text.split("\n")[0]).toContain("CANNOT BE TOLD");
    expect(text).toMatch(/Why not\n {2}HOST_UNREACHABLE: /);
    expect(text).toContain("Drifted, as far as could be seen\n");
    expect(text).not.toContain("Snapshots\n");
  });
});
