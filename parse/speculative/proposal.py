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

    token_ids: Sequence[int] = ()
    parents: Sequence[int] = ()
    probabilities: Sequence[float] | None = None
    """How likely each is to be accepted, with all above it, as far as the method can tell."""
    ready: bool = True
    """Or is the text yet to be read, so that nothing follows from what is proposed?"""


NO_PROPOSAL = Proposal()
NOT_YET = Proposal(ready=False)


def chain_proposal(token_ids: Sequence[int], probabilities: Sequence[float] | None = None) -> Proposal:
    """One behind the other."""
    return Proposal(token_ids, range(-1, len(token_ids) - 1), probabilities)


@dataclass(frozen=True)
class MaskPrediction:
    """What the target said at the masks behind the last but one token of the text, the first mask first."""

    token_ids: Sequence[int]
    probabilities: Sequence[float]  # each, if those before it come


class ProposerState(Protocol):
    """The text of one request, as a method has read it. It is called in the engine's thread, and should be quick."""

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        """These tokens now follow in the text: at first all of the prompt.

        features [n, width], where the method asks for them: the target's, of the token *before* each of the last n of
        them. Fewer than there are tokens where the target does not know them any more. `foreseen`, where there were
        masks behind the last but one.
        """
        ...


UNLIMITED = 1 << 30

P = TypeVar("P", bound=ProposerState)


@dataclass(frozen=True)
class ProposalRequest(Generic[P]):
    """For what might follow a text: at most that many tokens, and none less likely than `floor` to be accepted."""

    state: P
    max_tokens: int
    min_probability: float = 0.0
    max_depth: int = UNLIMITED  # tokens one behind the other


class Proposer(ABC, Generic[P]):
    """A method, for any number of requests."""

    aux_hidden_state_layers: tuple[int, ...] = ()
    """Which of the target's `hidden_states`, side by side, are the features that it reads."""
    bytes_per_token: int = 0
    """What it keeps of each token of a text, the features not counted."""

    def reserve(self, max_sequences: int, sequence_capacity: int) -> None:
        """Told once, before all else, how many texts there may be, and how long."""

    def reset(self) -> None:
        """What it has read of past texts serves no later ones. From any thread."""

    @abstractmethod
    def new_state(self) -> P:
        """For one request."""

    @abstractmethod
    def propose(self, requests: Sequence[ProposalRequest[P]]) -> list[Proposal]:
        """For several requests at once, a proposal for each wish."""
