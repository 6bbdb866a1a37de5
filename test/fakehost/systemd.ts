/**
 * A small model of systemd on a fake server: units of ours as they are written to disk, started and kept running.
 * Jobs go on by themselves, as those of process 1 do, whatever happens to the `systemctl` that asked for them.
 */
import { z } from "zod";
import { isLoopback } from "../../provider/linux/addresses.js";
import { isEnforcedElsewhere } from "../../provider/linux/exportUnit.js";
import { ownDirective } from "../../provider/linux/systemd.js";
import { clientsProof } from "../../provider/resources/clientsProof.js";
import { directives } from "../support/units.js";
import type { Machine, Process, Running, Tool } from "./machine.js";
import { Step, spawn } from "./machine.js";
import { type FakeNbd, parseServer } from "./nbd.js";
import type { Listener, Network } from "./network.js";

const folder = "/etc/systemd/system";

type ActiveState = "inactive" | "activating" | "active" | "deactivating" | "failed";

interface Unit {
  readonly name: string;
  /** The text as of the last look at the disk, and whether there were links to start it at boot. */
  text: string | undefined;
  enabled: boolean;
  state: ActiveState;
  mainPid: number;
  restarts: number;
  listener: Listener | undefined;
  /** Asked to stop: no restart. */
  stopping: boolean;
  /** How many times: a stop takes the place of a start that waits. */
  stops: number;
  /** Jobs that are not done yet. */
  readonly jobs: Set<object>;
}

/** What a server program needs to know of a device. */
export interface Devices {
  size(path: string): number | undefined;
  read(path: string): string | undefined;
}

export class FakeSystemd {
  readonly units = new Map<string, Unit>();
  /** Whether the kernel obeys IPAddressDeny= of what systemd-run starts. */
  filters = true;
  /** Whether, and how, it answers `list-units`. */
  lists: boolean | "nothing" | "with bullets" = true;
  /** The host's clock went back: what was written since looks older than what was read before. */
  clockWentBack = false;

  constructor(
    private readonly machine: Machine,
    private readonly network: Network,
    private readonly address: string,
    private readonly nbd: FakeNbd,
    private readonly devices: Devices,
  ) {}

  tools(): [string, Tool][] {
    return [
      ["systemctl", (process) => this.systemctl(process)],
      ["systemd-run", (process) => this.systemdRun(process)],
      [
        "journalctl",
        (process) => {
          process.out("what the unit said\n");
          return 0;
        },
      ],
    ];
  }

  /** Reads all units and starts those that are enabled. */
  boot(): void {
    this.units.clear();
    this.reload();
    for (const name of this.wanted()) this.machine.background.add(this.start(this.unit(name)));
  }

  /** The unit whose main process has that id. */
  byPid(pid: number): Unit | undefined {
    return [...this.units.values()].find(({ mainPid }) => mainPid === pid);
  }

  /** Its main process has ended by itself, e.g. by SIGKILL. */
  died(unit: Unit): void {
    const { listener } = unit;
    if (listener !== undefined) this.network.of(this.address).delete(listener);
    unit.listener = undefined;
    unit.mainPid = 0;
    if (unit.stopping || unit.state === "inactive") return;
    unit.state = "activating";
    unit.restarts += 1;
    this.machine.background.add(this.restartSoon(unit));
  }

  isEnabled(name: string): boolean {
    return this.wanted().includes(name);
  }

  private unit(name: string): Unit {
    let unit = this.units.get(name);
    if (unit === undefined) {
      unit = {
        name,
        text: this.onDisk(name),
        enabled: this.isEnabled(name),
        state: "inactive",
        mainPid: 0,
        restarts: 0,
        listener: undefined,
        stopping: false,
        stops: 0,
        jobs: new Set(),
      };
      this.units.set(name, unit);
    }
    // What neither runs nor is wanted by anything is not kept: it is read anew when somebody asks for it.
    if (unit.state === "inactive" && unit.jobs.size === 0 && !unit.enabled) this.read(unit);
    return unit;
  }

  private read(unit: Unit): void {
    unit.text = this.onDisk(unit.name);
    unit.enabled = this.isEnabled(unit.name);
  }

  private onDisk(name: string): string | undefined {
    const path = `${folder}/${name}`;
    return this.machine.files.kind(path) === "file" ? this.machine.files.read(path) : undefined;
  }

  private wanted(): string[] {
    return this.machine.files
      .glob(`${folder}/multi-user.target.wants/*`)
      .map((path) => path.split("/").at(-1) ?? "");
  }

