/** Outputs recorded on the lab's servers (Debian 12, lvm2 2.03.16). */
import { readFileSync } from "node:fs";
import { join } from "node:path";

/** What `lvsCommand` printed in that state of the server. */
export function recordedLvs(
  state:
    | "empty"
    | "valid"
    | "overflowed"
    | "merging"
    | "mergeRunning"
    | "thinMergeScheduled"
    | "inactive"
    | "thin"
    | "poolFull",
): string {
  return readFileSync(join(process.cwd(), "test", "recorded", `${state}.json`), "utf8");
}

/** The recorded origin as thin volumes of several names and groups: every replacement finds a suitable one. */
export function suitableOrigins(): string {
  const report: { report: { lv: Record<string, string>[] }[] } = JSON.parse(recordedLvs("valid"));
  const origin = report.report[0]?.lv.find((row) => row.lv_name === "vm1");
  const as = (vg_name: string, lv_name: string) => ({ ...origin, vg_name, lv_name, lv_attr: "Vwi-a-tz--" });
  return JSON.stringify({ report: [{ lv: [as("VgVm", "vm1"), as("VgVm", "vm2"), as("VgOther", "vm1")] }] });
}

/**
 * What `pulumi preview --refresh --json` of the lab's stack streamed, without debug messages, what the program's steps
 * repeat after they are done, and the text of the providers' closures. Two snapshots with an export each and two images of one VM,
 * a snapshot and an image of hosts with keys of their own.
 */
export function recordedPreview(
  state:
    | "asDeclared"
    | "programChanged"
    | "driftedAndProgramChanged"
    | "accepted"
    | "overflowed"
    | "unreachable"
    | "invalid",
): string {
  return readFileSync(join(process.cwd(), "test", "recorded", "preview", `${state}.jsonl`), "utf8");
}

/**
 * The first 80 bytes, in hexadecimal digits, of a qcow2 image of 16 MiB, without or with another file, or of the format's
 * second version, as qemu-img (QEMU 7.2) made them.
 */
export function recordedQcow2Header(name: "plain" | "backingFile" | "dataFile" | "version2"): string {
  const headers: Record<typeof name, string> = JSON.parse(
    readFileSync(join(process.cwd(), "test", "recorded", "qcow2Headers.json"), "utf8"),
  );
  return headers[name];
}

/** The unit of an export of a device, as versions wrote it that knew no other. */
export function recordedExportUnit(): string {
  return readFileSync(join(process.cwd(), "test", "recorded", "exportOfDevice.service"), "utf8");
}
