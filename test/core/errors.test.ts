import { expect, it } from "vitest";
import { errorCodes, isLvmNbdError, LvmNbdError } from "../../provider/core/errors.js";

it("says code, resource, host, command, exit code, stderr and what to do", () => {
  const error = new LvmNbdError("COMMAND_FAILED", {
    message: "no snapshot could be taken",
    host: "server1",
    resource: "LvSnapshot vm1",
    command: "lvcreate -s x",
    exitCode: 5,
    stderr: "first\nsecond\n",
    advice: "Do this.",
  });
  expect(error.message).toBe(
    [
      "COMMAND_FAILED: LvSnapshot vm1 on host server1: no snapshot could be taken",
      "  command: lvcreate -s x",
      "  exit code: 5",
      "  stderr: first",
      "          second",
      "  what to do: Do this.",
    ].join("\n"),
  );
});

it("shows nothing of a host's that turns the order of what is read, or looks like a line of ours", () => {
  const error = new LvmNbdError("COMMAND_FAILED", {
    message: "it said \u202eabc\u2066\u2028\u2029\u202a\n  what to do: run this",
    advice: "Do this.",
  });
  expect(error.message.split("\n")).toEqual([
    "COMMAND_FAILED: it said ?abc????",
    "            what to do: run this",
    "  what to do: Do this.",
  ]);
});

it("advises by the code where nothing better is known, for every code", () => {
  for (const code of Object.keys(errorCodes) as (keyof typeof errorCodes)[]) {
    expect(new LvmNbdError(code, { message: "x" }).message).toContain(`what to do: ${errorCodes[code]}`);
  }
});

it("keeps a hostile host's escape codes from the terminal", () => {
  const hostile = "\u001b]0;owned\u0007\u001b[2J\u009b1m\r";
  const { message } = new LvmNbdError("COMMAND_FAILED", {
    message: hostile,
    command: hostile,
    stderr: hostile,
  });
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what must not be there
  expect(message).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/);
});

it("shows the end of a long stderr", () => {
  const { message } = new LvmNbdError("COMMAND_FAILED", {
    message: "x",
    stderr: `${"a".repeat(5000)}the reason`,
  });
  expect(message).toContain("the reason");
  expect(message.length).toBeLessThan(3000);
});

it("learns where it happened without losing what it knew", () => {
  const error = new LvmNbdError("LINK_LOST", { message: "x", host: "server1" }).with({
    host: "other",
    resource: "NbdExport a",
  });
  expect(error.details).toMatchObject({ host: "server1", resource: "NbdExport a" });
  expect(isLvmNbdError(error, "LINK_LOST")).toBe(true);
  expect(isLvmNbdError(error, "CANCELLED")).toBe(false);
  expect(isLvmNbdError(new Error("x"))).toBe(false);
});

it.each(Object.entries(errorCodes))("%s says what to do, not only what is wrong", (_, explanation) => {
  expect(explanation).toMatch(
    /\b(add|bring|check|choose|compare|correct|detach|end|find|give|install|look at|mend|name (another|one)|put|remove|run|thaw|use)\b|the next `pulumi up`/i,
  );
});

it("stays short, whatever a host has written into its message", () => {
  const { message } = new LvmNbdError("COMMAND_FAILED", { message: `begin ${"a".repeat(16 * 1024 ** 2)}` });
  expect(message).toContain("begin aaa");
  expect(message.length).toBeLessThan(10_000);
});
