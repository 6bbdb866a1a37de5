/** Fills the tables in README.md, between `<!-- NAME -->` and `<!-- /NAME -->`, from the code. */
import { readFileSync } from "node:fs";
import { z } from "zod";
import { writeGenerated } from "./generated.mts";
import { errorCodes, resourceTypes } from "./provider.mts";

type Json = { readonly [key: string]: unknown };

function typeText(node: Json): string {
  const options = node.anyOf as Json[] | undefined;
  if (options !== undefined) return [...new Set(options.map(typeText))].join(" or ");
  if (Array.isArray(node.enum)) return node.enum.map((value) => `\`"${value}"\``).join(" or ");
  if (node.type === "array") return `list of ${typeText((node.items ?? {}) as Json)}`;
  if (node.type === "object" && node.properties === undefined)
    return `map of ${typeText((node.additionalProperties ?? {}) as Json)}`;
  if (node.type === "object") {
    return `{ ${Object.keys((node.properties ?? {}) as Json)
      .map((key) => `\`${key}\``)
      .join(", ")} }`;
  }
  return Array.isArray(node.type) ? node.type.join(" or ") : String(node.type ?? "any");
}

function rows(shape: z.ZodObject, io: "input" | "output"): [string, Json, boolean][] {
  const json = z.toJSONSchema(shape, { io, unrepresentable: "any", reused: "inline" }) as Json;
  const required = (json.required ?? []) as string[];
  return Object.entries(json.properties as Record<string, Json>).map(([key, node]) => [
    key,
    node,
    required.includes(key),
  ]);
}

function cell(text: unknown): string {
  return String(text ?? "")
    .replaceAll("|", "\\|")
    .replaceAll("\n", " ");
}

function table(head: readonly string[], body: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
  return [line(head), line(head.map(() => "---")), ...body.map(line)].join("\n");
}

function outputTable(of: readonly (readonly [string, Json, boolean])[]): string {
  const body = of.map(([key, node]) => [`\`${key}\``, cell(typeText(node)), cell(node.description)]);
  return table(["output", "type", "meaning"], body);
}

const blocks: Record<string, string> = {
  errors: table(
    ["code", "what it means and what to do"],
    Object.entries(errorCodes).map(([code, meaning]) => [`\`${code}\``, cell(meaning)]),
  ),
};
for (const type of resourceTypes) {
  const inputs = rows(type.inputs, "input").filter(([key]) => key !== "owner");
  blocks[`${type.type} inputs`] = table(
    ["input", "type", "default", "meaning"],
    inputs.map(([key, node, required]) => [
      `\`${key}\``,
      key === "host" ? "alias or object, see above" : cell(typeText(node)),
      key === type.nameInput
        ? "resource's name"
        : required
          ? "**required**"
          : "default" in node
            ? `\`${JSON.stringify(node.default)}\``
            : "",
      key === "host" ? "The server." : cell(node.description),
    ]),
  );
  blocks[`${type.type} outputs`] = outputTable(rows(type.outputs, "output"));
  for (const [key, value] of Object.entries(type.outputs.shape))
    if (value instanceof z.ZodArray && value.element instanceof z.ZodObject)
      blocks[`${type.type} ${key}`] = outputTable(rows(value.element, "output"));
}
const connection = rows(resourceTypes[0]?.inputs as z.ZodObject, "input").find(
  ([key]) => key === "host",
)?.[1];
const detailed = (connection?.anyOf as Json[] | undefined)?.find(({ type }) => type === "object");
blocks.host = table(
  ["`host`", "type", "meaning"],
  Object.entries((detailed?.properties ?? {}) as Record<string, Json>).map(([key, node]) => [
    `\`${key}\``,
    cell(key === "proxyJump" ? "alias or object, or a list of them" : typeText(node)),
    cell(node.description),
  ]),
);

let text = readFileSync("README.md", "utf8");
for (const [name, block] of Object.entries(blocks)) {
  const [start, end] = [`<!-- ${name} -->`, `<!-- /${name} -->`];
  const [from, to] = [text.indexOf(start), text.indexOf(end)];
  if (from < 0 || to < from) throw new Error(`README.md has no block ${start} ... ${end}`);
  text = `${text.slice(0, from + start.length)}\n${block}\n${text.slice(to)}`;
}
writeGenerated("README.md", text, "npm run readme");
