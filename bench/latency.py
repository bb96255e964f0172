"""Computes rates, percentiles and the overlap of drafting and verification from many timed answers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.client import RequestResult, ServerReport, TimedResponse
from training.confidence import share_figures

STAGES = "queue", "warm", "draft", "judge", "write"
SIDES = {"draft": 0, "judge": 1, "write": 1}  # 0: the drafter works, 1: the target works
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class OfferedLoad:
    """A number of clients that wait for their answers, or a rate of arrivals that does not depend on answers."""

    clients: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.rate:g}/s" if self.clients is None else str(self.clients)


@dataclass(frozen=True)
class Round:
    """Requests that were sent without a pause."""

    results: Sequence[RequestResult]
    wall_s: float
    cpu_s: float  # of the client


@dataclass(frozen=True)
class BenchmarkRun:
    """One contender under one load."""

    mode: str
    load: OfferedLoad
    rounds: Sequence[Round]

    @property
    def results(self) -> list[RequestResult]:
        return [outcome for part in self.rounds for outcome in part.results]


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Returns the figures of all rounds together. A figure without data is null."""
    results = [result for part in rounds for result in part.results]
    answered = [(outcome, outcome.response) for outcome in results if outcome.response]
    responses = [response for _, response in answered]
    reports = [response.report for response in responses if response.report]
    wall_s = sum(part.wall_s for part in rounds)
    return {
        "requests": len(results),
        "answered": len(answered),
        "wall_s": wall_s,
        "requests_per_s": len(responses) / wall_s,
        "tokens_per_s": sum(response.completion_tokens for response in responses) / wall_s,
        "completion_tokens": sum(response.completion_tokens for response in responses),
        **share_figures(
            "accuracy", [o.request.is_correct(r.text, r.ended) for o, r in answered if o.request.is_correct]
        ),
        "accepted_share": _ratio(sum(r.accepted_tokens for r in reports), sum(r.draft_tokens for r in reports)),
        "cached_share": _ratio(
            sum(r.cached_tokens for r in reports), sum(r.prompt_tokens for r in responses if r.report)
        ),
        "answered_as": dict(Counter(report.mode for report in reports)),
        "answered_with": dict(Counter(report.method for report in reports)),
        "ttft_s": spread(
            response.chunk_times[0] - outcome.scheduled_at for outcome, response in answered if response.chunk_times
        ),
        "itl_s": spread(gap for response in responses if (gap := mean_inter_token_s(response)) is not None),
        "pause_s": spread(max(_gaps(response)) for response in responses if len(response.chunk_times) > 1),
        "latency_s": spread(outcome.latency_s for outcome, _ in answered),
        "stages_s": {name: _mean([_stage_s(report, name) for report in reports]) for name in STAGES},
        "overlap_share": overlap_s(reports) / wall_s if reports else None,
        "client_cpu_share": sum(part.cpu_s for part in rounds) / wall_s,
        "errors": dict(Counter(outcome.error for outcome in results if outcome.error)),
    }


def spread(values: Iterable[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {"mean": _mean(ordered)} | {name: percentile(ordered, share) for name, share in SHARES.items()}


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Returns a percentile of ordered values, by linear interpolation."""
    if not ordered:
        return None
    rank = share * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def mean_inter_token_s(response: TimedResponse) -> float | None:
    """Returns the mean time between tokens. The tokens of one chunk arrive together."""
    return (
        (response.chunk_times[-1] - response.chunk_times[0]) / (response.completion_tokens - 1)
        if response.chunk_times and response.completion_tokens > 1
        else None
    )


def overlap_s(reports: Sequence[ServerReport]) -> float:
    """Returns the seconds in which one request was drafted while another one was verified or generated."""
    changes: list[tuple[float, int, int, int]] = []  # time, side, request, +1 or -1
    for number, report in enumerate(reports):
        for name, start, end in report.stages:
            if (side := SIDES.get(name)) is not None:
                changes += [(report.arrived + start, side, number, 1), (report.arrived + end, side, number, -1)]
    drafting, verifying = Counter[int](), Counter[int]()
    total = before = 0.0
    for time, side, number, change in sorted(changes):
        if drafting and verifying and len(drafting.keys() | verifying.keys()) > 1:
            total += time - before
        busy = verifying if side else drafting
        busy[number] += change
        if not busy[number]:
            del busy[number]
        before = time
    return total


def _gaps(response: TimedResponse) -> list[float]:
    return [after - before for before, after in zip(response.chunk_times, response.chunk_times[1:], strict=False)]


def _stage_s(report: ServerReport, name: str) -> float:
    return sum(end - start for stage, start, end in report.stages if stage == name)


def _ratio(part: float, total: float) -> float | None:
    return part / total if total else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
