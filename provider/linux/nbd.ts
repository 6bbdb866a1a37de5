/** NBD: URIs, servers' command lines and the client's, as pure functions. Sources: nbd-uri(7), nbdkit(1), nbd-server(5), qemu-nbd(8), nbd-client(8). */
import { isIP } from "node:net";
import type { ImageFormat } from "./imageFile.js";

/** Programs that can serve an export. */
export const nbdServers = ["nbdkit", "nbd-server", "qemu-nbd"] as const;
export type NbdServer = (typeof nbdServers)[number];

/** Where an export is reached. */
export interface NbdEndpoint {
  readonly server: string;
  readonly port: number;
  readonly exportName: string;
  /** Only by TLS. */
  readonly tls?: boolean | undefined;
}

export const defaultPort = 10809;

/** The NBD URI of an endpoint. */
export function nbdUri({ server, port, exportName, tls }: NbdEndpoint): string {
  const authority = isIP(server) === 6 ? `[${server}]` : server;
  return `${tls ? "nbds" : "nbd"}://${authority}:${port}/${encodeURIComponent(exportName)}`;
}

/** True if both lead to the same export, with TLS or without. */
export function sameEndpoint(one: NbdEndpoint, other: NbdEndpoint): boolean {
  return withoutTls(nbdUri(one)) === withoutTls(nbdUri(other));
}

/** What a URI leads to, whether by TLS or not. */
export function withoutTls(uri: string): string {
  return uri.replace(/^nbds:/, "nbd:");
}

/** The URI for a program of libnbd, with the folder of its certificates, if the endpoint has TLS. */
export function uriWithCertificates(uri: string, folder: string | undefined): string {
  if (folder === undefined) return uri;
  return `${uri}?tls-certificates=${encodeURIComponent(folder).replaceAll("%2F", "/")}`;
}

