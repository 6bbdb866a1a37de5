import { execFileSync } from "node:child_process";
import { createHmac, randomBytes } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { fingerprint, hostKeyError, judge, knownTypes, pinProblem } from "../../provider/ssh/hostKeys.js";
import { keyType, matchesWildcard } from "../../provider/ssh/knownHosts.js";

const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-keys-"));
afterAll(() => rmSync(folder, { recursive: true }));

interface Key {
  readonly line: string;
  readonly blob: Buffer;
  readonly file: string;
}

function makeKey(name: string, type: string): Key {
  const file = join(folder, name);
  execFileSync("ssh-keygen", ["-q", "-t", type, "-N", "", "-C", "", "-f", file]);
  const line = readFileSync(`${file}.pub`, "utf8").trim();
  return { line, blob: Buffer.from(line.split(" ")[1] ?? "", "base64"), file: `${file}.pub` };
}

let mine: Key;
let other: Key;
let ecdsa: Key;
beforeAll(() => {
  mine = makeKey("mine", "ed25519");
  other = makeKey("other", "ed25519");
  ecdsa = makeKey("ecdsa", "ecdsa");
});

function verdict(known: string, names: readonly string[] = ["vm1.example.com"]): string {
  return judge(mine.blob, names, { knownHosts: [known] }).verdict;
}

test("fingerprint and type are those that ssh-keygen prints", () => {
  const printed = execFileSync("ssh-keygen", ["-lf", mine.file], { encoding: "utf8" });
  expect(printed).toContain(fingerprint(mine.blob));
  expect(keyType(mine.blob)).toBe("ssh-ed25519");
  expect(keyType(ecdsa.blob)).toBe("ecdsa-sha2-nistp256");
  expect(keyType(Buffer.alloc(2))).toBe("");
});

describe("pins", () => {
  test.each([
    ["key line", () => mine.line],
    ["key line with a comment", () => `${mine.line} root@vm1`],
    ["fingerprint", () => fingerprint(mine.blob)],
    ["fingerprint with padding", () => `${fingerprint(mine.blob)}=`],
  ])("a %s accepts its key and no other", (_what, pin) => {
    expect(pinProblem(pin())).toBeUndefined();
    expect(judge(mine.blob, [], { pins: [pin()] }).verdict).toBe("ok");
    expect(judge(other.blob, [], { pins: [pin()] }).verdict).toBe("mismatch");
  });

  test("one of several is enough", () => {
    expect(judge(mine.blob, [], { pins: [other.line, fingerprint(mine.blob)] }).verdict).toBe("ok");
  });

  test.each([
    "",
    "ssh-ed25519",
    "SHA256:short",
    "MD5:00:11",
    "vm1 ssh-ed25519 AAAA",
    "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAA",
  ])("%j is no pin, and what would be one is said", (pin) => {
    expect(pinProblem(pin)).toMatch(/SHA256:/);
  });
});

