"""Isolates the engine from faults of a token-level method.

If a method raises an exception or returns an invalid proposal, only that proposal is lost. The request continues.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parse.device_errors import is_device_error
from parse.speculative.proposal import NO_PROPOSAL, MaskPrediction, Proposal, ProposalRequest, Proposer, ProposerState
from parse.tree import MASK

logger = logging.getLogger(__name__)


@dataclass
class GuardedState:
    """A proposer's state of one sequence.

    The state is None after it has failed, because it would no longer match the sequence.
    """

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
            self.report_fault("the state of a sequence could not be extended; it continues without proposals")
            self.state = None


class GuardedProposer(Proposer[GuardedState]):
    """Wraps a proposer so that it returns only valid proposals, and raises only if the device has failed."""

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
            self._report_fault("there is no state for a new sequence; the sequence gets no proposals")
            return GuardedState(None, self._report_fault)

    def propose(self, requests: Sequence[ProposalRequest[GuardedState]]) -> list[Proposal]:
        """Returns a proposal for each request: a valid one, or `NO_PROPOSAL`."""
        inner_requests = {
            index: ProposalRequest(request.state.state, request.max_tokens, request.min_probability, request.max_depth)
            for index, request in enumerate(requests)
            if request.state.state is not None and request.max_tokens > 0
        }
        proposals = [NO_PROPOSAL] * len(requests)
        if inner_requests:
            inner_proposals = self._call_proposer(list(inner_requests.values()))
            for index, proposal in zip(inner_requests, inner_proposals, strict=True):
                proposals[index] = self._valid_or_empty(proposal, requests[index].max_tokens)
        return proposals

    def _call_proposer(self, requests: Sequence[ProposalRequest[ProposerState]]) -> Sequence[Proposal]:
        try:
            proposals = self._proposer.propose(requests)
            if len(proposals) != len(requests):
                raise ValueError(f"got {len(proposals)} proposals for {len(requests)} requests")
            return proposals
        except Exception as error:
            if is_device_error(error):
                raise  # the model cannot run any more either
            if len(requests) == 1:
                self._report_fault("the call failed; the request gets no proposal in this step")
                return [NO_PROPOSAL]
        # The call is repeated for each request, so that only the faulty one fails. This is outside the handler, because
        # the exception keeps the tensors of the failed call in memory, which may be what ran out.
        return [self._call_proposer([request])[0] for request in requests]

    def _valid_or_empty(self, proposal: Proposal, max_tokens: int) -> Proposal:
        try:
            validate_proposal(proposal, max_tokens, self._vocab_size)
        except Exception:
            self._report_fault("the proposal is invalid and was dropped")
            return NO_PROPOSAL
        return proposal

    def _report_fault(self, message: str) -> None:
        """Logs only the 1st, 2nd, 4th and 8th fault, and so on.

        A method may fail with every token, so not every fault is logged.
        """
        self._num_faults += 1
        if self._num_faults.bit_count() == 1:
            number = f" (fault {self._num_faults} of this method)" if self._num_faults > 1 else ""
            logger.warning("%s: %s%s", type(self._proposer).__name__, message, number, exc_info=self._num_faults == 1)


def validate_proposal(proposal: Proposal, max_tokens: int, vocab_size: int) -> None:
    """Raises `ValueError` if a proposal is invalid.

    A valid proposal is a tree of at most `max_tokens` tokens of the vocabulary.
    """
    tokens, parents, probabilities = proposal.token_ids, proposal.parents, proposal.probabilities
    if not len(tokens) == len(parents) <= max_tokens:
        raise ValueError(
            f"a proposal needs as many parents as tokens and at most {max_tokens}, got {len(tokens)} tokens and "
            f"{len(parents)} parents"
        )
    if not all(type(token) is int and (0 <= token < vocab_size or token == MASK) for token in tokens):
        raise ValueError(f"tokens must lie in 0..{vocab_size - 1}")
    if not all(type(parent) is int and -1 <= parent < node for node, parent in enumerate(parents)):
        raise ValueError("the parent of a node must be an earlier node")
    if any(tokens[parent] == MASK != token for token, parent in zip(tokens, parents, strict=True) if parent >= 0):
        raise ValueError("only masks may follow a mask")
    if probabilities is not None and not (
        len(probabilities) == len(tokens) and all(0 <= probability <= 1.001 for probability in probabilities)
    ):
        raise ValueError("each token needs a probability between 0 and 1")
