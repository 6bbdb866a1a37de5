import { spawn } from "node:child_process";
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import {
  type AgentInboundRequest,
  AgentProtocol,
  type ParsedKey,
  type SigningRequestOptions,
  utils,
} from "ssh2";
import ts from "typescript";
import { afterEach, describe, expect, test, vi } from "vitest";
import { isLvmNbdError, type LvmNbdError } from "../../provider/core/errors.js";
import type { ResolvedHost } from "../../provider/ssh/config.js";
import { Connection, DialFailed, LinkLost } from "../../provider/ssh/connection.js";
import { fingerprint } from "../../provider/ssh/hostKeys.js";
import type { RemoteCommand } from "../../provider/ssh/types.js";
import {
  type Arrived,
  connection,
  type FakeServer,
  type FakeServerOptions,
  otherKey,
  startFakeServer,
  timing,
  until,
} from "./fakeServer.js";
import { dsaKey } from "./keyFolder.js";

const read: RemoteCommand = { argv: ["lvs"], deadlineSeconds: 30, kind: "read" };

const cleanup: (() => unknown)[] = [];
afterEach(async () => {
  for (const act of cleanup.splice(0).reverse()) await act();
});

async function serve(options?: FakeServerOptions): Promise<FakeServer> {
  const server = await startFakeServer(options);
  cleanup.push(() => server.close());
  return server;
}

async function open(host: ResolvedHost, changes: Partial<typeof timing> = {}): Promise<Connection> {
  const opened = await Connection.open(host, { ...timing, ...changes });
  cleanup.push(() => opened.end());
  return opened;
}

async function failure(promise: Promise<unknown>): Promise<LvmNbdError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!isLvmNbdError(error)) throw new Error(`expected an LvmNbdError, got ${String(error)}`);
  return error;
}

function parse(key: string): ParsedKey {
  const parsed = utils.parseKey(key);
  if (parsed instanceof Error) throw parsed;
  return parsed;
}

/** An agent's socket. */
async function listen(connected: (socket: Socket) => void): Promise<string> {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-agent-"));
  const path = join(folder, "socket");
  const server = createServer(connected);
  await new Promise<void>((resolve) => server.listen(path, resolve));
  cleanup.push(() => {
    server.close();
    rmSync(folder, { recursive: true });
  });
  return path;
}

function blob(line: string): Buffer {
  return Buffer.from(line.split(" ")[1] ?? "", "base64");
}

test("an unknown host key ends the dial before any login", async () => {
  const server = await serve();
  const error = await failure(open(server.host({ trust: { knownHosts: [] } })));
  expect(error.code).toBe("HOST_KEY_UNKNOWN");
  expect(error.message).toContain(fingerprint(blob(server.publicKey)));
  expect(server.logins).toEqual([]);
});

test("another host key than the pinned ends the dial before any login", async () => {
  const server = await serve();
  const error = await failure(open(server.host({ trust: { pins: [otherKey] } })));
  expect(error.code).toBe("HOST_KEY_MISMATCH");
  expect(error.message).toContain(fingerprint(blob(server.publicKey)));
  expect(error.message).toContain(fingerprint(blob(otherKey)));
  expect(server.logins).toEqual([]);
});

test("a refused login tells what was tried, and no secret", async () => {
  const server = await serve({
    authenticate: (context) => context.reject(["publickey", "password", "keyboard-interactive"]),
  });
  const error = await failure(open(server.host({ password: "hunter2" })));
  expect(error.code).toBe("AUTH_FAILED");
  expect(error.message).toContain("tried: the password");
  expect(JSON.stringify([error.message, error.details, error.stack])).not.toContain("hunter2");
});

test("nothing to log in with is said", async () => {
  const server = await serve();
  const error = await failure(open(server.host({ password: undefined })));
  expect(error.code).toBe("AUTH_FAILED");
  expect(error.message).toContain("nothing, since no key, agent or password is there");
});

test("an agent by a path that none can have leaves them as well, time and again", async () => {
  const server = await serve();
  for (const agent of ["", "99999", "99999"]) {
    const opened = await open(server.host({ agent }), { connect: 2000 });
    expect((await opened.run(read, undefined)).stdout).toBe("done");
  }
});

