/** Hosts made ready through the real CLI: real packages from a repository of one, real LVM, a real module. */
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { FaultStack, hostSetup } from "./faults/fault-stack.mts";
import type { Guest, Lab } from "./lab.mts";
import { freshLab, leftovers } from "./support.mts";

// A run of the CLI takes seconds, and many times that where others work on the machine too.
vi.setConfig({ testTimeout: 600_000, hookTimeout: 900_000 });

let lab: Lab;
let stack: FaultStack;
let untouched: string;

const both = { roles: ["source", "client"] };
const ready = [hostSetup("one", "server1", both), hostSetup("two", "server2", both)];
const modules = "/etc/modules-load.d/lvm-nbd-host.conf";

/** The guests have no network: nbd-client is packed again from what is installed of it, and removed. */
const repository = `set -e
  mkdir -p /srv/repository /srv/pack/DEBIAN /root/sources && cd /srv/pack
  dpkg -L nbd-client | while read -r file; do
    [ ! -f "$file" ] || { mkdir -p ".$(dirname "$file")" && cp -a "$file" ".$file"; }
  done
  dpkg-query -s nbd-client | sed -e '/^Status:/d' -e '/^Conffiles:/,/^[A-Z]/{/^Conffiles:/d;/^ /d}' >DEBIAN/control
  dpkg-deb -Zgzip -b . /srv/repository/nbd-client.deb >/dev/null
  cd /srv/repository
  { cat /srv/pack/DEBIAN/control; echo "Filename: ./nbd-client.deb"; echo "Size: $(stat -c %s nbd-client.deb)"
    echo "SHA256: $(sha256sum nbd-client.deb | cut -d' ' -f1)"; } >Packages
  mv /etc/apt/sources.list.d/* /root/sources && echo 'deb [trusted=yes] file:/srv/repository ./' >/etc/apt/sources.list.d/lab.list
  DEBIAN_FRONTEND=noninteractive dpkg --purge nbd-client`;

/** As somebody has it who keeps LVM off a disk: each other name of an NBD device would be accepted. */
const ownFilter = `sed -i 's,^devices {$,devices {\\n\\tglobal_filter = [ "r|^/dev/sdz|"\\, "a|.*|" ],' /etc/lvm/lvm.conf`;

const configuration = async (guest: Guest) =>
  (await guest.run("cd /etc/lvm && sha256sum *.conf && stat -c '%n %a %U' *.conf")).stdout;

beforeAll(async () => {
  lab = await freshLab();
  [stack] = await Promise.all([
    FaultStack.create(lab),
    lab.server1.run(ownFilter),
    lab.server2.run(repository),
  ]);
  untouched = await configuration(lab.server1);
});

afterAll(() => stack?.close());

it("what is missing is installed, and no more; the module is loaded; LVM sees no NBD device, and its own as before", async () => {
  stack.declare(...ready);
  (await stack.up()).succeeded("3 created");
  const state = await stack.state();
  expect(state.get("two")).toMatchObject({
    packagesInstalled: ["nbd-client"],
    distribution: expect.stringMatching(/^Debian GNU\/Linux/),
    kernel: expect.stringMatching(/^\d+\.\d+\./),
    versions: {
      nbdkit: expect.stringMatching(/^\d+\.\d+\.\d+$/),
      "nbd-client": expect.stringMatching(/^3\.\d+/),
      lvm: expect.stringMatching(/^2\.\d+\.\d+$/),
      systemd: expect.stringMatching(/^\d+$/),
    },
    nbdModule: true,
    nbdsMax: 16,
    globalFilter: ["r|^/dev/nbd|"],
    cgroupBpf: true,
    problems: [],
    state: "ready",
  });
  expect(state.get("one")).toMatchObject({ packagesInstalled: [], state: "ready" });
  await lab.server2.run(
    `nbd-client -V && test "$(cat ${modules})" && systemctl is-active systemd-modules-load`,
  );
  const seen = await lab.server1.run(`set -e
    truncate -s 64M /root/disk && nbdkit -P /run/disk.pid -i 127.0.0.1 -p 12345 file /root/disk
    for i in 1 2 3 4 5 6 7 8 9; do [ -s /run/disk.pid ] && break; sleep 0.2; done
    nbd-client -N '' 127.0.0.1 12345 /dev/nbd0 -timeout 30 >/dev/null
    pvcreate -qq -y --config 'devices { global_filter = [ "a|.*|" ] }' /dev/nbd0
    udevadm settle
    pvs --noheadings -o pv_name --config 'devices { global_filter = [ "r|^/dev/nbd|", "a|.*|" ] }' >/root/naive
    pvs --noheadings -o pv_name >/root/ours
    nbd-client -d /dev/nbd0 && kill $(cat /run/disk.pid) && udevadm settle
    echo ours $(cat /root/ours); echo naive $(cat /root/naive)`);
  // The second list hides nothing: this is what makes ours longer.
  expect(seen.stdout.trim()).toMatch(/^ours \/dev\/vdb\nnaive .*\/dev\/disk\/by-/);
  await stack.isAsDeclared();
});

