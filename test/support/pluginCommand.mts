import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";

const program = join(import.meta.dirname, "../../dist/plugin.js");

/**
 * The command that starts the plugin, as its first line says and the kernel does it: `#!/usr/bin/env -S node OPTION...`.
 * `PATH` leads to this process's Node.
 */
export function pluginCommand() {
  const [line = ""] = readFileSync(program, "utf8").split("\n", 1);
  const [, env, option, words] = /^#!(\S+) (-S) (.+)/.exec(line) ?? [];
  if (env === undefined || option === undefined || words === undefined)
    throw new Error(`${program} does not begin as it did`);
  return {
    file: env,
    args: [option, words, program],
    env: { ...process.env, PATH: `${dirname(process.execPath)}:${process.env.PATH}` },
  };
}
