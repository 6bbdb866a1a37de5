/** One SSH connection to one host, with many commands at once over it. */
import { randomUUID } from "node:crypto";
import { connect, type Socket } from "node:net";
import type { Duplex } from "node:stream";
import { Client, type ClientChannel, type ConnectConfig, type ServerHostKeyAlgorithm } from "ssh2";
import { LvmNbdError } from "../core/errors.js";
import { defaultGraceSeconds, displayCommand, killCommand, takePid, wireCommand } from "./command.js";
import type { ResolvedHost } from "./config.js";
import { hostKeyError, judge, knownTypes, type Verdict } from "./hostKeys.js";
import type { CommandResult, RemoteCommand } from "./types.js";

const connectMilliseconds = 20_000;
/** sshd's MaxSessions is 10 unless configured; a refused channel teaches a lower limit. */
const firstChannelLimit = 8;
const defaultMaxOutput = 16 * 1024 * 1024;
/** Beyond a command's own deadline and grace: for the host to answer at all. */
const slackSeconds = 10;

/** The link broke. `sent` tells whether the command may have run. */
export class LinkLost extends Error {
  constructor(
    readonly sent: boolean,
    message: string,
  ) {
    super(message);
    this.name = "LinkLost";
  }
}

/** A dial that failed. `mayPass`: refused or dropped at once, as by a host that restarts or is being dialled too much. */
export class DialFailed extends Error {
  constructor(
    message: string,
    readonly mayPass: boolean,
  ) {
    super(message);
    this.name = "DialFailed";
  }
}

const serverHostKeys: readonly ServerHostKeyAlgorithm[] = [
  "ssh-ed25519",
  "ecdsa-sha2-nistp256",
  "ecdsa-sha2-nistp384",
  "ecdsa-sha2-nistp521",
  "rsa-sha2-512",
  "rsa-sha2-256",
];

/** Only algorithms that are sound today; the strict key exchange is ssh2's own. */
const algorithms: NonNullable<ConnectConfig["algorithms"]> = {
  kex: [
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group-exchange-sha256",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group14-sha256",
  ],
  cipher: ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr"],
  hmac: ["hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512"],
};

/** An open connection. */
export class Connection {
  private readonly waiting: (() => void)[] = [];
  private channels = 0;
  private limit = firstChannelLimit;
  private lostBecause: string | undefined;

  private constructor(
    private readonly host: ResolvedHost,
    private readonly client: Client,
    /** The TCP connection that carries it: its own, or the first hop's. */
    private readonly socket: Socket,
    private readonly behind: Connection | undefined,
  ) {
    client.on("error", (error) => {
      this.lostBecause ??= error.message;
    });
    client.on("close", () => {
      this.lostBecause ??= "the host closed the connection";
      for (const wake of this.waiting.splice(0)) wake();
      this.behind?.end();
    });
    this.unref();
  }

  get lost(): boolean {
    return this.lostBecause !== undefined;
  }

  /** Dials, through the jumps if there are any. Raises DialFailed, HOST_KEY_UNKNOWN, HOST_KEY_MISMATCH, AUTH_FAILED. */
  static async open(host: ResolvedHost): Promise<Connection> {
    let behind: Connection | undefined;
    try {
      for (const hop of [...host.jumps, host]) {
        const socket: Socket = behind === undefined ? await openSocket(hop) : behind.socket;
        const stream: Duplex = behind === undefined ? socket : await behind.forward(hop);
        behind = new Connection(hop, await logIn(hop, host.name, stream), socket, behind);
      }
    } catch (error) {
      behind?.end();
      throw error;
    }
    if (behind === undefined) throw new Error("a host has at least itself to connect to");
    return behind;
  }

  end(): void {
    this.lostBecause ??= "the connection was ended";
    this.client.end();
  }

  private forward(to: ResolvedHost): Promise<Duplex> {
    return new Promise((resolve, reject) => {
      this.ref();
      this.client.forwardOut("127.0.0.1", 0, to.address, to.port, (error, channel) => {
        if (error)
          reject(
            new DialFailed(
              `${this.host.name} cannot reach ${to.address}:${to.port}: ${error.message}`,
              false,
            ),
          );
        else resolve(channel);
      });
    });
  }

