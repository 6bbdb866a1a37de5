/** Faults of what lies between: the link, the export's process, SSH, and the provider itself. */
import { once } from "node:events";
import { connect, type Socket } from "node:net";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { runChild } from "../child.mts";
import { providerProgram } from "../doorNames.mts";
import type { Lab } from "../lab.mts";
import { checksum, checksumSoon, freshLab, leftovers, mainPid, makeOrigin } from "../support.mts";
import { waitFor } from "../wait.mts";
import { attachment, type Declared, FaultStack, nbdExport, output, snapshot } from "./fault-stack.mts";
import { asDeclaredAndUp, together, up } from "./together.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let stack: FaultStack;
let moment: string;
const the = () => stack;

/** Every kind of character that LVM allows in a name, in a volume group whose name has dashes. */
const group = "Vg-of--vms";
const origin = "LV_VM+1.a-b--c";
const name = "VM+1.a-b_backup";

const vm = snapshot("vm", { volumeGroup: group, origin, name, size: "100%ORIGIN" });
const exported = nbdExport("vm-export", { device: output("vm", "path"), exportName: name });
const attached = attachment("vm-attached", { uri: output("vm-export", "uri"), name });
/** Gives up on a silent server soon. */
const brief = attachment("brief", { uri: output("vm-export", "uri"), timeoutSeconds: 5 });
const base: readonly Declared[] = [vm, exported, attached, brief];
const path = `/dev/lvm-nbd/${name}`;
const exportUnit = "lvm-nbd-export-VM\\x2b1.a-b_backup.service";

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([
    FaultStack.create(lab),
    (async () => {
      await lab.server1.run(`
        lvcreate -qq -y -W n -L 256M -n disk VgVm && loop=$(losetup -f --show /dev/VgVm/disk) && vgcreate -qq -y ${group} $loop &&
        lvcreate -qq -y -W n -L 16M -n ${origin} ${group} && dd if=/dev/urandom of=/dev/${group}/${origin} bs=1M count=16 oflag=direct status=none`);
      moment = await checksum(lab.server1, `/dev/${group}/${origin}`);
      await makeOrigin(lab.server2, "LV-FAR");
    })(),
  ]);
  stack.declare(...base);
  (await stack.up()).succeeded("5 created");
  // What is read from here on differs from the origin.
  await lab.server1.run(
    `dd if=/dev/urandom of=/dev/${group}/${origin} bs=1M count=2 oflag=direct status=none`,
  );
});

afterAll(() => stack?.close());

/** Starts to read a device of server2 in small pieces, and returns when the first have come. */
async function startReader(device: string): Promise<void> {
  await lab.server2.run(`
    rm -f /run/copy
    systemd-run -q --unit reader -p RemainAfterExit=yes dd if=${device} of=/run/copy bs=4k iflag=direct
    until [ -s /run/copy ] || systemctl is-failed -q reader; do sleep 0.05; done; systemctl show -p SubState reader | grep -qx SubState=running`);
}

/** Waits until the reader has ended: with the checksum of all it read, or told of an error and with nothing wrong before it. */
async function readerEnded(): Promise<string | "told of an error"> {
  const result = await waitFor(
    async () => {
      const { stdout } = await lab.server2.run("systemctl show -p SubState -p Result reader");
      return /SubState=(exited|failed)/.test(stdout) ? stdout : undefined;
    },
    { timeoutSeconds: 240, what: "the reader to end" },
  );
  if (result.includes("Result=success")) {
    const { stdout } = await lab.server2.run("systemctl stop reader; sha256sum </run/copy");
    return stdout.split(" ")[0] ?? "";
  }
  await lab.server2.run("systemctl reset-failed reader");
  return "told of an error";
}

/** What the reader got before its error is what the device holds. */
async function readRightly(device: string): Promise<void> {
  expect(await checksumSoon(lab.server2, device)).toBe(moment);
  await lab.server2.run(`cmp -n $(stat -c %s /run/copy) /run/copy ${device}`);
}

const exportPid = () => mainPid(lab.server1, exportUnit);

it("a VM name with every character LVM allows is snapshotted, exported and attached", async () => {
  expect(await checksum(lab.server2, path)).toBe(moment);
  expect((await stack.state()).get("vm-export")).toMatchObject({
    uri: `nbd://${lab.server1.privateAddress}:10809/VM%2B1.a-b_backup`,
    state: "serving",
  });
  const { stdout } = await lab.server1.run(`lvs --noheadings -o origin ${group}/${name}`);
  expect(stdout.trim()).toBe(origin);
});