  private reload(): void {
    const { files } = this.machine;
    for (const path of files.glob(`${folder}/lvm-nbd-*.service`)) this.unit(path.split("/").at(-1) ?? "");
    for (const unit of this.units.values()) this.read(unit);
  }

  private *systemctl(process: Process): Running<number> {
    const [verb = "", ...rest] = process.argv.slice(1);
    const options = rest.filter((argument) => argument.startsWith("-"));
    switch (verb) {
      case "show":
        return this.show(process, rest);
      case "list-units":
        if (!this.lists) return 1;
        if (this.lists === "nothing") return 0;
        process.out("-.slice loaded active active Root Slice\n");
        for (const { name, text, state } of this.units.values())
          if (text !== undefined || state !== "inactive")
            process.out(
              `${this.lists === true ? "" : "* "}${name} ${text === undefined ? "not-found" : "loaded"} ${state} ${state} what it is\n`,
            );
        return 0;
      case "daemon-reload":
        this.reload();
        return 0;
      case "reset-failed":
        return 1;
    }
    const name = rest.find((argument) => argument.endsWith(".service"));
    if (name === undefined) throw new Error(`systemctl ${process.argv.join(" ")}`);
    const unit = this.unit(name);
    switch (verb) {
      case "enable":
        return yield* this.enable(
          process,
          name,
          !options.includes("--no-reload") && !options.includes("--root=/"),
        );
      case "disable": {
        const names = rest.filter((argument) => argument.endsWith(".service"));
        const missing = names.find((one) => this.onDisk(one) === undefined);
        if (missing !== undefined) {
          process.err(`Failed to disable unit: Unit file ${missing} does not exist.\n`);
          return 1;
        }
        for (const one of names) yield* this.disable(process, one);
        if (!options.includes("--no-reload")) this.reload();
        if (!options.includes("--now")) return 0;
        // At once.
        const told = names.map((one) => this.enqueue(this.unit(one), this.stop(this.unit(one))));
        yield process.wait({ ready: () => told.every((code) => code() !== undefined) });
        return 0;
      }
      case "stop":
        if (this.onDisk(name) === undefined && unit.text === undefined && unit.state === "inactive") {
          process.err(`Failed to stop ${name}: Unit ${name} not loaded.\n`);
          return 5;
        }
        if (options.includes("--no-block")) this.enqueue(unit, this.stop(unit));
        else yield* this.job(process, unit, this.stop(unit));
        return 0;
      case "restart":
        if (unit.text === undefined && this.onDisk(name) === undefined) {
          process.err(`Failed to restart ${name}: Unit ${name} not found.\n`);
          return 5;
        }
        this.enqueue(unit, this.restart(unit, unit.stops + 1));
        return 0;
      case "start":
        if (unit.state === "active") return 0;
        return yield* this.started(process, unit);
      default:
        throw new Error(`systemctl ${process.argv.join(" ")}`);
    }
  }

  private show(process: Process, rest: readonly string[]): number {
    const asked = rest.flatMap((argument, at) => (rest[at - 1] === "-p" ? [argument] : []));
    const units = rest.filter((argument) => /\.(service|slice)$/.test(argument));
    const blocks = units.map((name) => {
      const values = this.properties(name);
      const unknown = asked.find((property) => values[property] === undefined);
      if (unknown !== undefined) throw new Error(`systemctl show -p ${unknown}`);
      // In its own order, whatever was asked first.
      const shown = Object.entries(values).filter(([property]) => asked.includes(property));
      return shown.map(([property, value]) =>
        rest.includes("--value") ? `${value}\n` : `${property}=${value}\n`,
      );
    });
    process.out(blocks.map((lines) => lines.join("")).join("\n"));
    return 0;
  }

  private properties(name: string): Readonly<Record<string, string>> {
    if (name.endsWith(".slice")) {
      return {
        ...{ MainPID: "0", IPAddressAllow: "", IPAddressDeny: "", Id: name, LoadState: "loaded" },
        ...{ ActiveState: "active", UnitFileState: "static", DropInPaths: "", NeedDaemonReload: "no" },
      };
    }
    const unit = this.unit(name);
    const disk = this.onDisk(name);
    const { files } = this.machine;
    const dropIns =
      files.kind(`${folder}/${name}.d`) === "directory" ? files.glob(`${folder}/${name}.d/*`) : [];
    return {
      MainPID: String(unit.mainPid),
      NRestarts: String(unit.restarts),
      IPAddressAllow: (directives(unit.text ?? "").get("Service.IPAddressAllow") ?? []).join(" "),
      IPAddressDeny: directives(unit.text ?? "").has("Service.IPAddressDeny") ? "::/0 0.0.0.0/0" : "",
      Id: name,
      LoadState: unit.text === undefined ? "not-found" : "loaded",
      ActiveState: unit.state,
      DropInPaths: dropIns.join(" "),
      UnitFileState: disk === undefined ? "" : unit.enabled ? "enabled" : "disabled",
      NeedDaemonReload: unit.text !== disk && !this.clockWentBack ? "yes" : "no",
      Job: unit.jobs.size === 0 ? "" : "1",
    };
  }

