/** The scripts that start an export and see whom it keeps out, in a real shell. */
import { existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { hostCommands } from "../../provider/core/hostCommands.js";
import { modulesLoad, udevRule } from "../../provider/linux/attachUnit.js";
import { parseFields } from "../../provider/linux/fields.js";
import { changedMeanwhile, provenOnly } from "../../provider/linux/unitScript.js";
import "../../provider/resources/nbdExport.js";
import { clientsProof } from "../../provider/resources/clientsProof.js";
import type { CommandResult } from "../../provider/ssh/types.js";
import { ShellHost } from "../support/shellHost.js";

const unit = "lvm-nbd-export-vm1.service";
const text =
  "[Service]\nIPAddressAllow=10.0.0.2 localhost\n\n[Install]\nWantedBy=multi-user.target dev-vm1.device\n\n[X-LvmNbd]\nMark=ours\nPlan={}\n";

/**
 * A host on which `nbdinfo` gets in unless it shows no right certificate, and a filter of systemd keeps it out. `atProof`: what happens
 * meanwhile, as shell text.
 */
class ExportHost extends ShellHost {
  private before: readonly string[] = [];

  constructor(atProof: string) {
    super(
      "export",
      {
        systemctl: `
          holds_lock() { ! flock -n "$SANDBOX/lock" true; }
          case "$*" in
          "show -p ActiveState -p LoadState "*)
            echo "ActiveState=$(cat "$SANDBOX/state")"; echo "LoadState=$(cat "$SANDBOX/loadState" 2>/dev/null || echo not-found)";;
          *ActiveState*) cat "$SANDBOX/state";;
          *MainPID*) ${atProof || ":"}; echo 7;;
          "show -p Job"*) ;;
          "show -p LoadState --value"*) shift 5; for one; do
            if [ -e "$SANDBOX/remembered" ] || [ -e "$SANDBOX/units/$one" ]; then echo loaded; else echo not-found; fi
            echo; done;;
          show*) if [ -e "$SANDBOX/silent" ]; then rm "$SANDBOX/silent"; exit 1; fi
            case "$*" in *LoadState*) printf 'UnitFileState=disabled\\nLoadState=loaded\\nNeedDaemonReload=no\\n';; esac
            echo "IPAddressAllow=10.0.0.2/32 127.0.0.0/8 ::1/128"; echo "IPAddressDeny=::/0 0.0.0.0/0"
            printf '\\nIPAddressAllow=%s\\n' "$(cat "$SANDBOX/above" 2>/dev/null)"
            [ -e "$SANDBOX/untold" ] || printf '\\nIPAddressAllow=\\n';;
          *) echo "$*" >>"$SANDBOX/jobs";;
          esac
          case "$*" in
          stop*) ! holds_lock || echo "under the lock" >>"$SANDBOX/jobs";;
          enable*|restart*) holds_lock || echo "without the lock" >>"$SANDBOX/jobs";;
          esac
          case "$*" in
          "disable --quiet --now --no-reload "*broken*) exit 1;;
          daemon-reload) [ ! -e "$SANDBOX/needed" ] || echo active >"$SANDBOX/state"; [ ! -e "$SANDBOX/deaf" ];;
          restart*) echo active >"$SANDBOX/state";;
          *--now*) echo inactive >"$SANDBOX/state";;
          esac`,
        "systemd-run": `case "$*" in *IPAddressDeny=any*) ${atProof || ":"}; [ -e "$SANDBOX/open" ] || exit 124; echo 1048576;; *) echo 1048576;; esac`,
        nbdinfo: `[ -e "$SANDBOX/open" ] || case "$*" in
          */none|*/stranger|*nbd://10.0.0.9*) exit 1;;
          esac
          echo 1048576`,
        flock: `[ ! -e "$SANDBOX/busy" ] || exit 1; PATH=\${PATH#*:}; exec flock "$@"`,
        nbdcopy: "head -c 4096 /dev/zero",
        udevadm: `echo "$*, of $(ls "$SANDBOX/units" | grep -c attach)" >>"$SANDBOX/udev"
          [ ! -e "$SANDBOX/unshielded" ] || { echo "no udev" >&2; exit 1; }`,
        sleep: ":",
        date: `if [ -e "$SANDBOX/clock" ]; then echo $(($(cat "$SANDBOX/clock") + 20)) >"$SANDBOX/clock"; cat "$SANDBOX/clock"
          else PATH=\${PATH#*:}; exec date "$@"; fi`,
      },
      [],
    );
    mkdirSync(join(this.folder, "units"));
    this.set("state", "inactive\n");
    this.set("shared", "kept\n");
  }

  protected inside(path: string): string {
    return path
      .replaceAll(dirname(clientsProof), join(this.folder, "seen"))
      .replaceAll("/etc/systemd/system", join(this.folder, "units"))
      .replaceAll("[ -b ", "[ -f ")
      .replaceAll(udevRule.path, join(this.folder, "shared"))
      .replaceAll(modulesLoad.path, join(this.folder, "modules"))
      .replaceAll("/dev/lvm-nbd", join(this.folder, "links"))
      .replaceAll("/run/lvm-nbd.lock", join(this.folder, "lock"))
      .replaceAll("/run/lvm-nbd-proof", join(this.folder, "proof"));
  }

  private run(name: string, args: readonly string[], stdin = ""): Promise<CommandResult | undefined> {
    const argv = [...this.before, ...(hostCommands().find((one) => one.name === name)?.argv ?? []), ...args];
    return this.execute({ argv, stdin, kind: "change", deadlineSeconds: 20 });
  }

  /** `undefined` if the script was killed. */
  start(
    marks: readonly [string, string] = ["absent", "absent"],
    port = "",
  ): Promise<CommandResult | undefined> {
    const conf = join(this.folder, "vm1.conf");
    const folders = join(this.folder, "vm1~");
    const args = [
      unit,
      conf,
      "",
      "nbd://10.0.0.1/vm1",
      "refuse",
      ...marks,
      String(text.length),
      folders,
      "",
      port,
    ];
    return this.run("apply-export", args, text);
  }

  /** From now on nobody reads any more what scripts say: whoever says something is killed. */
  hangUp(): void {
    const pipe = '"$SANDBOX/nobody"';
    const text = `mkfifo ${pipe}; : <${pipe} & exec 2>${pipe}; wait; exec "$@"`;
    this.before = ["sh", "-c", text, "sh"];
  }

  /** That exists already. */
  holds(plan: string): void {
    writeFileSync(join(this.folder, "units", unit), text.replace("{}", plan));
    mkdirSync(join(this.folder, "vm1~1"), { recursive: true });
    writeFileSync(join(this.folder, "vm1~1", "ca-cert.pem"), "");
  }

  /** It starts at boot. */
  links(...targets: readonly string[]): void {
    for (const target of targets) {
      mkdirSync(join(this.folder, "units", `${target}.wants`), { recursive: true });
      symlinkSync("/nowhere", join(this.folder, "units", `${target}.wants`, unit));
    }
  }

  /** Each with the mark that was seen, and the device that must not be held: the one called `held` is. */
  takeDown(
    ...all: readonly (readonly [name: string, mark: string, device?: string])[]
  ): Promise<CommandResult | undefined> {
    const args = all.flatMap(([name, mark, device = ""]) => [
      ...[name, join(this.folder, `${name}.conf`), mark, join(this.folder, `${name}~`)],
      device && join(this.folder, device),
    ]);
    const holders =
      'case $1 in */held) echo "Timed out for waiting the udev queue" >&2; echo "mount L21udA==";; */unknown) echo "who knows" >&2; exit 3;; esac';
    return this.run("take-down-units", [holders, ...args]);
  }

  proveClients(): Promise<CommandResult | undefined> {
    return this.run("prove-clients", [unit, "nbd://10.0.0.1/vm1", "refuse", "", "{}"]);
  }

  proveTls(enabled: "enabled" | "" = ""): Promise<CommandResult | undefined> {
    const folders = join(this.folder, "vm1~");
    const args = [
      unit,
      `nbds://10.0.0.9/vm1?tls-certificates=${folders}1`,
      `${folders}1`,
      folders,
      "{}",
      enabled,
    ];
    return this.run("prove-tls", [...args, "client-cert.pem", "4"], "cert");
  }

  get root(): string {
    return this.folder;
  }

  told(name: string): string {
    const path = join(this.folder, name);
    return existsSync(path) ? readFileSync(path, "utf8") : "";
  }
}

const hosts: ExportHost[] = [];
function host(atProof = ""): ExportHost {
  const made = new ExportHost(atProof);
  hosts.push(made);
  return made;
}
afterEach(() => {
  for (const made of hosts.splice(0)) made.close();
});

const begun = `restart --no-block ${unit}\n`;
const begunAnew = `daemon-reload\n${begun}`;
const cutOff = `disable --quiet --now ${unit}\n`;
const enabled = `enable --root=/ --quiet ${unit}\n`;
const stillEnabled = `enable --quiet ${unit}\n`;
const allTargets = ["multi-user.target", "dev-vm1.device"];

it("an export is started, proven, and only then starts at boot", async () => {
  const asked = host('cp "$SANDBOX/jobs" "$SANDBOX/before"');
  expect(await asked.start()).toMatchObject({ exitCode: 0, stderr: "" });
  expect([asked.told("before"), asked.told("jobs")]).toEqual([begun, begun + enabled]);
  // Also where all is known of the host; a server that runs is stopped first.
  expect(await asked.start(["ours", ""])).toMatchObject({ exitCode: 0, stderr: "" });
  expect(asked.told("jobs")).toBe(begun + enabled + cutOff + begunAnew + enabled);
  expect(asked.told("state")).toBe("active\n");
});

it("what systemd still holds of one that was removed is never started in a new one's place", async () => {
  const asked = host();
  asked.set("loadState", "loaded\n");
  expect(await asked.start()).toMatchObject({ exitCode: 0 });
  expect(asked.told("jobs")).toBe(begunAnew + enabled);
});

it("one that is stopped before it was ever proven serves no more", async () => {
  const asked = host("kill -s TERM 0");
  expect(await asked.start()).toMatchObject({ exitCode: 1 });
  // At once: the lock may be another's for longer than it is waited for.
  expect(asked.told("jobs")).toBe(`${begun}stop --no-block ${unit}\n${cutOff}`);
  expect(asked.told("state")).toBe("inactive\n");
});

it("one that was proven stays enabled while it is changed, whatever ends its script", async () => {
  const asked = host();
  asked.links(...allTargets);
  asked.holds("{}");
  expect(await asked.start(["ours", ""], "10809")).toMatchObject({ exitCode: 0, stderr: "" });
  const changed = `${stillEnabled}restart --no-block ${unit}\n`;
  expect(asked.told("jobs")).toBe(changed);
  const cut = host("kill -s TERM 0");
  cut.links(...allTargets);
  cut.holds("{}");
  expect(await cut.start(["ours", ""], "10809")).toBeUndefined();
  expect([cut.told("jobs"), cut.told("state")]).toEqual([changed, "active\n"]);
});

it("one that was proven, and is disabled since it was looked at, is looked at again", async () => {
  for (const left of [[], ["multi-user.target"], ["dev-vm1.device"]]) {
    const asked = host();
    asked.holds("{}");
    asked.links(...left);
    expect(await asked.start(["ours", ""], "10809")).toMatchObject({ exitCode: changedMeanwhile });
    expect(asked.told("jobs")).toBe("");
  }
});

it("what was to start one that is gone starts no new one", async () => {
  const asked = host();
  asked.links("multi-user.target");
  expect(await asked.start()).toMatchObject({ exitCode: 0 });
  expect(asked.told("jobs")).toBe(`disable --quiet --no-reload ${unit}\n${begun}${enabled}`);
});

it("where systemd does not tell of every slice above it, nobody is known to be kept out", async () => {
  const asked = host();
  asked.set("untold", "");
  expect(await asked.start()).toMatchObject({ exitCode: 72 });
  expect(asked.told("jobs")).toBe(begun + cutOff);
});

it("one of which is known already that it lets others in is stopped", async () => {
  const asked = host();
  asked.links(...allTargets);
  asked.holds("{}");
  asked.set("above", "10.0.0.0/8\n");
  expect(await asked.start(["ours", ""], "10809")).toMatchObject({ exitCode: 71 });
  expect(asked.told("jobs")).toBe(stillEnabled + cutOff);
});

it.each([
  ["of which that is known already", "start", { above: "10.0.0.0/8\n" }, stillEnabled],
  ["of which that is seen", "start", { open: "" }, `${stillEnabled}restart --no-block ${unit}\n`],
  ["with TLS", "proveTls", { open: "" }, ""],
] as const)(
  "one that lets others in, %s, is stopped before that is told: nobody may listen",
  async (...row) => {
    const [, name, switches, before] = row;
    const asked = host();
    asked.holds("{}");
    asked.links(...allTargets);
    for (const [one, content] of Object.entries(switches)) asked.set(one, content);
    asked.hangUp();
    expect(await (name === "start" ? asked.start(["ours", ""], "10809") : asked.proveTls())).toBeUndefined();
    expect(asked.told("jobs")).toBe(before + cutOff);
  },
);

it("one that was proven is not stopped for what systemd does not tell while it is changed", async () => {
  const asked = host();
  asked.holds("{}");
  asked.links(...allTargets);
  asked.set("silent", "");
  expect(await asked.start(["ours", ""], "10809")).toMatchObject({ exitCode: 0 });
  expect(existsSync(join(asked.root, "silent"))).toBe(false);
  expect(asked.told("jobs")).toBe(`${stillEnabled}restart --no-block ${unit}\n`);
});

it("one that was removed since it was looked at is not made anew", async () => {
  const asked = host();
  expect(await asked.start(["ours", "ours"])).toMatchObject({ exitCode: changedMeanwhile });
  expect([asked.told("jobs"), existsSync(join(asked.root, "units", unit))]).toEqual(["", false]);
});

it("one that was proven, but cannot be enabled, serves on", async () => {
  const asked = host(': >"$SANDBOX/busy"');
  expect(await asked.start()).toMatchObject({ exitCode: provenOnly });
  expect(asked.told("jobs")).toBe(begun);
  const secured = host(': >"$SANDBOX/busy"');
  secured.holds("{}");
  expect(await secured.proveTls()).toMatchObject({ exitCode: provenOnly });
  expect(secured.told("jobs")).toBe("");
});

it("with TLS it starts at boot once that was proven", async () => {
  const asked = host();
  asked.holds("{}");
  expect(await asked.proveTls()).toMatchObject({ exitCode: 0, stderr: "" });
  expect(asked.told("jobs")).toBe(enabled);
});

it("with TLS and never proven it serves no more when that is stopped; one that starts at boot does", async () => {
  const asked = host("kill -s TERM 0");
  asked.holds("{}");
  expect(await asked.proveTls()).toMatchObject({ exitCode: 1 });
  expect(asked.told("jobs")).toBe(`stop --no-block ${unit}\n${cutOff}`);
  const proven = host("kill -s TERM 0");
  proven.holds("{}");
  expect(await proven.proveTls("enabled")).toMatchObject({ exitCode: 1 });
  expect(proven.told("jobs")).toBe("");
});

it.each(["proveClients", "proveTls"] as const)(
  "%s answers for no unit but the one that was seen",
  async (proof) => {
    const asked = host(': >"$SANDBOX/asked"');
    asked.holds('{"port":10810}');
    expect(await asked[proof]()).toMatchObject({ exitCode: changedMeanwhile });
    expect([asked.told("jobs"), existsSync(join(asked.root, "asked"))]).toEqual(["", false]);
  },
);

const writtenAnew = `cp "$SANDBOX/units/${unit}" "$SANDBOX/new"; mv -f "$SANDBOX/new" "$SANDBOX/units/${unit}"`;

it("one that somebody else has written anew meanwhile is left to that", async () => {
  const asked = host(writtenAnew);
  expect(await asked.start()).toMatchObject({ exitCode: changedMeanwhile });
  expect(asked.told("jobs")).toBe(begun);
});

it("one that somebody else has written anew meanwhile may let in who has no certificate", async () => {
  const asked = host(writtenAnew);
  asked.holds("{}");
  asked.set("open", "");
  expect(await asked.proveTls("enabled")).toMatchObject({ exitCode: changedMeanwhile });
  expect(asked.told("jobs")).toBe("");
});

it("exports are removed together: stopped at once, systemd reads its units once, and then their files go", async () => {
  const asked = host();
  const names = ["one", "two", "theirs", "broken"].map((name) => `lvm-nbd-export-${name}.service`);
  const path = (name = "") => join(asked.root, "units", name);
  for (const name of names)
    writeFileSync(path(name), text.replace("Mark=ours", `Mark=${name.slice(15, -8)}`));
  mkdirSync(path(`${names[0]}.d`));
  const [one = "", two = "", theirs = "", broken = ""] = names;
  const gone = "lvm-nbd-export-gone.service";
  const result = await asked.takeDown([one, "one"], [theirs, "ours"], [two, "two"], [gone, ""]);
  expect(result?.exitCode).toBe(0);
  const told = parseFields(result?.stdout ?? "");
  expect([one, two, gone, theirs].map((name) => told.get(name))).toEqual(["0", "0", "0", "77"]);
  expect(names.map((name) => existsSync(path(name)))).toEqual([false, false, true, true]);
  expect(existsSync(path(`${one}.d`))).toBe(false);
  expect(asked.told("jobs")).toBe(
    `disable --quiet --now --no-reload ${one} ${two}\ndaemon-reload\nreset-failed ${one} ${two} ${gone}\n`,
  );
  // One that cannot be stopped does not keep the others, and its file stays.
  writeFileSync(path(one), text);
  const again = await asked.takeDown([broken, "broken"], [one, "ours"]);
  const then = parseFields(again?.stdout ?? "");
  expect([broken, one].map((name) => then.get(name))).toEqual(["1", "0"]);
  expect([broken, one].map((name) => existsSync(path(name)))).toEqual([true, false]);
});

/** Attachments of that host, each with a mark, its device and its path: `NAME.conf`. */
function attached(asked: ExportHost, ...all: readonly string[]) {
  const names = all.map((name) => `lvm-nbd-attach-${name}.service`);
  const unitPath = (name: string) => join(asked.root, "units", name);
  const pathOf = (name: string) => join(asked.root, `${name}.conf`);
  for (const name of names) {
    writeFileSync(unitPath(name), text);
    writeFileSync(pathOf(name), "");
    asked.set(`${name}.dev`, "");
  }
  const left = () => names.map((name) => [existsSync(unitPath(name)), existsSync(pathOf(name))]);
  return { names, left };
}

it("an attachment is stopped when nobody holds its device; one that is held, or may be, or another's is left alone", async () => {
  const asked = host();
  const { names, left } = attached(asked, "one", "held", "unknown", "theirs", "two");
  const [one = "", held = "", unknown = "", theirs = "", two = ""] = names;
  for (const device of ["held", "unknown"]) asked.set(device, "");
  asked.set(`${one}.conf.new`, "");
  const result = await asked.takeDown(
    ...([
      [one, "ours", `${one}.dev`],
      [held, "ours", "held"],
      [unknown, "ours", "unknown"],
    ] as const),
    ...([
      [theirs, "mine", `${theirs}.dev`],
      [two, "ours"],
    ] as const),
  );
  const told = parseFields(result?.stdout ?? "");
  expect(names.map((name) => told.get(name))).toEqual(["0", "75", "1", "77", "0"]);
  expect([told.get(`${held}.said`), told.get(`${unknown}.said`)]).toEqual(["mount L21udA==", "who knows"]);
  const [gone, there] = [
    [false, false],
    [true, true],
  ];
  expect(left()).toEqual([gone, there, there, there, gone]);
  // That may be another's path.
  expect(existsSync(join(asked.root, `${one}.conf.new`))).toBe(true);
  expect(asked.told("jobs")).toBe(
    `${[one, two].map((name) => `disable --quiet --now --no-reload ${name}\n`).join("")}daemon-reload\nreset-failed ${one} ${two}\n`,
  );
  expect(asked.told("udev")).toBe("control --reload, of 3\n");
  // What all attachments share stays while there is another, and goes with the last.
  expect(asked.told("shared")).toBe("kept\n");
  await asked.takeDown([held, "ours"], [unknown, "ours"], [theirs, "ours"]);
  expect([asked.told("shared"), asked.told("modules")]).toEqual(["", ""]);
});

it("exports and attachments go together; what systemd does not do for all of them is told of those it was for", async () => {
  const asked = host();
  asked.holds("{}");
  const { names, left } = attached(asked, "one");
  const [one = ""] = names;
  asked.set("unshielded", "");
  const result = await asked.takeDown([one, "ours", `${one}.dev`], [unit, "ours"]);
  const told = parseFields(result?.stdout ?? "");
  expect([told.get(one), told.get(unit), told.get(`${one}.said`)]).toEqual(["1", "0", "no udev"]);
  expect(left()).toEqual([[false, false]]);
});

it("what was not begun in time is left to another command, and what was started again to another run", async () => {
  const asked = host();
  const { names, left } = attached(asked, "one", "two", "three");
  const [one = "", two = "", three = ""] = names;
  // Each time that it is looked at, 20 s have passed.
  asked.set("clock", "0\n");
  const first = parseFields(
    (await asked.takeDown([one, "ours"], [two, "ours"], [three, "ours"]))?.stdout ?? "",
  );
  expect(names.map((name) => first.get(name))).toEqual(["0", undefined, undefined]);
  asked.set("needed", "");
  const second = parseFields((await asked.takeDown([two, "ours"]))?.stdout ?? "");
  expect([second.get(two), second.get(`${two}.said`)]).toEqual(["1", "it was started again meanwhile"]);
  expect(left()).toEqual([
    [false, false],
    [true, true],
    [true, true],
  ]);
});

it("nothing of systemd's is read anew where nothing was done", async () => {
  const asked = host();
  const { names } = attached(asked, "held");
  asked.set("held", "");
  await asked.takeDown([names[0] ?? "", "ours", "held"]);
  expect([asked.told("jobs"), asked.told("udev")]).toEqual(["", ""]);
});

it("what another unit has systemd remember is read once more when its file is gone", async () => {
  const asked = host();
  const { names } = attached(asked, "one");
  const [one = ""] = names;
  asked.set("remembered", "");
  expect(parseFields((await asked.takeDown([one, "ours"]))?.stdout ?? "").get(one)).toBe("0");
  expect(asked.told("jobs")).toMatch(/daemon-reload\nreset-failed \S+\ndaemon-reload\n$/);
});

it("no file goes where systemd does not read its units anew: it would start what it remembers", async () => {
  const asked = host();
  asked.set("deaf", "");
  asked.holds("{}");
  expect(parseFields((await asked.takeDown([unit, "ours"]))?.stdout ?? "").get(unit)).toBe("1");
  expect(existsSync(join(asked.root, "units", unit))).toBe(true);
});
