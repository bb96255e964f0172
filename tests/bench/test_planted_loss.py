"""`bench.quality` finds a planted loss of three points on problems of the demo task, with its own measurement."""

import asyncio
import random
import re
from dataclasses import dataclass, replace
from functools import cache

import pytest

from bench import quality
from bench.client import RequestParams, RequestResult, TimedResponse
from bench.tasks.local import LocalTask, demo_task
from bench.workload import SampleRequest
from training.task import correct_answer, parse_question

NUM_PROBLEMS = 2000
# An interval covers the loss in 95% of all repetitions, so in 8% of all blocks of 20 seeds, fewer than 18 cover it. The
# seeds 0 to 19 are such a block: 17 do. Of the seeds 0 to 999, 953 do, and the loss is found with all of them.
SEEDS = range(40, 60)
# The shares of problems that only one mode, or neither of them, answers correctly. The loss is 4.5% - 1.5% = 3 points.
ONLY_BASE, ONLY_OTHER, NEITHER = 0.045, 0.015, 0.04
LOSS = 0.03
MODES = "off", "full"


def spoil(answer: str) -> str:
    """Returns the answer with another result: its last number plus one."""
    return re.sub(r"\d+(?=\D*$)", lambda number: str((int(number[0]) + 1) % 100), answer)


@dataclass
class PlantedServer:
    """Answers the demo task as its target does, but gives wrong results to some problems, which differ by mode."""

    answers: dict[str, str]
    wrong: dict[str, set[str]]
    """The problems that each mode answers wrongly."""

    @classmethod
    def of(cls, task: LocalTask, seed: int) -> "PlantedServer":
        generator = random.Random(seed)
        base, other = MODES
        texts = [str(problem.messages[0]["content"]) for problem in task.problems]
        wrong: dict[str, set[str]] = {mode: set() for mode in MODES}
        for text in texts:
            draw = generator.random()
            if ONLY_BASE <= draw < ONLY_BASE + ONLY_OTHER + NEITHER:
                wrong[base].add(text)
            if draw < ONLY_BASE or ONLY_BASE + ONLY_OTHER <= draw < ONLY_BASE + ONLY_OTHER + NEITHER:
                wrong[other].add(text)
        return cls({text: correct_answer(parse_question(text)) for text in texts}, wrong)

    async def send(self, params: RequestParams, request: SampleRequest) -> RequestResult:
        problem = str(request.messages[0]["content"])
        answer = self.answers[problem]
        if problem in self.wrong[params.mode or ""]:
            answer = spoil(answer)
        return RequestResult(request, 0.0, 1.0, TimedResponse(answer, ended=True))


def measured_loss(task: LocalTask, seed: int) -> dict:
    server = PlantedServer.of(task, seed)

    async def measure():
        options = quality.MeasurementOptions(MODES, concurrency=64)
        results = await quality.measure(server.send, "model", task, options)
        return results, await task.grade({mode: of_mode.answers for mode, of_mode in results.items()})

    base, other = quality.compare(task, *asyncio.run(measure()))
    # The measurement has seen what the server has planted.
    assert other["num_only_base_correct"] == len(server.wrong["full"] - server.wrong["off"])
    assert other["num_only_mode_correct"] == len(server.wrong["off"] - server.wrong["full"])
    assert base["accuracy"] == pytest.approx(1 - len(server.wrong["off"]) / NUM_PROBLEMS)
    return other


@pytest.mark.slow
def test_a_planted_loss_is_found_and_covered_in_18_of_20_repetitions():
    task = demo_task(NUM_PROBLEMS, seed=1)
    task = replace(task, checks=tuple(map(cache, task.checks)))  # most answers are the same in all repetitions
    compared = [measured_loss(task, seed) for seed in SEEDS]
    assert sum(each["p"] < 0.05 and each["loss"] > 0 for each in compared) >= 18
    assert sum(each["loss_interval"][0] <= LOSS <= each["loss_interval"][1] for each in compared) >= 18
