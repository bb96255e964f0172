"""What passes of a model take by their size, and what a usual pass is at the moment.

A pass over more entries takes longer; how much longer depends on the device and on how full the batch is. So only a
look at the clock tells what one more proposed token costs.
"""

from bisect import bisect_right
from collections.abc import Iterable

COST_EMA_WEIGHT = 0.05  # share of the newest in a running mean
OUTLIER_RATIO = (
    3.0  # times the mean: what takes longer was held up by others on the machine, and says nothing about its size
)


class StepCostModel:
    """Fed by an engine after every pass in which texts were written and nothing else was done."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float]] = {}  # by order of magnitude, mean size and mean seconds
        # Of a usual pass:
        self.num_seqs = self.num_tokens = self.num_output_tokens = 1.0

    def initialize(self, measurements: Iterable[tuple[int, float]]) -> None:
        """What passes of a few sizes took before anybody came: entries and seconds."""
        for size, seconds in measurements:
            self._means[size.bit_length()] = float(size), seconds

    def record(self, num_seqs: int, num_tokens: int, num_output_tokens: int, seconds: float) -> None:
        """A pass over so many entries behind texts, which wrote so many tokens."""
        order = num_tokens.bit_length()
        size, mean = self._means.get(order, (float(num_tokens), seconds))
        self._means[order] = (
            size + COST_EMA_WEIGHT * (num_tokens - size),
            mean + COST_EMA_WEIGHT * (min(seconds, OUTLIER_RATIO * mean) - mean),
        )
        self.num_seqs += COST_EMA_WEIGHT * (num_seqs - self.num_seqs)
        self.num_tokens += COST_EMA_WEIGHT * (num_tokens - self.num_tokens)
        self.num_output_tokens += COST_EMA_WEIGHT * (num_output_tokens - self.num_output_tokens)

    def step_seconds(self, num_tokens: float) -> float:
        """Between two sizes as they were measured a straight line, beyond all as between the last two."""
        measurements = sorted(self._means.values())
        if not measurements:
            return 0.0
        if len(measurements) == 1 or num_tokens <= measurements[0][0]:
            return measurements[0][1]
        at = min(bisect_right(measurements, (num_tokens, 0.0)), len(measurements) - 1)
        (low, below), (high, above) = measurements[at - 1 : at + 1]
        slope = max(0.0, above - below) / (high - low) if high > low else 0.0
        return below + slope * (num_tokens - low)

    def added_seconds(self, num_tokens: float, base_tokens: float) -> float:
        """What so many entries add to a pass over others."""
        return max(0.0, self.step_seconds(base_tokens + num_tokens) - self.step_seconds(base_tokens))