  /** Runs a command. Raises LinkLost beside what `Host.run` raises. */
  async run(command: RemoteCommand, signal: AbortSignal | undefined): Promise<CommandResult> {
    const marker = `lvm-nbd-${randomUUID()}`;
    const channel = await this.openChannel(wireCommand(command, this.host.sudo, marker), command, signal);
    try {
      return await this.follow(channel, command, marker, signal);
    } finally {
      this.release();
    }
  }

  /** A channel as soon as one is free; a host that refuses one is asked for fewer at once from then on. */
  private async openChannel(
    line: string,
    command: RemoteCommand,
    signal: AbortSignal | undefined,
  ): Promise<ClientChannel> {
    const until = Date.now() + (command.deadlineSeconds + 60) * 1000;
    for (;;) {
      while (this.channels >= this.limit && !this.lost) await this.turn(until, command, signal);
      if (this.lost) throw new LinkLost(false, this.lostBecause ?? "");
      this.take();
      try {
        return await this.exec(line);
      } catch (error) {
        this.release();
        if (this.lost) throw new LinkLost(false, this.lostBecause ?? "");
        const others = this.channels;
        if (others === 0 || Date.now() > until) {
          throw this.error(
            "HOST_UNREACHABLE",
            `it opens no session for commands: ${error instanceof Error ? error.message : String(error)}`,
          );
        }
        this.limit = Math.max(1, Math.min(this.limit, others));
      }
    }
  }

  private exec(line: string): Promise<ClientChannel> {
    return new Promise((resolve, reject) => {
      const gone = () => reject(new Error("the link was lost"));
      this.client.once("close", gone);
      this.client.exec(line, (error, channel) => {
        this.client.off("close", gone);
        if (error) reject(error);
        else resolve(channel);
      });
    });
  }

