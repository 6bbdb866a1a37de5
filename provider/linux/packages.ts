/** Installing packages: apt-get(8), dnf(8), zypper(8), each without a question, and bounded. */
import { type HostScript, hostScript } from "../core/hostCommands.js";
import { emitFunctions } from "./fields.js";
import { openLock } from "./lockFile.js";
import type { PackageManager } from "./programs.js";

/** What a host says of its distribution (os-release(5)). */
export interface Distribution {
  /** For people, e.g. `Debian GNU/Linux 12 (bookworm)`. */
  readonly name: string;
  /** `undefined` for one whose packages are not known here. */
  readonly manager: PackageManager | undefined;
}

const kin: Readonly<Record<PackageManager, readonly string[]>> = {
  apt: ["debian", "ubuntu"],
  dnf: ["fedora", "rhel", "centos"],
  zypper: ["suse", "opensuse", "sles"],
};

export function parseOsRelease(text: string): Distribution {
  const values = new Map<string, string>();
  for (const line of text.split("\n")) {
    const [, key, value] = /^([A-Z_]+)=(.*)$/.exec(line.trim()) ?? [];
    if (key !== undefined && value !== undefined)
      values.set(key, value.replace(/^(["'])(.*)\1$/, "$2").replace(/\\(.)/g, "$1"));
  }
  const ids = [values.get("ID") ?? "", ...(values.get("ID_LIKE") ?? "").split(" ")];
  const family = (manager: PackageManager) =>
    kin[manager].some((name) => ids.some((id) => id === name || id.startsWith(`${name}-`)));
  return {
    name: values.get("PRETTY_NAME") ?? values.get("NAME") ?? "an unknown distribution",
    manager: (["apt", "dnf", "zypper"] as const).find(family),
  };
}

/** The command with which a person installs them. */
export function installCommand(manager: PackageManager, packages: readonly string[]): string {
  const program = { apt: "apt-get install", dnf: "dnf install", zypper: "zypper install" }[manager];
  return `${program} ${packages.join(" ")}`;
}

const aptGet =
  "apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 " +
  "-o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold";

/**
 * Reads the lists of packages anew, and says which versions there are. Arguments: packages. apt alone tells a candidate's
 * version without a network; a list that cannot be read anew is used as it is.
 */
export const candidatesScript = hostScript(
  "package-candidates",
  "setup",
  `${emitFunctions}
timeout 300 ${aptGet} update >/dev/null 2>&1 || emit stale ""
emit candidates "$(timeout 60 apt-cache policy "$@" 2>/dev/null)"
emit end ""
`,
);

/** Versions that `apt-cache policy` names as candidates, by package. */
export function parseCandidates(policy: string): ReadonlyMap<string, string> {
  const found = new Map<string, string>();
  let name = "";
  for (const line of policy.split("\n")) {
    name = /^(\S+):$/.exec(line)?.[1] ?? name;
    const version = /^ {2}Candidate: (\S+)$/.exec(line)?.[1];
    if (version !== undefined && version !== "(none)") found.set(name, version);
  }
  return found;
}

/** Upstream's version in a package's, e.g. `3.24` in `1:3.24-1.1`. */
export function upstreamVersion(packageVersion: string): string {
  return packageVersion.replace(/^\d+:/, "").replace(/[-+~].*$/, "");
}

/** True for a Debian package that was changed after its release: then what it mends does not show in its version. */
export function wasUpdated(packageVersion: string): boolean {
  return /\+deb\d+u\d|ubuntu[\d.]*\.\d|~bpo/.test(packageVersion);
}

/** Run by systemd, so that a lost link does not leave half a package. Arguments: packages. */
const installers: Readonly<Record<PackageManager, string>> = {
  // --no-remove: nothing that is there has to go. What a power failure cut short is ended first, as apt asks for; it is no failure
  // that another dpkg is at work, for which apt waits. Debian's nbd-server would start one of its own, on the port of our first export.
  apt: `
[ -z "$(ls /var/lib/dpkg/updates)" ] || dpkg --configure -a || :
for package; do
  [ "$package" != nbd-server ] || systemctl mask nbd-server.service || exit 1
done
exec ${aptGet} --no-install-recommends --no-remove install "$@"
`,
  dnf: `exec dnf -y -q --setopt=install_weak_deps=False install "$@"\n`,
  zypper: `exec zypper --non-interactive --quiet install --no-recommends "$@"\n`,
};

/** How long an installation may take. */
const installSeconds = 1200;

/** The deadline of `installScripts`: another one's end is waited for first. */
export const installDeadlineSeconds = 2 * installSeconds + 120;

/**
 * Installs packages. Arguments: record's path and text (what is being installed is noted first), packages. On failure the last lines
 * of the package manager are on stderr.
 */
export const installScripts: Readonly<Record<PackageManager, HostScript>> = {
  apt: installScript("apt"),
  dnf: installScript("dnf"),
  zypper: installScript("zypper"),
};

function installScript(manager: PackageManager): HostScript {
  return hostScript(
    `install-packages-${manager}`,
    "setup",
    `
record=$1 text=$2; shift 2
${openLock(9, "/run/lvm-nbd-packages.lock")} && flock -w ${installSeconds} 9 || { echo "packages are being installed for more than ${installSeconds} s" >&2; exit 1; }
unit=lvm-nbd-packages.service log=/run/lvm-nbd-packages.log
# One that a lost link left behind goes on by itself.
end=$(( $(date +%s) + ${installSeconds} ))
while systemctl is-active --quiet "$unit"; do
  [ "$(date +%s)" -lt "$end" ] || { echo "$unit runs for more than ${installSeconds} s" >&2; exit 1; }
  sleep 1
done
umask 022
rm -f "$log"
folder=\${record%/*}
[ ! -L "$folder" ] && mkdir -p "$folder" && rm -f "$record.new" && printf '%s\\n' "$text" >"$record.new" && sync "$record.new" && mv -fT "$record.new" "$record" || exit 1
systemd-run --quiet --wait --collect --unit="$unit" -p RuntimeMaxSec=${installSeconds} -p StandardOutput=file:"$log" -p StandardError=file:"$log" \\
  --setenv=LC_ALL=C --setenv=DEBIAN_FRONTEND=noninteractive --setenv=NEEDRESTART_MODE=l --setenv=UCF_FORCE_CONFFOLD=1 --setenv=ZYPP_LOCK_TIMEOUT=300 \\
  sh -c ${shellQuoted(installers[manager])} sh "$@" 9>&-
rc=$?
[ "$rc" = 0 ] || tail -n 15 "$log" >&2
rm -f "$log"
exit "$rc"
`,
  );
}

function shellQuoted(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
