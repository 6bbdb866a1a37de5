/**
 * An image: the content of a volume in a file of another host, with its manifest. What `VolumeCopy` and `BackupImage` share.
 *
 * A copy runs on the image's host as a transient unit, beside the file it will become. It takes the file's name only when
 * it has been read back, compared with its source, and its snapshot was seen to be valid after the last byte; an earlier
 * image keeps the name until then.
 */
import { randomUUID } from "node:crypto";
import { z } from "zod";
import { failure, parseOutput, succeed } from "../core/command.js";
import { type ErrorCode, firstLine, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { type HostScript, script } from "../core/hostCommands.js";
import { readableBy, refusing } from "../core/inputs.js";
import { digest, generationMark, ownerMark } from "../core/owner.js";
import type { Context, Problem } from "../core/resource.js";
import {
  type CopyPaths,
  type CopyPlan,
  type CopyResult,
  copyArguments,
  copyJob,
  copyPaths,
  copyPrograms,
  copyResult,
  folderOf,
  parseRate,
} from "../linux/copyJob.js";
import {
  checkImageScript,
  claimCopyScript,
  commitCopyScript,
  discardCopyScript,
  exposedWords,
  fileInUse,
  followCopyScript,
  heldImageScript,
  imageChanged,
  inOtherHands,
  observeCopyScript,
  preflightCopyScript,
  removeCopyScript,
  startCopyScript,
  turnedWords,
} from "../linux/copyScripts.js";
import { parseFields } from "../linux/fields.js";
import { fileProblem, imageFormats } from "../linux/imageFile.js";
import type { LogicalVolume } from "../linux/lvm.js";
import { missingPrograms } from "../linux/programs.js";
import { withExtents } from "../linux/zeroRanges.js";
import { hostName } from "../ssh/config.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";
import {
  type CopyIdentity,
  changeByScript,
  copyFailures,
  discardAfter,
  longestSeconds,
  parsed,
  runCopy,
} from "./copyRun.js";
import {
  asReadable,
  begunWith,
  type CopySource,
  certifySize,
  comparedBy,
  emptyRanges,
  explained,
  isRefusedNow,
  isVerifiable,
  refused,
  type SizeAnswer,
  sourceSize,
  sourceSumOf,
} from "./copySource.js";
import { asking, jobText } from "./tls.js";

/** Declared properties of an image: where it is and how it is copied. */
export const imageInputs = {
  file: z
    .string()
    .superRefine(refusing(fileProblem))
    .describe(
      "Absolute path of the image on the host. Its folder must exist, and it and every folder above must be root's and writable for no " +
        "group and no others. On a network file system that is not asked, unless its mount lets others than root write to every folder " +
        "(`dir_mode`, `umask`): who can write there can replace images, which only `deepCheck` may tell.",
    ),
  mountPoint: z
    .string()
    .superRefine(refusing(mountPointProblem))
    .optional()
    .describe(
      "Where the disk of the images is mounted on the host: an image is refused while nothing is mounted there, instead of being " +
        "written to the disk below. Default: what holds the folder is not asked.",
    ),
  format: z
    .enum(imageFormats)
    .meta({ title: "ImageFormat" })
    .default("raw")
    .describe("Format of the image; both are sparse."),
  compress: z.boolean().default(false).describe('Whether a `"qcow2"` image is compressed.'),
  connections: z
    .number()
    .int()
    .min(1)
    .max(16)
    .default(4)
    .describe("NBD connections to the source at most, for `raw`."),
  bandwidthLimit: z
    .union([z.string(), z.number()])
    .superRefine(readableBy(parseRate))
    .optional()
    .describe(
      'Bytes a second that are read from the source at most, e.g. `"20M"` (1024-based). Default: no limit.',
    ),
  verify: z
    .boolean()
    .default(true)
    .describe(
      "Whether the source is read a second time and its SHA-256 compared with that of the image, which is read from the disk. Where the " +
        "snapshot behind it is known, it is read on its own host, while the copy runs; else over the network, afterwards.",
    ),
  deepCheck: z
    .boolean()
    .default(false)
    .describe("Whether a refresh reads the whole image and compares its SHA-256, not only size and time."),
} as const;

/** What is added to the state of a copy, wherever it goes. */
export const copyOutputs = {
  sha256: z
    .string()
    .describe("SHA-256 of the content (of a qcow2 image too: what a reader of the disk sees)."),
  sizeBytes: z.number().describe("Size of the content in bytes."),
  allocatedBytes: z.number().describe("What the copy takes on the disk, in bytes; informational."),
  seconds: z.number().describe("How long copying and verifying took."),
  bytesPerSecond: z.number().describe("`sizeBytes` by `seconds`."),
  completedAt: z.string().describe("When the copy was complete (ISO 8601, by the host's clock)."),
  verified: z
    .boolean()
    .describe("Whether its source was read a second time and had the same SHA-256; see `verify`."),
  copyId: z.string().describe("Which resource's life the copy belongs to."),
} as const;

/** What is added to the state of an image. */
export const imageOutputs = {
  ...copyOutputs,
  manifest: z
    .string()
    .describe("Path of the manifest, JSON beside the image: what it is, without any Pulumi state."),
  filesystem: z
    .string()
    .describe("UUID of the file system that holds the image, or its source where it has none."),
} as const;

/** What is copied to where, for whom. */
export interface CopyWanted extends z.infer<z.ZodObject<Omit<typeof imageInputs, "deepCheck">>>, CopySource {
  readonly owner: string;
  /** The files of all images of the same moment, where they are several, and what tells that moment from others. */
  readonly together?: readonly string[] | undefined;
  readonly moment?: string | undefined;
}

/** Only a qcow2 image can be compressed. */
export function compressProblems(
  { compress, format }: { readonly compress?: boolean; readonly format?: string },
  unknown: ReadonlySet<string>,
): Problem[] {
  if (compress !== true || unknown.has("format") || format === "qcow2") return [];
  return [{ property: "compress", reason: 'needs `format: "qcow2"`: a raw image cannot be compressed' }];
}

/** An image lies below its `mountPoint`. `property`: the file's. */
export function mountPointProblems(
  { file, mountPoint }: { readonly file?: string | undefined; readonly mountPoint?: string | undefined },
  property: string,
): Problem[] {
  if (file === undefined || mountPoint === undefined) return [];
  if (file.startsWith(mountPoint === "/" ? mountPoint : `${mountPoint}/`)) return [];
  return [{ property, reason: `"${file}" is not below \`mountPoint\` "${mountPoint}"` }];
}

function mountPointProblem(path: string): string | undefined {
  if (path !== "/" && !/^(\/[^/\p{Cc}]+)+$/u.test(path))
    return `"${path}" must be an absolute path without a slash at its end, e.g. "/var/backups"`;
  return path.split("/").some((part) => part === "." || part === "..")
    ? `"${path}" must not hold "." and ".."`
    : undefined;
}

/** JSON beside the image. Fields are added, never changed: an image outlives the provider's version. */
const manifestShape = z.object({
  kind: z.literal("lvm-nbd image"),
  /** Owner mark. */
  mark: z.string(),
  copyId: z.string(),
  generation: z.string(),
  image: z.object({
    format: z.string(),
    sha256: z.string(),
    sizeBytes: z.number(),
    verified: z.boolean(),
    /** Size of the file in bytes and time of its last modification. */
    facts: z.string(),
  }),
  source: z.record(z.string(), z.unknown()),
  seconds: z.number(),
  startedAt: z.string(),
  completedAt: z.string(),
  tools: z.string(),
  /** The files of all images of the same moment, this one's too, and what tells that moment from others. */
  together: z.array(z.string()).optional(),
  moment: z.string().optional(),
});
export type Manifest = z.infer<typeof manifestShape>;

/** In the folder of an unfinished copy: whose it is, what for, whether it is compared with its source, and that read on its own host. */
const recordShape = z.object({
  ...{ mark: z.string(), generation: z.string(), verify: z.boolean() },
  readThere: z.boolean().default(false),
});

interface Part {
  /** `undefined` if it is none of ours. */
  readonly record: z.infer<typeof recordShape> | undefined;
  readonly recordDigest: string;
  readonly result: CopyResult | undefined;
  /** "-" without an image. */
  readonly imageFacts: string;
}

/** What was seen of an image and of an unfinished copy to it. */
export interface ImageObservation {
  readonly mark: string | undefined;
  readonly halfMade: boolean;
  readonly file: { readonly kind: string; readonly allocatedBytes: number } | undefined;
  /** Inode, size and time of the file; "-" for none. */
  readonly facts: string;
  readonly manifest: Manifest | undefined;
  readonly manifestDigest: string;
  readonly part: Part | undefined;
  readonly running: boolean;
  readonly filesystem: string;
  /** What reading the whole image showed. */
  readonly content: "unread" | "good" | "bad";
}

const quick = { deadlineSeconds: 60, kind: "read" } as const;

function planOf(wanted: CopyWanted): CopyPlan {
  const { uri, tls, format, compress, connections, bandwidthLimit } = wanted;
  return {
    ...{ uri, tls, format, compress, connections },
    // What is read on its own host the job does not read again.
    verify: begunWith(wanted).verify,
    bandwidthLimit: bandwidthLimit === undefined ? undefined : parseRate(bandwidthLimit),
  };
}

/** A script of copyScripts.ts, with what it needs beside the paths. */
function scriptOn(paths: CopyPaths, text: HostScript, ...args: string[]): string[] {
  return script(text, ...pathArguments(paths), ...args);
}

function pathArguments({ file, part, manifest, unit, run }: CopyPaths): string[] {
  return [file, part, manifest, unit, run];
}

/** Looks at the image and at what an unfinished copy has left. `filesystem`: where the image was when it was last seen. */
export async function observeImage(
  context: Context,
  { file, filesystem }: { readonly file: string; readonly filesystem?: string | undefined },
): Promise<ImageObservation | undefined> {
  const command: RemoteCommand = { ...quick, argv: scriptOn(copyPaths(file), observeCopyScript) };
  const result = await looked(context, command, `${file} could not be looked at`);
  const { parent, ...seen } = parseOutput(context, command, result, (stdout) =>
    readObservation(parseFields(stdout)),
  );
  if (seen.file !== undefined || seen.manifest !== undefined || seen.part !== undefined) return seen;
  if (filesystem !== undefined && filesystem !== seen.filesystem) {
    throw new LvmNbdError("ANOTHER_FILE_SYSTEM", {
      message: parent
        ? `${file} is not there, and its folder is on the file system ${seen.filesystem}, not on ${filesystem}`
        : `the folder of ${file} is not there, nor is the file system ${filesystem}`,
      host: context.host.name,
      resource: context.resource,
    });
  }
  return undefined;
}

function readObservation(
  fields: ReadonlyMap<string, string>,
): ImageObservation & { readonly parent: boolean } {
  const kind = fields.get("kind");
  const [blocks, blockSize] = (fields.get("blocks") ?? "").split(" ").map(Number);
  const manifest = readManifest(fields.get("manifest"));
  const part = readPart(fields);
  return {
    // A file without a manifest of ours carries no mark, whatever lies beside it.
    mark: kind === undefined ? (part?.record?.mark ?? manifest?.mark) : manifest?.mark,
    halfMade: kind === undefined,
    file: kind === undefined ? undefined : { kind, allocatedBytes: (blocks ?? 0) * (blockSize ?? 0) },
    facts: required(fields, "facts"),
    manifest,
    manifestDigest: required(fields, "manifestDigest"),
    part,
    running: !["inactive", "failed"].includes(required(fields, "active")),
    filesystem: required(fields, "filesystem"),
    content: "unread",
    parent: fields.has("parent"),
  };
}

function readPart(fields: ReadonlyMap<string, string>): Part | undefined {
  const part = fields.get("part");
  // An empty folder is what a start leaves that was cut at its beginning.
  if (part === undefined || part === "vacant") return undefined;
  return {
    record: parsed(fields.get("record"), recordShape),
    recordDigest: fields.get("recordDigest") ?? "-",
    result: parsed(fields.get("result"), copyResult),
    imageFacts: fields.get("image") ?? "-",
  };
}

function required(fields: ReadonlyMap<string, string>, name: string): string {
  const value = fields.get(name);
  if (value === undefined || value === "") throw new Error(`"${name}" is missing`);
  return value;
}

/** The manifest in a text; `undefined` for what is none of ours. */
export function readManifest(text: string | undefined): Manifest | undefined {
  return parsed(text, manifestShape);
}

const snapshotShape = z.object({
  snapshot: z.object({
    uuid: z.string().optional(),
    volumeGroup: z.string().optional(),
    origin: z.string().optional(),
    takenAt: z.string(),
  }),
});

/** The snapshot that an image is of; `undefined` for one of no known snapshot. */
export function snapshotOf({ source }: Manifest): z.infer<typeof snapshotShape>["snapshot"] | undefined {
  return snapshotShape.safeParse(source).data?.snapshot;
}

/** The moment that an image holds (ISO 8601); `undefined` for one of no known snapshot. */
export function takenAtOf(manifest: Manifest): string | undefined {
  return snapshotOf(manifest)?.takenAt;
}

/** Size and time of what `facts` tells: an inode is another one after a restore, the content is not. */
export function contentFacts(facts: string): string {
  return facts.split(" ").slice(1).join(" ");
}

/** True if size and time of the file are those that its manifest tells. */
export function isAsMade({ manifest, facts }: ImageObservation): boolean {
  return manifest?.image.facts === contentFacts(facts);
}

/** Reads the whole image, where that is declared. */
export async function inspectImage(
  context: Context,
  { file, deepCheck }: { readonly file: string; readonly deepCheck: boolean },
  seen: ImageObservation,
): Promise<ImageObservation> {
  if (!deepCheck || seen.manifest === undefined || !isAsMade(seen)) return seen;
  const { format, sha256, sizeBytes } = seen.manifest.image;
  context.progress(`reading ${file} to check its content (deepCheck)`);
  const command: RemoteCommand = {
    argv: script(checkImageScript, format, file),
    kind: "read",
    deadlineSeconds: 600 + Math.ceil(sizeBytes / (5 * 1024 ** 2)),
  };
  const result = await looked(context, command, `${file} could not be checked`, [70]);
  if (result.exitCode === 70) return { ...seen, content: "bad" };
  return { ...seen, content: result.stdout.trim() === sha256 ? "good" : "bad" };
}

function imageInUse(context: Context, what: string, { stdout }: CommandResult): LvmNbdError {
  return new LvmNbdError("FILE_IN_USE", {
    message: `${what}: it is held by ${stdout.trim().split("\n").join(", ")}`,
    host: context.host.name,
    resource: context.resource,
  });
}

/** Somebody who is not root can have it lead where he likes, or exchange it. `why`: which path. */
function inTheirHands(context: Context, what: string, why: string): LvmNbdError {
  return new LvmNbdError("FILE_UNSUITABLE", {
    message: `file: ${what}: ${why}`,
    host: context.host.name,
    resource: context.resource,
    property: "file",
    advice:
      "Nothing was written or removed there. The folder of an image and every folder above it must be root's, and writable for no group and " +
      "no others (`chown root`, `chmod go-w`; of a file system without owners by its mount options, e.g. `uid=0,dir_mode=0700` or " +
      "`umask=077`). Do that, or keep images in a folder where it is so, e.g. /var/backups, and run again. An image that is to be removed " +
      "needs that too, or is removed by hand.",
  });
}

/** Runs one of the looking scripts. `answers`: exit codes beside 0 that are no failure. */
async function looked(
  context: Context,
  command: RemoteCommand,
  what: string,
  answers: readonly number[] = [],
): Promise<CommandResult> {
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === 0 || answers.includes(result.exitCode)) return result;
  if (result.exitCode === inOtherHands)
    throw inTheirHands(context, what, result.stdout.trim().split("\n").at(-1) ?? "");
  throw failure(context, command, result, what, "COMMAND_FAILED");
}

