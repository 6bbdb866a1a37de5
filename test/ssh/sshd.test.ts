import { execFileSync, spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { isLvmNbdError, type LvmNbdError } from "../../provider/core/errors.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import type { Host, HostConnection, RemoteCommand } from "../../provider/ssh/types.js";
import { until } from "./fakeServer.js";
import { type Sshd, startSshd } from "./sshd.js";

let sshd: Sshd;
let narrow: Sshd;
const pool = createHostPool();
beforeAll(async () => {
  [sshd, narrow] = await Promise.all([startSshd(), startSshd({ maxSessions: 2 })]);
}, 180_000);
afterAll(async () => {
  pool.close();
  await Promise.all([sshd.stop(), narrow.stop()]);
});

function args(server: Sshd, changes: Partial<HostConnection> = {}): HostConnection {
  return {
    address: "127.0.0.1",
    port: server.port,
    user: server.user,
    privateKeyPath: server.key,
    hostKey: server.hostKey,
    sudo: false,
    ...changes,
  };
}

function command(...argv: string[]): RemoteCommand {
  // Long after any test gives up: what a test sees ended was ended by what it did.
  return { argv, deadlineSeconds: 600, kind: "read" };
}

async function failure(promise: Promise<unknown>): Promise<LvmNbdError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!isLvmNbdError(error)) throw new Error(`expected an LvmNbdError, got ${String(error)}`);
  return error;
}

/** Process ids of the program that have this argument. */
function running(program: string, argument: string): string[] {
  return readdirSync("/proc").filter((pid) => {
    if (!/^\d+$/.test(pid)) return false;
    try {
      const words = readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0");
      return words[0] === program && words.includes(argument);
    } catch (error) {
      // A process may end while one looks.
      if (error instanceof Error && "code" in error && /^(ENOENT|ESRCH)$/.test(String(error.code)))
        return false;
      throw error;
    }
  });
}

function sleeping(duration: string): string[] {
  return running("sleep", duration);
}

/** A duration that no other process sleeps for. */
function uniqueDuration(): string {
  return `7${Math.floor(Math.random() * 1e6)}.${Math.floor(Math.random() * 1e6) + 1}`;
}