it("a volume group whose name has dashes is found again: nothing drifts, nothing changes", async () => {
  const { stdout } = await lab.server1.run("dmsetup ls");
  expect(stdout).toContain("Vg--of----vms-VM+1.a--b_backup");
  await stack.isAsDeclared();
});

it("the link is cut for 10 s while a reader reads: it waits and reads on", async () => {
  await startReader(path);
  await lab.setLink(false);
  const from = performance.now();
  await waitFor(async () => (performance.now() - from >= 10_000 ? true : undefined), {
    timeoutSeconds: 20,
    what: "10 s to pass, which are the fault",
  });
  expect((await lab.server2.run("systemctl show -p SubState reader")).stdout).toContain("running");
  await lab.setLink(true);
  expect(await readerEnded()).toBe(moment);
  await stack.isAsDeclared();
});

it("the export's process is killed by SIGKILL while a reader reads: it is told, and all comes back by itself", async () => {
  const before = await exportPid();
  await startReader(path);
  await lab.server1.run(`kill -KILL ${before}`);
  expect(await readerEnded()).toBe("told of an error");
  await readRightly(path);
  expect(await exportPid()).not.toBe(before);
  expect(await checksumSoon(lab.server2, "/dev/lvm-nbd/brief")).toBe(moment);
  await stack.isAsDeclared();
});

it("the export's process is frozen by SIGSTOP while a reader reads: it is told in time, and the next up heals both", async () => {
  const before = await exportPid();
  await startReader("/dev/lvm-nbd/brief");
  await lab.server1.run(`kill -STOP ${before}`);
  expect(await readerEnded()).toBe("told of an error");
  const run = await stack.up({ refresh: true });
  run.said("NbdExport vm-export on server1: is notServing");
  expect(run.text).toMatch(/NbdAttachment brief on server2: is (dead|detached)/);
  run.succeeded();
  expect(await exportPid()).not.toBe(before);
  expect((await lab.server1.run(`ps -o pid= -p ${before}; true`)).stdout.trim()).toBe("");
  expect((await stack.state()).get("vm-export")).toMatchObject({ state: "serving" });
  expect((await stack.state()).get("brief")).toMatchObject({ state: "attached" });
  await readRightly("/dev/lvm-nbd/brief");
  expect(await checksumSoon(lab.server2, path)).toBe(moment);
});

it("the link is cut for good: the reader is told, the attachment is kept in the state, and comes back with the link", async () => {
  await startReader("/dev/lvm-nbd/brief");
  await lab.setLink(false);
  expect(await readerEnded()).toBe("told of an error");
  const run = await stack.up({ refresh: true });
  expect(run.text).toMatch(/NbdAttachment brief on server2: is (dead|detached)/);
  for (const attachmentName of ["vm-attached", "brief"])
    run.failedWith(
      "EXPORT_UNREACHABLE",
      `NbdAttachment ${attachmentName}`,
      "server2",
      "nbd://10.77.0.1:10809/",
    );
  expect([...(await stack.state()).keys()].sort()).toEqual(["brief", "vm", "vm-attached", "vm-export"]);
  expect((await stack.state()).get("vm-export")).toMatchObject({ state: "serving" });
  await lab.setLink(true);
  (await stack.up()).succeeded("2 updated");
  await readRightly("/dev/lvm-nbd/brief");
  expect(await checksum(lab.server2, path)).toBe(moment);
});

together("host key changed:", { met: () => stack.refresh(), next: up(the, { refresh: true }) }, [
  {
    name: "the host is refused, its state stays, and it is as declared with its own key again",
    broken: () =>
      lab.server2.run(
        "mv /etc/ssh/lab/server2 /root/ && ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/lab/server2 && systemctl restart ssh",
      ),
    told: async (run) => {
      for (const attachmentName of ["vm-attached", "brief"])
        run.failedWith("HOST_KEY_MISMATCH", `NbdAttachment ${attachmentName}`, "server2", "SHA256:");
      expect((await stack.state()).get("brief")).toMatchObject({ state: "attached" });
    },
    mended: () => lab.server2.run("mv /root/server2 /etc/ssh/lab/server2 && systemctl restart ssh"),
    healed: async (run) => {
      run.succeeded();
      expect(await checksum(lab.server2, "/dev/lvm-nbd/brief")).toBe(moment);
    },
  },
  {
    name: "the other host's resources are refreshed all the same",
    broken: () => lab.server1.run(`systemctl disable -q '${exportUnit}'`),
    told: (run) => run.said("NbdExport vm-export on server1: is disabled"),
    healed: async () => {
      await lab.server1.run(`systemctl is-enabled '${exportUnit}'`);
    },
  },
]);

