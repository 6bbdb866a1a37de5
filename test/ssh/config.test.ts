import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { hostname, tmpdir } from "node:os";
import { join } from "node:path";
import { utils } from "ssh2";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import { isLvmNbdError, type LvmNbdError } from "../../provider/core/errors.js";
import {
  hostAddress,
  hostName,
  hostRoute,
  resolveHost,
  secretsOf,
  validateHostArgs,
} from "../../provider/ssh/config.js";
import { dsaKey } from "./keyFolder.js";

const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-config-"));
const key = join(folder, "key");
const encrypted = join(folder, "encrypted");
const before = { config: process.env.LVM_NBD_SSH_CONFIG, agent: process.env.SSH_AUTH_SOCK };
let pin: string;
let files = 0;

beforeAll(() => {
  execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", key]);
  execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "correct horse", "-f", encrypted]);
  pin = readFileSync(`${key}.pub`, "utf8").split(" ").slice(0, 2).join(" ");
});
beforeEach(() => {
  process.env.SSH_AUTH_SOCK = "/run/test-agent";
});
afterEach(() => {
  restore("LVM_NBD_SSH_CONFIG", before.config);
  restore("SSH_AUTH_SOCK", before.agent);
});
afterAll(() => rmSync(folder, { recursive: true }));

function restore(name: string, value: string | undefined): void {
  if (value === undefined) delete process.env[name];
  else process.env[name] = value;
}

/** A new file each time: what was made of an alias is remembered by the file's path. */
function sshConfig(text: string): void {
  const file = join(folder, `config${files++}`);
  writeFileSync(file, text);
  process.env.LVM_NBD_SSH_CONFIG = file;
}

async function failure(promise: Promise<unknown>): Promise<LvmNbdError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!isLvmNbdError(error)) throw new Error(`expected an LvmNbdError, got ${String(error)}`);
  return error;
}

describe("a name of the provider's configuration", () => {
  const named = new Map(
    Object.entries({
      web: { address: "10.9.0.1", port: 2222, user: "ann", password: "w", proxyJump: ["gate", "inner:2200"] },
      gate: { address: "10.9.0.2", password: "g", proxyJump: "outer" },
      inner: { address: "10.9.0.3", user: "bob", password: "i", proxyJump: "outer" },
      outer: { address: "10.9.0.4", password: "o" },
      lost: { address: "10.9.0.5", privateKeyPath: join(folder, "missing") },
      behind: { address: "10.9.0.6", proxyJump: "lost" },
      again: { address: "10.9.0.7", proxyJump: "me@again" },
    }),
  );

  test("goes before an alias, and is the host's name", async () => {
    sshConfig("Host web\n HostName 10.1.2.3\n");
    expect(await resolveHost("web", named)).toMatchObject({
      name: "web",
      address: "10.9.0.1",
      password: "w",
    });
    expect(await resolveHost("web")).toMatchObject({ name: "web", address: "10.1.2.3" });
    expect(await hostAddress("web", named)).toBe("10.9.0.1:2222");
    expect(await hostAddress("web")).toBe("10.1.2.3:22");
  });

  test("may have a user and a port, as a jump may", async () => {
    sshConfig("");
    const host = await resolveHost("eve@web:2300", named);
    expect(host).toMatchObject({ name: "web", address: "10.9.0.1", user: "eve", port: 2300, password: "w" });
    expect(host.jumps.map(({ name }) => name)).toEqual(["outer", "gate", "inner"]);
    expect(await hostAddress("eve@web:2300", named)).toBe("10.9.0.1:2300");
    expect(await hostAddress("eve@web", named)).toBe("10.9.0.1:2222");
    await expect(resolveHost("web:70000", named)).rejects.toThrow(/INVALID_INPUT.*70000 is no port/);
  });

  test("is not taken for an alias in another case, by whoever opens a host", async () => {
    sshConfig("Host WEB\n HostName 10.1.2.3\n");
    for (const host of ["WEB", { address: "10.1.2.3", proxyJump: "ann@WEB" }])
      await expect(resolveHost(host, named)).rejects.toThrow(
        /INVALID_INPUT.*WEB" differs from .* web in nothing but/,
      );
    expect(await hostAddress("WEB", named)).toBe("10.1.2.3:22");
  });

  test("is told apart by what it is reached through", async () => {
    sshConfig("Host aliased\n HostName 10.1.2.9\n");
    const through = (proxyJump: string[]) => hostRoute({ address: "10.9.0.9", proxyJump }, named);
    expect(await through(["gate", "inner:2200"])).toEqual([
      ...["10.9.0.4:22", "10.9.0.2:22", "10.9.0.3:2200", "10.9.0.9:22"],
    ]);
    expect(await through(["ann@aliased:22"])).toEqual(await through(["aliased"]));
    await expect(hostRoute("again", named)).rejects.toThrow(/circle/);
  });

  test("leaves every other name what it was", async () => {
    sshConfig("Host files\n HostName 10.1.2.4\n");
    expect(await resolveHost("files", named)).toEqual(await resolveHost("files"));
    expect(await resolveHost({ address: "web" }, named)).toMatchObject({
      address: "web",
      password: undefined,
    });
  });

  test("is jumped through as an alias is: by user and port, later ones without their own jumps", async () => {
    sshConfig("");
    expect((await resolveHost("web", named)).jumps).toMatchObject([
      { name: "outer", address: "10.9.0.4", password: "o" },
      { name: "gate", address: "10.9.0.2", password: "g", jumps: [] },
      { name: "inner", address: "10.9.0.3", password: "i", port: 2200, user: "bob" },
    ]);
    const through = { address: "10.1.2.3", proxyJump: "eve@outer" };
    expect((await resolveHost(through, named)).jumps).toMatchObject([{ address: "10.9.0.4", user: "eve" }]);
  });

  test("means nothing in the SSH configuration's own jumps", async () => {
    sshConfig("Host inside\n HostName 10.1.2.5\n ProxyJump outer\nHost outer\n HostName 10.1.2.6\n");
    expect((await resolveHost("inside", named)).jumps).toMatchObject([{ address: "10.1.2.6" }]);
  });

  test("is told as what is wrong, and not what the resource declares", async () => {
    sshConfig("");
    for (const name of ["lost", "behind"]) {
      const error = await failure(resolveHost(name, named));
      expect(error.details).toMatchObject({ host: name, property: "host" });
      expect(error.message).toMatch(
        /^KEY_UNREADABLE: host \w+: lvm-nbd:hosts\.lost\.privateKeyPath: the private/,
      );
    }
    await expect(resolveHost("again", named)).rejects.toThrow(
      /lvm-nbd:hosts\.again: ProxyJump goes in a circle/,
    );
  });
});

