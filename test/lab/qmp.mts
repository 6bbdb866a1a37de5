import { createConnection } from "node:net";
import { createInterface } from "node:readline";

/**
 * Gives one command to a QEMU over its QMP socket and returns the answer
 * (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html). Fails after the time limit: a QEMU that is
 * stopped by a signal still accepts connections.
 */
export async function qmp(
  socketPath: string,
  command: string,
  args: Readonly<Record<string, unknown>> = {},
  timeoutSeconds = 10,
): Promise<unknown> {
  const socket = createConnection(socketPath);
  const lines = createInterface({ input: socket });
  const abort = AbortSignal.timeout(timeoutSeconds * 1000);
  try {
    return await new Promise<unknown>((resolve, reject) => {
      const send = (execute: string, parameters: Readonly<Record<string, unknown>>): void => {
        socket.write(`${JSON.stringify({ execute, arguments: parameters })}\n`);
      };
      abort.addEventListener("abort", () =>
        reject(new Error(`QMP ${command}: no answer within ${timeoutSeconds} s`)),
      );
      socket.on("error", reject);
      lines.on("error", reject);
      lines.on("close", () => reject(new Error(`QMP ${command}: the connection ended`)));
      let negotiated = false;
      lines.on("line", (line) => {
        const message: unknown = JSON.parse(line);
        if (typeof message !== "object" || message === null) return;
        if ("QMP" in message) send("qmp_capabilities", {});
        else if ("error" in message) reject(new Error(`QMP ${command}: ${JSON.stringify(message.error)}`));
        else if ("return" in message) {
          if (negotiated) resolve(message.return);
          else {
            negotiated = true;
            send(command, args);
          }
        }
      });
    });
  } finally {
    lines.close();
    socket.destroy();
  }
}
