"""What followed the last few tokens the last time they stood there, in the prompt or in the answer itself."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from parse.speculative.proposal import NOTHING, Foreseen, Foresight, Proposal, Wish, chained

LONGEST, SHORTEST = 4, 2  # tokens that must be the same; fewer than that say too little


class Ngram(Foresight["Words"]):
    """Costs a look through the text, and no model."""

    bytes_per_token = 4

    def proposer(self) -> "Words":
        return Words()

    def propose(self, wishes: Sequence[Wish["Words"]]) -> list[Proposal]:
        return [wish.proposer.following(min(wish.most, wish.depth)) for wish in wishes]


class Words:
    """The text of one request."""

    def __init__(self) -> None:
        self._text = np.empty(1024, np.int32)
        self._size = 0

    def take(self, tokens: Sequence[int], features: Tensor | None = None, foreseen: Foreseen | None = None) -> None:
        size = self._size + len(tokens)
        if size > len(self._text):
            self._text = np.concatenate([self._text, np.empty(size, np.int32)])
        self._text[self._size : size] = tokens
        self._size = size

    def following(self, most: int) -> Proposal:
        text = self._text[: self._size]
        for width in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
            if (start := _last_before(text, width)) is not None:
                return chained(text[start : start + most].tolist())
        return NOTHING


def _last_before(text: np.ndarray, width: int) -> int | None:
    """Where the text goes on behind the last place, before its end, at which its last `width` tokens stand too."""
    same = text[width - 1 : -1] == text[-1]
    for back in range(1, width):
        same &= text[width - 1 - back : -1 - back] == text[-1 - back]
    found = np.flatnonzero(same)
    return int(found[-1]) + width if len(found) else None
