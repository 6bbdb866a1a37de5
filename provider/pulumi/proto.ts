/** Pulumi's gRPC stubs, which the SDK ships without a name of their own in its exports, and what they are made of. */
import { createRequire } from "node:module";

import engineGrpc = require("@pulumi/pulumi/proto/engine_grpc_pb.js");
import engineProto = require("@pulumi/pulumi/proto/engine_pb.js");
import pluginProto = require("@pulumi/pulumi/proto/plugin_pb.js");
import providerGrpc = require("@pulumi/pulumi/proto/provider_grpc_pb.js");
import providerProto = require("@pulumi/pulumi/proto/provider_pb.js");
import statusProto = require("@pulumi/pulumi/proto/status_pb.js");

export type Struct = NonNullable<ReturnType<providerProto.CheckRequest["getNews"]>>;
export type Value = NonNullable<ReturnType<ReturnType<Struct["getFieldsMap"]>["get"]>>;
type Any = ReturnType<statusProto.Status["getDetailsList"]>[number];

/** The SDK's own: stubs take no messages of another copy. */
const ofSdk = createRequire(require.resolve("@pulumi/pulumi/proto/provider_pb.js"));
const structProto = ofSdk("google-protobuf/google/protobuf/struct_pb.js") as {
  readonly Struct: { fromJavaScript(value: object): Struct };
};
/** Of servers and clients: states with certificates and long lists may be large; the engine bounds nothing either. */
export const anySize = { "grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1 };

/** A message of plain values. */
export const structOf = (values: object): Struct => structProto.Struct.fromJavaScript(values);
const { Any } = ofSdk("google-protobuf/google/protobuf/any_pb.js") as { Any: new () => Any };
const { Empty } = ofSdk("google-protobuf/google/protobuf/empty_pb.js") as { Empty: new () => object };

export { Any, Empty, engineGrpc, engineProto, pluginProto, providerGrpc, providerProto, statusProto };
