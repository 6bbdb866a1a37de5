/**
 * TLS of an NBD link: which certificates there are, where they lie on a host and how they come there. Keys travel on stdin
 * alone and lie in files that only root reads. Sources: nbd-uri(5), nbdkit-tls(1), qemu-nbd(8), nbd-client(8), systemd.exec(5).
 */
import { createPrivateKey, X509Certificate } from "node:crypto";
import { isIP } from "node:net";
import {
  type ArgumentRule,
  certificatesPlace,
  type HostScript,
  hostCommandOf,
  hostScript,
  script,
} from "../core/hostCommands.js";
import { digest } from "../core/owner.js";
import { quote } from "../ssh/quoting.js";
import { uriWithCertificates } from "./nbd.js";

/** What a client shows, and by what it knows its server; PEM texts. */
export interface ClientTls {
  /** Certificate of the authority that signed the other two. */
  readonly caCertificate: string;
  readonly certificate: string;
  readonly privateKey: string;
}

/** All of an export; PEM texts. */
export interface ServerTls extends ClientTls {
  readonly clientCertificate: string;
  readonly clientPrivateKey: string;
}

/** How a set of certificates is kept: which one, and of one that was made here what for. */
export interface TlsRecord {
  /** `certificatesDigest` of the files. */
  readonly digest: string;
  /** Digest of the names and triggers they were made for; none for those that were given. */
  readonly made?: string | undefined;
}

/** Files by the names that nbdkit, qemu-nbd and libnbd look for in a folder. */
export type CertificateFiles = Readonly<Record<string, string>>;

/** The files of an export. The client's are for the host itself, which proves by them that it serves. */
export function serverFiles(tls: ServerTls): CertificateFiles {
  return {
    "ca-cert.pem": pem(tls.caCertificate),
    "server-cert.pem": pem(tls.certificate),
    "server-key.pem": pem(tls.privateKey),
    "client-cert.pem": pem(tls.clientCertificate),
    "client-key.pem": pem(tls.clientPrivateKey),
  };
}

/** The files of a client. */
export function clientFiles(tls: ClientTls): CertificateFiles {
  return {
    "ca-cert.pem": pem(tls.caCertificate),
    "client-cert.pem": pem(tls.certificate),
    "client-key.pem": pem(tls.privateKey),
  };
}

function pem(text: string): string {
  return `${text.trim()}\n`;
}

/** Identifies a set: of all its files, as `cat *.pem | sha256sum` in the order of their names. */
export function certificatesDigest(files: CertificateFiles): string {
  const names = Object.keys(files).sort();
  return digest(names.map((name) => files[name]).join(""), 32);
}

/** A folder of its own for each set, so that what runs never meets half of another one. */
export function certificatesFolder(unit: string, certificates: Pick<TlsRecord, "digest">): string {
  return `${certificatesFolders(unit)}${certificates.digest}`;
}

/** What the folders of a unit's sets begin with, and no other's: a unit's name holds no `~`. */
export function certificatesFolders(unit: string): string {
  return `/etc/lvm-nbd/${unit.replace(/\.service$/, "")}~`;
}

/**
 * Shell functions for scripts. `receive_certificates FOLDER NAME BYTES...`: stdin as those files in a new folder, on the disk.
 * `same_certificates FOLDER DIGEST`: they are whole, and root's alone; where that cannot be told the script ends. `tidy_certificates FOLDERS [KEPT]`: removes those that
 * begin so, but for one.
 */
