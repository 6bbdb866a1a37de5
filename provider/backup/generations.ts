/** Which generations of a backup should exist now. */

/** How many of each are kept: the newest one of each of so many days, weeks (from Monday), months and years. */
export interface RetentionPolicy {
  readonly daily?: number | undefined;
  readonly weekly?: number | undefined;
  readonly monthly?: number | undefined;
  readonly yearly?: number | undefined;
}

const dayMs = 24 * 3600 * 1000;

/** The period that a day (as milliseconds of its midnight, UTC) belongs to. */
const periods: Readonly<Record<keyof RetentionPolicy, (day: number) => string>> = {
  daily: (day) => keyOf(day),
  // Thursday decides, as in ISO 8601; days since 1970 began on one.
  weekly: (day) => String(Math.floor((day / dayMs + 3) / 7)),
  monthly: (day) => keyOf(day).slice(0, 7),
  yearly: (day) => keyOf(day).slice(0, 4),
};

/**
 * The keys (`YYYY-MM-DD`) of the generations that should exist now, the newest first: today's, and of those that were
 * `made` the newest one of each period that the policy keeps. Pure.
 *
 * Days on which nothing was made count for nothing: after a week of silence as many generations are kept as before. What was
 * not made in time is never asked for later: it would hold another day's data under its name. A second run of the same day
 * yields the same keys. Keys of the future (a clock that was wrong) are kept, and count for nothing.
 *
 * @param policy - at least one number must be 1 or more
 * @param now - the day is that of the local time of this machine (`TZ`)
 * @param made - keys of the generations that exist; see `listImages`
 * @throws Error that says what is wrong with the policy or with a key
 *
 * @example
 * generations({ daily: 7, weekly: 4 }, new Date(), images.map(({ generation }) => generation))
 */
export function generations(policy: RetentionPolicy, now: Date, made: readonly string[]): string[] {
  const rules = Object.entries(policy).filter((rule): rule is [keyof RetentionPolicy, number] => {
    const [name, count] = rule;
    if (!(name in periods))
      throw new Error(`"${name}" is no period: a policy has ${Object.keys(periods).join(", ")}`);
    if (count !== undefined && !(Number.isInteger(count) && count >= 0))
      throw new Error(`${name}: ${count} must be a whole number of generations, 0 or more`);
    return count !== undefined && count > 0;
  });
  if (rules.length === 0)
    throw new Error("the policy keeps nothing: give at least one of daily, weekly, monthly, yearly");
  if (Number.isNaN(now.getTime())) throw new Error("now is no valid time");
  const today = Date.UTC(now.getFullYear(), now.getMonth(), now.getDate());
  const days = [...new Set([today, ...made.map(dayOf)])].sort((one, other) => other - one);
  const kept = new Set(days.filter((day) => day > today));
  for (const [name, count] of rules) {
    const seen = new Set<string>();
    for (const day of days.filter((one) => one <= today)) {
      const period = periods[name](day);
      if (seen.has(period) || seen.size === count) continue;
      seen.add(period);
      kept.add(day);
    }
  }
  return days.filter((day) => kept.has(day)).map(keyOf);
}

function keyOf(day: number): string {
  return new Date(day).toISOString().slice(0, 10);
}

function dayOf(key: string): number {
  const day = /^\d{4}-\d\d-\d\d$/.test(key) ? Date.parse(`${key}T00:00:00Z`) : Number.NaN;
  if (Number.isNaN(day) || keyOf(day) !== key)
    throw new Error(`"${key}" is no generation's key: a day, e.g. "2026-11-30"`);
  return day;
}
