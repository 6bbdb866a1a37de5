/** Images in a folder that somebody else owns, who puts links and folders of his own where the copy is written. */
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { createHandlers, type Handlers } from "../../provider/core/handlers.js";
import { script } from "../../provider/core/hostCommands.js";
import { digest } from "../../provider/core/owner.js";
import { resourceType } from "../../provider/core/registry.js";
import { copyArguments, copyJob, copyPaths } from "../../provider/linux/copyJob.js";
import {
  claimCopyScript,
  commitCopyScript,
  discardCopyScript,
  inOtherHands,
  removeCopyScript,
  startCopyScript,
} from "../../provider/linux/copyScripts.js";
import { changedMeanwhile } from "../../provider/linux/unitScript.js";
import type { RemoteCommand } from "../../provider/ssh/types.js";
import { CopyHost } from "../support/copyHost.js";

vi.mock("node:timers/promises", async (original) =>
  (await import("../support/shortWaits.js")).shortWaits(await original()),
);

const moment = "a moment of the disk\n".repeat(1000);

let host: CopyHost;
/** What nobody may touch, beside the folder of the images. */
let victims: string;
/** Owned by somebody else: below it a link is his. */
let theirs: string;

beforeEach(() => {
  host = new CopyHost();
  host.serve(moment);
  host.kill(undefined);
  [victims, theirs] = [join(host.disk, "victims"), join(host.disk, "theirs")];
  for (const folder of [victims, theirs]) mkdirSync(folder);
  chmodSync(theirs, 0o777);
  // There owners and modes say little.
  host.set("type", "nfs\n");
  writeFileSync(join(victims, "precious"), "precious");
});

afterEach(() => {
  expect(readdirSync(victims)).toEqual(["precious"]);
  expect(readFileSync(join(victims, "precious"), "utf8")).toBe("precious");
  expect(lstatSync(join(victims, "precious")).mode & 0o777).toBe(0o644);
  host.close();
});

function handlers(): Handlers {
  return createHandlers(resourceType("VolumeCopy"), {
    openHost: async () => host,
    progress: () => undefined,
    warn: () => undefined,
    signal: new AbortController().signal,
  });
}

async function made(file: string, change: Readonly<Record<string, unknown>> = {}) {
  const { inputs, problems } = await handlers().check(
    undefined,
    {
      ...{
        host: {
          address: "192.0.2.2",
          password: "x",
          hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
        },
      },
      ...{ owner: "o/p/s/vm1", uri: "nbd://10.0.0.1:10809/vm1", file, ...change },
    },
    new Set(),
  );
  expect(problems).toEqual([]);
  return handlers().create(inputs);
}

const image = () => join(theirs, "vm1.raw");
const part = () => `${image()}.part`;

/** An unfinished copy with that record, and a job for one: its exit code, and what it says. */
function jobOn(record: string) {
  const { run } = copyPaths(image());
  const below = join(host.disk, "..", run);
  for (const folder of [part(), below]) mkdirSync(folder, { recursive: true });
  writeFileSync(join(part(), "record.json"), record);
  const plan = { uri: "nbd://x", format: "raw", compress: false, connections: 1, verify: false } as const;
  return {
    failure: () => readFileSync(join(below, "failure"), "utf8"),
    job: async (of: string) => {
      const args = copyArguments(copyPaths(image()), { ...plan, bandwidthLimit: undefined }, digest(of, 64));
      const argv = ["sh", "-c", copyJob, "sh", ...args];
      return (await host.run({ argv, kind: "change", deadlineSeconds: 60 })).exitCode;
    },
  };
}

it("an image is made there all the same, with files of nobody else's", async () => {
  await made(image());
  expect(readFileSync(image(), "utf8")).toBe(moment);
  expect(readdirSync(theirs).sort()).toEqual(["vm1.raw", "vm1.raw.manifest.json"]);
});

