"""MT-Bench: questions with a follow-up, whose answers a judge model scores from 1 to 10."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.tasks.harness import ProblemSource, call_program, parse_problem
from bench.tasks.judge import SCORES, JudgeOptions, RatedExchange, rate_all, rated_exchanges
from bench.tasks.task import BenchmarkProblem, Grades, ProblemAnswer, TaskUnavailable

MAX_TOKENS = 1024


@dataclass(frozen=True)
class MTBenchTask:
    """The grade of a problem is the mean score of its answers."""

    name: str
    problems: tuple[BenchmarkProblem, ...]
    references: tuple[tuple[str, ...], ...]
    judge: JudgeOptions
    max_tokens: int = MAX_TOKENS
    score_range: tuple[float, float] = SCORES

    @classmethod
    def load(cls, source: ProblemSource, judge: JudgeOptions) -> "MTBenchTask":
        document = call_program("mt_bench", "prepare", source)
        problems = tuple(map(parse_problem, document["problems"]))
        return cls(source.task, problems, tuple(map(tuple, document["references"])), judge)

    async def grade(self, answers: Mapping[str, Sequence[ProblemAnswer]]) -> Grades:
        exchanges: dict[str, list[list[RatedExchange]]] = {
            mode: [
                rated_exchanges(problem, references, answer)
                for problem, references, answer in zip(self.problems, self.references, of_mode, strict=True)
            ]
            for mode, of_mode in answers.items()
        }
        every_exchange = (
            exchange for of_mode in exchanges.values() for of_problem in of_mode for exchange in of_problem
        )
        scores = await rate_all(self.judge, list(every_exchange))
        rated = [
            index
            for index in range(len(self.problems))
            if all(exchange in scores for of_mode in exchanges.values() for exchange in of_mode[index])
        ]
        if not rated:
            raise TaskUnavailable(f"{self.name}: the judge has written no score in the expected form")
        if num_unrated := len(self.problems) - len(rated):
            print(f"{self.name}: {num_unrated} problems without a score are left out", file=sys.stderr, flush=True)
        return Grades(
            tuple(self.problems[index].id for index in rated),
            {
                mode: tuple(statistics.fmean(scores[exchange] for exchange in of_mode[index]) for index in rated)
                for mode, of_mode in exchanges.items()
            },
        )
