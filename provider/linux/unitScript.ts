/** What the scripts that write units share. */

/** Exit code of a script that found another unit than the one that was seen, and changed nothing. */
export const changedMeanwhile = 77;

/**
 * Shell functions for scripts. `lock`: one of them at a time on the host. `own NAME FILE`: a directive of our own
 * section. `guard FILE MARK...`: ends the script with `changedMeanwhile` unless there is no such file or it
 * carries one of the marks ("" for none). `receive FILE BYTES`: stdin as that file, on the disk; fails if a link that
 * broke has cut it short.
 */
export const unitFunctions = `
lock() { exec 9>/run/lvm-nbd.lock && flock -w 120 9 || { echo "another unit is being written for more than 120 s" >&2; exit 1; }; }
own() { sed -n '/^\\[X-LvmNbd\\]/,$s/^'"$1"'=//p' "$2"; }
guard() {
  [ -e "$1" ] || return 0
  guard_mark=$(own Mark "$1"); shift
  for guard_one in "$@"; do [ "$guard_mark" != "$guard_one" ] || return 0; done
  exit ${changedMeanwhile}
}
receive() {
  cat >"$1" && [ "$(wc -c <"$1")" -eq "$2" ] && sync "$1" && return 0
  rm -f "$1"; echo "what was to be written did not arrive whole" >&2; return 1
}
`;

/**
 * The marks that `guard` lets pass: ours and what was seen. For what was not there nothing passes: what has
 * appeared since, even of our own (a script whose link was lost goes on), must be looked at first.
 */
export function expectedMarks(
  own: string,
  seen: { readonly mark: string | undefined } | undefined,
): [string, string] {
  return seen === undefined ? ["absent", "absent"] : [own, seen.mark ?? ""];
}
