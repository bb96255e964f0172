// The statistics of each mode since the page was opened.

import { percent, element, times } from "./dom.js";
import { ratio, sparkline } from "./charts.js";

const SHOWN = 40; // the maximum number of answers in a chart, which is about 130 pixels wide

export class Session {
  constructor() {
    this.modes = new Map(); // the reports of each mode, in order
  }

  take(name, report) {
    if (!this.modes.has(name)) this.modes.set(name, []);
    this.modes.get(name).push(report);
  }

  get hasBaseline() {
    return [...this.modes.keys()].every((name) => this.baseline(name));
  }

  /** Returns the answers of mode `off` with the same method, or else with the default method. */
  baseline(name) {
    const method = name.replace(/, own draft$/, "").replace(/^[^,]+/, "");
    return this.modes.get(`off${method}`) ?? this.modes.get("off");
  }

  /** Returns [{name, answers, shares, accepted, rate, speedup}], with `off` first. Unknown values are null. */
  rows() {
    return [...this.modes]
      .sort(([a], [b]) => isBaseline(b) - isBaseline(a))
      .map(([name, reports]) => {
        const drafted = sum(reports, ({ drafted }) => drafted);
        const baseline = this.baseline(name);
        return {
          name,
          answers: reports.length,
          shares: reports.filter((one) => one.drafted).map((one) => one.accepted / one.drafted).slice(-SHOWN),
          accepted: drafted ? sum(reports, ({ accepted }) => accepted) / drafted : null,
          rate: rate(reports),
          speedup: baseline && rate(baseline) ? rate(reports) / rate(baseline) : null,
        };
      });
  }

  drawn() {
    const rows = this.rows();
    const most = Math.max(1, ...rows.map(({ speedup }) => speedup ?? 0));
    return rows.map(({ name, answers, shares, accepted, rate: speed, speedup }) =>
      element(
        "tr",
        { "data-mode": name },
        element("th", { scope: "row" }, name),
        element("td", { class: "number" }, String(answers)),
        element(
          "td",
          {},
          accepted === null
            ? element("span", { class: "faint" }, "no drafts")
            : element("span", { class: "with-chart" }, sparkline(shares), element("b", {}, percent(accepted))),
        ),
        element("td", { class: "number" }, speed.toFixed(0)),
        element(
          "td",
          { "data-figure": "speedup" },
          speedup === null
            ? element("span", { class: "faint" }, "unknown")
            : element("span", { class: "with-chart" }, ratio(speedup, most, { baseline: isBaseline(name) }), element("b", {}, times(speedup))),
        ),
      ),
    );
  }
}

const isBaseline = (name) => name === "off" || name.startsWith("off, ");

export const tokens = (report) => report.accepted + report.written;

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
const rate = (reports) => sum(reports, tokens) / Math.max(sum(reports, ({ total_s }) => total_s), 1e-9);
