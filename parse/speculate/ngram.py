"""What followed the last few tokens the last time they stood there, in the prompt or in the answer itself."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from parse.speculate.proposal import Proposal

LONGEST, SHORTEST = 4, 2  # tokens that must be the same; fewer than that say too little


class NgramProposer:
    """Costs a look through the text, and no model."""

    def __init__(self) -> None:
        self._text = np.empty(1024, np.int32)
        self._size = 0

    def take(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        size = self._size + len(tokens)
        if size > len(self._text):
            self._text = np.concatenate([self._text, np.empty(size, np.int32)])
        self._text[self._size : size] = tokens
        self._size = size

    def propose(self, most: int) -> Proposal:
        text = self._text[: self._size]
        for width in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
            if (start := _last_before(text, width)) is not None:
                tokens = tuple(text[start : start + max(0, most)].tolist())
                return Proposal(tokens, tuple(range(-1, len(tokens) - 1)))
        return Proposal()


def _last_before(text: np.ndarray, width: int) -> int | None:
    """Where the text goes on behind the last place, before its end, at which its last `width` tokens stand too."""
    same = text[width - 1 : -1] == text[-1]
    for back in range(1, width):
        same &= text[width - 1 - back : -1 - back] == text[-1 - back]
    found = np.flatnonzero(same)
    return int(found[-1]) + width if len(found) else None
