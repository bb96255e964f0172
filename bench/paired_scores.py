"""Compares two ways to answer the same problems by scores: the mean loss, its interval, and a test of it.

Right and wrong answers are compared by `bench.paired_outcomes` instead.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

PRECISION = 1e-9  # of a quantile


@dataclass(frozen=True)
class PairedScores:
    """The score of the base minus that of the other way, for each problem."""

    losses: tuple[float, ...]
    max_loss: float
    """The largest loss of a problem that the scale of the scores allows."""

    @classmethod
    def of(cls, base: Sequence[float], other: Sequence[float], max_loss: float) -> "PairedScores":
        return cls(tuple(a - b for a, b in zip(base, other, strict=True)), max_loss)

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    def p_value(self) -> float:
        """Returns the probability of a mean loss at least as large if there is none (paired t-test)."""
        if not any(self.losses) or len(self.losses) < 2:
            return 1.0
        error = self._standard_error()
        if not error:  # all losses are equal, which says nothing about their spread; the test of the signs still holds
            return float(0.5 ** (len(self.losses) - 1))
        return 1.0 - central_probability(abs(self.loss) / error, len(self.losses) - 1)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Returns a confidence interval of the mean loss (Student's t).

        A single problem says nothing about the mean, so its interval is the whole scale.
        """
        if len(self.losses) < 2:
            return -self.max_loss, self.max_loss
        distance = quantile(confidence, len(self.losses) - 1) * self._standard_error()
        if not distance:  # all losses are equal; Hoeffding's inequality needs no spread
            distance = 2 * self.max_loss * math.sqrt(math.log(2 / (1 - confidence)) / (2 * len(self.losses)))
        return max(-self.max_loss, self.loss - distance), min(self.max_loss, self.loss + distance)

    def _standard_error(self) -> float:
        return statistics.stdev(self.losses) / math.sqrt(len(self.losses))


def central_probability(t: float, degrees_of_freedom: int) -> float:
    """Returns the probability that Student's t is between `-t` and `t`.

    These are the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    theta = math.atan2(t, math.sqrt(degrees_of_freedom))
    cosine_squared = math.cos(theta) ** 2
    is_odd = degrees_of_freedom % 2
    term = math.cos(theta) if is_odd else 1.0
    total = 0.0
    for k in range(1 + is_odd, degrees_of_freedom, 2):
        total += term
        term *= k / (k + 1) * cosine_squared
    if is_odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def quantile(confidence: float, degrees_of_freedom: int) -> float:
    """Returns the `t` between whose negative and itself Student's t is with this probability."""
    low, high = 0.0, 1.0
    while central_probability(high, degrees_of_freedom) < confidence:
        high *= 2
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if central_probability(middle, degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2
