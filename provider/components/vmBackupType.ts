/** VmBackup as programs in any language see it. */
import { z } from "zod";
import { imagesAtOnce } from "../backup/listImages.js";
import {
  type NamedVolume,
  type VmGeneration,
  type VmWanted,
  vmGenerations,
} from "../backup/vmGenerations.js";
import type { ComponentType, Composition, Part } from "../core/component.js";
import { LvmNbdError } from "../core/errors.js";
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
  now: z.iso
    .datetime({
      local: true,
      offset: true,
      error: 'must be a day and a time (ISO 8601), e.g. "2026-11-30T03:00:00"',
    })
    .optional()
    .describe(
      "A day and a time (ISO 8601), e.g. `2026-11-30T03:00:00`, on the day that is today's, by the local time of the machine that runs the provider. Default: now.",
    )
    .meta(plain),
  ...{ compress, connections, bandwidthLimit, mountPoint, verify, deepCheck },
});

const outputs = z.object({
  keys: z
    .array(z.string())
    .describe("The days (`YYYY-MM-DD`) of which there are to be backups, the newest first."),
});

type Inputs = z.infer<typeof vmBackupInputs>;

/** Inputs that each image has, whatever its day. */
const common = [
  ...(["host", "source", "mountPoint"] as const),
  ...(["connections", "bandwidthLimit", "verify", "deepCheck"] as const),
];

interface VmBackupComposition extends Composition {
  readonly parts: readonly (Part & {
    readonly inputs: Pick<VmGeneration<NamedVolume>, "volumes" | "format"> & { readonly existing: boolean };
  })[];
  readonly outputs: { readonly keys: readonly string[] };
}

/** A BackupImage of each day that is to be kept, of which today's alone may be made. Throws an Error that says what cannot be right. */
export function vmBackupParts(wanted: VmWanted<NamedVolume>): VmBackupComposition {
  const generations = vmGenerations(wanted);
  const parts = generations.map(({ key, isToday, format, volumes }) => ({
    type: "BackupImage",
    name: `${wanted.name}-${key}`,
    // What is kept may be of another format than the declared one.
    handedOn: isToday || format === "qcow2" ? [...common, "compress"] : common,
    inputs: { volumes, format, existing: !isToday },
  }));
  return { parts, outputs: { keys: generations.map(({ key }) => key) } };
}

export const vmBackup: ComponentType<Inputs> = {
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
  handsOn: [...common, "compress"],
  async compose(name, { now, ...inputs }, host) {
    const made = host === undefined ? [] : await imagesAtOnce(host, inputs.folder);
    const composed = readable(() =>
      vmBackupParts({ ...inputs, name, made, now: now === undefined ? new Date() : new Date(now) }),
    );
    if (host !== undefined) return composed;
    const unsure =
      "the host is only known later: which backups it has, and which of them are kept, is looked up by `pulumi up`. Until then earlier ones are missing here";
    return { ...composed, outputs: {}, unsure };
  },
};

/** What cannot be right of a declaration. */
function readable<T>(work: () => T): T {
  try {
    return work();
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new LvmNbdError("INVALID_INPUT", { message, cause: error });
  }
}
