import { utils } from "ssh2";
import { describe, expect, it } from "vitest";
import { configurationProblems, namedHosts, refuseUnknown } from "../../provider/core/configuration.js";

const address = "192.0.2.1";
const { private: key } = utils.generateKeyPairSync("ed25519");

describe("the configuration", () => {
  it.each([
    ["nothing", {}, []],
    [
      "a host in detail",
      { hosts: { server1: { address, user: "backup", port: 2222, privateKey: key } } },
      [],
    ],
    ["a name with dots", { hosts: { "server-1.example_x": { address } } }, []],
    [
      "hosts as the text that they reach a provider as",
      { hosts: JSON.stringify({ server1: { address } }) },
      [],
    ],
    ["what is null in that", { hosts: '{"server1":{"address":"a","user":null}}' }, []],
    ["jumps through one another in a row", { hosts: chain({ a: "b", b: ["c", "a"], c: undefined }) }, []],
    ["an unknown property", { host: {}, organization: "acme" }, ["host"]],
    ["an organisation that is none", { organization: "a/b" }, ["organization"]],
    ["what is no JSON", { hosts: "server1" }, ["hosts"]],
    [
      "a name that an id could not begin with",
      { hosts: { "server1/VgVm": { address } } },
      ["hosts.server1/VgVm"],
    ],
    ["a host without an address", { hosts: { server1: { user: "x" } } }, ["hosts.server1.address"]],
    ["a host that is but a text", { hosts: { server1: address } }, ["hosts.server1"]],
    ["a misspelt property", { hosts: { s: { address, pasword: "x" } } }, ["hosts.s.pasword"]],
    ["a port that is a text", { hosts: { s: { address, port: "22" } } }, ["hosts.s.port"]],
    ["an address with a user", { hosts: { s: { address: "me@a" } } }, ["hosts.s.address"]],
    ["a key that is none", { hosts: { s: { address, privateKey: "x" } } }, ["hosts.s.privateKey"]],
    ["a pin that is none", { hosts: { s: { address, hostKey: "x" } } }, ["hosts.s.hostKey"]],
    ["jumps in a circle", { hosts: chain({ a: "b", b: ["a"] }) }, ["hosts.a.proxyJump", "hosts.b.proxyJump"]],
    [
      "a jump through another of them in another case",
      { hosts: chain({ a: "me@Gate:22", b: ["x", { address }, "GATE"], gate: undefined }) },
      ["hosts.a.proxyJump", "hosts.b.proxyJump"],
    ],
    [
      "several that are wrong",
      { hosts: { s: { address, port: 0 }, t: {} }, x: 1 },
      ["x", "hosts.s.port", "hosts.t.address"],
    ],
  ])("of %s is told by its path where it is wrong", (_what, values, properties) => {
    const problems = configurationProblems(values);
    expect(problems.map(({ property }) => property)).toEqual(properties);
    for (const { reason } of problems) expect(reason).not.toBe("");
  });

  it("is never quoted in what is said of it", () => {
    const wrong = [
      '{"server1": {"privateKey": "planted"',
      "planted",
      { s: { address, privateKey: "planted", password: "planted" } },
      { s: { address, password: ["planted"], passphrase: { planted: "planted" } } },
      { s: "planted" },
      { s: { address: "planted@x" } },
      { s: { address, hostKey: "planted" } },
      { s: { address, hostKey: ["SHA256:planted", "ssh-ed25519 planted"] } },
      { s: { address, proxyJump: "planted@" } },
      { s: { address, proxyJump: ["planted planted"] } },
      { s: { address, proxyJump: "ssh://planted:70000" } },
      { s: { address, privateKeyPath: "-----BEGIN\nplanted" } },
    ];
    for (const hosts of wrong) {
      const problems = configurationProblems({ hosts });
      expect(problems.length).toBeGreaterThan(0);
      expect(JSON.stringify(problems)).not.toContain("planted");
      expect(() => namedHosts(hosts)).toThrow(/^INVALID_INPUT: lvm-nbd:hosts(?![\s\S]*planted)/);
    }
  });

  it.each(["host", "Hosts", "organisation"])(
    "that a program finds is refused where it means nothing: %s",
    (name) => {
      const words = `INVALID_INPUT: lvm-nbd:${name}: is no property of lvm-nbd's configuration`;
      expect(() => refuseUnknown(["aws:region", `lvm-nbd:${name}`])).toThrow(words);
    },
  );

  it("that a program finds may be what the plugin's is, and another's", () => {
    const own = ["hosts", "organization", "version", "pluginDownloadURL"].map((name) => `lvm-nbd:${name}`);
    expect(() => refuseUnknown([...own, "aws:region", "project:host"])).not.toThrow();
  });

  it("names its hosts, and none that every object has", () => {
    const hosts = namedHosts(JSON.stringify({ server1: { address } }));
    expect(hosts.get("server1")).toEqual({ address });
    expect([...hosts.keys()]).toEqual(["server1"]);
    expect(namedHosts(undefined).get("constructor")).toBeUndefined();
  });
});

function chain(jumps: Readonly<Record<string, unknown>>) {
  return Object.fromEntries(
    Object.entries(jumps).map(([name, proxyJump]) => [
      name,
      { address, ...(proxyJump ? { proxyJump } : {}) },
    ]),
  );
}
