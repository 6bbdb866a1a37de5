import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { clientsFunctions, clientsGuard, clientsProof } from "../../provider/resources/clientsProof.js";
import type { CommandResult } from "../../provider/ssh/types.js";
import { ShellHost } from "../support/shellHost.js";

/** A host on which `nbdinfo` gets in, and a filter of systemd keeps it out, unless a switch says otherwise. */
class ProofHost extends ShellHost {
  constructor() {
    super(
      "proof",
      {
        systemctl: `
          case $1 in
          show) case $3 in
            IPAddressAllow) cat "$SANDBOX/allowed" 2>/dev/null || echo 10.0.0.2;;
            *) cat "$SANDBOX/denied" 2>/dev/null || echo "::/0 0.0.0.0/0";; esac;;
          *) echo "$*" >>"$SANDBOX/jobs";;
          esac`,
        // Exit codes as of the real one with --wait: those of the program.
        "systemd-run": `
          case "$*" in
          *IPAddressDeny=any*) cat "$SANDBOX/filtered" 2>/dev/null; exit "$(cat "$SANDBOX/filtered.rc" 2>/dev/null || echo 124)";;
          *) echo asked >>"$SANDBOX/asked"; echo 1048576; exit "$(cat "$SANDBOX/free.$(wc -l <"$SANDBOX/asked").rc" 2>/dev/null || echo 0)";;
          esac`,
        ss: `echo "$*" >>"$SANDBOX/listed"; cat "$SANDBOX/connected" 2>/dev/null; exit "$(cat "$SANDBOX/ss.rc" 2>/dev/null || echo 0)"`,
        sleep: ":",
      },
      [],
    );
  }

  protected inside(text: string): string {
    return text.replaceAll(clientsProof, join(this.folder, "proof"));
  }

  async prove(guard: ReturnType<typeof clientsGuard>, ...port: string[]): Promise<CommandResult> {
    const text = `${clientsFunctions}\nprove_clients "$@"; echo went on`;
    const argv = ["sh", "-c", text, "sh", "lvm-nbd-export-vm1.service", "nbd://10.0.0.1/vm1", guard, ...port];
    const result = await this.execute({ argv, kind: "change", deadlineSeconds: 20 });
    if (result === undefined) throw new Error("the script was killed");
    return result;
  }

  get proven(): boolean {
    return existsSync(join(this.folder, "proof"));
  }

  get jobs(): string {
    return this.#told("jobs");
  }

  /** What `ss` was asked. */
  get listed(): string {
    return this.#told("listed");
  }

  #told(name: string): string {
    const path = join(this.folder, name);
    return existsSync(path) ? readFileSync(path, "utf8") : "";
  }
}

const hosts: ProofHost[] = [];
function host(switches: Readonly<Record<string, string>> = {}): ProofHost {
  const made = new ProofHost();
  for (const [name, content] of Object.entries(switches)) made.set(name, content);
  hosts.push(made);
  return made;
}
afterEach(() => {
  for (const made of hosts.splice(0)) made.close();
});

