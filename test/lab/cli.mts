import { spawn } from "node:child_process";
import { join } from "node:path";
import { instanceNames, instancePlace, isOrphan, readRecord } from "./instance.mts";
import { labDown, labUp } from "./lab.mts";
import { sshGreets } from "./ssh.mts";
import { elapsed } from "./wait.mts";

const HELP = `Two real servers, server1 and server2, as QEMU guests on this machine.

  npm run lab -- up                     bring them up (the first time builds the guest image)
  npm run lab -- down                   end them and remove what is theirs
  npm run lab -- reset                  bring them back to the clean state
  npm run lab -- ssh HOST [COMMAND...]  a shell, or one command, on a server; HOST is server1 or server2 (as
                                        root), server1-operator or server2-operator (with sudo)
  npm run lab -- status                 what is running

LAB_NAME=NAME before it means another lab than "default"; labs run beside each other.
`;

const log = (line: string): void => console.error(line);

async function main(args: readonly string[]): Promise<number> {
  const name = process.env.LAB_NAME || "default";
  const started = performance.now();
  switch (args[0]) {
    case "up": {
      const lab = await labUp({ name, keep: true, log });
      console.log(`SSH: ssh -F ${lab.sshConfigPath} server1`);
      return 0;
    }
    case "down":
      console.log(
        (await labDown(name)) ? `lab: "${name}" is down (${elapsed(started)})` : `lab: "${name}" was not up`,
      );
      return 0;
    case "reset": {
      const lab = await labUp({ name, keep: true, log });
      await lab.reset();
      console.log(`lab: "${name}" is in the clean state (${elapsed(started)})`);
      return 0;
    }
    case "ssh":
      return openSsh(name, args.slice(1));
    case "status":
      await printStatus();
      return 0;
    default:
      console.log(HELP);
      return args.length === 0 || args[0] === "help" || args[0] === "--help" ? 0 : 2;
  }
}

async function openSsh(name: string, args: readonly string[]): Promise<number> {
  const { directory } = instancePlace(name);
  if (args[0] === undefined) throw new Error("lab: which server? npm run lab -- ssh server1");
  if ((await readRecord(directory)) === undefined)
    throw new Error(`lab: "${name}" is not up: npm run lab -- up`);
  const child = spawn("ssh", ["-F", join(directory, "ssh_config"), ...args], { stdio: "inherit" });
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => resolve(code ?? 1));
  });
}

async function printStatus(): Promise<void> {
  const names = await instanceNames();
  if (names.length === 0) console.log("lab: none is up");
  for (const name of names) {
    const record = await readRecord(instancePlace(name).directory);
    if (record === undefined) {
      console.log(`${name}: half up or half down; npm run lab -- down clears it`);
      continue;
    }
    const owner = record.keep ? "kept" : `of process ${record.owner.pid}`;
    console.log(`${name} (${owner}${(await isOrphan(record)) ? ", which is gone" : ""})`);
    for (const [guest, port] of Object.entries(record.ports)) {
      console.log(`  ${guest}: 127.0.0.1:${port} ${(await sshGreets(port)) ? "answers" : "does not answer"}`);
    }
  }
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code;
  },
  (error: unknown) => {
    console.error(error instanceof Error ? error.message : error);
    process.exitCode = 1;
  },
);
