/** The fake servers' LVM beside the real one: the same commands, the same answers. */
import { afterAll, beforeAll, expect, it } from "vitest";
import { z } from "zod";
import { lvsCommand } from "../../provider/linux/lvm.js";
import { quoteAll } from "../../provider/ssh/quoting.js";
import { finish, run } from "../fakehost/machine.js";
import { Network } from "../fakehost/network.js";
import { FakeServer } from "../fakehost/server.js";
import type { Lab } from "./lab.mts";
import { freshLab } from "./support.mts";

const MiB = 1024 ** 2;
let lab: Lab;
const fake = new FakeServer("server1", "10.0.0.1", new Network(), { now: Date.UTC(2026, 0, 1) });

beforeAll(async () => {
  lab = await freshLab();
  await lab.server1.run(
    "lvcreate -qq -y -W n -L 64M -n vm1 VgVm; lvcreate -qq -y -T -L 64M VgVm/pool; lvcreate -qq -y -V 32M -T VgVm/pool -n thin1",
  );
  fake.lvm.addGroup("VgVm");
  fake.lvm.addVolume("VgVm", "vm1", 64 * MiB, "");
  fake.lvm.addPool("VgVm", "pool", 64 * MiB);
  fake.lvm.addThin("VgVm", "pool", "thin1", 32 * MiB, "");
});

afterAll(() => lab?.server1.run("lvremove -qq -f VgVm", { allowFailure: true }));

interface Answer {
  readonly exitCode: number;
  readonly stdout: string;
  readonly stderr: string;
}

function onFake(argv: readonly string[]): Answer {
  let stdout = "";
  let stderr = "";
  const running = run(fake.machine, argv, {
    out: (text) => {
      stdout += text;
    },
    err: (text) => {
      stderr += text;
    },
  });
  return { exitCode: finish(fake.machine, running), stdout, stderr };
}

const onReal = (argv: readonly string[]) =>
  lab.server1.run(`LC_ALL=C LVM_SUPPRESS_FD_WARNINGS=1 ${quoteAll(argv)}`, { allowFailure: true });

const report = z.object({ report: z.array(z.object({ lv: z.array(z.record(z.string(), z.string())) })) });

/** What differs by nature: identities, times, paths by number; and volumes that only LVM itself sees. */
function rows({ stdout }: Answer): Record<string, string>[] {
  const differing = ["lv_uuid", "origin_uuid", "lv_time", "vg_free", "metadata_percent"];
  return (report.parse(JSON.parse(stdout)).report[0]?.lv ?? [])
    .filter((row) => !/^lvol0_pmspare$|_t(data|meta)$/.test(row.lv_name ?? ""))
    .map((row) => Object.fromEntries(Object.entries(row).filter(([field]) => !differing.includes(field))))
    .sort((a, b) => (String(a.lv_name) < String(b.lv_name) ? -1 : 1));
}

const uuidOf = (name: string, { stdout }: Answer) =>
  (report.parse(JSON.parse(stdout)).report[0]?.lv ?? []).find((row) => row.lv_name === name)?.lv_uuid ?? "";

/** Warnings, roundings and successes are LVM's own affair; what the provider reads is compared. */
function told(answer: Answer): { exitCode: number; failure: string } {
  const lines = answer.stderr.split("\n").filter((line) => !/^ *(WARNING|Rounding|Reducing)|^$/.test(line));
  return { exitCode: answer.exitCode, failure: answer.exitCode === 0 ? "" : lines.join("\n") };
}

const cow = (name: string, origin = "VgVm/vm1") => [
  "lvcreate",
  "-s",
  "-y",
  "-p",
  "r",
  "-n",
  name,
  "-c",
  "65536b",
  "-L",
  "16777216b",
  "--addtag",
  "a",
  origin,
];

it.each<[string, readonly string[]]>([
  ["a COW snapshot", cow("s1")],
  ["a name that is taken", cow("s1")],
  ["an origin that is not there", cow("s2", "VgVm/none")],
  ["a group that is not there", cow("s2", "None/vm1")],
  ["a thin snapshot", ["lvcreate", "-s", "-y", "-p", "r", "-n", "t1", "-kn", "-ay", "VgVm/thin1"]],
  [
    "a thin snapshot of what is not thin",
    ["lvcreate", "-s", "-y", "-p", "r", "-n", "t2", "-kn", "-ay", "VgVm/vm1"],
  ],
  ["growing", ["lvextend", "-y", "-L", "20971520b", "VgVm/s1"]],
  ["growing to what it has", ["lvextend", "-y", "-L", "20971520b", "VgVm/s1"]],
  ["writable", ["lvchange", "-y", "-p", "rw", "-S", 'lv_uuid="UUID s1"', "VgVm/s1"]],
  ["writable once more", ["lvchange", "-y", "-p", "rw", "-S", 'lv_uuid="UUID s1"', "VgVm/s1"]],
  ["other tags", ["lvchange", "-y", "--addtag", "b", "--deltag", "a", "-S", 'lv_uuid="UUID s1"', "VgVm/s1"]],
  [
    "a change of another by its name",
    ["lvchange", "-y", "--addtag", "c", "-S", 'lv_uuid="UUID t1"', "VgVm/s1"],
  ],
  ["another name", ["lvrename", "-y", "VgVm", "s1", "s3"]],
  ["a name that is gone", ["lvrename", "-y", "VgVm", "s1", "s4"]],
  ["a name that another has", ["lvrename", "-y", "VgVm", "s3", "t1"]],
  ["removing another by its name", ["lvremove", "-y", "-S", 'lv_uuid="UUID t1"', "VgVm/s3"]],
  ["removing what is not there", ["lvremove", "-y", "VgVm/s1"]],
  ["looking at one that is there", ["lvs", "VgVm/s3"]],
  ["looking at one that is not", ["lvs", "VgVm/s1"]],
  ["a group that is there", ["vgs", "--noheadings", "-o", "vg_name", "VgVm"]],
  ["a group that is not", ["vgs", "--noheadings", "-o", "vg_name", "None"]],
  ["removing what does not have the mark", ["lvremove", "-y", "-S", 'lv_tags={"a"}', "VgVm/s3"]],
  ["another snapshot", [...cow("s5").slice(0, -1), "--addtag", "lvm-nbd.making", "VgVm/vm1"]],
  [
    "removing what has the mark among others",
    ["lvremove", "-y", "-S", 'lv_tags={"lvm-nbd.making"}', "VgVm/s5"],
  ],
  ["removing", ["lvremove", "-y", "-S", 'lv_uuid="UUID s3"', "VgVm/s3"]],
  ["removing a thin one", ["lvremove", "-y", "-S", 'lv_uuid="UUID t1"', "VgVm/t1"]],
])("%s: the same answer, and the same volumes afterwards", async (_, argv) => {
  const [realBefore, fakeBefore] = [await onReal(lvsCommand()), onFake(lvsCommand())];
  const filled = (before: Answer) =>
    argv.map((argument) => argument.replace(/UUID (\w+)/, (__, name: string) => uuidOf(name, before)));
  const real = await onReal(filled(realBefore));
  const fakeAnswer = onFake(filled(fakeBefore));
  expect(told(fakeAnswer)).toEqual(told(real));
  expect(rows(onFake(lvsCommand()))).toEqual(rows(await onReal(lvsCommand())));
});
