/**
 * Mount: the file system of an attachment, or of a partition of it, read-only at a path of the host, kept there by a
 * systemd mount unit.
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, parseOutput, refusal, succeed } from "../core/command.js";
import { firstLine, isLvmNbdError, type LvmNbdError } from "../core/errors.js";
import { OutputOf } from "../core/example.js";
import { hostScript, script } from "../core/hostCommands.js";
import { commonInputs, plainName, refusing, replaces } from "../core/inputs.js";
import { ownerMark } from "../core/owner.js";
import type { Change, Context, ResourceType } from "../core/resource.js";
import { serially } from "../core/serial.js";
import { attachUnitName } from "../linux/attachUnit.js";
import {
  type Content,
  contentPhrase,
  type Partition,
  parseContent,
  parsePartitions,
  partitionsFunction,
  partitionsPhrase,
} from "../linux/blkid.js";
import { unitMark } from "../linux/exportUnit.js";
import { emitFunctions, parseFields } from "../linux/fields.js";
import { alwaysOptions, kernelTypes, mountableTypes, readOnlyMount } from "../linux/fileSystems.js";
import { findPattern, parseHolders, usersScript } from "../linux/holders.js";
import { imageGuardFunctions } from "../linux/imageFile.js";
import { escapedMountPoint, fstabSources, type MountEntry, parseMountinfo } from "../linux/mountinfo.js";
import { type MountPlan, mountedDevice, mountUnitName, renderMountUnit } from "../linux/mountUnit.js";
import { missingFunction, missingPrograms } from "../linux/programs.js";
import { hasDropIns, parseShow, type UnitProperties } from "../linux/systemd.js";
import { changedMeanwhile, expectedMarks, unitFunctions } from "../linux/unitScript.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import { enable, lookAtUnit, readPlan, unitDrift, writtenMeanwhile } from "./unit.js";

const stablePath = "/dev/lvm-nbd/";

const inputs = z.strictObject({
  ...commonInputs,
  device: z
    .string()
    .refine(
      (device) =>
        /^\/dev\/nbd(0|[1-9]\d{0,2})$/.test(device) ||
        (device.startsWith(stablePath) && plainName.test(device.slice(stablePath.length))),
      'must be the `path` of an NbdAttachment, e.g. "/dev/lvm-nbd/vm1", or its device, e.g. "/dev/nbd0"',
    )
    .describe("The attached disk: the `path` of an NbdAttachment of this host.")
    .meta(replaces),
  partition: z
    .number()
    .int("must be a whole number")
    .min(1, "must be 1 or more")
    .max(256, "must be 256 or less")
    .optional()
    .describe("Number of the partition that holds the file system. Default: the whole disk is one.")
    .meta(replaces),
  path: z
    .string()
    .superRefine(refusing(pathProblem))
    .describe(
      "Where to mount it: an empty folder, or one that is made (and removed again at the end). Every folder above it must be root's, " +
        "and writable for nobody else.",
    )
    .meta(replaces),
});

function pathProblem(path: string): string | undefined {
  if (!path.startsWith("/") || path === "/")
    return 'must be an absolute path and not "/", e.g. "/mnt/vm1-backup"';
  if (/[\p{Cc}\\]/u.test(path)) return "must not hold control characters or backslashes";
  if (path.split("/").some((part, at) => at > 0 && ["", ".", ".."].includes(part)))
    return 'must hold no "." and "..", no "//" and no "/" at its end';
  // systemd cuts them off.
  if (path.trim() !== path) return "must not end with a blank";
  if (/^\/(dev|proc|sys)(\/|$)/.test(path)) return "must not be below /dev, /proc or /sys";
  return mountUnitName(path).length > 200 ? "is too long for the name of a systemd unit" : undefined;
}

const outputs = z.object({
  fileSystem: z
    .object({
      type: z.string().describe("E.g. `ext4`."),
      uuid: z.string().optional().describe("UUID of the file system; left out where it has none."),
      label: z.string().optional().describe("Label of the file system; left out where it has none."),
    })
    .describe("What is mounted: `type` (e.g. `ext4`), `uuid` and `label`."),
  options: z.string().describe("Options in effect, as the kernel lists them."),
  mountedDevice: z.string().describe("The device that is mounted, e.g. `/dev/nbd0p1`."),
  state: z
    .enum(["mounted", "unmounted", "degraded", "remounted", "replaced", "disabled", "edited"])
    .describe(
      "`mounted` (proven by a read of the device); `unmounted`; `degraded` (mounted, but its device cannot be read: the " +
        "attachment is detached or dead); `remounted` (with other options, e.g. writable); `replaced` (another device, or " +
        "another file system, is there); `disabled` (would not come back after a reboot); `edited` (its unit was changed by hand).",
    ),
});

type Inputs = z.infer<typeof inputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type MountDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type MountOutputs = State;

interface Observed {
  readonly mark: string | undefined;
  /** What our unit says it was made from; `undefined` if it is not ours or its record was spoiled. */
  readonly plan: MountPlan | undefined;
  readonly edited: boolean;
  /** It is mounted, but the unit's file was deleted. */
  readonly fileGone: boolean;
  readonly show: UnitProperties;
  /** False if a boot, or its attachment, would not mount it. */
  readonly wanted: boolean;
  /** What is mounted at the path, the topmost. */
  readonly mounted: MountEntry | undefined;
  /** The disk that the attachment's unit names now. */
  readonly disk: string | undefined;
  /** The attachment's unit runs, and the device can be read. */
  readonly readable: boolean;
  /** What is on the device; `undefined` if it cannot be read. */
  readonly content: Content | undefined;
}

