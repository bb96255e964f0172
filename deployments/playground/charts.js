// Draws small charts with a given width. The page shows a table with the same data next to each chart.

import { chance, element, percent, seconds, svg, table } from "./dom.js";

const LEFT = 38;
const RIGHT = 8;
// The axis shows log-odds, so that the difference between 0.93 and 0.99 is visible.
const [LOW, HIGH] = [0.005, 0.9995];
const TICKS = [0.01, 0.1, 0.5, 0.9, 0.99];
const odds = (p) => Math.log(p / (1 - p));
const height = (p, top, bottom) => {
  const inside = Math.min(Math.max(p, LOW), HIGH);
  return bottom - ((odds(inside) - odds(LOW)) / (odds(HIGH) - odds(LOW))) * (bottom - top);
};
const n = (x) => Math.round(x * 10) / 10;

/** Draws P(correct) of every prefix of every draft. `thresholds` is {full, prefix}; an unknown threshold is null. */
export function curve(drafts, thresholds, width) {
  const [top, bottom, total] = [12, 120, 152];
  const gap = 22;
  const plotWidth = width - LEFT - RIGHT - gap * (drafts.length - 1);
  const tokens = drafts.reduce((sum, { length }) => sum + Math.max(length, 1), 0);
  const plot = svg("svg", {
    class: "curve-plot",
    width,
    height: total,
    viewBox: `0 0 ${width} ${total}`,
    role: "img",
    "aria-label": described(drafts, thresholds),
  });
  for (const p of TICKS) {
    const y = n(height(p, top, bottom));
    plot.append(
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
      svg("text", { class: "tick", x: LEFT - 7, y: y + 3.5, "text-anchor": "end" }, String(p)),
    );
  }
  let x0 = LEFT;
  for (const [number, draft] of drafts.entries()) {
    const wide = (plotWidth * Math.max(draft.length, 1)) / tokens;
    const x = (token) => n(x0 + (wide * token) / Math.max(draft.length, 1));
    const edge = x(draft.kept);
    plot.append(
      svg("rect", { class: "zone kept", x: x0, y: top, width: n(edge - x0), height: bottom - top }),
      svg("rect", { class: "zone lost", x: edge, y: top, width: n(Math.max(x0 + wide - edge, 0)), height: bottom - top }),
      svg("line", { class: "edge", x1: edge, x2: edge, y1: top - 4, y2: bottom + 4 }),
    );
    const evaluated = draft.points.filter(({ p }) => p !== null);
    const path = evaluated.map(({ prefixLength, p }, at) => `${at ? "L" : "M"}${x(prefixLength)} ${n(height(p, top, bottom))}`).join("");
    if (path) plot.append(svg("path", { class: "line", d: path }));
    for (const { prefixLength, p, passes } of draft.points) plot.append(point(x(prefixLength), p, passes, top, bottom, prefixLength));
    const labels = axis(draft, x, x0 + wide);
    const name = drafts.length > 1 ? `draft ${number + 1}` : "tokens of the draft";
    plot.append(...labels, svg("text", { class: "axis", x: n(x0 + wide / 2), y: total - 2, "text-anchor": "middle" }, name));
    x0 += wide + gap;
  }
  plot.append(...lines(thresholds, width, top, bottom));
  return plot;
}

function point(x, p, passes, top, bottom, prefixLength) {
  const y = n(p === null ? bottom : height(p, top, bottom));
  const kind = p === null ? "unverified" : passes ? "passes" : "fails";
  const label = svg("title", {}, `prefix of ${prefixLength} tokens: ${chance(p)}`);
  // The shape also shows the result: a disc passes, a cross fails, and a bar was not evaluated.
  const shape = { passes: `M${x - 3.2} ${y}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0`, unverified: `M${x} ${y - 4}v8` };
  const cross = `M${x - 3} ${y - 3}l6 6m0 -6l-6 6`;
  return svg("path", { class: `prefix-point ${kind}`, d: shape[kind] ?? cross, "data-p": p ?? "" }, label);
}

