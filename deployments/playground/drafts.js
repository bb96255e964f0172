// Computes drafts from verifications: P(correct) of each prefix, and how much of each draft was accepted.

/**
 * Returns [{base, length, kept, points: [{prefixLength, p, passes}]}], with lengths in tokens from the start of each draft.
 * A draft starts after the target's last tokens. Between the windows of one draft (mode `progressive`) there are no
 * target tokens.
 */
export function drafts(pieces, verdicts) {
  const drafts = [];
  for (const { start, cuts, correct, kept } of verdicts) {
    const base = endOfTargetTokens(pieces, start);
    let draft = drafts.at(-1);
    if (draft?.base !== base) drafts.push((draft = { base, length: 0, kept: 0, points: [] }));
    const before = start - base; // tokens of the draft in earlier windows
    draft.kept = before + kept;
    for (const [index, cut] of cuts.entries()) {
      draft.points.push({ prefixLength: before + cut, p: correct[index], passes: cut <= kept });
      draft.length = before + cut;
    }
  }
  return drafts;
}

function endOfTargetTokens(pieces, start) {
  let tokens = 0;
  let base = 0;
  for (const { origin, tokens: count } of pieces) {
    tokens += count;
    if (tokens > start) break;
    if (origin === "target") base = tokens;
  }
  return base;
}
