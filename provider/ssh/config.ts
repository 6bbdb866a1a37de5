/**
 * A declared host, resolved: what to connect to, with which keys, and what its host key is held against. An
 * alias is resolved by OpenSSH itself (`ssh -G`), so that Include, Match and tokens mean what they mean there; its
 * own jumps too: the names of the provider's configuration mean nothing to that.
 */

import { execFile } from "node:child_process";
import { createHmac, randomBytes } from "node:crypto";
import { lookup } from "node:dns/promises";
import { isIP } from "node:net";
import { homedir, hostname, userInfo } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import type * as Ssh2 from "ssh2";
import { isLvmNbdError, LvmNbdError } from "../core/errors.js";
import type { Problem } from "../core/resource.js";
import { childEnvironment } from "./environment.js";
import { type HostKeyLimits, hostKeyAlgorithms, pinProblem, type Trust } from "./hostKeys.js";
import { readText } from "./localFiles.js";
import type { HostArgs, HostConnection, NamedHosts } from "./types.js";

const run = promisify(execFile);

/** A private key with the name it is shown by. */
export interface IdentityKey {
  readonly label: string;
  readonly privateKey: string;
  readonly passphrase: string | undefined;
  /** Certificates (OpenSSH's) that may be of it. */
  readonly certificates: readonly Buffer[];
}

/** All that is needed to connect. */
export interface ResolvedHost {
  /** As the user names it. */
  readonly name: string;
  readonly address: string;
  readonly port: number;
  readonly user: string;
  readonly keys: readonly IdentityKey[];
  readonly agent: string | undefined;
  /** Public keys (base64) of the configured identity files, which the agent's keys are matched with. */
  readonly agentKeys: readonly string[];
  /** Of the agent's keys only these are offered. */
  readonly identitiesOnly: boolean;
  readonly password: string | undefined;
  /** ConnectTimeout of the SSH configuration. */
  readonly connectSeconds: number | undefined;
  readonly trust: Trust;
  /** Names under which known_hosts may have the host. */
  readonly hostKeyNames: readonly string[];
  /** Files of keys that are not taken, whoever vouches for them. */
  readonly revokedHostKeys: readonly string[];
  readonly sudo: boolean;
  /** To be connected first, in order. */
  readonly jumps: readonly ResolvedHost[];
}

/** The alias, or `address[:port]`. */
export function hostName(args: HostArgs): string {
  if (typeof args === "string") return args;
  const port = args.port ?? 22;
  return port === 22
    ? args.address
    : `${isIP(args.address) === 6 ? `[${args.address}]` : args.address}:${port}`;
}

/** The host of that `hostName`, as far as it tells. */
export function hostOfName(name: string): HostArgs {
  const [, bracketed, plain, port] = /^(?:\[(.+)\]|([^:]+)):(\d+)$/.exec(name) ?? [];
  const address = bracketed ?? plain;
  return address === undefined ? name : { address, port: Number(port) };
}

/**
 * `address:port`, to see whether two declarations mean the same machine. Jumps do not count: another way to an
 * address is far more often a new way than another machine, and taking it for another machine would remove
 * there what was just made. Raises INVALID_INPUT.
 */
export async function hostAddress(args: HostArgs, named: NamedHosts = noNames): Promise<string> {
  const known = connectionOf(args, named);
  if (known !== undefined) return `${known.address.toLowerCase()}:${known.port ?? 22}`;
  const text = hostName(args);
  const { name, given } = partsOf(text) ?? { name: text, given: {} };
  const config = await sshConfig(name, given);
  return `${(config.hostname ?? name).toLowerCase()}:${given.port ?? config.port ?? "22"}`;
}

/**
 * The `hostAddress` of all that is passed on the way to a host, its own last: an address behind one server is not that behind
 * another. What the SSH configuration jumps through by itself is not told. Raises INVALID_INPUT.
 */
