/**
 * HostSetup: what the other resources need of a host, looked at, and brought there: programs, the nbd module, and an LVM that
 * leaves NBD devices alone.
 */
import { isDeepStrictEqual } from "node:util";
import { z } from "zod";
import { failure, parseOutput, refusal, succeed } from "../core/command.js";
import type { LvmNbdError } from "../core/errors.js";
import { script } from "../core/hostCommands.js";
import { commonInputs, refusing } from "../core/inputs.js";
import { declareInstead, ownerMark } from "../core/owner.js";
import type { Change, Context, ResourceType } from "../core/resource.js";
import { serially } from "../core/serial.js";
import { linesToEnd, parseFields } from "../linux/fields.js";
import { attaches, type HostRole, hostRoles, programsOf } from "../linux/hostRoles.js";
import {
  applySetupScript,
  fieldOf,
  filterBackup,
  filterHides,
  filterRefused,
  filterShows,
  hostModules,
  linkInTheWay,
  lookScript,
  moduleRefused,
  removeSetupScript,
  setupRecord,
  setupRecordsScript,
  versionCommands,
} from "../linux/hostSetup.js";
import {
  globalFilterLine,
  hidesNbd,
  lvmLocal,
  parseGlobalFilter,
  withGlobalFilter,
  withoutNbd,
} from "../linux/lvmFilter.js";
import {
  candidatesScript,
  type Distribution,
  installCommand,
  installDeadlineSeconds,
  installScripts,
  parseCandidates,
  parseOsRelease,
  upstreamVersion,
  wasUpdated,
} from "../linux/packages.js";
import { knownPackages, missingOf, type PackageManager, packagesOf } from "../linux/programs.js";
import { changedMeanwhile } from "../linux/unitScript.js";
import { holesOf, versionIn } from "../linux/versions.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import { nbdServerInput } from "./nbdExport.js";
import { writtenMeanwhile } from "./unit.js";

const inputs = z.strictObject({
  ...commonInputs,
  roles: z
    .array(z.enum(hostRoles).meta({ title: "HostRole" }))
    .min(1, "must name at least one role")
    .superRefine(
      refusing((roles) => (new Set(roles).size === roles.length ? undefined : "must name no role twice")),
    )
    .describe(
      "What the host is used for: `source` (volumes are snapshotted, exported, merged with their snapshots there), `client` " +
        "(exports are attached and mounted there), `destination` (copies are made and images restored there, in files or volumes).",
    ),
  server: nbdServerInput.describe(
    "Program that serves the exports of a `source`: the `server` of its NbdExports.",
  ),
  packages: z
    .boolean()
    .default(true)
    .describe("Install what is missing. `false`: refuse, with the command that installs it."),
  lvmFilter: z
    .boolean()
    .default(true)
    .describe("Keep LVM of a `client` off NBD devices, by its `global_filter`."),
});

/** What a look at a host tells of it, whatever it is used for. */
export const hostFacts = {
  distribution: z.string().describe("E.g. `Debian GNU/Linux 12 (bookworm)`."),
  kernel: z.string().describe("Version of the running kernel."),
  versions: z
    .record(z.string(), z.string())
    .describe(
      "Versions of the tools that are there: `nbdkit`, `nbdcopy`, `nbdinfo`, `nbd-server`, `nbd-client`, `qemu-img`, `lvm`, `systemd`.",
    ),
  nbdModule: z.boolean().describe("Whether the kernel's nbd module is loaded."),
  nbdsMax: z
    .number()
    .optional()
    .describe("NBD devices that the module made (`nbds_max`), while it is loaded."),
  globalFilter: z
    .array(z.string())
    .optional()
    .describe("LVM's `global_filter` in effect; left out where there is no LVM."),
  cgroupBpf: z
    .boolean()
    .optional()
    .describe(
      "Whether the kernel can enforce the `clients` of an NbdExport (unified control groups and BPF); left out where its configuration cannot be read.",
    ),
} as const;
type HostFacts = z.infer<z.ZodObject<typeof hostFacts>>;

