"""What speculation should gain, from bare passes and from what was accepted at each place.

A method writes L tokens in a pass, its own one and those that were accepted. It pays while L exceeds what its passes
take, with their proposals, in passes of a single token: the tokens *needed*.
"""

from dataclasses import dataclass

from bench.passes import Curve, Seen
from parse.types import MethodName, SpeculationStats

BY_TOKEN: frozenset[MethodName] = frozenset({"eagle3", "draft_model"})
"""Methods whose proposals take a pass of their own for each token."""


@dataclass(frozen=True)
class Writing:
    """What writing by a method came to, all answers together."""

    passes: int  # of single texts
    proposed: tuple[int, ...]  # at each place
    accepted: tuple[int, ...]
    entries: float  # of a text in a pass
    texts: float  # in a pass
    pass_s: float
    wishes: int  # for a proposal
    proposal_s: float  # one of them

    @property
    def tokens_per_pass(self) -> float:
        return 1 + sum(self.accepted) / self.passes

    @property
    def proposing_s(self) -> float:
        """For a pass of one text."""
        return self.wishes * self.proposal_s / self.passes

    def step_s(self, method: MethodName) -> float:
        """A proposal, of methods that go token by token each token of it."""
        steps = sum(self.proposed) if method in BY_TOKEN else self.wishes
        return self.wishes * self.proposal_s / steps if steps else 0.0

    @property
    def accepted_by_place(self) -> list[float]:
        """Of what was proposed there."""
        return [kept / there for kept, there in zip(self.accepted, self.proposed, strict=True)]


def writing(came: SpeculationStats, seen: Seen) -> Writing:
    """Passes that read prompts are not among those seen."""
    passes, texts = len(seen.passes), sum(p.texts for p in seen.passes)
    wishes = sum(count for count, _ in seen.proposing)
    return Writing(
        came.passes,
        came.proposed_per_position,
        came.accepted_per_position,
        sum(p.entries for p in seen.passes) / texts,
        texts / passes,
        sum(p.seconds for p in seen.passes) / passes,
        wishes,
        sum(seconds for _, seconds in seen.proposing) / wishes if wishes else 0.0,
    )


def needed(found: Writing, curve: Curve) -> float:
    """Tokens in a pass at which a text by itself is written as fast as without the method."""
    return (curve.at(found.entries) + found.proposing_s) / curve.at(1)


def predicted(found: Writing, curve: Curve, plain_passes: int, answers: int, prompt_s: float) -> float:
    """Speed-up over plain writing of as many answers; each one's first pass reads its prompt."""
    reading = answers * prompt_s
    alone = reading + (plain_passes - answers) * curve.at(1)
    return alone / (reading + (found.passes - answers) * (curve.at(found.entries) + found.proposing_s))


def by_depth(found: Writing, curve: Curve, method: MethodName, step_s: float) -> list[float]:
    """Speed-up of writing by chains of 1, 2, ... tokens in passes of `curve.texts` texts, prompts aside.

    `found` tells how deep proposals of one text at a time are accepted: at each place as often as where it was tried.
    `step_s` is what a proposal takes now, of methods that go token by token each token of it.
    """
    if not found.proposed:
        return []
    share = found.proposed[0] / found.wishes  # some methods have nothing to propose now and then
    tokens, reached, speedups = 1.0, share, []
    for length, accepted in enumerate(found.accepted_by_place, 1):
        reached = min(reached, share * accepted)  # nothing is accepted behind what was not
        tokens += reached
        steps = length if method in BY_TOKEN else 1
        spent = curve.at(1 + length * share) + curve.texts * step_s * steps
        speedups.append(tokens * curve.at(1) / spent)
    return speedups
