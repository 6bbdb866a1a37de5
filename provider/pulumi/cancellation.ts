/**
 * Ctrl-C: the engine asks every provider to cancel, and Pulumi's dynamic provider answers without telling the
 * resources. The request itself is seen here, by Node's own report of what its HTTP/2 servers are asked.
 * Source: diagnostics_channel in Node's documentation, "HTTP/2"; provider.proto of Pulumi.
 */
import { subscribe } from "node:diagnostics_channel";

const cancelPath = "/pulumirpc.ResourceProvider/Cancel";

/** A signal that is aborted when the engine asks this process to cancel. Node before 22.18 does not tell: then never. */
export function cancelSignal(): AbortSignal {
  const controller = new AbortController();
  subscribe("http2.server.stream.start", (message) => {
    if (pathOf(message) === cancelPath) controller.abort();
  });
  return controller.signal;
}

function pathOf(message: unknown): unknown {
  if (typeof message !== "object" || message === null || !("headers" in message)) return undefined;
  const { headers } = message;
  return typeof headers === "object" && headers !== null ? Reflect.get(headers, ":path") : undefined;
}
