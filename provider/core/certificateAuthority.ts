/**
 * A certificate authority for one export: it signs its server's certificate and its client's, and is forgotten. Nobody,
 * whatever he reads later, can make another client.
 */
import { isIP } from "node:net";
import type { ServerTls } from "../linux/tls.js";

/** Days for which certificates are made. */
export const certificateDays = 397;

const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" } as const;

/**
 * Makes an authority with the certificates of a server, reached by `serverNames` (addresses or names), and of its client.
 * `now`: by the server's clock. `namesake`: another authority's certificate, whose name this one takes.
 */
export async function makeCertificates(
  exportName: string,
  serverNames: readonly string[],
  now: Date,
  namesake?: string,
): Promise<ServerTls> {
  // Only here: it takes a while to load, and most runs make no certificate.
  await import("reflect-metadata");
  const x509 = await import("@peculiar/x509");
  const { subtle } = globalThis.crypto;
  const day = 24 * 3600 * 1000;
  const common = {
    // Clocks differ.
    notBefore: new Date(now.getTime() - day),
    notAfter: new Date(now.getTime() + certificateDays * day),
    signingAlgorithm: algorithm,
  };
  const authorityKeys = await subtle.generateKey(algorithm, false, ["sign", "verify"]);
  const { keyCertSign, digitalSignature } = x509.KeyUsageFlags;
  const authority = await x509.X509CertificateGenerator.createSelfSigned({
    ...common,
    serialNumber: "01",
    name:
      namesake === undefined
        ? [{ CN: [[...`lvm-nbd export ${exportName}`].slice(0, 64).join("")] }]
        : new x509.X509Certificate(namesake).subjectName,
    keys: authorityKeys,
    extensions: [
      new x509.BasicConstraintsExtension(true, 0, true),
      new x509.KeyUsagesExtension(keyCertSign, true),
    ],
  });
  const issue = async (
    serialNumber: string,
    name: string,
    usage: "serverAuth" | "clientAuth",
    names: readonly string[],
  ) => {
    const keys = await subtle.generateKey(algorithm, true, ["sign", "verify"]);
    const certificate = await x509.X509CertificateGenerator.create({
      ...common,
      serialNumber,
      subject: [{ CN: [name] }],
      issuer: authority.subjectName,
      publicKey: keys.publicKey,
      signingKey: authorityKeys.privateKey,
      extensions: [
        new x509.BasicConstraintsExtension(false, undefined, true),
        new x509.KeyUsagesExtension(digitalSignature, true),
        new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage[usage]]),
        ...(names.length === 0
          ? []
          : [
              new x509.SubjectAlternativeNameExtension(
                names.map((value) => ({
                  type: isIP(value) === 0 ? ("dns" as const) : ("ip" as const),
                  value,
                })),
              ),
            ]),
      ],
    });
    const key = await subtle.exportKey("pkcs8", keys.privateKey);
    return {
      certificate: `${certificate.toString("pem")}\n`,
      privateKey: `${x509.PemConverter.encode(key, "PRIVATE KEY")}\n`,
    };
  };
  const server = await issue("02", "server", "serverAuth", [...new Set(serverNames)]);
  const client = await issue("03", "client", "clientAuth", []);
  return {
    caCertificate: `${authority.toString("pem")}\n`,
    ...server,
    clientCertificate: client.certificate,
    clientPrivateKey: client.privateKey,
  };
}
