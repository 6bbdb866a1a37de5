/**
 * Reads what `pulumi preview --refresh --json` prints with PULUMI_ENABLE_STREAMING_JSON_PREVIEW=true: one engine event
 * a line, of the shape of Pulumi's own event log. (Without that variable it prints one digest, in which what the refresh
 * saw is missing.) First every resource of the state is refreshed: `resOutputsEvent` with `op: "refresh"` has the stored
 * state as `old` and the server's as `new`, which is missing when the thing is gone. Then the program is run against
 * that, and a `resourcePreEvent` says what `pulumi up` would do.
 */
import { z } from "zod";

type Values = Readonly<Record<string, unknown>>;

/** What `pulumi up` would do. */
export type Plan = "create" | "update" | "replace" | "delete";

/** A resource of this package that is in the state, or that the program declares. */
export interface Resource {
  /** E.g. `LvSnapshot`. */
  readonly type: string;
  readonly name: string;
  /** As the provider names it in its messages. */
  readonly host: string;
  /** As declared now. */
  readonly declared: Values;
  /** Its outputs as the server showed them; `undefined` if it is gone, not made yet, or was not looked at. */
  readonly seen: Values | undefined;
  /** What is not as declared on the server, a sentence each. Empty: nothing. */
  readonly drift: readonly string[];
  /** What the program wants otherwise than it did at the last `pulumi up`. */
  readonly pending: Plan | undefined;
}

/** What one look at the servers told. */
export interface Look {
  readonly resources: readonly Resource[];
  /** Why it cannot be told how things are; what is in `resources` is then not all. Empty: everything was looked at. */
  readonly errors: readonly string[];
}

/** How the command ended. */
export interface Ended {
  readonly exitCode: number;
  readonly stdout: string;
  readonly stderr: string;
}

const values = z.record(z.string(), z.unknown());
const state = z.object({
  inputs: values.nullish(),
  outputs: values.nullish(),
  delete: z.boolean().optional(),
});
const step = z.object({
  metadata: z.object({ op: z.string(), urn: z.string(), old: state.nullish(), new: state.nullish() }),
});
const diagnostic = z.object({ urn: z.string().optional(), message: z.string(), severity: z.string() });
const engineEvent = z.object({
  sequence: z.number(),
  resourcePreEvent: step.optional(),
  resOutputsEvent: step.optional(),
  diagnosticEvent: diagnostic.optional(),
  summaryEvent: z.object({ result: z.string() }).optional(),
});
type State = z.infer<typeof state>;
type EngineEvent = z.infer<typeof engineEvent>;

/** What the events tell of one resource. */
interface Track {
  readonly type: string;
  readonly name: string;
  readonly ops: Set<string>;
  toBeRefreshed: boolean;
  refreshed: boolean;
  stored?: State | undefined;
  seen?: State | undefined;
  planned?: State | undefined;
}

/** The state in which each type is as declared. */
const sound: Readonly<Record<string, string>> = {
  LvSnapshot: "valid",
  NbdExport: "serving",
  NbdAttachment: "attached",
  Mount: "mounted",
  VolumeCopy: "complete",
  BackupImage: "complete",
  HostSetup: "ready",
};

/** Pure. Never throws: what cannot be read is an error of the look. */
export function readPreview({ exitCode, stdout, stderr }: Ended): Look {
  const { events, unreadable } = readEvents(stdout);
  const tracks = new Map<string, Track>();
  for (const event of events) follow(tracks, event);
  const said = events.flatMap(({ diagnosticEvent }) => diagnosticEvent ?? []);
  const failures = said.filter(({ severity }) => severity === "error");
  const errors = [...unreadable, ...failures.map(({ message }) => failureText(message)).filter(isTelling)];
  for (const [urn, { type, name, toBeRefreshed, refreshed, ops }] of tracks) {
    const inState = toBeRefreshed || ops.has("same") || ops.has("update") || ops.has("replace");
    if (inState && !refreshed && !failures.some((failure) => failure.urn === urn))
      errors.push(`${type} ${name} was not looked at`);
  }
  const result = events.findLast(({ summaryEvent }) => summaryEvent !== undefined)?.summaryEvent?.result;
  const isWhole = exitCode === 0 && result === "succeeded";
  if (!isWhole && errors.length === 0) {
    const ending =
      result === undefined ? "before its preview was finished" : `after a preview that ${result}`;
    errors.push(`pulumi ended with exit code ${exitCode} ${ending}\n${stderr.trim().slice(-2000)}`.trim());
  }
  const warnings = attributed(
    tracks,
    said.filter(({ severity }) => severity === "warning").map(({ message }) => message.trim()),
  );
  const madeAnew = [...tracks.values()].some((track) => track.ops.has("replace") || isGone(track));
  return {
    resources: [...tracks.values()].map((track) => resourceOf(track, warnings.get(track) ?? [], madeAnew)),
    errors,
  };
}

function readEvents(stdout: string): { events: EngineEvent[]; unreadable: string[] } {
  const events: EngineEvent[] = [];
  const unreadable: string[] = [];
  for (const [index, line] of stdout.split("\n").entries()) {
    if (line.trim() === "") continue;
    const event = eventIn(line);
    if (event !== undefined) events.push(event);
    else if (unreadable.length === 0)
      unreadable.push(`line ${index + 1} of pulumi's output is no engine event: ${line.slice(0, 200)}`);
  }
  return { events, unreadable };
}

