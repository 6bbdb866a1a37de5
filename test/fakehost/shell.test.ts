/** The fake shell and its plain tools against dash and coreutils. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { FileTree, type Shown } from "./files.js";
import { finish, Machine, run } from "./machine.js";
import { parseScript } from "./syntax.js";
import { plainTools } from "./tools.js";

interface Result {
  readonly out: string;
  readonly err: string;
  readonly code: number | null;
  readonly files: Readonly<Record<string, string>>;
}

const args = ["one", "two words", ""];
const stdin = "first line\n second\\n  line \nlast";

function inFake(script: string): Result {
  const files = new FileTree();
  files.mkdir("/w");
  const machine = new Machine(files, plainTools());
  const said = { out: "", err: "" };
  const session = {
    stdin,
    out: (text: string) => {
      said.out += text;
    },
    err: (text: string) => {
      said.err += text;
    },
    cwd: "/w",
    env: { LC_ALL: "C" },
  };
  const code = finish(machine, run(machine, ["sh", "-c", script, "sh", ...args], session));
  const inside = Object.entries(files.snapshot("/w")).slice(1);
  return {
    ...said,
    code,
    files: Object.fromEntries(inside.map(([path, entry]) => [path.slice(3), shown(entry)])),
  };
}

function shown(entry: Shown): string {
  if (entry.kind === "file") return `file ${entry.content}`;
  return entry.kind === "link" ? `link ${entry.target}` : entry.kind;
}

function inReal(script: string): Result {
  const folder = mkdtempSync(join(tmpdir(), "shell-"));
  try {
    const { stdout, stderr, status, signal } = spawnSync("dash", ["-c", script, "sh", ...args], {
      input: stdin,
      cwd: folder,
      env: { PATH: process.env.PATH, LC_ALL: "C" },
      encoding: "utf8",
    });
    return { out: stdout, err: stderr, code: signal === "SIGTERM" ? 143 : status, files: filesBelow(folder) };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function filesBelow(folder: string, prefix = ""): Record<string, string> {
  const entries = readdirSync(folder, { withFileTypes: true }).map((entry): Record<string, string> => {
    const path = join(folder, entry.name);
    const name = prefix + entry.name;
    if (entry.isSymbolicLink()) return { [name]: `link ${readlinkSync(path)}` };
    if (entry.isDirectory()) return { [name]: "directory", ...filesBelow(path, `${name}/`) };
    return { [name]: `file ${readFileSync(path, "utf8")}` };
  });
  return Object.assign({}, ...entries);
}

const snippets = readFileSync(join(__dirname, "snippets.txt"), "utf8").split(/^%%\n/m);

describe.skipIf(spawnSync("dash", ["-c", ":"]).error !== undefined)("does what dash does with", () => {
  it.each(snippets.map((snippet) => [snippet.split("\n").slice(0, 2).join(" "), snippet]))(
    "%s",
    (_name, snippet) => {
      const compared = ({ err, ...rest }: Result) =>
        snippet.includes("# stderr differs") ? rest : { err, ...rest };
      expect(compared(inFake(snippet))).toEqual(compared(inReal(snippet)));
    },
  );
});

describe("refuses what it would do otherwise than dash", () => {
  it.each([
    "sleep 1 &",
    "[[ a = a ]]",
    "a=(1 2)",
    "echo $" + "{a/b/c}",
    "echo {a,b}",
    "echo ~/x",
    "cat <<< x",
    "echo $'a'",
    "a+=1",
    "x &> f",
    "x |& y",
    "echo <(x)",
    "((1))",
    "for ((;;)); do :; done",
    "function f { :; }",
    "time x",
    "export a=1",
    "select x in a; do :; done",
    "if true; then",
    "echo $(if)",
    "echo !(a)",
    "case a in a) ;& b) ;; esac",
    "echo $!",
  ])("the syntax %s", (script) => {
    expect(() => parseScript(script)).toThrow(/does not support/);
  });

  it.each([
    "export a",
    "set -e",
    "local x",
    "read x",
    "printf %5s x",
    "unset x",
    "wait",
    "command cat",
    "break",
    "kill -9 1",
    "cat -n f",
    "grep -i x f",
    "grep x f",
    "grep -q 'a*' f",
    "sed s/a/b/",
    "awk '{ print }'",
    "head -n 1",
    "sort -r",
    "find . -name x",
    "date",
    "trap x CHLD",
    "[ a -nt b ]",
    "[ a == b ]",
    "IFS=:; x=a:b; echo $x",
    "case é in ?) ;; esac",
  ])("the command %s", (script) => {
    expect(() => inFake(script)).toThrow(/does not support/);
  });
});
