/** Addresses and networks of IP, as far as inputs need them. */
import { isIP } from "node:net";

/** True for 127.0.0.0/8 and ::1. */
export function isLoopback(address: string): boolean {
  return address === "::1" || (isIP(address) === 4 && address.startsWith("127."));
}

/** True for the address that stands for all interfaces. */
export function isAnyAddress(address: string): boolean {
  return address === "0.0.0.0" || (isIP(address) === 6 && /^[0:]+$/.test(address));
}

/** Why this is no address or network that may be a client; `undefined` when it is one. */
export function clientProblem(client: string): string | undefined {
  const [address = "", prefix, ...rest] = client.split("/");
  const version = isIP(address);
  const right = `"${client}" is not an address or network: write e.g. "10.0.0.2" or "10.0.0.0/24"`;
  if (version === 0 || rest.length > 0) return right;
  if (prefix === undefined) return undefined;
  if (!/^\d{1,3}$/.test(prefix) || Number(prefix) > (version === 4 ? 32 : 128)) return right;
  if (Number(prefix) === 0)
    return `"${client}" is everybody: name the addresses or networks that may connect`;
  return undefined;
}
