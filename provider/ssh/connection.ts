/** One SSH connection to one host, with many commands at once over it. */
import { getCiphers, randomUUID } from "node:crypto";
import { connect, createServer, isIP, type Socket } from "node:net";
import { constants } from "node:os";
import type { Duplex } from "node:stream";
import { StringDecoder } from "node:string_decoder";
import {
  type CipherAlgorithm,
  Client,
  type ClientChannel,
  type ConnectConfig,
  type GetStreamCallback,
  type NegotiatedAlgorithms,
  OpenSSHAgent,
  type ParsedKey,
  type SignCallback,
  type SigningRequestOptions,
} from "ssh2";
import { LvmNbdError } from "../core/errors.js";
import { defaultGraceSeconds, displayCommand, killCommand, takePid, wireCommand } from "./command.js";
import { type IdentityKey, parseOnce, type ResolvedHost } from "./config.js";
import { NotAsked, type Scan, scanCertificates, vouchedFor } from "./hostCertificates.js";
import {
  authoritiesFor,
  fingerprint,
  hostKeyAlgorithms,
  hostKeyError,
  judge,
  knownKeys,
  knownTypes,
  limitsOf,
  mayBePlain,
  portlessNames,
  type Verdict,
} from "./hostKeys.js";
import { keyType } from "./knownHosts.js";
import { prepareKeys, sendTogether } from "./packets.js";
import { enforceWindow, leastChunk } from "./receiveWindow.js";
import { isRevokedIn } from "./revokedKeys.js";
import type { CommandResult, RemoteCommand } from "./types.js";
import { certifiedKey, soundHash, soundKey, speakKeys } from "./userCertificates.js";

/** sshd's MaxSessions is 10 unless configured; a refused channel teaches a lower limit. */
const firstChannelLimit = 8;
/** For a free channel: many commands of a large stack on a slow host stand in one queue. */
const longestQueueSeconds = 600;
const defaultMaxOutput = 16 * 1024 * 1024;
/** Of what is said on stderr, with `leastChunk`: a process id comes within that or not at all. */
const mostBeforePid = 64 * 1024;
/** setTimeout takes more than this for "at once". */
const longestTimer = 2 ** 31 - 1;

/** Milliseconds that the host itself is given, beside what a command may take. */
export interface Timing {
  /** For the TCP connection, for the login, and for a jump to reach the next hop. */
  readonly connect: number;
  /** For an agent to sign, which may ask its owner first: not of the host's time. sshd waits 120 s for a login, or often 60. */
  readonly signature: number;
  /** Beyond a command's own deadline and grace: for the host to answer at all. */
  readonly slack: number;
  /** Between two keepalives while commands run; three without an answer are a lost link. */
  readonly keepalive: number;
}

const usualTiming: Timing = { connect: 20_000, signature: 45_000, slack: 10_000, keepalive: 10_000 };

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

/** The host has shown a key that is not trusted by itself; the connection has ended. */
class KeyRefused extends Error {
  constructor(
    readonly key: Buffer,
    readonly verdict: Verdict,
  ) {
    super(`the host key ${fingerprint(key)} was refused`);
  }
}

/** The host opened no session: the command was not started. */
class ChannelRefused extends Error {}

const chacha20: CipherAlgorithm = "chacha20-poly1305@openssh.com";

/**
 * Only algorithms that are sound today. Of key exchanges and ciphers ssh2's defaults are (no SHA-1, no CBC); its default host keys and
 * MACs hold SHA-1. ChaCha20 last, since it is for strict key exchanges only: see `isTerrapin`. No compression: little that is sent may
 * be much when it is unpacked.
 */
const algorithms: NonNullable<ConnectConfig["algorithms"]> = {
  cipher: [
    ...([
      "aes128-gcm@openssh.com",
      "aes256-gcm@openssh.com",
      "aes128-ctr",
      "aes192-ctr",
      "aes256-ctr",
    ] as const),
    // OpenSSL may be without it, e.g. for FIPS.
    ...(getCiphers().includes("chacha20") ? [chacha20] : []),
  ],
  compress: ["none"],
  hmac: ["hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512"],
};

/** An open connection. */
export class Connection {
  private readonly waiting: (() => void)[] = [];
  private readonly onLoss = new Set<() => void>();
  private channels = 0;
  private limit = firstChannelLimit;
  private lostBecause: string | undefined;
  private keepalive: NodeJS.Timeout | undefined;

