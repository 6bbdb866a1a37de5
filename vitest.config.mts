import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    // Two labs at most at once: each is two guests of one emulated CPU that wait half of the time.
    maxWorkers: 2,
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
