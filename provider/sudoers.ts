/**
 * sudoers(5) for a login that may run what this provider runs on a host, and nothing else; and what puts both there.
 * The commands are files of root's alone, named one by one.
 */
// Each names its commands when it is loaded.
import "./backup/listImages.js";
import "./core/registry.js";
import "./ssh/machineId.js";
import { type CommandClass, type HostCommand, hostCommands } from "./core/hostCommands.js";
import { commandPath, installation, tidyCommands } from "./ssh/keptCommands.js";
import { quote } from "./ssh/quoting.js";

/** What a login is for. `observe`: refresh, preview and drift detection, no change; `operate`: all resources; `setup`: HostSetup too. */
export type LoginRole = "observe" | "operate" | "setup";

const classes: Readonly<Record<LoginRole, readonly CommandClass[]>> = {
  observe: ["observe"],
  operate: ["observe", "change"],
  setup: ["observe", "change", "setup"],
};

/** All that may be asked for. */
export const loginRoles = Object.keys(classes) as readonly LoginRole[];

/** What the login may run. */
export function commandsOf(role: LoginRole): HostCommand[] {
  return hostCommands().filter((command) => classes[role].includes(command.class));
}

/** Why that cannot be a user in sudoers, if it cannot. */
export function userProblem(user: string): string | undefined {
  if (!/^%?[a-z_][a-z0-9_.-]*$/i.test(user)) {
    return `"${user}" is no name of a user (letters, digits, "_", "-", "."), nor "%" and that of a group`;
  }
  // For sudoers(5), ALL is everybody, a name of capitals an alias, and these begin another line.
  if (/^%?[A-Z][A-Z0-9_]*$|^Defaults$|^(Cmnd|Cmd|Host|Runas|User)_Alias$/.test(user))
    return `"${user}" would be no user, but what sudoers calls an alias`;
  return user === "root" ? "root needs no sudo" : undefined;
}

/** The file for /etc/sudoers.d. `version`: of this package. */
export function sudoers(user: string, role: LoginRole, version: string): string {
  const paths = commandsOf(role).map(commandPath);
  return `# What pulumi-lvm-nbd ${version} runs on this host as root, for ${user} (${role}). Made by \`lvm-nbd sudoers\`; see sudoers(5).
${user} ALL = (root) NOPASSWD: \\
${paths.map((path) => `    ${path}`).join(", \\\n")}
`;
}

/** A script for root's `sh` that puts commands and sudoers on a host. It changes nothing that sudo would not take. */
export function sudoersInstallation(user: string, role: LoginRole, version: string): string {
  const commands = commandsOf(role);
  // sudo passes over a file with a dot in its name.
  const file = `/etc/sudoers.d/lvm-nbd-${user.replaceAll(".", ",")}`;
  const database = user.startsWith("%") ? "group" : "passwd";
  return `#!/bin/sh
# Puts what pulumi-lvm-nbd ${version} runs as root on this host, and lets ${user} run that alone. Run it as root.
[ "$(id -u)" = 0 ] || { echo "run this as root" >&2; exit 1; }
getent ${database} ${quote(user.replace("%", ""))} >/dev/null || { echo ${quote(`there is no ${user} on this host`)} >&2; exit 1; }
command -v visudo >/dev/null || { echo "sudo is not installed" >&2; exit 1; }
${installation(commands)}
sudoers=${quote(file)}
rm -f "$sudoers.new"
(umask 0337; set -C; printf %s ${quote(sudoers(user, role, version))} >"$sudoers.new") && visudo -cqf "$sudoers.new" && mv -f "$sudoers.new" "$sudoers" ||
  { rm -f "$sudoers.new"; echo "$sudoers was not written" >&2; exit 1; }
${tidyCommands}echo ${quote(`${user} may now run ${commands.length} commands as root on`)} "$(uname -n): $sudoers, ${"$folder"}"
`;
}