  private constructor(
    private readonly host: ResolvedHost,
    private readonly client: Client,
    /** The TCP connection that carries it: its own, or the first hop's. */
    private readonly socket: Socket,
    private readonly timing: Timing,
  ) {
    client.on("error", (error) => this.lose(error.message));
    client.on("end", () => this.lose("the host closed the connection"));
    client.on("close", () => this.lose("the host closed the connection"));
    // Keys are exchanged again from time to time.
    client.on("handshake", () => prepareKeys(client));
    // An idle connection does not keep the process alive; a running command does.
    socket.unref();
  }

  get lost(): boolean {
    return this.lostBecause !== undefined;
  }

  /** Dials, through the jumps if there are any. Raises DialFailed, HOST_KEY_UNKNOWN, HOST_KEY_MISMATCH, AUTH_FAILED. */
  static async open(host: ResolvedHost, timing: Timing = usualTiming): Promise<Connection> {
    let last: Connection | undefined;
    try {
      for (const hop of [...host.jumps, host]) {
        const patience =
          hop.connectSeconds === undefined ? timing : { ...timing, connect: hop.connectSeconds * 1000 };
        const name: string = hop === host ? host.name : `${hop.name} (jump to ${host.name})`;
        last = await Connection.reach(hop, name, last, patience);
      }
    } catch (error) {
      last?.end();
      throw error;
    }
    if (last === undefined) throw new Error("a host has at least itself to connect to");
    return last;
  }

  /**
   * Dials and logs in. A key that is not known by itself ends that, and only a certificate of that very key begins it anew, at the same
   * address: a name may have several machines behind it, each with a key of its own. Behind a jump it is that which resolves the name.
   */
  private static async reach(
    declared: ResolvedHost,
    name: string,
    before: Connection | undefined,
    timing: Timing,
  ): Promise<Connection> {
    const host = await withoutRevoked(declared);
    let { address } = host;
    const dial = async (hop: ResolvedHost) => {
      const socket = before === undefined ? await openSocket({ ...hop, address }, timing) : before.socket;
      // What is an address already may name its interface, too.
      if (before === undefined && isIP(address) === 0) address = socket.remoteAddress ?? address;
      const stream: Duplex = before === undefined ? socket : await before.forward(hop);
      // What is run there is ended there, too: see `kill`.
      const reached = { ...hop, address };
      return logIn(hop, name, stream, timing, (client) => new Connection(reached, client, socket, timing));
    };
    const scan: Scan = (types) =>
      before === undefined
        ? scanCertificates(address, host.port, types, timing.connect)
        : before.forwarded(host, (port) => scanCertificates("127.0.0.1", port, types, timing.connect));
    const refused = (error: unknown, { verdict, problems = [] }: Partial<VouchedKeys> = {}) =>
      error instanceof KeyRefused
        ? hostKeyError(name, host.hostKeyNames[0] ?? host.address, error.key, verdict ?? error.verdict, {
            problems,
            limits: limitsOf(host.trust),
          })
        : error;
    try {
      return await dial(host);
    } catch (error) {
      if (!(error instanceof KeyRefused)) throw error;
      const vouched = await vouch(error, host, scan);
      if ("pins" in host.trust || vouched.keys.length === 0) throw refused(error, vouched);
      const certified = { ...host, trust: { ...host.trust, certified: vouched.keys } };
      return await dial(certified).catch((again: unknown) => {
        throw refused(again);
      });
    }
  }

  end(): void {
    if (!this.lost) this.client.end();
    this.lose("the connection was ended", () => this.socket.destroySoon());
  }

  /** Tells all who wait for this connection, and closes what is left of it, with the jumps before it. */
  private lose(reason: string, close: () => void = () => this.socket.destroy()): void {
    if (this.lost) return;
    this.lostBecause = reason;
    clearInterval(this.keepalive);
    for (const tell of [...this.onLoss]) tell();
    for (const wake of this.waiting.splice(0)) wake();
    close();
  }

  /** Passes connections to a local port on to that host, while `work` runs. */
  private async forwarded<T>(to: ResolvedHost, work: (port: number) => Promise<T>): Promise<T> {
    const open = new Set<Socket>();
    const server = createServer((socket) => {
      open.add(socket);
      socket.on("error", () => socket.destroy());
      this.forward(to).then(
        (stream) => {
          if (socket.destroyed) return stream.destroy();
          stream.on("error", () => socket.destroy());
          socket.on("close", () => stream.destroy());
          return socket.pipe(stream).pipe(socket);
        },
        // Whoever connected sees the end of his connection, as of one that the host refuses.
        () => socket.destroy(),
      );
    });
    await new Promise<void>((resolve, reject) => {
      server.once("error", reject);
      server.listen(0, "127.0.0.1", resolve);
    });
    try {
      const address = server.address();
      if (address === null || typeof address === "string") throw new Error("no local port");
      return await work(address.port);
    } finally {
      server.close();
      for (const socket of open) socket.destroy();
    }
  }