describe("known_hosts", () => {
  test.each([
    ["plain", (key: string) => `vm1.example.com ${key}`, "ok"],
    ["upper case", (key: string) => `VM1.example.com ${key}`, "ok"],
    ["list", (key: string) => `vm0,vm1.example.com,10.0.0.1 ${key}`, "ok"],
    ["wildcards", (key: string) => `vm?.*.com ${key}`, "ok"],
    ["wildcard of too few characters", (key: string) => `vm?1.example.com ${key}`, "unknown"],
    ["dot is a dot", (key: string) => `vm1xexample.com ${key}`, "unknown"],
    ["negated after a match", (key: string) => `*.example.com,!vm1.example.com ${key}`, "unknown"],
    ["negated before a match", (key: string) => `!vm1.*,*.example.com ${key}`, "unknown"],
    ["another name negated", (key: string) => `*.example.com,!vm2.example.com ${key}`, "ok"],
    ["another host", (key: string) => `vm2.example.com ${key}`, "unknown"],
    ["another port", (key: string) => `[vm1.example.com]:2222 ${key}`, "unknown"],
    ["comment", (key: string) => `# vm1.example.com ${key}\n\n`, "unknown"],
    ["with comment and CRLF", (key: string) => `vm1.example.com ${key} root@vm1\r\n`, "ok"],
    ["certificate authority", (key: string) => `@cert-authority *.example.com ${key}`, "unknown"],
    ["revoked", (key: string) => `@revoked * ${key}\nvm1.example.com ${key}`, "revoked"],
    ["revoked elsewhere", (key: string) => `@revoked vm9 ${key}\nvm1.example.com ${key}`, "ok"],
    ["cut line", () => "vm1.example.com ssh-ed25519", "unknown"],
    [
      "type that is not the key's",
      (key: string) => `vm1.example.com ${key.replace("ed25519", "rsa")}`,
      "unknown",
    ],
  ] as const)("%s", (_what, text, expected) => {
    expect(verdict(text(mine.line))).toBe(expected);
  });

  test("another key of the host is a mismatch that names it", () => {
    const judged = judge(mine.blob, ["vm1"], { knownHosts: [`vm1 ${other.line}`] });
    expect(judged).toEqual({ verdict: "mismatch", expected: [`ssh-ed25519 ${fingerprint(other.blob)}`] });
  });

  test("a second line with the key makes it known, in another file too", () => {
    expect(judge(mine.blob, ["vm1"], { knownHosts: [`vm1 ${other.line}`, `vm1 ${mine.line}`] }).verdict).toBe(
      "ok",
    );
  });

  test("a port other than 22 is looked up in brackets", () => {
    expect(verdict(`[vm1.example.com]:2222 ${mine.line}`, ["[vm1.example.com]:2222"])).toBe("ok");
    expect(verdict(`[*.example.com]:2222 ${mine.line}`, ["[vm1.example.com]:2222"])).toBe("ok");
    expect(verdict(`vm1.example.com ${mine.line}`, ["[vm1.example.com]:2222"])).toBe("unknown");
  });

  test("names hashed by ssh-keygen are found, whatever their case", () => {
    const file = join(folder, "known_hosts");
    writeFileSync(file, `vm1.example.com ${mine.line}\n[vm1.example.com]:2222 ${mine.line}\n`);
    execFileSync("ssh-keygen", ["-q", "-H", "-f", file], { stdio: "ignore" });
    const hashed = readFileSync(file, "utf8");
    expect(hashed).not.toContain("vm1");
    expect(verdict(hashed)).toBe("ok");
    expect(verdict(hashed, ["VM1.example.com"])).toBe("ok");
    expect(verdict(hashed, ["[vm1.example.com]:2222"])).toBe("ok");
    expect(verdict(hashed, ["vm2.example.com"])).toBe("unknown");
  });

  test("a name hashed with a salt of more than a block is found", () => {
    const salt = randomBytes(80);
    const digest = createHmac("sha1", salt).update("vm1.example.com").digest("base64");
    expect(verdict(`|1|${salt.toString("base64")}|${digest} ${mine.line}`)).toBe("ok");
  });

  test("the keys of a host are told in the order of their lines, however these name it", () => {
    const text = `*.com ${ecdsa.line}\nvm1.com,vm1.com ${other.line}\nvm?.com,!vm2.com ${ecdsa.line}\n`;
    const judged = judge(mine.blob, ["vm1.com"], { knownHosts: [text] });
    const expected = [ecdsa, other, ecdsa].map(
      ({ line, blob }) => `${line.split(" ")[0]} ${fingerprint(blob)}`,
    );
    expect(judged).toEqual({ verdict: "mismatch", expected });
  });

  test("a file is read once for all hosts, hashed or not", () => {
    const names = Array.from({ length: 30 }, (_, n) => `host${n}.example.com`);
    const file = join(folder, "many");
    for (const hash of [false, true]) {
      writeFileSync(file, names.map((name) => `${name} ${mine.line}\n`).join(""));
      if (hash) execFileSync("ssh-keygen", ["-q", "-H", "-f", file], { stdio: "ignore" });
      const text = readFileSync(file, "utf8");
      const made = vi.spyOn(Buffer, "from");
      for (const name of names) {
        expect(knownTypes([name], { knownHosts: [text] })).toEqual(["ssh-ed25519"]);
        expect(verdict(text, [name])).toBe("ok");
      }
      const decoded = made.mock.calls.filter((call: readonly unknown[]) => call[1] === "base64").length;
      made.mockRestore();
      // The key of each line, and its salt and hash.
      expect(decoded).toBe(names.length * (hash ? 3 : 1));
    }
  });

  test("the types known for a host are asked for first", () => {
    const text = `vm1 ${ecdsa.line}\nvm2 ${mine.line}\n@cert-authority vm1 ${mine.line}`;
    expect(knownTypes(["vm1"], { knownHosts: [text] })).toEqual(["ecdsa-sha2-nistp256"]);
    expect(knownTypes(["vm1"], { pins: [mine.line, fingerprint(ecdsa.blob)] })).toEqual(["ssh-ed25519"]);
  });
});

