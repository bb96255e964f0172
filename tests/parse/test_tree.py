import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.tree import chain, suffix_forest, tree_from_parents


def test_a_chain_is_plain_causal_text():
    assert (chain([5, 6, 7]).visible() == np.tri(3, dtype=bool)).all()


def lineage(above, node):
    """The node and its ancestors."""
    found = set()
    while node >= 0:
        found.add(node)
        node = above[node]
    return found


def assert_is(tree, tokens, above):
    """`above[j]`: the parent of node j, -1 for a root."""
    assert tree.tokens.tolist() == list(tokens)
    visible = tree.visible()
    for node in range(len(tokens)):
        seen = lineage(above, node)
        assert set(np.flatnonzero(visible[node])) == seen
        assert tree.depth[node] == len(seen) - 1


@given(st.lists(st.integers(0, 50), max_size=6), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_probes_see_the_context_up_to_their_cut_and_none_of_one_another(at, suffix):
    tree = suffix_forest(at, suffix)
    width = len(suffix)
    assert_is(tree, suffix * len(at), [-1 if j % width == 0 else j - 1 for j in range(len(at) * width)])
    assert tree.visible_context(1000).tolist() == [cut for cut in at for _ in suffix]


@given(st.data())
def test_proposals_hang_where_they_are_told_to(data):
    size = data.draw(st.integers(0, 12))
    above = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    tokens = data.draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
    tree, place = tree_from_parents(tokens, above)
    assert sorted(place) == list(range(size))
    assert [tree.tokens[at] for at in place] == tokens
    visible = tree.visible()
    for node in range(size):
        seen = lineage(above, node)
        assert set(np.flatnonzero(visible[place[node]])) == {place[other] for other in seen}
        assert tree.depth[place[node]] == len(seen) - 1


@pytest.mark.parametrize("above", [[0], [-1, 1], [-1, 5], [-1, -2]])
def test_a_proposal_below_itself_or_a_later_one_is_refused(above):
    with pytest.raises(ValueError, match=f"the parent of node {len(above) - 1} must stand before it"):
        tree_from_parents([7] * len(above), above)


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(0, 100))
def test_where_nothing_else_is_said_a_tree_hangs_on_the_end_of_its_context(tokens, context):
    for tree in (chain(tokens), tree_from_parents(tokens, list(range(-1, len(tokens) - 1)))[0]):
        assert tree.visible_context(context).tolist() == [context] * len(tree)
