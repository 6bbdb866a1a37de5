/** Inputs that all resources share, as zod objects: types, checks and documentation come from here. */
import { z } from "zod";

/** A refinement by a rule that says what is wrong with a value, and nothing of a good one. */
export function refusing<T>(
  problem: (value: T) => string | undefined,
): (value: T, refinement: z.RefinementCtx) => void {
  return (value, refinement) => {
    const message = problem(value);
    if (message !== undefined) refinement.addIssue({ code: "custom", message });
  };
}

/** A refinement by a parser, whose error says what would be right. */
export function readableBy<T>(parse: (value: T) => unknown): (value: T, refinement: z.RefinementCtx) => void {
  return refusing((value) => {
    try {
      parse(value);
      return undefined;
    } catch (error) {
      return error instanceof Error ? error.message : String(error);
    }
  });
}

/** For `.meta()`: the value is encrypted in the state. */
export const secret = { secret: true } as const;

/** For `.meta()` of an input: whatever its change, the thing is made anew. The tests hold it against `diff`. */
export const replaces = { willReplaceOnChanges: true } as const;

const secretNote = "Stored encrypted in the state.";

/** How to reach a host in detail; see `HostConnection`. */
const connectionShape = {
  address: z.string().min(1).describe("Name or address of the SSH server."),
  port: z.number().int().min(1).max(65535).optional().describe("Port of the SSH server. Default 22."),
  user: z.string().min(1).optional().describe("User to log in as. Default `root`."),
  privateKey: z
    .string()
    .min(1)
    .optional()
    .describe(`Private key (PEM or OpenSSH text). ${secretNote}`)
    .meta(secret),
  privateKeyPath: z
    .string()
    .min(1)
    .optional()
    .describe(
      "File of the private key on the machine that runs Pulumi; only the path is kept in the state. Its certificate is taken from `<path>-cert.pub`.",
    ),
  passphrase: z
    .string()
    .min(1)
    .optional()
    .describe(`Passphrase of an encrypted private key. ${secretNote}`)
    .meta(secret),
  password: z.string().min(1).optional().describe(`Password to log in with. ${secretNote}`).meta(secret),
  agent: z
    .union([z.string().min(1), z.boolean()])
    .optional()
    .describe(
      "Socket of an SSH agent; `true` takes `SSH_AUTH_SOCK`. Default: the agent, if no key or password is given.",
    ),
  hostKey: z
    .union([z.string().min(1), z.array(z.string().min(1)).min(1)])
    .optional()
    .describe("The only accepted host keys: `ssh-ed25519 AAAA...` or `SHA256:...`. Default: known_hosts."),
  knownHostsPath: z
    .union([z.string().min(1), z.array(z.string().min(1)).min(1)])
    .optional()
    .describe("known_hosts files to consult instead of the user's and the system's."),
  sudo: z
    .boolean()
    .optional()
    .describe(
      "Run commands by `sudo -n`; `npx lvm-nbd sudoers` lists which. Default: true unless the user is root.",
    ),
} as const;

const jump = z.union([z.string().min(1), z.strictObject(connectionShape).meta({ title: "JumpHost" })]);

/** All details of how to reach a host. */
export const hostConnection = z
  .strictObject({
    ...connectionShape,
    proxyJump: z
      .union([jump, z.array(jump).min(1)])
      .optional()
      .describe("Hosts to jump through first, in order."),
  })
  .meta({ title: "HostConnection" });

/** A host: a name of the configuration, an alias from the SSH configuration, or all details. */
export const hostInput = z
  .union([z.string().min(1), hostConnection])
  .describe(
    "The server: a name of `lvm-nbd:hosts`, an alias from `~/.ssh/config` (with its ProxyJump), or an object with `address`, `port`, `user`, " +
      "`privateKey`/`privateKeyPath`/`agent`/`password`, `hostKey`, `sudo`, `proxyJump`. The host's key is always verified.",
  );

export const commonInputs = {
  host: hostInput,
  owner: z
    .string()
    .min(1)
    .describe("Organisation, project, stack and resource that own the thing. Filled in by the provider."),
  adopt: z
    .boolean()
    .default(false)
    .describe("Take over an existing thing of this name that carries no owner mark, instead of refusing."),
} as const;

/** Values of which a change makes a thing anew. */
export const triggersInput = z.array(z.union([z.string(), z.number(), z.boolean()])).default([]);

/** Names that become part of unit names and paths. */
export const plainName = /^[A-Za-z0-9][A-Za-z0-9_.:+-]*$/;
