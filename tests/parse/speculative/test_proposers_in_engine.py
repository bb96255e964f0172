"""Proposers inside the engine: what is written stays the target's own, and their features are those of the model."""

import asyncio
import random
from contextlib import aclosing
from typing import Any

import pytest
import torch
from torch import Tensor

from parse.config import EngineSettings
from parse.config import SpeculativeConfig as Way
from parse.engines.loader import load_native_engine
from parse.engines.native import service as service_module
from parse.engines.native.attention import STEP_ATTENTION
from parse.engines.native.engine import NativeEngine
from parse.local import DEMO, DEMO_DRAFT, DEMO_TARGET
from parse.prompts import chat_prompt_token_ids
from parse.speculative import policy
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import Proposal, Proposer
from parse.types import RequestError, SamplingParams, sum_stats
from training.measure import draw_problems

SETTINGS = EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=1024, memory_mb=256)
TAPS = (2, 7, 11)
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=120),
    SamplingParams(temperature=0.8, seed=3, max_tokens=120),
    SamplingParams(temperature=1.0, seed=5, max_tokens=60, presence_penalty=0.5, repetition_penalty=1.1, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=120, stop=["Third"]),
]


class Method(Proposer[Any]):
    """Of a test, with features."""

    taps = TAPS

    def reserve(self, contexts, capacity):
        assert contexts > 0 and capacity > 0


class Watching(Method):
    """Proposes at random, trees too, and keeps what it is told."""

    def __init__(self):
        self.texts: list = []
        self.together: list[int] = []

    def new_state(self):
        return Told(self)

    def propose(self, wishes):
        self.together.append(len(wishes))
        return [wish.proposer.guess(wish.most) for wish in wishes]


class Told:
    def __init__(self, watching):
        self.told: list = []
        watching.texts.append(self.told)
        self.rng = random.Random(len(watching.texts))

    def extend(self, tokens, features, foreseen):
        assert foreseen is None
        self.told.append((tuple(tokens), features))

    def guess(self, most):
        size = min(most, self.rng.randint(0, 6))
        tokens = tuple(self.rng.choice(self.told[0][0]) for _ in range(size))
        return Proposal(tokens, tuple(self.rng.randrange(-1, node) for node in range(size)))


METHODS = {
    "ngram": Way(method="ngram", num_speculative_tokens=6),
    "draft_model": Way(method="draft_model", model=DEMO_DRAFT, num_speculative_tokens=5),
    "eagle3": Way(method="eagle3", model=str(DEMO / "demo-eagle3")),
    "eagle3 tree": Way(method="eagle3", model=str(DEMO / "demo-eagle3"), topk=3, num_speculative_tokens=12),
    "parallel": Way(method="parallel", model=str(DEMO / "demo-parallel")),
    "parallel tree": Way(method="parallel", model=str(DEMO / "demo-parallel"), topk=2),
    "space": Way(method="space", model=str(DEMO / "demo-space")),
}


def serving(*ways: Way) -> NativeEngine:
    return load_native_engine(SETTINGS.model_copy(update={"speculation": ways}))


def serving_own(monkeypatch, method) -> NativeEngine:
    """With a method that no settings name."""

    def ways(settings, model, costs):
        model.taps = method.taps
        return {
            "eagle3": policy.SpeculativeMethod(
                "eagle3", GuardedProposer(method, model.vocabulary), 6, False, method.taps, costs
            )
        }

    monkeypatch.setattr(service_module, "ways", ways)
    return load_native_engine(SETTINGS)


@pytest.fixture
def tireless(monkeypatch):
    """Without a clock nothing seems to cost too much, and so the same is proposed every time."""
    monkeypatch.setattr(service_module, "pass_seconds", lambda model: [])
    monkeypatch.setattr("parse.speculative.cost_model.StepCostModel.record", lambda *_: None)


@pytest.fixture(scope="module")
def alone():
    service = load_native_engine(SETTINGS)
    yield service
    service.shutdown()


@pytest.fixture(params=[*METHODS, "at random"])
def foreseen(request, monkeypatch):
    own = request.param == "at random"
    service = serving_own(monkeypatch, Watching()) if own else serving(METHODS[request.param])
    yield service
    service.shutdown()


def questions(alone, count):
    turns = [[{"role": "user", "content": problem.question}] for problem in draw_problems(5, count)]
    return [chat_prompt_token_ids(alone.model.tokenizer, turn) for turn in turns]


async def speculated(service, prompt, choice):
    async with aclosing(service.generate(prompt, sampling=SAMPLINGS[0], speculation=choice)) as pieces:
        return sum_stats([tokens.speculated async for tokens in pieces])


async def written(service, prompt, sampling, choice=None):
    ids, logprobs, finish = [], [], None
    async with aclosing(service.generate(prompt, sampling=sampling, speculation=choice)) as pieces:
        async for tokens in pieces:
            ids += tokens.ids
            logprobs += [(one.logprob, [token for token, _ in one.top]) for one in tokens.logprobs]
            finish = tokens.finish
    return ids, logprobs, finish


