// Backs up every VM in vms.json, and keeps of each as many backups as `keep` says.
//
//   each VM: freeze ─▶ snapshots ─▶ thaw ─▶ NBD ─▶ backup server: NAME.GROUP.VOLUME.DAY.raw, verified
import { readFileSync } from "node:fs";
import * as pulumi from "@pulumi/pulumi";
import { listImages, VmBackup, type VmBackupVolume } from "pulumi-lvm-nbd";

interface Vm {
  name: string;
  /** SSH alias of the server it runs on, and the address at which the backup server reaches that. */
  host: string;
  listenAddress: string;
  volumes: VmBackupVolume[];
}

const keep = { daily: 7, weekly: 4, monthly: 12 };

// Asynchronous, since it first asks what is there: where that cannot be told, nothing is made or removed.
export = async () => {
  const config = new pulumi.Config();
  const host = config.require("backupHost");
  const folder = config.require("folder");
  // Where the disk of the backups is mounted: without it nothing is to be written to the disk below.
  const mountPoint = config.get("mountPoint");
  const today = config.get("today");
  const vms: Vm[] = JSON.parse(readFileSync(config.require("vms"), "utf8"));

  const made = await listImages(host, folder);
  const backups = vms.map(
    (vm) =>
      new VmBackup(vm.name, {
        host,
        folder,
        source: {
          host: vm.host,
          listenAddress: vm.listenAddress,
          // With a guest agent in the VM; without these lines the images are as after a power failure.
          quiesce: { freeze: `virsh domfsfreeze ${vm.name}`, thaw: `virsh domfsthaw ${vm.name}` },
        },
        volumes: vm.volumes,
        keep,
        made,
        ...(mountPoint ? { mountPoint } : {}),
        ...(today ? { now: new Date(today) } : {}),
      }),
  );
  return { kept: Object.fromEntries(vms.map((vm, index) => [vm.name, backups[index]?.keys])) };
};
