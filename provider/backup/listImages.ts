/** The images that are in a folder of a host, by their manifests. */
import { parseOutput, succeed } from "../core/command.js";
import { type ErrorCode, isLvmNbdError, LvmNbdError } from "../core/errors.js";
import { hostScript, script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { folderGuardFunctions, imageFunctions } from "../linux/copyJob.js";
import { exposedWords, inOtherHands } from "../linux/copyScripts.js";
import { linesToEnd } from "../linux/fields.js";
import { contentFacts, readManifest, snapshotOf } from "../resources/image.js";
import { createHostPool } from "../ssh/pool.js";
import type { Host, HostArgs, NamedHosts, RemoteCommand } from "../ssh/types.js";

/** An image of a VolumeCopy or BackupImage. Times are ISO 8601. */
export interface Image {
  /** Absolute path. */
  readonly file: string;
  /** Name of the file without its last extension: the key, where a stack names its files by generation. */
  readonly generation: string;
  readonly format: string;
  /** SHA-256 of the content. */
  readonly sha256: string;
  /** Of the content, in bytes. */
  readonly sizeBytes: number;
  /** When the image was complete. */
  readonly completedAt: string;
  /** The moment of the volume; `undefined` for a copy of no known snapshot. */
  readonly takenAt: string | undefined;
  /** Whether its source was read a second time and was the same. */
  readonly verified: boolean;
  /** Whether the file has the size and time of modification that its manifest tells. */
  readonly sound: boolean;
  /** The volume, where it is an image of a known snapshot. */
  readonly volumeGroup: string | undefined;
  readonly origin: string | undefined;
  /** The files of all images of the same moment, this one's too. */
  readonly together: readonly string[];
  /** What tells the moment of several images from others; `undefined` for an image that was made alone. */
  readonly moment: string | undefined;
}

const explanations: ReadonlyMap<number, ErrorCode> = new Map([
  [70, "DIRECTORY_NOT_FOUND"],
  [inOtherHands, "FILE_UNSUITABLE"],
]);

const listScript = hostScript(
  "list-images",
  "observe",
  `${folderGuardFunctions}${imageFunctions}
folder=\${1%/}
[ -d "$folder/" ] || exit 70
[ -r "$folder/" ] && [ -x "$folder/" ] || { echo "the folder cannot be read" >&2; exit 1; }
# Another's link would have any file of root's read and told.
danger=$(endangered "$folder/")
[ -z "$danger" ] || { echo "$danger ${exposedWords}" >&2; exit ${inOtherHands}; }
for manifest in "$folder"/*.manifest.json; do
  plain "$manifest" || continue
  file=\${manifest%.manifest.json}
  text=$(base64 -w0 <"$manifest") && seen=$(facts "$file") || exit 1
  printf '%s %s %s\\n' "$(printf %s "$file" | base64 -w0)" "$text" "$(printf %s "$seen" | base64 -w0)"
done
echo end
`,
  ["path"],
);

/** As `listImages` of a program; `named`: the hosts that are configured. */
export async function listImages(host: HostArgs, folder: string, named?: NamedHosts): Promise<Image[]> {
  const pool = createHostPool();
  try {
    const opened = await pool.get(host, named);
    const context: Context = {
      host: opened,
      resource: "listImages",
      signal: new AbortController().signal,
      progress: () => undefined,
      warn: () => undefined,
      open: (other) => pool.get(other, named),
    };
    return await imagesIn(context, folder);
  } finally {
    pool.close();
  }
}

/** As `listImages`, on the context's host. */
export async function imagesIn(context: Context, folder: string): Promise<Image[]> {
  const command: RemoteCommand = {
    argv: script(listScript, withoutSlash(folder) || "/"),
    kind: "read",
    deadlineSeconds: 120,
  };
  const result = await succeed(context, command, `the images in ${folder} could not be listed`, (failed) =>
    explanations.get(failed.exitCode),
  );
  return parseOutput(context, command, result, parseImages);
}

/** Lists that are being made, by host and folder. */
const underWay = new WeakMap<Host, Map<string, Promise<Image[]>>>();

/** As `imagesIn`. Who asks while the folder is being listed for another gets that list: for many VMs at once it is read once. */
export async function imagesAtOnce(context: Context, folder: string): Promise<Image[]> {
  const folders = underWay.get(context.host) ?? new Map<string, Promise<Image[]>>();
  underWay.set(context.host, folders);
  const path = withoutSlash(folder);
  const listing = folders.get(path) ?? imagesIn(context, folder).finally(() => folders.delete(path));
  folders.set(path, listing);
  try {
    return await listing;
  } catch (error) {
    if (!isLvmNbdError(error)) throw error;
    if (error.code === "CANCELLED" && !context.signal.aborted) return imagesIn(context, folder);
    // It may name the one for whom it was begun.
    throw new LvmNbdError(error.code, { ...error.details, resource: context.resource });
  }
}

/** A folder as it stands before the name of a file in it. */
export function withoutSlash(folder: string): string {
  return folder.replace(/\/+$/, "");
}

function parseImages(stdout: string): Image[] {
  const images = linesToEnd(stdout).flatMap((line): Image[] => {
    const [file = "", text = "", facts = ""] = line
      .split(" ")
      .map((word) => Buffer.from(word, "base64").toString("utf8"));
    const manifest = readManifest(text);
    if (manifest === undefined || facts === "-") return [];
    const { format, sha256, sizeBytes, verified } = manifest.image;
    const sound = manifest.image.facts === contentFacts(facts);
    const name = file.slice(file.lastIndexOf("/") + 1);
    const generation = name.replace(/(?<=.)\.[^.]*$/, "");
    const { completedAt } = manifest;
    const { takenAt, volumeGroup, origin } = snapshotOf(manifest) ?? {};
    const { together = [file], moment } = manifest;
    return [
      {
        ...{ file, generation, format, sha256, sizeBytes, completedAt, takenAt, verified, sound },
        ...{ volumeGroup, origin, together, moment },
      },
    ];
  });
  return images.sort((one, other) => Date.parse(other.completedAt) - Date.parse(one.completedAt));
}