export async function hostRoute(args: HostArgs, named: NamedHosts, depth = 0): Promise<string[]> {
  if (depth > 8) throw invalid("host", "ProxyJump goes in a circle", hostName(args));
  const [first, ...others] = jumpsOf(connectionOf(args, named));
  return [
    ...(first === undefined ? [] : await hostRoute(first, named, depth + 1)),
    ...(await Promise.all([...others, args].map((one) => hostAddress(one, named)))),
  ];
}

/** The first text of a declaration, jumps included, that is a configured name but for its case. */
export function nearMiss(
  args: HostArgs,
  named: NamedHosts,
): { readonly text: string; readonly name: string } | undefined {
  if (typeof args !== "string") {
    const misses = jumpsOf(args).map((jump) => nearMiss(jump, named));
    return misses.find((miss) => miss !== undefined);
  }
  const text = partsOf(args)?.name ?? args;
  const name = named.has(text)
    ? undefined
    : [...named.keys()].find((one) => one.toLowerCase() === text.toLowerCase());
  return name === undefined ? undefined : { text: args, name };
}

/** Why a near miss is wrong, in words that can follow what it is in. */
export function missed(name: string): string {
  return `differs from the configured name ${name} in nothing but case: write it so`;
}

/** True for a name of the provider's configuration, also with a user or port as a jump may have. */
export function isConfigured(args: HostArgs, named: NamedHosts): boolean {
  return typeof args === "string" && connectionOf(args, named) !== undefined;
}

/** The name or address under which a host is reached that is declared in detail or configured; else what it is declared by. */
export function serverOf(args: HostArgs, named: NamedHosts = noNames): string {
  const known = connectionOf(args, named);
  if (known !== undefined) return known.address;
  const text = hostName(args);
  return partsOf(text)?.name ?? text;
}

/**
 * True where a text is the SSH configuration's own word for an address, or is one. Any other may once have been a configured name, and
 * what a name server says of such a one is not what it stood for.
 */
export async function isKnownElsewhere(text: string): Promise<boolean> {
  const name = partsOf(text)?.name ?? text;
  if (isIP(name) !== 0) return true;
  const { hostname: address = name } = await sshConfig(name);
  return address.toLowerCase() !== name.toLowerCase();
}

function connectionOf(args: HostArgs, named: NamedHosts): HostConnection | undefined {
  if (typeof args !== "string") return args;
  const parts = partsOf(args);
  const connection = parts && named.get(parts.name);
  return connection && withGiven(connection, parts.given);
}

function withGiven(connection: HostConnection, given: Given): HostConnection {
  const { user = connection.user, port = connection.port } = given;
  return { ...connection, user, port };
}

/** What `[user@]host[:port]` or `ssh://...` consists of; `undefined` for what is neither. */
function partsOf(text: string): { readonly name: string; readonly given: Given } | undefined {
  const [, user, host, port] = /^(?:ssh:\/\/)?(?:(.+)@)?(\[[^\]@]+\]|[^:@]+)(?::(\d+))?\/?$/.exec(text) ?? [];
  if (host === undefined) return undefined;
  const given = { user, port: port === undefined ? undefined : Number(port) };
  return { name: host.replace(/^\[(.*)\]$/, "$1"), given };
}

function jumpsOf(args: HostConnection | undefined): HostArgs[] {
  return args?.proxyJump === undefined ? [] : [args.proxyJump].flat();
}

/**
 * Checks what can be checked without connecting: an unknown alias, an unreadable key, a malformed pin.
 * Raises HOST_UNKNOWN, KEY_UNREADABLE, INVALID_INPUT.
 */
export async function validateHostArgs(args: HostArgs, named: NamedHosts = noNames): Promise<void> {
  const resolved = await resolveHost(args, named);
  const first = resolved.jumps[0] ?? resolved;
  if (isIP(first.address) !== 0) return;
  try {
    await lookup(first.address);
  } catch (error) {
    // Only a definite "no such name" is the user's mistake; a name server that does not answer is not.
    if (!(error instanceof Error && "code" in error && error.code === "ENOTFOUND")) return;
    throw new LvmNbdError("HOST_UNKNOWN", {
      host: resolved.name,
      property: "host",
      message: unresolved(args, first, named),
    });
  }
}

