/**
 * The picture of a host: its volumes, exports and attachments by ONE command, for all resources that only want to know how it is. What
 * it does not tell is looked at by itself.
 */
import { isLvmNbdError } from "../core/errors.js";
import { Gathering } from "../core/gathering.js";
import { hostScript, script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import { lvsCommand } from "../linux/lvm.js";
import { unitFunctions } from "../linux/unitScript.js";
import { quoteAll } from "../ssh/quoting.js";
import type { CommandResult, Host, RemoteCommand } from "../ssh/types.js";
import { lookAtAttachmentFunction } from "./attachmentLook.js";
import { lookAtExportFunctions } from "./exportLook.js";

/** Seconds after which no further unit is looked at: each of those that do not answer takes as long as it may. */
const lookingSeconds = 8;
/** One that took longer is too old for nearly all who come after it, who would wait for the next one as long. */
const slowSeconds = 10;
/** How long a host is not asked for another one then, or after one that timed out. */
const withoutSeconds = 600;
/** The same where one command for several units is not to be had, as by a sudo of an older version's. */
const pauseSeconds = 60;

/**
 * `volumes`: what `lvsCommand` prints. `units`: the names of all exports and attachments, also of those that run without a file, of the
 * root slice, which there always is, and `end`. By its name, what a unit's own look prints. Left out is what could not be told, or not in
 * time.
 */
const pictureScript = hostScript(
  "observe-host",
  "observe",
  `${emitFunctions}${unitFunctions}${lookAtExportFunctions}${lookAtAttachmentFunction}
end=$(( $(date +%s) + ${lookingSeconds} ))
cd /etc/systemd/system || exit 1
running=$(systemctl list-units --all --plain --no-legend --no-pager -- -.slice 'lvm-nbd-export-*.service' 'lvm-nbd-attach-*.service') || exit 1
# In a group of its own, which is ended here alone.
if seen=$(timeout -k 5 30 ${quoteAll(lvsCommand())}) &&
  # One line, as JSON may be: a thousand volumes are not to be kept encoded and decoded.
  seen=$(printf '%s' "$seen" | tr '\\n' ' '); then emit volumes "$seen"; fi
units=$({
  for file in /etc/systemd/system/lvm-nbd-export-*.service /etc/systemd/system/lvm-nbd-attach-*.service; do
    if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\\n' "\${file##*/}"; fi
  done
  printf '%s\\n' "$running" | cut -d ' ' -f 1 && echo end
} | sort -u)
emit units "$units"
printf '%s\\n' "$units" | while IFS= read -r unit; do
  [ "$(date +%s)" -lt "$end" ] || break
  name=\${unit%.service}
  # A name of other characters is written with "\\" in its unit's.
  case $unit in *[!A-Za-z0-9:_.-]*) continue;; esac
  case $unit in
  lvm-nbd-export-*) seen=$(look_at_export "$unit" "/etc/lvm-nbd/$name.conf" </dev/null) || continue;;
  lvm-nbd-attach-*) seen=$(look_at_attachment "$unit" "/dev/lvm-nbd/\${name#lvm-nbd-attach-}" </dev/null) || continue;;
  *) continue;;
  esac
  emit "$unit" "$seen"
done
emit end ""
`,
  [],
);

/**
 * Arguments: `for-removal` or "", units. By its name, what a unit's own look prints; left out is what could not be told, or not in time.
 * systemd is asked for all of them at once. A block of what it shows is found by its `Id`, wherever in it that stands.
 */
const unitsScript = hostScript(
  "observe-units",
  "observe",
  `${emitFunctions}${unitFunctions}${lookAtExportFunctions}${lookAtAttachmentFunction}
purpose=$1; shift
end=$(( $(date +%s) + ${lookingSeconds} ))
line='
'
all=$(systemctl show -p Id -p LoadState -p ActiveState -p NeedDaemonReload -p DropInPaths -p MainPID -p IPAddressAllow -p IPAddressDeny -- "$@" system.slice -.slice) || exit 1
all="$line$line$all$line"
block_of() {
  block_end=\${all#*"\${line}Id=$1$line"}
  [ "$block_end" != "$all" ] || return 1
  block=\${all%%"\${line}Id=$1$line"*}
  case $block in *"$line") block=;; *) block=\${block##*"$line$line"}$line;; esac
  case $block_end in "$line"*) ;; *) block=$block\${block_end%%"$line$line"*};; esac
}
block_of system.slice && slice=$block && block_of -.slice || exit 1
above=$slice$line$line$block
show_with_slices() { block_of "$1" && shown=$block; }
show_at_first() { block_of "$1" && printf '%s\n' "$block"; }
for unit; do
  [ "$(date +%s)" -lt "$end" ] || break
  name=\${unit%.service}
  case $unit in *[!A-Za-z0-9:_.-]*) continue;; esac
  case $unit in
  lvm-nbd-export-*) seen=$(look_at_export "$unit" "/etc/lvm-nbd/$name.conf" $purpose </dev/null) || continue;;
  lvm-nbd-attach-*) seen=$(look_at_attachment "$unit" "/dev/lvm-nbd/\${name#lvm-nbd-attach-}" $purpose </dev/null) || continue;;
  *) continue;;
  esac
  emit "$unit" "$seen"
done
emit end ""
`,
  ["word?", "many:unit"],
);

/** There is no such unit: neither its file, nor does it run. */
export const absent = "absent";

type Fields = ReadonlyMap<string, string>;

const pictures = new WeakMap<CommandResult, Fields | undefined>();
/** Until when a host is not asked for one. */
const without = new WeakMap<Host, number>();

/** Codes of a look by one command that looks by themselves may do without. */
const partial = ["SUDO_DENIED", "COMMAND_TIMED_OUT", "OUTPUT_TOO_LARGE"] as const;

/** `undefined`: it is not to be had, or something is to be done, for which everything is looked at by itself. */
async function pictureOf(context: Context): Promise<Fields | undefined> {
  const { host, recentSeconds: oldestSeconds = 0 } = context;
  if (oldestSeconds === 0 || performance.now() < (without.get(host) ?? 0)) return undefined;
  // Of a host that does not tell which machine it is, nothing is kept: everyone would take a picture of his own.
  if ((await host.machineId(context.signal)) === undefined) return undefined;
  const command: RemoteCommand = {
    argv: script(pictureScript),
    kind: "read",
    deadlineSeconds: 120,
    maxOutputBytes: 64 * 1024 * 1024,
    shared: { oldestSeconds },
  };
  return fromMany(host, oldestSeconds, async () => read(await host.run(command, context.signal), namesAll));
}

/** Such a look's answer. `undefined`: it is not to be had. `pauses`: seconds for which the host is not asked for one then. */
async function fromMany<T>(
  host: Host,
  pauses: number,
  look: () => Promise<T | undefined>,
): Promise<T | undefined> {
  let answer: T | undefined;
  try {
    answer = await noticed(host, look);
  } catch (error) {
    if (!isLvmNbdError(error, ...partial)) throw error;
  }
  if (answer === undefined) pause(host, pauses);
  return answer;
}

/** Where it is slow, nobody else is to wait for the next one. */
async function noticed<T>(host: Host, look: () => Promise<T>): Promise<T> {
  const asked = performance.now();
  try {
    return await look();
  } finally {
    if (performance.now() - asked > slowSeconds * 1000) pause(host, withoutSeconds);
  }
}

function pause(host: Host, seconds: number): void {
  without.set(host, Math.max(without.get(host) ?? 0, performance.now() + seconds * 1000));
}

function read(result: CommandResult, isWhole: (fields: Fields) => boolean): Fields | undefined {
  if (!pictures.has(result))
    pictures.set(result, result.exitCode === 0 ? fieldsOf(result.stdout, isWhole) : undefined);
  return pictures.get(result);
}

function fieldsOf(stdout: string, isWhole: (fields: Fields) => boolean): Fields | undefined {
  try {
    const fields = parseFields(stdout);
    return isWhole(fields) ? fields : undefined;
  } catch {
    // As what is missing in it: each look by itself tells what it cannot read.
    return undefined;
  }
}

/**
 * Whether what is not among them is not there: a program that was killed or is missing leaves some out, systemctl lists nothing
 * in a chroot, and one that lists in another way than is asked for names nothing.
 */
function namesAll(fields: Fields): boolean {
  const units = fields.get("units")?.split("\n") ?? [];
  const isKnown = (unit: string) => /^(?:lvm-nbd-.*|-\.slice|end)$/.test(unit);
  return units.includes("end") && units.includes("-.slice") && units.every(isKnown);
}

/** Units that one command looks at. */
const mostUnits = 15;

const unitLooks = new Gathering<CommandResult | string>();

/**
 * What the unit's own look (`alone`) prints, or `absent`. A refresh or preview has it from the picture; who is to change something looks
 * after that was asked, together with others who do.
 */
export async function lookAmongOthers(
  context: Context,
  unit: string,
  alone: () => Promise<CommandResult>,
): Promise<CommandResult | string> {
  const told =
    (context.recentSeconds ?? 0) > 0
      ? await picturedUnit(context, unit)
      : await gatheredUnit(context, unit, alone);
  return told ?? alone();
}

async function gatheredUnit(
  context: Context,
  unit: string,
  alone: () => Promise<CommandResult>,
): Promise<CommandResult | string | undefined> {
  const { host, signal } = context;
  if (performance.now() < (without.get(host) ?? 0) || /[^A-Za-z0-9:_.-]/.test(unit)) return undefined;
  const [purpose = ""] = purposeOf(context);
  const looks = {
    most: mostUnits,
    alone: () => noticed(host, alone),
    together: (units: readonly string[], stop: AbortSignal) => lookAtUnits(host, purpose, units, stop),
  };
  return unitLooks.ask(host, `units ${purpose}`, unit, looks, signal);
}

async function lookAtUnits(
  host: Host,
  purpose: string,
  units: readonly string[],
  signal: AbortSignal,
): Promise<ReadonlyMap<string, string>> {
  const command: RemoteCommand = {
    argv: script(unitsScript, purpose, ...units),
    kind: "read",
    deadlineSeconds: 120,
  };
  const fields = await fromMany(host, pauseSeconds, async () =>
    read(await host.run(command, signal), () => true),
  );
  return new Map(
    units.flatMap((unit) => {
      const block = fields?.get(unit);
      return block === undefined ? [] : [[unit, endOf(block)] as const];
    }),
  );
}

/** As the unit's own look ends. */
function endOf(block: string): string {
  return `${block}\nend =\n`;
}

/** What the unit's own look would print, `absent`, or `undefined` where it is to be looked at by itself. */
async function picturedUnit(context: Context, unit: string): Promise<string | undefined> {
  const picture = await pictureOf(context);
  const units = picture?.get("units");
  if (picture === undefined || units === undefined) return undefined;
  if (!units.split("\n").includes(unit)) return absent;
  const block = picture.get(unit);
  return block === undefined ? undefined : endOf(block);
}

/** What `lvs` printed. */
export async function picturedVolumes(context: Context): Promise<string | undefined> {
  return (await pictureOf(context))?.get("volumes");
}

/** The last argument of a look at a unit. */
export function purposeOf({ forRemoval }: Context): string[] {
  return forRemoval ? ["for-removal"] : [];
}
