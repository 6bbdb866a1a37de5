import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { isLvmNbdError, type LvmNbdError } from "../../provider/core/errors.js";
import { Connection, LinkLost } from "../../provider/ssh/connection.js";
import { createHostPool, type HostPool } from "../../provider/ssh/pool.js";
import type { CommandResult, HostConnection, RemoteCommand } from "../../provider/ssh/types.js";
import {
  type Arrived,
  type FakeServer,
  type FakeServerOptions,
  fakeHostKey,
  startFakeServer,
  timing,
  until,
} from "./fakeServer.js";

const read: RemoteCommand = { argv: ["lvs"], deadlineSeconds: 30, kind: "read" };
const change: RemoteCommand = { argv: ["lvcreate"], deadlineSeconds: 30, kind: "change" };

const cleanup: (() => unknown)[] = [];
const unhandled: unknown[] = [];
const note = (reason: unknown) => unhandled.push(reason);
beforeEach(() => {
  process.on("unhandledRejection", note);
});
afterEach(async () => {
  for (const act of cleanup.splice(0).reverse()) await act();
  // Unhandled rejections are told once the microtasks are done.
  await new Promise((resolve) => setImmediate(resolve));
  process.off("unhandledRejection", note);
  expect(unhandled.splice(0)).toEqual([]);
});

async function serve(options?: FakeServerOptions): Promise<FakeServer> {
  const server = await startFakeServer(options);
  cleanup.push(() => server.close());
  return server;
}

function pool(connect = timing.connect): HostPool {
  const made = createHostPool({
    connect: (host) => Connection.open(host, { ...timing, connect }),
    backoff: [10, 20, 40],
  });
  cleanup.push(() => made.close());
  return made;
}

function args(server: FakeServer): HostConnection {
  return { address: "127.0.0.1", port: server.port, password: "hunter2", hostKey: server.publicKey };
}

async function failure(promise: Promise<unknown>): Promise<LvmNbdError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!isLvmNbdError(error)) throw new Error(`expected an LvmNbdError, got ${String(error)}`);
  return error;
}

async function freePort(): Promise<number> {
  const probe = createServer();
  await new Promise<void>((resolve) => probe.listen(0, "127.0.0.1", resolve));
  const address = probe.address();
  await new Promise((resolve) => probe.close(resolve));
  if (typeof address !== "object" || address === null) throw new Error("no port");
  return address.port;
}

test("first uses at the same time share one connection", async () => {
  const server = await serve();
  const hosts = pool();
  const results = await Promise.all(
    Array.from({ length: 10 }, async () => (await hosts.get(args(server))).run(read)),
  );
  expect(results.map((result) => result.stdout)).toEqual(Array(10).fill("done"));
  expect(server.sockets).toHaveLength(1);
});

test("what known_hosts says anew is held against a new connection, and what it says still against the old one", async () => {
  const server = await serve();
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-pool-"));
  cleanup.push(() => rmSync(folder, { recursive: true }));
  const knownHostsPath = join(folder, "known_hosts");
  const { hostKey, ...host } = args(server);
  const hosts = pool();
  const known = `[127.0.0.1]:${server.port} ${hostKey}\n`;
  writeFileSync(knownHostsPath, known);
  const first = await hosts.get({ ...host, knownHostsPath });
  expect(await hosts.get({ ...host, knownHostsPath })).toBe(first);
  expect((await first.run(read)).stdout).toBe("done");
  writeFileSync(knownHostsPath, `@revoked * ${hostKey}\n${known}`);
  const second = await hosts.get({ ...host, knownHostsPath });
  expect((await failure(second.run(read))).code).toBe("HOST_KEY_MISMATCH");
});

/** Cuts the first link when the command arrives: before it is answered, or while it runs. */
function cutting(when: "before the answer" | "while it runs"): FakeServerOptions {
  let cut = false;
  const once = (act: () => void) => {
    if (cut) return false;
    cut = true;
    act();
    return true;
  };
  return {
    exec: (_line, socket) => !(when === "before the answer" && once(() => socket.destroy())),
    run: (command: Arrived) => {
      command.started();
      if (when === "while it runs" && once(() => setImmediate(() => command.socket.destroy()))) return;
      command.exit(0, "done");
    },
  };
}

