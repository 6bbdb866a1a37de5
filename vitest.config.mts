import { defineConfig } from "vitest/config";
import { BaseSequencer, type TestSpecification } from "vitest/node";

/** Files that take minutes, the longest first: begun last, one of them would keep a single worker busy at the end. */
const longest = [
  "lab/nightly",
  "lab/faults/storage",
  "lab/faults/network",
  "lab/tls",
  "lab/refusals",
  "lab/faults/copy",
  "lab/plugin",
  "lab/mount",
  "lab/package",
  "fakehost/backupImage",
  "lab/faults/hosts",
  "lab/inPlace",
  "lab/attacks",
  "lab/configuredHosts",
  "lab/yaml",
  "lab/restore",
  "lab/secrets",
  "lab/drift",
  "lab/driftWatch",
  "lab/hostSetup",
  "lab/copyVolume",
  "fakehost/cuts",
  "fakehost/model",
  "lab/chain",
  "lab/reboot",
  "resources/copiedVolume",
  "fakehost/restore",
  "fakehost/restoreModel",
  "resources/volumeCopy",
  "resources/hostSetup",
  "resources/imageRestore",
  "resources/mount",
];

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const rank = ({ moduleId }: TestSpecification): number => {
      const at = longest.findIndex((name) => moduleId.endsWith(`/test/${name}.test.ts`));
      return at === -1 ? longest.length : at;
    };
    return (await super.sort(files)).sort((one, other) => rank(one) - rank(other));
  }
}

export default defineConfig({
  test: {
    // Labs at once: each is two guests of one emulated CPU, of which mostly one works while the other waits. Two left a third of two cores idle.
    maxWorkers: 3,
    sequence: { sequencer: LongestFirst },
    coverage: {
      provider: "v8",
      include: ["provider/**/*.ts"],
      reporter: ["text", "lcovonly"],
    },
    projects: [
      {
        extends: true,
        test: { name: "unit", include: ["test/**/*.test.ts"], exclude: ["test/lab/**"], testTimeout: 30_000 },
      },
      {
        extends: true,
        test: {
          name: "lab",
          include: ["test/lab/**/*.test.ts"],
          globalSetup: ["test/lab/globalSetup.mts"],
          testTimeout: 240_000,
          hookTimeout: 300_000,
        },
      },
    ],
  },
});
