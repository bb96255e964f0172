"""What speculation should gain, from bare passes and from what was accepted at each place.

A method writes L tokens in a pass, its own one and those that were accepted. It pays while L exceeds what its passes
take, with their proposals, in passes of a single token: the tokens *needed*.
"""

from dataclasses import dataclass

from bench.passes import Curve, Seen
from parse.types import Method, Speculated

BY_TOKEN: frozenset[Method] = frozenset({"eagle3", "draft_model"})
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

    @property
    def accepted_by_place(self) -> list[float]:
        """Of what was proposed there."""
        return [kept / there for kept, there in zip(self.accepted, self.proposed, strict=True)]


def writing(came: Speculated, seen: Seen) -> Writing:
    """Passes that read prompts are not among those seen."""
    passes, texts = len(seen.passes), sum(p.texts for p in seen.passes)
    wishes = sum(count for count, _ in seen.proposing)
    return Writing(
        came.passes,
        came.proposed,
        came.accepted,
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


def by_depth(found: Writing, curve: Curve, method: Method, proposal_s: float) -> list[float]:
    """Speed-up of writing by chains of 1, 2, ... tokens in passes of `curve.texts` texts, prompts aside.

    `found` tells how deep proposals are accepted, with one text at a time; `proposal_s` is what each takes now.
    """
    if not found.proposed:
        return []
    proposals = found.proposed[0]
    found_share = proposals / found.wishes  # some methods have nothing to propose now and then
    depth = sum(found.proposed) / proposals
    tokens, speedups = 1.0, []
    for length, kept in enumerate(found.accepted, 1):
        tokens += kept / found.wishes
        share = length / depth if method in BY_TOKEN else 1.0
        spent = curve.at(1 + length * found_share) + curve.texts * proposal_s * share
        speedups.append(tokens * curve.at(1) / spent)
    return speedups
