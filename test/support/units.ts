/** A unit file as systemd reads it: `Section.Directive` to its values, in order. */
export function directives(unitText: string): ReadonlyMap<string, string[]> {
  const found = new Map<string, string[]>();
  let section = "";
  for (const line of unitText.split("\n")) {
    if (line === "" || /^[#;]/.test(line)) continue;
    if (line.endsWith("\\")) throw new Error(`the line goes on in the next one: ${line}`);
    const header = /^\[(.*)\]$/.exec(line)?.[1];
    if (header !== undefined) {
      section = header;
      continue;
    }
    const at = line.indexOf("=");
    if (at < 1) throw new Error(`neither a section nor a directive: ${line}`);
    const name = `${section}.${line.slice(0, at)}`;
    found.set(name, [...(found.get(name) ?? []), line.slice(at + 1)]);
  }
  return found;
}
