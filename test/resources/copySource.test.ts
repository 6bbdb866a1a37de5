/** Sources that are read on their own host. */
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import type { Context } from "../../provider/core/resource.js";
import { checkDeviceScript } from "../../provider/linux/deviceCopy.js";
import { aliveSeconds } from "../../provider/linux/holders.js";
import { zeroRangesScript } from "../../provider/linux/zeroRanges.js";
import {
  asReadable,
  begunWith,
  certifySize,
  emptyRanges,
  sourceSumOf,
} from "../../provider/resources/copySource.js";
import { deviceSum } from "../../provider/resources/deviceCopy.js";
import { leastChunk } from "../../provider/ssh/receiveWindow.js";
import type { CommandResult, Host, RemoteCommand } from "../../provider/ssh/types.js";
import { fakeHost } from "../support/fakeHost.js";
import { recordedLvs } from "../support/recorded.js";

const recorded = JSON.parse(recordedLvs("valid")).report[0].lv.find(
  (row: Readonly<Record<string, unknown>>) => row.lv_attr === "sri-a-s---",
);
const snapshot = {
  ...{ host: "server1", volumeGroup: recorded.vg_name, name: recorded.lv_name, uuid: recorded.lv_uuid },
};
const sum = "0".repeat(64);

/** A host on which a reading goes on until it is let go, or cancelled. */
class SlowHost implements Host {
  readonly name = "server1";
  /** How its volumes are; "writable": the snapshot among valid ones. */
  volumes: "valid" | "overflowed" | "writable" = "valid";
  readonly #looks = fakeHost(() =>
    this.volumes === "writable"
      ? recordedLvs("valid").replaceAll("sri-a-s---", "swi-a-s---")
      : recordedLvs(this.volumes),
  );
  readonly #waiting: (() => void)[] = [];
  reading = 0;
  /** What a reading says in the end, after that it was on its way. */
  says = `\n\n${sum}\n`;
  /** How many were begun. */
  begun = 0;

  async machineId(): Promise<undefined> {
    return undefined;
  }

  /** What the reading prints meanwhile. */
  say = (_text: string): void => {
    throw new Error("nobody listens");
  };
  readonly commands: RemoteCommand[] = [];

  async run(command: RemoteCommand, signal?: AbortSignal): Promise<CommandResult> {
    this.commands.push(command);
    if (command.argv[2] !== checkDeviceScript) return this.#looks.run(command);
    if (signal?.aborted) throw new LvmNbdError("CANCELLED", { message: "cancelled before it began" });
    this.begun++;
    this.reading++;
    this.say = command.onOutput ?? this.say;
    try {
      await new Promise<void>((resolve, reject) => {
        this.#waiting.push(resolve);
        signal?.addEventListener("abort", () =>
          reject(new LvmNbdError("CANCELLED", { message: "cancelled" })),
        );
      });
    } finally {
      this.reading--;
    }
    return { exitCode: 0, stdout: this.says, stderr: "" };
  }

  letGo(): void {
    this.#waiting.shift()?.();
  }
}

function contextOn(host: Host, signal: AbortSignal): Context {
  return {
    ...{ host, resource: "VolumeCopy vm1", signal },
    progress: () => undefined,
    warn: () => undefined,
    open: async () => host,
  };
}

function read(context: Context, tell: (progress: string) => void = () => undefined): Promise<string> {
  const sourceSum = sourceSumOf({ snapshot, verify: true });
  if (sourceSum === undefined) throw new Error("it is read there");
  return sourceSum(context, tell);
}

