/** The resource types by name, each loaded when it is first asked for: most stacks have few of them. */
import { once } from "./once.js";
import type { AnyResourceType } from "./resource.js";

/** Kept, since Node looks for a module anew each time that it is imported. */
const loaders: Readonly<Record<string, () => Promise<AnyResourceType>>> = {
  HostSetup: once(async () => (await import("../resources/hostSetup.js")).hostSetup),
  LvSnapshot: once(async () => (await import("../resources/lvSnapshot.js")).lvSnapshot),
  NbdExport: once(async () => (await import("../resources/nbdExport.js")).nbdExport),
  NbdAttachment: once(async () => (await import("../resources/nbdAttachment.js")).nbdAttachment),
  Mount: once(async () => (await import("../resources/mount.js")).mount),
  VolumeCopy: once(async () => (await import("../resources/volumeCopy.js")).volumeCopy),
  BackupImage: once(async () => (await import("../resources/backupImage.js")).backupImage),
  LvRestore: once(async () => (await import("../resources/lvRestore.js")).lvRestore),
};

/** Their names. */
export const resourceNames: readonly string[] = Object.keys(loaders);

/** The type of that name. Throws for a name that no version of this package knows. */
export async function loadResourceType(name: string): Promise<AnyResourceType> {
  const load = Object.hasOwn(loaders, name) ? loaders[name] : undefined;
  if (load === undefined) throw unknownResource(name);
  return load();
}

export function unknownResource(name: string): Error {
  return new Error(
    `pulumi-lvm-nbd has no resource "${name}": the stack was made with a newer version of the package`,
  );
}
