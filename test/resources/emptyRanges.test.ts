/** Copies that leave out what of their snapshot is empty: their jobs run in a real shell, with an nbdkit that serves nothing for what it is told to be a hole. */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { LvmNbdError } from "../../provider/core/errors.js";
import { createHandlers, type Handlers } from "../../provider/core/handlers.js";
import { resourceType } from "../../provider/core/registry.js";
import { CopyHost } from "../support/copyHost.js";
import { fakeHost } from "../support/fakeHost.js";
import { recordedLvs } from "../support/recorded.js";

vi.mock("node:timers/promises", async (original) =>
  (await import("../support/shortWaits.js")).shortWaits(await original()),
);

type Values = Readonly<Record<string, unknown>>;
const MiB = 1024 ** 2;
const size = 6 * MiB;
const address = (name: string) => ({
  address: name,
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
});
const recorded = JSON.parse(recordedLvs("valid")).report[0].lv.find(
  (row: Values) => row.lv_attr === "sri-a-s---",
);
const snapshot = {
  host: address("192.0.2.1"),
  volumeGroup: recorded.vg_name,
  name: recorded.lv_name,
  uuid: recorded.lv_uuid,
};
const sha256 = (content: string | Buffer) => createHash("sha256").update(content).digest("hex");

/** Empty but for these bytes. */
function disk(bytes: Readonly<Record<number, string>>): string {
  const content = Buffer.alloc(size);
  for (const [at, text] of Object.entries(bytes)) content.write(text, Number(at));
  return content.toString("latin1");
}
/** The first byte, one in the middle of a MiB, the last sector: half of its MiBs are empty. */
const moment = disk({ 0: "x", [2 * MiB + 700_001]: "x", [size - 512]: "last sector" });
/** As large, and with data where the other one has none. */
const other = disk({ [MiB + 5]: "y", [4 * MiB]: "y" });

let destination: CopyHost;
let cancel: AbortController;
let lines: string[];
let scans: number;

beforeEach(() => {
  destination = new CopyHost();
  destination.set("extents", "4000\n");
  destination.kill(undefined);
  destination.serve(moment);
  scans = 0;
  destination.onScan = () => {
    scans++;
    return destination.scanOf(moment);
  };
});
afterEach(() => destination.close());

function handlers(): Handlers {
  [cancel, lines] = [new AbortController(), []];
  const volumes = recordedLvs("valid").replaceAll('"67108864"', `"${size}"`);
  const source = fakeHost(
    (command) =>
      destination.sourceAnswer(command) ??
      (command.argv[0] === "date" ? String(Number(recorded.lv_time) + 100) : volumes),
  );
  return createHandlers(resourceType("VolumeCopy"), {
    openHost: async (host) =>
      typeof host === "object" && host.address === "192.0.2.1" ? source : destination,
    progress: (line) => lines.push(line),
    warn: (line) => lines.push(line),
    signal: cancel.signal,
  });
}

/** The export serves another disk than the snapshot that is declared to be behind it. */
function serveOther(): void {
  destination.serve(other);
  // What the snapshot reads as on its own host.
  destination.set("reread", moment);
}

class Died extends Error {}

/** The provider's process dies right after the job was started, which then waits. */
function diesWhileCopied(): void {
  let dead = false;
  destination.set("hold", "");
  destination.onCommand = ({ argv }) => {
    if (dead) throw new Died();
    if (!argv[2]?.includes("systemd-run")) return undefined;
    return () => {
      dead = true;
      throw new Died();
    };
  };
}

function goesOn(): void {
  destination.onCommand = () => undefined;
  destination.set("hold", undefined);
}

const file = () => join(destination.disk, "vm1.raw");
const volume = { volumeGroup: "VgVm", name: "vm1" };

