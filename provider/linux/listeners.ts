/** Listening TCP sockets as `ss -Hltnp` prints them. Source: ss(8). */
import { isAnyAddress } from "./addresses.js";

export interface Listener {
  /** Address with port, as printed. */
  readonly address: string;
  readonly host: string;
  readonly program: string | undefined;
  readonly pids: readonly number[];
}

export function parseListeners(stdout: string): Listener[] {
  return stdout
    .split("\n")
    .filter((line) => line.trim() !== "")
    .map((line) => {
      const columns = line.trim().split(/\s+/);
      const address = columns[0] === "LISTEN" ? columns[3] : columns[2];
      if (address === undefined || !address.includes(":"))
        throw new Error(`ss: unexpected line "${line.slice(0, 80)}"`);
      const program = /\(\("([^"]*)",pid=/.exec(line)?.[1];
      const pids = [...line.matchAll(/,pid=(\d+)/g)].map((match) => Number(match[1]));
      const host = address
        .slice(0, address.lastIndexOf(":"))
        .replace(/%.*$/, "")
        .replace(/^\[(.*)\]$/, "$1");
      return { address, host, program, pids };
    });
}

/** Those that keep another program from listening on the address, on the port they were asked for. */
export function listenersOn(listeners: readonly Listener[], address: string): Listener[] {
  const wildcard = (host: string) => host === "*" || isAnyAddress(host);
  return listeners.filter(({ host }) => host === address || wildcard(host) || isAnyAddress(address));
}
