"""Finds the cases in which PARSE loses: it is slower than a baseline, later, or answers less correctly."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.reproduce.plan import REPEATED, TARGET_ALONE

Document = Mapping[str, Any]


def find_losses(
    cells: Sequence[Document],
    quality: Sequence[Document],
    rates_per_unit: Sequence[Document],
    noise: Sequence[Document],
    unit: str,
) -> list[dict[str, Any]]:
    """Returns all losses. A `ratio` below 1 says by how much PARSE is worse.

    A difference that is not larger than the drift of the same figure of the target alone is marked as `within_noise`,
    but not left out.
    """
    drifts = {entry["clients"]: entry for entry in noise}
    losses: list[dict[str, Any]] = []
    for clients in dict.fromkeys(cell["clients"] for cell in cells):
        level = [cell for cell in cells if cell["clients"] == clients and cell["status"] == "ok"]
        modes = [cell for cell in level if cell["kind"] == "parse" and cell["mode"] != "off"]
        baselines = [cell for cell in level if cell["kind"] == "vllm" and cell["contender"] != REPEATED]
        target = next((cell for cell in baselines if cell["contender"] == TARGET_ALONE), None)
        if not modes:
            continue
        losses_here = [*_faster_baselines(modes, baselines)]
        if target is not None:
            losses_here += [*_slower_modes(modes, target), *_later_first_token(modes, target)]
            losses_here += _less_accurate_modes(modes, target)
        for loss in losses_here:
            name = "ttft_drift" if loss["figure"] == "ttft_p50_s" else "drift"
            drift = drifts.get(clients, {}).get(name)
            is_comparable = loss["ratio"] is not None and drift is not None
            losses.append(loss | {"within_noise": is_comparable and 1 - loss["ratio"] <= abs(drift or 0.0)})
    losses += [loss | {"within_noise": False} for loss in _lost_answers(quality)]
    losses += [loss | {"within_noise": False} for loss in _fewer_per_unit(rates_per_unit, unit)]
    return losses


def _loss(kind: str, cell: Document, against: Document, figure: str, ratio: float | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "clients": cell["clients"],
        "contender": cell["contender"],
        "figure": figure,
        "value": cell[figure],
        "against": against["contender"],
        "against_value": against[figure],
        "ratio": ratio,
        "steps": [cell["step"], against["step"]],
    }


def _faster_baselines(modes: Sequence[Document], baselines: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """Yields each baseline on no more hardware that answers more requests per second than every mode of PARSE."""
    best = max(modes, key=lambda cell: float(cell["requests_per_s"]))
    for baseline in baselines:
        rate = baseline["requests_per_s"]
        if baseline["num_units"] <= best["num_units"] and rate > best["requests_per_s"]:
            yield _loss("best mode, requests/s", best, baseline, "requests_per_s", best["requests_per_s"] / rate)


def _slower_modes(modes: Sequence[Document], target: Document) -> Iterator[dict[str, Any]]:
    for mode in modes:
        if mode["requests_per_s"] < target["requests_per_s"]:
            ratio = mode["requests_per_s"] / target["requests_per_s"]
            yield _loss("mode against the target alone, requests/s", mode, target, "requests_per_s", ratio)


def _later_first_token(modes: Sequence[Document], target: Document) -> Iterator[dict[str, Any]]:
    timed = [mode for mode in modes if mode["ttft_p50_s"] is not None]
    if not timed or target["ttft_p50_s"] is None:
        return
    earliest = min(timed, key=lambda cell: float(cell["ttft_p50_s"]))
    if earliest["ttft_p50_s"] > target["ttft_p50_s"]:
        ratio = target["ttft_p50_s"] / earliest["ttft_p50_s"]
        yield _loss("earliest mode, median first token in s", earliest, target, "ttft_p50_s", ratio)


def _less_accurate_modes(modes: Sequence[Document], target: Document) -> Iterator[dict[str, Any]]:
    """Yields each mode that answers less correctly than the target alone, by more than the interval of the difference.

    The interval combines those of the two shares (Newcombe's method).
    """
    if target["accuracy_interval"] is None:
        return
    for mode in modes:
        if mode["accuracy_interval"] is None:
            continue
        above = mode["accuracy_interval"][1] - mode["accuracy"]
        below = target["accuracy"] - target["accuracy_interval"][0]
        if target["accuracy"] - mode["accuracy"] > math.hypot(above, below):
            yield _loss("correct answers under load", mode, target, "accuracy", None)


def _lost_answers(quality: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """Yields each mode that loses correct answers, with an interval that does not contain zero."""
    for entry in quality:
        if entry["is_base"] or entry["loss_interval"][0] <= 0:
            continue
        base = next(
            other
            for other in quality
            if other["is_base"] and other["step"] == entry["step"] and other["task"] == entry["task"]
        )
        figure = "accuracy" if "accuracy" in entry else "mean_score"
        yield {
            "kind": f"{'correct answers' if figure == 'accuracy' else 'score'}, task {entry['task']}",
            "clients": None,
            "contender": entry["contender"],
            "value": entry[figure],
            "against": base["contender"],
            "against_value": base[figure],
            "ratio": None,
            "steps": [entry["step"], base["step"]],
        }


def _fewer_per_unit(rates_per_unit: Sequence[Document], unit: str) -> Iterator[dict[str, Any]]:
    """Yields the best baseline if it answers more requests per GPU within the bound of the latency than PARSE."""
    modes = [entry for entry in rates_per_unit if entry["kind"] == "parse" and entry["mode"] != "off"]
    baselines = [entry for entry in rates_per_unit if entry["kind"] == "vllm" and entry["contender"] != REPEATED]
    name = "requests_per_s_per_unit"
    best = max(modes, key=lambda entry: float(entry[name] or 0), default=None)
    baseline = max(baselines, key=lambda entry: float(entry[name] or 0), default=None)
    if best is None or baseline is None or (best[name] or 0) >= (baseline[name] or 0):
        return
    yield {
        "kind": f"best mode, requests/s per {unit} within the latency bound",
        "clients": best["clients"],
        "contender": best["contender"],
        "value": best[name],
        "against": baseline["contender"],
        "against_value": baseline[name],
        "ratio": best[name] / baseline[name] if best[name] else None,
        "steps": [step for step in (best["step"], baseline["step"]) if step],
    }