test("an agent that cannot be reached leaves the other ways to log in", async () => {
  const server = await serve();
  const opened = await open(server.host({ agent: "/nowhere/agent.sock" }));
  expect((await opened.run(read, undefined)).stdout).toBe("done");
  const error = await failure(open(server.host({ agent: "/nowhere/agent.sock", password: undefined })));
  expect(error.code).toBe("AUTH_FAILED");
  expect(error.message).toContain("the agent's keys (");
});

describe("an agent", () => {
  const pairs = [
    utils.generateKeyPairSync("ecdsa", { bits: 256 }),
    utils.generateKeyPairSync("ecdsa", { bits: 384 }),
  ];

  /** One that has those keys, and lets `sign` answer. As ssh-agent, it answers nobody else meanwhile. */
  const listenWithKeys = (sign: (reply: () => void, socket: Socket) => void) => {
    let idle = Promise.resolve();
    return listen((socket) => {
      const protocol = new AgentProtocol(false);
      const all = pairs.map((pair) => parse(pair.public));
      protocol.on("identities", (request: AgentInboundRequest) => {
        idle = idle.then(() => void protocol.getIdentitiesReply(request, all));
      });
      protocol.on("sign", (request: AgentInboundRequest, key: ParsedKey, data: Buffer) => {
        const pair = pairs.find((one) => parse(one.public).getPublicSSH().equals(key.getPublicSSH()));
        const signed = (done: () => void) => () => {
          protocol.signReply(request, parse(pair?.private ?? "").sign(data));
          done();
        };
        idle = idle.then(() => new Promise<void>((done) => sign(signed(done), socket)));
      });
      socket.pipe(protocol).pipe(socket);
    });
  };

  test("that says nothing leaves the other ways to log in, and is let go", async () => {
    const server = await serve();
    const asking: Socket[] = [];
    const agent = await listen((socket) => asking.push(socket.resume()));
    const opened = await open(server.host({ agent }), { connect: 2000 });
    expect((await opened.run(read, undefined)).stdout).toBe("done");
    await until(() => asking.length === 1 && asking.every((socket) => socket.readableEnded), "its end");
  });

  test("that does not sign is told, and asked for no other of its keys", async () => {
    const server = await serve();
    let signatures = 0;
    const agent = await listenWithKeys(() => signatures++);
    const error = await failure(open(server.host({ agent, password: undefined }), { signature: 300 }));
    expect(error.code).toBe("AUTH_FAILED");
    expect(error.message).toMatch(
      /tried: the agent's keys \(no signature within 0.3 s: it did not answer, or nobody confirmed it\)$/m,
    );
    expect(signatures).toBe(1);
  });

  test("that asks before it signs has longer for that than the host for the login", async () => {
    const server = await serve();
    const agent = await listenWithKeys((reply) => setTimeout(reply, 1500));
    const host = server.host({ agent, password: undefined, connectSeconds: 1 });
    expect((await (await open(host)).run(read, undefined)).stdout).toBe("done");
  });

  test("that asks before it signs is asked for one host after the other", async () => {
    const servers = [await serve(), await serve()];
    let asked = 0;
    const agent = await listenWithKeys((reply) => {
      asked++;
      setTimeout(reply, 1500);
    });
    const opening: Promise<Connection>[] = [];
    for (const server of servers) {
      opening.push(open(server.host({ agent, password: undefined, connectSeconds: 1 })));
      if (opening.length === 1) await until(() => asked === 1, "the first question");
    }
    for (const opened of await Promise.all(opening))
      expect((await opened.run(read, undefined)).stdout).toBe("done");
  });

  test("gives a host no more time for the rest of the login", async () => {
    const server = await serve({
      authenticate: (context) => {
        if (context.method === "publickey" && context.signature === undefined)
          setTimeout(() => context.accept(), 700);
        else context.reject(["publickey"]);
      },
    });
    const agent = await listenWithKeys((reply) => reply());
    const host = server.host({ agent, password: undefined, connectSeconds: 1 });
    await expect(open(host)).rejects.toThrow("no login within 1 s");
  });

  test("signs once for a host that asks for the same signature again", async () => {
    const server = await serve({
      authenticate: (context) => {
        if (context.method !== "publickey") return context.reject(["publickey"]);
        // As if it had come without one.
        Object.assign(context, { signature: undefined });
        context.accept();
      },
    });
    let signatures = 0;
    const agent = await listenWithKeys((reply) => {
      if (++signatures < 10) reply();
    });
    const error = await failure(open(server.host({ agent, password: undefined }), { signature: 300 }));
    expect(error.message).toContain("the host asked again for a signature that it had");
    expect(signatures).toBe(pairs.length);
  });

  test.each(["destroy", "resetAndDestroy"] as const)(
    "is let go and told when the host does not wait for it (%s)",
    async (cut) => {
      const server = await serve();
      const asking: Socket[] = [];
      const agent = await listenWithKeys((_reply, socket) => {
        asking.push(socket);
        for (const one of server.sockets) one[cut]();
      });
      const opening = open(server.host({ agent, password: undefined }), { signature: 600_000 });
      const error = await failure(opening);
      expect(error.code).toBe("AUTH_FAILED");
      expect(error.message).toContain("refused while the agent was asked: the host did not wait");
      await until(() => asking.length === 1 && asking.every((socket) => socket.readableEnded), "its end");
    },
  );
});

