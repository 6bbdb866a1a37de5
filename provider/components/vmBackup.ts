/**
 * VmBackup: the nightly backups of a VM. Each run of the program declares today's and those that are to be kept; Pulumi
 * makes the one and removes what is no longer declared, in this order.
 */
import * as pulumi from "@pulumi/pulumi";
import type { RetentionPolicy } from "../backup/generations.js";
import type { Image } from "../backup/listImages.js";
import { BackupImage, type BackupImageArgs } from "../pulumi/dynamic.js";
import { vmBackupParts } from "./vmBackupType.js";

/** A volume of the VM; its names must be known to the program, since they become part of the images' names. */
export interface VmBackupVolume {
  /** Volume group of the volume. */
  readonly volumeGroup: string;
  /** Logical volume that is backed up. */
  readonly origin: string;
  /** Size of the snapshot's COW store while it is copied, e.g. `"20%ORIGIN"`; left out for a thin volume. */
  readonly size?: string | number;
  /** Chunk of the COW store in bytes, or `"64K"`. */
  readonly chunkSize?: string | number;
}

/** Arguments of a `VmBackup`. What is not described here is as of a `BackupImage`. */
export interface VmBackupArgs
  extends Pick<
    BackupImageArgs,
    "host" | "source" | "mountPoint" | "compress" | "connections" | "bandwidthLimit" | "verify" | "deepCheck"
  > {
  /** Absolute path of the folder on the host in which the images are: `NAME.GROUP.VOLUME.DAY.FORMAT`. It must exist. */
  readonly folder: string;
  /** The volumes of the VM: frozen together once, snapshotted, thawed, then copied. */
  readonly volumes: readonly VmBackupVolume[];
  /** How many backups are kept; see `generations`. */
  readonly keep: RetentionPolicy;
  /** What is in the folder: `await listImages(host, folder)`, asked once for all VMs. */
  readonly made: readonly Image[];
  /** Format of the images. Default `"raw"`. */
  readonly format?: "raw" | "qcow2";
  /** What day it is, by the local time of this machine. Default: now. */
  readonly now?: Date;
}

/**
 * The backups of one VM: one `BackupImage` for each day that is to be kept, called `NAME-YYYY-MM-DD`.
 *
 * @example
 * export = async () => {
 *   const made = await listImages("backup1", "/var/backups");
 *   new VmBackup("vm1", {
 *     host: "backup1",
 *     folder: "/var/backups",
 *     source: { host: "server1", listenAddress: "10.0.0.1" },
 *     volumes: [{ volumeGroup: "VgVm", origin: "LV-VM1", size: "20%ORIGIN" }],
 *     keep: { daily: 7, weekly: 4 },
 *     made,
 *   });
 * };
 */
export class VmBackup extends pulumi.ComponentResource {
  /** The days of which there are to be backups, the newest first. */
  readonly keys: readonly string[];
  /** Today's backup. */
  readonly today: BackupImage;

  constructor(name: string, args: VmBackupArgs, options?: pulumi.ComponentResourceOptions) {
    super("lvm-nbd:index:VmBackup", name, {}, options);
    const { folder, volumes, keep, made, format = "raw", now = new Date() } = args;
    const { parts, outputs } = vmBackupParts({ name, folder, volumes, keep, made, format, now });
    const images = parts.map(({ name: image, handedOn, inputs }) => {
      const { host, source } = args;
      const own = Object.fromEntries(Object.entries(args).filter(([key]) => handedOn.includes(key)));
      const resource = new BackupImage(image, { host, source, ...own, ...inputs }, { parent: this });
      return { existing: inputs.existing, resource };
    });
    const today = images.find(({ existing }) => !existing)?.resource;
    if (today === undefined) throw new Error("today's backup is not among those that should exist");
    this.today = today;
    this.keys = outputs.keys;
    this.registerOutputs(outputs);
  }
}