describe("whether the host's kernel enforces the clients", () => {
  it("is proven once a boot by one that is kept out, beside one that gets in", async () => {
    const asked = host();
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 0, stdout: "went on\n" });
    expect(asked.proven).toBe(true);
    // From now on nobody has to be kept out again.
    asked.set("filtered.rc", "0");
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 0 });
    expect(asked.jobs).toBe("");
  });

  it("is proven as well where the filter is told at once", async () => {
    const asked = host({ "filtered.rc": "1", filtered: "nbdinfo: connect: Operation not permitted" });
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 0 });
    expect(asked.proven).toBe(true);
  });

  it.each([
    ["who may reach nothing gets in", 71, { "filtered.rc": "0" }, /\(IPAddressDeny=any\) got in/],
    [
      "who may reach nothing fails for another reason, such as a systemd that knows no such filter",
      72,
      { "filtered.rc": "1", filtered: "Unknown assignment: IPAddressDeny=any" },
      /cannot be told: Unknown assignment/,
    ],
    [
      "nobody gets in",
      72,
      { "free.1.rc": "1", "free.2.rc": "1" },
      /without an address filter does not get in/,
    ],
    [
      "nobody gets in any more, so that who waits may not be kept out",
      72,
      { "free.2.rc": "124", "free.4.rc": "124" },
      /does not always get in within \d+ s/,
    ],
    [
      "everybody is allowed by another file",
      71,
      { allowed: "10.0.0.2 0.0.0.0/0" },
      /IPAddressAllow=\) is overridden/,
    ],
    ["what the unit denies is overridden", 71, { denied: "" }, /IPAddressDeny=\) is overridden/],
    ["only one family is denied", 71, { denied: "0.0.0.0/0" }, /IPAddressDeny=\) is overridden/],
  ])("is not where %s: the export is stopped, or it is told", async (_what, exitCode, switches, why) => {
    const refusing = host(switches);
    const refused = await refusing.prove("refuse");
    expect(refused).toMatchObject({ exitCode, stdout: "" });
    expect(refused.stderr).toMatch(why);
    expect(refusing.jobs).toBe("disable --quiet --now lvm-nbd-export-vm1.service\n");
    expect(refusing.proven).toBe(false);

    const telling = host(switches);
    for (const _time of [1, 2]) {
      telling.set("asked", undefined);
      const told = await telling.prove("elsewhere");
      const { stdout } = told;
      expect(told.exitCode).toBe(0);
      expect(stdout).toMatch(exitCode === 71 ? /^unenforced: .*\nwent on\n$/s : /^untold: .*\nwent on\n$/s);
      expect(stdout).toMatch(why);
    }
    expect(telling.jobs).toBe("");
    expect(telling.proven).toBe(false);
  });

  it.each([
    ["nobody gets in", { "free.1.rc": "1" }],
    ["who waits may not be kept out", { "free.2.rc": "124" }],
  ])("is told by a second look where %s at the first", async (_what, switches) => {
    const asked = host(switches);
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 0, stdout: "went on\n" });
    expect([asked.proven, asked.jobs]).toEqual([true, ""]);
  });

  const untold = { "free.1.rc": "1", "free.2.rc": "1" };
  const connection = "0 0 10.0.0.1:10809 10.0.0.2:40000\n";
  const disabled = "disable --quiet --now lvm-nbd-export-vm1.service\n";

  it.each([
    ["is not stopped while a client is connected", { connected: connection }, 73, ""],
    ["is not stopped where ss cannot tell whether one is", { "ss.rc": "255" }, 73, ""],
    ["is stopped where none is, as after a cut before it was ever proven", {}, 72, disabled],
  ])("of an export that serves cannot be told: it %s", async (_what, switches, exitCode, jobs) => {
    const asked = host({ ...untold, ...switches });
    const result = await asked.prove("refuse", "10809");
    expect(result).toMatchObject({ exitCode, stdout: "" });
    expect(result.stderr).toMatch(/without an address filter does not get in/);
    expect([asked.proven, asked.jobs, asked.listed]).toEqual([
      false,
      jobs,
      "-Htn state established ( sport = :10809 )\n",
    ]);
  });

  it("is not: an export that serves is stopped, whoever is connected", async () => {
    const asked = host({ "filtered.rc": "0", connected: connection });
    expect(await asked.prove("refuse", "10809")).toMatchObject({ exitCode: 71 });
    expect(asked.jobs).toBe(disabled);
  });

  it("is not asked of an export on loopback", async () => {
    expect(clientsGuard({ listenAddress: "127.0.0.1" }, false)).toBe("none");
    expect(clientsGuard({ listenAddress: "::1" }, true)).toBe("none");
    expect(clientsGuard({ listenAddress: "0.0.0.0" }, false)).toBe("refuse");
    const asked = host({ denied: "", "filtered.rc": "0" });
    expect(await asked.prove("none")).toMatchObject({ exitCode: 0, stdout: "went on\n" });
  });
});
