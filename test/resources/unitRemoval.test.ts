/** Units that go together, as their caller has it. */
import { expect, it } from "vitest";
import type { Context } from "../../provider/core/resource.js";
import { removeUnit } from "../../provider/resources/unitRemoval.js";
import { fakeHost } from "../support/fakeHost.js";
import { fields } from "../support/fields.js";

/** Removes so many attachments at once on a host that tells, of those that it is given, as many as it has time for. */
async function removing(count: number, tells: number) {
  const given: number[] = [];
  const host = fakeHost(({ argv }) => {
    const units = argv.filter((_word, at) => at >= 5 && (at - 5) % 5 === 0);
    given.push(units.length);
    return fields({ ...Object.fromEntries(units.slice(0, tells).map((unit) => [unit, "0"])), end: "" });
  });
  const context: Context = {
    host,
    resource: "NbdAttachment vm1",
    signal: new AbortController().signal,
    progress: () => undefined,
    warn: () => undefined,
    open: async () => host,
  };
  const outcomes = await Promise.allSettled(
    Array.from({ length: count }, (_, n) =>
      removeUnit(context, {
        unit: `lvm-nbd-attach-vm${n}.service`,
        path: `/dev/lvm-nbd/vm${n}`,
        mark: "ours",
      }),
    ),
  );
  return {
    given,
    failures: outcomes.flatMap((one) => (one.status === "rejected" ? [String(one.reason)] : [])),
  };
}

it("what a host had no time for is asked again, however many are to go and however slow it is", async () => {
  const { given, failures } = await removing(64, 1);
  expect(failures).toEqual([]);
  expect(given).toHaveLength(64);
  expect(Math.max(...given)).toBe(8);
});

it("a host that tells of none of them is not asked again", async () => {
  const { given, failures } = await removing(3, 0);
  expect(given).toEqual([3]);
  expect(failures).toHaveLength(3);
  for (const failure of failures) expect(failure).toMatch(/OUTPUT_UNREADABLE.*vm0.*vm1.*vm2.*was removed/s);
});
