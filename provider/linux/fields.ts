/**
 * Answers of several looks in one output: a script prints `NAME BASE64` lines, so that no content, however
 * hostile, can be taken for another field.
 */

/** Exit code of a script whose file went away while it was read. */
export const vanished = 74;

/** Shell functions for scripts: `emit NAME VALUE`, `emit_file NAME PATH`, `emit_output NAME COMMAND...`. */
export const emitFunctions = `
emit() { printf '%s ' "$1"; printf '%s' "$2" | base64 -w0; echo; }
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
    const match = /^([a-zA-Z.]+) ([A-Za-z0-9+/=]*)$/.exec(line);
    if (!match?.[1]) throw new Error(`unexpected line "${line.slice(0, 80)}"`);
    fields.set(match[1], Buffer.from(match[2] ?? "", "base64").toString("utf8"));
  }
  // Every such script ends with this field; without it the output was cut short.
  if (!fields.has("end")) throw cutShort();
  return fields;
}
