/** Failures as the engine understands them. Source: sdk/go/common/resource/plugin/provider_plugin.go (parseError) of pulumi. */
import * as grpc from "@grpc/grpc-js";
import { isLvmNbdError } from "../core/errors.js";
import { Any, providerProto, type Struct, statusProto } from "./proto.js";

/** What an operation made before it failed: the engine keeps it in the state. */
export interface Partial {
  readonly id: string;
  readonly properties: Struct;
}

/** A failure as the answer to a call. Of a code that the engine takes for well understood, it keeps no pending operation: marks tell what was made. */
export function failureStatus(
  error: unknown,
  partial?: Partial,
): Pick<grpc.StatusObject, "code" | "details"> & {
  metadata?: grpc.Metadata;
} {
  const details = error instanceof Error ? error.message : String(error);
  const code = codeOf(error);
  if (partial === undefined) return { code, details };
  const failed = new providerProto.ErrorResourceInitFailed();
  failed.setId(partial.id);
  failed.setProperties(partial.properties);
  failed.setReasonsList([details]);
  const detail = new Any();
  detail.pack(failed.serializeBinary(), "pulumirpc.ErrorResourceInitFailed");
  const status = new statusProto.Status();
  status.setCode(code);
  status.setMessage(details);
  status.addDetails(detail);
  const metadata = new grpc.Metadata();
  metadata.set("grpc-status-details-bin", Buffer.from(status.serializeBinary()));
  return { code, details, metadata };
}

function codeOf(error: unknown): grpc.status {
  if (!isLvmNbdError(error)) return grpc.status.INTERNAL;
  if (error.code === "INVALID_INPUT") return grpc.status.INVALID_ARGUMENT;
  if (error.code === "CANCELLED") return grpc.status.ABORTED;
  if (error.code === "OPERATION_TIMED_OUT") return grpc.status.DEADLINE_EXCEEDED;
  return grpc.status.FAILED_PRECONDITION;
}
