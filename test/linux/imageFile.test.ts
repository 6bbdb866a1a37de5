import { describe, expect, it } from "vitest";
import { fileProblem, parseImageInfo } from "../../provider/linux/imageFile.js";
import { recordedImageInfo } from "../support/recorded.js";

describe("what qemu-img tells of an image", () => {
  it("is the size of its content", () => {
    expect(parseImageInfo(recordedImageInfo("plain"))).toEqual({ sizeBytes: 16777216 });
  });

  it.each([
    ["backing file", "backingFile", "/srv/back ups/other.raw"],
    ["data file", "dataFile", "/srv/back ups/ext.raw"],
  ] as const)("is the %s that it needs", (what, name, file) => {
    expect(parseImageInfo(recordedImageInfo(name))).toEqual({
      sizeBytes: 16777216,
      needs: { what, name: file },
    });
  });

  it.each(["", "{}", '{"virtual-size":-1}', '{"virtual-size":"1"}'])("is not guessed from %j", (text) => {
    expect(() => parseImageInfo(text)).toThrow();
  });
});

describe("a path of an image", () => {
  it.each([
    "vm1.raw",
    "/",
    "/a//b",
    "/a/../b",
    "/a/./b",
    "/dev/x",
    "/run/x",
    "/a/b.part",
    "/a/b\nc",
    `/${"a".repeat(240)}`,
  ])("is not %j", (file) => {
    expect(fileProblem(file)).toEqual(expect.any(String));
  });

  it.each(["/vm1.raw", "/var/back ups/vm 1.qcow2", "/runs/x", '/a/we"ird:\\%n$x'])("is %j", (file) => {
    expect(fileProblem(file)).toBeUndefined();
  });
});