  private turn(until: number, command: RemoteCommand, signal: AbortSignal | undefined): Promise<void> {
    return new Promise((resolve, reject) => {
      const done = (finish: () => void) => () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", cancelled);
        const at = this.waiting.indexOf(wake);
        if (at >= 0) this.waiting.splice(at, 1);
        finish();
      };
      const wake = done(resolve);
      const cancelled = done(() => reject(this.error("CANCELLED", "cancelled before it began", command)));
      const timer = setTimeout(
        done(() => reject(this.error("COMMAND_TIMED_OUT", "no session became free for it in time", command))),
        Math.max(0, until - Date.now()),
      );
      if (signal?.aborted) cancelled();
      else {
        this.waiting.push(wake);
        signal?.addEventListener("abort", cancelled);
      }
    });
  }

  private take(): void {
    this.channels++;
    this.ref();
  }

  private release(): void {
    this.channels--;
    this.waiting.shift()?.();
    if (this.channels === 0) this.unref();
  }

  /** An idle connection does not keep the process alive; a running command does. */
  private unref(): void {
    this.socket.unref();
  }

  private ref(): void {
    this.socket.ref();
  }

  private follow(
    channel: ClientChannel,
    command: RemoteCommand,
    marker: string,
    signal: AbortSignal | undefined,
  ): Promise<CommandResult> {
    const maxOutput = command.maxOutputBytes ?? defaultMaxOutput;
    const grace = command.graceSeconds ?? defaultGraceSeconds;
    const started = Date.now();
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    let size = 0;
    let exitCode: number | undefined;
    let exitSignal: string | undefined;
    return new Promise((resolve, reject) => {
      let stopping: LvmNbdError | undefined;
      /** Stops the command on the host, then fails with the reason; bounded, whatever the host does. */
      const stop = (reason: LvmNbdError) => {
        if (stopping !== undefined) return;
        stopping = reason;
        const { pid } = takePid(Buffer.concat(err).toString("utf8"), marker);
        if (pid !== undefined) this.kill(pid, grace);
        else channel.close();
        setTimeout(
          () => {
            channel.close();
            finish(() => reject(reason));
          },
          (grace + 5) * 1000,
        );
      };
      const cancelled = () => stop(this.error("CANCELLED", "cancelled", command));
      const timer = setTimeout(
        () =>
          stop(
            this.error(
              "COMMAND_TIMED_OUT",
              `no end after ${command.deadlineSeconds} s, and the host did not stop it`,
              command,
            ),
          ),
        (command.deadlineSeconds + grace + slackSeconds) * 1000,
      );
      const lost = () =>
        finish(() => reject(stopping ?? new LinkLost(true, this.lostBecause ?? "the link was lost")));
      let finished = false;
      const finish = (act: () => void) => {
        if (finished) return;
        finished = true;
        clearTimeout(timer);
        signal?.removeEventListener("abort", cancelled);
        this.client.off("close", lost);
        act();
      };
      const collect = (into: Buffer[]) => (chunk: Buffer) => {
        if (stopping !== undefined) return;
        size += chunk.length;
        into.push(chunk);
        if (size > maxOutput)
          stop(this.error("OUTPUT_TOO_LARGE", `it printed more than ${maxOutput} bytes`, command));
      };
      this.client.once("close", lost);
      signal?.addEventListener("abort", cancelled);
      channel.on("data", collect(out));
      channel.stderr.on("data", collect(err));
      channel.on("exit", (code: number | null, name?: string) => {
        exitCode = code ?? undefined;
        exitSignal = name;
      });
      channel.on("error", lost);
      channel.on("close", () => {
        finish(() => {
          if (stopping !== undefined) return reject(stopping);
          if (exitCode === undefined && exitSignal === undefined) {
            return reject(
              new LinkLost(true, this.lostBecause ?? "the host ended the session without a result"),
            );
          }
          const { pid, stderr } = takePid(Buffer.concat(err).toString("utf8"), marker);
          const result = { exitCode: exitCode ?? 128, stdout: Buffer.concat(out).toString("utf8"), stderr };
          if (pid === undefined) return reject(this.notStarted(result));
          const late = Date.now() - started >= command.deadlineSeconds * 1000;
          if (late && (result.exitCode === 124 || result.exitCode === 137 || exitSignal !== undefined)) {
            return reject(
              this.error("COMMAND_TIMED_OUT", `stopped after ${command.deadlineSeconds} s`, command, stderr),
            );
          }
          resolve(result);
        });
      });
      if (signal?.aborted) cancelled();
      channel.end(command.stdin ?? "");
    });
  }

  /** Ends a command's process group over a session of its own; what it leaves is bounded by the command's own `timeout`. */
  private kill(pid: number, graceSeconds: number): void {
    this.client.exec(killCommand(pid, graceSeconds, this.host.sudo), (error, channel) => {
      if (!error) channel.resume().end();
    });
  }

  private notStarted(result: CommandResult): LvmNbdError {
    const text = `${result.stderr}${result.stdout}`.trim();
    if (this.host.sudo) {
      return new LvmNbdError("SUDO_DENIED", {
        host: this.host.name,
        message: `\`sudo -n\` as ${this.host.user} was refused`,
        exitCode: result.exitCode,
        stderr: text,
      });
    }
    return new LvmNbdError("COMMAND_FAILED", {
      host: this.host.name,
      message: "the host ran no command: its login shell printed something else",
      exitCode: result.exitCode,
      stderr: text,
    });
  }

  private error(
    code: "HOST_UNREACHABLE" | "CANCELLED" | "COMMAND_TIMED_OUT" | "OUTPUT_TOO_LARGE",
    message: string,
    command?: RemoteCommand,
    stderr?: string,
  ): LvmNbdError {
    return new LvmNbdError(code, {
      host: this.host.name,
      message,
      command: command === undefined ? undefined : displayCommand(command),
      stderr,
    });
  }
}

