/** RevokedHostKeys of ssh_config(5): a file of public keys, or a key revocation list (ssh-keygen(1)). */
import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseCertificate } from "./certificates.js";
import { childEnvironment } from "./environment.js";
import { keyType } from "./knownHosts.js";

/**
 * True if the file revokes this key, or this certificate, by its key or its authority too. Throws where that cannot be told: the file
 * cannot be read, or holds a list and `ssh-keygen` is not there.
 */
export async function isRevokedIn(path: string, blob: Buffer): Promise<boolean> {
  const file = await readFile(path);
  if (!file.subarray(0, 6).equals(Buffer.from("SSHKRL"))) {
    const certificate = parseCertificate(blob);
    const asked = certificate === undefined ? [blob] : [certificate.key, certificate.authority];
    const revoked = publicKeys(file.toString("utf8"));
    return asked.some((one) => revoked.some((key) => key.equals(one)));
  }
  const folder = await mkdtemp(join(tmpdir(), "lvm-nbd-key-"));
  try {
    const asked = join(folder, "key.pub");
    await writeFile(asked, `${keyType(blob)} ${blob.toString("base64")}\n`);
    return await query(path, asked);
  } finally {
    await rm(folder, { recursive: true });
  }
}

function publicKeys(text: string): Buffer[] {
  return text.split("\n").flatMap((line) => {
    if (/^\s*(#|$)/.test(line)) return [];
    const [type, data] = line.trim().split(/\s+/);
    const key = Buffer.from(data ?? "", "base64");
    if (type === undefined || keyType(key) !== type)
      throw new Error(`"${line.slice(0, 60)}" is no public key`);
    return [parseCertificate(key)?.key ?? key];
  });
}

function query(list: string, key: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const options = { timeout: 20_000, env: childEnvironment() };
    execFile("ssh-keygen", ["-Q", "-f", list, key], options, (error, stdout, stderr) => {
      if (/: REVOKED$/m.test(stdout)) resolve(true);
      else if (error === null && /: ok$/m.test(stdout)) resolve(false);
      else reject(new Error(stderr.trim() || error?.message || "ssh-keygen gave no answer"));
    });
  });
}
