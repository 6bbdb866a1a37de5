/** The systemd unit of an export: hardened, bound to one device or image, its clients enforced by the kernel. */
import { ownerMark } from "../core/owner.js";
import { canonicalNetwork, isAnyAddress, isLoopback } from "./addresses.js";
import { folderOf } from "./copyJob.js";
import { imageGuard } from "./imageFile.js";
import {
  type NbdServer,
  nbdServerConfig,
  nbdUri,
  type Served,
  type ServeOptions,
  serverCommand,
  uriWithCertificates,
} from "./nbd.js";
import {
  type Directive,
  deviceUnit,
  execLine,
  literal,
  ownDirective,
  ownSection,
  pathUnit,
  quotedPath,
  renderUnit,
} from "./systemd.js";
import { certificatesFolder, type TlsRecord } from "./tls.js";
import { unitName } from "./unitName.js";

/** All that the unit is made from; it is kept in the unit itself, so that it can be read back. */
export type ExportPlan = ExportTerms & Served;

interface ExportTerms extends FoundOnHost {
  readonly owner: string;
  readonly exportName: string;
  readonly listenAddress: string;
  readonly port: number;
  readonly readOnly: boolean;
  readonly clients: readonly string[];
  readonly server: NbdServer;
  /** Without it everybody on the way reads along. */
  readonly tls?: TlsRecord | undefined;
}

/** What the host itself tells. */
export interface FoundOnHost {
  /** From where the host reaches the listen address, if not from that itself (a second address of a network). */
  readonly ownAddress?: string | undefined;
  /** Where `file` really is, if symbolic links lead to its folder. */
  readonly realPath?: string | undefined;
  /** Where the file system of `file` is mounted, if it is not that of `/`. */
  readonly mountPoint?: string | undefined;
  /**
   * Which file `file` was when it was examined: inode and time of birth (seconds since 1970, 0 where the file system knows
   * none). Not the device's number, which is another one after a boot.
   */
  readonly fileId?: string | undefined;
}

/** As the server is to see it. systemd hands it the certificates: it runs as a user that cannot read root's files. */
function serveOptions(plan: ExportPlan): ServeOptions {
  const found = "file" in plan ? { ...plan, file: plan.realPath ?? plan.file } : plan;
  return plan.tls === undefined
    ? found
    : { ...found, certificates: `/run/credentials/${exportUnitName(plan.exportName)}` };
}

/** Where the certificates lie; `undefined` without TLS. */
export function exportCertificates(plan: Pick<ExportPlan, "exportName" | "tls">): string | undefined {
  return plan.tls && certificatesFolder(exportUnitName(plan.exportName), plan.tls);
}

/** What a server reads of its certificates. */
const serverCredentials = ["ca-cert.pem", "server-cert.pem", "server-key.pem"];

export function exportUnitName(exportName: string): string {
  return unitName("export", exportName);
}

/** Only nbd-server needs a file of its own. */
export function exportConfigPath(exportName: string): string {
  return `/etc/lvm-nbd/${exportUnitName(exportName).replace(/\.service$/, ".conf")}`;
}

export function exportConfig(plan: ExportPlan): string | undefined {
  return plan.server === "nbd-server" ? nbdServerConfig(serveOptions(plan)) : undefined;
}

/** The address under which the host itself reaches the export to look at it. */
export function probeAddress(listenAddress: string): string {
  if (!isAnyAddress(listenAddress)) return listenAddress;
  return listenAddress.includes(":") ? "::1" : "127.0.0.1";
}

type Probed = Pick<ExportPlan, "listenAddress" | "port" | "exportName" | "tls">;

/** The URI with that. */
export function probeUri({ listenAddress, port, exportName, tls }: Probed): string {
  return nbdUri({ server: probeAddress(listenAddress), port, exportName, tls: tls !== undefined });
}

/** By which programs ask the export there. */
export function askedUri(plan: Probed): string {
  return uriWithCertificates(probeUri(plan), exportCertificates(plan));
}

/**
 * Addresses the kernel lets through: the clients, and the host itself, which must see its own export answer
 * before it may be called serving.
 */