describe("a command", () => {
  let host: Host;
  beforeAll(async () => {
    host = await pool.get(args(sshd));
  });

  test("gives its exit code, stdout and stderr", async () => {
    expect(await host.run(command("sh", "-c", "echo out; echo err >&2; exit 7"))).toEqual({
      exitCode: 7,
      stdout: "out\n",
      stderr: "err\n",
    });
    expect((await host.run(command("true"))).exitCode).toBe(0);
    expect((await host.run(command("no-such-program"))).exitCode).toBe(127);
  });

  test("that a signal ends gives 128 and its number", async () => {
    expect((await host.run(command("sh", "-c", "kill -9 $$"))).exitCode).toBe(137);
  });

  test("reads its stdin to the end, and an empty one when none is given", async () => {
    const stdin = `${"x'\"\\$ \n".repeat(50_000)}é`;
    expect((await host.run({ ...command("cat"), stdin })).stdout).toBe(stdin);
    expect((await host.run(command("cat"))).stdout).toBe("");
  });

  test("may print a character in pieces, and end within one", async () => {
    const pieces = "printf '\\303'; sleep 0.3; printf '\\251\\360\\237'; sleep 0.3; printf '\\222\\276\\303'";
    expect((await host.run(command("sh", "-c", pieces))).stdout).toBe("é\u{1f4be}\ufffd");
  });

  test("gets its arguments as they are", async () => {
    const odd = [
      ..."'\"`$\\!*?[]{}()<>|&;#~ \t\n\r=%^-",
      "",
      "--",
      "-n",
      "$(id)",
      "$HOME",
      "'\\''",
      "a\nb",
      "A=b",
      "é\u{1f4be}",
      "\u0001\u007f",
    ];
    const { stdout } = await host.run(command("printf", "%s\\0", ...odd));
    expect(stdout.split("\0").slice(0, -1)).toEqual(odd);
  });

  test("speaks the C locale, whatever the host's", async () => {
    expect((await host.run(command("sh", "-c", "echo $LC_ALL"))).stdout).toBe("C\n");
  });

  test("that prints without end is stopped, there as well", async () => {
    const mark = `y-${randomUUID()}`;
    const error = await failure(host.run({ ...command("yes", mark), maxOutputBytes: 100_000 }));
    expect(error.code).toBe("OUTPUT_TOO_LARGE");
    await until(() => running("yes", mark).length === 0, "its end");
  });

  test("that passes its deadline is ended with its children", async () => {
    const duration = uniqueDuration();
    const script = 'sleep "$1" & sleep "$1"; true';
    const ending = failure(
      host.run({ ...command("sh", "-c", script, "sh", duration), deadlineSeconds: 3, graceSeconds: 1 }),
    );
    await until(() => sleeping(duration).length === 2, "both children");
    expect((await ending).code).toBe("COMMAND_TIMED_OUT");
    await until(() => sleeping(duration).length === 0, "the children's end");
  });

  test("that is deaf to TERM is killed", async () => {
    const duration = uniqueDuration();
    const script = 'trap "" TERM; while :; do sleep "$1"; done';
    const ending = failure(
      host.run({ ...command("sh", "-c", script, "sh", duration), deadlineSeconds: 2, graceSeconds: 1 }),
    );
    await until(() => sleeping(duration).length === 1, "the child");
    expect((await ending).code).toBe("COMMAND_TIMED_OUT");
    await until(() => sleeping(duration).length === 0, "the child's end");
  });

  test("that passes its deadline takes a deaf child with it which holds none of its pipes", async () => {
    const duration = uniqueDuration();
    const script = '(trap "" TERM; exec sleep "$1" </dev/null >/dev/null 2>&1) & exec sleep "$1"';
    const ending = failure(
      host.run({ ...command("sh", "-c", script, "sh", duration), deadlineSeconds: 2, graceSeconds: 1 }),
    );
    await until(() => sleeping(duration).length === 2, "both children");
    expect((await ending).code).toBe("COMMAND_TIMED_OUT");
    expect(sleeping(duration)).toEqual([]);
  });

  test("that itself ends with timeout's exit code has not timed out", async () => {
    expect((await host.run(command("sh", "-c", "exit 124"))).exitCode).toBe(124);
    expect((await host.run(command("sh", "-c", "exit 137"))).exitCode).toBe(137);
  });

  test("that is cancelled leaves its trap the grace to run", async () => {
    const duration = uniqueDuration();
    const file = `${sshd.folder}/trapped`;
    const script = 'trap "sleep 1; touch $2; exit 1" TERM; sleep "$1" & wait';
    const abort = new AbortController();
    const ending = failure(host.run(command("sh", "-c", script, "sh", duration, file), abort.signal));
    await until(() => sleeping(duration).length === 1, "the child");
    abort.abort();
    expect((await ending).code).toBe("CANCELLED");
    expect(existsSync(file)).toBe(true);
  });

  test("that is cancelled is ended with its children", async () => {
    const duration = uniqueDuration();
    const script = 'sleep "$1" & sleep "$1"; true';
    const abort = new AbortController();
    const ending = failure(host.run(command("sh", "-c", script, "sh", duration), abort.signal));
    await until(() => sleeping(duration).length === 2, "both children");
    abort.abort();
    expect((await ending).code).toBe("CANCELLED");
    await until(() => sleeping(duration).length === 0, "the children's end");
  });

  test("that is cancelled takes a deaf child with it which holds none of its pipes", async () => {
    const duration = uniqueDuration();
    const script = '(trap "" TERM; exec sleep "$1" </dev/null >/dev/null 2>&1) & exec sleep "$1"';
    const abort = new AbortController();
    const long = { ...command("sh", "-c", script, "sh", duration), graceSeconds: 1 };
    const ending = failure(host.run(long, abort.signal));
    await until(() => sleeping(duration).length === 2, "both children");
    abort.abort();
    expect((await ending).code).toBe("CANCELLED");
    expect(sleeping(duration)).toEqual([]);
  });

  test("that is cancelled where all allowed sessions are busy is ended all the same", async () => {
    const duration = uniqueDuration();
    const busy = await pool.get(args(narrow));
    const abort = new AbortController();
    const ending = Promise.all(
      Array.from({ length: 3 }, () => failure(busy.run(command("sleep", duration), abort.signal))),
    );
    await until(() => sleeping(duration).length > 0, "a command");
    abort.abort();
    expect((await ending).every((error) => error.code === "CANCELLED")).toBe(true);
    await until(() => sleeping(duration).length === 0, "their end");
  });
});

test("twenty commands at once succeed with MaxSessions 2, over one connection", async () => {
  const host = await createdFor(narrow);
  const before = logins(narrow);
  const results = await Promise.all(
    Array.from({ length: 20 }, (_, i) => host.run(command("echo", String(i)))),
  );
  expect(results.map((result) => result.stdout)).toEqual(Array.from({ length: 20 }, (_, i) => `${i}\n`));
  await until(() => logins(narrow) > before, "the login in the log");
  expect(logins(narrow)).toBe(before + 1);
});

