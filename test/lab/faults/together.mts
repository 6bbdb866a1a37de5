import { beforeAll, describe, it } from "vitest";
import type { FaultStack, Run } from "./fault-stack.mts";

/** A fault, the run of the CLI that meets it, and the world after it was mended. */
export interface Fault {
  readonly name: string;
  /** Breaks the server. */
  readonly broken: () => Promise<unknown>;
  /** What the run must have said, and what must not have happened. */
  readonly told: (run: Run) => unknown;
  /** Takes the fault's cause away; nothing for a drift, which is for the next run to put right. */
  readonly mended?: () => Promise<unknown>;
  /** What must be so after the next run. */
  readonly healed: (run: Run) => unknown;
}

/**
 * Faults that do not touch each other, met by one run of the CLI and put right by another: each run takes seconds.
 * Each fault is a test of its own. `met` runs with all faults there, `next` after their causes were taken away.
 */
export function together(
  title: string,
  runs: { readonly met: () => Promise<Run>; readonly next: () => Promise<Run> },
  faults: readonly Fault[],
): void {
  describe(title, () => {
    const failures = new Map<Fault, unknown>();
    let healing: Run;

    beforeAll(async () => {
      for (const { broken } of faults) await broken();
      const run = await runs.met();
      for (const fault of faults) {
        try {
          await fault.told(run);
        } catch (error) {
          failures.set(fault, error);
        }
      }
      for (const { mended } of faults) await mended?.();
      try {
        healing = await runs.next();
      } catch (error) {
        // Often what the first run met is the reason.
        throw new Error([...failures.values(), error].map(String).join("\n\nand then: "), { cause: error });
      }
    });

    for (const fault of faults) {
      it(fault.name, async () => {
        if (failures.has(fault)) throw failures.get(fault);
        await fault.healed(healing);
      });
    }
  });
}

/** The usual run after the causes are gone: `up`, which must succeed. */
export function up(stack: () => FaultStack, options: { refresh?: boolean } = {}): () => Promise<Run> {
  return async () => {
    const run = await stack().up(options);
    run.succeeded();
    return run;
  };
}

/** As `up`, after a refresh has shown that nothing of the stack was changed. */
export function asDeclaredAndUp(stack: () => FaultStack): () => Promise<Run> {
  return async () => {
    await stack().isAsDeclared();
    return up(stack)();
  };
}
