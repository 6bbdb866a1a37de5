import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import {
  appendFileSync,
  chmodSync,
  mkdirSync,
  mkdtempSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { imagesAtOnce, listImages } from "../../provider/backup/listImages.js";
import { LvmNbdError } from "../../provider/core/errors.js";
import type { Context } from "../../provider/core/resource.js";
import type { Host, HostArgs } from "../../provider/ssh/types.js";
import { connection, type FakeServer, startFakeServer } from "../ssh/fakeServer.js";
import { fakeHost } from "../support/fakeHost.js";

let server: FakeServer;
let host: HostArgs;
let folder: string;
let bin: string;

beforeAll(async () => {
  // Everybody's folder for what is temporary is root's alone here.
  bin = mkdtempSync(join(tmpdir(), "lvm-nbd-bin-"));
  const stat = `#!/bin/sh\n[ "$*" != "-c %u %A ${tmpdir()}" ] || { echo "0 drwxr-xr-x"; exit; }\nexec /usr/bin/stat "$@"\n`;
  writeFileSync(join(bin, "stat"), stat, { mode: 0o755 });
  // A server that runs what it is told in a real shell.
  server = await startFakeServer({
    run: ({ line, channel }) => {
      const child = spawn("sh", ["-c", line.replace("PATH=", `PATH=${bin}:`)]);
      child.stdout.on("data", (data) => channel.write(data));
      child.stderr.on("data", (data) => channel.stderr.write(data));
      child.on("close", (code) => {
        channel.exit(code ?? 255);
        channel.end();
      });
    },
  });
  host = { ...connection({ port: server.port }), hostKey: server.publicKey, sudo: false };
});
afterAll(() => {
  server.close();
  rmSync(bin, { recursive: true });
});
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "lvm-nbd-images-"));
  return () => rmSync(folder, { recursive: true });
});

const sha256 = createHash("sha256").update("x").digest("hex");

/** An image as it is made, of that content. */
async function image(name: string, completedAt: string, content = "x"): Promise<void> {
  const file = join(folder, name);
  writeFileSync(file, content);
  const { stdout } = await new Promise<{ stdout: string }>((resolve) => {
    const child = spawn("stat", ["-c", "%s %.9Y", file]);
    let stdout = "";
    child.stdout.on("data", (data) => {
      stdout += data;
    });
    child.on("close", () => resolve({ stdout: stdout.trim() }));
  });
  const manifest = {
    ...{ kind: "lvm-nbd image", mark: "lvm-nbd.owner=o/p/s/vm", copyId: "1", generation: "g" },
    image: { format: "raw", sha256, sizeBytes: 1, verified: true, facts: stdout },
    source: {
      uri: "nbd://10.0.0.1/vm",
      snapshot: { volumeGroup: "VgVm", origin: "vm", takenAt: "2026-01-01T00:00:00.000Z" },
    },
    ...{ seconds: 1, startedAt: completedAt, completedAt, tools: "nbdcopy" },
  };
  writeFileSync(`${file}.manifest.json`, JSON.stringify(manifest));
}