/** A host of a pool of its own: a connection that has learned nothing yet. */
async function createdFor(server: Sshd): Promise<Host> {
  const own = createHostPool();
  opened.push(() => own.close());
  return own.get(args(server));
}
const opened: (() => void)[] = [];
afterAll(() => {
  for (const close of opened) close();
});

function logins(server: Sshd): number {
  return server.log().match(/Accepted publickey/g)?.length ?? 0;
}

describe("a host behind a jump", () => {
  test("is reached through it", async () => {
    const host = await pool.get(args(sshd, { proxyJump: args(narrow) }));
    expect((await host.run(command("sh", "-c", "echo $SSH_CONNECTION"))).stdout).toMatch(
      new RegExp(` ${sshd.port}\n$`),
    );
  });

  test("is not reached when the jump shows another key", async () => {
    const host = await pool.get(args(sshd, { proxyJump: args(narrow, { hostKey: sshd.hostKey }) }));
    const error = await failure(host.run(command("true")));
    expect(error.code).toBe("HOST_KEY_MISMATCH");
    expect(error.message).toContain(`127.0.0.1:${narrow.port} (jump to 127.0.0.1:${sshd.port})`);
  });

  test("is not trusted when it shows another key itself", async () => {
    const host = await pool.get(args(sshd, { hostKey: narrow.hostKey, proxyJump: args(narrow) }));
    const error = await failure(host.run(command("true")));
    expect(error.code).toBe("HOST_KEY_MISMATCH");
    expect(error.message).not.toContain("jump");
  });

  test("that does not listen is HOST_UNREACHABLE", async () => {
    const host = await pool.get(args(sshd, { port: 1, proxyJump: args(narrow) }));
    const error = await failure(host.run(command("true")));
    expect(error.code).toBe("HOST_UNREACHABLE");
    expect(error.message).toContain("cannot reach 127.0.0.1:1");
  });
});

test("many hosts behind one jump are reached without a dropped connection, at a small MaxStartups", async () => {
  const jump = await startSshd({ maxStartups: "6:100:6" });
  const own = createHostPool();
  try {
    const results = Array.from({ length: 20 }, async (_, i) => {
      // As many pins, as many hosts.
      const hostKey = Array<string>(i + 1).fill(sshd.hostKey);
      const host = await own.get(args(sshd, { hostKey, proxyJump: args(jump) }));
      return host.run(command("echo", "in"));
    });
    expect((await Promise.all(results)).map((result) => result.stdout)).toEqual(Array(20).fill("in\n"));
    expect(jump.log().match(/Accepted publickey/g)).toHaveLength(20);
    expect(jump.log()).not.toMatch(/MaxStartups|drop connection/);
  } finally {
    own.close();
    await jump.stop();
  }
});

