/**
 * `npm run bench -- chains [COUNT...]`: how long chains take (1 and 8 unless told) to be made, found unchanged, looked at and removed: by
 * both doors, by a hand-written script, and by the engine that does nothing for them. Prints medians of runs in turns, with what reached
 * the servers, and writes them to results/chains.json and results/chains.svg.
 */
import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { loadavg } from "node:os";
import { join } from "node:path";
import type * as Sudoers from "../../provider/sudoers.js";
import type { Door } from "../lab/doorNames.mts";
import { FaultStack, type Run } from "../lab/faults/fault-stack.mts";
import { OPERATOR } from "../lab/image-contents.mts";
import { type Lab, labUp } from "../lab/lab.mts";
import { ensureAnsible, playbook } from "./ansible.mts";
import { type Chain, chains, declared, makeOrigins, standing } from "./chain.mts";
import { barChart } from "./chart.mts";
import { median, rounded, say } from "./figures.mts";
import { handDown, handUp } from "./handScript.mts";
import { type Remote, sinceLast, tellOfSessions } from "./remoteCommands.mts";

const load = createRequire(import.meta.url);
const { sudoersInstallation }: typeof Sudoers = load(join(import.meta.dirname, "../../dist/sudoers.js"));

const rounds = 3;
const operations = ["up", "no-change up", "refresh", "down"] as const;
type Operation = (typeof operations)[number];

const [hand, nothing] = ["hand-written script", "engine alone"];

/** One of those that are compared. What it does not have, it cannot do. */
interface Side {
  readonly name: string;
  readonly touchesServers: boolean;
  readonly does: Readonly<Partial<Record<Operation, (all: readonly Chain[]) => Promise<void>>>>;
}

interface Measured {
  readonly seconds: number;
  readonly remote: Readonly<Record<string, Remote>>;
}

type Figures = Map<string, Map<Operation, Measured[]>>;

/** A stack that any of the sides runs. `door`: that of ours. */
function pulumi(name: string, stack: FaultStack, door: Door | undefined): Side {
  const run = (work: () => Promise<Run>) => async (all: readonly Chain[]) => {
    if (door !== undefined) stack.door = door;
    stack.declare(...all.flatMap(declared));
    (await work()).succeeded();
  };
  return {
    name,
    touchesServers: door !== undefined,
    does: {
      up: run(() => stack.up()),
      "no-change up": run(() => stack.up({ args: ["--expect-no-changes"] })),
      refresh: run(() => stack.refresh({ args: ["--expect-no-changes"] })),
      down: run(() => stack.destroy()),
    },
  };
}

/** Nothing where Ansible cannot be had. */
async function ansibleSide(lab: Lab): Promise<readonly Side[]> {
  let program: string;
  try {
    program = await ensureAnsible(say);
  } catch (error) {
    say(`without Ansible, which cannot be had here: ${error instanceof Error ? error.message : error}`);
    return [];
  }
  const up = (all: readonly Chain[]) => playbook(program, "up.yaml", lab, all);
  const down = (all: readonly Chain[]) => playbook(program, "down.yaml", lab, all);
  return [{ name: "Ansible", touchesServers: true, does: { up, "no-change up": up, down } }];
}

/** Whatever a side says, it has done what it was to. */
async function check(lab: Lab, side: Side, operation: Operation, count: number): Promise<void> {
  const wanted = operation === "down" || !side.touchesServers ? 0 : count;
  for (const [what, number] of Object.entries(await standing(lab))) {
    if (number !== wanted) throw new Error(`${side.name}, ${operation}: ${number} ${what}, not ${wanted}`);
  }
}

async function measure(
  lab: Lab,
  sides: readonly Side[],
  all: readonly Chain[],
  times: number,
): Promise<Figures> {
  const figures: Figures = new Map(sides.map(({ name }) => [name, new Map()]));
  for (let round = 1; round <= times; round++) {
    for (const side of sides) {
      for (const operation of operations) {
        const work = side.does[operation];
        if (work === undefined) continue;
        await sinceLast(lab);
        const began = performance.now();
        await work(all);
        const seconds = (performance.now() - began) / 1000;
        const remote = await sinceLast(lab);
        await check(lab, side, operation, all.length);
        const of = figures.get(side.name);
        of?.set(operation, [...(of.get(operation) ?? []), { seconds, remote }]);
        say(`  round ${round} of ${times}: ${side.name}, ${operation}: ${seconds.toFixed(1)} s`);
      }
    }
  }
  return figures;
}

/** The round that took the median. */
function middle(measured: readonly Measured[]): Measured | undefined {
  const seconds = median(measured.map((one) => one.seconds));
  return measured.find((one) => one.seconds === seconds);
}

/** Beside what each operation is judged: a script that has it, else the engine that does nothing. */
function judgedBy(figures: Figures, operation: Operation): Measured | undefined {
  return [hand, nothing].map((name) => middle(figures.get(name)?.get(operation) ?? [])).find(Boolean);
}

