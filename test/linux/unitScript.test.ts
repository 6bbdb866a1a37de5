import { execFileSync } from "node:child_process";
import { expect, it } from "vitest";
import { unitFunctions } from "../../provider/linux/unitScript.js";

/** What `read_anew` asks of a systemd that shows that. */
function asked(shown: string, isNew: string): string {
  const text = `${unitFunctions}
systemctl() { case $1 in show) printf '%s\\n' "$SHOWN";; *) echo "$*";; esac; }
read_anew vm1.service "$1"`;
  return execFileSync("sh", ["-c", text, "sh", isNew], { encoding: "utf8", env: { SHOWN: shown } });
}

const read = "LoadState=loaded\nUnitFileState=enabled\nNeedDaemonReload=no";
const reload = "daemon-reload\n";

it("a new unit that systemd shows as it is spares it reading all of them", () => {
  expect(asked(read, "new")).toBe("");
  expect(asked(read.split("\n").reverse().join("\n"), "new")).toBe("");
});

it.each<[string, string, string]>([
  ["one that was there before, also if a clock that went back hides it", read, ""],
  ["one that is known to be gone", read.replace("=loaded", "=not-found"), "new"],
  ["one of which an older file was read", read.replace("=no", "=yes"), "new"],
  ["one that was seen before it was enabled", read.replace("=enabled", "=disabled"), "new"],
])("%s is read anew", (_what, shown, isNew) => {
  expect(asked(shown, isNew)).toBe(reload);
});
