/** A plugin that does nothing for what it is asked, and says that it is done: what gRPC and the messages take for themselves. */
import { createRequire } from "node:module";
import { join } from "node:path";
import * as grpc from "@grpc/grpc-js";
import type * as Proto from "../../provider/pulumi/proto.js";

const load = createRequire(import.meta.url);
const { anySize, Empty, providerGrpc, providerProto, structOf }: typeof Proto = load(
  join(import.meta.dirname, "..", "..", "dist/pulumi/proto.js"),
);

function answer<Request, Response>(
  work: (request: Request) => Response,
): grpc.handleUnaryCall<Request, Response> {
  return ({ request }, done) => done(null, work(request));
}

const server = new grpc.Server(anySize);
server.addService(providerGrpc.ResourceProviderService, {
  handshake: answer(() => new providerProto.ProviderHandshakeResponse()),
  configure: answer(() => new providerProto.ConfigureResponse()),
  cancel: answer(() => new Empty()),
  check: answer((request: Proto.providerProto.CheckRequest) => {
    const response = new providerProto.CheckResponse();
    response.setInputs(request.getNews());
    return response;
  }),
  create: answer((request: Proto.providerProto.CreateRequest) => {
    const inputs = request.getProperties()?.toJavaScript();
    const response = new providerProto.CreateResponse();
    response.setId("nothing");
    response.setProperties(structOf({ ...inputs, path: "/dev/nothing", uri: "nbd://nothing" }));
    return response;
  }),
  diff: answer((request: Proto.providerProto.DiffRequest) => {
    const response = new providerProto.DiffResponse();
    const [olds, news] = [request.getOlds()?.toJavaScript(), request.getNews()?.toJavaScript()];
    if (olds === undefined || news === undefined) throw new Error("nothing to compare");
    response.setChanges(providerProto.DiffResponse.DiffChanges.DIFF_NONE);
    return response;
  }),
  read: answer((request: Proto.providerProto.ReadRequest) => {
    const response = new providerProto.ReadResponse();
    response.setId(request.getId());
    response.setProperties(structOf(request.getProperties()?.toJavaScript() ?? {}));
    return response;
  }),
  delete: answer(() => new Empty()),
});
server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  process.stdout.write(`${port}\n`);
});