describe("the checksum of a source", () => {
  it.each([
    ["without `verify`", { snapshot, verify: false }],
    ["with a limit", { snapshot, verify: true, bandwidthLimit: "20M" }],
    ["of which only the uri is known", { verify: true }],
  ])("is not read on its host %s", (_what, source) => {
    expect(sourceSumOf(source)).toBeUndefined();
  });

  it("is read beside three others; who is cancelled does not wait for them, and reads nothing", async () => {
    const host = new SlowHost();
    const cancel = new AbortController();
    const { signal } = new AbortController();
    const others = [1, 2, 3, 4].map(() => read(contextOn(host, signal)));
    const told: string[] = [];
    const one = read(contextOn(host, cancel.signal), (line) => told.push(line));
    await until(() => host.reading === 4);
    cancel.abort();
    await expect(one).rejects.toMatchObject({ code: "CANCELLED" });
    expect(told).toEqual(["waiting until other sources are read on server1"]);
    expect(host.reading).toBe(4);
    const later = read(contextOn(host, signal));
    for (const _ of others) host.letGo();
    expect(await Promise.all(others)).toEqual([sum, sum, sum, sum]);
    await until(() => host.reading === 1);
    host.letGo();
    expect(await later).toBe(sum);
    expect(host.begun).toBe(5);
  });

  it("is not read of what ran full while it waited for its turn", async () => {
    const host = new SlowHost();
    const { signal } = new AbortController();
    const others = [1, 2, 3, 4].map(() => read(contextOn(host, signal)));
    const last = read(contextOn(host, signal));
    await until(() => host.reading === 4);
    host.volumes = "overflowed";
    for (const _ of others) host.letGo();
    await Promise.all(others);
    await expect(last).rejects.toMatchObject({ code: "SNAPSHOT_OVERFLOWED" });
    expect(host.begun).toBe(4);
  });

  it("is not read of what may be written to: beside the copy it would prove nothing", async () => {
    const host = new SlowHost();
    host.volumes = "writable";
    const { signal } = new AbortController();
    await expect(read(contextOn(host, signal))).rejects.toMatchObject({ code: "COPY_UNCERTIFIED" });
    const warnings: string[] = [];
    const context = { ...contextOn(host, signal), warn: (line: string) => warnings.push(line) };
    const source = await asReadable(context, { snapshot, verify: true });
    expect(sourceSumOf(source)).toBeUndefined();
    expect(begunWith(source)).toEqual({ verify: true, readThere: false });
    expect([host.begun, warnings]).toEqual([0, []]);
  });

  it("of what was made writable meanwhile certifies no copy; of one that was read again afterwards it does", async () => {
    const host = new SlowHost();
    const context = contextOn(host, new AbortController().signal);
    const source = { snapshot, verify: true, uri: "nbd://10.0.0.1/vm1" };
    const sizeBytes = Number(recorded.origin_size);
    expect(await certifySize(context, source, sizeBytes, source)).toMatchObject({ uuid: snapshot.uuid });
    host.volumes = "writable";
    await expect(certifySize(context, source, sizeBytes, source)).rejects.toMatchObject({
      code: "COPY_UNCERTIFIED",
    });
    expect(await certifySize(context, source, sizeBytes, { ...source, refusedThere: true })).toMatchObject({
      uuid: snapshot.uuid,
    });
  });

  it("that is cancelled has ended when that is told: what reads a snapshot holds it", async () => {
    const host = new SlowHost();
    const cancel = new AbortController();
    const only = read(contextOn(host, cancel.signal));
    await until(() => host.reading === 1);
    cancel.abort();
    await expect(only).rejects.toMatchObject({ code: "CANCELLED" });
    expect(host.reading).toBe(0);
  });

  describe("is ended where its reading hangs", () => {
    beforeEach(() => {
      vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    });
    afterEach(() => {
      vi.useRealTimers();
    });

    it("for minutes at one place, and tells until then how far it is", async () => {
      const host = new SlowHost();
      const told: string[] = [];
      const only = read(contextOn(host, new AbortController().signal), (line) => told.push(line));
      const failed = expect(only).rejects.toMatchObject({ code: "SOURCE_STALLED" });
      await until(() => host.reading === 1);
      host.say("0\n".repeat(60));
      host.say("16777");
      host.say("216\n");
      host.say("16777216\n".repeat(59));
      host.say("33554432\n".repeat(60));
      expect(host.reading).toBe(1);
      host.say("33554432\n");
      await failed;
      expect(host.reading).toBe(0);
      const phrases = [...new Set(told)].filter((line) => line.startsWith("reading the source"));
      expect(phrases).toEqual(
        [/: 0 % of 64 MiB/, /: 25 % of 64 MiB, \S+ \S+\/s, .* left$/, /: 50 % of/].map((line) =>
          expect.stringMatching(line),
        ),
      );
    });

    it("not where only this process stood still, and what was said meanwhile comes now", async () => {
      const host = new SlowHost();
      const only = read(contextOn(host, new AbortController().signal));
      await until(() => host.reading === 1);
      host.say("0\n");
      for (const position of [1, 2, 3]) {
        await vi.advanceTimersByTimeAsync(305_000);
        host.say(`${position}\n`);
      }
      host.letGo();
      expect(await only).toBe(sum);
    });

    it("before it says anything", async () => {
      const host = new SlowHost();
      const only = read(contextOn(host, new AbortController().signal));
      const failed = expect(only).rejects.toMatchObject({ code: "SOURCE_STALLED" });
      await until(() => host.reading === 1);
      await vi.advanceTimersByTimeAsync(310_000);
      await failed;
    });

    it("and not where it cannot be told at which place it is", async () => {
      const host = new SlowHost();
      const only = read(contextOn(host, new AbortController().signal));
      await until(() => host.reading === 1);
      for (let minutes = 0; minutes < 20; minutes += 4) {
        host.say("\n");
        await vi.advanceTimersByTimeAsync(240_000);
      }
      host.says = `\n512\n${sum}\n1024\n`;
      host.letGo();
      expect(await only).toBe(sum);
    });

    it("and not who is cancelled", async () => {
      const host = new SlowHost();
      const cancel = new AbortController();
      const only = read(contextOn(host, cancel.signal));
      await until(() => host.reading === 1);
      cancel.abort();
      await expect(only).rejects.toMatchObject({ code: "CANCELLED" });
      expect(vi.getTimerCount()).toBe(0);
    });
  });

  it.each([
    ["nothing", "\n\n"],
    ["a part of one", `\n${sum.slice(1)}\n`],
    ["one and more", `Last login: never\n${sum}\n`],
    ["two", `${sum}\n${sum}\n`],
    ["the words of another program", `${"g".repeat(64)}\n`],
  ])("is not read from %s", async (_what, says) => {
    const host = new SlowHost();
    host.says = says;
    const only = read(contextOn(host, new AbortController().signal));
    await until(() => host.reading === 1);
    host.letGo();
    await expect(only).rejects.toMatchObject({ code: "OUTPUT_UNREADABLE" });
  });
});

