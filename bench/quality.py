"""Measures what each mode costs in correct answers, and what it gains in time, on the same problems.

    python -m bench.quality --url http://127.0.0.1:8000 --modes off,full,rounds --limit 500
    python -m bench.quality --url URL --tasks gsm8k,math500,mmlu_pro,humaneval,mbpp --limit 1000 --json quality.json
    python -m bench.quality --url URL --tasks mtbench --judge JUDGE_URL
    python -m bench.quality --url URL --tasks my_problems.jsonl --modes off,full

A task is one of these names, or a file in which each line has a problem: {"prompt": "...", "answer": "..."}, or
`messages` instead of `prompt`.

    demo                      the task of the demo pair
    gsm8k, math500, mmlu_pro  questions and graders of lm-eval
    humaneval, mbpp           programs, which the tests of evalplus run ON THIS MACHINE: use a container
    mtbench                   questions with a follow-up, which a judge model scores from 1 to 10

lm-eval and evalplus are installed in an environment of their own at the first use, and their data sets are downloaded.
With --data-dir DIR, a data set is read from DIR/TASK/SPLIT.jsonl instead.

The first mode is the base that the others are compared with. The modes take turns on groups of problems, so that a
change of the machine's speed affects all of them.

`loss` is the share of correct answers that a mode loses, or its mean loss of score, with its 95% confidence interval.
`p` is the probability of such a difference if there is none (McNemar's exact test; for scores, a paired t-test).
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.client import (
    RequestParams,
    RequestResult,
    ServerUnreachable,
    TimedResponse,
    get_first_model,
    open_client,
    send_request,
)
from bench.output import add_json_argument, heading, row, write_output
from bench.paired_outcomes import PairedOutcomes
from bench.paired_scores import PairedScores
from bench.tasks.judge import JudgeOptions
from bench.tasks.loading import TaskOptions, load_task
from bench.tasks.local import DEMO
from bench.tasks.task import BenchmarkProblem, BenchmarkTask, Grades, ProblemAnswer, TaskUnavailable
from bench.workload import InvalidPromptFile, SampleRequest

MODES = "off", "full", "rounds"
NUM_ATTEMPTS, RETRY_PAUSE_S = 3, 2.0  # of a request; a server may restart
PROBLEMS_PER_CLIENT = 8  # of a group: more than one, so that few clients idle at its end
API_KEY_VARIABLE = "PARSE_API_KEY"
JUDGE_API_KEY_VARIABLE = "JUDGE_API_KEY"

Send = Callable[[RequestParams, SampleRequest], Awaitable[RequestResult]]


class NoAnswer(RuntimeError):
    """Requests have failed, so the modes cannot be compared."""


@dataclass(frozen=True)
class MeasurementOptions:
    """How the problems are sent."""

    modes: tuple[str, ...]
    concurrency: int = 4
    max_tokens: int | None = None
    """None: the default of the task."""


@dataclass
class ModeResults:
    """What a mode has answered, in the order of the problems."""

    answers: list[ProblemAnswer] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each group of problems."""
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def num_truncated(self) -> int:
        return sum(not answer.ended for answer in self.answers)

    def add(self, conversations: Sequence[Sequence[TimedResponse]], seconds: float) -> None:
        """Adds the responses to a group of problems: one for each message of the user."""
        self.seconds.append(seconds)
        for responses in conversations:
            texts = tuple(response.text for response in responses)
            self.answers.append(ProblemAnswer(texts, all(response.ended for response in responses)))
            for response in responses:
                if response.report is not None:
                    self.draft_tokens += response.report.draft_tokens
                    self.accepted_tokens += response.report.accepted_tokens


async def measure(send: Send, model: str, task: BenchmarkTask, options: MeasurementOptions) -> dict[str, ModeResults]:
    """Lets all modes answer all problems of a task."""
    results = {mode: ModeResults() for mode in options.modes}
    problems = task.problems
    size = options.concurrency * PROBLEMS_PER_CLIENT
    for start in range(0, len(problems), size):
        group = problems[start : start + size]
        # The first mode finds no prompt in the cache of the server, so each mode is the first one in turn.
        first, modes = start // size % len(results), list(results)
        for mode in [*modes[first:], *modes[:first]]:
            params = RequestParams(model, max_tokens=options.max_tokens or task.max_tokens, mode=mode)
            started = time.perf_counter()
            conversations = await _converse_all(send, params, group, options.concurrency)
            results[mode].add(conversations, time.perf_counter() - started)
        done = min(start + size, len(problems))
        print(f"{task.name}: {done} of {len(problems)} problems", file=sys.stderr, flush=True)
    return results


