import * as grpc from "@grpc/grpc-js";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { connectEngineLog } from "../../provider/pulumi/engine.js";
import { engineGrpc, engineProto } from "../../provider/pulumi/proto.js";

const received: { message: string; severity: number; ephemeral: boolean }[] = [];
const server = new grpc.Server();
let address = "";

beforeAll(async () => {
  const { log } = engineGrpc.EngineService as unknown as grpc.ServiceDefinition;
  if (log === undefined) throw new Error("the engine has no log");
  // An empty answer is no bytes.
  server.addService(
    { log: { ...log, responseSerialize: () => Buffer.alloc(0) } },
    {
      log: (
        call: grpc.ServerUnaryCall<engineProto.LogRequest, unknown>,
        answer: grpc.sendUnaryData<unknown>,
      ) => {
        const { request } = call;
        received.push({
          message: request.getMessage(),
          severity: request.getSeverity(),
          ephemeral: request.getEphemeral(),
        });
        answer(null, {});
      },
    },
  );
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    );
  });
  address = `127.0.0.1:${port}`;
});

afterAll(() => server.forceShutdown());

it("shows progress that passes and warnings that stay", async () => {
  const log = connectEngineLog(address);
  log.progress("taking the snapshot");
  log.warn("is stopped");
  await vi.waitFor(() => expect(received).toHaveLength(2));
  expect(received).toEqual(
    expect.arrayContaining([
      { message: "taking the snapshot", severity: engineProto.LogSeverity.INFO, ephemeral: true },
      { message: "is stopped", severity: engineProto.LogSeverity.WARNING, ephemeral: false },
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
