import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it } from "vitest";
import { reloadFunction, unitFunctions } from "../../provider/linux/unitScript.js";

/** What `read_anew` asks of a systemd that shows that. */
function asked(shown: string, isNew: string): string {
  const text = `${unitFunctions}
systemctl() { case $1 in show) printf '%s\\n' "$SHOWN";; *) echo "$*";; esac; }
read_anew vm1.service "$1" enabled`;
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

/** What systemd was asked by a script in a folder of its own, FOLDER. Its first answer waits until so many have asked for a reload. */
function reloadsOf(text: string, asking = 1): string[] {
  const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-reloads-"));
  try {
    const own = `${unitFunctions}${reloadFunction}`.replaceAll("/run/", `${folder}/`);
    const script = `${own}
flock() { echo >>FOLDER/asking; command flock "$@"; }
systemctl() {
  echo began >>FOLDER/log
  while [ "$(wc -l <FOLDER/asking)" -lt ${asking} ]; do sleep 0.01; done
  [ ! -e FOLDER/broken ] || return 1
  echo "$*" >>FOLDER/log
}
${text}`.replaceAll("FOLDER", folder);
    execFileSync("sh", ["-c", script], { stdio: ["ignore", "pipe", "ignore"], timeout: 20_000 });
    return readFileSync(join(folder, "log"), "utf8").trim().split("\n");
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const whole = ["began", "daemon-reload"];

it("who waits while the units are read, and read again, has been seen by that", () => {
  // The first did not see those that asked after it had begun.
  const many = `(reload_units) & while [ ! -e FOLDER/log ]; do sleep 0.01; done
for one in 1 2 3 4 5 6; do (reload_units && echo >>FOLDER/done) & done
wait; [ "$(wc -l <FOLDER/done)" = 6 ]`;
  expect(reloadsOf(many, 7)).toEqual([...whole, ...whole]);
});

it("where it cannot be counted each reads them by itself", () => {
  const uncounted = "mkdir /run/lvm-nbd.reloads.new; reload_units && reload_units";
  expect(reloadsOf(uncounted.replace("/run/", "FOLDER/"))).toEqual([...whole, ...whole]);
});

it("each that comes after the other reads them by itself, as after one that failed or was killed", () => {
  expect(reloadsOf("reload_units && reload_units && reload_units")).toEqual([...whole, ...whole, ...whole]);
  expect(reloadsOf(": >FOLDER/broken; ! (reload_units) && rm FOLDER/broken && reload_units")).toEqual([
    "began",
    ...whole,
  ]);
  const killed = `(reload_units) & one=$!; while [ ! -e FOLDER/log ]; do sleep 0.01; done; kill -s KILL $one; echo >>FOLDER/asking
reload_units`;
  expect(reloadsOf(killed, 2)).toEqual(["began", ...whole]);
});