test("a host behind a jump that hangs up is a dial that may pass", async () => {
  const server = await serve({
    authenticate: () => {
      for (const one of server.sockets) one.destroy();
    },
  });
  const jump = await serve({
    forward: (channel) => {
      const socket = connect(server.port, "127.0.0.1");
      channel.pipe(socket).pipe(channel, { end: false });
      // As sshd: it closes its half of the channel, and waits for the other.
      socket.once("end", () => channel.eof());
    },
  });
  const opening = open(server.host({ jumps: [jump.host()] }), { connect: 600_000 });
  expect(await opening.catch((reason: unknown) => reason)).toMatchObject({
    name: "DialFailed",
    mayPass: true,
  });
});

test("a host that does not answer a login is given up in the time that it has for it", async () => {
  const server = await serve({ authenticate: () => undefined });
  const opening = open(server.host({ connectSeconds: 0.5 }), { signature: 600_000 });
  await expect(opening).rejects.toThrow("no login within 0.5 s");
});

test("the password answers a keyboard-interactive login", async () => {
  let answered: string[] = [];
  const server = await serve({
    authenticate: (context) => {
      if (context.method !== "keyboard-interactive") return context.reject(["keyboard-interactive"]);
      context.prompt([{ prompt: "Password: ", echo: false }], (answers) => {
        answered = answers;
        context.accept();
      });
    },
  });
  const opened = await open(server.host({ password: "hunter2" }));
  expect((await opened.run(read, undefined)).stdout).toBe("done");
  expect(answered).toEqual(["hunter2"]);
});

test("a host that ends the login after too many attempts is a refused login", async () => {
  const server = await serve({
    authenticate: (context) => {
      const protocol = (context as unknown as { _protocol: { disconnect(reason: number): void } })._protocol;
      protocol.disconnect(2);
    },
  });
  expect((await failure(open(server.host()))).code).toBe("AUTH_FAILED");
});

test("the result is read even if it comes in one packet with the acceptance", async () => {
  const server = await serve({
    exec: (_line, socket) => {
      socket.cork();
      setImmediate(() => setImmediate(() => socket.uncork()));
      return true;
    },
    run: (command) => {
      command.started();
      command.exit(3, "all at once");
    },
  });
  const opened = await open(server.host());
  expect(await opened.run(read, undefined)).toEqual({ exitCode: 3, stdout: "all at once", stderr: "" });
});

test("twenty commands at once all succeed on a host that allows two sessions", async () => {
  const server = await serve({
    maxSessions: 2,
    run: (command) => {
      command.started();
      setTimeout(() => command.exit(0, "done"), 5);
    },
  });
  const opened = await open(server.host());
  const results = await Promise.all(Array.from({ length: 20 }, () => opened.run(read, undefined)));
  expect(results.map((result) => result.stdout)).toEqual(Array(20).fill("done"));
  expect(server.lines).toHaveLength(20);
});

