/**
 * The resources as a program declares them: Pulumi dynamic resources whose closure in the state is a constant
 * few lines, whatever version of the package made it.
 */
import * as pulumi from "@pulumi/pulumi";
import { outputsOf } from "../core/outputs.js";
import { ownerOf } from "../core/owner.js";
import type { AnyResourceType } from "../core/resource.js";
import {
  type BackupImageDeclaration,
  type BackupImageOutputs,
  backupImage,
} from "../resources/backupImage.js";
import { type HostSetupDeclaration, type HostSetupOutputs, hostSetup } from "../resources/hostSetup.js";
import { type LvRestoreDeclaration, type LvRestoreOutputs, lvRestore } from "../resources/lvRestore.js";
import { type LvSnapshotDeclaration, type LvSnapshotOutputs, lvSnapshot } from "../resources/lvSnapshot.js";
import { type MountDeclaration, type MountOutputs, mount } from "../resources/mount.js";
import {
  type NbdAttachmentDeclaration,
  type NbdAttachmentOutputs,
  nbdAttachment,
} from "../resources/nbdAttachment.js";
import { type NbdExportDeclaration, type NbdExportOutputs, nbdExport } from "../resources/nbdExport.js";
import { type VolumeCopyDeclaration, type VolumeCopyOutputs, volumeCopy } from "../resources/volumeCopy.js";
import type { HostArgs } from "../ssh/types.js";
import { requireKnownNames } from "./stackConfiguration.js";
import { thinProvider } from "./thinProvider.js";
import { packageName, pluginToken } from "./urn.js";

/** A value that may also be given as an output, at any depth. */
type DeepInput<T> = pulumi.Input<
  T extends string | number | boolean | undefined
    ? T
    : T extends readonly (infer Item)[]
      ? readonly DeepInput<Item>[]
      : { readonly [Key in keyof T]: DeepInput<T[Key]> }
>;

type Args<Declaration, NameInput extends keyof Declaration = never> = {
  readonly [Key in keyof Omit<Declaration, "owner" | NameInput>]: DeepInput<Declaration[Key]>;
} & { readonly [Key in NameInput]?: DeepInput<Declaration[Key]> };

/** Arguments of a `HostSetup`; the README's table says what each means. */
export type HostSetupArgs = Args<HostSetupDeclaration>;
/** Arguments of an `LvSnapshot`; the README's table says what each means. */
export type LvSnapshotArgs = Args<LvSnapshotDeclaration, "name">;
/** Arguments of an `NbdExport`; the README's table says what each means. */
export type NbdExportArgs = Args<NbdExportDeclaration, "exportName">;
/** Arguments of an `NbdAttachment`; the README's table says what each means. */
export type NbdAttachmentArgs = Args<NbdAttachmentDeclaration, "name">;
/** Arguments of a `Mount`; the README's table says what each means. */
export type MountArgs = Args<MountDeclaration>;
/** Arguments of a `VolumeCopy`; the README's table says what each means. `snapshot` may be an `LvSnapshot`. */
export type VolumeCopyArgs = Omit<Args<VolumeCopyDeclaration>, "snapshot"> & {
  readonly snapshot?: Args<VolumeCopyDeclaration>["snapshot"] | LvSnapshot;
};

/** Arguments of a `BackupImage`; the README's table says what each means. */
export type BackupImageArgs = Args<BackupImageDeclaration>;

/** Arguments of an `LvRestore`; the README's table says what each means. `snapshot` may be an `LvSnapshot`. */
export type LvRestoreArgs = Omit<Args<LvRestoreDeclaration>, "snapshot"> & {
  readonly snapshot?: Args<LvRestoreDeclaration>["snapshot"] | LvSnapshot;
};

abstract class LvmNbdResource extends pulumi.dynamic.Resource {
  /** machine-id(5) of the host. */
  declare readonly machineId: pulumi.Output<string | undefined>;

