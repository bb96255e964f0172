// One answer: its words as they come, and what is told of them at the end.

import { curve, cutsTable, fitted, gantt, nothing, stagesTable } from "./charts.js";
import { byId, element, percent, seconds } from "./dom.js";
import { drafts } from "./drafts.js";
import { explained } from "./problems.js";
import { tokens } from "./session.js";
import { runs, said, Transcript } from "./transcript.js";

const STATES = {
  waiting: "waits for the other",
  asked: "asked",
  writing: "writing",
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
    this.judged = 0;
    this.most = 0; // seconds of the stages' axis
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
    this.root.setAttribute("aria-busy", String(state === "asked" || state === "writing"));
    this.part(".state").textContent = STATES[state];
  }

  get state() {
    return this.root.dataset.state;
  }

  get text() {
    return said(this.pieces);
  }

  take({ piece, verdict, report, finish }) {
    if (this.state === "asked") this.state = "writing";
    if (piece) this.pieces.push(piece);
    if (verdict) this.verdicts.push(verdict);
    if (report) this.ended(report, finish);
    // Once for all that came since the screen was last drawn.
    this.frame ??= requestAnimationFrame(() => this.show());
  }

  show() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.frame = null;
    this.transcript.show(runs(this.pieces, this.verdicts));
    this.drafts = drafts(this.pieces, this.verdicts);
    if (this.judged < this.verdicts.length) {
      this.judged = this.verdicts.length;
      this.curve.again();
      this.told(".curve", cutsTable(this.drafts));
    }
  }

  told(chart, table) {
    this.part(`${chart} .table`).replaceChildren(table);
    this.part(`${chart} .numbers`).hidden = false;
  }

  drawnCurve(width) {
    if (this.drafts?.length) return curve(this.drafts, this.thresholds, width);
    if (this.mode === "off" || this.report?.mode === "off") return nothing("The target alone: there is nothing to judge.");
    if (this.report?.mode === "exact" && this.report.drafted) {
      return nothing("Nothing is asked in this mode: the draft’s tokens are held against the target’s own, one by one.");
    }
    return nothing(this.report || this.over ? "No draft was judged." : "Comes with the first verdict.");
  }

  drawnStages(width) {
    if (!this.report) return nothing(this.over ? "Is told at the end of an answer, and there was none." : "Comes with the end of the answer.");
    const { stages, first_s: first, total_s: total } = this.report;
    return gantt(stages, { first, total, most: Math.max(this.most, total) }, width);
  }

  /** Charts side by side have one scale. */
  scaled(most) {
    this.most = most;
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
    this.told(".stages", stagesTable(report.stages));
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
    const id = failure.request && element("small", {}, `Request ${failure.request} in the server’s log`);
    box.replaceChildren(
      element("strong", {}, title),
      element("q", {}, failure.message),
      element("span", {}, advice),
      ...(id ? [id] : []),
    );
    box.hidden = false;
  }

  /** For those who hear the page: once, at the end. */
  get summary() {
    const { drafted, accepted, written, total_s: total } = this.report;
    const draft = drafted ? `${accepted} of ${drafted} drafted tokens accepted` : "no draft";
    return `Mode ${this.name} is done after ${seconds(total)}: ${draft}, ${written} written by the target.`;
  }

  leave() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.curve.end();
    this.stages.end();
    this.root.remove();
  }
}

/** A server that knows of no methods tells nothing of them. */
function passed(speculation) {
  if (!speculation) return [];
  const { method, passes, tokens_per_pass: each, proposed, accepted } = speculation;
  return [
    ["speculation", method, "how the target wrote"],
    ["passes", passes, "of the target, while it wrote"],
    ["tokens_per_pass", each.toFixed(2), "that came of them"],
    ["proposed", `${accepted} of ${proposed}`, "tokens, that were taken"],
  ];
}

function figures(report, finish) {
  const rows = [
    ["mode", report.mode, "what was done"],
    ["drafted", report.drafted, "tokens"],
    ["accepted", report.accepted, "of them"],
    ["rejected", report.rejected, "of them"],
    ["written", report.written, "by the target"],
    ["rounds", report.rounds, "drafts judged"],
    ["boundary", report.boundary ?? "none", "tokens kept of the first draft"],
    ...passed(report.speculation),
    ["cached", report.cached, "tokens of the prompt known before"],
    ["retries", report.retries, "calls made again"],
    ["fallback", report.fallback ?? "none", "why the target went alone"],
    ["first_s", report.first_s.toFixed(4), "seconds to the first words"],
    ["total_s", report.total_s.toFixed(4), "seconds in all"],
    ["finish", finish, "why it ended"],
  ];
  return rows.map(([name, value, meaning]) =>
    element(
      "div",
      {},
      element("dt", {}, name, element("small", {}, meaning)),
      element("dd", { "data-report": name }, String(value)),
    ),
  );
}
