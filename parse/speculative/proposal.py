"""Tokens that might come next, as a tree, and who proposes them.

Whatever is proposed, the text is the target's own: in one pass it says which token it would choose behind every
proposed one, and the proposal is followed as long as it says the same. So a proposer can only be useless, never wrong.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """`parents[j]` is the node that node j follows, an earlier one; -1: the last token of the text.

    A node may be a MASK (`parse.tree`): nothing follows there, but the target is to say what it foresees.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    likely: Sequence[float] | None = None
    """How likely each is to be accepted, with all above it, as far as the method can tell."""
    ready: bool = True
    """Or is the text yet to be read, so that nothing follows from what is proposed?"""


NOTHING = Proposal()
NOT_YET = Proposal(ready=False)


def chained(tokens: Sequence[int], likely: Sequence[float] | None = None) -> Proposal:
    """One behind the other."""
    return Proposal(tokens, range(-1, len(tokens) - 1), likely)


@dataclass(frozen=True)
class Foreseen:
    """What the target said at the masks behind the last but one token of the text, the first mask first."""

    tokens: Sequence[int]
    likely: Sequence[float]  # each, if those before it come


class Proposer(Protocol):
    """The text of one request, as a method has read it. It is called in the engine's thread, and should be quick."""

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None) -> None:
        """These tokens now follow in the text: at first all of the prompt.

        features [n, width], where the method asks for them: the target's, of the token *before* each of the last n of
        them. Fewer than there are tokens where the target does not know them any more. `foreseen`, where there were
        masks behind the last but one.
        """
        ...


ENDLESS = 1 << 30

P = TypeVar("P", bound=Proposer)


@dataclass(frozen=True)
class Wish(Generic[P]):
    """For what might follow a text: at most that many tokens, and none less likely than `floor` to be accepted."""

    proposer: P
    most: int
    floor: float = 0.0
    depth: int = ENDLESS  # tokens one behind the other


class Foresight(ABC, Generic[P]):
    """A method, for any number of requests."""

    taps: tuple[int, ...] = ()
    """Which of the target's `hidden_states`, side by side, are the features that it reads."""
    bytes_per_token: int = 0
    """What it keeps of each token of a text, the features not counted."""

    def reserve(self, contexts: int, capacity: int) -> None:
        """Told once, before all else, how many texts there may be, and how long."""

    def forget(self) -> None:
        """What it has read of past texts serves no later ones. From any thread."""

    @abstractmethod
    def proposer(self) -> P:
        """For one request."""

    @abstractmethod
    def propose(self, wishes: Sequence[Wish[P]]) -> list[Proposal]:
        """For several requests at once, a proposal for each wish."""