describe("a link that was there before is refused", () => {
  it.each([
    ["in the place of the unfinished copy", () => symlinkSync(victims, part()), "FOREIGN_RESOURCE"],
    ["in the place of the image", () => symlinkSync(join(victims, "precious"), image()), "FOREIGN_RESOURCE"],
    [
      "in the place of the manifest",
      () => symlinkSync(join(victims, "precious"), `${image()}.manifest.json`),
      "FOREIGN_RESOURCE",
    ],
    [
      "that leads nowhere in the place of the manifest",
      () => symlinkSync(join(victims, "new"), `${image()}.manifest.json`),
      "FOREIGN_RESOURCE",
    ],
  ])("%s", async (_what, plant, code) => {
    plant();
    const before = readdirSync(theirs);
    await expect(made(image())).rejects.toMatchObject({ code });
    expect(readdirSync(theirs)).toEqual(before);
    expect(host.started).toBe(0);
  });

  it.each(["vm1.raw", "deeper/vm1.raw"])("on the way to the folder of %s", async (file) => {
    mkdirSync(join(victims, "..", "elsewhere"));
    symlinkSync(join(victims, "..", "elsewhere"), join(theirs, "folder"));
    mkdirSync(join(victims, "..", "elsewhere", "deeper"));
    const refused = await made(join(theirs, "folder", file)).catch((error: unknown) => error);
    expect(refused).toMatchObject({ code: "FILE_UNSUITABLE" });
    expect(String(refused)).toContain(`${join(theirs, "folder")} is a symbolic link`);
    expect(readdirSync(join(victims, "..", "elsewhere"))).toEqual(["deeper"]);
    expect(host.started).toBe(0);
  });
});

/** Does that just before the how-many-th change of the host that has this in it. */
function beforeChange(words: string, act: () => void): void {
  host.onCommand = ({ kind, argv }: RemoteCommand) => {
    if (kind !== "change" || !argv[2]?.includes(words)) return undefined;
    host.onCommand = () => undefined;
    act();
    return undefined;
  };
}

const starts = "write_record";
const commits = "mv -fT image";

describe("what is put there while the copy is made is not written through", () => {
  it("a folder of theirs where the unfinished copy begins", async () => {
    beforeChange(starts, () => {
      mkdirSync(part());
      chmodSync(part(), 0o777);
    });
    const refused = await made(image()).catch((error: unknown) => error);
    expect(refused).toMatchObject({ code: "FILE_UNSUITABLE", message: expect.stringContaining(part()) });
    expect(existsSync(image())).toBe(false);
    expect(host.started).toBe(0);
  });

  it("a folder above, turned elsewhere when it begins", async () => {
    mkdirSync(join(theirs, "folder"));
    beforeChange(starts, () => {
      renameSync(join(theirs, "folder"), join(theirs, "away"));
      symlinkSync(victims, join(theirs, "folder"));
    });
    await expect(made(join(theirs, "folder", "vm1"))).rejects.toMatchObject({ code: "FILE_UNSUITABLE" });
    expect(host.started).toBe(0);
  });

  it.each([
    ["a link to a folder", () => symlinkSync(victims, part())],
    [
      "a folder of theirs, with a link for the manifest",
      () => {
        mkdirSync(part());
        chmodSync(part(), 0o777);
        for (const name of ["record.json", "image"])
          writeFileSync(join(part(), name), readFileSync(join(`${part()}.away`, name)));
        symlinkSync(join(victims, "precious"), join(part(), "manifest.json"));
      },
    ],
  ])("%s in the place of the complete copy", async (_what, plant) => {
    beforeChange(commits, () => {
      renameSync(part(), `${part()}.away`);
      plant();
    });
    await expect(made(image())).rejects.toThrow();
    expect(existsSync(image())).toBe(false);
  });

  it("the unfinished copy of another record in the place of a job's own", async () => {
    const { failure, job } = jobOn("record of vm2");
    for (const name of ["image", "result"]) writeFileSync(join(part(), name), "of vm2");
    expect(await job("record of vm1")).toBe(1);
    expect(failure()).toMatch(/vm1\.raw\.part \(\w+, drwxr-xr-x\), is not the one that was made for it/);
    for (const name of ["image", "result"]) expect(readFileSync(join(part(), name), "utf8")).toBe("of vm2");
  });

  it("a link in the place of a manifest that is written anew, as by a create that takes its copy over", async () => {
    await made(image());
    symlinkSync(join(victims, "precious"), `${image()}.manifest.json.new`);
    const claims = host.commands.length;
    await made(image());
    expect(host.commands.slice(claims).filter(({ kind }) => kind === "change")).toHaveLength(1);
    expect(readdirSync(theirs).sort()).toEqual(["vm1.raw", "vm1.raw.manifest.json"]);
    expect(lstatSync(`${image()}.manifest.json`).isFile()).toBe(true);
  });
});

