/**
 * Commands kept on a host, each as a program of its own that sudoers(5) can name, so that the login needs no other right.
 * Where one is kept it is used; where not, its text is sent.
 */
import { createHash } from "node:crypto";
import { certificatesPlace, type HostCommand, hostScript, script } from "../core/hostCommands.js";
import { quote, quoteAll } from "./quoting.js";

/** The folder of the kept commands: root's alone to write, everybody's to read. */
export const commandFolder = "/usr/local/libexec/lvm-nbd";

export const environment = [
  "LC_ALL=C",
  "LVM_SUPPRESS_FD_WARNINGS=1",
  "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
];

const paths = new WeakMap<HostCommand, string>();

/** The file of a command. Its name tells its content, so that each version of this provider finds its own. */
export function commandPath(command: HostCommand): string {
  let path = paths.get(command);
  if (path === undefined) {
    const id = createHash("sha256").update(commandFile(command)).digest("hex").slice(0, 12);
    path = `${commandFolder}/${command.name}-${id}`;
    paths.set(command, path);
  }
  return path;
}

/**
 * Shell function. `fits RULES ARGUMENT...`: the arguments are what the rules say, see `ArgumentRule`. A login that may run one command
 * can give it any argument: an option for a program of LVM's may write a file, one for rpm runs a program.
 */
const fitsFunction = `
is() {
  case $1 in *\\?) [ -n "$2" ] || return 0;; esac
  case $2 in *'
'*) return 1;; esac
  case \${1%\\?} in
  unit) case $2 in ''|-*|*/*|*[[:space:]]*) return 1;; esac;;
  run) case $2 in /run/lvm-nbd-?*) ;; *) return 1;; esac; case \${2#/run/} in */*) return 1;; esac;;
  record) case $2 in /etc/lvm-nbd/?*) ;; *) return 1;; esac; case \${2#/etc/lvm-nbd/} in */*|..) return 1;; esac;;
  path) case $2/ in */../*) return 1;; esac; case $2 in /*) ;; *) return 1;; esac;;
  word) case $2 in ''|-*|*[!A-Za-z0-9.+_/-]*) return 1;; esac;;
  words) case $2 in ''|-*|*' -'*|*[!A-Za-z0-9.+_/\\ -]*) return 1;; esac;;
  name) case $2 in ''|-*|*[!A-Za-z0-9.+_-]*) return 1;; esac;;
  uuid) case $2 in ''|-*|*[!A-Za-z0-9-]*) return 1;; esac;;
  tag) case $2 in ''|-*|*[!A-Za-z0-9_+./=!:\\&#-]*) return 1;; esac;;
  number) case $2 in ''|*[!0-9]*) return 1;; esac;;
  uri)
    case $2 in nbd://[A-Za-z0-9[]*|nbds://[A-Za-z0-9[]*) ;; *) return 1;; esac
    case \${2%"$certificates_in_uri"} in *[?\\#]*) return 1;; esac;;
  address) case $2 in ''|*[!0-9A-Fa-f.:]*) return 1;; esac;;
  filter) case $2 in '( sport = :'*' )') ;; *) return 1;; esac; set -- "\${2#'( sport = :'}"; case \${1%' )'} in ''|*[!0-9]*) return 1;; esac;;
  format) case $2 in raw|qcow2) ;; *) return 1;; esac;;
  mark) case $2 in lvm-nbd-?*) ;; *) return 1;; esac; case $2 in *[!a-z0-9-]*) return 1;; esac;;
  *) return 1;;
  esac
}
fits() {
  rules=$1; shift
  # No rule is a pattern for files.
  set -f
  for rule in $rules; do
    case $rule in
    many:*)
      for one; do is "\${rule#many:}" "$one" || return 1; done
      return 0;;
    certificates)
      is number "\${1-}" && [ "\${#1}" -le 2 ] || return 1
      left=$1; shift
      while [ "$left" -gt 0 ]; do
        case \${1-} in ''|-*|*[!a-z0-9.-]*) return 1;; esac
        shift; left=$((left-1))
      done;;
    *) [ $# -gt 0 ] && is "$rule" "$1" || return 1; shift;;
    esac
  done
  [ $# = 0 ]
}
`;