/** A read through a dead link ends with the attachment's `timeoutSeconds`, 600 at most. */
const readSeconds = 660;

const observeScript = hostScript(
  "observe-mount",
  "observe",
  `${emitFunctions}${unitFunctions}
unit=$1 file=/etc/systemd/system/$1
if [ -e "$file" ] || [ -L "$file" ]; then emit_file unit "$file"; fi
if [ -L "$file" ]; then emit linked yes; fi
end=$(( $(date +%s) + 4 ))
while :; do
  show=$(systemctl show -p ActiveState -p UnitFileState -p NeedDaemonReload -p DropInPaths "$unit") || exit 1
  # On its way after its attachment: give it a moment before it counts as unmounted.
  case $show in *ActiveState=*activating*) [ "$(date +%s)" -lt "$end" ] || break; sleep 0.2;; *) break;; esac
done
emit show "$show"
outdated "$show"
emit_file mountinfo /proc/1/mountinfo
if [ -e "$file" ]; then
  for target in $(sed -n 's/^WantedBy=//p' "$file"); do
    [ -L "/etc/systemd/system/$target.wants/$unit" ] || emit unwanted "$target"
  done
  attachment=$(own Attachment "$file") device=$(own MountedDevice "$file")
  if [ -n "$attachment" ] && [ -e "/etc/systemd/system/$attachment" ]; then
    emit disk "$(own Device "/etc/systemd/system/$attachment")"
    emit attached "$(systemctl show -p ActiveState --value "$attachment")"
  fi
  if [ -n "$device" ] && [ -e "$device" ]; then
    emit_output read timeout 10 dd if="$device" of=/dev/null bs=4096 count=1 iflag=direct
    [ "$emit_rc" != 0 ] || emit_output content timeout 30 blkid -p -o udev "$device"
  fi
fi
emit end ""
`,
  ["unit"],
);

async function observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined> {
  const unit = mountUnitName(wanted.path);
  const command: RemoteCommand = {
    argv: script(observeScript, unit),
    kind: "read",
    deadlineSeconds: readSeconds,
  };
  const result = await lookAtUnit(context, command, unit);
  return parseOutput(context, command, result, (stdout) => readObservation(parseFields(stdout), wanted));
}

function readObservation(fields: ReadonlyMap<string, string>, wanted: Inputs | State): Observed | undefined {
  const mounted = mountsAt(fields, wanted.path).at(-1);
  const text = fields.get("unit");
  const fileGone = text === undefined;
  // Without a unit, only what this resource is known to have mounted is its own; all else is somebody's.
  if (fileGone && !(mounted && "mountedDevice" in wanted && mounted.source === wanted.mountedDevice))
    return undefined;
  const show = parseShow(required(fields, "show"));
  const plan = fileGone ? undefined : readPlan(text, planShape);
  const readable = fields.get("read.rc") === "0";
  return {
    mark: fileGone ? undefined : unitMark(text),
    plan,
    edited:
      plan === undefined ||
      fields.has("linked") ||
      renderMountUnit(plan) !== text ||
      (show.NeedDaemonReload === "yes" && !fields.has("outdated")) ||
      hasDropIns(show),
    fileGone,
    show,
    wanted: !fields.has("unwanted"),
    mounted,
    disk: fields.get("disk"),
    readable: readable && fields.get("attached") === "active",
    content: readable ? parseContent(required(fields, "content"), required(fields, "content.rc")) : undefined,
  };
}

