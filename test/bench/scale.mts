/**
 * `npm run bench -- scale [HOSTS...]`: so many fake hosts (1, 10, 100 and 1,000 of them) with ten resources each, driven as the engine
 * drives the plugin, a process of it for each of up, up without a change, refresh and destroy: seconds, processor time and memory of
 * that process, and what reaches the hosts; beside a plugin that does nothing, asked the same. Prints them with the slope, and
 * writes them to results/scale.json and scale.svg.
 */
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { cpus, loadavg, tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type * as Codec from "../../provider/pulumi/codec.js";
import type * as Proto from "../../provider/pulumi/proto.js";
import { barChart } from "./chart.mts";
import type { Counts, FakeHost } from "./fakeHosts.mts";
import { rounded, say } from "./figures.mts";
import { ask, memory, type PluginProcess, root, startPlugin } from "./pluginProcess.mts";

const load = createRequire(import.meta.url);
const { providerProto, structOf }: typeof Proto = load(join(root, "dist/pulumi/proto.js"));
const { decode }: typeof Codec = load(join(root, "dist/pulumi/codec.js"));

/** At once, as the engine runs them on 4 processors. */
const parallel = 16;
/** Of each host: a snapshot more than it exports, and as many attachments of its neighbour's exports. */
const [snapshots, exported] = [4, 3];
const perHost = snapshots + 2 * exported;
/** The fake hosts are to take no longer than needed: so many processes of them. */
const servingProcesses = 2;
/** What all resources may take, and what a process may have; see the issue. */
const [mostMilliseconds, mostMegabytes] = [2, 400];
/** Of the growth from one count to the next: up to here it is linear. */
const stillLinear = 1.25;

interface Declared {
  readonly type: "LvSnapshot" | "NbdExport" | "NbdAttachment";
  readonly name: string;
  readonly args: Readonly<Record<string, unknown>>;
  /** What must be there before it, and an argument that is an output of that. */
  readonly from?: { readonly name: string; readonly argument: string; readonly output: string };
}

interface Made {
  readonly id: string;
  readonly inputs: Proto.Struct | undefined;
  readonly state: Proto.Struct | undefined;
}

interface Serving {
  readonly child: ChildProcess;
  readonly lines: AsyncIterator<string>;
}

/** The fake hosts of all processes. */
class Hosts {
  readonly all: readonly FakeHost[];
  readonly #processes: readonly Serving[];

  private constructor(all: readonly FakeHost[], processes: readonly Serving[]) {
    this.all = all;
    this.#processes = processes;
  }

  static async open(count: number, compiled: string): Promise<Hosts> {
    const pairs = Math.ceil(count / 2);
    const shares = Array.from(
      { length: Math.min(servingProcesses, pairs) },
      (_, n) => Math.floor((pairs + n) / Math.min(servingProcesses, pairs)) * 2,
    );
    const processes = shares.map((share) => {
      const program = join(import.meta.dirname, "fakeHosts.mts");
      const child = spawn(process.execPath, [program, compiled, String(share), String(snapshots)], {
        stdio: ["pipe", "pipe", "inherit"],
      });
      return { child, lines: createInterface({ input: child.stdout })[Symbol.asyncIterator]() };
    });
    const all: FakeHost[] = [];
    for (const { lines } of processes) all.push(...(await answerOf<FakeHost[]>(lines)));
    return new Hosts(all.slice(0, count), processes);
  }

  /** Of all of them, since it was asked before. */
  async counts(): Promise<Counts> {
    const each = await Promise.all(
      this.#processes.map(({ child, lines }) => {
        child.stdin?.write("\n");
        return answerOf<Counts>(lines);
      }),
    );
    const sum = (key: keyof Counts) => each.reduce((total, one) => total + one[key], 0);
    return {
      commands: sum("commands"),
      connections: sum("connections"),
      mostConnections: Math.max(...each.map(({ mostConnections }) => mostConnections)),
      open: sum("open"),
    };
  }

  /** When the hosts have seen the end of whoever was connected. */
  async leftOpen(): Promise<number> {
    for (let looks = 0; ; looks++) {
      const { open } = await this.counts();
      if (open === 0 || looks === 50) return open;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }

  end(): void {
    for (const { child } of this.#processes) child.stdin?.end();
  }
}

async function answerOf<T>(lines: AsyncIterator<string>): Promise<T> {
  const { done, value } = await lines.next();
  if (done === true) throw new Error("the fake hosts have ended");
  return JSON.parse(value) as T;
}

/** An SSH configuration with an alias for each host, one key for all, and a line of known_hosts for each. */
function writeSshFiles(folder: string, hosts: readonly FakeHost[]): string {
  const [config, key, known] = ["config", "key", "known_hosts"].map((name) => join(folder, name));
  const made = spawnSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", String(key)]);
  if (made.status !== 0) throw new Error(`no key could be made: ${made.stderr}`);
  const aliases = hosts.map(({ port }, n) => `Host host${n}\n  HostName 127.0.0.1\n  Port ${port}\n`);
  const all = `Host *\n  User root\n  IdentityFile ${key}\n  UserKnownHostsFile ${known}\n  GlobalKnownHostsFile none\n`;
  writeFileSync(String(config), [...aliases, all].join("\n"));
  writeFileSync(
    String(known),
    hosts.map(({ port, hostKey }) => `[127.0.0.1]:${port} ${hostKey.trim()}\n`).join(""),
  );
  return String(config);
}

/** What the program declares, in its order. */
function program(hosts: readonly FakeHost[]): Declared[] {
  return hosts.flatMap(({ address }, n): Declared[] => {
    const neighbour = hosts[n ^ 1] === undefined ? n : n ^ 1;
    const host = `host${n}`;
    return [
      ...Array.from({ length: snapshots }, (_, vm): Declared => {
        const args = { host, volumeGroup: "VgVm", origin: `vm${vm}`, size: "16M" };
        return { type: "LvSnapshot", name: `${host}-snapshot${vm}`, args };
      }),
      ...Array.from({ length: exported }, (_, vm): Declared => {
        const client = hosts[neighbour]?.address ?? "";
        const args = { host, listenAddress: address, clients: [client], port: 10_809 + vm };
        const from = { name: `${host}-snapshot${vm}`, argument: "device", output: "path" };
        return { type: "NbdExport", name: `${host}-export${vm}`, args, from };
      }),
      ...Array.from({ length: exported }, (_, vm): Declared => {
        const from = { name: `host${neighbour}-export${vm}`, argument: "uri", output: "uri" };
        return { type: "NbdAttachment", name: `${host}-attachment${vm}`, args: { host }, from };
      }),
    ];
  });
}

/** A command of Pulumi's. */
interface Phase {
  readonly name: string;
  /** Which goes first: what others depend on, what depends on others, or as they come. */
  readonly order: "needed" | "needing" | "any";
  work(plugin: PluginProcess, declared: Declared, made: Map<string, Made>): Promise<void>;
}

function urnOf({ type, name }: Declared): string {
  return `urn:pulumi:bench::bench::lvm-nbd:index:${type}::${name}`;
}

async function checked(
  { client }: PluginProcess,
  declared: Declared,
  made: Map<string, Made>,
): Promise<Proto.Struct | undefined> {
  const { from, args } = declared;
  const before = from && decode(made.get(from.name)?.state).values[from.output];
  const check = new providerProto.CheckRequest();
  check.setUrn(urnOf(declared));
  check.setOlds(made.get(declared.name)?.inputs);
  check.setNews(structOf(from === undefined ? args : { ...args, [from.argument]: before }));
  const answer = await ask<Proto.providerProto.CheckResponse>((done) => client.check(check, done));
  const [failure] = answer.getFailuresList();
  if (failure !== undefined) throw new Error(`${declared.name}: ${failure.getReason()}`);
  return answer.getInputs();
}

const phases: readonly Phase[] = [
  {
    name: "up",
    order: "needed",
    async work(plugin, declared, made) {
      const inputs = await checked(plugin, declared, made);
      const create = new providerProto.CreateRequest();
      create.setUrn(urnOf(declared));
      create.setProperties(inputs);
      const answer = await ask<Proto.providerProto.CreateResponse>((done) =>
        plugin.client.create(create, done),
      );
      made.set(declared.name, { id: answer.getId(), inputs, state: answer.getProperties() });
    },
  },
  {
    name: "no-change up",
    order: "needed",
    async work(plugin, declared, made) {
      const inputs = await checked(plugin, declared, made);
      const diff = new providerProto.DiffRequest();
      diff.setUrn(urnOf(declared));
      diff.setId(made.get(declared.name)?.id ?? "");
      diff.setOlds(made.get(declared.name)?.state);
      diff.setOldInputs(made.get(declared.name)?.inputs);
      diff.setNews(inputs);
      const answer = await ask<Proto.providerProto.DiffResponse>((done) => plugin.client.diff(diff, done));
      if (answer.getChanges() !== providerProto.DiffResponse.DiffChanges.DIFF_NONE)
        throw new Error(`${declared.name} is to be changed: ${answer.getDiffsList()}`);
    },
  },
  {
    name: "refresh",
    order: "any",
    async work(plugin, declared, made) {
      const old = made.get(declared.name);
      const read = new providerProto.ReadRequest();
      read.setUrn(urnOf(declared));
      read.setId(old?.id ?? "");
      read.setProperties(old?.state);
      read.setInputs(old?.inputs);
      const answer = await ask<Proto.providerProto.ReadResponse>((done) => plugin.client.read(read, done));
      if (answer.getId() !== old?.id) throw new Error(`${declared.name} is gone`);
    },
  },
  {
    name: "destroy",
    order: "needing",
    async work(plugin, declared, made) {
      const remove = new providerProto.DeleteRequest();
      remove.setUrn(urnOf(declared));
      remove.setId(made.get(declared.name)?.id ?? "");
      remove.setProperties(made.get(declared.name)?.state);
      await ask((done) => plugin.client.delete(remove, done));
    },
  },
];

/** Has all done, `parallel` at once, each when what it needs is done. */
async function inOrder(
  declared: readonly Declared[],
  { order }: Phase,
  work: (one: Declared) => Promise<void>,
): Promise<void> {
  const users = new Map(declared.flatMap(({ name, from }) => (from ? [[from.name, name] as const] : [])));
  const settled = new Map<string, () => void>();
  const done = new Map(
    declared.map(({ name }) => [name, new Promise<void>((resolve) => settled.set(name, resolve))]),
  );
  const inTurn = order === "needing" ? [...declared].reverse() : declared;
  // As the engine: one that waits for another has no place yet.
  let places = parallel;
  const waiting: (() => void)[] = [];
  await Promise.all(
    inTurn.map(async (one) => {
      const before = order === "needing" ? users.get(one.name) : one.from?.name;
      if (before !== undefined && order !== "any") await done.get(before);
      if (places > 0) places--;
      else await new Promise<void>((resolve) => waiting.push(resolve));
      await work(one);
      settled.get(one.name)?.();
      const next = waiting.shift();
      if (next === undefined) places++;
      else next();
    }),
  );
}

/** Milliseconds of processor time, user and system, of a process so far, without its children. */
function processorTime(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  // proc_pid_stat(5), from the third field; in hundredths of a second.
  const fields = stat
    .slice(stat.lastIndexOf(")") + 2)
    .split(" ")
    .map(Number);
  const [user = 0, system = 0] = fields.slice(11, 13);
  return (user + system) * 10;
}

interface Figures {
  readonly seconds: number;
  /** Of the process from its start to the last answer. */
  readonly cpuMs: number;
  readonly cpuMsPerResource: number;
  /** Of these, before it was asked for a resource. */
  readonly startCpuMs: number;
  readonly megabytes: number;
  readonly commandsPerHost: number;
  readonly connectionsPerHost: number;
  /** To the host that had most. */
  readonly mostConnections: number;
  /** After the process has ended. */
  readonly leftOpen: number;
}

type ByPhase = Readonly<Record<string, Figures>>;

async function run(
  count: number,
  declared: readonly Declared[],
  hosts: Hosts,
  options: Parameters<typeof startPlugin>[0],
): Promise<ByPhase> {
  const made = new Map<string, Made>();
  const figures: Record<string, Figures> = {};
  for (const phase of phases) {
    const plugin = await startPlugin(options);
    const { client, pid } = plugin;
    await ask((done) => client.handshake(new providerProto.ProviderHandshakeRequest(), done));
    const configuration = new providerProto.ConfigureRequest();
    configuration.setArgs(structOf({ organization: "bench" }));
    await ask((done) => client.configure(configuration, done));
    const startCpuMs = processorTime(pid);
    await hosts.counts();
    const began = performance.now();
    await inOrder(declared, phase, (one) => phase.work(plugin, one, made));
    const seconds = (performance.now() - began) / 1000;
    const cpuMs = processorTime(pid);
    const { most } = memory(pid);
    const { commands, connections, mostConnections } = await hosts.counts();
    await plugin.end();
    const leftOpen = await hosts.leftOpen();
    figures[phase.name] = {
      seconds: rounded(seconds),
      cpuMs,
      cpuMsPerResource: rounded(cpuMs / declared.length),
      startCpuMs,
      megabytes: most,
      commandsPerHost: rounded(commands / count),
      connectionsPerHost: rounded(connections / count),
      mostConnections,
      leftOpen,
    };
    say(row(count, phase.name, figures[phase.name] as Figures));
  }
  return figures;
}

const columns = [
  ["hosts", 5],
  ["", 13],
  ["s", 7],
  ["CPU ms/res.", 11],
  ["start ms", 8],
  ["MB", 4],
  ["commands/host", 13],
  ["conn./host", 10],
  ["most", 4],
  ["left", 4],
] as const;

function row(count: number, phase: string, figures: Figures): string {
  const { seconds, cpuMsPerResource, startCpuMs, megabytes, commandsPerHost } = figures;
  const cells = [
    ...[count, phase, seconds.toFixed(1), cpuMsPerResource.toFixed(2), startCpuMs, megabytes],
    ...[commandsPerHost, figures.connectionsPerHost, figures.mostConnections, figures.leftOpen],
  ];
  return cells
    .map((cell, n) =>
      n === 1 ? String(cell).padEnd(columns[n][1]) : String(cell).padStart(columns[n]?.[1] ?? 0),
    )
    .join("  ");
}

interface Growth {
  /** Milliseconds of processor time, and kilobytes, that each host more takes, from one count to the next. */
  readonly cpuMsPerHost: readonly number[];
  readonly kilobytesPerHost: readonly number[];
  /** Each step of processor time by the one before it. 1 is linear. */
  readonly ratios: readonly number[];
}

function growthOf(counts: readonly number[], phase: string, by: ReadonlyMap<number, ByPhase>): Growth {
  const steps = counts.slice(1).map((count, n) => {
    const [less, more] = [by.get(counts[n] ?? 0)?.[phase], by.get(count)?.[phase]];
    const hosts = count - (counts[n] ?? 0);
    return {
      cpu: ((more?.cpuMs ?? 0) - (less?.cpuMs ?? 0)) / hosts,
      kilobytes: (((more?.megabytes ?? 0) - (less?.megabytes ?? 0)) * 1000) / hosts,
    };
  });
  return {
    cpuMsPerHost: steps.map(({ cpu }) => rounded(cpu)),
    kilobytesPerHost: steps.map(({ kilobytes }) => Math.round(kilobytes)),
    ratios: steps.slice(1).map(({ cpu }, n) => rounded(cpu / (steps[n]?.cpu ?? Number.NaN))),
  };
}

const asked = process.argv.slice(2).map(Number);
const counts = (asked.length === 0 ? [1, 10, 100, 1000] : asked).sort((one, other) => one - other);
if (counts.some((count) => !Number.isInteger(count) || count < 1)) {
  process.stderr.write("usage: npm run bench -- scale [HOSTS...]\n");
  process.exit(2);
}

say("compiling the fake host ...");
const compiling = spawnSync("tsc", ["-p", join(import.meta.dirname, "tsconfig.json")], { stdio: "inherit" });
if (compiling.status !== 0) throw new Error("the fake host does not compile");
const compiled = join(root, "node_modules/.cache/lvm-nbd-bench/test/fakehost/world.js");

const ours = new Map<number, ByPhase>();
const nothing = new Map<number, ByPhase>();
for (const count of counts) {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-scale-"));
  const hosts = await Hosts.open(count, compiled);
  const said = join(folder, "stderr");
  const stderr = openSync(said, "w");
  try {
    const environment = { LVM_NBD_SSH_CONFIG: writeSshFiles(folder, hosts.all), SSH_AUTH_SOCK: "" };
    const declared = program(hosts.all);
    say(`\n${count} hosts, ${declared.length} resources (load ${loadavg()[0]?.toFixed(1)})`);
    say(columns.map(([title, width]) => title.padStart(width)).join("  "));
    ours.set(count, await run(count, declared, hosts, { environment, stderr }));
    say("  the plugin that does nothing:");
    const idle = join(import.meta.dirname, "nothingProvider.mts");
    nothing.set(count, await run(count, declared, hosts, { program: idle, environment, stderr }));
  } catch (error) {
    say(readFileSync(said, "utf8").split("\n").slice(-20).join("\n"));
    throw error;
  } finally {
    hosts.end();
    closeSync(stderr);
    rmSync(folder, { recursive: true });
  }
}

say("\ngrowth, from one count of hosts to the next");
const growth: Record<string, Growth> = {};
for (const { name } of phases) {
  const own = growthOf(counts, name, ours);
  growth[name] = own;
  const linear = own.ratios.every((ratio) => ratio <= stillLinear) ? "linear" : "NOT LINEAR";
  const told = own.ratios.length === 0 ? "three counts tell more" : linear;
  say(
    `${name.padEnd(13)}  CPU ms a host more: ${own.cpuMsPerHost.join(", ")}; kB: ${own.kilobytesPerHost.join(", ")}; each step by the one before: ${own.ratios.join(", ") || "-"}: ${told}`,
  );
}
const most = counts.at(-1) ?? 0;
for (const [name, { cpuMsPerResource, megabytes, mostConnections, leftOpen }] of Object.entries(
  ours.get(most) ?? {},
)) {
  const kept =
    cpuMsPerResource <= mostMilliseconds &&
    megabytes < mostMegabytes &&
    mostConnections <= 1 &&
    leftOpen === 0;
  say(
    `${name.padEnd(13)}  ${most} hosts: ${cpuMsPerResource} ms a resource (at most ${mostMilliseconds}), ${megabytes} MB (under ${mostMegabytes}), ${mostConnections} connections (at most 1), ${leftOpen} left open: ${kept ? "kept" : "NOT KEPT"}`,
  );
}

const results = {
  node: process.version,
  processors: cpus().length,
  load: rounded(loadavg()[0] ?? 0),
  perHost: { LvSnapshot: snapshots, NbdExport: exported, NbdAttachment: exported },
  parallel,
  ours: Object.fromEntries(ours),
  nothing: Object.fromEntries(nothing),
  growth,
};
const file = join(import.meta.dirname, "results", "scale.json");
writeFileSync(file, `${JSON.stringify(results, null, 2)}\n`);
const valuesOf = (all: ReadonlyMap<number, ByPhase>, phase: string, value: (one: Figures) => number) =>
  Object.fromEntries([...all].map(([count, by]) => [`${count} hosts`, value(by[phase] as Figures)]));
const panel = (title: string, value: (one: Figures) => number) => ({
  title,
  series: [
    ...phases.map(({ name }) => ({ name, values: valuesOf(ours, name, value) })),
    { name: "up, a plugin that does nothing", values: valuesOf(nothing, "up", value) },
  ],
});
const chart = barChart(
  `Hosts with ${perHost} resources each`,
  "of the provider",
  counts.map((count) => `${count} hosts`),
  [
    panel("milliseconds of processor time a resource", ({ cpuMsPerResource }) => cpuMsPerResource),
    panel("megabytes at most", ({ megabytes }) => megabytes),
  ],
);
writeFileSync(join(import.meta.dirname, "results", "scale.svg"), chart);
say(`written to ${file} and scale.svg beside it`);