test.each(["before the answer", "while it runs"] as const)(
  "a read whose link is lost %s is run again on a new connection",
  async (when) => {
    const server = await serve(cutting(when));
    const host = await pool().get(args(server));
    expect((await host.run(read)).stdout).toBe("done");
    expect(server.lines).toHaveLength(2);
    expect(server.sockets).toHaveLength(2);
  },
);

test.each(["before the answer", "while it runs"] as const)(
  "a change whose link is lost %s is LINK_LOST and is not repeated",
  async (when) => {
    const server = await serve(cutting(when));
    const host = await pool().get(args(server));
    const error = await failure(host.run(change));
    expect(error.code).toBe("LINK_LOST");
    expect(error.details.command).toBe("lvcreate");
    expect(error.details.host).toBe(`127.0.0.1:${server.port}`);
    expect((await host.run(read)).stdout).toBe("done");
    expect(server.lines.filter((line) => line.includes("lvcreate"))).toHaveLength(1);
  },
);

test("a change after the idle link was lost runs once, on a new connection", async () => {
  const server = await serve();
  let opened: Connection | undefined;
  const hosts = createHostPool({
    connect: async (host) => {
      opened = await Connection.open(host, timing);
      return opened;
    },
  });
  cleanup.push(() => hosts.close());
  const host = await hosts.get(args(server));
  await host.run(read);
  const first = opened;
  server.sockets[0]?.destroy();
  await until(() => first?.lost === true, "the loss to be noticed");
  expect((await host.run(change)).stdout).toBe("done");
  expect(server.lines.filter((line) => line.includes("lvcreate"))).toHaveLength(1);
  expect(server.sockets).toHaveLength(2);
});

test("a change whose session was not open yet when the link was lost runs once, on a new connection", async () => {
  let cut = false;
  const server = await serve({
    session: (socket) => {
      if (cut) return true;
      cut = true;
      socket.destroy();
      return false;
    },
  });
  const host = await pool().get(args(server));
  expect((await host.run(change)).stdout).toBe("done");
  expect(server.lines).toHaveLength(1);
  expect(server.sockets).toHaveLength(2);
});

test("a change whose session was not open yet when the link went silent runs once, on a new connection", async () => {
  let silent = false;
  const server = await serve({
    session: (socket) => {
      if (silent) return true;
      silent = true;
      socket.pause();
      socket.removeAllListeners("data");
      return false;
    },
  });
  const hosts = createHostPool({ connect: (host) => Connection.open(host, { ...timing, keepalive: 100 }) });
  cleanup.push(() => hosts.close());
  const host = await hosts.get(args(server));
  expect((await host.run({ ...change, deadlineSeconds: 3600 })).stdout).toBe("done");
  expect(server.lines).toHaveLength(1);
});

test("a cancel before the next try is CANCELLED, not the failure before it", async () => {
  const abort = new AbortController();
  const hosts = createHostPool({
    connect: async () => ({
      lost: false,
      end: () => undefined,
      run: async () => {
        abort.abort();
        throw new LinkLost(false, "cut");
      },
    }),
  });
  cleanup.push(() => hosts.close());
  const host = await hosts.get({ address: "127.0.0.1", password: "hunter2", hostKey: fakeHostKey });
  expect((await failure(host.run(read, abort.signal))).code).toBe("CANCELLED");
});

test("hosts behind one jump are dialled a few at a time, and all of them", async () => {
  let dialling = 0;
  let most = 0;
  const waiting: (() => void)[] = [];
  const hosts = createHostPool({
    connect: async () => {
      most = Math.max(most, ++dialling);
      await new Promise<void>((resolve) => waiting.push(resolve));
      dialling--;
      return {
        lost: false,
        end: () => undefined,
        run: async () => ({ exitCode: 0, stdout: "done", stderr: "" }),
      };
    },
  });
  const names = Array.from({ length: 20 }, (_, i) => `10.0.1.${i}`);
  const results = names.map(async (address) => {
    const host = await hosts.get({ address, password: "p", proxyJump: { address: "10.0.0.1" } });
    return host.run(read);
  });
  let left = results.length;
  const all = Promise.all(results.map((result) => result.finally(() => left--)));
  await until(() => {
    waiting.shift()?.();
    return left === 0;
  }, "all hosts");
  expect((await all).map((result) => result.stdout)).toEqual(Array(20).fill("done"));
  expect(most).toBe(5);
});

