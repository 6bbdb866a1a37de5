/**
 * Host certificates of OpenSSH: an authority's word for a host's key. ssh2 speaks none, so they are fetched with `ssh-keyscan` and
 * verified here; the host must then prove in the key exchange that it has the key that was certified.
 * Source: PROTOCOL.certkeys of OpenSSH, and what ssh(1) asks of a certificate.
 */
import { execFile } from "node:child_process";
import { createPublicKey, type JsonWebKey, verify } from "node:crypto";
import { type Certificate, parseCertificate, Reader } from "./certificates.js";
import { childEnvironment } from "./environment.js";
import { fingerprint, type HostKeyLimits, mayBeCertified } from "./hostKeys.js";
import { keyType, matchesWildcard } from "./knownHosts.js";

/** Hashes of the signatures that an authority of each type may make; SHA-1 is none of them. */
const signatures: Readonly<Record<string, Readonly<Record<string, string | null>>>> = {
  "ssh-ed25519": { "ssh-ed25519": null },
  "ecdsa-sha2-nistp256": { "ecdsa-sha2-nistp256": "sha256" },
  "ecdsa-sha2-nistp384": { "ecdsa-sha2-nistp384": "sha384" },
  "ecdsa-sha2-nistp521": { "ecdsa-sha2-nistp521": "sha512" },
  "ssh-rsa": { "rsa-sha2-256": "sha256", "rsa-sha2-512": "sha512" },
};

/** True if the authority whose public key that is has signed the certificate. */
export function isSigned({ authority, signature, signed }: Certificate): boolean {
  try {
    const reader = new Reader(signature);
    const algorithm = reader.text();
    const value = reader.bytes();
    const hash = signatures[keyType(authority)]?.[algorithm];
    if (hash === undefined || !reader.atEnd) return false;
    const key = createPublicKey({ key: jwk(authority), format: "jwk" });
    return algorithm.startsWith("ecdsa")
      ? verify(hash, signed, { key, dsaEncoding: "ieee-p1363" }, joined(value, coordinateBytes(algorithm)))
      : verify(hash, signed, key, value);
  } catch (error) {
    // What is no key and no signature of that form: of RSA's numbers and points on no curve OpenSSL says so.
    if (error instanceof Error) return false;
    throw error;
  }
}

function jwk(publicKey: Buffer): JsonWebKey {
  const reader = new Reader(publicKey);
  const type = reader.text();
  const text = (data: Buffer) => data.toString("base64url");
  if (type === "ssh-ed25519") return { kty: "OKP", crv: "Ed25519", x: text(reader.bytes()) };
  if (type === "ssh-rsa") {
    const [e, n] = [reader.bytes(), reader.bytes()];
    return { kty: "RSA", e: text(e), n: text(n) };
  }
  const bits = reader.text().replace("nistp", "");
  const size = coordinateBytes(type);
  const point = reader.bytes();
  if (point[0] !== 4 || point.length !== 1 + 2 * size) throw new RangeError("no uncompressed point");
  return {
    ...{ kty: "EC", crv: `P-${bits}` },
    ...{ x: text(point.subarray(1, 1 + size)), y: text(point.subarray(1 + size)) },
  };
}

function coordinateBytes(type: string): number {
  return Math.ceil(Number(type.slice(-3)) / 8);
}

/** r and s of an ECDSA signature, each as long as a coordinate. */
function joined(value: Buffer, size: number): Buffer {
  const reader = new Reader(value);
  return Buffer.concat([reader.bytes(), reader.bytes()].map((number) => sized(number, size)));
}

function sized(number: Buffer, size: number): Buffer {
  const digits = number[0] === 0 ? number.subarray(1) : number;
  if (digits.length > size) throw new RangeError("a number is too long");
  return Buffer.concat([Buffer.alloc(size - digits.length), digits]);
}

/**
 * Why the certificate does not vouch for a host of one of these names at this moment, in words that go on "its certificate ...";
 * `undefined` when it does. `authorities`: public keys of those that may. `now`: milliseconds since 1970.
 */
export function certificateProblem(
  certificate: Certificate,
  names: readonly string[],
  authorities: readonly Buffer[],
  now: number,
  limits?: HostKeyLimits,
): string | undefined {
  const { key, signature, authority, isHost, principals, validAfter, validBefore, criticalOptions, keyId } =
    certificate;
  const shown = `"${keyId.replace(/[^\x20-\x7e]/g, "?").slice(0, 100)}"`;
  if (!authorities.some((one) => one.equals(authority)))
    return `${shown} is of the authority ${fingerprint(authority)}, which known_hosts does not have for it`;
  if (signatures[keyType(authority)] === undefined)
    return `${shown} is of an authority of the type ${keyType(authority)}, which is not supported here`;
  if (!isSigned(certificate)) return `${shown} is not signed by its authority, or with SHA-1`;
  if (!mayBeCertified(keyType(key), limits))
    return `${shown} is of a key of the type ${keyType(key)}, which HostKeyAlgorithms leaves out`;
  const signedWith = new Reader(signature).text();
  if (limits?.caSignatureAlgorithms?.includes(signedWith) === false)
    return `${shown} is signed with ${signedWith}, which CASignatureAlgorithms leaves out`;
  if (!isHost) return `${shown} is a user's`;
  if (criticalOptions.length > 0) return `${shown} has critical options, which a host's has not`;
  const seconds = BigInt(Math.floor(now / 1000));
  if (seconds < validAfter) return `${shown} is valid only from ${timeOf(validAfter)} on`;
  if (seconds >= validBefore) return `${shown} has expired at ${timeOf(validBefore)}`;
  if (!principals.some((pattern) => names.some((name) => isNamed(pattern, name))))
    return `${shown} is for ${
      principals
        .map((one) => one.replace(/[^\x20-\x7e]/g, "?"))
        .join(", ")
        .slice(0, 200) || "no host"
    }, not for ${names.join(" or ")}`;
  return undefined;
}