describe("an alias", () => {
  const before = { config: process.env.LVM_NBD_SSH_CONFIG, agent: process.env.SSH_AUTH_SOCK };
  const ends: (() => void)[] = [];
  afterEach(() => {
    for (const [name, value] of [
      ["LVM_NBD_SSH_CONFIG", before.config],
      ["SSH_AUTH_SOCK", before.agent],
    ] as const) {
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
    for (const end of ends.splice(0)) end();
  });

  function sshConfig(...lines: string[]): void {
    const file = `${sshd.folder}/config-${randomUUID()}`;
    const all = ["Host real", "HostName 127.0.0.1", `Port ${sshd.port}`, `User ${sshd.user}`, ...lines, ""];
    writeFileSync(file, all.join("\n"));
    process.env.LVM_NBD_SSH_CONFIG = file;
  }

  function hashedKnownHosts(): string {
    const file = `${sshd.folder}/known-${randomUUID()}`;
    writeFileSync(file, `[127.0.0.1]:${sshd.port} ${sshd.hostKey}\n`);
    execFileSync("ssh-keygen", ["-q", "-H", "-f", file], { stdio: "ignore" });
    expect(readFileSync(file, "utf8")).toContain("|1|");
    return file;
  }

  test("whose key is in a hashed known_hosts is reached", async () => {
    sshConfig(`UserKnownHostsFile ${hashedKnownHosts()}`, `IdentityFile ${sshd.key}`, "IdentitiesOnly yes");
    const host = await pool.get("real");
    expect(host.name).toBe("real");
    expect((await host.run(command("echo", "in"))).stdout).toBe("in\n");
  });

  test("with StrictHostKeyChecking no is verified all the same", async () => {
    sshConfig("UserKnownHostsFile /dev/null", "GlobalKnownHostsFile /dev/null", "StrictHostKeyChecking no");
    const host = await pool.get("real");
    expect((await failure(host.run(command("true")))).code).toBe("HOST_KEY_UNKNOWN");
  });

  test("gets its encrypted key from an agent that holds more keys than the host lets one try", async () => {
    const agent = await startAgent();
    ends.push(agent.stop);
    for (let i = 0; i < 8; i++) {
      const other = `${sshd.folder}/other-${randomUUID()}`;
      execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", other]);
      agent.add(other);
    }
    agent.add(sshd.encryptedKey, sshd.passphrase);
    process.env.SSH_AUTH_SOCK = agent.socket;
    const known = `UserKnownHostsFile ${hashedKnownHosts()}`;

    sshConfig(known, `IdentityFile ${sshd.encryptedKey}`);
    expect((await (await pool.get("real")).run(command("echo", "in"))).stdout).toBe("in\n");

    sshConfig(known, `IdentityFile ${sshd.folder}/host_key.pub`, "IdentitiesOnly yes");
    const error = await failure((await pool.get("real")).run(command("true")));
    expect(error.code).toBe("AUTH_FAILED");
    expect(error.message).toContain("the agent's keys");
    expect(error.message).not.toContain("Too many");
  });
});

/** Programs of OpenSSH's client, like `ssh` itself. */
const [agentProgram, addProgram] = ["ssh-agent", "ssh-add"];

/** An ssh-agent of its own. */
async function startAgent() {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-agent-"));
  const socket = join(folder, "socket");
  const child = spawn(agentProgram, ["-D", "-a", socket], { stdio: "ignore" });
  await until(() => existsSync(socket), "the agent");
  return {
    socket,
    add(key: string, passphrase = "") {
      const ask = join(folder, "ask");
      writeFileSync(ask, `#!/bin/sh\necho '${passphrase}'\n`, { mode: 0o700 });
      const env = { ...process.env, SSH_AUTH_SOCK: socket, SSH_ASKPASS: ask, SSH_ASKPASS_REQUIRE: "force" };
      execFileSync(addProgram, ["-q", key], { env, stdio: ["ignore", "ignore", "inherit"] });
    },
    stop() {
      child.kill("SIGTERM");
      rmSync(folder, { recursive: true });
    },
  };
}

describe("a login", () => {
  test("with an encrypted key and its passphrase succeeds", async () => {
    const host = await pool.get(
      args(sshd, { privateKeyPath: sshd.encryptedKey, passphrase: sshd.passphrase }),
    );
    expect((await host.run(command("echo", "in"))).stdout).toBe("in\n");
  });

  test("with a key that the host does not know is AUTH_FAILED, which names the key's file", async () => {
    const host = await pool.get(args(sshd, { privateKeyPath: `${sshd.folder}/host_key` }));
    const error = await failure(host.run(command("true")));
    expect(error.code).toBe("AUTH_FAILED");
    expect(error.message).toContain(`${sshd.folder}/host_key`);
  });

  test("tells no password, passphrase or key in any error", async () => {
    const password = `secret-${randomUUID()}`;
    const privateKey = readFileSync(`${sshd.folder}/host_key`, "utf8");
    const secrets = [password, ...privateKey.split("\n").slice(1, -2)];
    const given = { privateKeyPath: undefined, password };
    const errors = await Promise.all([
      pool.get(args(sshd, given)).then((host) => failure(host.run(command("true")))),
      pool.get(args(sshd, { ...given, privateKey })).then((host) => failure(host.run(command("true")))),
      pool
        .get(args(sshd, { ...given, hostKey: narrow.hostKey }))
        .then((host) => failure(host.run(command("true")))),
      failure(pool.get(args(sshd, { privateKeyPath: sshd.encryptedKey, passphrase: password }))),
      failure(pool.get(args(sshd, { ...given, privateKey: password }))),
    ]);
    expect(errors.map((error) => error.code)).toEqual([
      "AUTH_FAILED",
      "AUTH_FAILED",
      "HOST_KEY_MISMATCH",
      "KEY_UNREADABLE",
      "KEY_UNREADABLE",
    ]);
    expect(errors[0]?.message).toContain("tried: the password");
    expect(errors[1]?.message).toContain("the password (the host does not take it)");
    const told = JSON.stringify(errors.map((error) => [error.message, error.stack, error.details]));
    for (const secret of secrets) expect(told).not.toContain(secret);
  });
});
