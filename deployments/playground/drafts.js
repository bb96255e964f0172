// Verdicts to drafts: what was judged, cut by cut, and how far it stands.

/**
 * [{base, length, kept, points: [{cut, p, stands}]}], each draft in tokens from its own beginning. A draft begins behind
 * the target's last words; the windows of one draft (mode `progressive`) follow one another without any.
 */
export function drafts(pieces, verdicts) {
  const found = [];
  for (const { start, cuts, correct, kept } of verdicts) {
    const base = behindTheTarget(pieces, start);
    let draft = found.at(-1);
    if (draft?.base !== base) found.push((draft = { base, length: 0, kept: 0, points: [] }));
    const before = start - base; // of the draft, in the windows before this one
    draft.kept = before + kept;
    for (const [place, cut] of cuts.entries()) {
      draft.points.push({ cut: before + cut, p: correct[place], stands: cut <= kept });
      draft.length = before + cut;
    }
  }
  return found;
}

function behindTheTarget(pieces, start) {
  let tokens = 0;
  let base = 0;
  for (const { origin, tokens: count } of pieces) {
    tokens += count;
    if (tokens > start) break;
    if (origin === "target") base = tokens;
  }
  return base;
}