  private *enable(process: Process, name: string, reloads: boolean): Running<number> {
    const text = this.onDisk(name);
    if (text === undefined) {
      process.err(`Failed to enable unit: Unit file ${name} does not exist.\n`);
      return 1;
    }
    if (!this.isEnabled(name) && !this.mayStartAtBoot(name, text))
      throw new Error(`${name} is to start at boot before anybody has seen that it keeps others out`);
    for (const target of (directives(text).get("Install.WantedBy") ?? []).join(" ").split(" ")) {
      const link = `${folder}/${target}.wants/${name}`;
      this.machine.files.mkdirs(`${folder}/${target}.wants`);
      if (this.machine.files.kind(link, false) === undefined)
        this.machine.files.link(`${folder}/${name}`, link);
      yield process.wait({});
    }
    if (reloads) this.reload();
    return 0;
  }

  private mayStartAtBoot(name: string, text: string): boolean {
    if (!name.startsWith("lvm-nbd-export-") || isEnforcedElsewhere(text)) return true;
    const { listenAddress } = z
      .object({ listenAddress: z.string() })
      .parse(JSON.parse(ownDirective(text, "Plan") ?? ""));
    if (isLoopback(listenAddress)) return true;
    const { files } = this.machine;
    return files.exists(clientsProof) && files.read(clientsProof).startsWith(files.read("/proc/version"));
  }

  private *disable(process: Process, name: string): Running<void> {
    for (const link of this.machine.files.glob(`${folder}/*.wants/*`)) {
      if (!link.endsWith(`/${name}`)) continue;
      this.machine.files.remove(link);
      const parent = link.slice(0, link.lastIndexOf("/"));
      if (this.machine.files.list(parent).length === 0) this.machine.files.rmdir(parent);
      yield process.wait({});
    }
  }

  /** Has a job done as process 1 does it, by itself. Returns what tells its result. */
  private enqueue({ jobs }: Unit, work: Running<number>): () => number | undefined {
    let code: number | undefined;
    const job = {};
    jobs.add(job);
    this.machine.background.add(
      (function* () {
        code = yield* work;
        jobs.delete(job);
        return 0;
      })(),
    );
    return () => code;
  }

  /** `systemctl` only waits for it. */
  private *job(process: Process, unit: Unit, work: Running<number>): Running<number> {
    const told = this.enqueue(unit, work);
    for (;;) {
      const code = told();
      if (code !== undefined) return code;
      yield process.wait({ ready: () => told() !== undefined });
    }
  }

  private *started(process: Process, unit: Unit): Running<number> {
    const code = yield* this.job(process, unit, this.startUnlessStopped(unit, unit.stops));
    if (code !== 0)
      process.err(`Job for ${unit.name} failed because the control process exited with error code.\n`);
    return code;
  }

  private *restartSoon(unit: Unit): Running<number> {
    const until = this.machine.now() + 2000;
    const step = new Step([`restart of ${unit.name}`], { until, ready: () => unit.state !== "activating" });
    while (!step.canGoOn(this.machine.now())) yield step;
    if (unit.state !== "activating" || unit.mainPid !== 0) return 0;
    return yield* this.start(unit);
  }

  /** One job: any other stop takes its place. */
  private *restart(unit: Unit, stops: number): Running<number> {
    yield* this.stop(unit);
    return yield* this.startUnlessStopped(unit, stops);
  }

  private *startUnlessStopped(unit: Unit, stops: number): Running<number> {
    return unit.stops === stops ? yield* this.start(unit) : 1;
  }

