import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { programSearchPath, runChild } from "./child.mts";
import {
  GUEST_FILES,
  GUEST_PACKAGES,
  GUESTS,
  IMAGE_VERSION,
  INITRAMFS_INIT,
  INITRAMFS_MODULES,
  REQUIRED_MODULES,
  SETUP_SCRIPT,
} from "./image-contents.mts";
import { withLock } from "./lock.mts";
import { ensureMachinePackages, findProgram, machineRelease } from "./machine.mts";
import { labDirectory } from "./paths.mts";
import { elapsed } from "./wait.mts";

/** The built guest image: files in the cache that every instance shares and none changes. */
export interface GuestImage {
  directory: string;
  kernel: string;
  initramfs: string;
  /** Raw ext4 file system, the backing file of every root disk. */
  root: string;
  /** SSH key which root and the ordinary user of every guest accept. */
  privateKey: string;
  /** Public host key of each guest: "ssh-ed25519 AAAA...". */
  hostKeys: Readonly<Record<string, string>>;
}

const BUILD_LIMIT_SECONDS = 1200;
const ROOT_SIZE = "3G";

/** The guest image, built first if the cache does not hold it. */
export async function ensureImage(log: (line: string) => void): Promise<GuestImage> {
  const { codename } = await machineRelease();
  const definition = JSON.stringify({
    IMAGE_VERSION,
    codename,
    GUESTS,
    GUEST_PACKAGES,
    GUEST_FILES,
    SETUP_SCRIPT,
    INITRAMFS_INIT,
    INITRAMFS_MODULES,
    ROOT_SIZE,
  });
  const hash = createHash("sha256").update(definition).digest("hex").slice(0, 16);
  const directory = join(labDirectory(), hash);
  const built = await exists(directory);
  await ensureMachinePackages(log, { build: !built });
  if (!built) {
    await withLock(
      join(labDirectory(), "image.lock"),
      {
        timeoutSeconds: BUILD_LIMIT_SECONDS,
        onWait: () => log("lab: waiting for another build of the guest image ..."),
      },
      async () => {
        if (!(await exists(directory))) await buildImage(directory, codename, log);
      },
    );
  }
  return openImage(directory);
}

async function openImage(directory: string): Promise<GuestImage> {
  const hostKeys: Record<string, string> = {};
  for (const { name } of GUESTS) {
    const text = await readFile(join(directory, `${name}.hostkey.pub`), "utf8");
    hostKeys[name] = text.trim().split(/\s+/).slice(0, 2).join(" ");
  }
  return {
    directory,
    kernel: join(directory, "vmlinuz"),
    initramfs: join(directory, "initramfs"),
    root: join(directory, "root.img"),
    privateKey: join(directory, "id_ed25519"),
    hostKeys,
  };
}

/** Builds beside the target and renames at the end: a build that is cut leaves no image, only a directory to sweep. */
async function buildImage(target: string, codename: string, log: (line: string) => void): Promise<void> {
  const started = performance.now();
  const cache = dirname(target);
  for (const name of await readdir(cache)) {
    if (name.startsWith(".build-")) await rm(join(cache, name), { recursive: true, force: true });
  }
  log(`lab: building the guest image (Debian ${codename}; once, about 2 minutes) ...`);
  const build = join(cache, `.build-${process.pid}`);
  await mkdir(build, { recursive: true });
  try {
    await makeKeys(build);
    await makeOverlay(build);
    await bootstrap(build, codename);
    log(`lab: packages are in (${elapsed(started)}), making the disk image ...`);
    await packRoot(build);
    await packInitramfs(build);
    for (const name of ["tree", "overlay", "overlay.tar", "setup.sh", "root.tar", "initramfs.d"]) {
      await rm(join(build, name), { recursive: true, force: true });
    }
    await rename(build, target);
  } finally {
    await rm(build, { recursive: true, force: true });
  }
  log(`lab: the guest image is built (${elapsed(started)})`);
}

