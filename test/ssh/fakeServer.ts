/** An SSH server inside the test, which misbehaves as told. */
import { type AddressInfo, createServer, type Socket } from "node:net";
import { type AuthContext, type Connection, Server, type ServerChannel, type Session, utils } from "ssh2";
import type { ResolvedHost } from "../../provider/ssh/config.js";
import type { Timing } from "../../provider/ssh/connection.js";

/** A command that arrived. `pid` is what the wrapper's first line of stderr says. */
export interface Arrived {
  readonly line: string;
  readonly channel: ServerChannel;
  /** The TCP connection it came by, e.g. to cut it. */
  readonly socket: Socket;
  /** Says the process id, as the wrapper does. */
  started(pid?: number): void;
  /** Ends it. */
  exit(code?: number, stdout?: string): void;
}

export interface FakeServerOptions {
  readonly run?: (command: Arrived) => void;
  /** Called for the request itself, before it is answered; `false` leaves it unanswered. `send`: see `sender`. */
  readonly exec?: (line: string, socket: Socket, send: (data: Buffer) => void) => boolean;
  /** Called when a session is asked for; `false` leaves that unanswered. */
  readonly session?: (socket: Socket) => boolean;
  /** Called for commands that end others. Default: they succeed. */
  readonly kill?: (command: Arrived) => void;
  /** Called with a connection that it is asked to pass on. Default: it refuses. */
  readonly forward?: (channel: ServerChannel) => void;
  readonly authenticate?: (context: AuthContext) => void;
  readonly algorithms?: NonNullable<ConstructorParameters<typeof Server>[0]["algorithms"]>;
  /** It does not say which signatures it takes, as servers before 2016. */
  readonly signaturesUnsaid?: boolean;
  /** It knows no strict key exchange, as servers before 2023. */
  readonly notStrict?: boolean;
  readonly maxSessions?: number;
  /** Default: a free one. */
  readonly port?: number;
}

/** An `authenticate` that takes this password and nothing else. */
export function takesPassword(password: string): (context: AuthContext) => void {
  return (context) => {
    if (context.method === "password" && context.password === password) context.accept();
    else context.reject(["password"]);
  };
}

export interface FakeServer {
  readonly port: number;
  readonly publicKey: string;
  /** TCP connections so far. */
  readonly sockets: Socket[];
  /** Lines of the commands so far, without those that end others. */
  readonly lines: string[];
  /** Lines of the commands that end others. */
  readonly kills: string[];
  readonly logins: string[];
  mostSessions(): number;
  host(changes?: Partial<ResolvedHost>): ResolvedHost;
  close(): Promise<void>;
}

/** Of three in a thousand ssh2 writes a private key that it cannot read. */
function readableKeyPair(): ReturnType<typeof utils.generateKeyPairSync> {
  for (;;) {
    const pair = utils.generateKeyPairSync("ed25519");
    if (!(utils.parseKey(pair.private) instanceof Error)) return pair;
  }
}

const hostKey = readableKeyPair();
export const fakeHostKey = hostKey.public;
export const otherKey = utils.generateKeyPairSync("ed25519").public;

/** Short where the usual waits are long, long enough for a busy machine. */
export const timing: Timing = { connect: 5000, signature: 5000, slack: 2000, keepalive: 10_000 };

export function connection(changes: Partial<ResolvedHost> & { port: number }): ResolvedHost {
  return {
    name: "fake",
    address: "127.0.0.1",
    user: "root",
    keys: [],
    agent: undefined,
    agentKeys: [],
    identitiesOnly: false,
    connectSeconds: undefined,
    password: "hunter2",
    trust: { pins: [hostKey.public] },
    hostKeyNames: [`[127.0.0.1]:${changes.port}`],
    revokedHostKeys: [],
    sudo: false,
    jumps: [],
    ...changes,
  };
}

/** The lists of algorithms in ssh2's lib/protocol/kex.js. */
interface Offer {
  readonly lists: {
    readonly kex: { readonly array: readonly string[] };
    readonly serverHostKey: List;
  } & Directions<List>;
  readonly constructor: new (
    lists: { kex: readonly string[]; serverHostKey: readonly string[] } & Directions<readonly string[]>,
  ) => Offer;
}
interface List {
  readonly array: readonly string[];
}
type Directions<T> = Record<"cs" | "sc", Record<"cipher" | "mac" | "compress" | "lang", T>>;

/** What ssh2's server has inside; see its lib/protocol/Protocol.js. */
interface Protocol {
  _offer: Offer;
  /** Unless it is set, the client's word alone decides. */
  _strictMode: boolean | undefined;
  readonly _kex: { remoteExtInfoEnabled: boolean };
  _onHandshakeComplete: (...args: unknown[]) => void;
  channelData(id: number, data: Buffer): void;
}