/** `first`: what is connected to first, whose address does not resolve. Of what is configured the place is named, and not the value. */
function unresolved(args: HostArgs, first: ResolvedHost, named: NamedHosts): string {
  if (named.get(first.name)?.address === first.address)
    return `lvm-nbd:hosts.${first.name}.address: does not resolve`;
  const own = isConfigured(args, named) ? partsOf(hostName(args))?.name : undefined;
  if (own !== undefined) return `lvm-nbd:hosts.${own}.proxyJump: the first of them does not resolve`;
  return first.address === args
    ? `"${args}" is neither in \`lvm-nbd:hosts\`, nor an alias in the SSH configuration, nor a name that resolves`
    : `the name ${first.address} does not resolve`;
}

/** Raises HOST_UNKNOWN, KEY_UNREADABLE, INVALID_INPUT. */
export async function resolveHost(args: HostArgs, named: NamedHosts = noNames): Promise<ResolvedHost> {
  const miss = nearMiss(args, named);
  if (miss !== undefined) throw invalid("host", `"${miss.text}" ${missed(miss.name)}`, hostName(args));
  if (typeof args !== "string") return resolveConnection(args, named, 0);
  const parts = partsOf(args);
  if (parts === undefined || !named.has(parts.name)) return resolveAlias(args, 0);
  requirePort(parts.given, args);
  return resolveName(parts.name, named, 0, parts.given);
}

const noNames: NamedHosts = new Map();

async function resolveName(
  name: string,
  named: NamedHosts,
  depth: number,
  given: Given = {},
): Promise<ResolvedHost> {
  const connection = named.get(name);
  if (connection === undefined) return resolveAlias(name, depth, given);
  try {
    return { ...(await resolveConnection(withGiven(connection, given), named, depth)), name };
  } catch (error) {
    throw isLvmNbdError(error) ? ofConfiguration(error, name) : error;
  }
}

/** The failure as one of what is configured, and not of what the resource declares. */
function ofConfiguration(error: LvmNbdError, name: string): LvmNbdError {
  const { property = "host", message } = error.details;
  const path = property.replace("host", `lvm-nbd:hosts.${name}`);
  const isJumps = message.startsWith("lvm-nbd:hosts.");
  return new LvmNbdError(error.code, {
    ...error.details,
    host: name,
    property: "host",
    message: isJumps ? message : `${path}: ${message.replace(`${property}: `, "")}`,
  });
}

/** Why a connection is wrong by itself, whatever machine it is used on; by the property without `host.` before it, and never by its value. */
export function connectionProblem(args: HostConnection): Problem | undefined {
  try {
    declaredKeys(args);
    return undefined;
  } catch (error) {
    if (!isLvmNbdError(error)) throw error;
    const { property = "host", message } = error.details;
    return { property: property.replace("host.", ""), reason: message.replace(`${property}: `, "") };
  }
}

/** The keys that are declared by their texts. Raises INVALID_INPUT, KEY_UNREADABLE for what is wrong by itself, without quoting it. */
function declaredKeys(args: HostConnection): IdentityKey[] {
  const name = hostName(args);
  const { port = 22 } = args;
  if (!isPort(port)) throw invalid("host.port", "is no port: 1 to 65535 are", name);
  if (!/^[^\s@/[\]-][^\s@/[\]]*$/.test(args.address)) {
    throw invalid("host.address", "is no name or address of a server", name);
  }
  for (const pin of listOf(args.hostKey)) {
    const problem = pinProblem(pin);
    if (problem !== undefined) throw invalid("host.hostKey", problem, name);
  }
  for (const jump of jumpsOf(args)) {
    const problem = typeof jump === "string" ? jumpProblem(jump) : undefined;
    if (problem !== undefined) throw invalid("host.proxyJump", problem, name);
  }
  if (args.privateKeyPath?.includes("\n")) {
    throw invalid("host.privateKeyPath", "is no path: a key's text is for `privateKey`", name);
  }
  return args.privateKey === undefined
    ? []
    : [parsedKey("privateKey", args.privateKey, args.passphrase, name)];
}

