/** The systemd unit of an export: hardened, bound to one device, its clients enforced by the kernel. */
import { ownerMark } from "../core/owner.js";
import { isAnyAddress, isLoopback } from "./addresses.js";
import { type NbdServer, nbdServerConfig, nbdUri, serverCommand } from "./nbd.js";
import {
  type Directive,
  deviceUnit,
  execLine,
  literal,
  ownDirective,
  ownSection,
  renderUnit,
} from "./systemd.js";
import { unitName } from "./unitName.js";

/** All that the unit is made from; it is kept in the unit itself, so that it can be read back. */
export interface ExportPlan {
  readonly owner: string;
  readonly device: string;
  readonly exportName: string;
  readonly listenAddress: string;
  readonly port: number;
  readonly readOnly: boolean;
  readonly clients: readonly string[];
  readonly server: NbdServer;
  /** From where the host reaches the listen address, if not from that itself (a second address of a network). */
  readonly ownAddress?: string | undefined;
}

export function exportUnitName(exportName: string): string {
  return unitName("export", exportName);
}

/** Only nbd-server needs a file of its own. */
export function exportConfigPath(exportName: string): string {
  return `/etc/lvm-nbd/${exportUnitName(exportName).replace(/\.service$/, ".conf")}`;
}

export function exportConfig(plan: ExportPlan): string | undefined {
  return plan.server === "nbd-server" ? nbdServerConfig(plan) : undefined;
}

/** Where the host itself reaches the export to look at it. */
export function probeUri(plan: Pick<ExportPlan, "listenAddress" | "port" | "exportName">): string {
  const any = isAnyAddress(plan.listenAddress);
  const server = any ? (plan.listenAddress.includes(":") ? "::1" : "127.0.0.1") : plan.listenAddress;
  return nbdUri({ server, port: plan.port, exportName: plan.exportName });
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
  return [...new Set([...plan.clients, itself, ...(plan.ownAddress === undefined ? [] : [plan.ownAddress])])];
}

/** The unit's text. The same plan always gives the same text, so that an edit by hand shows. */
export function renderExportUnit(plan: ExportPlan): string {
  const device = deviceUnit(plan.device);
  const low = plan.port < 1024 ? "CAP_NET_BIND_SERVICE" : "";
  return renderUnit({
    Unit: [
      ["Description", literal(`lvm-nbd: export ${plan.exportName} of ${plan.device}`)],
      ["Requires", literal(device)],
      ["After", `network-online.target ${literal(device)}`],
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
      ["DynamicUser", "yes"],
      ["SupplementaryGroups", "disk"],
      ["DevicePolicy", "closed"],
      ["DeviceAllow", `${literal(plan.device)} ${plan.readOnly ? "r" : "rw"}`],
      ["CapabilityBoundingSet", low],
      ["AmbientCapabilities", low],
      ["NoNewPrivileges", "yes"],
      ["ProtectSystem", "strict"],
      ["ProtectHome", "yes"],
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
    // Also by the device: one that appears later than systemd waits for it at boot starts the export then.
    Install: [["WantedBy", `multi-user.target ${literal(device)}`]],
    [ownSection]: [
      ["Mark", ownerMark(plan.owner)],
      ["Device", plan.device],
      ["ProbeUri", probeUri(plan)],
      ["Plan", JSON.stringify(plan)],
    ],
  });
}

function start(plan: ExportPlan): Directive[] {
  const command = execLine(serverCommand(plan.server, plan, exportConfigPath(plan.exportName)));
  if (plan.server !== "nbd-server")
    return [
      ["Type", "exec"],
      ["ExecStart", command],
    ];
  return [
    ["Type", "forking"],
    ["RuntimeDirectory", "%N"],
    ["ExecStart", `${command} -p %t/%N/pid`],
  ];
}

/** The mark in a unit of ours; `undefined` for a unit that is not. */
export function unitMark(unitText: string): string | undefined {
  return ownDirective(unitText, "Mark");
}