function mountsAt(fields: ReadonlyMap<string, string>, path: string): MountEntry[] {
  return parseMountinfo(required(fields, "mountinfo")).filter(({ mountPoint }) => mountPoint === path);
}

function required(fields: ReadonlyMap<string, string>, name: string): string {
  const value = fields.get(name);
  if (value === undefined) throw new Error(`"${name}" is missing`);
  return value;
}

const planShape = z.strictObject({
  owner: z.string(),
  device: z.string(),
  partition: z.number().optional(),
  path: z.string(),
  attachment: z.string(),
  disk: z.string(),
  fileSystem: outputs.shape.fileSystem.strict(),
  kernelType: z.string(),
  options: z.array(z.string()),
  made: z.string().optional(),
});

function stateOf(seen: Observed): State["state"] {
  const { plan, mounted } = seen;
  if (mounted === undefined) return "unmounted";
  if (plan === undefined) return "edited";
  if (mounted.source !== mountedDevice(plan)) return "replaced";
  if (!isReadOnly(mounted)) return "remounted";
  if (!seen.readable) return "degraded";
  if (seen.disk !== plan.disk || !isSameFileSystem(seen.content, plan)) return "replaced";
  if (seen.edited) return "edited";
  return seen.show.UnitFileState === "enabled" && seen.wanted ? "mounted" : "disabled";
}

function isReadOnly({ options, superOptions }: MountEntry): boolean {
  return alwaysOptions.every((option) => options.includes(option)) && superOptions.includes("ro");
}

function isSameFileSystem(content: Content | undefined, { fileSystem }: MountPlan): boolean {
  return content?.type === fileSystem.type && content.uuid === fileSystem.uuid;
}

const preflightScript = hostScript(
  "preflight-mount",
  "observe",
  `${emitFunctions}${unitFunctions}${missingFunction}${partitionsFunction}${imageGuardFunctions}
unit=$1 path=$2 device=$3 attachment=$4 partition=$5 types=$6
cd /etc/systemd/system || exit 1
emit_missing blkid partx systemctl
emit mark "$(own Mark "$unit" 2>/dev/null)"
emit fragment "$(systemctl show -p FragmentPath --value "$unit")"
emit_file mountinfo /proc/1/mountinfo
if [ -e /etc/fstab ]; then emit_file fstab /etc/fstab; fi
there=$path made=
while [ ! -e "$there" ] && [ ! -L "$there" ]; do made=$there there=\${there%/*}; there=\${there:-/}; done
emit there "$there"
emit made "$made"
emit real "$(readlink -f "$there")"
# Whoever can change what is above could turn it to /etc, say, in the moment of the mount.
above=$there
[ -n "$made" ] || above=\${path%/*}
emit exposed "$(exposed "\${above:-/}")"
if [ -d "$there" ]; then emit folder ""; fi
if [ -z "$made" ] && [ -d "$path" ]; then emit files "$(ls -A "$path" | head -n 3)"; fi
emit release "$(uname -r)"
supported=
for type in $types; do
  { grep -qw "$type" /proc/filesystems || modprobe -n -q "$type"; } && supported="$supported $type"
done
emit supported "$supported"
btrfs=
for held in /sys/fs/btrfs/*/devices/*; do
  [ -e "$held" ] || continue
  held=\${held#/sys/fs/btrfs/}; btrfs="$btrfs \${held%%/*} /dev/\${held##*/}"
done
emit btrfs "$btrfs"
if [ -z "$attachment" ]; then attachment=$(grep -lsx "Device=$device" lvm-nbd-attach-*.service | head -n 1); fi
if [ -e "$attachment" ]; then
  emit attachment "$attachment"
  disk=$(own Device "$attachment")
  emit disk "$disk"
  emit attached "$(systemctl show -p ActiveState --value "$attachment")"
  emit_output read timeout 10 dd if="$disk" of=/dev/null bs=4096 count=1 iflag=direct
  if [ "$emit_rc" = 0 ]; then
    emit_output content timeout 60 blkid -p -o udev "$disk"
    emit_partitions "$disk"
    sys=/sys/class/block/\${disk##*/}p$partition
    if [ -n "$partition" ] && [ -e "$sys" ]; then emit node "$(cat "$sys/start") $(cat "$sys/size")"; fi
  fi
fi
emit end ""
`,
  ["unit", "path", "path", "unit?", "number?", "words"],
);

