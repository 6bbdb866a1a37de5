/** The built provider, for the scripts that make documentation and schema from it. */
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);

export const { componentTypes, resourceTypes } =
  require("../dist/core/registry.js") as typeof import("../provider/core/registry.ts");
export const { outputsOf } =
  require("../dist/core/outputs.js") as typeof import("../provider/core/outputs.ts");
export const { configuration } =
  require("../dist/core/configuration.js") as typeof import("../provider/core/configuration.ts");
export const { functionTypes } =
  require("../dist/functions/registry.js") as typeof import("../provider/functions/registry.ts");
export const { ofTwo } = require("../dist/core/owner.js") as typeof import("../provider/core/owner.ts");
export const { errorCodes } =
  require("../dist/core/errors.js") as typeof import("../provider/core/errors.ts");
export const { OutputOf } =
  require("../dist/core/example.js") as typeof import("../provider/core/example.ts");
export const { dynamicToken } =
  require("../dist/pulumi/urn.js") as typeof import("../provider/pulumi/urn.ts");
