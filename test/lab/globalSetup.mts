/** Makes sure that the lab's image is there before the lab tests begin, and takes down what they leave. */
import type { TestProject } from "vitest/node";
import { labDown, labUp } from "./lab.mts";

declare module "vitest" {
  export interface ProvidedContext {
    /** The beginning of this run's lab names; `freshLab` of support.mts has one lab for each worker. */
    labName: string;
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  // Runs may go on beside each other, so each has labs of its own.
  const name = `test-${process.pid}`;
  await labUp({ name, log: (line) => process.stdout.write(`${line}\n`) });
  await labDown(name);
  project.provide("labName", name);
  const { maxWorkers } = project.vitest.config;
  return async () => {
    for (let worker = 1; worker <= maxWorkers; worker++) await labDown(`${name}-${worker}`);
  };
}