const outputs = z.object({
  packagesInstalled: z.array(z.string()).describe("Packages that this resource installed. They stay."),
  ...hostFacts,
  problems: z
    .array(z.string())
    .describe("What is not as declared, each with what it is; empty if the host is ready."),
  state: z
    .enum(["ready", "incomplete"])
    .describe("`ready`; `incomplete` (`problems` says what is not as declared)."),
});

type Inputs = z.infer<typeof inputs>;
type Outputs = z.infer<typeof outputs>;
type State = Inputs & Outputs;

/** What a program declares, before defaults. */
export type HostSetupDeclaration = z.input<typeof inputs>;
/** What a program can read of it. */
export type HostSetupOutputs = State;

/** What this resource notes on the host. */
const recordShape = z.strictObject({
  mark: z.string(),
  module: z.boolean(),
  filter: z.boolean(),
  packages: z.array(z.string()),
  /** Missing in a record of an earlier version. */
  declared: inputs.pick({ roles: true, server: true, packages: true, lvmFilter: true }).optional(),
});
type HostRecord = z.infer<typeof recordShape>;

interface Lvm {
  /** The patterns in effect. */
  readonly filter: readonly string[];
  /** The file that lists LVM's devices, where it goes by that: then it reads no filter, and no device that is not listed. */
  readonly devicesFile: string | undefined;
  /** Checksum of lvmlocal.conf; "absent" for none. */
  readonly sum: string;
  /** lvmlocal.conf as it is without this provider. */
  readonly local: string;
  /** The patterns in effect without ours, where lvmlocal.conf still reads as this provider wrote it. */
  readonly base: readonly string[] | undefined;
}

interface Facts {
  readonly record: HostRecord | undefined;
  readonly recordText: string | undefined;
  /** Links, or what is no file, where this resource writes. */
  readonly links: readonly string[];
  readonly distribution: Distribution;
  readonly kernel: string;
  readonly missing: readonly string[];
  readonly versions: Readonly<Record<string, string>>;
  /** Versions of the packages that a program of ours may come from, those that are installed. */
  readonly packages: ReadonlyMap<string, string>;
  readonly mended: (program: string) => ReadonlySet<string>;
  readonly loaded: boolean;
  readonly nbdsMax: number | undefined;
  /** What modprobe says of a module that it could not load; `undefined` if it could. */
  readonly noModule: string | undefined;
  readonly modules: string | undefined;
  readonly lvm: Lvm | undefined;
  readonly cgroupBpf: boolean | undefined;
}

interface Observed {
  readonly mark: string | undefined;
  readonly facts: Facts;
}

async function look(context: Context, wanted: Pick<Inputs, "owner" | "roles" | "server">): Promise<Facts> {
  const command: RemoteCommand = {
    argv: script(
      lookScript,
      setupRecord(wanted.owner),
      programsOf(wanted.roles, wanted.server).join(" "),
      knownPackages("apt").join(" "),
      [...new Set([...knownPackages("dnf"), ...knownPackages("zypper")])].join(" "),
    ),
    kind: "read",
    deadlineSeconds: 180,
  };
  const result = await succeed(context, command, "the host could not be looked at");
  return parseOutput(context, command, result, (stdout) => readFacts(parseFields(stdout)));
}

/** Looks at a host, of which nothing is declared. */
export async function lookAtHost(context: Context): Promise<HostFacts> {
  return factsOf(await look(context, { owner: "", roles: [...hostRoles], server: "nbdkit" }));
}

async function observe(context: Context, wanted: Inputs | State): Promise<Observed | undefined> {
  const facts = await look(context, wanted);
  if (facts.recordText === undefined) return undefined;
  return { mark: facts.record?.mark, facts };
}

