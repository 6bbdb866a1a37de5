import { execFileSync } from "node:child_process";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { emitFunctions, parseFields } from "../../provider/linux/fields.js";
import { holdersScript, parseHolders } from "../../provider/linux/holders.js";

const line = (kind: string, who: string) => `${kind}\t${Buffer.from(who).toString("base64")}\n`;

describe("holders of a device", () => {
  it("are named in words", () => {
    expect(
      parseHolders(
        line("mount", "/mnt/vm 1") +
          line("device", "vg-guest") +
          line("swap", "/dev/nbd0p2") +
          line("process", "qemu-system-x86_64 -name vm1 (pid 412)"),
      ),
    ).toEqual([
      "mounted at /mnt/vm 1",
      "used by device vg-guest",
      "swap on /dev/nbd0p2",
      "open in qemu-system-x86_64 -name vm1 (pid 412)",
    ]);
  });

  it("are none where nothing is printed", () => {
    expect(parseHolders("")).toEqual([]);
  });

  it("cannot be made up or hidden by a name that holds line breaks and tabs", () => {
    expect(parseHolders(line("mount", "/mnt\nprocess\teA=="))).toEqual(["mounted at /mnt\nprocess\teA=="]);
  });

  it.each(["noise", "mounted\tL21udA==", "\tL21udA=="])("are not guessed from %j", (stdout) => {
    expect(() => parseHolders(stdout)).toThrow();
  });

  it("are not said to be none of what is no block device", () => {
    const run = () =>
      execFileSync("sh", ["-c", holdersScript, "sh", "/etc/passwd", ""], {
        stdio: ["ignore", "pipe", "pipe"],
      });
    expect(run).toThrow(/not a block device/);
  });
});

it("a script's fields come out of a real shell as they went in", () => {
  const script = `${emitFunctions}\nemit a "$1"; emit_output b printf '%s' "$2"; emit_output c sh -c 'exit 3'; emit end ""`;
  fc.assert(
    fc.property(fc.string({ unit: "binary" }), fc.string({ unit: "binary" }), (one, two) => {
      const [a, b] = [one, two].map((text) => Buffer.from(text).toString().replaceAll("\0", ""));
      const parsed = parseFields(
        execFileSync("sh", ["-c", script, "sh", a ?? "", b ?? ""], { encoding: "utf8" }),
      );
      expect(parsed.get("a")).toBe(a);
      // $(...) takes line breaks at the end away.
      expect(parsed.get("b")).toBe(b?.replace(/\n+$/, ""));
      expect([parsed.get("b.rc"), parsed.get("c.rc")]).toEqual(["0", "3"]);
    }),
    { numRuns: 30 },
  );
});
