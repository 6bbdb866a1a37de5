/**
 * Host keys: pins and known_hosts. Always verified; there is no switch.
 */
import { createHash } from "node:crypto";
import type { ServerHostKeyAlgorithm } from "ssh2";
import { errorCodes, LvmNbdError } from "../core/errors.js";
import { certificateSuffix, parseCertificate } from "./certificates.js";
import { type KnownKey, keyType, linesFor } from "./knownHosts.js";

export type Verdict =
  | { readonly verdict: "ok" }
  | { readonly verdict: "unknown" }
  | { readonly verdict: "mismatch"; readonly expected: readonly string[] }
  | { readonly verdict: "revoked" };

/** What is trusted for a host: pins, or the texts of known_hosts files, with the keys that their authorities were seen to vouch for. */
export type Trust =
  | { readonly pins: readonly string[] }
  | {
      readonly knownHosts: readonly string[];
      readonly certified?: readonly Buffer[] | undefined;
      /** Of the known keys those that another file revokes. */
      readonly revoked?: readonly Buffer[] | undefined;
      readonly limits?: HostKeyLimits | undefined;
    };

/** What an alias is held to, as ssh_config(5) calls it and `ssh -G` lists it. */
export interface HostKeyLimits {
  readonly hostKeyAlgorithms: readonly string[];
  /** An old OpenSSH knows none. */
  readonly caSignatureAlgorithms?: readonly string[] | undefined;
}

export function limitsOf(trust: Trust): HostKeyLimits | undefined {
  return "pins" in trust ? undefined : trust.limits;
}

const serverHostKeys: readonly ServerHostKeyAlgorithm[] = [
  "ssh-ed25519",
  "ecdsa-sha2-nistp256",
  "ecdsa-sha2-nistp384",
  "ecdsa-sha2-nistp521",
  "rsa-sha2-512",
  "rsa-sha2-256",
];

/** What a host may prove its key with, be that taken by itself or by its certificate. */
export function hostKeyAlgorithms(limits: HostKeyLimits | undefined): ServerHostKeyAlgorithm[] {
  return serverHostKeys.filter(
    (one) =>
      limits === undefined ||
      limits.hostKeyAlgorithms.includes(one) ||
      limits.hostKeyAlgorithms.includes(`${one}${certificateSuffix}`),
  );
}

/** What a key of that type may sign with. */
function algorithmsOf(type: string): string[] {
  return type === "ssh-rsa" ? ["rsa-sha2-512", "rsa-sha2-256"] : [type];
}

/** True if a key of that type may be taken by itself. */
export function mayBePlain(type: string, limits: HostKeyLimits | undefined): boolean {
  return limits === undefined || algorithmsOf(type).some((one) => limits.hostKeyAlgorithms.includes(one));
}

/** True if a key of that type may be taken by its certificate. */
export function mayBeCertified(type: string, limits: HostKeyLimits | undefined): boolean {
  return (
    limits === undefined ||
    algorithmsOf(type).some((one) => limits.hostKeyAlgorithms.includes(`${one}${certificateSuffix}`))
  );
}

/** `SHA256:...` of a public key blob, as ssh-keygen -l prints it. */
export function fingerprint(key: Buffer): string {
  return `SHA256:${createHash("sha256").update(key).digest("base64").replace(/=+$/, "")}`;
}

/** Why this is no pin, without quoting it; `undefined` when it is one. */
export function pinProblem(pin: string): string | undefined {
  const right =
    "write `ssh-ed25519 AAAA...` (of a line of `ssh-keyscan` that you have compared, without the name before it) or `SHA256:...`";
  if (/^SHA256:[A-Za-z0-9+/]{43}=?$/.test(pin)) return undefined;
  const [type, blob] = pin.trim().split(/\s+/);
  return type !== undefined && blob !== undefined && keyType(Buffer.from(blob, "base64")) === type
    ? undefined
    : `is not a host key: ${right}`;
}

/** Judges a host's key. `names` are the host's name or address, with `[...]:port` where the port is not 22. */
export function judge(key: Buffer, names: readonly string[], trust: Trust): Verdict {
  if ("pins" in trust) {
    return trust.pins.some((pin) => matchesPin(key, pin))
      ? { verdict: "ok" }
      : { verdict: "mismatch", expected: trust.pins.map(shownPin) };
  }
  const revoked = [...revokedFor(names, trust.knownHosts), ...(trust.revoked ?? [])];
  if (revoked.some((one) => one.equals(key))) return { verdict: "revoked" };
  const plain = plainLines(names, trust);
  if ([...plain.map((line) => line.key), ...(trust.certified ?? [])].some((one) => one.equals(key)))
    return { verdict: "ok" };
  if (plain.length === 0) return { verdict: "unknown" };
  return { verdict: "mismatch", expected: plain.map((line) => `${line.type} ${fingerprint(line.key)}`) };
}

/** The lines that say which keys are good by themselves. */
function plainLines(
  names: readonly string[],
  {
    knownHosts,
    limits,
  }: { readonly knownHosts: readonly string[]; readonly limits?: HostKeyLimits | undefined },
): KnownKey[] {
  return linesFor(names, knownHosts, undefined).filter((line) => mayBePlain(line.type, limits));
}

