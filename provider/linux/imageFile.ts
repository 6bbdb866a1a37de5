/** An image: the content of a disk in a file of the host, beside its manifest. */

export const imageFormats = ["raw", "qcow2"] as const;
export type ImageFormat = (typeof imageFormats)[number];

const longestName = 255 - ".manifest.json.new".length;

/** Why the path cannot be an image's; `undefined` when it is good. */
export function fileProblem(file: string): string | undefined {
  if (!file.startsWith("/")) return `"${file}" must be an absolute path, e.g. "/var/backups/vm1.raw"`;
  if (/\p{Cc}/u.test(file)) return "must not hold control characters";
  const parts = file.slice(1).split("/");
  if (parts.some((part) => part === "" || part === "." || part === ".."))
    return `"${file}" must name a file without empty parts, "." and ".."`;
  if (/^\/(dev|proc|sys|run)\//.test(file))
    return `"${file}" does not outlive a reboot: name a file on a disk, e.g. "/var/backups/vm1.raw"`;
  if (/\.(part|manifest\.json)$/.test(file)) return `"${file}" must not end in .part or .manifest.json`;
  if (Buffer.byteLength(parts.at(-1) ?? "") > longestName)
    return `has a name of more than ${longestName} bytes, which leaves no room for the manifest's`;
  return undefined;
}

/** What an image may be refused for, in a sentence that begins with its path. */
export interface ImageProblem {
  readonly code: "DIRECTORY_NOT_FOUND" | "FILE_NOT_FOUND" | "FILE_UNSUITABLE";
  readonly message: string;
  readonly advice?: string;
}

const zeros = "0".repeat(16);

/**
 * Shell functions. `walk FILE`: goes the way from / to the file, itself included, following links, and sets `theirs` to the first thing
 * that others than root can change, and `turned` to the first link behind that, or to one of links without end; in a subshell.
 * `exposed FILE`: the former, with its owner and mode; nothing where root alone can change anything. `header FILE`: its first 80 bytes
 * in hexadecimal digits. `alone FILE`: it is a qcow2 image that needs no other file; 2 where that
 * cannot be told.
 */
export const imageGuardFunctions = `
walk() {
  way=; rest=$1; links=0 theirs= turned=
  while [ "$links" -lt 40 ]; do
    [ -n "$theirs" ] || case $(stat -c '%u %A' "\${way:-/}") in "0 "?????-??-?) ;; *) theirs=\${way:-/};; esac
    while [ "\${rest#/}" != "$rest" ]; do rest=\${rest#/}; done
    [ -n "$rest" ] || return 0
    next=\${rest%%/*}; rest=\${rest#"$next"}
    case $next in
    .) ;;
    ..) way=\${way%/*};;
    *)
      if [ -L "$way/$next" ]; then
        [ -z "$theirs" ] || break
        links=$((links + 1)); link=$(readlink "$way/$next"); rest=$link$rest
        case $link in /*) way=;; esac
      else way=$way/$next; fi;;
    esac
  done
  turned=$way/$next
}
exposed() (
  walk "$1"
  if [ -n "$theirs" ]; then printf '%s (%s)' "$theirs" "$(stat -c '%U, %A' "$theirs" 2>&1)"
  elif [ -n "$turned" ]; then printf '%s' "$1 (links without end)"; fi
)
header() { od -An -v -tx1 -N 80 "$1" | tr -d ' \\n'; }
alone() { case $(header "$1") in 514649fb00000002${zeros}*|514649fb00000003${zeros}*[012389ab]) ;; '') return 2;; *) return 1;; esac; }
`;

/**
 * Shell function for scripts with `emitFunctions` and `imageGuardFunctions`. `look_at_image FILE FORMAT`: emits what `imageProblem`
 * and `imageSize` judge; fails where that is enough to refuse it. Nothing of what is in the file is interpreted on the host, and
 * what others can change is not opened: it might be a pipe by then.
 */
export const lookAtImageFunction = `
look_at_image() {
  image_folder=\${1%/*}/
  if [ -L "$1" ]; then emit leads "$(readlink -f "$1")"; fi
  if [ -d "$image_folder" ]; then emit folder yes; fi
  if [ -e "$1" ]; then emit kind "$(stat -L -c %F "$1")"; fi
  [ -f "$1" ] && [ ! -L "$1" ] || return 1
  emit realPath "$(readlink -f "$1")"
  image_exposed=$(exposed "$1"); emit exposed "$image_exposed"
  [ -z "$image_exposed" ] || return 1
  emit mountPoint "$(stat -c %m "$1")"
  emit fileId "$(stat -c %i:%W "$1")"
  emit fileSize "$(stat -c %s "$1")"
  [ "$2" != qcow2 ] || emit header "$(header "$1")"
}
`;

/** Why what `look_at_image` saw may not be served; `undefined` when it may. */
export function imageProblem(
  { file, format }: { readonly file: string; readonly format: ImageFormat },
  fields: ReadonlyMap<string, string>,
): ImageProblem | undefined {
  const unsuitable = (message: string, advice?: string): ImageProblem => ({
    code: "FILE_UNSUITABLE",
    message: `${file} ${message}`,
    ...(advice === undefined ? {} : { advice }),
  });
  const [kind, leads, exposed] = [fields.get("kind"), fields.get("leads"), fields.get("exposed")];
  if (leads !== undefined) return unsuitable(`is a symbolic link: give ${leads}`);
  if (!fields.has("folder"))
    return { code: "DIRECTORY_NOT_FOUND", message: `the folder of ${file} does not exist on the host` };
  if (kind === undefined) return { code: "FILE_NOT_FOUND", message: `${file} does not exist on the host` };
  if (!fields.has("realPath")) return unsuitable(`is a ${kind}, not a regular file`);
  if (exposed !== "") {
    return unsuitable(
      `is not safe to serve: others than root can change ${exposed ?? "it"}, and so choose what is served`,
      "The image and every folder above it must be root's, and writable for no group and no others (`chown root`, `chmod go-w`). Do that, or keep images in a folder where it is so, e.g. /var/backups.",
    );
  }
  if (format === "qcow2") {
    const header = qcow2Header(fields);
    if (header === undefined) return unsuitable("is no qcow2 image");
    if (header.needs !== undefined)
      return unsuitable(`names a ${header.needs}, whose content would be served too`);
  }
  const sizeBytes = imageSize(format, fields);
  // A client's kernel leaves out the last bytes of others, and qemu-nbd makes some up.
  if (sizeBytes === undefined || sizeBytes === 0 || sizeBytes % 512 !== 0)
    return unsuitable(`holds ${sizeBytes ?? "unknown"} bytes: no disk, whose size is a multiple of 512`);
  return undefined;
}

/** Size in bytes of the content that `look_at_image` saw; `undefined` where there is none. */
export function imageSize(format: ImageFormat, fields: ReadonlyMap<string, string>): number | undefined {
  if (format === "qcow2") return qcow2Header(fields)?.sizeBytes;
  const size = fields.get("fileSize");
  return size === undefined ? undefined : Number(size);
}

/** What the header of a qcow2 image tells. */
export interface Qcow2Header {
  /** Size of the content in bytes. */
  readonly sizeBytes: number;
  /** A file of which a reader of the image would see the content too: what is no image of ours. */
  readonly needs?: "backing file" | "data file";
}

function qcow2Header(fields: ReadonlyMap<string, string>): Qcow2Header | undefined {
  return parseQcow2Header(fields.get("header") ?? "");
}

/** Reads the first 80 bytes, in hexadecimal digits; `undefined` if they are none of qcow2. Source: QEMU's docs/interop/qcow2.txt. */
export function parseQcow2Header(digits: string): Qcow2Header | undefined {
  const header = /^[0-9a-f]{160}$/.test(digits) ? Buffer.from(digits, "hex") : Buffer.alloc(80);
  const version = header.readUInt32BE(4);
  if (header.toString("latin1", 0, 4) !== "QFI\xfb" || (version !== 2 && version !== 3)) return undefined;
  const sizeBytes = Number(header.readBigUInt64BE(24));
  if (header.readBigUInt64BE(8) !== 0n) return { sizeBytes, needs: "backing file" };
  if (version === 3 && (header.readUInt8(79) & 4) !== 0) return { sizeBytes, needs: "data file" };
  return { sizeBytes };
}

/**
 * For `sh -c`, with the image's path and format as $0 and $1: fails, and says why, if root is not the only one who can choose what
 * is served. Once that is so it stays so: only root could change it.
 */
export const imageGuard = `${imageGuardFunctions}
no() { printf '%s\\n' "$0 $1" >&2; exit 1; }
seen=$(exposed "$0"); [ -z "$seen" ] || no "is not served: others than root can change $seen"
[ -f "$0" ] && [ ! -L "$0" ] || no "is no regular file"
[ "$1" != qcow2 ] || alone "$0" || no "is no qcow2 image, or one that needs another file"
`;
