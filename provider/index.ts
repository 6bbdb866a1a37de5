/** What a Pulumi program imports. */
export { type ErrorCode, errorCodes } from "./core/errors.js";
export {
  BackupImage,
  type BackupImageArgs,
  LvSnapshot,
  type LvSnapshotArgs,
  NbdAttachment,
  type NbdAttachmentArgs,
  NbdExport,
  type NbdExportArgs,
  VolumeCopy,
  type VolumeCopyArgs,
} from "./pulumi/dynamic.js";
