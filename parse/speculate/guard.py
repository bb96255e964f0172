"""Keeps a request safe from its proposer: one that fails, or proposes what cannot be, costs its proposals only."""

import logging
from collections.abc import Sequence

from torch import Tensor

from parse.speculate.proposal import NOTHING, Proposal, Proposer

logger = logging.getLogger(__name__)


class Guarded:
    def __init__(self, proposer: Proposer, vocabulary: int) -> None:
        self._proposer: Proposer | None = proposer  # None: it has lost track of the text
        self._vocabulary = vocabulary

    def take(self, tokens: Sequence[int], features: Tensor | None) -> None:
        if self._proposer is None:
            return
        try:
            self._proposer.take(tokens, features)
        except Exception:
            logger.warning("a proposer failed, and proposes no more for its request", exc_info=True)
            self._proposer = None

    def propose(self, most: int) -> Proposal:
        if self._proposer is None or most < 1:
            return NOTHING
        try:
            found = self._proposer.propose(most)
            check(found, most, self._vocabulary)
        except Exception:
            logger.warning("a proposer failed, and proposes nothing this time", exc_info=True)
            return NOTHING
        return found


def check(proposal: Proposal, most: int, vocabulary: int) -> None:
    tokens, parents = proposal.tokens, proposal.parents
    if not len(tokens) == len(parents) <= most:
        raise ValueError(f"{len(tokens)} tokens and {len(parents)} parents, where at most {most} were asked for")
    if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise ValueError(f"what is proposed is not all tokens in 0..{vocabulary - 1}")
    if not all(type(parent) is int and -1 <= parent < node for node, parent in enumerate(parents)):
        raise ValueError("a node must hang behind an earlier one")
