import { execFileSync } from "node:child_process";
import fc from "fast-check";
import { expect, test } from "vitest";
import { quote, quoteAll } from "../../provider/ssh/quoting.js";

/** What a real shell makes of the words: each is printed back, ended by a NUL. */
function throughShell(words: readonly string[], shell = "sh"): string[] {
  const printed = execFileSync(shell, ["-s"], {
    input: `printf '%s\\0' ${quoteAll(words)}\n`,
    maxBuffer: 64 * 1024 * 1024,
  });
  return printed.toString("utf8").split("\0").slice(0, -1);
}

const awkward = fc.constantFrom(
  ..."'\"`$\\!*?[]{}()<>|&;#~ \t\n\r=%^-",
  "$(id)",
  "$HOME",
  "'\\''",
  "-n",
  "--",
  "é",
  "\u{1f4be}",
  "\u0001",
  "\u007f",
);
const word = fc.oneof(
  fc.string({ unit: "binary" }).filter((text) => !text.includes("\0")),
  fc.array(awkward, { maxLength: 12 }).map((parts) => parts.join("")),
);

test.each(["sh", "bash"])(
  "a hundred thousand words without NUL come out of a real %s as they went in",
  (shell) => {
    let passed = 0;
    fc.assert(
      fc.property(fc.array(word, { minLength: 200, maxLength: 200, size: "max" }), (words) => {
        expect(throughShell(words, shell)).toEqual(words);
        passed += words.length;
      }),
      { numRuns: 500 },
    );
    expect(passed).toBe(100_000);
  },
);

test("an empty argument stays an argument", () => {
  expect(throughShell(["a", "", "b"])).toEqual(["a", "", "b"]);
});

test("plain words are shown without quotes", () => {
  expect(quoteAll(["lvs", "--units=b", "/dev/vg0/lv_1", "a@b:1,2%+"])).toBe(
    "lvs --units=b /dev/vg0/lv_1 a@b:1,2%+",
  );
});

test("a NUL, which no program can be given, is refused", () => {
  expect(() => quote("a\0b")).toThrow(/NUL/);
});