/** Runs one of the changing scripts. */
async function change(context: Context, what: string, argv: string[], stdin?: string): Promise<void> {
  const explain = (command: RemoteCommand, result: CommandResult) => {
    if (result.exitCode === fileInUse) return imageInUse(context, what, result);
    if (result.exitCode === inOtherHands) return inTheirHands(context, what, result.stdout.trim());
    if (result.exitCode !== imageChanged) return undefined;
    return failure(context, command, result, "somebody wrote the image after it was verified", "COPY_FAILED");
  };
  await changeByScript(context, what, argv, { stdin, explain });
}

/**
 * Finds out before anything is changed what would make the copy fail on its host. `uri`: "" while nothing is exported yet.
 * Returns what the source says of its size.
 */
async function requireHost(
  context: Context,
  wanted: Omit<CopyWanted, "uri">,
  seen: ImageObservation,
  uri: string,
): Promise<SizeAnswer> {
  const paths = copyPaths(wanted.file);
  const folder = folderOf(wanted.file);
  const asked = asking(uri, uri === "" ? undefined : wanted.tls);
  const command: RemoteCommand = {
    ...quick,
    ...asked.command(
      preflightCopyScript,
      ...pathArguments(paths),
      ...[asked.uri, wanted.mountPoint ?? ""],
      ...copyPrograms(planOf({ ...wanted, uri })),
    ),
  };
  const result = await succeed(context, command, "the host could not be looked at");
  const fields = parseOutput(context, command, result, parseFields);
  const missing = missingPrograms(fields);
  if (missing !== undefined) throw refused(context, "PROGRAM_MISSING", "host", missing);
  if (wanted.mountPoint !== undefined && !fields.has("mounted"))
    throw refused(context, "NOT_MOUNTED", "mountPoint", `nothing is mounted at ${wanted.mountPoint}`);
  const exposed = fields.get("exposed") ?? "";
  if (exposed !== "")
    throw inTheirHands(context, `${wanted.file} is not written`, `${exposed} ${exposedWords}`);
  const turned = fields.get("astray") ?? "";
  if (turned !== "") throw inTheirHands(context, `${wanted.file} is not written`, `${turned} ${turnedWords}`);
  if (!fields.has("parent"))
    throw refused(context, "DIRECTORY_NOT_FOUND", "file", `there is no folder ${folder}`);
  if (!fields.has("writable"))
    throw refused(context, "DIRECTORY_NOT_FOUND", "file", `the folder ${folder} cannot be written`);
  if (fields.has("manifest") && seen.manifestDigest === "-") {
    const message = `file: ${paths.manifest} is not the manifest of a copy of this resource`;
    throw foreign(context, message, "Move it away, or choose another `file`.");
  }
  return { exitCode: fields.get("size.rc"), text: fields.get("size") ?? "" };
}

