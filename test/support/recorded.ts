/** Outputs recorded on the lab's servers (Debian 12, lvm2 2.03.16). */
import { readFileSync } from "node:fs";
import { join } from "node:path";

/** What `lvsCommand` printed in that state of the server. */
export function recordedLvs(
  state: "empty" | "valid" | "overflowed" | "merging" | "inactive" | "thin" | "poolFull",
): string {
  return readFileSync(join(process.cwd(), "test", "recorded", `${state}.json`), "utf8");
}