  private forward(to: ResolvedHost): Promise<Duplex> {
    const what = `${this.host.name} cannot reach ${to.address}:${to.port}`;
    return new Promise((resolve, reject) => {
      const fail = (message: string, mayPass: boolean) => {
        clearTimeout(timer);
        reject(new DialFailed(`${what}: ${message}`, mayPass));
      };
      const timer = setTimeout(
        () => fail(`no answer within ${this.timing.connect / 1000} s`, false),
        this.timing.connect,
      );
      this.socket.ref();
      try {
        this.client.forwardOut("127.0.0.1", 0, to.address, to.port, (error, channel) => {
          clearTimeout(timer);
          if (error) fail(error.message, this.lost || /refused|reset/i.test(error.message));
          else resolve(channel);
        });
      } catch (error) {
        fail(error instanceof Error ? error.message : String(error), true);
      }
    });
  }

  /**
   * Runs a command on a channel as soon as one is free; a host that refuses one is asked for fewer at once from
   * then on. Raises LinkLost beside what `Host.run` raises.
   */
  async run(command: RemoteCommand, signal: AbortSignal | undefined): Promise<CommandResult> {
    const marker = `lvm-nbd-${randomUUID()}`;
    const line = wireCommand(command, this.host.sudo, marker);
    const until = performance.now() + (command.deadlineSeconds + longestQueueSeconds) * 1000;
    for (;;) {
      while (this.channels >= this.limit && !this.lost) await this.turn(until, command, signal);
      if (signal?.aborted) throw this.error("CANCELLED", "cancelled before it began", command);
      if (this.lost) throw new LinkLost(false, this.lostBecause ?? "");
      this.take();
      try {
        return await this.execute(line, command, marker, signal);
      } catch (error) {
        if (!(error instanceof ChannelRefused)) throw error;
        const others = this.channels - 1;
        if (others === 0 || performance.now() > until) {
          throw this.error("HOST_UNREACHABLE", `it opens no session for commands: ${error.message}`);
        }
        this.limit = Math.min(this.limit, others);
      } finally {
        this.release();
      }
    }
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
        Math.min(longestTimer, Math.max(0, until - performance.now())),
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
    if (this.channels > 1) return;
    this.socket.ref();
    this.watch();
  }

  private release(): void {
    this.channels--;
    this.waiting.shift()?.();
    if (this.channels > 0) return;
    clearInterval(this.keepalive);
    this.socket.unref();
  }

  /**
   * Keepalives of our own: ssh2's run on a timer that would keep an idle process alive. The request, to stop a
   * forwarding that never was, is one that every server answers.
   */
  private watch(): void {
    let unanswered = 0;
    clearInterval(this.keepalive);
    this.keepalive = setInterval(() => {
      if (unanswered === 3) {
        this.lose(`no answer to keepalives for ${(3 * this.timing.keepalive) / 1000} s`);
        return;
      }
      unanswered++;
      try {
        this.client.unforwardIn("127.0.0.1", 1, () => {
          unanswered = 0;
        });
      } catch (error) {
        this.lose(error instanceof Error ? error.message : String(error));
      }
    }, this.timing.keepalive);
  }

