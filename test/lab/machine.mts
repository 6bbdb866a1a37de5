import { access, constants, readFile } from "node:fs/promises";
import { delimiter, join } from "node:path";
import { programSearchPath, runChild } from "./child.mts";

/** Programs that run the lab on this machine, and the Debian package each comes in. */
const RUN_PROGRAMS: Readonly<Record<string, string>> = {
  "qemu-system-x86_64": "qemu-system-x86",
  "qemu-img": "qemu-utils",
  flock: "util-linux",
  setpriv: "util-linux",
  ssh: "openssh-client",
};

/** Programs that build the guest image. */
const BUILD_PROGRAMS: Readonly<Record<string, string>> = {
  mmdebstrap: "mmdebstrap",
  cpio: "cpio",
  mke2fs: "e2fsprogs",
  "ssh-keygen": "openssh-client",
  busybox: "busybox-static",
};

/** Programs that an ordinary user needs beside those to build it. */
const UNPRIVILEGED_BUILD_PROGRAMS: Readonly<Record<string, string>> = {
  fakeroot: "fakeroot",
  newuidmap: "uidmap",
};

/** The full path of a program on PATH or in the system directories (or in other directories), if it is there. */
export async function findProgram(name: string, path = programSearchPath()): Promise<string | undefined> {
  for (const directory of path.split(delimiter)) {
    const file = join(directory || ".", name);
    try {
      await access(file, constants.X_OK);
      return file;
    } catch {
      // Not in this directory.
    }
  }
  return undefined;
}

/**
 * Makes sure that everything the lab runs on this machine (and builds the image with) is installed. As root it
 * installs what is missing with apt; otherwise it fails and names all of it in one line.
 */
export async function ensureMachinePackages(
  log: (line: string) => void,
  options: { build: boolean },
): Promise<void> {
  const root = process.getuid?.() === 0;
  const programs = {
    ...RUN_PROGRAMS,
    ...(options.build ? BUILD_PROGRAMS : {}),
    ...(options.build && !root ? UNPRIVILEGED_BUILD_PROGRAMS : {}),
  };
  const missing = new Set<string>();
  for (const [program, debianPackage] of Object.entries(programs)) {
    if ((await findProgram(program)) === undefined) missing.add(debianPackage);
  }
  if (missing.size === 0) return;
  const names = [...missing].join(" ");
  if (!root || (await findProgram("apt-get")) === undefined) {
    throw new Error(`lab: these packages are missing: ${names} (install them: apt-get install ${names})`);
  }
  log(`lab: installing ${names} ...`);
  const env = { ...process.env, DEBIAN_FRONTEND: "noninteractive", PATH: programSearchPath() };
  await runChild(["apt-get", "update", "-qq"], { env, timeoutSeconds: 300 });
  await runChild(["apt-get", "install", "-qq", "-y", "--no-install-recommends", ...missing], {
    env,
    timeoutSeconds: 900,
  });
}

/** The Debian release of this machine ("bookworm") and its distributor ("debian"), from os-release(5). */
export async function machineRelease(): Promise<{ codename: string; distributor: string }> {
  const text = await readFile("/etc/os-release", "utf8");
  const field = (name: string): string | undefined =>
    new RegExp(`^${name}="?([^"\n]*)"?$`, "m").exec(text)?.[1];
  const codename = field("VERSION_CODENAME");
  if (codename === undefined) throw new Error("lab: /etc/os-release names no VERSION_CODENAME");
  return { codename, distributor: field("ID") ?? "debian" };
}
