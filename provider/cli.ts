#!/usr/bin/env node
/** The command `lvm-nbd`: what a host's administrator needs of this package beside Pulumi. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { z } from "zod";
import { type LoginRole, loginRoles, sudoers, sudoersInstallation, userProblem } from "./sudoers.js";

const usage = `lvm-nbd sudoers USER [--role observe|operate|setup] [--install]

Prints the file for /etc/sudoers.d that lets USER (or %GROUP) run on a host what this version of the provider runs there,
and nothing else. The commands are files below /usr/local/libexec/lvm-nbd; --install prints a script instead that puts
both there:

    npx lvm-nbd sudoers backup --install | ssh root@server1 sh

Roles: observe   only looks: pulumi refresh, preview, drift detection
       operate   all resources but HostSetup (the default)
       setup     HostSetup too, which installs packages
Run it again with each new version of the package. The version that was installed last is the one that USER may run: commands
of another are removed unless another user may still run them.
`;

/** Exit codes: 0, or 2 for arguments that are not understood (said on stderr). */
export function main(
  args: readonly string[],
  out: NodeJS.WritableStream,
  err: NodeJS.WritableStream,
): number {
  const refuse = (reason: string): number => {
    err.write(`lvm-nbd: ${reason}\n\n${usage}`);
    return 2;
  };
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(args);
  } catch (error) {
    return refuse(error instanceof Error ? error.message : String(error));
  }
  const { values, positionals } = parsed;
  if (values.help) {
    out.write(usage);
    return 0;
  }
  const [command, user, ...rest] = positionals;
  if (command !== "sudoers" || rest.length > 0) return refuse(`unknown command "${positionals.join(" ")}"`);
  if (user === undefined) return refuse("for whom? A user is missing");
  const problem = userProblem(user);
  if (problem !== undefined) return refuse(problem);
  const role = loginRoles.find((one) => one === values.role);
  if (role === undefined) return refuse(`there is no role "${values.role}"`);
  out.write((values.install ? sudoersInstallation : sudoers)(user, role, version()));
  return 0;
}

function parse(args: readonly string[]) {
  return parseArgs({
    args: [...args],
    allowPositionals: true,
    options: {
      role: { type: "string", default: "operate" satisfies LoginRole },
      install: { type: "boolean", default: false },
      help: { type: "boolean", short: "h", default: false },
    },
  });
}

function version(): string {
  const text = readFileSync(join(__dirname, "..", "package.json"), "utf8");
  return z.object({ version: z.string() }).parse(JSON.parse(text)).version;
}

if (require.main === module) process.exitCode = main(process.argv.slice(2), process.stdout, process.stderr);
