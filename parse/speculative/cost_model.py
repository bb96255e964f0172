"""Predicts the duration of an engine step from its number of tokens.

A step over more tokens takes longer. How much longer depends on the device, and on how full the batch already is. The
cost of one more proposed token is therefore measured.
"""

from bisect import bisect_right
from collections.abc import Iterable

COST_EMA_WEIGHT = 0.05  # weight of the newest step in the running means
# A step that takes longer than this multiple of the mean was delayed by other processes. Its excess is ignored.
OUTLIER_RATIO = 3.0


class StepCostModel:
    """Running means of the times of steps.

    The engine updates them after every step without prefill or verification.
    """

    def __init__(self) -> None:
        # The mean number of tokens and the mean seconds of steps. The key is the bit length of the number of tokens.
        self._means: dict[int, tuple[float, float]] = {}
        # Running means of a step: sequences, tokens computed, tokens added to the sequences.
        self.num_seqs = self.num_tokens = self.num_output_tokens = 1.0

    def initialize(self, measurements: Iterable[tuple[int, float]]) -> None:
        """Sets the means from steps that were timed at start-up.

        Each measurement is a number of tokens and the seconds that the step took.
        """
        for num_tokens, seconds in measurements:
            self._means[num_tokens.bit_length()] = float(num_tokens), seconds

    def record(self, num_seqs: int, num_tokens: int, num_output_tokens: int, seconds: float) -> None:
        """Adds a step to the means.

        The step computed `num_tokens` and added `num_output_tokens` of them to the sequences.
        """
        bucket = num_tokens.bit_length()
        mean_tokens, mean_seconds = self._means.get(bucket, (float(num_tokens), seconds))
        self._means[bucket] = (
            mean_tokens + COST_EMA_WEIGHT * (num_tokens - mean_tokens),
            mean_seconds + COST_EMA_WEIGHT * (min(seconds, OUTLIER_RATIO * mean_seconds) - mean_seconds),
        )
        self.num_seqs += COST_EMA_WEIGHT * (num_seqs - self.num_seqs)
        self.num_tokens += COST_EMA_WEIGHT * (num_tokens - self.num_tokens)
        self.num_output_tokens += COST_EMA_WEIGHT * (num_output_tokens - self.num_output_tokens)

    def step_seconds(self, num_tokens: float) -> float:
        """Returns the predicted time of a step over `num_tokens`, in seconds.

        It interpolates linearly between the measured sizes.

        Beyond the largest size, it continues the line through the last two sizes. Without measurements the result is 0.
        """
        measurements = sorted(self._means.values())
        if not measurements:
            return 0.0
        if len(measurements) == 1 or num_tokens <= measurements[0][0]:
            return measurements[0][1]
        index = min(bisect_right(measurements, (num_tokens, 0.0)), len(measurements) - 1)
        (lower_tokens, lower_s), (upper_tokens, upper_s) = measurements[index - 1 : index + 1]
        slope = max(0.0, upper_s - lower_s) / (upper_tokens - lower_tokens) if upper_tokens > lower_tokens else 0.0
        return lower_s + slope * (num_tokens - lower_tokens)

    def added_seconds(self, num_tokens: float, base_tokens: float) -> float:
        """Returns by how many seconds `num_tokens` additional tokens lengthen a step over `base_tokens`."""
        return max(0.0, self.step_seconds(base_tokens + num_tokens) - self.step_seconds(base_tokens))
