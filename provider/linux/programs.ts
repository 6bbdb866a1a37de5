/** Whether the programs that an operation needs are installed, and what to install where they are not. */

/** Whose packages a host has: Debian and its kin, Red Hat's kin, SUSE's. */
export const packageManagers = ["apt", "dnf", "zypper"] as const;
export type PackageManager = (typeof packageManagers)[number];

type Names = Readonly<Record<PackageManager, string>>;

const everywhere = (name: string): Names => ({ apt: name, dnf: name, zypper: name });
const utilLinux = everywhere("util-linux");
const libnbd: Names = { apt: "libnbd-bin", dnf: "libnbd", zypper: "libnbd" };
const iproute: Names = { apt: "iproute2", dnf: "iproute", zypper: "iproute2" };
/** openSUSE has moved QEMU's tools between packages: zypper takes the program for what is wanted. */
const qemu = (program: string): Names => ({
  apt: "qemu-utils",
  dnf: "qemu-img",
  zypper: `/usr/bin/${program}`,
});
const systemd = everywhere("systemd");

/** The package of each program. */
const packages = {
  nbdkit: everywhere("nbdkit"),
  "nbd-server": { apt: "nbd-server", dnf: "nbd", zypper: "nbd" },
  "nbd-client": { apt: "nbd-client", dnf: "nbd", zypper: "nbd" },
  "qemu-nbd": qemu("qemu-nbd"),
  "qemu-img": qemu("qemu-img"),
  nbdinfo: libnbd,
  nbdcopy: libnbd,
  lvs: everywhere("lvm2"),
  lvmconfig: everywhere("lvm2"),
  ss: iproute,
  ip: iproute,
  flock: utilLinux,
  setpriv: utilLinux,
  blkid: utilLinux,
  partx: utilLinux,
  findmnt: utilLinux,
  blockdev: utilLinux,
  sha256sum: everywhere("coreutils"),
  modprobe: everywhere("kmod"),
  udevadm: { apt: "udev", dnf: "systemd-udev", zypper: "udev" },
  systemctl: systemd,
  "systemd-run": systemd,
} as const satisfies Readonly<Record<string, Names>>;

/** A program whose package is known. */
export type Program = keyof typeof packages;

function isKnown(program: string): program is Program {
  return program in packages;
}

/** The packages of these programs, each once, in order. A program that is not known passes for its own package. */
export function packagesOf(programs: readonly string[], manager: PackageManager): string[] {
  return [
    ...new Set(programs.map((program) => (isKnown(program) ? packages[program][manager] : program))),
  ].sort();
}

/** All packages of that manager that a program of ours may come from. */
export function knownPackages(manager: PackageManager): string[] {
  return packagesOf(Object.keys(packages), manager);
}

/** Shell function for scripts with `emitFunctions`: `emit_missing PROGRAM...` prints those that are not there. */
export const missingFunction = `
emit_missing() {
  missing=
  for program in "$@"; do command -v "$program" >/dev/null || missing="$missing $program"; done
  emit missing "$missing"
}
`;

/** What `emit_missing` found. */
export function missingOf(fields: ReadonlyMap<string, string>): string[] {
  return (fields.get("missing") ?? "")
    .trim()
    .split(" ")
    .filter((program) => program !== "");
}

/** What `emit_missing` found, as a sentence with the packages; `undefined` when all are there. */
export function missingPrograms(fields: ReadonlyMap<string, string>): string | undefined {
  const missing = missingOf(fields);
  if (missing.length === 0) return undefined;
  return `not installed on the host: ${missing.map((program) => `${program}, from package ${packagePhrase(program)}`).join("; ")}`;
}

function packagePhrase(program: string): string {
  if (!isKnown(program)) return program;
  const { apt, dnf } = packages[program];
  return apt === dnf ? apt : `${apt} (Debian) or ${dnf} (RPM distributions)`;
}