/**
 * Finds out before anything is changed what would make the mount fail. `ours`: the mount point has this resource's unit,
 * of which `made` is what the unit says it made.
 */
async function preflight(
  context: Context,
  wanted: Inputs,
  ours?: { readonly made: string | undefined },
): Promise<MountPlan> {
  const { device, partition, path, owner } = wanted;
  const unit = mountUnitName(path);
  const command: RemoteCommand = {
    argv: script(
      preflightScript,
      unit,
      path,
      device,
      device.startsWith(stablePath) ? attachUnitName(device.slice(stablePath.length)) : "",
      partition === undefined ? "" : String(partition),
      kernelTypes.join(" "),
    ),
    kind: "read",
    deadlineSeconds: readSeconds,
  };
  const result = await succeed(context, command, "the host could not be looked at");
  return parseOutputOrRefuse(context, command, result, (fields) => {
    const missing = missingPrograms(fields);
    if (missing !== undefined) throw refusal(context, "PROGRAM_MISSING", missing);
    const isOurs = ours !== undefined || fields.get("mark") === ownerMark(owner);
    refuseMountPoint(context, fields, wanted, isOurs);
    const disk = attachedDisk(context, fields, wanted);
    const content = mountedContent(context, fields, wanted, disk);
    const mount = readOnlyMount(content.type, required(fields, "release"));
    if (mount === undefined) throw unsuitable(context, wanted, disk, content);
    const target = mountedDevice({ disk, partition });
    if (!required(fields, "supported").split(" ").includes(mount.kernelType)) {
      throw refusal(
        context,
        "MODULE_MISSING",
        `${target} holds ${contentPhrase(content)}, and the host's kernel has no ${mount.kernelType}`,
        "Install the package of the kernel's modules that holds it, or mount it on another host.",
      );
    }
    refuseSecondBtrfs(context, fields, target, content);
    const { type, uuid, label } = content;
    return {
      owner,
      device,
      ...(partition === undefined ? {} : { partition }),
      path,
      attachment: required(fields, "attachment"),
      disk,
      fileSystem: {
        type,
        ...(uuid === undefined ? {} : { uuid }),
        ...(label === undefined ? {} : { label }),
      },
      ...mount,
      ...madeFolder(ours?.made || required(fields, "made")),
    };
  });
}

function madeFolder(made: string): { made?: string } {
  return made === "" ? {} : { made };
}

/** As `parseOutput`, for a reader that also refuses. */
function parseOutputOrRefuse<T>(
  context: Context,
  command: RemoteCommand,
  result: CommandResult,
  read: (fields: ReadonlyMap<string, string>) => T,
): T {
  const outcome = parseOutput(context, command, result, (stdout) => {
    try {
      return { value: read(parseFields(stdout)) };
    } catch (error) {
      if (isLvmNbdError(error)) return { error };
      throw error;
    }
  });
  if ("error" in outcome) throw outcome.error;
  return outcome.value;
}

function refuseMountPoint(
  context: Context,
  fields: ReadonlyMap<string, string>,
  { path }: Inputs,
  isOurs: boolean,
): void {
  const refuse = (message: string) => refusal(context, "MOUNT_POINT_UNSUITABLE", `path: ${message}`);
  const [source] = fstabSources(fields.get("fstab") ?? "", path);
  if (source !== undefined) throw refuse(`/etc/fstab mounts ${source} at ${path}`);
  const mounted = mountsAt(fields, path).at(-1);
  if (mounted !== undefined) {
    if (isOurs) return;
    throw refuse(`${mounted.source} (${mounted.type}) is mounted at ${path}`);
  }
  const fragment = required(fields, "fragment");
  const own = `/etc/systemd/system/${mountUnitName(path)}`;
  // One there without our mark is the reconciler's to judge.
  if (fragment !== "" && fragment !== own) throw refuse(`${fragment} mounts something at ${path}`);
  const there = required(fields, "there");
  const real = required(fields, "real");
  // systemd refuses such mount points.
  if (real !== there) throw refuse(`${there} is a symbolic link: give ${real}${path.slice(there.length)}`);
  if (!fields.has("folder")) throw refuse(`${there} is not a folder`);
  const exposed = required(fields, "exposed");
  if (exposed !== "")
    throw refuse(`${exposed} can be changed by others than root, who could turn the mount to another folder`);
  const files = (fields.get("files") ?? "").split("\n").filter((file) => file !== "");
  if (files.length > 0) throw refuse(`${path} is not empty: it holds ${files.join(", ")}`);
}

