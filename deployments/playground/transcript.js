// Shows an answer: its text is marked by origin, and rejected text is struck out at the end of its sentence.

import { element } from "./dom.js";

/**
 * Merges text deltas and verifications, in any order, to [{kind, text}]. Neighbours of the same kind are joined.
 * A draft is rejected after the first `start` + `kept` tokens of the answer.
 */
export function runs(pieces, verdicts) {
  const struck = verdicts
    .filter(({ rejected }) => rejected)
    .map(({ start, kept, rejected }) => ({ at: start + kept, text: rejected }))
    .sort((a, b) => a.at - b.at);
  const answer = answerText(pieces);
  const spans = [];
  const rejected = []; // [{offset, text}], with offsets in the answer
  let [tokens, offset] = [0, 0];
  const strike = () => {
    while (struck.length && struck[0].at <= tokens) rejected.push({ offset: sentenceEnd(answer, offset), text: struck.shift().text });
  };
  for (const { text, origin, tokens: count } of pieces) {
    if (count) strike(); // a delta without tokens is text of earlier tokens that was held back
    spans.push({ kind: origin === "draft" ? "accepted" : "target", start: offset, end: offset + text.length });
    tokens += count;
    offset += text.length;
  }
  strike();
  return merged(answer, spans, rejected);
}

/** Returns where the sentence ends that contains or begins at an offset. If the offset is between sentences, it is the offset. */
function sentenceEnd(answer, offset) {
  if (!answer.slice(0, offset).trim()) return offset;
  const ends = [...answer.matchAll(/[.!?…]["'’”)\]]*\s+|\n+|[。！？]/g)].map((match) => match.index + match[0].length);
  return ends.find((end) => end >= offset) ?? answer.length;
}

function merged(answer, spans, rejected) {
  const runs = [];
  const add = (kind, text) => {
    const last = runs.at(-1);
    if (last?.kind === kind && kind !== "rejected") last.text += text;
    else if (text) runs.push({ kind, text });
  };
  for (const { kind, start, end } of spans) {
    let from = start;
    while (rejected.length && rejected[0].offset < end) {
      const { offset, text } = rejected.shift();
      add(kind, answer.slice(from, offset));
      add("rejected", text);
      from = offset;
    }
    add(kind, answer.slice(from, end));
  }
  for (const { text } of rejected) add("rejected", text);
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
        this.root.append(node);
        this.shown.push({ run: { ...run }, node });
      } else if (old.run.text !== run.text) {
        old.node.firstChild.data = old.run.text = run.text;
      }
      this.shown[index].node.classList.toggle("block", isBlock(runs, index));
    }
    for (const { node } of this.shown.splice(runs.length)) node.remove();
  }
}

/** Whether a run gets its own paragraph: rejected text between two lines, or at the end. */
function isBlock(runs, index) {
  if (runs[index].kind !== "rejected") return false;
  const before = runs[index - 1];
  return !before || before.text.endsWith("\n") || before.kind === "rejected" || index === runs.length - 1;
}

/** Returns the text of the answer. */
export const answerText = (pieces) => pieces.map(({ text }) => text).join("");
