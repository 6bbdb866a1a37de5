/** A file tree in memory. Texts are JavaScript strings and stand for their UTF-8 bytes. Paths are absolute. */
import { isPattern, matches, unquotePattern } from "./pattern.js";

const reasons = {
  EACCES: "Permission denied",
  EBADF: "Bad file descriptor",
  EBUSY: "Device or resource busy",
  EEXIST: "File exists",
  EINVAL: "Invalid argument",
  EIO: "Input/output error",
  EISDIR: "Is a directory",
  ELOOP: "Too many levels of symbolic links",
  ENOENT: "No such file or directory",
  ENOSPC: "No space left on device",
  ENOTDIR: "Not a directory",
  ENOTEMPTY: "Directory not empty",
  EPIPE: "Broken pipe",
  EROFS: "Read-only file system",
} as const;

/** A system call that failed. */
export class FileError extends Error {
  constructor(
    readonly code: keyof typeof reasons,
    readonly path: string,
  ) {
    super(`${path}: ${reasons[code]}`);
  }

  /** As strerror(3) says it. */
  get reason(): string {
    return reasons[this.code];
  }
}

type Directory = { readonly kind: "directory"; readonly entries: Map<string, Entry> };

/** What a path leads to; its identity is that of an inode. */
export type Entry =
  | Directory
  | { readonly kind: "file"; content: string }
  | { readonly kind: "link"; readonly target: string }
  | { readonly kind: "block"; readonly id: string }
  | { readonly kind: "null" };

/** What is about to be done to a path; `write` comes after the `create` or `truncate` that opened the file. */
export type Operation =
  | "create"
  | "truncate"
  | "write"
  | "mkdir"
  | "remove"
  | "rename"
  | "link"
  | "block"
  | "sync";

/** An entry as `snapshot` shows it. */
export type Shown = Exclude<Entry, Directory> | { readonly kind: "directory" };

/** What a file descriptor leads to. A read moves on, for all who share the descriptor. */
export abstract class Stream {
  protected position = 0;
  protected abstract text(): string;
  abstract write(text: string): void;

  /** All that is left. */
  read(): string {
    const rest = this.text().slice(this.position);
    this.position += rest.length;
    return rest;
  }

  /** The next line with its end; `""` at the end. */
  readLine(): string {
    const text = this.text();
    const end = text.indexOf("\n", this.position);
    const line = text.slice(this.position, end === -1 ? undefined : end + 1);
    this.position += line.length;
    return line;
  }
}

/** An open file description. */
export class OpenFile extends Stream {
  constructor(
    readonly entry: Entry,
    private readonly path: string,
    private readonly appends: boolean,
    private readonly tree: FileTree,
  ) {
    super();
  }

  protected text(): string {
    if (this.entry.kind === "null") return "";
    if (this.entry.kind === "file") return this.entry.content;
    throw new FileError(this.entry.kind === "directory" ? "EISDIR" : "EIO", this.path);
  }

  write(text: string): void {
    if (this.entry.kind === "null" || text === "") return;
    if (this.entry.kind !== "file") throw new FileError("EIO", this.path);
    this.tree.onWrite?.(this.path, "write");
    const { content } = this.entry;
    const at = this.appends ? content.length : this.position;
    this.entry.content = content.slice(0, at).padEnd(at, "\0") + text + content.slice(at + text.length);
    this.position = at + text.length;
  }
}

interface Place {
  readonly parent: Directory;
  readonly name: string;
  readonly path: string;
  readonly entry: Entry | undefined;
}

/** A fresh tree holds `/dev/null` alone. Every method raises `FileError` as the system calls do. */
export class FileTree {
  /** Called before every change; throws a `FileError` for a full or read-only disk. */
  onWrite: ((path: string, operation: Operation) => void) | undefined;
  private readonly root: Directory = { kind: "directory", entries: new Map() };

  constructor() {
    this.mkdirs("/dev");
    this.put("/dev/null", { kind: "null" }, "create");
  }