function readFacts(fields: ReadonlyMap<string, string>): Facts {
  const recordText = fields.get("record");
  const versions = Object.keys(versionCommands).flatMap((program) => {
    const version = versionIn(fields.get(fieldOf("version", program)) ?? "");
    return version === undefined ? [] : [[program, version] as const];
  });
  return {
    record: recordText === undefined ? undefined : readRecord(recordText),
    recordText,
    links: words(fields.get("links")),
    distribution: parseOsRelease(fields.get("osrelease") ?? ""),
    kernel: required(fields, "kernel").trim(),
    missing: missingOf(fields),
    versions: Object.fromEntries(versions),
    packages: new Map(
      (fields.get("packages") ?? "")
        .split("\n")
        .filter((line) => line !== "")
        .map((line) => [line.split(" ")[0] ?? "", line.split(" ")[1] ?? ""]),
    ),
    mended: (program) => new Set(words(fields.get(fieldOf("mended", program)))),
    loaded: fields.has("loaded"),
    nbdsMax: numberIn(fields.get("nbdsmax")),
    noModule: ["0", undefined].includes(fields.get("modprobe.rc"))
      ? undefined
      : required(fields, "modprobe").trim(),
    modules: fields.get("modules"),
    lvm: fields.has("filter") ? readLvm(fields) : undefined,
    cgroupBpf: bpfIn(fields),
  };
}

function readLvm(fields: ReadonlyMap<string, string>): Lvm {
  const isOurs = fields.has("ours");
  return {
    filter: parseGlobalFilter(required(fields, "filter")),
    devicesFile: fields.get("devicesfile"),
    sum: required(fields, "sum"),
    local: fields.get(isOurs ? "kept" : "local") ?? "",
    base: isOurs ? parseGlobalFilter(required(fields, "base")) : undefined,
  };
}

/** A record that was spoiled by hand counts as another's declaration, and is written anew. */
function readRecord(text: string): HostRecord | undefined {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return undefined;
  }
  return recordShape.safeParse(value).data;
}

function bpfIn(fields: ReadonlyMap<string, string>): boolean | undefined {
  const [groups, configured] = ["cgroup", "bpf"].map((name) => fields.get(name) ?? "");
  if (groups === "") return undefined;
  if (groups !== "cgroup2fs") return false;
  return configured === "" ? undefined : configured?.endsWith("=y");
}

function words(text: string | undefined): string[] {
  return (text ?? "").split(/\s+/).filter((word) => word !== "");
}

function numberIn(text: string | undefined): number | undefined {
  const number = Number(text);
  return text === undefined || !Number.isSafeInteger(number) ? undefined : number;
}

function required(fields: ReadonlyMap<string, string>, name: string): string {
  const value = fields.get(name);
  if (value === undefined) throw new Error(`"${name}" is missing`);
  return value;
}

type Wishes = Pick<Inputs, "roles" | "server" | "lvmFilter">;

/** What is not as declared, each as a sentence. */
function problemsOf(facts: Facts, wanted: Wishes): string[] {
  const { manager } = facts.distribution;
  const missing = facts.missing.map((program) =>
    manager === undefined
      ? `${program} is not installed`
      : `${program} is not installed (package ${packagesOf([program], manager).join()})`,
  );
  return [
    ...missing,
    ...vulnerable(facts, wanted),
    ...moduleProblems(facts, wanted.roles),
    ...filterProblems(facts.lvm, wanted),
  ];
}

function moduleProblems(facts: Facts, roles: readonly HostRole[]): string[] {
  if (!attaches(roles)) return [];
  const { path, text } = hostModules;
  return [
    ...(facts.loaded ? [] : ["the nbd module is not loaded"]),
    ...(facts.modules === undefined ? [`${path}, which loads nbd at boot, is not there`] : []),
    ...(facts.modules === undefined || facts.modules === text ? [] : [`${path} was changed`]),
  ];
}

/** Whether LVM of the host is to leave NBD devices alone by a filter. */
function isFiltered(lvm: Lvm | undefined, { roles, lvmFilter }: Wishes): lvm is Lvm {
  return lvmFilter && attaches(roles) && lvm !== undefined && lvm.devicesFile === undefined;
}