/** Refuses, by looking only, where an image cannot be made: asked before a VM is frozen for it. */
export async function requireDestination(
  context: Context,
  wanted: Omit<CopyWanted, "uri">,
  seen: ImageObservation,
): Promise<void> {
  refuseOthers(context, wanted, seen);
  await requireHost(context, wanted, seen, "");
}

function foreign(context: Context, message: string, advice: string): LvmNbdError {
  return new LvmNbdError("FOREIGN_RESOURCE", {
    message,
    host: context.host.name,
    resource: context.resource,
    property: "file",
    advice,
  });
}

/** What cannot be served as declared: then nothing of a copy is of use either. */
const notServed: readonly ErrorCode[] = [
  ...(["ADDRESS_NOT_LOCAL", "CLIENTS_NOT_ENFORCED", "EXPORT_NOT_SERVING", "EXPORT_UNREACHABLE"] as const),
  ...(["FOREIGN_RESOURCE", "PORT_IN_USE", "PROGRAM_MISSING", "TLS_NOT_ENFORCED", "TLS_UNSUPPORTED"] as const),
];

/** True for a failure after which nothing will go on with the copy; `isBegun`: of a moment of which copies were begun before. */
export function isFinalFailure(error: unknown, isBegun: boolean): boolean {
  return isLvmNbdError(error, ...copyFailures, ...(isBegun ? [] : notServed));
}