/** Labels the axis with 0, the accepted length and the length of the draft, if these labels do not overlap. */
function axis({ kept, length }, x, end) {
  const text = (token, anchor) => svg("text", { class: "tick", x: x(token), y: 135, "text-anchor": anchor }, String(token));
  const labels = [];
  if (x(kept) - x(0) > 24 || kept === 0) labels.push(text(0, "middle"));
  if (kept > 0 && end - x(kept) > 26) labels.push(text(kept, "middle"));
  if (end - x(0) > 20) labels.push(text(length, "end"));
  return labels;
}

function lines({ full, prefix }, width, top, bottom) {
  const thresholds = Object.entries({ full, prefix }).filter(([, p]) => p !== null);
  const heights = Object.fromEntries(thresholds.map(([name, p]) => [name, height(p, top, bottom)]));
  const below = { full: "prefix", prefix: "full" };
  return thresholds.flatMap(([name, p]) => {
    const y = n(heights[name]);
    const other = heights[below[name]];
    // If the two lines are close together, one label is above its line and the other one below.
    const under = other !== undefined && Math.abs(other - y) < 26 && (other < y || (other === y && name === "prefix"));
    return [
      svg("line", { class: `threshold ${name}`, x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
      svg("text", { class: "threshold-name", x: width - RIGHT, y: under ? y + 12 : y - 4, "text-anchor": "end" }, `${name} ${p}`),
    ];
  });
}

function described(drafts, { full, prefix }) {
  const parts = drafts.map(({ points, kept, length }, at) => {
    const evaluated = points.filter(({ p }) => p !== null);
    const last = evaluated.findLast(({ passes }) => passes);
    const next = evaluated.find(({ passes }) => !passes);
    const sentences = [`Draft ${at + 1}: ${points.length} prefixes, ${kept} of ${length} tokens accepted`];
    if (last) sentences.push(`P(correct) is ${chance(last.p)} for the last prefix that passes`);
    if (next) sentences.push(`P(correct) is ${chance(next.p)} for the first prefix that fails`);
    return sentences.join(", ");
  });
  const thresholds = Object.entries({ full, prefix }).filter(([, p]) => p !== null);
  if (thresholds.length) parts.push(`Thresholds: ${thresholds.map(([name, p]) => `${name} ${p}`).join(", ")}`);
  return `P(correct) of each prefix. ${parts.join(". ")}.`;
}

export function prefixTable(drafts) {
  const rows = drafts.flatMap(({ points }, at) =>
    points.map(({ prefixLength, p, passes }) => [`${at + 1}`, `${prefixLength}`, chance(p), passes ? "passes" : "fails"]),
  );
  return table("P(correct) of each prefix", ["Draft", "Tokens", "P(correct)", "Result"], rows);
}

/** The API's names of the stages, with the labels that the page shows. */
const STAGES = { queue: "queue", warm: "prefill", draft: "draft", judge: "verify", write: "generate" };

/** Draws when each stage ran. `axisSeconds` is the length of the axis. Charts with the same length are comparable. */
export function gantt(stages, { first, total, axisSeconds }, width) {
  const [row, thick, top, left] = [19, 11, 16, 58];
  const bottom = top + row * Object.keys(STAGES).length;
  const high = bottom + 20;
  const end = width - 58;
  const x = (s) => n(left + ((end - left) * s) / Math.max(axisSeconds, 1e-9));
  const sums = sumsOf(stages);
  const used = Object.entries(STAGES).filter(([name]) => sums[name] !== undefined);
  const label = used.map(([name, shown]) => `${shown} ${seconds(sums[name])}`);
  const plot = svg("svg", {
    class: "gantt",
    width,
    height: high,
    viewBox: `0 0 ${width} ${high}`,
    role: "img",
    "aria-label": `Stages: ${label.join(", ")}. They overlap. First token after ${seconds(first)}, total ${seconds(total)}.`,
  });
  for (const tick of ticks(axisSeconds)) {
    plot.append(
      svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: bottom }),
      svg("text", { class: "tick", x: x(tick), y: bottom + 14, "text-anchor": "middle" }, tick ? seconds(tick) : "0"),
    );
  }
  const flip = x(first) > width - 150;
  plot.append(
    svg("line", { class: "edge", x1: x(first), x2: x(first), y1: top - 5, y2: bottom }),
    svg("text", { class: "tick", x: x(first) + (flip ? -5 : 5), y: top - 4, "text-anchor": flip ? "end" : "start" }, "first token"),
  );
  for (const [index, [name, shown]] of Object.entries(STAGES).entries()) {
    const y = top + row * index;
    const wasUsed = sums[name] !== undefined;
    const style = wasUsed ? "tick stage" : "tick stage unused";
    plot.append(svg("text", { class: style, x: left - 8, y: y + row / 2 + 3.5, "text-anchor": "end" }, shown));
    const own = stages.filter((stage) => stage.name === name);
    for (const { start, end: until } of own) {
      const bar = { class: `bar ${name}`, x: x(start), y: y + (row - thick) / 2, height: thick, rx: 2 };
      plot.append(svg("rect", { ...bar, width: n(Math.max(x(until) - x(start), 1.5)) }));
    }
    if (wasUsed) {
      const last = Math.max(...own.map((stage) => stage.end));
      const after = x(last) + 6;
      const crossed = after < x(first) + 3 && x(first) < after + 46;
      plot.append(svg("text", { class: "tick sum", x: crossed ? x(first) + 5 : after, y: y + row / 2 + 3.5 }, seconds(sums[name])));
    }
  }
  return plot;
}