describe("a pattern", () => {
  test.each([
    ["", "", true],
    ["", "a", false],
    ["*", "", true],
    ["?", "", false],
    ["**a", "a", true],
    ["a*", "a", true],
    ["a*b", "aXbXb", true],
    ["a*b", "aXbX", false],
    ["*ab", "aab", true],
    ["*a?c*", "xabac", false],
    ["*a?c*", "xabacc", true],
    ["a*b*c", "a.b.b.c", true],
    ["a.c", "abc", false],
    ["*", "a\nb", true],
    ["abc", "ab", false],
  ])("%j and %j", (pattern, text, matches) => {
    expect(matchesWildcard(pattern, text)).toBe(matches);
  });

  test("of several stars is not tried in every way", () => {
    const started = performance.now();
    expect(matchesWildcard("*a*a*a*b", "a".repeat(600))).toBe(false);
    expect(performance.now() - started).toBeLessThan(2000);
  });
});

describe("the error", () => {
  test("of an unknown key tells its fingerprint and two ways to pin it", () => {
    const error = hostKeyError("web", "[10.0.0.1]:2222", mine.blob, { verdict: "unknown" });
    expect(error.code).toBe("HOST_KEY_UNKNOWN");
    expect(error.message).toContain(fingerprint(mine.blob));
    expect(error.message).toContain(`hostKey: "${mine.line}"`);
    expect(error.message).toContain(`known_hosts: [10.0.0.1]:2222 ${mine.line}`);
    expect(error.message).toContain("ssh_host_ed25519_key.pub");
    expect(hostKeyError("web", "web", ecdsa.blob, { verdict: "unknown" }).message).toContain(
      "ssh_host_ecdsa_key.pub",
    );
  });

  test("of a key that its alias takes by a certificate alone does not tell to pin it", () => {
    const limits = { hostKeyAlgorithms: ["ssh-ed25519-cert-v01@openssh.com"] };
    const { message } = hostKeyError("web", "web", mine.blob, { verdict: "unknown" }, { limits });
    expect(message).toContain("@cert-authority web");
    expect(message).toContain("allow ssh-ed25519 in HostKeyAlgorithms");
    expect(message).not.toContain(mine.line);
  });

  test.each([
    ["key line", () => other.line],
    ["fingerprint", () => fingerprint(other.blob)],
  ])("of another key than the pinned %s tells both fingerprints", (_what, pin) => {
    const error = hostKeyError("web", "web", mine.blob, judge(mine.blob, ["web"], { pins: [pin()] }));
    expect(error.code).toBe("HOST_KEY_MISMATCH");
    expect(error.message).toContain(`shows the host key ssh-ed25519 ${fingerprint(mine.blob)}`);
    expect(error.message).toContain(fingerprint(other.blob));
  });

  test("of a key that a pinned fingerprint may not be of says so", () => {
    const verdict = { verdict: "mismatch", expected: ["SHA256:abc"] } as const;
    const error = hostKeyError("web", "web", mine.blob, verdict);
    expect(error.message).toContain("pin that of its ssh-ed25519 key");
  });

  test("of a revoked key says so", () => {
    const error = hostKeyError("web", "web", mine.blob, { verdict: "revoked" });
    expect(error.code).toBe("HOST_KEY_MISMATCH");
    expect(error.message).toContain("revoked");
    expect(error.message).toContain(fingerprint(mine.blob));
  });
});