function attachedDisk(
  context: Context,
  fields: ReadonlyMap<string, string>,
  { device }: Pick<Inputs, "device">,
): string {
  const disk = fields.get("disk");
  if (disk === undefined || disk === "") {
    throw refusal(
      context,
      "DEVICE_NOT_FOUND",
      `device: no NbdAttachment has ${device} on the host`,
      "Give the `path` of an NbdAttachment of this host, or run `pulumi up --refresh`, which attaches it again.",
    );
  }
  if (fields.get("attached") !== "active" || fields.get("read.rc") !== "0") {
    throw refusal(
      context,
      "ATTACHMENT_DEAD",
      `device: ${device} cannot be read: ${fields.get("read") ?? ""}`,
    );
  }
  return disk;
}

/** What is to be mounted, if it is a file system. */
function mountedContent(
  context: Context,
  fields: ReadonlyMap<string, string>,
  wanted: Inputs,
  disk: string,
): Content & { readonly type: string } {
  const { device, partition } = wanted;
  const whole = parseContent(required(fields, "content"), required(fields, "content.rc"));
  const partitions =
    fields.get("partitions.rc") === "0" ? parsePartitions(required(fields, "partitions")) : undefined;
  if (partition === undefined) {
    if (!isMountable(whole)) throw unsuitable(context, wanted, disk, whole, partitions);
    return whole;
  }
  const found = partitions?.find(({ number }) => number === partition);
  if (found === undefined) {
    throw refusal(
      context,
      "PARTITION_NOT_FOUND",
      partitions === undefined
        ? `partition: ${device} has no partition table; the whole of it is ${contentPhrase(whole)}`
        : `partition: ${device} has no partition ${partition}; there are: ${partitionsPhrase(partitions)}`,
    );
  }
  if (!isMountable(found.content)) throw unsuitable(context, wanted, disk, found.content, partitions);
  const node = fields.get("node");
  if (node !== `${found.start} ${found.sectors}`) {
    throw refusal(
      context,
      "PARTITION_NOT_FOUND",
      `partition: the partition table of ${device} has partition ${partition}, but the host's kernel ${node === undefined ? "has no device of it" : "has it elsewhere"}`,
      "Put `options nbd max_part=15` into /etc/modprobe.d, detach all NBD devices and load the module anew " +
        "(`modprobe -r nbd; modprobe nbd`). If the table was written since the disk was attached, attach it anew.",
    );
  }
  return found.content;
}

function isMountable(content: Content): content is Content & { readonly type: string } {
  return (
    content.ambivalent === undefined && content.type !== undefined && mountableTypes.includes(content.type)
  );
}

const inGuest =
  "It is the guest's own and is never activated on a host. Mount a partition that holds a file system, or attach the disk to " +
  "a virtual machine and read it there; `guestmount` of libguestfs does so.";

const advices: Readonly<Record<string, string>> = {
  LVM2_member: inGuest,
  LVM1_member: inGuest,
  linux_raid_member: inGuest,
  crypto_LUKS:
    "Only the guest has its key: attach the disk to a virtual machine and open it there. Or mount a partition that is not encrypted.",
  swap: "There are no files in it. Mount a partition that holds a file system.",
};

function unsuitable(
  context: Context,
  { device, partition }: Inputs,
  disk: string,
  content: Content,
  partitions?: readonly Partition[],
): LvmNbdError {
  const what = partition === undefined ? device : `partition ${partition} of ${device}`;
  const others =
    partitions === undefined || partitions.length === 0
      ? ""
      : `; its partitions: ${partitionsPhrase(partitions)}`;
  const unmentioned = `A file system that is not listed in the documentation may write in spite of "ro": mount ${mountedDevice({ disk, partition })} by hand, or read it in a virtual machine.`;
  const advice =
    partition === undefined && content.type === undefined && partitions !== undefined && partitions.length > 0
      ? "Name the one to mount by `partition`."
      : content.type === undefined
        ? "Is it the right disk, and was it whole when it was snapshotted? Name a `partition` or `device` with a file system."
        : (advices[content.type] ?? unmentioned);
  return refusal(
    context,
    "NOT_MOUNTABLE",
    `${what} holds ${contentPhrase(content)}, which is not mounted${others}`,
    advice,
  );
}

