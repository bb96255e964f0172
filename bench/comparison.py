"""Compares the contenders of a load test: figures, ratios to the first contender, tables and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.latency import BenchmarkRun, summarize
from bench.output import heading, milliseconds, row
from training.confidence import format_ratio, format_share, rounds_interval

Rates = dict[str, float | None]
COLUMNS = (
    "load, contender, requests/s, ratio, tokens/s, ratio, first token, time between tokens, latency p50, p95, p99, "
    "accepted, accuracy, overlap, cached, errors"
)
SUMMARY_COLUMNS = "load, contender, requests/s, ratio, latency p50, first token p50, accepted, accuracy"


def compare_runs(runs: Sequence[BenchmarkRun]) -> dict[str, Any]:
    summaries = [
        {
            "mode": run.mode,
            "concurrency": run.load.clients,
            "rate": run.load.rate,
            **summarize(run.rounds),
            "rounds": [_rates(summarize([part])) for part in run.rounds],
        }
        for run in runs
    ]
    firsts: dict[str, Mapping[str, Any]] = {}
    ratios: dict[str, dict[str, Any]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        first = firsts.setdefault(run.load.name, summary)
        ratios.setdefault(run.load.name, {})[run.mode] = _ratios(summary, first)
    return {"runs": summaries, "ratios": ratios}


def _rates(summary: Mapping[str, Any]) -> Rates:
    return {
        "requests_per_s": summary["requests_per_s"],
        "tokens_per_s": summary["tokens_per_s"],
        "latency_p50": summary["latency_s"]["p50"],
    }


def _ratios(summary: Mapping[str, Any], first_summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ratios of all rounds together, and of the single rounds their geometric mean with its interval."""
    overall = _quotients(_rates(summary), _rates(first_summary))
    rounds = [
        _quotients(round_rates, first_rates)
        for round_rates, first_rates in zip(summary["rounds"], first_summary["rounds"], strict=True)
    ]
    return {**overall, "rounds": {name: _round_figures([part[name] for part in rounds]) for name in overall}}


def _quotients(rates: Rates, base_rates: Rates) -> Rates:
    return {
        name: value / base if value is not None and (base := base_rates[name]) else None
        for name, value in rates.items()
    }


def _round_figures(values: Sequence[float | None]) -> dict[str, Any]:
    positive = [value for value in values if value]
    return {
        "mean": statistics.geometric_mean(positive) if positive else None,
        "interval": rounds_interval(positive),
        "values": list(values),
    }


def table(result: Mapping[str, Any]) -> str:
    lines = heading(*COLUMNS.split(", "))
    for load, run, ratios in _entries(result):
        times = run["ttft_s"]["p50"], run["itl_s"]["p50"], *(run["latency_s"][share] for share in ("p50", "p95", "p99"))
        lines.append(
            row(
                load,
                run["mode"],
                f"{run['requests_per_s']:.2f}",
                _ratio(ratios, "requests_per_s"),
                f"{run['tokens_per_s']:.0f}",
                _ratio(ratios, "tokens_per_s"),
                *map(milliseconds, times),
                format_share(run["accepted_share"], None),
                format_share(run["accuracy"], run["accuracy_interval"]),
                *(format_share(run[name], None) for name in ("overlap_share", "cached_share")),
                ", ".join(f"{count} of {kind}" for kind, count in run["errors"].items()) or "none",
            )
        )
    return "\n".join(lines)


def summary_table(result: Mapping[str, Any]) -> str:
    """Returns the table of the README, and a sentence for each load on the fastest contender."""
    lines = heading(*SUMMARY_COLUMNS.split(", "))
    for load, run, ratios in _entries(result):
        lines.append(
            row(
                load,
                run["mode"],
                f"{run['requests_per_s']:.2f}",
                _ratio(ratios, "requests_per_s"),
                *(milliseconds(run[name]["p50"]) for name in ("latency_s", "ttft_s")),
                format_share(run["accepted_share"], None),
                format_share(run["accuracy"], run["accuracy_interval"]),
            )
        )
    return "\n".join([*lines, "", served_sentence(result), *fastest_sentences(result)])


def served_sentence(result: Mapping[str, Any]) -> str:
    """Returns the token-level methods of the server. A contender without a method uses the default."""
    choices = result["served"]
    if not choices:
        return "The server does not report its token-level methods."
    methods = ", ".join(f"`{method}`" for method in choices["methods"] if method != "none") or "none"
    return f"The server has loaded these token-level methods: {methods}. The default is `{choices['speculation']}`."


def fastest_sentences(result: Mapping[str, Any]) -> list[str]:
    """Returns for each load the fastest contender, and how close mode `auto` comes to it."""
    sentences = []
    for load in result["ratios"]:
        runs = {run["mode"]: run["requests_per_s"] for name, run, _ in _entries(result) if name == load}
        fastest = max(runs, key=runs.__getitem__)
        sentence = f"{_load_phrase(load)}, `{fastest}` answers the most requests per second"
        if "auto" in runs and fastest != "auto":
            sentence += f", and `auto` answers {1 - runs['auto'] / runs[fastest]:.1%} fewer"
        sentences.append(f"{sentence}.")
    return sentences


def _load_phrase(load: str) -> str:
    """Returns the name of a load as the beginning of a sentence, for example "With 8 clients"."""
    if load.endswith("/s"):
        return f"At {load.removesuffix('/s')} arrivals per second"
    return f"With {load} client{'' if load == '1' else 's'}"


def _entries(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Returns the load, the figures and the ratios of each run."""
    names = [(load, mode) for load, modes in result["ratios"].items() for mode in modes]
    return [(load, run, result["ratios"][load][mode]) for (load, mode), run in zip(names, result["runs"], strict=True)]


def _ratio(ratios: Mapping[str, Any], name: str) -> str:
    figures = ratios["rounds"][name]
    return format_ratio(figures["mean"], figures["interval"])


def plot(runs: Sequence[BenchmarkRun], result: Mapping[str, Any], path: Path) -> None:
    """Draws the distribution of the latency and the rates."""
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
