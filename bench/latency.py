"""The figures of many timed answers: rates, percentiles, and how far drafting and judging overlapped."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.client import Outcome, Reply, Report

STAGES = "queue", "warm", "draft", "judge", "write"
SIDES = {"draft": 0, "judge": 1, "write": 1}  # the drafter's and the target's
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Load:
    """Clients that wait for their answers, or arrivals a second that wait for nothing."""

    clients: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.rate:g}/s" if self.clients is None else str(self.clients)


@dataclass(frozen=True)
class Round:
    """What was asked without a break."""

    outcomes: Sequence[Outcome]
    wall_s: float
    cpu_s: float  # of the client


@dataclass(frozen=True)
class Run:
    """One mode under one load."""

    mode: str
    load: Load
    rounds: Sequence[Round]

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for part in self.rounds for outcome in part.outcomes]


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """Of all rounds together. What cannot be known is null."""
    outcomes = [outcome for part in rounds for outcome in part.outcomes]
    answered = [(outcome, outcome.reply) for outcome in outcomes if outcome.reply]
    replies = [reply for _, reply in answered]
    reports = [reply.report for reply in replies if reply.report]
    wall_s = sum(part.wall_s for part in rounds)
    return {
        "requests": len(outcomes),
        "answered": len(answered),
        "wall_s": wall_s,
        "requests_per_s": len(replies) / wall_s,
        "tokens_per_s": sum(reply.tokens for reply in replies) / wall_s,
        "completion_tokens": sum(reply.tokens for reply in replies),
        "accuracy": _mean([o.task.right(r.text, r.ended) for o, r in answered if o.task.right]),
        "accepted_share": _share(sum(r.accepted for r in reports), sum(r.drafted for r in reports)),
        "cached_share": _share(sum(r.cached for r in reports), sum(r.prompt_tokens for r in replies if r.report)),
        "answered_as": dict(Counter(report.mode for report in reports)),
        "ttft_s": spread(reply.came[0] - outcome.due for outcome, reply in answered if reply.came),
        "itl_s": spread(gap for reply in replies if (gap := between_tokens(reply)) is not None),
        "pause_s": spread(max(_gaps(reply)) for reply in replies if len(reply.came) > 1),
        "latency_s": spread(outcome.latency_s for outcome, _ in answered),
        "stages_s": {name: _mean([_stage_s(report, name) for report in reports]) for name in STAGES},
        "overlap_share": overlap_s(reports) / wall_s if reports else None,
        "client_cpu_share": sum(part.cpu_s for part in rounds) / wall_s,
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
    }


def spread(values: Iterable[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {"mean": _mean(ordered)} | {name: percentile(ordered, share) for name, share in SHARES.items()}


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Between the two nearest of the ordered values, in proportion."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def between_tokens(reply: Reply) -> float | None:
    """Mean time from one token to the next, as a reader sees them: those of one chunk come together."""
    return (reply.came[-1] - reply.came[0]) / (reply.tokens - 1) if reply.came and reply.tokens > 1 else None


def overlap_s(reports: Sequence[Report]) -> float:
    """Seconds in which one request was drafted while another one was judged or written."""
    changes: list[tuple[float, int, int, int]] = []  # when, whose side, of which request, one more or one less
    for number, report in enumerate(reports):
        for name, start, end in report.stages:
            if (side := SIDES.get(name)) is not None:
                changes += [(report.arrived + start, side, number, 1), (report.arrived + end, side, number, -1)]
    drafting, judging = Counter[int](), Counter[int]()
    total = before = 0.0
    for at, side, number, change in sorted(changes):
        if drafting and judging and len(drafting.keys() | judging.keys()) > 1:
            total += at - before
        busy = judging if side else drafting
        busy[number] += change
        if not busy[number]:
            del busy[number]
        before = at
    return total


def _gaps(reply: Reply) -> list[float]:
    return [after - before for before, after in zip(reply.came, reply.came[1:], strict=False)]


def _stage_s(report: Report, name: str) -> float:
    return sum(end - start for stage, start, end in report.stages if stage == name)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
