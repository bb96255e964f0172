"""A draft model uses tokens of its method without checking them, compared with a naive implementation."""

import asyncio
import random
from itertools import accumulate
from operator import mul
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.config import DraftingSettings, EngineSettings, SpeculativeConfig
from parse.demo import DEMO_DRAFT, DEMO_DRAFT_PARALLEL
from parse.engines.native.engine import NativeEngine
from parse.engines.native_loader import load_native_engine
from parse.prompts import chat_prompt_token_ids
from parse.requests import GenerateRequest
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import NOT_READY, Proposal, Proposer, chain_proposal
from parse.speculative.proposal_policy import SpeculativeMethod
from parse.types import SamplingParams
from tests.parse.engines.native.test_generation import END, PROMPT, TABLE, VOCABULARY, ids, write
from training.measure import draw_problems

MAX_TOKENS = 5  # in a proposal
GREEDY = SamplingParams(temperature=0.0)


def proposed_chain(seed: int, length: int, max_tokens: int) -> list[tuple[int, float]]:
    """What is proposed after a sequence of that length: each token with its probability, given those before it."""
    rng = random.Random(f"{seed}/{length}")
    chain = [(rng.randrange(VOCABULARY), rng.choice((0.1, 0.5, 0.9))) for _ in range(rng.randint(0, MAX_TOKENS))]
    return chain[:max_tokens]


class ChainProposer(Proposer[Any]):
    """Proposes that chain. Before each proposal, it is not ready for `delays` calls."""

    def __init__(self, seed: int, delays: int = 0) -> None:
        self.seed, self.delays, self.length, self.waited = seed, delays, 0, 0

    def new_state(self):
        return self

    def extend(self, tokens, hidden_states, mask_prediction):
        self.length += len(tokens)
        self.waited = 0

    def propose(self, requests):
        return [self._proposal(request.max_tokens) for request in requests]

    def _proposal(self, max_tokens: int) -> Proposal:
        self.waited += 1
        if self.waited <= self.delays:
            return NOT_READY
        chain = proposed_chain(self.seed, self.length, max_tokens)
        return chain_proposal([token for token, _ in chain], list(accumulate((p for _, p in chain), mul)))


def drafting(proposer: ChainProposer, min_confidence: float | None, step_seconds: float = 0.0, *, check_all=False):
    cost_model = StepCostModel()
    if step_seconds:
        cost_model.initialize([(1, step_seconds), (2, 9 * step_seconds)])
    method = SpeculativeMethod(
        "parallel", GuardedProposer(proposer, VOCABULARY), MAX_TOKENS, False, (), cost_model, min_confidence
    )
    return method.start_sequence(check_all=check_all)


def naive_draft(seed: int, min_confidence: float, max_new_tokens: int) -> list[int]:
    """The draft token by token: a confident token is taken, and all others are what the model chooses."""
    draft: list[int] = []
    while len(draft) < max_new_tokens and END not in draft:
        length = len(PROMPT) + len(draft)
        for token, probability in [*proposed_chain(seed, length, max_new_tokens - len(draft) - 1), (None, 0.0)]:
            choice = int(TABLE[[*PROMPT, *draft][-1]].argmax())
            draft.append(token if token is not None and probability >= min_confidence else choice)
            if draft[-1] != token or draft[-1] == END:
                break
    return draft[: draft.index(END)] if END in draft else draft


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    st.integers(1, 30),
    st.integers(0, 2),
    st.sampled_from([1, 3, 99]),
)
def test_confident_tokens_are_taken_and_the_others_are_the_models_own(
    seed, min_confidence, max_new_tokens, delays, stream_interval
):
    deltas, final_context, _ = write(
        GREEDY,
        max_new_tokens=max_new_tokens,
        eos_token_ids={END},
        stream_interval=stream_interval,
        speculation=drafting(ChainProposer(seed, delays), min_confidence),
    )
    draft = ids(deltas)
    assert draft == naive_draft(seed, min_confidence, max_new_tokens)
    assert deltas[-1].finish_reason == ("length" if len(draft) == max_new_tokens else "stop")
    assert final_context == [*PROMPT, *draft][: len(final_context)]


@given(st.integers(0, 10**6))
def test_if_nothing_is_checked_a_pass_yields_the_whole_proposal(seed):
    """It also yields the token that the model adds to it."""
    draft = naive_draft(seed, 0.0, 30)
    _, _, runs = write(
        GREEDY, max_new_tokens=30, eos_token_ids={END}, speculation=drafting(ChainProposer(seed), min_confidence=0.0)
    )
    length, expected = 0, 0
    while length < len(draft) or (length == len(draft) < 30):
        length += 1 + len(proposed_chain(seed, len(PROMPT) + length, 30 - length - 1))
        expected += 1
    assert runs == expected


