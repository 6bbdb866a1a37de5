import { describe, expect, it } from "vitest";
import { hostName, type Look, readPreview } from "../../../examples/drift-watch/parse.ts";
import { recordedPreview } from "../../support/recorded.js";

type Recorded = Parameters<typeof recordedPreview>[0];

const ended = (stdout: string, exitCode = 0, stderr = "") => readPreview({ exitCode, stdout, stderr });
const look = (state: Recorded) => ended(recordedPreview(state));

/** What drifted, e.g. `{ "LvSnapshot s-a": ["was made writable"] }`. */
const drifted = ({ resources }: Look) =>
  Object.fromEntries(
    resources
      .filter(({ drift }) => drift.length > 0)
      .map(({ type, name, drift }) => [`${type} ${name}`, drift]),
  );
const pending = ({ resources }: Look) =>
  Object.fromEntries(
    resources.flatMap(({ name, pending: plan }) => (plan === undefined ? [] : [[name, plan]])),
  );

/** The recording with its events changed, or left out. */
function changed(state: Recorded, change: (line: string) => string | undefined): string {
  return recordedPreview(state)
    .trim()
    .split("\n")
    .flatMap((line) => change(line) ?? [])
    .join("\n");
}

describe("a stack that is as declared", () => {
  it("has no drift and no error, though its snapshots fill up", () => {
    const seen = look("asDeclared");
    expect(seen.errors).toEqual([]);
    expect(drifted(seen)).toEqual({});
    expect(pending(seen)).toEqual({});
    expect(seen.resources).toHaveLength(8);
  });

  it("tells what the servers show now, and not what the state holds", () => {
    const snapshot = look("asDeclared").resources.find(({ name }) => name === "s-a");
    expect(snapshot).toMatchObject({ type: "LvSnapshot", host: "server1", seen: { usedPercent: 26.56 } });
    expect(recordedPreview("asDeclared")).toContain('"usedPercent":0');
  });
});

describe("drift", () => {
  const away = "is gone from the host; `pulumi up` will make it again";
  const stopped = "is stopped; `pulumi up` will start it as declared";

  it("is told of what is gone, of what was changed in place, and of what no `pulumi up` will mend, beside a changed program", () => {
    expect(drifted(look("driftedAndProgramChanged"))).toEqual({
      "LvSnapshot s-a": ["was made writable"],
      "LvSnapshot s-b": [away],
      "NbdExport e-a": [stopped],
      "NbdExport e-b": [stopped],
      "BackupImage monday": [expect.stringMatching(/^\/backup\/monday.raw was changed: its size/)],
      "BackupImage tuesday": [away],
    });
  });

  it("is told of what needs a replacement", () => {
    const overflowed = "is now overflowed, was valid";
    const seen = look("overflowed");
    expect(drifted(seen)).toMatchObject({ "LvSnapshot s-a": [overflowed], "LvSnapshot s-k": [overflowed] });
    expect(pending(seen)).toEqual({});
  });

  it("that a `pulumi refresh` has accepted into the state is told all the same", () => {
    const seen = look("accepted");
    expect(drifted(seen)).toMatchObject({
      "NbdExport e-a": [stopped],
      "LvSnapshot s-a": [expect.stringContaining("`pulumi up` would update it")],
    });
  });

  it("is told by what the servers show, should no warning have been given", () => {
    const silent = (state: Recorded) =>
      drifted(ended(changed(state, (line) => (line.includes('"severity":"warning"') ? undefined : line))));
    expect(silent("accepted")).toMatchObject({
      "NbdExport e-a": ["is stopped"],
      "BackupImage monday": ["is changed"],
    });
    expect(silent("driftedAndProgramChanged")).toMatchObject({
      "LvSnapshot s-b": ["is gone from the host"],
      "NbdExport e-b": ["is stopped"],
      "BackupImage monday": ["is changed"],
    });
  });

  it("is laid to the resource with the longer of two names that begin alike", () => {
    const text = changed("driftedAndProgramChanged", (line) => line.replaceAll("s-k", "s-a on server1"));
    const renamed = text.replace(
      "LvSnapshot s-a on server1: was made",
      "LvSnapshot s-a on server1 on x: was made",
    );
    expect(drifted(ended(renamed))).toMatchObject({ "LvSnapshot s-a on server1": ["was made writable"] });
  });
});

