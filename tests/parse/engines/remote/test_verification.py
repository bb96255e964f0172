"""How many calls and prompts a verification takes on a server, and when a prompt is prefilled."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from parse.demo import DEMO_TARGET
from parse.engines.remote.dialect import ServerFeatures
from parse.engines.remote.startup import measure_call_cost
from parse.engines.remote.verification import AnswerFirstPolicy
from tests.parse.engines.remote.fake_vllm import FakeVLLM
from tests.parse.engines.remote.test_remote_engine import (
    GREEDY,
    PROMPTS,
    TOKENIZER,
    answer_of,
    generation,
    remote,
    verification,
)

FEATURES = ServerFeatures("0.32.0", 16, True, True, True, False)


@pytest.fixture(scope="module")
def server():
    server = FakeVLLM(DEMO_TARGET)
    yield server
    server.close()


@dataclass
class TimedDialect:
    """A dialect whose calls take the same time plus some for each prompt, on a clock of its own."""

    call_s: float
    prompt_s: float
    now: float = 0.0
    prompts: list[tuple[int, ...]] = field(default_factory=list)

    async def next_token_logprobs(self, server, model, prompts, token_ids, *, by_token_id):
        self.now += self.call_s + self.prompt_s * len(prompts)
        self.prompts += map(tuple, prompts)
        return [{} for _ in prompts]


@pytest.mark.parametrize(("call_s", "prompt_s", "cost"), [(6.0, 2.0, 3.0), (0.0, 1.0, 0.0), (5.0, 0.5, 10.0)])
def test_the_cost_of_a_call_is_measured_in_prompts(server, monkeypatch, call_s, prompt_s, cost):
    dialect: Any = TimedDialect(call_s, prompt_s)
    monkeypatch.setattr("parse.engines.remote.startup.time.perf_counter", lambda: dialect.now)
    measured = asyncio.run(measure_call_cost(dialect, server, "served", TOKENIZER, FEATURES))
    assert measured == pytest.approx(cost)
    assert len(set(dialect.prompts)) == len(dialect.prompts)  # none of them is cached


@pytest.mark.parametrize("call_cost", [0.0, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("pass_rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_prefixes", [1, 2, 9, 60])
def test_the_cheaper_order_is_chosen(call_cost, pass_rate, num_prefixes):
    answer_first = AnswerFirstPolicy(call_cost)
    for number in range(1000):
        answer_first.record(number % 2 < 2 * pass_rate if pass_rate != 0.5 else bool(number % 2))
    at_once = call_cost + 1 + num_prefixes
    alone_first = call_cost + 1 + (1 - pass_rate) * (call_cost + num_prefixes)
    if abs(alone_first - at_once) > 0.1 * at_once:  # the share of answers that pass is estimated
        assert answer_first.decide(num_prefixes) == (alone_first < at_once)


def test_an_answer_that_passes_costs_one_prompt_and_a_failure_is_searched(server, native):
    answer = answer_of(native)
    wrong = [*answer[:20], answer[20] + 1, *answer[21:]]
    engine = remote(server)
    engine._answer_first = AnswerFirstPolicy(0.0)  # calls are free

    async def prompts_of(draft, **changes):
        server.bodies.clear()
        result = await engine.verify(verification(draft, **changes))
        return [len(body["prompt"]) for body in server.bodies if "logprob_token_ids" in body], result.p_correct

    async def all_of_them():
        policy = replace(verification(wrong).policy, exhaustive=False)
        lengths = [*range(2, len(wrong), 2), len(wrong)]
        return (
            await prompts_of(answer),
            await prompts_of(wrong, prefix_lengths=lengths, policy=policy),
            await prompts_of(wrong, prefix_lengths=lengths, policy=replace(policy, exhaustive=True)),
            len(lengths),
        )

    (passed, _), (searched, some_p), (exhaustive, all_p), num_prefixes = asyncio.run(all_of_them())
    engine.shutdown()
    assert passed == [1] and searched[0] == 1 and exhaustive == [1, num_prefixes - 1]
    assert sum(searched) < sum(exhaustive) / 2
    assert all(p is None or p == pytest.approx(q, abs=1e-3) for p, q in zip(some_p, all_p, strict=True))


def test_a_prompt_is_prefilled_if_that_can_save_time(server):
    short, long = PROMPTS[0], [*PROMPTS[0]] * 8
    assert FEATURES.block_size <= len(short) < 256 < len(long)

    async def is_prefilled(engine, prompt):
        server.bodies.clear()
        await engine.prefill(prompt)
        return list(prompt) in [body["prompt"] for body in server.bodies]

    async def all_of_them():
        engine = remote(server)
        less_than_a_block = await is_prefilled(engine, short[: FEATURES.block_size - 1])
        idle = await is_prefilled(engine, short)
        async with aclosing(engine.generate(generation(sampling_params=GREEDY))) as deltas:
            await anext(deltas)
            busy = [await is_prefilled(engine, prompt) for prompt in (short, long)]
        idle_again = await is_prefilled(engine, short)
        engine.shutdown()
        return less_than_a_block, idle, busy, idle_again

    assert asyncio.run(all_of_them()) == (False, True, [False, True], True)
