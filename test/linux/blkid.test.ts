import { execFileSync } from "node:child_process";
import { describe, expect, it } from "vitest";
import {
  contentPhrase,
  parseContent,
  parsePartitions,
  partitionsFunction,
  partitionsPhrase,
} from "../../provider/linux/blkid.js";
import { emitFunctions, parseFields } from "../../provider/linux/fields.js";

/** What `blkid -p -o udev` of util-linux 2.38.1 printed of each. */
const recorded = {
  ext4: `ID_FS_LABEL=my_"boot
ID_FS_LABEL_ENC=my\\x20\\x22boot
ID_FS_UUID=8f9bcd4f-b8ea-4024-91fc-9df4c85abc87
ID_FS_UUID_ENC=8f9bcd4f-b8ea-4024-91fc-9df4c85abc87
ID_FS_VERSION=1.0
ID_FS_BLOCK_SIZE=1024
ID_FS_TYPE=ext4
ID_FS_USAGE=filesystem
`,
  lvm: `ID_FS_UUID=2aH92G-jXq0-o6lk-DwTJ-F8YA-WJiA-W29dUf
ID_FS_UUID_ENC=2aH92G-jXq0-o6lk-DwTJ-F8YA-WJiA-W29dUf
ID_FS_VERSION=LVM2\\x20001
ID_FS_TYPE=LVM2_member
ID_FS_USAGE=raid
`,
  luks: "ID_FS_VERSION=1\nID_FS_TYPE=crypto_LUKS\nID_FS_USAGE=crypto\n",
  swap: "ID_FS_UUID=9f79bdf7-ea9d-49a6-be14-4c706f4c6a37\nID_FS_UUID_ENC=9f79bdf7-ea9d-49a6-be14-4c706f4c6a37\nID_FS_VERSION=1\nID_FS_TYPE=swap\nID_FS_USAGE=other\n",
  md: "ID_FS_UUID=55555555-5555-5555-5555-555555555555\nID_FS_UUID_ENC=55555555-5555-5555-5555-555555555555\nID_FS_LABEL=host:md0\nID_FS_LABEL_ENC=host:md0\nID_FS_VERSION=1.2\nID_FS_TYPE=linux_raid_member\nID_FS_USAGE=raid\n",
  table: "ID_PART_TABLE_UUID=c75ef652-8732-8942-9bb8-f6ae50c267c8\nID_PART_TABLE_TYPE=gpt\n",
};
const ambivalent = "ID_FS_AMBIVALENT=filesystem:ext2:1.0 filesystem:btrfs\n";

describe("what is on a device", () => {
  it("is told with type, UUID and label as the file system has it", () => {
    expect(parseContent(recorded.ext4, "0")).toMatchObject({
      type: "ext4",
      uuid: "8f9bcd4f-b8ea-4024-91fc-9df4c85abc87",
      label: 'my "boot',
    });
    expect(parseContent("ID_FS_LABEL_ENC=a\\x0ab\\xc3\\xa4\u00e4\nID_FS_TYPE=ext4\n", "0").label).toBe(
      "a\nbää",
    );
  });

  it.each([
    ["ext4", 'ext4 "my \\"boot"'],
    ["lvm", "a physical volume of LVM"],
    ["luks", "an encrypted volume (LUKS)"],
    ["swap", "swap space"],
    ["md", 'a member of an md array "host:md0"'],
    ["table", "a partition table (gpt)"],
  ] as const)("%s is put in words", (name, words) => {
    expect(contentPhrase(parseContent(recorded[name], "0"))).toBe(words);
  });

  it("is nothing, or several things, where blkid says so", () => {
    expect(contentPhrase(parseContent("", "2"))).toBe("nothing that blkid recognises");
    expect(contentPhrase(parseContent(ambivalent, "8"))).toMatch(/several things at once.*ext2.*btrfs/);
  });

  it.each(["1", "4", "124", "127"])("is not said to be nothing where blkid ended with %s", (exitCode) => {
    expect(() => parseContent("blkid: error: /dev/nbd0: Input/output error", exitCode)).toThrow(/exit code/);
  });
});

describe("partitions", () => {
  const line = (number: number, content: string, exitCode: number) =>
    `${number} ${2048 * number} 32768 0x83 ${exitCode} ${Buffer.from(content).toString("base64")}`;

  it("are listed with number, size and what they hold", () => {
    const partitions = parsePartitions(
      [line(1, recorded.ext4, 0), line(2, "", 2), line(5, ambivalent, 8)].join("\n"),
    );
    expect(partitions[0]).toMatchObject({
      number: 1,
      start: 2048,
      sectors: 32768,
      content: { type: "ext4" },
    });
    expect(partitionsPhrase(partitions)).toBe(
      '1 (16 MiB, ext4 "my \\"boot"), 2 (16 MiB, type 0x83), 5 (16 MiB, several things at once (filesystem:ext2:1.0 filesystem:btrfs))',
    );
    expect(partitionsPhrase([])).toBe("none");
  });

  it("are not guessed from noise, nor from one that could not be probed", () => {
    expect(() => parsePartitions("1 2048 noise")).toThrow(/unexpected line/);
    expect(() => parsePartitions(line(1, "", 124))).toThrow(/exit code 124/);
  });

  it("come out of the script as partx and blkid have them", () => {
    const stubs = `
      timeout() { shift; "$@"; }
      partx() { printf '1 2048 32768 0x83\\n2 34816 16384 0x82\\n'; }
      blkid() { case "$*" in *"-O 1048576 -S 16777216 "*) echo ID_FS_TYPE=ext4;; *) return 2;; esac; }`;
    const text = execFileSync(
      "sh",
      ["-c", `${emitFunctions}${partitionsFunction}${stubs}\nemit_partitions /dev/x; emit end ""`],
      {
        encoding: "utf8",
      },
    );
    const found = parseFields(text);
    expect(found.get("partitions.rc")).toBe("0");
    expect(partitionsPhrase(parsePartitions(found.get("partitions") ?? ""))).toBe(
      "1 (16 MiB, ext4), 2 (8.0 MiB, type 0x82)",
    );
  });
});

it("makes a label that a guest has filled with escape codes harmless", () => {
  const label = (text: string) => parseContent(`ID_FS_LABEL_ENC=${text}\nID_FS_TYPE=ext4\n`, "0").label;
  expect(label("\\x1b[2J\\x1b]0;owned\\x07\\xc2\\x9b1m")).toBe("?[2J?]0;owned??1m");
});
