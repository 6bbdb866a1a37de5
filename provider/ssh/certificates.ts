/** OpenSSH's certificates as they are written. Source: PROTOCOL.certkeys of OpenSSH, RFC 4251 section 5. */

/** A certificate of a host or a user; times in seconds since 1970. */
export interface Certificate {
  /** The public key that it is of, as it is shown without a certificate. */
  readonly key: Buffer;
  /** The certificate itself. */
  readonly blob: Buffer;
  readonly keyId: string;
  readonly isHost: boolean;
  readonly principals: readonly string[];
  readonly validAfter: bigint;
  readonly validBefore: bigint;
  readonly criticalOptions: Buffer;
  /** The authority's public key, and its signature of all before that. */
  readonly authority: Buffer;
  readonly signature: Buffer;
  readonly signed: Buffer;
}

/** What the name of a certificate's type ends with, after that of its key. */
export const certificateSuffix = "-cert-v01@openssh.com";

/** How many fields a public key has after its type. */
const keyFields: Readonly<Record<string, number>> = {
  "ssh-ed25519": 1,
  "ecdsa-sha2-nistp256": 2,
  "ecdsa-sha2-nistp384": 2,
  "ecdsa-sha2-nistp521": 2,
  "ssh-rsa": 2,
};

/** Reads SSH's wire format; throws where it ends too early. */
export class Reader {
  at = 0;
  constructor(private readonly data: Buffer) {}

  get atEnd(): boolean {
    return this.at === this.data.length;
  }

  bytes(): Buffer {
    const length = this.data.readUInt32BE(this.at);
    const from = this.at + 4;
    if (from + length > this.data.length) throw new RangeError("a field ends beyond the data");
    this.at = from + length;
    return this.data.subarray(from, this.at);
  }

  text(): string {
    return this.bytes().toString("utf8");
  }

  uint32(): number {
    this.at += 4;
    return this.data.readUInt32BE(this.at - 4);
  }

  uint64(): bigint {
    this.at += 8;
    return this.data.readBigUInt64BE(this.at - 8);
  }
}

/** A field of SSH's wire format: its length, then itself. */
export function wireString(data: Buffer): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(data.length);
  return Buffer.concat([length, data]);
}

/** Reads a certificate; `undefined` for what is none, or none of a type that is known here. */
export function parseCertificate(blob: Buffer): Certificate | undefined {
  try {
    const reader = new Reader(blob);
    const named = reader.text();
    const type = named.slice(0, -certificateSuffix.length);
    const fields = named.endsWith(certificateSuffix) ? keyFields[type] : undefined;
    if (fields === undefined) return undefined;
    reader.bytes(); // nonce
    const parts = Array.from({ length: fields }, () => reader.bytes());
    reader.uint64(); // serial
    const kind = reader.uint32();
    const keyId = reader.text();
    const names = new Reader(reader.bytes());
    const principals: string[] = [];
    while (!names.atEnd) principals.push(names.text());
    const [validAfter, validBefore] = [reader.uint64(), reader.uint64()];
    const criticalOptions = reader.bytes();
    reader.bytes(); // extensions
    reader.bytes(); // reserved
    const authority = reader.bytes();
    const signed = blob.subarray(0, reader.at);
    const signature = reader.bytes();
    if (!reader.atEnd) return undefined;
    return {
      key: Buffer.concat([wireString(Buffer.from(type)), ...parts.map(wireString)]),
      blob,
      ...{ keyId, isHost: kind === 2, principals, validAfter, validBefore, criticalOptions },
      ...{ authority, signature, signed },
    };
  } catch (error) {
    if (error instanceof RangeError) return undefined;
    throw error;
  }
}
