"""What followed the last few tokens the last time they stood there, in the prompt or in the answer itself."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from parse.speculative.proposal import NO_PROPOSAL, MaskPrediction, Proposal, ProposalRequest, Proposer, chain_proposal

MAX_NGRAM, MIN_NGRAM = 4, 2  # tokens that must be the same; fewer than that say too little


class NgramProposer(Proposer["NgramState"]):
    """Costs a look through the text, and no model."""

    bytes_per_token = 4

    def new_state(self) -> "NgramState":
        return NgramState()

    def propose(self, requests: Sequence[ProposalRequest["NgramState"]]) -> list[Proposal]:
        return [wish.state.continuation(min(wish.max_tokens, wish.max_depth)) for wish in requests]


class NgramState:
    """The text of one request."""

    def __init__(self) -> None:
        self._token_ids = np.empty(1024, np.int32)
        self._size = 0

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None = None, mask_prediction: MaskPrediction | None = None
    ) -> None:
        size = self._size + len(tokens)
        if size > len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.empty(size, np.int32)])
        self._token_ids[self._size : size] = tokens
        self._size = size

    def continuation(self, max_tokens: int) -> Proposal:
        token_ids = self._token_ids[: self._size]
        for width in range(min(MAX_NGRAM, len(token_ids) - 1), MIN_NGRAM - 1, -1):
            if (start := _last_match(token_ids, width)) is not None:
                return chain_proposal(token_ids[start : start + max_tokens].tolist())
        return NO_PROPOSAL


def _last_match(token_ids: np.ndarray, width: int) -> int | None:
    """Where the text goes on behind the last place, before its end, at which its last `width` tokens stand too."""
    is_match = token_ids[width - 1 : -1] == token_ids[-1]
    for back in range(1, width):
        is_match &= token_ids[width - 1 - back : -1 - back] == token_ids[-1 - back]
    matches = np.flatnonzero(is_match)
    return int(matches[-1]) + width if len(matches) else None
