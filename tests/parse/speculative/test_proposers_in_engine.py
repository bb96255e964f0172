"""Proposers inside the engine: the output stays the target's own, and they receive the target's hidden states."""

import asyncio
import random
import threading
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parse.acceptance import AcceptancePolicy, Thresholds
from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_DRAFT, DEMO_MODELS, DEMO_TARGET
from parse.engines.native.attention import STEP_ATTENTION
from parse.engines.native.engine import NativeEngine
from parse.engines.native.fair_lock import CPU_LOCK
from parse.engines.native.model import Model
from parse.engines.native.step_timing import measure_step_seconds
from parse.engines.native_loader import load_native_engine
from parse.errors import RequestError
from parse.prompts import VerificationSuffix, chat_prompt_token_ids
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import Proposal, Proposer
from parse.speculative.proposal_policy import SpeculativeMethod
from parse.types import SamplingParams, sum_stats
from training.measure import draw_problems

pytestmark = pytest.mark.slow

SETTINGS = EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=1024, kv_cache_memory_bytes=256 * 2**20)
LAYERS = (2, 7, 11)
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=120),
    SamplingParams(temperature=0.8, seed=3, max_tokens=120),
    SamplingParams(temperature=1.0, seed=5, max_tokens=60, presence_penalty=0.5, repetition_penalty=1.1, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=120, stop=["Third"]),
]


class HiddenStateProposer(Proposer[Any]):
    """Base of the proposers of these tests, which read hidden states."""

    aux_hidden_state_layers = LAYERS

    def reserve(self, max_sequences, sequence_capacity):
        assert max_sequences > 0 and sequence_capacity > 0


class RecordingProposer(HiddenStateProposer):
    """Proposes random trees, and records what its states receive."""

    def __init__(self):
        self.states: list[RecordingState] = []
        self.batch_sizes: list[int] = []

    def new_state(self):
        self.states.append(RecordingState(seed=len(self.states)))
        return self.states[-1]

    def propose(self, requests):
        self.batch_sizes.append(len(requests))
        return [request.state.random_tree(request.max_tokens) for request in requests]


class RecordingState:
    def __init__(self, seed):
        self.received: list = []
        self.rng = random.Random(seed)

    def extend(self, tokens, hidden_states, mask_prediction):
        assert mask_prediction is None
        self.received.append((tuple(tokens), hidden_states))

    def random_tree(self, max_tokens):
        size = min(max_tokens, self.rng.randint(0, 6))
        prompt, _ = self.received[0]
        tokens = tuple(self.rng.choice(prompt) for _ in range(size))
        return Proposal(tokens, tuple(self.rng.randrange(-1, node) for node in range(size)))


CONFIGS = {
    "ngram": SpeculativeConfig(method="ngram", num_speculative_tokens=6),
    "draft_model": SpeculativeConfig(method="draft_model", model=DEMO_DRAFT, num_speculative_tokens=5),
    "eagle3": SpeculativeConfig(method="eagle3", model=str(DEMO_MODELS / "demo-eagle3")),
    "eagle3 tree": SpeculativeConfig(
        method="eagle3", model=str(DEMO_MODELS / "demo-eagle3"), topk=3, num_speculative_tokens=12
    ),
    "parallel": SpeculativeConfig(method="parallel", model=str(DEMO_MODELS / "demo-parallel")),
    "parallel tree": SpeculativeConfig(method="parallel", model=str(DEMO_MODELS / "demo-parallel"), topk=2),
    "space": SpeculativeConfig(method="space", model=str(DEMO_MODELS / "demo-space")),
}


def engine_with(*configs: SpeculativeConfig) -> NativeEngine:
    return load_native_engine(SETTINGS.model_copy(update={"speculative_configs": configs}))


def engine_with_proposer(proposer) -> NativeEngine:
    """An engine with a method that is not in the registry."""
    torch.set_num_threads(1)
    model = Model.load(DEMO_TARGET, device="cpu")
    model.aux_hidden_state_layers = proposer.aux_hidden_state_layers
    cost_model = StepCostModel()
    cost_model.initialize(measure_step_seconds(model))
    guarded = GuardedProposer(proposer, model.vocab_size)
    method = SpeculativeMethod("eagle3", guarded, 6, False, model.aux_hidden_state_layers, cost_model)
    return NativeEngine(SETTINGS, model, methods={"eagle3": method}, cost_model=cost_model)


@pytest.fixture
def untimed(monkeypatch):
    """Without measurements nothing seems to cost time, so that every step gets proposals."""
    monkeypatch.setattr("parse.engines.native_loader.planned_step_seconds", lambda model: [])
    monkeypatch.setattr(StepCostModel, "record", lambda *_: None)


@pytest.fixture(scope="module")
def plain_engine():
    engine = load_native_engine(SETTINGS)
    yield engine
    engine.shutdown()


