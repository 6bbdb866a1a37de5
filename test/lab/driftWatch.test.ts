/** examples/drift-watch against real servers, and its units under a real systemd. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { type ChildResult, runChild } from "./child.mts";
import { backupImage, FaultStack, nbdExport, output, snapshot } from "./faults/fault-stack.mts";
import type { Lab } from "./lab.mts";
import { freshLab, makeOrigin } from "./support.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

const example = join(__dirname, "..", "..", "examples", "drift-watch");
const exportUnit = "lvm-nbd-export-vm1-export.service";
let lab: Lab;
let stack: FaultStack;
let out: string;

beforeAll(async () => {
  lab = await freshLab();
  out = mkdtempSync(join(tmpdir(), "lvm-nbd-watch-"));
  [stack] = await Promise.all([
    FaultStack.create(lab),
    makeOrigin(lab.server1),
    lab.server2.run("mkdir /backup"),
  ]);
  stack.declare(
    snapshot("vm1", { origin: "LV-VM1", size: "8M" }),
    nbdExport("vm1-export", { device: output("vm1", "path") }),
    snapshot("vm1-second", { origin: "LV-VM1", size: "8M" }),
    backupImage("monday", {}, [{ origin: "LV-VM1", size: "8M", file: "/backup/monday.raw" }], {}),
  );
  (await stack.up()).succeeded("5 created");
});

afterAll(() => {
  stack?.close();
  if (out !== undefined) rmSync(out, { recursive: true });
});

/** All that the provider could change on the servers, and when units were started. */
async function fingerprint(): Promise<string> {
  const look = (server: "server1" | "server2") =>
    lab[server].run(`
      vgs --noheadings -o vg_seqno,vg_tags; lvs -a --noheadings -o lv_name,lv_uuid,lv_attr,lv_tags | sort
      systemctl show -p ActiveState -p UnitFileState -p InvocationID 'lvm-nbd-*'
      find /etc/systemd/system /etc/lvm-nbd /etc/modules-load.d /backup -type f -exec stat -c '%n %s %.9Y %i' {} + 2>/dev/null | sort`);
  const [one, two] = [await look("server1"), await look("server2")];
  return one.stdout + two.stdout;
}

/** Runs the example as its unit does. */
function watch(...more: string[]): Promise<ChildResult> {
  const { projectDir, name, env } = stack.cli;
  const program = [join(example, "main.ts"), "--project", projectDir, "--stack", name, "--out", out];
  return runChild(["node", ...program, ...more], { env, allowFailure: true, timeoutSeconds: 300 });
}

/** As `watch`; neither a server nor the state is other than before. */
async function watched(...more: string[]): Promise<ChildResult> {
  const before = [await fingerprint(), await stack.cli.exportState()];
  const result = await watch(...more);
  expect([await fingerprint(), await stack.cli.exportState()]).toEqual(before);
  return result;
}

const file = (name: string) => readFileSync(join(out, name), "utf8");
const metric = (name: string) =>
  file("lvm_nbd.prom")
    .split("\n")
    .filter((line) => line.startsWith(`${name}{`))
    .map((line) => Number(line.split(" ").at(-1)));

it("nothing has drifted: 0, with the snapshots' fill level and the newest image, and nothing is changed", async () => {
  await lab.server1.run(
    "dd if=/dev/urandom of=/dev/VgVm/LV-VM1 bs=1M count=2 oflag=direct status=none; sync",
  );
  const { exitCode, stdout, stderr } = await watched();
  expect(exitCode, stdout + stderr).toBe(0);
  expect(readdirSync(out).sort()).toEqual(["lvm_nbd.prom", "report.json", "report.txt"]);
  expect(metric("lvm_nbd_watch_up")).toEqual([1]);
  expect(metric("lvm_nbd_drifted_resources")).toEqual([0]);
  const used = metric("lvm_nbd_snapshot_used_ratio");
  expect(used).toHaveLength(2);
  for (const ratio of used) expect(ratio).toBeGreaterThan(0.2);
  expect(metric("lvm_nbd_backup_newest_image_size_bytes")).toEqual([16 * 1024 ** 2]);
  const moment = Date.parse(String((await stack.state()).get("monday")?.takenAt)) / 1000;
  expect(metric("lvm_nbd_backup_newest_image_timestamp_seconds")).toEqual([moment]);
  expect(JSON.parse(file("report.json"))).toMatchObject({
    outcome: "good",
    backups: [{ vm: "server1:VgVm/LV-VM1", soundImages: 1 }],
  });
});

