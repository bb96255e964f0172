"""Keeps requests safe from a method: one that fails, or proposes what cannot be, costs its proposals only."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parse.speculate.proposal import NOTHING, Foreseen, Foresight, Proposal, Proposer, Wish
from parse.tree import MASK

logger = logging.getLogger(__name__)


@dataclass
class Guarded:
    """A proposer; None: it has lost track of the text."""

    proposer: Proposer | None

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None) -> None:
        if self.proposer is None:
            return
        try:
            self.proposer.take(tokens, features, foreseen)
        except Exception:
            logger.warning("a proposer failed, and proposes no more for its request", exc_info=True)
            self.proposer = None


class Guard:
    """A foresight that never fails, over one that may."""

    def __init__(self, foresight: Foresight[Any], vocabulary: int) -> None:
        self._foresight, self._vocabulary = foresight, vocabulary

    @property
    def taps(self) -> tuple[int, ...]:
        return self._foresight.taps

    @property
    def bytes_per_token(self) -> int:
        return self._foresight.bytes_per_token

    def reserve(self, contexts: int, capacity: int) -> None:
        self._foresight.reserve(contexts, capacity)

    def proposer(self) -> Guarded:
        try:
            return Guarded(self._foresight.proposer())
        except Exception:
            logger.warning("a request goes without proposals", exc_info=True)
            return Guarded(None)

    def propose(self, wishes: Sequence[Wish[Guarded]]) -> list[Proposal]:
        asked = [
            Wish(wish.proposer.proposer, wish.most, wish.floor, wish.depth)
            for wish in wishes
            if wish.proposer.proposer is not None and wish.most > 0
        ]
        found = iter(self._proposed(asked) if asked else ())
        return [
            self._sound(next(found), wish) if wish.proposer.proposer is not None and wish.most > 0 else NOTHING
            for wish in wishes
        ]

    def _proposed(self, wishes: Sequence[Wish[Proposer]]) -> Sequence[Proposal]:
        try:
            found = self._foresight.propose(wishes)
            if len(found) != len(wishes):
                raise ValueError(f"{len(found)} proposals for {len(wishes)} texts")
            return found
        except Exception:
            if len(wishes) > 1:  # whoever is at fault fails alone
                return [self._proposed([wish])[0] for wish in wishes]
            logger.warning("a proposer failed, and proposes nothing this time", exc_info=True)
            return [NOTHING]

    def _sound(self, proposal: Proposal, wish: Wish[Guarded]) -> Proposal:
        try:
            check(proposal, wish.most, self._vocabulary)
        except Exception:
            logger.warning("a proposer proposed what cannot be; nothing is proposed this time", exc_info=True)
            return NOTHING
        return proposal


def check(proposal: Proposal, most: int, vocabulary: int) -> None:
    tokens, parents, likely = proposal.tokens, proposal.parents, proposal.likely
    if not len(tokens) == len(parents) <= most:
        raise ValueError(f"{len(tokens)} tokens and {len(parents)} parents, where at most {most} were asked for")
    if not all(type(token) is int and (0 <= token < vocabulary or token == MASK) for token in tokens):
        raise ValueError(f"what is proposed is not all tokens in 0..{vocabulary - 1}")
    if not all(type(parent) is int and -1 <= parent < node for node, parent in enumerate(parents)):
        raise ValueError("a node must hang behind an earlier one")
    if any(tokens[parent] == MASK != token for token, parent in zip(tokens, parents, strict=True) if parent >= 0):
        raise ValueError("nothing but masks can follow a mask")
    if likely is not None and not (len(likely) == len(tokens) and all(0 <= chance <= 1.001 for chance in likely)):
        raise ValueError("each proposed token has a chance between 0 and 1")