  protected constructor(
    type: AnyResourceType,
    name: string,
    args: Readonly<Record<string, unknown>>,
    options: pulumi.CustomResourceOptions | undefined,
  ) {
    requireKnownNames();
    const outputs = Object.fromEntries(Object.keys(outputsOf(type).shape).map((key) => [key, undefined]));
    const inputs = {
      ...outputs,
      ...args,
      ...(type.nameInput === undefined ? {} : { [type.nameInput]: args[type.nameInput] ?? name }),
      host: withSecrets(args.host),
      owner: ownerOf(pulumi.getOrganization(), pulumi.getProject(), pulumi.getStack(), name),
    };
    // A stack that was made with the plugin goes on with what it has.
    const moved = pulumi.mergeOptions(options, { aliases: [{ type: pluginToken(type.type) }] });
    super(thinProvider(type.type), name, inputs, moved, packageName, type.type);
  }
}

/** Makes a host ready for its roles, and tells what it is. */
export class HostSetup extends LvmNbdResource {
  declare readonly packagesInstalled: pulumi.Output<HostSetupOutputs["packagesInstalled"]>;
  declare readonly distribution: pulumi.Output<HostSetupOutputs["distribution"]>;
  declare readonly kernel: pulumi.Output<HostSetupOutputs["kernel"]>;
  declare readonly versions: pulumi.Output<HostSetupOutputs["versions"]>;
  declare readonly nbdModule: pulumi.Output<HostSetupOutputs["nbdModule"]>;
  declare readonly nbdsMax: pulumi.Output<HostSetupOutputs["nbdsMax"]>;
  declare readonly globalFilter: pulumi.Output<HostSetupOutputs["globalFilter"]>;
  declare readonly cgroupBpf: pulumi.Output<HostSetupOutputs["cgroupBpf"]>;
  declare readonly problems: pulumi.Output<HostSetupOutputs["problems"]>;
  declare readonly state: pulumi.Output<HostSetupOutputs["state"]>;

  constructor(name: string, args: HostSetupArgs, options?: pulumi.CustomResourceOptions) {
    super(hostSetup, name, args, options);
  }
}

/** A moment of a logical volume, as a COW or thin snapshot. */
export class LvSnapshot extends LvmNbdResource {
  declare readonly host: pulumi.Output<HostArgs>;
  declare readonly name: pulumi.Output<string>;
  declare readonly volumeGroup: pulumi.Output<string>;
  declare readonly origin: pulumi.Output<string>;
  declare readonly uuid: pulumi.Output<LvSnapshotOutputs["uuid"]>;
  declare readonly path: pulumi.Output<LvSnapshotOutputs["path"]>;
  declare readonly sizeBytes: pulumi.Output<LvSnapshotOutputs["sizeBytes"]>;
  declare readonly originSizeBytes: pulumi.Output<LvSnapshotOutputs["originSizeBytes"]>;
  declare readonly originUuid: pulumi.Output<LvSnapshotOutputs["originUuid"]>;
  declare readonly createdAt: pulumi.Output<LvSnapshotOutputs["createdAt"]>;
  declare readonly usedPercent: pulumi.Output<LvSnapshotOutputs["usedPercent"]>;
  declare readonly state: pulumi.Output<LvSnapshotOutputs["state"]>;

  constructor(name: string, args: LvSnapshotArgs, options?: pulumi.CustomResourceOptions) {
    super(lvSnapshot, name, args, options);
  }
}

/** A block device, or the content of an image, offered over NBD to named clients. */
export class NbdExport extends LvmNbdResource {
  declare readonly exportName: pulumi.Output<string>;
  declare readonly device: pulumi.Output<NbdExportOutputs["device"]>;
  declare readonly file: pulumi.Output<NbdExportOutputs["file"]>;
  declare readonly uri: pulumi.Output<NbdExportOutputs["uri"]>;
  /** With `tls`: the `tls` of an attachment; a secret. */
  declare readonly clientTls: pulumi.Output<NbdExportOutputs["clientTls"]>;
  declare readonly certificatesExpireAt: pulumi.Output<NbdExportOutputs["certificatesExpireAt"]>;
  declare readonly sizeBytes: pulumi.Output<NbdExportOutputs["sizeBytes"]>;
  declare readonly state: pulumi.Output<NbdExportOutputs["state"]>;

