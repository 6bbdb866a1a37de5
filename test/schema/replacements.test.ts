/** What schema.json says of a property that makes the thing anew, held against the resource's own `diff`. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { z } from "zod";
import { createHandlers } from "../../provider/core/handlers.js";
import { resourceType, resourceTypes } from "../../provider/core/registry.js";
import { untouchedHost } from "../support/fakeHost.js";

type Values = Readonly<Record<string, unknown>>;

/** A resource as it is in a state, and other values of its properties. */
interface Sample {
  readonly type: string;
  readonly declared: Values;
  readonly outputs: Values;
  readonly others: Readonly<Record<string, readonly unknown[]>>;
}

/** A value that is only known later. */
const unknown = Symbol("unknown");

const host = {
  address: "192.0.2.1",
  user: "admin",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const common = { host, owner: "o/p/s/vm1" };
const everywhere = { host: [{ ...host, password: "y" }], adopt: [true] };
const certificates = { caCertificate: "a", certificate: "b", privateKey: "c" };
const uuid = "b6tJ4e-aaaa-bbbb-cccc-dddd-eeee-ffffff";
const otherUuid = "c7uK5f-aaaa-bbbb-cccc-dddd-eeee-ffffff";

const snapshot = { host, volumeGroup: "VgVm", name: "vm1-snap", uuid };
const copy = { connections: [8], bandwidthLimit: ["20M"], mountPoint: ["/var/backups"], deepCheck: [true] };
const copied = {
  ...{ sha256: "a".repeat(64), sizeBytes: 1, allocatedBytes: 1, seconds: 1, bytesPerSecond: 1 },
  ...{ completedAt: "2026-01-01T00:00:00.000Z", verified: true, copyId: "c", path: "/var/backups/vm1" },
};

const samples: readonly Sample[] = [
  {
    type: "HostSetup",
    declared: { roles: ["source"] },
    outputs: {
      ...{ packagesInstalled: [], distribution: "", kernel: "", versions: {}, nbdModule: true },
      ...{ problems: [], state: "ready" },
    },
    others: {
      ...everywhere,
      ...{ roles: [["client"]], server: ["qemu-nbd"], packages: [false], lvmFilter: [false] },
    },
  },
  {
    type: "LvSnapshot",
    declared: { volumeGroup: "VgVm", origin: "vm1", name: "vm1-snap", size: "16M" },
    outputs: {
      ...{
        uuid,
        path: "/dev/VgVm/vm1-snap",
        sizeBytes: 16777216,
        originSizeBytes: 67108864,
        originUuid: "o",
      },
      ...{ createdAt: "2026-01-01T00:00:00.000Z", usedPercent: 3, state: "valid" },
    },
    others: {
      ...everywhere,
      ...{ volumeGroup: ["VgOther"], origin: ["vm2"], name: ["vm1-other"], size: ["32M"], readOnly: [false] },
      ...{ chunkSize: ["128K", 4096], tags: [["mine"]], quiesce: [{ freeze: "f", thaw: "t" }] },
      triggers: [["2"], [2], [true, 1]],
    },
  },
  {
    type: "NbdExport",
    declared: { device: "/dev/VgVm/vm1-snap", exportName: "vm1", listenAddress: "127.0.0.1" },
    outputs: { uri: "nbd://127.0.0.1:10809/vm1", sizeBytes: 1, state: "serving" },
    others: {
      ...everywhere,
      ...{ device: ["/dev/VgVm/vm2-snap"], exportName: ["vm2"], listenAddress: ["127.0.0.2"], port: [10810] },
      ...{
        readOnly: [false],
        clients: [["10.0.0.2"]],
        clientsEnforcedElsewhere: [true],
        server: ["qemu-nbd"],
      },
      ...{ tls: [true], triggers: [["2"]] },
    },
  },
  {
    type: "NbdExport",
    declared: { file: "/var/backups/vm1.raw", exportName: "vm1", listenAddress: "127.0.0.1" },
    outputs: { uri: "nbd://127.0.0.1:10809/vm1", sizeBytes: 1, state: "serving" },
    others: { file: ["/var/backups/vm2.raw"], format: ["qcow2"] },
  },
  {
    type: "NbdAttachment",
    declared: { name: "vm1", uri: "nbd://10.0.0.1/vm1" },
    outputs: { device: "/dev/nbd0", path: "/dev/lvm-nbd/vm1", sizeBytes: 1, state: "attached" },
    others: {
      ...everywhere,
      // The same export, encrypted from now on, is reached anew in place.
      ...{ name: ["vm2"], uri: ["nbd://10.0.0.2/vm1", "nbds://10.0.0.1/vm1"], device: ["/dev/nbd1"] },
      ...{
        readOnly: [false],
        connections: [2],
        timeoutSeconds: [10],
        blockSize: [4096],
        tls: [certificates],
      },
    },
  },
  {
    type: "NbdAttachment",
    declared: { name: "vm1", server: "10.0.0.1", port: 10809, exportName: "vm1" },
    outputs: { device: "/dev/nbd0", path: "/dev/lvm-nbd/vm1", sizeBytes: 1, state: "attached" },
    others: { server: ["10.0.0.2"], port: [10810], exportName: ["vm2"] },
  },
  {
    type: "Mount",
    declared: { device: "/dev/lvm-nbd/vm1", partition: 1, path: "/mnt/vm1" },
    outputs: { fileSystem: { type: "ext4" }, options: "ro", mountedDevice: "/dev/nbd0p1", state: "mounted" },
    others: { ...everywhere, device: ["/dev/lvm-nbd/vm2"], partition: [2], path: ["/mnt/vm2"] },
  },
  {
    type: "VolumeCopy",
    declared: { uri: "nbd://10.0.0.1/vm1", file: "/var/backups/vm1.raw", snapshot },
    outputs: { ...copied, manifest: "m", filesystem: "f", state: "complete" },
    others: {
      ...{ ...everywhere, ...copy },
      ...{ uri: ["nbd://10.0.0.1/vm2"], tls: [certificates], snapshot: [{ ...snapshot, uuid: otherUuid }] },
      ...{ file: ["/var/backups/vm2.raw"], format: ["qcow2"], compress: [true], verify: [false] },
      triggers: [["2"]],
    },
  },
  {
    type: "VolumeCopy",
    declared: { uri: "nbd://10.0.0.1/vm1", volume: { volumeGroup: "VgVm", name: "vm1" } },
    outputs: { ...copied, uuid, state: "complete" },
    others: { volume: [{ volumeGroup: "VgVm", name: "vm2" }] },
  },
  {
    type: "BackupImage",
    declared: {
      source: { host, listenAddress: "10.0.0.1" },
      volumes: [{ volumeGroup: "VgVm", origin: "vm1", size: "1G", file: "/var/backups/vm1.raw" }],
    },
    outputs: { images: [], takenAt: "", copyId: "c", state: "complete" },
    others: {
      ...{ ...everywhere, ...copy },
      source: [{ host: "server2", listenAddress: "10.0.0.2" }],
      volumes: [[{ volumeGroup: "VgVm", origin: "vm2", size: "1G", file: "/var/backups/vm2.raw" }]],
      ...{ format: ["qcow2"], compress: [true], verify: [false], existing: [true], triggers: [["2"]] },
    },
  },
  {
    type: "LvRestore",
    declared: { volumeGroup: "VgVm", origin: "vm1", snapshot: { name: "vm1-snap", uuid } },
    outputs: {
      ...{ state: "restored", snapshotRemoved: true, restoredSnapshot: uuid, restoredImage: "" },
      ...{ originUuid: uuid, startedAt: "", restoredAt: "", seconds: 1, restoreId: "r" },
    },
    others: {
      ...everywhere,
      ...{ volumeGroup: ["Vg2"], origin: ["vm2"], snapshot: [{ name: "vm1-snap2", uuid: otherUuid }] },
      ...{ image: [{ uri: "nbd://10.0.0.1/vm1", sha256: "a".repeat(64) }], overwrite: [uuid] },
      ...{ connections: [8], bandwidthLimit: ["20M"], whenOpen: ["atNextActivation"], triggers: [["2"]] },
    },
  },
];

const { resources } = z
  .object({
    resources: z.record(
      z.string(),
      z.object({
        inputProperties: z.record(
          z.string(),
          z.looseObject({ willReplaceOnChanges: z.boolean().optional() }),
        ),
      }),
    ),
  })
  .parse(JSON.parse(readFileSync(join(__dirname, "..", "..", "schema.json"), "utf8")));

function propertiesOf(type: string) {
  return Object.entries(resources[`lvm-nbd:index:${type}`]?.inputProperties ?? {});
}

const samplesOf = (type: string) => samples.filter((sample) => sample.type === type);

/** What the resource makes of another value of a property, or of one that is not known yet; `undefined`: nothing. */
async function effect(sample: Sample, property: string, value: unknown): Promise<string | undefined> {
  // Whether the host could take the new one is not asked here.
  const { suitable: _, ...type } = resourceType(sample.type);
  const inputs: Values = type.inputs.parse({ ...common, ...sample.declared });
  const { [property]: _old, ...rest } = inputs;
  const { changes } = await createHandlers(type, {
    openHost: async () => untouchedHost(),
    progress: () => undefined,
    warn: () => undefined,
    signal: new AbortController().signal,
  }).diff(
    { ...inputs, ...sample.outputs },
    value === unknown ? rest : { ...rest, [property]: value },
    new Set(value === unknown ? [property] : []),
  );
  return changes.find((change) => change.property === property)?.effect;
}

describe.each(resourceTypes.map(({ type }) => type))("%s in schema.json", (type) => {
  it("has a sample of every property here", () => {
    const sampled = samplesOf(type).flatMap(({ others }) => Object.keys(others));
    expect(new Set(sampled)).toEqual(new Set(propertiesOf(type).map(([property]) => property)));
  });

  it.each(propertiesOf(type))("tells of %s whether a change makes the thing anew", async (property, spec) => {
    const seen: (string | undefined)[] = [];
    for (const sample of samplesOf(type))
      for (const value of sample.others[property] ?? []) seen.push(await effect(sample, property, value));
    if (!spec.willReplaceOnChanges) {
      expect(seen.some((one) => one !== "replace")).toBe(true);
      return;
    }
    for (const sample of samplesOf(type).filter(({ others }) => property in others))
      seen.push(await effect(sample, property, unknown));
    expect(new Set(seen)).toEqual(new Set(["replace"]));
  });
});
