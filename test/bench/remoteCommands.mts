/** What reaches the servers over SSH, by their own logs. */

import { OPERATOR } from "../lab/image-contents.mts";
import type { Guest, Lab } from "../lab/lab.mts";

/** What reached one server. */
export interface Remote {
  readonly connections: number;
  readonly commands: number;
  /** What sudo ran of them, and how often. */
  readonly names: Readonly<Record<string, number>>;
}

/** Where journalctl(1) keeps what it has shown. */
const shown = "/run/bench-journal";

/** Has sshd tell of each session. The lab's own go over connections from before, and are not told of. */
export async function tellOfSessions({ server1, server2 }: Lab): Promise<void> {
  for (const guest of [server1, server2])
    await guest.run("echo 'LogLevel VERBOSE' >/etc/ssh/sshd_config.d/bench.conf && systemctl restart ssh");
}

/** On each server since this was called last. */
export async function sinceLast({ server1, server2 }: Lab): Promise<Readonly<Record<string, Remote>>> {
  return { server1: await remoteOn(server1), server2: await remoteOn(server2) };
}

async function remoteOn(guest: Guest): Promise<Remote> {
  const { stdout } = await guest.run(
    `journalctl --sync && journalctl -q --cursor-file=${shown} -t sshd -t sudo -o cat`,
  );
  const lines = stdout.split("\n");
  const told = (begin: string) =>
    lines.filter((line) => line.startsWith(`${begin} for ${OPERATOR.user} from `)).length;
  const names: Record<string, number> = {};
  for (const line of lines) {
    // A command that is kept on the host has its text's hash in its name.
    const name = /; COMMAND=\S*\/([^/\s]+?)(-[0-9a-f]{12})?(\s|$)/.exec(line)?.[1];
    if (name !== undefined) names[name] = (names[name] ?? 0) + 1;
  }
  return { connections: told("Accepted publickey"), commands: told("Starting session: command"), names };
}
