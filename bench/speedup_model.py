"""What speculation should gain, from bare passes and from what was accepted at each place.

A method writes L tokens in a pass, its own one and those that were accepted. It pays while L exceeds what its passes
take, with their proposals, in passes of a single token: the tokens *needed*.
"""

from dataclasses import dataclass

from bench.forward_passes import PassRecords, PassTimeCurve
from parse.registry import METHODS
from parse.types import SpeculationStats


@dataclass(frozen=True)
class DecodingStats:
    """What writing by a method came to, all answers together."""

    passes: int  # of single texts
    proposed: tuple[int, ...]  # at each place
    accepted: tuple[int, ...]
    entries: float  # of a text in a pass
    texts: float  # in a pass
    pass_s: float
    num_proposal_requests: int  # for a proposal
    proposal_s: float  # one of them

    @property
    def tokens_per_pass(self) -> float:
        return 1 + sum(self.accepted) / self.passes

    @property
    def proposal_s_per_pass(self) -> float:
        """For a pass of one text."""
        return self.num_proposal_requests * self.proposal_s / self.passes

    def step_s(self, method: str) -> float:
        """A proposal, of methods that go token by token each token of it."""
        steps = sum(self.proposed) if METHODS[method].is_sequential else self.num_proposal_requests
        return self.num_proposal_requests * self.proposal_s / steps if steps else 0.0

    @property
    def acceptance_rates(self) -> list[float]:
        """Of what was proposed there."""
        return [accepted / proposed for accepted, proposed in zip(self.accepted, self.proposed, strict=True)]


def decoding_stats(speculation: SpeculationStats, records: PassRecords) -> DecodingStats:
    """Passes that read prompts are not among those seen."""
    passes, texts = len(records.passes), sum(p.texts for p in records.passes)
    num_proposals = sum(count for count, _ in records.proposal_times)
    return DecodingStats(
        speculation.passes,
        speculation.proposed_per_position,
        speculation.accepted_per_position,
        sum(p.entries for p in records.passes) / texts,
        texts / passes,
        sum(p.seconds for p in records.passes) / passes,
        num_proposals,
        sum(seconds for _, seconds in records.proposal_times) / num_proposals if num_proposals else 0.0,
    )


def break_even_tokens(stats: DecodingStats, curve: PassTimeCurve) -> float:
    """Tokens in a pass at which a text by itself is written as fast as without the method."""
    return (curve.seconds_at(stats.entries) + stats.proposal_s_per_pass) / curve.seconds_at(1)


def predict_speedup(
    stats: DecodingStats, curve: PassTimeCurve, plain_passes: int, answers: int, prompt_s: float
) -> float:
    """Speed-up over plain writing of as many answers; each one's first pass reads its prompt."""
    prefill_s = answers * prompt_s
    plain_s = prefill_s + (plain_passes - answers) * curve.seconds_at(1)
    return plain_s / (
        prefill_s + (stats.passes - answers) * (curve.seconds_at(stats.entries) + stats.proposal_s_per_pass)
    )


def speedup_by_depth(stats: DecodingStats, curve: PassTimeCurve, method: str, step_s: float) -> list[float]:
    """Speed-up of writing by chains of 1, 2, ... tokens in passes of `curve.texts` texts, prompts aside.

    `found` tells how deep proposals of one text at a time are accepted: at each place as often as where it was tried.
    `step_s` is what a proposal takes now, of methods that go token by token each token of it.
    """
    if not stats.proposed:
        return []
    share = stats.proposed[0] / stats.num_proposal_requests  # some methods have nothing to propose now and then
    tokens, reach_probability, speedups = 1.0, share, []
    for depth, acceptance_rate in enumerate(stats.acceptance_rates, 1):
        reach_probability = min(reach_probability, share * acceptance_rate)  # nothing is accepted behind what was not
        tokens += reach_probability
        steps = depth if METHODS[method].is_sequential else 1
        seconds = curve.seconds_at(1 + depth * share) + curve.texts * step_s * steps
        speedups.append(tokens * curve.seconds_at(1) / seconds)
    return speedups
