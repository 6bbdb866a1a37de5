import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { decode, encode, holdsSecret } from "../../provider/pulumi/codec.js";
import { structOf } from "../../provider/pulumi/proto.js";
import { unknownValue } from "../../provider/pulumi/unknowns.js";

const signature = "4dabf18193072939515e22adb298388d";
const secret = (value?: unknown) => ({
  [signature]: "1b47061264138c4ac30d75fd1eb44270",
  ...(value === undefined ? {} : { value }),
});
const output = (more: object) => ({ [signature]: "d0e6a833031e9bbcd3f4e8bde6ca49a4", ...more });
const none: ReadonlySet<string> = new Set();

/** What a message holds, as it crosses the wire. */
const onTheWire = (values: Record<string, unknown>, secrets = none) => encode(values, secrets).toJavaScript();

it("uses Pulumi's own signatures", async () => {
  const rpc = await import("@pulumi/pulumi/runtime/rpc.js");
  expect(rpc.specialSigKey).toBe(signature);
  expect(secret()[signature]).toBe(rpc.specialSecretSig);
  expect(output({})[signature]).toBe(rpc.specialOutputValueSig);
  for (const kind of [rpc.specialAssetSig, rpc.specialArchiveSig, rpc.specialResourceSig]) {
    const { refused } = decode(structOf({ a: { [signature]: kind } }));
    expect(refused).toEqual([{ property: "a", reason: expect.stringMatching(/^is an? \w+; give/) }]);
  }
});

const keys = fc
  .string({ unit: "grapheme", maxLength: 8 })
  .filter((key) => key !== signature && key !== "__proto__");
const plainValues = fc.letrec((tie) => ({
  value: fc.oneof(
    { maxDepth: 4 },
    fc.string({ unit: "grapheme" }),
    fc.double({ noNaN: true, noDefaultInfinity: true }).map((number) => number + 0),
    fc.boolean(),
    fc.array(tie("value"), { maxLength: 4 }),
    fc.dictionary(keys, tie("value"), { maxKeys: 4, noNullPrototype: true }),
  ),
})).value;

it("gives back every plain value as it was, with its secrets", () => {
  fc.assert(
    fc.property(
      fc.dictionary(keys, plainValues, { noNullPrototype: true }),
      fc.boolean(),
      (values, hidden) => {
        const secrets = new Set(hidden ? Object.keys(values).map((key) => JSON.stringify([key])) : []);
        const decoded = decode(encode(values, secrets));
        expect(decoded.values).toEqual(values);
        expect(decoded.refused).toEqual([]);
        for (const path of secrets) expect(decoded.secrets).toContain(path);
      },
    ),
  );
});

describe("a message", () => {
  it("that is not there has no values", () => {
    expect(decode(undefined)).toEqual({ values: {}, secrets: none, refused: [], dependencies: new Map() });
  });

  it("holds nothing where it holds null: so a secret output that is undefined arrives", () => {
    const { values } = decode(
      structOf({ a: null, b: { c: null, d: [] }, e: secret(null), f: secret(), g: {} }),
    );
    expect(values).toEqual({ b: { d: [] }, g: {} });
  });

  it("keeps null in a list, where it has a place", () => {
    expect(decode(structOf({ a: [1, null] })).values).toEqual({ a: [1, null] });
  });

  it("tells secrets by their paths, however deep, and opens them", () => {
    const { values, secrets } = decode(
      structOf({
        host: { address: "a", password: secret("p") },
        clients: ["10.0.0.1", secret("10.0.0.2")],
        all: secret({ inner: secret("x") }),
        "a.b": secret(1),
      }),
    );
    expect(values).toEqual({
      host: { address: "a", password: "p" },
      clients: ["10.0.0.1", "10.0.0.2"],
      all: { inner: "x" },
      "a.b": 1,
    });
    expect(secrets).toEqual(
      new Set(['["host","password"]', '["clients",1]', '["all"]', '["all","inner"]', '["a.b"]']),
    );
  });

  it("takes output values for what they hold: known or not, secret or not", () => {
    const { values, secrets } = decode(
      structOf({
        a: output({ value: 1, dependencies: ["urn"] }),
        b: output({}),
        c: output({ value: "s", secret: true }),
        d: output({ secret: true }),
      }),
    );
    expect(values).toEqual({ a: 1, b: unknownValue, c: "s", d: unknownValue });
    expect(secrets).toEqual(new Set(['["c"]', '["d"]']));
  });

  it("names what has no plain value by its path, also of a kind that is not known", () => {
    const { refused } = decode(structOf({ a: { b: [{ [signature]: "of-tomorrow" }] } }));
    expect(refused).toEqual([{ property: "a.b.0", reason: expect.stringContaining("does not know") }]);
  });

  it("changes no prototype", () => {
    const { values } = decode(structOf(JSON.parse('{"a": {"__proto__": {"polluted": true}}}')));
    expect(Reflect.get(values.a as object, "polluted")).toBeUndefined();
    expect(Reflect.get({}, "polluted")).toBeUndefined();
  });
});

describe("values", () => {
  it("are secret again at their paths, and nowhere else", () => {
    const secrets = new Set(['["host","user"]', '["size"]', '["gone","x"]']);
    expect(onTheWire({ host: { address: "a", user: "u" }, size: "1G", other: "o" }, secrets)).toEqual({
      host: { address: "a", user: secret("u") },
      size: secret("1G"),
      other: "o",
    });
  });

  it("in a list with a secret are a secret together: it may come back in another order", () => {
    const secrets = new Set(['["clients",1]', '["deep",0,"a"]']);
    expect(onTheWire({ clients: ["a", "b"], deep: [{ a: "x" }] }, secrets)).toEqual({
      clients: secret(["a", "b"]),
      deep: secret([{ a: "x" }]),
    });
  });

  it("that are keys and passwords are secret without being marked; that there are some is none", () => {
    const host = { address: "a", privateKey: "k", proxyJump: [{ address: "j", password: "p" }] };
    expect(onTheWire({ host, tls: true, clientTls: { privateKey: "k", certificate: undefined } })).toEqual({
      host: {
        address: "a",
        privateKey: secret("k"),
        proxyJump: [{ address: "j", password: secret("p") }],
      },
      tls: true,
      clientTls: secret({ privateKey: "k" }),
    });
  });

  it("that are undefined are left out, at any depth", () => {
    expect(onTheWire({ a: undefined, b: { c: undefined, d: 1 } })).toEqual({ b: { d: 1 } });
  });
});

it.each([
  ["a marked one", "size", "1G", new Set(['["size"]'])],
  ["one inside of it", "host", { user: "u" }, new Set(['["host","user"]'])],
  ["one that always is", "host", { password: "p" }, none],
] as const)("sees that a property holds a secret: %s", (_what, property, value, secrets) => {
  expect(holdsSecret(property, value, secrets)).toBe(true);
  expect(holdsSecret("other", "o", secrets)).toBe(false);
});

it("takes no property for another whose name begins like it", () => {
  expect(holdsSecret("size", "1G", new Set(['["sizes"]', '["size\\",x"]']))).toBe(false);
});
