from typing import Any

import pytest

from parse.speculative.guard import Guard
from parse.speculative.proposal import NOTHING, Foresight, Proposal, Wish
from parse.tree import MASK


class Scripted(Foresight[Any]):
    """A method whose texts bring their proposals along."""

    def __init__(self, *texts):
        self.texts, self.calls = list(texts), []

    def proposer(self):
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

    def take(self, tokens, features, foreseen):
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
    guard = Guard(Scripted(Text(nonsense, SOUND), Text(SOUND, SOUND)), vocabulary=9)
    wishes = [Wish(guard.proposer(), 3) for _ in range(2)]
    assert guard.propose(wishes) == [NOTHING, SOUND] and "Scripted: " in caplog.text
    wishes[0].proposer.take((1,), None, None)
    assert guard.propose(wishes) == [SOUND, SOUND]


def test_who_cannot_follow_the_text_is_not_asked_again(caplog):
    text = Text(SOUND, fails_to_take=True)
    guard = Guard(Scripted(text), vocabulary=9)
    guarded = guard.proposer()
    guarded.take((1,), None, None)
    guarded.take((2,), None, None)
    assert guard.propose([Wish(guarded, 3)]) == [NOTHING] and caplog.text.count("goes on without proposals") == 1
    assert text.proposals == [SOUND]


def test_who_has_no_place_for_another_text_lets_it_go_without(caplog):
    guard = Guard(Scripted(), vocabulary=9)
    guarded = guard.proposer()
    guarded.take((1,), None, None)
    assert guard.propose([Wish(guarded, 3)]) == [NOTHING] and "a text goes without proposals" in caplog.text


def test_where_there_is_no_room_nobody_is_asked():
    method = Scripted(Text(), Text(SOUND))
    guard = Guard(method, vocabulary=9)
    assert guard.propose([Wish(guard.proposer(), 0), Wish(guard.proposer(), 3)]) == [NOTHING, SOUND]
    assert method.calls == [1]


def test_too_few_answers_are_none():
    class Short(Scripted):
        def propose(self, wishes):
            return []

    guard = Guard(Short(Text(SOUND), Text(SOUND)), vocabulary=9)
    assert guard.propose([Wish(guard.proposer(), 3) for _ in range(2)]) == [NOTHING, NOTHING]


def test_what_fails_with_every_token_does_not_fill_the_log(caplog):
    guard = Guard(Scripted(Text(*[ZeroDivisionError()] * 100)), vocabulary=9)
    wishes = [Wish(guard.proposer(), 3)]
    for _ in range(100):
        assert guard.propose(wishes) == [NOTHING]
    assert len(caplog.records) == 7 and "fault 64 of this method" in caplog.text  # 1, 2, 4, ..., 64
    assert sum(bool(record.exc_info) for record in caplog.records) == 1
