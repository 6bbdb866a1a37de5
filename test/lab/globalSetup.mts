/** Brings up the two servers for a run of the lab tests, and takes them down at its end. */
import { rm } from "node:fs/promises";
import type { TestProject } from "vitest/node";
import { instanceLock } from "./instance.mts";
import { labDown, labUp } from "./lab.mts";

declare module "vitest" {
  export interface ProvidedContext {
    /** The lab of this run; `freshLab` of support.mts gives it to a test file. */
    labName: string;
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  // Runs may go on beside each other, so each has a lab of its own.
  const name = `test-${process.pid}`;
  await labUp({ name, log: (line) => process.stdout.write(`${line}\n`) });
  project.provide("labName", name);
  return async () => {
    await labDown(name);
    // Nobody else has a lab of this name.
    await rm(await instanceLock(name), { force: true });
  };
}