test("a change that waited for a session when the link was lost runs once, on a new connection", async () => {
  const server = await serve({
    run: (command) => {
      command.started();
      if (!command.line.includes("sleep")) command.exit(0, "done");
    },
  });
  const host = await pool().get(args(server));
  const holding = Array.from({ length: 8 }, () => failure(host.run({ ...change, argv: ["sleep", "9"] })));
  await until(() => server.lines.length === 8, "eight commands");
  const waiting = host.run(change);
  server.sockets[0]?.destroy();
  expect((await waiting).stdout).toBe("done");
  expect((await Promise.all(holding)).every((error) => error.code === "LINK_LOST")).toBe(true);
  expect(server.lines.filter((line) => line.includes("lvcreate"))).toHaveLength(1);
});

test("a host that drops every link is unreachable for a read, after a bounded number of tries", async () => {
  const server = await serve({
    exec: (_line, socket) => {
      socket.destroy();
      return false;
    },
  });
  const host = await pool().get(args(server));
  expect((await failure(host.run(read))).code).toBe("HOST_UNREACHABLE");
  expect(server.sockets).toHaveLength(4);
});

test("nobody listening is HOST_UNREACHABLE, and is tried anew by the next command", async () => {
  const port = await freePort();
  const host = await pool().get({ address: "127.0.0.1", port, password: "hunter2", hostKey: fakeHostKey });
  const error = await failure(host.run(change));
  expect(error.code).toBe("HOST_UNREACHABLE");
  expect(error.message).toContain("ECONNREFUSED");
  await serve({ port });
  expect((await host.run(change)).stdout).toBe("done");
});

test("a server that says nothing is HOST_UNREACHABLE and is not dialled again and again", async () => {
  let dials = 0;
  const silent = createServer((socket) => {
    dials++;
    cleanup.push(() => socket.destroy());
  });
  await new Promise<void>((resolve) => silent.listen(0, "127.0.0.1", resolve));
  cleanup.push(() => silent.close());
  const address = silent.address();
  const port = typeof address === "object" && address !== null ? address.port : 0;
  const host = await pool(300).get({
    address: "127.0.0.1",
    port,
    password: "hunter2",
    hostKey: "SHA256:".padEnd(50, "A"),
  });
  expect((await failure(host.run(read))).code).toBe("HOST_UNREACHABLE");
  expect(dials).toBe(1);
});

test("a failed login is tried anew by the next command, and never by itself", async () => {
  let accept = false;
  const server = await serve({
    authenticate: (context) => (accept ? context.accept() : context.reject(["publickey"])),
  });
  const host = await pool().get(args(server));
  const errors = await Promise.all([failure(host.run(read)), failure(host.run(change))]);
  expect(errors.map((error) => error.code)).toEqual(["AUTH_FAILED", "AUTH_FAILED"]);
  expect(JSON.stringify(errors.map((error) => error.message))).not.toContain("hunter2");
  expect(server.sockets).toHaveLength(1);
  accept = true;
  expect((await host.run(read)).stdout).toBe("done");
});

test("a cancel does not wait for the dial, which others go on to use", async () => {
  const waiting: (() => void)[] = [];
  const server = await serve({ authenticate: (context) => waiting.push(() => context.accept()) });
  const host = await pool().get(args(server));
  const abort = new AbortController();
  const cancelled = failure(host.run(change, abort.signal));
  const other = host.run(read);
  await until(() => waiting.length === 1, "the login");
  abort.abort();
  expect((await cancelled).code).toBe("CANCELLED");
  waiting[0]?.();
  expect((await other).stdout).toBe("done");
  expect(server.lines.some((line) => line.includes("lvcreate"))).toBe(false);
});

