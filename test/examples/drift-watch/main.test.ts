/** The program as it is started, with a `pulumi` that prints what was recorded. */
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { beforeEach, expect, it } from "vitest";
import { runChild } from "../../lab/child.mts";

const root = process.cwd();
const program = join(root, "examples", "drift-watch", "main.ts");
let folder: string;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "drift-watch-"));
  return () => rmSync(folder, { recursive: true });
});

/** `script`: what `pulumi` is. */
async function watch(script: string, ...more: string[]) {
  const bin = join(folder, "bin");
  mkdirSync(bin, { recursive: true });
  writeFileSync(join(bin, "pulumi"), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  const { exitCode, stdout, stderr } = await run([
    ...["--project", folder, "--stack", "watch", "--out", join(folder, "out")],
    // The recordings have no age.
    ...["--max-age-hours", "1e9", ...more],
  ]);
  return { exitCode, text: stdout, stderr };
}

function run(args: readonly string[], path = program) {
  const env = { ...process.env, PATH: [join(folder, "bin"), process.env.PATH].join(delimiter) };
  return runChild(["node", path, ...args], { env, allowFailure: true });
}

const recording = (state: string) => `cat '${join(root, "test", "recorded", "preview", `${state}.jsonl`)}'`;
const out = (name: string) => readFileSync(join(folder, "out", name), "utf8");

it("ends with 0 when nothing has drifted, and leaves three files and no other", async () => {
  expect((await watch(recording("asDeclared"))).exitCode).toBe(0);
  expect(readdirSync(join(folder, "out")).sort()).toEqual(["lvm_nbd.prom", "report.json", "report.txt"]);
  expect(JSON.parse(out("report.json"))).toMatchObject({ outcome: "good", stack: "watch" });
});

it("asks Pulumi for a preview with a refresh, as events, in the project", async () => {
  await watch(`echo "$PWD $PULUMI_ENABLE_STREAMING_JSON_PREVIEW $*" >asked; ${recording("asDeclared")}`);
  expect(readFileSync(join(folder, "asked"), "utf8")).toBe(
    `${folder} true preview --refresh --json --stack watch --non-interactive --color never\n`,
  );
});

it("ends with 1 on drift, and prints what is in report.txt", async () => {
  const { exitCode, text } = await watch(recording("driftedAndProgramChanged"));
  expect(exitCode).toBe(1);
  expect(text).toContain("NbdExport e-a on server1");
  expect(text).toBe(out("report.txt"));
});

it("ends with 2 when a host is not reached, and keeps when it last knew, but no figure", async () => {
  await watch(recording("asDeclared"));
  const known = JSON.parse(out("report.json")).lastSuccessAt;
  expect((await watch(`${recording("unreachable")}; exit 1`)).exitCode).toBe(2);
  expect(JSON.parse(out("report.json")).lastSuccessAt).toBe(known);
  expect(out("lvm_nbd.prom")).toContain('lvm_nbd_watch_up{stack="watch"} 0\n');
  expect(out("lvm_nbd.prom")).not.toContain("lvm_nbd_drifted_resources");
  expect((await watch(recording("asDeclared"))).exitCode).toBe(0);
});

it("ends with 2 when its own report of before cannot be read, and writes a good one all the same", async () => {
  mkdirSync(join(folder, "out"));
  writeFileSync(join(folder, "out", "report.json"), "{");
  expect((await watch(`${recording("unreachable")}; exit 1`)).exitCode).toBe(2);
  expect(JSON.parse(out("report.json")).lastSuccessAt).toBeUndefined();
});

it("stops a Pulumi that takes too long, and ends with 2", async () => {
  const { exitCode, text } = await watch(
    `${recording("asDeclared")}; sleep 60 & echo $! >child; wait`,
    ...["--deadline-seconds", "1"],
  );
  expect(exitCode).toBe(2);
  expect(text).toContain("pulumi took longer than 1 s and was stopped");
  // With all that it started, at once: what is asked to end need not be killed.
  expect(JSON.parse(out("report.json")).seconds).toBeLessThan(15);
  const child = readFileSync(join(folder, "child"), "utf8").trim();
  const { stdout } = await runChild(["ps", "-o", "stat=", "-p", child], { allowFailure: true });
  // Z: it has ended, and nobody has asked for its status.
  expect(stdout.trim()).toMatch(/^(Z.*)?$/);
});

it.each([
  [
    "Pulumi fails",
    "echo 'error: incorrect passphrase' >&2; exit 255",
    /exit code 255 .*\n *error: incorrect/,
  ],
  ["Pulumi says nothing", "exit 0", /before its preview was finished/],
  ["Pulumi is killed", "kill -KILL $$", /ended by SIGKILL/],
])("ends with 2 when %s, and says so", async (_, script, why) => {
  const { exitCode, text } = await watch(script);
  expect(exitCode).toBe(2);
  expect(text).toMatch(why);
  expect(out("lvm_nbd.prom")).toContain('lvm_nbd_watch_up{stack="watch"} 0\n');
});

it("ends with 2 where there is no Pulumi, no project, or no place for the report", async () => {
  const args = ["--project", join(folder, "none"), "--stack", "watch", "--out", join(folder, "out")];
  expect((await run(args)).exitCode).toBe(2);
  expect(out("report.txt")).toContain("pulumi could not be started");
  writeFileSync(join(folder, "file"), "");
  expect((await watch(recording("asDeclared"), "--out", join(folder, "file", "out"))).exitCode).toBe(2);
});

it.each([
  [[], /--project DIR/],
  [["--project", "."], /stack/],
  [["--project", ".", "--stack", "s", "--out", ".", "--max-age-hours", "soon"], /max-age-hours/],
  [["--nonsense"], /nonsense/],
])("ends with 2 when it is started with %j", async (args, message) => {
  const { exitCode, stderr } = await run(args);
  expect(exitCode).toBe(2);
  expect(stderr).toMatch(message);
});

it("ends with 2 when a part of it is missing, not with Node's own 1, which would pass for drift", async () => {
  const copy = join(folder, "main.ts");
  cpSync(program, copy);
  writeFileSync(join(folder, "package.json"), '{ "type": "module" }');
  const { exitCode, stderr } = await run([], copy);
  expect(exitCode).toBe(2);
  expect(stderr).toContain("ERR_MODULE_NOT_FOUND");
});
