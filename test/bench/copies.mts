/**
 * `npm run bench -- copies [MIB]`: how long a copy of a full, a 10 % full and an empty volume (256 MiB unless told: the servers are emulated) takes from server1 to a
 * volume of server2: a VolumeCopy, whole, with and without `verify`, beside dd through /dev/nbd0, nbdcopy and qemu-img; without and with
 * TLS. Each server has one emulated processor, so that a checksum costs as much as the way of the bytes themselves. Prints medians of
 * runs in turns, and writes them to results/copies.json and results/copies.svg.
 */
import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { loadavg } from "node:os";
import { join } from "node:path";
import { z } from "zod";
import type * as HandlersModule from "../../provider/core/handlers.js";
import type * as Registry from "../../provider/core/registry.js";
import type * as Pool from "../../provider/ssh/pool.js";
import { type Lab, labUp } from "../lab/lab.mts";
import { barChart } from "./chart.mts";
import { median, rounded, say } from "./figures.mts";

const load = createRequire(import.meta.url);
const provider = join(import.meta.dirname, "../../dist");
const { createHandlers }: typeof HandlersModule = load(join(provider, "core/handlers.js"));
const { resourceType }: typeof Registry = load(join(provider, "core/registry.js"));
const { createHostPool }: typeof Pool = load(join(provider, "ssh/pool.js"));

const rounds = 3;
const contents = ["full", "10 % full", "empty"] as const;
type Content = (typeof contents)[number];
type Values = Readonly<Record<string, unknown>>;

const ours = "VolumeCopy, unverified";
const oursVerified = "VolumeCopy, verified";
const group = "VgVm";
const target = `/dev/${group}/target`;
const limit = { timeoutSeconds: 3600 };

/** What is copied, as server2 reaches it. */
interface Source {
  readonly content: Content;
  readonly snapshot: Values;
  readonly uri: string;
  readonly clientTls: Values | undefined;
  /** For programs of libnbd. */
  readonly libnbdUri: string;
}

/** One of those that are compared: copies and waits until all is on the disk. */
interface Side {
  readonly name: string;
  readonly knowsTls: boolean;
  copy(source: Source): Promise<void>;
  /** Where it lies then. */
  readonly target: string;
  /** What is not counted: the copy goes, so that nothing of it passes for the next side's work. */
  clear(): Promise<void>;
}

const [megabytes = 256, ...rest] = process.argv.slice(2).map(Number);
if (rest.length > 0 || !(Number.isInteger(megabytes) && megabytes >= 32)) {
  process.stderr.write("usage: npm run bench -- copies [MIB]\n");
  process.exit(2);
}

/** The resources of a run, made by their handlers: what the engine of Pulumi costs is none of a copy's. */
class Resources {
  readonly #pool = createHostPool();
  readonly #made: { readonly type: string; readonly state: Values }[] = [];

  #handlers(type: string) {
    return createHandlers(resourceType(type), {
      openHost: (host) => this.#pool.get(host),
      progress: () => undefined,
      warn: say,
      signal: AbortSignal.timeout(6 * 3600 * 1000),
    });
  }

  async make(type: string, name: string, args: Values): Promise<Values> {
    const handlers = this.#handlers(type);
    const { inputs, problems } = await handlers.check(
      undefined,
      { ...args, owner: `bench/copies/lab/${name}` },
      new Set(),
    );
    if (problems.length > 0) throw new Error(`${type} ${name}: ${JSON.stringify(problems)}`);
    const { state } = await handlers.create(inputs);
    this.#made.push({ type, state });
    return state;
  }

  async remove(state: Values): Promise<void> {
    const at = this.#made.findIndex((one) => one.state === state);
    const [{ type } = { type: "" }] = this.#made.splice(at, 1);
    await this.#handlers(type).remove(state);
  }

  close(): void {
    this.#pool.close();
  }
}

const clientTls = z.object({ caCertificate: z.string(), certificate: z.string(), privateKey: z.string() });

/** Incompressible where it is full; the tenth lies in a file system's files, as that lays them out. */
async function fill({ server1 }: Lab, content: Content, volume: string): Promise<void> {
  const path = `/dev/${group}/${volume}`;
  await server1.run(`lvcreate -qq -y -Wn -L ${megabytes}M -n ${volume} ${group}`);
  const random = (file: string, count: number, flag = "") =>
    `dd if=/dev/urandom of=${file} bs=1M count=${count} ${flag} status=none`;
  if (content === "full") await server1.run(random(path, megabytes, "oflag=direct"), limit);
  if (content === "10 % full")
    await server1.run(
      `mkfs.ext4 -q -E nodiscard ${path} && mount ${path} /mnt && for file in 1 2 3 4 5 6 7 8; do ${random("/mnt/$file", Math.round(megabytes / 80))} || exit; done; umount /mnt`,
      limit,
    );
}

