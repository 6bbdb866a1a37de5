/**
 * What the guest image is made of. Everything here goes into the image's cache key: a change builds a new
 * image. Pure data, no I/O.
 */

/** Raise it when the way of building changes in a manner that the contents below do not show. */
export const IMAGE_VERSION = 1;

/** The two guests and what tells them apart: same image, different MAC addresses and host keys. */
export const GUESTS = [
  { name: "server1", privateAddress: "10.77.0.1", macSuffix: "01" },
  { name: "server2", privateAddress: "10.77.0.2", macSuffix: "02" },
] as const;

/** One of the two guests. */
export type GuestName = (typeof GUESTS)[number]["name"];

/** MAC address of a guest's network card on the management (forwarded SSH) or the private network. */
export function macAddress(macSuffix: string, network: "management" | "private"): string {
  return `52:54:00:6c:${network === "management" ? "00" : "01"}:${macSuffix}`;
}

/** The ordinary user with passwordless sudo, and its password: a lab's, not a secret. */
export const OPERATOR = { user: "operator", password: "lab-operator" } as const;

/** Modules the kernel must have for the lab to be of any use. */
export const REQUIRED_MODULES = ["dm-snapshot", "dm-thin-pool", "nbd", "virtio_net"] as const;

/**
 * Modules the initial ram disk loads, with what they depend on (those built into the kernel are passed over), before it can mount
 * the root.
 */
export const INITRAMFS_MODULES = ["virtio_pci", "virtio_blk", "ext4"] as const;

/** Debian packages of the guest. Debian's cloud kernel has every module below and boots quickly. */
export const GUEST_PACKAGES = [
  "dbus",
  "dmeventd",
  "e2fsprogs",
  "fdisk",
  "fio",
  "iproute2",
  "iptables",
  "kmod",
  "kpartx",
  "libnbd-bin",
  "linux-image-cloud-amd64",
  "lvm2",
  "nbd-client",
  "nbd-server",
  "nbdkit",
  "openssh-server",
  "procps",
  "psmisc",
  "qemu-utils",
  "sudo",
  "systemd",
  "systemd-sysv",
  "thin-provisioning-tools",
  "udev",
  "util-linux",
  "xfsprogs",
] as const;

/** Their packages' scripts would start them, on ports and devices that are the tests'. */
const MASKED_UNITS = ["nbd-client.service", "nbd-server.service"];

/**
 * Units of no use here, as globs: removed, so that nothing runs behind a test's back, and that the many
 * `systemctl daemon-reload` of a run take half the time: each reads every unit that is loaded or masked. What LVM,
 * udev, mounts, the journal and a reboot use stays as Debian has it.
 */
const REMOVED_UNITS = [
  "*ask-password*",
  "*cryptsetup*",
  "*getty*",
  "*integritysetup*",
  "*veritysetup*",
  "apt-daily*",
  "autovt@*",
  "cryptdisks*",
  "dbus-org.freedesktop.login1.*",
  "dev-hugepages.mount",
  "dev-mqueue.mount",
  "dpkg-db-backup.*",
  "e2scrub*",
  "emergency.*",
  "first-boot-complete.*",
  "fstrim.*",
  "initrd*",
  "proc-sys-fs-binfmt_misc.*",
  "rc-local.*",
  "rescue*",
  "runlevel*",
  "sys-fs-fuse-connections.*",
  "sys-kernel-*",
  "syslog.*",
  "system-update*",
  "systemd-backlight@*",
  "systemd-binfmt.*",
  "systemd-firstboot.*",
  "systemd-fsck-root.*",
  "systemd-hibernate-resume*",
  "systemd-hwdb-update.*",
  "systemd-initctl.*",
  "systemd-logind.*",
  "systemd-machine-id-commit.*",
  "systemd-network-generator.*",
  "systemd-pcrphase*",
  "systemd-pstore.*",
  "systemd-quotacheck.*",
  "systemd-repart.*",
  "systemd-rfkill.*",
  "systemd-sysext.*",
  "systemd-tmpfiles-clean.*",
  "systemd-update-*",
  "x11-common.*",
];

/** Generators with nothing to generate here: each `systemctl daemon-reload` runs them all. */
const MASKED_GENERATORS = [
  "systemd-cryptsetup-generator",
  "systemd-debug-generator",
  "systemd-fstab-generator",
  "systemd-getty-generator",
  "systemd-gpt-auto-generator",
  "systemd-hibernate-resume-generator",
  "systemd-integritysetup-generator",
  "systemd-rc-local-generator",
  "systemd-run-generator",
  "systemd-system-update-generator",
  "systemd-sysv-generator",
  "systemd-veritysetup-generator",
];

/** Frames between the guests: each costs QEMU the same, so fewer and larger ones copy two to three times faster. */
const PRIVATE_MTU = 9000;

