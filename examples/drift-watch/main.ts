/**
 * Looks at the servers of a stack, changes nothing, and writes report.txt, report.json and lvm_nbd.prom.
 *
 *   node main.ts --project DIR --stack NAME --out DIR [--max-age-hours 26] [--deadline-seconds 900]
 *
 * Exit status: 0 nothing has drifted; 1 something has, or a VM has no fresh backup; 2 it cannot be told.
 */

/** Node's own status after an error is 1, which would pass for drift: here that is 2. */
function cannotTell(error: unknown): never {
  console.error(error);
  process.exit(2);
}

process.on("uncaughtException", cannotTell);
try {
  // Not imported above: a module that is missing is such an error too.
  const { watch } = await import("./watch.ts");
  process.exitCode = await watch(process.argv.slice(2));
} catch (error) {
  cannotTell(error);
}
