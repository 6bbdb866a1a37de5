/** What the resources that look at logical volumes share. */
import { parseOutput, succeed } from "../core/command.js";
import { LvmNbdError } from "../core/errors.js";
import type { Context } from "../core/resource.js";
import { type LogicalVolume, lvmFailure, lvsCommand, parseLvs } from "../linux/lvm.js";
import type { HostArgs, RemoteCommand } from "../ssh/types.js";

export const observeSeconds = 60;

/** All logical volumes of the context's host. */
export async function volumes(context: Context): Promise<LogicalVolume[]> {
  const command: RemoteCommand = { argv: lvsCommand(), kind: "read", deadlineSeconds: observeSeconds };
  const result = await succeed(context, command, "the logical volumes could not be listed", (failed) =>
    lvmFailure(failed.stderr),
  );
  return parseOutput(context, command, result, parseLvs);
}

/** A group that has vanished (a disk not there yet) says nothing of its volumes: that is not an absence. */
export async function requireGroup(
  context: Context,
  volumeGroup: string,
  all: readonly LogicalVolume[],
): Promise<void> {
  if (all.some((lv) => lv.volumeGroup === volumeGroup)) return;
  const argv = ["vgs", "--noheadings", "-o", "vg_name", volumeGroup];
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
  const lv = all.find(({ uuid }) => uuid === snapshot.uuid);
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
