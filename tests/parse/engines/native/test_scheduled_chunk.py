from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.tree import TokenTree, chain, suffix_forest, tree_from_parents, trunk_with_suffixes


@dataclass
class Entry:
    """One entry of a request's row, by the definition of a forest attached to a context."""

    token: int
    position: int
    ancestors: list[int]  # all entries that it sees, including itself


def row(prompt, tokens, parents, at):
    """The prompt is a chain; the parent of node j is node `parents[j]`, or (-1) the prompt up to `at[j]`."""
    entries = [Entry(token, place, list(range(place + 1))) for place, token in enumerate(prompt)]
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        visible = list(range(at[node])) if parent < 0 else entries[len(prompt) + parent].ancestors
        entries.append(Entry(token, len(visible), [*visible, len(prompt) + node]))
    return entries


@st.composite
def forests(draw):
    """A prompt, a forest attached to it, and the row of both by its definition."""
    prompt = draw(st.lists(st.integers(0, 9), max_size=20))
    length = len(prompt)
    trunk = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    suffix = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    width, size = len(suffix), len(trunk)
    kind = draw(st.sampled_from(["tokens", "chain", "suffixes", "proposals", "trunk with suffixes", "forest"]))
    if kind in ("tokens", "chain"):
        tree = trunk if kind == "tokens" else chain(trunk)
        return prompt, tree, row(prompt, trunk, range(-1, size - 1), [length] * size)
    if kind == "suffixes":
        prefix_lengths = draw(st.lists(st.integers(0, length), min_size=1, max_size=4))
        parents = [-1 if j % width == 0 else j - 1 for j in range(width * len(prefix_lengths))]
        at = [prefix_length for prefix_length in prefix_lengths for _ in suffix]
        return prompt, suffix_forest(prefix_lengths, suffix), row(prompt, suffix * len(prefix_lengths), parents, at)
    if kind == "trunk with suffixes":
        prefix_lengths = sorted(draw(st.sets(st.integers(1, size), max_size=4)), reverse=True)
        parents = list(range(-1, size - 1))
        for prefix_length in prefix_lengths:
            parents += [prefix_length - 1, *range(len(parents), len(parents) + width - 1)]
        tokens = trunk + suffix * len(prefix_lengths)
        return (
            prompt,
            trunk_with_suffixes(trunk, prefix_lengths, suffix),
            row(prompt, tokens, parents, [length] * len(tokens)),
        )
    # Trees side by side, each attached at a position of its own.
    parts, tokens, parents, at = [], [], [], []
    for _ in range(draw(st.integers(1, 3)) if kind == "forest" else 1):
        above = [draw(st.integers(-1 if node == 0 else 0, node - 1)) for node in range(draw(st.integers(1, 5)))]
        part, preorder = tree_from_parents([draw(st.integers(0, 9)) for _ in above], above)
        parts.append(part)
        start, back = len(tokens), np.argsort(preorder)
        parents += [-1 if above[node] < 0 else start + int(preorder[above[node]]) for node in back]
        tokens += part.tokens.tolist()
        at += [draw(st.integers(0, length)) if kind == "forest" else length] * len(above)
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    tree = TokenTree(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.end + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.depth for part in parts]),
        np.asarray(at) if kind == "forest" else None,
    )
    return prompt, tree, row(prompt, tokens, parents, at)


@given(forests(), st.one_of(st.none(), st.integers(1, 12)), st.data())
def test_in_any_chunk_an_entry_sees_its_ancestors_within_the_window(forest, window, data):
    tokens, tree, entries = forest
    sequence = SequenceState(tokens)
    borders = sorted({0, len(entries), *data.draw(st.lists(st.integers(0, len(entries)), max_size=4))})
    for first, last in pairwise(borders):
        chunk = ScheduledChunk(sequence, tree, first, last)
        assert len(chunk) == last - first
        assert chunk.token_ids() == [entry.token for entry in entries[first:last]]
        assert chunk.positions() == [entry.position for entry in entries[first:last]]
        visible = chunk.visibility(window)
        assert visible.shape == (last - first, last)
        for place in range(first, last):
            reach = window or len(entries)
            assert np.flatnonzero(visible[place - first]).tolist() == [
                other for other in entries[place].ancestors if entries[place].position - entries[other].position < reach
            ]


@given(forests())
def test_a_causal_chunk_hides_nothing_that_came_before(forest):
    tokens, tree, entries = forest
    for last in range(1, len(entries) + 1):
        chunk = ScheduledChunk(SequenceState(tokens), tree, 0, last)
        if chunk.is_causal:
            assert (chunk.visibility(None) == np.tri(last, dtype=bool)).all()
            assert chunk.positions() == list(range(last))
