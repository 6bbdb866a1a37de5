/** Which logical volumes a host has, e.g. to loop over the disks of its virtual machines. */
import { z } from "zod";
import type { FunctionType } from "../core/functions.js";
import { hostInput, refusing } from "../core/inputs.js";
import { volumeGroupNameProblem } from "../linux/lvm.js";
import { requireGroup, volumes } from "../resources/volumes.js";

const inputs = z.object({
  host: hostInput,
  volumeGroup: z
    .string()
    .superRefine(refusing(volumeGroupNameProblem))
    .optional()
    .describe("Only the volumes of this volume group. Default: of all."),
});

const volume = z
  .object({
    name: z.string().describe("Name of the volume."),
    volumeGroup: z.string().describe("Volume group that it is in."),
    uuid: z.string().describe("LVM UUID."),
    sizeBytes: z.number().describe("Size in bytes; of a COW snapshot that of its store."),
    origin: z.string().optional().describe("Of a snapshot: the volume of which it is one."),
    kind: z
      .enum(["cow", "thin", "pool", "other"])
      .meta({ title: "VolumeKind" })
      .describe(
        "`cow` (a COW snapshot), `thin` (a thin volume; with an `origin` a snapshot), `pool` (a thin pool), `other` (e.g. a linear volume).",
      ),
  })
  .meta({ title: "LogicalVolume" });

const outputs = z.object({
  volumes: z
    .array(volume)
    .describe(
      "The volumes, by group and name; without those that are but parts of others, such as a pool's.",
    ),
});

/** What `getVolumes` is asked. */
export type GetVolumesArgs = z.input<typeof inputs>;
/** What `getVolumes` tells. */
export type GetVolumesResult = z.infer<typeof outputs>;

export const getVolumes: FunctionType<z.infer<typeof inputs>> = {
  name: "getVolumes",
  description: "Which logical volumes a host has. It only looks.",
  example: { host: "server1", volumeGroup: "VgVm" },
  inputs,
  outputs,
  async ask(context, { volumeGroup }): Promise<GetVolumesResult> {
    const all = await volumes(context);
    const asked = all.filter((lv) => volumeGroup === undefined || lv.volumeGroup === volumeGroup);
    // A group without volumes shows in no list of volumes.
    if (volumeGroup !== undefined && asked.length === 0) await requireGroup(context, volumeGroup, all);
    const told = asked.flatMap(({ kind, ...lv }) =>
      kind === "internal"
        ? []
        : [
            {
              ...{ name: lv.name, volumeGroup: lv.volumeGroup, uuid: lv.uuid, sizeBytes: lv.sizeBytes, kind },
              ...(lv.origin === undefined ? {} : { origin: lv.origin }),
            },
          ],
    );
    const place = (one: { volumeGroup: string; name: string }) => `${one.volumeGroup}/${one.name}`;
    return { volumes: told.sort((one, other) => (place(one) < place(other) ? -1 : 1)) };
  },
};
