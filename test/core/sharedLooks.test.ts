import { setTimeout } from "node:timers/promises";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { sharingLooks } from "../../provider/core/sharedLooks.js";
import type { CommandResult, Host, RemoteCommand } from "../../provider/ssh/types.js";

/** A host whose commands end when a test says so. */
class SlowHost implements Host {
  readonly name = "server1";
  machine: string | undefined = "one";
  exitCode = 0;
  readonly running: { end(stdout: string | Error): void; readonly signal: AbortSignal | undefined }[] = [];
  count = 0;

  async machineId() {
    return this.machine;
  }

  run(_command: RemoteCommand, signal?: AbortSignal): Promise<CommandResult> {
    this.count++;
    return new Promise((resolve, reject) => {
      const end = (stdout: string | Error) =>
        stdout instanceof Error ? reject(stdout) : resolve({ exitCode: this.exitCode, stdout, stderr: "" });
      signal?.addEventListener("abort", () => end(new Error("stopped")));
      this.running.push({ end, signal });
    });
  }

  /** Ends the command that was begun first, once it has. */
  async end(stdout: string | Error): Promise<void> {
    await settled();
    const [first] = this.running.splice(0, 1);
    if (first === undefined) throw new Error("nothing runs");
    first.end(stdout);
    await settled();
  }
}

/** Until everything has gone on as far as it can. */
async function settled(): Promise<void> {
  for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve));
}

const change: RemoteCommand = { argv: ["lvcreate"], kind: "change", deadlineSeconds: 10 };

function look(oldestSeconds = 0, argv: readonly string[] = ["lvs"]): RemoteCommand {
  return { argv, kind: "read", deadlineSeconds: 10, shared: { oldestSeconds } };
}

let slow: SlowHost;
let host: Host;
beforeEach(() => {
  slow = new SlowHost();
  host = sharingLooks(slow);
});
afterEach(() => {
  vi.useRealTimers();
});

const told = async (asked: Promise<CommandResult>) => (await asked).stdout;

it("who asks before a look has begun shares it, who asks later has the next one", async () => {
  const first = [host.run(look()), host.run(look()), sharingLooks(slow).run(look())];
  await settled();
  const later = [host.run(look()), host.run(look())];
  await slow.end("before");
  expect(await Promise.all(first.map(told))).toEqual(["before", "before", "before"]);
  await slow.end("after");
  expect(await Promise.all(later.map(told))).toEqual(["after", "after"]);
  expect(slow.count).toBe(2);
});

it("looks that are not the same, and those that say nothing, are shared by nobody", async () => {
  const alone: RemoteCommand = { argv: ["lvs"], kind: "read", deadlineSeconds: 10 };
  const asked = [host.run(look()), host.run(look(0, ["vgs"])), host.run(alone), host.run(alone)];
  asked.push(host.run({ ...look(), stdin: "more" }));
  await settled();
  expect(slow.count).toBe(5);
  for (const _ of asked) await slow.end("told");
  await Promise.all(asked);
});

it("what fails is told to all who share it, and the next one asks again", async () => {
  const asked = [host.run(look(20)), host.run(look(20))].map((one) => one.catch(String));
  await slow.end(new Error("no answer"));
  expect(await Promise.all(asked)).toEqual(["Error: no answer", "Error: no answer"]);
  const again = told(host.run(look(20)));
  await slow.end("told");
  expect(await again).toBe("told");
});

it("an answer that is a failure serves nobody who asks later", async () => {
  slow.exitCode = 5;
  const failed = told(host.run(look(20)));
  await slow.end("");
  await failed;
  slow.exitCode = 0;
  const again = told(host.run(look(20)));
  await slow.end("told");
  expect(await again).toBe("told");
});

it("who is cancelled leaves at once, and the look goes on for the others, until all have left", async () => {
  const [one, other] = [new AbortController(), new AbortController()];
  const left = host.run(look(), one.signal).catch(String);
  const stays = host.run(look(), other.signal).catch(String);
  await settled();
  one.abort();
  expect(await left).toContain("CANCELLED");
  expect(slow.running[0]?.signal?.aborted).toBe(false);
  const next = host.run(look(), other.signal).catch(String);
  other.abort();
  expect(await Promise.all([stays, next])).toEqual([
    expect.stringContaining("CANCELLED"),
    expect.stringContaining("CANCELLED"),
  ]);
  expect(slow.running[0]?.signal?.aborted).toBe(true);
  slow.running.splice(0);
  const after = told(host.run(look()));
  await slow.end("told");
  expect(await after).toBe("told");
  expect(slow.count).toBe(2);
});

it("an answer serves those whom a recent one will do, until it is too old", async () => {
  vi.useFakeTimers({ toFake: ["performance"] });
  const first = told(host.run(look(20)));
  await settled();
  // Also one that is not there yet.
  const joined = told(host.run(look(20)));
  await slow.end("first");
  expect(await Promise.all([first, joined])).toEqual(["first", "first"]);
  vi.advanceTimersByTime(15_000);
  expect(await told(host.run(look(20)))).toBe("first");
  expect(slow.count).toBe(1);
  vi.advanceTimersByTime(6000);
  const second = told(host.run(look(20)));
  await slow.end("second");
  expect(await second).toBe("second");
});

it("who acts on it has none that was begun before he asked", async () => {
  const first = told(host.run(look(20)));
  await slow.end("first");
  await first;
  const acts = told(host.run(look()));
  await slow.end("second");
  expect(await acts).toBe("second");
});

it.each<[string, () => Promise<void>]>([
  [
    "a change has ended, on another host",
    async () => {
      const other = new SlowHost();
      const changed = sharingLooks(other).run(change);
      await other.end("");
      await changed;
    },
  ],
  [
    "the name leads to another machine",
    async () => {
      slow.machine = "another";
    },
  ],
  [
    "it does not tell which machine it is",
    async () => {
      slow.machine = undefined;
    },
  ],
])("no recent answer serves when %s", async (_when, happens) => {
  const first = told(host.run(look(20)));
  await slow.end("first");
  await first;
  await happens();
  const next = told(host.run(look(20)));
  await slow.end("second");
  expect(await next).toBe("second");
  expect(slow.count).toBe(2);
});

it("what was begun while something was being changed, or before, serves nobody later", async () => {
  const other = new SlowHost();
  const changed = sharingLooks(other).run(change);
  const during = told(host.run(look(20)));
  await slow.end("during");
  await during;
  const across = told(host.run(look(20)));
  await settled();
  await other.end("");
  await changed;
  await slow.end("across");
  expect(await across).toBe("across");
  const after = told(host.run(look(20)));
  await slow.end("after");
  expect(await after).toBe("after");
  // That one was begun when nothing was changed any more.
  expect(await told(host.run(look(20)))).toBe("after");
});

it("one that a lost link has taken to another machine serves nobody else", async () => {
  const first = told(host.run(look(20)));
  await settled();
  slow.machine = "another";
  await slow.end("of the other");
  expect(await first).toBe("of the other");
  slow.machine = "one";
  const next = told(host.run(look(20)));
  await slow.end("own");
  expect(await next).toBe("own");
});

it("a look keeps the next one waiting only until it fails", async () => {
  const first = host.run(look()).catch(String);
  await settled();
  const second = told(host.run(look()));
  await setTimeout(5);
  expect(slow.count).toBe(1);
  await slow.end(new Error("timed out"));
  await slow.end("told");
  expect([await first, await second]).toEqual(["Error: timed out", "told"]);
});
