import { spawnSync } from "node:child_process";
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { makeCertificates } from "../../provider/core/certificateAuthority.js";
import { certificatesPlace } from "../../provider/core/hostCommands.js";
import {
  certificatesArguments,
  certificatesDigest,
  certificatesFunctions,
  certificatesInput,
  certificatesText,
  clientFiles,
  expiryPhrase,
  isCertificateFor,
  jobUri,
  nameProblem,
  provenFile,
  type ServerTls,
  serverFiles,
  tlsProblem,
} from "../../provider/linux/tls.js";

let tls: ServerTls;
let other: ServerTls;
let folder: string;

beforeAll(async () => {
  const now = new Date();
  tls = await makeCertificates("vm1", ["10.0.0.1", "server1.example"], now);
  other = await makeCertificates("vm1", ["10.0.0.1"], now);
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-tls-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe("certificates that are given", () => {
  it("fit together", () => {
    expect(tlsProblem(tls, { usage: "server" })).toBeUndefined();
    const { clientCertificate: certificate, clientPrivateKey: privateKey } = tls;
    expect(tlsProblem({ ...tls, certificate, privateKey }, { usage: "client" })).toBeUndefined();
  });

  it.each([
    ["an authority that is none", () => ({ caCertificate: "x" }), "caCertificate", "is no certificate"],
    ["a certificate that is none", () => ({ certificate: "x" }), "certificate", "is no certificate"],
    ["a key that is none", () => ({ privateKey: "x" }), "privateKey", "is no private key"],
    [
      "another certificate's key",
      () => ({ privateKey: other.privateKey }),
      "privateKey",
      "is not the key of",
    ],
    ["another authority", () => ({ caCertificate: other.caCertificate }), "certificate", "is not signed by"],
    [
      "an authority that is none",
      () => ({ caCertificate: tls.certificate }),
      "caCertificate",
      "no certificate of an authority",
    ],
    [
      "several authorities, each of whose clients would be let in",
      () => ({ caCertificate: tls.caCertificate + other.caCertificate }),
      "caCertificate",
      "holds several",
    ],
    ["a chain", () => ({ certificate: tls.certificate + other.certificate }), "certificate", "holds several"],
    [
      "a client's certificate for the server",
      () => ({ certificate: tls.clientCertificate, privateKey: tls.clientPrivateKey }),
      "certificate",
      "is not for a server",
    ],
  ])("are refused with %s", (_what, change, property, reason) => {
    expect(tlsProblem({ ...tls, ...change() }, { usage: "server" })).toEqual({
      property,
      reason: expect.stringContaining(reason),
    });
  });

  it("are for the addresses and names in them, and for no other", () => {
    for (const name of ["10.0.0.1", "server1.example"])
      expect(isCertificateFor(tls.certificate, name)).toBe(true);
    for (const name of ["10.0.0.2", "server2.example", "server"])
      expect(isCertificateFor(tls.certificate, name)).toBe(false);
  });
});

it.each([
  ["10.0.0.1", true],
  ["::1", true],
  ["server1.example", true],
  ["fe80::1%eth0", false],
  ["::ffff:10.0.0.1", false],
  ["sérver", false],
  ["a b", false],
])("a server that is reached by %s can be known by a certificate: %s", (name, can) => {
  expect(nameProblem(name) === undefined).toBe(can);
});

it("a set is another one with any other file in it", () => {
  const digests = [
    serverFiles(tls),
    clientFiles(tls),
    serverFiles({ ...tls, privateKey: other.privateKey }),
    serverFiles({ ...tls, clientPrivateKey: other.clientPrivateKey }),
  ].map(certificatesDigest);
  expect(new Set(digests).size).toBe(4);
  // Spaces around a PEM text mean nothing.
  expect(certificatesDigest(serverFiles({ ...tls, certificate: `\n${tls.certificate}\n\n` }))).toBe(
    digests[0],
  );
});

describe("expiry is told", () => {
  const now = 1_800_000_000;
  it.each([
    [31, undefined],
    [29.5, "its certificates expire on 2027-02-13, in 29 days"],
    [0, "its certificates expired on 2027-01-15"],
    [-10, "its certificates expired on 2027-01-05"],
  ])("%d days before", (days, phrase) => {
    expect(expiryPhrase({ expiresAt: now + days * 86_400, now })).toBe(phrase);
  });
});

it("a job asks with its certificates, and without TLS by the plain URI", () => {
  expect(jobUri("nbds://a:1/b", clientOf(tls), "/run/x")).toBe("nbds://a:1/b?tls-certificates=/run/x/tls");
  expect(jobUri("nbd://a:1/b", undefined, "/run/x")).toBe("nbd://a:1/b");
});

function clientOf({ caCertificate, clientCertificate, clientPrivateKey }: ServerTls) {
  return { caCertificate, certificate: clientCertificate, privateKey: clientPrivateKey };
}

describe("on the host", () => {
  let set: string;
  const run = (script: string, args: readonly string[], input = "") => {
    const { status, stdout, stderr } = spawnSync("sh", ["-c", script, "sh", ...args], { input });
    return { status, stdout: stdout.toString(), stderr: stderr.toString() };
  };
  const receive = (input: string) =>
    run(
      `${certificatesFunctions}\nreceive_certificates "$@"`,
      [set, ...certificatesArguments(serverFiles(tls))],
      input,
    );
  const same = (digest: string) =>
    // The tests need not run as root.
    run(
      `${certificatesFunctions.replaceAll("0:700", `${process.getuid?.()}:700`).replaceAll("0:600", `${process.getuid?.()}:600`)}\nsame_certificates "$@"`,
      [set, digest],
    ).status;

  beforeEach(() => {
    set = join(mkdtempSync(join(folder, "host-")), "lvm-nbd", "vm1~1");
  });

  it("they lie in files of their owner alone, in a folder that others can pass", () => {
    expect(receive(certificatesInput(serverFiles(tls)))).toEqual({ status: 0, stdout: "", stderr: "" });
    for (const [name, text] of Object.entries(serverFiles(tls))) {
      expect(readFileSync(join(set, name), "utf8")).toBe(text);
      expect(statSync(join(set, name)).mode & 0o777).toBe(0o600);
    }
    expect(statSync(set).mode & 0o777).toBe(0o700);
    expect(statSync(join(set, "..")).mode & 0o005).toBe(0o005);
    expect(readdirSync(join(set, ".."))).toEqual(["vm1~1"]);
    expect(same(certificatesDigest(serverFiles(tls)))).toBe(0);
    // As the proof writes it.
    writeFileSync(join(set, provenFile), "", { mode: 0o600 });
    expect(same(certificatesDigest(serverFiles(tls)))).toBe(0);
  });

  it.each([
    ["cut short", (all: string) => all.slice(0, -1)],
    ["nothing at all", () => ""],
    ["more than was meant", (all: string) => `${all}x`],
  ])("they are not there when what arrived is %s", (_what, change) => {
    const { status, stderr } = receive(change(certificatesInput(serverFiles(tls))));
    expect([status, stderr]).toEqual([1, "the certificates did not arrive whole\n"]);
    expect(readdirSync(join(set, ".."))).toEqual([]);
  });

  it("a link in their place is taken away, not followed", () => {
    const victim = join(folder, "victim");
    mkdirSync(victim, { recursive: true });
    writeFileSync(join(victim, "kept"), "");
    mkdirSync(join(set, ".."), { recursive: true });
    symlinkSync(victim, set);
    symlinkSync(victim, `${set}.new`);
    expect(receive(certificatesInput(serverFiles(tls))).status).toBe(0);
    expect(readdirSync(victim)).toEqual(["kept"]);
    expect(statSync(set).isDirectory()).toBe(true);
  });

  it.each([
    ["a key that others may read", () => chmodSync(join(set, "server-key.pem"), 0o644)],
    ["a folder that others may read", () => chmodSync(set, 0o755)],
    ["a changed certificate", () => writeFileSync(join(set, "ca-cert.pem"), "x")],
    ["a missing key", () => rmSync(join(set, "client-key.pem"))],
    [
      "a link instead of a file",
      () => {
        writeFileSync(join(folder, "elsewhere"), readFileSync(join(set, "ca-cert.pem")), { mode: 0o600 });
        rmSync(join(set, "ca-cert.pem"));
        symlinkSync(join(folder, "elsewhere"), join(set, "ca-cert.pem"));
      },
    ],
    ["no folder", () => rmSync(set, { recursive: true })],
  ])("%s is noticed", (_what, spoil) => {
    receive(certificatesInput(serverFiles(tls)));
    spoil();
    expect(same(certificatesDigest(serverFiles(tls)))).not.toBe(0);
  });

  it("the sets of before go, the kept one and those of other units stay", () => {
    for (const name of ["vm1~1", "vm1~2", "vm1~2.new", "vm1.tls-1~1"])
      mkdirSync(join(set, "..", name), { recursive: true });
    const prefix = set.slice(0, -1);
    const tidy = (...args: string[]) => run(`${certificatesFunctions}\ntidy_certificates "$@"`, args).status;
    expect(tidy(prefix, set)).toBe(0);
    expect(readdirSync(join(set, "..")).sort()).toEqual(["vm1.tls-1~1", "vm1~1"]);
    expect(tidy(prefix)).toBe(0);
    expect(readdirSync(join(set, ".."))).toEqual(["vm1.tls-1~1"]);
  });

  it("a command finds a client's while it runs, and nothing of them is left, whatever its end", () => {
    const files = clientFiles(clientOf(tls));
    const parts = certificatesArguments(files);
    mkdirSync(set, { recursive: true });
    const old = join(set, "lvm-nbd-certificates.killed");
    mkdirSync(old);
    utimesSync(old, 0, 0);
    const work = (command: string, argument = "") =>
      run(
        certificatesText(command, set),
        [String(parts.length), ...parts, argument],
        certificatesInput(files),
      );
    const asked = `nbds://a:1/b?tls-certificates=${certificatesPlace}`;
    const look = work(`folder=\${1#*=}; cat "$folder/client-key.pem"; echo "$1"; cat; exit 3`, asked);
    expect([look.status, look.stderr]).toEqual([3, ""]);
    expect(look.stdout).toBe(
      `${files["client-key.pem"]}nbds://a:1/b?tls-certificates=${/=(.*)\n$/.exec(look.stdout)?.[1]}\n`,
    );
    expect(look.stdout).toContain(`${set}/lvm-nbd-certificates.`);
    expect(work("kill -TERM $PPID; sleep 0.1").status).toBe(1);
    expect(readdirSync(set)).toEqual([]);
  });
});