  private *start(unit: Unit): Running<number> {
    unit.stopping = false;
    unit.restarts = unit.state === "activating" ? unit.restarts : 0;
    if (unit.text === undefined) return 5;
    const text = directives(unit.text);
    const lines = (name: string) => (text.get(`Service.${name}`) ?? []).map(commandLine);
    unit.state = "activating";
    const device = text.get(`X-LvmNbd.Device`)?.[0] ?? "";
    if (text.has("Unit.Requires") && this.machine.files.kind(device) !== "block") {
      unit.state = "inactive";
      return 1;
    }
    const { stops } = unit;
    for (const before of lines("ExecStartPre")) {
      const code = yield* this.exec(before);
      if (unit.stops !== stops) return 1;
      if (code !== 0) {
        this.died(unit);
        return 1;
      }
    }
    const argv = lines("ExecStart")[0] ?? [];
    unit.mainPid = this.machine.nextPid();
    const runs = argv[0] === "nbd-client" ? this.attach(unit, argv) : this.serve(unit, argv, text);
    if (!runs) {
      this.died(unit);
      return argv[0] === "nbd-client" ? 1 : 0;
    }
    for (const after of lines("ExecStartPost")) {
      const code = yield* this.exec(withMainPid(after, unit));
      if (unit.stops !== stops) return 1;
      if (code !== 0) {
        yield* this.stop(unit);
        return 1;
      }
    }
    unit.state = "active";
    return 0;
  }

  private attach(unit: Unit, argv: readonly string[]): boolean {
    const after = (option: string) => argv[argv.indexOf(option) + 1] ?? "";
    const [address = "", port = "", device = ""] = argv.slice(argv.indexOf("-N") + 2);
    const endpoint = { address, port: Number(port), exportName: after("-N") };
    return this.nbd.connect(
      device.replace("/dev/", ""),
      unit.mainPid,
      endpoint,
      argv.includes("-readonly"),
      Number(after("-b")),
    );
  }

  private serve(unit: Unit, argv: readonly string[], text: ReadonlyMap<string, readonly string[]>): boolean {
    const { files } = this.machine;
    // Without its configuration a server ends.
    const isThere = argv.every((one) => !one.startsWith("/etc/lvm-nbd/") || files.kind(one) !== undefined);
    if (!isThere) return false;
    const asked = parseServer(argv, (path) => files.read(path));
    if (asked === undefined || this.network.conflict(this.address, asked.address, asked.port) !== undefined)
      return false;
    const { device } = asked;
    if (this.devices.size(device) === undefined) return false;
    unit.listener = {
      ...asked,
      pid: unit.mainPid,
      program: argv[0] ?? "",
      allowed: (text.get("Service.IPAddressAllow")?.[0] ?? "any").split(" "),
      size: () => this.devices.size(device),
      read: () => this.devices.read(device),
      frozen: false,
    };
    this.network.of(this.address).add(unit.listener);
    return true;
  }

  private *stop(unit: Unit): Running<number> {
    unit.stopping = true;
    unit.stops += 1;
    if (unit.text !== undefined && unit.mainPid !== 0) {
      for (const line of (directives(unit.text).get("Service.ExecStop") ?? []).map(commandLine)) {
        yield* this.exec(withMainPid(line, unit));
      }
    }
    if (unit.listener !== undefined) this.network.of(this.address).delete(unit.listener);
    unit.listener = undefined;
    unit.mainPid = 0;
    if (unit.text !== undefined) {
      for (const line of (directives(unit.text).get("Service.ExecStopPost") ?? []).map(commandLine))
        yield* this.exec(line);
    }
    unit.state = "inactive";
    return 0;
  }

  private *exec(argv: readonly string[]): Running<number> {
    return yield* spawn(this.machine, argv, { out: () => undefined, err: () => undefined }).running;
  }

  private *systemdRun(process: Process): Running<number> {
    const at = process.argv.indexOf("timeout");
    if (process.argv.includes("IPAddressDeny=any") && this.filters) {
      yield process.wait({ until: process.machine.now() + 3000 });
      return 124;
    }
    return yield* process.run(process.argv.slice(at));
  }
}

function withMainPid(argv: readonly string[], { mainPid }: Unit): string[] {
  return argv.map((argument) => (argument === "$MAINPID" ? String(mainPid) : argument));
}

/** A command line of a unit as systemd splits it; the one variable we use stays. */
export function commandLine(line: string): string[] {
  const words = line.match(/"(?:[^"\\]|\\.)*"|\S+/g) ?? [];
  return words.map((word) => {
    const bare = word.startsWith('"') ? word.slice(1, -1) : word;
    const plain = bare
      .replace(/\\(x[0-9a-f]{2}|.)/g, (_, escaped: string) =>
        escaped.startsWith("x") && escaped.length === 3
          ? String.fromCharCode(Number.parseInt(escaped.slice(1), 16))
          : ({ n: "\n", t: "\t" }[escaped] ?? escaped),
      )
      .replaceAll("%%", "%");
    return word === "$MAINPID" ? word : plain.replaceAll("$$", "$");
  });
}
