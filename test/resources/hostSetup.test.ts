import { chmodSync, mkdirSync, symlinkSync } from "node:fs";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { PartialFailure } from "../../provider/core/partialFailure.js";
import { handlersOn, untouchedHost } from "../support/fakeHost.js";
import { imported, importer } from "../support/imported.js";
import { SetupHost } from "../support/setupHost.js";

type Values = Readonly<Record<string, unknown>>;

const connection = {
  address: "192.0.2.2",
  password: "x",
  hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
};
const declared = { host: connection, owner: "o/p/s/setup", roles: ["source", "client"] };
const wanted = { adopt: false, server: "nbdkit", packages: true, lvmFilter: true, ...declared };
const none: ReadonlySet<string> = new Set();

const local = "/etc/lvm/lvmlocal.conf";
const modules = "/etc/modules-load.d/lvm-nbd-host.conf";
const nbdOnly = ["r|^/dev/nbd|"];

let host: SetupHost;
beforeEach(() => {
  host = new SetupHost();
});
afterEach(() => host.close());

const handlers = () => handlersOn("HostSetup", host);
const create = async (more: Values = {}) => (await handlers().create({ ...wanted, ...more })).state;

async function update(state: Values, more: Values = {}): Promise<Values> {
  return handlers().update(state, { ...wanted, ...more });
}

async function warningsOf(work: (own: ReturnType<typeof handlers>) => Promise<unknown>): Promise<string> {
  const own = handlers();
  await work(own);
  return own.warnings.join("\n");
}

async function refused(more: Values, ...texts: RegExp[]): Promise<void> {
  const before = [host.left(), host.read(local)];
  for (const text of texts) await expect(create(more)).rejects.toThrow(text);
  expect([host.left(), host.read(local)]).toEqual(before);
}

describe("arguments", () => {
  const problems = async (change: object) => {
    const asked = untouchedHost();
    const checked = await handlersOn("HostSetup", asked).check(undefined, { ...declared, ...change }, none);
    return checked.problems.map(({ property, reason }) => `${property}: ${reason}`);
  };

  it.each([
    [{}, []],
    [{ roles: ["destination"], server: "qemu-nbd", packages: false, lvmFilter: false }, []],
    [{ roles: [] }, ["roles: must name at least one role"]],
    [{ roles: ["client", "client"] }, ["roles: must name no role twice"]],
    [{ roles: ["servant"] }, [expect.stringMatching(/^roles\.0: .*"source"\|"client"\|"destination"/)]],
    [{ server: "nbd" }, [expect.stringMatching(/^server: .*"nbdkit"/)]],
  ])("%j", async (change, expected) => {
    expect(await problems(change)).toEqual(expected);
  });
});

