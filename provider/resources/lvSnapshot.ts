/**
 * LvSnapshot: a moment of a logical volume, as a COW snapshot (with `size`) or a thin one (without).
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, parseOutput, script, succeed } from "../core/command.js";
import { LvmNbdError } from "../core/errors.js";
import { commonInputs } from "../core/inputs.js";
import {
  generationMark,
  isOfAnotherGeneration,
  markAmong,
  ownerMark,
  tagPrefix,
  userTags,
} from "../core/owner.js";
import type { Change, Context, Problem, ResourceType } from "../core/resource.js";
import { serially } from "../core/serial.js";
import { holdersScript, parseHolders } from "../linux/holders.js";
import {
  activateCommand,
  createSnapshotCommand,
  deviceMapperNameProblem,
  extendCommand,
  type LogicalVolume,
  logicalVolumeNameProblem,
  lvmFailure,
  lvsCommand,
  parseLvs,
  parseSize,
  permissionCommand,
  removeCommand,
  renameCommand,
  sizeInBytes,
  tagCommand,
  tagProblem,
  volumeGroupNameProblem,
} from "../linux/lvm.js";
import { hostName } from "../ssh/config.js";
import type { RemoteCommand } from "../ssh/types.js";

const KiB = 1024;

const name = (problem: (value: string) => string | undefined) =>
  z.string().superRefine((value, refinement) => {
    const message = problem(value);
    if (message !== undefined) refinement.addIssue({ code: "custom", message });
  });

const size = z.union([z.string(), z.number()]).superRefine((value, refinement) => {
  try {
    parseSize(value);
  } catch (error) {
    refinement.addIssue({ code: "custom", message: error instanceof Error ? error.message : String(error) });
  }
});

const chunkSize = z.union([z.string(), z.number()]).superRefine((value, refinement) => {
  const bytes = chunkSizeBytes(value);
  if (bytes === undefined || bytes < 4 * KiB || bytes > 512 * KiB || !Number.isInteger(Math.log2(bytes))) {
    refinement.addIssue({
      code: "custom",
      message: `"${value}" is not a chunk size: a power of 2 from 4K to 512K, e.g. "64K" or 65536`,
    });
  }
});

const inputs = z.strictObject({
  ...commonInputs,
  volumeGroup: name(volumeGroupNameProblem).describe("Volume group of the origin and the snapshot."),
  origin: name((value) => (value === "" ? "must not be empty" : volumeGroupNameProblem(value))).describe(
    "Logical volume of which the snapshot is taken.",
  ),
  name: name(logicalVolumeNameProblem).describe("Name of the snapshot. Default: the resource's name."),
  size: size
    .optional()
    .describe(
      'Size of the COW store: `"1G"` (1024-based), bytes, or `"20%ORIGIN"`; `"100%ORIGIN"` cannot overflow. ' +
        "Leave out for a thin snapshot of a thin origin.",
    ),
  readOnly: z.boolean().default(true).describe("Whether the snapshot may not be written."),
  chunkSize: chunkSize
    .default(64 * KiB)
    .describe('Chunk of the COW store in bytes (or `"64K"`): a power of 2 from 4 KiB to 512 KiB.'),
  tags: z.array(name(tagProblem)).default([]).describe("LVM tags of your own."),
  quiesce: z
    .strictObject({
      freeze: z
        .string()
        .min(1)
        .describe("Shell command on the host that brings the VM's file systems to rest."),
      thaw: z
        .string()
        .min(1)
        .describe("Shell command that lets them go on; it is ALWAYS run, also after failures."),
      timeoutSeconds: z
        .number()
        .int()
        .min(1)
        .max(600)
        .default(30)
        .describe("Seconds after which either command is stopped."),
    })
    .optional()
    .describe("Commands run around the taking of the snapshot, as root."),
  triggers: z
    .array(z.union([z.string(), z.number(), z.boolean()]))
    .default([])
    .describe("Any values; a change of one takes a new snapshot."),
});

const outputs = z.object({
  uuid: z.string().describe("LVM UUID of the snapshot."),
  path: z.string().describe("Device path, `/dev/VG/LV`."),
  sizeBytes: z.number().describe("Size of the COW store, or of the thin snapshot, in bytes."),
  originSizeBytes: z.number().describe("Size of the origin (what a reader sees) in bytes."),
  originUuid: z.string().describe("LVM UUID of the origin."),
  createdAt: z.string().describe("When the snapshot was taken (ISO 8601, by the host's clock)."),
  usedPercent: z.number().describe("Fill level of the COW store, or of the thin snapshot; informational."),
  state: z
    .enum(["valid", "overflowed", "merging", "inactive", "poolFull"])
    .describe("`valid`; `overflowed` (store ran full, content lost); `merging`; `inactive`; `poolFull`."),
});

type Inputs = z.infer<typeof inputs>;
type State = Inputs & z.infer<typeof outputs>;

/** What a program declares, before defaults. */
export type LvSnapshotDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type LvSnapshotOutputs = State;