describe.each([
  { into: "an image", place: () => ({ file: file() }), held: () => readFileSync(file()) },
  {
    into: "a volume",
    place: () => ({ volume }),
    held: () => readFileSync(destination.device("vm1")).subarray(0, size),
  },
])("a copy into $into", ({ place, held }) => {
  async function made(change: Values = {}): Promise<Values> {
    const declared = { host: address("192.0.2.2"), owner: "o/p/s/vm1", uri: "nbd://10.0.0.1:10809/vm1" };
    const wanted = { ...declared, snapshot, ...place(), ...change };
    const { inputs, problems } = await handlers().check(undefined, wanted, new Set());
    expect(problems).toEqual([]);
    return (await handlers().create(inputs)).state;
  }

  function left(): readonly string[] {
    return [...destination.left(), ...destination.volumes()];
  }

  /** It is whole and verified, and the source was asked for all of it. */
  function isWhole(content = moment): void {
    expect(sha256(held())).toBe(sha256(content));
    expect(destination.bytesAsked).toBeUndefined();
  }

  it("asks only for what is not empty, and holds the whole", async () => {
    expect(await made()).toMatchObject({ verified: true, sha256: sha256(moment) });
    expect(sha256(held())).toBe(sha256(moment));
    expect(destination.bytesAsked).toBe(3 * MiB);
    expect(destination.nbdkitCalls.at(-1)).toMatch(
      /--filter=extentlist nbd uri=nbd:\/\/10\.0\.0\.1:10809\/vm1 extentlist=\/\S+\/extents --run /,
    );
  });

  it("of a snapshot that is empty asks for nothing", async () => {
    const empty = disk({});
    destination.serve(empty);
    destination.onScan = () => destination.scanOf(empty);
    await made();
    expect(sha256(held())).toBe(sha256(empty));
    expect(destination.bytesAsked).toBe(0);
  });

  it.each(["no-nbd-plugin", "no-extentlist"])(
    "asks for all where nbdkit cannot do that: %s",
    async (lack) => {
      destination.set(lack, "");
      expect(await made()).toMatchObject({ verified: true });
      isWhole();
      expect(scans).toBe(1);
    },
  );

  it.each([
    ["fails", () => ({ exitCode: 1, stderr: "not a block device" })],
    ["was killed in a line", () => destination.scanOf(moment).slice(0, 5)],
    ["was killed after a line", () => destination.scanOf(moment).replace("end\n", "")],
    ["is killed by the link", () => lost("HOST_UNREACHABLE")],
    ["takes too long", () => lost("COMMAND_TIMED_OUT")],
    ["is not allowed", () => lost("SUDO_DENIED")],
    ["prints garbage", () => "Last login: never\n0 6291456\nend\n"],
    ["tells of more than there is", () => `0 ${size + MiB}\nend\n`],
    ["tells of one place twice", () => `0 ${4 * MiB}\n${MiB} ${MiB}\nend\n`],
  ])("asks for all where the look for what is empty %s", async (_what, scan) => {
    destination.onScan = scan;
    expect(await made()).toMatchObject({ verified: true });
    isWhole();
    expect(lines.join("\n")).toContain("what is empty is sent as well");
  });

  it("asks for all where there is no perl", async () => {
    destination.onScan = () => "";
    expect(await made()).toMatchObject({ verified: true });
    isWhole();
  });

  it("asks for all that lies behind the end of a look that ended early", async () => {
    destination.onScan = () => `${MiB} ${MiB}\n\n${3 * MiB} ${MiB}\nend\n`;
    expect(await made()).toMatchObject({ verified: true });
    expect(sha256(held())).toBe(sha256(moment));
    expect(destination.bytesAsked).toBe(4 * MiB);
  });

  it("is refused where the snapshot is not what the export serves", async () => {
    serveOther();
    await expect(made()).rejects.toThrow(/COPY_MISMATCH/);
    expect(destination.bytesAsked).toBe(3 * MiB);
    expect(left()).toEqual([]);
  });

  it("without `verify` believes nothing of the snapshot: all that the export serves is copied", async () => {
    serveOther();
    expect(await made({ verify: false })).toMatchObject({ verified: false, sha256: sha256(other) });
    isWhole(other);
    expect(scans).toBe(0);
  });

  it.each([
    ["is not allowed", () => lost("SUDO_DENIED")],
    ["has no program for it", () => ({ exitCode: 71, stderr: "sh: sha256sum: not found" })],
    ["cannot", () => ({ exitCode: 70 })],
    ["does not answer", () => lost("HOST_UNREACHABLE")],
  ])(
    "is compared over the network where the snapshot's host %s, which shows before it is begun",
    async (_what, firstSector) => {
      destination.onFirstSector = firstSector;
      let reads = 0;
      destination.onSource = () => {
        reads++;
      };
      expect(await made()).toMatchObject({ verified: true, sha256: sha256(moment) });
      isWhole();
      expect([reads, scans, destination.started]).toEqual([0, 0, 1]);
      expect(lines.join("\n")).toContain("is read a second time over the network, not on server1: ");
    },
  );

  it("is compared over the network with what the export serves then, where the snapshot's host refuses to", async () => {
    destination.onFirstSector = () => lost("SUDO_DENIED");
    destination.set("reread", other);
    await expect(made()).rejects.toThrow(/COPY_MISMATCH/);
    expect(left()).toEqual([]);
  });

  it("with a limit reads nothing on the snapshot's host, and is verified over the network", async () => {
    expect(await made({ bandwidthLimit: "20M" })).toMatchObject({ verified: true });
    isWhole();
    expect(scans).toBe(0);
    expect(destination.nbdkitCalls.at(-1)).toMatch(/ --filter=rate nbd uri=\S+ rate=167772160 --run /);
  });

  it("that was begun with `verify` is compared with the snapshot, though that is not declared any more", async () => {
    serveOther();
    diesWhileCopied();
    await expect(made()).rejects.toThrow(Died);
    goesOn();
    await expect(made({ verify: false })).rejects.toThrow(/COPY_MISMATCH/);
    expect(destination.started).toBe(1);
    expect(left()).toEqual([]);
  });

  it("that waits for a comparison on the snapshot's host is none that compares anything, to a version that knows of no such job", async () => {
    diesWhileCopied();
    await expect(made()).rejects.toThrow(Died);
    const record = destination.commands.flatMap(({ argv }) => argv).find((text) => text.startsWith("{"));
    expect(JSON.parse(record ?? "")).toMatchObject({ verify: false, readThere: true });
    goesOn();
    expect(await made()).toMatchObject({ verified: true });
    expect(destination.started).toBe(1);
  });

  it("that waits for a comparison on the snapshot's host is begun anew where that refuses it by now", async () => {
    diesWhileCopied();
    await expect(made()).rejects.toThrow(Died);
    goesOn();
    destination.onFirstSector = () => lost("SUDO_DENIED");
    expect(await made()).toMatchObject({ verified: true });
    expect(sha256(held())).toBe(sha256(moment));
    expect(destination.started).toBe(2);
  });

  it.each(["HOST_UNREACHABLE", "COMMAND_TIMED_OUT"] as const)(
    "that waits for a comparison on the snapshot's host is gone on with after what may pass: %s",
    async (code) => {
      diesWhileCopied();
      await expect(made()).rejects.toThrow(Died);
      goesOn();
      destination.onFirstSector = () => lost(code);
      expect(await made()).toMatchObject({ verified: true });
      expect(destination.started).toBe(1);
    },
  );

  it("that waits for a comparison on the snapshot's host is begun anew where that is not to be read there any more", async () => {
    diesWhileCopied();
    await expect(made()).rejects.toThrow(Died);
    goesOn();
    expect(await made({ bandwidthLimit: "20M" })).toMatchObject({ verified: true });
    expect(sha256(held())).toBe(sha256(moment));
    expect(destination.started).toBe(2);
  });
});

/** What a command raises that never came to an end. */
function lost(code: "COMMAND_TIMED_OUT" | "HOST_UNREACHABLE" | "SUDO_DENIED"): never {
  throw new LvmNbdError(code, { message: "it never came to an end" });
}