/** A copy that is complete and verified, and does not have its name yet. */
export interface VerifiedCopy {
  readonly recordDigest: string;
  readonly imageFacts: string;
  readonly manifest: Manifest;
}

/** Makes the copy and gives it its name, or goes on with one of ours that runs or has ended. */
export async function copyImage(
  context: Context,
  wanted: CopyWanted,
  seen: ImageObservation,
  identity: CopyIdentity,
): Promise<void> {
  await commitCopy(context, wanted, seen, await verifiedCopy(context, wanted, seen, identity));
}

function partGeneration(
  { snapshot, format, compress }: Omit<CopyWanted, "uri">,
  { generation }: CopyIdentity,
): string {
  return generationMark([generation, snapshot?.uuid ?? "", format, compress]);
}

/** True if the unfinished copy is what is wanted, and on its way or complete. */
export function isGoneOnWith(
  wanted: Omit<CopyWanted, "uri">,
  { part, running }: ImageObservation,
  identity: CopyIdentity,
): boolean {
  // Of a source without identity, what a job read some time ago may be another moment.
  const goesOn = running || (part?.result !== undefined && wanted.snapshot !== undefined);
  const isAsDeclared = part?.record?.generation === partGeneration(wanted, identity);
  return goesOn && isAsDeclared && isVerifiable(part.record, wanted);
}

