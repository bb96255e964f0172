"""What passes of a model take by their size, and what a token comes to at the moment.

A pass over more entries takes longer, how much longer depends on the device and on how full the batch is. So only a look
at the clock tells what one more proposed token costs.
"""

from bisect import bisect_right
from collections.abc import Iterable

FRESH = 0.05  # share of the newest in a running mean
USUAL = 0.98  # what is left of the past after a pass, in what a token comes to


class Costs:
    """Fed by an engine after every pass in which texts were written and nothing else was done."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float]] = {}  # by order of magnitude, mean size and mean seconds
        self._seconds = self._tokens = 0.0
        self.entries = 1.0  # of a usual pass, at the moment

    def begin(self, tried: Iterable[tuple[int, float]]) -> None:
        """What passes of a few sizes took before anybody came: entries and seconds."""
        for size, seconds in tried:
            self._means[size.bit_length()] = float(size), seconds

    def passed(self, entries: int, seconds: float) -> None:
        order = entries.bit_length()
        size, mean = self._means.get(order, (float(entries), seconds))
        # Somebody else's work on the machine makes a pass slow now and then; that says nothing about its size.
        seconds = min(seconds, 3 * mean)
        self._means[order] = size + FRESH * (entries - size), mean + FRESH * (seconds - mean)
        self.entries += FRESH * (entries - self.entries)

    def wrote(self, tokens: int, seconds: float) -> None:
        """In one pass, with what was proposed for it."""
        self._tokens = USUAL * self._tokens + tokens
        self._seconds = USUAL * self._seconds + seconds

    @property
    def token_s(self) -> float | None:
        """What a token of the batch comes to; None: nobody knows yet."""
        return self._seconds / self._tokens if self._tokens >= 1 else None

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
        return max(0.0, self.pass_s(beside + entries) - self.pass_s(max(1.0, beside)))