function jumpProblem(text: string): string | undefined {
  const parts = partsOf(text);
  if (parts === undefined || !aliasForm.test(parts.name)) return "is not a host to jump through";
  const { port } = parts.given;
  return port === undefined || isPort(port) ? undefined : "has a port that is none: 1 to 65535 are";
}

async function resolveConnection(
  args: HostConnection,
  named: NamedHosts,
  depth: number,
): Promise<ResolvedHost> {
  const keys = declaredKeys(args);
  const name = hostName(args);
  const port = args.port ?? 22;
  const user = args.user ?? "root";
  if (args.privateKeyPath !== undefined) {
    keys.push(await readKey(expandHome(args.privateKeyPath), args.passphrase, name, "privateKeyPath"));
  }
  const pins = listOf(args.hostKey);
  const files = listOf(args.knownHostsPath).map(expandHome);
  const alone = keys.length === 0 && args.password === undefined;
  const agent = args.agent === undefined ? alone : args.agent;
  if (args.agent === true && !process.env.SSH_AUTH_SOCK) {
    throw invalid("host.agent", "no agent is there: SSH_AUTH_SOCK is not set", name);
  }
  const jumps: ResolvedHost[] = [];
  for (const jump of jumpsOf(args)) {
    jumps.push(...(await resolveJump(jump, named, depth, jumps.length === 0)));
  }
  return {
    name,
    address: args.address,
    port,
    user,
    keys,
    agent: typeof agent === "string" ? expandHome(agent) : agent ? process.env.SSH_AUTH_SOCK : undefined,
    agentKeys: [],
    identitiesOnly: false,
    password: args.password,
    connectSeconds: undefined,
    trust:
      pins.length > 0
        ? { pins }
        : { knownHosts: await readTexts(files.length > 0 ? files : defaultKnownHosts()) },
    hostKeyNames: [port === 22 ? args.address : `[${args.address}]:${port}`],
    revokedHostKeys: [],
    sudo: args.sudo ?? user !== "root",
    jumps,
  };
}

/** What goes before the SSH configuration, which may have more to say of that user, and to name by that port. */
interface Given {
  readonly user?: string | undefined;
  readonly port?: number | undefined;
}

async function resolveAlias(alias: string, depth: number, given: Given = {}): Promise<ResolvedHost> {
  const config = await sshConfig(alias, given);
  const command = config.proxycommand;
  if (command !== undefined && command !== "none") {
    throw invalid(
      "host",
      `the alias "${alias}" uses ProxyCommand, which is not supported: use ProxyJump`,
      alias,
    );
  }
  const address = config.hostname ?? alias;
  const port = given.port ?? Number(config.port ?? "22");
  const user = config.user ?? "root";
  const values = {
    ...{ alias: alias.replace(/^.*@/, ""), address, port, user },
    ...{ hostKeyAlias: config.hostkeyalias, hash: config.controlpath },
  };
  const expand = (path: string) => expandPath(path, values);
  const keys: IdentityKey[] = [];
  const agentKeys: string[] = [];
  const named = config.certificatefile.filter((path) => path !== "none").map(expand);
  const declared = await readCertificates(named);
  for (const file of config.identityfile.filter((path) => path !== "none").map(expand)) {
    const key = await readKeyIfThere(file, alias);
    // As OpenSSH: where files of certificates are named, no other is looked for.
    if (key !== undefined) keys.push(named.length === 0 ? key : { ...key, certificates: declared });
    const publicKey = await readPublicKey(file);
    if (publicKey !== undefined) agentKeys.push(publicKey);
  }
  const connectSeconds = Number(config.connecttimeout);
  const jumps: ResolvedHost[] = [];
  if (config.proxyjump !== undefined && config.proxyjump !== "none") {
    for (const jump of config.proxyjump.split(",")) {
      const expanded = expandJump(jump.trim(), values);
      jumps.push(...(await resolveJump(expanded, noNames, depth, jumps.length === 0)));
    }
  }
  const base = config.hostkeyalias ?? address;
  const agent =
    config.identityagent === undefined || config.identityagent === "SSH_AUTH_SOCK"
      ? process.env.SSH_AUTH_SOCK
      : /^\$\w+$/.test(config.identityagent)
        ? process.env[config.identityagent.slice(1)]
        : expandHome(config.identityagent);
  return {
    name: alias,
    address,
    port,
    user,
    keys,
    agent: agent === "none" ? undefined : agent,
    agentKeys,
    identitiesOnly: config.identitiesonly === "yes",
    password: undefined,
    connectSeconds: connectSeconds > 0 ? connectSeconds : undefined,
    trust: {
      knownHosts: await readTexts(
        // In the user's ssh has put the values for tokens, and in the system's there are none.
        [...config.userknownhostsfile, ...config.globalknownhostsfile]
          .filter((path) => path !== "none")
          .map(expandHome),
      ),
      limits: limitsOf(config, alias),
    },
    revokedHostKeys: config.revokedhostkeys.filter((path) => path !== "none").map(expand),
    hostKeyNames: [config.hostkeyalias === undefined && port !== 22 ? `[${base}]:${port}` : base],
    sudo: user !== "root",
    jumps,
  };
}

