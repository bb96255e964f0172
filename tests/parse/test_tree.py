import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.tree import chain, child, suffix_forest, tree_from_parents


def test_a_chain_is_plain_causal_text():
    assert (chain([5, 6, 7]).visible() == np.tri(3, dtype=bool)).all()


def lineage(above, node):
    """The node and its ancestors."""
    nodes = set()
    while node >= 0:
        nodes.add(node)
        node = above[node]
    return nodes


def assert_is(tree, tokens, above):
    """`above[j]`: the parent of node j, -1 for a root."""
    assert tree.tokens.tolist() == list(tokens)
    visible = tree.visible()
    for node in range(len(tokens)):
        ancestors = lineage(above, node)
        assert set(np.flatnonzero(visible[node])) == ancestors
        assert tree.depth[node] == len(ancestors) - 1


@given(st.lists(st.integers(0, 50), max_size=6), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_suffixes_see_the_context_up_to_their_prefix_and_not_one_another(prefix_lengths, suffix):
    tree = suffix_forest(prefix_lengths, suffix)
    width = len(suffix)
    assert_is(
        tree,
        suffix * len(prefix_lengths),
        [-1 if j % width == 0 else j - 1 for j in range(len(prefix_lengths) * width)],
    )
    assert tree.visible_context(1000).tolist() == [length for length in prefix_lengths for _ in suffix]


@given(st.data())
def test_each_node_is_below_its_parent(data):
    size = data.draw(st.integers(0, 12))
    above = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    tokens = data.draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
    tree, preorder = tree_from_parents(tokens, above)
    assert sorted(preorder) == list(range(size))
    assert [tree.tokens[node] for node in preorder] == tokens
    visible = tree.visible()
    for node in range(size):
        ancestors = lineage(above, node)
        assert set(np.flatnonzero(visible[preorder[node]])) == {preorder[other] for other in ancestors}
        assert tree.depth[preorder[node]] == len(ancestors) - 1


@given(st.data())
def test_the_child_of_a_node_is_the_one_with_the_token(data):
    size = data.draw(st.integers(1, 12))
    above = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    tokens = list(range(size))  # so that no two children of a node have the same token
    tree, preorder = tree_from_parents(tokens, above)
    for node in range(size):
        for token in range(-1, size + 1):
            expected = preorder[token] if 0 <= token < size and above[token] == node else None
            assert child(tree, int(preorder[node]), token) == expected


@given(st.lists(st.integers(0, 3), max_size=6), st.integers(0, 3))
def test_the_child_in_a_chain_is_the_next_token(tokens, token):
    for nodes in (tokens, chain(tokens)):
        for node in range(len(tokens)):
            is_next = tokens[node + 1 : node + 2] == [token]
            assert child(nodes, node, token) == (node + 1 if is_next else None)


@pytest.mark.parametrize("above", [[0], [-1, 1], [-1, 5], [-1, -2]])
def test_a_proposal_below_itself_or_a_later_one_is_refused(above):
    with pytest.raises(ValueError, match=f"the parent of node {len(above) - 1} must come before it"):
        tree_from_parents([7] * len(above), above)


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(0, 100))
def test_by_default_a_tree_is_attached_at_the_end_of_its_context(tokens, context_length):
    for tree in (chain(tokens), tree_from_parents(tokens, list(range(-1, len(tokens) - 1)))[0]):
        assert tree.visible_context(context_length).tolist() == [context_length] * len(tree)
