/** What may happen to a command on its way, for tests that cut in. */
import type { Stack } from "./stack.js";
import type { Command, FakeWorld } from "./world.js";

/** Strikes while a command runs, before it or before its answer. */
export type Strike = (world: FakeWorld, stack: Stack, command: Command) => void;

export const strikes: Readonly<Record<string, Strike>> = {
  "the link is cut": (world, _, { server }) => world.cut(server),
  "the provider is killed": (_, stack) => stack.kill(),
  "its deadline passes": (world, _, command) => world.pass(deadlineSeconds(command)),
  "it is killed": (world, _, command) => world.killCommand(command),
  "the server's power fails": (world, _, { server }) => world.reboot(server),
  "Ctrl-C is pressed": (_, stack) => stack.cancel(),
};

/** The deadline that the provider gave the command. */
function deadlineSeconds({ line }: Command): number {
  const seconds = Number(/ -k '?[\d.]+'? '?([\d.]+)/.exec(line)?.[1]);
  if (!(seconds > 0)) throw new Error(`no deadline in ${line}`);
  return seconds;
}

/** When: before it runs, while its input is on its way, before its answer, or at one of its steps (from 1). */
export type Moment = "before" | "input" | "after" | number;

/** Strikes once, at that command of all that arrive from now on. Tells whether it did. */
export function strikeAt(
  world: FakeWorld,
  stack: Stack,
  at: number,
  moment: Moment,
  strike: Strike,
): { struck: boolean } {
  const first = world.commands.length;
  const told = { struck: false };
  const hit = (command: Command, now: boolean) => {
    if (!now || command.index !== first + at || told.struck) return false;
    told.struck = true;
    strike(world, stack, command);
    return true;
  };
  world.hooks = {
    // A command whose input breaks off with the link runs all the same.
    input: (index) => {
      const now = moment === "input" && index === first + at && !told.struck;
      told.struck ||= now;
      return now;
    },
    // What was cut off before it was read never runs.
    arrived: (command) => !hit(command, moment === "before") || !command.socket.destroyed,
    step: (command) => hit(command, command.steps === moment),
    ended: (command) => hit(command, moment === "after"),
  };
  return told;
}
