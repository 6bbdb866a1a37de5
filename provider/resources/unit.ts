/** What the resources that are systemd units share: the record in the unit, and the answer of their scripts. */
import type { z } from "zod";
import { failure, succeed } from "../core/command.js";
import { type ErrorCode, firstLine, type LvmNbdError } from "../core/errors.js";
import { hostScript, script } from "../core/hostCommands.js";
import { ChangedMeanwhile, type Context } from "../core/resource.js";
import { vanished } from "../linux/fields.js";
import { ownDirective } from "../linux/systemd.js";
import {
  type CertificateFiles,
  certificatesArguments,
  certificatesFunctions,
  certificatesInput,
} from "../linux/tls.js";
import { changedMeanwhile, reloadFunction, unitFunctions } from "../linux/unitScript.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";

/** As `succeed`, of a look at a unit: it may be just being removed, by a run that was cut, so that its file vanishes. */
export async function lookAtUnit(
  context: Context,
  command: RemoteCommand,
  unit: string,
  explain?: (result: CommandResult) => ErrorCode | undefined,
): Promise<CommandResult> {
  for (let tries = 1; ; tries++) {
    const result = await context.host.run(command, context.signal);
    if (result.exitCode === 0) return result;
    if (result.exitCode === vanished && tries < 3) continue;
    const what = `the unit ${unit} could not be looked at`;
    throw failure(context, command, result, what, explain?.(result) ?? "COMMAND_FAILED");
  }
}

/** The record in a unit of ours. One that was spoiled by hand counts as edited, and is written anew. */
export function readPlan<Plan>(unitText: string, shape: z.ZodType<Plan>): Plan | undefined {
  const record = ownDirective(unitText, "Plan");
  if (record === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(record);
  } catch {
    return undefined;
  }
  return shape.safeParse(value).data;
}

/** True for a name as it stands behind the host in an id. */
export function isName(path: string): boolean {
  return path !== "" && !path.includes("/");
}

/** For a script that ended with `changedMeanwhile`. */
export function writtenMeanwhile(
  context: Context,
  command: RemoteCommand,
  result: CommandResult,
): ChangedMeanwhile {
  const what = "somebody else wrote a unit of this name in the meantime";
  return new ChangedMeanwhile(failure(context, command, result, what, "FOREIGN_RESOURCE"));
}

/** For a script that ended with `provenOnly`. What it looked at goes on. */
export function couldNotEnable(context: Context, command: RemoteCommand, result: CommandResult): LvmNbdError {
  const what = "the unit serves and was proven, but that could not be noted, or the unit not be enabled";
  const advice =
    "Put right what stderr names and run again: what serves is left alone, and then starts at boot.";
  return failure(context, command, result, what, "COMMAND_FAILED", advice);
}

/**
 * What a refresh found changed, for the log: these properties, and a state other than the `sound` one. `mending`: what
 * `pulumi up` does about that.
 */
export function unitDrift<State extends { readonly state: string }>(
  before: State,
  now: State,
  properties: readonly (keyof State & string)[],
  sound: State["state"],
  mending: string,
): string[] {
  const lines = properties.flatMap((property) => {
    const [declared, seen] = [JSON.stringify(before[property]), JSON.stringify(now[property])];
    return declared === seen ? [] : [`${property} is ${seen}, declared is ${declared}`];
  });
  if (now.state === sound) return lines;
  const effect = now.state === "disabled" ? "let it start at boot again" : mending;
  return [...lines, `is ${now.state}; \`pulumi up\` will ${effect}`];
}

/** Arguments: unit, mark, record ("": whatever it is). With the lock: whoever removes the unit meanwhile would leave a link to nothing. */
const enableScript = hostScript(
  "enable-unit",
  "change",
  `${unitFunctions}
unit=$1 file=/etc/systemd/system/$1
lock
[ -e "$file" ] || exit ${changedMeanwhile}
guard "$file" "$2"
[ -z "$3" ] || [ "$(own Plan "$file")" = "$3" ] || exit ${changedMeanwhile}
systemctl enable --quiet "$unit"
`,
);

