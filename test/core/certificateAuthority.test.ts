import { createPrivateKey, X509Certificate } from "node:crypto";
import { describe, expect, it } from "vitest";
import { certificateDays, makeCertificates } from "../../provider/core/certificateAuthority.js";

const now = new Date("2026-11-26T12:00:00Z");
const day = 86_400_000;

describe("certificates that are made", () => {
  it("are signed by an authority that nobody else has, for that server and one client", async () => {
    const made = await makeCertificates("vm1", ["10.0.0.1", "::1", "server1"], now);
    const again = await makeCertificates("vm1", ["10.0.0.1"], now);
    const authority = new X509Certificate(made.caCertificate);
    const server = new X509Certificate(made.certificate);
    const client = new X509Certificate(made.clientCertificate);
    expect(authority.ca).toBe(true);
    for (const one of [server, client]) {
      expect(one.ca).toBe(false);
      expect(one.verify(authority.publicKey)).toBe(true);
      expect(one.verify(new X509Certificate(again.caCertificate).publicKey)).toBe(false);
      expect(one.validFromDate.getTime()).toBe(now.getTime() - day);
      expect(one.validToDate.getTime()).toBe(now.getTime() + certificateDays * day);
    }
    expect(server.checkPrivateKey(createPrivateKey(made.privateKey))).toBe(true);
    expect(client.checkPrivateKey(createPrivateKey(made.clientPrivateKey))).toBe(true);
    expect(server.subjectAltName).toBe("IP Address:10.0.0.1, IP Address:0:0:0:0:0:0:0:1, DNS:server1");
    expect(client.subjectAltName).toBeUndefined();
    // Neither can stand in for the other.
    expect(server.keyUsage).toEqual(["1.3.6.1.5.5.7.3.1"]);
    expect(client.keyUsage).toEqual(["1.3.6.1.5.5.7.3.2"]);
  });

  it("can be made for any export's name", async () => {
    const made = await makeCertificates(`a,b=c+"ü\\ ${"x".repeat(200)}`, ["10.0.0.1"], now);
    expect(
      new X509Certificate(made.certificate).verify(new X509Certificate(made.caCertificate).publicKey),
    ).toBe(true);
  });
});