  private execute(
    line: string,
    command: RemoteCommand,
    marker: string,
    signal: AbortSignal | undefined,
  ): Promise<CommandResult> {
    const maxOutput = command.maxOutputBytes ?? defaultMaxOutput;
    const grace = command.graceSeconds ?? defaultGraceSeconds;
    // Before it is sent: an answer that is read late must not make a command that timed out look quick.
    const started = performance.now();
    const out = new StringDecoder("utf8");
    let stdout = "";
    const err: Buffer[] = [];
    let size = 0;
    let errSize = 0;
    let exitCode: number | undefined;
    let exitSignal: string | undefined;
    return new Promise((resolve, reject) => {
      let channel: ClientChannel | undefined;
      let stopping: LvmNbdError | undefined;
      let killing = false;
      let killed = false;
      let closed = false;
      let finished = false;
      let giveUp: NodeJS.Timeout | undefined;
      const finish = (act: () => void) => {
        if (finished) return;
        finished = true;
        clearTimeout(timer);
        clearTimeout(giveUp);
        signal?.removeEventListener("abort", cancelled);
        this.onLoss.delete(lost);
        act();
      };
      const unconfirmed = (reason: LvmNbdError) =>
        new LvmNbdError(reason.code, {
          ...reason.details,
          message: `${reason.details.message}; the host did not confirm that the command has ended`,
          advice: `The host itself ends it after ${command.deadlineSeconds} s at the latest. The next \`pulumi up\` looks and goes on from there.`,
        });
      /** Stops the command on the host, then fails with the reason; bounded, whatever the host does. */
      const stop = (reason: LvmNbdError) => {
        if (stopping !== undefined) return;
        stopping = reason;
        giveUp = setTimeout(
          () => {
            channel?.close();
            finish(() => reject(unconfirmed(reason)));
          },
          grace * 1000 + this.timing.slack / 2,
        );
        killWhenKnown();
      };
      /** Its process id is the first it says, which may still be on the way. */
      const killWhenKnown = () => {
        if (killing) return;
        const { pid } = takePid(Buffer.concat(err).toString("utf8"), marker);
        if (pid === undefined) return;
        killing = true;
        this.kill(
          pid,
          grace,
          marker,
          () => !finished,
          () => {
            killed = true;
            if (closed) finish(ended);
          },
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
        Math.min(longestTimer, (command.deadlineSeconds + grace) * 1000 + this.timing.slack),
      );
      const lost = () => {
        // Without a channel it is ssh2's answer to the request, certain to come now, that tells whether it was sent.
        if (channel === undefined) return;
        const why = this.lostBecause ?? "the link was lost";
        finish(() => reject(stopping === undefined ? new LinkLost(true, why) : unconfirmed(stopping)));
      };
      const collect = (into: Buffer[] | StringDecoder) => (chunk: Buffer) => {
        if (finished) return;
        if (stopping !== undefined && (into === out || killing || size > maxOutput)) return;
        const counted = Math.max(chunk.length, leastChunk);
        size += counted;
        if (into === err) errSize += counted;
        if (into === out) {
          const text = out.write(chunk);
          stdout += text;
          command.onOutput?.(text);
        } else err.push(chunk);
        // Not of each piece: a host may send each byte by itself, and it is all looked through.
        if (stopping !== undefined && errSize <= mostBeforePid && chunk.includes("\n")) killWhenKnown();
        if (stopping === undefined && size > maxOutput)
          stop(this.error("OUTPUT_TOO_LARGE", `it printed more than ${maxOutput} bytes`, command));
      };
      const ended = () => {
        if (stopping !== undefined) return reject(stopping);
        if (exitCode === undefined && exitSignal === undefined) {
          return reject(
            new LinkLost(true, this.lostBecause ?? "the host ended the session without a result"),
          );
        }
        const { pid, stderr } = takePid(Buffer.concat(err).toString("utf8"), marker);
        const result = {
          exitCode: exitCode ?? 128 + signalNumber(exitSignal),
          stdout: stdout + out.end(),
          stderr,
        };
        if (pid === undefined) return reject(this.notStarted(result));
        resolve(result);
      };
      /** `timeout` waits for the command alone: what it started and is deaf to TERM may have outlived it. */
      const endedAtDeadline = () => {
        const late = performance.now() - started >= command.deadlineSeconds * 1000;
        if (stopping !== undefined || !late) return false;
        const { pid, stderr } = takePid(Buffer.concat(err).toString("utf8"), marker);
        if (pid === undefined) return false;
        if (exitCode !== 124 && exitCode !== 137 && exitSignal === undefined) return false;
        stop(this.error("COMMAND_TIMED_OUT", `stopped after ${command.deadlineSeconds} s`, command, stderr));
        return true;
      };
      this.onLoss.add(lost);
      signal?.addEventListener("abort", cancelled);
      try {
        this.client.exec(line, (error, opened) => {
          if (error) {
            const why = this.lost
              ? new LinkLost(!isUnsent(error), this.lostBecause ?? "the link was lost")
              : new ChannelRefused(error.message);
            return finish(() => reject(stopping ?? why));
          }
          if (finished) return opened.close();
          channel = opened;
          // All listeners at once: the whole answer may be in the packet that is being read.
          opened.on("data", collect(out));
          opened.stderr.on("data", collect(err));
          opened.on("exit", (code: number | null, name?: string) => {
            exitCode = code ?? undefined;
            exitSignal = name;
          });
          opened.on("error", lost);
          opened.on("close", () => {
            closed = true;
            // Its end is not yet that of all it started, which the kill that is under way sees to.
            if (!endedAtDeadline() && (!killing || killed)) finish(ended);
          });
          opened.end(command.stdin ?? "");
        });
      } catch (error) {
        // ssh2 throws only when it finds the connection closed before it sends anything.
        const message = error instanceof Error ? error.message : String(error);
        finish(() => reject(new LinkLost(false, message)));
        this.lose(message);
      }
    });
  }

  /**
   * Ends a command's process group over a session of its own. A host that refuses one is asked again, since the
   * commands that are ended make room; then over another connection, lest busy sessions keep each other alive.
   */
  private kill(
    pid: number,
    graceSeconds: number,
    marker: string,
    wanted: () => boolean,
    ended = () => {},
    refusals = 0,
  ): void {
    if (this.lost || !wanted()) {
      ended();
      return;
    }
    const again = () => {
      const next = () => {
        if (refusals < 3 || !wanted())
          return this.kill(pid, graceSeconds, marker, wanted, ended, refusals + 1);
        Connection.open(this.host, this.timing).then(
          (other) =>
            other.kill(pid, graceSeconds, marker, wanted, () => {
              other.end();
              ended();
            }),
          () => this.kill(pid, graceSeconds, marker, wanted, ended),
        );
      };
      setTimeout(next, 200).unref();
    };
    this.take();
    try {
      this.client.exec(killCommand(pid, graceSeconds, this.host.sudo, marker), (error, channel) => {
        if (error) {
          this.release();
          again();
          return;
        }
        channel.on("close", () => {
          this.release();
          ended();
        });
        channel.resume().end();
      });
    } catch (error) {
      this.release();
      this.lose(error instanceof Error ? error.message : String(error));
    }
  }

  private notStarted(result: CommandResult): LvmNbdError {
    const text = `${result.stderr}${result.stdout}`.trim();
    // Without sudo's own words it was the login shell, e.g. nologin, that ended it.
    if (this.host.sudo && /sudo|password/i.test(text)) {
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

function openSocket({ address, port }: ResolvedHost, timing: Timing): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect({ host: address, port });
    const fail = (message: string, mayPass: boolean) => {
      clearTimeout(timer);
      socket.destroy();
      reject(new DialFailed(`${address}:${port}: ${message}`, mayPass));
    };
    const timer = setTimeout(
      () => fail(`no answer within ${timing.connect / 1000} s`, false),
      timing.connect,
    );
    socket.once("error", (error: NodeJS.ErrnoException) => {
      // The error of a name with several addresses has a code and no message.
      fail(error.message || (error.code ?? error.name), /^(ECONNREFUSED|ECONNRESET)$/.test(error.code ?? ""));
    });
    socket.once("connect", () => {
      clearTimeout(timer);
      socket.removeAllListeners("error");
      socket.setNoDelay(true);
      sendTogether(socket);
      socket.setKeepAlive(true, timing.keepalive);
      resolve(socket);
    });
  });
}

/** The host with those of its known keys that RevokedHostKeys names; raises INVALID_INPUT where that cannot be told. */
async function withoutRevoked(host: ResolvedHost): Promise<ResolvedHost> {
  const { trust, hostKeyNames, revokedHostKeys } = host;
  if ("pins" in trust || revokedHostKeys.length === 0) return host;
  const revoked: Buffer[] = [];
  for (const key of knownKeys(hostKeyNames, trust)) {
    if (await isRevoked(host, key)) revoked.push(key);
  }
  return { ...host, trust: { ...trust, revoked } };
}

async function isRevoked({ name, revokedHostKeys }: ResolvedHost, blob: Buffer): Promise<boolean> {
  for (const path of revokedHostKeys) {
    try {
      if (await isRevokedIn(path, blob)) return true;
    } catch (error) {
      throw new LvmNbdError("INVALID_INPUT", {
        host: name,
        property: "host",
        message: `RevokedHostKeys ${path} cannot be read: ${error instanceof Error ? error.message : String(error)}`,
      });
    }
  }
  return false;
}

interface VouchedKeys {
  readonly keys: readonly Buffer[];
  /** Of the key that was shown, where there are none. */
  readonly verdict: Verdict;
  readonly problems: readonly string[];
}

/**
 * The keys that certificates of the host vouch for: that which it has shown, or others. Raises DialFailed where it could not be asked.
 * Not while a connection waits for it: ssh2 would take the host's word for what comes after its key.
 */
async function vouch({ key, verdict }: KeyRefused, host: ResolvedHost, scan: Scan): Promise<VouchedKeys> {
  const { trust, hostKeyNames: names } = host;
  const authorities = authoritiesFor(names, trust);
  const limits = limitsOf(trust);
  if (verdict.verdict === "revoked" || authorities.length === 0) {
    const wanted = "is what HostKeyAlgorithms asks for, and no @cert-authority of known_hosts is for it";
    return { keys: [], verdict, problems: mayBePlain(keyType(key), limits) ? [] : [wanted] };
  }
  const vouched = await vouchedFor(key, portlessNames(names), authorities, scan, limits).catch(
    (error: unknown) => {
      if (!(error instanceof NotAsked)) throw error;
      throw new DialFailed(`its certificate could not be asked for: ${error.message}`, true);
    },
  );
  const keys: Buffer[] = [];
  for (const one of vouched.by) {
    if (!(await isRevoked(host, one.blob))) keys.push(one.key);
  }
  const revoked = vouched.by.length > 0 && keys.length === 0;
  return { keys, verdict: revoked ? { verdict: "revoked" } : verdict, problems: vouched.problems };
}

/**
 * True when ssh2 failed before it sent the request to run the command: it sends it as soon as the host has opened
 * the channel, and says "Unable to exec" of one that was sent.
 */
function isUnsent(error: Error): boolean {
  return (
    error.message === "No response from server" || error.message.startsWith("(SSH) Channel open failure")
  );
}

/** As a shell counts it: a command that KILL ended has the exit code 137. */
function signalNumber(name: string | undefined): number {
  return Object.entries(constants.signals).find(([known]) => known === name)?.[1] ?? 0;
}

/**
 * True where a man in the middle could take the first packets out of what is encrypted, unseen: CVE-2023-48795. What else is open to it
 * (CBC) is never offered.
 */
function isTerrapin(client: Client, { cs, sc }: NegotiatedAlgorithms): boolean {
  // Of ssh2's lib/protocol/kex.js.
  const strict =
    "_protocol" in client && (client._protocol as { readonly _strictMode?: unknown })._strictMode;
  return strict !== true && [cs, sc].some(({ cipher }) => cipher === chacha20);
}

/** Logs in; `opened` is called before the next packet is read, so that no event of the connection is missed. */
function logIn<T>(
  host: ResolvedHost,
  name: string,
  stream: Duplex,
  timing: Timing,
  opened: (client: Client) => T,
): Promise<T> {
  return new Promise((resolve, reject) => {
    const client = new Client();
    let refused: KeyRefused | undefined;
    const clock = new LoginClock(timing.connect, () => {
      const what = `no login within ${timing.connect / 1000} s`;
      fail(new DialFailed(`${host.address}:${host.port}: ${what}`, false));
    });
    const login = new LoginAttempts(host, timing, clock);
    const end = () => {
      clock.end();
      client.removeAllListeners();
    };
    const fail = (error: unknown) => {
      end();
      login.end();
      // ssh2 may still report the socket's end; nobody is interested any more.
      client.on("error", () => undefined);
      client.end();
      stream.destroy();
      reject(error);
    };
    const authFailed = (why: string) =>
      fail(
        new LvmNbdError("AUTH_FAILED", {
          host: name,
          message: `the login as ${host.user} was refused${why}; tried: ${login.tried.join(", ") || "nothing, since no key, agent or password is there"}`,
        }),
      );
    client.once("ready", () => {
      end();
      resolve(opened(client));
    });
    const cut = (why: string) => {
      // To dial again would only ask its owner again.
      if (login.signing)
        authFailed(
          " while the agent was asked: the host did not wait for an answer (LoginGraceTime), which its owner may have to confirm",
        );
      else fail(new DialFailed(why, true));
    };
    const closed = () => cut("the connection was closed before the login was complete");
    // Behind a jump the end comes alone: the jump's sshd waits for ours.
    client.once("end", closed);
    client.once("close", closed);
    client.once("handshake", (negotiated) => {
      if (!isTerrapin(client, negotiated)) return prepareKeys(client);
      const why = `it takes no cipher but ${chacha20}, which is not safe without the strict key exchange that it does not know`;
      fail(
        new DialFailed(`${host.address}:${host.port}: ${why}: update its sshd, or have it take AES`, false),
      );
    });
    client.on("change password", () => authFailed(" until the password is changed"));
    client.on("error", (error: Error & { level?: string; code?: unknown }) => {
      if (refused !== undefined) return fail(refused);
      // ssh2 goes on with the next attempt after these.
      if (error.level === "agent") return login.agentFailed(error.message);
      if (error.level === "client-authentication") return login.exhausted ? authFailed("") : undefined;
      if (error.level === "client-socket") return cut(`${host.address}:${host.port}: ${error.message}`);
      // A disconnect by the host in the middle of the login, e.g. "Too many authentication failures".
      if (login.tried.length > 0 && typeof error.code === "number") return authFailed(` (${error.message})`);
      fail(new DialFailed(`${host.address}:${host.port}: ${error.message}`, error.level !== "handshake"));
    });
    const known = knownTypes(host.hostKeyNames, host.trust).flatMap((type) =>
      type === "ssh-rsa" ? ["rsa-sha2-512", "rsa-sha2-256"] : [type],
    );
    const usable = hostKeyAlgorithms(limitsOf(host.trust));
    // What is certified first, which `known` begins with then.
    const certifies = !("pins" in host.trust) && host.trust.certified !== undefined;
    const preferred = certifies
      ? [...new Set(known)].flatMap((type) => usable.filter((one) => one === type))
      : usable.filter((type) => known.includes(type));
    clock.go();
    client.connect({
      sock: stream,
      username: host.user,
      // The clock sees to it.
      readyTimeout: 0,
      algorithms: {
        ...algorithms,
        serverHostKey: [...preferred, ...usable.filter((type) => !preferred.includes(type))],
      },
      // At once, and of each exchange of keys again.
      hostVerifier: (key: Buffer) => {
        const verdict = judge(key, host.hostKeyNames, host.trust);
        if (verdict.verdict === "ok") return true;
        refused = new KeyRefused(key, verdict);
        return false;
      },
      authHandler: ((
        left: readonly string[] | null,
        _partial: unknown,
        next: (attempt: object | false) => void,
      ) => next(login.next(left))) as NonNullable<ConnectConfig["authHandler"]>,
    });
    try {
      enforceWindow(client);
      speakKeys(client);
    } catch (error) {
      fail(error);
    }
  });
}

/** The time that a host has for one login, in milliseconds. It stands still while an agent is asked, or waited for. */
class LoginClock {
  private timer: NodeJS.Timeout | undefined;
  private since = 0;
  private ended = false;