function networkFiles(): Record<string, string> {
  const files: Record<string, string> = {};
  for (const guest of GUESTS) {
    const networks = [
      { network: "management", link: "mgmt0", address: "10.0.2.15/24" },
      { network: "private", link: "private0", address: `${guest.privateAddress}/24` },
    ] as const;
    for (const { network, link, address } of networks) {
      const mac = macAddress(guest.macSuffix, network);
      const base = `etc/systemd/network/10-${guest.name}-${network}`;
      files[`${base}.link`] = `[Match]\nMACAddress=${mac}\n\n[Link]\nName=${link}\n`;
      // IgnoreCarrierLoss: a cut link keeps its address, as a cable cut two switches away would.
      files[`${base}.network`] = [
        `[Match]\nMACAddress=${mac}\n`,
        ...(network === "private" ? [`[Link]\nMTUBytes=${PRIVATE_MTU}\n`] : []),
        `[Network]\nAddress=${address}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\nIgnoreCarrierLoss=yes\n`,
      ].join("\n");
    }
  }
  return files;
}

/** Files laid over the root file system, by path. */
export const GUEST_FILES: Readonly<Record<string, string>> = {
  ...networkFiles(),
  "etc/hosts": [
    "127.0.0.1 localhost",
    "::1 localhost",
    ...GUESTS.map((guest) => `${guest.privateAddress} ${guest.name}`),
    "",
  ].join("\n"),
  "etc/fstab": "",
  "etc/resolv.conf": "",
  "etc/hostname": "lab\n",
  "etc/default/locale": "LANG=C.UTF-8\n",
  "etc/sudoers.d/operator": `${OPERATOR.user} ALL=(ALL) NOPASSWD:ALL\n`,
  // A PAM session costs as much as all else of a sudo: two lines in the journal and a look at limits, each time.
  "etc/sudoers.d/lab": "Defaults !pam_session, !pam_setcred\n",
  "etc/ssh/sshd_config.d/lab.conf": "PasswordAuthentication yes\nUseDNS no\nUsePAM no\nPrintLastLog no\n",
  // Each guest its own host key, from the one image: %H is the host name the kernel command line gives.
  "etc/systemd/system/ssh.service.d/lab.conf":
    "[Unit]\nAfter=systemd-networkd.service\n[Service]\nExecStartPre=\nExecStart=\nExecStart=/usr/sbin/sshd -D -h /etc/ssh/lab/%H\n",
  "etc/systemd/system/systemd-networkd-wait-online.service.d/lab.conf":
    "[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-networkd-wait-online --interface=private0 --timeout=60\n",
  "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\nRuntimeMaxUse=32M\n",
  "etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultTimeoutStartSec=90s\nDefaultTimeoutStopSec=30s\n",
};

/** Runs inside the new root file system, after the packages are in and the files above are laid over it. */
export const SETUP_SCRIPT = `#!/bin/sh
set -eu
chmod 0440 /etc/sudoers.d/operator /etc/sudoers.d/lab
chmod 0700 /root/.ssh /etc/ssh/lab
chmod 0600 /root/.ssh/authorized_keys /etc/ssh/lab/*
rm -f /etc/ssh/ssh_host_*
useradd --create-home --gid users --shell /bin/bash ${OPERATOR.user}
echo '${OPERATOR.user}:${OPERATOR.password}' | chpasswd
install -d -m 0700 -o ${OPERATOR.user} -g users /home/${OPERATOR.user}/.ssh
install -m 0600 -o ${OPERATOR.user} -g users /root/.ssh/authorized_keys /home/${OPERATOR.user}/.ssh/authorized_keys
systemctl enable ssh.service systemd-networkd.service systemd-networkd-wait-online.service
systemctl disable systemd-networkd.socket 2>/dev/null || true
systemctl set-default multi-user.target
systemctl add-wants multi-user.target network-online.target
systemctl mask ${MASKED_UNITS.join(" ")}
find /usr/lib/systemd/system /etc/systemd/system -depth \\( ${REMOVED_UNITS.map((glob) => `-name '${glob}'`).join(" -o ")} \\) -exec rm -rf {} +
mkdir -p /etc/systemd/system-generators
for generator in ${MASKED_GENERATORS.join(" ")}; do
  ln -s /dev/null "/etc/systemd/system-generators/$generator"
done
: > /etc/machine-id
rm -rf /boot/initrd.img-* /var/cache/apt/* /var/lib/apt/lists/* /var/log/*.log /usr/share/doc /usr/share/man
`;

/** The initial ram disk's /init: loads the modules in /modules.list, mounts the root, hands over to systemd. */
export const INITRAMFS_INIT = `#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do
  busybox insmod "/modules/$module" || echo "lab: cannot load $module"
done < /modules.list
tries=0
while [ ! -b /dev/vda ]; do
  tries=$((tries + 1))
  if [ $tries -gt 300 ]; then echo "lab: no root disk"; busybox poweroff -f; fi
  busybox usleep 100000
done
busybox mount -t ext4 -o rw,noatime /dev/vda /root || { echo "lab: cannot mount the root"; busybox poweroff -f; }
busybox mount --move /proc /root/proc
busybox mount --move /sys /root/sys
busybox mount --move /dev /root/dev
exec busybox switch_root /root /lib/systemd/systemd
`;