  constructor(name: string, args: NbdExportArgs, options?: pulumi.CustomResourceOptions) {
    const additionalSecretOutputs = [...(options?.additionalSecretOutputs ?? []), "clientTls"];
    super(nbdExport, name, { ...args, tls: secretTls(args.tls) }, { ...options, additionalSecretOutputs });
  }
}

/** An export as a block device of another host. */
export class NbdAttachment extends LvmNbdResource {
  declare readonly name: pulumi.Output<string>;
  declare readonly device: pulumi.Output<NbdAttachmentOutputs["device"]>;
  declare readonly path: pulumi.Output<NbdAttachmentOutputs["path"]>;
  declare readonly sizeBytes: pulumi.Output<NbdAttachmentOutputs["sizeBytes"]>;
  declare readonly certificatesExpireAt: pulumi.Output<NbdAttachmentOutputs["certificatesExpireAt"]>;
  declare readonly state: pulumi.Output<NbdAttachmentOutputs["state"]>;

  constructor(name: string, args: NbdAttachmentArgs, options?: pulumi.CustomResourceOptions) {
    super(nbdAttachment, name, { ...args, tls: secretTls(args.tls) }, options);
  }
}

/** The file system of an attachment, or of a partition of it, read-only at a path of the host. */
export class Mount extends LvmNbdResource {
  declare readonly device: pulumi.Output<string>;
  declare readonly path: pulumi.Output<string>;
  declare readonly fileSystem: pulumi.Output<MountOutputs["fileSystem"]>;
  declare readonly options: pulumi.Output<MountOutputs["options"]>;
  declare readonly mountedDevice: pulumi.Output<MountOutputs["mountedDevice"]>;
  declare readonly state: pulumi.Output<MountOutputs["state"]>;

  constructor(name: string, args: MountArgs, options?: pulumi.CustomResourceOptions) {
    super(mount, name, args, options);
  }
}

/** What an export serves, verified, in a file or in a logical volume of another host. */
export class VolumeCopy extends LvmNbdResource {
  declare readonly file: pulumi.Output<VolumeCopyOutputs["file"]>;
  declare readonly volume: pulumi.Output<VolumeCopyOutputs["volume"]>;
  declare readonly path: pulumi.Output<VolumeCopyOutputs["path"]>;
  declare readonly uuid: pulumi.Output<VolumeCopyOutputs["uuid"]>;
  declare readonly manifest: pulumi.Output<VolumeCopyOutputs["manifest"]>;
  declare readonly sha256: pulumi.Output<VolumeCopyOutputs["sha256"]>;
  declare readonly sizeBytes: pulumi.Output<VolumeCopyOutputs["sizeBytes"]>;
  declare readonly allocatedBytes: pulumi.Output<VolumeCopyOutputs["allocatedBytes"]>;
  declare readonly seconds: pulumi.Output<VolumeCopyOutputs["seconds"]>;
  declare readonly bytesPerSecond: pulumi.Output<VolumeCopyOutputs["bytesPerSecond"]>;
  declare readonly completedAt: pulumi.Output<VolumeCopyOutputs["completedAt"]>;
  declare readonly filesystem: pulumi.Output<VolumeCopyOutputs["filesystem"]>;
  declare readonly state: pulumi.Output<VolumeCopyOutputs["state"]>;

  constructor(name: string, args: VolumeCopyArgs, options?: pulumi.CustomResourceOptions) {
    super(
      volumeCopy,
      name,
      { ...args, snapshot: reference(args.snapshot), tls: secretTls(args.tls) },
      options,
    );
  }
}

