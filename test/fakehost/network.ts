/** The network between fake servers: who listens where, and who may reach whom. */
import { BlockList, isIP } from "node:net";
import { isAnyAddress, isLoopback } from "../../provider/linux/addresses.js";

/** A server program that accepts NBD clients. */
export interface Listener {
  readonly pid: number;
  readonly program: string;
  readonly address: string;
  readonly port: number;
  readonly exportName: string;
  readonly readOnly: boolean;
  /** Addresses and networks that the kernel lets through; `undefined`: all. */
  readonly allowed: readonly string[] | undefined;
  /** Bytes that a client sees; `undefined`: the device cannot be opened, and the client is turned away. */
  size(): number | undefined;
  /** What a read gives; `undefined`: an I/O error. */
  read(): string | undefined;
  /** Alive, but not answering (as after SIGSTOP). */
  frozen: boolean;
}

export interface Endpoint {
  readonly address: string;
  readonly port: number;
  readonly exportName: string;
}

export type Answer =
  | { readonly listener: Listener }
  | { readonly failure: "refused" | "timeout" | "unknown export" };

export class Network {
  private readonly listeners = new Map<string, Set<Listener>>();
  /** Listeners that a device is connected to. */
  readonly readers = new Set<Listener>();
  /** Addresses whose link to the others is cut. */
  readonly cut = new Set<string>();

  /** The listeners of the host with that address. */
  of(hostAddress: string): Set<Listener> {
    const there = this.listeners.get(hostAddress) ?? new Set();
    this.listeners.set(hostAddress, there);
    return there;
  }

  /** What keeps another program from listening there. */
  conflict(hostAddress: string, address: string, port: number): Listener | undefined {
    return [...this.of(hostAddress)].find(
      (other) =>
        other.port === port &&
        (other.address === address || isAnyAddress(other.address) || isAnyAddress(address)),
    );
  }

  /** A client on the host `from` asks for an export. */
  connect(from: string, { address, port, exportName }: Endpoint): Answer {
    const home = isLoopback(address) ? from : address;
    if (home !== from && (this.cut.has(home) || this.cut.has(from))) return { failure: "timeout" };
    const listener = [...this.of(home)].find(
      (one) => one.port === port && (one.address === address || isAnyAddress(one.address)),
    );
    if (listener === undefined) return { failure: "refused" };
    if (listener.frozen || !allows(listener.allowed, isLoopback(address) ? "127.0.0.1" : from))
      return { failure: "timeout" };
    return listener.exportName === exportName && listener.size() !== undefined
      ? { listener }
      : { failure: "unknown export" };
  }
}

function allows(allowed: readonly string[] | undefined, client: string): boolean {
  if (allowed === undefined) return true;
  const list = new BlockList();
  for (const one of allowed) {
    if (one === "any") return true;
    if (one === "localhost") list.addSubnet("127.0.0.0", 8);
    else if (isIP(one) !== 0) list.addAddress(one);
    else list.addSubnet(one.split("/")[0] ?? "", Number(one.split("/")[1]));
  }
  return list.check(client);
}
