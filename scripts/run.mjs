// Runs one of the project's TypeScript scripts from any checkout, also a fresh clone: installs the
// dependencies when the lockfile has changed, builds when the sources have, and uses the Node that the
// dependencies bring (the system's may be too old to read TypeScript). Plain JavaScript for that reason.
//
//   node scripts/run.mjs SCRIPT [ARGUMENT...]
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const [script, ...args] = process.argv.slice(2);
if (script === undefined) {
  console.error("usage: node scripts/run.mjs SCRIPT [ARGUMENT...]");
  process.exit(2);
}

ensure("node_modules/.installed-for", digest(["package-lock.json"]), "installing the dependencies", () => {
  // npm's own Node is used here: the one in node_modules is about to be replaced.
  const path = (process.env.PATH ?? "").split(":").filter((entry) => !entry.includes("node_modules/.bin"));
  // Not `npm ci`: it refuses a lockfile made where packages of other platforms could not be seen.
  run("npm", ["install", "--no-save", "--no-audit", "--no-fund", "--loglevel=error"], {
    PATH: path.join(":"),
  });
});
const bin = join(root, "node_modules", ".bin");
const env = { PATH: `${bin}:${process.env.PATH ?? ""}` };
const sources = readdirSync(join(root, "provider"), { recursive: true })
  .map((file) => join("provider", String(file)))
  .filter((file) => file.endsWith(".ts"))
  .sort();
ensure(
  "dist/.built-from",
  digest([...sources, "tsconfig.json", "tsconfig.build.json"]),
  "building the provider",
  () => {
    // Into a folder of its own first: what was removed from the sources must not live on in dist.
    const fresh = join(root, "dist.new");
    rmSync(fresh, { recursive: true, force: true });
    run(
      join(bin, "node"),
      [join(root, "node_modules/typescript/bin/tsc"), "-p", "tsconfig.build.json", "--outDir", fresh],
      env,
    );
    rmSync(join(root, "dist"), { recursive: true, force: true });
    renameSync(fresh, join(root, "dist"));
  },
);

const child = spawn(join(bin, "node"), [join(root, script), ...args], {
  stdio: "inherit",
  env: { ...process.env, ...env },
});
// The child gets the terminal's Ctrl-C itself and decides when it is done; we only wait for it.
process.on("SIGINT", () => undefined);
process.on("SIGTERM", () => child.kill("SIGTERM"));
child.on("exit", (code, signal) => process.exit(code ?? 128 + constants.signals[signal ?? "SIGTERM"]));

/** Does the work unless the stamp says it was done for exactly this. */
function ensure(stamp, wanted, what, work) {
  const file = join(root, stamp);
  if (existsSync(file) && readFileSync(file, "utf8") === wanted) return;
  const start = Date.now();
  process.stderr.write(`${what} ...\n`);
  work();
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, wanted);
  process.stderr.write(`${what}: done in ${((Date.now() - start) / 1000).toFixed(0)} s\n`);
}

function digest(files) {
  const hash = createHash("sha256");
  for (const file of files)
    hash
      .update(file)
      .update("\0")
      .update(readFileSync(join(root, file)))
      .update("\0");
  return hash.digest("hex");
}

function run(command, argv, extra) {
  const { status, error } = spawnSync(command, argv, {
    cwd: root,
    stdio: ["ignore", process.stderr, process.stderr],
    env: { ...process.env, ...extra },
  });
  if (status === 0) return;
  console.error(`${command} ${argv.join(" ")} failed: ${error?.message ?? `exit code ${status}`}`);
  process.exit(1);
}
