"""What is written with proposals is what the target writes alone: token by token, and drawn as often as it should."""

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from itertools import product

import numpy as np
import pytest
import torch

from parse.config import EngineSettings
from parse.config import SpeculativeConfig as Settings
from parse.engines.loader import load_native_engine
from parse.engines.native.model import Model
from parse.engines.native.programs import generate
from parse.local import DEMO, DEMO_DRAFT, DEMO_TARGET
from parse.prompts import chat_prompt_token_ids
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.policy import SpeculativeMethod
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
from tests.parse.speculative.proposers.test_space import some_adapters
from training.measure import draw_problems

PROMPTS = 200
LENGTH = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)

CHAINS = (
    Settings(method="ngram"),
    Settings(method="draft_model", model=DEMO_DRAFT),
    Settings(method="eagle3", model=str(DEMO / "demo-eagle3")),
    Settings(method="parallel", model=str(DEMO / "demo-parallel")),
    Settings(method="space", model=str(DEMO / "demo-space")),
)
TREES = (
    Settings(method="eagle3", model=str(DEMO / "demo-eagle3"), topk=3, num_speculative_tokens=12),
    Settings(method="parallel", model=str(DEMO / "demo-parallel"), topk=2),
)


def serve(*ways):
    return load_native_engine(
        EngineSettings(
            model=DEMO_TARGET, num_threads=1, max_model_len=512, memory_mb=256, max_num_seqs=16, speculation=ways
        )
    )


@pytest.fixture(scope="module")
def alone():
    service = serve()
    yield service
    service.shutdown()


@pytest.fixture(scope="module")
def prompts(alone):
    """Questions, some of them asked a second time after an answer, or broken off, or put of words at random."""
    rng = random.Random(8)
    found = []
    for problem in draw_problems(12, PROMPTS):
        ids = chat_prompt_token_ids(alone.model.tokenizer, [{"role": "user", "content": problem.question}])
        match rng.randrange(4):
            case 0:
                ids = ids[: rng.randint(1, len(ids))]
            case 1:
                ids = [*ids, *rng.choices(ids, k=20)]
            case 2:
                ids = rng.choices(range(alone.model.vocabulary), k=rng.randint(1, 60))
        found.append(list(ids))
    return found


async def written(service, prompt, choice, delay):
    await asyncio.sleep(delay)
    ids, parts = [], []
    async with aclosing(service.generate(prompt, sampling=GREEDY, speculation=choice)) as pieces:
        async for tokens in pieces:
            ids += tokens.ids
            parts.append(tokens.speculated)
    return ids, sum_stats(parts)


async def all_written(service, prompts, choices, rng):
    """They come by and by, and more of them than are served at once."""
    asked = (
        written(service, prompt, choice, 0.5 * rng.random()) for prompt, choice in zip(prompts, choices, strict=True)
    )
    return await asyncio.gather(*asked)


@pytest.fixture(scope="module")
def expected(alone, prompts):
    found = asyncio.run(all_written(alone, prompts, ["none"] * PROMPTS, random.Random(0)))
    return [ids for ids, _ in found]


@pytest.mark.parametrize("ways", [CHAINS, TREES], ids=["chains", "trees"])
def test_200_prompts_are_answered_as_by_the_target_alone_by_every_method_side_by_side(alone, prompts, expected, ways):
    service = serve(*ways)
    choices = [*service.methods, "none"]
    proposed: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    try:
        for turn in range(len(choices)):  # so that each of them answers every prompt
            chosen = [choices[(number + turn) % len(choices)] for number in range(PROMPTS)]
            found = asyncio.run(all_written(service, prompts, chosen, random.Random(turn)))
            wrong = {
                number: difference(alone, prompts[number], ids, expected[number])
                for number, (ids, _) in enumerate(found)
                if ids != expected[number]
            }
            assert not wrong
            for _, came in found:
                if came is not None:
                    proposed[came.method] += sum(came.proposed_per_position)
                    accepted[came.method] += sum(came.accepted_per_position)
        assert service.stats.num_step_requests > 4 * service.stats.num_steps
    finally:
        service.shutdown()
    for method in service.methods:
        assert 0 < accepted[method] < proposed[method]


