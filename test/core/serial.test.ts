import { expect, it } from "vitest";
import { serially } from "../../provider/core/serial.js";

it("runs work of one key in the order asked for, also after a failure", async () => {
  const host = {};
  const log: string[] = [];
  let release: () => void = () => undefined;
  const gate = new Promise<void>((resolve) => {
    release = resolve;
  });
  const first = serially(host, "VgVm", async () => {
    await gate;
    log.push("first");
    throw new Error("failed");
  });
  const second = serially(host, "VgVm", async () => log.push("second"));
  await serially(host, "Other", async () => log.push("other key"));
  await serially({}, "VgVm", async () => log.push("other host"));
  release();
  await expect(first).rejects.toThrow("failed");
  await second;
  expect(log).toEqual(["other key", "other host", "first", "second"]);
});
