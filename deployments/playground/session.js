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
    return this.modes.has("off");
  }

  /** Returns [{name, answers, shares, accepted, rate, speedup}], with `off` first. Unknown values are null. */
  rows() {
    const baseline = this.hasBaseline ? rate(this.modes.get("off")) : null;
    return [...this.modes]
      .sort(([a], [b]) => (b === "off") - (a === "off"))
      .map(([name, reports]) => {
        const drafted = sum(reports, ({ drafted }) => drafted);
        return {
          name,
          answers: reports.length,
          shares: reports.filter((one) => one.drafted).map((one) => one.accepted / one.drafted).slice(-SHOWN),
          accepted: drafted ? sum(reports, ({ accepted }) => accepted) / drafted : null,
          rate: rate(reports),
          speedup: baseline ? rate(reports) / baseline : null,
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
            : element("span", { class: "with-chart" }, ratio(speedup, most, { baseline: name === "off" }), element("b", {}, times(speedup))),
        ),
      ),
    );
  }
}

export const tokens = (report) => report.accepted + report.written;

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
const rate = (reports) => sum(reports, tokens) / Math.max(sum(reports, ({ total_s }) => total_s), 1e-9);
