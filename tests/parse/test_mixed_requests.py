"""At temperature 0, a request gets the same answer alone and among others, also while cached prompts are evicted."""

import asyncio
import random

import pytest

from parse import EngineSettings, Pair
from parse.config import SpeculativeConfig
from parse.demo import DEMO_DRAFT, DEMO_PARALLEL, DEMO_TARGET
from training.measure import draw_problems

pytestmark = pytest.mark.slow

NUM_REQUESTS = 60
CONCURRENCY = 16
METHODS = (SpeculativeConfig(method="parallel", model=DEMO_PARALLEL), SpeculativeConfig(method="ngram"))
MODES = ["full", "rounds", "progressive", "exact", "off", "auto"]


def settings(path, *methods):
    num_bytes = 224 * 2**20  # for eight sequences of the target, so that cached ones are evicted and requests wait
    return EngineSettings(
        model=path, num_threads=1, max_model_len=512, kv_cache_memory_bytes=num_bytes, speculative_configs=methods
    )


def make_requests(count):
    """Questions, some of them with an earlier turn, in all modes, with and without a method and a token limit."""
    rng = random.Random(4)
    requests = []
    for index, problem in enumerate(draw_problems(40, count)):
        messages = [{"role": "user", "content": problem.question}]
        if rng.random() < 0.3:
            messages = [*messages, {"role": "assistant", "content": "So far so good."}, *messages]
        options = dict(
            mode=MODES[index % len(MODES)],
            temperature=0,
            max_tokens=rng.choice([None, None, 20, 90]),
            speculative_method=rng.choice([None, "none", "ngram"]),
        )
        requests.append((messages, options))
    return requests


async def answer_all(pair, requests, concurrency):
    semaphore = asyncio.Semaphore(concurrency)

    async def answer(messages, options):
        async with semaphore:
            return await pair.agenerate(messages, **options)

    return await asyncio.gather(*(answer(*request) for request in requests))


def test_requests_get_the_same_answers_alone_and_together():
    requests = make_requests(NUM_REQUESTS)
    with Pair(settings(DEMO_TARGET, *METHODS), settings(DEMO_DRAFT)) as pair:
        together = asyncio.run(answer_all(pair, requests, CONCURRENCY))
        assert (asyncio.run(pair.target.read_stats()).evictions or 0) > NUM_REQUESTS / 4
        used_modes = [output.usage.mode for output in together]
        same_modes = [
            (messages, options | {"mode": mode}) for (messages, options), mode in zip(requests, used_modes, strict=True)
        ]
        alone = asyncio.run(answer_all(pair, same_modes, 1))
    differences = [
        (index, used_modes[index])
        for index, (one, other) in enumerate(zip(together, alone, strict=True))
        if (one.text, one.token_ids, one.finish_reason) != (other.text, other.token_ids, other.finish_reason)
    ]
    assert not differences
    assert {"full", "rounds", "progressive", "exact", "off"} <= set(used_modes)
    assert sum(output.usage.accepted_tokens for output in together) > 1000
