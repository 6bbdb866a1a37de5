import * as pulumi from "@pulumi/pulumi";
import { beforeAll, describe, expect, it, vi } from "vitest";

interface Registered {
  readonly type: string;
  readonly name: string;
  readonly inputs: Record<string, unknown>;
}
const registered: Registered[] = [];

beforeAll(async () => {
  await pulumi.runtime.setMocks(
    {
      newResource: ({ type, name, inputs }) => {
        registered.push({ type, name, inputs });
        return {
          id: `${name}-id`,
          state: type.endsWith(":LvSnapshot") ? { ...inputs, uuid: "its UUID" } : inputs,
        };
      },
      call: () => ({}),
    },
    "project",
    "stack",
    false,
    "organisation",
  );
});

async function declare(
  make: (library: typeof import("../../provider/index.js")) => pulumi.Resource,
): Promise<Registered> {
  const resource = make(await import("../../provider/index.js"));
  await new Promise((resolve) => resource.urn.apply(resolve));
  const last = registered.at(-1);
  if (last === undefined) throw new Error("nothing was registered");
  return last;
}

describe("a declared resource", () => {
  it("has the type token, its name and its owner", async () => {
    const { type, name, inputs } = await declare(
      ({ LvSnapshot }) =>
        new LvSnapshot("vm1", { host: "server1", volumeGroup: "VgVm", origin: "LV-VM1", size: "1G" }),
    );
    expect(type).toBe("pulumi-nodejs:dynamic/lvm-nbd:LvSnapshot");
    expect(name).toBe("vm1");
    expect(inputs).toMatchObject({ name: "vm1", owner: "organisation/project/stack/vm1", host: "server1" });
  });

  it("is what the plugin has made under that name, beside the program's own aliases", async () => {
    let aliases: unknown;
    const transformations: pulumi.ResourceTransformation[] = [
      ({ opts }) => {
        aliases = opts.aliases;
        return undefined;
      },
    ];
    await declare(
      ({ NbdExport }) =>
        new NbdExport(
          "vm1",
          { host: "server1", device: "/dev/x", listenAddress: "127.0.0.1" },
          { aliases: [{ type: "before" }], transformations },
        ),
    );
    expect(aliases).toEqual([{ type: "before" }, { type: "lvm-nbd:index:NbdExport" }]);
  });

  it("is refused while the stack has a name in `lvm-nbd:` that means nothing, unless the project is called so", async () => {
    const { NbdAttachment } = await import("../../provider/index.js");
    const make = () => new NbdAttachment("c", { host: "server2", uri: "nbd://a/b" });
    const project = vi.spyOn(pulumi, "getProject");
    try {
      pulumi.runtime.setConfig("lvm-nbd:Hosts", "{}");
      expect(make).toThrow(/INVALID_INPUT: lvm-nbd:Hosts: is no property/);
      project.mockReturnValue("lvm-nbd");
      expect(make).not.toThrow();
    } finally {
      pulumi.runtime.setAllConfig({});
      project.mockRestore();
    }
  });

  it("takes the resource's name for its own only where none is given", async () => {
    const exported = await declare(
      ({ NbdExport }) =>
        new NbdExport("a", {
          host: "server1",
          device: "/dev/x",
          listenAddress: "127.0.0.1",
          exportName: "b",
        }),
    );
    expect(exported).toMatchObject({
      type: "pulumi-nodejs:dynamic/lvm-nbd:NbdExport",
      inputs: { exportName: "b" },
    });
    const attached = await declare(
      ({ NbdAttachment }) => new NbdAttachment("c", { host: "server2", uri: "nbd://a/b" }),
    );
    expect(attached).toMatchObject({
      type: "pulumi-nodejs:dynamic/lvm-nbd:NbdAttachment",
      inputs: { name: "c" },
    });
  });

  it("keeps keys and passwords secret, in jumps and in outputs too", async () => {
    const library = await import("../../provider/index.js");
    const jump = { address: "j", password: "planted-1" };
    const host = { address: "a", privateKey: "planted-2", passphrase: "planted-3", proxyJump: [jump] };
    for (const given of [host, pulumi.output(host), Promise.resolve(host)]) {
      const { inputs } = await declare(
        () => new library.NbdAttachment("s", { host: given, uri: "nbd://a/b" }),
      );
      expect(secretsIn(inputs.host)).toEqual(expect.arrayContaining(["planted-1", "planted-2", "planted-3"]));
      expect(plainText(inputs.host)).not.toContain("planted");
    }
  });

  it("keeps those of a second host secret as well", async () => {
    const { BackupImage, VolumeCopy } = await import("../../provider/index.js");
    const host = { address: "a", privateKey: "planted-1", password: "planted-2" };
    const backup = await declare(() => {
      const source = { host, listenAddress: "10.0.0.1" };
      const volumes = [{ volumeGroup: "VgVm", origin: "vm1", file: "/b" }];
      return new BackupImage("b", { host: "h", source, volumes });
    });
    const copy = await declare(() => {
      const snapshot = { host, volumeGroup: "VgVm", name: "vm1", uuid: "u" };
      return new VolumeCopy("c", { host: "h", file: "/c", uri: "nbd://a/b", snapshot });
    });
    for (const value of [backup.inputs.source, copy.inputs.snapshot]) {
      expect(secretsIn(value)).toEqual(expect.arrayContaining(["planted-1", "planted-2"]));
      expect(plainText(value)).not.toContain("planted");
    }
  });
});

it("a restore takes name and UUID from an LvSnapshot, and nothing else of it", async () => {
  const { LvRestore, LvSnapshot } = await import("../../provider/index.js");
  const place = { host: "server1", volumeGroup: "VgVm", origin: "LV-VM1" };
  const { inputs } = await declare(() => {
    const snapshot = new LvSnapshot("vm1-snap", { ...place, size: "1G" });
    return new LvRestore("vm1", { ...place, snapshot, triggers: ["monday"] });
  });
  expect(inputs).toMatchObject({ origin: "LV-VM1", triggers: ["monday"] });
  expect(inputs.snapshot).toEqual({ name: "vm1-snap", uuid: "its UUID" });
});

const secretKey = "4dabf18193072939515e22adb298388d";

/** The values marked as secret, as they cross the wire. */
function secretsIn(value: unknown, inside = false): string[] {
  if (typeof value === "string") return inside ? [value] : [];
  if (typeof value !== "object" || value === null) return [];
  const marked = secretKey in value;
  return Object.values(value).flatMap((child) => secretsIn(child, inside || marked));
}

/** Everything that is not marked as secret. */
function plainText(value: unknown): string {
  return JSON.stringify(value, (_key, child: unknown) =>
    typeof child === "object" && child !== null && secretKey in child ? "secret" : child,
  );
}
