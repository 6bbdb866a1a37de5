/** All resource types by name, and the components that are made of them. */
import { vmBackup } from "../components/vmBackupType.js";
import { backupImage } from "../resources/backupImage.js";
import { hostSetup } from "../resources/hostSetup.js";
import { lvRestore } from "../resources/lvRestore.js";
import { lvSnapshot } from "../resources/lvSnapshot.js";
import { mount } from "../resources/mount.js";
import { nbdAttachment } from "../resources/nbdAttachment.js";
import { nbdExport } from "../resources/nbdExport.js";
import { volumeCopy } from "../resources/volumeCopy.js";
import type { AnyComponentType } from "./component.js";
import { LvmNbdError } from "./errors.js";
import { unknownResource } from "./lazyRegistry.js";
import type { AnyResourceType } from "./resource.js";

export const resourceTypes: readonly AnyResourceType[] = [
  hostSetup,
  lvSnapshot,
  nbdExport,
  nbdAttachment,
  mount,
  volumeCopy,
  backupImage,
  lvRestore,
];

export const componentTypes: readonly AnyComponentType[] = [vmBackup];

/** The type of that name. Throws for a name that no version of this package knows. */
export function resourceType(name: string): AnyResourceType {
  const found = resourceTypes.find((candidate) => candidate.type === name);
  if (found === undefined) throw unknownResource(name);
  return found;
}

/** The component of that name. Raises INVALID_INPUT for what is none. */
export function componentType(name: string): AnyComponentType {
  const found = componentTypes.find((candidate) => candidate.type === name);
  if (found === undefined)
    throw new LvmNbdError("INVALID_INPUT", { message: `${name} is no component of lvm-nbd` });
  return found;
}
