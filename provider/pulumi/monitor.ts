/** The engine's resource monitor, to which a program, and a component in its place, says what there is to be. Source: resource.proto of pulumi. */
import * as grpc from "@grpc/grpc-js";
import { LvmNbdError } from "../core/errors.js";
import { anySize, type Struct } from "./proto.js";

import aliasProto = require("@pulumi/pulumi/proto/alias_pb.js");
import resourceGrpc = require("@pulumi/pulumi/proto/resource_grpc_pb.js");
import resourceProto = require("@pulumi/pulumi/proto/resource_pb.js");

export interface Monitor {
  /** The URN of the resource. It comes when what was declared is there, or at a preview is foreseen. */
  register(request: resourceProto.RegisterResourceRequest): Promise<string>;
  /** Ends the declaration of a component. */
  registerOutputs(urn: string, outputs: Struct): Promise<void>;
  close(): void;
}

/** The engine cancels its plugins for either. */
const ended = "not all of its resources were declared: one of them failed, or the run was cancelled";

/** Calls have no deadline of their own: a resource takes as long as it takes. They end with the signal. */
export function connectMonitor(address: string, signal: AbortSignal): Monitor {
  const client = new resourceGrpc.ResourceMonitorClient(address, grpc.credentials.createInsecure(), anySize);

  const ask = <Response>(
    start: (answer: (error: grpc.ServiceError | null, response: Response) => void) => grpc.ClientUnaryCall,
  ): Promise<Response> =>
    new Promise((resolve, reject) => {
      const cancel = () => call.cancel();
      const call = start((error, response) => {
        signal.removeEventListener("abort", cancel);
        if (error === null) resolve(response);
        else if (signal.aborted) reject(new LvmNbdError("CANCELLED", { message: ended, cause: error }));
        else reject(new Error(`the engine did not take it: ${error.details}`, { cause: error }));
      });
      signal.addEventListener("abort", cancel);
      if (signal.aborted) cancel();
    });

  return {
    async register(request) {
      const registered = await ask<resourceProto.RegisterResourceResponse>((answer) =>
        client.registerResource(request, answer),
      );
      return registered.getUrn();
    },
    async registerOutputs(urn, outputs) {
      const request = new resourceProto.RegisterResourceOutputsRequest();
      request.setUrn(urn);
      request.setOutputs(outputs);
      await ask((answer) => client.registerResourceOutputs(request, answer));
    },
    close: () => client.close(),
  };
}

export { aliasProto, resourceGrpc, resourceProto };