/** The names without their port: what certificates are for. */
export function portlessNames(names: readonly string[]): string[] {
  return names.map((name) => /^\[(.+)\]:\d+$/.exec(name)?.[1] ?? name);
}

/** Public keys of the authorities whose certificates are to be taken for a host, without those that are revoked. */
export function authoritiesFor(names: readonly string[], trust: Trust): Buffer[] {
  if ("pins" in trust) return [];
  if (trust.limits?.hostKeyAlgorithms.some((one) => one.endsWith(certificateSuffix)) === false) return [];
  const revoked = revokedFor(names, trust.knownHosts);
  return markedFor("@cert-authority", names, trust.knownHosts).filter(
    (key) => !revoked.some((one) => one.equals(key)),
  );
}

/** The keys that are known for a host by themselves. */
export function knownKeys(
  names: readonly string[],
  trust: { readonly knownHosts: readonly string[] },
): Buffer[] {
  return plainLines(names, trust).map((line) => line.key);
}

/** Keys of the lines with that marker. A line for all ports of a host has none. */
function markedFor(marker: string, names: readonly string[], knownHosts: readonly string[]): Buffer[] {
  return linesFor([...names, ...portlessNames(names)], knownHosts, marker).map((line) => line.key);
}

/** What is revoked for a host; of a certificate the key that it is of, as OpenSSH takes it. */
function revokedFor(names: readonly string[], knownHosts: readonly string[]): Buffer[] {
  return markedFor("@revoked", names, knownHosts).map((key) => parseCertificate(key)?.key ?? key);
}

/** Types of the keys that are known for a host: those are asked for first, so that a known host shows the known key. */
export function knownTypes(names: readonly string[], trust: Trust): string[] {
  const types =
    "pins" in trust
      ? trust.pins.flatMap((pin) => (pin.startsWith("SHA256:") ? [] : [pin.trim().split(/\s+/)[0] ?? ""]))
      : [...(trust.certified ?? []).map(keyType), ...plainLines(names, trust).map((line) => line.type)];
  return [...new Set(types)];
}

/**
 * The error for a key that was not accepted; it says how to go on. `problems`: why no certificate vouches for it, where one could;
 * `limits`: what the host is held to.
 */
export function hostKeyError(
  host: string,
  name: string,
  key: Buffer,
  verdict: Verdict,
  {
    problems = [],
    limits,
  }: { readonly problems?: readonly string[]; readonly limits?: HostKeyLimits | undefined } = {},
): LvmNbdError {
  const type = keyType(key);
  const shown = `${type} ${fingerprint(key)}`;
  const certificates = problems.map((problem) => `; its certificate ${problem}`).join("");
  if (verdict.verdict === "unknown") {
    return new LvmNbdError("HOST_KEY_UNKNOWN", {
      host,
      message: `its host key ${shown} is not known${certificates}`,
      advice: mayBePlain(type, limits)
        ? `Compare it with \`ssh-keygen -lf /etc/ssh/ssh_host_${type.replace(/^ssh-|-.*$/g, "")}_key.pub\` run on the host itself. ` +
          `If it is the same, pin it with hostKey: "${type} ${key.toString("base64")}" or add to known_hosts: ${name} ${type} ${key.toString("base64")}`
        : "As HostKeyAlgorithms says, a key of its type is taken by a certificate alone: " +
          `add \`@cert-authority ${name} ...\` with the key that signs the host's certificate to known_hosts, or allow ${algorithmsOf(type)[0]} in HostKeyAlgorithms.`,
    });
  }
  const expected =
    verdict.verdict === "mismatch"
      ? `; expected is ${verdict.expected.map((one) => one.slice(0, 120)).join(" or ")}`
      : "";
  return new LvmNbdError("HOST_KEY_MISMATCH", {
    host,
    message:
      verdict.verdict === "revoked"
        ? `its host key ${shown} is revoked in known_hosts or by RevokedHostKeys`
        : `it shows the host key ${shown}${expected}${certificates}`,
    // A fingerprint does not tell which of the host's keys it is of, so that one cannot be asked for.
    advice:
      verdict.verdict === "mismatch" && verdict.expected.some((one) => one.startsWith("SHA256:"))
        ? `${errorCodes.HOST_KEY_MISMATCH} A pinned fingerprint of another key type of the same host does not match either: pin that of its ${type} key, or the key's whole line.`
        : undefined,
  });
}

/** In the form in which the key that was shown is printed, so that the two can be compared. */
function shownPin(pin: string): string {
  const [type, blob] = pin.trim().split(/\s+/);
  return blob === undefined ? pin : `${type} ${fingerprint(Buffer.from(blob, "base64"))}`;
}

function matchesPin(key: Buffer, pin: string): boolean {
  if (pin.startsWith("SHA256:")) return fingerprint(key) === pin.replace(/=+$/, "");
  return Buffer.from(pin.trim().split(/\s+/)[1] ?? "", "base64").equals(key);
}
