/** What the resources that look at logical volumes share. */
import { failure, parseOutput, refusal, succeed } from "../core/command.js";
import { LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { ownerOfRestore, type RestoreMark } from "../core/restoreMark.js";
import { serially } from "../core/serial.js";
import { holdersScript, parseHolders, serversScript } from "../linux/holders.js";
import { groupCommand } from "../linux/looks.js";
import { identified, type LogicalVolume, lvmFailure, lvsCommand, parseLvs } from "../linux/lvm.js";
import { mergePhase, ranFullAdvice, ranFullPhrase } from "../linux/merge.js";
import type { Host, HostArgs, RemoteCommand } from "../ssh/types.js";
import { picturedVolumes } from "./hostPicture.js";

export const observeSeconds = 60;

/** By what was printed. Those who share an answer share what it tells. */
const parsed = new WeakMap<Host, { readonly text: string; readonly all: readonly LogicalVolume[] }>();

/** All logical volumes of the context's host. */
export async function volumes(context: Context): Promise<readonly LogicalVolume[]> {
  const command: RemoteCommand = {
    argv: lvsCommand(),
    kind: "read",
    deadlineSeconds: observeSeconds,
    shared: { oldestSeconds: context.recentSeconds ?? 0 },
  };
  const what = "the logical volumes could not be listed";
  const answer =
    (await picturedVolumes(context)) ??
    (await succeed(context, command, what, (failed) => lvmFailure(failed.stderr)));
  const text = typeof answer === "string" ? answer : answer.stdout;
  const { host } = context;
  const last = parsed.get(host);
  if (last?.text === text) return last.all;
  const all = parseOutput(context, command, answer, parseLvs);
  parsed.set(host, { text, all });
  return all;
}

/** Also the time between TERM and KILL: an LVM command killed half-way leaves the origin suspended. */
export const changeSeconds = 120;
export const changing = {
  kind: "change",
  deadlineSeconds: changeSeconds,
  graceSeconds: changeSeconds,
} as const;

/** LVM locks the volume group for a change; those of one group wait for each other here. */
export function changeVolume(
  context: Context,
  volumeGroup: string,
  argv: string[],
  what: string,
): Promise<unknown> {
  return serially(context.host, volumeGroup, () =>
    succeed(context, { ...changing, argv }, what, (result) => lvmFailure(result.stderr)),
  );
}

/** Raises VOLUME_SUSPENDED if the users of one of them stand still. */
export function refuseSuspended(context: Context, all: readonly (LogicalVolume | undefined)[]): void {
  const still = all.find((volume) => volume?.suspended);
  if (still === undefined) return;
  const path = `${still.volumeGroup}/${still.name}`;
  throw new LvmNbdError("VOLUME_SUSPENDED", {
    message: `${path} is suspended, so whoever uses it stands still`,
    host: context.host.name,
    resource: context.resource,
    advice: `An LVM command was killed half-way. Run \`lvchange --refresh ${path}\` on the host NOW, then \`pulumi up\` again.`,
  });
}

/** `VG/LV`. */
export function pathOf({ volumeGroup, name }: Pick<LogicalVolume, "volumeGroup" | "name">): string {
  return `${volumeGroup}/${name}`;
}

/** The volume of that name. */
export function named(
  all: readonly LogicalVolume[],
  group: string,
  volume: string,
): LogicalVolume | undefined {
  return all.find((lv) => lv.volumeGroup === group && lv.name === volume);
}

/**
 * The volume of that UUID, which was in that group; in another one only if that is not there any more, renamed. Raises
 * IDENTITY_MISMATCH where it cannot be told which of several it is.
 */
export async function volumeOf(
  context: Context,
  all: readonly LogicalVolume[],
  volumeGroup: string,
  uuid: string | undefined,
): Promise<LogicalVolume | undefined> {
  if (uuid === undefined) return undefined;
  const [found, ...others] = identified(all, { volumeGroup, uuid });
  if (found === undefined || found.volumeGroup === volumeGroup) return found;
  if (await isGroup(context, volumeGroup)) return undefined;
  if (others.length === 0) return found;
  const paths = [found, ...others].map(pathOf);
  throw refusal(
    context,
    "IDENTITY_MISMATCH",
    `the UUID ${uuid} is that of ${paths.join(" and of ")}, and none of them is in ${volumeGroup}: clones of a disk, of which no one can tell which is meant`,
    `Nothing was touched. Give the group that is meant its name back (\`vgrename ${found.volumeGroup} ${volumeGroup}\`), or take the clone's disk away, and run again.`,
  );
}

/**
 * Raises IDENTITY_MISMATCH before a volume is given up in another group than it was in: whether that was renamed, or its disk is
 * away and this is a clone, cannot be told.
 */
export function refuseOtherGroup(context: Context, lv: LogicalVolume, volumeGroup: string): void {
  if (lv.volumeGroup === volumeGroup) return;
  throw refusal(
    context,
    "IDENTITY_MISMATCH",
    `${pathOf(lv)} has the UUID of what was in ${volumeGroup}, of which nothing is there now: either ${volumeGroup} was renamed, or its disk is away and this is a clone`,
    `Nothing was touched. If the disk is away, bring it back. If ${volumeGroup} was renamed to ${lv.volumeGroup}, run \`pulumi refresh\`, which tells so, and then this again.`,
  );
}

/** A group without volumes shows in no list of volumes. */
async function isGroup(context: Context, volumeGroup: string): Promise<boolean> {
  const argv = groupCommand(volumeGroup);
  const command: RemoteCommand = { argv, kind: "read", deadlineSeconds: observeSeconds };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === 0) return true;
  if (lvmFailure(result.stderr) === "VOLUME_GROUP_NOT_FOUND") return false;
  const what = `whether there is a volume group "${volumeGroup}" could not be found out`;
  throw failure(context, command, result, what, lvmFailure(result.stderr) ?? "COMMAND_FAILED");
}