/** The exports of all contents, without TLS and with it. */
async function sources(lab: Lab, made: Resources): Promise<readonly Source[]> {
  const all: Source[] = [];
  for (const [n, content] of contents.entries()) {
    const name = `vm${n}`;
    await fill(lab, content, name);
    const { name: taken, uuid } = await made.make("LvSnapshot", name, {
      ...{ host: "server1", volumeGroup: group, origin: name, name: `${name}-moment`, size: "16M" },
    });
    for (const tls of [false, true]) {
      const state = await made.make("NbdExport", `${name}-${tls}`, {
        ...{
          host: "server1",
          device: `/dev/${group}/${taken}`,
          exportName: `${name}-${tls}`,
          server: "nbdkit",
          tls,
        },
        ...{ listenAddress: lab.server1.privateAddress, clients: [lab.server2.privateAddress] },
        port: 10_809 + all.length,
      });
      const uri = z.string().parse(state.uri);
      const secured = tls ? clientTls.parse(state.clientTls) : undefined;
      const folder = `/run/bench/${name}`;
      const files = {
        "ca-cert.pem": secured?.caCertificate,
        "client-cert.pem": secured?.certificate,
        "client-key.pem": secured?.privateKey,
      };
      for (const [file, stdin] of Object.entries(files))
        if (stdin !== undefined)
          await lab.server2.run(`umask 077; mkdir -p ${folder}; cat >${folder}/${file}`, { stdin });
      all.push({
        ...{ content, uri, clientTls: secured },
        snapshot: { host: "server1", volumeGroup: group, name: taken, uuid },
        libnbdUri: tls ? `${uri}?tls-certificates=${folder}` : uri,
      });
    }
  }
  return all;
}

async function requireCopied({ server1, server2 }: Lab, { snapshot }: Source, side: Side): Promise<void> {
  const sum = (path: string) => `dd if=${path} bs=4M iflag=direct status=none | sha256sum`;
  const served = await server1.run(sum(`/dev/${group}/${snapshot.name}`), limit);
  const copied = await server2.run(sum(side.target), limit);
  if (served.stdout !== copied.stdout) throw new Error(`${side.name}: ${side.target} is not what was served`);
}

function sides({ server2 }: Lab, made: Resources): readonly Side[] {
  const command = (name: string, knowsTls: boolean, text: (source: Source) => string): Side => ({
    ...{ name, knowsTls, target },
    copy: async (source) => void (await server2.run(text(source), limit)),
    clear: async () => {
      await server2.run(`blkdiscard -f -z ${target} && sync && echo 3 >/proc/sys/vm/drop_caches`, limit);
    },
  });
  const attached = ({ uri }: Source, then: string) => {
    const { hostname, port, pathname } = new URL(uri.replace(/^nbd/, "http"));
    return `modprobe nbd && nbd-client -N ${pathname.slice(1)} ${hostname} ${port} /dev/nbd0 -timeout 30 -readonly -b 512 >/dev/null 2>&1 &&
until [ "$(cat /sys/block/nbd0/size)" != 0 ]; do sleep 0.05; done &&
dd if=/dev/nbd0 of=${target} bs=1M conv=fsync status=none && ${then}; rc=$?; nbd-client -d /dev/nbd0 >/dev/null; exit $rc`;
  };
  const volumeCopy = (name: string, verify: boolean): Side => {
    let state: Values | undefined;
    return {
      ...{ name, knowsTls: true, target: `/dev/${group}/copy` },
      copy: async ({ uri, snapshot, clientTls: tls }) => {
        state = await made.make("VolumeCopy", "copy", {
          ...{ host: "server2", uri, snapshot, verify, volume: { volumeGroup: group, name: "copy" } },
          ...(tls === undefined ? {} : { tls }),
        });
      },
      clear: async () => {
        if (state !== undefined) await made.remove(state);
        await server2.run("sync && echo 3 >/proc/sys/vm/drop_caches");
      },
    };
  };
  return [
    volumeCopy(ours, false),
    volumeCopy(oursVerified, true),
    command("nbdcopy", true, ({ libnbdUri }) => `nbdcopy --flush '${libnbdUri}' ${target}`),
    command(
      "qemu-img",
      false,
      ({ uri }) => `qemu-img convert -n -W -f raw -O raw ${uri} ${target} && sync ${target}`,
    ),
    command("dd", false, (source) => attached(source, "true")),
    command("dd, both ends summed", false, (source) =>
      attached(source, `[ "$(sha256sum </dev/nbd0)" = "$(sha256sum <${target})" ]`),
    ),
  ];
}

