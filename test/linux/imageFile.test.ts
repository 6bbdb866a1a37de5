import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, realpathSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { emitFunctions, parseFields } from "../../provider/linux/fields.js";
import {
  fileProblem,
  imageGuard,
  imageGuardFunctions,
  imageProblem,
  imageSize,
  lookAtImageFunction,
  parseQcow2Header,
} from "../../provider/linux/imageFile.js";
import { recordedQcow2Header } from "../support/recorded.js";

describe("the header of a qcow2 image", () => {
  it.each(["plain", "version2"] as const)("tells the size of its content: %s", (name) => {
    expect(parseQcow2Header(recordedQcow2Header(name))).toEqual({ sizeBytes: 16777216 });
  });

  it.each([
    ["backing file", "backingFile"],
    ["data file", "dataFile"],
  ] as const)("tells of the %s that it needs", (needs, name) => {
    expect(parseQcow2Header(recordedQcow2Header(name))).toEqual({ sizeBytes: 16777216, needs });
  });

  it.each([
    "",
    recordedQcow2Header("plain").slice(2),
    recordedQcow2Header("plain").replace(/^5/, "6"),
    recordedQcow2Header("plain").replace("fb00000003", "fb00000001"),
    "00".repeat(80),
  ])("is not guessed from %j", (digits) => {
    expect(parseQcow2Header(digits)).toBeUndefined();
  });
});

