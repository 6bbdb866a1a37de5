/** VmBackup as a program of this language declares it: the resources are those that the plugin makes of it. */
import * as pulumi from "@pulumi/pulumi";
import { beforeAll, expect, it, vi } from "vitest";
import type { Image } from "../../provider/backup/listImages.js";
import { composeAs } from "../../provider/core/component.js";
import { componentType } from "../../provider/core/registry.js";
import { VmBackup } from "../../provider/index.js";
import { untouchedHost } from "../support/fakeHost.js";

type Values = Readonly<Record<string, unknown>>;

let registered: { type: string; name: string; inputs: Values }[] = [];

beforeAll(async () => {
  await pulumi.runtime.setMocks(
    {
      newResource: ({ type, name, inputs }) => {
        registered.push({ type, name, inputs });
        return { id: `${name}-id`, state: inputs };
      },
      call: () => ({}),
    },
    "project",
    "stack",
    false,
    "organisation",
  );
});

const now = "2026-11-30T03:00:00";
const declared = {
  ...{ host: "backup1", folder: "/backup", keep: { daily: 3 }, connections: 2, compress: true },
  source: { host: "server1", listenAddress: "10.0.0.1" },
  volumes: [{ volumeGroup: "VgVm", origin: "disk", size: "16M" }],
};

function image(day: string, format: string): Image {
  const file = `/backup/vm1.VgVm.disk.${day}.${format}`;
  return {
    ...{ file, generation: "", format, sha256: "0", sizeBytes: 1, completedAt: `${day}T03:00:00Z` },
    ...{ takenAt: `${day}T03:00:00Z`, verified: true, sound: true, volumeGroup: "VgVm", origin: "disk" },
    ...{ together: [file], moment: undefined },
  };
}

/** The images, the newest first, when there are so many. */
function declaredImages(count: number): Promise<typeof registered> {
  return vi.waitFor(() => {
    const images = registered.filter(({ type }) => type.endsWith(":BackupImage"));
    expect(images).toHaveLength(count);
    return images.sort((one, other) => (one.name < other.name ? 1 : -1));
  });
}

it("has a backup for each day that is kept, today's the only one that may be made", async () => {
  registered = [];
  const made = [image("2026-11-29", "qcow2"), image("2026-11-28", "raw"), image("2026-11-27", "raw")];
  const backup = new VmBackup("vm1", { ...declared, format: "qcow2", now: new Date(now), made });
  expect(backup.keys).toEqual(["2026-11-30", "2026-11-29", "2026-11-28"]);
  const images = await declaredImages(3);
  expect(images.map(({ name }) => name)).toEqual(backup.keys.map((key) => `vm1-${key}`));
  expect(images.map(({ inputs }) => inputs.existing)).toEqual([false, true, true]);
  // Of another format than the declared one what is there is kept.
  expect(images.map(({ inputs }) => [inputs.format, inputs.compress])).toEqual([
    ["qcow2", true],
    ["qcow2", true],
    ["raw", undefined],
  ]);
  for (const { inputs } of images)
    expect(inputs).toMatchObject({ host: "backup1", source: declared.source, connections: 2 });
});

it("declares the same as the plugin makes of it", async () => {
  registered = [];
  const backup = new VmBackup("vm1", { ...declared, format: "qcow2", now: new Date(now), made: [] });
  const [own] = await declaredImages(1);
  const environment = {
    openHost: async () => ({
      ...untouchedHost(),
      run: async () => ({ exitCode: 0, stdout: "end\n", stderr: "" }),
    }),
    progress: () => undefined,
    warn: () => undefined,
    signal: new AbortController().signal,
  };
  const wanted = { ...declared, format: "qcow2", now };
  const { parts, outputs } = await composeAs(
    componentType("VmBackup"),
    environment,
    "vm1",
    wanted,
    new Set(),
  );
  expect(outputs).toEqual({ keys: backup.keys });
  expect(parts).toHaveLength(1);
  const [part] = parts;
  const handedOn = Object.entries(declared).filter(([key]) => part?.handedOn.includes(key));
  expect(own).toMatchObject({ name: part?.name, inputs: { ...Object.fromEntries(handedOn) } });
  const { volumes, ...inputs } = part?.inputs ?? {};
  expect(own?.inputs).toMatchObject(inputs);
  // The defaults of a volume come with its check in the one, and with the component's in the other.
  expect(volumes).toEqual([
    { ...declared.volumes[0], chunkSize: 65536, file: "/backup/vm1.VgVm.disk.2026-11-30.qcow2" },
  ]);
  expect(own?.inputs.volumes).toEqual([
    { ...declared.volumes[0], file: "/backup/vm1.VgVm.disk.2026-11-30.qcow2" },
  ]);
});
