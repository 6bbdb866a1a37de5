/** Locks between scripts on one host. */

/**
 * Shell text that opens a file as descriptor `fd`, for flock. Nobody but root can open it: whoever can read a file can also lock it,
 * and would keep every change of the host waiting. `path`: as it stands in the script, quoted where it has to be.
 */
export function openLock(fd: number, path: string): string {
  return `(umask 077; : >>${path}) && exec ${fd}>>${path}`;
}
