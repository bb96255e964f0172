"""From settings to methods: what is loaded, how much memory it takes, and what is rejected."""

import asyncio
from contextlib import aclosing

import pytest
import torch

from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_DRAFT, DEMO_MODELS, DEMO_TARGET
from parse.engines.native.checkpoint import CheckpointError
from parse.engines.native.model import Model
from parse.engines.native_loader import load_native_engine
from parse.registry import METHODS
from parse.requests import GenerateRequest
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.loading import load_methods
from parse.speculative.proposal_policy import SpeculativeMethod
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.ngram import NgramProposer
from parse.types import SamplingParams

MODELS = {
    "eagle3": str(DEMO_MODELS / "demo-eagle3"),
    "parallel": str(DEMO_MODELS / "demo-parallel"),
    "space": str(DEMO_MODELS / "demo-space"),
    "draft_model": DEMO_DRAFT,
    "ngram": None,
}
KV_CACHE_BYTES = 128 * 2**20


def settings(*configs):
    return EngineSettings(
        model=DEMO_TARGET,
        num_threads=1,
        max_model_len=512,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        speculative_configs=configs,
    )


def config(method, **options):
    return SpeculativeConfig(method=method, model=MODELS[method], **options)


@pytest.fixture(scope="module")
def model():
    return Model.load(DEMO_TARGET, device="cpu")


@pytest.mark.parametrize(
    ("method", "options", "max_tokens"),
    [
        ("eagle3", {}, 12),
        ("eagle3", {"topk": 4}, 16),
        ("eagle3", {"num_speculative_tokens": 5}, 5),
        ("parallel", {}, 12),  # as many as its head predicts in a pass
        ("parallel", {"topk": 2}, 24),
        ("space", {}, 8 * 10),  # eight candidates, and eight masks after each of them and after the sequence
        ("space", {"num_speculative_tokens": 3}, 3 * 5),
        ("draft_model", {"num_speculative_tokens": 6}, 6),
        ("ngram", {"num_speculative_tokens": 20}, 20),
    ],
)
def test_a_method_proposes_as_many_tokens_as_its_settings_or_its_default_allow(model, method, options, max_tokens):
    methods = load_methods(settings(config(method, **options)), model, StepCostModel())
    assert methods[method].max_tokens == max_tokens
    assert methods[method].is_sequential == METHODS[method].is_sequential


def test_the_memory_that_methods_keep_for_a_token_is_counted(monkeypatch):
    """Compares it with the tensors that are there after a generation."""
    engine = load_native_engine(settings(*map(config, ("eagle3", "parallel", "draft_model", "ngram"))))
    methods = engine._methods
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    states: list = []
    start_sequence = SpeculativeMethod.start_sequence

    async def generate(method):
        request = GenerateRequest(prompt_token_ids=(5, 6, 7, 8), sampling_params=params, speculative_method=method)
        async with aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                pass

    def start_and_keep_state(method, **options):
        speculation = start_sequence(method, **options)
        states.append((method.name, speculation.state.state))
        return speculation

    try:
        monkeypatch.setattr(SpeculativeMethod, "start_sequence", start_and_keep_state)
        for method in ("eagle3", "parallel", "draft_model"):
            asyncio.run(generate(method))
        kv_cache = engine.core.model_runner.kv_cache
        assert kv_cache.aux_hidden_states is not None
        bytes_per_token = engine.model.bytes_per_token + kv_cache.aux_hidden_states[0].nbytes
        for name, state in states:
            if name != "draft_model":
                num_bytes = sum(part[:, :, 0].nbytes for part in (state.keys, state.values))
                assert methods[name].proposer.bytes_per_token == num_bytes
                bytes_per_token += num_bytes
        draft_cache = methods["draft_model"].proposer._proposer._kv_cache  # type: ignore[attr-defined]
        draft_bytes = draft_cache.num_bytes // (draft_cache.num_blocks * draft_cache.block_size)
        assert methods["draft_model"].proposer.bytes_per_token == draft_bytes
        bytes_per_token += draft_bytes + methods["ngram"].proposer.bytes_per_token
        # The engine divides its memory by this number; a part of a token per sequence may remain.
        capacity = kv_cache.num_blocks * kv_cache.block_size
        assert KV_CACHE_BYTES // bytes_per_token - kv_cache.num_blocks < capacity <= KV_CACHE_BYTES // bytes_per_token
        plain_engine = load_native_engine(settings())
        plain_engine.shutdown()
        plain_cache = plain_engine.core.model_runner.kv_cache
        assert capacity < plain_cache.num_blocks * plain_cache.block_size
    finally:
        engine.shutdown()


def test_each_method_reads_the_hidden_states_that_it_names(model):
    class LayerProposer(NgramProposer):
        def __init__(self, *layers):
            self.aux_hidden_state_layers = layers

    all_layers = (2, 5, 7, 11)
    hidden_states = torch.arange(5 * 4 * 3).view(5, 12)  # four layers of width three
    for layers, columns in (((7,), (6, 7, 8)), ((11, 2), (9, 10, 11, 0, 1, 2)), (all_layers, range(12))):
        proposer = GuardedProposer(LayerProposer(*layers), 9)
        method = SpeculativeMethod("eagle3", proposer, 8, True, all_layers, StepCostModel())
        selected = method.select_layers(hidden_states)
        assert selected is not None and torch.equal(selected, hidden_states[:, list(columns)])


@pytest.mark.parametrize(
    ("method", "model_name", "error", "message"),
    [
        ("eagle3", "demo-parallel", ProposerLoadError, "not an EAGLE-3 head"),
        ("parallel", "demo-eagle3", ProposerLoadError, "not a parallel head"),
        ("space", "demo-eagle3", ProposerLoadError, "config.json lacks 'rank'"),
        ("eagle3", "demo-space", ProposerLoadError, "config.json lacks"),
        ("eagle3", "nowhere", ProposerLoadError, "nowhere"),
        ("draft_model", "nowhere", CheckpointError, "nowhere is not a directory"),
        ("space", None, ProposerLoadError, "this tokenizer has none"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_rejected_while_loading(model, method, model_name, error, message):
    unfit = SpeculativeConfig(method=method, model=model_name and str(DEMO_MODELS / model_name))
    with pytest.raises(error, match=message):
        load_methods(settings(unfit), model, StepCostModel())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ngram", "model": "some"}, "ngram takes no model"),
        ({"method": "eagle3"}, "eagle3 needs a model"),
        ({"method": "draft_model"}, "draft_model needs a model"),
        ({"method": "space", "topk": 2}, "space proposes chains only"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "greater than or equal to 1"),
        ({"method": "medusa"}, "'draft_model', 'ngram', 'eagle3', 'parallel' or 'space'"),
    ],
)
def test_invalid_settings_are_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**values)


def test_a_method_may_be_named_once():
    with pytest.raises(ValueError, match="each method may be named only once, got ngram, ngram"):
        settings(config("ngram"), config("ngram"))