  /** What is there, or `undefined`; `follow: false` looks at a symbolic link itself. */
  kind(path: string, follow = true): Entry["kind"] | undefined {
    return this.entry(path, follow)?.kind;
  }

  entry(path: string, follow = true): Entry | undefined {
    try {
      return this.locate(path, follow).entry;
    } catch (error) {
      if (error instanceof FileError) return undefined;
      throw error;
    }
  }

  exists(path: string): boolean {
    return this.kind(path) !== undefined;
  }

  read(path: string): string {
    return this.open(path, "read").read();
  }

  write(path: string, content: string): void {
    this.open(path, "write").write(content);
  }

  append(path: string, content: string): void {
    this.open(path, "append").write(content);
  }

  open(path: string, mode: "read" | "write" | "append"): OpenFile {
    const place = this.locate(path, true);
    let { entry } = place;
    if (mode === "read") entry = required(entry, path);
    else if (entry?.kind === "directory") throw new FileError("EISDIR", path);
    else if (entry === undefined) {
      entry = { kind: "file", content: "" };
      this.place(place, entry, "create");
    } else if (mode === "write" && entry.kind === "file") {
      this.onWrite?.(place.path, "truncate");
      entry.content = "";
    }
    return new OpenFile(entry, place.path, mode === "append", this);
  }

  /** Names in a directory, sorted by bytes. */
  list(path: string): string[] {
    return [...this.directory(path).entries.keys()].sort(byBytes);
  }

  mkdir(path: string): void {
    this.put(path, { kind: "directory", entries: new Map() }, "mkdir");
  }

  /** With its parents; one that exists is good. */
  mkdirs(path: string): void {
    const parts = path.split("/").filter((part) => part !== "");
    parts.forEach((_, index) => {
      const part = `/${parts.slice(0, index + 1).join("/")}`;
      const kind = this.kind(part);
      if (kind === undefined) this.mkdir(part);
      else if (kind !== "directory")
        throw new FileError(index + 1 < parts.length ? "ENOTDIR" : "EEXIST", part);
    });
  }

  /** Removes anything but a directory. */
  remove(path: string): void {
    const place = this.locate(path, false);
    if (required(place.entry, path).kind === "directory") throw new FileError("EISDIR", path);
    this.take(place);
  }

  rmdir(path: string): void {
    const directory = this.directory(path, false);
    if (directory.entries.size > 0) throw new FileError("ENOTEMPTY", path);
    this.take(this.locate(path, false));
  }

  /** Removes it with all that is in it, the innermost first. */
  removeTree(path: string): void {
    if (this.kind(path, false) !== "directory") {
      this.remove(path);
      return;
    }
    for (const name of this.list(path)) this.removeTree(`${path}/${name}`);
    this.rmdir(path);
  }

  /** As rename(2): what was at `to` is replaced in the same moment. */
  rename(from: string, to: string): void {
    const source = this.locate(from, false);
    const entry = required(source.entry, from);
    const target = this.locate(to, false);
    if (target.entry === entry) return;
    if (target.entry?.kind === "directory") {
      if (entry.kind !== "directory") throw new FileError("EISDIR", to);
      if (target.entry.entries.size > 0) throw new FileError("ENOTEMPTY", to);
    } else if (target.entry !== undefined && entry.kind === "directory") throw new FileError("ENOTDIR", to);
    if (target.path.startsWith(`${source.path}/`)) throw new FileError("EINVAL", to);
    this.onWrite?.(target.path, "rename");
    source.parent.entries.delete(source.name);
    target.parent.entries.set(target.name, entry);
  }

  /** Makes a symbolic link at `path`. */
  link(target: string, path: string): void {
    this.put(path, { kind: "link", target }, "link");
  }

  /** The target of a symbolic link. */
  readlink(path: string): string {
    const entry = required(this.locate(path, false).entry, path);
    if (entry.kind !== "link") throw new FileError("EINVAL", path);
    return entry.target;
  }

  /** The path without symbolic links; all but its last part must exist. */
  realpath(path: string): string {
    return this.locate(path, true).path;
  }

