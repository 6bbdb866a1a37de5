/** An operation that failed after it made something. Pulumi keeps `state`; the next `up` goes on from it. */
export class PartialFailure extends Error {
  constructor(
    readonly id: string,
    readonly state: Readonly<Record<string, unknown>>,
    override readonly cause: unknown,
  ) {
    super(cause instanceof Error ? cause.message : String(cause));
    this.name = "PartialFailure";
  }
}
