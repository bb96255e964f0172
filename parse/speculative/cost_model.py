"""What passes of a model take by their size, and what a usual pass is at the moment.

A pass over more entries takes longer; how much longer depends on the device and on how full the batch is. So only a
look at the clock tells what one more proposed token costs.
"""

from bisect import bisect_right
from collections.abc import Iterable

FRESH = 0.05  # share of the newest in a running mean
SLOW = 3.0  # times the mean: what takes longer was held up by others on the machine, and says nothing about its size


class Costs:
    """Fed by an engine after every pass in which texts were written and nothing else was done."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float]] = {}  # by order of magnitude, mean size and mean seconds
        # Of a usual pass:
        self.texts = self.entries = self.tokens = 1.0

    def begin(self, tried: Iterable[tuple[int, float]]) -> None:
        """What passes of a few sizes took before anybody came: entries and seconds."""
        for size, seconds in tried:
            self._means[size.bit_length()] = float(size), seconds

    def passed(self, texts: int, entries: int, tokens: int, seconds: float) -> None:
        """A pass over so many entries behind texts, which wrote so many tokens."""
        order = entries.bit_length()
        size, mean = self._means.get(order, (float(entries), seconds))
        self._means[order] = size + FRESH * (entries - size), mean + FRESH * (min(seconds, SLOW * mean) - mean)
        self.texts += FRESH * (texts - self.texts)
        self.entries += FRESH * (entries - self.entries)
        self.tokens += FRESH * (tokens - self.tokens)

    def pass_s(self, entries: float) -> float:
        """Between two sizes as they were measured a straight line, beyond all as between the last two."""
        known = sorted(self._means.values())
        if not known:
            return 0.0
        if len(known) == 1 or entries <= known[0][0]:
            return known[0][1]
        at = min(bisect_right(known, (entries, 0.0)), len(known) - 1)
        (low, below), (high, above) = known[at - 1 : at + 1]
        slope = max(0.0, above - below) / (high - low) if high > low else 0.0
        return below + slope * (entries - low)

    def more_s(self, entries: float, beside: float) -> float:
        """What so many entries add to a pass over others."""
        return max(0.0, self.pass_s(beside + entries) - self.pass_s(beside))
