import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from parse.demo import DEMO_MODELS
from parse.engines.native.attention import UnsupportedModelError
from parse.engines.native.generation import TreeInput
from parse.engines.native.model import Model
from parse.prompts import chat_prompt_token_ids
from parse.tree import suffix_forest, tree_from_parents
from tests.parse.engines.native.tiny import REFUSED, SERVED, VOCABULARY, alone, build, paused, plain, run_trees, serving
from training.task import correct_answer, draw_problem

ATOL = 1e-4


YARN = {"original_max_position_embeddings": 100}

# Models whose rotary frequencies depend on the longest sequence of a forward pass, and how long it may be.
LIMITED: dict[str, tuple[dict[str, Any], int]] = {
    "phi3": (
        dict(
            original_max_position_embeddings=64,
            rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 4.0, 8.0]),
        ),
        64,
    ),
    "llama": (dict(max_position_embeddings=64, rope_scaling=dict(rope_type="dynamic", factor=4.0)), 64),
}


def random_tokens(rng, size):
    return [rng.randrange(VOCABULARY) for _ in range(size)]


@pytest.mark.parametrize("kind", SERVED)
def test_a_forest_in_packed_and_chunked_steps_gives_the_logits_of_separate_sequences(kind, tokenizer):
    network = build(kind)
    reference = deepcopy(network)
    rng = random.Random(0)
    prompt, suffix, short, other = (
        random_tokens(rng, 57),
        random_tokens(rng, 4),
        random_tokens(rng, 9),
        random_tokens(rng, 40),
    )
    forest = suffix_forest([57, 5, 16, 40, 33], suffix)
    tree, _ = tree_from_parents(random_tokens(rng, 7), [-1, 0, 0, -1, 3, 1, 4])
    tokens = random_tokens(rng, 14)
    proposals = [random_tokens(rng, 5) for _ in range(3)]
    with serving(Model(network, tokenizer), max_num_batched_tokens=19) as engine:
        with paused(engine):
            verifying = run_trees(engine, prompt, TreeInput(forest))
            decoding = run_trees(
                engine, short, *(TreeInput([token], accepted_path=range(bool(i))) for i, token in enumerate(tokens))
            )
            proposing = run_trees(
                engine,
                other,
                *(TreeInput(proposal, accepted_path=range(2 * bool(i))) for i, proposal in enumerate(proposals)),
            )
            running_tree = run_trees(engine, other[:20], TreeInput(tree))
        verified, decoded, proposed, tree_logits = (
            response.result() for response in (verifying, decoding, proposing, running_tree)
        )
        before = engine.stats
        again = run_trees(engine, prompt[:50], TreeInput(tree), TreeInput(tree, logits_nodes=[4])).result()
        assert engine.stats.prefix_hits - before.prefix_hits == 50

    def close(logits, expected):
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)

    expected = alone(reference, prompt, forest)
    assert expected[3::4].std(0).max() > 100 * ATOL, "the prefix lengths make no difference to this model"
    close(verified[0], expected)
    close(torch.cat(decoded), plain(reference, short + tokens)[len(short) :])
    for place, proposal in enumerate(proposals):
        sequence = [*other, *proposals[0][:2], *proposals[1][:2]][: len(other) + 2 * place]
        close(proposed[place], plain(reference, sequence + proposal)[len(sequence) :])
    close(tree_logits[0], alone(reference, other[:20], tree))
    close(again[0], alone(reference, prompt[:50], tree))
    close(again[1], again[0][4:5])


@pytest.mark.parametrize("kind", REFUSED)
def test_an_unsupported_model_is_refused_by_name(kind, tokenizer):
    with pytest.raises(UnsupportedModelError, match=f"(?i){kind}.*{REFUSED[kind][1]}"):
        Model(build(kind), tokenizer)


class Neighbours(nn.Module):
    """Lets each token of a step see the one before it, even that of another request."""

    def __init__(self, inner, share=0.2):
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden):
        return self.inner(hidden + self.share * hidden.roll(1, dims=1))


