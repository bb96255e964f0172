"""N-gram lookup: proposes tokens that occur earlier in the same sequence.

It looks for an earlier occurrence of the last few tokens and proposes the tokens that followed it.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from parse.config import SpeculativeConfig
from parse.speculative.proposal import NO_PROPOSAL, MaskPrediction, Proposal, ProposalRequest, Proposer, chain_proposal
from parse.speculative.proposers.base import DEFAULT_CHAIN_LENGTH, LoadContext, LoadedProposer

MAX_NGRAM, MIN_NGRAM = 4, 2  # tokens that must match; matches of fewer tokens are rarely right


def load(config: SpeculativeConfig, load_context: LoadContext) -> LoadedProposer:
    return LoadedProposer(NgramProposer(), config.num_speculative_tokens or DEFAULT_CHAIN_LENGTH)


class NgramProposer(Proposer["NgramState"]):
    """Searches the prompt and the output. It needs no model.

    For example, in the sequence 7 8 9 5 6 7 8, the last two tokens occurred before and were followed by 9 5 6. With
    `max_tokens=3` it proposes 9 5 6. Longer matches are preferred to shorter ones, and later matches to earlier ones.
    """

    bytes_per_token = 4

    def new_state(self) -> "NgramState":
        return NgramState()

    def propose(self, requests: Sequence[ProposalRequest["NgramState"]]) -> list[Proposal]:
        return [request.state.continuation(min(request.max_tokens, request.max_depth)) for request in requests]


class NgramState:
    """The tokens of one sequence."""

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
        """Returns at most `max_tokens` tokens, which followed the longest match."""
        token_ids = self._token_ids[: self._size]
        for width in range(min(MAX_NGRAM, len(token_ids) - 1), MIN_NGRAM - 1, -1):
            if (start := _end_of_last_match(token_ids, width)) is not None:
                return chain_proposal(token_ids[start : start + max_tokens].tolist())
        return NO_PROPOSAL


def _end_of_last_match(token_ids: np.ndarray, width: int) -> int | None:
    """Returns the index after the last earlier occurrence of the last tokens.

    `width` tokens must match. Returns None if there is no such occurrence.
    """
    is_match = token_ids[width - 1 : -1] == token_ids[-1]
    for back in range(1, width):
        is_match &= token_ids[width - 1 - back : -1 - back] == token_ids[-1 - back]
    matches = np.flatnonzero(is_match)
    return int(matches[-1]) + width if len(matches) else None