function filterProblems(lvm: Lvm | undefined, wanted: Wishes): string[] {
  if (!isFiltered(lvm, wanted)) return [];
  if (lvm.base === undefined)
    return hidesNbd(lvm.filter) ? [] : ["LVM's global_filter does not keep it off NBD devices"];
  return isDeepStrictEqual(withoutNbd(lvm.base), lvm.filter)
    ? []
    : ["LVM's global_filter was changed since it was merged, and the change has no effect yet"];
}

/** The known holes of what this host is to use. */
function vulnerable(facts: Facts, { roles, server }: Pick<Wishes, "roles" | "server">): string[] {
  return programsOf(roles, server).flatMap((program) => {
    const version = facts.versions[program];
    if (version === undefined || facts.missing.includes(program)) return [];
    return holesOf(program, version, facts.mended(program));
  });
}

function refuseVulnerable(context: Context, found: readonly string[], manager: PackageManager | undefined) {
  if (found.length === 0) return;
  const otherServer = found.some((hole) => hole.includes("nbd-server"))
    ? ' Or serve by another program: `server: "nbdkit"`, which the exports of this host then have to name.'
    : "";
  throw refusal(
    context,
    "VERSION_VULNERABLE",
    found.join("; "),
    `Install a version that has it no more${manager === undefined ? "" : ", e.g. by an upgrade of the distribution"}, or one whose changelog (in the package's documentation) names it as mended, and run again.${otherServer}`,
  );
}

/** Refuses by looking only. Returns what is to be installed, and by what. */
function preflight(
  context: Context,
  wanted: Inputs,
  facts: Facts,
): { manager: PackageManager; packages: string[] } | undefined {
  const filterIsToBeWritten = filterProblems(facts.lvm, wanted).length > 0;
  const inTheWay = facts.links.filter(
    (path) => filterIsToBeWritten || !(path === lvmLocal || path === "/etc/lvm"),
  );
  if (inTheWay.length > 0) throw linked(context, inTheWay.join(", "));
  refuseVulnerable(context, vulnerable(facts, wanted), facts.distribution.manager);
  if (attaches(wanted.roles) && facts.noModule !== undefined && !facts.missing.includes("modprobe"))
    throw noModule(context, facts, facts.noModule);
  return missingPackages(context, wanted, facts);
}

function missingPackages(
  context: Context,
  wanted: Inputs,
  facts: Facts,
): { manager: PackageManager; packages: string[] } | undefined {
  if (facts.missing.length === 0) return undefined;
  const { manager, name } = facts.distribution;
  const missing = `not installed on the host: ${facts.missing.join(", ")}`;
  if (manager === undefined) {
    throw refusal(
      context,
      "PROGRAM_MISSING",
      `${missing}; the packages of ${name} are not known`,
      "Install these programs by hand and run again. Packages are known of Debian, Red Hat and SUSE and of what derives from them.",
    );
  }
  const packages = packagesOf(facts.missing, manager);
  if (!wanted.packages) {
    throw refusal(
      context,
      "PROGRAM_MISSING",
      `${missing}; and packages is false`,
      `Run \`${installCommand(manager, packages)}\` on the host, then this again; or leave \`packages\` out.`,
    );
  }
  return { manager, packages };
}

function linked(context: Context, paths: string): LvmNbdError {
  return refusal(
    context,
    "FOREIGN_RESOURCE",
    `a symbolic link, or what is no file, is where this resource writes: ${paths}. Nothing was written through it`,
    "Put what it leads to in its place, or remove it, and run again.",
  );
}

function noModule(context: Context, { distribution, kernel }: Facts, said: string): LvmNbdError {
  const holding = {
    apt: `linux-modules-extra-${kernel}`,
    dnf: "kernel-modules-extra",
    zypper: "kernel-default",
  };
  const { manager } = distribution;
  return refusal(
    context,
    "MODULE_MISSING",
    `kernel ${kernel} has no nbd module: ${said}`,
    `Install the package of the kernel's modules that holds it${manager === undefined ? "" : ` (of ${distribution.name} probably ${holding[manager]})`}, boot that kernel, and run again.`,
  );
}