it.each([64 * 1024 ** 2, 2 * 1024 ** 4, 64 * 1024 ** 4])(
  "a device of %d bytes may be read until its deadline: saying so does not add up to too much output",
  async (sizeBytes) => {
    const host = fakeHost(() => `${sum}\n`);
    expect(await deviceSum(contextOn(host, new AbortController().signal), "/dev/VgVm/vm1", sizeBytes)).toBe(
      sum,
    );
    const [{ deadlineSeconds = 0, maxOutputBytes = 16 * 1024 ** 2 } = {}] = host.commands;
    expect(maxOutputBytes).toBeGreaterThan((deadlineSeconds / aliveSeconds + 1) * leastChunk);
  },
);

it("what is read for hours takes no session from what is not", async () => {
  const looked = fakeHost(({ argv }) => (argv[2] === zeroRangesScript ? "end\n" : recordedLvs("valid")));
  const { signal } = new AbortController();
  await emptyRanges(contextOn(looked, signal), { snapshot, verify: true }, 64 * 1024 ** 2);
  const host = new SlowHost();
  const reading = read(contextOn(host, signal));
  await until(() => host.reading === 1);
  host.letGo();
  await reading;
  const apart = [...looked.commands, ...host.commands].filter(({ ownConnection }) => ownConnection);
  expect(apart.map(({ argv }) => argv[2])).toEqual([zeroRangesScript, checkDeviceScript]);
});

async function until(done: () => boolean): Promise<void> {
  const end = Date.now() + 10_000;
  while (!done()) {
    if (Date.now() > end) throw new Error("it did not come to pass");
    await new Promise((resolve) => setImmediate(resolve));
  }
}