@pytest.fixture(params=[*CONFIGS, "at random"])
def engine(request):
    at_random = request.param == "at random"
    engine = engine_with_proposer(RecordingProposer()) if at_random else engine_with(CONFIGS[request.param])
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def plain_continuation(plain_engine):
    """What the target alone generates for a request; the tests of all methods share the results."""
    results: dict = {}

    def continuation(request):
        key = (request.prompt_token_ids, request.output_token_ids, request.sampling_params.seed)
        if key not in results:
            results[key], _, _ = asyncio.run(generate(plain_engine, request))
        return results[key]

    return continuation


def prompts_for(engine, count):
    conversations = [[{"role": "user", "content": problem.question}] for problem in draw_problems(5, count)]
    return [chat_prompt_token_ids(engine.model.tokenizer, messages) for messages in conversations]


def requests_for(prompts, params=PARAMS, methods=(None,)):
    """A request for each prompt; sampling parameters and methods take turns."""
    return [
        GenerateRequest(
            prompt_token_ids=tuple(prompt),
            sampling_params=params[number % len(params)],
            speculative_method=methods[number % len(methods)],
        )
        for number, prompt in enumerate(prompts)
    ]


async def collect_stats(engine, prompt, method):
    request = GenerateRequest(prompt_token_ids=tuple(prompt), sampling_params=PARAMS[0], speculative_method=method)
    async with aclosing(engine.generate(request)) as deltas:
        return sum_stats([delta.speculation async for delta in deltas])


async def generate(engine, request):
    """The tokens, their log-probabilities with the alternatives, and the finish reason."""
    token_ids, logprobs, finish_reason = [], [], None
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            token_ids += delta.token_ids
            logprobs += [(logprob.logprob, [token for token, _ in logprob.top]) for logprob in delta.logprobs]
            finish_reason = delta.finish_reason
    return token_ids, logprobs, finish_reason


async def generate_all(engine, requests):
    return await asyncio.gather(*(generate(engine, request) for request in requests))


def fused_requests(requests, drafts):
    """Requests that verify a draft first. The thresholds differ, so that all, some or none of it is accepted."""
    return [
        VerifyAndGenerateRequest(
            verify=VerifyRequest(
                prompt_token_ids=request.prompt_token_ids,
                draft_token_ids=tuple(draft),
                prefix_lengths=range(4, len(draft) + 1, 4),
                suffix=VerificationSuffix((1, 2, 3), (4,), (5,)),
                policy=AcceptancePolicy(Thresholds(prefix=(0.0, 0.5, 1.0)[number % 3]), "longest_passing"),
            ),
            sampling_params=request.sampling_params,
        )
        for number, (request, draft) in enumerate(zip(requests, drafts, strict=True))
    ]


async def verify_and_generate(engine, fused_request):
    """The number of accepted draft tokens, and the tokens generated after them."""
    async with aclosing(engine.verify_and_generate(fused_request)) as items:
        accepted = fused_request.accepted_prefix_length(await anext(items))
        return accepted, [token async for delta in items for token in delta.token_ids]


async def verify_and_generate_all(engine, requests):
    return await asyncio.gather(*(verify_and_generate(engine, request) for request in requests))


def test_the_output_in_a_mixed_batch_is_the_targets_own(plain_engine, engine):
    requests = requests_for(prompts_for(plain_engine, 12))
    expected = asyncio.run(generate_all(plain_engine, requests))
    for _ in range(2):  # the second time, prompts and their hidden states come from the cache
        outputs = asyncio.run(generate_all(engine, requests))
        for output, expected_output in zip(outputs, expected, strict=True):
            (token_ids, logprobs, finish_reason), (expected_ids, expected_logprobs, expected_finish) = (
                output,
                expected_output,
            )
            assert token_ids == expected_ids and finish_reason == expected_finish
            assert [top for _, top in logprobs] == [top for _, top in expected_logprobs]
            assert [p for p, _ in logprobs] == pytest.approx([p for p, _ in expected_logprobs], abs=1e-4)


def test_the_output_after_a_verification_is_the_targets_own(plain_engine, engine, plain_continuation):
    requests = requests_for(prompts_for(plain_engine, 6))
    drafts = [plain_continuation(request)[:24] for request in requests]
    outputs = asyncio.run(verify_and_generate_all(engine, fused_requests(requests, drafts)))
    assert {0, 24} <= {accepted for accepted, _ in outputs}
    for request, draft, (accepted, token_ids) in zip(requests, drafts, outputs, strict=True):
        assert token_ids == plain_continuation(replace(request, output_token_ids=tuple(draft[:accepted])))


@pytest.mark.parametrize("method", ["eagle3", "eagle3 tree", "parallel", "space"])
def test_heads_save_most_of_the_steps(plain_engine, untimed, method):
    engine = engine_with(CONFIGS[method])
    try:
        engine_start, plain_start = engine.stats.num_steps, plain_engine.stats.num_steps
        for request in requests_for(prompts_for(plain_engine, 6), PARAMS[:1]):
            for each in (engine, plain_engine):
                asyncio.run(generate(each, request))
        ratio = (plain_engine.stats.num_steps - plain_start) / (engine.stats.num_steps - engine_start)
        assert ratio > 3.5
    finally:
        engine.shutdown()


