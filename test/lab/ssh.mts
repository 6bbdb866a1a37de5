import { rm, stat, writeFile } from "node:fs/promises";
import { createConnection } from "node:net";
import { join } from "node:path";
import { type ChildResult, runChild } from "./child.mts";
import { OPERATOR } from "./image-contents.mts";

/** A guest as ssh_config(5) needs to know it. */
export interface SshGuest {
  name: string;
  port: number;
  hostKey: string;
}

const CONNECT_LIMIT_SECONDS = 30;

/**
 * SSH to the guests through the system's client: writes its configuration, and keeps one connection to each
 * guest and user open for all commands (a new one costs a second where QEMU translates).
 */
export class GuestSsh {
  readonly configPath: string;
  /** The hosts server1 and server2 as the ordinary user, and server1-root and server2-root. */
  readonly operatorConfigPath: string;
  readonly knownHostsPath: string;
  readonly #controlDirectory: string;
  readonly #starting = new Map<string, Promise<void>>();

  constructor(directory: string, controlDirectory: string) {
    this.configPath = join(directory, "ssh_config");
    this.operatorConfigPath = join(directory, "ssh_config_operator");
    this.knownHostsPath = join(directory, "known_hosts");
    this.#controlDirectory = controlDirectory;
  }

  /** Writes ssh_config and known_hosts. For each guest the aliases NAME (root) and NAME-operator. */
  async writeFiles(guests: readonly SshGuest[], privateKey: string): Promise<void> {
    const known = guests.map((guest) => `[127.0.0.1]:${guest.port} ${guest.hostKey}\n`);
    const host = (name: string, guest: SshGuest, user: string): string =>
      [
        `Host ${name}`,
        "  HostName 127.0.0.1",
        `  Port ${guest.port}`,
        `  User ${user}`,
        `  IdentityFile "${privateKey}"`,
        "  IdentitiesOnly yes",
        `  UserKnownHostsFile "${this.knownHostsPath}"`,
        "  GlobalKnownHostsFile /dev/null",
        "  StrictHostKeyChecking yes",
        "  LogLevel ERROR",
        "",
      ].join("\n");
    const aliases = guests.flatMap((guest) =>
      ["root", OPERATOR.user].map((user) => host(alias(guest.name, user), guest, user)),
    );
    const asOperator = guests.flatMap((guest) => [
      host(`${guest.name} ${alias(guest.name, OPERATOR.user)}`, guest, OPERATOR.user),
      host(`${guest.name}-root`, guest, "root"),
    ]);
    await writeFile(this.knownHostsPath, known.join(""));
    await writeFile(this.configPath, aliases.join("\n"));
    await writeFile(this.operatorConfigPath, asOperator.join("\n"));
  }

  /** Runs a shell command in a guest. */
  async run(
    guest: string,
    command: string,
    options: { timeoutSeconds?: number; user?: string; stdin?: string; allowFailure?: boolean } = {},
  ): Promise<ChildResult> {
    const host = alias(guest, options.user ?? "root");
    await this.#connect(host);
    const argv = ["ssh", "-F", this.configPath, "-S", this.#controlSocket(host), "-o", "BatchMode=yes"];
    const { user: _, ...childOptions } = options;
    // A client of a kept connection does not end on SIGTERM while its command runs.
    return runChild([...argv, host, "--", command], { ...childOptions, graceSeconds: 0.2 });
  }

  /** Ends the kept connections to a guest, which after a reboot or a restore lead nowhere. */
  async disconnect(guest: string): Promise<void> {
    for (const user of ["root", OPERATOR.user]) {
      const host = alias(guest, user);
      const socket = this.#controlSocket(host);
      if (!(await exists(socket))) continue;
      await runChild(["ssh", "-F", this.configPath, "-S", socket, "-O", "exit", host], {
        allowFailure: true,
        timeoutSeconds: 10,
      });
      await rm(socket, { force: true });
    }
  }

  /** Opens the kept connection, once even if several commands want it at the same time. */
  async #connect(host: string): Promise<void> {
    if (await exists(this.#controlSocket(host))) return;
    let starting = this.#starting.get(host);
    if (starting === undefined) {
      starting = this.#startMaster(host).finally(() => this.#starting.delete(host));
      this.#starting.set(host, starting);
    }
    await starting;
  }

  async #startMaster(host: string): Promise<void> {
    // The master goes to the background with our pipes; so its output is left out and its end is not waited for
    // by them (`sh` closes them for it).
    const master = ["ssh", "-F", this.configPath, "-S", this.#controlSocket(host), "-MNf"].concat(
      ["-o", "BatchMode=yes", "-o", `ConnectTimeout=${CONNECT_LIMIT_SECONDS}`],
      ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=6", host],
    );
    const errors = `${this.#controlSocket(host)}.log`;
    const result = await runChild(
      ["sh", "-c", 'log=$1; shift; exec "$@" >"$log" 2>&1', "sh", errors, ...master],
      {
        allowFailure: true,
        timeoutSeconds: CONNECT_LIMIT_SECONDS + 10,
      },
    );
    if (result.exitCode !== 0 && !(await exists(this.#controlSocket(host)))) {
      const { stdout } = await runChild(["cat", errors], { allowFailure: true });
      throw new Error(`lab: no SSH connection to ${host}: ${stdout.trim()}`);
    }
  }

  #controlSocket(host: string): string {
    return join(this.#controlDirectory, `ssh-${host}`);
  }
}

/** The Host of ssh_config for a user of a guest. */
function alias(guest: string, user: string): string {
  return user === "root" ? guest : `${guest}-${user}`;
}

/** Does an SSH server greet on this port? QEMU accepts connections while the guest is not listening yet. */
export async function sshGreets(port: number, limitMs = 2000): Promise<boolean> {
  const socket = createConnection(port, "127.0.0.1");
  const timer = setTimeout(() => socket.destroy(), limitMs);
  try {
    return await new Promise<boolean>((resolve) => {
      socket.on("data", (chunk) => resolve(chunk.toString("latin1").startsWith("SSH-2.0-")));
      socket.on("error", () => resolve(false));
      socket.on("close", () => resolve(false));
    });
  } finally {
    clearTimeout(timer);
    socket.destroy();
  }
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}