export const certificatesFunctions = `
receive_certificates() (
  folder=$1; shift
  # What lies in another's folder he could put something else in place of.
  [ ! -L "\${folder%/*}" ] || { echo "\${folder%/*} is a symbolic link, and no key was written through it: put what it leads to in its place, or remove it" >&2; exit 1; }
  mkdir -p "\${folder%/*}" || exit 1
  umask 077
  rm -rf "$folder.new" && mkdir "$folder.new" && chmod u=rwx,go=,ug-s "$folder.new" && head -c 1000000 >"$folder.new/all" || exit 1
  whole() {
    from=1
    while [ $# -gt 0 ]; do
      case $1 in */*) return 1;; esac
      tail -c +$from "$folder.new/all" | head -c "$2" >"$folder.new/$1" || return 1
      [ "$(wc -c <"$folder.new/$1")" -eq "$2" ] && sync "$folder.new/$1" || return 1
      from=$((from+$2)); shift 2
    done
    [ "$(wc -c <"$folder.new/all")" -eq $((from-1)) ] && rm "$folder.new/all"
  }
  whole "$@" && rm -rf "$folder" && mv -T "$folder.new" "$folder" && sync "\${folder%/*}" && exit 0
  rm -rf "$folder.new"; echo "the certificates did not arrive whole" >&2; exit 1
)
same_certificates() {
  [ -d "$1" ] && [ ! -L "$1" ] && [ ! -L "\${1%/*}" ] || return 1
  same_seen=$(stat -c %u:%a "$1") || exit 1
  [ "$same_seen" = 0:700 ] || return 1
  set -- "$1" "$2" "$1"/*.pem
  [ -e "$3" ] || return 1
  same_folder=$1 same_digest=$2; shift 2
  for same_one; do
    same_seen=$(stat -c %u:%a:%F "$same_one") || exit 1
    [ "$same_seen" = "0:600:regular file" ] || return 1
  done
  same_seen=$(cat "$same_folder"/*.pem && echo end) || exit 1
  [ "$(printf %s "\${same_seen%end}" | sha256sum | head -c 32)" = "$same_digest" ]
}
tidy_certificates() {
  for tidy_one in "$1"*; do [ "$tidy_one" = "\${2-}" ] || rm -rf "$tidy_one" || return 1; done
  rmdir "\${1%/*}" 2>/dev/null
  return 0
}
`;

/** Arguments of `receive_certificates` behind the folder. Its stdin: `certificatesInput`. */
export function certificatesArguments(files: CertificateFiles): string[] {
  return Object.entries(files).flatMap(([name, text]) => [name, String(Buffer.byteLength(text))]);
}

export function certificatesInput(files: CertificateFiles): string {
  return Object.values(files).join("");
}

const withCertificates = new Map<HostScript, HostScript>();

/**
 * Makes a script one that can also be run while a client's certificates lie in a folder of their own; see
 * `scriptWithCertificates`.
 */
export function canHaveCertificates(text: HostScript): void {
  const { name, rules = [] } = hostCommandOf(script(text)) ?? {};
  const own: ArgumentRule[] = ["certificates", ...rules];
  withCertificates.set(text, hostScript(`${name}-by-tls`, "observe", certificatesText(text), own));
}

/**
 * The script as it runs with certificates (stdin). Arguments: how many arguments of `receive_certificates` follow, those, the script's
 * own with `certificatesPlace`.
 */
export function scriptWithCertificates(text: HostScript): HostScript {
  const found = withCertificates.get(text);
  if (found === undefined) throw new Error("a script that cannot have certificates");
  return found;
}

/** The folders of runs that were killed go with the next one. `base`: where folders are made. */
export function certificatesText(text: string, base = "/run"): string {
  return `${certificatesFunctions}
base=${quote(`${base}/lvm-nbd-certificates`)} count=$1; shift
find "\${base%/*}" -maxdepth 1 -name 'lvm-nbd-certificates.*' -mmin +60 -exec rm -rf {} +
folder=$(mktemp -d "$base.XXXXXXXX") || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
parts=
while [ "$count" -gt 0 ]; do parts="$parts $1"; shift; count=$((count-1)); done
receive_certificates "$folder/tls" $parts || exit 1
for argument; do
  shift
  case $argument in *${certificatesPlace}*) argument="\${argument%%${certificatesPlace}*}$folder/tls\${argument#*${certificatesPlace}}";; esac
  set -- "$@" "$argument"
done
sh -c ${quote(text)} sh "$@" </dev/null
`;
}

/** Beside the certificates: the server that the unit starts lets nobody in without them. It goes when the unit is written anew. */
export const provenFile = "proven";

/** Where a job has its certificates: below /run, so on no disk, and removed with it. */
export function jobCertificates(run: string): string {
  return `${run}/tls`;
}

/** By what URI a job asks the export. */
export function jobUri(uri: string, tls: ClientTls | undefined, run: string): string {
  return uriWithCertificates(uri, tls && jobCertificates(run));
}

/** A link's certificates as a host has them. */
export interface SeenCertificates {
  /** Seconds since 1970 at which the first of them expires. */
  readonly expiresAt: number;
  /** The same of now, by the host's clock. */
  readonly now: number;
}

