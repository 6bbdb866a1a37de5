/** What a look at the servers means, as JSON, as a text for a person, and as metrics. All of it pure. */
import { z } from "zod";
import { hostName, type Look, type Resource } from "./parse.ts";

/** How a run ended, by its exit status: a run that cannot tell is never 0. */
export const exitStatus = { good: 0, attention: 1, unknown: 2 } as const;

/** The newest image of a VM that is verified and sound. */
interface NewestImage {
  readonly host: string;
  readonly file: string;
  /** The moment that it holds, ISO 8601. */
  readonly takenAt: string;
  readonly ageHours: number;
  readonly sizeBytes: number;
}

interface Backup {
  /** `HOST:VG/LV`, or `BACKUPHOST:FOLDER/` where the source is a secret. */
  readonly vm: string;
  /** How many images are verified and sound. */
  readonly soundImages: number;
  readonly newest: NewestImage | undefined;
  /** What is wrong, as a sentence; `undefined` if nothing is. */
  readonly problem: string | undefined;
}

interface Snapshot {
  readonly host: string;
  readonly volumeGroup: string;
  readonly name: string;
  readonly state: string;
  /** 0 to 1. */
  readonly usedRatio: number;
}

/** A resource by its name, and what is to be said of it. */
interface Told {
  readonly type: string;
  readonly name: string;
  readonly host: string;
}

/** What is in report.json. */
export interface Report {
  readonly stack: string;
  readonly outcome: keyof typeof exitStatus;
  /** ISO 8601. */
  readonly startedAt: string;
  readonly seconds: number;
  /** When a run last could tell how things are, ISO 8601. */
  readonly lastSuccessAt: string | undefined;
  /** Why it cannot be told how things are. */
  readonly errors: readonly string[];
  /** What was looked at. */
  readonly watched: readonly Told[];
  readonly drifted: readonly (Told & { readonly reasons: readonly string[] })[];
  /** What the program declares and `pulumi up` has not yet done: no drift. */
  readonly pending: readonly (Told & { readonly change: string })[];
  /** `undefined` where it cannot be told how things are: figures of an earlier run are not repeated. */
  readonly backups: readonly Backup[] | undefined;
  readonly snapshots: readonly Snapshot[] | undefined;
}

/** What is known beside the look. */
export interface Run {
  readonly stack: string;
  readonly startedAt: Date;
  readonly endedAt: Date;
  readonly lastSuccessAt: string | undefined;
  readonly maxAgeHours: number;
}

/** A clock that is wrong by less is no matter. */
const futureMs = 10 * 60_000;
const hourMs = 3600_000;

export function reportOf(look: Look, run: Run): Report {
  const { stack, startedAt, endedAt } = run;
  const errors = [...look.errors];
  const read = <T>(type: string, reading: (resource: Resource) => T): T[] =>
    look.resources
      .filter((resource) => resource.type === type)
      .flatMap((resource) => {
        const result = attempted(() => reading(resource));
        if ("failure" in result) {
          errors.push(`${type} ${resource.name}: its outputs cannot be read: ${result.failure}`);
          return [];
        }
        return [result.value];
      });
  const backups = backupsOf(read("BackupImage", imagesOf).flat(), run);
  const snapshots = read("LvSnapshot", snapshotOf).flatMap((snapshot) => snapshot ?? []);
  const told = ({ type, name, host }: Resource) => ({ type, name, host });
  const drifted = look.resources
    .filter(({ drift }) => drift.length > 0)
    .map((resource) => ({ ...told(resource), reasons: resource.drift }));
  const needsAttention = drifted.length > 0 || backups.some(({ problem }) => problem !== undefined);
  const isKnown = errors.length === 0;
  return {
    stack,
    outcome: !isKnown ? "unknown" : needsAttention ? "attention" : "good",
    startedAt: startedAt.toISOString(),
    seconds: (endedAt.getTime() - startedAt.getTime()) / 1000,
    lastSuccessAt: isKnown ? endedAt.toISOString() : run.lastSuccessAt,
    errors,
    watched: look.resources.filter(({ seen, drift }) => seen !== undefined || drift.length > 0).map(told),
    drifted,
    pending: look.resources.flatMap((resource) =>
      resource.pending === undefined ? [] : [{ ...told(resource), change: resource.pending }],
    ),
    backups: isKnown ? backups : undefined,
    snapshots: isKnown ? snapshots : undefined,
  };
}

function attempted<T>(work: () => T): { value: T } | { failure: string } {
  try {
    return { value: work() };
  } catch (error) {
    if (error instanceof z.ZodError) return { failure: z.prettifyError(error).replaceAll("\n", " ") };
    throw error;
  }
}

