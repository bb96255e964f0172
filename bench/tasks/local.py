"""Tasks that need no package and no data set: the task of the demo pair, and problems in a file of the user."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tasks.task import BenchmarkProblem, Grades, ProblemAnswer
from bench.workload import SampleRequest, demo_requests, load_problems

DEMO = "demo"
MAX_TOKENS = 512

AnswerCheck = Callable[[str, bool], bool]
"""Receives the text of an answer and whether it is complete."""


@dataclass(frozen=True)
class LocalTask:
    """Problems with a function that checks an answer."""

    name: str
    problems: tuple[BenchmarkProblem, ...]
    checks: tuple[AnswerCheck, ...]
    max_tokens: int = MAX_TOKENS
    score_range: None = None

    async def grade(self, answers: Mapping[str, Sequence[ProblemAnswer]]) -> Grades:
        return Grades(
            tuple(problem.id for problem in self.problems),
            {
                mode: tuple(
                    float(check(answer.texts[-1], answer.ended))
                    for check, answer in zip(self.checks, of_mode, strict=True)
                )
                for mode, of_mode in answers.items()
            },
        )


def demo_task(limit: int, seed: int) -> LocalTask:
    return _local_task(DEMO, demo_requests(limit, seed))


def file_task(file: str, limit: int, result: str | None) -> LocalTask:
    """Returns the problems of a file. `result` is the regular expression that finds the result in an answer."""
    return _local_task(file, load_problems(Path(file), result)[:limit])


def _local_task(name: str, requests: Sequence[SampleRequest]) -> LocalTask:
    problems = (BenchmarkProblem(str(number), tuple(request.messages)) for number, request in enumerate(requests, 1))
    return LocalTask(name, tuple(problems), tuple(request.is_correct for request in requests if request.is_correct))
