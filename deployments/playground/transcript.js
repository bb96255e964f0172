// Shows an answer: its text is marked by origin, and rejected text is struck out at its place.

import { element } from "./dom.js";

/**
 * Merges text deltas and verifications, in any order, to [{kind, text}]. Neighbours of the same kind are joined.
 * Rejected text comes after the first `start` + `kept` tokens of the answer.
 */
export function runs(pieces, verdicts) {
  const struck = verdicts
    .filter(({ rejected }) => rejected)
    .map(({ start, kept, rejected }) => ({ at: start + kept, text: rejected }))
    .sort((a, b) => a.at - b.at);
  const runs = [];
  let tokens = 0;
  const add = (kind, text) => {
    const last = runs.at(-1);
    if (last?.kind === kind && kind !== "rejected") last.text += text;
    else if (text) runs.push({ kind, text });
  };
  const strike = (upto) => {
    while (struck.length && struck[0].at <= upto) add("rejected", struck.shift().text);
  };
  for (const { text, origin, tokens: count } of pieces) {
    if (count) strike(tokens); // a delta without tokens is text of earlier tokens that was held back
    add(origin === "draft" ? "accepted" : "target", text);
    tokens += count;
  }
  strike(tokens);
  return runs;
}

const NAMES = { accepted: "draft tokens, accepted", target: "target tokens", rejected: "draft tokens, rejected" };

/** Shows runs. Elements of unchanged runs are not replaced. */
export class Transcript {
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  show(runs) {
    for (const [index, run] of runs.entries()) {
      const old = this.shown[index];
      if (old?.run.kind !== run.kind) {
        for (const { node } of this.shown.splice(index)) node.remove();
        const name = run.kind === "rejected" ? "del" : "span";
        const node = element(name, { class: `run ${run.kind}`, title: NAMES[run.kind] }, run.text);
        // Text that is rejected at the start of a line gets its own paragraph.
        const before = runs[index - 1];
        if (run.kind === "rejected" && (!before || before.text.endsWith("\n"))) node.classList.add("block");
        this.root.append(node);
        this.shown.push({ run: { ...run }, node });
      } else if (old.run.text !== run.text) {
        old.node.firstChild.data = old.run.text = run.text;
      }
    }
    for (const { node } of this.shown.splice(runs.length)) node.remove();
  }
}

/** Returns the text of the answer. */
export const answerText = (pieces) => pieces.map(({ text }) => text).join("");