/** One moment of the volumes of a VM, as verified images in files of another host. */
export class BackupImage extends LvmNbdResource {
  declare readonly volumes: pulumi.Output<BackupImageOutputs["volumes"]>;
  declare readonly images: pulumi.Output<BackupImageOutputs["images"]>;
  declare readonly takenAt: pulumi.Output<BackupImageOutputs["takenAt"]>;
  /** Snapshots (`GROUP/NAME`) that could not be taken down when the images were complete; `pulumi up` tries again. */
  declare readonly leftOnSource: pulumi.Output<BackupImageOutputs["leftOnSource"]>;
  declare readonly unfinished: pulumi.Output<BackupImageOutputs["unfinished"]>;
  declare readonly state: pulumi.Output<BackupImageOutputs["state"]>;

  constructor(name: string, args: BackupImageArgs, options?: pulumi.CustomResourceOptions) {
    super(backupImage, name, { ...args, source: withHostSecrets(args.source) }, options);
  }
}

/** Brings a logical volume back to the moment of one of its snapshots, or to a verified image, once. */
export class LvRestore extends LvmNbdResource {
  declare readonly volumeGroup: pulumi.Output<string>;
  declare readonly origin: pulumi.Output<string>;
  declare readonly state: pulumi.Output<LvRestoreOutputs["state"]>;
  declare readonly snapshotRemoved: pulumi.Output<LvRestoreOutputs["snapshotRemoved"]>;
  declare readonly restoredSnapshot: pulumi.Output<LvRestoreOutputs["restoredSnapshot"]>;
  declare readonly restoredImage: pulumi.Output<LvRestoreOutputs["restoredImage"]>;
  declare readonly originUuid: pulumi.Output<LvRestoreOutputs["originUuid"]>;
  declare readonly startedAt: pulumi.Output<LvRestoreOutputs["startedAt"]>;
  declare readonly restoredAt: pulumi.Output<LvRestoreOutputs["restoredAt"]>;
  declare readonly seconds: pulumi.Output<LvRestoreOutputs["seconds"]>;

  constructor(name: string, args: LvRestoreArgs, options?: pulumi.CustomResourceOptions) {
    const { snapshot } = args;
    const named = snapshot instanceof LvSnapshot ? { name: snapshot.name, uuid: snapshot.uuid } : snapshot;
    super(lvRestore, name, { ...args, snapshot: named, image: withSecretTls(args.image) }, options);
  }
}

/** A snapshot by its identity. Its resource's host is marked secret already where it has to be. */
function reference(snapshot: VolumeCopyArgs["snapshot"]): unknown {
  if (snapshot instanceof LvSnapshot) {
    const { host, volumeGroup, name, uuid } = snapshot;
    return { host, volumeGroup, name, uuid };
  }
  return withHostSecrets(snapshot);
}

/** A value that names a host of its own. */
function withHostSecrets(value: unknown): pulumi.Output<unknown> {
  const resolved: pulumi.Output<unknown> = pulumi.output<object | undefined>(value as object | undefined);
  return resolved.apply((known) =>
    typeof known === "object" && known !== null && "host" in known
      ? { ...known, host: withSecrets(known.host) }
      : known,
  );
}

/** Keys that are given are encrypted in the state; that there are some is no secret. */
function secretTls(value: unknown): unknown {
  return value === undefined || typeof value === "boolean" ? value : pulumi.secret(value);
}

/** A value that has a `tls` of its own. */
function withSecretTls(value: unknown): unknown {
  if (value === undefined) return undefined;
  return pulumi
    .output(value as object)
    .apply((known: object) => ("tls" in known ? { ...known, tls: secretTls(known.tls) } : known));
}

const secretFields = ["privateKey", "passphrase", "password"] as const;

/** Keys and passwords are encrypted in the state, whether the program marked them as secrets or not. */
function withSecrets(host: unknown): unknown {
  if (pulumi.Output.isInstance(host) || host instanceof Promise) {
    return pulumi.output(host).apply((value) => withSecrets(value));
  }
  if (Array.isArray(host)) return host.map(withSecrets);
  if (typeof host !== "object" || host === null) return host;
  return Object.fromEntries(
    Object.entries(host).map(([key, value]) => {
      if (key === "proxyJump") return [key, withSecrets(value)];
      const secret = (secretFields as readonly string[]).includes(key) && value !== undefined;
      return [key, secret ? pulumi.secret(value) : value];
    }),
  );
}