const snapshotOutputs = z.object({
  volumeGroup: z.string(),
  name: z.string(),
  state: z.string(),
  usedPercent: z.number(),
});

function snapshotOf({ host, seen }: Resource): Snapshot | undefined {
  if (seen === undefined) return undefined;
  const { volumeGroup, name, state, usedPercent } = snapshotOutputs.parse(seen);
  return { host, volumeGroup, name, state, usedRatio: usedPercent / 100 };
}

/** An image of a VM, or that there should be one. */
interface Image {
  readonly vm: string;
  /** `undefined`: declared and not there, or not to be relied on. */
  readonly sound: Omit<NewestImage, "ageHours"> | undefined;
}

const declaredInputs = z.object({
  source: z.object({ host: z.unknown() }),
  volumes: z.array(z.object({ volumeGroup: z.string(), origin: z.string(), file: z.string() })),
});
const imageOutputs = z.object({
  images: z.array(
    z.object({
      file: z.string(),
      takenAt: z.string(),
      sizeBytes: z.number(),
      verified: z.boolean(),
      state: z.string(),
    }),
  ),
});

/** The images of a BackupImage. What BackupImage's outputs look like is known here only. Raises ZodError. */
function imagesOf({ host, declared, seen }: Resource): Image[] {
  const { volumes } = declaredInputs.pick({ volumes: true }).parse(declared);
  // The whole source is a secret where its key comes from one.
  const source = declaredInputs.safeParse(declared).data?.source;
  const images = seen === undefined ? [] : imageOutputs.parse(seen).images;
  return volumes.map(({ volumeGroup, origin, file }) => {
    const vm =
      source === undefined
        ? `${host}:${file.slice(0, file.lastIndexOf("/") + 1)}`
        : `${hostName(source.host)}:${volumeGroup}/${origin}`;
    const image = images.find((one) => one.file === file);
    if (image === undefined || !image.verified || image.state !== "complete") return { vm, sound: undefined };
    const { takenAt, sizeBytes } = image;
    z.iso.datetime().parse(takenAt);
    return { vm, sound: { host, file, takenAt, sizeBytes } };
  });
}

function backupsOf(images: readonly Image[], { endedAt, maxAgeHours }: Run): Backup[] {
  return [...new Set(images.map(({ vm }) => vm))].sort().map((vm) => {
    const good = images.filter((image) => image.vm === vm).flatMap(({ sound }) => sound ?? []);
    const newest = good.sort((one, other) => Date.parse(other.takenAt) - Date.parse(one.takenAt))[0];
    const ageMs = newest === undefined ? Number.NaN : endedAt.getTime() - Date.parse(newest.takenAt);
    return {
      vm,
      soundImages: good.length,
      newest: newest && { ...newest, ageHours: ageMs / hourMs },
      problem: ageProblem(ageMs, maxAgeHours),
    };
  });
}

/** `ageMs`: NaN where there is no image. */
function ageProblem(ageMs: number, maxAgeHours: number): string | undefined {
  if (Number.isNaN(ageMs)) return "there is no verified and sound image";
  if (ageMs < -futureMs) return "the newest image is dated in the future: a clock is wrong";
  const isOld = ageMs > maxAgeHours * hourMs;
  return isOld ? `the newest image is older than ${maxAgeHours} hours` : undefined;
}

/** For a person. */
export function textOf(report: Report): string {
  const { stack, outcome, startedAt, seconds, lastSuccessAt, errors, drifted, pending } = report;
  const { backups = [], snapshots = [] } = report;
  const neglected = backups.filter(({ problem }) => problem !== undefined).length;
  const counts = [
    `${drifted.length} of ${report.watched.length} resources drifted`,
    `${neglected} of ${backups.length} VMs without a fresh backup`,
  ];
  const headline = {
    good: "nothing has drifted",
    attention: counts.join(", "),
    unknown: "it CANNOT BE TOLD how things are",
  };
  const resource = ({ type, name, host }: Told) => `  ${type} ${name} on ${host}`;
  const sections: [string, string[]][] = [
    ["Why not", errors.map((error) => indented(error))],
    [
      outcome === "unknown" ? "Drifted, as far as could be seen" : "Drifted",
      drifted.flatMap((one) => [resource(one), ...one.reasons.map((reason) => `    ${reason}`)]),
    ],
    [
      "Declared, and not yet done by `pulumi up` (no drift)",
      pending.map((one) => `${resource(one)}: ${one.change}`),
    ],
    ["Newest verified and sound image", backups.map(backupLine)],
    [
      "Snapshots",
      snapshots.map(
        ({ host, volumeGroup, name, state, usedRatio }) =>
          `  ${host}:${volumeGroup}/${name}  ${(usedRatio * 100).toFixed(0)} % full, ${state}`,
      ),
    ],
  ];
  return [
    `lvm-nbd, stack ${stack}: ${headline[outcome]}`,
    `looked at ${startedAt} for ${seconds.toFixed(0)} s; last known ${lastSuccessAt ?? "never"}`,
    ...sections.flatMap(([title, lines]) => (lines.length === 0 ? [] : ["", title, ...lines])),
    "",
  ].join("\n");
}

