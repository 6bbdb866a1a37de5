/** The resource types by name, each loaded when it is first asked for: most stacks have few of them. */
import type { AnyResourceType } from "./resource.js";

const loaders: Readonly<Record<string, () => Promise<AnyResourceType>>> = {
  HostSetup: async () => (await import("../resources/hostSetup.js")).hostSetup,
  LvSnapshot: async () => (await import("../resources/lvSnapshot.js")).lvSnapshot,
  NbdExport: async () => (await import("../resources/nbdExport.js")).nbdExport,
  NbdAttachment: async () => (await import("../resources/nbdAttachment.js")).nbdAttachment,
  Mount: async () => (await import("../resources/mount.js")).mount,
  VolumeCopy: async () => (await import("../resources/volumeCopy.js")).volumeCopy,
  BackupImage: async () => (await import("../resources/backupImage.js")).backupImage,
  LvRestore: async () => (await import("../resources/lvRestore.js")).lvRestore,
};

/** Their names. */
export const resourceNames: readonly string[] = Object.keys(loaders);

/** The type of that name. Throws for a name that no version of this package knows. */
export async function loadResourceType(name: string): Promise<AnyResourceType> {
  const load = Object.hasOwn(loaders, name) ? loaders[name] : undefined;
  if (load !== undefined) return load();
  throw new Error(
    `pulumi-lvm-nbd has no resource "${name}": the stack was made with a newer version of the package`,
  );
}
