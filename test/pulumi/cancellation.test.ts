/** A gRPC server in this process, as Pulumi's dynamic provider has one, and what is seen of its requests. */
import * as grpc from "@grpc/grpc-js";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { cancelSignal } from "../../provider/pulumi/cancellation.js";

let server: grpc.Server;
let client: grpc.Client;

beforeEach(async () => {
  server = new grpc.Server();
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    );
  });
  client = new grpc.Client(`127.0.0.1:${port}`, grpc.credentials.createInsecure());
});

afterEach(() => {
  client.close();
  server.forceShutdown();
});

/** Asks as the engine does; no method is there, which makes no difference to what is asked. */
function ask(method: string): Promise<void> {
  const plain = (value: Buffer) => value;
  return new Promise((resolve) => {
    client.makeUnaryRequest(`/pulumirpc.ResourceProvider/${method}`, plain, plain, Buffer.alloc(0), () =>
      resolve(),
    );
  });
}

it("the signal is aborted when the engine asks to cancel, and by no other request", async () => {
  const signal = cancelSignal();
  await ask("Create");
  expect(signal.aborted).toBe(false);
  await ask("Cancel");
  await vi.waitFor(() => expect(signal.aborted).toBe(true));
});