{
  const held: Socket[] = [];
  const far = (named: string) => snapshot(named, { host: "server2", origin: "LV-FAR", size: "8M" });
  const near = (named: string) => snapshot(named, { volumeGroup: group, origin, size: "4M" });
  const more = [...base, near("near1"), near("near2"), near("near3"), far("far1"), far("far2")];

  together(
    "a host that is odd, but there, is worked on:",
    {
      met: async () => {
        stack.declare(...more);
        const [run] = await Promise.all([
          stack.up({ refresh: true }),
          waitFor(
            async () =>
              (await lab.server2.run("journalctl -q -u ssh | grep -q MaxStartups", { allowFailure: true }))
                .exitCode === 0 || undefined,
            { timeoutSeconds: 60, what: "sshd to drop the provider's connection" },
          ).finally(() => {
            for (const socket of held) socket.destroy();
          }),
        ]);
        return run;
      },
      next: asDeclaredAndUp(the),
    },
    [
      {
        name: "MaxSessions 2: seven resources share two sessions",
        broken: () =>
          lab.server1.run("echo MaxSessions 2 >/etc/ssh/sshd_config.d/few.conf; systemctl restart ssh"),
        told: async (run) => {
          run.succeeded("5 created");
          const { stdout } = await lab.server1.run("sshd -T -h /etc/ssh/lab/server1 | grep -i maxsessions");
          expect(stdout.trim()).toBe("maxsessions 2");
        },
        mended: () => lab.server1.run("rm /etc/ssh/sshd_config.d/few.conf; systemctl restart ssh"),
        healed: async () => {
          for (const each of ["near1", "near2", "near3"])
            expect((await stack.state()).get(each)).toMatchObject({ state: "valid" });
        },
      },
      {
        name: "MaxStartups 1, and somebody else is logging in: the dial is made again",
        broken: async () => {
          await lab.server2.run(
            "echo MaxStartups 1:100:1 >/etc/ssh/sshd_config.d/few.conf; systemctl restart ssh",
          );
          const socket = connect(lab.server2.port, lab.server2.address);
          await once(socket, "data");
          held.push(socket);
        },
        told: (run) => run.succeeded("5 created"),
        mended: () => lab.server2.run("rm /etc/ssh/sshd_config.d/few.conf; systemctl restart ssh"),
        healed: async () => {
          expect((await stack.state()).get("far1")).toMatchObject({ state: "valid" });
        },
      },
      {
        name: "wrong clock: what is made then is found and left alone when the clock is right again",
        broken: () => lab.server2.run("date -u -s 2001-02-03T04:05:06"),
        told: async () => {
          expect((await stack.state()).get("far2")).toMatchObject({
            createdAt: expect.stringMatching(/^2001-02-03T04:/),
            state: "valid",
          });
        },
        mended: () => lab.server2.run(`date -u -s @${(Date.now() / 1000).toFixed(0)}`),
        healed: async () => {
          expect((await stack.state()).get("far2")).toMatchObject({
            createdAt: expect.stringMatching(/^2001-02-03T04:/),
          });
        },
      },
    ],
  );
}

/** A snapshot whose taking has begun when `begun` exists on server1, and goes on when `go` does. */
const slow = (named: string, freeze = "") =>
  snapshot(named, {
    volumeGroup: group,
    origin,
    size: "4M",
    quiesce: {
      freeze: `echo frozen >>/run/${named}.log; ${freeze} i=0; while [ $i -lt 100 ] && [ ! -e /run/${named}.go ]; do i=$((i+1)); sleep 0.2; done`,
      thaw: `echo thawed >>/run/${named}.log`,
    },
  });

async function inTheMiddle(named: string): Promise<void> {
  await waitFor(
    async () =>
      (await lab.server1.run(`test -e /run/${named}.log`, { allowFailure: true })).exitCode === 0 ||
      undefined,
    { timeoutSeconds: 60, what: `the taking of ${named} to begin` },
  );
}

/** The orphaned command on server1 goes on: returns the UUID of what it made, once it has ended. */
async function madeByOrphan(named: string): Promise<string> {
  await lab.server1.run(`touch /run/${named}.go`);
  return waitFor(
    async () => {
      const { stdout } = await lab.server1.run(
        `grep -q thawed /run/${named}.log && lvs --noheadings -o lv_uuid ${group}/${named}`,
        { allowFailure: true },
      );
      return stdout.trim() || undefined;
    },
    { timeoutSeconds: 30, what: `${named} to be made and thawed` },
  );
}

