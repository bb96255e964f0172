from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.tree import TokenTree, chain, suffix_forest, tree_from_parents
from training.verification_tree import trunk_with_suffixes


@dataclass
class Entry:
    """One place of a request's row, by the definition of a forest on a context."""

    token: int
    position: int
    ancestors: list[int]  # the places of all it sees, itself among them


def row(context, tokens, parents, at):
    """The context is a chain; node j hangs below node `parents[j]`, or (-1) on the first `at[j]` of the context."""
    entries = [Entry(token, place, list(range(place + 1))) for place, token in enumerate(context)]
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        seen = list(range(at[node])) if parent < 0 else entries[len(context) + parent].ancestors
        entries.append(Entry(token, len(seen), [*seen, len(context) + node]))
    return entries


@st.composite
def forests(draw):
    """A context, a forest on it, and the same by its definition."""
    context = draw(st.lists(st.integers(0, 9), max_size=20))
    known = len(context)
    trunk = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    suffix = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    width, size = len(suffix), len(trunk)
    kind = draw(st.sampled_from(["tokens", "chain", "probes", "proposals", "probed", "forest"]))
    if kind in ("tokens", "chain"):
        tree = trunk if kind == "tokens" else chain(trunk)
        return context, tree, row(context, trunk, range(-1, size - 1), [known] * size)
    if kind == "probes":
        cuts = draw(st.lists(st.integers(0, known), min_size=1, max_size=4))
        parents = [-1 if j % width == 0 else j - 1 for j in range(width * len(cuts))]
        at = [cut for cut in cuts for _ in suffix]
        return context, suffix_forest(cuts, suffix), row(context, suffix * len(cuts), parents, at)
    if kind == "probed":
        cuts = sorted(draw(st.sets(st.integers(1, size), max_size=4)), reverse=True)
        parents = list(range(-1, size - 1))
        for cut in cuts:
            parents += [cut - 1, *range(len(parents), len(parents) + width - 1)]
        tokens = trunk + suffix * len(cuts)
        return context, trunk_with_suffixes(trunk, cuts, suffix), row(context, tokens, parents, [known] * len(tokens))
    # Trees side by side, each hung on a place of its own.
    parts, tokens, parents, at = [], [], [], []
    for _ in range(draw(st.integers(1, 3)) if kind == "forest" else 1):
        above = [draw(st.integers(-1 if node == 0 else 0, node - 1)) for node in range(draw(st.integers(1, 5)))]
        part, place = tree_from_parents([draw(st.integers(0, 9)) for _ in above], above)
        parts.append(part)
        start, back = len(tokens), np.argsort(place)
        parents += [-1 if above[node] < 0 else start + int(place[above[node]]) for node in back]
        tokens += part.tokens.tolist()
        at += [draw(st.integers(0, known)) if kind == "forest" else known] * len(above)
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    tree = TokenTree(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.end + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.depth for part in parts]),
        np.asarray(at) if kind == "forest" else None,
    )
    return context, tree, row(context, tokens, parents, at)


@given(forests(), st.one_of(st.none(), st.integers(1, 12)), st.data())
def test_wherever_a_row_is_cut_an_entry_sees_its_ancestors_within_the_window(forest, window, data):
    tokens, tree, entries = forest
    context = SequenceState(tokens)
    borders = sorted({0, len(entries), *data.draw(st.lists(st.integers(0, len(entries)), max_size=4))})
    for first, last in pairwise(borders):
        span = ScheduledChunk(context, tree, first, last)
        assert len(span) == last - first
        assert span.token_ids() == [entry.token for entry in entries[first:last]]
        assert span.positions() == [entry.position for entry in entries[first:last]]
        visible = span.visibility(window)
        assert visible.shape == (last - first, last)
        for place in range(first, last):
            reach = window or len(entries)
            assert np.flatnonzero(visible[place - first]).tolist() == [
                seen for seen in entries[place].ancestors if entries[place].position - entries[seen].position < reach
            ]


@given(forests())
def test_a_causal_span_hides_nothing_that_came_before(forest):
    tokens, tree, entries = forest
    for last in range(1, len(entries) + 1):
        span = ScheduledChunk(SequenceState(tokens), tree, 0, last)
        if span.is_causal:
            assert (span.visibility(None) == np.tri(last, dtype=bool)).all()
            assert span.positions() == list(range(last))
