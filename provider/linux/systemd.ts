/** systemd units: how their text is written and how their state is read. Sources: systemd.unit(5), systemd.exec(5). */

/** A directive and its value; the same directive may come several times. */
export type Directive = readonly [name: string, value: string];

/** The text of a unit file. */
export function renderUnit(sections: Readonly<Record<string, readonly Directive[]>>): string {
  return Object.entries(sections)
    .map(([section, directives]) => {
      const lines = directives.map(([name, value]) => {
        if (/[\n\r\0]/.test(value)) throw new Error(`${name} must not hold a line break`);
        return `${name}=${value}\n`;
      });
      return `[${section}]\n${lines.join("")}`;
    })
    .join("\n");
}

/** A command line for ExecStart=: every argument quoted, specifiers and variables neutralised. */
export function execLine(argv: readonly string[]): string {
  return argv.map(execArgument).join(" ");
}

function execArgument(argument: string): string {
  const escaped = argument
    .replaceAll("%", "%%")
    .replaceAll("$", "$$$$")
    .replaceAll("\\", "\\\\")
    .replaceAll('"', '\\"')
    .replaceAll("\n", "\\n")
    .replaceAll("\t", "\\t");
  return /^[A-Za-z0-9_./:@,=+-]+$/.test(escaped) ? escaped : `"${escaped}"`;
}

/** Neutralises specifiers in a directive that expands them. */
export function literal(value: string): string {
  return value.replaceAll("%", "%%");
}

/** A path in a list of them: quoted, and nothing in it is expanded. */
export function quotedPath(path: string): string {
  return `"${literal(path).replace(/[\\"]/g, "\\$&")}"`;
}

/** The unit of a device. */
export function deviceUnit(path: string): string {
  return pathUnit(path, "device");
}

/** The unit of a path, as `systemd-escape --path --suffix=SUFFIX` names it. */
export function pathUnit(path: string, suffix: "device" | "mount"): string {
  const bare = path
    .split("/")
    .filter((part) => part !== "")
    .join("/");
  const escaped = [...Buffer.from(bare, "utf8")]
    .map((byte, index) => {
      const character = String.fromCharCode(byte);
      if (character === "/") return "-";
      if (/[A-Za-z0-9:_]/.test(character) || (character === "." && index > 0)) return character;
      return `\\x${byte.toString(16).padStart(2, "0")}`;
    })
    .join("");
  return `${escaped}.${suffix}`;
}

/** What `systemctl show` tells of a unit. */
export type UnitProperties = Readonly<Record<string, string>>;

export function parseShow(stdout: string): UnitProperties {
  const properties: Record<string, string> = {};
  for (const line of stdout.split("\n")) {
    const at = line.indexOf("=");
    if (at > 0) properties[line.slice(0, at)] = line.slice(at + 1);
  }
  return properties;
}

/** Whether a drop-in changes this unit. One for all units of a type, as Fedora ships it, is the host's own way. systemd.unit(5). */
export function hasDropIns({ DropInPaths: paths = "" }: UnitProperties): boolean {
  return paths.split(" ").some((path) => path !== "" && !/\/(service|mount)\.d\/[^/]+$/.test(path));
}

/** The section that only we read: systemd ignores sections whose name begins with `X-`. */
export const ownSection = "X-LvmNbd";

/** Reads a directive of our own section. */
export function ownDirective(unitText: string, name: string): string | undefined {
  // Lines end with \n alone: for JavaScript's ^ a U+2028 in somebody's name would begin a line as well.
  const section = `\n${unitText}`.split("\n[").find((part) => part.startsWith(`${ownSection}]\n`));
  const line = section?.split("\n").find((candidate) => candidate.startsWith(`${name}=`));
  return line?.slice(name.length + 1);
}