async def _converse_all(
    send: Send, params: RequestParams, problems: Sequence[BenchmarkProblem], concurrency: int
) -> list[list[TimedResponse]]:
    slots = asyncio.Semaphore(concurrency)

    async def converse(problem: BenchmarkProblem) -> list[TimedResponse]:
        async with slots:
            return await _converse(send, replace(params, stop=problem.stop), problem)

    return await asyncio.gather(*map(converse, problems))


async def _converse(send: Send, params: RequestParams, problem: BenchmarkProblem) -> list[TimedResponse]:
    """Returns the responses to the messages of a problem and to each of its follow-ups."""
    messages, responses = list(problem.messages), list[TimedResponse]()
    for follow_up in (None, *problem.follow_ups):
        if follow_up is not None:
            messages += [
                {"role": "assistant", "content": responses[-1].text},
                {"role": "user", "content": follow_up},
            ]
        for attempt in range(NUM_ATTEMPTS):
            result = await send(params, SampleRequest(tuple(messages)))
            if result.response is not None:
                break
            await asyncio.sleep(attempt * RETRY_PAUSE_S)
        if result.response is None:
            raise NoAnswer(f"a request failed: {result.error} {result.detail}".strip())
        responses.append(result.response)
    return responses


def compare(task: BenchmarkTask, results: Mapping[str, ModeResults], grades: Grades) -> list[dict[str, Any]]:
    """Returns the figures of each mode. The first mode is the base."""
    base, *_ = results
    return [
        {
            "task": task.name,
            "mode": mode,
            "num_problems": len(grades.problem_ids),
            "num_truncated": of_mode.num_truncated,
            **compare_grades(task.score_range, grades.by_mode[base], grades.by_mode[mode]),
            "accepted_share": of_mode.accepted_tokens / of_mode.draft_tokens if of_mode.draft_tokens else None,
            "speedup": median_ratio(results[base].seconds, of_mode.seconds),
        }
        for mode, of_mode in results.items()
    ]


def compare_grades(
    score_range: tuple[float, float] | None, base: Sequence[float], other: Sequence[float]
) -> dict[str, Any]:
    paired: PairedOutcomes | PairedScores
    if score_range is None:
        paired = PairedOutcomes.of([grade > 0 for grade in base], [grade > 0 for grade in other])
        figures = {
            "accuracy": statistics.fmean(other),
            "num_only_base_correct": paired.num_only_base,
            "num_only_mode_correct": paired.num_only_other,
        }
    else:
        low, high = score_range
        paired = PairedScores.of(base, other, high - low)
        figures = {
            "mean_score": statistics.fmean(other),
            "max_score": high,
            "num_base_better": sum(loss > 0 for loss in paired.losses),
            "num_mode_better": sum(loss < 0 for loss in paired.losses),
        }
    return figures | {"loss": paired.loss, "loss_interval": paired.interval(), "p": paired.p_value()}


def median_ratio(base_seconds: Sequence[float], seconds: Sequence[float]) -> float:
    return statistics.median(base / other for base, other in zip(base_seconds, seconds, strict=True))


async def run(options: argparse.Namespace, document: dict[str, Any]) -> None:
    """Measures the tasks one after the other, and adds the figures of each to the document."""
    measurement = MeasurementOptions(options.modes, options.concurrency, options.max_tokens)
    async with open_client(options.url, os.environ.get(API_KEY_VARIABLE)) as client:
        model = document["settings"]["model"] = (await get_first_model(client)).name

        async def send(params: RequestParams, request: SampleRequest) -> RequestResult:
            return await send_request(client, params, request, time.perf_counter())

        # All tasks are loaded before anything is measured, so that a missing data set does not end a long run.
        for task in [load_task(name, _task_options(options)) for name in options.tasks]:
            results = await measure(send, model, task, measurement)
            for mode, of_mode in results.items():
                if of_mode.num_truncated:
                    note = f"{of_mode.num_truncated} answers ended at the limit of tokens (--max-tokens)"
                    print(f"{task.name}, mode {mode}: {note}", file=sys.stderr, flush=True)
            grades = None
            try:
                grades = await task.grade({mode: of_mode.answers for mode, of_mode in results.items()})
            finally:
                if options.answers:  # also if they cannot be graded, because they have taken long
                    _write_answers(Path(options.answers), task, results, grades)
            document["rows"] += compare(task, results, grades)