test("a command that waits for a session can be cancelled without having run", async () => {
  const server = await serve({ run: (command) => command.started() });
  const opened = await open(server.host());
  const running = Array.from({ length: 8 }, () => opened.run(read, undefined));
  const ended = Promise.allSettled(running);
  const abort = new AbortController();
  const waiting = failure(opened.run({ ...read, argv: ["late"] }, abort.signal));
  await until(() => server.lines.length === 8, "eight commands");
  abort.abort();
  expect((await waiting).code).toBe("CANCELLED");
  expect(server.lines.some((line) => line.includes("late"))).toBe(false);
  opened.end();
  await ended;
});

test("a command that was cancelled before it began is never sent", async () => {
  const server = await serve();
  const opened = await open(server.host());
  expect((await failure(opened.run(read, AbortSignal.abort()))).code).toBe("CANCELLED");
  await opened.run(read, undefined);
  expect(server.lines).toHaveLength(1);
});

test("what a command prints is told as it comes, and is all in its result", async () => {
  let arrived: Arrived | undefined;
  const server = await serve({
    run: (command) => {
      command.started();
      arrived = command;
    },
  });
  const told: string[] = [];
  const host = await open(server.host());
  const running = host.run({ ...read, onOutput: (text) => told.push(text) }, undefined);
  await until(() => arrived !== undefined, "the command");
  arrived?.channel.write("4096\n");
  await until(() => told.join("") === "4096\n", "what it printed");
  arrived?.channel.stderr.write("not that\n");
  arrived?.exit(0, "end\n");
  expect((await running).stdout).toBe("4096\nend\n");
  expect(told.join("")).toBe("4096\nend\n");
});

test("a cancel ends the process group on the host", async () => {
  let command: Arrived | undefined;
  const server = await serve({
    run: (arrived) => {
      arrived.started(12345);
      command = arrived;
    },
  });
  const opened = await open(server.host());
  const abort = new AbortController();
  const cancelled = failure(opened.run(read, abort.signal));
  await until(() => command !== undefined, "the command");
  abort.abort();
  await until(() => server.kills.length === 1, "the kill");
  expect(server.kills[0]).toContain("12345");
  command?.exit(143);
  expect((await cancelled).code).toBe("CANCELLED");
});

test("a cancel that comes before the process id is known ends it when it is", async () => {
  let command: Arrived | undefined;
  const server = await serve({
    run: (arrived) => {
      command = arrived;
    },
  });
  const opened = await open(server.host());
  const abort = new AbortController();
  const cancelled = failure(opened.run(read, abort.signal));
  await until(() => command !== undefined, "the command");
  abort.abort();
  command?.started(54321);
  await until(() => server.kills.length === 1, "the kill");
  expect(server.kills[0]).toContain("54321");
  command?.exit(143);
  expect((await cancelled).code).toBe("CANCELLED");
});

test("cancelling many commands ends each, though the host allows few more sessions", async () => {
  const running = new Map<string, Arrived>();
  const server = await serve({
    maxSessions: 9,
    run: (arrived) => {
      const pid = 100 + running.size;
      running.set(String(pid), arrived);
      arrived.started(pid);
    },
  });
  const opened = await open(server.host());
  const abort = new AbortController();
  const ended = Promise.all(Array.from({ length: 8 }, () => failure(opened.run(read, abort.signal))));
  await until(() => running.size === 8, "eight commands");
  abort.abort();
  await until(() => {
    for (const line of server.kills) running.get(/ (\d+) \d+$/.exec(line)?.[1] ?? "")?.exit(143);
    return new Set(server.kills).size === 8;
  }, "eight kills");
  expect((await ended).every((error) => error.code === "CANCELLED")).toBe(true);
});

test("endless output is stopped", async () => {
  const server = await serve({
    run: (command) => {
      command.started();
      const more = () => {
        if (command.channel.writable && !command.socket.destroyed)
          command.channel.write("x".repeat(30_000), () => setImmediate(more));
      };
      more();
    },
  });
  const opened = await open(server.host());
  const error = await failure(opened.run({ ...read, maxOutputBytes: 1_000_000, graceSeconds: 1 }, undefined));
  expect(error.code).toBe("OUTPUT_TOO_LARGE");
  expect(server.kills).toHaveLength(1);
});

