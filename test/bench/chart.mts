/** Bars as an SVG: groups of them side by side, one colour for each side of a comparison. */

/** Bars of one colour, by group. A group without a value has no bar. */
export interface Series {
  readonly name: string;
  readonly values: Readonly<Record<string, number>>;
}

export interface Panel {
  readonly title: string;
  readonly series: readonly Series[];
}

const colours = ["#1b6ca8", "#6bb1de", "#d9822b", "#8a8a8a", "#5b8c5a", "#9b5fa8"];
const [barWidth, groupGap, plotHeight, labelHeight, titleHeight, margin] = [26, 34, 200, 26, 60, 24];

/** `unit`: of the values, for people. */
export function barChart(
  title: string,
  unit: string,
  groups: readonly string[],
  panels: readonly Panel[],
): string {
  const width = Math.max(
    ...panels.map(({ series }) => groups.length * (series.length * barWidth + groupGap)),
  );
  const names = [...new Set(panels.flatMap(({ series }) => series.map(({ name }) => name)))];
  const panelHeight = titleHeight + plotHeight + labelHeight;
  const legendTop = margin + 24;
  const top = legendTop + names.length * 18 + 8;
  const parts = [text(margin, margin, title, "bold 15px")];
  for (const [n, name] of names.entries()) {
    const y = legendTop + n * 18;
    parts.push(rectangle(margin, y - 10, 12, 12, colourOf(names, name)), text(margin + 18, y, name));
  }
  for (const [n, panel] of panels.entries())
    parts.push(...panelParts(panel, names, groups, unit, top + n * panelHeight));
  const height = top + panels.length * panelHeight + margin;
  const whole = width + 2 * margin;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${whole} ${height}" width="${whole}" height="${height}" font-family="sans-serif">`,
    rectangle(0, 0, whole, height, "#ffffff"),
    ...parts,
    "</svg>",
    "",
  ].join("\n");
}

function panelParts(
  { title, series }: Panel,
  names: readonly string[],
  groups: readonly string[],
  unit: string,
  top: number,
): string[] {
  const most = Math.max(...series.flatMap(({ values }) => Object.values(values)));
  const floor = top + titleHeight + plotHeight;
  const parts = [text(margin, top + 24, `${title} (${unit})`, "bold 13px")];
  const groupWidth = series.length * barWidth + groupGap;
  for (const [g, group] of groups.entries()) {
    const left = margin + g * groupWidth;
    parts.push(text(left, floor + 18, group));
    for (const [s, { name, values }] of series.entries()) {
      const value = values[group];
      if (value === undefined) continue;
      const x = left + s * barWidth;
      const height = (value / most) * plotHeight;
      parts.push(
        rectangle(x, floor - height, barWidth - 4, height, colourOf(names, name)),
        text(x, floor - height - 4, value < 10 ? value.toFixed(1) : value.toFixed(0), "11px"),
      );
    }
  }
  return parts;
}

function colourOf(names: readonly string[], name: string): string {
  return colours[names.indexOf(name) % colours.length] ?? "";
}

function rectangle(x: number, y: number, width: number, height: number, fill: string): string {
  return `<rect x="${x}" y="${y.toFixed(1)}" width="${width}" height="${height.toFixed(1)}" fill="${fill}"/>`;
}

function text(x: number, y: number, content: string, font = "12px"): string {
  const [weight, size] = font.includes(" ") ? font.split(" ") : ["normal", font];
  const escaped = content.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  return `<text x="${x}" y="${y.toFixed(1)}" font-size="${size}" font-weight="${weight}">${escaped}</text>`;
}