def _task_options(options: argparse.Namespace) -> TaskOptions:
    judge = options.judge and JudgeOptions(
        options.judge, options.judge_model, os.environ.get(JUDGE_API_KEY_VARIABLE), options.concurrency
    )
    return TaskOptions(options.limit, options.seed, options.result, options.data_dir, judge)


def _write_answers(file: Path, task: BenchmarkTask, results: Mapping[str, ModeResults], grades: Grades | None) -> None:
    """Appends the answers of a task to a file, with their grades."""
    with file.open("a", encoding="utf-8") as output:
        for mode, of_mode in results.items():
            of_problem = dict(zip(grades.problem_ids, grades.by_mode[mode], strict=True)) if grades else {}
            for problem, answer in zip(task.problems, of_mode.answers, strict=True):
                entry = {"task": task.name, "problem": problem.id, "mode": mode, "grade": of_problem.get(problem.id)}
                output.write(json.dumps({**entry, "complete": answer.ended, "answers": answer.texts}) + "\n")


def table(document: Mapping[str, Any]) -> str:
    names = "correct", "loss", "95% interval", "p", "accepted tokens", "speed-up"
    lines = [*heading("task", "problems", "mode", *names)]
    for each in document["rows"]:
        low, high = each["loss_interval"]
        accepted = each["accepted_share"]
        if "accuracy" in each:
            of_grades = [
                f"{each['accuracy']:.1%}",
                f"{100 * each['loss']:.2f} points",
                f"{100 * low:.2f} to {100 * high:.2f}",
            ]
        else:
            score = f"{each['mean_score']:.2f} of {each['max_score']:g}"
            of_grades = [score, f"{each['loss']:.2f}", f"{low:.2f} to {high:.2f}"]
        speed = ["" if accepted is None else f"{accepted:.0%}", f"{each['speedup']:.2f}"]
        cells = [*of_grades, f"{each['p']:.3f}", *speed]
        if each["mode"] == document["settings"]["base"]:
            cells[1:] = [""] * (len(cells) - 1)
        lines.append(row(each["task"], str(each["num_problems"]), each["mode"], *cells))
    return "\n".join(lines)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return number


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--url", required=True, help=f"the address of the service; a key is read from {API_KEY_VARIABLE}"
    )
    parser.add_argument("--tasks", type=_words, default=(DEMO,), help="names or files, separated by commas")
    parser.add_argument("--modes", type=_words, default=MODES, help="the first one is the base (default: %(default)s)")
    parser.add_argument("--limit", type=_positive, default=500, help="problems of each task (default: 500)")
    parser.add_argument(
        "--result",
        metavar="REGEX",
        help="finds the result in an answer to a problem of a file: its last match, or the first group of that match, "
        "must be `answer`. Without it, `answer` must occur in the text",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the problems of the demo task")
    parser.add_argument("--concurrency", type=_positive, default=4, help="requests at the same time (default: 4)")
    parser.add_argument("--max-tokens", type=_positive, help="of an answer (default: depends on the task)")
    parser.add_argument(
        "--judge",
        metavar="URL",
        help=f"a server of the OpenAI API with the judge of mtbench; a key is read from {JUDGE_API_KEY_VARIABLE}",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="default: the first model that the judge's server lists")
    parser.add_argument("--data-dir", metavar="DIR", help="a folder with the data sets, instead of a download")
    parser.add_argument("--answers", metavar="FILE", help="file to which all answers are appended, with their grades")
    add_json_argument(parser)
    options = parser.parse_args()
    try:
        re.compile(options.result or "")
    except re.error as error:
        parser.error(f"--result: {error}")
    return options


def main() -> None:
    options = _parse_arguments()
    settings = {"base": options.modes[0], "concurrency": options.concurrency, "seed": options.seed}
    document: dict[str, Any] = {"settings": settings, "rows": []}
    failure: Exception | None = None
    try:
        asyncio.run(run(options, document))
    except (ServerUnreachable, InvalidPromptFile, NoAnswer, TaskUnavailable) as error:
        failure = error
    if document["rows"]:  # also those of the tasks before a failure
        write_output(document, table(document), options.json)
    if failure is not None:
        sys.exit(f"bench.quality: {failure}")


if __name__ == "__main__":
    main()
