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
    // A window's cuts count from the draft's beginning, or from its own.
    const before = start - base;
    const shift = before && cuts.length && cuts[0] <= before ? before : 0;
    draft.kept = before + kept;
    for (const [place, cut] of cuts.entries()) {
      draft.points.push({ cut: cut + shift, p: correct[place], stands: cut + shift <= draft.kept });
      draft.length = cut + shift;
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
