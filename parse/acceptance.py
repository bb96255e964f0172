"""From P(correct) at each cut to the boundary: how many of the draft's tokens are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from parse.types import RequestError

AcceptanceRule = Literal["first_failure", "longest_passing"]


@dataclass(frozen=True)
class Thresholds:
    """Where accepting pays: with these the demo pair takes 98% of the right drafts whole and 1% of the wrong ones.

    A wrong prefix is found out by the next ones, a wrong answer by nobody: so the full answer must pass at more.
    """

    full: float = 0.97
    prefix: float = 0.93

    def __post_init__(self) -> None:
        for name in ("full", "prefix"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise RequestError(f"thresholds.{name}", f"must lie in 0..1, got {getattr(self, name)}")


def accepted_prefix_length(
    prefix_lengths: Sequence[int],
    p_correct: Sequence[float | None],
    thresholds: Thresholds,
    *,
    ended: bool,
    rule: AcceptanceRule = "first_failure",
) -> int:
    """The full answer if it passes, else the last prefix before the first that fails, or the longest that passes.

    `cuts` ascend; where the draft ended by itself the last one asks about the full answer. What was not
    asked does not pass. The longest passing prefix keeps more, and with every further cut risks more to
    trust a single mistaken yes.
    """
    if ended and prefix_lengths and (p_correct[-1] or 0.0) >= thresholds.full:
        return prefix_lengths[-1]
    accepted = 0
    for length, probability in zip(prefix_lengths[: len(prefix_lengths) - ended], p_correct, strict=False):
        if (probability or 0.0) >= thresholds.prefix:
            accepted = length
        elif rule == "first_failure":
            break
    return accepted
