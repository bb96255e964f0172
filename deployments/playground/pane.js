// Shows one answer: its text while it is generated, and the report at the end.

import { curve, prefixTable, fitted, gantt, nothing, stagesTable } from "./charts.js";
import { byId, element, percent, seconds } from "./dom.js";
import { drafts } from "./drafts.js";
import { explained } from "./problems.js";
import { tokens } from "./session.js";
import { answerText, runs, Transcript } from "./transcript.js";

const STATES = {
  waiting: "waiting for the first answer",
  sent: "sent",
  generating: "generating",
  done: "done",
  stopped: "stopped",
  failed: "failed",
};

export class Pane {
  constructor(mode, { method, name, thresholds, id }) {
    this.mode = mode;
    this.method = method;
    this.name = name;
    this.thresholds = thresholds;
    this.pieces = [];
    this.verdicts = [];
    this.report = null;
    this.shownVerdicts = 0;
    this.axisSeconds = 0; // the length of the time axis
    this.root = byId("pane").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    const title = this.part("h3");
    title.id = `${id}-title`;
    title.textContent = name;
    this.root.dataset.mode = mode;
    this.root.setAttribute("aria-labelledby", title.id);
    this.part(".transcript").setAttribute("aria-label", `Answer, mode ${name}`);
    this.transcript = new Transcript(this.part(".transcript"));
    this.curve = fitted(this.part(".curve .plot"), (width) => this.drawnCurve(width));
    this.stages = fitted(this.part(".stages .plot"), (width) => this.drawnStages(width));
    this.frame = null;
    this.state = "waiting";
  }

  set state(state) {
    this.root.dataset.state = state;
    this.root.setAttribute("aria-busy", String(state === "sent" || state === "generating"));
    this.part(".state").textContent = STATES[state];
  }

  get state() {
    return this.root.dataset.state;
  }

  get text() {
    return answerText(this.pieces);
  }

  take({ piece, verdict, report, finish }) {
    if (this.state === "sent") this.state = "generating";
    if (piece) this.pieces.push(piece);
    if (verdict) this.verdicts.push(verdict);
    if (report) this.ended(report, finish);
    // The pane is drawn at most once per frame, even if many events arrive.
    this.frame ??= requestAnimationFrame(() => this.show());
  }

  show() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.frame = null;
    this.transcript.show(runs(this.pieces, this.verdicts));
    this.drafts = drafts(this.pieces, this.verdicts);
    if (this.shownVerdicts < this.verdicts.length) {
      this.shownVerdicts = this.verdicts.length;
      this.curve.again();
      this.showTable(".curve", prefixTable(this.drafts));
    }
  }

  showTable(chart, table) {
    this.part(`${chart} .table`).replaceChildren(table);
    this.part(`${chart} .numbers`).hidden = false;
  }

  drawnCurve(width) {
    if (this.drafts?.length) return curve(this.drafts, this.thresholds, width);
    if (this.mode === "off" || this.report?.mode === "off") return nothing("The target answers alone, so no draft is verified.");
    if (this.report?.mode === "exact" && this.report.drafted) {
      return nothing("No prefix is verified in this mode. The draft is compared with the target’s own tokens, one by one.");
    }
    return nothing(this.report || this.over ? "No draft was verified." : "The chart appears after the first verification.");
  }

  drawnStages(width) {
    if (!this.report) return nothing(this.over ? "There is no report, because the answer is not complete." : "The chart appears when the answer is complete.");
    const { stages, first_s: first, total_s: total } = this.report;
    return gantt(stages, { first, total, axisSeconds: Math.max(this.axisSeconds, total) }, width);
  }

  /** Sets the length of the time axis, so that two charts have the same scale. */
  setScale(axisSeconds) {
    this.axisSeconds = axisSeconds;
    this.stages.again();
  }

  ended(report, finish) {
    this.report = report;
    this.state = "done";
    const figure = (name, text) => (this.part(`[data-figure=${name}]`).textContent = text);
    figure("total", seconds(report.total_s));
    figure("first", seconds(report.first_s));
    figure("rate", (tokens(report) / Math.max(report.total_s, 1e-9)).toFixed(0));
    figure("share", report.drafted ? percent(report.accepted / report.drafted) : "no draft");
    this.part(".figures").replaceChildren(...figures(report, finish));
    this.part(".report").hidden = false;
    this.showTable(".stages", stagesTable(report.stages));
    this.stages.again();
    this.curve.again();
  }

  stopped() {
    this.over = true;
    this.state = "stopped";
    this.show();
    this.curve.again();
    this.stages.again();
  }

  failed(failure) {
    this.over = true;
    this.state = "failed";
    this.show();
    this.curve.again();
    this.stages.again();
    const { title, advice } = explained(failure);
    const box = this.part(".problem");
    const id = failure.request && element("small", {}, `Look for request ${failure.request} in the server’s log.`);
    box.replaceChildren(
      element("strong", {}, title),
      element("q", {}, failure.message),
      element("span", {}, advice),
      ...(id ? [id] : []),
    );
    box.hidden = false;
  }

  /** The text that screen readers announce at the end of the answer. */
  get summary() {
    const { drafted, accepted, written, total_s: total } = this.report;
    const draft = drafted ? `${accepted} of ${drafted} draft tokens accepted` : "no draft";
    return `Mode ${this.name} is done after ${seconds(total)}: ${draft}, ${written} target tokens.`;
  }

  leave() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.curve.end();
    this.stages.end();
    this.root.remove();
  }
}

/** Returns rows about the token-level method, if one was used. */
function methodRows(speculation) {
  if (!speculation) return [];
  const { method, passes, tokens_per_pass: each, proposed, accepted } = speculation;
  return [
    ["speculation", "method", method, "token-level method of the target"],
    ["passes", "passes", passes, "forward passes while the target generated"],
    ["tokens_per_pass", "tokens per pass", each.toFixed(2), "tokens generated in a forward pass"],
    ["proposed", "proposed tokens", `${accepted} of ${proposed}`, "were accepted"],
  ];
}

function figures(report, finish) {
  const rows = [
    ["mode", "mode", report.mode, "the mode that was used"],
    ["drafted", "draft tokens", report.drafted, "written by the drafter"],
    ["accepted", "accepted tokens", report.accepted, "draft tokens in the answer"],
    ["rejected", "rejected tokens", report.rejected, "draft tokens not in the answer"],
    ["written", "target tokens", report.written, "generated by the target"],
    ["rounds", "rounds", report.rounds, "verified drafts"],
    ["boundary", "accepted prefix", report.boundary ?? "none", "accepted tokens of the first draft"],
    ...methodRows(report.speculation),
    ["cached", "cached tokens", report.cached, "prompt tokens in the prefix cache"],
    ["retries", "retries", report.retries, "lost and repeated calls"],
    ["fallback", "fallback", report.fallback ?? "none", "why there was no draft"],
    ["first_s", "first token", report.first_s.toFixed(4), "seconds until the first token"],
    ["total_s", "total", report.total_s.toFixed(4), "seconds until the end of the answer"],
    ["finish", "finish reason", finish, "why the answer ended"],
  ];
  return rows.map(([name, label, value, meaning]) =>
    element(
      "div",
      {},
      element("dt", {}, label, element("small", {}, meaning)),
      element("dd", { "data-report": name }, String(value)),
    ),
  );
}