function recordOf(wanted: Inputs, packages: readonly string[]): string {
  const record: HostRecord = {
    mark: ownerMark(wanted.owner),
    module: attaches(wanted.roles),
    filter: wanted.lvmFilter && attaches(wanted.roles),
    packages: [...new Set(packages)].sort(),
    declared: {
      ...{ roles: wanted.roles, server: wanted.server },
      ...{ packages: wanted.packages, lvmFilter: wanted.lvmFilter },
    },
  };
  return `${JSON.stringify(record)}\n`;
}

/** Installs what is missing. Returns the record as it was written, with the packages that are ours from now on. */
async function install(
  context: Context,
  wanted: Inputs,
  facts: Facts,
  { manager, packages }: { manager: PackageManager; packages: readonly string[] },
): Promise<string[]> {
  if (manager === "apt") await refuseCandidates(context, facts, packages);
  context.progress(`installing ${packages.join(", ")}`);
  const ours = [...(facts.record?.packages ?? []), ...packages];
  const command: RemoteCommand = {
    argv: script(
      installScripts[manager],
      setupRecord(wanted.owner),
      recordOf(wanted, ours).trim(),
      ...packages,
    ),
    kind: "change",
    deadlineSeconds: installDeadlineSeconds,
  };
  const result = await serially(context.host, "packages", () => context.host.run(command, context.signal));
  if (result.exitCode !== 0) {
    throw failure(
      context,
      command,
      result,
      `${packages.join(", ")} could not be installed`,
      "COMMAND_FAILED",
      `Put right what its stderr names, or run \`${installCommand(manager, packages)}\` on the host; then run again. ${manager === "dnf" ? "Of RHEL and its kin, nbd is in EPEL: `dnf install epel-release`." : ""}`.trim(),
    );
  }
  return ours;
}

/**
 * A version with a known hole is not installed in the first place, as far as it can be told before: the changelog, by which one
 * that was mended afterwards is judged, comes with the package.
 */
async function refuseCandidates(context: Context, facts: Facts, packages: readonly string[]): Promise<void> {
  const command: RemoteCommand = {
    argv: script(candidatesScript, ...packages),
    kind: "change",
    deadlineSeconds: 400,
  };
  const result = await serially(context.host, "packages", () =>
    succeed(context, command, "the lists of packages could not be read"),
  );
  const fields = parseOutput(context, command, result, parseFields);
  if (fields.has("stale"))
    context.warn("apt's lists of packages could not be read anew; those that the host has are used");
  const candidates = parseCandidates(fields.get("candidates") ?? "");
  const found = facts.missing.flatMap((program) => {
    const candidate = candidates.get(packagesOf([program], "apt").join());
    return candidate === undefined || wasUpdated(candidate)
      ? []
      : holesOf(program, upstreamVersion(candidate), new Set());
  });
  refuseVulnerable(
    context,
    found.map((hole) => `what ${facts.distribution.name} would install: ${hole}`),
    "apt",
  );
}

/** Brings the host to what is declared; does nothing to what is right. `old`: the owner whose record is there, if it is another. */
async function makeReady(context: Context, wanted: Inputs, seen: Facts, old?: string): Promise<void> {
  const isRight =
    problemsOf(seen, wanted).length === 0 &&
    seen.recordText === recordOf(wanted, seen.record?.packages ?? []);
  if (isRight && old === undefined) return;
  const missing = preflight(context, wanted, seen);
  let facts = seen;
  let packages = seen.record?.packages ?? [];
  if (missing !== undefined) {
    packages = await install(context, wanted, seen, missing);
    facts = await look(context, wanted);
    if (facts.missing.length > 0) {
      throw refusal(
        context,
        "PROGRAM_MISSING",
        `${missing.packages.join(", ")} are installed, and still there is no ${facts.missing.join(", ")}`,
        "Somebody has removed the program of an installed package, or it is not on root's PATH. Install the package anew (`apt-get install --reinstall`, `dnf reinstall`, `zypper install --force`) and run again.",
      );
    }
    preflight(context, wanted, facts);
  }
  await apply(context, wanted, facts, packages, old);
}

