import { createRequire } from "node:module";
import { join } from "node:path";
import * as pulumi from "@pulumi/pulumi";
import { expect, it } from "vitest";

const require_ = createRequire(join(process.cwd(), "package.json"));

/** What is written into the state: the built closure, as Pulumi serialises a dynamic provider. */
async function serialised(type: string): Promise<string> {
  const { thinProvider } = require_(
    "./dist/pulumi/thinProvider.js",
  ) as typeof import("../../provider/pulumi/thinProvider.js");
  const provider = thinProvider(type);
  return (await pulumi.runtime.serializeFunction(() => provider, { allowSecrets: true })).text;
}

it("writes only a few constant lines and the type's name into the state, so that an upgrade changes nothing", async () => {
  expect(await serialised("LvSnapshot")).toMatchSnapshot();
});

it("names no module but the runtime, and captures nothing", async () => {
  const text = await serialised("NbdExport");
  expect([...text.matchAll(/require\("([^"]*)"\)/g)].map((match) => match[1])).toEqual(
    Array(7).fill("pulumi-lvm-nbd/runtime"),
  );
  expect(text.length).toBeLessThan(3000);
});
