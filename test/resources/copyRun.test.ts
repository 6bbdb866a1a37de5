/** A copy whose source is read on its own host beside its job. */
import { describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import type { Context } from "../../provider/core/resource.js";
import { type CopyRun, runCopy, type SourceSum } from "../../provider/resources/copyRun.js";
import { fakeHost } from "../support/fakeHost.js";
import { fields } from "../support/fields.js";

vi.mock("node:timers/promises", async (original) =>
  (await import("../support/shortWaits.js")).shortWaits(await original()),
);

const sum = "0".repeat(64);
const recordDigest = "d".repeat(64);
const result = {
  ...{ sizeBytes: 1024, sha256: sum, facts: "", verified: false, startedAt: 1, endedAt: 2, tools: "" },
};

/** A job of ours that is gone on with, and its looks. */
function job(sourceSum: SourceSum) {
  const lines: string[] = [];
  const discarded: string[] = [];
  const seen = { looks: 0, ended: false };
  const host = fakeHost(() => {
    seen.looks++;
    const show = `ActiveState=${seen.ended ? "inactive" : "active"}\nCPUUsageNSec=${seen.looks}\n`;
    const told = { show, phase: "verify 1", size: "1024", now: "2", recordDigest, end: "" };
    return fields(seen.ended ? { ...told, result: JSON.stringify(result) } : told);
  });
  const context: Context = {
    ...{ host, resource: "VolumeCopy vm1", signal: new AbortController().signal },
    progress: (line) => lines.push(line),
    warn: (line) => lines.push(line),
    open: async () => host,
  };
  const run: CopyRun<boolean> = {
    ...{
      target: "vm1",
      unfinished: "vm1.part",
      whenFull: undefined,
      going: recordDigest,
      following: ["look"],
    },
    prepare: async () => "",
    start: async () => undefined,
    sourceSum,
    certify: async ({ verified }) => verified,
    discard: async (_to, record) => {
      discarded.push(record);
    },
    explain: async (error) => error,
  };
  return { lines, discarded, seen, made: () => runCopy(context, run) };
}

describe("what reads the source beside the job", () => {
  it("is followed when nothing else is waited for, and not before", async () => {
    let tell = (_line: string): void => undefined;
    let read = (_sum: string): void => undefined;
    const { lines, seen, made } = job((_context, told) => {
      tell = told;
      return new Promise((resolve) => {
        read = resolve;
      });
    });
    const making = made();
    await vi.waitFor(() => expect(seen.looks).toBeGreaterThan(1));
    tell("25 % there");
    seen.ended = true;
    await vi.waitFor(() => expect(lines.join("\n")).toContain("waiting for the checksum"), { timeout: 5000 });
    tell("50 % there");
    read(sum);
    expect(await making).toBe(true);
    expect(lines).toContain("50 % there");
    expect(lines).not.toContain("25 % there");
  });

  it.each(["SUDO_DENIED", "SOURCE_STALLED"] as const)(
    "is told at once when it cannot go on: %s; the job does",
    async (code) => {
      const { lines, discarded, seen, made } = job(() =>
        Promise.reject(new LvmNbdError(code, { message: "no" })),
      );
      await expect(made()).rejects.toMatchObject({ code });
      expect(seen.ended).toBe(false);
      expect(discarded).toEqual([]);
      expect(lines.join("\n")).toContain("the copy to vm1 goes on");
    },
  );

  it.each(["COPY_FAILED", "COPY_STALLED", "SNAPSHOT_OVERFLOWED"] as const)(
    "ends the job that cannot be compared any more: %s",
    async (code) => {
      const { lines, discarded, made } = job(() => Promise.reject(new LvmNbdError(code, { message: "no" })));
      await expect(made()).rejects.toMatchObject({ code });
      expect(discarded).toEqual([recordDigest]);
      expect(lines.join("\n")).not.toContain("goes on:");
    },
  );

  it.each([
    ...(["HOST_UNREACHABLE", "AUTH_FAILED", "COMMAND_TIMED_OUT", "COMMAND_FAILED"] as const),
    "OUTPUT_UNREADABLE",
  ] as const)("is begun anew when the job has ended, after what may have passed: %s", async (code) => {
    let begun = 0;
    const { seen, made } = job(async () => {
      if (++begun === 1) throw new LvmNbdError(code, { message: "not now" });
      return sum;
    });
    const making = made();
    await vi.waitFor(() => expect(seen.looks).toBeGreaterThan(1));
    expect(begun).toBe(1);
    seen.ended = true;
    expect(await making).toBe(true);
    expect(begun).toBe(2);
  });
});