/** Makes the copy up to its name, or goes on with one of ours. What has failed for good is removed. */
export async function verifiedCopy(
  context: Context,
  wanted: CopyWanted,
  seen: ImageObservation,
  identity: CopyIdentity,
): Promise<VerifiedCopy> {
  const paths = copyPaths(wanted.file);
  let { part } = seen;
  if (part?.record !== undefined && isDecided(seen) && seen.manifest?.generation === identity.generation)
    return {
      ...{ recordDigest: part.recordDigest, imageFacts: part.imageFacts },
      manifest: { ...seen.manifest, mark: ownerMark(wanted.owner), copyId: identity.copyId },
    };
  if (
    part !== undefined &&
    (!isGoneOnWith(wanted, seen, identity) || (await isRefusedNow(context, part.record, wanted)))
  ) {
    context.progress(`removing an unfinished copy to ${wanted.file}`);
    await discard(context, paths, part.recordDigest);
    part = undefined;
  }
  let compared = comparedBy(part?.record, wanted);
  let sizeBytes = 0;
  let empty = "";
  return runCopy(context, {
    target: wanted.file,
    unfinished: paths.part,
    whenFull: "The disk of the image is full: make room there, or choose another `file`, and run again.",
    going: part?.recordDigest,
    following: scriptOn(paths, followCopyScript),
    prepare: async () => {
      sizeBytes = await sourceSize(context, wanted, await requireHost(context, wanted, seen, wanted.uri));
      compared = await asReadable(context, compared);
      empty = await emptyRanges(context, compared, sizeBytes);
      const [mark, generation] = [ownerMark(wanted.owner), partGeneration(wanted, identity)];
      return `${JSON.stringify({ mark, generation, ...begunWith(compared), started: randomUUID() })}\n`;
    },
    start: (record) => start(context, paths, compared, seen, record, sizeBytes, empty),
    // As it comes out when the copy is prepared.
    get sourceSum() {
      return sourceSumOf(compared);
    },
    certify: async (result, recordDigest) => {
      const snapshot = snapshotFacts(await certifySize(context, wanted, result.sizeBytes, compared));
      const manifest = manifestOf(wanted, identity, result, snapshot);
      return { recordDigest, imageFacts: result.facts, manifest };
    },
    discard: (to, recordDigest) => discard(to, paths, recordDigest),
    explain: (error, progress) => explained(context, wanted, error, progress),
  });
}