  constructor(
    private left: number,
    private readonly over: () => void,
  ) {}

  go(): void {
    if (this.ended || this.timer !== undefined) return;
    this.since = performance.now();
    this.timer = setTimeout(this.over, this.left);
  }

  stop(): void {
    if (this.timer === undefined) return;
    clearTimeout(this.timer);
    this.timer = undefined;
    this.left -= performance.now() - this.since;
  }

  end(): void {
    this.stop();
    this.ended = true;
  }
}

/** Who asks each agent, by its socket, and who waits to. */
const turns = new Map<string, (() => void)[]>();

/**
 * Lets `ask` ask the agent when all before have released it: ssh-agent answers nobody while its owner is asked to confirm. What is
 * asked has a limit of its own, so that the wait has one.
 */
function takeTurn(socket: string, ask: (release: () => void) => void): void {
  const queue = turns.get(socket) ?? [];
  const turn = () =>
    ask(() => {
      queue.shift();
      if (queue[0] === undefined) turns.delete(socket);
      else queue[0]();
    });
  queue.push(turn);
  turns.set(socket, queue);
  if (queue[0] === turn) turn();
}

/**
 * The agent's keys as OpenSSH offers them: first those of the configured identity files, and only those where
 * IdentitiesOnly says so. An agent may hold more keys than the host's MaxAuthTries.
 */
class ChosenKeys extends OpenSSHAgent {
  /** It has been asked for a signature, and its owner perhaps for a confirmation. */
  signing = false;
  private silent: Error | undefined;
  private asked: Duplex | undefined;
  private patience: { readonly ms: number; readonly without: string; readonly signing: boolean };
  /** Keys and hashes: a host may take any number of signatures of one for no answer, and ask for the next. */
  private readonly signed = new Set<string>();

