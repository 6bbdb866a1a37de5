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

/**
 * An address or network as systemd shows it (systemd.resource-control(5), inet_ntop(3)): without the bits of its hosts, and without the length
 * of an address.
 */
export function canonicalNetwork(text: string): string {
  const [given = "", prefix] = text.split("/");
  // Without an interface, which only who listens has.
  const [address = ""] = given.split("%");
  const version = isIP(address);
  if (version === 0) throw new Error(`${text} is no address or network`);
  const bits = version === 4 ? 32 : 128;
  const length = prefix === undefined ? bits : Number(prefix);
  const bytes = (version === 4 ? bytesOf4(address) : bytesOf6(address)).map(
    (byte, index) => byte & (0xff00 >> Math.min(8, Math.max(0, length - 8 * index))),
  );
  const shown = version === 4 ? bytes.join(".") : shown6(bytes);
  return length === bits ? shown : `${shown}/${length}`;
}

function bytesOf4(address: string): number[] {
  return address.split(".").map(Number);
}

function bytesOf6(address: string): number[] {
  // What ends as an address of version 4 does comes out in the usual groups as well.
  const groups = new URL(`http://[${address}]`).hostname.slice(1, -1).split("::");
  const [head = [], tail = []] = groups.map((part) => part.split(":").filter((group) => group !== ""));
  const between = Array.from({ length: groups.length === 1 ? 0 : 8 - head.length - tail.length }, () => "0");
  return [...head, ...between, ...tail].flatMap((group) => {
    const value = Number.parseInt(group, 16);
    return [value >> 8, value & 0xff];
  });
}

function shown6(bytes: readonly number[]): string {
  const groups = Array.from(
    { length: 8 },
    (_, index) => ((bytes[2 * index] ?? 0) << 8) | (bytes[2 * index + 1] ?? 0),
  );
  const short = new URL(`http://[${groups.map((group) => group.toString(16)).join(":")}]`).hostname.slice(
    1,
    -1,
  );
  // As inet_ntop does where just the last two groups, or `ffff` and these, are left.
  const isMapped = groups.slice(0, 5).every((group) => group === 0) && groups[5] === 0xffff;
  const isCompatible = groups.slice(0, 6).every((group) => group === 0) && groups[6] !== 0;
  if (!isMapped && !isCompatible) return short;
  return `::${isMapped ? "ffff:" : ""}${bytes.slice(12).join(".")}`;
}

/** Why this is no address or network that may be a client; `undefined` when it is one. */
export function clientProblem(client: string): string | undefined {
  const [address = "", prefix, ...rest] = client.split("/");
  const version = isIP(address);
  const right = `"${client}" is not an address or network: write e.g. "10.0.0.2" or "10.0.0.0/24"`;
  if (version === 0 || address.includes("%") || rest.length > 0) return right;
  if (prefix === undefined) return undefined;
  if (!/^\d{1,3}$/.test(prefix) || Number(prefix) > (version === 4 ? 32 : 128)) return right;
  if (Number(prefix) === 0)
    return `"${client}" is everybody: name the addresses or networks that may connect`;
  return undefined;
}
