from copy import deepcopy

import pytest
import torch

from parse.engines.native.generation import TreeInput
from parse.engines.native.model import Model
from parse.engines.native.step_timing import SIZES, measure_step_seconds
from tests.parse.engines.native.tiny import VOCABULARY, build, plain, run_trees, serving


@pytest.fixture(scope="module")
def reference():
    return build("llama")


@pytest.mark.parametrize("max_model_len", [2, 3, 17, 64, 65, 100, 256])
def test_sizes_are_those_that_a_model_has_positions_for(max_model_len, tokenizer, monkeypatch):
    """GPT-2 has a table of positions, and fails beyond its end."""
    model = Model(build("gpt2"), tokenizer)
    monkeypatch.setattr(model, "max_model_len", max_model_len)
    calls = []
    forward = model.forward

    def recorded(tokens, positions, *rest):
        calls.append((tokens, positions))
        return forward(tokens, positions, *rest)

    monkeypatch.setattr(model, "forward", recorded)
    measurements = measure_step_seconds(model)
    assert [size for size, _ in measurements] == [size for size in SIZES if size < max_model_len]
    assert all(seconds > 0 for _, seconds in measurements)
    for tokens, positions in calls:
        assert len(tokens) == len(positions) and max(positions) < max_model_len
        assert all(0 <= token < VOCABULARY for token in tokens)
    assert {len(tokens) for tokens, _ in calls} == {size for size, _ in measurements}


def test_a_vocabulary_may_be_smaller_than_the_number_of_tokens(tokenizer):
    assert len(measure_step_seconds(Model(build("llama", vocab_size=40), tokenizer))) == len(SIZES)


def test_a_model_that_was_timed_computes_what_it_did_before(reference, tokenizer):
    model = Model(deepcopy(reference), tokenizer)
    model.aux_hidden_state_layers = (1,)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    num_threads, layers = torch.get_num_threads(), model.aux_hidden_state_layers
    measure_step_seconds(model)
    assert (torch.get_num_threads(), model.aux_hidden_state_layers, model.mask_embedder) == (num_threads, layers, None)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    prompt, tokens = [5, 3, 99], [7, 7, 40, 2]
    with serving(model) as engine:
        (logits,) = run_trees(engine, prompt, TreeInput(tokens)).result()
    torch.testing.assert_close(logits, plain(reference, [*prompt, *tokens])[3:], atol=1e-4, rtol=0)