function eventIn(line: string): EngineEvent | undefined {
  let json: unknown;
  try {
    json = JSON.parse(line);
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
  return engineEvent.safeParse(json).data;
}

function follow(tracks: Map<string, Track>, { resourcePreEvent, resOutputsEvent }: EngineEvent): void {
  const metadata = (resourcePreEvent ?? resOutputsEvent)?.metadata;
  // urn:pulumi:STACK::PROJECT::PARENTS$TYPE::NAME, and a name may hold what it likes.
  const match = /^urn:pulumi:[^:]*::[^:]*::(?:.*?[$/:])?lvm-nbd:(?:index:)?(\w+)::(.*)$/s.exec(
    metadata?.urn ?? "",
  );
  if (metadata === undefined || match === null) return;
  const { op, urn, old, new: after } = metadata;
  // What a cut replacement has still to remove bears the name of what replaced it.
  if (old?.delete) return;
  const track: Track = tracks.get(urn) ?? {
    ...{ type: match[1] ?? "", name: match[2] ?? "", ops: new Set() },
    ...{ toBeRefreshed: false, refreshed: false },
  };
  tracks.set(urn, track);
  if (op !== "refresh") {
    track.ops.add(op);
    if (after) track.planned = after;
    return;
  }
  track.toBeRefreshed = true;
  if (resOutputsEvent === undefined) return;
  track.refreshed = true;
  track.stored = old ?? undefined;
  track.seen = after ?? undefined;
}

function failureText(message: string): string {
  return message
    .trim()
    .replace(/^Preview failed: /, "")
    .replace(/\n {4}at .*/g, "");
}

/** Beside each resource's own error Pulumi says that there was one. */
function isTelling(message: string): boolean {
  return message !== "preview failed";
}

/** The provider's warnings of a refresh, which begin `TYPE NAME on HOST: `, by resource. */
function attributed(tracks: ReadonlyMap<string, Track>, warnings: readonly string[]): Map<Track, string[]> {
  const found = new Map<Track, string[]>();
  for (const warning of warnings) {
    const candidates = [...tracks.values()].filter(({ type, name }) =>
      warning.startsWith(`${type} ${name} on `),
    );
    const [track] = candidates.sort((one, other) => other.name.length - one.name.length);
    if (track === undefined) continue;
    const rest = warning.slice(`${track.type} ${track.name} on `.length);
    found.set(track, [...(found.get(track) ?? []), rest.slice(rest.indexOf(": ") + 2)]);
  }
  return found;
}

function isGone({ refreshed, seen }: Track): boolean {
  return refreshed && seen === undefined;
}

function planOf({ ops }: Track): Plan | undefined {
  if (ops.has("replace")) return "replace";
  if (ops.has("create")) return "create";
  if (ops.has("update")) return "update";
  return ops.has("delete") || ops.has("delete-replaced") ? "delete" : undefined;
}

function resourceOf(track: Track, warnings: readonly string[], madeAnew: boolean): Resource {
  const { type, name, stored, seen, planned } = track;
  const declared = planned?.inputs ?? stored?.inputs ?? {};
  const outputs = seen?.outputs ?? undefined;
  const plan = planOf(track);
  const wants = stored === undefined || plan === "delete" ? "otherwise" : inputChange(stored, planned);
  const drift = [...warnings];
  if (drift.length === 0) {
    if (isGone(track)) drift.push("is gone from the host");
    const now = outputs?.state;
    const before = stored?.outputs?.state;
    if (outputs !== undefined && now !== (sound[type] ?? before)) drift.push(`is ${String(now)}`);
  }
  // What is declared as before, and yet would be changed: a `pulumi refresh` has accepted the drift into the state. Where
  // something else is made anew, what depends on it is replaced only for that.
  const follows = wants === "later" || (plan === "replace" && madeAnew);
  if (drift.length === 0 && plan !== undefined && wants !== "otherwise" && !follows)
    drift.push(
      `is not as declared: \`pulumi up\` would ${plan} it, though the program wants what it did before`,
    );
  return {
    ...{ type, name, host: hostName(declared.host ?? outputs?.host), declared, seen: outputs, drift },
    pending: wants === "otherwise" ? plan : undefined,
  };
}

/** What Pulumi writes in place of a value that is only known once another resource is made. */
const unknownValue = "04da6b54-80e4-46f7-96ec-b56ff0331ba9";

/** Whether the program wants something otherwise than at the last `pulumi up`, or will know it only later. */
function inputChange(stored: State, planned: State | undefined): "no" | "later" | "otherwise" {
  if (planned === undefined) return "no";
  const [before, now] = [stored.inputs ?? {}, planned.inputs ?? {}];
  const changed = [...new Set([...Object.keys(before), ...Object.keys(now)])].filter(
    // The closure changes with the SDK, and is nothing that anybody declared.
    (key) => key !== "__provider" && canonical(before[key]) !== canonical(now[key]),
  );
  if (changed.length === 0) return "no";
  return changed.every((key) => canonical(now[key]).includes(unknownValue)) ? "later" : "otherwise";
}

/** The same text for the same value, in whatever order its keys are. */
function canonical(value: unknown): string {
  return (
    JSON.stringify(value, (_, inner: unknown) =>
      typeof inner === "object" && inner !== null && !Array.isArray(inner)
        ? Object.fromEntries(Object.entries(inner).sort(([one], [other]) => (one < other ? -1 : 1)))
        : inner,
    ) ?? ""
  );
}

const hostObject = z.object({ address: z.string(), port: z.number().optional() });

/** A host as the provider names it: an alias, or an address with its port. "" if it is a secret. */
export function hostName(host: unknown): string {
  if (typeof host === "string") return host;
  const { data } = hostObject.safeParse(host);
  if (data === undefined) return "";
  const { address, port = 22 } = data;
  if (port === 22) return address;
  return `${address.includes(":") ? `[${address}]` : address}:${port}`;
}