/** The kernel takes devices of one UUID for one file system: what is mounted could change under its user. */
function refuseSecondBtrfs(
  context: Context,
  fields: ReadonlyMap<string, string>,
  target: string,
  { type, uuid }: Content,
): void {
  if (type !== "btrfs") return;
  const words = required(fields, "btrfs").trim().split(" ");
  const other = words.find((_, at) => words[at - 1] === uuid && words[at] !== target);
  if (other === undefined) return;
  throw refusal(
    context,
    "NOT_MOUNTABLE",
    `${target} holds the btrfs ${uuid}, of which ${other} is mounted on the host already`,
    "btrfs cannot tell two copies of a file system apart: mount it on another host, or unmount the other first.",
  );
}

/**
 * Shell functions, which need `unit`, `path`, `pattern`, `escaped` and `users`. `mounted`: the topmost source at the path.
 * `unmount SOURCE`: ends the script with 76 (users named on stdout) or 78 where that cannot be unmounted.
 */
const mountFunctions = `
mounted() {
  ESCAPED="$escaped" awk '$5 == ENVIRON["ESCAPED"] { for (i = 7; $i != "-"; i++); s = $(i + 2) } END { print s }' /proc/1/mountinfo
}
refuse_used() {
  held=$(sh -c "$users" sh "$path" "$pattern" "$escaped") || exit 1
  if [ -n "$held" ]; then printf '%s\\n' "$held"; exit 76; fi
}
unmount() {
  refuse_used
  said=$(systemctl stop "$unit" 2>&1)
  [ "$(mounted)" = "$1" ] || return 0
  refuse_used
  printf '%s\\n' "$said" >&2
  exit 78
}
`;

/**
 * Writes the unit (stdin) and mounts. Exit code 70: it could not be mounted. 75: something else is mounted there (named
 * on stdout). 76 and 78: as of `unmount`.
 */
const applyScript = hostScript(
  "apply-mount",
  "change",
  `${unitFunctions}${mountFunctions}
unit=$1 path=$2 pattern=$3 escaped=$4 users=$5 device=$6 current=$7 mark=$8 seen=$9; shift 9
bytes=$1 file=/etc/systemd/system/$unit
lock
guard "$file" "$mark" "$seen"
umask 022
rm -f "$file.new"
trap 'rm -f "$file.new"' EXIT
receive "$file.new" "$bytes" || exit 1
from=$(mounted)
if [ -n "$from" ] && [ "$from" = "$current" ]; then unmount "$from"; from=$(mounted); fi
if [ -n "$from" ] && [ "$from" != "$device" ]; then printf '%s\\n' "$from"; exit 75; fi
mv -fT "$file.new" "$file" && rm -rf "$file.d" && mkdir -p "$path" || exit 1
fail() { echo "$1" >&2; last_words "$unit" 10; exit 70; }
# enable reloads systemd's view of the units as well
systemctl enable --quiet "$unit" || fail "the unit could not be enabled"
# Of what is mounted systemd knows the device, and would wait for its unit, which does not come up.
[ -n "$from" ] || systemctl start "$unit" || fail "the unit did not start"
[ "$(mounted)" = "$device" ] || fail "what is mounted: $(mounted)"
exit 0
`,
);

/** What the scripts need to know of a path; see `mountFunctions`. */
function pathArguments(path: string): string[] {
  return [mountUnitName(path), path, findPattern(path), escapedMountPoint(path), usersScript];
}

/** `current`: the device that is to be unmounted first, if it is mounted. `seen`: what was there when it was looked at. */
async function apply(
  context: Context,
  plan: MountPlan,
  current: string | undefined,
  seen: Observed | undefined,
): Promise<void> {
  const text = renderMountUnit(plan);
  const command: RemoteCommand = {
    argv: script(
      applyScript,
      ...pathArguments(plan.path),
      mountedDevice(plan),
      current ?? "",
      ...expectedMarks(ownerMark(plan.owner), seen),
      String(Buffer.byteLength(text)),
    ),
    stdin: text,
    kind: "change",
    // The lock 120 s, unmounting and mounting 90 s each.
    deadlineSeconds: 400,
  };
  await change(
    context,
    plan.path,
    command,
    `${plan.fileSystem.type} of ${mountedDevice(plan)} could not be mounted`,
  );
}

