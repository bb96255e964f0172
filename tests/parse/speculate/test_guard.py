import pytest

from parse.speculate.guard import Guarded
from parse.speculate.proposal import NOTHING, Proposal


class Scripted:
    def __init__(self, *proposals, fails_to_take=False):
        self.proposals, self.fails_to_take = list(proposals), fails_to_take
        self.taken = []

    def take(self, tokens, features):
        if self.fails_to_take:
            raise ZeroDivisionError
        self.taken += tokens

    def propose(self, most):
        proposal = self.proposals.pop(0)
        if isinstance(proposal, Exception):
            raise proposal
        return proposal


SOUND = Proposal((3, 4, 5), (-1, 0, 0))


@pytest.mark.parametrize(
    "nonsense",
    [
        ZeroDivisionError(),
        Proposal((3, 4), (-1,)),
        Proposal((3, 4, 5, 6), (-1, 0, 1, 2)),
        Proposal((9,), (-1,)),
        Proposal((-1,), (-1,)),
        Proposal((1.5,), (-1,)),  # type: ignore[arg-type]
        Proposal((True,), (-1,)),
        Proposal(("a",), (-1,)),  # type: ignore[arg-type]
        Proposal((3,), (0,)),
        Proposal((3,), (-2,)),
        Proposal((3, 4), (-1, None)),  # type: ignore[arg-type]
        None,
        [3, 4],
    ],
)
def test_nonsense_costs_one_proposal(nonsense, caplog):
    guarded = Guarded(Scripted(nonsense, SOUND), vocabulary=9)
    assert guarded.propose(3) is NOTHING and "proposes nothing this time" in caplog.text
    guarded.take((1,), None)
    assert guarded.propose(3) is SOUND


def test_who_cannot_follow_the_text_is_not_asked_again(caplog):
    proposer = Scripted(SOUND, fails_to_take=True)
    guarded = Guarded(proposer, vocabulary=9)
    guarded.take((1,), None)
    guarded.take((2,), None)
    assert guarded.propose(3) is NOTHING and caplog.text.count("proposes no more") == 1
    assert proposer.proposals == [SOUND]


def test_where_there_is_no_room_nobody_is_asked():
    assert Guarded(Scripted(), vocabulary=9).propose(0) is NOTHING
