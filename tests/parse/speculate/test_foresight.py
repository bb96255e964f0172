"""Proposers inside the engine: what is written stays the target's own, and their features are those of the model."""

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from parse.config import EngineSettings
from parse.engine.attention import STEP_ATTENTION
from parse.engine.service import ModelService
from parse.local import DEMO, DEMO_TARGET
from parse.prompts import prompt_ids
from parse.speculate.eagle3 import Eagle3
from parse.speculate.ngram import NgramProposer
from parse.speculate.parallel import Parallel
from parse.speculate.proposal import NOTHING, Proposal
from parse.types import Sampling
from training.measure import problems

SETTINGS = EngineSettings(model=DEMO_TARGET, threads=1, max_context=1024, memory_mb=256)
TAPS = (2, 7, 11)
SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=120),
    Sampling(temperature=0.8, seed=3, max_tokens=120),
    Sampling(temperature=1.0, seed=5, max_tokens=60, presence_penalty=0.5, repetition_penalty=1.1, logprobs=2),
    Sampling(temperature=0.0, max_tokens=120, stop=["Third"]),
]


class Ngrams:
    taps = ()

    def proposer(self):
        return NgramProposer()


@dataclass
class Watching:
    """Proposes at random, trees too, and keeps what it is told."""

    texts: list = field(default_factory=list)

    @property
    def taps(self):
        return TAPS

    def proposer(self):
        told: list = []
        self.texts.append(told)
        rng = random.Random(len(self.texts))

        class Proposing:
            def take(self, tokens, features):
                told.append((tuple(tokens), features))

            def propose(self, most):
                size = min(most, rng.randint(0, 6))
                tokens = tuple(rng.choice(told[0][0]) for _ in range(size))
                return Proposal(tokens, tuple(rng.randrange(-1, node) for node in range(size)))

        return Proposing()


METHODS: dict[str, Any] = {
    "ngram": lambda model: Ngrams(),
    "eagle3 chain": lambda model: Eagle3.load(DEMO / "demo-eagle3", model.network, beam=1),
    "eagle3 tree": lambda model: Eagle3.load(DEMO / "demo-eagle3", model.network, depth=4, beam=3),
    "parallel": lambda model: Parallel.load(DEMO / "demo-parallel", model.network),
    "at random": lambda model: Watching(),
}


@pytest.fixture(scope="module")
def alone():
    service = ModelService(SETTINGS)
    yield service
    service.close()


@pytest.fixture(params=METHODS)
def foreseen(request):
    service = ModelService(SETTINGS, foresight=METHODS[request.param])
    yield service
    service.close()


def questions(alone, count):
    turns = [[{"role": "user", "content": problem.question}] for problem in problems(5, count)]
    return [prompt_ids(alone.model.tokenizer, turn) for turn in turns]


async def written(service, prompt, sampling):
    ids, logprobs, finish = [], [], None
    async with aclosing(service.generate(prompt, sampling=sampling)) as pieces:
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


@pytest.mark.parametrize("method", ["eagle3 chain", "eagle3 tree", "parallel"])
def test_heads_save_most_of_the_passes(alone, method):
    service = ModelService(SETTINGS, foresight=METHODS[method])
    try:
        steps = [service.load.steps, alone.load.steps]
        for prompt in questions(alone, 6):
            for one in (service, alone):
                asyncio.run(written(one, prompt, SAMPLINGS[0]))
        saved = (alone.load.steps - steps[1]) / (service.load.steps - steps[0])
        assert saved > 3.5
    finally:
        service.close()


def test_the_features_told_are_the_models_own_of_the_token_before_each(alone):
    watching = Watching()
    service = ModelService(SETTINGS, foresight=lambda model: watching)
    try:
        asked = [(prompt, SAMPLINGS[n % 2]) for n, prompt in enumerate(questions(alone, 4))]
        for _ in range(2):
            asyncio.run(all_written(service, asked))
    finally:
        service.close()
    assert len(watching.texts) == 8
    for told in watching.texts:
        tokens = [token for some, _ in told for token in some]
        features = torch.cat([rows for _, rows in told])
        assert len(features) == len(tokens) - 1
        torch.testing.assert_close(features, plain(alone, tokens[:-1]), atol=2e-4, rtol=1e-3)


@torch.inference_mode()
def plain(service: ModelService, tokens: list[int]) -> Tensor:
    """The library's own, in one pass."""
    network = service.model.network
    network.set_attn_implementation("sdpa")
    try:
        out = network(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    finally:
        network.set_attn_implementation(STEP_ATTENTION)
    return torch.cat([out.hidden_states[tap][0] for tap in TAPS], -1)


def test_a_proposer_that_breaks_down_costs_its_proposals_only(alone):
    class Broken:
        @property
        def taps(self):
            return TAPS

        def proposer(self):
            class Breaking:
                def take(self, tokens, features):
                    raise MemoryError

                def propose(self, most):
                    return NOTHING

            return Breaking()

    service = ModelService(SETTINGS, foresight=lambda model: Broken())
    try:
        asked = [(prompt, SAMPLINGS[0]) for prompt in questions(alone, 2)]
        assert asyncio.run(all_written(service, asked)) == asyncio.run(all_written(alone, asked))
    finally:
        service.close()
