"""Measures the speed-up of each token-level method with several clients on one engine.

Every method must first learn the costs at this load, so the first answers of each run are not counted. Methods take
turns with generation without a method, in an order that changes, and all answer the same problems.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tqdm import tqdm

from bench.contenders import BenchResult, PipelineContender, clear_caches, native_target
from bench.forward_passes import PassRecords, PassTimeCurve, RecordingCostModel, measure_passes
from bench.output import heading, row
from bench.speedup_model import DecodingStats, decoding_stats, speedup_by_depth
from parse.pair import Pair
from parse.types import sum_stats
from training.confidence import format_ratio, rounds_interval

CLIENT_COUNTS = 4, 16  # the speed-ups of a single client are those of the table of contenders
ANSWERS_PER_CLIENT = 3
MIN_ANSWERS = 16  # counted answers of a run, if there are as many problems


@dataclass(frozen=True)
class ConcurrentRun:
    """The answers of one method in one round. Each client requests one answer after another."""

    results: tuple[BenchResult, ...]
    seconds: float
    records: PassRecords

    @property
    def tokens_per_s(self) -> float:
        return sum(len(a.ids) for a in self.results) / self.seconds


async def run(
    pair: Pair,
    recorder: RecordingCostModel,
    prompts: Sequence[Sequence[int]],
    single_stats: Mapping[str, DecodingStats],
    rounds: int,
) -> list[dict[str, Any]]:
    choices: list[str] = ["none", *native_target(pair).methods]
    settings = [(round_index, clients) for round_index in range(rounds) for clients in CLIENT_COUNTS]
    runs: dict[int, dict[str, list[ConcurrentRun]]] = {c: {choice: [] for choice in choices} for c in CLIENT_COUNTS}
    curves: dict[int, list[PassTimeCurve]] = {clients: [] for clients in CLIENT_COUNTS}
    for round_index, clients in tqdm(settings, desc="crowds", unit="crowd", file=sys.stderr):
        first = round_index % len(choices)
        for choice in choices[first:] + choices[:first]:
            curves[clients].append(measure_passes(native_target(pair).model, clients))
            runs[clients][choice].append(
                await run_concurrently(PipelineContender(pair, "off", choice), recorder, prompts, clients)
            )
    return [
        summarize(clients, method, runs[clients], PassTimeCurve.median(curves[clients]), single_stats.get(method))
        for clients in CLIENT_COUNTS
        for method in native_target(pair).methods
    ]


async def run_concurrently(
    contender: PipelineContender, recorder: RecordingCostModel, prompts: Sequence[Sequence[int]], clients: int
) -> ConcurrentRun:
    min_answers = min(MIN_ANSWERS, len(prompts))
    per_client = min(ANSWERS_PER_CLIENT, max(1, len(prompts) // 8))  # a short run of few problems takes less time
    count = max(min_answers, per_client * clients)
    clear_caches(contender.pair)
    await _answer_prompts(contender, _cycle(prompts, max(min_answers // 4, clients)), clients)
    clear_caches(contender.pair)
    recorder.pop_records()
    started = time.perf_counter()
    results = await _answer_prompts(contender, _cycle(prompts, count), clients)
    return ConcurrentRun(tuple(results), time.perf_counter() - started, recorder.pop_records())


async def _answer_prompts(
    contender: PipelineContender, prompts: Iterator[Sequence[int]], clients: int
) -> list[BenchResult]:
    results: list[BenchResult] = []

    async def client() -> None:
        for prompt in prompts:  # all clients share one iterator
            results.append(await contender.answer_prompt(prompt))  # noqa: PERF401

    await asyncio.gather(*(client() for _ in range(clients)))
    return results


def _cycle(prompts: Sequence[Sequence[int]], count: int) -> Iterator[Sequence[int]]:
    return (prompts[index % len(prompts)] for index in range(count))


def summarize(
    clients: int,
    method: str,
    runs: Mapping[str, Sequence[ConcurrentRun]],
    curve: PassTimeCurve,
    single_stats: DecodingStats | None,
) -> dict[str, Any]:
    plain_runs, method_runs = runs["none"], runs[method]
    speculation = sum_stats(a.speculation for b in method_runs for a in b.results)
    assert speculation is not None
    stats = decoding_stats(speculation, reduce(PassRecords.__add__, (b.records for b in method_runs)))
    depths = (
        speedup_by_depth(single_stats, curve, method, stats.step_s(method))
        if single_stats and method != "space"
        else []
    )
    best = max(range(len(depths)), key=depths.__getitem__, default=None)
    ratios = [b.tokens_per_s / p.tokens_per_s for b, p in zip(method_runs, plain_runs, strict=True)]
    return {
        "clients": clients,
        "method": method,
        "tokens_per_s": statistics.median(b.tokens_per_s for b in method_runs),
        "plain_tokens_per_s": statistics.median(b.tokens_per_s for b in plain_runs),
        "ratios": ratios,
        "speedup": statistics.geometric_mean(ratios),
        "speedup_interval": rounds_interval(ratios),
        "tokens_per_pass": stats.tokens_per_pass,
        "depth": sum(stats.proposed) / stats.passes,
        **stats.to_json(),
        "bare": curve.to_json(),
        "by_depth": depths,
        "best_depth": None if best is None else best + 1,
    }


def table(crowds: Sequence[Mapping[str, Any]]) -> str:
    names = "tokens/s", "none", "speed-up", "tokens per pass", "proposed per pass", "computed per pass"
    predictions = "best length by the model", "speed-up there", "at full length"
    lines = heading("clients", "method", *names, *predictions)
    for entry in crowds:
        by_depth = entry["by_depth"]
        predicted = [str(entry["best_depth"]), f"{max(by_depth):.2f}", f"{by_depth[-1]:.2f}"] if by_depth else [""] * 3
        lines.append(
            row(
                str(entry["clients"]),
                entry["method"],
                f"{entry['tokens_per_s']:.0f}",
                f"{entry['plain_tokens_per_s']:.0f}",
                format_ratio(entry["speedup"], entry["speedup_interval"]),
                f"{entry['tokens_per_pass']:.2f}",
                f"{entry['depth']:.1f}",
                f"{entry['entries']:.1f}",
                *predicted,
            )
        )
    return "\n".join(lines)
