/** The chains as a playbook makes and removes them, as the user that ours logs in as, over connections that are kept. */
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { buildOnce, isOnPath, type Program } from "../lab/buildOnce.mts";
import { runChild } from "../lab/child.mts";
import type { Lab } from "../lab/lab.mts";
import { cacheDirectory } from "../lab/paths.mts";
import { type Chain, storeMiB, volumeGroup } from "./chain.mts";

const name = "ansible-playbook";
const version = "2.19.14";

/** The program on PATH, else that of PyPI's package, put into the cache. Throws where that cannot be had. */
export async function ensureAnsible(log: (line: string) => void): Promise<string> {
  if (await isOnPath(name, process.env.PATH ?? "")) return name;
  const bin = join(cacheDirectory(), "ansible", version);
  const environment = join(bin, "environment");
  const program: Program = {
    name,
    async make(target) {
      log(`installing Ansible ${version} into the cache`);
      await rm(environment, { recursive: true, force: true });
      await runChild(["python3", "-m", "venv", environment]);
      const pip = [join(environment, "bin", "pip"), "install", "--quiet"];
      await runChild([...pip, `ansible-core==${version}`], { timeoutSeconds: 600 });
      const start = `#!/bin/sh\nexec '${join(environment, "bin", name)}' "$@"\n`;
      await writeFile(target, start, { mode: 0o755 });
    },
  };
  await buildOnce(bin, [program], "Ansible", log);
  return join(bin, name);
}

/** Runs one of the playbooks. */
export async function playbook(
  program: string,
  file: "up.yaml" | "down.yaml",
  lab: Lab,
  all: readonly Chain[],
): Promise<void> {
  const variables = {
    ...{ chains: all, group: volumeGroup, store: `${storeMiB}M`, address: lab.server1.privateAddress },
    ansible_python_interpreter: "/usr/bin/python3",
  };
  const argv = [program, "-i", "server1,server2,", "-e", JSON.stringify(variables)];
  await runChild([...argv, join(import.meta.dirname, "ansible", file)], {
    env: {
      ...process.env,
      ANSIBLE_PIPELINING: "True",
      ANSIBLE_SSH_ARGS: `-F ${lab.operatorConfigPath} -o ControlMaster=auto -o ControlPersist=60s`,
      ANSIBLE_SSH_CONTROL_PATH_DIR: join(lab.directory, "ansible"),
      ANSIBLE_LOCALHOST_WARNING: "False",
    },
    timeoutSeconds: 1800,
  });
}
