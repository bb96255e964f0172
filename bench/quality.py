"""Measures what each mode costs in correct answers, and what it gains in time, on the same problems.

    python -m bench.quality --url http://127.0.0.1:8000 --modes off,full,rounds --limit 500
    python -m bench.quality --url URL --tasks my_problems.jsonl --modes off,full --json quality.json

A task is `demo`, or a file in which each line has a problem: {"prompt": "...", "answer": "..."}, or `messages`
instead of `prompt`. The first mode is the base that the others are compared with. The modes take turns on groups of
problems, so that a change of the machine's speed affects all of them.

`loss` is the share of correct answers that a mode loses, with its 95% confidence interval. `p` is the probability of
such a difference if there is none.
"""

import argparse
import asyncio
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.client import RequestParams, RequestResult, ServerUnreachable, get_first_model, open_client, send_request
from bench.output import add_json_argument, heading, row, write_output
from bench.paired_outcomes import PairedOutcomes
from bench.workload import InvalidPromptFile, SampleRequest, demo_requests, load_problems

DEMO = "demo"
MODES = "off", "full", "rounds"
PROBLEMS_PER_CLIENT = 8  # of a group: more than one, so that few clients idle at its end
API_KEY_VARIABLE = "PARSE_API_KEY"


class TooManyErrors(RuntimeError):
    """Requests have failed, so the modes cannot be compared."""


@dataclass
class ModeResults:
    """What a mode has answered, in the order of the problems."""

    correct: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each group of problems."""
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, results: Sequence[RequestResult], seconds: float) -> None:
        self.seconds.append(seconds)
        for result in results:
            if result.response is None:
                raise TooManyErrors(f"a request failed: {result.error} {result.detail}".strip())
            assert result.request.is_correct is not None
            self.correct.append(result.request.is_correct(result.response.text, result.response.ended))
            if result.response.report is not None:
                self.draft_tokens += result.response.report.draft_tokens
                self.accepted_tokens += result.response.report.accepted_tokens


def compare(base: ModeResults, other: ModeResults) -> dict[str, Any]:
    outcomes = PairedOutcomes.of(base.correct, other.correct)
    ratios = [base_s / other_s for base_s, other_s in zip(base.seconds, other.seconds, strict=True)]
    return {
        "accuracy": statistics.fmean(other.correct),
        "num_only_base_correct": outcomes.num_only_base,
        "num_only_mode_correct": outcomes.num_only_other,
        "loss": outcomes.loss,
        "loss_interval": outcomes.interval(),
        "p": outcomes.p_value(),
        "accepted_share": other.accepted_tokens / other.draft_tokens if other.draft_tokens else None,
        "speedup": statistics.median(ratios),
    }


async def measure(
    client: httpx.AsyncClient, model: str, problems: Sequence[SampleRequest], options: argparse.Namespace
) -> dict[str, ModeResults]:
    results = {mode: ModeResults() for mode in options.modes}
    size = options.concurrency * PROBLEMS_PER_CLIENT
    for start in range(0, len(problems), size):
        group = problems[start : start + size]
        for mode, of_mode in results.items():
            params = RequestParams(model, max_tokens=options.max_tokens, mode=mode)
            started = time.perf_counter()
            answers = await _answer_all(client, params, group, options.concurrency)
            of_mode.add(answers, time.perf_counter() - started)
        print(f"{min(start + size, len(problems))} of {len(problems)} problems", file=sys.stderr, flush=True)
    return results


async def _answer_all(
    client: httpx.AsyncClient, params: RequestParams, problems: Sequence[SampleRequest], concurrency: int
) -> list[RequestResult]:
    slots = asyncio.Semaphore(concurrency)

    async def answer(problem: SampleRequest) -> RequestResult:
        async with slots:
            return await send_request(client, params, problem, time.perf_counter())

    return await asyncio.gather(*map(answer, problems))


async def run(options: argparse.Namespace) -> dict[str, Any]:
    tasks = {task: _load_task(task, options) for task in options.tasks}
    rows: list[dict[str, Any]] = []
    async with open_client(options.url, os.environ.get(API_KEY_VARIABLE)) as client:
        model = (await get_first_model(client)).name
        for task, problems in tasks.items():
            results = await measure(client, model, problems, options)
            base = results[options.modes[0]]
            rows += (
                {"task": task, "mode": mode, "num_problems": len(problems), **compare(base, of_mode)}
                for mode, of_mode in results.items()
            )
    settings = {"model": model, "base": options.modes[0], "concurrency": options.concurrency, "seed": options.seed}
    return {"settings": settings, "rows": rows}


def _load_task(task: str, options: argparse.Namespace) -> list[SampleRequest]:
    if task == DEMO:
        return demo_requests(options.limit, options.seed)
    return load_problems(Path(task), options.result)[: options.limit]


def table(document: Mapping[str, Any]) -> str:
    names = "correct", "loss", "95% interval", "p", "accepted tokens", "speed-up"
    lines = [*heading("task", "problems", "mode", *names)]
    for each in document["rows"]:
        low, high = each["loss_interval"]
        accepted = each["accepted_share"]
        cells = [
            f"{each['accuracy']:.1%}",
            f"{100 * each['loss']:.2f} points",
            f"{100 * low:.2f} to {100 * high:.2f}",
            f"{each['p']:.3f}",
            "" if accepted is None else f"{accepted:.0%}",
            f"{each['speedup']:.2f}",
        ]
        if each["mode"] == document["settings"]["base"]:
            cells[1:] = [""] * (len(cells) - 1)
        lines.append(row(each["task"], str(each["num_problems"]), each["mode"], *cells))
    return "\n".join(lines)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--url", required=True, help=f"the address of the service; a key is read from {API_KEY_VARIABLE}"
    )
    parser.add_argument("--tasks", type=_words, default=(DEMO,), help="demo, or files, separated by commas")
    parser.add_argument("--modes", type=_words, default=MODES, help="the first one is the base (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=500, help="problems of each task (default: 500)")
    parser.add_argument(
        "--result",
        metavar="REGEX",
        help="finds the result in an answer to a problem of a file: its last match, or the first group of that match, "
        "must be `answer`. Without it, `answer` must occur in the text",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the problems of the demo task")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at the same time (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: 512)")
    add_json_argument(parser)
    options = parser.parse_args()
    try:
        re.compile(options.result or "")
    except re.error as error:
        parser.error(f"--result: {error}")
    try:
        document = asyncio.run(run(options))
    except (ServerUnreachable, InvalidPromptFile, TooManyErrors) as error:
        sys.exit(f"bench.quality: {error}")
    write_output(document, table(document), options.json)


if __name__ == "__main__":
    main()