describe("what may be served", () => {
  const sound = { folder: "yes", kind: "regular file", exposed: "", realPath: "/b/vm1", fileSize: "1048576" };
  const problem = (format: "raw" | "qcow2", change: Readonly<Record<string, string>>) =>
    imageProblem({ file: "/b/vm1", format }, new Map(Object.entries({ ...sound, ...change })))?.message;

  it("is a file of root's alone that holds a disk", () => {
    expect(problem("raw", {})).toBeUndefined();
    expect(problem("qcow2", { fileSize: "196616", header: recordedQcow2Header("plain") })).toBeUndefined();
  });

  it("is nothing that others than root can change, or of which that could not be told", () => {
    expect(problem("raw", { exposed: "/b (bob, drwxr-xr-x)" })).toMatch(
      /others than root can change \/b \(bob/,
    );
    const { exposed: _, ...rest } = sound;
    expect(imageProblem({ file: "/b/vm1", format: "raw" }, new Map(Object.entries(rest)))?.message).toMatch(
      /others than root/,
    );
  });

  it.each([
    ["backingFile", /names a backing file/],
    ["dataFile", /names a data file/],
  ] as const)("is no qcow2 image with a %s", (name, said) => {
    expect(problem("qcow2", { header: recordedQcow2Header(name) })).toMatch(said);
    // Raw is raw, whatever it looks like.
    expect(problem("raw", { header: recordedQcow2Header(name) })).toBeUndefined();
  });

  it("has the size of a qcow2 image's content, and of a raw image", () => {
    const fields = new Map([
      ["fileSize", "196616"],
      ["header", recordedQcow2Header("plain")],
    ]);
    expect([imageSize("qcow2", fields), imageSize("raw", fields)]).toEqual([16777216, 196616]);
    expect(imageSize("raw", new Map())).toBeUndefined();
  });
});

describe("on the host", () => {
  let folder: string;
  /** All is root's alone, but for the path given with its owner and mode. */
  const asRoots = `stat() {
    if [ "$3" = "$odd" ]; then shown=$odd_is; else shown='0 drwxr-xr-x'; fi
    case $2 in *%U*) echo "somebody, \${shown#* }";; *) echo "$shown";; esac
  }
  `;
  const sh = (script: string, args: readonly string[], odd = "", oddIs = "") =>
    spawnSync("sh", ["-c", `odd='${odd}' odd_is='${oddIs}'; ${asRoots}${script}`, ...args], {
      encoding: "utf8",
    });
  const exposed = (path: string, odd?: string, oddIs?: string) =>
    sh(`${imageGuardFunctions}exposed "$1"`, ["sh", path], odd, oddIs).stdout;

  beforeAll(() => {
    folder = realpathSync(mkdtempSync(join(tmpdir(), "lvm-nbd-image-")));
    for (const name of ["images", "theirs"]) mkdirSync(join(folder, name));
    for (const name of ["plain", "version2", "backingFile", "dataFile"] as const)
      writeFileSync(join(folder, "images", name), Buffer.from(recordedQcow2Header(name), "hex"));
    writeFileSync(join(folder, "images", "a b\\c"), "raw");
    symlinkSync("../theirs/hop", join(folder, "images", "way"));
    symlinkSync(join(folder, "images"), join(folder, "theirs", "hop"));
    symlinkSync("loop", join(folder, "loop"));
    symlinkSync("plain", join(folder, "images", "link"));
  });

  afterAll(() => rmSync(folder, { recursive: true }));

  it("a file is nobody else's if it and all folders above are root's and others cannot write them", () => {
    expect(exposed(join(folder, "images", "a b\\c"))).toBe("");
    expect(exposed(join(folder, "images", "way", "plain"))).toBe("");
  });

  it.each([
    ["of another owner", "1000 drwxr-xr-x"],
    ["that its group can write", "0 drwxrwxr-x"],
    ["that others can write, though sticky as /tmp", "0 drwxrwxrwt"],
    ["that cannot be looked at", ""],
  ])("what is %s is told, wherever it is on the way", (_what, is) => {
    const file = join(folder, "images", "way", "plain");
    const on = ["/", folder, join(folder, "images"), join(folder, "theirs"), join(folder, "images", "plain")];
    for (const odd of on)
      expect(exposed(file, odd, is)).toMatch(`${odd} (somebody, ${is.slice(is.indexOf(" ") + 1)})`);
  });

  it("links that lead nowhere else than to each other come to an end", () => {
    expect(exposed(join(folder, "loop", "x"))).toMatch(/links without end/);
  });

  const guard = (name: string, format: string, odd?: string, oddIs?: string) => {
    const { status, stderr } = sh(
      imageGuard,
      [join(folder, "images", name), format],
      odd && join(folder, odd),
      oddIs,
    );
    return [status, stderr];
  };

  it.each([
    ["plain", "raw"],
    ["plain", "qcow2"],
    ["version2", "qcow2"],
    ["backingFile", "raw"],
    ["a b\\c", "raw"],
  ])("the server of %j as %s may start", (name, format) => {
    expect(guard(name, format)).toEqual([0, ""]);
  });

  it.each([
    ["link", "raw", /is no regular file/],
    ["none", "raw", /is no regular file/],
    ["backingFile", "qcow2", /needs another file/],
    ["dataFile", "qcow2", /needs another file/],
    ["a b\\c", "qcow2", /is no qcow2 image/],
  ])("the server of %j as %s may not start", (name, format, said) => {
    expect(guard(name, format)).toEqual([1, expect.stringMatching(said)]);
  });

  it("what others can change is not opened", () => {
    const look = (odd?: string) => {
      const script = `${emitFunctions}${imageGuardFunctions}${lookAtImageFunction}
        look_at_image "$1" qcow2; emit rc "$?"; emit end ""`;
      const file = join(folder, "images", "plain");
      const fields = parseFields(sh(script, ["sh", file], odd && join(folder, odd), "0 drwxrwxr-x").stdout);
      return [fields.get("rc"), fields.has("header"), fields.get("exposed")];
    };
    expect(look()).toEqual(["0", true, ""]);
    expect(look("images")).toEqual(["1", false, expect.stringContaining("drwxrwxr-x")]);
  });

  it("nor may one whose image is in others' hands", () => {
    expect(guard("plain", "raw", "images", "0 drwxrwxr-x")).toEqual([
      1,
      expect.stringMatching(/is not served: others than root can change .*images \(somebody, drwxrwxr-x\)/),
    ]);
  });
});

describe("a path of an image", () => {
  it.each([
    "vm1.raw",
    "/",
    "/a//b",
    "/a/../b",
    "/a/./b",
    "/dev/x",
    "/run/x",
    "/a/b.part",
    "/a/b\nc",
    `/${"a".repeat(240)}`,
  ])("is not %j", (file) => {
    expect(fileProblem(file)).toEqual(expect.any(String));
  });

  it.each(["/vm1.raw", "/var/back ups/vm 1.qcow2", "/runs/x", '/a/we"ird:\\%n$x'])("is %j", (file) => {
    expect(fileProblem(file)).toBeUndefined();
  });
});
