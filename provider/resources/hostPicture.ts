/**
 * The picture of a host: its volumes, exports and attachments by ONE command, for all resources that only want to know how it is. What
 * it does not tell is looked at by itself.
 */
import { isLvmNbdError } from "../core/errors.js";
import { hostScript, script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import { lvsCommand } from "../linux/lvm.js";
import { unitFunctions } from "../linux/unitScript.js";
import { quoteAll } from "../ssh/quoting.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import { lookAtAttachmentFunction } from "./attachmentLook.js";
import { lookAtExportFunctions } from "./exportLook.js";

/** Seconds after which no further unit is looked at: each of those that do not answer takes as long as it may. */
const lookingSeconds = 8;
/** One that took longer is too old for nearly all who come after it, who would wait for the next one as long. */
const slowSeconds = 10;
/** How long a host is not asked for another one then, or after one that timed out. */
const withoutSeconds = 600;

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
if seen=$(timeout -k 5 30 ${quoteAll(lvsCommand())}); then emit volumes "$seen"; fi
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

/** There is no such unit: neither its file, nor does it run. */
export const absent = "absent";

type Fields = ReadonlyMap<string, string>;

const pictures = new WeakMap<CommandResult, Fields | undefined>();
/** Until when a host is not asked for one. */
const without = new WeakMap<object, number>();

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
  const asked = performance.now();
  let picture: Fields | undefined;
  try {
    picture = read(await host.run(command, context.signal));
  } catch (error) {
    if (!isLvmNbdError(error, ...partial)) throw error;
  }
  const now = performance.now();
  if (now - asked > slowSeconds * 1000) without.set(host, now + withoutSeconds * 1000);
  else if (picture === undefined) without.set(host, now + oldestSeconds * 1000);
  return picture;
}

function read(result: CommandResult): Fields | undefined {
  if (!pictures.has(result))
    pictures.set(result, result.exitCode === 0 ? fieldsOf(result.stdout) : undefined);
  return pictures.get(result);
}

function fieldsOf(stdout: string): Fields | undefined {
  try {
    const fields = parseFields(stdout);
    return namesAll(fields.get("units")?.split("\n") ?? []) ? fields : undefined;
  } catch {
    // As what is missing in it: each look by itself tells what it cannot read.
    return undefined;
  }
}

/**
 * Whether what is not among them is not there: a program that was killed or is missing leaves some out, systemctl lists nothing
 * in a chroot, and one that lists in another way than is asked for names nothing.
 */
function namesAll(units: readonly string[]): boolean {
  const isKnown = (unit: string) => /^(?:lvm-nbd-.*|-\.slice|end)$/.test(unit);
  return units.includes("end") && units.includes("-.slice") && units.every(isKnown);
}

/** What the unit's own look would print, `absent`, or `undefined` where it is to be looked at by itself. */
export async function picturedUnit(context: Context, unit: string): Promise<string | undefined> {
  const picture = await pictureOf(context);
  const units = picture?.get("units");
  if (picture === undefined || units === undefined) return undefined;
  if (!units.split("\n").includes(unit)) return absent;
  const block = picture.get(unit);
  return block === undefined ? undefined : `${block}\nend =\n`;
}

/** What `lvs` printed. */
export async function picturedVolumes(context: Context): Promise<string | undefined> {
  return (await pictureOf(context))?.get("volumes");
}

/** The last argument of a look at a unit. */
export function purposeOf({ forRemoval }: Context): string[] {
  return forRemoval ? ["for-removal"] : [];
}