describe("the images in a folder", () => {
  it("are told by their manifests, the newest first", async () => {
    await image("2026-01-01.raw", "2026-01-01T01:00:00.000Z");
    await image("2026-01-02.qcow2", "2026-01-02T01:00:00.000Z");
    const images = await listImages(host, folder);
    expect(images.map(({ generation }) => generation)).toEqual(["2026-01-02", "2026-01-01"]);
    expect(images[1]).toEqual({
      ...{ file: join(folder, "2026-01-01.raw"), generation: "2026-01-01", format: "raw", sha256 },
      ...{ sizeBytes: 1, verified: true, sound: true },
      ...{ completedAt: "2026-01-01T01:00:00.000Z", takenAt: "2026-01-01T00:00:00.000Z" },
      ...{ volumeGroup: "VgVm", origin: "vm", together: [join(folder, "2026-01-01.raw")] },
      moment: undefined,
    });
  });

  it("are none in an empty folder, among files of others, and of an unfinished copy", async () => {
    expect(await listImages(host, folder)).toEqual([]);
    writeFileSync(join(folder, "letter.txt"), "x");
    writeFileSync(join(folder, "notes.manifest.json"), "{}");
    writeFileSync(join(folder, "broken.manifest.json"), "no JSON");
    await image("gone.raw", "2026-01-01T01:00:00.000Z");
    rmSync(join(folder, "gone.raw"));
    mkdirSync(join(folder, "a.part"));
    mkdirSync(join(folder, "folder.manifest.json"));
    await image("led.raw", "2026-01-01T01:00:00.000Z");
    renameSync(join(folder, "led.raw.manifest.json"), join(folder, "elsewhere"));
    symlinkSync("elsewhere", join(folder, "led.raw.manifest.json"));
    expect(await listImages(host, folder)).toEqual([]);
  });

  it("are not sound where the file was written to", async () => {
    await image("written.raw", "2026-01-02T01:00:00.000Z");
    appendFileSync(join(folder, "written.raw"), "more");
    expect((await listImages(host, folder)).map(({ sound }) => sound)).toEqual([false]);
  });

  it("have any name", async () => {
    await image("a b'$(id)\n\"ä.raw", "2026-01-01T01:00:00.000Z");
    await image(".hidden", "2026-01-01T01:00:00.000Z");
    expect((await listImages(host, folder)).map(({ generation }) => generation)).toEqual(["a b'$(id)\n\"ä"]);
  });

  it("are not told of a folder where others could have a link lead to any file", async () => {
    chmodSync(folder, 0o777);
    await expect(listImages(host, folder)).rejects.toThrow(
      /FILE_UNSUITABLE.*listImages[\s\S]*drwxrwxrwx\) can be changed by others than root/,
    );
  });

  it("cannot be told of a folder that is not there: an error, and no empty list", async () => {
    await expect(listImages(host, join(folder, "none"))).rejects.toThrow(/DIRECTORY_NOT_FOUND.*listImages/);
  });

  it("cannot be told of a host that does not answer: an error, and no empty list", async () => {
    await expect(
      listImages({ ...connection({ port: 1 }), hostKey: server.publicKey }, folder),
    ).rejects.toThrow(/HOST_UNREACHABLE/);
  }, 60_000);
});

describe("one list for all who ask while it is made", () => {
  const folder = "/backup";
  /** Somebody who asks the host. */
  function asker(host: Host, resource: string, signal = new AbortController().signal): Context {
    return {
      ...{ host, resource, signal, open: async () => host },
      ...{ progress: () => undefined, warn: () => undefined },
    };
  }

  it("fails for each of them as its own", async () => {
    const host = fakeHost(() => ({ exitCode: 70 }));
    const failures = await Promise.allSettled(
      ["VmBackup vm1", "VmBackup vm2"].map((name) => imagesAtOnce(asker(host, name), folder)),
    );
    expect(failures).toMatchObject([
      { reason: { message: expect.stringMatching(/DIRECTORY_NOT_FOUND: VmBackup vm1/) } },
      { reason: { message: expect.stringMatching(/DIRECTORY_NOT_FOUND: VmBackup vm2/) } },
    ]);
    expect(host.commands).toHaveLength(1);
  });

  it("does not end with the one that asked first", async () => {
    const host = fakeHost((_command, index) =>
      index === 0 ? new LvmNbdError("CANCELLED", { message: "cancelled" }) : "end\n",
    );
    const cancelled = imagesAtOnce(asker(host, "VmBackup vm1", AbortSignal.abort()), folder);
    const other = imagesAtOnce(asker(host, "VmBackup vm2"), folder);
    await expect(cancelled).rejects.toThrow(/CANCELLED/);
    expect(await other).toEqual([]);
  });
});
