/** Pulumi's resource monitor, as far as a component sees it: it remembers what it was told. */
import * as grpc from "@grpc/grpc-js";
import { resourceGrpc, resourceProto } from "../../provider/pulumi/monitor.js";
import { Empty } from "../../provider/pulumi/proto.js";
import { listen } from "./pluginClient.js";

type Registration = resourceProto.RegisterResourceRequest;

/** `answer`: before a resource counts as registered; may throw a status. `stack`: of the URNs. */
export async function startMonitor(
  answer: (request: Registration) => Promise<void> | void = () => undefined,
  stack = "s",
) {
  const registered: Registration[] = [];
  const outputs: { urn: string; values: unknown }[] = [];
  let ended = 0;
  const server = new grpc.Server();
  const { registerResource, registerResourceOutputs } =
    resourceGrpc.ResourceMonitorService as unknown as grpc.ServiceDefinition;
  if (registerResource === undefined || registerResourceOutputs === undefined)
    throw new Error("the monitor registers nothing");
  server.addService(
    { registerResource, registerResourceOutputs },
    {
      registerResource(
        call: grpc.ServerUnaryCall<Registration, resourceProto.RegisterResourceResponse>,
        respond: grpc.sendUnaryData<resourceProto.RegisterResourceResponse>,
      ) {
        const { request } = call;
        registered.push(request);
        call.on("cancelled", () => {
          ended += 1;
        });
        const response = new resourceProto.RegisterResourceResponse();
        response.setUrn(`urn:pulumi:${stack}::p::${request.getType()}::${request.getName()}`);
        Promise.resolve(request)
          .then(answer)
          .then(
            () => respond(null, response),
            (error: unknown) => respond(error as grpc.ServiceError),
          );
      },
      registerResourceOutputs(
        { request }: grpc.ServerUnaryCall<resourceProto.RegisterResourceOutputsRequest, object>,
        respond: grpc.sendUnaryData<object>,
      ) {
        outputs.push({ urn: request.getUrn(), values: request.getOutputs()?.toJavaScript() });
        respond(null, new Empty());
      },
    },
  );
  const port = await listen(server);
  return {
    registered,
    outputs,
    /** Calls that the caller gave up. */
    get ended() {
      return ended;
    },
    /** What was said of the resource of that name. */
    of(name: string): Registration {
      const found = registered.find((request) => request.getName() === name);
      if (found === undefined) throw new Error(`no ${name} was registered`);
      return found;
    },
    address: `127.0.0.1:${port}`,
    close: () => server.forceShutdown(),
  };
}
