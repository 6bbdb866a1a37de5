/** Programs in the documentation: one source for all languages, and held against the types themselves by the tests. */

/** Where an example's property is an output of another of its resources. */
export class OutputOf {
  constructor(
    readonly resource: string,
    readonly output: string,
  ) {}
}

/** Resources of a program by their names. */
export type Example = Readonly<
  Record<string, { readonly type: string; readonly properties: Readonly<Record<string, unknown>> }>
>;