/** Runs a script that mounts or unmounts. `failed`: what it could not do, for its exit code 70 and those that have no meaning. */
async function change(context: Context, path: string, command: RemoteCommand, failed: string): Promise<void> {
  const result = await serially(context.host, "mount", () => context.host.run(command, context.signal));
  switch (result.exitCode) {
    case 0:
      return;
    case changedMeanwhile:
      throw writtenMeanwhile(context, command, result);
    case 75:
      throw refusal(
        context,
        "MOUNT_POINT_UNSUITABLE",
        `path: ${result.stdout.trim()} is mounted at ${path}, which is not this resource's`,
      );
    case 76: {
      const users = parseOutput(context, command, result, parseHolders);
      throw refusal(context, "MOUNT_IN_USE", `${path} is in use: ${users.join(", ")}`);
    }
    case 78:
      throw failure(context, command, result, `${path} could not be unmounted`, "MOUNT_IN_USE");
    default:
      throw failure(
        context,
        command,
        result,
        failed,
        result.exitCode === 70 ? "MOUNT_FAILED" : "COMMAND_FAILED",
      );
  }
}

async function create(context: Context, wanted: Inputs): Promise<void> {
  const plan = await preflight(context, wanted);
  context.progress(`mounting ${plan.fileSystem.type} of ${mountedDevice(plan)} at ${plan.path}`);
  try {
    await apply(context, plan, undefined, undefined);
  } catch (error) {
    // What cannot be mounted is not left behind: each boot would try it on a host nobody looks at.
    if (isLvmNbdError(error, "MOUNT_FAILED", "COMMAND_FAILED")) {
      const what = { path: plan.path, device: mountedDevice(plan), made: plan.made };
      await takeDown(context, what, ownerMark(plan.owner)).catch((cleanup: unknown) => {
        context.warn(`what was not mounted could not be taken down again: ${firstLine(cleanup)}`);
      });
    }
    throw error;
  }
}

async function converge(context: Context, wanted: Inputs, seen: Observed, old?: State): Promise<void> {
  const { plan, mounted } = seen;
  const asDeclared = (["owner", "device", "partition"] as const).every(
    (property) => plan?.[property] === wanted[property],
  );
  const state = stateOf(seen);
  if (asDeclared && state === "mounted") return;
  if (asDeclared && state === "disabled")
    return enable(context, mountUnitName(wanted.path), ownerMark(wanted.owner));
  // An unmarked one that is adopted is looked at as if nothing were there.
  const isOurs = seen.mark !== undefined || seen.fileGone;
  const next = await preflight(context, wanted, isOurs ? { made: plan?.made } : undefined);
  const device = mountedDevice(next);
  const isRight =
    mounted?.source === device &&
    isReadOnly(mounted) &&
    (plan === undefined || isDeepStrictEqual(plan.fileSystem, next.fileSystem));
  const own = [plan && mountedDevice(plan), old?.mountedDevice, device];
  // What is right stays mounted while its unit is written; what somebody else mounted is not this resource's to unmount.
  const current = isRight || !own.includes(mounted?.source) ? undefined : mounted?.source;
  context.progress(
    isRight
      ? `writing the unit of ${wanted.path} as declared; it stays mounted`
      : `mounting ${next.fileSystem.type} of ${device} at ${wanted.path} (it was ${state})`,
  );
  await apply(context, next, current, seen);
}

/**
 * Removes the unit, and what it mounted. What somebody else mounted there since is left; exit code 75 if that hides this
 * resource's own. The unit's file goes last: until then what a cut leaves is found by its mark, and removed by the next run.
 */
const takeDownScript = hostScript(
  "take-down-mount",
  "change",
  `${unitFunctions}${mountFunctions}
unit=$1 path=$2 pattern=$3 escaped=$4 users=$5 device=$6 made=$7 seen=$8
file=/etc/systemd/system/$unit
lock
guard "$file" "$seen"
from=$(mounted)
if [ -n "$from" ] && [ "$from" = "$device" ]; then unmount "$from"
elif ESCAPED="$escaped" DEVICE="$device" awk '$5 == ENVIRON["ESCAPED"] { for (i = 7; $i != "-"; i++); if ($(i + 2) == ENVIRON["DEVICE"]) f = 1 } END { exit !f }' /proc/1/mountinfo; then
  printf '%s\\n' "$from"; exit 75
fi
if [ -e "$file" ]; then systemctl disable --quiet --no-reload "$unit" || exit 1; fi
if [ -n "$made" ]; then
  folder=$path
  while rmdir "$folder" 2>/dev/null && [ "$folder" != "$made" ]; do folder=\${folder%/*}; done
fi
rm -rf "$file.d" && rm -f "$file.new" "$file" && systemctl daemon-reload || exit 1
systemctl reset-failed "$unit" 2>/dev/null
exit 0
`,
);

