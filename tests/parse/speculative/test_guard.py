import weakref
from typing import Any

import pytest
import torch

from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import NO_PROPOSAL, Proposal, ProposalRequest, Proposer
from parse.tree import MASK


class ScriptedProposer(Proposer[Any]):
    """A proposer whose states hold the proposals that it will make for them."""

    def __init__(self, *states):
        self.states, self.calls = list(states), []

    def new_state(self):
        return self.states.pop(0)

    def propose(self, requests):
        self.calls.append(len(requests))
        proposals = [request.state.proposals.pop(0) for request in requests]
        if fault := next((proposal for proposal in proposals if isinstance(proposal, Exception)), None):
            for request, proposal in zip(requests, proposals, strict=True):
                request.state.proposals.insert(0, proposal)
            if len(requests) == 1:
                requests[0].state.proposals.pop(0)
            raise fault
        return proposals


class ScriptedState:
    def __init__(self, *proposals, fails_to_extend=False):
        self.proposals, self.fails_to_extend = list(proposals), fails_to_extend
        self.token_ids: list[int] = []

    def extend(self, tokens, hidden_states, mask_prediction):
        if self.fails_to_extend:
            raise ZeroDivisionError
        self.token_ids += tokens


VALID = Proposal((3, 4, 5), (-1, 0, 0))


@pytest.mark.parametrize(
    "invalid",
    [
        ZeroDivisionError(),
        Proposal((3, 4), (-1,)),
        Proposal((3, 4, 5, 6), (-1, 0, 1, 2)),
        Proposal((9,), (-1,)),
        Proposal((-2,), (-1,)),
        Proposal((1.5,), (-1,)),  # type: ignore[arg-type]
        Proposal((True,), (-1,)),
        Proposal(("a",), (-1,)),  # type: ignore[arg-type]
        Proposal((3,), (0,)),
        Proposal((3,), (-2,)),
        Proposal((3, 4), (-1, None)),  # type: ignore[arg-type]
        Proposal((MASK, 3), (-1, 0)),
        Proposal((3, 4), (-1, 0), (0.5,)),
        Proposal((3, 4), (-1, 0), (0.5, 1.5)),
        Proposal((3, 4), (-1, 0), (0.5, float("nan"))),
        None,
        [3, 4],
    ],
)
def test_an_invalid_proposal_costs_one_proposal_of_one_sequence(invalid, caplog):
    guard = GuardedProposer(ScriptedProposer(ScriptedState(invalid, VALID), ScriptedState(VALID, VALID)), vocab_size=9)
    requests = [ProposalRequest(guard.new_state(), 3) for _ in range(2)]
    assert guard.propose(requests) == [NO_PROPOSAL, VALID] and "ScriptedProposer: " in caplog.text
    requests[0].state.extend((1,), None, None)
    assert guard.propose(requests) == [VALID, VALID]


def test_a_state_that_could_not_be_extended_gets_no_more_proposals(caplog):
    state = ScriptedState(VALID, fails_to_extend=True)
    guard = GuardedProposer(ScriptedProposer(state), vocab_size=9)
    guarded = guard.new_state()
    guarded.extend((1,), None, None)
    guarded.extend((2,), None, None)
    assert guard.propose([ProposalRequest(guarded, 3)]) == [NO_PROPOSAL]
    assert caplog.text.count("continues without proposals") == 1
    assert state.proposals == [VALID]


def test_a_sequence_for_which_no_state_can_be_made_gets_no_proposals(caplog):
    guard = GuardedProposer(ScriptedProposer(), vocab_size=9)
    guarded = guard.new_state()
    guarded.extend((1,), None, None)
    assert guard.propose([ProposalRequest(guarded, 3)]) == [NO_PROPOSAL]
    assert "there is no state for a new sequence" in caplog.text


def test_the_proposer_is_not_called_for_requests_of_no_tokens():
    proposer = ScriptedProposer(ScriptedState(), ScriptedState(VALID))
    guard = GuardedProposer(proposer, vocab_size=9)
    requests = [ProposalRequest(guard.new_state(), 0), ProposalRequest(guard.new_state(), 3)]
    assert guard.propose(requests) == [NO_PROPOSAL, VALID]
    assert proposer.calls == [1]


def test_too_few_proposals_count_as_none():
    class EmptyProposer(ScriptedProposer):
        def propose(self, requests):
            return []

    guard = GuardedProposer(EmptyProposer(ScriptedState(VALID), ScriptedState(VALID)), vocab_size=9)
    requests = [ProposalRequest(guard.new_state(), 3) for _ in range(2)]
    assert guard.propose(requests) == [NO_PROPOSAL, NO_PROPOSAL]


def test_a_method_that_fails_with_every_token_does_not_fill_the_log(caplog):
    guard = GuardedProposer(ScriptedProposer(ScriptedState(*[ZeroDivisionError()] * 100)), vocab_size=9)
    requests = [ProposalRequest(guard.new_state(), 3)]
    for _ in range(100):
        assert guard.propose(requests) == [NO_PROPOSAL]
    assert len(caplog.records) == 7 and "fault 64 of this method" in caplog.text  # 1, 2, 4, ..., 64
    assert sum(bool(record.exc_info) for record in caplog.records) == 1


def test_a_call_that_ran_out_of_memory_is_repeated_after_its_tensors_are_freed():
    class Greedy(ScriptedProposer):
        tensor: Any = None

        def propose(self, requests):
            if len(requests) > 1:
                scratch = torch.zeros(1000)
                self.tensor = weakref.ref(scratch)
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert self.tensor() is None
            return super().propose(requests)

    guard = GuardedProposer(Greedy(ScriptedState(VALID), ScriptedState(VALID)), vocab_size=9)
    assert guard.propose([ProposalRequest(guard.new_state(), 3) for _ in range(2)]) == [VALID, VALID]
