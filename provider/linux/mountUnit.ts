/**
 * The systemd unit of a mount. It is bound to its attachment's unit: when the link dies the file system is unmounted, as
 * soon as nobody uses it, so that the attachment can connect again, and mounted again when it has.
 */
import { ownerMark } from "../core/owner.js";
import { literal, ownSection, pathUnit, renderUnit } from "./systemd.js";

/** All that the unit is made from; it is kept in the unit itself, so that it can be read back. */
export interface MountPlan {
  readonly owner: string;
  readonly device: string;
  readonly partition?: number | undefined;
  readonly path: string;
  /** Unit of the attachment. */
  readonly attachment: string;
  /** The attached disk, `/dev/nbdN`. */
  readonly disk: string;
  readonly fileSystem: {
    readonly type: string;
    readonly uuid?: string | undefined;
    readonly label?: string | undefined;
  };
  readonly kernelType: string;
  readonly options: readonly string[];
  /** The topmost folder that was made for the mount point; `undefined` if it was all there. */
  readonly made?: string | undefined;
}

export function mountUnitName(path: string): string {
  return pathUnit(path, "mount");
}

/**
 * The device that is mounted. A partition is the kernel's own: it is as read-only as its disk, its major number and name
 * keep it under the udev rule of attached disks and under the look for holders. A loop device at its offset would be
 * none of that: udev would make by-uuid links of what is on it, and activate a guest's volume groups.
 */
export function mountedDevice({ disk, partition }: Pick<MountPlan, "disk" | "partition">): string {
  return partition === undefined ? disk : `${disk}p${partition}`;
}

/** The unit's text. The same plan always gives the same text, so that an edit by hand shows. */
export function renderMountUnit(plan: MountPlan): string {
  const device = mountedDevice(plan);
  return renderUnit({
    Unit: [
      ["Description", literal(`lvm-nbd: ${plan.fileSystem.type} of ${device}, read-only`)],
      ["After", literal(plan.attachment)],
      ["BindsTo", literal(plan.attachment)],
    ],
    Mount: [
      // systemd would wait for the device's unit, which never comes up: the udev rule of attached disks makes
      // SYSTEMD_READY=0 of partitions and of disks at boot. By this name of it, systemd sees no device.
      ["What", `/proc/1/root${device}`],
      ["Where", literal(plan.path)],
      ["Type", plan.kernelType],
      // _netdev and nofail: the boot waits for neither, and no target before the network does.
      ["Options", [...plan.options, "_netdev", "nofail"].join(",")],
      ["TimeoutSec", "90"],
    ],
    // Also by the attachment: when its link comes back, the mount does.
    Install: [["WantedBy", `multi-user.target ${literal(plan.attachment)}`]],
    [ownSection]: [
      ["Mark", ownerMark(plan.owner)],
      ["Attachment", plan.attachment],
      ["MountedDevice", device],
      ["Plan", JSON.stringify(plan)],
    ],
  });
}
