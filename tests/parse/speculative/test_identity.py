"""Output with proposals equals the target's own: token by token if greedy, in distribution if sampled."""

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from itertools import product

import numpy as np
import pytest
import torch

from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_DRAFT, DEMO_MODELS, DEMO_TARGET
from parse.engines.native.attention import STEP_ATTENTION
from parse.engines.native.generation import generate
from parse.engines.native.model import Model
from parse.engines.native_loader import load_native_engine
from parse.prompts import chat_prompt_token_ids
from parse.requests import GenerateRequest
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal_policy import SpeculativeMethod
from parse.speculative.proposers.draft_model import DraftModelProposer
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import TargetModel
from parse.speculative.proposers.ngram import NgramProposer
from parse.speculative.proposers.parallelspec import ParallelSpecProposer
from parse.speculative.proposers.space import SpaceProposer
from parse.types import SamplingParams, sum_stats
from tests.parse.engines.native.chance import surprising
from tests.parse.engines.native.tiny import build, plain, serving, submit
from tests.parse.speculative import naive
from tests.parse.speculative.proposers.test_space import random_adapters
from training.measure import draw_problems

pytestmark = pytest.mark.slow

NUM_PROMPTS = 200
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

CHAINS = (
    SpeculativeConfig(method="ngram"),
    SpeculativeConfig(method="draft_model", model=DEMO_DRAFT),
    SpeculativeConfig(method="eagle3", model=str(DEMO_MODELS / "demo-eagle3")),
    SpeculativeConfig(method="parallel", model=str(DEMO_MODELS / "demo-parallel")),
    SpeculativeConfig(method="space", model=str(DEMO_MODELS / "demo-space")),
)
TREES = (
    SpeculativeConfig(method="eagle3", model=str(DEMO_MODELS / "demo-eagle3"), topk=3, num_speculative_tokens=12),
    SpeculativeConfig(method="parallel", model=str(DEMO_MODELS / "demo-parallel"), topk=2),
)


def engine_with(*configs):
    return load_native_engine(
        EngineSettings(
            model=DEMO_TARGET,
            num_threads=1,
            max_model_len=512,
            kv_cache_memory_bytes=256 * 2**20,
            max_num_seqs=16,
            speculative_configs=configs,
        )
    )


@pytest.fixture(scope="module")
def plain_engine():
    engine = engine_with()
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def prompts(plain_engine):
    """Questions; some are cut off, followed by random words of theirs, or replaced by random tokens."""
    rng = random.Random(8)
    prompts = []
    for problem in draw_problems(12, NUM_PROMPTS):
        ids = chat_prompt_token_ids(plain_engine.model.tokenizer, [{"role": "user", "content": problem.question}])
        match rng.randrange(4):
            case 0:
                ids = ids[: rng.randint(1, len(ids))]
            case 1:
                ids = [*ids, *rng.choices(ids, k=20)]
            case 2:
                ids = rng.choices(range(plain_engine.model.vocab_size), k=rng.randint(1, 60))
        prompts.append(list(ids))
    return prompts


async def generate_later(engine, prompt, method, delay_s):
    """The tokens, and the statistics of the proposals."""
    await asyncio.sleep(delay_s)
    request = GenerateRequest(prompt_token_ids=tuple(prompt), sampling_params=GREEDY, speculative_method=method)
    token_ids, stats = [], []
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            token_ids += delta.token_ids
            stats.append(delta.speculation)
    return token_ids, sum_stats(stats)


async def generate_all(engine, prompts, methods, rng):
    """The requests arrive one after another, and more of them than are served at once."""
    return await asyncio.gather(
        *(
            generate_later(engine, prompt, method, 0.5 * rng.random())
            for prompt, method in zip(prompts, methods, strict=True)
        )
    )


@pytest.fixture(scope="module")
def expected(plain_engine, prompts):
    outputs = asyncio.run(generate_all(plain_engine, prompts, ["none"] * NUM_PROMPTS, random.Random(0)))
    return [token_ids for token_ids, _ in outputs]


@pytest.mark.parametrize("configs", [CHAINS, TREES], ids=["chains", "trees"])
def test_200_prompts_are_answered_as_by_the_target_alone_by_every_method_side_by_side(
    plain_engine, prompts, expected, configs
):
    engine = engine_with(*configs)
    methods = [*engine.methods, "none"]
    proposed: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    try:
        for offset in range(len(methods)):  # so that each method answers every prompt
            methods_of_prompts = [methods[(number + offset) % len(methods)] for number in range(NUM_PROMPTS)]
            outputs = asyncio.run(generate_all(engine, prompts, methods_of_prompts, random.Random(offset)))
            differences = {
                number: first_difference(plain_engine, prompts[number], token_ids, expected[number])
                for number, (token_ids, _) in enumerate(outputs)
                if token_ids != expected[number]
            }
            assert not differences
            for _, stats in outputs:
                if stats is not None:
                    proposed[stats.method] += sum(stats.proposed_per_position)
                    accepted[stats.method] += sum(stats.accepted_per_position)
        assert engine.stats.num_step_requests > 4 * engine.stats.num_steps
    finally:
        engine.shutdown()
    for method in engine.methods:
        assert 0 < accepted[method] < proposed[method]