/** The volume that is to be brought back. Raises ORIGIN_NOT_FOUND, or VOLUME_GROUP_NOT_FOUND. */
export async function requireOrigin(
  context: Context,
  { volumeGroup, origin }: { readonly volumeGroup: string; readonly origin: string },
  all: readonly LogicalVolume[],
  advice?: string,
): Promise<LogicalVolume> {
  const group = all.filter((lv) => lv.volumeGroup === volumeGroup && lv.kind !== "internal");
  if (group.length === 0) await requireGroup(context, volumeGroup, all);
  const found = named(group, volumeGroup, origin);
  if (found !== undefined) return found;
  throw refusal(
    context,
    "ORIGIN_NOT_FOUND",
    `origin: no logical volume "${origin}" in ${volumeGroup}; there are: ${listed(group.map((lv) => lv.name))}`,
    advice,
  );
}

/** Raises VOLUME_IN_USE, with who holds or serves it, unless each is closed. */
export async function refuseOpen(
  context: Context,
  all: readonly LogicalVolume[],
  advice: string,
): Promise<void> {
  for (const lv of all.filter(({ active }) => active)) {
    const holders = [...(await holdersOf(context, lv)), ...(await serversOf(context, [lv]))];
    if (holders.length === 0) continue;
    throw refusal(context, "VOLUME_IN_USE", `${pathOf(lv)} is open: ${holders.join(", ")}`, advice);
  }
}

/** Raises ORIGIN_UNSUITABLE for a mark of a restore that has begun to write the volume: nothing of that can be used. */
export function refuseHalfWritten(context: Context, lv: LogicalVolume, mark: RestoreMark | undefined): void {
  if (mark === undefined) return;
  const [what, advice] = writtenBy(lv, mark);
  throw refusal(context, "ORIGIN_UNSUITABLE", `origin: ${what}`, `Nothing was touched. ${advice}`);
}

/** Raises SNAPSHOT_OVERFLOWED where one of the volume's snapshots ran full while its merge waited: nothing else ends that. */
export function refuseRanFull(context: Context, all: readonly LogicalVolume[], origin: LogicalVolume): void {
  const full = all.find(
    (lv) =>
      lv.volumeGroup === origin.volumeGroup &&
      lv.originUuid === origin.uuid &&
      lv.merging &&
      mergePhase(lv, origin) === "overflowed",
  );
  if (full === undefined) return;
  throw refusal(
    context,
    "SNAPSHOT_OVERFLOWED",
    ranFullPhrase(full, origin),
    `Nothing was touched. ${ranFullAdvice(full)}, and run again, with another snapshot or an image.`,
  );
}

/** How a volume with that mark of a restore is, and what to do, in words. */
export function writtenBy(
  lv: Pick<LogicalVolume, "volumeGroup" | "name">,
  mark: RestoreMark,
): [what: string, advice: string] {
  const path = pathOf(lv);
  return [
    `${path} is HALF-WRITTEN by ${ownerOfRestore(mark)}, which restores it from an image: it holds neither what it held before nor the image`,
    `Use nothing of it until that restore is done: run \`pulumi up\` of that stack. If that is gone for good, and you have put the content right: \`lvchange --deltag '${mark.tag}' ${path}\`.`,
  ];
}

