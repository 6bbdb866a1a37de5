// Keeps a moment of a VM's disk and lets another server read it.
//
//   source:  LV-VM1 ──snapshot──▶ LV-VM1-backup ──NBD──▶ client: /dev/lvm-nbd/vm1
import * as pulumi from "@pulumi/pulumi";
import { LvSnapshot, NbdAttachment, NbdExport } from "pulumi-lvm-nbd";

const config = new pulumi.Config();
const source = config.require("source");

const snapshot = new LvSnapshot("vm1", {
  host: source,
  volumeGroup: config.require("volumeGroup"),
  origin: config.require("origin"),
  name: `${config.require("origin")}-backup`,
  size: config.require("size"),
  // A new value takes a new snapshot: `pulumi config set moment "$(date -I)"`.
  triggers: [config.get("moment") ?? "first"],
});

const exported = new NbdExport("vm1", {
  host: source,
  device: snapshot.path,
  listenAddress: config.require("listenAddress"),
  clients: [config.require("clientAddress")],
  server: config.require("server") as "nbdkit" | "nbd-server" | "qemu-nbd",
});

const attachment = new NbdAttachment("vm1", {
  host: config.require("client"),
  uri: exported.uri,
});

export const takenAt = snapshot.createdAt;
export const device = attachment.path;
export const uri = exported.uri;
