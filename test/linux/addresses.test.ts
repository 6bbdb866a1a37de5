import { describe, expect, it } from "vitest";
import { canonicalNetwork, clientProblem, isAnyAddress, isLoopback } from "../../provider/linux/addresses.js";
import { listenersOn, parseListeners } from "../../provider/linux/listeners.js";

describe("clients", () => {
  it.each(["10.0.0.2", "10.0.0.0/24", "fd00::/8", "::1", "192.168.1.0/32"])("accepts %s", (client) => {
    expect(clientProblem(client)).toBeUndefined();
  });

  it.each([
    "",
    "server2",
    "fe80::1%eth0",
    "10.0.0",
    "10.0.0.1/33",
    "fd00::/129",
    "10.0.0.1/24/8",
    "10.0.0.1/x",
    "10.0.0.1 10.0.0.2",
  ])("refuses %j", (client) => {
    expect(clientProblem(client)).toMatch(/not an address or network/);
  });

  it.each(["0.0.0.0/0", "::/0"])("refuses everybody (%s)", (client) => {
    expect(clientProblem(client)).toMatch(/everybody/);
  });
});

it("tells loopback and all interfaces from other addresses", () => {
  expect([
    isLoopback("127.0.0.1"),
    isLoopback("127.9.9.9"),
    isLoopback("::1"),
    isLoopback("10.0.0.1"),
  ]).toEqual([true, true, true, false]);
  expect([
    isAnyAddress("0.0.0.0"),
    isAnyAddress("::"),
    isAnyAddress("::1"),
    isAnyAddress("10.0.0.1"),
  ]).toEqual([true, true, false, false]);
});

describe("listeners", () => {
  const printed = [
    'LISTEN 0      128        10.77.0.1:10809      0.0.0.0:*    users:(("nbdkit",pid=412,fd=4))',
    "LISTEN 0      128          0.0.0.0:10809      0.0.0.0:*",
    'LISTEN 0      128             [::]:10809         [::]:*    users:(("x",pid=7,fd=3))',
    'LISTEN 0      128        10.77.0.9:10809      0.0.0.0:*    users:(("y",pid=8,fd=3))',
  ].join("\n");

  it("finds those in the way of an address: the same one and wildcards", () => {
    expect(listenersOn(parseListeners(printed), "10.77.0.1").map(({ address }) => address)).toEqual([
      "10.77.0.1:10809",
      "0.0.0.0:10809",
      "[::]:10809",
    ]);
    expect(listenersOn(parseListeners(printed), "0.0.0.0")).toHaveLength(4);
  });

  it("are read whatever their address looks like", () => {
    const listener = (address: string) => parseListeners(`LISTEN 0 5 ${address} 0.0.0.0:*`)[0]?.host;
    expect(listener("[fe80::1]%eth0:1")).toBe("fe80::1");
    expect(listener("127.0.0.53%lo:1")).toBe("127.0.0.53");
    expect(listener("*:1")).toBe("*");
    expect(listenersOn(parseListeners("LISTEN 0 5 *:1 *:*"), "10.77.0.1")).toHaveLength(1);
  });

  it("are not said to be none where the output cannot be read", () => {
    expect(parseListeners("")).toEqual([]);
    expect(() => parseListeners("Cannot open netlink socket")).toThrow(/unexpected line/);
  });

  it("names the program", () => {
    expect(parseListeners(printed)[0]).toMatchObject({ program: "nbdkit", pids: [412] });
    expect(parseListeners(printed)[1]?.program).toBeUndefined();
  });
});

// As systemd 252 shows them, but for the length of an address.
it.each([
  ["10.0.0.2", "10.0.0.2"],
  ["10.0.0.2/32", "10.0.0.2"],
  ["10.1.2.3/16", "10.1.0.0/16"],
  ["10.1.255.3/20", "10.1.240.0/20"],
  ["FE80:0:0::1", "fe80::1"],
  ["2001:db8:0:0:1:0:0:1/128", "2001:db8::1:0:0:1"],
  ["2001:db8:ffff::1/33", "2001:db8:8000::/33"],
  ["::ffff:10.0.0.2", "::ffff:10.0.0.2"],
  ["::1", "::1"],
  ["::a00:2", "::10.0.0.2"],
  ["fe80::1%eth0", "fe80::1"],
])("%s is shown as %s", (text, shown) => {
  expect(canonicalNetwork(text)).toBe(shown);
});
