/** Writes a generated file, or with `--check` fails if it is not as it would be written. */
import { readFileSync, writeFileSync } from "node:fs";

export function writeGenerated(path: string, text: string, how: string): void {
  if (!process.argv.includes("--check")) {
    writeFileSync(path, text);
    return;
  }
  if (readFileSync(path, "utf8") === text) return;
  console.error(`${path} is out of date: run \`${how}\``);
  process.exit(1);
}
