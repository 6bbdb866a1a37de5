/** What is configured of the provider: for all resources of a stack, or for those that are given one provider of it. */
import { z } from "zod";
import { connectionProblem, missed, nearMiss } from "../ssh/config.js";
import type { HostConnection, NamedHosts } from "../ssh/types.js";
import { LvmNbdError } from "./errors.js";
import { hostConnection, secret } from "./inputs.js";
import { problemsOf } from "./problems.js";
import type { Problem } from "./resource.js";

type Values = Readonly<Record<string, unknown>>;

/** A name as it can be given for a `host`, and begins an id. */
const hostNames = z
  .string()
  .regex(
    /^[A-Za-z0-9][A-Za-z0-9_.-]*$/,
    "is no name for a host: it must begin with a letter or digit and hold only letters, digits and _ . -",
  );

export const configuration = z.strictObject({
  organization: z
    .string()
    .regex(/^[^/]+$/, 'must be the name of an organisation, without "/"')
    .optional()
    .describe(
      "The organisation of the stack, part of the mark on everything that is made; needed where no program tells it. With a backend " +
        "of one's own it is `organization`.",
    ),
  hosts: z
    .record(hostNames, hostConnection)
    .optional()
    .describe(
      "How hosts are reached, by name: a resource whose `host` is such a name is on that host. A key or password that changes here " +
        "changes no resource. Encrypted in the state.",
    )
    .meta(secret),
});

/** What is wrong with the configuration. */
export function configurationProblems(values: Values): Problem[] {
  const { hosts, ...rest } = values;
  return [...problemsIn(rest), ...readHosts(hosts).problems];
}

/** The hosts that are configured. Raises INVALID_INPUT; of what is wrong it names the place and never the value. */
export function namedHosts(value: unknown): NamedHosts {
  const { hosts, problems } = readHosts(value);
  if (problems.length === 0) return hosts;
  throw wrong(problems);
}

function wrong(problems: readonly Problem[]): LvmNbdError {
  const reasons = problems.map(({ property, reason }) => `lvm-nbd:${property}: ${reason}`);
  // Without the program, Pulumi gives the configuration as it was at the last one's run.
  const advice =
    "Correct it by `pulumi config set --path` or `pulumi config rm --path`. What is correct by now reaches `pulumi refresh` and " +
    "`destroy` by a `pulumi up`, or with `--run-program`.";
  return new LvmNbdError("INVALID_INPUT", { message: reasons.join("; "), advice });
}

/**
 * Refuses, with INVALID_INPUT, what is configured and means nothing, as a misspelt name does. `names`: of all that the stack has. The
 * plugin's engine gives the plugin's own to it; to a program all are there.
 */
export function refuseUnknown(names: readonly string[]): void {
  const own = names
    .filter((name) => name.startsWith("lvm-nbd:"))
    .map((name) => name.slice("lvm-nbd:".length));
  const unknown = own.filter((name) => !(name in configuration.shape) && !ofPlugins.has(name));
  if (unknown.length > 0) throw wrong(problemsIn(Object.fromEntries(unknown.map((name) => [name, ""]))));
}

/** What the engine itself reads of a plugin's. */
const ofPlugins = new Set(["version", "pluginDownloadURL"]);

/** A value of the configuration: what is no text reaches a provider as one, in JSON. There null is nothing. */
export function plainValue(value: unknown): unknown {
  if (typeof value !== "string") return value;
  try {
    return JSON.parse(value, (_key, inner) => inner ?? undefined);
  } catch {
    // Not the parser's words: they quote the text, which may be a key.
    return value;
  }
}

function readHosts(value: unknown): { hosts: NamedHosts; problems: Problem[] } {
  const values = { hosts: plainValue(value) };
  const { data, error } = configuration.safeParse(values);
  if (error !== undefined) return { hosts: new Map(), problems: problemsOfParsing(error, values) };
  const hosts = new Map<string, HostConnection>(Object.entries(data.hosts ?? {}));
  const problems = [...hosts].flatMap(([name, connection]) => {
    const problem = connectionProblem(connection) ?? circle(name, hosts) ?? missedJump(connection, hosts);
    return problem === undefined ? [] : [{ ...problem, property: `hosts.${name}.${problem.property}` }];
  });
  return { hosts, problems };
}

function problemsIn(values: Values): Problem[] {
  const { error } = configuration.safeParse(values);
  return error === undefined ? [] : problemsOfParsing(error, values);
}

function problemsOfParsing({ issues }: z.ZodError, values: Values): Problem[] {
  return problemsOf(issues, values, "lvm-nbd's configuration");
}

function missedJump(connection: HostConnection, hosts: NamedHosts): Problem | undefined {
  const miss = nearMiss(connection, hosts);
  return miss && { property: "proxyJump", reason: missed(miss.name) };
}

/** Hosts that are reached through one another. Of a later jump its own jumps do not count. */
function circle(start: string, hosts: NamedHosts): Problem | undefined {
  const passed = new Set<unknown>();
  let name: unknown = start;
  while (typeof name === "string" && !passed.has(name)) {
    passed.add(name);
    [name] = [hosts.get(name)?.proxyJump].flat();
  }
  return name === start ? { property: "proxyJump", reason: "goes in a circle" } : undefined;
}
