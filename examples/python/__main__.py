import pulumi
import pulumi_lvm_nbd as lvm_nbd

config = pulumi.Config()

vm1_snapshot = lvm_nbd.LvSnapshot(
    "vm1Snapshot",
    host=config.require("source"),
    volume_group=config.require("volumeGroup"),
    origin=config.require("origin"),
    size="20%ORIGIN",
)
vm1_export = lvm_nbd.NbdExport(
    "vm1Export",
    host=config.require("source"),
    device=vm1_snapshot.path,
    listen_address=config.require("listenAddress"),
    clients=[config.require("clientAddress")],
)
vm1_disk = lvm_nbd.NbdAttachment(
    "vm1Disk",
    host=config.require("client"),
    uri=vm1_export.uri,
)
vm1 = lvm_nbd.VmBackup(
    "vm1",
    host=config.require("backups"),
    folder="/var/backups",
    source={
        "host": config.require("source"),
        "listen_address": config.require("listenAddress"),
    },
    volumes=[
        {
            "volume_group": config.require("volumeGroup"),
            "origin": config.require("origin"),
            "size": "20%ORIGIN",
        },
    ],
    keep={
        "daily": 7,
        "weekly": 4,
        "monthly": 12,
    },
)

pulumi.export("device", vm1_disk.path)
pulumi.export("takenAt", vm1_snapshot.created_at)
pulumi.export("backups", vm1.keys)
