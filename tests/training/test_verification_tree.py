import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from parse.tree import trunk_with_suffixes
from training.prefix_verification import prefill, tree_logits
from training.verification_tree import suffix_end_nodes


def parents(trunk, prefix_lengths, width):
    """Node -> parent, straight from the definition: the trunk is a chain, each probe a chain behind its length."""
    parent_of = {0: None} | {k: k - 1 for k in range(1, trunk)}
    node = trunk
    for length in sorted(prefix_lengths, reverse=True):
        parent_of[node] = length - 1
        for k in range(1, width):
            parent_of[node + k] = node + k - 1
        node += width
    return parent_of


@pytest.mark.parametrize("seed", range(20))
def test_a_node_sees_itself_and_its_ancestors_and_nothing_else(seed):
    rng = random.Random(seed)
    trunk, width = rng.randint(1, 12), rng.randint(1, 4)
    prefix_lengths = [rng.randint(1, trunk) for _ in range(rng.randint(0, 5))]
    tree = trunk_with_suffixes(range(trunk), prefix_lengths, range(100, 100 + width))
    parent_of = parents(trunk, prefix_lengths, width)
    visible = tree.visible()
    for node in range(len(tree)):
        seen, at = set(), node
        while at is not None:
            seen.add(at)
            at = parent_of[at]
        assert set(np.flatnonzero(visible[node])) == seen
        assert tree.depth[node] == len(seen) - 1


def test_a_cut_outside_the_trunk_is_refused():
    for length in (0, 4, -1):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            trunk_with_suffixes([1, 2, 3], [length], [9])


@pytest.mark.parametrize("config", [Qwen3Config, LlamaConfig])
def test_one_pass_over_the_tree_answers_as_separate_conversations_do(config):
    torch.manual_seed(0)
    shape = dict(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config(**shape, head_dim=8, intermediate_size=48)).eval()
    rng = random.Random(0)
    prompt, draft, suffix = ([rng.randrange(90) for _ in range(size)] for size in (9, 17, 4))
    prefix_lengths = [5, 17, 1, 10]
    alone = [
        model(input_ids=torch.tensor([[*prompt, *draft[:length], *suffix]])).logits[0, -1] for length in prefix_lengths
    ]  # fmt: skip
    at = torch.from_numpy(suffix_end_nodes(len(draft), prefix_lengths, len(suffix)))
    together = tree_logits(model, trunk_with_suffixes(draft, prefix_lengths, suffix), at, prefill(model, prompt))
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
