import { execFileSync } from "node:child_process";
import fc from "fast-check";
import { expect, it } from "vitest";
import { emitFunctions, parseFields } from "../../provider/linux/fields.js";

function emitted(values: readonly string[], shell: string): ReadonlyMap<string, string> {
  const text = `${emitFunctions}
name=
for value; do name="x$name"; emit "$name" "$value"; done
emit end ""`;
  return parseFields(execFileSync(shell, ["-c", text, shell, ...values], { encoding: "utf8" }));
}

const line = fc.constantFrom("\n", "end ", "end =", "x =", "x eA==", "\r", "\u2028", "\\n", "%s", "-n", "=");
const value = fc.string({ unit: fc.oneof(fc.string({ unit: "grapheme" }), line) });

it.each(["sh", "bash"])(
  "whatever a field holds, in %s, it is read as it was, and as no other field",
  (shell) => {
    fc.assert(
      fc.property(fc.array(value, { maxLength: 6 }), (written) => {
        const values = written.map((one) => one.replaceAll("\0", ""));
        const read = emitted(values, shell);
        expect([...read.keys()]).toEqual([...values.map((_, at) => "x".repeat(at + 1)), "end"]);
        expect([...read.values()]).toEqual([...values, ""]);
      }),
      { numRuns: 100 },
    );
  },
);

it("an output that was cut short, or holds anything else, is no answer", () => {
  expect(() => parseFields("x =1\n")).toThrow("cut short");
  expect(() => parseFields("x =1\nen")).toThrow("unexpected line");
  expect(() => parseFields("x 1=1\nend =\n")).toThrow("unexpected line");
  expect(parseFields("x MQ==\nend \n").get("x")).toBe("1");
});
