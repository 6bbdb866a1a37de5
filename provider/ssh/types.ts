/** What the rest of the provider sees of SSH: a host on which commands run. */

/** A command to run on a host. It is an argument array; quoting happens in one place, in `quoting.ts`. */
export interface RemoteCommand {
  /** Program and arguments. A script is `["sh", "-c", SCRIPT, "sh", ...arguments]` with a constant SCRIPT. */
  readonly argv: readonly string[];
  /** Written to the command's stdin, which is then closed. Default: empty stdin. Secrets may travel here. */
  readonly stdin?: string | undefined;
  /** The command is stopped on the host (TERM, then KILL) when it has run this long. */
  readonly deadlineSeconds: number;
  /**
   * `read`: looks only, so it is run again after a lost link. `change`: is never blindly repeated; a lost
   * link is `LINK_LOST`, and the caller observes before it goes on.
   */
  readonly kind: "read" | "change";
  /**
   * Of a `read`: one answer serves all who ask for the same before it has begun. `oldestSeconds`: so does one that was begun at most
   * so long ago on the same machine, if this process has changed nothing on any host since. Default: none is shared.
   */
  readonly shared?: { readonly oldestSeconds: number } | undefined;
  /**
   * Of a `read` that goes on for minutes and hours: it has a connection of its own, which ends with it. A host may open one or two
   * sessions a connection (MaxSessions in sshd_config(5)), and everything else would wait for it. Its user sees to it that they are few.
   */
  readonly ownConnection?: boolean | undefined;
  /** Seconds between TERM and KILL, e.g. to let a script's trap run. Default 5. */
  readonly graceSeconds?: number | undefined;
  /** Called with what it prints on stdout, as it comes: of one that is run again, from the beginning. Must not throw. */
  readonly onOutput?: ((text: string) => void) | undefined;
  /** Bytes of stdout or stderr after which the command is stopped with `OUTPUT_TOO_LARGE`. Default 16 MiB. */
  readonly maxOutputBytes?: number | undefined;
}

/** What a command that ran to its end left. A non-zero exit code is a result, not an exception. */
export interface CommandResult {
  readonly exitCode: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A host as the user declares it, in detail. */
export interface HostConnection {
  /** Name or address of the SSH server. */
  readonly address: string;
  /** Default 22. */
  readonly port?: number | undefined;
  /** Default `root`. */
  readonly user?: string | undefined;
  /** Private key, PEM or OpenSSH text. */
  readonly privateKey?: string | undefined;
  /** File of the private key on the machine that runs Pulumi; `~/` is the home folder. */
  readonly privateKeyPath?: string | undefined;
  /** For an encrypted private key. */
  readonly passphrase?: string | undefined;
  readonly password?: string | undefined;
  /** Agent socket; `true` takes SSH_AUTH_SOCK. The default offers the agent if no key or password is given. */
  readonly agent?: string | boolean | undefined;
  /** The only accepted host key(s): `ssh-ed25519 AAAA...` lines or `SHA256:...` fingerprints. Default: known_hosts. */
  readonly hostKey?: string | readonly string[] | undefined;
  /** known_hosts files to consult instead of ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts. */
  readonly knownHostsPath?: string | readonly string[] | undefined;
  /** Run commands as root by `sudo -n`. Default: true unless `user` is root. */
  readonly sudo?: boolean | undefined;
  /** Jump through these hosts first, in order. */
  readonly proxyJump?: string | HostConnection | readonly (string | HostConnection)[] | undefined;
}

/** A host: an alias (or plain name) resolved by the user's SSH configuration, or all details. */
export type HostArgs = string | HostConnection;

/** Hosts by the names that the provider's configuration gives them, which go before the SSH configuration's aliases. */
export type NamedHosts = ReadonlyMap<string, HostConnection>;

/** An open host. Made by the pool; one TCP connection each, however many commands run at once, but for those with one of their own. */
export interface Host {
  /** How the user names it, for messages and ids: the alias, or `address[:port]` (port only when not 22). */
  readonly name: string;
  /**
   * Runs a command as root. Raises HOST_UNREACHABLE, HOST_KEY_UNKNOWN, HOST_KEY_MISMATCH, AUTH_FAILED,
   * SUDO_DENIED, LINK_LOST (changes only), COMMAND_TIMED_OUT, OUTPUT_TOO_LARGE, CANCELLED.
   */
  run(command: RemoteCommand, signal?: AbortSignal): Promise<CommandResult>;
  /**
   * The machine-id(5) of the machine that its connection leads to now; `undefined` if it has none. Asked once per connection. Raises
   * what `run` raises for reads, COMMAND_FAILED and OUTPUT_UNREADABLE.
   */
  machineId(signal?: AbortSignal): Promise<string | undefined>;
}
