"""Several answers at once on one engine: what is left of a method's speed-up when passes are full anyway.

What a method makes of a load it has to learn first; so each begins with answers that are not counted. Methods take
turns with plain writing, in an order that changes, and all answer the same questions.
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

from bench.contenders import BenchResult, PipelineContender, clear_caches
from bench.forward_passes import PassRecords, PassTimeCurve, RecordingCostModel, measure_passes
from bench.speedup_model import DecodingStats, decoding_stats, speedup_by_depth
from parse.pair import Pair
from parse.types import sum_stats

CLIENT_COUNTS = 1, 4, 16
ROUNDS = 3
ANSWERS_PER_CLIENT = 3  # answers of each client
MIN_ANSWERS = 16  # answers counted, however few clients


@dataclass(frozen=True)
class ConcurrentRun:
    """Some answers of one method, one after another for each client."""

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
) -> list[dict[str, Any]]:
    choices: list[str] = ["none", *pair.target.methods]
    settings = [(round_index, clients) for round_index in range(ROUNDS) for clients in CLIENT_COUNTS]
    runs: dict[int, dict[str, list[ConcurrentRun]]] = {c: {choice: [] for choice in choices} for c in CLIENT_COUNTS}
    curves: dict[int, list[PassTimeCurve]] = {clients: [] for clients in CLIENT_COUNTS}
    for round_index, clients in tqdm(settings, desc="crowds", unit="crowd", file=sys.stderr):
        for choice in choices[round_index:] + choices[:round_index]:
            curves[clients].append(measure_passes(pair.target.model, clients))
            runs[clients][choice].append(
                await run_concurrently(PipelineContender(pair, "off", choice), recorder, prompts, clients)
            )
    return [
        summarize(clients, method, runs[clients], PassTimeCurve.median(curves[clients]), single_stats.get(method))
        for clients in CLIENT_COUNTS
        for method in pair.target.methods
    ]


async def run_concurrently(
    contender: PipelineContender, recorder: RecordingCostModel, prompts: Sequence[Sequence[int]], clients: int
) -> ConcurrentRun:
    count = max(MIN_ANSWERS, ANSWERS_PER_CLIENT * clients)
    clear_caches(contender.pair)
    await _answer_prompts(contender, _cycle(prompts, max(MIN_ANSWERS // 4, clients)), clients)
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
        for prompt in prompts:  # all clients take from one list
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
    return {
        "clients": clients,
        "method": method,
        "tokens_per_s": statistics.median(b.tokens_per_s for b in method_runs),
        "plain_tokens_per_s": statistics.median(b.tokens_per_s for b in plain_runs),
        "ratios": [b.tokens_per_s / p.tokens_per_s for b, p in zip(method_runs, plain_runs, strict=True)],
        "tokens_per_pass": stats.tokens_per_pass,
        "depth": sum(stats.proposed) / stats.passes,
        **stats.to_json(),
        "bare": curve.to_json(),
        "by_depth": depths,
        "best_depth": None if best is None else best + 1,
    }


def table(crowds: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| clients | method | tokens/s | plain | speed-up | rounds | tokens a pass | proposed a pass | entries a pass "
        "| best depth by the model | speed-up there | at full depth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in crowds:
        model = ["", "", ""]
        if row["by_depth"]:
            model = [str(row["best_depth"]), f"{max(row['by_depth']):.2f}", f"{row['by_depth'][-1]:.2f}"]
        ratios = row["ratios"]
        lines.append(
            f"| {row['clients']} | {row['method']} | {row['tokens_per_s']:.0f} | {row['plain_tokens_per_s']:.0f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {row['tokens_per_pass']:.2f} | {row['depth']:.1f} | {row['entries']:.1f} | {' | '.join(model)} |"
        )
    return "\n".join(lines)