describe("what is configured and does not resolve", () => {
  const nowhere = "no-such-host.invalid";
  const named = new Map(
    Object.entries({
      lost: { address: nowhere },
      behind: { address: "10.9.0.1", proxyJump: "lost" },
      through: { address: "10.9.0.2", proxyJump: [{ address: nowhere }] },
    }),
  );

  test.each([
    ["lost", "lost.address"],
    ["ann@behind", "lost.address"],
    ["through", "through.proxyJump"],
    [{ address: "10.9.0.3", proxyJump: "behind" }, "lost.address"],
  ])("is told by its path: %j", async (args, path) => {
    sshConfig("");
    const error = await failure(validateHostArgs(args, named));
    expect(error.code).toBe("HOST_UNKNOWN");
    expect(error.message).toContain(`lvm-nbd:hosts.${path}: `);
    expect(JSON.stringify([error.message, error.details])).not.toContain(nowhere);
  });
});

describe("an alias", () => {
  test("is what ssh makes of it", async () => {
    const known = join(folder, "known");
    writeFileSync(known, `10.1.2.3 ${pin}\n`);
    sshConfig(`Host web
      HostName 10.1.2.3
      Port 2222
      User ann
      IdentityFile ${key}
      IdentityFile ${join(folder, "missing")}
      IdentityFile ${encrypted}
      UserKnownHostsFile ${known} ${join(folder, "none-there")}
      GlobalKnownHostsFile none\n`);
    const host = await resolveHost("web");
    expect(host).toMatchObject({
      name: "web",
      address: "10.1.2.3",
      port: 2222,
      user: "ann",
      sudo: true,
      agent: "/run/test-agent",
      hostKeyNames: ["[10.1.2.3]:2222"],
      jumps: [],
    });
    expect(host.keys.map((one) => one.label)).toEqual([key]);
    expect(host.trust).toMatchObject({ knownHosts: [`10.1.2.3 ${pin}\n`] });
  });

  test("may name the agent, a variable that holds it, or none", async () => {
    sshConfig(
      `Host own\n IdentityAgent /run/own\nHost percent\n IdentityAgent /run/100%%h\nHost none\n IdentityAgent none\nHost var\n IdentityAgent $SSH_AUTH_SOCK\n`,
    );
    expect((await resolveHost("own")).agent).toBe("/run/own");
    // `ssh -G` has put values in for tokens already.
    expect((await resolveHost("percent")).agent).toBe("/run/100%h");
    expect((await resolveHost("none")).agent).toBeUndefined();
    expect((await resolveHost("var")).agent).toBe("/run/test-agent");
  });

  test("may have tokens and spaces in the names of its files", async () => {
    const known = join(folder, "known hosts");
    writeFileSync(known, "spaced\n");
    writeFileSync(join(folder, "ann@10.1.2.3 web"), readFileSync(key), { mode: 0o600 });
    sshConfig(`Host web
      HostName 10.1.2.3
      User ann
      IdentityFile "${folder}/%r@%h %n"
      UserKnownHostsFile "${known}" ${join(folder, "none-there")}
      GlobalKnownHostsFile none\n`);
    const host = await resolveHost("web");
    expect(host.keys.map((one) => one.label)).toEqual([join(folder, "ann@10.1.2.3 web")]);
    expect(host.trust).toMatchObject({ knownHosts: ["spaced\n"] });
  });

  test("may have variables in them, and tokens in its jumps", async () => {
    const known = join(folder, "known-by-alias");
    writeFileSync(known, "by alias\n");
    process.env.LVM_NBD_TEST_FOLDER = folder;
    try {
      sshConfig(`Host web
        HostName 10.1.2.3
        HostKeyAlias known-by-alias
        IdentityFile \${LVM_NBD_TEST_FOLDER}/key
        IdentityAgent \${LVM_NBD_TEST_FOLDER}/agent
        UserKnownHostsFile ${join(folder, "none-there")} \${LVM_NBD_TEST_FOLDER}/%k
        GlobalKnownHostsFile none
        ProxyJump %r@%n-gw
        User ann
Host web-gw\n HostName 10.0.0.1\n`);
      const host = await resolveHost("web");
      expect(host.keys.map((one) => one.label)).toEqual([key]);
      expect(host.agent).toBe(join(folder, "agent"));
      expect(host.trust).toMatchObject({ knownHosts: ["by alias\n"] });
      expect(host.jumps).toMatchObject([{ address: "10.0.0.1", user: "ann" }]);
    } finally {
      delete process.env.LVM_NBD_TEST_FOLDER;
    }
  });

  test("may have its connection's hash in the names of its files, that of a jump with the jump's port", async () => {
    const hash = (...words: string[]) =>
      createHash("sha1")
        .update(`${hostname()}${words.join("")}`)
        .digest("hex");
    sshConfig(`Host web\n HostName 10.1.2.3\n User ann
      CertificateFile ${folder}/%C-cert.pub
      RevokedHostKeys /keys/%C
Host inner\n ProxyJump web:2200
`);
    expect((await resolveHost("web")).revokedHostKeys).toEqual([`/keys/${hash("10.1.2.3", "22", "ann")}`]);
    expect((await resolveHost("inner")).jumps[0]?.revokedHostKeys).toEqual([
      `/keys/${hash("10.1.2.3", "2200", "ann")}`,
    ]);
  });

  test("has files of known hosts with no token but those that ssh has put values in for", async () => {
    for (const name of ["100%host", "%h"]) writeFileSync(join(folder, name), `${name}\n`);
    sshConfig(`Host web
      HostName 10.1.2.3
      UserKnownHostsFile ${folder}/100%%host
      GlobalKnownHostsFile ${folder}/%h\n`);
    expect((await resolveHost("web")).trust).toMatchObject({ knownHosts: ["100%host\n", "%h\n"] });
  });

  const unset = `\${LVM_NBD_NOT_SET}`;
  test.each([
    ["IdentityFile", `${unset}/key`, unset, /no variable that is set/],
    ["IdentityFile", "/keys/%x", "%x", /no token that is known here/],
    ["CertificateFile", `${unset}/key`, unset, /no variable that is set/],
    ["RevokedHostKeys", "/keys/%x", "%x", /no token that is known here/],
    ["ProxyJump", "%u-gw", "%u", /no token that is known here/],
  ])("with %s %s is INVALID_INPUT, which names what is not known", async (option, value, found, words) => {
    sshConfig(`Host web\n ${option} ${value}\n`);
    const error = await failure(resolveHost("web"));
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.message).toContain(found);
    expect(error.message).toMatch(words);
  });

  test("tells which keys an agent is to be asked for, of files that cannot be read without it too", async () => {
    sshConfig(`Host web\n IdentityFile ${encrypted}\n IdentitiesOnly yes\n ConnectTimeout 7\n`);
    const publicKey = readFileSync(`${encrypted}.pub`, "utf8").split(" ")[1];
    expect(await resolveHost("web")).toMatchObject({
      keys: [],
      agentKeys: [publicKey],
      identitiesOnly: true,
      connectSeconds: 7,
    });
  });

  test("with HostKeyAlias is looked up under that name alone", async () => {
    sshConfig(`Host web\n HostName 10.1.2.3\n Port 2222\n HostKeyAlias web-key\n`);
    expect((await resolveHost("web")).hostKeyNames).toEqual(["web-key"]);
  });

  test.each([
    ["ssh-rsa", "ssh-rsa"],
    ["-*", "nothing"],
  ])(
    "whose HostKeyAlgorithms %s leave nothing that is sound is INVALID_INPUT, which says what is left",
    async (given, left) => {
      sshConfig(`Host web\n HostKeyAlgorithms ${given}\n`);
      const error = await failure(resolveHost("web"));
      expect(error.code).toBe("INVALID_INPUT");
      expect(error.message).toContain(`HostKeyAlgorithms leaves none that is taken here: ${left}`);
    },
  );

  test("is jumped to through a chain, in order", async () => {
    sshConfig(`Host web\n HostName 10.0.0.3\n ProxyJump inner
Host inner\n HostName 10.0.0.2\n ProxyJump bob@outer:2200
Host outer\n HostName 10.0.0.1\n`);
    const { jumps } = await resolveHost("web");
    expect(jumps.map((jump) => `${jump.address}:${jump.port}`)).toEqual(["10.0.0.1:2200", "10.0.0.2:22"]);
    expect(jumps[0]?.user).toBe("bob");
    expect(jumps.map((jump) => jump.hostKeyNames[0])).toEqual(["[10.0.0.1]:2200", "10.0.0.2"]);
    expect(jumps.every((jump) => jump.jumps.length === 0)).toBe(true);
  });

  test("a list of jumps is not lengthened by the later ones' own jumps", async () => {
    sshConfig(
      `Host web\n ProxyJump outer,inner\nHost inner\n HostName 10.0.0.2\n ProxyJump outer\nHost outer\n HostName 10.0.0.1\n`,
    );
    expect((await resolveHost("web")).jumps.map((jump) => jump.address)).toEqual(["10.0.0.1", "10.0.0.2"]);
  });

  test("a jump with a port keeps its HostKeyAlias", async () => {
    sshConfig(`Host web\n ProxyJump outer:2200\nHost outer\n HostName 10.0.0.1\n HostKeyAlias outer-key\n`);
    expect((await resolveHost("web")).jumps[0]).toMatchObject({ port: 2200, hostKeyNames: ["outer-key"] });
  });

  test("a jump as another user is what the configuration says of that user", async () => {
    sshConfig(`Match user deploy host outer
      HostKeyAlias deploys-key
      RevokedHostKeys ${folder}/revoked
Host web\n ProxyJump deploy@outer
Host outer\n HostName 10.0.0.1\n User ann\n HostKeyAlias anns-key
Host inner\n ProxyJump outer`);
    expect((await resolveHost("web")).jumps[0]).toMatchObject({
      name: "outer",
      user: "deploy",
      hostKeyNames: ["deploys-key"],
      revokedHostKeys: [`${folder}/revoked`],
    });
    expect((await resolveHost("inner")).jumps[0]).toMatchObject({ user: "ann", hostKeyNames: ["anns-key"] });
  });

  test.each([
    ["ann@corp.com@gw", "ann@corp.com", "gw", 22],
    ["ssh://ann@gw:2200", "ann", "gw", 2200],
    ["ann@[fe80::1]:2200", "ann", "fe80::1", 2200],
    ["ann@gw", "ann", "gw", 22],
  ])("a jump through %s is as the user before the last @", async (jump, user, name, port) => {
    sshConfig(`Host web\n ProxyJump ${jump}\n`);
    expect((await resolveHost("web")).jumps[0]).toMatchObject({ user, name, port });
  });

  test("is resolved without the stack's configuration, whose secrets are in the environment of a program", async () => {
    const told = join(folder, "environment");
    vi.stubEnv("PULUMI_CONFIG", '{"lvm-nbd:hosts":"planted"}');
    vi.stubEnv("PULUMI_CONFIG_SECRET_KEYS", '["lvm-nbd:hosts"]');
    vi.stubEnv("LVM_NBD_TEST_STAYS", "yes");
    try {
      sshConfig(`Match host web exec "env >'${told}'"\n HostName 10.1.2.3\n`);
      expect((await resolveHost("web")).address).toBe("10.1.2.3");
    } finally {
      vi.unstubAllEnvs();
    }
    const environment = readFileSync(told, "utf8");
    expect(environment).toContain("LVM_NBD_TEST_STAYS=yes");
    expect(environment).not.toMatch(/PULUMI_CONFIG|planted/);
  });

  test("that jumps in a circle is refused", async () => {
    sshConfig(`Host a\n ProxyJump b\nHost b\n ProxyJump a\n`);
    const error = await failure(resolveHost("a"));
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.message).toContain("circle");
  });

  test("with ProxyCommand is refused, and ProxyJump named instead", async () => {
    sshConfig(`Host web\n ProxyCommand nc %h %p\n`);
    const error = await failure(resolveHost("web"));
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.message).toContain("ProxyJump");
  });

  test.each(["-oProxyCommand=touch /tmp/x", "-F/etc/passwd", "", "a b", "a;b", "$(id)", "a\nb"])(
    "%j is no alias",
    async (alias) => {
      const error = await failure(resolveHost(alias));
      expect(error.code).toBe("INVALID_INPUT");
      expect(error.message).toContain("is not a host alias");
    },
  );

  test("that ssh cannot read is asked anew once the file is mended", async () => {
    sshConfig("Nonsense here\n");
    expect((await failure(resolveHost("web"))).code).toBe("INVALID_INPUT");
    writeFileSync(process.env.LVM_NBD_SSH_CONFIG ?? "", "Host web\n HostName 10.0.0.9\n");
    expect((await resolveHost("web")).address).toBe("10.0.0.9");
  });

  test("and an object that mean the same machine have the same address", async () => {
    sshConfig("Host web\n HostName Server1.example.com\n Port 2222\n");
    expect(await hostAddress("web")).toBe(await hostAddress({ address: "SERVER1.example.com", port: 2222 }));
    expect(await hostAddress("web")).not.toBe(await hostAddress({ address: "server1.example.com" }));
  });
});