async function makeKeys(build: string): Promise<void> {
  for (const name of ["id_ed25519", ...GUESTS.map((guest) => `${guest.name}.hostkey`)]) {
    await runChild([
      "ssh-keygen",
      "-q",
      "-t",
      "ed25519",
      "-N",
      "",
      "-C",
      "lvm-nbd-lab",
      "-f",
      join(build, name),
    ]);
  }
}

async function makeOverlay(build: string): Promise<void> {
  const overlay = join(build, "overlay");
  const files: Record<string, string> = {
    ...GUEST_FILES,
    "root/.ssh/authorized_keys": await readFile(join(build, "id_ed25519.pub"), "utf8"),
  };
  for (const { name } of GUESTS) {
    files[`etc/ssh/lab/${name}`] = await readFile(join(build, `${name}.hostkey`), "utf8");
  }
  for (const [path, content] of Object.entries(files)) {
    await mkdir(dirname(join(overlay, path)), { recursive: true });
    await writeFile(join(overlay, path), content, { mode: 0o644 });
  }
  // Only the files: directories that exist keep their modes and owners.
  await runChild(
    [
      "tar",
      "--create",
      "--file",
      join(build, "overlay.tar"),
      "--owner=0",
      "--group=0",
      "--numeric-owner",
    ].concat("--directory", overlay, Object.keys(files)),
  );
  await writeFile(join(build, "setup.sh"), SETUP_SCRIPT, { mode: 0o755 });
}

async function bootstrap(build: string, codename: string): Promise<void> {
  const setup = shellQuote(join(build, "setup.sh"));
  await runChild(
    [
      "mmdebstrap",
      "--quiet",
      "--variant=apt",
      `--include=${GUEST_PACKAGES.join(",")}`,
      "--dpkgopt=force-unsafe-io",
      "--dpkgopt=path-exclude=/usr/share/man/*",
      "--dpkgopt=path-exclude=/usr/share/locale/*",
      "--dpkgopt=path-exclude=/usr/share/doc/*",
      ...(await machineProxies()),
      `--customize-hook=tar-in ${shellQuote(join(build, "overlay.tar"))} /`,
      `--customize-hook=chroot "$1" sh -s < ${setup}`,
      codename,
      join(build, "root.tar"),
      ...(await machineSources()),
    ],
    {
      timeoutSeconds: BUILD_LIMIT_SECONDS,
      env: { ...process.env, PATH: programSearchPath(), DEBIAN_FRONTEND: "noninteractive" },
    },
  );
}

/**
 * The machine's own apt sources. Where apt knows which of them are the distributor's, only those: others need
 * keys and agents that have no place in a guest.
 */
async function machineSources(): Promise<string[]> {
  const { distributor } = await machineRelease();
  const targets = await runChild([
    "apt-get",
    "indextargets",
    "--format",
    "$(ORIGIN)|$(SOURCESENTRY)",
    "Identifier: Packages",
  ]);
  const own = new Set<string>();
  for (const line of targets.stdout.split("\n")) {
    const match = /^([^|]+)\|(.+):\d+$/.exec(line);
    if (match?.[1]?.toLowerCase() === distributor && match[2]) own.add(match[2]);
  }
  if (own.size > 0) return [...own];
  const directory = "/etc/apt/sources.list.d";
  const files = (await readdir(directory)).filter((name) => /\.(list|sources)$/.test(name));
  const found = files.map((name) => join(directory, name));
  if (await exists("/etc/apt/sources.list")) found.push("/etc/apt/sources.list");
  if (found.length === 0) throw new Error("lab: this machine has no apt sources in /etc/apt");
  return found;
}

/** The machine's proxy settings, as options for the apt of mmdebstrap, which does not read /etc/apt/apt.conf. */
async function machineProxies(): Promise<string[]> {
  const { stdout } = await runChild(["apt-config", "dump"]);
  return stdout
    .split("\n")
    .filter((line) => /^Acquire::[\w:]*Proxy\S* ".+";$/.test(line))
    .map((line) => `--aptopt=${line}`);
}