  /** After an answer that the agent did not give in time it is not asked again. */
  constructor(
    private readonly socket: string,
    private readonly host: Pick<ResolvedHost, "agentKeys" | "identitiesOnly">,
    private readonly timing: Timing,
    private readonly clock: LoginClock,
  ) {
    super(socket);
    // It only lists its keys.
    const ms = timing.connect / 2;
    this.patience = { ms, without: `no answer within ${ms / 1000} s`, signing: false };
  }

  end(): void {
    this.silent = new Error("the login has ended");
    this.asked?.destroy(this.silent);
  }

  override getStream(answer: GetStreamCallback): void {
    if (this.silent !== undefined) {
      answer(this.silent);
      return;
    }
    const { ms, without, signing } = this.patience;
    this.clock.stop();
    takeTurn(this.socket, (release) => {
      const answered = () => {
        this.signing = false;
        this.clock.go();
        release();
      };
      // While it waited for its turn.
      if (this.silent !== undefined) {
        answered();
        answer(this.silent);
        return;
      }
      const opened: GetStreamCallback = (error, stream) => {
        this.asked = stream;
        if (stream === undefined) answered();
        else {
          this.signing = signing;
          const timer = setTimeout(() => {
            this.silent = new Error(without);
            stream.destroy(this.silent);
          }, ms);
          stream.once("close", () => {
            clearTimeout(timer);
            answered();
          });
        }
        answer(error, stream);
      };
      try {
        super.getStream(opened);
      } catch (error) {
        // Its path is none that can be connected to.
        answered();
        answer(error instanceof Error ? error : new Error(String(error)));
      }
    });
  }

