/**
 * User certificates of OpenSSH: an authority's word for a login's key, sent in that key's place. ssh2 writes their name into the
 * signature too, where the plain key's belongs; so the request that it makes is put right before it is sent.
 * Source: PROTOCOL.certkeys of OpenSSH, RFC 4252 section 7.
 */
import type { Client, ParsedKey } from "ssh2";
import { certificateSuffix, parseCertificate, Reader, wireString } from "./certificates.js";
import { keyType } from "./hostKeys.js";

/** With which hash a key signs, as ssh2 calls it, and what the signature is called; RSA's own default is SHA-1. */
const rsaHash = "sha512";

/** What a signature by a key of this type is called. */
function signatureName(type: string): string {
  return type === "ssh-rsa" ? "rsa-sha2-512" : type;
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

/** Has a client that is connecting send certified keys as OpenSSH wants them. Throws where ssh2 is another than is known here. */
export function speakCertificates(client: Client): void {
  const protocol = protocolOf(client);
  const plain = protocol.authPK;
  protocol.authPK = (user, key, algorithm, sign) => {
    if (!key.type.endsWith(certificateSuffix)) return plain.call(protocol, user, key, algorithm, sign);
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
    throw new Error("certificates are not sent with this version of ssh2: use 1.17");
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
