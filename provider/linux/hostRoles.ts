/** What a host is used for, and the programs that our resources need there for it. */
import { copyPrograms } from "./copyJob.js";
import { deviceCopyPrograms } from "./deviceCopy.js";
import type { NbdServer } from "./nbd.js";

/**
 * `source`: its volumes are snapshotted, exported, and merged with their snapshots. `client`: exports are attached and mounted.
 * `destination`: copies are made and images restored there, in files or volumes.
 */
export const hostRoles = ["source", "client", "destination"] as const;
export type HostRole = (typeof hostRoles)[number];

/** The programs that a host of these roles needs, each once, sorted. `server`: what its exports are served by. */
export function programsOf(roles: readonly HostRole[], server: NbdServer): string[] {
  const programs: Readonly<Record<HostRole, readonly string[]>> = {
    source: [
      ...["lvs", "lvmconfig", server, "nbdinfo", "nbdcopy", "ss", "ip", "setpriv", "flock", "systemctl"],
      // An image of qcow2 is looked at before it is served.
      ...(server === "qemu-nbd" ? ["qemu-img"] : []),
    ],
    client: ["nbd-client", "nbdinfo", "flock", "udevadm", "blkid", "partx", "modprobe", "systemctl"],
    destination: [
      ...["lvs", "systemctl"],
      ...copyPrograms({ format: "qcow2", bandwidthLimit: 1 }),
      ...deviceCopyPrograms({ bandwidthLimit: 1 }),
    ],
  };
  return [...new Set(roles.flatMap((role) => programs[role]))].sort();
}

/** Whether NBD devices appear on a host of these roles: then it needs the module, and LVM must leave them alone. */
export function attaches(roles: readonly HostRole[]): boolean {
  return roles.includes("client");
}
