from typing import Any

import pytest

from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import NO_PROPOSAL, Proposal, ProposalRequest, Proposer
from parse.tree import MASK


class Scripted(Proposer[Any]):
    """A method whose texts bring their proposals along."""

    def __init__(self, *texts):
        self.texts, self.calls = list(texts), []

    def new_state(self):
        return self.texts.pop(0)

    def propose(self, wishes):
        self.calls.append(len(wishes))
        found = [wish.proposer.proposals.pop(0) for wish in wishes]
        if fault := next((one for one in found if isinstance(one, Exception)), None):
            for wish, one in zip(wishes, found, strict=True):
                wish.proposer.proposals.insert(0, one)
            if len(wishes) == 1:
                wishes[0].proposer.proposals.pop(0)
            raise fault
        return found


class Text:
    def __init__(self, *proposals, fails_to_take=False):
        self.proposals, self.fails_to_take = list(proposals), fails_to_take
        self.taken: list[int] = []

    def extend(self, tokens, features, foreseen):
        if self.fails_to_take:
            raise ZeroDivisionError
        self.taken += tokens


SOUND = Proposal((3, 4, 5), (-1, 0, 0))


@pytest.mark.parametrize(
    "nonsense",
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
def test_nonsense_costs_one_proposal_of_one_text(nonsense, caplog):
    guard = GuardedProposer(Scripted(Text(nonsense, SOUND), Text(SOUND, SOUND)), vocab_size=9)
    wishes = [ProposalRequest(guard.new_state(), 3) for _ in range(2)]
    assert guard.propose(wishes) == [NO_PROPOSAL, SOUND] and "Scripted: " in caplog.text
    wishes[0].state.extend((1,), None, None)
    assert guard.propose(wishes) == [SOUND, SOUND]


def test_who_cannot_follow_the_text_is_not_asked_again(caplog):
    text = Text(SOUND, fails_to_take=True)
    guard = GuardedProposer(Scripted(text), vocab_size=9)
    guarded = guard.new_state()
    guarded.extend((1,), None, None)
    guarded.extend((2,), None, None)
    assert (
        guard.propose([ProposalRequest(guarded, 3)]) == [NO_PROPOSAL]
        and caplog.text.count("goes on without proposals") == 1
    )
    assert text.proposals == [SOUND]


def test_who_has_no_place_for_another_text_lets_it_go_without(caplog):
    guard = GuardedProposer(Scripted(), vocab_size=9)
    guarded = guard.new_state()
    guarded.extend((1,), None, None)
    assert (
        guard.propose([ProposalRequest(guarded, 3)]) == [NO_PROPOSAL] and "a text goes without proposals" in caplog.text
    )


def test_where_there_is_no_room_nobody_is_asked():
    method = Scripted(Text(), Text(SOUND))
    guard = GuardedProposer(method, vocab_size=9)
    assert guard.propose([ProposalRequest(guard.new_state(), 0), ProposalRequest(guard.new_state(), 3)]) == [
        NO_PROPOSAL,
        SOUND,
    ]
    assert method.calls == [1]


def test_too_few_answers_are_none():
    class Short(Scripted):
        def propose(self, wishes):
            return []

    guard = GuardedProposer(Short(Text(SOUND), Text(SOUND)), vocab_size=9)
    assert guard.propose([ProposalRequest(guard.new_state(), 3) for _ in range(2)]) == [NO_PROPOSAL, NO_PROPOSAL]


def test_what_fails_with_every_token_does_not_fill_the_log(caplog):
    guard = GuardedProposer(Scripted(Text(*[ZeroDivisionError()] * 100)), vocab_size=9)
    wishes = [ProposalRequest(guard.new_state(), 3)]
    for _ in range(100):
        assert guard.propose(wishes) == [NO_PROPOSAL]
    assert len(caplog.records) == 7 and "fault 64 of this method" in caplog.text  # 1, 2, 4, ..., 64
    assert sum(bool(record.exc_info) for record in caplog.records) == 1