/** What a manifest tells of the snapshot, beside its name. */
function snapshotFacts(lv: LogicalVolume | undefined): object | undefined {
  return (
    lv && {
      ...{ origin: lv.origin, originUuid: lv.originUuid },
      takenAt: new Date(lv.createdAt * 1000).toISOString(),
    }
  );
}

/** Raises FILE_IN_USE, with who holds it, if one of the images that are to be replaced is open. Changes nothing. */
export async function refuseHeldImages(context: Context, files: readonly string[]): Promise<void> {
  for (const file of files) {
    const command: RemoteCommand = { ...quick, argv: scriptOn(copyPaths(file), heldImageScript) };
    const result = await context.host.run(command, context.signal);
    if (result.exitCode === fileInUse) throw imageInUse(context, `${file} cannot be replaced`, result);
    if (result.exitCode !== 0)
      throw failure(context, command, result, `who holds ${file} could not be found out`, "COMMAND_FAILED");
  }
}

/** Gives a verified copy its name. */
export async function commitCopy(
  context: Context,
  { file }: Pick<CopyWanted, "file">,
  seen: ImageObservation,
  { recordDigest, imageFacts, manifest }: VerifiedCopy,
): Promise<void> {
  const paths = copyPaths(file);
  context.progress(`the image is complete: giving it its name ${file}`);
  try {
    await commit(context, paths, seen, recordDigest, imageFacts, manifest);
  } catch (error) {
    // Of any other failure the image is kept: its manifest may have its name already, and the next run goes on from there.
    if (isLvmNbdError(error, "COPY_FAILED"))
      await discardAfter(context, paths.part, (to) => discard(to, paths, recordDigest));
    throw error;
  }
}

/** Removes an unfinished copy that nothing will go on with. */
export async function discardUnfinished(
  context: Context,
  { file, owner }: Pick<CopyWanted, "file" | "owner">,
): Promise<void> {
  const looking = { ...context, signal: AbortSignal.timeout(90_000) };
  try {
    const seen = await observeImage(looking, { file });
    // One whose manifest has its name already is finished by the next run.
    if (seen?.part?.record?.mark !== ownerMark(owner) || isDecided(seen)) return;
    await discard(looking, copyPaths(file), seen.part.recordDigest);
  } catch (error) {
    context.warn(
      `whether an unfinished copy to ${file} is left cannot be told: ${firstLine(error)}; the next \`pulumi up\` removes it`,
    );
  }
}

/** True for a copy whose commit was begun: its manifest is in place, its image not yet. */
export function isDecided({ part, manifest }: ImageObservation): boolean {
  if (part?.record === undefined || part.imageFacts === "-") return false;
  return manifest?.image.facts === contentFacts(part.imageFacts);
}

