/** Keys and certificates by ssh-keygen, in a folder of their own. */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** Every type of key that is spoken, as ssh-keygen takes it after `-t`. */
export const keyTypes: readonly (readonly string[])[] = [
  ["ed25519"],
  ["ecdsa", "-b", "256"],
  ["ecdsa", "-b", "384"],
  ["ecdsa", "-b", "521"],
  ["rsa", "-b", "2048"],
];

export interface KeyFolder {
  file(name: string): string;
  keygen(...args: readonly string[]): void;
  /** Makes a key pair; `type` is one of `keyTypes`. */
  makeKey(name: string, type: readonly string[], passphrase?: string): void;
  /** The public key, `ssh-ed25519 AAAA...`. */
  line(name: string): string;
  /** What a file of ssh-keygen's holds in base64: a public key or a certificate. */
  blob(name: string): Buffer;
  remove(): void;
}

export function keyFolder(): KeyFolder {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-keys-"));
  const file = (name: string) => join(folder, name);
  const keygen = (...args: readonly string[]) => {
    execFileSync("ssh-keygen", ["-q", ...args], { stdio: "pipe" });
  };
  const line = (name: string) => readFileSync(file(`${name}.pub`), "utf8").trim();
  return {
    file,
    keygen,
    makeKey: (name, type, passphrase = "") =>
      keygen("-t", ...type, "-N", passphrase, "-C", "", "-f", file(name)),
    line,
    blob: (name) => Buffer.from(line(name).split(" ")[1] ?? "", "base64"),
    remove: () => rmSync(folder, { recursive: true }),
  };
}

/** Reads as a DSA key, which no ssh-keygen makes any more; nothing can be signed with it. */
export const dsaKey = `-----BEGIN DSA PRIVATE KEY-----\n${Buffer.from("3012020100020105020105020105020105020105", "hex").toString("base64")}\n-----END DSA PRIVATE KEY-----\n`;