async function apply(
  context: Context,
  wanted: Inputs,
  facts: Facts,
  packages: readonly string[],
  old: string | undefined,
): Promise<void> {
  const { lvm } = facts;
  const isToBeWritten = filterProblems(lvm, wanted).length > 0 && isFiltered(lvm, wanted);
  const patterns = isToBeWritten ? withoutNbd(lvm.base ?? lvm.filter) : [];
  const text = isToBeWritten ? withGlobalFilter(lvm.local, patterns) : "";
  const filter = isToBeWritten ? "yes" : isFiltered(lvm, wanted) ? "keep" : "no";
  context.progress("writing what is not as declared");
  const command: RemoteCommand = {
    argv: script(
      applySetupScript,
      setupRecord(wanted.owner),
      recordOf(wanted, packages),
      old === undefined ? "" : setupRecord(old),
      attaches(wanted.roles) ? "yes" : "no",
      filter,
      lvm?.sum ?? "",
      globalFilterLine(patterns),
      String(Buffer.byteLength(text)),
    ),
    stdin: text,
    kind: "change",
    deadlineSeconds: 480,
  };
  const result = await serially(context.host, "setup", () => context.host.run(command, context.signal));
  refuseOutcome(context, command, result, facts, patterns);
  warnOfTouched(context, result);
}

/** The error for what the script refused. */
function refuseOutcome(
  context: Context,
  command: RemoteCommand,
  result: CommandResult,
  facts: Facts,
  patterns: readonly string[],
): void {
  const byHand = `Give LVM such a filter by hand (\`${globalFilterLine(patterns)}\` in the devices section), or set \`lvmFilter: false\`.`;
  switch (result.exitCode) {
    case 0:
      return;
    case changedMeanwhile:
      throw writtenMeanwhile(context, command, result);
    case linkInTheWay:
      throw linked(context, result.stdout.trim());
    case moduleRefused:
      throw noModule(context, facts, result.stderr.trim());
    case filterRefused:
      throw failure(
        context,
        command,
        { ...result, stderr: result.stdout },
        `LVM does not take ${lvmLocal} with the filter merged into it; nothing was written`,
        "COMMAND_FAILED",
        byHand,
      );
    case filterHides:
      throw failure(
        context,
        command,
        result,
        `with NBD devices out of its global_filter LVM would no longer see ${result.stdout.trim().replaceAll("\n", ", ")}; nothing was written`,
        "COMMAND_FAILED",
        byHand,
      );
    case filterShows:
      throw failure(
        context,
        command,
        result,
        `with the global_filter that was merged LVM would see ${result.stdout.trim().replaceAll("\n", ", ")}, which it does not see now; nothing was written`,
        "COMMAND_FAILED",
        byHand,
      );
    default:
      throw failure(context, command, result, "the host could not be made ready", "COMMAND_FAILED");
  }
}

function warnOfTouched(context: Context, { stdout }: CommandResult): void {
  if (!stdout.split("\n").includes("touched")) return;
  context.warn(
    `${lvmLocal} was changed since NBD devices were taken out of it, so it is left as it is. If they may come back, take the ` +
      `first pattern, or the section that HostSetup wrote, out of it by hand; ${filterBackup} is how it was before`,
  );
}

function factsOf(facts: Facts): HostFacts {
  return {
    distribution: facts.distribution.name,
    kernel: facts.kernel,
    versions: facts.versions,
    nbdModule: facts.loaded,
    nbdsMax: facts.nbdsMax,
    globalFilter: facts.lvm === undefined ? undefined : [...facts.lvm.filter],
    cgroupBpf: facts.cgroupBpf,
  };
}

