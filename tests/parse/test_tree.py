import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from parse.tree import chain, probe_ends, probed
from training.judging import cached, run


def parents(trunk, cuts, width):
    """Node -> parent, straight from the definition: the trunk is a chain, each probe a chain behind its cut."""
    above = {0: None} | {k: k - 1 for k in range(1, trunk)}
    node = trunk
    for cut in sorted(cuts, reverse=True):
        above[node] = cut - 1
        for k in range(1, width):
            above[node + k] = node + k - 1
        node += width
    return above


@pytest.mark.parametrize("seed", range(20))
def test_a_node_sees_itself_and_its_ancestors_and_nothing_else(seed):
    rng = random.Random(seed)
    trunk, width = rng.randint(1, 12), rng.randint(1, 4)
    cuts = [rng.randint(1, trunk) for _ in range(rng.randint(0, 5))]
    tree = probed(range(trunk), cuts, range(100, 100 + width))
    above = parents(trunk, cuts, width)
    visible = tree.visible()
    for node in range(len(tree)):
        seen, at = set(), node
        while at is not None:
            seen.add(at)
            at = above[at]
        assert set(np.flatnonzero(visible[node])) == seen
        assert tree.depth[node] == len(seen) - 1


def test_a_chain_is_plain_causal_text():
    assert (chain([5, 6, 7]).visible() == np.tri(3, dtype=bool)).all()


def test_a_cut_outside_the_trunk_is_refused():
    for cut in (0, 4, -1):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            probed([1, 2, 3], [cut], [9])


@pytest.mark.parametrize("config", [Qwen3Config, LlamaConfig])
def test_one_pass_over_the_tree_answers_as_separate_conversations_do(config):
    torch.manual_seed(0)
    shape = dict(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config(**shape, head_dim=8, intermediate_size=48)).eval()
    rng = random.Random(0)
    prompt, draft, suffix = ([rng.randrange(90) for _ in range(size)] for size in (9, 17, 4))
    cuts = [5, 17, 1, 10]
    alone = [
        model(input_ids=torch.tensor([[*prompt, *draft[:cut], *suffix]])).logits[0, -1] for cut in cuts
    ]  # fmt: skip
    at = torch.from_numpy(probe_ends(len(draft), cuts, len(suffix)))
    together = run(model, probed(draft, cuts, suffix), at, cached(model, prompt))
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