it("the newest image is too old: 1", async () => {
  const { exitCode, stdout } = await watched("--max-age-hours", "0.0001");
  expect(exitCode).toBe(1);
  expect(stdout).toMatch(/server1:VgVm\/LV-VM1 .*PROBLEM: the newest image is older than 0.0001 hours/);
});

it("an export is stopped, a snapshot and an image are removed: 1, each is named, and nothing is mended", async () => {
  await lab.server1.run(`systemctl stop ${exportUnit}; lvremove -qq -f VgVm/vm1-second`);
  await lab.server2.run("rm /backup/monday.raw");
  const { exitCode, stdout } = await watched();
  expect(exitCode, stdout).toBe(1);
  expect(stdout).toContain("NbdExport vm1-export on server1\n    is stopped");
  expect(stdout).toContain("LvSnapshot vm1-second on server1\n    is gone");
  expect(stdout).toContain("BackupImage monday on server2\n    is gone");
  expect(stdout).toContain("there is no verified and sound image");
  expect(metric("lvm_nbd_drifted_resources")).toEqual([3]);
  expect(metric("lvm_nbd_backup_sound_images")).toEqual([0]);
  expect(JSON.parse(file("report.json"))).toMatchObject({ outcome: "attention", pending: [] });
});

it("a server is cut off: 2, with no figure of before, though the other is told of", async () => {
  const known = JSON.parse(file("report.json")).lastSuccessAt;
  const before = await fingerprint();
  await lab.server1.freeze();
  const { exitCode, stdout } = await watch().finally(() => lab.server1.thaw());
  expect(await fingerprint()).toBe(before);
  expect(exitCode, stdout).toBe(2);
  expect(stdout).toContain("HOST_UNREACHABLE: NbdExport vm1-export on host server1");
  expect(stdout).toContain("BackupImage monday on server2\n    is gone");
  expect(metric("lvm_nbd_watch_up")).toEqual([0]);
  expect(file("lvm_nbd.prom")).not.toMatch(/snapshot_used_ratio|backup_|drifted/);
  expect(JSON.parse(file("report.json"))).toMatchObject({ outcome: "unknown", lastSuccessAt: known });
});

it("the systemd units are right, fail for 2 and not for 1, and are hardened", async () => {
  const units = readdirSync(join(example, "systemd"));
  for (const unit of units)
    await lab.server1.run(`cat >/etc/systemd/system/${unit}`, {
      stdin: readFileSync(join(example, "systemd", unit), "utf8"),
    });
  // What the program's place is taken by ends with the status that is written in a file.
  await lab.server1.run(`
    useradd --system drift-watch; mkdir -p /etc/drift-watch && echo secret >/etc/drift-watch/passphrase
    printf '#!/bin/sh\\ntest "$(cat "$PULUMI_CONFIG_PASSPHRASE_FILE")" = secret && echo "$*" >/var/lib/drift-watch/report/report.txt || exit 9\\nexit "$(cat /etc/drift-watch/status)"\\n' >/usr/bin/node
    chmod +x /usr/bin/node; systemctl daemon-reload`);
  const verified = await lab.server1.run("systemd-analyze verify drift-watch.service drift-watch.timer 2>&1");
  expect(verified.stdout).not.toContain("drift-watch");
  const run = async (status: number) =>
    (
      await lab.server1.run(
        `echo ${status} >/etc/drift-watch/status; systemctl start drift-watch.service; echo $?; systemctl show -p Result --value drift-watch.service`,
      )
    ).stdout
      .trim()
      .split("\n");
  expect(await run(0)).toEqual(["0", "success"]);
  expect(await run(1)).toEqual(["0", "success"]);
  expect(await run(2)).toEqual(["1", "exit-code"]);
  const { stdout: said } = await lab.server1.run("cat /var/lib/drift-watch/report/report.txt");
  expect(said).toMatch(/^\/opt\/drift-watch\/main.ts --project \S+ --stack prod --out \S+ /);
  const { stdout: exposure } = await lab.server1.run(
    "systemd-analyze security --no-pager drift-watch.service | tail -n 1",
  );
  expect(Number(/exposure level for drift-watch.service: ([\d.]+)/.exec(exposure)?.[1])).toBeLessThan(3);
  await lab.server1.run("systemctl enable --now -q drift-watch.timer");
  const { stdout: next } = await lab.server1.run("systemctl list-timers --no-legend drift-watch.timer");
  expect(next).toContain("drift-watch.service");
});
