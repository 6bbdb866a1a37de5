/**
 * Every error the provider raises: one class, one stable code each, and a sentence that says what to do.
 * The table in the README is made from `errorCodes`, so a code is explained in exactly one place.
 */

/** What each code means and, in general, what to do about it. */
export const errorCodes = {
  INVALID_INPUT: "An argument cannot be right; the message names the property and what would be. Correct it.",
  HOST_UNKNOWN:
    "The host is in neither `lvm-nbd:hosts` nor the SSH configuration, and is not a resolvable name. Correct it, or add it to one of them.",
  HOST_UNREACHABLE:
    "No SSH connection could be made. Nothing was changed and the state was kept. Check network, address and sshd; run again.",
  HOST_KEY_UNKNOWN:
    "The host's key is neither pinned nor in known_hosts. Compare the printed fingerprint with the host's own, then pin it with `hostKey` or add it to known_hosts.",
  HOST_KEY_MISMATCH:
    "The host shows another key than the pinned or known one: it was reinstalled, or somebody is in between. Find out which before you change the pin.",
  HOST_CHANGED:
    "The host is another machine than the one the resource was made on, or does not tell which one it is. Nothing was touched, and nothing is taken for gone. Put the address right, or accept the machine as the message says.",
  AUTH_FAILED:
    "The host accepts none of the offered keys or passwords for this user. Add a key to its authorized_keys, or name another by `privateKeyPath`. What was changed in `lvm-nbd:hosts` reaches `pulumi refresh` and `destroy` by a `pulumi up`, or with `--run-program`.",
  KEY_UNREADABLE:
    "A private key file is missing, unreadable, encrypted without a passphrase, or not a private key. Name another, or give `passphrase`.",
  SUDO_DENIED:
    "The user may not run commands as root with `sudo -n`. Let it run what `npx lvm-nbd sudoers USER` lists (again after each new version of this package), or anything, or connect as root.",
  LINK_LOST:
    "The SSH connection broke while a command was running; whether it took effect is unknown. The next `pulumi up` looks and goes on from there.",
  COMMAND_FAILED:
    "A command on the host failed; its exit code and stderr are in the message. Put right what it names and run again: what is done already is left alone.",
  COMMAND_TIMED_OUT:
    "A command passed its deadline and was stopped on the host. A hanging LVM or NBD command points to a dead device or a held lock: find it on the host, end it, run again.",
  OUTPUT_UNREADABLE:
    "A command printed what the provider cannot read. It concludes nothing from that; the state was kept. Run the command by hand on the host, mend what disturbs it, run again.",
  OUTPUT_TOO_LARGE:
    "A command printed more than can be right and was stopped. Run it by hand on the host to see why.",
  CANCELLED:
    "The operation was cancelled; the remote command was stopped. The next `pulumi up` goes on from there.",
  OPERATION_TIMED_OUT:
    "The time that `customTimeouts` gives the operation has passed; the remote command was stopped. Give it more and run again: it goes on from what is there.",
  LVM_LOCKED: "Another LVM command holds the volume group's lock. Run again when it has finished.",
  PROGRAM_MISSING:
    "A program the operation needs is not installed on the host; the message names its package. Install it, or let a HostSetup do so, and run again.",
  VERSION_VULNERABLE:
    "A program that the host needs has a known hole; the message names the version that has it no more. Nothing was set up. Upgrade it, or choose another `server`.",
  MODULE_MISSING:
    "The host's kernel lacks a module, nbd or a file system's; the message names it. Install the package of the kernel's modules that holds it, or use another host.",
  VOLUME_GROUP_NOT_FOUND:
    "The volume group does not exist on the host, or its disks are not there. Correct `volumeGroup`, or bring the disks back; nothing is taken for gone meanwhile.",
  ORIGIN_NOT_FOUND: "The origin logical volume does not exist on the host. Correct `origin`.",
  ORIGIN_UNSUITABLE:
    "The origin cannot be snapshotted or restored as declared: it is itself a COW snapshot or an internal volume, is being merged, is half-written by a restore from an image, needs a `size`, or has snapshots beside which LVM merges none. Choose another origin, or give or remove what the message names.",
  NO_SPACE:
    "The volume group, the thin pool, or the disk of an image has too little free space. Remove what is not needed, extend it (vgextend, lvextend), or choose a smaller `size` or another `file`.",
  SNAPSHOT_NOT_FOUND:
    "The snapshot does not exist on the host, or not of that origin. Nothing was touched. Name one of those that the message lists.",
  SNAPSHOT_OVERFLOWED:
    "The snapshot's store ran full, its content is lost. `pulumi up` replaces it by a new one of now; give it a larger `size`.",
  SNAPSHOT_MERGING:
    "The snapshot is being merged into its origin and cannot be changed. Run again when that has ended.",
  QUIESCE_FAILED:
    "The `freeze` command failed, or took too long; no snapshot was kept and `thaw` was run. Put right what its stderr names and run again.",
  THAW_FAILED:
    "The snapshot was taken but `thaw` failed: the VM may still stand still. Thaw it by hand NOW, then run `pulumi up` again.",
  VOLUME_SUSPENDED:
    "A volume is suspended: an LVM command was killed half-way, and the VM that uses the volume stands still. Run `lvchange --refresh VG/LV` on the host NOW.",
  VOLUME_IN_USE:
    "The volume is open; the message names who holds it. Nothing was removed. End what holds it and run again.",
  FOREIGN_RESOURCE:
    "Something of that name exists and does not carry this resource's mark; the message names its owner. Choose another name, or set `adopt: true` to take over an unmarked one.",
  IDENTITY_MISMATCH:
    "What now bears the name is not the thing this resource made. Nothing was touched. Run `pulumi refresh`.",
  DEVICE_NOT_FOUND: "The device does not exist on the host. Correct `device`, or activate the volume.",
  DEVICE_NOT_BLOCK: "The path is not a block device. Name one, e.g. `/dev/VG/LV`.",
  DEVICE_UNREADABLE:
    "The device exists but cannot be read, e.g. an overflowed snapshot; dd's words are in the message. Run `pulumi up --refresh`, which takes an overflowed one anew.",
  FILE_NOT_FOUND:
    "The image does not exist on the host. Correct `file`, or mount the disk that it is on, and run again.",
  FILE_UNSUITABLE:
    "The file cannot be served, or an image not be written or removed there: it is no regular file, a symbolic link, changeable by others than root (itself or a folder above it), not readable for a root without capabilities, no image of the declared `format`, or one that needs another file; the message says which. Nothing was touched. Name another `file`, put owners and modes right, or correct `format`.",
  PORT_IN_USE: "Another program listens on that address and port. Choose another `port`, or stop it.",
  ADDRESS_NOT_LOCAL: "The listen address is not an address of the host. Choose one that `ip address` lists.",
  EXPORT_NOT_SERVING:
    "The server started but a real NBD handshake did not succeed, or showed another size. Its last log lines are in the message. Put right what they name and run again.",
  CLIENTS_NOT_ENFORCED:
    "The host's systemd or kernel does not enforce `clients` (no BPF firewall for control groups), so everybody could read the disk. The export was stopped. Use a host with unified control groups, or listen on loopback; or, if a firewall lets in nobody else, set `clientsEnforcedElsewhere: true`.",
  TLS_UNSUPPORTED:
    "The host cannot serve with TLS; the message says what lacks it. Nothing was touched. Update that, or choose another `server`.",
  TLS_NOT_ENFORCED:
    "The server let a client in without TLS, or without a certificate: it was built without TLS, or its configuration is not obeyed. The export was stopped. Choose another `server`.",
  EXPORT_UNREACHABLE:
    "The export cannot be reached from the attaching host: not running, blocked, not in `clients`, or another name. Look at the export and at the network between the hosts, then run again.",
  DEVICE_IN_USE:
    "The NBD device is mounted or held; the message names the holder. Nothing was detached. End what holds it and run again.",
  NO_FREE_DEVICE: "No NBD device is free on the host. Detach what is not needed.",
  DIRECTORY_NOT_FOUND:
    "The folder of `file` does not exist on the host, or cannot be written. Create it, mount what belongs there, or correct `file`.",
  NOT_MOUNTED:
    "Nothing is mounted at `mountPoint`, so the image would go to the disk below it. Nothing was written. Mount the disk of the images and run again.",
  ANOTHER_FILE_SYSTEM:
    "The copy is not there, and its folder is on another file system than when it was made: the disk of the backups is probably not mounted. Nothing is taken for gone. Mount it and run again. If the disk was replaced for good, so that its copies are lost, take them out of the state with `pulumi state delete URN` (`pulumi stack --show-urns` lists them), and run again: they are copied anew.",
  FILE_IN_USE:
    "The file is open, or exported; the message names who holds it. Nothing was replaced or removed. End what holds it and run again.",
  COPY_FAILED:
    "The copy broke off; what had been copied was removed, and an earlier copy of that name is untouched. The last lines of the job are in the message. Put right what they name and run again.",
  COPY_MISMATCH:
    "The image does not read back as what the source serves. It was removed, and an earlier copy of that name is untouched. Check the destination's disk and memory, and that the source is a snapshot and nothing that is written meanwhile; run again.",
  SNAPSHOT_INACTIVE:
    "The snapshot is not active, so LVM cannot tell whether it is valid. Nothing was changed, and what was copied is kept. Activate its volume group (`vgchange -ay`) and run again.",
  COPY_STALLED:
    "The copy made no progress for minutes; it was stopped and removed. Look at the export, at the network and at the destination's disk, then run again.",
  SOURCE_STALLED:
    "A source came no further for minutes while it was read on its own host, to be compared with its copy. What was copied is kept. Look at that host's disks (`dmesg`); the next `pulumi up` goes on.",
  COPY_UNCERTIFIED:
    "The snapshot was removed, made writable, or is being merged, before the copy was certified: whether all that was read is its moment cannot be told, so the image was removed. Run `pulumi up --refresh`, which takes the snapshot anew.",
  IMAGE_CORRUPT:
    "The image does not read as the `sha256` that was declared: it was changed since, or `uri` serves another one. Nothing was written. Check that `uri` serves the image of that checksum; if it does, its disk has spoiled it: restore from another backup.",
  RESTORE_OVERFLOWS:
    "Restoring would overflow other COW snapshots of the origin, since it writes to that. Nothing was touched. Extend or remove those that the message names, and run again.",
  RESTORE_FAILED:
    "The kernel gave up a merge half-way, for an I/O error. Use nothing of the origin until it goes on. Look at `dmesg`, put the disk right, activate the origin anew; the next `pulumi up` follows the merge.",
  RESTORE_STALLED:
    "A merge has made no progress for minutes; it was not stopped. Look at what the message names. The next `pulumi up` follows it on.",
  RESTORE_UNCERTAIN:
    "What the origin holds cannot be told. A restore was cut off in the very moment in which it began, or its merge was not seen to have ended, and its snapshot is gone since: it may have been merged or removed. Or the state and the marks on the origin tell of different restores. Nothing is restored for that. Look at the origin's content, and do what the message says for the case it is in.",
  ATTACHMENT_DEAD:
    "The attachment is there, but a read through it fails or takes too long. Look at the export and at the network, then run `pulumi up --refresh`.",
  PARTITION_NOT_FOUND:
    "The disk has no such partition; the message lists those there are, with what they hold. Correct `partition`.",
  NOT_MOUNTABLE:
    "What lies on the device is no file system, or none that can be mounted without a write; the message names it. Nothing was touched. Name another `partition` or `device`, or read it in a virtual machine.",
  MOUNT_POINT_UNSUITABLE:
    "Nothing can be mounted at `path`: it is no folder, not empty, reached through a symbolic link, below a folder that others than root can change, in /etc/fstab, or something else is mounted there; the message says which. Nothing was touched. Choose another `path`, or clear this one.",
  MOUNT_IN_USE:
    "The file system is in use; the message names the processes. Nothing was unmounted. End them, or let them leave the folder, and run again.",
  MOUNT_FAILED:
    "The file system could not be mounted; the kernel's or mount's words are in the message. Look at `journalctl -k` on the host; a snapshot of a running VM may hold a file system that is damaged until its journal is replayed.",
} as const;

