"""From settings to methods: what is loaded, what it takes, and what is refused."""

import asyncio
from contextlib import aclosing

import pytest
import torch

from parse.config import EngineSettings, SpeculativeConfig
from parse.engines.loader import load_native_engine
from parse.engines.native.model import Model, ModelNotFoundError
from parse.local import DEMO, DEMO_DRAFT, DEMO_TARGET
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.loading import bytes_per_token, load_methods
from parse.speculative.policy import SpeculativeMethod
from parse.speculative.proposers.eagle_head import ProposerLoadError
from parse.speculative.proposers.ngram import NgramProposer
from parse.types import SamplingParams

HEADS = {
    "eagle3": str(DEMO / "demo-eagle3"),
    "parallel": str(DEMO / "demo-parallel"),
    "space": str(DEMO / "demo-space"),
    "draft_model": DEMO_DRAFT,
    "ngram": None,
}


def settings(*methods, **given):
    ways = [SpeculativeConfig(method=method, model=HEADS[method], **given) for method in methods]
    return EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=512, memory_mb=128, speculation=ways)


@pytest.fixture(scope="module")
def model():
    return Model.load(DEMO_TARGET, device="cpu")


@pytest.mark.parametrize(
    ("method", "given", "most"),
    [
        ("eagle3", {}, 12),
        ("eagle3", {"beam": 4}, 16),
        ("eagle3", {"tokens": 5}, 5),
        ("parallel", {}, 12),  # so many as its head says in a pass
        ("parallel", {"beam": 2}, 24),
        ("space", {}, 8 * 10),  # eight masks behind each of eight candidates and behind the text, and the candidates
        ("space", {"tokens": 3}, 3 * 5),
        ("draft_model", {"tokens": 6}, 6),
        ("ngram", {"tokens": 20}, 20),
    ],
)
def test_a_method_proposes_as_much_as_it_is_good_for_or_as_it_is_told(model, method, given, most):
    assert load_methods(settings(method, **given), model, StepCostModel())[method].max_tokens == most


def test_what_is_kept_of_a_token_is_counted(model):
    """Against what lies in memory after a text was written."""
    service = load_native_engine(settings("eagle3", "parallel", "draft_model", "ngram"))
    found = service._methods
    sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    texts: list = []
    begin = SpeculativeMethod.start_sequence

    async def written(method):
        async with aclosing(service.generate([5, 6, 7, 8], sampling=sampling, speculation=method)) as pieces:
            async for _ in pieces:
                pass

    try:
        with pytest.MonkeyPatch.context() as patch:

            def begun(way):
                speculation = begin(way)
                texts.append((way.method, speculation.state.state))
                return speculation

            patch.setattr(SpeculativeMethod, "begin", begun)
            for method in ("eagle3", "parallel", "draft_model"):
                asyncio.run(written(method))
        memory = service.core._kv_cache
        assert memory.aux_hidden_states is not None
        whole = memory.aux_hidden_states[0].nbytes
        for method, text in texts:
            if method != "draft_model":
                held = sum(part[:, :, 0].nbytes for part in (text.keys, text.values))
                assert found[method].proposer.bytes_per_token == held
                whole += held
        small = found["draft_model"].proposer._proposer._memory  # type: ignore[attr-defined]
        assert found["draft_model"].proposer.bytes_per_token == small.bytes // (small.pages * small.page_size)
        whole += found["draft_model"].proposer.bytes_per_token + found["ngram"].proposer.bytes_per_token
        assert bytes_per_token(list(found.values()), service.model) == whole
        plain = load_native_engine(settings())
        plain.shutdown()
        rows = service.core._kv_cache.num_blocks * service.core._kv_cache.block_size
        assert rows * (service.model.bytes_per_token + whole) <= 128 * 2**20
        assert rows < plain.core._kv_cache.num_blocks * plain.core._kv_cache.block_size
    finally:
        service.shutdown()


def test_each_method_reads_the_features_it_names(model):
    class Method(NgramProposer):
        def __init__(self, *taps):
            self.aux_hidden_state_layers = taps

    features = torch.arange(5 * 4 * 3).view(5, 12)  # four taps of width three
    for taps, columns in (((7,), (6, 7, 8)), ((11, 2), (9, 10, 11, 0, 1, 2)), ((2, 5, 7, 11), range(12))):
        way = SpeculativeMethod("eagle3", GuardedProposer(Method(*taps), 9), 8, True, (2, 5, 7, 11), StepCostModel())
        assert torch.equal(way.select_layers(features), features[:, list(columns)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "head", "error", "message"),
    [
        ("eagle3", "demo-parallel", ProposerLoadError, "not an EAGLE-3 head"),
        ("parallel", "demo-eagle3", ProposerLoadError, "not a parallel head"),
        ("space", "demo-eagle3", ProposerLoadError, "config.json does not say 'rank'"),
        ("eagle3", "demo-space", ProposerLoadError, "does not say"),
        ("eagle3", "nowhere", ProposerLoadError, "nowhere"),
        ("draft_model", "nowhere", ModelNotFoundError, "nowhere is no directory"),
        ("space", None, ProposerLoadError, "this one has none"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_loaded(model, method, head, error, message):
    given = SpeculativeConfig(method=method, model=head and str(DEMO / head))
    with pytest.raises(error, match=message):
        load_methods(settings().model_copy(update={"speculation": (given,)}), model, StepCostModel())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "ngram", "head": "some"}, "ngram takes no head"),
        ({"method": "eagle3"}, "eagle3 needs a head"),
        ({"method": "draft_model"}, "draft_model needs a head"),
        ({"method": "space", "beam": 2}, "space proposes chains only"),
        ({"method": "ngram", "tokens": 0}, "greater than or equal to 1"),
        ({"method": "medusa"}, "'draft_model', 'ngram', 'eagle3', 'parallel' or 'space'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**given)


def test_a_method_may_be_named_once():
    with pytest.raises(ValueError, match="each method may be named once, got ngram, ngram"):
        settings("ngram", "ngram")
