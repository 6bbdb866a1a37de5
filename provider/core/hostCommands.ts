/**
 * The commands that are ever run on hosts, each under a name: what a file for sudo can name, and a host can keep.
 * A script is a constant; what varies are its arguments. Nothing else is run: see `script` and `hostProgram`.
 */

/**
 * Who needs it: `observe`, a refresh, a preview or drift detection, and changes nothing that is declared; `change`, the
 * resources; `setup`, `HostSetup`.
 */
export type CommandClass = "observe" | "change" | "setup";

/**
 * What an argument can be, as a host holds a login to it that may run this command alone. `unit`: a unit's name; `run`, `record`: a
 * path of ours right below /run or /etc/lvm-nbd; `path`: absolute, without `..`; `word`: a program or package; `words`: several in one
 * argument; `name`: a volume group or volume; `certificates`: how many arguments follow that name files and their lengths, and those.
 */
export type ArgumentKind =
  | ("unit" | "run" | "record" | "path" | "word" | "words" | "name" | "uuid" | "tag" | "number")
  | ("uri" | "address" | "filter" | "format" | "mark" | "certificates");

/** `?`: it may be empty. `many:`: all that follow are such. */
export type ArgumentRule = ArgumentKind | `${ArgumentKind}?` | `many:${ArgumentKind}`;

/** A command as it is kept on a host. */
export interface HostCommand {
  /** Letters, digits and dashes. */
  readonly name: string;
  readonly class: CommandClass;
  /** Program and first arguments; what a call adds comes behind them. */
  readonly argv: readonly string[];
  /** What the arguments of a call must be. Default: anything, for what only a login may run that can change everything. */
  readonly rules?: readonly ArgumentRule[] | undefined;
}

declare const named: unique symbol;
/** The text of a script for `sh` that has a name. */
export type HostScript = string & { readonly [named]: true };

const byText = new Map<string, HostCommand>();
const programs: HostCommand[] = [];
const names = new Set<string>();

function claim(name: string): void {
  if (!/^[a-z][a-z\d-]*$/.test(name) || names.has(name)) throw new Error(`"${name}" names another command`);
  names.add(name);
}

/** Gives a script its name. Defined at the top of a module, once. What only looks is held to its arguments. */
export function hostScript(name: string, commandClass: "change" | "setup", text: string): HostScript;
export function hostScript(
  name: string,
  commandClass: "observe",
  text: string,
  rules: readonly ArgumentRule[],
): HostScript;
export function hostScript(
  name: string,
  commandClass: CommandClass,
  text: string,
  rules?: readonly ArgumentRule[],
): HostScript {
  claim(name);
  if (byText.has(text)) throw new Error(`"${name}" is the same script as "${byText.get(text)?.name}"`);
  byText.set(text, { name, class: commandClass, argv: ["sh", "-c", text, "sh"], rules });
  return text as HostScript;
}

/** A program that is run as it is, with what a call adds. */
export function hostProgram(
  name: string,
  commandClass: CommandClass,
  argv: readonly [string, ...string[]],
  rules?: readonly ArgumentRule[],
): (...more: string[]) => string[] {
  claim(name);
  programs.push({ name, class: commandClass, argv, rules });
  return (...more) => [...argv, ...more];
}

/** A script with its arguments as a command; the arguments are never part of its text. */
export function script(text: HostScript, ...args: string[]): string[] {
  return ["sh", "-c", text, "sh", ...args];
}

/** The named command that this is. Arguments of the call's own stand behind those of it. */
export function hostCommandOf(argv: readonly string[]): HostCommand | undefined {
  const isScript = argv[0] === "sh" && argv[1] === "-c" && argv[3] === "sh";
  return isScript
    ? byText.get(argv[2] ?? "")
    : programs.find((one) => one.argv.every((argument, at) => argument === argv[at]));
}

/** All of them, by name. Complete once every resource's module is loaded. */
export function hostCommands(): HostCommand[] {
  return [...byText.values(), ...programs].sort((one, other) => (one.name < other.name ? -1 : 1));
}

/** In the arguments of a command: the folder of its certificates. */
export const certificatesPlace = "@LVM-NBD-CERTIFICATES@";