/** Raises INVALID_INPUT where nothing that is sound is left. A key that is pinned is not held to them: it has no alias. */
function limitsOf(
  { hostkeyalgorithms, casignaturealgorithms }: SshConfig,
  alias: string,
): HostKeyLimits | undefined {
  if (hostkeyalgorithms === undefined) return undefined;
  const limits = {
    hostKeyAlgorithms: hostkeyalgorithms.split(","),
    caSignatureAlgorithms: casignaturealgorithms?.split(","),
  };
  if (hostKeyAlgorithms(limits).length === 0) {
    const what = `HostKeyAlgorithms leaves none that is taken here: ${hostkeyalgorithms || "nothing"}`;
    throw invalid("host", `the alias "${alias}": ${what}`, alias);
  }
  return limits;
}

/**
 * A jump may be a name or alias, `[user@]host[:port]` or `ssh://...`. As in OpenSSH the configuration's own jumps of
 * such a one come before it only when it is the first: a later one is reached through those before it.
 */
async function resolveJump(
  jump: HostArgs,
  named: NamedHosts,
  depth: number,
  first: boolean,
): Promise<readonly ResolvedHost[]> {
  if (depth > 8) throw invalid("host", "ProxyJump goes in a circle", hostName(jump));
  let resolved: ResolvedHost;
  if (typeof jump !== "string") resolved = await resolveConnection(jump, named, depth + 1);
  else {
    const parts = partsOf(jump);
    if (parts === undefined) throw invalid("host", `"${jump}" is not a host to jump through`, jump);
    requirePort(parts.given, jump);
    const alias = await resolveName(parts.name, named, depth + 1, parts.given);
    resolved = { ...alias, jumps: first ? alias.jumps : [] };
  }
  return [...resolved.jumps, { ...resolved, jumps: [] }];
}

function requirePort({ port }: Given, text: string): void {
  if (port !== undefined && !isPort(port)) throw invalid("host", `${port} is no port: 1 to 65535 are`, text);
}

interface SshConfig {
  readonly hostname?: string;
  readonly port?: string;
  readonly user?: string;
  readonly hostkeyalias?: string;
  readonly proxyjump?: string;
  readonly proxycommand?: string;
  readonly identityagent?: string;
  readonly identitiesonly?: string;
  readonly connecttimeout?: string;
  /** Not the configuration's: see `askOpenSsh`. */
  readonly controlpath?: string;
  readonly hostkeyalgorithms?: string;
  readonly casignaturealgorithms?: string;
  readonly identityfile: readonly string[];
  readonly certificatefile: readonly string[];
  readonly revokedhostkeys: readonly string[];
  readonly userknownhostsfile: readonly string[];
  readonly globalknownhostsfile: readonly string[];
}