interface Observed {
  readonly mark: string | undefined;
  readonly lv: LogicalVolume;
  readonly origin: LogicalVolume | undefined;
  readonly poolFull: boolean;
  /** COW snapshots of this (thin) snapshot itself: lvremove would take them along. */
  readonly dependents: readonly string[];
}

function chunkSizeBytes(value: string | number): number | undefined {
  if (typeof value === "number") return value;
  const match = /^(\d+)(?:([km])(?:i?b)?)?$/i.exec(value);
  if (!match) return undefined;
  return Number(match[1]) * ({ k: KiB, m: KiB * KiB }[match[2]?.toLowerCase() ?? ""] ?? 1);
}

/** Marks of ours for a declaration: whose it is, and for which declared moment it was taken. */
function marks(wanted: Inputs): string[] {
  return [ownerMark(wanted.owner), generationOf(wanted)];
}

function generationOf(wanted: Inputs): string {
  return generationMark([
    wanted.origin,
    wanted.size === undefined ? "thin" : chunkSizeBytes(wanted.chunkSize),
    wanted.triggers,
  ]);
}

const observeSeconds = 60;
/** Also the time between TERM and KILL: an LVM command killed half-way leaves the origin suspended. */
const changeSeconds = 120;

async function volumes(context: Context): Promise<LogicalVolume[]> {
  const command: RemoteCommand = { argv: lvsCommand(), kind: "read", deadlineSeconds: observeSeconds };
  const result = await succeed(context, command, "the logical volumes could not be listed", (failed) =>
    lvmFailure(failed.stderr),
  );
  return parseOutput(context, command, result, parseLvs);
}

/** A group that has vanished (a disk not there yet) says nothing of its volumes: that is not an absence. */
async function requireGroup(
  context: Context,
  volumeGroup: string,
  all: readonly LogicalVolume[],
): Promise<void> {
  const argv = ["vgs", "--noheadings", "-o", "vg_name", volumeGroup];
  await succeed(
    context,
    { argv, kind: "read", deadlineSeconds: observeSeconds },
    `volumeGroup: no volume group "${volumeGroup}" is on the host now; there are: ${listed(all.map((lv) => lv.volumeGroup))}`,
    (failed) => lvmFailure(failed.stderr),
  );
}

async function observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined> {
  const all = await volumes(context);
  const uuid = "uuid" in wanted ? wanted.uuid : undefined;
  const lv =
    all.find((candidate) => candidate.uuid === uuid) ??
    all.find((candidate) => candidate.volumeGroup === wanted.volumeGroup && candidate.name === wanted.name);
  if (lv === undefined) {
    if (!all.some((other) => other.volumeGroup === wanted.volumeGroup))
      await requireGroup(context, wanted.volumeGroup, all);
    return undefined;
  }
  const inGroup = (name: string | undefined) =>
    all.find((candidate) => candidate.volumeGroup === lv.volumeGroup && candidate.name === name);
  const pool = inGroup(lv.pool);
  return {
    mark: markAmong(lv.tags),
    lv,
    origin: inGroup(lv.origin),
    dependents: all
      .filter(
        (other) => other.kind === "cow" && other.volumeGroup === lv.volumeGroup && other.origin === lv.name,
      )
      .map((other) => other.name),
    poolFull: pool !== undefined && (pool.health !== "" || (pool.usedPercent ?? 0) >= 100),
  };
}