export function allowedAddresses(
  plan: Pick<ExportPlan, "listenAddress" | "clients" | "ownAddress">,
): string[] {
  const itself =
    isAnyAddress(plan.listenAddress) || isLoopback(plan.listenAddress) ? "localhost" : plan.listenAddress;
  const all = [...plan.clients, itself, ...(plan.ownAddress === undefined ? [] : [plan.ownAddress])];
  // As systemd shows them: what it shows beside them is from elsewhere.
  return [...new Set(all.map((one) => (one === "localhost" ? one : canonicalNetwork(one))))];
}

/** What the unit has for the thing that it serves. */
interface Subject {
  /** For people. */
  readonly name: string;
  /** Without it the unit does not run, and with it it starts. */
  readonly needs: readonly Directive[];
  readonly unit: string | undefined;
  /** Whom the server runs as, and what it sees. */
  readonly rights: readonly Directive[];
  readonly protectHome: string;
  readonly own: readonly Directive[];
}

function deviceSubject({
  device,
  readOnly,
}: {
  readonly device: string;
  readonly readOnly: boolean;
}): Subject {
  const unit = literal(deviceUnit(device));
  return {
    name: device,
    needs: [["Requires", unit]],
    unit,
    rights: [
      ["DynamicUser", "yes"],
      ["SupplementaryGroups", "disk"],
      ["DevicePolicy", "closed"],
      ["DeviceAllow", `${literal(device)} ${readOnly ? "r" : "rw"}`],
    ],
    protectHome: "yes",
    own: [["Device", device]],
  };
}

/** What a server needs of the host beside the image: programs and libraries. `-`: where it is there. */
const programPaths =
  "/usr -/bin -/sbin -/lib -/lib32 -/lib64 -/etc/ld.so.cache -/run/systemd/journal/dev-log";

/** Where distributions say which ciphers are allowed: GnuTLS of Fedora's and its like does not go without. */
const tlsPaths = "-/etc/crypto-policies -/etc/gnutls";

/**
 * The image stays root's alone, so the server runs as root: without any capability, and in a file system in which there is
 * nothing else of the host but programs. A root without capabilities owns, and reads, whatever is root's.
 */
function imageSubject(plan: ExportTerms & { readonly file: string; readonly format: string }): Subject {
  const path = plan.realPath ?? plan.file;
  const unit = plan.mountPoint && literal(pathUnit(plan.mountPoint, "mount"));
  const nbdServer = plan.server === "nbd-server";
  return {
    name: plan.file,
    // Also BindsTo: a file system that is unmounted would stay in use here, unseen.
    needs: [["RequiresMountsFor", quotedPath(folderOf(path))], ...(unit ? [["BindsTo", unit] as const] : [])],
    unit,
    rights: [
      // There it is root in name only, of root's files alone. A low port cannot be bound from there.
      ...(plan.port < 1024 ? [] : [["PrivateUsers", "yes"] as const]),
      // Before the server, outside of its root, with the rights to look everywhere. Whoever could change a folder on the way could
      // have put a link to any file of root's in the image's place.
      ["ExecStartPre", `+${execLine(["/bin/sh", "-c", imageGuard, path, plan.format])}`],
      ["RootDirectoryStartOnly", "yes"],
      ["PrivateDevices", "yes"],
      ["DevicePolicy", "closed"],
      // An empty folder, in which only what is bound appears.
      ["RootDirectory", "%t/%N"],
      ["RuntimeDirectory", "%N"],
      ["MountAPIVFS", "yes"],
      ["BindReadOnlyPaths", programPaths],
      ...(plan.tls === undefined ? [] : [["BindReadOnlyPaths", tlsPaths] as const]),
      ["BindReadOnlyPaths", quotedPath(path)],
      ...(nbdServer ? [["BindReadOnlyPaths", quotedPath(exportConfigPath(plan.exportName))] as const] : []),
    ],
    protectHome: "tmpfs",
    own: [
      ["File", plan.file],
      ["RealPath", path],
      ["Format", plan.format],
    ],
  };
}

/**
 * The unit's text. The same plan always gives the same text, so that an edit by hand shows. `elsewhere`: it may start at boot though nobody
 * has seen that the host's kernel enforces its clients.
 */