def first_difference(plain_engine, prompt, token_ids, expected_ids):
    """Its position, and both tokens with their logits in one pass of the library."""
    position = next(n for n, (one, other) in enumerate(zip(token_ids, expected_ids, strict=False)) if one != other)
    logits = logits_of_transformers(plain_engine.model, [*prompt, *expected_ids[:position]])
    return position, [(token, float(logits[token])) for token in (token_ids[position], expected_ids[position])]


@torch.inference_mode()
def logits_of_transformers(model, token_ids):
    model.network.set_attn_implementation("sdpa")
    try:
        return model.network(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
    finally:
        model.network.set_attn_implementation(STEP_ATTENTION)


# Sampled output.

VOCAB_SIZE = 5
OUTPUT_TOKENS = 4
NUM_SAMPLES = 4000
PROMPT = (1, 4, 2, 0, 1, 4)
KINDS = ["none", "ngram", "draft model", "eagle3", "eagle3 tree", "parallel", "parallel tree", "space"]


def make_proposer(kind, model, tokenizer, folder):
    sizes = dict(hidden_size=32, vocab_size=VOCAB_SIZE, draft_vocab_size=4, eagle_aux_hidden_state_layer_ids=[1, 2, 3])
    if kind.startswith("parallel"):
        sizes |= dict(parallel_tokens=3, num_hidden_layers=2)
    config = naive.sizes(**sizes)
    topk = 3 if kind.endswith("tree") else 1
    match kind.split()[0]:
        case "ngram":
            return NgramProposer()
        case "draft":
            return DraftModelProposer(Model(build("llama", seed=9, vocab_size=VOCAB_SIZE), tokenizer))
        case "space":
            return SpaceProposer(random_adapters(model.network).attach(model.network), 2)
    head, embedding = load_head(naive.write(folder, config, naive.checkpoint(config)), TargetModel.of(model.network))
    if kind.startswith("eagle3"):
        return Eagle3Proposer(head, embedding, depth=3, topk=topk)
    return ParallelSpecProposer(head, embedding, topk=topk)


def build_target():
    return build("llama", seed=6, vocab_size=VOCAB_SIZE, num_hidden_layers=4, initializer_range=0.15)


@pytest.fixture(scope="module")
def reference():
    return build_target()


@pytest.fixture(scope="module")
def output_probabilities(reference):
    """The probability of every possible output, in lexicographic order."""
    outputs = list(product(range(VOCAB_SIZE), repeat=OUTPUT_TOKENS))
    probabilities = np.ones(len(outputs))
    for number, output in enumerate(outputs):
        distributions = plain(reference, [*PROMPT, *output])[len(PROMPT) - 1 : -1].double().softmax(-1)
        probabilities[number] = float(distributions[range(OUTPUT_TOKENS), output].prod())
    assert probabilities.sum() == pytest.approx(1)
    return probabilities.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_outputs_have_the_targets_distribution_with_every_method(
    kind, reference, output_probabilities, tokenizer, tmp_path
):
    model = Model(build_target(), tokenizer)
    method = None
    if kind != "none":
        proposer = make_proposer(kind, model, tokenizer, tmp_path)
        model.aux_hidden_state_layers = proposer.aux_hidden_state_layers
        model.mask_embedder = proposer.mask_embedder if kind == "space" else None
        guarded = GuardedProposer(proposer, VOCAB_SIZE)
        method = SpeculativeMethod("eagle3", guarded, 6, False, model.aux_hidden_state_layers, StepCostModel())
        proposer.reserve(40, 32)
    samples: list[list] = [[] for _ in range(NUM_SAMPLES)]
    limits = dict(max_sequences=40, sequence_capacity=32, max_num_seqs=32, max_num_batched_tokens=256)
    with serving(model, **limits) as engine:
        submitted = []
        for seed, deltas in enumerate(samples):
            params = SamplingParams(seed=seed, ignore_eos=True)
            program = generate(
                GenerateRequest(prompt_token_ids=PROMPT, sampling_params=params),
                eos_token_ids=(),
                max_new_tokens=OUTPUT_TOKENS,
                emit=deltas.append,
                speculation=method.start_sequence() if method else None,
            )
            submitted.append(submit(engine, PROMPT[:-1], program, OUTPUT_TOKENS + 1))
        for submission in submitted:
            submission.result()
    counts = np.zeros((VOCAB_SIZE,) * OUTPUT_TOKENS, int)
    for deltas in samples:
        counts[tuple(token for delta in deltas for token in delta.token_ids)] += 1
    assert not surprising(counts.ravel(), output_probabilities)
    flatter = np.array(output_probabilities) ** 0.8
    assert surprising(counts.ravel(), (flatter / flatter.sum()).tolist())
    if method:
        stats = sum_stats(delta.speculation for deltas in samples for delta in deltas)
        assert stats is not None
        assert NUM_SAMPLES / 10 < sum(stats.accepted_per_position) < sum(stats.proposed_per_position)