/** Lets a unit that runs as declared start at boot again. What runs is not touched: nobody is cut off. `plan`: of no other one. */
export async function enable(context: Context, unit: string, mark: string, plan?: object): Promise<void> {
  context.progress(`enabling ${unit}, so that it starts at boot again`);
  const command: RemoteCommand = {
    argv: script(enableScript, unit, mark, plan === undefined ? "" : JSON.stringify(plan)),
    kind: "change",
    deadlineSeconds: 180,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode !== 0)
    throw failure(context, command, result, `the unit ${unit} could not be enabled`, "COMMAND_FAILED");
}

const reloadScript = hostScript("reload-units", "change", `${reloadFunction}\nreload_units\n`);

/**
 * Has systemd read all units, after some were enabled without that. A boot starts them whatever becomes of this; until it is done
 * systemd shows them as disabled, and does not start them when their device disappears and comes back.
 */
export async function tellSystemd(context: Context): Promise<void> {
  await afterwards(
    context,
    script(reloadScript),
    "systemd could not read its units anew",
    "until `systemctl daemon-reload` is run there, systemd shows new exports as disabled",
  );
}

/** Also after a cancel: it is for what was done before. Its failure is told as a warning. It takes one of the locks (120 s). */
async function afterwards(context: Context, argv: string[], what: string, warning: string): Promise<void> {
  const command: RemoteCommand = { argv, kind: "change", deadlineSeconds: 180 };
  try {
    await succeed({ ...context, signal: AbortSignal.timeout(90_000) }, command, what);
  } catch (error) {
    context.warn(`${warning}: ${firstLine(error)}`);
  }
}

/** Arguments: unit, the two marks of `guard`, folder, names and lengths of the files. */
const certificatesScript = hostScript(
  "put-certificates",
  "change",
  `${unitFunctions}${certificatesFunctions}
file=/etc/systemd/system/$1
lock
guard "$file" "$2" "$3"; shift 3
receive_certificates "$@"
`,
);

/** Arguments: unit, folder. */
const withdrawScript = hostScript(
  "withdraw-certificates",
  "change",
  `${unitFunctions}
file=/etc/systemd/system/$1
lock
if [ -e "$file" ]; then used=$(own Certificates "$file") || exit 1; else used=; fi
[ "$used" = "$2" ] || rm -rf "$2" || exit 1
rmdir "\${2%/*}" 2>/dev/null
exit 0
`,
);

/** Removes what was put there for a unit that then was not written. */
async function withdrawCertificates(context: Context, unit: string, folder: string): Promise<void> {
  await afterwards(
    context,
    script(withdrawScript, unit, folder),
    "certificates could not be removed",
    "certificates that were put on the host are left there",
  );
}

/** Puts the certificates of a unit on its host and writes that; they go again if it fails. `marks`: those that `guard` lets pass. */
export async function withCertificates<T>(
  context: Context,
  unit: string,
  marks: readonly [string, string],
  folder: string,
  files: CertificateFiles,
  write: () => Promise<T>,
): Promise<T> {
  await putCertificates(context, unit, marks, folder, files);
  try {
    return await write();
  } catch (error) {
    await withdrawCertificates(context, unit, folder);
    throw error;
  }
}

async function putCertificates(
  context: Context,
  unit: string,
  marks: readonly [string, string],
  folder: string,
  files: CertificateFiles,
): Promise<void> {
  const command: RemoteCommand = {
    argv: script(certificatesScript, unit, ...marks, folder, ...certificatesArguments(files)),
    stdin: certificatesInput(files),
    kind: "change",
    deadlineSeconds: 180,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode !== 0)
    throw failure(context, command, result, "the certificates could not be written", "COMMAND_FAILED");
}