async function start(
  context: Context,
  paths: CopyPaths,
  wanted: CopyWanted,
  seen: ImageObservation,
  record: string,
  sizeBytes: number,
  empty: string,
): Promise<void> {
  const { file } = paths;
  const plan = planOf(wanted);
  context.progress(`copying ${wanted.uri} to ${file}`);
  const description = `lvm-nbd: copy of ${wanted.uri} to ${file}`;
  await change(
    context,
    `the copy to ${file} could not be started`,
    scriptOn(
      ...[paths, startCopyScript, seen.facts, seen.manifestDigest, record, description],
      String(longestSeconds(sizeBytes, plan.bandwidthLimit)),
    ),
    jobText(paths.run, plan.tls, copyArguments(paths, plan, digest(record, 64)), withExtents(empty, copyJob)),
  );
}

async function commit(
  context: Context,
  paths: CopyPaths,
  seen: ImageObservation,
  recordDigest: string,
  imageFacts: string,
  manifest: Manifest,
): Promise<void> {
  await change(
    context,
    `the verified image could not get its name ${paths.file}`,
    scriptOn(paths, commitCopyScript, seen.facts, seen.manifestDigest, recordDigest, imageFacts),
    manifestText(manifest),
  );
}

function manifestText(manifest: Manifest): string {
  return `${JSON.stringify(manifest, null, 2)}\n`;
}

function manifestOf(
  wanted: CopyWanted,
  identity: CopyIdentity,
  result: CopyResult,
  snapshotFacts: object | undefined,
): Manifest {
  const { snapshot } = wanted;
  // Nothing else of it: a manifest lies in plain text wherever the image goes.
  const source = snapshot && {
    host: hostName(snapshot.host),
    volumeGroup: snapshot.volumeGroup,
    name: snapshot.name,
    uuid: snapshot.uuid,
    ...snapshotFacts,
  };
  return {
    kind: "lvm-nbd image",
    mark: ownerMark(wanted.owner),
    ...identity,
    image: {
      format: wanted.format,
      sha256: result.sha256,
      sizeBytes: result.sizeBytes,
      verified: result.verified,
      facts: contentFacts(result.facts),
    },
    source: { uri: wanted.uri, ...(source === undefined ? {} : { snapshot: source }) },
    seconds: result.endedAt - result.startedAt,
    startedAt: new Date(result.startedAt * 1000).toISOString(),
    completedAt: new Date(result.endedAt * 1000).toISOString(),
    tools: result.tools,
    ...(wanted.together === undefined ? {} : { together: [...wanted.together], moment: wanted.moment }),
  };
}

async function discard(context: Context, paths: CopyPaths, recordDigest: string): Promise<void> {
  await change(
    context,
    `the unfinished copy ${paths.part} could not be removed`,
    scriptOn(paths, discardCopyScript, recordDigest),
  );
}

/**
 * Makes the image there is into the declared one: copies anew unless it `isRight`, and makes it this resource's. `copyId`: of
 * the state; `undefined` for a create over what is there.
 */
export async function bring(
  context: Context,
  wanted: CopyWanted,
  seen: ImageObservation,
  {
    isRight,
    copyId,
    generation,
  }: { readonly isRight: boolean; readonly copyId: string | undefined; readonly generation: string },
): Promise<void> {
  if (isRight) return keepImage(context, wanted, seen, copyId);
  refuseOthers(context, wanted, seen);
  await copyImage(context, wanted, seen, { copyId: copyId ?? randomUUID(), generation });
}

/** What is no file of ours is refused, and so is an unfinished copy of somebody else's. */
function refuseOthers(
  context: Context,
  { file, owner }: Pick<CopyWanted, "file" | "owner">,
  seen: ImageObservation,
): void {
  if (
    seen.file !== undefined &&
    seen.file.kind !== "regular file" &&
    seen.file.kind !== "regular empty file"
  ) {
    throw foreign(
      context,
      `file: ${file} is a ${seen.file.kind}`,
      "Choose another `file`: only a regular file is ever replaced.",
    );
  }
  const partMark = seen.part?.record?.mark;
  const ours = partMark === ownerMark(owner) || (partMark !== undefined && partMark === seen.mark);
  if (seen.part === undefined || ours) return;
  throw foreign(
    context,
    `file: ${copyPaths(file).part} exists and is not an unfinished copy of this resource`,
    "Choose another `file`, or remove what is there by hand.",
  );
}