describe("create", () => {
  it("of a host with all programs writes module and filter, and tells what the host is", async () => {
    const before = host.read(local);
    const { id, state } = await handlers().create(wanted);
    expect(id).toBe("192.0.2.2/host-setup");
    expect(state).toEqual({
      ...wanted,
      packagesInstalled: [],
      distribution: "Debian GNU/Linux 12 (bookworm)",
      kernel: "6.1.0-56-cloud-amd64",
      versions: {
        nbdkit: "1.32.5",
        nbdcopy: "1.14.2",
        nbdinfo: "1.14.2",
        "nbd-client": "3.24",
        "qemu-img": "7.2.22",
        lvm: "2.03.16",
        systemd: "252",
      },
      nbdModule: true,
      nbdsMax: 16,
      globalFilter: nbdOnly,
      cgroupBpf: true,
      problems: [],
      state: "ready",
    });
    expect(host.read(modules)).toBe("# Made by HostSetup of lvm-nbd.\nnbd\n");
    expect(host.read(local)).toMatch(
      /^local \{[\s\S]*devices \{\n\tglobal_filter = \[ "r\|\^\/dev\/nbd\|" \]\n\}\n$/,
    );
    expect(host.read("/etc/lvm-nbd/lvmlocal.conf.before")).toBe(before);
    expect(host.told("log")).toBe("");
  });

  it("again changes nothing: a run that was cut off before its answer is found", async () => {
    await create();
    const [left, text, before] = [host.left(), host.read(local), host.changes.length];
    expect(await create()).toMatchObject({ state: "ready" });
    expect([host.left(), host.read(local), host.changes.length]).toEqual([left, text, before]);
  });

  it("of a source alone writes neither module nor filter", async () => {
    const before = host.read(local);
    expect(await create({ roles: ["source"] })).toMatchObject({ nbdModule: false, state: "ready" });
    expect(host.read(local)).toBe(before);
    expect(host.left()).toEqual([expect.stringMatching(/^\/etc\/lvm-nbd\/host-[0-9a-f]{16}\.json$/)]);
  });

  it("merges the filter into a list of lvm.conf, and rejects the other names of NBD devices where all are accepted", async () => {
    host.write("/etc/lvm/lvm.conf", 'devices {\n\tglobal_filter = [ "r|^/dev/sdz|", "a|.*|" ]\n}\n');
    const { globalFilter } = await create();
    expect(globalFilter).toEqual([
      "r|^/dev/nbd|",
      "r|^/dev/sdz|",
      "r#^/dev/(lvm-nbd/|block/43:|disk/by-(diskseq|partuuid|partlabel|id/lvm-pv-uuid-))#",
      "a|.*|",
    ]);
  });

  it("merges the filter of an lvm.conf that is a link to elsewhere, and finds it there again", async () => {
    host.write(
      "/etc/lvm/managed.d/lvm.conf",
      'devices {\n\tglobal_filter = [ "r|^/dev/VgVm/|", "r|^/dev/zd|" ]\n}\n',
    );
    host.delete("/etc/lvm/lvm.conf");
    symlinkSync("managed.d/lvm.conf", host.real("/etc/lvm/lvm.conf"));
    const merged = { globalFilter: [...nbdOnly, "r|^/dev/VgVm/|", "r|^/dev/zd|"], state: "ready" };
    const state = await create();
    expect(state).toMatchObject(merged);
    expect(await update(state)).toMatchObject(merged);
  });

  it("leaves a filter that keeps LVM off NBD devices already, and one where LVM goes by a list of devices", async () => {
    host.write("/etc/lvm/lvm.conf", 'devices {\n\tglobal_filter = [ "a|^/dev/vd|", "r|.*|" ]\n}\n');
    expect(await create()).toMatchObject({ globalFilter: ["a|^/dev/vd|", "r|.*|"], state: "ready" });
    host.write("/etc/lvm/lvm.conf", "devices {\n}\n");
    host.set("use_devicesfile", "1\n");
    host.write("/etc/lvm/devices/system.devices", "");
    expect(await create()).toMatchObject({ globalFilter: ["a|.*|"], state: "ready" });
    expect(host.read(local)).not.toContain("nbd");
  });

  it("of a client without LVM asks nothing of it", async () => {
    host.shelve("lvm2", "lvmconfig", "lvs", "lvm");
    const state = await create({ roles: ["client"] });
    expect(state).toMatchObject({ state: "ready" });
    expect(state).not.toHaveProperty("globalFilter");
  });

  it("keeps mode, and the setting in lvmlocal.conf takes the new list in its place", async () => {
    const own = 'devices {\n\t# global_filter = [ "r|no|" ]\n\tglobal_filter = [ "a|^/dev/vd|" ] # ours\n}\n';
    host.write(local, own);
    chmodSync(host.real(local), 0o640);
    const state = await create();
    expect(state).toMatchObject({ globalFilter: ["r|^/dev/nbd|", "a|^/dev/vd|"], state: "ready" });
    expect(host.read(local)).toBe(own.replace('[ "a|^/dev/vd|" ]', '[ "r|^/dev/nbd|", "a|^/dev/vd|" ]'));
    expect(host.mode(local)).toBe(0o640);
    await handlers().remove(state);
    expect(host.read(local)).toBe(own);
    expect(host.mode(local)).toBe(0o640);
  });
});

describe("packages", () => {
  it("exactly the missing ones are installed, without a question, and named; they stay", async () => {
    host.shelve("nbd-client", "nbd-client");
    host.shelve("nbdkit", "nbdkit");
    const state = await create();
    expect(state).toMatchObject({ packagesInstalled: ["nbd-client", "nbdkit"], state: "ready" });
    expect(host.told("log")).toMatch(/ update\n/);
    expect(host.told("log")).toMatch(
      /-o DPkg::Lock::Timeout=300 .*--no-install-recommends --no-remove install nbd-client nbdkit\nnoninteractive l\n/,
    );
    expect(host.told("masked")).toBe("");
    await handlers().remove(state);
    expect(host.told("installed")).toContain("nbd-client");
    expect(host.left()).toEqual([]);
  });

  it("of nbd-server, Debian's own daemon is not started", async () => {
    host.program("nbd-server", "echo This is nbd-server version 3.26.1");
    host.shelve("nbd-server", "nbd-server");
    host.set("candidate.nbd-server", "1:3.26.1-1\n");
    expect(await create({ server: "nbd-server" })).toMatchObject({ state: "ready" });
    expect(host.told("masked")).toBe("nbd-server.service\n");
  });

  it("packages: false refuses with the command that installs them", async () => {
    host.shelve("nbd-client", "nbd-client");
    host.shelve("libnbd-bin", "nbdcopy", "nbdinfo");
    await refused(
      { packages: false },
      /PROGRAM_MISSING.*nbd-client, nbdcopy, nbdinfo.*apt-get install libnbd-bin nbd-client/s,
    );
    expect(host.changes).toEqual([]);
  });

  it("an unknown distribution is refused with the programs that are missing, and none where none is", async () => {
    host.write("/etc/os-release", 'PRETTY_NAME="Own Linux 3"\nID=own\n');
    expect(await create({ owner: "o/p/s/first" })).toMatchObject({
      distribution: "Own Linux 3",
      state: "ready",
    });
    host.shelve("nbd-client", "nbd-client");
    await refused({}, /PROGRAM_MISSING.*nbd-client; the packages of Own Linux 3 are not known/s);
  });

  it("what cannot be installed fails with the package manager's words; the next up goes on", async () => {
    host.shelve("nbd-client", "nbd-client");
    host.set("refused", "");
    const failed = await create().catch((error: unknown) => error);
    expect(failed).toBeInstanceOf(PartialFailure);
    expect(String(failed)).toMatch(
      /COMMAND_FAILED.*nbd-client could not be installed.*Unable to locate package/s,
    );
    const { state } = failed as PartialFailure;
    expect(state).toMatchObject({ state: "incomplete", packagesInstalled: [] });
    host.set("refused", undefined);
    expect(await update(state)).toMatchObject({ state: "ready", packagesInstalled: ["nbd-client"] });
  });

  it("lists that cannot be read anew are used as they are, and said", async () => {
    host.shelve("nbd-client", "nbd-client");
    host.set("stale", "");
    expect(await warningsOf((own) => own.create(wanted))).toContain("could not be read anew");
  });

  it("a package that does not bring its program is told", async () => {
    host.shelve("nbd-client", "nbd-client");
    host.set("shelf/nbd-client", "");
    await expect(create()).rejects.toThrow(
      /PROGRAM_MISSING.*nbd-client are installed.*no nbd-client.*--reinstall/s,
    );
  });

  it("leaves it to apt to wait for a dpkg that is at work", async () => {
    host.shelve("nbd-client", "nbd-client");
    host.write("/var/lib/dpkg/updates/0001", "");
    host.program(
      "dpkg",
      'echo "dpkg $*" >>"$SANDBOX/log"; echo "frontend lock is locked by another process" >&2; exit 2',
    );
    expect(await create()).toMatchObject({ packagesInstalled: ["nbd-client"], state: "ready" });
    expect(host.told("log")).toMatch(/^dpkg --configure -a\n.*install nbd-client$/ms);
  });

  it.each([
    [
      "dnf",
      'ID=almalinux\nID_LIKE="rhel centos fedora"\n',
      /^dnf -y -q --setopt=install_weak_deps=False install nbd$/m,
    ],
    [
      "zypper",
      'ID=opensuse-leap\nID_LIKE="suse opensuse"\n',
      /^zypper --non-interactive --quiet install --no-recommends nbd$/m,
    ],
  ])("%s installs by its own names", async (manager, osRelease, expected) => {
    host.write("/etc/os-release", osRelease);
    host.shelve("nbd", "nbd-client", "dpkg-query");
    host.program(
      manager,
      `echo "${manager} $*" >>"$SANDBOX/log"; cp "$SANDBOX/shelf/bin/nbd-client" "$SANDBOX/bin"; echo nbd >"$SANDBOX/rpms"`,
    );
    host.program(
      "rpm",
      `case $2 in --changelog) exit 1;; esac; shift 4; [ "$1" = nbd ] && [ -e "$SANDBOX/rpms" ] && echo "nbd 3.25-1.el9" || { echo "no package provides $1"; exit 1; }`,
    );
    expect(await create()).toMatchObject({ packagesInstalled: ["nbd"], state: "ready" });
    expect(host.told("log")).toMatch(expected);
  });
});

describe("versions with known holes", () => {
  it("are refused with the version that has them no more, before anything is touched", async () => {
    host.set("nbdcopy.version", "nbdcopy 1.10.3\n");
    await refused({}, /VERSION_VULNERABLE.*nbdcopy 1\.10\.3 has CVE-2022-0485.*fixed in libnbd 1\.10\.4/s);
    expect(host.changes).toEqual([]);
    expect(await create({ roles: ["client"] })).toMatchObject({ state: "ready" });
  });

  it("are taken where the distribution's changelog names them as mended", async () => {
    host.set("nbdcopy.version", "nbdcopy 1.6.0\n");
    host.write(
      "/usr/share/doc/libnbd-bin/changelog.Debian.gz",
      "libnbd (1.6.0-5) stable; urgency=high\n\n  * Fix CVE-2022-0485.\n",
    );
    expect(await create()).toMatchObject({ state: "ready" });
  });

  it("nbd-server's are refused only where it is to serve, also before it is installed", async () => {
    host.program("nbd-server", "echo This is nbd-server version 3.24");
    expect(await create({ owner: "o/p/s/first" })).toMatchObject({ state: "ready" });
    await refused(
      { server: "nbd-server" },
      /VERSION_VULNERABLE.*issue 137.*fixed in nbd 3\.25.*server: "nbdkit"/s,
    );
    host.shelve("nbd-server", "nbd-server");
    host.set("candidate.nbd-server", "1:3.24-1.1\n");
    await refused({ server: "nbd-server" }, /VERSION_VULNERABLE.*would install: nbd-server 3\.24/s);
    expect(host.told("installed")).not.toContain("nbd-server");
  });

  it("of a package that its distribution has updated are judged by its changelog, which comes with it", async () => {
    host.program("nbd-server", "echo This is nbd-server version 3.21");
    host.shelve("nbd-server", "nbd-server");
    host.set("candidate.nbd-server", "1:3.21-1+deb11u1\n");
    const changelog = "/usr/share/doc/nbd-server/changelog.Debian.gz";
    host.write(changelog, "  * Fix CVE-2022-26495.\n");
    await expect(create({ server: "nbd-server" })).rejects.toThrow(/VERSION_VULNERABLE.*CVE-2022-26496/s);
    host.write(changelog, "  * Fix CVE-2022-26495 and CVE-2022-26496.\n");
    expect(await create({ server: "nbd-server" })).toMatchObject({ state: "ready" });
  });
});

describe("is refused before anything is touched", () => {
  it("a kernel without the module", async () => {
    host.set("no-module", "");
    await refused({}, /MODULE_MISSING.*no nbd module.*linux-modules-extra-6\.1\.0-56-cloud-amd64/s);
    expect(await create({ roles: ["source"] })).toMatchObject({ state: "ready" });
  });

  it.each([local, modules, "/etc/lvm-nbd", "/etc/lvm-nbd/lvmlocal.conf.before"])(
    "a link at %s",
    async (path) => {
      host.write("/srv/elsewhere", "somebody's\n");
      if (path !== "/etc/lvm-nbd") mkdirSync(host.real("/etc/lvm-nbd"));
      if (path === local) host.delete(local);
      symlinkSync(host.real("/srv/elsewhere"), host.real(path));
      await refused({}, /FOREIGN_RESOURCE.*symbolic link/s);
      expect(host.read("/srv/elsewhere")).toBe("somebody's\n");
    },
  );

  it("a configuration that LVM does not take, or by which it would not see the host's own volumes", async () => {
    host.write("/etc/lvm/lvm.conf", "BROKEN\n");
    await refused({}, /COMMAND_FAILED.*does not take.*Parse error.*lvmFilter: false/s);
    host.write("/etc/lvm/lvm.conf", "devices {\n}\n");
    host.set("hides", "");
    await refused({}, /COMMAND_FAILED.*no longer see \/dev\/vdb/s);
    host.set("hides", undefined);
    host.program(
      "pvs",
      `echo "  254 A /dev/vdb"; [ "$LVM_SYSTEM_DIR" = "$ROOT/etc/lvm" ] || echo "  230 B /dev/zd0"`,
    );
    await refused({}, /COMMAND_FAILED.*would see \/dev\/zd0, which it does not see now/s);
    host.program("pvs", "echo 'Failed to find device' >&2; exit 5");
    await refused({}, /COMMAND_FAILED.*does not list its physical volumes/s);
    expect(await create({ lvmFilter: false })).toMatchObject({ state: "ready", globalFilter: ["a|.*|"] });
  });
});

describe("drift", () => {
  it("is named and healed: a package gone, the module unloaded, its file gone, the filter gone", async () => {
    const state = await create();
    host.shelve("nbd-client", "nbd-client");
    host.delete("/sys/module/nbd");
    host.delete(modules);
    host.write(local, "local {\n}\n");
    let seen: Values = {};
    const said = await warningsOf(async (own) => {
      seen = (await own.read(state)) ?? {};
    });
    for (const problem of [
      "nbd-client is not installed (package nbd-client)",
      "the nbd module is not loaded",
      `${modules}, which loads nbd at boot, is not there`,
      "LVM's global_filter does not keep it off NBD devices",
    ])
      expect(said).toContain(`${problem}; \`pulumi up\` will put it right`);
    expect(seen).toMatchObject({ state: "incomplete" });
    expect((await handlers().diff(seen, wanted, none)).changes).toEqual([
      { property: "state", effect: "update" },
    ]);
    expect(await update(seen)).toMatchObject({ state: "ready", problems: [] });
    await handlers().remove(state);
    expect(host.read(local)).toBe("local {\n}\n");
  });

  it("a list of lvm.conf that was changed since is merged anew, and the first lvmlocal.conf comes back", async () => {
    const before = host.read(local);
    const state = await create();
    host.write("/etc/lvm/lvm.conf", 'devices {\n\tglobal_filter = [ "r|^/dev/sdz|" ]\n}\n');
    expect(await warningsOf((own) => own.read(state))).toContain("was changed since it was merged");
    expect(await update(state)).toMatchObject({
      globalFilter: ["r|^/dev/nbd|", "r|^/dev/sdz|"],
      state: "ready",
    });
    await handlers().remove(state);
    expect(host.read(local)).toBe(before);
  });

  it("a host that was never set up, or whose record is gone, is gone from the state", async () => {
    const state = await create();
    host.delete("/etc/lvm-nbd");
    expect(await handlers().read(state)).toBeUndefined();
  });
});

describe("change", () => {
  it("of the roles takes back what is no longer wanted", async () => {
    const before = host.read(local);
    const state = await create();
    expect(await update(state, { roles: ["source"] })).toMatchObject({
      globalFilter: ["a|.*|"],
      state: "ready",
    });
    expect([host.read(local), host.read(modules)]).toEqual([before, undefined]);
  });

  it("of lvmFilter takes the filter back, or writes it; the module stays", async () => {
    const before = host.read(local);
    const state = await create();
    const without = await update(state, { lvmFilter: false });
    expect(without).toMatchObject({ globalFilter: ["a|.*|"], nbdModule: true, state: "ready" });
    expect([host.read(local), host.read(modules)]).toEqual([before, expect.stringContaining("nbd")]);
    expect(await update(without)).toMatchObject({ globalFilter: nbdOnly, state: "ready" });
  });

  it("of the record by hand is written over, the packages being forgotten", async () => {
    const state = await create();
    const record = host.left().find((path) => path.includes("/host-")) ?? "";
    const text = host.read(record);
    host.write(record, "{");
    expect(await update(state)).toMatchObject({ state: "ready" });
    expect(host.read(record)).toBe(text);
  });

  it("of the owner moves the record", async () => {
    const state = await create();
    const moved = await update(state, { owner: "o/p/s/renamed" });
    expect(moved).toMatchObject({ owner: "o/p/s/renamed", state: "ready" });
    expect(host.left().filter((path) => path.includes("/host-"))).toHaveLength(1);
    await handlers().remove(moved);
    expect(host.left()).toEqual([]);
  });
});

describe("remove", () => {
  it("restores lvmlocal.conf byte for byte, or removes one that was not there", async () => {
    host.write(local, "# no newline at its end");
    await handlers().remove(await create());
    expect([host.read(local), host.left()]).toEqual(["# no newline at its end", []]);
    host.delete(local);
    await handlers().remove(await create());
    expect([host.read(local), host.left()]).toEqual([undefined, []]);
  });

  it("leaves one that was touched since, and says what to do", async () => {
    const state = await create();
    const touched = `${host.read(local)}# by hand\n`;
    host.write(local, touched);
    expect(await warningsOf((own) => own.remove(state))).toMatch(/was changed since.*lvmlocal\.conf\.before/);
    expect(host.read(local)).toBe(touched);
    expect(host.left()).toEqual(["/etc/lvm-nbd/lvmlocal.conf.before"]);
  });

  it("leaves what another HostSetup of the host wants, and the last one takes it back", async () => {
    const before = host.read(local);
    const [first, second] = [await create(), await create({ owner: "o/p/other/setup", roles: ["client"] })];
    expect(second).toMatchObject({ state: "ready" });
    await handlers().remove(first);
    expect(await handlers().read(second)).toMatchObject({ state: "ready", globalFilter: nbdOnly });
    await handlers().remove(second);
    expect([host.read(local), host.left()]).toEqual([before, []]);
  });
});

describe("where it is stopped, as by a cancel, no working copy of LVM's configuration stays", () => {
  it("while the filter is written", async () => {
    host.program("sync", "case $1 in *lvmlocal.conf.new) kill -s TERM 0;; esac");
    const before = host.read(local);
    await expect(create()).rejects.toThrow();
    expect(host.read(local)).toBe(before);
    expect(host.left().filter((path) => /^\/run\/|\.new$/.test(path))).toEqual([]);
  });

  it("while it is looked at", async () => {
    const state = await create();
    host.program("cp", "kill -s TERM 0");
    await expect(handlers().read(state)).rejects.toThrow();
    expect(host.left().filter((path) => path.startsWith("/run/"))).toEqual([]);
  });
});

describe("a cut at any moment", () => {
  const restored = () => [host.read(local), host.left().filter((path) => !path.startsWith("/run/"))];

  it("of the creation or the removal is finished by the next one", async () => {
    const before = host.read(local);
    const cut = async (step: number, work: () => Promise<unknown>) => {
      host.kill({ step, when: "after" });
      const isCut = await work().then(
        () => false,
        () => true,
      );
      host.kill(undefined);
      return isCut;
    };
    for (let step = 1; ; step++) {
      host.shelve("nbd-client", "nbd-client");
      const isCreateCut = await cut(step, create);
      const state = await create();
      expect(state, `step ${step}`).toMatchObject({ state: "ready", packagesInstalled: ["nbd-client"] });
      const isRemoveCut = await cut(step, () => handlers().remove(state));
      expect(await warningsOf((own) => own.remove(state)), `step ${step}`).toBe("");
      expect(restored(), `step ${step}`).toEqual([before, []]);
      if (!isCreateCut && !isRemoveCut) break;
      expect(step).toBeLessThan(80);
      host.set("installed", "lvm2 2.03.16-2\n");
      host.delete("/sys/module/nbd");
    }
  }, 240_000);
});

describe("read by its id alone", () => {
  const id = "192.0.2.2/host-setup";
  const setup = { ...importer, name: "setup" };

  it.each([
    { roles: ["source", "client"] },
    { roles: ["source"], server: "qemu-nbd" },
    { roles: ["destination"], packages: false, lvmFilter: false },
  ])("%j is declared as its record has it, so that nothing is to change", async (more) => {
    const made = await create(more);
    // What only other roles need is not missed.
    if (!more.roles.includes("client")) host.shelve("nbd-client", "nbd-client");
    const { versions: _, ...state } = made;
    const changes = host.changes.length;
    const found = await imported(handlers(), id, setup);
    expect(found.inputs).toEqual({ ...declared, ...more, host: "192.0.2.2" });
    expect(found.state).toMatchObject({ ...state, host: "192.0.2.2", state: "ready" });
    expect(host.changes).toHaveLength(changes);
  });

  it("asks for the organisation where that is not known: the record lies under the owner's name", async () => {
    await create();
    await expect(handlers().find(id, { ...setup, organization: undefined })).rejects.toThrow(
      /INVALID_INPUT.*lvm-nbd:organization/s,
    );
  });

  it("of one that another resource made is refused, naming that; without any there is none", async () => {
    expect(await handlers().find(id, setup)).toBeUndefined();
    await create();
    const changes = host.changes.length;
    const other = { ...setup, stack: "other" };
    await expect(handlers().find(id, other)).rejects.toThrow(
      /FOREIGN_RESOURCE.*of o\/p\/s\/setup.*Import it under that name/s,
    );
    await expect(handlers().find(id, { ...other, readsOnly: true })).rejects.toThrow(
      /INVALID_INPUT.*of o\/p\/s\/setup.*under the name of the resource that made it/s,
    );
    expect(await warningsOf((own) => own.find(id, setup))).toMatch(
      /another resource of this stack.*`pulumi state delete`.*removes this too\.$/,
    );
    expect(host.changes).toHaveLength(changes);
  });

  it("of a record of an earlier version is refused: it does not tell the roles, and is as good as ever", async () => {
    const state = await create();
    const [record = ""] = host.left().filter((path) => /host-[0-9a-f]{16}\.json$/.test(path));
    const { declared: told, ...earlier } = JSON.parse(host.read(record) ?? "");
    expect(told).toMatchObject({ roles: ["source", "client"] });
    host.write(record, `${JSON.stringify(earlier)}\n`);
    await expect(handlers().find(id, setup)).rejects.toThrow(
      /INVALID_INPUT.*does not tell what the host is used for.*Declare it with all its properties/s,
    );
    expect(await handlers().read(state)).toEqual(state);
    await create();
    expect(JSON.parse(host.read(record) ?? "")).toEqual({ ...earlier, declared: told });
  });

  it("of another form is refused", async () => {
    await expect(handlers().find("192.0.2.2/setup", setup)).rejects.toThrow(/that is HOST\/host-setup/);
  });
});
