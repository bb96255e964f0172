import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from parse.tree import chain, suffix_end_nodes, suffix_forest, tree_from_parents, trunk_with_suffixes
from training.prefix_verification import prefill, tree_logits


def parents(trunk, prefix_lengths, width):
    """Node -> parent, by the definition: the trunk is a chain, and so is each suffix below the end of its prefix."""
    above = {0: None} | {k: k - 1 for k in range(1, trunk)}
    node = trunk
    for length in sorted(prefix_lengths, reverse=True):
        above[node] = length - 1
        for k in range(1, width):
            above[node + k] = node + k - 1
        node += width
    return above


@pytest.mark.parametrize("seed", range(20))
def test_a_node_sees_itself_and_its_ancestors_and_nothing_else(seed):
    rng = random.Random(seed)
    trunk, width = rng.randint(1, 12), rng.randint(1, 4)
    prefix_lengths = [rng.randint(1, trunk) for _ in range(rng.randint(0, 5))]
    tree = trunk_with_suffixes(range(trunk), prefix_lengths, range(100, 100 + width))
    above = parents(trunk, prefix_lengths, width)
    visible = tree.visible()
    for node in range(len(tree)):
        visible_nodes, ancestor = set(), node
        while ancestor is not None:
            visible_nodes.add(ancestor)
            ancestor = above[ancestor]
        assert set(np.flatnonzero(visible[node])) == visible_nodes
        assert tree.depth[node] == len(visible_nodes) - 1


def test_a_chain_is_plain_causal_text():
    assert (chain([5, 6, 7]).visible() == np.tri(3, dtype=bool)).all()


def test_a_prefix_length_outside_the_trunk_is_refused():
    for prefix_length in (0, 4, -1):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            trunk_with_suffixes([1, 2, 3], [prefix_length], [9])


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


@pytest.mark.parametrize("above", [[0], [-1, 1], [-1, 5], [-1, -2]])
def test_a_proposal_below_itself_or_a_later_one_is_refused(above):
    with pytest.raises(ValueError, match=f"the parent of node {len(above) - 1} must come before it"):
        tree_from_parents([7] * len(above), above)


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(0, 100))
def test_by_default_a_tree_is_attached_at_the_end_of_its_context(tokens, context):
    for tree in (chain(tokens), tree_from_parents(tokens, list(range(-1, len(tokens) - 1)))[0]):
        assert tree.visible_context(context).tolist() == [context] * len(tree)


@pytest.mark.parametrize("config", [Qwen3Config, LlamaConfig])
def test_one_pass_over_the_tree_gives_the_logits_of_separate_conversations(config):
    torch.manual_seed(0)
    shape = dict(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config(**shape, head_dim=8, intermediate_size=48)).eval()
    rng = random.Random(0)
    prompt, draft, suffix = ([rng.randrange(90) for _ in range(size)] for size in (9, 17, 4))
    prefix_lengths = [5, 17, 1, 10]
    alone = [
        model(input_ids=torch.tensor([[*prompt, *draft[:length], *suffix]])).logits[0, -1] for length in prefix_lengths
    ]  # fmt: skip
    end_nodes = torch.from_numpy(suffix_end_nodes(len(draft), prefix_lengths, len(suffix)))
    together = tree_logits(model, trunk_with_suffixes(draft, prefix_lengths, suffix), end_nodes, prefill(model, prompt))
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
