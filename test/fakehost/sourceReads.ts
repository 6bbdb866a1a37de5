/** How a copy reads the snapshot on a fake server, in place of its scripts: those themselves run in test/linux. */
import { createHash } from "node:crypto";
import { checkDeviceScript } from "../../provider/linux/deviceCopy.js";
import { zeroRangesScript } from "../../provider/linux/zeroRanges.js";
import type { FakeServer } from "./server.js";

export function readSources(server: FakeServer): void {
  server.scripts.set(checkDeviceScript, (process) => {
    const [path = "", bytes] = process.argv.slice(4);
    const content = server.read(path);
    if (content === undefined) return 70;
    const whole = content.padEnd(Number(bytes), "\0");
    process.out(`${createHash("sha256").update(whole).digest("hex")}\n`);
    return 0;
  });
  // As where there is no perl.
  server.scripts.set(zeroRangesScript, () => 0);
}