  override getIdentities(answer: (error: Error | null | undefined, keys?: ParsedKey[]) => void): void {
    const { agentKeys, identitiesOnly } = this.host;
    super.getIdentities((error, offered = []) => {
      const keys = offered.filter((key) => "getPublicSSH" in key).filter(({ type }) => type !== "ssh-dss");
      const configured = (key: ParsedKey) => agentKeys.includes(key.getPublicSSH().toString("base64"));
      const others = identitiesOnly ? [] : keys.filter((key) => !configured(key));
      answer(error, [...keys.filter(configured), ...others]);
    });
  }

  override sign(
    key: ParsedKey | Buffer | string,
    data: Buffer,
    options?: SigningRequestOptions | SignCallback,
    answer?: SignCallback,
  ): boolean {
    const [wanted, done] = typeof options === "function" ? [undefined, options] : [options?.hash, answer];
    const hash = soundHash(wanted);
    const blob = typeof key === "object" && "getPublicSSH" in key ? key.getPublicSSH() : key;
    const what = `${hash} ${blob.toString("base64")}`;
    if (this.signed.has(what)) {
      done?.(new Error("the host asked again for a signature that it had"));
      return false;
    }
    this.signed.add(what);
    const ms = this.timing.signature;
    this.patience = {
      ms,
      without: `no signature within ${ms / 1000} s: it did not answer, or nobody confirmed it`,
      signing: true,
    };
    return super.sign(key, data, { hash }, done);
  }
}

/** The key's certificates, and itself. As OpenSSH: those come first. */
function offersOf({ label, privateKey, passphrase, certificates }: IdentityKey): [string, ParsedKey][] {
  const parsed = parseOnce(privateKey, passphrase);
  const key = Array.isArray(parsed) ? parsed[0] : parsed;
  if (key === undefined || key instanceof Error) throw new Error(`${label} was a key when it was read`);
  const certified = certificates.flatMap((one) => certifiedKey(key, one) ?? []);
  return [
    ...certified.map((one): [string, ParsedKey] => [`${label}'s certificate`, one]),
    [label, soundKey(key)],
  ];
}

interface Prompt {
  readonly echo?: boolean;
}

/**
 * Every key that is named, then the agent's, of which there may be more than the host's MaxAuthTries, then the
 * password; what was tried is told if all are refused.
 */
class LoginAttempts {
  readonly tried: string[] = [];
  exhausted = false;
  private readonly attempts: { readonly label: string; readonly method: string; readonly attempt: object }[];
  private readonly agent: ChosenKeys | undefined;

