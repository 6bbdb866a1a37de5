/**
 * The systemd unit of an attachment. Its process is the link: when the link dies the client ends, and systemd
 * connects again as soon as the export answers, unless somebody still holds the device.
 */
import { ownerMark } from "../core/owner.js";
import { attachCommand, nbdUri } from "./nbd.js";
import { execLine, literal, ownSection, renderUnit } from "./systemd.js";
import { certificatesFolder, type TlsRecord } from "./tls.js";
import { unitName } from "./unitName.js";

/** All that the unit is made from; it is kept in the unit itself, so that it can be read back. */
export interface AttachPlan {
  readonly owner: string;
  readonly name: string;
  readonly server: string;
  readonly port: number;
  readonly exportName: string;
  readonly device: string;
  readonly readOnly: boolean;
  readonly connections: number;
  readonly timeoutSeconds: number;
  readonly blockSize: number;
  readonly tls?: TlsRecord | undefined;
}

/** Where the certificates lie; `undefined` without TLS. */
export function attachCertificates(plan: Pick<AttachPlan, "name" | "tls">): string | undefined {
  return plan.tls && certificatesFolder(attachUnitName(plan.name), plan.tls);
}

export function attachUnitName(name: string): string {
  return unitName("attach", name);
}

/** Where the attachment's stable path lies. */
export function attachPath(name: string): string {
  return `/dev/lvm-nbd/${name}`;
}

/**
 * The device must be free: a link that died under a mounted file system is not replaced beneath it.
 */
const free = `modprobe nbd || exit 1; k=\${0##*/}; s=/sys/block/$k; [ -e $s ] || exit 0
[ ! -e $s/pid ] && [ "$(cat $s/size)" = 0 ] || { echo "$0 is in use"; exit 1; }
for h in $s/holders/* $s/$k*/holders/*; do [ ! -e "$h" ] || { echo "$0 is held by \${h##*/}"; exit 1; }; done
for d in $s/dev $s/$k*/dev; do [ -e $d ] || continue
grep -qs " $(cat $d) " /proc/[0-9]*/mountinfo && { echo "$0 is still mounted"; exit 1; }; done; exit 0`
  .replaceAll("continue\n", "continue; ")
  .replaceAll("\n", "; ");

/**
 * systemd waits for this even when the client has ended already: then it ends at once, and the next try is soon. The
 * kernel reads the partition table at the first opening: what is mounted after this unit finds its partition there. udev has it read
 * once more for each client that closed the disk before, and partitions are not there meanwhile: it comes to its end first.
 */
const link = `k=\${0##*/}; i=0; while [ "$(cat /sys/block/$k/size 2>/dev/null || echo 0)" = 0 ]; do
i=$((i+1)); [ $i -lt 300 ] && [ -e /proc/$2/status ] || exit 1; sleep 0.1; done; udevadm settle -t 3; : <"$0"
mkdir -p /dev/lvm-nbd && ln -sfn "$0" "$1"`
  .replaceAll("do\n", "do ")
  .replaceAll("\n", "; ");

/**
 * Cuts the link only if it is this unit's own: somebody else's behind the device is left alone. At shutdown
 * systemd stops services beside mounts: what is mounted gets 40 s to be unmounted first.
 */
const cut =
  `k=\${0##*/}; s=/sys/block/$k; [ "$1" ] && [ "$(cat $s/pid)" = "$1" ] || exit 0; i=0; while [ $i -lt 200 ]; do
m=; for d in $s/dev $s/$k*/dev; do [ ! -e $d ] || ! grep -qs " $(cat $d) " /proc/1/mountinfo || m=y; done
[ "$m" ] || break; i=$((i+1)); sleep 0.2; done; exec nbd-client -d "$0"`
    .replaceAll("do\n", "do ")
    .replaceAll("\n", "; ");

/** The unit's text. The same plan always gives the same text, so that an edit by hand shows. */
export function renderAttachUnit(plan: AttachPlan): string {
  const path = attachPath(plan.name);
  return renderUnit({
    Unit: [
      [
        "Description",
        literal(`lvm-nbd: ${nbdUri({ ...plan, tls: plan.tls !== undefined })} attached as ${path}`),
      ],
      ["After", "network-online.target"],
      // Network file systems on it are mounted after and unmounted before.
      ["Before", "remote-fs-pre.target"],
      ["Wants", "network-online.target remote-fs-pre.target"],
      ["StartLimitIntervalSec", "0"],
    ],
    Service: [
      ["Type", "exec"],
      ["ExecStartPre", execLine(["/bin/sh", "-c", free, plan.device])],
      [
        "ExecStart",
        execLine([
          ...attachCommand({ ...plan, certificates: attachCertificates(plan) }),
          ...["-nofork", "-nonetlink"],
        ]),
      ],
      ["ExecStartPost", `${execLine(["/bin/sh", "-c", link, plan.device, path])} $MAINPID`],
      ["ExecStop", `${execLine(["/bin/sh", "-c", cut, plan.device])} $MAINPID`],
      ["ExecStopPost", execLine(["/bin/rm", "-f", path])],
      ["Restart", "always"],
      ["RestartSec", "2"],
      ["TimeoutStartSec", "60"],
      ["TimeoutStopSec", "60"],
      ["NoNewPrivileges", "yes"],
      ["ProtectSystem", "yes"],
      ["ProtectHome", "yes"],
      ["UMask", "0077"],
    ],
    Install: [["WantedBy", "multi-user.target"]],
    [ownSection]: [
      ["Mark", ownerMark(plan.owner)],
      ["Device", plan.device],
      ...(plan.tls === undefined
        ? []
        : ([
            ["Certificates", attachCertificates(plan) ?? ""],
            ["CertificatesDigest", plan.tls.digest],
          ] as const)),
      ["Plan", JSON.stringify(plan)],
    ],
  });
}

/** Loads the module at boot. */
export const modulesLoad = { path: "/etc/modules-load.d/lvm-nbd.conf", text: "# Made by lvm-nbd.\nnbd\n" };

/**
 * Keeps udev's LVM, md and by-uuid rules off the NBD devices that a unit of ours names, and off no other: a guest's
 * volume groups on an attached disk must not be activated here, nor its file systems take the place of the host's
 * own by UUID. Must come before 60-persistent-storage.rules and 69-lvm.rules. Source: udev(7).
 */
export const udevRule = {
  path: "/etc/udev/rules.d/59-lvm-nbd.rules",
  text:
    "# Made by lvm-nbd: what lies on an attached disk is the guest's, not this host's.\n" +
    'SUBSYSTEM!="block", GOTO="lvm_nbd_end"\nKERNEL!="nbd*", GOTO="lvm_nbd_end"\n' +
    // Not connected: nothing to keep off.
    'ENV{DEVTYPE}=="disk", TEST!="pid", GOTO="lvm_nbd_end"\n' +
    `PROGRAM=="/bin/sh -c 'k=%k; grep -qsx Device=/dev/$\${k%%%%p*} /etc/systemd/system/lvm-nbd-attach-*.service'", ` +
    'ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1", ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1"\n' +
    'LABEL="lvm_nbd_end"\n',
};

/** Shell function `tidy FILE`: removes what all attachments share if FILE is the last unit of one. */
export const tidyFunction = `
tidy() {
  for tidy_unit in /etc/systemd/system/lvm-nbd-attach-*.service; do
    [ "$tidy_unit" = "$1" ] || [ ! -e "$tidy_unit" ] || return 0
  done
  rm -f ${udevRule.path} ${modulesLoad.path} || return 1
  rmdir /dev/lvm-nbd 2>/dev/null
  return 0
}
`;