function stateOf({ lv, poolFull }: Observed): State["state"] {
  if (lv.kind === "cow" && lv.invalid) return "overflowed";
  if (lv.merging) return "merging";
  if (!lv.active) return "inactive";
  return poolFull ? "poolFull" : "valid";
}

/** LVM locks the volume group for a change; those of one group wait for each other here. */
function change(context: Context, volumeGroup: string, argv: string[], what: string): Promise<unknown> {
  return serially(context.host, volumeGroup, () =>
    succeed(
      context,
      { argv, kind: "change", deadlineSeconds: changeSeconds, graceSeconds: changeSeconds },
      what,
      (result) => lvmFailure(result.stderr),
    ),
  );
}

/** Everything that would make lvcreate fail, or make something else than meant, is found before it runs. */
async function suitableOrigin(context: Context, wanted: Inputs): Promise<LogicalVolume> {
  const all = await volumes(context);
  const refuse = (
    code: "ORIGIN_UNSUITABLE" | "ORIGIN_NOT_FOUND" | "VOLUME_GROUP_NOT_FOUND",
    message: string,
  ) =>
    new LvmNbdError(code, {
      message,
      host: context.host.name,
      resource: context.resource,
      property: "origin",
    });
  const group = all.filter((lv) => lv.volumeGroup === wanted.volumeGroup && lv.kind !== "internal");
  if (group.length === 0) {
    throw refuse(
      "VOLUME_GROUP_NOT_FOUND",
      `volumeGroup: no volume group "${wanted.volumeGroup}" with logical volumes; there are: ${listed(all.map((lv) => lv.volumeGroup))}`,
    );
  }
  const origin = group.find((lv) => lv.name === wanted.origin);
  if (origin === undefined) {
    throw refuse(
      "ORIGIN_NOT_FOUND",
      `origin: no logical volume "${wanted.origin}" in ${wanted.volumeGroup}; there are: ${listed(group.map((lv) => lv.name))}`,
    );
  }
  if (origin.kind === "cow") {
    throw refuse(
      "ORIGIN_UNSUITABLE",
      `origin: "${origin.name}" is itself a snapshot, of "${origin.origin}": name that`,
    );
  }
  if (origin.kind === "pool")
    throw refuse("ORIGIN_UNSUITABLE", `origin: "${origin.name}" is a thin pool, not a volume`);
  if (origin.attr[0] === "O") {
    throw refuse(
      "ORIGIN_UNSUITABLE",
      `origin: a snapshot is being merged into "${origin.name}"; wait until that has ended`,
    );
  }
  if (wanted.size === undefined && origin.kind !== "thin") {
    throw refuse(
      "ORIGIN_UNSUITABLE",
      `size: "${origin.name}" is not a thin volume, so its snapshot needs a size, e.g. size: "20%ORIGIN"`,
    );
  }
  return origin;
}

function listed(names: readonly string[]): string {
  const unique = [...new Set(names)].sort();
  const shown = unique.slice(0, 8).map((one) => `"${one}"`);
  if (unique.length > shown.length) shown.push(`and ${unique.length - shown.length} more`);
  return shown.length === 0 ? "none" : shown.join(", ");
}

/**
 * Freezes, runs the command, thaws. The thaw is a trap of the script on the host, so it is run whatever
 * happens to the command, to the link or to Pulumi. Exit code 90: freeze failed; 91: only thaw failed.
 */