  constructor(host: ResolvedHost, timing: Timing, clock: LoginClock) {
    const { user: username, password } = host;
    // An empty SSH_AUTH_SOCK is none.
    const agent = host.agent ? new ChosenKeys(host.agent, host, timing, clock) : undefined;
    this.agent = agent;
    this.attempts = host.keys.flatMap(offersOf).map(([label, key]) => ({
      ...{ label, method: "publickey", attempt: { type: "publickey", username, key } },
    }));
    if (agent !== undefined) {
      this.attempts.push({
        label: "the agent's keys",
        method: "publickey",
        attempt: { type: "agent", username, agent },
      });
    }
    if (password !== undefined) {
      this.attempts.push(
        { label: "the password", method: "password", attempt: { type: "password", username, password } },
        {
          label: "the password (keyboard-interactive)",
          method: "keyboard-interactive",
          attempt: {
            type: "keyboard-interactive",
            username,
            prompt: (
              _name: string,
              _instructions: string,
              _language: string,
              prompts: readonly Prompt[],
              answer: (answers: string[]) => void,
            ) => answer(prompts.map((prompt) => (prompt.echo ? "" : password))),
          },
        },
      );
    }
  }

  /** The next attempt of a method that the host still takes; `left` is unknown before the first. */
  next(left: readonly string[] | null): object | false {
    for (;;) {
      const current = this.attempts.shift();
      if (current === undefined) {
        this.exhausted = true;
        return false;
      }
      const taken = left?.includes(current.method) ?? true;
      if (taken || current.method !== "keyboard-interactive")
        this.tried.push(taken ? current.label : `${current.label} (the host does not take it)`);
      if (taken) return current.attempt;
    }
  }

  /** The agent has been asked for a signature, and has not answered. */
  get signing(): boolean {
    return this.agent?.signing ?? false;
  }

  /** Lets the agent go, which may still be asking its owner. */
  end(): void {
    this.agent?.end();
  }

  agentFailed(message: string): void {
    const last = this.tried.pop();
    // It tells of each of its keys.
    const told = ` (${message})`;
    if (last !== undefined) this.tried.push(last.endsWith(told) ? last : `${last}${told}`);
  }
}
