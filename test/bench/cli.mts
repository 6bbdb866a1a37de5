/** `npm run bench`: all of them, one after the other. `npm run bench -- NAME [ARGUMENT...]`: one. */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { say } from "./figures.mts";

/** What each measures, and minutes that it takes on 2 cores. */
const benches: Readonly<Record<string, string>> = {
  plugin: "the plugin's start and memory (2 minutes)",
  scale: "up to 1,000 hosts with ten resources each (12 minutes)",
  startup: "the dynamic provider's first answer beside that of an empty one (1 minute)",
  tls: "what TLS costs a copy (5 minutes)",
  copies: "copies beside dd, nbdcopy and qemu-img (25 minutes)",
  chains: "chains beside a hand-written script and the engine alone (30 minutes)",
};

const [chosen, ...args] = process.argv.slice(2);
if (chosen !== undefined && !Object.hasOwn(benches, chosen)) {
  process.stderr.write(`usage: npm run bench [-- ${Object.keys(benches).join("|")} [ARGUMENT...]]\n`);
  process.exit(2);
}

const names = chosen === undefined ? Object.keys(benches) : [chosen];
const failed: string[] = [];
for (const [at, name] of names.entries()) {
  say(`\n== ${name} (${at + 1} of ${names.length}): ${benches[name]}`);
  const began = performance.now();
  const { status } = spawnSync(process.execPath, [join(import.meta.dirname, `${name}.mts`), ...args], {
    stdio: "inherit",
  });
  if (status !== 0) failed.push(name);
  say(
    `== ${name}: ${status === 0 ? "done" : "FAILED"} after ${Math.round((performance.now() - began) / 1000)} s`,
  );
}
if (failed.length > 0) {
  say(`\nfailed: ${failed.join(", ")}`);
  process.exit(1);
}