const quiesceScript = `
freeze=$1 thaw=$2 limit=$3; shift 3
trap '' PIPE
thawed=no thaw_rc=0
thaw() {
  [ "$thawed" = no ] || return 0
  thawed=yes
  timeout -k 5 "$limit" sh -c "$thaw" </dev/null >&2 || thaw_rc=$?
}
trap 'thaw' EXIT
trap 'exit 143' HUP INT TERM
timeout -k 5 "$limit" sh -c "$freeze" </dev/null >&2 || exit 90
"$@" </dev/null
rc=$?
thaw
[ "$rc" = 0 ] || exit "$rc"
[ "$thaw_rc" = 0 ] || exit 91
`;

async function create(context: Context, wanted: Inputs): Promise<void> {
  await suitableOrigin(context, wanted);
  const argv = createSnapshotCommand({
    volumeGroup: wanted.volumeGroup,
    origin: wanted.origin,
    name: wanted.name,
    size: wanted.size === undefined ? undefined : parseSize(wanted.size),
    readOnly: wanted.readOnly,
    chunkSize: chunkSizeBytes(wanted.chunkSize) ?? 64 * KiB,
    tags: [...marks(wanted), ...wanted.tags],
  });
  const what = `no snapshot of ${wanted.volumeGroup}/${wanted.origin} could be taken`;
  const { quiesce } = wanted;
  if (quiesce === undefined) {
    context.progress(`taking the snapshot ${wanted.volumeGroup}/${wanted.name} of ${wanted.origin}`);
    await change(context, wanted.volumeGroup, argv, what);
    return;
  }
  context.progress(`freezing, taking the snapshot ${wanted.volumeGroup}/${wanted.name}, thawing`);
  const command: RemoteCommand = {
    argv: script(quiesceScript, quiesce.freeze, quiesce.thaw, String(quiesce.timeoutSeconds), ...argv),
    kind: "change",
    deadlineSeconds: changeSeconds + 2 * quiesce.timeoutSeconds,
    graceSeconds: changeSeconds + 2 * (quiesce.timeoutSeconds + 10),
  };
  const result = await serially(context.host, wanted.volumeGroup, () =>
    context.host.run(command, context.signal),
  );
  if (result.exitCode === 0) return;
  if (result.exitCode === 90)
    throw failure(context, command, result, `freeze failed: ${quiesce.freeze}`, "QUIESCE_FAILED");
  if (result.exitCode === 91)
    throw failure(context, command, result, `thaw failed: ${quiesce.thaw}`, "THAW_FAILED");
  throw failure(context, command, result, what, lvmFailure(result.stderr) ?? "COMMAND_FAILED");
}

