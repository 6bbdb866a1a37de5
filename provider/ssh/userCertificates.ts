/**
 * User certificates of OpenSSH: an authority's word for a login's key, sent in that key's place. ssh2 writes their name into the
 * signature too, where the plain key's belongs; so the request that it makes is put right before it is sent. And what ssh2 would sign
 * with SHA-1 is not: an RSA key for a host that does not say what it takes (RFC 8308, section 3.1).
 * Source: PROTOCOL.certkeys of OpenSSH, RFC 4252 section 7.
 */
import type { Client, ParsedKey, SigningRequestOptions } from "ssh2";
import { certificateSuffix, parseCertificate, Reader, wireString } from "./certificates.js";
import { keyType } from "./knownHosts.js";

/** With which hash a key signs, as ssh2 calls it, and what the signature is called; RSA's own default is SHA-1. */
const rsaHash = "sha512";

/** What a signature by a key of this type is called. */
function signatureName(type: string): string {
  return type === "ssh-rsa" ? "rsa-sha2-512" : type;
}

/** The hash to sign with, where ssh2 wants that one. Other keys than RSA's have but one. */
export function soundHash(hash: SigningRequestOptions["hash"]): "sha256" | "sha512" {
  return hash === undefined || hash === "sha1" ? rsaHash : hash;
}

/** The key, which signs with a sound hash whatever ssh2 wants. */
export function soundKey(key: ParsedKey): ParsedKey {
  if (key.type !== "ssh-rsa") return key;
  const sign = (data: Buffer, hash?: SigningRequestOptions["hash"]) => key.sign(data, soundHash(hash));
  return Object.create(key, { sign: { value: sign } });
}

/** The key, offered as its certificate; `undefined` where that is no user's, or of another key. */
export function certifiedKey(key: ParsedKey, certificate: Buffer): ParsedKey | undefined {
  const parsed = parseCertificate(certificate);
  if (parsed === undefined || parsed.isHost || !parsed.key.equals(key.getPublicSSH())) return undefined;
  const type = keyType(parsed.key);
  return Object.create(key, {
    type: { value: keyType(certificate) },
    getPublicSSH: { value: () => certificate },
    sign: {
      value: (data: Buffer) => {
        const signature = type === "ssh-rsa" ? key.sign(data, rsaHash) : key.sign(data);
        return type.startsWith("ecdsa") && Buffer.isBuffer(signature) ? wireNumbers(signature) : signature;
      },
    },
  });
}

/** An ECDSA signature as SSH writes it, from DER: r and s. */
function wireNumbers(der: Buffer): Buffer {
  // A length of more than 127 takes a second byte.
  let at = (der[1] ?? 0) > 127 ? 3 : 2;
  const numbers = [0, 1].map(() => {
    const length = der[at + 1] ?? 0;
    const number = der.subarray(at + 2, at + 2 + length);
    at += 2 + length;
    return wireString(number);
  });
  return Buffer.concat(numbers);
}

type Sign = (data: Buffer, done: (signature: Buffer) => void) => void;
type AuthPK = (user: string, key: ParsedKey, algorithm?: string | Sign, sign?: Sign) => void;

/** What ssh2's `Client` has inside; see its lib/protocol/Protocol.js. */
interface Protocol {
  authPK: AuthPK;
  readonly _packetRW: {
    readonly write: {
      readonly allocStart: number;
      alloc(size: number): Buffer;
      finalize(packet: Buffer): Buffer;
    };
  };
}

/**
 * Has a client that is connecting send certified keys as OpenSSH wants them, and no RSA key for SHA-1. Throws where ssh2 is another than
 * is known here.
 */
export function speakKeys(client: Client): void {
  const protocol = protocolOf(client);
  const plain = protocol.authPK;
  protocol.authPK = (user, key, algorithm, sign) => {
    if (!key.type.endsWith(certificateSuffix)) {
      const sound = algorithm === "ssh-rsa" ? signatureName(algorithm) : algorithm;
      return plain.call(protocol, user, key, sound, sign);
    }
    const name = signatureName(key.type.slice(0, -certificateSuffix.length));
    const { write } = protocol._packetRW;
    const corrected = {
      allocStart: 0,
      alloc: (size: number) => Buffer.alloc(size),
      finalize: (request: Buffer) => {
        const right = sign === undefined ? request : withSignatureName(request, name);
        const packet = write.alloc(right.length);
        packet.set(right, write.allocStart);
        return write.finalize(packet);
      },
    };
    const corrects: Protocol = Object.create(protocol, { _packetRW: { value: { write: corrected } } });
    plain.call(corrects, user, key, `${name}${certificateSuffix}`, sign);
  };
}

function protocolOf(client: Client): Protocol {
  const protocol: Protocol | undefined = "_protocol" in client ? (client._protocol as Protocol) : undefined;
  const write = protocol?._packetRW?.write;
  if (typeof protocol?.authPK !== "function" || typeof write?.finalize !== "function")
    throw new Error("keys and certificates are not sent with this version of ssh2: use 1.17");
  return protocol;
}

/** The request (RFC 4252 section 7) with that name in its signature. */
function withSignatureName(request: Buffer, name: string): Buffer {
  const reader = new Reader(request);
  reader.at = 1;
  for (const _field of ["user", "service", "method"]) reader.bytes();
  reader.at++;
  for (const _field of ["algorithm", "key"]) reader.bytes();
  const head = request.subarray(0, reader.at);
  const signature = new Reader(reader.bytes());
  signature.bytes();
  const body = Buffer.concat([wireString(Buffer.from(name)), wireString(signature.bytes())]);
  return Buffer.concat([head, wireString(body)]);
}