function protocolOf(client: Connection): Protocol {
  return (client as unknown as { readonly _protocol: Protocol })._protocol;
}

function beNotStrict(protocol: Protocol): void {
  const { kex, serverHostKey, cs, sc } = protocol._offer.lists;
  const listed = ({ cipher, mac, compress, lang }: typeof cs) => ({
    ...{ cipher: cipher.array, mac: mac.array, compress: compress.array, lang: lang.array },
  });
  protocol._strictMode = false;
  protocol._offer = new protocol._offer.constructor({
    kex: kex.array.filter((one) => !one.startsWith("kex-strict")),
    ...{ serverHostKey: serverHostKey.array, cs: listed(cs), sc: listed(sc) },
  });
}

function leaveSignaturesUnsaid(protocol: Protocol): void {
  const complete = protocol._onHandshakeComplete;
  protocol._onHandshakeComplete = (...args) => {
    protocol._kex.remoteExtInfoEnabled = false;
    complete(...args);
  };
}

/** Sends data on a session's channel, whatever its state and window. */
function sender(client: Connection, session: Session): (data: Buffer) => void {
  const { _chanInfo } = session as unknown as { readonly _chanInfo: { outgoing: { readonly id: number } } };
  return (data) => protocolOf(client).channelData(_chanInfo.outgoing.id, data);
}

export async function startFakeServer(options: FakeServerOptions = {}): Promise<FakeServer> {
  const sockets: Socket[] = [];
  const lines: string[] = [];
  const kills: string[] = [];
  const logins: string[] = [];
  let most = 0;
  const { algorithms = {} } = options;
  const server = new Server({ hostKeys: [hostKey.private], algorithms }, (client, { port: remotePort }) => {
    // Several may have connected before the first is announced.
    const socket = sockets.find((one) => one.remotePort === remotePort);
    if (socket === undefined) throw new Error("a client without a connection");
    if (options.notStrict) beNotStrict(protocolOf(client));
    if (options.signaturesUnsaid) leaveSignaturesUnsaid(protocolOf(client));
    let sessions = 0;
    // A client that is cut off is what these tests are about.
    client.on("error", () => undefined);
    client.on("authentication", (context) => {
      logins.push(context.method);
      if (options.authenticate !== undefined) options.authenticate(context);
      else context.accept();
    });
    client.on("tcpip", (accept, reject) => {
      if (options.forward === undefined) reject();
      else options.forward(accept());
    });
    client.on("session", (accept, reject) => {
      if (options.session?.(socket) === false) return;
      if (sessions >= (options.maxSessions ?? 10)) return reject();
      sessions++;
      most = Math.max(most, sessions);
      const session = accept();
      session.on("close", () => {
        sessions--;
      });
      session.on("exec", (acceptExec, _rejectExec, { command: line }) => {
        const kill = line.includes("kill -s TERM");
        (kill ? kills : lines).push(line);
        if (!kill && options.exec?.(line, socket, sender(client, session)) === false) return;
        const channel = acceptExec();
        channel.on("error", () => undefined);
        const marker = /lvm-nbd-[0-9a-f-]{36}/.exec(line)?.[0] ?? "";
        const command: Arrived = {
          line,
          channel,
          socket,
          started: (pid = 4711) => {
            channel.stderr.write(`${marker} ${pid}\n`);
          },
          exit: (code = 0, stdout = "") => {
            channel.write(stdout);
            channel.exit(code);
            channel.end();
          },
        };
        if (kill && options.kill === undefined) command.exit();
        else if (kill) options.kill?.(command);
        else if (options.run !== undefined) options.run(command);
        else {
          command.started();
          command.exit(0, "done");
        }
      });
    });
  });
  const tcp = createServer((socket) => {
    socket.setNoDelay(true);
    sockets.push(socket);
    server.injectSocket(socket);
  });
  await new Promise<void>((resolve) => tcp.listen(options.port ?? 0, "127.0.0.1", resolve));
  const { port } = tcp.address() as AddressInfo;
  return {
    port,
    publicKey: hostKey.public,
    sockets,
    lines,
    kills,
    logins,
    mostSessions: () => most,
    host: (changes = {}) => connection({ port, ...changes }),
    close: () =>
      new Promise((resolve) => {
        tcp.close(() => resolve());
        for (const socket of sockets) socket.destroy();
      }),
  };
}

/** Waits for a condition; fails when it is not met in time. */
export async function until(condition: () => boolean, what: string): Promise<void> {
  const end = Date.now() + 20_000;
  while (!condition()) {
    if (Date.now() > end) throw new Error(`waited in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
