/** Versions of the tools on a host, and the holes that are known of them. */

/** The first number, dotted or not, in what a program says of its version. */
export function versionIn(text: string): string | undefined {
  // systemd's is one number, and what stands in brackets behind it is its package's.
  return /\d+(?:\.\d+)*/.exec(text)?.[0];
}

/** Negative if `one` is the older version, 0 if they are the same. */
export function compareVersions(one: string, other: string): number {
  const [left, right] = [one, other].map((version) => version.split(".").map(Number));
  for (let at = 0; at < Math.max(left?.length ?? 0, right?.length ?? 0); at++) {
    const difference = (left?.[at] ?? 0) - (right?.[at] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}

interface Hole {
  readonly program: "nbdcopy" | "nbd-server";
  /** For people. */
  readonly name: string;
  readonly what: string;
  /** The version that has it no more, for people. */
  readonly fixedIn: string;
  /** Whether upstream's version of that number has it. */
  affects(version: string): boolean;
  /** What a distribution's changelog says where it has mended an older version itself. */
  readonly mendedAs: readonly string[];
}

const before = (fixed: string) => (version: string) => compareVersions(version, fixed) < 0;

/** Series of libnbd in which an own release mended it, beside 1.11.8. */
const mendedLibnbd = ["1.6.6", "1.8.7", "1.10.4"];

/**
 * Sources: libnbd-security(3) and the tags that hold "Fail nbdcopy if NBD read or write fails"; nbd's issue 137 (its cause came
 * with 3.22) and the announcements of its versions 3.24 and 3.5.
 */
const holes: readonly Hole[] = [
  {
    program: "nbdcopy",
    name: "CVE-2022-0485",
    what: "passes over failed reads and writes in silence, so that an image is spoiled and nobody told",
    fixedIn: "libnbd 1.10.4 (of older series 1.6.6 and 1.8.7)",
    affects: (version) =>
      before("1.11.8")(version) &&
      !mendedLibnbd.some((mended) => series(mended) === series(version) && !before(mended)(version)),
    mendedAs: ["CVE-2022-0485"],
  },
  {
    program: "nbd-server",
    name: "CVE-2022-26495 and CVE-2022-26496",
    what: "lets whoever may connect write over its memory",
    fixedIn: "nbd 3.24",
    affects: before("3.24"),
    mendedAs: ["CVE-2022-26495", "CVE-2022-26496"],
  },
  {
    program: "nbd-server",
    name: "the allow-list bypass of nbd's issue 137",
    what: "lets in any IPv4 client, whatever its allow-list (`authfile`) says, where it listens on IPv6 as well",
    fixedIn: "nbd 3.25",
    affects: (version) => !before("3.22")(version) && before("3.25")(version),
    mendedAs: ["v6-mapped"],
  },
  {
    program: "nbd-server",
    name: "CVE-2013-6410",
    what: "lets in clients whose address only begins like one of its allow-list",
    fixedIn: "nbd 3.5",
    affects: before("3.5"),
    mendedAs: ["CVE-2013-6410"],
  },
];

/** What to look for in changelogs, as one extended regular expression. */
export const mendedPattern = [...new Set(holes.flatMap(({ mendedAs }) => mendedAs))].join("|");

/**
 * The known holes of a program, as sentences that say which version has them no more. `mended`: what the changelog of its
 * package names, since a distribution mends without a new version.
 */
export function holesOf(program: string, version: string, mended: ReadonlySet<string>): string[] {
  return holes
    .filter(
      (hole) =>
        hole.program === program && hole.affects(version) && !hole.mendedAs.every((name) => mended.has(name)),
    )
    .map(({ name, what, fixedIn }) => `${program} ${version} has ${name}: it ${what}; fixed in ${fixedIn}`);
}

function series(version: string): string {
  return version.split(".").slice(0, 2).join(".");
}
