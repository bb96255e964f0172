// Compares two answers to the same question in words.

import { percent, seconds, times } from "./dom.js";
import { tokens } from "./session.js";

const FEW_ACCEPTED = 0.4; // below this share, most of the time spent on the draft is lost
const MANY_PER_PASS = 1.5; // tokens per forward pass from which the target alone is much faster than one at a time

/** Returns how much faster the faster pane is, as {ratio, sentences}. */
export function comparison(a, b) {
  const [fast, slow] = a.report.total_s <= b.report.total_s ? [a, b] : [b, a];
  const sentences = [
    `${fast.name} is faster: it took ${seconds(fast.report.total_s)}, and ${slow.name} took ${seconds(slow.report.total_s)}.`,
    `The ratio in tokens per second is ${times(rate(fast) / rate(slow))}.`,
  ];
  if (fast.mode === "off" && slow.mode !== "off") sentences.push(whyOffIsFaster(slow.report, fast.report));
  sentences.push(a.text === b.text ? "Both texts are identical." : "The texts differ.");
  return { ratio: times(slow.report.total_s / fast.report.total_s), sentences };
}

const rate = ({ report }) => tokens(report) / Math.max(report.total_s, 1e-9);

function whyOffIsFaster(report, off) {
  const { drafted, accepted, fallback } = report;
  if (fallback) return `Drafting saved nothing: ${fallback}.`;
  if (!drafted) return "Drafting saved nothing, because there was no draft.";
  if (accepted / drafted < FEW_ACCEPTED) return `Only ${percent(accepted / drafted)} of the draft was accepted, so most of the drafting was in vain.`;
  const { method, tokens_per_pass: perPass } = off.speculation ?? {};
  if (perPass > MANY_PER_PASS) {
    return `With the method ${method}, the target alone generates ${perPass.toFixed(1)} tokens per forward pass, which leaves little for a draft to save.`;
  }
  return "Drafting and verifying took longer than the target needs for the accepted tokens.";
}
