/**
 * What of a snapshot is zero, found where it lies, so that a copy need not have it sent. A block device tells no holes, and no NBD server
 * looks for zeros in what it reads. Sources: nbdkit-extentlist-filter(1), perlfunc(1), dd(1).
 */
import { hostScript } from "../core/hostCommands.js";
import { quote } from "../ssh/quoting.js";
import { deviceNodeFunction } from "./deviceCopy.js";
import { aliveSeconds } from "./holders.js";

/** Ranges of so many bytes are looked at: a request of nbdcopy's is a quarter of that, and a file system's data seldom lies closer. */
const stepBytes = 1024 ** 2;

/** So many ranges at most are told: shorter ones than this share of a large volume are copied. */
const mostRanges = 4096;

/** After which the look ends at the latest, with what was found until then. */
const zeroSeconds = 1800;

/** The bound of a command that looks at a device of that size: beyond it, the look hangs. */
export function zeroDeadline(sizeBytes: number): number {
  return Math.min(zeroSeconds, 5 + Math.ceil(sizeBytes / (100 * 1024 ** 2))) + 300;
}

/**
 * Prints `OFFSET LENGTH` of ranges that were read and are zero. Arguments: device, bytes. Nothing where there is no perl, which reads
 * without a process for each range. Of what is not zero only the beginning is read, and what is zero is not read again by the copy: so it
 * ends early only where it finds less than 100 MiB/s beside a second for each 8 GiB. What it read does not stay in the page cache, which is
 * the VMs'. A range that cannot be read, or not whole, passes for data. Empty lines say that it is on its way, as of `checkDeviceScript`.
 */
export const zeroRangesScript = hostScript(
  "zero-ranges",
  "observe",
  `${deviceNodeFunction}
device_node "$1" || { echo "$1 is not a block device" >&2; exit 1; }
command -v perl >/dev/null || exit 0
exec perl -e '
my ($path, $size, $began, $found, $seen, $from) = (@ARGV, time, 0, 0);
my $told = $began;
$| = 1;
my ($step, $page) = (${stepBytes}, 4096);
my $zeros = "\\0" x $step;
open(my $device, "<:raw", $path) or exit 0;
sub say_line { $told = time; print @_, "\\n" or exit 1; }
sub zero {
  my ($at, $length) = @_;
  sysseek($device, $at, 0) or return 0;
  my $read = sysread($device, my $bytes, $length);
  $seen += $read if $read;
  return defined($read) && $read == $length && $bytes eq substr($zeros, 0, $length);
}
sub tell_until {
  my $to = shift;
  say_line("$from " . ($to - $from)) if defined $from && $to - $from >= $size / ${mostRanges};
  undef $from;
}
sub forget { system("dd", "if=$path", "iflag=nocache", "count=0", "status=none"); $seen = 0; }
my $at = 0;
while ($at < $size) {
  my $spent = time - $began;
  last if $spent > ${zeroSeconds} or $spent > 5 + $size / (8 << 30) + $found / (100 << 20);
  my $length = $size - $at < $step ? $size - $at : $step;
  if (zero($at, $length < $page ? $length : $page) && zero($at, $length)) {
    $from = $at unless defined $from;
    $found += $length;
  } else { tell_until($at); }
  forget() if $seen >= 256 << 20;
  say_line() if time - $told >= ${aliveSeconds};
  $at += $length;
}
tell_until($at);
forget();
say_line("end");
' "$node" "$2"
`,
  ["path", "number"],
);

/** Bytes from `offset` on. */
export interface ZeroRange {
  readonly offset: number;
  readonly length: number;
}

/** Reads what `zeroRangesScript` prints of a device of that size. Throws if that was cut, or cannot be. */
export function parseZeroRanges(text: string, sizeBytes: number): ZeroRange[] {
  if (text === "") return [];
  const lines = text.split("\n").filter((line) => line !== "");
  if (!text.endsWith("\n") || lines.pop() !== "end") throw new Error("what is zero was not told to its end");
  let end = 0;
  return lines.map((line) => {
    const match = /^(\d+) (\d+)$/.exec(line);
    const range = { offset: Number(match?.[1] ?? Number.NaN), length: Number(match?.[2] ?? Number.NaN) };
    if (!(range.offset >= end && range.length > 0 && range.offset + range.length <= sizeBytes))
      throw new Error(`"${line}" is no range of ${sizeBytes} bytes behind byte ${end}`);
    end = range.offset + range.length;
    return range;
  });
}

/** Of less than this it does not pay to have every byte pass through one more program. */
const leastShare = 1 / 4;

/**
 * All of the source as nbdkit's extentlist filter reads it, what is zero as holes; "" where that is too little. What is not listed the
 * filter takes for a hole: so every byte is.
 */
export function extentList(zeros: readonly ZeroRange[], sizeBytes: number): string {
  const empty = zeros.reduce((sum, { length }) => sum + length, 0);
  if (empty < sizeBytes * leastShare) return "";
  const lines: string[] = [];
  let at = 0;
  const data = (end: number) => {
    if (end > at) lines.push(`${at} ${end - at}`);
  };
  for (const { offset, length } of zeros) {
    data(offset);
    lines.push(`${offset} ${length} hole,zero`);
    at = offset + length;
  }
  data(sizeBytes);
  return `${lines.join("\n")}\n`;
}

/** A job whose copy does not ask for what the list calls a hole. */
export function withExtents(list: string, job: string): string {
  return list === "" ? job : `extents=${quote(list)}\n${job}`;
}