/** Reads what certificates say. Throws on what is none. */
export function expiryOf(...certificates: readonly string[]): number {
  return Math.min(...certificates.map((text) => Date.parse(new X509Certificate(text).validTo) / 1000));
}

/** Days before their end from which certificates are told to expire. */
export const expiryNoticeDays = 30;

export function isExpired({ expiresAt, now }: SeenCertificates): boolean {
  return expiresAt <= now;
}

/** ISO 8601. */
export function expiryTime({ expiresAt }: Pick<SeenCertificates, "expiresAt">): string {
  return new Date(expiresAt * 1000).toISOString();
}

/** What to say of certificates that have expired or soon will have. */
export function expiryPhrase(seen: SeenCertificates): string | undefined {
  const { expiresAt, now } = seen;
  const day = expiryTime(seen).slice(0, 10);
  const days = Math.floor((expiresAt - now) / 86_400);
  if (isExpired(seen)) return `its certificates expired on ${day}`;
  return days < expiryNoticeDays ? `its certificates expire on ${day}, in ${days} days` : undefined;
}

/** Seconds since 1970 from which certificates are valid. */
export function validFrom(...certificates: readonly string[]): number {
  return Math.max(...certificates.map((text) => Date.parse(new X509Certificate(text).validFrom) / 1000));
}

/** Extended key usages, RFC 5280, 4.2.1.12. */
const usages = { server: "1.3.6.1.5.5.7.3.1", client: "1.3.6.1.5.5.7.3.2" } as const;

/** What is wrong with a certificate, its key and its authority; property and reason. */
export function tlsProblem(
  { caCertificate, certificate, privateKey }: ClientTls,
  of: {
    readonly usage: keyof typeof usages;
    readonly certificate?: string;
    readonly privateKey?: string;
  },
): { readonly property: string; readonly reason: string } | undefined {
  const names = { certificate: "certificate", privateKey: "privateKey", ...of };
  const authority = parsed(() => new X509Certificate(caCertificate));
  if (authority === undefined) return { property: "caCertificate", reason: "is no certificate in PEM" };
  if (holdsSeveral(caCertificate))
    return {
      property: "caCertificate",
      reason: "holds several certificates: every client of each would be let in",
    };
  if (!authority.ca)
    return { property: "caCertificate", reason: "is no certificate of an authority (CA:TRUE)" };
  const own = parsed(() => new X509Certificate(certificate));
  if (own === undefined) return { property: names.certificate, reason: "is no certificate in PEM" };
  if (holdsSeveral(certificate))
    return {
      property: names.certificate,
      reason: "holds several certificates: give the one that `caCertificate` signed",
    };
  // Node calls them the usage of the key.
  const allowed: readonly string[] | undefined = own.keyUsage;
  if (allowed !== undefined && !allowed.includes(usages[of.usage]))
    return { property: names.certificate, reason: `is not for a ${of.usage} (extended key usage)` };
  const key = parsed(() => createPrivateKey(privateKey));
  if (key === undefined)
    return { property: names.privateKey, reason: "is no private key in PEM, or one with a passphrase" };
  if (!own.checkPrivateKey(key))
    return { property: names.privateKey, reason: `is not the key of \`${names.certificate}\`` };
  if (!own.verify(authority.publicKey) || own.issuer !== authority.subject)
    return { property: names.certificate, reason: "is not signed by `caCertificate` itself" };
  return undefined;
}

function holdsSeveral(pemText: string): boolean {
  return pemText.split("-----BEGIN CERTIFICATE-----").length > 2;
}

function parsed<T>(parse: () => T): T | undefined {
  try {
    return parse();
  } catch {
    return undefined;
  }
}

/** True if clients that reach the server by this name or address will accept its certificate. */
export function isCertificateFor(certificate: string, server: string): boolean {
  const own = new X509Certificate(certificate);
  return (
    (isIP(server) === 0 ? own.checkHost(server, { subject: "never" }) : own.checkIP(server)) !== undefined
  );
}

/** Why no certificate can be made for a server that is reached by this name or address. */
export function nameProblem(name: string): string | undefined {
  const fits =
    isIP(name) === 0 ? /^[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})$/.test(name) : !/%|::ffff:.*\./i.test(name);
  if (fits) return undefined;
  return `cannot know the server by "${name}": a certificate is for a plain IP address or a DNS name. Listen on one`;
}