it("drift is named, each by what it is, and the same up puts it right", async () => {
  await lab.server2.run(
    `DEBIAN_FRONTEND=noninteractive dpkg --purge nbd-client && modprobe -r nbd && rm ${modules} && ${ownFilter}`,
  );
  const run = await stack.up({ refresh: true });
  for (const problem of [
    "nbd-client is not installed (package nbd-client)",
    "the nbd module is not loaded",
    `${modules}, which loads nbd at boot, is not there`,
    "LVM's global_filter was changed since it was merged",
  ])
    run.said(`two on server2: ${problem}`);
  run.succeeded("1 updated");
  expect((await stack.state()).get("two")).toMatchObject({
    packagesInstalled: ["nbd-client"],
    globalFilter: ["r|^/dev/nbd|", "r|^/dev/sdz|", expect.stringContaining("by-("), "a|.*|"],
    problems: [],
  });
});

it("what cannot be made ready is refused before anything is touched: each says why", async () => {
  await lab.server1.run("mv /usr/sbin/nbd-client /root");
  await lab.server2.run(`rm ${modules} && ln -s /root/elsewhere ${modules}`);
  const before = await leftovers(lab.server1);
  stack.declare(
    ...ready,
    hostSetup("vulnerable", "server1", { roles: ["source"], server: "nbd-server" }),
    hostSetup("by-hand", "server1", { roles: ["client"], packages: false }),
    hostSetup("linked", "server2", { roles: ["client"] }),
  );
  const run = await stack.up();
  run.failedWith("VERSION_VULNERABLE", "HostSetup vulnerable", "server1", "issue 137", "fixed in nbd 3.25");
  run.failedWith("PROGRAM_MISSING", "HostSetup by-hand", "server1", "`apt-get install nbd-client`");
  run.failedWith("FOREIGN_RESOURCE", "HostSetup linked", "server2", `symbolic link`, modules);
  expect(await leftovers(lab.server1)).toBe(before);
  expect((await lab.server2.run("ls /root /etc/lvm-nbd")).stdout).not.toMatch(/elsewhere|host-.*\n.*host-/);
  await lab.server1.run("mv /root/nbd-client /usr/sbin");
  await lab.server2.run(`rm ${modules}`);
});

it("LVM's configuration comes back byte for byte; one that was touched since is left, and said", async () => {
  await lab.server2.run("echo '# by hand' >>/etc/lvm/lvmlocal.conf");
  const touched = await configuration(lab.server2);
  const run = await stack.destroy();
  run.succeeded("3 deleted");
  run.said("two on server2: /etc/lvm/lvmlocal.conf was changed since");
  expect(run.text).not.toContain("one on server1: /etc/lvm/lvmlocal.conf");
  expect(await configuration(lab.server1)).toBe(untouched);
  expect(await configuration(lab.server2)).toBe(touched);
  expect(await leftovers(lab.server1)).toBe("");
  await lab.server2.run(
    "cp /etc/lvm-nbd/lvmlocal.conf.before /etc/lvm/lvmlocal.conf && rm -r /etc/lvm-nbd /etc/apt/sources.list.d/lab.list /srv/* && mv /root/sources/* /etc/apt/sources.list.d",
  );
  expect(await leftovers(lab.server2)).toBe("");
  await Promise.all(
    [lab.server1, lab.server2].map((guest) =>
      guest.run("modprobe -r nbd; sed -i '/global_filter = \\[ \"r|^.dev.sdz/d' /etc/lvm/lvm.conf"),
    ),
  );
});