const aliasForm = /^[A-Za-z0-9_.:%@+][A-Za-z0-9_.:%@+-]*$/;

const configs = new Map<string, Promise<SshConfig>>();

/** What OpenSSH makes of an alias. Asked once per process. */
function sshConfig(alias: string, given: Given = {}): Promise<SshConfig> {
  if (!aliasForm.test(alias)) {
    throw invalid("host", `"${alias}" is not a host alias: letters, digits and _ . : - are right`, alias);
  }
  const file = process.env.LVM_NBD_SSH_CONFIG;
  const key = [file, alias, given.user, given.port].join("\0");
  let config = configs.get(key);
  if (config === undefined) {
    config = askOpenSsh(alias, file, given);
    configs.set(key, config);
    config.catch(() => configs.delete(key));
  }
  return config;
}

async function askOpenSsh(
  alias: string,
  file: string | undefined,
  { user, port }: Given,
): Promise<SshConfig> {
  const options = [
    ...(file === undefined ? [] : ["-F", file]),
    ...(user === undefined ? [] : ["-l", user]),
    ...(port === undefined ? [] : ["-p", String(port)]),
    // What %C is a hash of is another thing with each OpenSSH; in this option it puts it itself.
    ...["-o", "ControlPath=%C"],
  ];
  let stdout: string;
  try {
    ({ stdout } = await run("ssh", [...options, "-G", "--", alias], {
      timeout: 20_000,
      env: childEnvironment(),
    }));
  } catch (error) {
    const missing = error instanceof Error && "code" in error && error.code === "ENOENT";
    throw invalid(
      "host",
      missing
        ? `the alias "${alias}" is resolved by OpenSSH's \`ssh\`, which is not installed here: install it, or give the host as an object`
        : `OpenSSH cannot resolve the alias "${alias}": ${error instanceof Error ? error.message.split("\n").slice(0, 3).join(" ") : String(error)}`,
      alias,
    );
  }
  const lines = stdout.split("\n").map((line) => line.trim());
  const first = (key: string) => {
    // Of an empty list, e.g. of algorithms, the key alone is printed.
    const line = lines.find((candidate) => candidate === key || candidate.startsWith(`${key} `));
    return line === undefined ? {} : { [key]: line.slice(key.length + 1) };
  };
  // Printed without quotes: what does not begin like a path goes on with the one before it.
  const paths = (key: string) =>
    lines
      .filter((line) => line.startsWith(`${key} `))
      .flatMap((line) => line.slice(key.length + 1).split(/ (?=[/~%]|\$\{|none$)/));
  return {
    ...first("hostname"),
    ...first("port"),
    ...first("user"),
    ...first("hostkeyalias"),
    ...first("proxyjump"),
    ...first("proxycommand"),
    ...first("identityagent"),
    ...first("identitiesonly"),
    ...first("connecttimeout"),
    ...first("controlpath"),
    ...first("hostkeyalgorithms"),
    ...first("casignaturealgorithms"),
    identityfile: lines.filter((line) => line.startsWith("identityfile ")).map((line) => line.slice(13)),
    certificatefile: paths("certificatefile"),
    revokedhostkeys: paths("revokedhostkeys"),
    userknownhostsfile: paths("userknownhostsfile"),
    globalknownhostsfile: paths("globalknownhostsfile"),
  };
}

async function readKey(
  path: string,
  passphrase: string | undefined,
  host: string,
  property: string,
): Promise<IdentityKey> {
  let text: string;
  try {
    text = await readText(path);
  } catch (error) {
    throw new LvmNbdError("KEY_UNREADABLE", {
      host,
      property: `host.${property}`,
      message: `the private key ${path} cannot be read: ${error instanceof Error ? error.message.replace(/, (open|stat|read).*/, "") : String(error)}`,
    });
  }
  const certificates = await readCertificates([`${path}-cert.pub`]);
  return { ...parsedKey(property, text, passphrase, host, path), label: path, certificates };
}

/** Certificates in files, of which any may not be there: OpenSSH goes on without them as well. */
async function readCertificates(paths: readonly string[]): Promise<Buffer[]> {
  const texts = await Promise.all(
    [...new Set(paths)].map((path) =>
      readText(path).catch((error: unknown) => {
        if (error instanceof Error && "code" in error) return "";
        throw error;
      }),
    ),
  );
  return texts.flatMap((text) => {
    const blob = /^\S+-cert-v01@openssh\.com ([A-Za-z0-9+/=]+)/.exec(text)?.[1];
    return blob === undefined ? [] : [Buffer.from(blob, "base64")];
  });
}

/** OpenSSH's default keys need not exist, and one that is encrypted is left to the agent. */
async function readKeyIfThere(path: string, host: string): Promise<IdentityKey | undefined> {
  try {
    return await readKey(path, undefined, host, "privateKeyPath");
  } catch (error) {
    if (error instanceof LvmNbdError && error.code === "KEY_UNREADABLE") return undefined;
    throw error;
  }
}

function parsedKey(
  property: string,
  privateKey: string,
  passphrase: string | undefined,
  host: string,
  path?: string,
): IdentityKey {
  const what = path === undefined ? "the private key" : `the private key ${path}`;
  const fail = (message: string) =>
    new LvmNbdError("KEY_UNREADABLE", { host, property: `host.${property}`, message });
  const parsed = parseOnce(privateKey, passphrase);
  if (parsed instanceof Error) {
    const encrypted = /passphrase|encrypted/i.test(parsed.message);
    throw fail(
      encrypted && passphrase === undefined
        ? `${what} is encrypted: give its \`passphrase\`, or use the agent`
        : encrypted
          ? `${what} cannot be decrypted with the given passphrase`
          : `${what} is not a private key (${parsed.message})`,
    );
  }
  const key = Array.isArray(parsed) ? parsed[0] : parsed;
  if (key === undefined || !key.isPrivateKey()) throw fail(`${what} is a public key: give the private one`);
  if (key.type === "ssh-dss") throw fail(`${what} is a DSA key, which signs with SHA-1 alone`);
  return { label: what, privateKey, passphrase, certificates: [] };
}

type ParsedKeys = ReturnType<typeof Ssh2.utils.parseKey>;

const memory = randomBytes(32);
/** By their texts, and by what tells a passphrase from another without holding it. */
const parsedKeys = new Map<string, Map<string, ParsedKeys>>();

/** To decrypt a key takes half a second, and a host is resolved for every resource on it. */
export function parseOnce(privateKey: string, passphrase: string | undefined): ParsedKeys {
  const ofText = parsedKeys.get(privateKey) ?? new Map<string, ParsedKeys>();
  parsedKeys.set(privateKey, ofText);
  const id =
    passphrase === undefined ? "without" : createHmac("sha256", memory).update(passphrase).digest("hex");
  let parsed = ofText.get(id);
  if (parsed === undefined) {
    // Not before a key is given: it takes longer to load than all else that a check needs.
    const { utils }: typeof Ssh2 = require("ssh2");
    parsed = utils.parseKey(privateKey, passphrase);
    ofText.set(id, parsed);
  }
  return parsed;
}

/** The public key beside an identity file (or in its place), by which OpenSSH knows the agent's key. */
async function readPublicKey(path: string): Promise<string | undefined> {
  for (const file of [`${path}.pub`, path]) {
    let text: string;
    try {
      text = await readText(file);
    } catch (error) {
      // Unreadable or not there: OpenSSH goes on without it as well.
      if (error instanceof Error && "code" in error) continue;
      throw error;
    }
    const blob = /^(?:ssh-|ecdsa-|sk-)\S+ ([A-Za-z0-9+/=]+)/.exec(text)?.[1];
    if (blob !== undefined) return blob;
  }
  return undefined;
}

/** The values of a host's declaration that are never shown: private keys, passphrases, passwords, also of its jumps. */
export function secretsOf(args: HostArgs): string[] {
  if (typeof args === "string") return [];
  return [args.privateKey, args.passphrase, args.password, ...jumpsOf(args).flatMap(secretsOf)].filter(
    (value) => value !== undefined,
  );
}

function isPort(port: number): boolean {
  return Number.isInteger(port) && port >= 1 && port <= 65535;
}

interface TokenValues {
  /** Without the user that goes before it. */
  readonly alias: string;
  readonly address: string;
  readonly port: number;
  readonly user: string;
  readonly hostKeyAlias: string | undefined;
  /** Of the connection. */
  readonly hash: string | undefined;
}

/** The tokens that `ssh -G` leaves in a jump, by ssh_config(5). */
function jumpTokens(host: TokenValues): Readonly<Record<string, string>> {
  return { "%%": "%", "%h": host.address, "%n": host.alias, "%p": String(host.port), "%r": host.user };
}

/** Those that it leaves in the names of files. Few names have any. */
function fileTokens(host: TokenValues): Readonly<Record<string, string>> {
  const local = hostname();
  return {
    ...jumpTokens(host),
    ...(host.hash === undefined ? {} : { "%C": host.hash }),
    "%d": homedir(),
    "%i": String(process.getuid?.() ?? ""),
    "%k": host.hostKeyAlias ?? host.alias,
    "%L": local.split(".")[0] ?? local,
    "%l": local,
    "%u": userInfo().username,
  };
}

/** The path behind tokens, `${VARIABLE}` and `~`. Raises INVALID_INPUT for what is not known, lest another file be meant. */
function expandPath(path: string, host: TokenValues): string {
  return expandHome(
    path.replace(/%.?|\$\{([^}]*)\}?/g, (found, variable?: string) => {
      const value = variable === undefined ? fileTokens(host)[found] : process.env[variable];
      if (value === undefined) throw notKnown(found, path, host.alias);
      return value;
    }),
  );
}

