/** What a Pulumi program imports. */
export { generations, type RetentionPolicy } from "./backup/generations.js";
export type { Image } from "./backup/listImages.js";
export { VmBackup, type VmBackupArgs, type VmBackupVolume } from "./components/vmBackup.js";
export { type ErrorCode, errorCodes } from "./core/errors.js";
export type { GetHostArgs, GetHostResult } from "./functions/getHost.js";
export type { GetVolumesArgs, GetVolumesResult } from "./functions/getVolumes.js";
export {
  BackupImage,
  type BackupImageArgs,
  HostSetup,
  type HostSetupArgs,
  LvRestore,
  type LvRestoreArgs,
  LvSnapshot,
  type LvSnapshotArgs,
  Mount,
  type MountArgs,
  NbdAttachment,
  type NbdAttachmentArgs,
  NbdExport,
  type NbdExportArgs,
  VolumeCopy,
  type VolumeCopyArgs,
} from "./pulumi/dynamic.js";
export { getHost, getVolumes, listImages } from "./pulumi/questions.js";
