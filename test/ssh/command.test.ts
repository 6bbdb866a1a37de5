import { expect, test } from "vitest";
import { isLvmNbdError } from "../../provider/core/errors.js";
import { displayCommand, killCommand, takePid, wireCommand } from "../../provider/ssh/command.js";
import type { RemoteCommand } from "../../provider/ssh/types.js";

const command: RemoteCommand = { argv: ["lvs", "vg 0"], deadlineSeconds: 30, kind: "read" };

test("a command goes out with its environment, its marker and its deadline, each word quoted", () => {
  expect(wireCommand(command, false, "mark")).toBe(
    "env LC_ALL=C LVM_SUPPRESS_FD_WARNINGS=1 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LVM_NBD_RUN=mark " +
      `sh -c 'echo "$1 $$" >&2; shift; exec timeout "$@"' sh mark -k 5 30 lvs 'vg 0'`,
  );
});

test("with sudo all of it runs as root, and so does what ends it", () => {
  expect(wireCommand(command, true, "mark")).toBe(`sudo -n -- ${wireCommand(command, false, "mark")}`);
  expect(killCommand(7, 5, true, "mark")).toContain("exec sudo -n -- env");
});

test.each([
  ["no deadline", { deadlineSeconds: 0 }],
  ["an endless deadline", { deadlineSeconds: Number.POSITIVE_INFINITY }],
  ["a deadline that is no number", { deadlineSeconds: Number.NaN }],
  ["no grace, so that nothing is killed", { graceSeconds: 0 }],
])("%s is refused", (_what, change) => {
  expect(() => wireCommand({ ...command, ...change }, false, "mark")).toThrowError(
    expect.toSatisfy((error: unknown) => isLvmNbdError(error, "INVALID_INPUT")),
  );
});

test("the marked line is taken out of stderr, with what came before the command", () => {
  const banner = "sudo: unable to resolve host server1\nWelcome";
  expect(takePid(`${banner}mark 4711\nlvs: oh\n`, "mark")).toEqual({ pid: 4711, stderr: "lvs: oh\n" });
  // The mark alone, as where sudo tells what it was asked to run.
  expect(takePid("mark 1mark markmark 4711\noh", "mark")).toEqual({ pid: 4711, stderr: "oh" });
  expect(takePid("sudo: mark is run\nmark 4711\noh", "mark")).toEqual({ pid: 4711, stderr: "oh" });
});

test("without the whole marked line nothing is known, and nothing is lost", () => {
  for (const stderr of ["", "mark 47", "sudo: a password is required\n"]) {
    expect(takePid(stderr, "mark")).toEqual({ pid: undefined, stderr });
  }
});

test("a command is shown as one can paste it, a script by its beginning, stdin never", () => {
  expect(displayCommand({ argv: ["lvremove", "vg 0/a'b"] })).toBe(`lvremove 'vg 0/a'\\''b'`);
  const shown = { ...command, argv: ["sh", "-c", "set -e\nlvs\nlvs", "sh", "x"], stdin: "secret" };
  expect(displayCommand(shown)).toBe("sh -c 'set -e...' sh x");
});