function expandJump(jump: string, host: TokenValues): string {
  const tokens = jumpTokens(host);
  return jump.replace(/%.?/g, (found) => {
    const value = tokens[found];
    if (value === undefined) throw notKnown(found, jump, host.alias);
    return value;
  });
}

function notKnown(found: string, whole: string, alias: string): LvmNbdError {
  const what = found.startsWith("$") ? "no variable that is set" : "no token that is known here";
  return invalid("host", `the alias "${alias}" has ${found} in ${whole}, which is ${what}`, alias);
}

function invalid(property: string, message: string, host: string): LvmNbdError {
  return new LvmNbdError("INVALID_INPUT", { property, message: `${property}: ${message}`, host });
}

function listOf(value: string | readonly string[] | undefined): readonly string[] {
  return value === undefined ? [] : typeof value === "string" ? [value] : value;
}

function expandHome(path: string): string {
  return path === "~" || path.startsWith("~/") ? join(homedir(), path.slice(1)) : path;
}

function defaultKnownHosts(): string[] {
  return [join(homedir(), ".ssh", "known_hosts"), "/etc/ssh/ssh_known_hosts"];
}

/** Files that do not exist know no host; one that cannot be read is an error, lest a known key seem unknown. */
async function readTexts(paths: readonly string[]): Promise<string[]> {
  const texts: string[] = [];
  for (const path of paths) {
    try {
      texts.push(await readText(path));
    } catch (error) {
      const code = error instanceof Error && "code" in error ? error.code : undefined;
      if (code === "ENOENT" || code === "ENOTDIR") continue;
      throw new LvmNbdError("INVALID_INPUT", {
        property: "host.knownHostsPath",
        message: `the known_hosts file ${path} cannot be read: ${error instanceof Error ? error.message.replace(/, (open|stat|read).*/, "") : String(error)}`,
      });
    }
  }
  return texts;
}
