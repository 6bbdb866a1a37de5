/**
 * The chains as an administrator's script makes and removes them: one SSH session a host, as the user that ours logs in as, one
 * command after the other.
 */
import { runChild } from "../lab/child.mts";
import type { Lab } from "../lab/lab.mts";
import { type Chain, storeMiB, volumeGroup } from "./chain.mts";

async function onHost(lab: Lab, host: "server1" | "server2", commands: readonly string[]): Promise<void> {
  await runChild(["ssh", "-F", lab.operatorConfigPath, "-o", "BatchMode=yes", host, "sudo -n sh -s"], {
    stdin: ["set -e", ...commands, ""].join("\n"),
    timeoutSeconds: 600,
  });
}

export async function handUp(lab: Lab, all: readonly Chain[]): Promise<void> {
  const address = lab.server1.privateAddress;
  await onHost(
    lab,
    "server1",
    all.flatMap(({ origin, name, port }) => [
      `lvcreate -qq -s -y -p r -L ${storeMiB}M -n ${name} ${volumeGroup}/${origin}`,
      `nbdkit -r -i ${address} -p ${port} -P /run/${name}.pid file file=/dev/${volumeGroup}/${name} cache=none`,
    ]),
  );
  await onHost(lab, "server2", [
    "modprobe nbd",
    ...all.map(
      ({ name, port, device }) => `nbd-client -N ${name} ${address} ${port} ${device} -timeout 30 -readonly`,
    ),
  ]);
}

export async function handDown(lab: Lab, all: readonly Chain[]): Promise<void> {
  await onHost(
    lab,
    "server2",
    all.map(({ device }) => `nbd-client -d ${device}`),
  );
  await onHost(
    lab,
    "server1",
    all.flatMap(({ name }) => [
      `pid=$(cat /run/${name}.pid); kill "$pid"`,
      // A volume that is still open is not removed.
      `while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; rm /run/${name}.pid`,
      `lvremove -qq -y ${volumeGroup}/${name}`,
    ]),
  );
}
