/** Whether the programs that an operation needs are installed, and what to install where they are not. */

/** Debian's package of each program; RPM distributions mostly name them alike. */
const packageOf: Readonly<Record<string, string>> = {
  nbdkit: "nbdkit",
  "nbd-server": "nbd-server (Debian) or nbd (RPM distributions)",
  "nbd-client": "nbd-client (Debian) or nbd (RPM distributions)",
  "qemu-nbd": "qemu-utils (Debian) or qemu-img (RPM distributions)",
  "qemu-img": "qemu-utils (Debian) or qemu-img (RPM distributions)",
  setpriv: "util-linux",
  nbdinfo: "libnbd-bin (Debian) or libnbd (RPM distributions)",
  nbdcopy: "libnbd-bin (Debian) or libnbd (RPM distributions)",
};

/** Shell function for scripts with `emitFunctions`: `emit_missing PROGRAM...` prints those that are not there. */
export const missingFunction = `
emit_missing() {
  missing=
  for program in "$@"; do command -v "$program" >/dev/null || missing="$missing $program"; done
  emit missing "$missing"
}
`;

/** What `emit_missing` found, as a sentence with the packages; `undefined` when all are there. */
export function missingPrograms(fields: ReadonlyMap<string, string>): string | undefined {
  const missing = (fields.get("missing") ?? "")
    .trim()
    .split(" ")
    .filter((program) => program !== "");
  if (missing.length === 0) return undefined;
  const named = missing.map((program) => `${program}, from package ${packageOf[program] ?? program}`);
  return `not installed on the host: ${named.join("; ")}`;
}