/** Takes the snapshot anew where an interrupted run left one of an earlier declaration; else mends it in place. */
async function converge(context: Context, wanted: Inputs, seen: Observed): Promise<void> {
  let { lv } = seen;
  if (lv.kind !== "cow" && !(lv.kind === "thin" && lv.origin !== undefined)) {
    throw new LvmNbdError("FOREIGN_RESOURCE", {
      message: `${lv.volumeGroup}/${lv.name} exists and is not a snapshot`,
      host: context.host.name,
      resource: context.resource,
      advice: "Choose another name: a volume that is not a snapshot is never taken over.",
    });
  }
  if (lv.origin !== wanted.origin) {
    throw new LvmNbdError("IDENTITY_MISMATCH", {
      message: `${lv.volumeGroup}/${lv.name} is a snapshot of "${lv.origin}", not of "${wanted.origin}"`,
      host: context.host.name,
      resource: context.resource,
    });
  }
  if (stateOf(seen) === "merging") {
    throw new LvmNbdError("SNAPSHOT_MERGING", {
      message: `${lv.volumeGroup}/${lv.name} is being merged into "${lv.origin}"`,
      host: context.host.name,
      resource: context.resource,
    });
  }
  const stale = seen.mark === ownerMark(wanted.owner) && isOfAnotherGeneration(lv.tags, generationOf(wanted));
  if (stale || stateOf(seen) === "overflowed") {
    context.progress(`${lv.name} is ${stale ? "of an earlier declaration" : "overflowed"}: taking it anew`);
    await removeVolume(context, seen);
    await create(context, wanted);
    return;
  }
  if (lv.name !== wanted.name) {
    context.progress(`renaming ${lv.name} to ${wanted.name}`);
    await change(
      context,
      lv.volumeGroup,
      renameCommand(lv, wanted.name),
      `${lv.name} could not be renamed to ${wanted.name}`,
    );
    lv = { ...lv, name: wanted.name };
  }
  const right = [...marks(wanted), ...wanted.tags];
  const add = right.filter((tag) => !lv.tags.includes(tag));
  const drop = lv.tags.filter((tag) => !right.includes(tag));
  if (add.length > 0 || drop.length > 0) {
    await change(
      context,
      lv.volumeGroup,
      tagCommand(lv, add, drop),
      `the tags of ${lv.name} could not be changed`,
    );
  }
  if (lv.readOnly !== wanted.readOnly) {
    await change(
      context,
      lv.volumeGroup,
      permissionCommand(lv, wanted.readOnly),
      `the permission of ${lv.name} could not be changed`,
    );
  }
  if (!lv.active && lv.kind === "thin")
    await change(context, lv.volumeGroup, activateCommand(lv), `${lv.name} could not be activated`);
  if (wanted.size !== undefined && isSmaller(lv, wanted.size)) {
    context.progress(`growing ${lv.name} to ${wanted.size}`);
    await change(
      context,
      lv.volumeGroup,
      extendCommand(lv, parseSize(wanted.size)),
      `${lv.name} could not be grown`,
    );
  }
}

/** True if the store is smaller than declared by at least one extent and can still grow. */
function isSmaller(lv: LogicalVolume, declared: string | number): boolean {
  const bytes = sizeInBytes(parseSize(declared), lv.originSizeBytes);
  if (bytes === undefined || lv.kind !== "cow") return false;
  return lv.sizeBytes < Math.min(bytes, largestUsefulStore(lv)) - lv.extentSizeBytes + 1;
}

/** LVM clamps a COW store to what a complete copy of the origin and its exception table need; a lower bound of that. */
function largestUsefulStore(lv: LogicalVolume): number {
  return lv.originSizeBytes ?? Number.MAX_SAFE_INTEGER;
}

async function removeVolume(context: Context, seen: Observed): Promise<void> {
  const { lv, dependents } = seen;
  if (dependents.length > 0) {
    throw new LvmNbdError("VOLUME_IN_USE", {
      message: `${lv.volumeGroup}/${lv.name} is the origin of ${listed(dependents)}, which would be removed with it`,
      host: context.host.name,
      resource: context.resource,
    });
  }
  if (lv.open !== false && lv.active) await refuseOpen(context, lv);
  if (stateOf(seen) === "merging") {
    throw new LvmNbdError("SNAPSHOT_MERGING", {
      message: `${lv.volumeGroup}/${lv.name} is being merged into "${lv.origin}" and cannot be removed`,
      host: context.host.name,
      resource: context.resource,
      advice: "Wait until the merge has ended: LVM removes the snapshot by itself then.",
    });
  }
  context.progress(`removing the snapshot ${lv.volumeGroup}/${lv.name}`);
  await change(
    context,
    lv.volumeGroup,
    removeCommand(lv),
    `${lv.volumeGroup}/${lv.name} could not be removed`,
  );
}

async function refuseOpen(context: Context, lv: LogicalVolume): Promise<void> {
  const command: RemoteCommand = {
    argv: script(holdersScript, lv.path),
    kind: "read",
    deadlineSeconds: observeSeconds,
  };
  const result = await succeed(context, command, `who holds ${lv.path} could not be found out`);
  const holders = parseOutput(context, command, result, parseHolders);
  if (lv.open !== true && holders.length === 0) return;
  throw new LvmNbdError("VOLUME_IN_USE", {
    message: `${lv.volumeGroup}/${lv.name} is open: ${holders.join(", ") || "by a program that has just closed it or is in another namespace"}`,
    host: context.host.name,
    resource: context.resource,
  });
}