@pytest.mark.parametrize("step_seconds", [1e-9, 1.0, 1e9])
def test_the_draft_does_not_depend_on_how_long_steps_take(step_seconds):
    """With these times, no proposal or no further token would pay."""
    for seed in range(20):
        speculation = drafting(ChainProposer(seed), 0.6, step_seconds)
        deltas, _, _ = write(GREEDY, max_new_tokens=30, eos_token_ids={END}, speculation=speculation)
        assert ids(deltas) == naive_draft(seed, 0.6, 30)


@pytest.mark.parametrize("options", [dict(min_confidence=None), dict(min_confidence=0.0, check_all=True)])
def test_if_everything_is_checked_the_draft_is_the_models_own(options):
    plain = ids(write(GREEDY, max_new_tokens=30, eos_token_ids={END})[0])
    for seed in range(20):
        speculation = drafting(ChainProposer(seed), **options)
        deltas, _, _ = write(GREEDY, max_new_tokens=30, eos_token_ids={END}, speculation=speculation)
        assert ids(deltas) == plain


@given(st.integers(0, 10**6), st.integers(0, VOCABULARY - 2), st.booleans())
def test_a_stop_token_among_unchecked_tokens_ends_the_draft(seed, stop, include):
    params = SamplingParams(temperature=0.0, stop_token_ids=(stop,), include_stop_str_in_output=include)
    speculation = drafting(ChainProposer(seed), 0.0)
    deltas, _, _ = write(params, max_new_tokens=30, eos_token_ids={END}, speculation=speculation)
    draft = naive_draft(seed, 0.0, 30)
    assert ids(deltas) == (draft[: draft.index(stop) + include] if stop in draft else draft)


def test_a_tree_is_not_used_unchecked():
    speculation = drafting(ChainProposer(0), 0.5)
    with pytest.raises(ValueError, match="only the tokens of a chain"):
        speculation.unchecked_tokens(Proposal((1, 2), (-1, -1), (0.9, 0.8)))


def draft_engine(check: str, *more: SpeculativeConfig) -> NativeEngine:
    head = SpeculativeConfig(method="parallel", model=DEMO_DRAFT_PARALLEL)
    return load_native_engine(
        EngineSettings(
            model=DEMO_DRAFT,
            num_threads=1,
            max_model_len=1024,
            kv_cache_memory_bytes=2**28,
            speculative_configs=(head, *more),
            drafting=DraftingSettings.model_validate({"check": check}),
        )
    )


WHOLE_DRAFT = SamplingParams(temperature=0.0, max_tokens=200)


async def drafts(engine: NativeEngine, prompts, params=WHOLE_DRAFT, method=None):
    """Returns all drafts, which are written at the same time."""

    async def draft(prompt):
        request = GenerateRequest(prompt_token_ids=prompt, sampling_params=params, speculative_method=method)
        return [token async for delta in engine.generate(request) for token in delta.token_ids]

    return await asyncio.gather(*map(draft, prompts))


@pytest.mark.slow
def test_the_engine_of_a_draft_model_uses_tokens_unchecked_in_greedy_requests_with_its_first_method():
    never, always = draft_engine("never", SpeculativeConfig(method="ngram")), draft_engine("always")
    try:
        prompts = [
            tuple(chat_prompt_token_ids(always.tokenizer, [{"role": "user", "content": problem.question}]))
            for problem in draw_problems(5, 6)
        ]
        checked = asyncio.run(drafts(always, prompts))
        assert checked == asyncio.run(drafts(always, prompts, method="none"))

        steps_before = never.stats.num_steps
        unchecked = [asyncio.run(drafts(never, [prompt]))[0] for prompt in prompts]
        num_tokens, num_steps = sum(map(len, unchecked)), never.stats.num_steps - steps_before
        assert unchecked != checked and num_tokens > 12 * num_steps
        assert asyncio.run(drafts(never, prompts)) == unchecked

        assert asyncio.run(drafts(never, prompts, method="ngram")) == checked
        for params in (
            SamplingParams(temperature=0.0, max_tokens=200, presence_penalty=0.1),
            SamplingParams(temperature=1.0, seed=3, max_tokens=200),
        ):
            expected = asyncio.run(drafts(always, prompts, params, method="none"))
            assert asyncio.run(drafts(never, prompts, params)) == expected
    finally:
        never.shutdown()
        always.shutdown()