describe("on a local file system a folder that others can change is refused before anything is touched", () => {
  beforeEach(() => host.set("type", undefined));

  const open = () => chmodSync(theirs, 0o777);
  const close = () => chmodSync(theirs, 0o755);
  const told = () => ({
    code: "FILE_UNSUITABLE",
    message: expect.stringMatching(
      new RegExp(`${theirs} \\(root, drwxrwxrwx\\) can be changed by others than root[\\s\\S]*chown root`),
    ),
  });

  it.each(["vm1.raw", "deeper/vm1.raw"])("by a copy to %s", async (file) => {
    mkdirSync(join(theirs, "deeper"));
    await expect(made(join(theirs, file))).rejects.toMatchObject(told());
    expect(host.commands.filter(({ kind }) => kind === "change")).toEqual([]);
    expect(readdirSync(theirs)).toEqual(["deeper"]);
  });

  it("when a copy begins", async () => {
    close();
    beforeChange(starts, open);
    await expect(made(image())).rejects.toMatchObject(told());
    expect([readdirSync(theirs), host.started]).toEqual([[], 0]);
  });

  it("when a copy gets its name, which the next run gives it", async () => {
    close();
    beforeChange(commits, open);
    await expect(made(image())).rejects.toMatchObject(told());
    expect(readdirSync(theirs)).toEqual(["vm1.raw.part"]);
    close();
    await made(image());
    expect(readdirSync(theirs).sort()).toEqual(["vm1.raw", "vm1.raw.manifest.json"]);
  });

  it("when a manifest is written anew", async () => {
    close();
    await made(image());
    const before = readFileSync(`${image()}.manifest.json`, "utf8");
    beforeChange('receive "$manifest.new"', open);
    await expect(made(image())).rejects.toMatchObject(told());
    expect(readFileSync(`${image()}.manifest.json`, "utf8")).toBe(before);
  });

  it("when an image is removed, which says what to do", async () => {
    close();
    const { state } = await made(image());
    open();
    await expect(handlers().remove(state)).rejects.toMatchObject({
      ...told(),
      message: expect.stringMatching(
        /could not be looked at: [\s\S]*An image that is to be removed needs that too/,
      ),
    });
    expect(readdirSync(theirs).sort()).toEqual(["vm1.raw", "vm1.raw.manifest.json"]);
    close();
    await handlers().remove(state);
    expect(readdirSync(theirs)).toEqual([]);
  });

  it("when its job begins", async () => {
    const { failure, job } = jobOn(`record of ${image()}`);
    expect(await job(`record of ${image()}`)).toBe(1);
    expect(failure()).toContain(`others than root can change ${theirs} (root, drwxrwxrwx)`);
    expect(readdirSync(part())).toEqual(["record.json"]);
    close();
    expect(await job(`record of ${image()}`)).toBe(0);
    expect(readFileSync(join(part(), "image"), "utf8")).toBe(moment);
  });

  const units = () => readdirSync(join(host.disk, "..", "units"));
  const run = (file: string, text: Parameters<typeof script>[0], ...args: string[]) => {
    const { part, manifest, unit, run } = copyPaths(file);
    const argv = script(text, file, part, manifest, unit, run, ...args);
    return host.run({ argv, kind: "change", deadlineSeconds: 60, stdin: "" });
  };

  it.each([
    ["discarded", discardCopyScript, ["0".repeat(64)]],
    ["removed", removeCopyScript, ["-", "-", "0".repeat(64)]],
  ] as const)("when a copy is %s, whose job is ended all the same", async (_what, text, args) => {
    const { unit } = copyPaths(image());
    host.exportImage(unit, "/none");
    expect(units()).toContain(`${unit}.pid`);
    expect(await run(image(), text, ...args)).toMatchObject({ exitCode: inOtherHands });
    expect(units()).not.toContain(`${unit}.pid`);
  });

  it("without the folder nothing is done by its path", async () => {
    const file = join(theirs, "away", "vm1.raw");
    const codes = await Promise.all([
      run(file, startCopyScript, "-", "-", "{}", "words", "60", "0"),
      run(file, commitCopyScript, "-", "-", "-", "-", "0"),
      run(file, claimCopyScript, "-", "-", "0"),
      // What was seen has gone without us: it is looked for again.
      run(file, removeCopyScript, "1 2 3", "-", "-"),
      run(file, removeCopyScript, "-", "-", "-"),
      run(file, discardCopyScript, "-"),
    ]);
    expect(codes.map(({ exitCode }) => exitCode)).toEqual([
      ...[changedMeanwhile, changedMeanwhile, changedMeanwhile, changedMeanwhile],
      ...[0, 0],
    ]);
    expect(readdirSync(theirs)).toEqual([]);
  });
});