/** `device`: what this resource mounted. `made`: the topmost folder it made. `mark`: what the unit's file carries, "" for none. */
async function takeDown(
  context: Context,
  { path, device, made }: { path: string; device: string; made: string | undefined },
  mark: string,
): Promise<void> {
  const command: RemoteCommand = {
    argv: script(takeDownScript, ...pathArguments(path), device, made ?? "", mark),
    kind: "change",
    deadlineSeconds: 300,
  };
  await change(context, path, command, `the unit ${mountUnitName(path)} could not be removed`);
}

function toState(declared: Inputs | State, seen: Observed): State {
  const { plan, mounted, content } = seen;
  const before = "mountedDevice" in declared ? declared : undefined;
  return {
    ...declared,
    ...(plan && { device: plan.device, partition: plan.partition }),
    fileSystem:
      content?.type === undefined
        ? (plan?.fileSystem ?? before?.fileSystem ?? { type: "unknown" })
        : { type: content.type, uuid: content.uuid, label: content.label },
    options: mounted === undefined ? (before?.options ?? plan?.options.join(",") ?? "") : optionsOf(mounted),
    mountedDevice: (plan && mountedDevice(plan)) ?? before?.mountedDevice ?? "",
    state: stateOf(seen),
  };
}

function optionsOf({ options, superOptions }: MountEntry): string {
  return [...new Set([...options, ...superOptions])].join(",");
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  for (const property of ["device", "partition", "path"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property])
      changes.push({ property, effect: "replace" });
  }
  if (unknown.has("owner") || wanted.owner !== state.owner)
    changes.push({ property: "owner", effect: "update" });
  if (state.state !== "mounted") changes.push({ property: "state", effect: "update" });
  return changes;
}

function drift(state: State, seen: Observed): string[] {
  const now = toState(state, seen);
  const lines = unitDrift(
    state,
    now,
    ["device", "partition", "mountedDevice"],
    "mounted",
    "mount it as declared",
  );
  const { mounted } = seen;
  if (mounted !== undefined && ["replaced", "remounted"].includes(now.state))
    lines.unshift(`${mounted.source} is mounted there (${mounted.type}, ${optionsOf(mounted)})`);
  const [before, after] = [state, now].map(({ fileSystem: { type, uuid, label } }) =>
    [type, uuid, label].join(" ").trim(),
  );
  return before === after ? lines : [`the device holds ${after}, it was ${before}`, ...lines];
}

/** What is mounted where, as the unit's record has it. */
async function declared(context: Context, { plan }: Observed): Promise<Partial<Inputs>> {
  if (plan === undefined)
    throw refusal(context, "INVALID_INPUT", "its unit has no record of what is mounted");
  const { device, partition, path } = plan;
  return { device, path, ...(partition === undefined ? {} : { partition }) };
}

/** The resource as the reconciler sees it. */
export const mount: ResourceType<Inputs, State, Observed> = {
  type: "Mount",
  description: "The file system of an attachment, or of a partition of it, read-only at a path of the host.",
  example: {
    vm1Disk: { type: "NbdAttachment", properties: { host: "server2", uri: "nbd://10.0.0.1/vm1" } },
    vm1: {
      type: "Mount",
      properties: {
        host: "server2",
        device: new OutputOf("vm1Disk", "path"),
        partition: 1,
        path: "/mnt/vm1",
      },
    },
  },
  inputs,
  outputs,
  validate: () => [],
  predict: () => ({}),
  id: (wanted, hostName) => `${hostName}${wanted.path}`,
  observe,
  isSame: (seen, state) => seen.mark === ownerMark(state.owner) || seen.fileGone,
  toState,
  diff,
  byId: { form: "MOUNT/POINT", place: (path) => ({ path: `/${path}` }), declared },
  // One path may lie below the other, and the attachment cannot be made anew while it is mounted.
  collides: () => true,
  async suitable(context, wanted) {
    await preflight(context, wanted);
  },
  create,
  converge,
  async remove(context, state, seen) {
    const { path } = state;
    const device = seen.plan ? mountedDevice(seen.plan) : state.mountedDevice;
    context.progress(`unmounting ${path}`);
    await takeDown(context, { path, device, made: seen.plan?.made }, seen.mark ?? "");
  },
  drift,
};