/** As OpenSSH: a principal may hold `*` and `?`, and counts in its case; a host's name is in small letters. */
function isNamed(principal: string, name: string): boolean {
  return matchesWildcard(principal, name.toLowerCase());
}

function timeOf(seconds: bigint): string {
  return seconds > 8_640_000_000_000n ? "no time" : new Date(Number(seconds) * 1000).toISOString();
}

/** The host could not be asked for its certificates just then. */
export class NotAsked extends Error {}

/** What a host shows. `problem`: why no host can be asked here. */
export interface Shown {
  readonly certificates: readonly Certificate[];
  readonly problem?: string;
}

/** Asks for the certificates of keys of these types (`ssh-ed25519`); raises NotAsked. */
export type Scan = (types: readonly string[]) => Promise<Shown>;

/**
 * The certificates that a host shows, by `ssh-keyscan`, which opens a connection for each type at once. Whoever answers may show any:
 * nothing of them is true until it was verified.
 */
export function scanCertificates(
  address: string,
  port: number,
  types: readonly string[],
  timeoutMs: number,
): Promise<Shown> {
  const kinds = new Set(types.map((type) => type.replace(/^ssh-|-.*$/g, "")));
  const seconds = String(Math.max(1, Math.ceil(timeoutMs / 1000)));
  const args = ["-v", "-c", "-t", [...kinds].join(","), "-T", seconds, "-p", String(port), "--", address];
  return new Promise((resolve, reject) => {
    const limits = { timeout: timeoutMs + 2000, killSignal: "SIGKILL", maxBuffer: 1024 ** 2 } as const;
    execFile("ssh-keyscan", args, { ...limits, env: childEnvironment() }, (error, stdout, stderr) => {
      if (error !== null && "code" in error && error.code === "ENOENT")
        return resolve({
          certificates: [],
          problem: "could not be asked for: `ssh-keyscan` (of OpenSSH) is not on this machine",
        });
      const certificates = stdout
        .split("\n")
        .flatMap((line) => /\S+-cert-v01@openssh\.com ([A-Za-z0-9+/=]+)/.exec(line)?.[1] ?? [])
        .flatMap((blob) => parseCertificate(Buffer.from(blob, "base64")) ?? []);
      // So it tells, of each type, that the host has no certificate; of one that did not answer to the end it says nothing, or why.
      const without = stderr.match(/host key algorithm: \(no match\)/g)?.length ?? 0;
      if (certificates.length > 0 || without >= kinds.size) return resolve({ certificates });
      const wrong = stderr.split("\n").find((line) => /closed|reset|refused|timed out|not known/i.test(line));
      reject(new NotAsked(wrong?.slice(0, 200) ?? "no answer"));
    });
  });
}

/** What the authorities of known_hosts say of the key that a host has shown. */
export interface Vouched {
  /** The certificate that vouches for it, or where none does those that vouch for keys of other types. */
  readonly by: readonly Certificate[];
  /** Why none does, in words that go on "its certificate ". */
  readonly problems: readonly string[];
}

const allTypes = ["ssh-ed25519", "ecdsa", "ssh-rsa"];

/** Asks for the certificate of the key's type, and only if there is none for those of others. Raises NotAsked. */
export async function vouchedFor(
  key: Buffer,
  names: readonly string[],
  authorities: readonly Buffer[],
  scan: Scan,
  limits?: HostKeyLimits,
): Promise<Vouched> {
  const problems = new Set<string>();
  const good = async (types: readonly string[]) => {
    const { certificates, problem } = await scan(types);
    if (problem !== undefined) problems.add(problem);
    return certificates.filter((one) => {
      const reason = certificateProblem(one, names, authorities, Date.now(), limits);
      if (reason !== undefined) problems.add(reason);
      return reason === undefined;
    });
  };
  const type = keyType(key);
  const own = (mayBeCertified(type, limits) ? await good([type]) : []).filter((one) => one.key.equals(key));
  if (own.length > 0) return { by: own, problems: [] };
  const others = problems.size > 0 ? [] : await good(allTypes.filter((one) => !type.startsWith(one)));
  if (others.length === 0 && problems.size === 0) problems.add("could not be had: it shows none");
  return { by: others, problems: [...problems] };
}