describe("an object", () => {
  test("offers the agent only when nothing else is given, or when told", async () => {
    expect((await resolveHost({ address: "10.0.0.1", hostKey: pin })).agent).toBe("/run/test-agent");
    expect((await resolveHost({ address: "10.0.0.1", hostKey: pin, password: "p" })).agent).toBeUndefined();
    expect((await resolveHost({ address: "10.0.0.1", hostKey: pin, password: "p", agent: true })).agent).toBe(
      "/run/test-agent",
    );
    expect((await resolveHost({ address: "10.0.0.1", hostKey: pin, agent: false })).agent).toBeUndefined();
  });

  test("is root without sudo, anybody else with it, unless told", async () => {
    expect(await resolveHost({ address: "10.0.0.1" })).toMatchObject({ user: "root", sudo: false });
    expect(await resolveHost({ address: "10.0.0.1", user: "ann" })).toMatchObject({ sudo: true });
    expect(await resolveHost({ address: "10.0.0.1", user: "ann", sudo: false })).toMatchObject({
      sudo: false,
    });
  });

  test("is named by its address, and by its port when it is not 22", () => {
    expect(hostName({ address: "10.0.0.1" })).toBe("10.0.0.1");
    expect(hostName({ address: "10.0.0.1", port: 2222 })).toBe("10.0.0.1:2222");
    expect(hostName({ address: "fe80::1", port: 2222 })).toBe("[fe80::1]:2222");
  });

  test("may jump through aliases and objects", async () => {
    sshConfig("Host outer\n HostName 10.0.0.1\n");
    const host = await resolveHost({
      address: "10.0.0.3",
      proxyJump: ["outer", { address: "10.0.0.2", hostKey: pin }],
    });
    expect(host.jumps.map((jump) => jump.address)).toEqual(["10.0.0.1", "10.0.0.2"]);
  });

  test.each([
    ["a missing key file", { privateKeyPath: "/nowhere/key" }, "host.privateKeyPath", /ENOENT/],
    ["a folder", { privateKeyPath: folder }, "host.privateKeyPath", /EISDIR/],
    ["a public key file", { privateKeyPath: `${key}.pub` }, "host.privateKeyPath", /public key/],
    [
      "an encrypted file without passphrase",
      { privateKeyPath: encrypted },
      "host.privateKeyPath",
      /passphrase/,
    ],
    [
      "a wrong passphrase",
      { privateKeyPath: encrypted, passphrase: "hunter2" },
      "host.privateKeyPath",
      /decrypted/,
    ],
    ["a DSA key", { privateKey: dsaKey }, "host.privateKey", /SHA-1/],
    ["text that is no key", { privateKey: "hunter2" }, "host.privateKey", /not a private key/],
  ])(
    "with %s is KEY_UNREADABLE, which names the property and no secret",
    async (_what, extra, property, words) => {
      const error = await failure(validateHostArgs({ address: "10.0.0.1", ...extra }));
      expect(error.code).toBe("KEY_UNREADABLE");
      expect(error.details.property).toBe(property);
      expect(error.message).toMatch(words);
      expect(JSON.stringify([error.message, error.details, error.stack])).not.toContain("hunter2");
    },
  );

  test.each([
    ["port", { port: 65536 }],
    ["port", { port: 1.5 }],
    ["address", { address: "root@10.0.0.1" }],
    ["address", { address: "-oProxyCommand=id" }],
    ["address", { address: "10.0.0.1/24" }],
    ["proxyJump", { proxyJump: ["outer", "-oProxyCommand=id"] }],
    ["proxyJump", { proxyJump: "outer:0" }],
  ])("with a %s of %j is INVALID_INPUT, which names it", async (property, extra) => {
    const error = await failure(validateHostArgs({ address: "10.0.0.1", ...extra }));
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.details.property).toBe(`host.${property}`);
  });

  test("that wants the agent where none is, is INVALID_INPUT", async () => {
    delete process.env.SSH_AUTH_SOCK;
    const error = await failure(validateHostArgs({ address: "10.0.0.1", agent: true }));
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.message).toContain("SSH_AUTH_SOCK");
  });

  test("and those it is reached through tell their secrets to be masked, an alias has none", () => {
    const jump = { address: "10.0.0.2", passphrase: "p2", privateKeyPath: "/key" };
    expect(
      secretsOf({ address: "10.0.0.1", privateKey: "k1", password: "w1", proxyJump: ["outer", jump] }),
    ).toEqual(["k1", "w1", "p2"]);
    expect(secretsOf({ address: "10.0.0.1", proxyJump: jump })).toEqual(["p2"]);
    expect(secretsOf("web")).toEqual([]);
  });

  test("decrypts its key once, however many resources are on it", async () => {
    const parse = vi.spyOn(utils, "parseKey");
    const host = { address: "10.0.0.1", privateKeyPath: encrypted, passphrase: "correct horse" };
    for (let i = 0; i < 5; i++) await resolveHost(host);
    expect(parse.mock.calls.length).toBeLessThanOrEqual(1);
    parse.mockRestore();
  });

  test("takes an encrypted key with its passphrase", async () => {
    const host = await resolveHost({
      address: "10.0.0.1",
      privateKeyPath: encrypted,
      passphrase: "correct horse",
    });
    expect(host.keys.map((one) => one.label)).toEqual([encrypted]);
  });

  test("with a malformed pin is INVALID_INPUT, which says what a pin is", async () => {
    const error = await failure(validateHostArgs({ address: "10.0.0.1", hostKey: [pin, "SHA256:abc"] }));
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.details.property).toBe("host.hostKey");
    expect(error.message).toContain("ssh-ed25519 AAAA");
  });

  test("with a known_hosts file that cannot be read is an error, not an unknown key", async () => {
    const error = await failure(resolveHost({ address: "10.0.0.1", knownHostsPath: folder }));
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.details.property).toBe("host.knownHostsPath");
  });
});

describe("a name that does not resolve", () => {
  test.each([
    ["as an alias", "no-such-host.invalid", /neither in `lvm-nbd:hosts`, nor an alias/],
    ["as an address", { address: "no-such-host.invalid" }, /does not resolve/],
  ])("%s is HOST_UNKNOWN", async (_what, args, words) => {
    sshConfig("");
    const error = await failure(validateHostArgs(args));
    expect(error.code).toBe("HOST_UNKNOWN");
    expect(error.message).toMatch(words);
  });

  test("is left alone behind a jump, which is the one to resolve it", async () => {
    await validateHostArgs({ address: "no-such-host.invalid", proxyJump: { address: "10.0.0.1" } });
    const error = await failure(
      validateHostArgs({ address: "10.0.0.1", proxyJump: { address: "no-such-host.invalid" } }),
    );
    expect(error.code).toBe("HOST_UNKNOWN");
  });
});