describe("of a command that is stopped before its process id is known", () => {
  /** How often something that came byte by byte has been put together. */
  const watchJoins = () => {
    const concat = vi.spyOn(Buffer, "concat");
    cleanup.push(() => concat.mockRestore());
    return () =>
      concat.mock.calls.filter(([list]) => list.length > 0 && list.every((one) => one.length === 1)).length;
  };

  test.each([
    ["x", 5],
    ["\n", 250],
  ])("%j again and again is not looked through for it each time", async (byte, most) => {
    const controller = new AbortController();
    const server = await serve({
      run: (command) => {
        controller.abort();
        for (let bytes = 0; bytes < 1000; bytes++) command.channel.stderr.write(byte);
        command.exit();
      },
    });
    const opened = await open(server.host());
    const joins = watchJoins();
    expect((await failure(opened.run(read, controller.signal))).code).toBe("CANCELLED");
    expect(joins()).toBeLessThanOrEqual(most);
  });

  test("what comes when it has been given up is not looked through", async () => {
    const controller = new AbortController();
    let given: Arrived | undefined;
    const server = await serve({
      run: (command) => {
        if (given !== undefined) {
          command.started();
          command.exit();
        }
        given ??= command;
        controller.abort();
      },
    });
    const opened = await open(server.host(), { slack: 0 });
    expect((await failure(opened.run({ ...read, graceSeconds: 0.1 }, controller.signal))).code).toBe(
      "CANCELLED",
    );
    const joins = watchJoins();
    for (let bytes = 0; bytes < 50; bytes++) given?.channel.stderr.write("\n");
    await opened.run(read, undefined);
    expect(joins()).toBe(0);
  });
});

test("a command that the host does not stop at its deadline is given up in bounded time", async () => {
  const server = await serve({ run: (command) => command.started() });
  const opened = await open(server.host());
  const error = await failure(opened.run({ ...read, deadlineSeconds: 1, graceSeconds: 1 }, undefined));
  expect(error.code).toBe("COMMAND_TIMED_OUT");
  expect(error.message).toContain("lvs");
  expect(error.message).toContain("did not confirm that the command has ended");
  expect(server.kills).toHaveLength(1);
});

test("a host that does not even answer the request is given up in bounded time", async () => {
  const server = await serve({ exec: () => false });
  const opened = await open(server.host());
  const error = await failure(opened.run({ ...read, deadlineSeconds: 1, graceSeconds: 1 }, undefined));
  expect(error.code).toBe("COMMAND_TIMED_OUT");
});

test("a link that goes silent is noticed by keepalives, long before the command's deadline", async () => {
  let command: Arrived | undefined;
  const server = await serve({
    run: (arrived) => {
      arrived.started();
      arrived.socket.pause();
      arrived.socket.removeAllListeners("data");
      command = arrived;
    },
  });
  const opened = await open(server.host(), { keepalive: 100 });
  const error = await opened
    .run({ ...read, deadlineSeconds: 3600 }, undefined)
    .catch((reason: unknown) => reason);
  expect(command).toBeDefined();
  expect(error).toBeInstanceOf(LinkLost);
  expect(opened.lost).toBe(true);
});

test("a link that answers keepalives stays, however long the command is silent", async () => {
  let command: Arrived | undefined;
  const server = await serve({
    run: (arrived) => {
      arrived.started();
      command = arrived;
    },
  });
  const opened = await open(server.host(), { keepalive: 300 });
  const result = opened.run(read, undefined);
  await until(() => command !== undefined, "the command");
  const received = server.sockets[0]?.bytesRead ?? 0;
  // Eight keepalives of at least 60 bytes: more than the three that may stay without an answer.
  await until(() => (server.sockets[0]?.bytesRead ?? 0) > received + 8 * 60, "keepalives");
  command?.exit(0, "after a while");
  expect((await result).stdout).toBe("after a while");
});

test("many commands at once leave no listeners behind and give no warning", async () => {
  const warnings: Error[] = [];
  const warned = (warning: Error) => warnings.push(warning);
  process.on("warning", warned);
  cleanup.push(() => process.off("warning", warned));
  const server = await serve();
  const opened = await open(server.host());
  const { signal } = new AbortController();
  for (let round = 0; round < 5; round++) {
    await Promise.all(Array.from({ length: 40 }, () => opened.run(read, signal)));
  }
  await new Promise((resolve) => setImmediate(resolve));
  expect(warnings).toEqual([]);
});