/** Keeps the image as it is, or finishes the commit that was begun on it; removes an unfinished copy beside it, and makes it this resource's; see `bring`. */
export async function keepImage(
  context: Context,
  { file, owner }: Pick<CopyWanted, "file" | "owner">,
  seen: ImageObservation,
  copyId: string | undefined,
): Promise<void> {
  refuseOthers(context, { file, owner }, seen);
  const paths = copyPaths(file);
  const own = ownerMark(owner);
  if (seen.part !== undefined && seen.manifest !== undefined && isDecided(seen)) {
    const { recordDigest, imageFacts } = seen.part;
    const decided = { ...seen.manifest, mark: own, copyId: copyId ?? seen.manifest.copyId };
    return commit(context, paths, seen, recordDigest, imageFacts, decided);
  }
  if (seen.part !== undefined) await discard(context, paths, seen.part.recordDigest);
  // Taken over by a create, it is this resource's from now on, and no longer goes with the one that made it.
  if (seen.manifest === undefined || (copyId === seen.manifest.copyId && seen.mark === own)) return;
  const manifest = { ...seen.manifest, mark: own, copyId: copyId ?? randomUUID() };
  await change(
    context,
    `${paths.manifest} could not be written`,
    scriptOn(paths, claimCopyScript, seen.facts, seen.manifestDigest),
    manifestText(manifest),
  );
}

/** Removes image, manifest, and what is unfinished of ours. */
export async function removeImage(
  context: Context,
  { file, owner }: { readonly file: string; readonly owner: string },
  seen: ImageObservation,
): Promise<void> {
  context.progress(`removing ${file}`);
  // What another resource has begun there is left alone.
  const record = seen.part?.record;
  const own = record !== undefined && [ownerMark(owner), seen.mark].includes(record.mark);
  const recordDigest = own ? (seen.part?.recordDigest ?? "-") : "-";
  await change(
    context,
    `${file} could not be removed`,
    scriptOn(copyPaths(file), removeCopyScript, seen.facts, seen.manifestDigest, recordDigest),
  );
}

/** The outputs of an image; `before`: those of the state. */
export function imageState(
  file: string,
  before: z.infer<z.ZodObject<typeof copyOutputs>> | undefined,
  { manifest, file: seen, filesystem }: ImageObservation,
): z.infer<z.ZodObject<typeof imageOutputs>> {
  const seconds = manifest?.seconds ?? before?.seconds ?? 0;
  const sizeBytes = manifest?.image.sizeBytes ?? before?.sizeBytes ?? 0;
  return {
    manifest: copyPaths(file).manifest,
    sha256: manifest?.image.sha256 ?? before?.sha256 ?? "",
    sizeBytes,
    allocatedBytes: seen?.allocatedBytes ?? before?.allocatedBytes ?? 0,
    seconds,
    bytesPerSecond: Math.round(sizeBytes / Math.max(1, seconds)),
    completedAt: manifest?.completedAt ?? before?.completedAt ?? "",
    verified: manifest?.image.verified ?? before?.verified ?? false,
    filesystem,
    copyId: manifest?.copyId ?? before?.copyId ?? "",
  };
}

/**
 * What was once read to be rotten stays so until it is read again or copied anew: no time stamp tells. `before`: the
 * state.
 */
export function isRotten(
  before: { readonly state: string; readonly completedAt: string } | undefined,
  {
    content,
    manifest,
  }: {
    readonly content: ImageObservation["content"];
    readonly manifest: { readonly completedAt: string } | undefined;
  },
): boolean {
  if (content !== "unread") return content === "bad";
  return before?.state === "corrupt" && manifest?.completedAt === before.completedAt;
}

/** Of an image that is not there. */
export const noImage: ImageObservation = {
  ...{
    mark: undefined,
    halfMade: false,
    file: undefined,
    facts: "-",
    manifest: undefined,
    manifestDigest: "-",
  },
  ...{ part: undefined, running: false, filesystem: "", content: "unread" },
};

/** What a resource that is an image is to the reconciler, whatever makes it. */
export const imageResource = {
  predict: ({ file }: { readonly file?: string }): Readonly<Record<string, unknown>> =>
    file === undefined ? {} : { manifest: copyPaths(file).manifest },
  id: ({ file }: { readonly file: string }, name: string): string => `${name}${file}`,
  observe: observeImage,
  inspect: inspectImage,
  isSame: ({ manifest }: ImageObservation, state: { readonly copyId: string }): boolean =>
    manifest !== undefined && manifest.copyId === state.copyId,
  isSuperseded: ({ manifest }: ImageObservation, state: { readonly copyId: string }): boolean =>
    manifest !== undefined && manifest.copyId !== state.copyId,
  // A new image is verified under a name of its own before it takes the old one's.
  collides: (): boolean => false,
};
