"""Compares two ways to answer the same problems: the loss of correct answers, its interval, and a test of it.

The two ways answer most problems alike, so only those that one of them alone answers correctly tell them apart. This
makes a small loss visible with far fewer problems than two independent samples would need.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

PRECISION = 1e-6  # of the limits of an interval


@dataclass(frozen=True)
class PairedOutcomes:
    """The numbers of problems that both, only one, or neither of the two ways answers correctly."""

    num_both: int
    num_only_base: int
    num_only_other: int
    num_neither: int

    @classmethod
    def of(cls, base: Sequence[bool], other: Sequence[bool]) -> "PairedOutcomes":
        pairs = list(zip(base, other, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def num_problems(self) -> int:
        return self.num_both + self.num_only_base + self.num_only_other + self.num_neither

    @property
    def loss(self) -> float:
        """The share of correct answers of the base minus that of the other way."""
        return (self.num_only_base - self.num_only_other) / self.num_problems

    def p_value(self) -> float:
        """Returns the probability of a difference at least as large if there is none (McNemar's exact test)."""
        num_different = self.num_only_base + self.num_only_other
        fewer = min(self.num_only_base, self.num_only_other)
        tail = sum(math.comb(num_different, count) for count in range(fewer + 1)) / 2**num_different
        return min(1.0, 2 * tail)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Returns a confidence interval of the loss (Tango's score interval).

        It holds for small numbers too, and also if the two ways never differ.
        """
        limit = NormalDist().inv_cdf((1 + confidence) / 2)
        low = _solve(lambda loss: self._score(loss) - limit, -1.0, self.loss)
        high = _solve(lambda loss: self._score(loss) + limit, self.loss, 1.0)
        return low, high

    def _score(self, loss: float) -> float:
        """Returns by how many standard deviations the observed loss is above this one.

        The standard deviation is that of the most likely model with this loss.
        """
        n, only_base, only_other = self.num_problems, self.num_only_base, self.num_only_other
        b = (2 * n - only_base + only_other) * loss - only_base - only_other
        c = -only_other * loss * (1 - loss)
        only_other_share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * only_other_share + loss * (1 - loss))
        distance = only_base - only_other - n * loss
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)


def _solve(function: Callable[[float], float], low: float, high: float) -> float:
    """Returns where a decreasing function crosses zero, or the nearer end of the range if it does not."""
    while high - low > PRECISION:
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