/** A stable name for a kind of failure, to be matched by programs and looked up by people. */
export type ErrorCode = keyof typeof errorCodes;

/** What is known about a failure. Everything here may be shown to a person: no secret belongs in it. */
export interface ErrorDetails {
  /** What failed, in one sentence without the code. */
  readonly message: string;
  /** The host it happened on, as the user names it. */
  readonly host?: string | undefined;
  /** The resource, e.g. `NbdExport vm1`. */
  readonly resource?: string | undefined;
  /** The input property at fault, e.g. `size`. */
  readonly property?: string | undefined;
  /** The remote command as one could paste it, secrets masked. */
  readonly command?: string | undefined;
  readonly exitCode?: number | undefined;
  /** The end of the command's stderr. */
  readonly stderr?: string | undefined;
  /** What to do, when more can be said than the code's general advice. */
  readonly advice?: string | undefined;
  readonly cause?: unknown;
}

/** The only error class of the provider. `message` is the whole text a person needs. */
export class LvmNbdError extends Error {
  readonly code: ErrorCode;
  readonly details: ErrorDetails;

  constructor(code: ErrorCode, details: ErrorDetails) {
    super(render(code, details), details.cause === undefined ? undefined : { cause: details.cause });
    this.name = "LvmNbdError";
    this.code = code;
    this.details = details;
  }