test("a command without the wrapper's first line was not started", async () => {
  const refuse = (text: string) => (command: Arrived) => {
    command.channel.stderr.write(text);
    command.exit(1);
  };
  const sudo = await serve({ run: refuse("sudo: a password is required\n") });
  const denied = await failure((await open(sudo.host({ sudo: true, user: "ann" }))).run(read, undefined));
  expect(denied.code).toBe("SUDO_DENIED");
  expect(denied.message).toContain("sudo: a password is required");
  const nologin = await serve({ run: refuse("This account is currently not available.\n") });
  const failed = await failure((await open(nologin.host({ sudo: true, user: "ann" }))).run(read, undefined));
  expect(failed.code).toBe("COMMAND_FAILED");
  expect(failed.message).toContain("not available");
});

test("nobody listening is a dial that may pass", async () => {
  const port = await new Promise<number>((resolve) => {
    const probe: Server = createServer();
    probe.listen(0, "127.0.0.1", () => {
      const address = probe.address();
      probe.close(() => resolve(typeof address === "object" && address !== null ? address.port : 0));
    });
  });
  for (const address of ["127.0.0.1", "localhost"]) {
    const error = await open(connection({ port, address })).catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(DialFailed);
    expect(error).toMatchObject({ mayPass: true, message: expect.stringContaining("ECONNREFUSED") });
  }
});

test.each<[string, NonNullable<FakeServerOptions["algorithms"]>, RegExp]>([
  ["algorithms of yesterday", { kex: ["diffie-hellman-group14-sha1"] }, /no matching key exchange/],
  ["compression", { compress: ["zlib@openssh.com"] }, /no matching .* compression/],
])("a server that takes only %s is a dial that cannot pass", async (_what, algorithms, words) => {
  const server = await serve({ algorithms });
  const error = await open(server.host()).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(DialFailed);
  expect(error).toMatchObject({ mayPass: false, message: expect.stringMatching(words) });
});

test("a server that is hardened to one good cipher is talked to", async () => {
  const server = await serve({
    algorithms: { cipher: ["chacha20-poly1305@openssh.com"], kex: ["diffie-hellman-group18-sha512"] },
  });
  expect((await (await open(server.host())).run(read, undefined)).stdout).toBe("done");
});

test("a server without strict key exchange is talked to with a cipher that needs none", async () => {
  const server = await serve({
    notStrict: true,
    algorithms: { cipher: ["chacha20-poly1305@openssh.com", "aes256-ctr"] },
  });
  expect((await (await open(server.host())).run(read, undefined)).stdout).toBe("done");
});

test("a server without strict key exchange that takes only what needs one gets no login", async () => {
  const server = await serve({ notStrict: true, algorithms: { cipher: ["chacha20-poly1305@openssh.com"] } });
  const error = await open(server.host()).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(DialFailed);
  expect(error).toMatchObject({ mayPass: false, message: expect.stringContaining("strict key exchange") });
  expect(server.logins).toEqual([]);
});

