/** TLS as resources declare it. */
import { z } from "zod";
import { certificatesPlace, type HostScript, script } from "../core/hostCommands.js";
import { secret } from "../core/inputs.js";
import type { Problem } from "../core/resource.js";
import { parseNbdUri } from "../linux/nbd.js";
import {
  type ClientTls,
  certificatesArguments,
  certificatesInput,
  clientFiles,
  jobCertificates,
  scriptWithCertificates,
  tlsProblem,
} from "../linux/tls.js";
import { quote, quoteAll } from "../ssh/quoting.js";
import type { RemoteCommand } from "../ssh/types.js";

/** A certificate or key in PEM. */
export function pemInput(what: string) {
  return z
    .string()
    .min(1)
    .max(64 * 1024, "is too long for a certificate or key")
    .describe(`PEM: ${what}.`);
}

/** A private key in PEM, of the certificate that is named before it. */
export const keyInput = pemInput("its private key, without a passphrase").meta(secret);

/** A client's certificate, its key, and by what it knows its server. */
export const clientTlsShape = z
  .strictObject({
    caCertificate: pemInput("certificate of the authority that signed the server's and the client's"),
    certificate: pemInput("the client's certificate"),
    privateKey: keyInput,
  })
  .meta({ title: "ClientTls" });

/** As an input: they must go together. */
export const clientTlsInput = clientTlsShape.superRefine((tls, refinement) => {
  const problem = tlsProblem(tls, { usage: "client" });
  if (problem) refinement.addIssue({ code: "custom", message: problem.reason, path: [problem.property] });
});

/** A `TlsRecord`. */
export const tlsRecordShape = z.strictObject({ digest: z.string(), made: z.string().optional() });

/** The `tls` of what reads an export. */
export const sourceTlsInput = clientTlsInput
  .optional()
  .describe(
    "Certificates (PEM) for an export with TLS, e.g. its output `clientTls`. Encrypted in the state; on the host they lie below /run " +
      "while they are in use.",
  )
  .meta(secret);

/** What is wrong with a `uri` and the `tls` beside it; `property`: of the latter. */
export function tlsProblems(
  uri: string | undefined,
  tls: ClientTls | undefined,
  unknown: ReadonlySet<string>,
  property = "tls",
): Problem[] {
  if (uri === undefined || unknown.has(property)) return [];
  const isSecured = parseNbdUri(uri).tls === true;
  if (isSecured && tls === undefined) {
    const reason = "is missing: an nbds:// export lets nobody in without a certificate. Give its `clientTls`";
    return [{ property, reason }];
  }
  if (!isSecured && tls !== undefined) {
    const reason = "goes only with an nbds:// `uri`: that of an export which has `tls`";
    return [{ property, reason }];
  }
  return [];
}

/** How an export is asked by programs of libnbd: by what URI, in what command. */
export interface Asking {
  readonly uri: string;
  command(text: HostScript, ...args: string[]): Pick<RemoteCommand, "argv" | "stdin">;
}

/** The certificates lie on the host only while the command runs. */
export function asking(uri: string, tls: ClientTls | undefined): Asking {
  if (tls === undefined) return { uri, command: (text, ...args) => ({ argv: script(text, ...args) }) };
  const files = clientFiles(tls);
  const parts = certificatesArguments(files);
  return {
    uri: `${uri}?tls-certificates=${certificatesPlace}`,
    command: (text, ...args) => ({
      argv: script(scriptWithCertificates(text), String(parts.length), ...parts, ...args),
      stdin: certificatesInput(files),
    }),
  };
}

/**
 * The text of a job: its certificates, its arguments, what it does. In a file of root's alone: systemd would expand what is in
 * arguments, and everybody can read those.
 */
export function jobText(
  run: string,
  tls: ClientTls | undefined,
  args: readonly string[],
  steps: string,
): string {
  const start = `set -- ${quoteAll(args)}\n${steps}`;
  if (tls === undefined) return start;
  const folder = jobCertificates(run);
  const put = Object.entries(clientFiles(tls)).map(
    ([name, text]) => `printf %s ${quote(text)} >${quote(`${folder}/${name}`)}`,
  );
  return `umask 077\n${[`mkdir -p ${quote(folder)}`, ...put].join(" &&\n")} || exit 1\n${start}`;
}
