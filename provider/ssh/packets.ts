/**
 * What a packet costs this process. ssh2 writes each in three pieces to the socket, and has Node look at the cipher's key of each
 * anew; a command is about ten packets, and a run of many hosts little else.
 */
import { createSecretKey } from "node:crypto";
import type { Socket } from "node:net";
import type { Client } from "ssh2";

/** Has a socket send together what is written in one turn of the event loop. */
export function sendTogether(socket: Socket): void {
  const { write } = socket;
  let held = false;
  const release = () => {
    held = false;
    socket.uncork();
  };
  const hold = (...args: unknown[]): unknown => {
    if (!held) {
      held = true;
      socket.cork();
      process.nextTick(release);
    }
    return Reflect.apply(write, socket, args);
  };
  // Node puts another in its place when the other side has ended.
  Object.defineProperty(socket, "write", { value: hold, writable: true, configurable: true });
}

/** What ssh2's `Client` has inside, for AES-GCM; see its lib/protocol/crypto.js. */
interface Inside {
  readonly _protocol?: {
    readonly _cipher?: { _encKey?: unknown };
    readonly _decipher?: { _decipherKey?: unknown };
  };
}

/**
 * Has the keys of a client that has exchanged them in the form that Node takes as it is. Where ssh2 is another than is known here, or has
 * ciphers of its own, there is nothing to change.
 */
export function prepareKeys(client: Client): void {
  const { _cipher, _decipher } = (client as Client & Inside)._protocol ?? {};
  if (Buffer.isBuffer(_cipher?._encKey)) _cipher._encKey = createSecretKey(_cipher._encKey);
  if (Buffer.isBuffer(_decipher?._decipherKey))
    _decipher._decipherKey = createSecretKey(_decipher._decipherKey);
}
