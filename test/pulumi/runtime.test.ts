/** The way of a call out of the state: the thin closure, the installed package's runtime, the handlers. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import type * as pulumi from "@pulumi/pulumi";
import { describe, expect, it, vi } from "vitest";
import { toDynamicProvider } from "../../provider/pulumi/dynamicProvider.js";
import { thinProvider } from "../../provider/pulumi/thinProvider.js";
import { handlers } from "../../provider/runtime.js";

vi.mock(import("../../provider/pulumi/dynamicProvider.js"), { spy: true });

const bad = { host: "no-such-host.invalid", __provider: "code", name: "snapshot1", sizee: "1G" };

/** The methods that a provider of this package has. */
function methods(provider: pulumi.dynamic.ResourceProvider) {
  const { check, diff, create, read, update, delete: remove } = provider;
  if (!check || !diff || !read || !update || !remove) throw new Error("a method is missing");
  return { check, diff, create, read, update, remove };
}

describe("the runtime", () => {
  it("checks inputs as Pulumi asks for it", async () => {
    const { failures } = await methods(handlers("LvSnapshot")).check({}, bad);
    expect(failures?.map(({ reason }) => reason.split(":")[0])).toEqual(
      expect.arrayContaining(["volumeGroup", "origin", "name", "sizee"]),
    );
  });

  it("has one provider a type for the whole process, so that all share one connection a host", () => {
    expect(handlers("LvSnapshot")).toBe(handlers("LvSnapshot"));
    expect(handlers("NbdExport")).not.toBe(handlers("LvSnapshot"));
  });

  it("says what is wrong when the state is of a newer version", async () => {
    await expect(methods(handlers("LvMirror")).read("id", {})).rejects.toThrow(/newer version/);
  });

  it("has one for all that ask at once, also the first time: it knows what this run has made", async () => {
    const before = vi.mocked(toDynamicProvider).mock.calls.length;
    const { check } = methods(handlers("Mount"));
    await Promise.all([check({}, bad), check({}, bad)]);
    expect(vi.mocked(toDynamicProvider).mock.calls.length).toBe(before + 1);
  });

  it("reaches a host only through the verified pool: one that does not answer is not said to be without the snapshot", async () => {
    const closed = { address: "127.0.0.1", port: 1, password: "x" };
    const state = {
      ...{ host: closed, owner: "o/p/s/vm1", volumeGroup: "VgVm", origin: "vm1", name: "s" },
      ...{ size: "1G", uuid: "u", path: "/dev/VgVm/s", sizeBytes: 1, originSizeBytes: 1, originUuid: "o" },
      ...{ createdAt: "", usedPercent: 0, state: "valid" },
    };
    await expect(methods(handlers("LvSnapshot")).read("id", state)).rejects.toThrow(
      /HOST_UNREACHABLE: LvSnapshot vm1 on host 127\.0\.0\.1:1/,
    );
  });
});

describe("a provider that Pulumi has left behind", () => {
  it("ends, instead of spinning on the failure to print its failures", async () => {
    // As the SDK's provider process does it: every uncaught error is printed, also that nobody reads stderr.
    const program = `
      process.on("uncaughtException", (error) => console.error(error));
      require("pulumi-lvm-nbd/runtime").handlers("LvSnapshot");
      process.stdout.write("ready");
      setInterval(() => console.error("still here"), 10);`;
    const child = spawn(process.execPath, ["-e", program], { stdio: ["ignore", "pipe", "pipe"] });
    child.stdout.once("data", () => child.stderr.destroy());
    const deadline = setTimeout(() => child.kill("SIGKILL"), 20_000);
    const [code] = await once(child, "exit");
    clearTimeout(deadline);
    expect(code).toBe(1);
  });
});

describe("the thin closure", () => {
  // It requires the package by its name, which is the built one, as in a user's stack.
  const thin = methods(thinProvider("NbdExport"));
  const state = { device: "/dev/x" };

  it("hands check over, with its arguments and its answer", async () => {
    const { failures } = await thin.check({}, { __provider: "code", listenAddress: "all" });
    expect(failures).toContainEqual({
      property: "",
      reason: expect.stringMatching(/^listenAddress: .*must be an IP address/),
    });
  });

  it.each([
    ["diff", () => thin.diff("id", state, state)],
    ["create", () => thin.create(state)],
    ["read", () => thin.read("id", state)],
    ["update", () => thin.update("id", state, state)],
    ["delete", () => thin.remove("id", state)],
  ])("hands %s over, with its arguments", async (_name, call) => {
    await expect(call()).rejects.toThrow(/INVALID_INPUT: the NbdExport cannot be read: (?!.*device)/);
  });
});