def test_proposers_receive_the_models_hidden_states_of_the_token_before_each(plain_engine):
    proposer = RecordingProposer()
    engine = engine_with_proposer(proposer)
    try:
        requests = requests_for(prompts_for(plain_engine, 4), PARAMS[:2])
        for _ in range(2):
            asyncio.run(generate_all(engine, requests))
        drafts = [ids[:24] for ids, _, _ in asyncio.run(generate_all(plain_engine, requests))]
        asyncio.run(verify_and_generate_all(engine, fused_requests(requests, drafts)))
    finally:
        engine.shutdown()
    assert len(proposer.states) == 12
    for state in proposer.states:
        tokens = [token for new_tokens, _ in state.received for token in new_tokens]
        hidden_states = torch.cat([new_states for _, new_states in state.received])
        assert len(hidden_states) == len(tokens) - 1
        expected = hidden_states_of_transformers(plain_engine, tokens[:-1])
        torch.testing.assert_close(hidden_states, expected, atol=2e-4, rtol=1e-3)


def test_all_requests_of_a_step_get_their_proposals_in_one_call(plain_engine):
    proposer = RecordingProposer()
    engine = engine_with_proposer(proposer)
    try:
        asyncio.run(generate_all(engine, requests_for(prompts_for(plain_engine, 4), PARAMS[:2])))
        assert max(proposer.batch_sizes) == 4
    finally:
        engine.shutdown()


@torch.inference_mode()
def hidden_states_of_transformers(engine: NativeEngine, tokens: list[int]) -> Tensor:
    """The library's hidden states, computed in one pass."""
    network = engine.model.network
    network.set_attn_implementation("sdpa")
    try:
        out = network(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    finally:
        network.set_attn_implementation(STEP_ATTENTION)
    return torch.cat([out.hidden_states[layer][0] for layer in LAYERS], -1)


def test_a_proposer_that_fails_costs_only_its_proposals(plain_engine):
    class FailingProposer(HiddenStateProposer):
        def new_state(self):
            return self

        def extend(self, tokens, hidden_states, mask_prediction):
            raise MemoryError

        def propose(self, requests):
            raise AssertionError("the state could not be extended, so there must be no request")

    engine = engine_with_proposer(FailingProposer())
    try:
        requests = requests_for(prompts_for(plain_engine, 2), PARAMS[:1])
        assert asyncio.run(generate_all(engine, requests)) == asyncio.run(generate_all(plain_engine, requests))
    finally:
        engine.shutdown()


def test_each_request_may_choose_its_method(plain_engine, untimed):
    """The requests share one batch and one KV cache."""
    engine = engine_with(*(CONFIGS[name] for name in ("parallel", "ngram", "eagle3", "draft_model", "space")))
    choices = [None, "none", *engine.methods]
    try:
        prompts = prompts_for(plain_engine, 2 * len(choices))
        expected = asyncio.run(generate_all(plain_engine, requests_for(prompts)))
        outputs = asyncio.run(generate_all(engine, requests_for(prompts, methods=choices)))
        assert [token_ids for token_ids, *_ in outputs] == [token_ids for token_ids, *_ in expected]
        for choice in choices:
            stats = asyncio.run(collect_stats(engine, prompts[0], choice))
            if choice == "none":
                assert stats is None
            else:
                assert stats.method == (choice or "parallel")
                num_accepted, num_proposed = sum(stats.accepted_per_position), sum(stats.proposed_per_position)
                assert 0 < num_accepted <= num_proposed or choice == "ngram"
    finally:
        engine.shutdown()


def test_a_method_that_the_engine_does_not_have_is_rejected(plain_engine):
    request = GenerateRequest(prompt_token_ids=(1, 2), sampling_params=PARAMS[0], speculative_method="ngram")
    with pytest.raises(RequestError, match="speculation: must be one of none, got 'ngram'"):
        asyncio.run(generate(plain_engine, request))


def test_proposers_compute_while_the_engine_holds_the_cpu(untimed):
    """Otherwise the engines of a process would compete for it."""
    lock_was_held = []

    class LockObserver(RecordingProposer):
        def propose(self, requests):
            entered = threading.Event()

            def enter():
                with CPU_LOCK:
                    entered.set()

            thread = threading.Thread(target=enter, daemon=True)
            thread.start()
            while not (entered.is_set() or CPU_LOCK.waiting):
                time.sleep(0.001)
            lock_was_held.append(not entered.is_set())
            return super().propose(requests)

    engine = engine_with_proposer(LockObserver())
    asyncio.run(generate_all(engine, requests_for(prompts_for(engine, 1), PARAMS[:1])))
    engine.shutdown()
    assert lock_was_held and all(lock_was_held)
