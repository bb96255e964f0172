"""Proposals, and the protocol between a token-level method and the engine.

A proposal is a tree of tokens that the target might generate next. In one pass, the target chooses its own token after
each proposed one. Proposed tokens are accepted as long as they equal the target's own. The output is therefore always
the target's own: a bad proposer costs time but never changes the text. The exception is a draft model that is told not
to check all proposed tokens (`drafting` in the settings): the target of the pair verifies the draft.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """A tree of proposed tokens.

    `parents[j]` is the node that node j follows. It is smaller than j. The value -1 stands for the last token of the
    sequence. A node may be a MASK (`parse.tree`): no token can follow it, but the target predicts a token there (see
    SPACE).
    """

    token_ids: Sequence[int] = ()
    parents: Sequence[int] = ()
    probabilities: Sequence[float] | None = None
    """The method's estimate, for each node, that the node and all its ancestors are accepted."""
    ready: bool = True
    """False while the proposer still prefills the sequence. Such a proposal says nothing about the method's quality."""


NO_PROPOSAL = Proposal()
NOT_READY = Proposal(ready=False)


def chain_proposal(token_ids: Sequence[int], probabilities: Sequence[float] | None = None) -> Proposal:
    """Returns a proposal in which each token follows the one before it."""
    return Proposal(token_ids, range(-1, len(token_ids) - 1), probabilities)


@dataclass(frozen=True)
class MaskPrediction:
    """The target's predictions at masks, in order.

    The last token was sampled in the pass that computed the token before it. The masks followed that token in the same
    pass.
    """

    token_ids: Sequence[int]
    probabilities: Sequence[float]  # of each, given the ones before it


class ProposerState(Protocol):
    """The state that a method keeps for one sequence.

    The engine's thread calls it, so it has to be quick.
    """

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        """Appends tokens to the sequence. The first call passes the whole prompt.

        `hidden_states` [n, width] is passed to methods that name `aux_hidden_state_layers`. Its rows belong to the
        tokens *before* each of the last n tokens. n is smaller than the number of tokens if the target no longer has
        all of the hidden states. `mask_prediction` is passed if the last pass also computed masks.
        """
        ...


UNLIMITED = 1 << 30

P = TypeVar("P", bound=ProposerState)


@dataclass(frozen=True)
class ProposalRequest(Generic[P]):
    """Asks for a proposal that continues one sequence."""

    state: P
    max_tokens: int
    min_probability: float = 0.0  # leave out nodes that are less likely to be accepted
    max_depth: int = UNLIMITED  # tokens on one path


class Proposer(ABC, Generic[P]):
    """A token-level method, which serves any number of sequences."""

    aux_hidden_state_layers: tuple[int, ...] = ()
    """The target's `hidden_states` that the method reads, concatenated in this order."""
    bytes_per_token: int = 0
    """Memory that the method keeps for each token of a sequence, without the target's hidden states."""

    def reserve(self, max_sequences: int, sequence_capacity: int) -> None:
        """Allocates memory for `max_sequences` of `sequence_capacity` tokens each.

        It is called once, before all other methods.
        """

    def reset(self) -> None:
        """Drops everything that was computed for past sequences.

        Later sequences then reuse nothing of it. Any thread may call this method.
        """

    @abstractmethod
    def new_state(self) -> P:
        """Returns the state of a new sequence."""

    @abstractmethod
    def propose(self, requests: Sequence[ProposalRequest[P]]) -> list[Proposal]:
        """Returns one proposal for each request."""