test("a closed pool ends its connections and opens none", async () => {
  const server = await serve();
  const hosts = pool();
  const host = await hosts.get(args(server));
  await host.run(read);
  hosts.close();
  await until(() => server.sockets[0]?.destroyed === true, "the end of the connection");
  expect((await failure(host.run(read))).code).toBe("CANCELLED");
  expect(server.sockets).toHaveLength(1);
});

const long: RemoteCommand = { ...read, argv: ["dd"], ownConnection: true };

test("what is read for long leaves the only session of a connection to the others, and its own one ends with it", async () => {
  let held: Arrived | undefined;
  const server = await serve({
    maxSessions: 1,
    run: (command) => {
      command.started();
      if (command.line.includes(" dd")) held = command;
      else command.exit(0, "done");
    },
  });
  const host = await pool().get(args(server));
  const reading = host.run(long);
  await until(() => held !== undefined, "the reading");
  expect((await host.run(read)).stdout).toBe("done");
  expect((await host.run(change)).stdout).toBe("done");
  expect(server.sockets).toHaveLength(2);
  held?.exit(0, "sum");
  expect((await reading).stdout).toBe("sum");
  await until(() => held?.socket.destroyed === true, "the end of its connection");
  expect((await host.run(read)).stdout).toBe("done");
  expect(server.sockets).toHaveLength(2);
});

test("what is read for long is read again on another connection of its own when its link is lost", async () => {
  const server = await serve(cutting("while it runs"));
  const host = await pool().get(args(server));
  expect((await host.run(long)).stdout).toBe("done");
  expect(server.lines).toHaveLength(2);
  await until(() => server.sockets.every(({ destroyed }) => destroyed), "the end of both connections");
});

test.each(["lets nobody in", "cuts everybody off"])(
  "what is read for long is read over the connection there is, where the host %s a second time",
  async (how) => {
    let logins = 0;
    const server = await serve({
      authenticate: (context) => {
        if (++logins === 1) context.accept();
        else if (how === "lets nobody in") context.reject(["publickey"]);
        else server.sockets.at(-1)?.destroy();
      },
    });
    const host = await pool().get(args(server));
    await host.run(read);
    expect((await host.run(long)).exitCode).toBe(0);
    expect(server.lines).toHaveLength(2);
    expect(logins).toBeGreaterThan(1);
  },
);

test("what is read for long logs in once where it is not let in and no other connection is open", async () => {
  const server = await serve({ authenticate: (context) => context.reject(["publickey"]) });
  const host = await pool().get(args(server));
  expect((await failure(host.run(long))).code).toBe("AUTH_FAILED");
  expect(server.sockets).toHaveLength(1);
});

test("a closed pool ends what is read for long, too", async () => {
  const server = await serve({ run: (command) => command.started() });
  const hosts = pool();
  const host = await hosts.get(args(server));
  const reading = failure(host.run(long));
  await until(() => server.lines.length === 1, "the reading");
  hosts.close();
  expect((await reading).code).toBe("CANCELLED");
  await until(() => server.sockets.every(({ destroyed }) => destroyed), "the end of the connection");
  expect(server.sockets).toHaveLength(1);
});

test("a connection of its own that comes about after a cancel ends at once", async () => {
  const waiting: (() => void)[] = [];
  const server = await serve({ authenticate: (context) => waiting.push(() => context.accept()) });
  const host = await pool().get(args(server));
  const abort = new AbortController();
  const cancelled = failure(host.run(long, abort.signal));
  await until(() => waiting.length === 1, "the login");
  abort.abort();
  expect((await cancelled).code).toBe("CANCELLED");
  waiting[0]?.();
  await until(() => server.sockets[0]?.destroyed === true, "the end of the connection");
  expect(server.lines).toEqual([]);
});