describe("a changed program", () => {
  it("is no drift", () => {
    const seen = look("programChanged");
    expect(drifted(seen)).toEqual({});
    expect(pending(seen)).toEqual({ "s-a": "update", "s-b": "replace", "s-new": "create", "e-b": "delete" });
  });

  it("is not another version of the provider's closure", () => {
    const upgraded = changed("accepted", (line) =>
      line.includes('"op":"refresh"') ? line : line.replaceAll("(closure)", "(another closure)"),
    );
    expect(drifted(ended(upgraded))).toHaveProperty("LvSnapshot s-a");
    expect(Object.keys(pending(ended(upgraded))).sort()).toEqual(["s-b", "tuesday"]);
  });

  it("is told beside the drift of the same resource", () => {
    expect(pending(look("driftedAndProgramChanged"))).toMatchObject({ "s-a": "update", "s-b": "create" });
  });

  it("is not what is only known later, because something else is made anew", () => {
    const later = changed("overflowed", (line) =>
      /"op":"(create-replacement|replace)"/.test(line) && line.includes("::e-a")
        ? line.replaceAll('"device":"/dev/VgVm/s-a"', '"device":"04da6b54-80e4-46f7-96ec-b56ff0331ba9"')
        : line.includes("NbdExport e-a") || (line.includes("::e-a") && line.includes("refresh"))
          ? line.replaceAll("notServing", "serving").replace('"severity":"warning"', '"severity":"info"')
          : line,
    );
    const seen = ended(later);
    expect(drifted(seen)).not.toHaveProperty("NbdExport e-a");
    expect(pending(seen)).toEqual({});
  });
});

describe("a look that cannot tell", () => {
  const good = recordedPreview("asDeclared");

  it("names each resource whose host is not reached, and tells of the others what it saw", () => {
    const seen = ended(recordedPreview("unreachable"), 1);
    expect(seen.errors).toHaveLength(5);
    for (const error of seen.errors) expect(error).toMatch(/^HOST_UNREACHABLE: \w+ \S+ on host /);
    expect(Object.keys(drifted(seen)).sort()).toEqual(["BackupImage monday", "BackupImage tuesday"]);
  });

  it("is one of a program that does not run, although every server was looked at", () => {
    expect(ended(recordedPreview("invalid"), 1).errors).toEqual([
      expect.stringMatching(/resource 'wrong': property size value .* is not a size/),
    ]);
  });

  it("gives the program's error without where in Pulumi it happened", () => {
    const message = "Running program failed:\nError: broken\n    at x (/y.js:1:7)\n    at z (/y.js:2:7)\n";
    const thrown = JSON.stringify({ sequence: 999, diagnosticEvent: { severity: "error", message } });
    expect(ended(`${good}${thrown}\n`, 1).errors).toEqual(["Running program failed:\nError: broken"]);
  });

  const lines = good.trim().split("\n");

  it("is one cut off anywhere", () => {
    for (let end = 0; end < lines.length - 1; end++)
      expect(ended(lines.slice(0, end).join("\n")).errors, `${end} lines`).not.toEqual([]);
    const summarised = lines.slice(0, -1).join("\n");
    for (let cut = 1; cut < 400; cut += 7)
      expect(ended(summarised.slice(0, -cut)).errors, `${cut} less`).not.toEqual([]);
  });

  it.each([
    ["with another exit status than 0", good, 255, /exit code 255/],
    ["with nothing but an error", "", 255, /error: no stack named 'x' found/],
    ["with a line that is no event", `${good}Segmentation fault\n`, 0, /line \d+ .*Segmentation/],
    ["with a line that is another JSON", `${good}{}\n`, 0, /line \d+ .* is no engine event/],
    ["of a failed preview", good.replace('"succeeded"', '"failed"'), 0, /a preview that failed/],
  ])("is one %s", (_, stdout, exitCode, message) => {
    const { errors } = ended(stdout, exitCode, "error: no stack named 'x' found");
    expect(errors.join("\n")).toMatch(message);
  });

  it("is one in which a resource of the state was not refreshed", () => {
    const skipped = changed("asDeclared", (line) =>
      line.includes('"op":"refresh"') && line.includes("::s-a") ? undefined : line,
    );
    expect(ended(skipped).errors).toEqual(["LvSnapshot s-a was not looked at"]);
    const unanswered = changed("asDeclared", (line) =>
      line.includes("resOutputsEvent") && line.includes("::e-a") ? undefined : line,
    );
    expect(ended(unanswered).errors).toEqual(["NbdExport e-a was not looked at"]);
  });
});

it("a resource that a cut replacement has yet to remove is not taken for the one that replaced it", () => {
  const old = changed("asDeclared", (line) =>
    line.includes("resOutputsEvent") && line.includes("::s-a") ? line : undefined,
  );
  const event = JSON.parse(old);
  event.resOutputsEvent.metadata.old.delete = true;
  delete event.resOutputsEvent.metadata.new;
  expect(drifted(ended(`${recordedPreview("asDeclared")}${JSON.stringify(event)}\n`))).toEqual({});
});

it.each([
  ["server1", "server1"],
  [{ address: "10.0.0.1" }, "10.0.0.1"],
  [{ address: "10.0.0.1", port: 2222 }, "10.0.0.1:2222"],
  [{ address: "fe80::1", port: 2222 }, "[fe80::1]:2222"],
  [{ ciphertext: "[secret]" }, ""],
])("a host %j is named %j", (host, name) => {
  expect(hostName(host)).toBe(name);
});
