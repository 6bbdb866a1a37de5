/**
 * How much a host may send on a channel before it is asked for more (RFC 4254, section 5.2). ssh2 takes whatever comes, and keeps what
 * nobody reads yet, e.g. on the channel of a command that the host has not confirmed, and answers that the host does not take.
 */
import type { Readable, Writable } from "node:stream";
import type { Client, ClientChannel } from "ssh2";

/** Bytes on a channel that nobody reads yet. A host that confirms a command before it sends what that prints sends none. */
const mostUnread = 64 * 1024;
/** Bytes that a piece of data counts as at least: a host may send each byte by itself, and each costs about that to keep. */
export const leastChunk = 320;
/** RFC 4254, section 5.2: the only type of extended data there is. */
const stderrType = 1;

/** Bytes that are to be sent. What a command reads is far less, and so is all that is sent beside it. */
const mostUnsent = 4 * 1024 ** 2;

type OnData = (protocol: unknown, channel: number, data: Buffer, type?: number) => void;
type OnRequest = (...request: unknown[]) => void;

/** What ssh2's `Client` has inside; see its lib/client.js. */
interface Inside {
  readonly _protocol: {
    readonly _handlers: Record<"CHANNEL_DATA" | "CHANNEL_EXTENDED_DATA", OnData> &
      Record<"GLOBAL_REQUEST" | "CHANNEL_REQUEST" | "CHANNEL_OPEN", OnRequest>;
  };
  readonly _sock: Writable;
  readonly _chanMgr: {
    /** A function while the channel is being opened. */
    get(
      id: number,
    ): (ClientChannel & { readonly incoming: { readonly window: number } }) | (() => void) | undefined;
  };
}

/**
 * Has a client that is connecting end with an error when a host sends more than it may. Throws where ssh2 is another than is known here.
 */
export function enforceWindow(client: Client): void {
  const { _protocol, _chanMgr, _sock } = client as Client & Partial<Inside>;
  const handlers = _protocol?._handlers;
  if (
    typeof handlers?.CHANNEL_DATA !== "function" ||
    typeof _chanMgr?.get !== "function" ||
    typeof _sock?.writableLength !== "number"
  )
    throw new Error("what a host sends is not bounded with this version of ssh2: use 1.17");
  for (const kind of ["GLOBAL_REQUEST", "CHANNEL_REQUEST", "CHANNEL_OPEN"] as const) {
    const take = handlers[kind];
    handlers[kind] = (...request) => {
      if (_sock.writableLength > mostUnsent) {
        client.emit("error", new Error("the host asks on and on, and takes no answers"));
        return;
      }
      take(...wanted(request));
    };
  }
  const unread = new WeakMap<Readable, number>();
  for (const kind of ["CHANNEL_DATA", "CHANNEL_EXTENDED_DATA"] as const) {
    const take = handlers[kind];
    handlers[kind] = (protocol, id, data, type) => {
      // ssh2 drops it, but not what has been copied for it by then.
      if (kind === "CHANNEL_EXTENDED_DATA" && type !== stderrType) return;
      const channel = _chanMgr.get(id);
      if (typeof channel === "object") {
        const stream = kind === "CHANNEL_DATA" ? channel : channel.stderr;
        const kept = (unread.get(stream) ?? 0) + Math.max(data.length, leastChunk);
        // A stream that is read once is so from then on.
        if (stream.readableFlowing === null) unread.set(stream, kept);
        else unread.delete(stream);
        if (data.length > channel.incoming.window || (unread.get(stream) ?? 0) > mostUnread) {
          client.emit("error", new Error("the host sent more than it may"));
          return;
        }
      }
      // A copy: the data is a part of the packet, which may be far longer, and would be kept with it; so would Node's pool.
      const copy = Buffer.allocUnsafeSlow(data.length);
      copy.set(data);
      take(protocol, id, copy, type);
    };
  }
}

/**
 * A request as it is, unless it tells of the host's other keys: ssh2 would ask for a proof of each time, and keep them until it comes,
 * and nobody wants to know.
 */
function wanted(request: unknown[]): unknown[] {
  const [protocol, name, reply] = request;
  return name === "hostkeys-00@openssh.com" ? [protocol, "not wanted", reply, []] : request;
}