/** Who has the volume open, in words; none for one that is closed. */
export async function holdersOf(context: Context, lv: LogicalVolume): Promise<string[]> {
  const holders = await told(context, script(holdersScript, lv.path), lv.path);
  if (holders.length > 0) return holders;
  // udev itself has a device open for a moment after each change.
  const [now] = identified(await volumes({ ...context, recentSeconds: 0 }), lv);
  return now?.open === true ? ["by a program that has just closed it or is in another namespace"] : [];
}

/** Who serves one of the volumes over NBD, in words, whether or not a client is connected. */
export function serversOf(context: Context, all: readonly LogicalVolume[]): Promise<string[]> {
  const paths = all.map(({ path }) => path);
  return told(context, script(serversScript, ...paths), paths.join(" or "));
}

async function told(context: Context, argv: string[], what: string): Promise<string[]> {
  const command: RemoteCommand = { argv, kind: "read", deadlineSeconds: observeSeconds };
  const result = await succeed(context, command, `who holds ${what} could not be found out`);
  return parseOutput(context, command, result, parseHolders);
}

/** A group that has vanished (a disk not there yet) says nothing of its volumes: that is not an absence. */
export async function requireGroup(
  context: Context,
  volumeGroup: string,
  all: readonly LogicalVolume[],
): Promise<void> {
  if (all.some((lv) => lv.volumeGroup === volumeGroup)) return;
  const argv = groupCommand(volumeGroup);
  await succeed(
    context,
    { argv, kind: "read", deadlineSeconds: observeSeconds },
    `volumeGroup: no volume group "${volumeGroup}" is on the host now; there are: ${listed(all.map((lv) => lv.volumeGroup))}`,
    (failed) => lvmFailure(failed.stderr),
  );
}

/** A snapshot on any host, by its identity. */
export interface SnapshotReference {
  readonly host: HostArgs;
  readonly volumeGroup: string;
  readonly name: string;
  readonly uuid: string;
}

/**
 * Sees that the snapshot is still there and valid: then everything that was ever read from it was its moment. Raises
 * SNAPSHOT_OVERFLOWED, or COPY_UNCERTIFIED where it is gone or another.
 */
export async function certify(context: Context, snapshot: SnapshotReference): Promise<LogicalVolume> {
  const host = await context.open(snapshot.host);
  const where = { host: host.name, resource: context.resource };
  const path = `${snapshot.volumeGroup}/${snapshot.name}`;
  const all = await volumes({ ...context, host });
  // A clone of the group, imported under another name, has the same UUIDs.
  const lv = all.find(
    ({ uuid, volumeGroup }) => uuid === snapshot.uuid && volumeGroup === snapshot.volumeGroup,
  );
  if (lv === undefined) {
    await requireGroup({ ...context, host }, snapshot.volumeGroup, all);
    throw new LvmNbdError("COPY_UNCERTIFIED", {
      ...where,
      message: `the snapshot ${path} (${snapshot.uuid}) is not there any more`,
      advice: "Run `pulumi up --refresh`: it takes the snapshot anew and copies that.",
    });
  }
  // Of an inactive one LVM says neither that it is valid nor that it is not.
  if (lv.kind === "cow" && !lv.active) {
    throw new LvmNbdError("SNAPSHOT_INACTIVE", { ...where, message: `the snapshot ${path} is not active` });
  }
  if (lv.kind === "cow" && lv.invalid) {
    throw new LvmNbdError("SNAPSHOT_OVERFLOWED", {
      ...where,
      message: `the snapshot ${path} ran full, so what was read from it is not its moment`,
    });
  }
  if (lv.merging) {
    throw new LvmNbdError("COPY_UNCERTIFIED", {
      ...where,
      message: `the snapshot ${path} is being merged into its origin`,
      advice: "Wait until the merge has ended, then run `pulumi up --refresh`.",
    });
  }
  return lv;
}

/** Names in a sentence: at most eight of them. */
export function listed(names: readonly string[]): string {
  const unique = [...new Set(names)].sort();
  const shown = unique.slice(0, 8).map((one) => `"${one}"`);
  if (unique.length > shown.length) shown.push(`and ${unique.length - shown.length} more`);
  return shown.length === 0 ? "none" : shown.join(", ");
}
