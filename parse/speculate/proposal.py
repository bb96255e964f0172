"""Tokens that might come next, as a tree, and who proposes them.

Whatever is proposed, the text is the target's own: in one pass it says which token it would choose behind every
proposed one, and the proposal is followed as long as it says the same. So a proposer can only be useless, never wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """`parents[j]` is the node that node j follows, an earlier one; -1: the last token of the text."""

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()


NOTHING = Proposal()


class Foresight(Protocol):
    """A method, for any number of requests."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Which of the target's `hidden_states`, side by side, are the features that it reads; (): none."""
        ...

    def proposer(self) -> "Proposer":
        """For one request."""
        ...


class Proposer(Protocol):
    """Of one request. It is called in the engine's thread, and should be quick."""

    def take(self, tokens: Sequence[int], features: Tensor | None) -> None:
        """These tokens now follow in the text: at first all of the prompt.

        features [n, width], where the method asks for them: the target's, of the token *before* each of the last n of
        them. Fewer than there are tokens where the target does not know them any more.
        """
        ...

    def propose(self, most: int) -> Proposal:
        """At most that many tokens."""
        ...
