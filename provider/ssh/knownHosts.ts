/**
 * Texts of known_hosts, each read once however many hosts are looked up in it. Source: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT.
 */
import { hash } from "node:crypto";

/** A line of known_hosts that can say something about a plain host key. */
export interface KnownKey {
  readonly marker: string | undefined;
  readonly patterns: string;
  readonly type: string;
  readonly key: Buffer;
}

/** The key's type, from the blob itself. */
export function keyType(key: Buffer): string {
  const length = key.length >= 4 ? key.readUInt32BE(0) : 0;
  return key.subarray(4, 4 + length).toString("latin1");
}

/** The lines with that marker, or without one, that are for any of those names. */
export function linesFor(
  names: readonly string[],
  knownHosts: readonly string[],
  marker: string | undefined,
): KnownKey[] {
  return knownHosts.flatMap((text) => {
    const lines = knownHostsOf(text);
    const found = new Set(names.flatMap((name) => lines.of(name.toLowerCase(), marker)));
    return found.size < 2 ? [...found] : lines.inOrder(found);
  });
}

/** Files that are in use at the same time are few; an older content is forgotten. */
const mostTexts = 16;
const texts = new Map<string, KnownHosts>();

const digests = new Map<string, string>();

/** Tells one text from another. */
export function digestOf(text: string): string {
  return keptOf(digests, text, () => hash("sha256", text));
}

function knownHostsOf(text: string): KnownHosts {
  return keptOf(texts, text, () => new KnownHosts(text));
}

/** What is made of a text, once while it is in use. */
function keptOf<T>(all: Map<string, T>, text: string, make: () => T): T {
  const made = all.get(text) ?? make();
  // The one that was used last comes last.
  all.delete(text);
  all.set(text, made);
  const [oldest] = all.keys();
  if (all.size > mostTexts && oldest !== undefined) all.delete(oldest);
  return made;
}

/** A text, in which a host that is named as it is in most files is found without a look at the others. */
class KnownHosts {
  private readonly places = new Map<KnownKey, number>();
  /** Lines that name hosts one by one, by these names. */
  private readonly named = new Map<string, KnownKey[]>();
  private readonly hashed: { readonly line: KnownKey; readonly name: HashedName }[] = [];
  private readonly patterned: KnownKey[] = [];
  private readonly found = new Map<string, readonly KnownKey[]>();

  constructor(text: string) {
    for (const line of parseKnownHosts(text)) {
      this.places.set(line, this.places.size);
      if (line.patterns.startsWith("|1|")) this.hashed.push({ line, name: hashedName(line.patterns) });
      else if (/[*?!]/.test(line.patterns)) this.patterned.push(line);
      else
        for (const name of new Set(line.patterns.toLowerCase().split(","))) {
          const lines = this.named.get(name);
          if (lines === undefined) this.named.set(name, [line]);
          else lines.push(line);
        }
    }
  }

  /** `name`: in small letters. */
  of(name: string, marker: string | undefined): readonly KnownKey[] {
    const asked = `${marker ?? ""} ${name}`;
    let lines = this.found.get(asked);
    if (lines === undefined) {
      lines = this.look(name, marker);
      this.found.set(asked, lines);
    }
    return lines;
  }

  inOrder(lines: Iterable<KnownKey>): KnownKey[] {
    const place = (line: KnownKey) => this.places.get(line) ?? 0;
    return [...lines].sort((one, other) => place(one) - place(other));
  }

  private look(name: string, marker: string | undefined): readonly KnownKey[] {
    // What it costs to look for a hashed one is for each line of the file.
    const hashed = this.hashed.filter(({ line }) => line.marker === marker);
    const matches = hashed.length === 0 ? () => false : hashMatcher(name);
    return [
      ...(this.named.get(name) ?? []).filter((line) => line.marker === marker),
      ...hashed.filter((one) => matches(one.name)).map(({ line }) => line),
      ...this.patterned.filter((line) => line.marker === marker && matchesPatterns(line.patterns, name)),
    ];
  }
}

function parseKnownHosts(text: string): KnownKey[] {
  return text.split("\n").flatMap((line) => {
    const words = line.trim().split(/\s+/);
    if (words[0] === undefined || words[0] === "" || words[0].startsWith("#")) return [];
    const marker = words[0].startsWith("@") ? words.shift() : undefined;
    const [patterns, type, blob] = words;
    if (patterns === undefined || type === undefined || blob === undefined) return [];
    const key = Buffer.from(blob, "base64");
    return keyType(key) === type ? [{ marker, patterns, type, key }] : [];
  });
}

/** A name by its HMAC-SHA1 (RFC 2104), with the blocks that the salt makes. */
interface HashedName {
  readonly inner: Buffer;
  readonly outer: Buffer;
  readonly digest: Buffer;
}

const blockSize = 64;

/** Of `|1|SALT|HASH`. */
function hashedName(patterns: string): HashedName {
  const [, , salt = "", digest = ""] = patterns.split("|");
  const given = Buffer.from(salt, "base64");
  const key = given.length > blockSize ? hash("sha1", given, "buffer") : given;
  const block = (padding: number) =>
    Buffer.from(Array.from({ length: blockSize }, (_, at) => (key[at] ?? 0) ^ padding));
  return { inner: block(0x36), outer: block(0x5c), digest: Buffer.from(digest, "base64") };
}

/** Tells whether a hashed name is that one. By hand: an `Hmac` costs ten times as much, and each line of the file needs one. */
function hashMatcher(name: string): (hashed: HashedName) => boolean {
  const inner = Buffer.concat([Buffer.alloc(blockSize), Buffer.from(name)]);
  const outer = Buffer.alloc(blockSize + 20);
  return (hashed) => {
    hashed.inner.copy(inner);
    hashed.outer.copy(outer);
    hash("sha1", inner, "buffer").copy(outer, blockSize);
    return hash("sha1", outer, "buffer").equals(hashed.digest);
  };
}

function matchesPatterns(patterns: string, name: string): boolean {
  let matched = false;
  for (const pattern of patterns.toLowerCase().split(",")) {
    const negated = pattern.startsWith("!");
    if (!matchesWildcard(negated ? pattern.slice(1) : pattern, name)) continue;
    if (negated) return false;
    matched = true;
  }
  return matched;
}

/**
 * True if the text is of a pattern of OpenSSH's, of `*` and `?`. Not by a RegExp, which takes for ever over many `*`: patterns come from
 * hosts too. Only the last `*` is ever given more of the text, since what lay before it has matched.
 */
export function matchesWildcard(pattern: string, text: string): boolean {
  let [at, from] = [0, 0];
  let star: number | undefined;
  for (let next = 0; next < text.length; ) {
    if (pattern[at] === "*") {
      star = at++;
      from = next;
    } else if (at < pattern.length && (pattern[at] === "?" || pattern[at] === text[next])) {
      at++;
      next++;
    } else if (star !== undefined) {
      at = star + 1;
      next = ++from;
    } else return false;
  }
  while (pattern[at] === "*") at++;
  return at === pattern.length;
}
