/** A real OpenSSH server for the current user on a free port of 127.0.0.1, with its own folder and keys. */
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";

const program = "/usr/sbin/sshd";

export interface Sshd {
  readonly port: number;
  readonly user: string;
  readonly folder: string;
  /** Its public host key, `ssh-ed25519 AAAA...`. */
  readonly hostKey: string;
  /** File of a private key that it accepts. */
  readonly key: string;
  /** File of another, encrypted with `passphrase`. */
  readonly encryptedKey: string;
  readonly passphrase: string;
  /** What it logged so far. */
  log(): string;
  stop(): Promise<void>;
}

export interface SshdOptions {
  readonly maxSessions?: number;
  readonly maxStartups?: string;
  /** File of the private key that certifies the host's, and more for ssh-keygen. */
  readonly certificate?: {
    readonly authority: string;
    readonly options: readonly string[];
    /** Of a second host key, of this type, instead of the first one's. */
    readonly type?: string;
  };
  /** File of the public key whose user certificates it takes. */
  readonly userAuthority?: string;
}

export async function startSshd(options: SshdOptions = {}): Promise<Sshd> {
  install();
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-sshd-"));
  const passphrase = "correct horse battery";
  const file = (name: string) => join(folder, name);
  const makeKey = (name: string, secret: string) => {
    execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", secret, "-C", "", "-f", file(name)]);
    return readFileSync(`${file(name)}.pub`, "utf8").trim();
  };
  const hostKey = makeKey("host_key", "");
  const { certificate } = options;
  const certified = certificate?.type === undefined ? "host_key" : "second_key";
  if (certificate !== undefined) {
    const how = ["-q", "-s", certificate.authority, "-I", "sshd", "-h", ...certificate.options];
    const { type } = certificate;
    if (type !== undefined)
      execFileSync("ssh-keygen", ["-q", "-t", type, "-N", "", "-C", "", "-f", file(certified)]);
    execFileSync("ssh-keygen", [...how, `${file(certified)}.pub`], { stdio: "pipe" });
  }
  const accepted = [makeKey("key", ""), makeKey("encrypted", passphrase)];
  writeFileSync(file("authorized_keys"), `${accepted.join("\n")}\n`, { mode: 0o600 });
  chmodSync(folder, 0o700);
  const port = await freePort();
  const { username: user } = userInfo();
  writeFileSync(
    file("config"),
    [
      `ListenAddress 127.0.0.1:${port}`,
      `HostKey ${file("host_key")}`,
      ...(certificate === undefined
        ? []
        : [`HostKey ${file(certified)}`, `HostCertificate ${file(`${certified}-cert.pub`)}`]),
      `AuthorizedKeysFile ${file("authorized_keys")}`,
      ...(options.userAuthority === undefined ? [] : [`TrustedUserCAKeys ${options.userAuthority}`]),
      "PidFile none",
      "UsePAM no",
      // The folder lies in /tmp, which everybody may write to.
      "StrictModes no",
      "PermitRootLogin yes",
      "PasswordAuthentication no",
      "KbdInteractiveAuthentication no",
      "LogLevel VERBOSE",
      `MaxSessions ${options.maxSessions ?? 10}`,
      `MaxStartups ${options.maxStartups ?? "100:30:200"}`,
      "",
    ].join("\n"),
  );
  const child = spawn(program, ["-D", "-e", "-f", file("config")], { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  child.stderr.on("data", (chunk: Buffer) => {
    log += chunk.toString();
  });
  await answering(child, port, () => log);
  return {
    port,
    user,
    folder,
    hostKey,
    key: file("key"),
    encryptedKey: file("encrypted"),
    passphrase,
    log: () => log,
    stop: async () => {
      if (child.exitCode === null && child.signalCode === null) {
        const ended = new Promise((resolve) => child.once("exit", resolve));
        child.kill("SIGTERM");
        await ended;
      }
      rmSync(folder, { recursive: true });
    },
  };
}

function install(): void {
  const root = process.getuid?.() === 0;
  if (!existsSync(program)) {
    if (!root) throw new Error(`${program} is missing: install OpenSSH's server (package openssh-server)`);
    const env = { ...process.env, DEBIAN_FRONTEND: "noninteractive" };
    execFileSync("apt-get", ["update"], { env, stdio: "ignore" });
    execFileSync("apt-get", ["install", "-y", "--no-install-recommends", "openssh-server"], {
      env,
      stdio: "ignore",
    });
  }
  // Where sshd separates its privileges; a distribution's service makes it at boot.
  if (root) mkdirSync("/run/sshd", { recursive: true, mode: 0o755 });
}

async function freePort(): Promise<number> {
  const probe = createServer();
  await new Promise<void>((resolve) => probe.listen(0, "127.0.0.1", resolve));
  const address = probe.address();
  await new Promise((resolve) => probe.close(resolve));
  if (typeof address !== "object" || address === null) throw new Error("no free port");
  return address.port;
}

async function answering(child: ChildProcess, port: number, log: () => string): Promise<void> {
  const end = Date.now() + 20_000;
  for (;;) {
    const open = await new Promise<boolean>((resolve) => {
      const socket = connect({ host: "127.0.0.1", port });
      socket.once("data", () => {
        socket.destroy();
        resolve(true);
      });
      socket.once("error", () => resolve(false));
    });
    if (open) return;
    if (child.exitCode !== null || Date.now() > end) throw new Error(`sshd does not answer: ${log()}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
