"""Draws a training run or the figures of the verifier, as SVG.

python -m training.plots runs/target/log.jsonl target.svg
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "parse"  # the same figures give the same file

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)


def draw_verifier(verifier: Mapping[str, Any], path: Path) -> None:
    """Draws the threshold sweep and the reliability curve side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    thresholds = [row["threshold"] for row in verifier["sweep"]]
    for key, label, style in (
        ("right_accepted_whole", "correct drafts accepted in full", "-"),
        ("prefix_precision", "prefix precision", "-"),
        ("prefix_recall", "prefix recall", "-"),
        ("wrong_accepted_whole", "wrong drafts accepted in full", "--"),
        ("kept_past_error", "wrong drafts accepted past the error", "--"),
    ):
        left.plot(thresholds, [_number(row[key]) for row in verifier["sweep"]], style, label=label, marker=".")
    left.set(xlabel="threshold on P(correct)", ylim=(-0.02, 1.02), title="Effect of the threshold")
    left.legend(fontsize="small", loc="center")
    points = verifier["reliability"]
    right.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
    right.plot([p["mean_p"] for p in points], [p["right"] for p in points], marker="o")
    for p in points:
        right.annotate(
            str(p["count"]), (p["mean_p"], p["right"]), fontsize="x-small", xytext=(4, -9), textcoords="offset points"
        )
    right.set(
        xlabel="mean P(correct) of the prefixes in a bin",
        ylabel="share of correct prefixes",
        title=f"Reliability (ECE {verifier['ece']:.3f})",
    )
    _save(figure, path)


def draw_log(log: Path, path: Path, keys: Sequence[str] = ()) -> None:
    """Draws the metrics of a run's log.jsonl over its steps: all of them, or the chosen ones."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for key in keys or [key for key in rows[-1] if key not in ("step", "seconds")]:
        axes.plot([row["step"] for row in rows], [row.get(key, float("nan")) for row in rows], label=key)
    axes.set(xlabel="step", ylim=(0, 1.5))
    axes.legend(fontsize="small", ncols=2)
    _save(figure, path)


def _number(value: float | None) -> float:
    """Returns a number that the library can draw. A share of no cases is a gap."""
    return float("nan") if value is None else value


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m training.plots LOG.jsonl PICTURE.svg [METRIC ...]")
    draw_log(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