/** What is in it. Arguments: see `wireCommand`. Exit code 64: arguments that the provider never gives. */
export function commandFile({ name, argv, rules }: HostCommand): string {
  // A command that is given none would have its program look for that folder where the login is.
  const inUri = rules?.[0] === "certificates" ? `?tls-certificates=${certificatesPlace}` : "";
  const check =
    rules === undefined
      ? ""
      : `certificates_in_uri=${quote(inUri)}${fitsFunction}fits ${quote(rules.join(" "))} "$@" || exit 64\n`;
  return `#!/bin/sh
# lvm-nbd ${name}, run by sudo. Arguments: a mark, seconds to end in, seconds to run, those of the command.
export ${quoteAll(environment)} LVM_NBD_KEPT=yes
[ $# -ge 3 ] || exit 64
LVM_NBD_RUN=$1 grace=$2 deadline=$3
shift 3
export LVM_NBD_RUN
case $LVM_NBD_RUN in lvm-nbd-*[!a-z0-9-]*) exit 64;; lvm-nbd-?*) ;; *) exit 64;; esac
# timeout takes 0 for no end at all.
for seconds in "$grace" "$deadline"; do case $seconds in *[!0-9.]*) exit 64;; *[1-9]*) ;; *) exit 64;; esac; done
${check}echo "$LVM_NBD_RUN $$" >&2
exec timeout -k "$grace" "$deadline" ${quoteAll(argv)} "$@"
`;
}

/**
 * Ends a process group: TERM, and KILL for what is still there after the grace. Done when nothing is, or 2 s later (what
 * hangs in the kernel cannot be killed). `-s`, since dash takes no group after `kill -TERM --`. Arguments: the group, the
 * grace in fifths of a second, the mark of the command that it runs. As a kept command it ends only what runs under that, for
 * the same login.
 */
const stopScript = hostScript(
  "stop",
  "observe",
  `case $1 in ''|*[!0-9]*|0|1) exit 64;; esac
case $2 in ''|*[!0-9]*) exit 64;; esac
if [ -n "\${LVM_NBD_KEPT-}" ]; then
  group_of() { IFS= read -r stat <"$1" && set -- \${stat##*) } && echo "$3"; }
  mine=no
  for process in $(grep -lszFx "LVM_NBD_RUN=$3" /proc/[0-9]*/environ); do
    # Who may run some of these may not end those of another login.
    [ -z "\${SUDO_UID-}" ] || grep -qszFx "SUDO_UID=$SUDO_UID" "$process" || continue
    [ "$(group_of "\${process%/environ}/stat" 2>/dev/null)" != "$1" ] || mine=yes
  done
  [ "$mine" = yes ] || exit 0
fi
kill -s TERM -- "-$1" 2>/dev/null
i=0
while kill -s 0 -- "-$1" 2>/dev/null; do
  i=$((i+1))
  [ "$i" -le "$2" ] || kill -s KILL -- "-$1"
  [ "$i" -le "$(($2+10))" ] || exit 1
  sleep 0.2
done
`,
  ["number", "number", "mark"],
);

/**
 * `/bin/sh` that removes, after an `installation`, the commands that no login of ours may run any more: the chooser on a host takes
 * what is there for allowed, and an older version's may have a hole.
 */
export const tidyCommands = `for old in "$folder"/*; do
  [ ! -e "$old" ] || grep -rqsF -- "$old" /etc/sudoers /etc/sudoers.d || rm -f "$old"
done
`;

/** What ends a command's process group `pid`, which it told after its `mark`. */
export function stopArgv(pid: number, graceSeconds: number, mark: string): string[] {
  return script(stopScript, String(pid), String(Math.ceil(graceSeconds * 5)), mark);
}

/** `/bin/sh` that puts the commands on a host, as root, each written whole. */
export function installation(commands: readonly HostCommand[]): string {
  const put = commands.map((command) => `put ${quote(commandPath(command))} ${quote(commandFile(command))}`);
  return `umask 022
folder=${commandFolder}
mkdir -p "$folder" && chmod 0755 "$folder" || exit 1
above=$folder
while [ -n "$above" ]; do
  [ ! -L "$above" ] && [ -n "$(find "$above" -maxdepth 0 -uid 0 ! -perm /022)" ] ||
    { echo "$above can be changed by others than root, who would choose what sudo runs: put its owner and mode right" >&2; exit 1; }
  above=\${above%/*}
done
put() {
  rm -f "$1.new" && (set -C; printf %s "$2" >"$1.new") && chmod 0755 "$1.new" && mv -fT "$1.new" "$1" || exit 1
}
${put.join("\n")}
`;
}
