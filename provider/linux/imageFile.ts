/** An image: the content of a disk in a file of the host, beside its manifest. Source: qemu-img(1). */
import { z } from "zod";

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

const infoShape = z.object({
  "virtual-size": z.int().nonnegative(),
  "backing-filename": z.string().optional(),
  "format-specific": z
    .object({ data: z.object({ "data-file": z.string().optional() }).optional() })
    .optional(),
});

/** What `qemu-img info --output=json` tells of an image. */
export interface ImageInfo {
  /** Size of the content in bytes. */
  readonly sizeBytes: number;
  /** A file of which a reader of the image would see the content too: what is no image of ours. */
  readonly needs?: { readonly what: "backing file" | "data file"; readonly name: string } | undefined;
}

/** Reads the output of `qemu-img info --output=json`; throws on any other text. */
export function parseImageInfo(json: string): ImageInfo {
  const info = infoShape.parse(JSON.parse(json));
  const [backing, data] = [info["backing-filename"], info["format-specific"]?.data?.["data-file"]];
  const sizeBytes = info["virtual-size"];
  if (backing !== undefined) return { sizeBytes, needs: { what: "backing file", name: backing } };
  if (data !== undefined) return { sizeBytes, needs: { what: "data file", name: data } };
  return { sizeBytes };
}