  /** The same failure with more known about where it happened; what is set already is kept. */
  with(extra: Pick<ErrorDetails, "host" | "resource">): LvmNbdError {
    return new LvmNbdError(this.code, {
      ...this.details,
      host: this.details.host ?? extra.host,
      resource: this.details.resource ?? extra.resource,
    });
  }
}

/** True for an `LvmNbdError`, with one of the codes if any are given. */
export function isLvmNbdError(error: unknown, ...codes: ErrorCode[]): error is LvmNbdError {
  return error instanceof LvmNbdError && (codes.length === 0 || codes.includes(error.code));
}

/** Characters of a message that are shown. */
const longestMessage = 8000;

function render(code: ErrorCode, details: ErrorDetails): string {
  const where = [details.resource, details.host && `host ${details.host}`].filter(Boolean).join(" on ");
  const lines = [`${code}: ${where ? `${where}: ` : ""}${continued(printable(shortened(details.message)))}`];
  if (details.command !== undefined) lines.push(`  command: ${printable(details.command)}`);
  if (details.exitCode !== undefined) lines.push(`  exit code: ${details.exitCode}`);
  const stderr = printable((details.stderr ?? "").slice(-2000)).trim();
  if (stderr !== "") lines.push(`  stderr: ${continued(stderr)}`);
  lines.push(`  ${whatToDo(code, details)}`);
  return lines.join("\n");
}

function whatToDo(code: ErrorCode, { advice }: ErrorDetails): string {
  return `what to do: ${printable(advice ?? errorCodes[code])}`;
}

/** What failed and what to do about it, in one line, for messages of what has not failed yet. */
export function briefly(error: LvmNbdError): string {
  return `${firstLine(error)} (${whatToDo(error.code, error.details)})`;
}

/** Further lines stand below the first one's text: none that a host wrote can be taken for a line of ours. */
function continued(text: string): string {
  return text.replaceAll("\n", "\n          ");
}

/** A message may hold what a host wrote, which has no end if that host so wishes. */
function shortened(message: string): string {
  return message.length <= longestMessage ? message : `${message.slice(0, longestMessage)}...`;
}

/** A host's output may hold terminal escape codes, and marks that turn the order of what is read: they never reach the person's terminal. */
export function printable(text: string): string {
  return text.replaceAll("\r\n", "\n").replace(
    // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g,
    "?",
  );
}

/** The first line of what was thrown, for messages that tell of a second failure. */
export function firstLine(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).split("\n")[0] ?? "";
}
