import { randomUUID } from "node:crypto";
import dns from "node:dns";
import { copyFileSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { type Certificate, parseCertificate } from "../../provider/ssh/certificates.js";
import {
  certificateProblem,
  isSigned,
  NotAsked,
  scanCertificates,
} from "../../provider/ssh/hostCertificates.js";
import { authoritiesFor, judge, knownTypes } from "../../provider/ssh/hostKeys.js";
import { createHostPool } from "../../provider/ssh/pool.js";
import { isRevokedIn } from "../../provider/ssh/revokedKeys.js";
import type { HostConnection } from "../../provider/ssh/types.js";
import { startFakeServer } from "./fakeServer.js";
import { keyFolder, keyTypes } from "./keyFolder.js";
import { type Sshd, startSshd } from "./sshd.js";

const keys = keyFolder();
const { file, keygen, makeKey, line, blob } = keys;
afterAll(() => keys.remove());

/** The certificate of a key by an authority. `options`: of ssh-keygen. */
function certificate(key: string, authority: string, ...options: string[]): Buffer {
  keygen("-s", file(authority), "-I", `host ${key}`, ...options, file(`${key}.pub`));
  return blob(`${key}-cert`);
}

function parsed(data: Buffer): Certificate {
  const found = parseCertificate(data);
  if (found === undefined) throw new Error("no certificate");
  return found;
}

const host = ["-h", "-n", "vm1.example.com,10.0.0.1", "-V", "-1d:+1d"];
beforeAll(() => {
  for (const type of keyTypes) {
    makeKey(`ca-${type.join("")}`, type);
    makeKey(type.join(""), type);
  }
  makeKey("other", ["ed25519"]);
});

describe("a host's certificate", () => {
  it.each(keyTypes.map((type) => [type.join("")]))(
    "of a key of type %s, by each type of authority, is read and its signature known",
    (key) => {
      for (const type of keyTypes) {
        const authority = `ca-${type.join("")}`;
        const read = parsed(certificate(key, authority, ...host));
        expect(read).toMatchObject({
          ...{ key: blob(key), keyId: `host ${key}`, isHost: true, authority: blob(authority) },
          principals: ["vm1.example.com", "10.0.0.1"],
        });
        expect(isSigned(read)).toBe(true);
        expect(
          certificateProblem(read, ["vm1.example.com"], [blob("other"), blob(authority)], Date.now()),
        ).toBeUndefined();
      }
    },
  );

  it.each(keyTypes.map((type) => [type.join("")]))(
    "by an authority of type %s is not signed if any of its bytes is another",
    (authority) => {
      const good = certificate("ed25519", `ca-${authority}`, ...host);
      // Each byte of the signed part and the signature, but the lengths that make it unreadable.
      for (let at = 0; at < good.length; at++) {
        const bad = Buffer.from(good);
        bad.writeUInt8((bad[at] ?? 0) ^ 1, at);
        const read = parseCertificate(bad);
        const known = read?.authority.equals(blob(`ca-${authority}`));
        expect([at, read !== undefined && known === true && isSigned(read)]).toEqual([at, false]);
      }
    },
  );

  it.each<[string, string[], RegExp]>([
    ["of a user", ["-n", "vm1.example.com", "-V", "-1d:+1d"], /is a user's/],
    [
      "that has expired",
      ["-h", "-n", "vm1.example.com", "-V", "20200101:20200201"],
      /has expired at 2020-02-0/,
    ],
    ["of tomorrow", ["-h", "-n", "vm1.example.com", "-V", "+1d:+2d"], /is valid only from \d{4}-/],
    [
      "of another host",
      ["-h", "-n", "vm2.example.com", "-V", "-1d:+1d"],
      /is for vm2\.example\.com, not for vm1\.example\.com/,
    ],
    ["of no host", ["-h", "-V", "-1d:+1d"], /is for no host/],
    ["with a critical option", [...host, "-O", "critical:x=y"], /has critical options/],
    ["signed with SHA-1", ["-t", "ssh-rsa", ...host], /with SHA-1/],
  ])("%s is not taken", (_what, options, problem) => {
    const authority = options.includes("ssh-rsa") ? "ca-rsa-b2048" : "ca-ed25519";
    const read = parsed(certificate("ed25519", authority, ...options));
    expect(certificateProblem(read, ["vm1.example.com"], [blob(authority)], Date.now())).toMatch(problem);
  });

  it("of an authority that is not known for the host is not taken", () => {
    const read = parsed(certificate("ed25519", "ca-ed25519", ...host));
    expect(certificateProblem(read, ["vm1.example.com"], [blob("other")], Date.now())).toMatch(
      /is of the authority SHA256:.* known_hosts does not have/,
    );
  });

  it("is valid to its second, and for ever where it says so", () => {
    const read = parsed(
      certificate("ed25519", "ca-ed25519", "-h", "-n", "vm1", "-V", "20200101000000Z:20200201000000Z"),
    );
    const at = (time: string) => certificateProblem(read, ["vm1"], [blob("ca-ed25519")], Date.parse(time));
    expect(at("2019-12-31T23:59:59Z")).toMatch(/valid only from 2020-01-01T00:00:00/);
    expect(at("2020-01-01T00:00:00Z")).toBeUndefined();
    expect(at("2020-01-31T23:59:59Z")).toBeUndefined();
    expect(at("2020-02-01T00:00:00Z")).toMatch(/expired/);
    const always = parsed(certificate("ed25519", "ca-ed25519", "-h", "-n", "vm1", "-V", "always:forever"));
    expect(certificateProblem(always, ["vm1"], [blob("ca-ed25519")], Date.now())).toBeUndefined();
  });

  it("is none where it is a plain key, cut short, or followed by more", () => {
    const good = certificate("ed25519", "ca-ed25519", ...host);
    expect(parseCertificate(blob("ed25519"))).toBeUndefined();
    for (let length = 0; length < good.length; length++)
      expect(parseCertificate(good.subarray(0, length))).toBeUndefined();
    expect(parseCertificate(Buffer.concat([good, Buffer.alloc(1)]))).toBeUndefined();
  });
});

describe("an authority in known_hosts", () => {
  const trust = (...lines: string[]) => ({ knownHosts: [lines.join("\n")] });

  it("is asked for the hosts of its line alone, on any port, unless it is revoked", () => {
    const known = trust(
      `@cert-authority *.example.com ${line("ca-ed25519")}`,
      `@cert-authority [b]:22 ${line("other")}`,
    );
    expect(authoritiesFor(["vm1.example.com"], known)).toEqual([blob("ca-ed25519")]);
    expect(authoritiesFor(["[vm1.example.com]:2222"], known)).toEqual([blob("ca-ed25519")]);
    expect(authoritiesFor(["vm1.example.org"], known)).toEqual([]);
    const revoked = trust(...known.knownHosts, `@revoked * ${line("ca-ed25519")}`);
    expect(authoritiesFor(["vm1.example.com"], revoked)).toEqual([]);
    expect(authoritiesFor(["vm1.example.com"], { pins: [line("ca-ed25519")] })).toEqual([]);
  });

  it.each([
    ["its key, for the host without a port", () => `@revoked vm1 ${line("ed25519")}`],
    ["its key, for the host with its port", () => `@revoked [vm1]:2222 ${line("ed25519")}`],
    ["its certificate", () => `@revoked * ${readFileSync(file("ed25519-cert.pub"), "utf8")}`],
  ])("vouches for no host of which is revoked %s", (_what, revoked) => {
    certificate("ed25519", "ca-ed25519", ...host);
    const known = { ...trust(revoked()), certified: [blob("ed25519")] };
    expect(judge(blob("ed25519"), ["[vm1]:2222"], known).verdict).toBe("revoked");
    expect(
      judge(blob("ecdsa-b256"), ["[vm1]:2222"], { ...known, certified: [blob("ecdsa-b256")] }).verdict,
    ).toBe("ok");
  });

  it("says nothing of a plain key; what it has certified is good unless revoked, and asked for first", () => {
    const known = trust(`@cert-authority * ${line("ca-ed25519")}`, `@revoked * ${line("other")}`);
    expect(judge(blob("ca-ed25519"), ["vm1"], known).verdict).toBe("unknown");
    const certified = [blob("ecdsa-b256"), blob("other")];
    expect(judge(blob("ecdsa-b256"), ["vm1"], { ...known, certified }).verdict).toBe("ok");
    expect(judge(blob("ed25519"), ["vm1"], { ...known, certified }).verdict).toBe("unknown");
    expect(judge(blob("other"), ["vm1"], { ...known, certified }).verdict).toBe("revoked");
    expect(knownTypes(["vm1"], { ...known, certified })[0]).toBe("ecdsa-sha2-nistp256");
  });
});

describe("keys that are revoked in a file", () => {
  it.each(["a list of ssh-keygen", "public keys"])(
    "are found in %s, and a certificate by its key",
    async (how) => {
      const list = file("revoked");
      const cert = certificate("ed25519", "ca-ed25519", ...host);
      if (how === "public keys") writeFileSync(list, `# mine\n${line("ed25519")}\n`);
      else keygen("-k", "-f", list, file("ed25519.pub"));
      expect(await isRevokedIn(list, blob("ed25519"))).toBe(true);
      expect(await isRevokedIn(list, cert)).toBe(true);
      expect(await isRevokedIn(list, blob("other"))).toBe(false);
    },
  );

  it("are an authority's too: what it has certified is no better", async () => {
    const cert = certificate("ed25519", "ca-ed25519", ...host);
    writeFileSync(file("revoked"), `${line("ca-ed25519").replace(" ", "\t ")}\n`);
    expect(await isRevokedIn(file("revoked"), cert)).toBe(true);
    keygen("-k", "-f", file("revoked"), file("ca-ed25519.pub"));
    expect(await isRevokedIn(file("revoked"), cert)).toBe(true);
  });

  it("are found by the serial number of a certificate, which only a list can hold", async () => {
    const cert = certificate("ed25519", "ca-ed25519", ...host, "-z", "17");
    writeFileSync(file("serials"), "serial: 17\n");
    keygen("-k", "-s", file("ca-ed25519.pub"), "-f", file("revoked"), file("serials"));
    expect(await isRevokedIn(file("revoked"), cert)).toBe(true);
    expect(await isRevokedIn(file("revoked"), blob("ed25519"))).toBe(false);
  });

  it("are not taken for good where the file cannot be read", async () => {
    await expect(isRevokedIn(file("none"), blob("ed25519"))).rejects.toThrow(/ENOENT/);
    for (const text of ["SSHKRL and nothing more", "ssh-ed25519 AAAA\n", "nonsense\n"]) {
      writeFileSync(file("broken"), text);
      await expect(isRevokedIn(file("broken"), blob("ed25519"))).rejects.toThrow();
    }
  });
});

describe("a real server with a certificate", () => {
  let sshd: Sshd;
  let jump: Sshd;
  /** It shows an Ed25519 key first, and has a certificate for another. */
  let two: Sshd;
  const pool = createHostPool();
  beforeAll(async () => {
    [sshd, jump, two] = await Promise.all([
      startSshd({
        certificate: { authority: file("ca-ed25519"), options: ["-n", "127.0.0.1,two.example.com"] },
      }),
      startSshd(),
      startSshd({
        certificate: { authority: file("ca-ed25519"), options: ["-n", "127.0.0.1"], type: "ecdsa" },
      }),
    ]);
  }, 180_000);
  afterAll(async () => {
    pool.close();
    await Promise.all([sshd.stop(), jump.stop(), two.stop()]);
  });

  const to = (authority: string, more: Partial<HostConnection> = {}): HostConnection => {
    const knownHostsPath = file(`known-${authority}`);
    writeFileSync(knownHostsPath, `@cert-authority 127.0.0.1 ${line(authority)}\n`);
    const { port, user, key: privateKeyPath } = sshd;
    return { address: "127.0.0.1", port, user, privateKeyPath, knownHostsPath, sudo: false, ...more };
  };
  const run = async (args: HostConnection) =>
    (await pool.get(args)).run({ argv: ["echo", "here"], deadlineSeconds: 60, kind: "read" });

  it("is let in by its authority alone", async () => {
    expect((await run(to("ca-ed25519"))).stdout).toBe("here\n");
  });

  it("is let in through a jump, whose own key is verified as ever", async () => {
    const { port, user, key: privateKeyPath, hostKey } = jump;
    const by = { address: "127.0.0.1", port, user, privateKeyPath };
    expect((await run(to("ca-ed25519", { proxyJump: { ...by, hostKey } }))).stdout).toBe("here\n");
    await expect(run(to("ca-ed25519", { proxyJump: { ...by, hostKey: line("other") } }))).rejects.toThrow(
      /HOST_KEY_MISMATCH/,
    );
  });

  it("is refused where another authority is known, and it is said why", async () => {
    await expect(run(to("other"))).rejects.toThrow(
      /HOST_KEY_UNKNOWN.*its certificate "sshd" is of the authority SHA256:/,
    );
  });

  it("with a key that nobody vouches for gets no login, whatever it does while others are asked", async () => {
    const liar = await startFakeServer();
    try {
      const args = {
        ...to("ca-ed25519", { port: liar.port, password: "hunter2" }),
        privateKeyPath: undefined,
      };
      await expect(run(args)).rejects.toThrow(
        /HOST_KEY_UNKNOWN.*its certificate could not be had: it shows none/,
      );
      expect([liar.logins, liar.lines]).toEqual([[], []]);
    } finally {
      await liar.close();
    }
  });

  it("without a certificate is refused, and it is said that it shows none", async () => {
    const { port, user, key: privateKeyPath } = jump;
    await expect(run(to("ca-ed25519", { port, user, privateKeyPath }))).rejects.toThrow(
      /HOST_KEY_UNKNOWN.*its certificate could not be had: it shows none/,
    );
  });

  it("is let in by the certificate of another key than it shows first", async () => {
    const { port, key: privateKeyPath } = two;
    expect((await run(to("ca-ed25519", { port, privateKeyPath }))).stdout).toBe("here\n");
  });

  it("is let in where its plain key is known, and is asked for no certificate then; or where another one is known by mistake", async () => {
    const args = to("ca-ed25519");
    const authority = `@cert-authority 127.0.0.1 ${line("ca-ed25519")}`;
    const known = (...lines: string[]) => writeFileSync(file("known-ca-ed25519"), `${lines.join("\n")}\n`);
    known(authority, `[127.0.0.1]:${sshd.port} ${sshd.hostKey}`);
    const before = sshd.log().length;
    const alone = createHostPool();
    expect(
      (await (await alone.get(args)).run({ argv: ["true"], deadlineSeconds: 60, kind: "read" })).exitCode,
    ).toBe(0);
    alone.close();
    expect(
      sshd
        .log()
        .slice(before)
        .match(/Connection from/g),
    ).toHaveLength(1);
    known(authority, `[127.0.0.1]:${sshd.port} ${line("other")}`);
    expect((await run(args)).stdout).toBe("here\n");
  });

  it("is let in where its name has another machine behind it the next time", async () => {
    const addresses = ["127.0.0.1", "127.0.0.2"];
    vi.spyOn(dns, "lookup").mockImplementation(((
      _name: string,
      _options: object,
      answer: (error: null, found: { address: string; family: number }[]) => void,
    ) => answer(null, [{ address: addresses.shift() ?? "", family: 4 }])) as typeof dns.lookup);
    try {
      const args = to("ca-ed25519", { address: "two.example.com" });
      writeFileSync(file("known-ca-ed25519"), `@cert-authority two.example.com ${line("ca-ed25519")}\n`);
      expect((await run(args)).stdout).toBe("here\n");
      expect(addresses).toEqual(["127.0.0.2"]);
    } finally {
      vi.restoreAllMocks();
    }
  });

  /** The alias `there`, whose known_hosts is the file `known`. */
  const writeAlias = (...more: string[]) => {
    const lines = ["Host there", "HostName 127.0.0.1", `Port ${sshd.port}`, `User ${sshd.user}`];
    const files = [`IdentityFile ${sshd.key}`, `UserKnownHostsFile ${file("known")}`];
    writeFileSync(file("config"), [...lines, ...files, ...more, ""].join("\n"));
  };

  const certificates = "HostKeyAlgorithms *-cert-v01@openssh.com";
  const plain = () => `[127.0.0.1]:${sshd.port} ${sshd.hostKey}`;
  const authority = () => `@cert-authority * ${line("ca-ed25519")}`;
  it.each<[string, string[], (() => string)[], RegExp]>([
    [
      "is known and certificates alone are taken",
      [certificates],
      [plain],
      /HOST_KEY_UNKNOWN.*is what HostKeyAlgorithms asks for.*or allow ssh-ed25519 in HostKeyAlgorithms/s,
    ],
    [
      "is known and certified and certificates alone are taken",
      [certificates],
      [plain, authority],
      /^let in$/,
    ],
    [
      "is certified and no certificate is taken",
      ["HostKeyAlgorithms ssh-ed25519"],
      [authority],
      /HOST_KEY_UNKNOWN/,
    ],
    ["is known and no certificate is taken", ["HostKeyAlgorithms ssh-ed25519"], [plain], /^let in$/],
    [
      "is certified and certificates of other types are taken",
      ["HostKeyAlgorithms ssh-ed25519,ecdsa-*-cert-v01@openssh.com"],
      [authority],
      /HOST_KEY_UNKNOWN/,
    ],
    [
      "is known and other types are taken",
      ["HostKeyAlgorithms rsa-sha2-512"],
      [plain],
      /HOST_UNREACHABLE.*no matching host key/,
    ],
    [
      "is certified with a signature that is not taken",
      ["CASignatureAlgorithms rsa-sha2-512"],
      [authority],
      /HOST_KEY_UNKNOWN.*signed with ssh-ed25519, which CASignatureAlgorithms leaves out/,
    ],
    [
      "is certified and no signature is taken",
      ["CASignatureAlgorithms -*"],
      [authority],
      /HOST_KEY_UNKNOWN.*signed with ssh-ed25519, which CASignatureAlgorithms leaves out/,
    ],
    [
      "is certified with a signature that is taken",
      ["CASignatureAlgorithms ssh-ed25519"],
      [authority],
      /^let in$/,
    ],
  ])("whose key %s, as its alias says", async (_what, options, known, answer) => {
    writeFileSync(file("known"), known.map((one) => `${one()}\n`).join(""));
    writeAlias(...options);
    // What was made of an alias is remembered by the file's path.
    process.env.LVM_NBD_SSH_CONFIG = file(`config-${randomUUID()}`);
    copyFileSync(file("config"), process.env.LVM_NBD_SSH_CONFIG);
    const alone = createHostPool();
    try {
      const there = await alone.get("there");
      const told = await there.run({ argv: ["true"], deadlineSeconds: 60, kind: "read" }).then(
        () => "let in",
        // Another login than root's may have no sudo here.
        (error: unknown) => String(error).replace(/^SUDO_DENIED.*$/s, "let in"),
      );
      expect(told).toMatch(answer);
    } finally {
      alone.close();
      delete process.env.LVM_NBD_SSH_CONFIG;
    }
  });

  it("is refused where RevokedHostKeys of its alias names it", async () => {
    keygen("-k", "-f", file("krl"), join(sshd.folder, "host_key.pub"));
    writeFileSync(file("known"), `@cert-authority * ${line("ca-ed25519")}\n`);
    writeAlias(`RevokedHostKeys ${file("krl")}`);
    process.env.LVM_NBD_SSH_CONFIG = file("config");
    try {
      const there = await pool.get("there");
      const asked = async () => there.run({ argv: ["true"], deadlineSeconds: 60, kind: "read" });
      await expect(asked()).rejects.toThrow(/HOST_KEY_MISMATCH.*is revoked/);
      writeFileSync(file("known"), `[127.0.0.1]:${sshd.port} ${sshd.hostKey}\n`);
      const known = await createHostPool().get("there");
      await expect(known.run({ argv: ["true"], deadlineSeconds: 60, kind: "read" })).rejects.toThrow(
        /HOST_KEY_MISMATCH.*is revoked/,
      );
      rmSync(file("krl"));
      await expect(known.run({ argv: ["true"], deadlineSeconds: 60, kind: "read" })).rejects.toThrow(
        /INVALID_INPUT.*RevokedHostKeys .*krl cannot be read/,
      );
    } finally {
      delete process.env.LVM_NBD_SSH_CONFIG;
    }
  });

  it("that does not answer is not said to have none", async () => {
    await expect(scanCertificates("127.0.0.1", 1, ["ssh-ed25519"], 5000)).rejects.toThrow(NotAsked);
  });

  it("is not asked where no ssh-keyscan is, which is said", async () => {
    const path = process.env.PATH;
    process.env.PATH = file("");
    try {
      expect(await scanCertificates("127.0.0.1", sshd.port, ["ssh-ed25519"], 5000)).toEqual({
        certificates: [],
        problem: expect.stringMatching(/ssh-keyscan.* is not on this machine/),
      });
    } finally {
      process.env.PATH = path;
    }
  });
});
