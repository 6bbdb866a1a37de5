/**
 * Answers of several looks in one output: a script prints lines, `NAME =TEXT` or, of what holds line breaks, `NAME BASE64`, so
 * that no content, however hostile, can be taken for another field.
 */

/** Exit code of a script whose file went away while it was read. */
export const vanished = 74;

/**
 * Shell functions for scripts: `emit NAME VALUE`, `emit_file NAME PATH`, `emit_output NAME COMMAND...`. Most values are a line, and
 * cost no process.
 */
export const emitFunctions = `
emit() {
  case $2 in
  *'
'*) printf '%s ' "$1"; printf '%s' "$2" | base64 -w0 || exit 1; echo;;
  *) printf '%s =%s\\n' "$1" "$2";;
  esac
}
emit_file() { printf '%s ' "$1"; base64 -w0 <"$2" || exit ${vanished}; echo; }
emit_output() {
  emit_name=$1; shift
  emit_text=$("$@" 2>&1); emit_rc=$?
  emit "$emit_name" "$emit_text"
  emit "$emit_name.rc" "$emit_rc"
}
`;

/** The lines of an output that ends with one that says `end`. Throws where that is missing. */
export function linesToEnd(stdout: string): string[] {
  const lines = stdout.trim().split("\n");
  if (lines.pop() !== "end") throw cutShort();
  return lines;
}

function cutShort(): Error {
  return new Error("the output was cut short");
}

/** The fields by name. Throws on a line that is none. */
export function parseFields(stdout: string): ReadonlyMap<string, string> {
  const fields = new Map<string, string>();
  for (const line of stdout.split("\n")) {
    if (line === "") continue;
    const [, name, text, encoded = ""] = /^(\S+) (?:=(.*)|([A-Za-z0-9+/]*={0,2}))$/s.exec(line) ?? [];
    if (name === undefined) throw new Error(`unexpected line "${line.slice(0, 80)}"`);
    fields.set(name, text ?? Buffer.from(encoded, "base64").toString("utf8"));
  }
  // Every such script ends with this field; without it the output was cut short.
  if (!fields.has("end")) throw cutShort();
  return fields;
}