/** The process and all it started, youngest last. Plugins have process groups of their own. */
async function family(pid: number): Promise<{ pid: number; command: string }[]> {
  const { stdout } = await runChild(["ps", "-e", "-o", "pid=,ppid=,args="]);
  const rows = stdout.split("\n").flatMap((line) => {
    const match = /^ *(\d+) +(\d+) +(.*)$/.exec(line);
    return match === null
      ? []
      : [{ pid: Number(match[1]), parent: Number(match[2]), command: match[3] ?? "" }];
  });
  const found = rows.filter((row) => row.pid === pid);
  for (const { pid: parent } of found) found.push(...rows.filter((row) => row.parent === parent));
  return found;
}

it("sshd is restarted and its sessions are killed in the middle of a create: the same up looks and goes on", async () => {
  stack.declare(
    ...base,
    slow(
      "cut",
      "if [ ! -e /run/cut.once ]; then touch /run/cut.once /run/cut.go; systemctl restart ssh; pkill -KILL -f '^sshd: (root|operator)'; fi;",
    ),
  );
  (await stack.up()).succeeded("1 created");
  expect((await stack.state()).get("cut")).toMatchObject({ state: "valid" });
  const { stdout } = await lab.server1.run("sort /run/cut.log | uniq -c | awk '{ print $1 }' | uniq | wc -l");
  expect(stdout.trim()).toBe("1");
});

it("the provider's process is killed by SIGKILL in the middle of a create: the next up adopts what it made", async () => {
  stack.declare(...base, slow("orphan"));
  const { pid, end } = stack.startUp();
  await inTheMiddle("orphan");
  const program = providerProgram[stack.door];
  const provider = (await family(pid)).findLast(({ command }) => command.includes(program));
  expect(provider).toBeDefined();
  process.kill(provider?.pid ?? 0, "SIGKILL");
  const run = await end;
  expect(run.exitCode).not.toBe(0);
  expect(run.text).toMatch(/LvSnapshot orphan \*\*creating failed\*\*/);
  const made = await madeByOrphan("orphan");
  (await stack.up()).succeeded();
  expect((await stack.state()).get("orphan")).toMatchObject({ uuid: made, state: "valid" });
});

it("Pulumi and the provider are killed by SIGKILL in the middle of a create: after a cancel the next up adopts what was made", async () => {
  stack.declare(...base, slow("deserted"));
  const { pid, end } = stack.startUp();
  await inTheMiddle("deserted");
  const pids = (await family(pid)).map((process) => String(process.pid));
  // Some end by themselves when those before them are gone.
  await runChild(["kill", "-KILL", ...pids], { allowFailure: true });
  await end;
  const made = await madeByOrphan("deserted");
  await stack.cancel();
  (await stack.up()).succeeded();
  expect((await stack.state()).get("deserted")).toMatchObject({ uuid: made, state: "valid" });
});

it("Ctrl-C in the middle of a create: the remote command ends, what is left is told, and the next up goes on", async () => {
  stack.declare(...base, slow("cancelled"));
  const { pid, end } = stack.startUp();
  await inTheMiddle("cancelled");
  process.kill(pid, "SIGINT");
  const run = await end;
  expect(run.exitCode).not.toBe(0);
  run.failedWith("CANCELLED", "LvSnapshot cancelled", "server1");
  run.said("was cancelled");
  // The freeze that was waiting has ended, the VM is thawed, and no snapshot came of it.
  const { stdout } = await lab.server1.run(
    `cat /run/cancelled.log; pgrep -fa 'cancelled[.]go' || true; lvs --noheadings -o lv_name ${group}`,
  );
  expect(stdout).toMatch(/^frozen\nthawed\n/);
  expect(stdout).not.toContain("cancelled");
  await lab.server1.run("touch /run/cancelled.go");
  (await stack.up()).succeeded("1 created");
  expect((await stack.state()).get("cancelled")).toMatchObject({ state: "valid" });
});

it("LVM scans every device while everything is removed: it is not taken for a holder, and nothing is left", async () => {
  const before = await checksum(lab.server1, `/dev/${group}/${origin}`);
  await lab.server2.run("systemd-run -q --unit scanner sh -c 'while :; do pvs -a >/dev/null 2>&1; done'");
  (await stack.destroy()).succeeded();
  await lab.server2.run("systemctl stop scanner");
  expect(await leftovers(lab.server1)).toBe("");
  expect(await leftovers(lab.server2)).toBe("");
  expect(await checksum(lab.server1, `/dev/${group}/${origin}`)).toBe(before);
});
