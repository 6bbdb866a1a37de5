import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  attachCommand,
  canServe,
  nbdServerConfig,
  nbdServers,
  nbdUri,
  parseNbdUri,
  sameEndpoint,
  serverCommand,
  uriWithCertificates,
} from "../../provider/linux/nbd.js";

describe("NBD URIs", () => {
  it("reads what it writes", () => {
    fc.assert(
      fc.property(
        fc.constantFrom("10.0.0.1", "server1", "fe80::1", "::1"),
        fc.integer({ min: 1, max: 65535 }),
        fc.string({ minLength: 1, unit: "grapheme" }),
        (server, port, exportName) => {
          expect(parseNbdUri(nbdUri({ server, port, exportName }))).toEqual({ server, port, exportName });
        },
      ),
    );
  });

  it("knows the default port", () => {
    expect(parseNbdUri("nbd://server1/vm1").port).toBe(10809);
  });

  it.each(["", "vm1", "http://a/b", "nbd:///x", "nbd://a", "nbd://a/", "nbd://u@a/b", "nbd://a/b?c=d"])(
    "refuses %j and says what would be right",
    (uri) => {
      expect(() => parseNbdUri(uri)).toThrow(/write nbd:\/\/SERVER/);
    },
  );
});

it("refuses a % that encodes nothing", () => {
  expect(() => parseNbdUri("nbd://a/b%zz")).toThrow(/%25/);
});

describe("servers", () => {
  const serve = {
    device: "/dev/VgVm/s",
    exportName: "vm1",
    listenAddress: "10.0.0.1",
    port: 1234,
    readOnly: true,
  };

  it("lets nbdkit serve just the named export, read-only", () => {
    const argv = serverCommand("nbdkit", serve, "");
    expect(argv).toEqual(
      expect.arrayContaining(["-r", "-i", "10.0.0.1", "exportname-strict=true", "exportname=vm1"]),
    );
  });

  it("lets qemu-nbd serve more than one client", () => {
    expect(serverCommand("qemu-nbd", serve, "").join(" ")).toContain("-e 0");
  });

  it("writes booleans as nbd-server reads them, and takes a % in a path literally", () => {
    const config = nbdServerConfig(serve);
    expect(config).toContain("readonly=true\n");
    expect(config).toContain("virtstyle=none\n");
    expect(serverCommand("nbd-server", serve, "/etc/x.conf")).toEqual(["nbd-server", "-C", "/etc/x.conf"]);
  });

  const { device: _, ...terms } = serve;
  const image = (format: "raw" | "qcow2") => ({ ...terms, file: "/b/vm1", format });

  it("never probes a raw image for another format", () => {
    expect(serverCommand("nbdkit", image("raw"), "")).toContain("file=/b/vm1");
    expect(nbdServerConfig(image("raw"))).toContain("exportname=/b/vm1\n");
    const argv = serverCommand("qemu-nbd", image("raw"), "");
    expect(argv.slice(argv.indexOf("-f"), argv.indexOf("-f") + 2)).toEqual(["-f", "raw"]);
    expect(argv.at(-1)).toBe("/b/vm1");
  });

  it("serves the content of a qcow2 image by qemu-nbd alone, which follows no backing file", () => {
    const argv = serverCommand("qemu-nbd", image("qcow2"), "");
    expect(argv).not.toContain("-f");
    expect(JSON.parse(argv.at(-1)?.replace("json:", "") ?? "")).toEqual({
      driver: "qcow2",
      backing: null,
      file: { driver: "file", filename: "/b/vm1" },
    });
    expect(nbdServers.filter((server) => canServe(server, "qcow2"))).toEqual(["qemu-nbd"]);
    expect(nbdServers.filter((server) => canServe(server, "raw"))).toEqual(nbdServers);
  });

  it("never serves a writable export as read-only or the other way round", () => {
    const writable = { ...serve, readOnly: false };
    expect(serverCommand("nbdkit", writable, "")).not.toContain("-r");
    expect(serverCommand("qemu-nbd", writable, "")).not.toContain("-r");
    expect(nbdServerConfig(writable)).toContain("readonly=false");
  });
});

it("attaches always with a timeout", () => {
  const argv = attachCommand({
    server: "10.0.0.1",
    port: 10809,
    exportName: "vm1",
    device: "/dev/nbd0",
    readOnly: true,
    connections: 2,
    timeoutSeconds: 30,
    blockSize: 512,
  });
  expect(argv.join(" ")).toBe("nbd-client -N vm1 10.0.0.1 10809 /dev/nbd0 -timeout 30 -b 512 -C 2 -readonly");
});

describe("with TLS every server asks for the client's certificate", () => {
  const serve = {
    ...{ device: "/dev/VgVm/s", exportName: "vm1", listenAddress: "10.0.0.1", port: 1234, readOnly: true },
    certificates: "/run/credentials/a\\x2cb,c",
  };

  it("nbdkit", () => {
    const argv = serverCommand("nbdkit", serve, "");
    expect(argv).toEqual(
      expect.arrayContaining([
        "--tls=require",
        `--tls-certificates=${serve.certificates}`,
        "--tls-verify-peer",
      ]),
    );
  });

  it("qemu-nbd, for which a comma ends a value", () => {
    const argv = serverCommand("qemu-nbd", serve, "");
    expect(argv[argv.indexOf("--object") + 1]).toBe(
      "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir=/run/credentials/a\\x2cb,,c",
    );
    expect(argv[argv.indexOf("--tls-creds") + 1]).toBe("tls0");
  });

  it("nbd-server, for which a backslash begins a character", () => {
    expect(nbdServerConfig(serve).split("\n")).toEqual(
      expect.arrayContaining([
        "certfile=/run/credentials/a\\\\x2cb,c/server-cert.pem",
        "keyfile=/run/credentials/a\\\\x2cb,c/server-key.pem",
        "cacertfile=/run/credentials/a\\\\x2cb,c/ca-cert.pem",
        "force_tls=true",
      ]),
    );
  });

  it("and a client knows its server by name and authority", () => {
    const attach = {
      ...{ server: "10.0.0.1", port: 1234, exportName: "vm1", device: "/dev/nbd0", readOnly: true },
      ...{ connections: 1, timeoutSeconds: 30, blockSize: 512, certificates: "/c" },
    };
    expect(attachCommand(attach).slice(-8)).toEqual([
      ...["-certfile", "/c/client-cert.pem", "-keyfile", "/c/client-key.pem"],
      ...["-cacertfile", "/c/ca-cert.pem", "-tlshostname", "10.0.0.1"],
    ]);
  });
});

it("a URI tells TLS by its scheme", () => {
  const endpoint = { server: "::1", port: 1, exportName: "a/b", tls: true };
  expect(nbdUri(endpoint)).toBe("nbds://[::1]:1/a%2Fb");
  expect(parseNbdUri(nbdUri(endpoint))).toEqual(endpoint);
  expect(uriWithCertificates("nbds://a:1/b", "/etc/x\\x20y")).toBe(
    "nbds://a:1/b?tls-certificates=/etc/x%5Cx20y",
  );
  expect(sameEndpoint(endpoint, { ...endpoint, tls: false })).toBe(true);
  expect(sameEndpoint(endpoint, { ...endpoint, port: 2 })).toBe(false);
});
