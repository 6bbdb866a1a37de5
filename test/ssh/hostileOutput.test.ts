/** What a host that was taken over prints: it costs bounded memory, and ends in an error that can be read. */
import { afterEach, expect, it } from "vitest";
import { createHandlers } from "../../provider/core/handlers.js";
import { resourceType } from "../../provider/core/registry.js";
import { Connection } from "../../provider/ssh/connection.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import { machineId } from "../support/machineId.js";
import { type Arrived, type FakeServer, startFakeServer, timing } from "./fakeServer.js";

const MiB = 1024 ** 2;

let server: FakeServer | undefined;
let stopped = false;
const pool = createHostPool();
afterEach(async () => {
  pool.close();
  await server?.close();
});

/** Writes that again and again as fast as it is read, until so many bytes are out. */
function pour(
  command: Arrived,
  text: string | Buffer,
  bytes: number,
  into = command.channel as NodeJS.WritableStream,
) {
  const piece = Buffer.concat(Array<Buffer>(Math.ceil(30_000 / text.length)).fill(Buffer.from(text)));
  let left = bytes;
  const more = () => {
    if (!command.channel.writable || command.socket.destroyed) return;
    if (left <= 0 || stopped) return command.exit();
    left -= piece.length;
    into.write(piece, () => setImmediate(more));
  };
  more();
}

/** By how many bytes this process has grown at most since then. */
function watchMemory(): () => number {
  const before = process.memoryUsage.rss();
  let most = before;
  const watching = setInterval(() => {
    most = Math.max(most, process.memoryUsage.rss());
  }, 20);
  return () => {
    clearInterval(watching);
    return most - before;
  };
}

const answers = (text: string | Buffer) => (command: Arrived) => {
  command.started();
  command.channel.write(text);
  command.exit();
};

const escapes = "\u001b]0;owned\u0007\u001b[2J\u001b[31m\u009b1m";

it.each<[what: string, code: string, run: (command: Arrived) => void]>([
  ["nothing", "OUTPUT_UNREADABLE", answers("")],
  ["JSON that breaks off", "OUTPUT_UNREADABLE", answers('{"report": [{"lv": [')],
  ["JSON of another shape", "OUTPUT_UNREADABLE", answers('{"report": [{"lv": [{"lv_name": 5}]}]}')],
  ["JSON that is nested without end", "OUTPUT_UNREADABLE", answers("[".repeat(2 * MiB))],
  ["no report at all", "OUTPUT_UNREADABLE", answers('{"report": []}')],
  ["escape codes", "OUTPUT_UNREADABLE", answers(escapes)],
  ["NUL bytes", "OUTPUT_UNREADABLE", answers(Buffer.alloc(4096))],
  [
    "bytes that are no UTF-8",
    "OUTPUT_UNREADABLE",
    answers(Buffer.from([0x7b, 0xff, 0xfe, 0xc3, 0x28, 0x7d])),
  ],
  [
    "a line of 100 MB",
    "OUTPUT_TOO_LARGE",
    (command) => {
      command.started();
      pour(command, "x", 100 * MiB);
    },
  ],
  [
    "without end",
    "OUTPUT_TOO_LARGE",
    (command) => {
      command.started();
      pour(command, `${escapes}\n`, Number.POSITIVE_INFINITY);
    },
  ],
  [
    "errors without end",
    "OUTPUT_TOO_LARGE",
    (command) => {
      command.started();
      pour(command, `${escapes}\n`, Number.POSITIVE_INFINITY, command.channel.stderr);
    },
  ],
  [
    "errors full of escape codes",
    "COMMAND_FAILED",
    (command) => {
      command.started();
      command.channel.stderr.write(`${escapes}\n`.repeat(10_000));
      command.exit(5);
    },
  ],
  ["machine-ids without end", "OUTPUT_TOO_LARGE", answers("0123456789abcdef".repeat(MiB))],
  ["machine-ids that are none", "OUTPUT_UNREADABLE", answers(escapes)],
])("a host that prints %s: %s", async (what, code, run) => {
  stopped = false;
  const kill = (command: Arrived) => {
    stopped = true;
    command.exit();
  };
  const sane = (command: Arrived) => {
    command.started();
    command.exit(0, `${machineId}\n`);
  };
  // Which machine it is, it tells: else nothing more would be asked of it.
  const tells = (command: Arrived) =>
    command.line.includes("/etc/machine-id") ? sane(command) : run(command);
  server = await startFakeServer({ run: what.startsWith("machine") ? run : tells, kill });
  const handlers = createHandlers(resourceType("LvSnapshot"), {
    openHost: (host) => pool.get(host),
    progress: () => undefined,
    warn: () => undefined,
    signal: new AbortController().signal,
  });
  const { inputs } = await handlers.check(
    undefined,
    {
      ...{ owner: "o/p/s/vm1", volumeGroup: "VgVm", origin: "vm1", name: "vm1-snap", size: "8M" },
      host: { address: "127.0.0.1", port: server.port, password: "x", hostKey: server.publicKey },
    },
    new Set(),
  );
  const memory = watchMemory();
  const error = await handlers.create(inputs).catch((reason: unknown) => reason);
  const grown = memory();
  expect(error).toMatchObject({ code });
  const text = String(error);
  expect(text).toMatch(/what to do: \S/);
  expect(text.length).toBeLessThan(10_000);
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what must not be there
  expect(text).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/);
  expect(grown).toBeLessThan(300 * MiB);
});

it("a host that does not confirm a command and sends on and on: the connection is ended", async () => {
  server = await startFakeServer({
    exec: (_line, socket, send) => {
      const more = () => {
        for (let packets = 0; packets < 100 && !socket.destroyed; packets++) send(Buffer.alloc(30_000));
        // As fast as it is taken.
        if (!socket.destroyed) socket.write("", () => setImmediate(more));
      };
      more();
      return false;
    },
  });
  const connection = await Connection.open(server.host(), timing);
  const memory = watchMemory();
  const ran = connection.run({ argv: ["lvs"], deadlineSeconds: 5, kind: "read" }, undefined);
  await expect(ran).rejects.toThrow("the host sent more than it may");
  expect(memory()).toBeLessThan(300 * MiB);
});

it("a host that prints each byte by itself: OUTPUT_TOO_LARGE before that costs much more than it says", async () => {
  let printing: Arrived | undefined;
  server = await startFakeServer({
    run: (command) => {
      printing = command;
      command.started();
      // When its process id has been read.
      command.channel.resume().on("end", () => {
        for (let bytes = 0; bytes < 2000; bytes++) command.channel.write("x");
      });
    },
    kill: (command) => {
      command.exit();
      printing?.exit();
    },
  });
  const connection = await Connection.open(server.host(), timing);
  const command = { argv: ["lvs"], deadlineSeconds: 60, maxOutputBytes: 64 * 1024, kind: "read" } as const;
  const ran = connection.run(command, AbortSignal.timeout(10_000));
  await expect(ran).rejects.toMatchObject({ code: "OUTPUT_TOO_LARGE" });
  connection.end();
});