async def all_written(service, asked):
    return await asyncio.gather(*(written(service, prompt, sampling) for prompt, sampling in asked))


def test_what_is_written_is_the_targets_own_in_a_mixed_batch(alone, foreseen):
    asked = [(prompt, SAMPLINGS[n % len(SAMPLINGS)]) for n, prompt in enumerate(questions(alone, 12))]
    expected = asyncio.run(all_written(alone, asked))
    for _ in range(2):  # the second time prompts and their features are found in the cache
        found = asyncio.run(all_written(foreseen, asked))
        for (ids, logprobs, finish), (right, wanted, end) in zip(found, expected, strict=True):
            assert ids == right and finish == end
            assert [top for _, top in logprobs] == [top for _, top in wanted]
            assert [p for p, _ in logprobs] == pytest.approx([p for p, _ in wanted], abs=1e-4)


@pytest.mark.parametrize("method", ["eagle3", "eagle3 tree", "parallel", "space"])
def test_heads_save_most_of_the_passes(alone, tireless, method):
    service = serving(METHODS[method])
    try:
        steps = [service.stats.num_steps, alone.load.steps]
        for prompt in questions(alone, 6):
            for one in (service, alone):
                asyncio.run(written(one, prompt, SAMPLINGS[0]))
        saved = (alone.load.steps - steps[1]) / (service.stats.num_steps - steps[0])
        assert saved > 3.5
    finally:
        service.shutdown()


def test_the_features_told_are_the_models_own_of_the_token_before_each(alone, monkeypatch):
    watching = Watching()
    service = serving_own(monkeypatch, watching)
    try:
        asked = [(prompt, SAMPLINGS[n % 2]) for n, prompt in enumerate(questions(alone, 4))]
        for _ in range(2):
            asyncio.run(all_written(service, asked))
    finally:
        service.shutdown()
    assert len(watching.texts) == 8
    for told in watching.texts:
        tokens = [token for some, _ in told for token in some]
        features = torch.cat([rows for _, rows in told])
        assert len(features) == len(tokens) - 1
        torch.testing.assert_close(features, plain(alone, tokens[:-1]), atol=2e-4, rtol=1e-3)


def test_what_all_requests_of_a_step_wish_for_is_asked_at_once(alone, monkeypatch):
    watching = Watching()
    service = serving_own(monkeypatch, watching)
    try:
        asked = [(prompt, SAMPLINGS[n % 2]) for n, prompt in enumerate(questions(alone, 4))]
        asyncio.run(all_written(service, asked))
        assert max(watching.together) == 4
    finally:
        service.shutdown()


@torch.inference_mode()
def plain(service: NativeEngine, tokens: list[int]) -> Tensor:
    """The library's own, in one pass."""
    network = service.model.network
    network.set_attn_implementation("sdpa")
    try:
        out = network(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    finally:
        network.set_attn_implementation(STEP_ATTENTION)
    return torch.cat([out.hidden_states[tap][0] for tap in TAPS], -1)


def test_a_proposer_that_breaks_down_costs_its_proposals_only(alone, monkeypatch):
    class Broken(Method):
        def new_state(self):
            return self

        def extend(self, tokens, features, foreseen):
            raise MemoryError

        def propose(self, wishes):
            raise AssertionError("of a text that it could not follow")

    service = serving_own(monkeypatch, Broken())
    try:
        asked = [(prompt, SAMPLINGS[0]) for prompt in questions(alone, 2)]
        assert asyncio.run(all_written(service, asked)) == asyncio.run(all_written(alone, asked))
    finally:
        service.shutdown()


def test_each_request_may_choose_its_method(alone, tireless):
    """In one batch, over one memory."""
    service = serving(*(METHODS[name] for name in ("parallel", "ngram", "eagle3", "draft_model", "space")))
    choices = [None, "none", *service.methods]
    try:
        prompts = questions(alone, 2 * len(choices))
        asked = [(prompt, SAMPLINGS[n % len(SAMPLINGS)]) for n, prompt in enumerate(prompts)]
        expected = asyncio.run(all_written(alone, asked))

        async def chosen():
            turns = (
                written(service, prompt, sampling, choices[n % len(choices)])
                for n, (prompt, sampling) in enumerate(asked)
            )
            return await asyncio.gather(*turns)

        assert [ids for ids, *_ in asyncio.run(chosen())] == [ids for ids, *_ in expected]
        for choice in choices:
            came = asyncio.run(speculated(service, prompts[0], choice))
            if choice == "none":
                assert came is None
            else:
                assert came.method == (choice or "parallel")
                assert 0 < sum(came.accepted_per_position) <= sum(came.proposed_per_position) or choice == "ngram"
    finally:
        service.shutdown()


def test_a_method_that_is_not_there_is_refused(alone):
    with pytest.raises(RequestError, match="speculation: must be one of none, got 'ngram'"):
        asyncio.run(written(alone, [1, 2], SAMPLINGS[0], "ngram"))