/** Seconds by side and content. */
type Figures = ReadonlyMap<string, ReadonlyMap<Content, number[]>>;

async function measure(
  lab: Lab,
  all: readonly Source[],
  every: readonly Side[],
  tls: boolean,
): Promise<Figures> {
  const compared = every.filter(({ knowsTls }) => knowsTls || !tls);
  const figures = new Map(
    compared.map(({ name }) => [name, new Map(contents.map((one): [Content, number[]] => [one, []]))]),
  );
  for (let round = 1; round <= rounds; round++)
    for (const source of all.filter(({ clientTls: secured }) => (secured !== undefined) === tls))
      for (const side of compared) {
        await lab.server1.run("echo 3 >/proc/sys/vm/drop_caches");
        const began = performance.now();
        await side.copy(source);
        const seconds = (performance.now() - began) / 1000;
        if (round === 1) await requireCopied(lab, source, side);
        await side.clear();
        figures.get(side.name)?.get(source.content)?.push(seconds);
        say(
          `  round ${round} of ${rounds}: ${side.name}, ${source.content}${tls ? ", TLS" : ""}: ${seconds.toFixed(1)} s`,
        );
      }
  return figures;
}

const middle = (figures: Figures, name: string, content: Content): number =>
  median(figures.get(name)?.get(content) ?? []);

function tell(figures: Figures, title: string): void {
  say(`\n${title}, ${megabytes} MiB: seconds (times the rate of nbdcopy)`);
  say(["".padEnd(24), ...contents.map((one) => one.padStart(18))].join(""));
  for (const name of figures.keys()) {
    const cells = contents.map((content) => {
      const seconds = middle(figures, name, content);
      const times = middle(figures, "nbdcopy", content) / seconds;
      return `${seconds.toFixed(1)} (${times.toFixed(2)})`.padStart(18);
    });
    say([name.padEnd(24), ...cells].join(""));
  }
  const against = (one: string, other: string) =>
    contents
      .map(
        (content) =>
          `${content} ${(middle(figures, other, content) / middle(figures, one, content)).toFixed(2)}`,
      )
      .join(", ");
  say(`verified to unverified: ${against(oursVerified, ours)}`);
  if (figures.has("dd"))
    say(`verified to dd with both ends summed: ${against(oursVerified, "dd, both ends summed")}`);
  if (figures.has("dd")) say(`unverified to dd: ${against(ours, "dd")}`);
}

function asJson(figures: Figures): object {
  const side = (byContent: ReadonlyMap<Content, number[]>) =>
    [...byContent].map(([content, seconds]) => [
      content,
      {
        median: rounded(median(seconds)),
        timesNbdcopy: rounded(middle(figures, "nbdcopy", content) / median(seconds)),
        seconds: seconds.map(rounded),
      },
    ]);
  return Object.fromEntries(
    [...figures].map(([name, byContent]) => [name, Object.fromEntries(side(byContent))]),
  );
}

const lab = await labUp({ name: `bench-${process.pid}`, log: say });
process.env.LVM_NBD_SSH_CONFIG = lab.sshConfigPath;
const made = new Resources();
try {
  await lab.server2.run(`lvcreate -qq -y -Wn -L ${megabytes}M -n target ${group}`);
  const all = await sources(lab, made);
  const every = sides(lab, made);
  const { stdout } = await lab.server2.run("uname -r; nbdcopy --version; qemu-img --version | head -n 1");
  const results: Record<string, Figures> = {};
  for (const [title, tls] of [
    ["without TLS", false],
    ["with TLS", true],
  ] as const) {
    const figures = await measure(lab, all, every, tls);
    results[title] = figures;
    tell(figures, title);
    const file = join(import.meta.dirname, "results", "copies");
    const json = {
      ...{ node: process.version, guest: stdout.trim().split("\n"), megabytes, rounds },
      loadAfterwards: rounded(loadavg()[0] ?? Number.NaN),
      copies: Object.fromEntries(Object.entries(results).map(([name, of]) => [name, asJson(of)])),
    };
    // What is measured is kept if the rest is cut off.
    writeFileSync(`${file}.json`, `${JSON.stringify(json, null, 2)}\n`);
    const panels = Object.entries(results).map(([name, of]) => ({
      title: name,
      series: [...of.keys()].map((side) => ({
        name: side,
        values: Object.fromEntries(contents.map((content) => [content, middle(of, side, content)])),
      })),
    }));
    const text = `Copies of ${megabytes} MiB between two emulated servers`;
    writeFileSync(`${file}.svg`, barChart(text, "seconds", contents, panels));
    say(`written to ${file}.json and ${file}.svg`);
  }
} finally {
  made.close();
  await lab.down();
}