function toState(declared: Inputs | State, seen: Observed): State {
  const { lv, origin } = seen;
  const before = "uuid" in declared ? declared : undefined;
  const shrunk =
    before !== undefined &&
    declared.size !== undefined &&
    lv.sizeBytes < before.sizeBytes &&
    isSmaller(lv, declared.size);
  return {
    ...declared,
    volumeGroup: lv.volumeGroup,
    origin: lv.origin ?? declared.origin,
    name: lv.name,
    readOnly: lv.readOnly,
    tags: sameMembers(userTags(lv.tags), declared.tags) ? declared.tags : userTags(lv.tags),
    ...(shrunk ? { size: lv.sizeBytes } : {}),
    uuid: lv.uuid,
    path: lv.path,
    sizeBytes: lv.sizeBytes,
    originSizeBytes: lv.originSizeBytes ?? origin?.sizeBytes ?? lv.sizeBytes,
    originUuid: lv.originUuid ?? before?.originUuid ?? "",
    createdAt: new Date(lv.createdAt * 1000).toISOString(),
    usedPercent: lv.usedPercent ?? 0,
    state: stateOf(seen),
  };
}

function sameMembers(a: readonly string[], b: readonly string[]): boolean {
  return JSON.stringify([...new Set(a)].sort()) === JSON.stringify([...new Set(b)].sort());
}

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = [];
  const update = (property: keyof State) => changes.push({ property, effect: "update" });
  const replace = (property: keyof State) => changes.push({ property, effect: "replace" });
  for (const property of ["volumeGroup", "origin"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property]) replace(property);
  }
  const thin = state.size === undefined;
  if (unknown.has("triggers") || JSON.stringify(wanted.triggers) !== JSON.stringify(state.triggers))
    replace("triggers");
  if (!thin && (unknown.has("chunkSize") || differentChunks(state.chunkSize, wanted.chunkSize)))
    replace("chunkSize");
  if (unknown.has("size")) update("size");
  else if ((wanted.size === undefined) !== thin) replace("size");
  else if (wanted.size !== undefined && state.size !== undefined) {
    const order = compareSizes(state, wanted.size);
    if (order > 0) update("size");
    if (order < 0) replace("size");
  }
  for (const property of ["name", "readOnly"] as const) {
    if (unknown.has(property) || wanted[property] !== state[property]) update(property);
  }
  if (unknown.has("tags") || !sameMembers(wanted.tags ?? [], state.tags)) update("tags");
  if (wanted.owner !== undefined && wanted.owner !== state.owner) update("owner");
  if (!isDeepStrictEqual(wanted.quiesce, state.quiesce))
    changes.push({ property: "quiesce", effect: "connection" });
  if (state.state === "overflowed") replace("state");
  // A COW snapshot is inactive with its origin: activating it would activate the VM's volume, maybe on a second host.
  if (state.state === "inactive" && thin) update("state");
  return changes;
}

function differentChunks(a: string | number, b: string | number | undefined): boolean {
  return b === undefined || chunkSizeBytes(a) !== chunkSizeBytes(b);
}

/** Positive: the declaration wants more than the state tells; negative: less. */
function compareSizes(state: Pick<State, "size" | "originSizeBytes">, wanted: string | number): number {
  if (state.size === undefined || wanted === state.size) return 0;
  const now = sizeInBytes(parseSize(state.size), state.originSizeBytes);
  const then = sizeInBytes(parseSize(wanted), state.originSizeBytes);
  return now === undefined || then === undefined ? 0 : then - now;
}

