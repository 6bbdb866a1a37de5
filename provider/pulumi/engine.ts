/** Messages to the engine: it shows them while an operation runs. */
import * as grpc from "@grpc/grpc-js";
import { engineGrpc, engineProto } from "./proto.js";

/** Shows lines at the engine; failing to show one never fails the work. */
export interface EngineLog {
  /** A line that is replaced by the next one. */
  progress(message: string): void;
  /** A line that stays. */
  warn(message: string): void;
}

/** The log of the engine at that address (the last argument of the provider's process). */
export function connectEngineLog(address: string | undefined): EngineLog {
  if (address === undefined || !/^[\w.[\]:-]+:\d+$/.test(address)) {
    return { progress: () => undefined, warn: (message) => process.stderr.write(`warning: ${message}\n`) };
  }
  const client = new engineGrpc.EngineClient(address, grpc.credentials.createInsecure());
  const send = (severity: engineProto.LogSeverity, message: string, ephemeral: boolean) => {
    const request = new engineProto.LogRequest();
    request.setSeverity(severity);
    request.setMessage(message);
    request.setEphemeral(ephemeral);
    client.log(request, (error) => {
      if (error) process.stderr.write(`the engine took no log message (${error.code}): ${message}\n`);
    });
  };
  return {
    progress: (message) => send(engineProto.LogSeverity.INFO, message, true),
    warn: (message) => send(engineProto.LogSeverity.WARNING, message, false),
  };
}