describe("an RSA key signs with SHA-2 for a server that does not say what it takes", () => {
  const { private: privateKey } = utils.generateKeyPairSync("rsa", { bits: 2048 });
  const parsed = parse(privateKey);

  /** Takes the key by SHA-2 alone; what else it was offered is told. */
  async function serveSha2(offered: string[]): Promise<FakeServer> {
    return serve({
      signaturesUnsaid: true,
      authenticate: (context) => {
        if (context.method !== "publickey") return context.reject(["publickey"]);
        offered.push(String(context.hashAlgo));
        const { blob, signature, hashAlgo } = context;
        if (signature === undefined || blob === undefined) return context.accept();
        if (hashAlgo === "sha512" && parsed.verify(blob, signature, hashAlgo)) context.accept();
        else context.reject(["publickey"]);
      },
    });
  }

  test("from a file", async () => {
    const offered: string[] = [];
    const server = await serveSha2(offered);
    const key = { label: "the key", privateKey, passphrase: undefined, certificates: [] };
    const opened = await open(server.host({ keys: [key], password: undefined }));
    expect((await opened.run(read, undefined)).stdout).toBe("done");
    expect(offered).toEqual(["sha512", "sha512"]);
  });

  test("from an agent", async () => {
    const offered: string[] = [];
    const server = await serveSha2(offered);
    const hashes: unknown[] = [];
    const agent = await listen((socket) => {
      const protocol = new AgentProtocol(false);
      protocol.on("identities", (request: AgentInboundRequest) =>
        protocol.getIdentitiesReply(request, [parse(dsaKey), parsed]),
      );
      protocol.on(
        "sign",
        (request: AgentInboundRequest, _key: ParsedKey, data: Buffer, { hash }: SigningRequestOptions) => {
          hashes.push(hash);
          protocol.signReply(request, parsed.sign(data, hash ?? "sha1"));
        },
      );
      socket.pipe(protocol).pipe(socket);
    });
    const opened = await open(server.host({ agent, password: undefined }));
    expect((await opened.run(read, undefined)).stdout).toBe("done");
    expect(hashes).toEqual(["sha512"]);
    // A DSA key knows nothing but SHA-1.
    expect(offered).toEqual(["sha512", "sha512"]);
  });
});

test("a host's own connect timeout goes before the usual one", async () => {
  const silent = createServer((socket) => cleanup.push(() => socket.destroy()));
  await new Promise<void>((resolve) => silent.listen(0, "127.0.0.1", resolve));
  cleanup.push(() => silent.close());
  const address = silent.address();
  const port = typeof address === "object" && address !== null ? address.port : 0;
  const dial = open(connection({ port, connectSeconds: 0.2 }), { connect: 600_000 });
  expect(await dial.catch((reason: unknown) => reason)).toBeInstanceOf(DialFailed);
});

test("a server that says nothing is given up in bounded time", async () => {
  const accepted: Socket[] = [];
  const silent = createServer((socket) => accepted.push(socket));
  await new Promise<void>((resolve) => silent.listen(0, "127.0.0.1", resolve));
  cleanup.push(() => silent.close());
  const address = silent.address();
  const port = typeof address === "object" && address !== null ? address.port : 0;
  const error = await open(connection({ port }), { connect: 300 }).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(DialFailed);
  const socket = accepted[0];
  socket?.resume();
  await until(
    () => socket?.readableEnded === true || socket?.destroyed === true,
    "the end of the given-up connection",
  );
  socket?.destroy();
});

/** The SSH layer as plain JavaScript, for a process of its own. */
function buildSsh(into: string): string {
  const root = join(__dirname, "../..");
  const own = readdirSync(join(root, "provider/ssh")).map((name) => name.replace(/\.ts$/, ""));
  for (const name of [...own, "../core/errors", "../core/hostCommands"]) {
    const source = readFileSync(join(root, "provider/ssh", `${name}.ts`), "utf8");
    const file = join(into, "ssh", `${name}.js`);
    mkdirSync(dirname(file), { recursive: true });
    const options = { module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2023, esModuleInterop: true };
    writeFileSync(file, ts.transpileModule(source, { compilerOptions: options }).outputText);
  }
  symlinkSync(join(root, "node_modules"), join(into, "node_modules"));
  return join(into, "ssh", "connection.js");
}

test("an idle connection lets its process end", async () => {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-idle-"));
  cleanup.push(() => rmSync(folder, { recursive: true }));
  const server = await serve();
  const script = `
    require(${JSON.stringify(buildSsh(folder))}).Connection.open(${JSON.stringify(server.host())})
      .then((open) => open.run(${JSON.stringify(read)}))
      .then((result) => console.log(result.stdout));`;
  const child = spawn(process.execPath, ["-e", script], { stdio: ["ignore", "pipe", "inherit"] });
  cleanup.push(() => child.kill("SIGKILL"));
  let printed = "";
  child.stdout.on("data", (chunk: Buffer) => {
    printed += chunk.toString();
  });
  await until(() => printed === "done\n", "the command in the child");
  await until(() => child.exitCode !== null, "the end of the child");
  expect(child.exitCode).toBe(0);
});
