"""Keeps requests safe from a method: one that fails, or proposes what cannot be, costs its proposals only."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parse.speculative.proposal import NO_PROPOSAL, MaskPrediction, Proposal, ProposalRequest, Proposer, ProposerState
from parse.tree import MASK

logger = logging.getLogger(__name__)


@dataclass
class GuardedState:
    """A proposer; None: it has lost track of the text."""

    state: ProposerState | None
    report_fault: Callable[[str], None]

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        if self.state is None:
            return
        try:
            self.state.extend(tokens, hidden_states, mask_prediction)
        except Exception:
            self.report_fault("a text could not be followed, and goes on without proposals")
            self.state = None


class GuardedProposer(Proposer[GuardedState]):
    """A foresight that never fails, over one that may."""

    def __init__(self, proposer: Proposer[Any], vocab_size: int) -> None:
        self._proposer, self._vocab_size = proposer, vocab_size
        self.aux_hidden_state_layers, self.bytes_per_token = proposer.aux_hidden_state_layers, proposer.bytes_per_token
        self._num_faults = 0

    def reserve(self, max_sequences: int, sequence_capacity: int) -> None:
        self._proposer.reserve(max_sequences, sequence_capacity)

    def reset(self) -> None:
        self._proposer.reset()

    def new_state(self) -> GuardedState:
        try:
            return GuardedState(self._proposer.new_state(), self._report_fault)
        except Exception:
            self._report_fault("a text goes without proposals")
            return GuardedState(None, self._report_fault)

    def propose(self, requests: Sequence[ProposalRequest[GuardedState]]) -> list[Proposal]:
        active = [
            ProposalRequest(wish.state.state, wish.max_tokens, wish.min_probability, wish.max_depth)
            for wish in requests
            if wish.state.state is not None and wish.max_tokens > 0
        ]
        proposals = iter(self._call_proposer(active) if active else ())
        return [
            self._validated(next(proposals), wish)
            if wish.state.state is not None and wish.max_tokens > 0
            else NO_PROPOSAL
            for wish in requests
        ]

    def _call_proposer(self, requests: Sequence[ProposalRequest[ProposerState]]) -> Sequence[Proposal]:
        try:
            proposals = self._proposer.propose(requests)
            if len(proposals) != len(requests):
                raise ValueError(f"{len(proposals)} proposals for {len(requests)} texts")
            return proposals
        except Exception:
            if len(requests) > 1:  # whoever is at fault fails alone
                return [self._call_proposer([wish])[0] for wish in requests]
            self._report_fault("nothing is proposed this time")
            return [NO_PROPOSAL]

    def _validated(self, proposal: Proposal, request: ProposalRequest[GuardedState]) -> Proposal:
        try:
            validate_proposal(proposal, request.max_tokens, self._vocab_size)
        except Exception:
            self._report_fault("what is proposed cannot be")
            return NO_PROPOSAL
        return proposal

    def _report_fault(self, what: str) -> None:
        """In full at first; what fails with every token must not fill the log."""
        self._num_faults += 1
        if self._num_faults.bit_count() == 1:  # 1, 2, 4, ...
            times = f" (fault {self._num_faults} of this method)" if self._num_faults > 1 else ""
            logger.warning("%s: %s%s", type(self._proposer).__name__, what, times, exc_info=self._num_faults == 1)


def validate_proposal(proposal: Proposal, max_tokens: int, vocab_size: int) -> None:
    tokens, parents, probabilities = proposal.token_ids, proposal.parents, proposal.probabilities
    if not len(tokens) == len(parents) <= max_tokens:
        raise ValueError(f"{len(tokens)} tokens and {len(parents)} parents, where at most {max_tokens} were asked for")
    if not all(type(token) is int and (0 <= token < vocab_size or token == MASK) for token in tokens):
        raise ValueError(f"what is proposed is not all tokens in 0..{vocab_size - 1}")
    if not all(type(parent) is int and -1 <= parent < node for node, parent in enumerate(parents)):
        raise ValueError("a node must hang behind an earlier one")
    if any(tokens[parent] == MASK != token for token, parent in zip(tokens, parents, strict=True) if parent >= 0):
        raise ValueError("nothing but masks can follow a mask")
    if probabilities is not None and not (
        len(probabilities) == len(tokens) and all(0 <= chance <= 1.001 for chance in probabilities)
    ):
        raise ValueError("each proposed token has a chance between 0 and 1")
