"""Keeps requests safe from a method: one that fails, or proposes what cannot be, costs its proposals only."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parse.speculative.proposal import NOTHING, Foreseen, Foresight, Proposal, Proposer, Wish
from parse.tree import MASK

logger = logging.getLogger(__name__)


@dataclass
class Guarded:
    """A proposer; None: it has lost track of the text."""

    proposer: Proposer | None
    fault: Callable[[str], None]

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None) -> None:
        if self.proposer is None:
            return
        try:
            self.proposer.take(tokens, features, foreseen)
        except Exception:
            self.fault("a text could not be followed, and goes on without proposals")
            self.proposer = None


class Guard(Foresight[Guarded]):
    """A foresight that never fails, over one that may."""

    def __init__(self, foresight: Foresight[Any], vocabulary: int) -> None:
        self._foresight, self._vocabulary = foresight, vocabulary
        self.taps, self.bytes_per_token = foresight.taps, foresight.bytes_per_token
        self._faults = 0

    def reserve(self, contexts: int, capacity: int) -> None:
        self._foresight.reserve(contexts, capacity)

    def forget(self) -> None:
        self._foresight.forget()

    def proposer(self) -> Guarded:
        try:
            return Guarded(self._foresight.proposer(), self._fault)
        except Exception:
            self._fault("a text goes without proposals")
            return Guarded(None, self._fault)

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
            self._fault("nothing is proposed this time")
            return [NOTHING]

    def _sound(self, proposal: Proposal, wish: Wish[Guarded]) -> Proposal:
        try:
            check(proposal, wish.most, self._vocabulary)
        except Exception:
            self._fault("what is proposed cannot be")
            return NOTHING
        return proposal

    def _fault(self, what: str) -> None:
        """In full at first; what fails with every token must not fill the log."""
        self._faults += 1
        if self._faults.bit_count() == 1:  # 1, 2, 4, ...
            times = f" (fault {self._faults} of this method)" if self._faults > 1 else ""
            logger.warning("%s: %s%s", type(self._foresight).__name__, what, times, exc_info=self._faults == 1)


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
