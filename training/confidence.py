"""Confidence intervals of measured figures: shares, ratios over problems, and ratios over rounds. All are at 95%."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]

NORMAL_QUANTILE = 1.959964
NUM_RESAMPLES = 2000
# Student's t at 97.5%, by degrees of freedom from 1 on.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def wilson_interval(successes: int, count: int) -> Interval | None:
    """Returns the Wilson score interval of a share, or None if nothing was counted."""
    if not count:
        return None
    share, z = successes / count, NORMAL_QUANTILE
    center = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def throughput_ratio_interval(
    amounts: Sequence[float], seconds: Sequence[float], base_amounts: Sequence[float], base_seconds: Sequence[float]
) -> Interval | None:
    """Returns the bootstrap interval of a ratio of throughputs, each a sum of amounts over a sum of seconds.

    Entry i of all four sequences belongs to problem i. Problems are drawn with replacement, and both sides keep the
    same problems, because the length of an answer affects both. Returns None for fewer than two problems.
    """
    if len(seconds) < 2:
        return None
    columns = np.array([amounts, seconds, base_amounts, base_seconds], dtype=float)
    chosen = np.random.default_rng(0).integers(len(seconds), size=(NUM_RESAMPLES, len(seconds)))
    amount, second, base_amount, base_second = (column[chosen].sum(axis=1) for column in columns)
    low, high = np.quantile(amount / second / (base_amount / base_second), (0.025, 0.975))
    return float(low), float(high)


def rounds_interval(ratios: Sequence[float]) -> Interval | None:
    """Returns the t interval of the geometric mean of positive ratios, one of each round.

    Returns None for fewer than two rounds.
    """
    if len(ratios) < 2:
        return None
    logarithms = [math.log(ratio) for ratio in ratios]
    degrees = len(ratios) - 1
    quantile = T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else NORMAL_QUANTILE
    spread = quantile * statistics.stdev(logarithms) / math.sqrt(len(ratios))
    center = statistics.fmean(logarithms)
    return math.exp(center - spread), math.exp(center + spread)


def median_interval(values: Sequence[float]) -> Interval | None:
    """Returns the bootstrap interval of a median, or None for fewer than two values."""
    if len(values) < 2:
        return None
    chosen = np.random.default_rng(0).choice(values, size=(NUM_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(chosen, axis=1), (0.025, 0.975))
    return float(low), float(high)


def share_figures(name: str, hits: Sequence[bool]) -> dict[str, object]:
    """Returns a share under its name, with `<name>_count` of cases and `<name>_interval`. It is null without cases."""
    share = sum(hits) / len(hits) if hits else None
    return {name: share, f"{name}_count": len(hits), f"{name}_interval": wilson_interval(sum(hits), len(hits))}


def format_ratio(value: float | None, interval: Sequence[float] | None) -> str:
    """Returns a ratio with its interval, such as `3.07 (2.98 to 3.15)`."""
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def format_share(value: float | None, interval: Sequence[float] | None) -> str:
    """Returns a share with its interval, such as `99.8% (98.9 to 100.0)`."""
    if value is None:
        return ""
    return f"{value:.1%}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")
