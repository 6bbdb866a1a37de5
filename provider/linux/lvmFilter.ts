/**
 * LVM's `devices/global_filter`: whether it leaves NBD devices alone, and what it would be if it did. Sources: lvm.conf(5),
 * lvmconfig(8); lib/filters/filter-regex.c.
 *
 * A device has several names (`/dev/nbd0`, `/dev/disk/by-diskseq/16`, ...). For each, the first pattern that matches it
 * decides, and ONE accepted name is enough for the device to be accepted; one of which no name matches is accepted too. So
 * `[ "r|^/dev/nbd|", "a|.*|" ]` hides nothing: its names below /dev/disk match the second pattern.
 */

/** Where LVM reads what overrides lvm.conf. No package upgrade touches it. */
export const lvmLocal = "/etc/lvm/lvmlocal.conf";

const rejectNbd = "r|^/dev/nbd|";
/** The other names of an NBD device. Of another device they are never the only ones: it is accepted by its others. */
const rejectAliases = ["r#^/dev/(lvm-nbd/|block/43:|disk/by-(diskseq|partuuid|partlabel|id/lvm-pv-uuid-))#"];

const names = ["/dev/nbd0", "/dev/nbd15", "/dev/nbd0p1"];
const aliases = [
  "/dev/lvm-nbd/vm1",
  "/dev/block/43:0",
  "/dev/disk/by-diskseq/16",
  "/dev/disk/by-partuuid/6f1f4a3c-01",
  "/dev/disk/by-partlabel/root",
  "/dev/disk/by-id/lvm-pv-uuid-ICMwpG-pgVy-h69z-9Nvv-U1rg-HcDg-E2ls46",
];

/** The patterns in `lvmconfig`'s line on the setting. Throws if there is no such line. */
export function parseGlobalFilter(stdout: string): string[] {
  const line = /^\s*global_filter=(.*)$/m.exec(stdout)?.[1];
  const strings = line === undefined ? null : /^\[?((?:"(?:[^"\\]|\\.)*",?)*)\]?$/.exec(line);
  if (strings?.[1] === undefined)
    throw new Error(`LVM does not tell its global_filter: ${stdout.trim().slice(0, 200)}`);
  return [...strings[1].matchAll(/"((?:[^"\\]|\\.)*)"/g)].map(([, text]) =>
    (text ?? "").replace(/\\(.)/g, "$1"),
  );
}

/** The line of `lvmconfig --type full devices/global_filter` for these patterns. */
export function globalFilterLine(patterns: readonly string[]): string {
  const [only] = patterns;
  const list = patterns.map(quoted).join(",");
  return `global_filter=${patterns.length === 1 && only !== undefined ? quoted(only) : `[${list}]`}`;
}

function quoted(text: string): string {
  return `"${text.replace(/["\\]/g, "\\$&")}"`;
}

/** What the patterns make of one name; "undecided" where none matches. */
function verdict(patterns: readonly string[], name: string): "a" | "r" | "undecided" {
  for (const pattern of patterns) {
    const [kind, matches] = [pattern[0], matcher(pattern)];
    if ((kind === "a" || kind === "r") && matches?.test(name)) return kind;
  }
  return "undecided";
}

/** LVM's regular expressions read as JavaScript's; `undefined` for one that cannot be. */
function matcher(pattern: string): RegExp | undefined {
  const open = pattern[1] ?? "";
  const close = { "(": ")", "[": "]", "{": "}" }[open] ?? open;
  const end = pattern.lastIndexOf(close);
  if (end < 2) return undefined;
  try {
    return new RegExp(pattern.slice(2, end));
  } catch {
    return undefined;
  }
}

/** True if LVM leaves NBD devices alone by these patterns. */
export function hidesNbd(patterns: readonly string[]): boolean {
  return (
    names.every((name) => verdict(patterns, name) === "r") &&
    aliases.every((alias) => verdict(patterns, alias) !== "a")
  );
}

/** These patterns with NBD devices rejected; all else as before. */
export function withoutNbd(patterns: readonly string[]): string[] {
  if (hidesNbd(patterns)) return [...patterns];
  // LVM's default accepts all, as does no pattern at all.
  if (patterns.length === 1 && patterns[0] === "a|.*|") return [rejectNbd];
  const accepting = patterns.findIndex(
    (pattern) => pattern.startsWith("a") && aliases.some((alias) => verdict([pattern], alias) === "a"),
  );
  const at = accepting === -1 ? patterns.length : accepting;
  return [
    rejectNbd,
    ...patterns.slice(0, at),
    ...(accepting === -1 ? [] : rejectAliases),
    ...patterns.slice(at),
  ];
}

const comment =
  "# Written by HostSetup of lvm-nbd, and removed with it: what lies on an NBD device is a guest's, and LVM of this host\n" +
  "# must not look into it. This list takes the place of the one in lvm.conf; whoever changes that one runs `pulumi up\n" +
  "# --refresh`, which merges it anew.\n";

/** The text of lvmlocal.conf with that filter: in the place of one that is set there, or else at its end. */
export function withGlobalFilter(text: string, patterns: readonly string[]): string {
  const list = `[ ${patterns.map(quoted).join(", ")} ]`;
  const set = settingIn(text);
  if (set !== undefined) return text.slice(0, set.from) + list + text.slice(set.to);
  const start = text === "" || text.endsWith("\n") ? text : `${text}\n`;
  return `${start}${comment}devices {\n\tglobal_filter = ${list}\n}\n`;
}

/** Where in a configuration the value of `global_filter` stands, the last one, which LVM goes by. */
function settingIn(text: string): { from: number; to: number } | undefined {
  const token = /#[^\n]*|"(?:[^"\\]|\\.)*"|(?<name>(?:devices\/)?global_filter)\s*=\s*/g;
  let found: { from: number; to: number } | undefined;
  for (const match of text.matchAll(token)) {
    if (match.groups?.name === undefined) continue;
    const from = match.index + match[0].length;
    const value = /^(?:\[(?:[^\]"#]|"(?:[^"\\]|\\.)*"|#[^\n]*)*\]|"(?:[^"\\]|\\.)*")/.exec(text.slice(from));
    if (value !== null) found = { from, to: from + value[0].length };
  }
  return found;
}
