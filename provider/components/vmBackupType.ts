/** VmBackup as programs in any language see it. */
import { z } from "zod";
import type { Described } from "../core/resource.js";
import { backupImageInputs } from "../resources/backupImage.js";

/** For `.meta()`: the program must know the value, since it becomes part of the images' names. */
const plain = { plain: true } as const;

const {
  host,
  source,
  volumes,
  format,
  compress,
  connections,
  bandwidthLimit,
  mountPoint,
  verify,
  deepCheck,
} = backupImageInputs.shape;

const kept = (period: string) =>
  z.number().int().min(0).optional().describe(`How many ${period} are kept, of each the newest backup.`);

/**
 * Declared properties of a `VmBackup`. What is in the folder is not among them: only a program in this language can ask for it once for
 * all VMs (`listImages`); for any other the component asks.
 */
export const vmBackupInputs = z.strictObject({
  ...{ host, source },
  folder: z
    .string()
    .min(1)
    .describe(
      "Absolute path of the folder on the host in which the images are: `NAME.GROUP.VOLUME.DAY.FORMAT`. It must exist.",
    )
    .meta(plain),
  volumes: z
    .array(volumes.element.omit({ file: true }))
    .min(1)
    .describe("The volumes of the VM: frozen together once, snapshotted, thawed, then copied.")
    .meta(plain),
  keep: z
    .strictObject({
      daily: kept("days"),
      weekly: kept("weeks (from Monday)"),
      monthly: kept("months"),
      yearly: kept("years"),
    })
    .meta({ title: "RetentionPolicy" })
    .describe(
      "How many backups are kept. Days, weeks, months and years without a backup count for nothing. At least one number must be 1 or more.",
    )
    .meta(plain),
  format: format.meta(plain),
  now: z
    .string()
    .optional()
    .describe(
      "A time (ISO 8601) on the day that is today's, by the local time of the machine that runs the provider. Default: now.",
    )
    .meta(plain),
  ...{ compress, connections, bandwidthLimit, mountPoint, verify, deepCheck },
});

const outputs = z.object({
  keys: z
    .array(z.string())
    .describe("The days (`YYYY-MM-DD`) of which there are to be backups, the newest first."),
});

export const vmBackup: Described = {
  type: "VmBackup",
  description:
    "The nightly backups of a VM with their retention: one `BackupImage`, called `NAME-YYYY-MM-DD`, for each day that is to be kept.",
  example: {
    vm1: {
      type: "VmBackup",
      properties: {
        host: "backup1",
        folder: "/var/backups",
        source: { host: "server1", listenAddress: "10.0.0.1" },
        volumes: [{ volumeGroup: "VgVm", origin: "LV-VM1", size: "20%ORIGIN" }],
        keep: { daily: 7, weekly: 4, monthly: 12 },
      },
    },
  },
  inputs: vmBackupInputs,
  outputs,
};
