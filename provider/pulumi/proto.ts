/** Pulumi's gRPC stubs of the engine service, which the SDK ships without a name of their own in its exports. */
import engineGrpc = require("@pulumi/pulumi/proto/engine_grpc_pb.js");
import engineProto = require("@pulumi/pulumi/proto/engine_pb.js");

export { engineGrpc, engineProto };