export function renderExportUnit(plan: ExportPlan, elsewhere = false): string {
  const subject = "file" in plan ? imageSubject(plan) : deviceSubject(plan);
  const also = subject.unit === undefined ? "" : ` ${subject.unit}`;
  const low = plan.port < 1024 ? "CAP_NET_BIND_SERVICE" : "";
  return renderUnit({
    Unit: [
      ["Description", literal(`lvm-nbd: export ${plan.exportName} of ${subject.name}`)],
      ...subject.needs,
      ["After", `network-online.target${also}`],
      ["Wants", "network-online.target"],
      ["StartLimitIntervalSec", "0"],
    ],
    Service: [
      ...start(plan),
      ["Restart", "always"],
      ["RestartSec", "2"],
      // On TERM nbdkit waits for its clients to leave. What a server has acknowledged lies with the kernel
      // already, so nothing is lost when it is ended at once.
      ["KillSignal", "SIGKILL"],
      ["SuccessExitStatus", "SIGKILL"],
      ["TimeoutStopSec", "10"],
      ["IPAddressDeny", "any"],
      ["IPAddressAllow", allowedAddresses(plan).join(" ")],
      ...credentials(plan),
      ...subject.rights,
      ["CapabilityBoundingSet", low],
      ["AmbientCapabilities", low],
      ["NoNewPrivileges", "yes"],
      ["ProtectSystem", "strict"],
      ["ProtectHome", subject.protectHome],
      ["PrivateTmp", "yes"],
      ["ProtectProc", "invisible"],
      ["ProcSubset", "pid"],
      ["ProtectKernelTunables", "yes"],
      ["ProtectKernelModules", "yes"],
      ["ProtectKernelLogs", "yes"],
      ["ProtectControlGroups", "yes"],
      ["ProtectClock", "yes"],
      ["ProtectHostname", "yes"],
      ["LockPersonality", "yes"],
      ["MemoryDenyWriteExecute", "yes"],
      ["RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"],
      ["RestrictNamespaces", "yes"],
      ["RestrictRealtime", "yes"],
      ["RestrictSUIDSGID", "yes"],
      ["RemoveIPC", "yes"],
      ["SystemCallArchitectures", "native"],
      ["SystemCallFilter", "@system-service"],
      ["SystemCallFilter", "~@privileged"],
      // The servers try calls they can do without (dropping rights they do not have, CPU affinity).
      ["SystemCallErrorNumber", "EPERM"],
      ["UMask", "0077"],
    ],
    // Also by the device or mount: one that appears later than systemd waits for it at boot starts the export then.
    Install: [["WantedBy", `multi-user.target${also}`]],
    [ownSection]: [
      ["Mark", ownerMark(plan.owner)],
      ...subject.own,
      ["ProbeUri", askedUri(plan)],
      ...(elsewhere ? [enforcedElsewhere] : []),
      ...(plan.tls === undefined
        ? []
        : ([
            ["Certificates", exportCertificates(plan) ?? ""],
            ["CertificatesDigest", plan.tls.digest],
          ] as const)),
      ["Plan", JSON.stringify(plan)],
    ],
  });
}

function credentials(plan: ExportPlan): Directive[] {
  const folder = exportCertificates(plan);
  if (folder === undefined) return [];
  return serverCredentials.map((name) => ["LoadCredential", literal(`${name}:${folder}/${name}`)]);
}

function start(plan: ExportPlan): Directive[] {
  const command = execLine(serverCommand(plan.server, serveOptions(plan), exportConfigPath(plan.exportName)));
  if (plan.server !== "nbd-server")
    return [
      ["Type", "exec"],
      ["ExecStart", command],
    ];
  return [
    ["Type", "forking"],
    ...("file" in plan ? [] : [["RuntimeDirectory", "%N"] as const]),
    ["ExecStart", `${command} -p %t/%N/pid`],
  ];
}

const enforcedElsewhere = ["ClientsEnforced", "elsewhere"] as const;

/** Whether the unit was written so. */
export function isEnforcedElsewhere(unitText: string): boolean {
  return ownDirective(unitText, enforcedElsewhere[0]) === enforcedElsewhere[1];
}

/** The mark in a unit of ours; `undefined` for a unit that is not. */
export function unitMark(unitText: string): string | undefined {
  return ownDirective(unitText, "Mark");
}
