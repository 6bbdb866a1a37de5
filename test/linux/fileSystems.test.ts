import { expect, it } from "vitest";
import { mountableTypes, readOnlyMount } from "../../provider/linux/fileSystems.js";

const always = ["ro", "nodev", "nosuid", "noexec"];

it.each([
  ["ext4", "ext4", ["noload"]],
  ["ext3", "ext4", ["noload"]],
  ["ext2", "ext4", ["noload"]],
  ["xfs", "xfs", ["norecovery", "nouuid"]],
  ["btrfs", "btrfs", ["rescue=nologreplay"]],
  ["vfat", "vfat", []],
  ["ntfs", "ntfs3", []],
])("%s is mounted read-only, without its journal replayed", (type, kernelType, options) => {
  expect(readOnlyMount(type, "6.1.0-18-amd64")).toEqual({ kernelType, options: [...always, ...options] });
});

it.each([
  ["5.8.18", "nologreplay"],
  ["4.19.0-26-amd64", "nologreplay"],
  ["5.9.0", "rescue=nologreplay"],
  ["6.1.0-18-cloud-amd64", "rescue=nologreplay"],
  ["10.0", "rescue=nologreplay"],
])("the btrfs of a kernel %s takes %s", (release, option) => {
  expect(readOnlyMount("btrfs", release)?.options).toEqual([...always, option]);
});

it("a kernel release that cannot be read is an error, and no old kernel", () => {
  expect(() => readOnlyMount("btrfs", "Linux")).toThrow(/no kernel release/);
});

it("what is not known to leave its device alone is not mounted", () => {
  for (const type of ["zfs_member", "LVM2_member", "crypto_LUKS", "swap", "f2fs", "constructor"])
    expect([type, readOnlyMount(type, "6.1.0")]).toEqual([type, undefined]);
  for (const type of mountableTypes) expect(readOnlyMount(type, "6.1.0")?.options).toContain("ro");
});
