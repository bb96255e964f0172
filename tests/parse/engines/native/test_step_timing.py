from copy import deepcopy

import pytest
import torch

from parse.engines.native.model import Model
from parse.engines.native.programs import TreeInput
from parse.engines.native.step_timing import SIZES, measure_step_seconds
from tests.parse.engines.native.tiny import VOCABULARY, ask, build, plain, serving


@pytest.fixture(scope="module")
def reference():
    return build("llama")


@pytest.mark.parametrize("longest", [2, 3, 17, 64, 65, 100, 256])
def test_sizes_are_those_that_a_model_has_positions_for(longest, tokenizer, monkeypatch):
    """Of one whose positions are a table, so that it would fail at one too many."""
    model = Model(build("gpt2"), tokenizer)
    monkeypatch.setattr(model, "longest", longest)
    seen = []
    forward = model.forward

    def watched(tokens, positions, *rest):
        seen.append((tokens, positions))
        return forward(tokens, positions, *rest)

    monkeypatch.setattr(model, "forward", watched)
    tried = measure_step_seconds(model)
    assert [size for size, _ in tried] == [size for size in SIZES if size < longest]
    assert all(seconds > 0 for _, seconds in tried)
    for tokens, positions in seen:
        assert len(tokens) == len(positions) and max(positions) < longest
        assert all(0 <= token < VOCABULARY for token in tokens)
    assert {len(tokens) for tokens, _ in seen} == {size for size, _ in tried}


def test_a_vocabulary_smaller_than_the_text_is_no_hindrance(tokenizer):
    assert len(measure_step_seconds(Model(build("llama", vocab_size=40), tokenizer))) == len(SIZES)


def test_a_model_that_was_timed_answers_as_before(reference, tokenizer):
    model = Model(deepcopy(reference), tokenizer)
    model.aux_hidden_state_layers = (1,)
    kept = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    threads, taps = torch.get_num_threads(), model.aux_hidden_state_layers
    measure_step_seconds(model)
    assert (torch.get_num_threads(), model.aux_hidden_state_layers, model.mask_embedder) == (threads, taps, None)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, kept[name])
    context, tokens = [5, 3, 99], [7, 7, 40, 2]
    with serving(model) as engine:
        (logits,) = ask(engine, context, TreeInput(tokens)).result()
    torch.testing.assert_close(logits, plain(reference, [*context, *tokens])[3:], atol=1e-4, rtol=0)