function validate(
  wanted: Partial<Inputs>,
  old: Partial<Inputs> | undefined,
  unknown: ReadonlySet<string>,
): Problem[] {
  const problems: Problem[] = [];
  if (wanted.volumeGroup !== undefined && wanted.name !== undefined) {
    const reason = deviceMapperNameProblem(wanted.volumeGroup, wanted.name);
    if (reason !== undefined) problems.push({ property: "name", reason: `"${wanted.name}" ${reason}` });
  }
  if (wanted.name !== undefined && wanted.name === wanted.origin) {
    problems.push({
      property: "name",
      reason: `"${wanted.name}" is the origin's name: choose another for the snapshot`,
    });
  }
  for (const tag of wanted.tags ?? []) {
    if (tag.startsWith(tagPrefix)) {
      problems.push({
        property: "tags",
        reason: `"${tag}" must not begin with "${tagPrefix}", the mark of this provider`,
      });
    }
  }
  const shrinks = old !== undefined && shrinking(old, wanted, unknown);
  if (shrinks) problems.push({ property: "size", reason: shrinks });
  return problems;
}

/** A smaller store means another snapshot, of now: that loses the moment that was kept, so it must be asked for. */
function shrinking(
  old: Partial<Inputs>,
  wanted: Partial<Inputs>,
  unknown: ReadonlySet<string>,
): string | undefined {
  if (old.size === undefined || wanted.size === undefined) return undefined;
  const decisive = ["host", "volumeGroup", "origin", "chunkSize", "triggers"];
  if (decisive.some((property) => unknown.has(property))) return undefined;
  // Other credentials, or a chunk size written otherwise, take no new snapshot.
  const moment = ({ host, volumeGroup, origin, chunkSize, triggers }: Partial<Inputs>) => [
    host === undefined ? undefined : hostName(host),
    volumeGroup,
    origin,
    chunkSize === undefined ? undefined : chunkSizeBytes(chunkSize),
    triggers,
  ];
  if (!isDeepStrictEqual(moment(old), moment(wanted))) return undefined;
  const before = parseSize(old.size);
  const after = parseSize(wanted.size);
  const smaller =
    "bytes" in before && "bytes" in after
      ? after.bytes < before.bytes
      : "percentOfOrigin" in before &&
        "percentOfOrigin" in after &&
        after.percentOfOrigin < before.percentOfOrigin;
  return smaller
    ? `a COW snapshot cannot shrink from ${old.size} to ${wanted.size}: keep at least ${old.size}, or change ` +
        "`triggers` as well to have this moment given up and a new, smaller snapshot taken"
    : undefined;
}

/** The resource as the reconciler sees it. */
export const lvSnapshot: ResourceType<Inputs, State, Observed> = {
  type: "LvSnapshot",
  description: "A moment of a logical volume: a COW snapshot (with `size`) or a thin one (without).",
  inputs,
  outputs,
  nameInput: "name",
  validate,
  predict: ({ volumeGroup, name }) =>
    volumeGroup === undefined || name === undefined ? {} : { path: `/dev/${volumeGroup}/${name}` },
  id: (wanted, hostName) => `${hostName}/${wanted.volumeGroup}/${wanted.name}`,
  observe,
  isSame: (seen, state) => seen.lv.uuid === state.uuid,
  toState,
  diff,
  // Whatever the group: a renamed one (vgrename) holds the very snapshot that the delete would remove.
  collides: (state, wanted) => state.name === wanted.name,
  async suitable(context, wanted) {
    await suitableOrigin(context, wanted);
  },
  create,
  converge,
  remove: (context, _state, seen) => removeVolume(context, seen),
  drift(state, seen) {
    const now = toState(state, seen);
    const lines: string[] = [];
    if (now.name !== state.name) lines.push(`was renamed to ${now.name}; \`pulumi up\` will rename it back`);
    if (now.readOnly !== state.readOnly) lines.push(`was made ${now.readOnly ? "read-only" : "writable"}`);
    if (!sameMembers(now.tags, state.tags))
      lines.push(`has tags [${now.tags.join(", ")}], declared are [${state.tags.join(", ")}]`);
    if (now.size !== state.size) lines.push(`its store has ${now.sizeBytes} bytes, less than declared`);
    if (now.state !== state.state) lines.push(`is now ${now.state}, was ${state.state}`);
    return lines;
  },
};