function indented(text: string): string {
  return `  ${text.replaceAll("\n", "\n  ")}`;
}

function backupLine({ vm, newest, problem }: Backup): string {
  const image =
    newest &&
    `${newest.takenAt} (${newest.ageHours.toFixed(1)} hours ago), ${newest.sizeBytes} bytes, ${newest.host}:${newest.file}`;
  return [`  ${vm}`, image, problem && `  PROBLEM: ${problem}`].filter(Boolean).join("  ");
}

type Labels = Readonly<Record<string, string>>;
type Sample = readonly [labels: Labels, value: number];

/**
 * For node_exporter's textfile collector. Moments are Unix times, not ages, so that an age goes on growing when nobody
 * looks any more. Where it cannot be told how things are, only that is said.
 */
export function metricsOf(report: Report): string {
  const isKnown = report.outcome !== "unknown";
  const { backups = [], snapshots = [] } = report;
  const unix = (time: string | undefined): Sample[] =>
    time === undefined ? [] : [[{}, Date.parse(time) / 1000]];
  const gauge = (name: string, help: string, samples: readonly Sample[]) =>
    metric(`lvm_nbd_${name}`, help, samples, report.stack);
  const onceKnown = (value: number): Sample[] => (isKnown ? [[{}, value]] : []);
  const resources = isKnown ? report.watched : [];
  return [
    gauge("watch_up", "Whether the last look at the servers told how all of it is.", [[{}, Number(isKnown)]]),
    gauge(
      "watch_last_run_timestamp_seconds",
      "When the last look began, whatever came of it.",
      unix(report.startedAt),
    ),
    gauge(
      "watch_last_success_timestamp_seconds",
      "When a look last told how all of it is.",
      unix(report.lastSuccessAt),
    ),
    gauge("watch_duration_seconds", "How long the last look took.", [[{}, report.seconds]]),
    gauge(
      "drifted_resources",
      "How many resources are not on the servers as declared.",
      onceKnown(report.drifted.length),
    ),
    gauge(
      "pending_changes",
      "How many changes of the program pulumi up has not yet made.",
      onceKnown(report.pending.length),
    ),
    gauge(
      "resource_drifted",
      "Whether the resource is not on the server as declared.",
      resources.map((one) => [
        { type: one.type, resource: one.name, host: one.host },
        Number(report.drifted.some(isSame(one))),
      ]),
    ),
    gauge(
      "snapshot_used_ratio",
      "Fill level of a snapshot's store; at 1 a COW snapshot is lost.",
      snapshots.map((one) => [
        { host: one.host, volume_group: one.volumeGroup, snapshot: one.name },
        one.usedRatio,
      ]),
    ),
    gauge(
      "backup_sound_images",
      "How many verified and sound images of a VM there are.",
      backups.map(({ vm, soundImages }) => [{ vm }, soundImages]),
    ),
    gauge(
      "backup_newest_image_timestamp_seconds",
      "The moment that the newest verified and sound image of a VM holds.",
      backups.flatMap(({ vm, newest }): Sample[] =>
        newest === undefined ? [] : [[{ vm }, Date.parse(newest.takenAt) / 1000]],
      ),
    ),
    gauge(
      "backup_newest_image_size_bytes",
      "Size of the content of the newest verified and sound image of a VM.",
      backups.flatMap(({ vm, newest }): Sample[] =>
        newest === undefined ? [] : [[{ vm }, newest.sizeBytes]],
      ),
    ),
  ].join("");
}

function isSame(one: Told): (other: Told) => boolean {
  return (other) => other.type === one.type && other.name === one.name && other.host === one.host;
}

/** A gauge in Prometheus' text format; "" if it has no value. */
function metric(name: string, help: string, samples: readonly Sample[], stack: string): string {
  if (samples.length === 0) return "";
  const series = new Map<string, number>();
  for (const [labels, value] of samples) {
    const pairs = Object.entries({ stack, ...labels }).map(
      ([label, text]) => `${label}="${escapedLabel(text)}"`,
    );
    // The same twice (one name in two components, say) would make the collector refuse the whole file.
    series.set(`${name}{${pairs.join(",")}}`, value);
  }
  const lines = [...series].map(([key, value]) => `${key} ${value}\n`);
  return `# HELP ${name} ${help}\n# TYPE ${name} gauge\n${lines.join("")}`;
}

function escapedLabel(text: string): string {
  return text.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
}