  /** Makes a block device. */
  block(path: string, id: string): void {
    this.put(path, { kind: "block", id }, "block");
  }

  /** The id of the block device that the path leads to. */
  blockId(path: string): string {
    const entry = required(this.locate(path, true).entry, path);
    if (entry.kind !== "block") throw new FileError("EINVAL", path);
    return entry.id;
  }

  /** As fsync(2); it only calls `onWrite`. */
  sync(path: string): void {
    const place = this.locate(path, true);
    required(place.entry, path);
    this.onWrite?.(place.path, "sync");
  }

  /** The paths that fit a pattern of the shell, sorted by bytes; a relative one begins at `folder`. */
  glob(pattern: string, folder = "/"): string[] {
    const prefix = /^\/*/.exec(pattern)?.[0] ?? "";
    const at = (path: string) => (prefix === "" ? `${folder}/${path}` : path);
    let found = [prefix];
    for (const part of pattern.slice(prefix.length).split("/")) {
      found = found.flatMap((base) => {
        const parent = base === "" || base === prefix ? base : `${base}/`;
        if (!isPattern(part)) return [parent + unquotePattern(part)];
        if (this.kind(at(base)) !== "directory") return [];
        return this.list(at(base))
          .filter((name) => (part.startsWith(".") || !name.startsWith(".")) && matches(part, name))
          .map((name) => parent + name);
      });
    }
    return found.filter((path) => this.kind(at(path), false) !== undefined).sort(byBytes);
  }

  /** Everything below a path, sorted; for comparisons. */
  snapshot(path = "/"): Record<string, Shown> {
    const entry = required(this.locate(path, false).entry, path);
    if (entry.kind !== "directory") return { [path]: { ...entry } };
    const inside = this.list(path).map((name) =>
      this.snapshot(path === "/" ? `/${name}` : `${path}/${name}`),
    );
    return Object.assign({ [path]: { kind: "directory" } }, ...inside);
  }

  private directory(path: string, follow = true): Directory {
    const entry = required(this.locate(path, follow).entry, path);
    if (entry.kind !== "directory") throw new FileError("ENOTDIR", path);
    return entry;
  }

  private put(path: string, entry: Entry, operation: Operation): void {
    const place = this.locate(path, false);
    if (place.entry !== undefined) throw new FileError("EEXIST", path);
    this.place(place, entry, operation);
  }

  private place({ parent, name, path }: Place, entry: Entry, operation: Operation): void {
    this.onWrite?.(path, operation);
    parent.entries.set(name, entry);
  }

  private take({ parent, name, path }: Place): void {
    this.onWrite?.(path, "remove");
    parent.entries.delete(name);
  }

  private locate(path: string, follow: boolean, hops = 0): Place {
    if (path === "") throw new FileError("ENOENT", path);
    if (hops > 40) throw new FileError("ELOOP", path);
    const parts = path.split("/").filter((part) => part !== "" && part !== ".");
    let here: Place = { parent: this.root, name: "", path: "/", entry: this.root };
    const above: Place[] = [];
    for (const [index, name] of parts.entries()) {
      const { entry } = here;
      if (entry === undefined) throw new FileError("ENOENT", path);
      if (entry.kind !== "directory") throw new FileError("ENOTDIR", path);
      if (name === "..") {
        here = above.pop() ?? here;
        continue;
      }
      const next = entry.entries.get(name);
      if (next?.kind === "link" && (follow || index + 1 < parts.length)) {
        const target = next.target.startsWith("/") ? next.target : `${here.path}/${next.target}`;
        return this.locate([target, ...parts.slice(index + 1)].join("/"), follow, hops + 1);
      }
      above.push(here);
      here = { parent: entry, name, path: `${here.path === "/" ? "" : here.path}/${name}`, entry: next };
    }
    return here;
  }
}

function required(entry: Entry | undefined, path: string): Entry {
  if (entry === undefined) throw new FileError("ENOENT", path);
  return entry;
}

/** The order of LC_ALL=C. */
export function byBytes(a: string, b: string): number {
  return Buffer.compare(Buffer.from(a), Buffer.from(b));
}
