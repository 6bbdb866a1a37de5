/**
 * The owner mark: whatever the provider makes carries the name of the resource that made it, so that a
 * create cut off before its answer is recognised, and two stacks cannot take each other's things.
 */
import { createHash } from "node:crypto";

/** Prefix of every LVM tag of ours; user tags must not begin with it. */
export const tagPrefix = "lvm-nbd.";

/** What an owner mark begins with; `ownerInTag` follows. */
export const ownerTag = `${tagPrefix}owner=`;
/** What a generation mark begins with. */
export const generationTag = `${tagPrefix}generation=`;

/** `organisation/project/stack/resource` of a resource. */
export function ownerOf(organization: string, project: string, stack: string, name: string): string {
  return [organization, project, stack, name].join("/");
}

/** The owner mark, an LVM tag. A mark as it was seen stays what it is: from a shortened one no owner can be read. */
export function ownerMark(owner: string): string {
  return owner.startsWith(ownerTag) ? owner : ownerTag + ownerInTag(owner);
}

/** Who a resource is, as its URN tells it: that names no organisation. */
export interface Claimant {
  /** Where it is known. */
  readonly organization: string | undefined;
  readonly project: string;
  readonly stack: string;
  readonly name: string;
}

/** Why nothing can be marked, where no program tells the organisation. */
export const organizationMissing =
  "the organisation is not known, which is part of the mark by which no stack takes what another made, and Pulumi tells it to " +
  "programs alone: say it once for the stack, `pulumi config set lvm-nbd:organization NAME` (with a backend of one's own it is `organization`)";

/** What to do about a thing of which an id alone does not tell enough. */
export const declareInstead =
  "Declare it with all its properties and run `pulumi up`: what carries its mark is found and kept.";

/** What to mind of a thing that an id alone brings into the state. `isClaimed`: whether a create over it makes it that resource's alone. */
export function ofTwo(isClaimed: boolean): string {
  const taken =
    "If another resource of this stack has it already, take that one out with `pulumi state delete`: removed by the program, it " +
    "removes this too.";
  const instead =
    "Declared with all its properties, instead of imported, what is as it was made is kept, and is the new resource's alone.";
  return isClaimed ? `${taken} ${instead}` : taken;
}

/** The organisation of an owner; `undefined` for a mark as it was seen, which may be shortened. */
export function organizationOf(owner: string): string | undefined {
  return owner.startsWith(ownerTag) ? undefined : owner.split("/")[0];
}

/** The claimant as the owner that the mark names; `undefined` if that is another. */
export function ownerByMark(
  mark: string,
  { organization, project, stack, name }: Claimant,
): string | undefined {
  const named = organization ?? organizationOf(ownerOfMark(mark));
  const owner = named === undefined ? undefined : ownerOf(named, project, stack, name);
  return owner !== undefined && ownerMark(owner) === mark ? owner : undefined;
}

/** Of what a create of this run took for its own, when it is to be removed as what that replaces. */
export function keptInstead(id: string): string {
  return (
    `${id} was there already when it was to be replaced, and bears this resource's mark: it is kept as it is. To have it made anew, ` +
    "change what makes it anew (such as `triggers`), or remove it first."
  );
}

/** An owner as part of a tag. Characters a tag may not hold are written `#XX` (UTF-8 bytes in hex). */
export function ownerInTag(owner: string): string {
  const encoded = [...Buffer.from(owner, "utf8")]
    .map((byte) => {
      const character = String.fromCharCode(byte);
      return /[A-Za-z0-9._\-+/=!:&]/.test(character) ? character : `#${byte.toString(16).padStart(2, "0")}`;
    })
    .join("");
  // Older LVM allows 128 characters in a tag; a longer owner keeps its start for people and a hash for us.
  const room = 120 - ownerTag.length;
  return encoded.length <= room ? encoded : `${encoded.slice(0, room - 33)}!${digest(owner, 32)}`;
}

/**
 * Marks a snapshot while it is being taken. lvcreate makes a plain volume first and its snapshot from that: a
 * plain volume with this mark is one that was cut off there, any other is somebody's own.
 */
export const makingMark = `${tagPrefix}making`;

/** Marks whatever the backups of a stack make, to whatever host; of one length for whatever names. */
export function backupsMark(organization: string, project: string, stack: string): string {
  return `${tagPrefix}backups=${digest(ownerOf(organization, project, stack, ""), 32)}`;
}

/** The owner mark among a volume's tags; `undefined` for something without any mark. */
export function markAmong(tags: readonly string[]): string | undefined {
  return tags.find((tag) => tag.startsWith(ownerTag));
}

/** The owner a mark names, for people. */
export function ownerOfMark(mark: string): string {
  const encoded = mark.startsWith(ownerTag) ? mark.slice(ownerTag.length) : mark;
  const bytes = encoded.replace(/#([0-9a-f]{2})/g, (_, hex: string) =>
    String.fromCharCode(Number.parseInt(hex, 16)),
  );
  return Buffer.from(bytes, "latin1").toString("utf8");
}

/** Marks for which declared generation (triggers, chunk size, ...) a snapshot was taken. */
export function generationMark(generation: unknown): string {
  return generationTag + digest(JSON.stringify(generation) ?? "", 16);
}

/** True if the tags say that the snapshot was taken for another declared moment. Without such a mark: false. */
export function isOfAnotherGeneration(tags: readonly string[], generation: string): boolean {
  return tags.some((tag) => tag.startsWith(generationTag)) && !tags.includes(generation);
}

/** The user's own tags: all but ours. */
export function userTags(tags: readonly string[]): string[] {
  return tags.filter((tag) => !tag.startsWith(tagPrefix)).sort();
}

/** The first hexadecimal digits of a text's SHA-256. */
export function digest(text: string, length: number): string {
  return createHash("sha256").update(text).digest("hex").slice(0, length);
}