def difference(alone, prompt, ids, wanted):
    """Where it is, and both tokens with their logits in one plain pass."""
    place = next(n for n, (one, other) in enumerate(zip(ids, wanted, strict=False)) if one != other)
    logits = plain_logits(alone.model, [*prompt, *wanted[:place]])
    return place, [(token, float(logits[token])) for token in (ids[place], wanted[place])]


@torch.inference_mode()
def plain_logits(model, ids):
    model._attend_with("sdpa")
    try:
        return model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        model._attend_with("parse_step")


# Drawn at random.

WORDS = 5
WRITTEN = 4
TEXTS = 4000
PROMPT = [1, 4, 2, 0, 1, 4]
KINDS = ["none", "ngram", "draft model", "eagle3", "eagle3 tree", "parallel", "parallel tree", "space"]


def method_of(kind, model, tokenizer, folder):
    sizes = dict(hidden_size=32, vocab_size=WORDS, draft_vocab_size=4, eagle_aux_hidden_state_layer_ids=[1, 2, 3])
    if kind.startswith("parallel"):
        sizes |= dict(parallel_tokens=3, num_hidden_layers=2)
    config = naive.sizes(**sizes)
    beam = 3 if kind.endswith("tree") else 1
    match kind.split()[0]:
        case "ngram":
            return NgramProposer()
        case "draft":
            return DraftModelProposer(Model(build("llama", seed=9, vocab_size=WORDS), tokenizer))
        case "space":
            return SpaceProposer(some_adapters(model.network).attach(model.network), 2)
    loaded = load_head(naive.write(folder, config, naive.checkpoint(config)), TargetModel.of(model.network))
    return (
        Eagle3Proposer(*loaded, depth=3, beam=beam)
        if kind.startswith("eagle3")
        else ParallelSpecProposer(*loaded, beam=beam)
    )


@pytest.fixture(scope="module")
def reference():
    return build("llama", seed=6, vocab_size=WORDS, num_hidden_layers=4, initializer_range=0.15)


@pytest.fixture(scope="module")
def chances(reference):
    """Of all rows of words that may be written, in their order."""
    texts = list(product(range(WORDS), repeat=WRITTEN))
    found = np.ones(len(texts))
    for number, text in enumerate(texts):
        likely = plain(reference, [*PROMPT, *text])[len(PROMPT) - 1 : -1].double().softmax(-1)
        found[number] = float(likely[range(WRITTEN), text].prod())
    assert found.sum() == pytest.approx(1)
    return found.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_proposes_texts_are_drawn_as_often_as_they_should_be(kind, reference, chances, tokenizer, tmp_path):
    model = Model(build("llama", seed=6, vocab_size=WORDS, num_hidden_layers=4, initializer_range=0.15), tokenizer)
    way = None
    if kind != "none":
        method = method_of(kind, model, tokenizer, tmp_path)
        model.aux_hidden_state_layers = method.aux_hidden_state_layers
        model.mask_embedder = method.mask_embedder if kind == "space" else None
        way = SpeculativeMethod(
            "eagle3", GuardedProposer(method, WORDS), 6, False, model.aux_hidden_state_layers, StepCostModel()
        )
        method.reserve(40, 32)
    texts: list[list] = [[] for _ in range(TEXTS)]
    with serving(model, contexts=40, capacity=32, max_num_seqs=32, max_num_batched_tokens=256) as engine:
        replies = []
        for seed, pieces in enumerate(texts):
            program = generate(
                PROMPT,
                (),
                SamplingParams(seed=seed, ignore_eos=True),
                stop_token_ids=(),
                max_new_tokens=WRITTEN,
                emit=pieces.append,
                speculation=way.start_sequence() if way else None,
            )
            replies.append(submit(engine, PROMPT[:-1], program, WRITTEN + 1))
        for reply in replies:
            reply.result()
    counts = np.zeros((WORDS,) * WRITTEN, int)
    for pieces in texts:
        counts[tuple(token for piece in pieces for token in piece.ids)] += 1
    assert not surprising(counts.ravel(), chances)
    flatter = np.array(chances) ** 0.8
    assert surprising(counts.ravel(), (flatter / flatter.sum()).tolist())
    if way:
        came = sum_stats(piece.speculated for pieces in texts for piece in pieces)
        assert came is not None and TEXTS / 10 < sum(came.accepted_per_position) < sum(came.proposed_per_position)