function toState(declared: Inputs | State, { facts }: Observed): State {
  const problems = problemsOf(facts, declared);
  return {
    ...declared,
    packagesInstalled: (facts.record?.packages ?? []).filter((name) => facts.packages.has(name)),
    ...factsOf(facts),
    problems,
    state: problems.length === 0 ? "ready" : "incomplete",
  };
}

const inPlace = ["roles", "server", "packages", "lvmFilter", "owner"] as const;

function diff(state: State, wanted: Partial<Inputs>, unknown: ReadonlySet<string>): Change[] {
  const changes: Change[] = inPlace
    .filter((property) => unknown.has(property) || !isDeepStrictEqual(wanted[property], state[property]))
    .map((property) => ({ property, effect: "update" }));
  if (state.state !== "ready") changes.push({ property: "state", effect: "update" });
  return changes;
}

/** The owner marks of all HostSetups of the host. */
async function marksOnHost(context: Context): Promise<string[]> {
  const command: RemoteCommand = { argv: script(setupRecordsScript), kind: "read", deadlineSeconds: 60 };
  const result = await succeed(context, command, "the records of the host could not be read");
  return parseOutput(context, command, result, (stdout) =>
    linesToEnd(stdout).flatMap(
      (line) => readRecord(Buffer.from(line, "base64").toString("utf8"))?.mark ?? [],
    ),
  );
}

/** What was declared, as the record has it. */
async function declared(context: Context, { facts }: Observed): Promise<Partial<Inputs>> {
  if (facts.record?.declared !== undefined) return facts.record.declared;
  const message = "its record on the host does not tell what the host is used for";
  throw refusal(context, "INVALID_INPUT", message, declareInstead);
}

/** The resource as the reconciler sees it. */
export const hostSetup: ResourceType<Inputs, State, Observed> = {
  type: "HostSetup",
  description: "Makes a host ready for its roles, and tells what it is.",
  example: {
    server1: { type: "HostSetup", properties: { host: "server1", roles: ["source"] } },
    server2: { type: "HostSetup", properties: { host: "server2", roles: ["client", "destination"] } },
  },
  inputs,
  outputs,
  validate: () => [],
  predict: () => ({}),
  id: (_wanted, hostName) => `${hostName}/host-setup`,
  observe,
  // The record's name follows from the owner.
  isSame: () => true,
  toState,
  diff,
  byId: {
    form: "host-setup",
    place: (path) => (path === "host-setup" ? { roles: [...hostRoles] } : undefined),
    declared,
    ofOwner: true,
    marksOfOthers: marksOnHost,
  },
  // Of one machine under two names the record is the same.
  collides: () => true,
  async suitable(context, wanted) {
    preflight(context, wanted, await look(context, wanted));
  },
  async create(context, wanted) {
    await makeReady(context, wanted, await look(context, wanted));
  },
  async converge(context, wanted, seen, old) {
    const earlier = old === undefined || old.owner === wanted.owner ? undefined : old.owner;
    // What was seen is what the old declaration names.
    const isForWanted =
      old === undefined || isDeepStrictEqual([old.roles, old.server], [wanted.roles, wanted.server]);
    const { record, recordText } = seen.facts;
    const facts = isForWanted ? seen.facts : { ...(await look(context, wanted)), record, recordText };
    await makeReady(context, wanted, facts, earlier);
  },
  async remove(context, state) {
    context.progress("taking back what no other HostSetup of the host wants; packages stay");
    const command: RemoteCommand = {
      argv: script(removeSetupScript, setupRecord(state.owner)),
      kind: "change",
      deadlineSeconds: 240,
    };
    const result = await serially(context.host, "setup", () => context.host.run(command, context.signal));
    if (result.exitCode === linkInTheWay) throw linked(context, result.stdout.trim());
    if (result.exitCode !== 0)
      throw failure(context, command, result, "the host's setup could not be taken back", "COMMAND_FAILED");
    warnOfTouched(context, result);
  },
  drift: (state, { facts }) =>
    problemsOf(facts, state).map((problem) => `${problem}; \`pulumi up\` will put it right`),
};