/** From now on a program of the host is this. */
function replaceProgram(name: string, text: string): void {
  const file = join(host.disk, "..", "bin", name);
  writeFileSync(file, `#!/bin/sh\n${text}\n`);
  chmodSync(file, 0o755);
}

describe("the folder of an unfinished copy", () => {
  it("is root's alone also below a default ACL", async () => {
    host.set("type", undefined);
    chmodSync(theirs, 0o755);
    // What is made without saying its mode gets it from there.
    replaceProgram("mkdir", `PATH=\${PATH#*:}; mkdir "$@" && case $1 in -m) ;; *) chmod 770 "$1";; esac`);
    await made(image());
    expect(readFileSync(image(), "utf8")).toBe(moment);
  });

  it("is gone again where its disk was too full for the record", async () => {
    // The job has arrived by then.
    const full = "trap '' XFSZ; sync() { ulimit -f 0; }\n";
    const { run: send } = host;
    host.run = (command, signal) => {
      const argv = command.argv.map((word) => (word.includes(starts) ? `${full}${word}` : word));
      return send.call(host, { ...command, argv }, signal);
    };
    await expect(made(image())).rejects.toThrow(/could not be started[\s\S]*(I.O error|too large)/);
    expect(readdirSync(theirs)).toEqual([]);
  });

  it("where modes are none is refused by owner and mode, with the mount options that help", async () => {
    replaceProgram("mkdir", `PATH=\${PATH#*:}; mkdir "$@" && case $* in *.part) chmod 770 "$3";; esac`);
    await expect(made(image())).rejects.toMatchObject({
      code: "FILE_UNSUITABLE",
      message: expect.stringMatching(
        /vm1\.raw\.part \(\w+, drwxrwx---\) can be changed by others than root[\s\S]*dir_mode=0700/,
      ),
    });
    expect(readdirSync(theirs)).toEqual([]);
  });
});

describe("what is no regular file is not read, so that no pipe holds up the host", () => {
  const pipe = (path: string) => expect(spawnSync("sh", ["-c", 'mkfifo "$0"', path]).status).toBe(0);

  it("in the place of a manifest", async () => {
    pipe(`${image()}.manifest.json`);
    await expect(made(image())).rejects.toMatchObject({ code: "FOREIGN_RESOURCE" });
    expect(host.started).toBe(0);
  });

  it("in the place of a manifest that is about to be replaced, and of a record", async () => {
    await made(image());
    beforeChange('receive "$manifest.new"', () => {
      rmSync(`${image()}.manifest.json`);
      pipe(`${image()}.manifest.json`);
    });
    await expect(made(image())).rejects.toThrow();
    const { part: folder, manifest, unit, run } = copyPaths(image());
    mkdirSync(folder);
    pipe(join(folder, "record.json"));
    const argv = script(discardCopyScript, image(), folder, manifest, unit, run, "0".repeat(64));
    const { exitCode } = await host.run({ argv, kind: "change", deadlineSeconds: 60 });
    expect(exitCode).toBe(changedMeanwhile);
  });

  it("but a link is not followed either: what it leads to is nobody's to see", async () => {
    await made(image());
    const manifest = `${image()}.manifest.json`;
    renameSync(manifest, join(theirs, "away"));
    symlinkSync(join(theirs, "away"), manifest);
    await expect(made(image())).rejects.toMatchObject({ code: "FOREIGN_RESOURCE" });
  });

  it("and a name with a backslash has a checksum like any other", async () => {
    await made(join(theirs, "a\\b"));
    await made(join(theirs, "a\\b"));
    expect(readdirSync(theirs).sort()).toEqual(["a\\b", "a\\b.manifest.json"]);
  });
});
