import { afterEach, beforeEach, expect, it, vi } from "vitest";
import type { Context } from "../../provider/core/resource.js";
import { sharingLooks } from "../../provider/core/sharedLooks.js";
import { absent, lookAmongOthers } from "../../provider/resources/hostPicture.js";
import type { Host } from "../../provider/ssh/types.js";

beforeEach(() => {
  vi.useFakeTimers({ toFake: ["performance"] });
});
afterEach(() => {
  vi.useRealTimers();
});

const alone = { exitCode: 0, stdout: "what the unit's own look prints", stderr: "" };

/** A host of which a picture takes that long, and what is asked of it. */
function picturing(seconds: number) {
  let pictures = 0;
  const host: Host = {
    name: "server1",
    machineId: async () => "one",
    run: async () => {
      pictures++;
      vi.advanceTimersByTime(seconds * 1000);
      const units = Buffer.from("-.slice\nend").toString("base64");
      return { exitCode: 0, stdout: `units ${units}\nend =\n`, stderr: "" };
    },
  };
  const context: Context = {
    ...{ host: sharingLooks(host), resource: "NbdExport vm1", recentSeconds: 20 },
    ...{ signal: new AbortController().signal, progress: () => undefined, warn: () => undefined },
    open: async () => host,
  };
  return {
    ask: () => lookAmongOthers(context, "lvm-nbd-export-vm1.service", async () => alone),
    pictures: () => pictures,
  };
}

it("a picture serves those who ask soon after it, and who comes later has another", async () => {
  const { ask, pictures } = picturing(5);
  expect([await ask(), await ask()]).toEqual([absent, absent]);
  expect(pictures()).toBe(1);
  vi.advanceTimersByTime(20_000);
  expect([await ask(), pictures()]).toEqual([absent, 2]);
});

it("nobody waits for another one of a host of which it took so long that it would serve nobody else", async () => {
  const { ask, pictures } = picturing(25);
  expect(await Promise.all([ask(), ask()])).toEqual([absent, absent]);
  expect([await ask(), pictures()]).toEqual([alone, 1]);
  vi.advanceTimersByTime(30_000);
  expect([await ask(), pictures()]).toEqual([alone, 1]);
});
