/** What the resources that are systemd units share: the record in the unit, and the answer of their scripts. */
import type { z } from "zod";
import { failure, script } from "../core/command.js";
import { ChangedMeanwhile, type Context } from "../core/resource.js";
import { ownDirective } from "../linux/systemd.js";
import { changedMeanwhile, unitFunctions } from "../linux/unitScript.js";
import type { CommandResult, RemoteCommand } from "../ssh/types.js";

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

/** For a script that ended with `changedMeanwhile`. */
export function writtenMeanwhile(
  context: Context,
  command: RemoteCommand,
  result: CommandResult,
): ChangedMeanwhile {
  const what = "somebody else wrote a unit of this name in the meantime";
  return new ChangedMeanwhile(failure(context, command, result, what, "FOREIGN_RESOURCE"));
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

/** With the lock: whoever removes the unit meanwhile would leave a link to nothing. */
const enableScript = `${unitFunctions}
unit=$1 file=/etc/systemd/system/$1
lock
[ -e "$file" ] || exit ${changedMeanwhile}
guard "$file" "$2"
systemctl enable --quiet "$unit"
`;

/** Lets a unit that runs as declared start at boot again. What runs is not touched: nobody is cut off. */
export async function enable(context: Context, unit: string, mark: string): Promise<void> {
  context.progress(`enabling ${unit}, so that it starts at boot again`);
  const command: RemoteCommand = {
    argv: script(enableScript, unit, mark),
    kind: "change",
    deadlineSeconds: 180,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode !== 0)
    throw failure(context, command, result, `the unit ${unit} could not be enabled`, "COMMAND_FAILED");
}