class Counting(nn.Module):
    """Makes the output of each token depend on its place in the step."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden + 0.01 * torch.arange(hidden.shape[1])[:, None])


@pytest.mark.parametrize("mixing", [Neighbours, Counting])
def test_an_unknown_model_that_computes_wrong_logits_is_caught_at_load(mixing, tokenizer):
    network = build("llama")
    Model(network, tokenizer)
    layer = network.model.layers[1]
    layer.mlp = mixing(layer.mlp)
    with pytest.raises(UnsupportedModelError, match="does not compute the same in packed steps as alone"):
        Model(network, tokenizer)


class PassDependentRotary(nn.Module):
    """Changes the positions of all tokens if one of them lies beyond a limit, as LongRoPE does."""

    def __init__(self, inner, limit):
        super().__init__()
        self.inner, self.limit = inner, limit

    def forward(self, hidden, position_ids):
        return self.inner(hidden, position_ids * (2 if position_ids.max() >= self.limit else 1))


@pytest.mark.parametrize("limit", [20, 100, 255])
def test_a_model_that_a_long_request_would_change_for_others_is_caught_at_load(limit, tokenizer):
    network = build("llama", rope_parameters={"rope_type": "yarn", "factor": 2.5, "rope_theta": 1e4, **YARN})
    Model(network, tokenizer)
    network.model.rotary_emb = PassDependentRotary(network.model.rotary_emb, limit)
    with pytest.raises(UnsupportedModelError, match="does not compute the same in packed steps as alone: at position"):
        Model(network, tokenizer)


@pytest.mark.parametrize("kind", LIMITED)
def test_long_and_short_requests_do_not_change_each_other(kind, tokenizer):
    """Rotary frequencies that depend on the longest request of a step are served up to where they change."""
    changes, limit = LIMITED[kind]
    network = build(kind, **changes)
    reference, rng = deepcopy(network), random.Random(3)
    model = Model(network, tokenizer)
    assert model.max_model_len == limit
    requests = [random_tokens(rng, size) for size in (5, limit, 9, limit - 1, 30)]
    with serving(model, max_num_batched_tokens=300) as engine:
        with paused(engine):
            responses = [run_trees(engine, tokens[:-3], TreeInput(tokens[-3:])) for tokens in requests]
        logits = [response.result()[0] for response in responses]
    for tokens, actual in zip(requests, logits, strict=True):
        torch.testing.assert_close(actual, plain(reference, tokens)[-3:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral", "gemma3_text"])
def test_no_model_is_refused_for_what_rounding_does_in_half_precision(kind, dtype, tokenizer):
    """Rounding may even choose another expert, where two are nearly equal."""
    for seed in range(6):
        Model(build(kind, seed, num_hidden_layers=3).to(dtype), tokenizer)
    network = build(kind, num_hidden_layers=3).to(dtype)
    network.model.layers[0].mlp = Neighbours(network.model.layers[0].mlp, 1.0)
    with pytest.raises(UnsupportedModelError, match="does not compute the same in packed steps as alone"):
        Model(network, tokenizer)


def test_a_wrong_model_is_caught_however_small_its_logits_are(tokenizer):
    network = build("llama")
    network.model.layers[1].mlp = Neighbours(network.model.layers[1].mlp)
    with torch.no_grad():
        network.lm_head.weight *= 1e-5
    with pytest.raises(UnsupportedModelError, match="does not compute the same in packed steps as alone"):
        Model(network, tokenizer)


def test_a_model_whose_logits_are_not_finite_is_refused(tokenizer):
    network = build("llama")
    with torch.no_grad():
        network.lm_head.weight[3] = torch.nan
    with pytest.raises(UnsupportedModelError):
        Model(network, tokenizer)


def test_a_loaded_model_knows_its_limits_and_all_its_end_tokens(tokenizer, tmp_path):
    network = build("qwen3", vocab_size=len(tokenizer))
    network.generation_config.eos_token_id = [7, 9]
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = Model.load(tmp_path, device="cpu")
    assert model.eos_token_ids == {7, 9, tokenizer.eos_token_id}
    assert (model.vocab_size, model.max_model_len) == (len(tokenizer), 256)
    assert model.bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, head size, bytes
    assert model.network.dtype == torch.float32


def test_a_model_in_8_bits_makes_nearly_all_the_choices_of_the_original():
    path = DEMO_MODELS / "demo-target"
    model = Model.load(path, device="cpu", int8=True)
    linears = [part for part in model.network.model.modules() if isinstance(part, nn.Linear)]
    assert linears and all(part.weight.isnan().all() for part in linears)
    problem = draw_problem("test", 1, 0)
    token_ids = chat_prompt_token_ids(model.tokenizer, [{"role": "user", "content": problem.question}])
    token_ids += model.tokenizer.encode(correct_answer(problem))
    with serving(model, sequence_capacity=len(token_ids)) as engine:
        (logits,) = run_trees(engine, [], TreeInput(token_ids)).result()
    same = logits.argmax(-1) == plain(AutoModelForCausalLM.from_pretrained(path), token_ids).argmax(-1)
    assert same.float().mean() > 0.95