/** Reads an NBD URI over TCP. Throws an error that says what would be right. */
export function parseNbdUri(uri: string): NbdEndpoint {
  const right = `write nbd://SERVER[:${defaultPort}]/EXPORTNAME, or nbds:// for one with TLS`;
  // Not URL: it would take an export called ".." for a folder.
  const match =
    /^nbd(s?):\/\/(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._-]*)(?::(\d{1,5}))?\/([^/?#]*)$/.exec(uri);
  const [, secure, server, port, name] = match ?? [];
  if (server === undefined || name === undefined) throw new Error(`"${uri}" cannot be used: ${right}`);
  if (name === "") throw new Error(`"${uri}" names no export: ${right}`);
  const number = port === undefined ? defaultPort : Number(port);
  if (number < 1 || number > 65535) throw new Error(`"${uri}" has no port from 1 to 65535: ${right}`);
  return {
    server: server.replace(/^\[(.*)\]$/, "$1"),
    port: number,
    exportName: decoded(name, uri),
    ...(secure === "s" ? { tls: true } : {}),
  };
}

function decoded(name: string, uri: string): string {
  try {
    return decodeURIComponent(name);
  } catch {
    throw new Error(`"${uri}" holds a % that encodes nothing: write it %25`);
  }
}

/** What is served: a block device, or the content of an image. */
export type Served = { readonly device: string } | { readonly file: string; readonly format: ImageFormat };

export function pathOf(served: Served): string {
  return "file" in served ? served.file : served.device;
}

/** Whether the server can serve an image of the format. */
export function canServe(server: NbdServer, format: ImageFormat): boolean {
  return format === "raw" || server === "qemu-nbd";
}

/** What a server process is to serve. */
export type ServeOptions = Served &
  Pick<NbdEndpoint, "port" | "exportName"> & {
    readonly listenAddress: string;
    readonly readOnly: boolean;
    /** Folder in which the server finds its certificates: clients without one of the same authority are refused. */
    readonly certificates?: string | undefined;
  };

/** The command line of a server; in the foreground, but for nbd-server. nbd-server reads `nbdServerConfig` from `configPath`. */
export function serverCommand(server: NbdServer, serve: ServeOptions, configPath: string): string[] {
  switch (server) {
    case "nbdkit":
      return [
        "nbdkit",
        "-f",
        ...(serve.readOnly ? ["-r"] : []),
        "-i",
        serve.listenAddress,
        "-p",
        String(serve.port),
        ...(serve.certificates === undefined
          ? []
          : ["--tls=require", `--tls-certificates=${serve.certificates}`, "--tls-verify-peer"]),
        "--filter=exportname",
        "file",
        `file=${pathOf(serve)}`,
        "cache=none",
        "exportname-strict=true",
        `exportname=${serve.exportName}`,
      ];
    case "nbd-server":
      // Not -d: that serves a single client and ends. It forks; its unit is of that type.
      return ["nbd-server", "-C", configPath];
    case "qemu-nbd":
      // -e 0: as many clients as come; the default of 1 lets a second one hang.
      return [
        "qemu-nbd",
        "-t",
        ...(serve.readOnly ? ["-r"] : []),
        "-e",
        "0",
        "-x",
        serve.exportName,
        ...qemuTls(serve.certificates),
        ...qemuOptions(serve),
        "-b",
        serve.listenAddress,
        "-p",
        String(serve.port),
        qemuSource(serve),
      ];
  }
}

/** A raw image is never probed for another format; not every file system knows direct I/O. */
function qemuOptions(served: Served): string[] {
  if (!("file" in served)) return ["-f", "raw", "--cache=none", "--aio=native"];
  return served.format === "raw" ? ["-f", "raw"] : [];
}

function qemuTls(certificates: string | undefined): string[] {
  if (certificates === undefined) return [];
  const folder = certificates.replaceAll(",", ",,");
  const credentials = `tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir=${folder}`;
  return ["--object", credentials, "--tls-creds", "tls0"];
}

/** Of a qcow2 image no other file that it names is read. */
function qemuSource(served: Served): string {
  if (!("file" in served) || served.format === "raw") return pathOf(served);
  const file = { driver: "file", filename: served.file };
  return `json:${JSON.stringify({ driver: served.format, backing: null, file })}`;
}

/** nbd-server(5). No user or allow-list: the unit drops rights, and the kernel keeps others out. */
export function nbdServerConfig(serve: ServeOptions): string {
  return [
    "[generic]",
    `listenaddr=${serve.listenAddress}`,
    `port=${serve.port}`,
    ...nbdServerTls(serve.certificates),
    `[${serve.exportName}]`,
    `exportname=${escaped(pathOf(serve))}`,
    `readonly=${serve.readOnly}`,
    "virtstyle=none",
    "",
  ].join("\n");
}

/** With an authority of its own nbd-server lets no client in that shows no certificate of it. */
function nbdServerTls(certificates: string | undefined): string[] {
  if (certificates === undefined) return [];
  const folder = escaped(certificates);
  return [
    `certfile=${folder}/server-cert.pem`,
    `keyfile=${folder}/server-key.pem`,
    `cacertfile=${folder}/ca-cert.pem`,
    "force_tls=true",
  ];
}

/** In a value of the configuration a backslash begins a character. */
function escaped(value: string): string {
  return value.replaceAll("\\", "\\\\");
}

/** How a client connects. */
export interface AttachOptions extends Omit<NbdEndpoint, "tls"> {
  readonly device: string;
  readonly readOnly: boolean;
  readonly connections: number;
  readonly timeoutSeconds: number;
  readonly blockSize: number;
  /** Folder of its certificates. */
  readonly certificates?: string | undefined;
}

/** nbd-client by netlink: it hands the connection to the kernel and ends. Always with a timeout. */
export function attachCommand(attach: AttachOptions): string[] {
  return [
    "nbd-client",
    "-N",
    attach.exportName,
    attach.server,
    String(attach.port),
    attach.device,
    "-timeout",
    String(attach.timeoutSeconds),
    "-b",
    String(attach.blockSize),
    ...(attach.connections > 1 ? ["-C", String(attach.connections)] : []),
    ...(attach.readOnly ? ["-readonly"] : []),
    ...clientTls(attach),
  ];
}

/** Without an authority's certificate nbd-client would take any server. */
function clientTls({ certificates, server }: Pick<AttachOptions, "certificates" | "server">): string[] {
  if (certificates === undefined) return [];
  return [
    ...["-certfile", `${certificates}/client-cert.pem`, "-keyfile", `${certificates}/client-key.pem`],
    ...["-cacertfile", `${certificates}/ca-cert.pem`, "-tlshostname", server],
  ];
}
