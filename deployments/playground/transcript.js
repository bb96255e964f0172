// An answer, marked by who wrote it, with what was rejected struck out where it would have stood.

import { element } from "./dom.js";

/**
 * Pieces and verdicts, in any order, to [{kind, text}]: neighbours of one kind are one.
 * What a verdict rejected stands behind the `start` + `kept` tokens of the answer that stand before it.
 */
export function runs(pieces, verdicts) {
  const struck = verdicts
    .filter(({ rejected }) => rejected)
    .map(({ start, kept, rejected }) => ({ at: start + kept, text: rejected }))
    .sort((a, b) => a.at - b.at);
  const found = [];
  let tokens = 0;
  const add = (kind, text) => {
    const last = found.at(-1);
    if (last?.kind === kind && kind !== "rejected") last.text += text;
    else if (text) found.push({ kind, text });
  };
  const strike = (upto) => {
    while (struck.length && struck[0].at <= upto) add("rejected", struck.shift().text);
  };
  for (const { text, origin, tokens: count } of pieces) {
    if (count) strike(tokens); // a piece without tokens is text of those before it, held back until then
    add(origin === "draft" ? "accepted" : "written", text);
    tokens += count;
  }
  strike(tokens);
  return found;
}

const NAMES = { accepted: "draft, accepted", written: "the target’s own", rejected: "draft, rejected" };

/** Shows runs; what has not changed since the last time is left alone. */
export class Transcript {
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  show(found) {
    for (const [place, run] of found.entries()) {
      const old = this.shown[place];
      if (old?.run.kind !== run.kind) {
        for (const { node } of this.shown.splice(place)) node.remove();
        const name = run.kind === "rejected" ? "del" : "span";
        const node = element(name, { class: `run ${run.kind}`, title: NAMES[run.kind] }, run.text);
        // A draft that goes wrong at the end of a line is a paragraph of its own.
        const before = found[place - 1];
        if (run.kind === "rejected" && (!before || before.text.endsWith("\n"))) node.classList.add("block");
        this.root.append(node);
        this.shown.push({ run: { ...run }, node });
      } else if (old.run.text !== run.text) {
        old.node.firstChild.data = old.run.text = run.text;
      }
    }
    for (const { node } of this.shown.splice(found.length)) node.remove();
  }
}

/** The answer alone. */
export const said = (pieces) => pieces.map(({ text }) => text).join("");
