import { expect, it } from "vitest";
import { attaches, hostRoles, programsOf } from "../../provider/linux/hostRoles.js";
import { nbdServers } from "../../provider/linux/nbd.js";

it("each role has the programs that the resources on such a host ask for", () => {
  // As the scripts of NbdExport, NbdAttachment and Mount, and the plans of the copies, name them.
  expect(programsOf(["source"], "nbdkit")).toEqual(
    expect.arrayContaining(["lvs", "nbdkit", "nbdinfo", "nbdcopy", "systemctl", "ss", "ip", "setpriv"]),
  );
  expect(programsOf(["client"], "nbdkit")).toEqual(
    expect.arrayContaining(["nbd-client", "nbdinfo", "systemctl", "flock", "udevadm", "blkid", "partx"]),
  );
  expect(programsOf(["destination"], "nbdkit")).toEqual(
    expect.arrayContaining([
      "nbdcopy",
      "nbdinfo",
      "nbdkit",
      "qemu-img",
      "qemu-nbd",
      "findmnt",
      "blockdev",
      "lvs",
    ]),
  );
});

it("a source has the server that it serves by, and no other", () => {
  for (const server of nbdServers)
    expect(
      programsOf(["source"], server).filter((program) => nbdServers.some((one) => one === program)),
    ).toEqual([server]);
  expect(programsOf(["source"], "qemu-nbd")).toContain("qemu-img");
});

it("roles share what they both need, and a client alone attaches", () => {
  const programs = programsOf(hostRoles, "nbdkit");
  expect(new Set(programs).size).toBe(programs.length);
  expect(hostRoles.filter((role) => attaches([role]))).toEqual(["client"]);
});
