/** Names of our systemd units. */

/**
 * `lvm-nbd-KIND-NAME.service`. Characters that a unit's name may not hold are written `\xHH`, as
 * systemd-escape(1) does.
 */
export function unitName(kind: "export" | "attach", name: string): string {
  const escaped = [...Buffer.from(name, "utf8")]
    .map((byte) => {
      const character = String.fromCharCode(byte);
      return /[A-Za-z0-9:_.-]/.test(character) ? character : `\\x${byte.toString(16).padStart(2, "0")}`;
    })
    .join("");
  return `lvm-nbd-${kind}-${escaped}.service`;
}

/** systemd allows 255 characters in a unit's name. */
export function unitNameProblem(kind: "export" | "attach", name: string): string | undefined {
  return unitName(kind, name).length > 200
    ? `"${name.slice(0, 40)}..." is too long for the name of a systemd unit`
    : undefined;
}