async function packRoot(build: string): Promise<void> {
  // An ordinary user needs fakeroot for the files' owners to survive the way from tar to ext4.
  const asRoot = process.getuid?.() === 0 ? [] : ["fakeroot"];
  const script = `set -eu
mkdir tree
tar --extract --file root.tar --directory tree --numeric-owner --preserve-permissions
mke2fs -q -t ext4 -m 0 -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 -d tree root.img ${ROOT_SIZE}`;
  await runChild([...asRoot, "sh", "-c", script], {
    cwd: build,
    timeoutSeconds: 300,
    env: { ...process.env, PATH: programSearchPath() },
  });
}

async function packInitramfs(build: string): Promise<void> {
  const tree = join(build, "initramfs.d");
  for (const name of ["bin", "dev", "modules", "proc", "root", "sys"]) {
    await mkdir(join(tree, name), { recursive: true });
  }
  const kernels = (await readdir(join(build, "tree/boot"))).filter((name) => name.startsWith("vmlinuz-"));
  const kernel = kernels[0];
  if (kernel === undefined || kernels.length > 1)
    throw new Error(`lab: kernels in the image: ${kernels.join(" ")}`);
  await copyFile(join(build, "tree/boot", kernel), join(build, "vmlinuz"));

  const modules = join(build, "tree/usr/lib/modules", kernel.slice("vmlinuz-".length));
  const dependencies = parseModulesDep(await readFile(join(modules, "modules.dep"), "utf8"));
  for (const name of REQUIRED_MODULES) {
    if (!dependencies.has(moduleName(name))) throw new Error(`lab: ${kernel} has no module ${name}`);
  }
  const list: string[] = [];
  for (const path of loadOrder(INITRAMFS_MODULES, dependencies)) {
    await copyFile(join(modules, path), join(tree, "modules", basename(path)));
    list.push(basename(path));
  }
  await writeFile(join(tree, "modules.list"), `${list.join("\n")}\n`);
  await writeFile(join(tree, "init"), INITRAMFS_INIT, { mode: 0o755 });
  const busybox = await findProgram("busybox");
  if (busybox === undefined) throw new Error("lab: busybox is missing (package busybox-static)");
  await copyFile(busybox, join(tree, "bin/busybox"));
  await runChild(["sh", "-c", "find . | cpio --quiet --create --format=newc --owner=0:0 > ../initramfs"], {
    cwd: tree,
  });
}

interface KernelModule {
  path: string;
  needs: string[];
}

/** Parses modules.dep(5): each module's path by its name, with the paths of what it needs, deepest last. */
function parseModulesDep(text: string): Map<string, KernelModule> {
  const modules = new Map<string, KernelModule>();
  for (const line of text.split("\n")) {
    const colon = line.indexOf(":");
    if (colon < 0) continue;
    const path = line.slice(0, colon);
    const needs = line.slice(colon + 1).trim();
    modules.set(moduleName(basename(path)), { path, needs: needs === "" ? [] : needs.split(" ") });
  }
  return modules;
}

/** Paths to insert one after another; a module that is not there is built into the kernel. */
function loadOrder(wanted: readonly string[], modules: Map<string, KernelModule>): string[] {
  const order = new Set<string>();
  for (const name of wanted) {
    const module = modules.get(moduleName(name));
    if (module === undefined) continue;
    for (const path of [...module.needs].reverse()) order.add(path);
    order.add(module.path);
  }
  return [...order];
}

/** "dm-snapshot.ko.xz" and "dm_snapshot" are the same module. */
function moduleName(file: string): string {
  return file.replace(/\.ko(\.\w+)?$/, "").replaceAll("-", "_");
}

function shellQuote(word: string): string {
  return `'${word.replaceAll("'", "'\\''")}'`;
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}