function sumsOf(stages) {
  const sums = {};
  for (const { name, start, end } of stages) sums[name] = (sums[name] ?? 0) + end - start;
  return sums;
}

function ticks(axisSeconds) {
  const raw = axisSeconds / 4;
  const power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= raw) ?? raw;
  return Array.from({ length: Math.floor(axisSeconds / step + 1e-9) + 1 }, (_, k) => k * step);
}

export function stagesTable(stages) {
  const rows = stages.map(({ name, start, end }) => [STAGES[name] ?? name, seconds(start), seconds(end), seconds(end - start)]);
  return table("Stages by start", ["Stage", "Start", "End", "Duration"], rows);
}

/** Draws the acceptance of consecutive answers. */
export function sparkline(shares, width = 132, high = 26) {
  const x = (at) => n(shares.length > 1 ? 5 + ((width - 10) * at) / (shares.length - 1) : width / 2);
  const y = (share) => n(high - 4 - (high - 8) * share);
  const path = shares.map((share, at) => `${at ? "L" : "M"}${x(at)} ${y(share)}`).join("");
  return svg(
    "svg",
    { class: "spark", width, height: high, viewBox: `0 0 ${width} ${high}`, "aria-hidden": "true" },
    svg("line", { class: "grid", x1: 0, x2: width, y1: y(1), y2: y(1) }),
    svg("line", { class: "grid", x1: 0, x2: width, y1: y(0), y2: y(0) }),
    svg("path", { class: "line", d: path }),
    ...shares.map((share, at) =>
      svg("circle", { class: "dot", cx: x(at), cy: y(share), r: 2.6 }, svg("title", {}, percent(share))),
    ),
  );
}

/** Draws a bar from 0 to the value, with a line at 1, which is the speed of mode `off`. */
export function ratio(value, most, { baseline = false, width = 190, high = 16 } = {}) {
  const x = (amount) => n((width * amount) / Math.max(most, 1));
  const kind = baseline ? " baseline" : value < 1 ? " slower" : "";
  return svg(
    "svg",
    { class: `ratio${kind}`, width, height: high, viewBox: `0 0 ${width} ${high}`, "aria-hidden": "true" },
    svg("rect", { class: "track", x: 0, y: 3, width, height: high - 6, rx: 2 }),
    svg("rect", { class: "fill", x: 0, y: 3, width: x(value), height: high - 6, rx: 2 }),
    svg("line", { class: "edge", x1: x(1), x2: x(1), y1: 0, y2: high }),
  );
}

/** Draws a chart into a box, and again whenever the width of the box changes. */
export function fitted(box, draw) {
  let drawn = 0;
  const watch = new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (width > 0 && width !== drawn) {
      drawn = width;
      box.replaceChildren(draw(Math.max(width, 220)));
    }
  });
  watch.observe(box);
  return {
    again: () => {
      drawn = Math.floor(box.clientWidth);
      if (drawn > 0) box.replaceChildren(draw(Math.max(drawn, 220)));
    },
    end: () => watch.disconnect(),
  };
}

export const nothing = (text) => element("p", { class: "help" }, text);
