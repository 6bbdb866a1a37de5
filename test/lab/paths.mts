import { homedir } from "node:os";
import { join } from "node:path";

/** Everything this project keeps between runs: `${XDG_CACHE_HOME:-~/.cache}/lvm-nbd`. */
export function cacheDirectory(): string {
  return join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "lvm-nbd");
}

/** The lab's part of the cache: guest images and instances. */
export function labDirectory(): string {
  return join(cacheDirectory(), "lab");
}

/** Where the instances lie, one directory each. */
export function instancesDirectory(): string {
  return join(labDirectory(), "instances");
}
