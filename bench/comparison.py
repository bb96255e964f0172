"""Runs side by side: their figures, ratios to the first mode, a table and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.latency import BenchmarkRun, summarize

Pace = dict[str, float | None]
COLUMNS = (
    "load, mode, requests/s, tokens/s, first token, a token, latency p50, p95, p99, "
    "accepted, right, overlap, cached, errors"
)
RATIO_COLUMNS = (
    "load, mode over the first, requests/s, tokens/s, latency p50, medians of rounds: requests/s, tokens/s, latency p50"
)


def compare_runs(runs: Sequence[BenchmarkRun]) -> dict[str, Any]:
    summaries = [
        {
            "mode": run.mode,
            "concurrency": run.load.clients,
            "rate": run.load.rate,
            **summarize(run.rounds),
            "rounds": [_pace(summarize([part])) for part in run.rounds],
        }
        for run in runs
    ]
    firsts: dict[str, Mapping[str, Any]] = {}
    ratios: dict[str, dict[str, Any]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        first = firsts.setdefault(run.load.name, summary)
        ratios.setdefault(run.load.name, {})[run.mode] = _ratios(summary, first)
    return {"runs": summaries, "ratios": ratios}


def _pace(summary: Mapping[str, Any]) -> Pace:
    return {
        "requests_per_s": summary["requests_per_s"],
        "tokens_per_s": summary["tokens_per_s"],
        "latency_p50": summary["latency_s"]["p50"],
    }


def _ratios(summary: Mapping[str, Any], first_summary: Mapping[str, Any]) -> dict[str, Any]:
    """Over all rounds together, and the medians of their own."""
    overall = _quotients(_pace(summary), _pace(first_summary))
    rounds = [
        _quotients(round_pace, first_pace)
        for round_pace, first_pace in zip(summary["rounds"], first_summary["rounds"], strict=True)
    ]
    return {**overall, "median": {name: _median([part[name] for part in rounds]) for name in overall}}


def _quotients(pace: Pace, base_pace: Pace) -> Pace:
    return {
        name: value / base if value is not None and (base := base_pace[name]) else None for name, value in pace.items()
    }


def _median(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.median(defined) if defined else None


def table(result: Mapping[str, Any]) -> str:
    lines = _heading(COLUMNS.split(", "))
    for load, run in zip(_loads(result), result["runs"], strict=True):
        times = run["ttft_s"]["p50"], run["itl_s"]["p50"], *(run["latency_s"][share] for share in ("p50", "p95", "p99"))
        shares = run["accepted_share"], run["accuracy"], run["overlap_share"], run["cached_share"]
        errors = ", ".join(f"{count} of {kind}" for kind, count in run["errors"].items())
        lines.append(
            _row(
                load,
                run["mode"],
                _formatted(run["requests_per_s"], ".2f"),
                _formatted(run["tokens_per_s"], ".0f"),
                *map(_ms, times),
                *(_formatted(share, ".1%") for share in shares),
                errors or "none",
            )
        )
    if any(len(modes) > 1 for modes in result["ratios"].values()):
        lines += ["", *_ratio_lines(result["ratios"])]
    return "\n".join(lines)


def _ratio_lines(ratios: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = _heading(RATIO_COLUMNS.split(", "))
    for load, modes in ratios.items():
        for mode, ratio in modes.items():
            medians = ratio["median"]
            lines.append(
                _row(load, mode, *(_formatted(part[name], ".2f") for part in (ratio, medians) for name in medians))
            )
    return lines


def _loads(result: Mapping[str, Any]) -> list[str]:
    return [load for load, modes in result["ratios"].items() for _ in modes]


def _heading(names: Sequence[str]) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.{0 if seconds >= 0.01 else 2}f} ms"


def _formatted(value: float | None, format_spec: str) -> str:
    return "" if value is None else f"{value:{format_spec}}"


def plot(runs: Sequence[BenchmarkRun], result: Mapping[str, Any], path: Path) -> None:
    """How many were answered within what time, and at what rate."""
    from matplotlib import pyplot

    figure, (within, rates) = pyplot.subplots(1, 2, figsize=(8, 3.2))
    names = [f"{run.mode}, {run.load.name}" for run in runs]
    for name, run in zip(names, runs, strict=True):
        seconds = sorted(result_.latency_s for result_ in run.results if result_.response)
        within.step(seconds, [(index + 1) / len(seconds) for index in range(len(seconds))], where="post", label=name)
    within.set(xlabel="latency, s", ylabel="share of answers", ylim=(0, 1.02))
    within.legend(frameon=False, fontsize=7)
    bars = rates.bar(names, [run["requests_per_s"] for run in result["runs"]], color="#2a7")
    rates.bar_label(bars, fmt="%.2f", fontsize=7)
    rates.set_ylabel("requests/s")
    rates.tick_params(axis="x", rotation=30, labelsize=7)
    figure.tight_layout()
    figure.savefig(path)