function tell(figures: Figures, count: number): void {
  say(`\n${count} chains: seconds, and times those of the script (of the engine alone where it has none)`);
  say(["".padEnd(20), ...operations.map((one) => one.padStart(18))].join(""));
  for (const [name, byOperation] of figures) {
    const cells = operations.map((operation) => {
      const mine = middle(byOperation.get(operation) ?? []);
      if (mine === undefined) return "-".padStart(18);
      const other = judgedBy(figures, operation)?.seconds ?? Number.NaN;
      return `${mine.seconds.toFixed(1)} (${(mine.seconds / other).toFixed(2)})`.padStart(18);
    });
    say([name.padEnd(20), ...cells].join(""));
  }
  say("\nremote commands/connections, server1 and server2");
  for (const [name, byOperation] of figures) {
    if (name === nothing) continue;
    const cells = operations.map((operation) => {
      const servers = Object.values(middle(byOperation.get(operation) ?? [])?.remote ?? {});
      const text = servers.map(({ commands, connections }) => `${commands}/${connections}`).join(" ");
      return (text || "-").padStart(18);
    });
    say([name.padEnd(20), ...cells].join(""));
  }
  say("");
}

function asJson(figures: Figures): object {
  const sides = [...figures].map(([name, byOperation]) => {
    const all = [...byOperation].map(([operation, measured]) => {
      const { seconds = Number.NaN, remote } = middle(measured) ?? {};
      const rest = name === nothing ? {} : { remote };
      return [
        operation,
        { median: rounded(seconds), seconds: measured.map((one) => rounded(one.seconds)), ...rest },
      ];
    });
    return [name, Object.fromEntries(all)];
  });
  return Object.fromEntries(sides);
}

function chart(results: ReadonlyMap<number, Figures>): string {
  const panels = [...results].map(([count, figures]) => ({
    title: `${count} ${count === 1 ? "chain" : "chains"}`,
    series: [...figures].map(([name, byOperation]) => ({
      name,
      values: Object.fromEntries(
        [...byOperation].map(([operation, measured]) => [operation, middle(measured)?.seconds ?? Number.NaN]),
      ),
    })),
  }));
  return barChart(
    "Chains of snapshot, export and attachment, on two emulated servers",
    "seconds",
    operations,
    panels,
  );
}

const counts = process.argv.slice(2).map(Number);
if (counts.some((count) => !(Number.isInteger(count) && count > 0))) {
  process.stderr.write("usage: npm run bench -- chains [COUNT...]\n");
  process.exit(2);
}
if (counts.length === 0) counts.push(1, 8);

const lab = await labUp({ name: `bench-${process.pid}`, log: say });
const stacks: FaultStack[] = [];
const stackOf = async (...more: { readonly from: string }[]) => {
  const stack = await FaultStack.create(lab, ...more);
  stacks.push(stack);
  return stack;
};
try {
  // Beside all rights, which the script needs: ours takes the commands that are kept on a host.
  for (const guest of [lab.server1, lab.server2])
    await guest.run("sh", { stdin: sudoersInstallation(OPERATOR.user, "operate", "of this checkout") });
  await tellOfSessions(lab);
  const most = chains(Math.max(...counts));
  await makeOrigins(lab, most);
  const ours = await stackOf();
  const sides: readonly Side[] = [
    pulumi("dynamic resources", ours, "dynamic"),
    pulumi("plugin", ours, "plugin"),
    {
      name: hand,
      touchesServers: true,
      does: { up: (all) => handUp(lab, all), down: (all) => handDown(lab, all) },
    },
    ...(await ansibleSide(lab)),
    pulumi(nothing, await stackOf({ from: join(import.meta.dirname, "nothing") }), undefined),
  ];
  say("once each without being measured: a host is asked some things once after it has booted");
  await measure(lab, sides, most.slice(0, 1), 1);
  const { stdout } = await lab.server1.run(
    "uname -r; lvm version | sed -n 's/ *LVM version: *//p'; nbdkit --version",
  );
  const [kernel, lvm, server] = stdout.split("\n");
  const file = join(import.meta.dirname, "results", "chains");
  const results = new Map<number, Figures>();
  const loads: number[] = [];
  for (const count of counts) {
    say(`${count} chains, ${rounds} rounds`);
    const figures = await measure(lab, sides, most.slice(0, count), rounds);
    tell(figures, count);
    results.set(count, figures);
    loads.push(rounded(loadavg()[0] ?? Number.NaN));
    // What is measured is kept if the next count is cut off.
    const json = {
      ...{ node: process.version, guest: { kernel, lvm, server }, rounds, loadAfterwards: loads },
      chains: Object.fromEntries([...results].map(([number, of]) => [number, asJson(of)])),
    };
    writeFileSync(`${file}.json`, `${JSON.stringify(json, null, 2)}\n`);
    writeFileSync(`${file}.svg`, chart(results));
    say(`written to ${file}.json and ${file}.svg`);
  }
} finally {
  for (const stack of stacks) stack.close();
  await lab.down();
}
