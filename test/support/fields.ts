/** Output of an observing script, as `emit` prints it. */
export function fields(values: Readonly<Record<string, string>>): string {
  return Object.entries(values)
    .map(([name, value]) => `${name} ${Buffer.from(value).toString("base64")}\n`)
    .join("");
}
