import { copyFileSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { Client, utils } from "ssh2";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { createHostPool } from "../../provider/ssh/pool.js";
import type { HostArgs, HostConnection } from "../../provider/ssh/types.js";
import { certifiedKey, speakKeys } from "../../provider/ssh/userCertificates.js";
import { keyFolder, keyTypes } from "./keyFolder.js";
import { type Sshd, startSshd } from "./sshd.js";

const keys = keyFolder();
const { file, keygen, makeKey, blob } = keys;
const names = keyTypes.map((type) => [type.join("")] as const);

let sshd: Sshd;
let pool = createHostPool();

beforeAll(async () => {
  for (const name of ["ca", "otherCa", "unknown"]) makeKey(name, ["ed25519"]);
  for (const type of keyTypes) makeKey(type.join(""), type);
  makeKey("encrypted", ["rsa"], "a passphrase");
  sshd = await startSshd({ userAuthority: file("ca.pub") });
}, 180_000);
afterAll(async () => {
  await sshd.stop();
  keys.remove();
});
afterEach(() => {
  pool.close();
  pool = createHostPool();
});

/** Has the key certified for the login; what is not said is so that it is let in. */
function certify(
  key: string,
  { authority = "ca", login = sshd.user, validity = "-1d:+1d", more = [] as string[] } = {},
): void {
  keygen("-s", file(authority), "-I", "me", "-n", login, "-V", validity, ...more, `${file(key)}.pub`);
}

function to(privateKeyPath: string, more: Partial<HostConnection> = {}): HostConnection {
  const { port, user, hostKey } = sshd;
  return { address: "127.0.0.1", port, user, hostKey, privateKeyPath, sudo: false, ...more };
}

async function logIn(args: HostArgs): Promise<string> {
  const host = await pool.get(args);
  return (await host.run({ argv: ["echo", "here"], deadlineSeconds: 60, kind: "read" })).stdout;
}

describe("a login by a certificate beside its key", () => {
  it.each(names)("of type %s is let in, by nothing else", async (key) => {
    certify(key);
    expect(await logIn(to(file(key)))).toBe("here\n");
    expect(sshd.log()).toMatch(/Accepted publickey for \S+ from 127\.0\.0\.1 .*-CERT .* ID me .* CA ED25519/);
  });

  it("of an encrypted key is let in", async () => {
    certify("encrypted");
    expect(await logIn(to(file("encrypted"), { passphrase: "a passphrase" }))).toBe("here\n");
  });

  it("that is named by CertificateFile of an alias is let in", async () => {
    certify("unknown");
    copyFileSync(`${file("unknown")}-cert.pub`, file("elsewhere"));
    rmSync(`${file("unknown")}-cert.pub`);
    writeFileSync(file("known_hosts"), `[127.0.0.1]:${sshd.port} ${sshd.hostKey}\n`);
    const lines = [
      "Host there",
      "HostName 127.0.0.1",
      `Port ${sshd.port}`,
      `User ${sshd.user}`,
      `IdentityFile ${file("unknown")}`,
    ];
    writeFileSync(
      file("config"),
      [
        ...lines,
        "IdentitiesOnly yes",
        `CertificateFile ${file("elsewhere")}`,
        `UserKnownHostsFile ${file("known_hosts")}`,
        "",
      ].join("\n"),
    );
    process.env.LVM_NBD_SSH_CONFIG = file("config");
    try {
      // The login is root's or another's: no command is run as root here.
      const host = await pool.get("there");
      const ran = host.run({ argv: ["echo", "here"], deadlineSeconds: 60, kind: "read" });
      if (sshd.user === "root") expect((await ran).stdout).toBe("here\n");
      else await ran.catch((error: unknown) => expect(String(error)).not.toContain("AUTH_FAILED"));
    } finally {
      delete process.env.LVM_NBD_SSH_CONFIG;
    }
    expect(sshd.log()).toMatch(/Accepted publickey for \S+ from 127\.0\.0\.1 .*ED25519-CERT/);
  });

  it.each([
    ["has expired", { validity: "20200101:20200201" }],
    ["is for another login", { login: "somebody-else" }],
    ["is by another authority", { authority: "otherCa" }],
  ])("that %s is refused, and both that were tried are told", async (_what, how) => {
    certify("ed25519", how);
    await expect(logIn(to(file("ed25519")))).rejects.toThrow(
      /AUTH_FAILED.*tried: .*ed25519's certificate, .*ed25519$/m,
    );
  });

  it("that is refused leaves the key itself, which is let in", async () => {
    copyFileSync(sshd.key, file("accepted"));
    copyFileSync(`${sshd.key}.pub`, file("accepted.pub"));
    certify("accepted", { authority: "otherCa" });
    expect(await logIn(to(file("accepted")))).toBe("here\n");
  });

  it.each([
    ["a host's", "ed25519", ["-h"]],
    ["another key's", "rsa-b2048", []],
  ])("that is %s is not sent", (_what, key, more) => {
    certify(key, { more });
    const certificate = blob(`${key}-cert`);
    const own = utils.parseKey(readFileSync(file("ed25519")));
    if (own instanceof Error || Array.isArray(own)) throw new Error("no key");
    expect(certifiedKey(own, certificate)).toBeUndefined();
  });

  it("is not sent by an ssh2 that is not known here: an error, and no login that is only half spoken", () => {
    expect(() => speakKeys(new Client())).toThrow(/with this version of ssh2/);
  });
});
