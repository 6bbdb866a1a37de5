/**
 * The mark of a restore: an LVM tag on the origin that remembers what was restored, for whom and how far it got, so
 * that a restore which was cut off is gone on with and one that is done is never done again.
 */
import { randomBytes } from "node:crypto";
import { digest, ownerInTag, ownerOfMark, tagPrefix } from "./owner.js";

/** What a mark of a restore begins with. */
export const restoreTag = `${tagPrefix}restore=`;

/**
 * `begun`: before LVM was told to merge, or before the first byte of an image was written; `merging`: after that, and for a
 * merge that waits; `writing`: from before that byte on; `restored`: when the merge was seen to have ended, or the image was
 * read back.
 */
const stages = { begun: "b", merging: "m", writing: "w", restored: "r" } as const;
const stageNames = ["begun", "merging", "writing", "restored"] as const;

/** What a mark tells. */
export interface RestoreMark {
  /** The whole tag. */
  readonly tag: string;
  /** Digest of the declared triggers. */
  readonly generation: string;
  /** Which resource's life it belongs to. */
  readonly life: string;
  readonly stage: keyof typeof stages;
  /** Seconds since 1970, by the host's clock. */
  readonly startedAt: number;
  /** Seconds from there to the end; 0 before it. */
  readonly seconds: number;
  /** Of what was only begun: the snapshot's device in its thin pool; 0 of a COW snapshot. */
  readonly thinId: number;
  /** LVM UUID of the snapshot, or SHA-256 of the image. */
  readonly source: string;
  /** As it stands in the tag. */
  readonly owner: string;
}

/** Digest of declared triggers. */
export function restoreGeneration(triggers: readonly unknown[]): string {
  return digest(JSON.stringify(triggers), 12);
}

/** A name for a new life of a resource. */
export function newLife(): string {
  return randomBytes(4).toString("hex");
}

/**
 * The tag of a mark before and after its stage and times: `lvm-nbd.restore=GENERATION:LIFE:` and `UUID:OWNER`; between
 * them stands e.g. `m1795694259+0:`. Of an image the checksum takes the UUID's place. Of at most 240 characters: every LVM
 * beside a systemd allows 1024.
 */
export function restoreTagParts(told: Pick<RestoreMark, "generation" | "life" | "source" | "owner">): {
  readonly head: string;
  readonly tail: string;
} {
  return {
    head: `${restoreTag}${told.generation}:${told.life}:`,
    tail: `${told.source}:${told.owner}`,
  };
}

/** The tag of a mark. */
export function restoreTagOf(told: Omit<RestoreMark, "tag">): string {
  const { head, tail } = restoreTagParts(told);
  const number = told.stage === "begun" ? told.thinId : told.stage === "restored" ? told.seconds : 0;
  return `${head}${stages[told.stage]}${told.startedAt}+${number}:${tail}`;
}

/** The marks among a volume's tags. What begins like one and is none of ours is passed over. */
export function restoreMarksAmong(tags: readonly string[]): RestoreMark[] {
  return tags.flatMap((tag): RestoreMark[] => {
    if (!tag.startsWith(restoreTag)) return [];
    const match = /^([0-9a-f]{12}):([0-9a-f]{8}):([bmwr])(\d{1,12})\+(\d{1,9}):([A-Za-z0-9-]+):(.+)$/.exec(
      tag.slice(restoreTag.length),
    );
    const [, generation, life, letter, startedAt, number, source, owner] = match ?? [];
    const stage = stageNames.find((one) => stages[one] === letter);
    if (!stage || !generation || !life || !source || !owner) return [];
    const times = {
      startedAt: Number(startedAt),
      seconds: stage === "restored" ? Number(number) : 0,
      thinId: stage === "begun" ? Number(number) : 0,
    };
    return [{ tag, generation, life, stage, ...times, source, owner }];
  });
}

/** True for a mark of that owner. */
export function isRestoreOf(mark: RestoreMark, owner: string): boolean {
  return mark.owner === ownerInTag(owner);
}

/** SHA-256 of the image that was restored; `undefined` for a snapshot. */
export function imageOfRestore({ source }: Pick<RestoreMark, "source">): string | undefined {
  return /^[0-9a-f]{64}$/.test(source) ? source : undefined;
}

/** The mark of a restore from an image that writes the volume, or has left it half-written, whoever's it is. */
export function writingAmong(tags: readonly string[]): RestoreMark | undefined {
  return restoreMarksAmong(tags).find(({ stage }) => stage === "writing");
}

/** The mark of a restore from an image that may have been writing the volume at that time (seconds since 1970). */
export function restoreDuring(tags: readonly string[], at: number): RestoreMark | undefined {
  return restoreMarksAmong(tags).find((mark) => {
    if (imageOfRestore(mark) === undefined || at < mark.startedAt) return false;
    return mark.stage === "writing" || (mark.stage === "restored" && at <= mark.startedAt + mark.seconds);
  });
}

/** The owner a mark names, for people. */
export function ownerOfRestore(mark: RestoreMark): string {
  return ownerOfMark(mark.owner);
}
