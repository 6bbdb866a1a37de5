/** Messages to the engine: it shows them while an operation runs. */
import * as grpc from "@grpc/grpc-js";
import { engineGrpc, engineProto } from "./proto.js";

/** Shows lines at the engine; failing to show one never fails the work. */
export interface EngineLog {
  /** A line that is replaced by the next one. */
  progress(message: string): void;
  /** A line that stays. */
  warn(message: string): void;
  /** The same on the row of that resource, as one stream. */
  on(urn: string): EngineLog;
  /** Until the engine has taken, or refused, what was shown: what comes after the end of an operation it may not show. */
  delivered(): Promise<unknown>;
  close(): void;
}

/** Milliseconds. */
const longestDelivery = 10_000;

/** Not 0, which is every stream's that has no number. */
let streams = 0;

/** The log of the engine at that address (the last argument of the provider's process). */
export function connectEngineLog(address: string | undefined): EngineLog {
  if (address === undefined || !/^[\w.[\]:-]+:\d+$/.test(address)) return stderrLog;
  const client = new engineGrpc.EngineClient(address, grpc.credentials.createInsecure());
  const close = () => client.close();
  const log = (urn: string, stream: number): EngineLog => {
    let delivered: Promise<unknown> = Promise.resolve();
    const send = (severity: engineProto.LogSeverity, message: string, ephemeral: boolean) => {
      const request = new engineProto.LogRequest();
      request.setSeverity(severity);
      request.setMessage(message);
      request.setUrn(urn);
      request.setStreamid(stream);
      request.setEphemeral(ephemeral);
      const deadline = Date.now() + longestDelivery;
      const sent = new Promise<void>((resolve) => {
        client.log(request, new grpc.Metadata(), { deadline }, (error) => {
          if (error) process.stderr.write(`the engine took no log message (${error.code}): ${message}\n`);
          resolve();
        });
      });
      delivered = delivered.then(() => sent);
    };
    return {
      progress: (message) => send(engineProto.LogSeverity.INFO, message, true),
      warn: (message) => send(engineProto.LogSeverity.WARNING, message, false),
      on: (other) => log(other, ++streams),
      delivered: () => delivered,
      close,
    };
  };
  return log("", 0);
}

/** Where there is no engine. */
const stderrLog: EngineLog = {
  progress: () => undefined,
  warn: (message) => process.stderr.write(`warning: ${message}\n`),
  on: () => stderrLog,
  delivered: () => Promise.resolve(),
  close: () => undefined,
};
