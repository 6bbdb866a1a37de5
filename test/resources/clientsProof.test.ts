import { existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { changedMeanwhile, unitFunctions } from "../../provider/linux/unitScript.js";
import { clientsFunctions, clientsGuard, clientsProof } from "../../provider/resources/clientsProof.js";
import type { CommandResult } from "../../provider/ssh/types.js";
import { ShellHost } from "../support/shellHost.js";

const unit = "lvm-nbd-export-vm1.service";
const writtenAnew = `cp "$SANDBOX/etc/${unit}" "$SANDBOX/new"; mv -f "$SANDBOX/new" "$SANDBOX/etc/${unit}"`;

/** A host on which `nbdinfo` gets in, and a filter of systemd keeps it out, unless a switch says otherwise. */
class ProofHost extends ShellHost {
  proofFolder: string | undefined;

  constructor() {
    super(
      "proof",
      {
        systemctl: `
          case $1 in
          show) [ ! -e "$SANDBOX/silent" ] || { echo "Connection timed out" >&2; exit 1; }
            case $* in
            *ActiveState*) if [ -e "$SANDBOX/stuck" ]; then echo active; else echo inactive; fi;;
            *) echo "IPAddressAllow=$(cat "$SANDBOX/allowed" 2>/dev/null || echo 10.0.0.2/32 127.0.0.0/8 ::1/128)"
              echo "IPAddressDeny=$(cat "$SANDBOX/denied" 2>/dev/null || echo "::/0 0.0.0.0/0")"
              cat "$SANDBOX/above" 2>/dev/null || printf '\\nIPAddressAllow=\\n\\nIPAddressAllow=\\n'
              [ ! -e "$SANDBOX/reloaded" ] || { rm "$SANDBOX/reloaded" "$SANDBOX/allowed"; ${writtenAnew}; };;
            esac;;
          *) echo "$*" >>"$SANDBOX/jobs"; [ ! -e "$SANDBOX/stuck" ];;
          esac`,
        // Exit codes as of the real one with --wait: those of the program.
        "systemd-run": `
          case "$*" in
          *IPAddressDeny=any*) cat "$SANDBOX/filtered" 2>/dev/null; exit "$(cat "$SANDBOX/filtered.rc" 2>/dev/null || echo 124)";;
          *) echo asked >>"$SANDBOX/asked"; echo 1048576; exit "$(cat "$SANDBOX/free.$(wc -l <"$SANDBOX/asked").rc" 2>/dev/null || echo 0)";;
          esac`,
        ss: `echo "$*" >>"$SANDBOX/listed"; cat "$SANDBOX/connected" 2>/dev/null; exit "$(cat "$SANDBOX/ss.rc" 2>/dev/null || echo 0)"`,
        sed: `[ ! -e "$SANDBOX/broken" ] || exit 137; PATH=\${PATH#*:}; exec sed "$@"`,
        // Between two looks.
        sleep: `[ ! -e "$SANDBOX/rewritten" ] || { ${writtenAnew}; }`,
      },
      [],
    );
    this.set("version", "Linux version 6.1\n");
    mkdirSync(join(this.folder, "etc"));
    writeFileSync(join(this.folder, "etc", unit), "[Service]\nIPAddressAllow=10.0.0.2 localhost\n");
  }

  protected inside(text: string): string {
    return text
      .replaceAll(dirname(clientsProof), this.proofFolder ?? this.folder)
      .replaceAll("/etc/systemd/system", join(this.folder, "etc"))
      .replaceAll("/proc/version", join(this.folder, "version"));
  }

  async prove(guard: ReturnType<typeof clientsGuard>, ...port: string[]): Promise<CommandResult> {
    const text = `${unitFunctions}${clientsFunctions}
watch "/etc/systemd/system/$1"; prove_clients "$@"; echo went on`;
    const argv = ["sh", "-c", text, "sh", unit, "nbd://10.0.0.1/vm1", guard, ...port];
    const result = await this.execute({ argv, kind: "change", deadlineSeconds: 20 });
    if (result === undefined) throw new Error("the script was killed");
    return result;
  }

  get proven(): boolean {
    return existsSync(join(this.folder, basename(clientsProof)));
  }

  get jobs(): string {
    return this.told("jobs");
  }

  /** What `ss` was asked. */
  get listed(): string {
    return this.told("listed");
  }

  link(to: string, name: string): void {
    symlinkSync(join(this.folder, to), join(this.folder, name));
  }

  told(name: string): string {
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
  it("is proven once for a kernel by one that is kept out, beside one that gets in", async () => {
    const asked = host();
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 0, stdout: "went on\n" });
    expect(asked.proven).toBe(true);
    // From now on nobody has to be kept out again.
    asked.set("filtered.rc", "0");
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 0 });
    expect(asked.jobs).toBe("");
    // Booted with another one, the host may no longer keep anybody out.
    asked.set("version", "Linux version 6.2\n");
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 71 });
  });

  it("is seen though it cannot be noted: nobody is cut off", async () => {
    const asked = host();
    asked.proofFolder = "/proc/none";
    const result = await asked.prove("refuse");
    expect(result).toMatchObject({ exitCode: 0, stdout: "went on\n" });
    expect(result.stderr).toContain("it could not be noted that they are");
    expect([asked.proven, asked.jobs]).toEqual([false, ""]);
  });

  it("is noted in a new file, whatever link has its name", async () => {
    const asked = host({ victim: "precious\n" });
    for (const name of ["", ".new"]) asked.link("victim", `${basename(clientsProof)}${name}`);
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 0 });
    expect(asked.told("victim")).toBe("precious\n");
    expect(asked.told(basename(clientsProof))).toContain("Linux version 6.1\n");
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
      "systemd itself may not start who may reach nothing",
      72,
      { "filtered.rc": "1", filtered: "Failed to start transient service unit: Operation not permitted" },
      /cannot be told: Failed to start/,
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
      { allowed: "10.0.0.2/32 127.0.0.0/8 ::1/128 0.0.0.0/0" },
      /IPAddressAllow=\) is overridden/,
    ],
    // systemd leaves out what a wider network has.
    [
      "a network is allowed by another file",
      71,
      { allowed: "10.0.0.0/8 127.0.0.0/8 ::1/128" },
      /IPAddressAllow=\) is overridden on this host: 10\.0\.0\.0\/8/,
    ],
    [
      "a slice above allows more",
      71,
      { above: "\nIPAddressAllow=\n\nIPAddressAllow=10.0.0.0/8\n" },
      /a slice above the unit allows more/,
    ],
    ["a slice above is not told of", 72, { above: "\nIPAddressAllow=\n" }, /what the slices above the unit/],
    ["a sed is killed", 72, { broken: "" }, /sed does not tell/],
    ["no slice is told of", 72, { above: "" }, /nor the slices above it/],
    ["systemd does not answer", 72, { silent: "" }, /systemctl does not tell/],
    ["what the unit denies is overridden", 71, { denied: "" }, /IPAddressDeny=\) is overridden/],
    ["only one family is denied", 71, { denied: "0.0.0.0/0" }, /IPAddressDeny=\) is overridden/],
  ])("is not where %s: the export is stopped, or it is told", async (_what, exitCode, switches, why) => {
    const refusing = host(switches);
    const refused = await refusing.prove("refuse");
    expect(refused).toMatchObject({ exitCode, stdout: "" });
    expect(refused.stderr).toMatch(why);
    expect(refusing.jobs).toBe(`disable --quiet --now ${unit}\n`);
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
  const disabled = `disable --quiet --now ${unit}\n`;

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

  it("cannot be told of an export that somebody else has written anew since: it is not stopped", async () => {
    const asked = host({ ...untold, rewritten: "" });
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: changedMeanwhile });
    expect(asked.jobs).toBe("");
    // Whoever wrote it, this host keeps nobody out.
    const open = host({ "free.1.rc": "1", "filtered.rc": "0", rewritten: "" });
    expect(await open.prove("refuse")).toMatchObject({ exitCode: 71 });
    expect(open.jobs).toBe(disabled);
  });

  it("is asked again where somebody else is just writing the export anew: systemd shows another one", async () => {
    const asked = host({ allowed: "10.0.0.3/32", reloaded: "" });
    expect(await asked.prove("refuse", "10809")).toMatchObject({ exitCode: 0, stdout: "went on\n" });
    expect(asked.jobs).toBe("");
  });

  it("is not, and the export cannot be stopped: that is told by another exit code", async () => {
    const asked = host({ "filtered.rc": "0", stuck: "" });
    expect(await asked.prove("refuse")).toMatchObject({ exitCode: 74 });
    expect(asked.jobs).toBe(`${disabled}stop ${unit}\ndisable --quiet ${unit}\n`);
  });

  it("is not asked of an export on loopback", async () => {
    expect(clientsGuard({ listenAddress: "127.0.0.1" }, false)).toBe("none");
    expect(clientsGuard({ listenAddress: "::1" }, true)).toBe("none");
    expect(clientsGuard({ listenAddress: "0.0.0.0" }, false)).toBe("refuse");
    const asked = host({ denied: "", "filtered.rc": "0" });
    expect(await asked.prove("none")).toMatchObject({ exitCode: 0, stdout: "went on\n" });
  });
});
