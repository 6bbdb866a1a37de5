import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { connectEngineLog } from "../../provider/pulumi/engine.js";
import { engineProto } from "../../provider/pulumi/proto.js";
import { startEngine } from "../support/pluginClient.js";

/** Of no resource's row. */
const anywhere = { urn: "", stream: 0 };
let engine: Awaited<ReturnType<typeof startEngine>>;

beforeAll(async () => {
  engine = await startEngine();
});

afterAll(() => engine.close());

it("shows progress that passes and warnings that stay", async () => {
  const log = connectEngineLog(engine.address);
  log.progress("taking the snapshot");
  log.warn("is stopped");
  await vi.waitFor(() => expect(engine.lines).toHaveLength(2));
  expect(engine.lines).toEqual(
    expect.arrayContaining([
      {
        ...anywhere,
        message: "taking the snapshot",
        severity: engineProto.LogSeverity.INFO,
        ephemeral: true,
      },
      { ...anywhere, message: "is stopped", severity: engineProto.LogSeverity.WARNING, ephemeral: false },
    ]),
  );
});

it("writes warnings to stderr where there is no engine", () => {
  const write = vi.spyOn(process.stderr, "write").mockReturnValue(true);
  try {
    const log = connectEngineLog("/some/file.js");
    log.progress("nothing");
    log.warn("something");
    expect(write.mock.calls).toEqual([["warning: something\n"]]);
  } finally {
    write.mockRestore();
  }
});
