/** The script that starts an export, in a real shell. */
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { hostCommands } from "../../provider/core/hostCommands.js";
import { changedMeanwhile } from "../../provider/linux/unitScript.js";
import "../../provider/resources/nbdExport.js";
import { clientsProof } from "../../provider/resources/clientsProof.js";
import type { CommandResult } from "../../provider/ssh/types.js";
import { ShellHost } from "../support/shellHost.js";

const unit = "lvm-nbd-export-vm1.service";
const text = "[Service]\nIPAddressAllow=10.0.0.2 localhost\n\n[X-LvmNbd]\nMark=ours\n";

/** A host on which `nbdinfo` gets in, and a filter of systemd keeps it out. `atProof`: what happens meanwhile, as shell text. */
class ExportHost extends ShellHost {
  constructor(atProof: string) {
    super(
      "export",
      {
        systemctl: `
          case "$*" in
          *slice*) ;;
          *ActiveState*) cat "$SANDBOX/state";;
          "show -p Job"*) ;;
          show*) echo "IPAddressAllow=10.0.0.2/32 127.0.0.0/8 ::1/128"; echo "IPAddressDeny=::/0 0.0.0.0/0";;
          *) echo "$*" >>"$SANDBOX/jobs";;
          esac
          case "$*" in
          start*) echo active >"$SANDBOX/state";;
          *--now*) echo inactive >"$SANDBOX/state";;
          esac`,
        "systemd-run": `case "$*" in *IPAddressDeny=any*) ${atProof || ":"}; exit 124;; *) echo 1048576;; esac`,
        nbdinfo: "echo 1048576",
        nbdcopy: "head -c 4096 /dev/zero",
        sleep: ":",
      },
      [],
    );
    mkdirSync(join(this.folder, "units"));
    this.set("state", "inactive\n");
  }

  protected inside(path: string): string {
    return path
      .replaceAll(dirname(clientsProof), join(this.folder, "seen"))
      .replaceAll("/etc/systemd/system", join(this.folder, "units"))
      .replaceAll("/run/lvm-nbd.lock", join(this.folder, "lock"));
  }

  async start(marks: readonly [string, string] = ["absent", "absent"], port = ""): Promise<CommandResult> {
    const command = hostCommands().find(({ name }) => name === "apply-export");
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
    const argv = [...(command?.argv ?? []), ...args];
    const result = await this.execute({ argv, stdin: text, kind: "change", deadlineSeconds: 20 });
    if (result === undefined) throw new Error("the script was killed");
    return result;
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

const begun = `disable --quiet ${unit}\nstart --no-block ${unit}\n`;
const cutOff = `disable --quiet --now ${unit}\n`;
const enabled = `enable --quiet ${unit}\n`;

it("an export is started, proven, and only then starts at boot", async () => {
  const asked = host('cp "$SANDBOX/jobs" "$SANDBOX/before"');
  expect(await asked.start()).toMatchObject({ exitCode: 0, stderr: "" });
  expect([asked.told("before"), asked.told("jobs")]).toEqual([begun, begun + enabled]);
  // Also where all is known of the host; a server that runs is stopped first.
  expect(await asked.start(["ours", ""])).toMatchObject({ exitCode: 0, stderr: "" });
  expect(asked.told("jobs")).toBe(begun + enabled + cutOff + begun + enabled);
  expect(asked.told("state")).toBe("active\n");
});

it("one that is stopped before it was ever proven serves no more", async () => {
  const asked = host("kill -s TERM 0");
  expect(await asked.start()).toMatchObject({ exitCode: 1 });
  expect(asked.told("jobs")).toBe(begun + cutOff);
  expect(asked.told("state")).toBe("inactive\n");
});

it("one that somebody else has written anew meanwhile is left to that", async () => {
  const asked = host(
    `cp "$SANDBOX/units/${unit}" "$SANDBOX/new"; mv -f "$SANDBOX/new" "$SANDBOX/units/${unit}"`,
  );
  expect(await asked.start()).toMatchObject({ exitCode: changedMeanwhile });
  expect(asked.told("jobs")).toBe(begun);
});