function openSocket({ address, port }: ResolvedHost): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect({ host: address, port });
    const fail = (message: string, mayPass: boolean) => {
      socket.destroy();
      reject(new DialFailed(`${address}:${port}: ${message}`, mayPass));
    };
    const timer = setTimeout(
      () => fail(`no answer within ${connectMilliseconds / 1000} s`, false),
      connectMilliseconds,
    );
    socket.once("error", (error: NodeJS.ErrnoException) => {
      clearTimeout(timer);
      fail(error.message, error.code === "ECONNREFUSED" || error.code === "ECONNRESET");
    });
    socket.once("connect", () => {
      clearTimeout(timer);
      socket.removeAllListeners("error");
      socket.setNoDelay(true);
      resolve(socket);
    });
  });
}

function logIn(host: ResolvedHost, name: string, stream: Duplex): Promise<Client> {
  return new Promise((resolve, reject) => {
    const client = new Client();
    let refused: Verdict | undefined;
    let shownKey: Buffer | undefined;
    const tried: string[] = [];
    const fail = (error: unknown) => {
      client.removeAllListeners();
      // ssh2 may still report the socket's end; nobody is interested any more.
      client.on("error", () => undefined);
      client.end();
      reject(error);
    };
    client.once("ready", () => {
      client.removeAllListeners();
      resolve(client);
    });
    client.once("close", () =>
      fail(new DialFailed("the connection was closed before the login was complete", true)),
    );
    client.once("error", (error: Error & { level?: string }) => {
      if (refused !== undefined && shownKey !== undefined) {
        return fail(hostKeyError(name, host.hostKeyNames[0] ?? host.address, shownKey, refused));
      }
      if (error.level === "client-authentication") {
        return fail(
          new LvmNbdError("AUTH_FAILED", {
            host: name,
            message: `the login as ${host.user} was refused; tried: ${tried.join(", ") || "nothing, since no key, agent or password is there"}`,
          }),
        );
      }
      fail(
        new DialFailed(`${host.address}:${host.port}: ${error.message}`, error.level !== "client-timeout"),
      );
    });
    const known = knownTypes(host.hostKeyNames, host.trust).flatMap((type) =>
      type === "ssh-rsa" ? ["rsa-sha2-512", "rsa-sha2-256"] : [type],
    );
    const preferred = serverHostKeys.filter((type) => known.includes(type));
    client.connect({
      sock: stream,
      username: host.user,
      readyTimeout: connectMilliseconds,
      keepaliveInterval: 10_000,
      keepaliveCountMax: 3,
      algorithms: {
        ...algorithms,
        serverHostKey: [...preferred, ...serverHostKeys.filter((type) => !preferred.includes(type))],
      },
      hostVerifier: (key: Buffer) => {
        const verdict = judge(key, host.hostKeyNames, host.trust);
        if (verdict.verdict === "ok") return true;
        refused = verdict;
        shownKey = key;
        return false;
      },
      authHandler: loginAttempts(host, tried) as NonNullable<ConnectConfig["authHandler"]>,
      ...(host.agent === undefined ? {} : { agent: host.agent }),
    });
  });
}

/** The agent, then every key, then the password; what was tried is told if all are refused. */
function loginAttempts(host: ResolvedHost, tried: string[]) {
  const attempts: { readonly label: string; readonly attempt: object }[] = [
    ...host.keys.map((key) => ({
      label: key.label,
      attempt: {
        type: "publickey",
        username: host.user,
        key: key.privateKey,
        ...(key.passphrase === undefined ? {} : { passphrase: key.passphrase }),
      },
    })),
    ...(host.agent === undefined
      ? []
      : [{ label: "the agent's keys", attempt: { type: "agent", username: host.user, agent: host.agent } }]),
    ...(host.password === undefined
      ? []
      : [
          {
            label: "the password",
            attempt: { type: "password", username: host.user, password: host.password },
          },
        ]),
  ];
  return (_left: unknown, _partial: unknown, next: (attempt: object | false) => void) => {
    const current = attempts.shift();
    if (current !== undefined) tried.push(current.label);
    next(current?.attempt ?? false);
  };
}