/** Servers under one address that have these machine-ids in turn, one each connection. `undefined`: no answer, the link is cut. */
async function machines(...answers: (Partial<CommandResult> | undefined)[]) {
  const asked: string[] = [];
  let dials = 0;
  const hosts = createHostPool({
    connect: async () => {
      const answer = answers[dials++];
      const connection = {
        lost: false,
        end: () => undefined,
        run: async ({ argv }: RemoteCommand) => {
          asked.push(argv.join(" "));
          if (answer !== undefined) return { exitCode: 0, stdout: "", stderr: "", ...answer };
          connection.lost = true;
          throw new LinkLost(true, "cut");
        },
      };
      opened.push(connection);
      return connection;
    },
    backoff: [1, 1],
  });
  const opened: { lost: boolean }[] = [];
  cleanup.push(() => hosts.close());
  const host = await hosts.get({ address: "127.0.0.1", password: "hunter2", hostKey: fakeHostKey });
  return { host, asked, opened };
}

const [one, other] = ["a".repeat(32), "b".repeat(32)];

test("the machine is asked for its id once per connection, and again by the next one", async () => {
  const { host, asked, opened } = await machines({ stdout: `${one}\n` }, { stdout: `${other}\n` });
  expect(await Promise.all([host.machineId(), host.machineId()])).toEqual([one, one]);
  expect(await host.machineId()).toBe(one);
  expect(asked).toEqual(["cat /etc/machine-id"]);
  for (const connection of opened) connection.lost = true;
  expect(await host.machineId()).toBe(other);
  expect(asked).toHaveLength(2);
});

test("a machine-id whose link is lost is asked for on a new connection, by all who wait for it", async () => {
  const { host, asked } = await machines(undefined, { stdout: `${one}\n` });
  expect(await Promise.all([host.machineId(), host.machineId()])).toEqual([one, one]);
  expect(asked).toHaveLength(2);
});

test.each<[string, Partial<CommandResult>]>([
  ["no file", { exitCode: 1, stderr: "cat: /etc/machine-id: No such file or directory\n" }],
  ["no file, in busybox's words", { exitCode: 1, stderr: "cat: can't open '/etc/machine-id': No such file" }],
  ["an empty file", { stdout: "" }],
  ["a file that the first boot has not filled yet", { stdout: "uninitialized\n" }],
])("a machine with %s has no id", async (_what, answer) => {
  expect(await (await machines(answer)).host.machineId()).toBeUndefined();
});

test.each<[string, string, Partial<CommandResult>]>([
  [
    "COMMAND_FAILED",
    "a read that fails",
    { exitCode: 1, stderr: "cat: /etc/machine-id: Input/output error" },
  ],
  ["COMMAND_FAILED", "a program that is not there", { exitCode: 127, stderr: "env: cat: No such file" }],
  ["OUTPUT_UNREADABLE", "half an id", { stdout: "aaaa\n" }],
  ["OUTPUT_UNREADABLE", "a line before it", { stdout: `Welcome!\n${one}\n` }],
])(
  "%s is told of %s, which is no machine without an id, and it is asked for again",
  async (code, _what, answer) => {
    const { host, asked } = await machines(answer);
    expect((await failure(host.machineId())).code).toBe(code);
    expect((await failure(host.machineId())).details.host).toBe("127.0.0.1");
    expect(asked).toHaveLength(2);
  },
);

test("who is cancelled leaves the question to the others", async () => {
  let answer = (_result: CommandResult): void => undefined;
  const hosts = createHostPool({
    connect: async () => ({
      lost: false,
      end: () => undefined,
      run: () =>
        new Promise((resolve) => {
          answer = resolve;
        }),
    }),
  });
  cleanup.push(() => hosts.close());
  const host = await hosts.get({ address: "127.0.0.1", password: "hunter2", hostKey: fakeHostKey });
  const abort = new AbortController();
  const cancelled = failure(host.machineId(abort.signal));
  const waiting = host.machineId();
  await new Promise((resolve) => setImmediate(resolve));
  abort.abort();
  expect((await cancelled).code).toBe("CANCELLED");
  answer({ exitCode: 0, stdout: `${one}\n`, stderr: "" });
  expect(await waiting).toBe(one);
});
