/**
 * `npm run demo`: the provider's main job, on two virtual servers that it builds itself, told as it goes.
 *
 *   npm run demo            ends the servers at the end
 *   npm run demo -- --keep  leaves them running, to try oneself
 */
import { cpSync, mkdirSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { labUp } from "../test/lab/lab.mts";
import { ensurePulumi, PulumiStack } from "../test/lab/pulumi.mts";

const keep = process.argv.includes("--keep");
const root = join(import.meta.dirname, "..");
const started = Date.now();
let step = 0;

function say(text: string): void {
  process.stdout.write(`${text}\n`);
}

function show(text: string): void {
  for (const line of text.trimEnd().split("\n")) say(`     | ${line}`);
}

/** One step of the story, with the time it took. */
async function tell<T>(what: string, work: () => Promise<T>): Promise<T> {
  say(`\n${String(++step).padStart(2)}. ${what}`);
  const start = Date.now();
  const result = await work();
  say(`     (${((Date.now() - start) / 1000).toFixed(1)} s)`);
  return result;
}

/** Lines of Pulumi's output that a reader of the story needs. */
function essence(output: string): string {
  const seen = new Set<string>();
  return output
    .split("\n")
    .map((line) => line.trimEnd().replace("pulumi-nodejs:dynamic/lvm-nbd:", ""))
    .filter((line) =>
      /^ *([+~-]|\+-|warning:|error:|Outputs:|Resources:)|^ {4}\w+ *: "| unchanged$/.test(line),
    )
    .filter(
      (line) =>
        !/\[urn=|pulumi:pulumi:Stack|creating \(|updating \(|deleting \(|refreshing \(|from \$PATH|--outputs/.test(
          line,
        ),
    )
    .filter((line) => !seen.has(line) && seen.add(line))
    .join("\n");
}

function expect(good: boolean, what: string): void {
  if (!good) throw new Error(`the demo did not go as told: ${what}`);
}

/** The example as a project of its own: what `npm install` would put there is linked from this checkout. */
function project(folder: string): string {
  const path = join(folder, "first-backup");
  cpSync(join(root, "examples", "first-backup"), path, {
    recursive: true,
    filter: (source) => !source.includes("node_modules"),
  });
  mkdirSync(join(path, "node_modules"), { recursive: true });
  for (const name of ["@pulumi", "@types", "typescript"]) {
    symlinkSync(join(root, "node_modules", name), join(path, "node_modules", name));
  }
  symlinkSync(root, join(path, "node_modules", "pulumi-lvm-nbd"));
  return path;
}

say("lvm-nbd: a moment of a VM's disk on server1, readable on server2.");
say("Two virtual servers with real LVM and NBD are started for it.");

const folder = mkdtempSync(join(tmpdir(), "lvm-nbd-demo-"));
const { env } = await ensurePulumi((line) => say(`     ${line}`));
const lab = await tell("Starting server1 and server2", () =>
  labUp({ name: "demo", keep, log: (line) => say(`     ${line}`) }),
);
const { server1, server2 } = lab;
try {
  await tell("server1 gets a VM's disk: LV-VM1 in VgVm, with a file system and a letter on it", async () => {
    await server1.run(`
      umount /mnt 2>/dev/null; lvremove -qq -f VgVm/LV-VM1 2>/dev/null
      lvcreate -qq -y -W n -L 512M -n LV-VM1 VgVm && mkfs.ext4 -q -F /dev/VgVm/LV-VM1 && mount /dev/VgVm/LV-VM1 /mnt &&
      echo "Dear Ada, the results are in." >/mnt/letter.txt && sync`);
    show((await server1.run("cat /mnt/letter.txt")).stdout);
  });

  const stack = await PulumiStack.create({
    projectDir: project(folder),
    stackName: "demo",
    backendDir: join(folder, "backend"),
    env: { ...env, LVM_NBD_SSH_CONFIG: lab.sshConfigPath },
    config: {
      source: "server1",
      client: "server2",
      listenAddress: server1.privateAddress,
      clientAddress: server2.privateAddress,
    },
  });

  await tell("pulumi up: a snapshot and its export on server1, its attachment on server2", async () => {
    show(essence((await stack.up()).stdout));
  });

  await tell("The VM goes on, and the letter is spoiled on the origin", async () => {
    await server1.run('echo "xxxxxxxx" >/mnt/letter.txt && sync');
    show((await server1.run("cat /mnt/letter.txt")).stdout);
  });

  await tell(
    "server2 mounts the attachment: the letter as it was at the moment of the snapshot",
    async () => {
      const { stdout } = await server2.run(
        "mount -o ro,noload /dev/lvm-nbd/vm1 /mnt && cat /mnt/letter.txt; umount /mnt",
      );
      show(`server2# mount -o ro,noload /dev/lvm-nbd/vm1 /mnt && cat /mnt/letter.txt\n${stdout}`);
      expect(stdout.includes("Dear Ada"), "server2 does not see the old letter");
    },
  );

  await tell("Somebody stops the export on server1, behind Pulumi's back", async () => {
    await server1.run("systemctl disable --now lvm-nbd-export-vm1.service");
    show("server1# systemctl disable --now lvm-nbd-export-vm1.service");
  });

  await tell("pulumi preview --refresh names what drifted", async () => {
    const { stdout, stderr } = await stack.preview({ refresh: true });
    show(essence(stdout + stderr));
    expect(
      /NbdExport vm1 on server1: is (stopped|disabled)/.test(stdout + stderr),
      "the drift was not named",
    );
  });

  await tell("pulumi up heals it", async () => {
    show(essence((await stack.up({ refresh: true })).stdout));
    const { stdout } = await server1.run("systemctl is-active lvm-nbd-export-vm1.service");
    expect(stdout.trim() === "active", "the export does not run again");
  });

  await tell("pulumi up once more changes nothing", async () => {
    const { stdout } = await stack.up();
    show(essence(stdout));
    expect(
      /unchanged/.test(stdout) && !/ (created|updated|replaced)/.test(stdout),
      "a second up changed something",
    );
  });

  await tell("pulumi destroy takes everything down again; the origin is untouched", async () => {
    show(essence((await stack.destroy()).stdout));
    const { stdout } = await server1.run(
      "lvs --noheadings -o lv_name VgVm; ls /etc/systemd/system/lvm-nbd-* 2>/dev/null; cat /mnt/letter.txt",
    );
    show(`server1# lvs --noheadings -o lv_name VgVm; cat /mnt/letter.txt\n${stdout}`);
    expect(
      !stdout.includes("backup") && stdout.includes("xxxxxxxx"),
      "something was left, or the origin was changed",
    );
  });

  say(`\nThat was all, in ${((Date.now() - started) / 1000).toFixed(0)} s.`);
  if (keep) {
    say("The servers go on running. Log in:        LAB_NAME=demo npm run lab -- ssh server1");
    say(`Use them in a stack of your own:          export LVM_NBD_SSH_CONFIG=${lab.sshConfigPath}`);
    say('  and `host: "server1"`, `host: "server2"` in it, as in examples/first-backup.');
    say("End them:                                 LAB_NAME=demo npm run lab -- down");
  } else {
    say("To keep the servers and try yourself:     npm run demo -- --keep");
  }
} finally {
  if (!keep) await lab.down();
  rmSync(folder, { recursive: true, force: true });
}
