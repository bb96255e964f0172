"""Predicts the gain of token-level methods from bare passes and from the acceptance rate at each position.

With a method, a pass generates L tokens: the target's own one and the accepted ones. The method pays while L is larger
than the time of a pass with its proposal, in units of passes of a single token: the tokens *needed*.
"""

from dataclasses import dataclass
from typing import Any

from bench.forward_passes import PassRecords, PassTimeCurve
from parse.registry import METHODS
from parse.types import SpeculationStats


@dataclass(frozen=True)
class DecodingStats:
    """The result of generation with a method, over all answers."""

    passes: int  # of single sequences
    proposed: tuple[int, ...]  # at each position
    accepted: tuple[int, ...]
    num_tokens: float  # of a sequence in a pass
    num_seqs: float  # in a pass
    pass_s: float
    num_proposal_requests: int  # for a proposal
    proposal_s: float  # one of them

    def to_json(self) -> dict[str, Any]:
        """Returns the fields under the keys of the published results."""
        return {
            "passes": self.passes,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "entries": self.num_tokens,
            "texts": self.num_seqs,
            "pass_s": self.pass_s,
            "wishes": self.num_proposal_requests,
            "proposal_s": self.proposal_s,
        }

    @property
    def tokens_per_pass(self) -> float:
        return 1 + sum(self.accepted) / self.passes

    @property
    def proposal_s_per_pass(self) -> float:
        """Seconds of proposals per pass of one sequence."""
        return self.num_proposal_requests * self.proposal_s / self.passes

    def step_s(self, method: str) -> float:
        """Seconds of a proposal, or of each token of it for sequential methods."""
        steps = sum(self.proposed) if METHODS[method].is_sequential else self.num_proposal_requests
        return self.num_proposal_requests * self.proposal_s / steps if steps else 0.0

    @property
    def acceptance_rates(self) -> list[float]:
        """Accepted over proposed tokens, by position."""
        return [accepted / proposed for accepted, proposed in zip(self.accepted, self.proposed, strict=True)]


def decoding_stats(speculation: SpeculationStats, records: PassRecords) -> DecodingStats:
    """Returns the statistics of a run. Passes that computed prompts are not recorded."""
    passes, num_seqs = len(records.passes), sum(p.num_seqs for p in records.passes)
    num_proposals = sum(count for count, _ in records.proposal_times)
    return DecodingStats(
        speculation.passes,
        speculation.proposed_per_position,
        speculation.accepted_per_position,
        sum(p.num_tokens for p in records.passes) / num_seqs,
        num_seqs / passes,
        sum(p.seconds for p in records.passes) / passes,
        num_proposals,
        sum(seconds for _, seconds in records.proposal_times) / num_proposals if num_proposals else 0.0,
    )


def break_even_tokens(stats: DecodingStats, curve: PassTimeCurve) -> float:
    """Returns the tokens per pass at which a single sequence is as fast as without the method."""
    return (curve.seconds_at(stats.num_tokens) + stats.proposal_s_per_pass) / curve.seconds_at(1)


def predict_speedup(
    stats: DecodingStats, curve: PassTimeCurve, plain_passes: int, answers: int, prompt_s: float
) -> float:
    """Returns the speed-up for a number of answers, whose first passes compute the prompts."""
    prefill_s = answers * prompt_s
    plain_s = prefill_s + (plain_passes - answers) * curve.seconds_at(1)
    return plain_s / (
        prefill_s + (stats.passes - answers) * (curve.seconds_at(stats.num_tokens) + stats.proposal_s_per_pass)
    )


def speedup_by_depth(stats: DecodingStats, curve: PassTimeCurve, method: str, step_s: float) -> list[float]:
    """Returns the speed-up of decoding with chains of 1, 2, ... tokens in passes of `curve.num_seqs` sequences.

    `stats` gives the acceptance rate at each position, measured with one sequence at a time. `step_s` is the time of a
    proposal, or of each token of it for sequential methods. The time of prompts is not counted.
    """
    if not stats.proposed:
        return []
    share = stats.proposed[0] / stats.num_proposal_requests  # some methods do not always have a proposal
    tokens, reach_probability, speedups = 1.0, share, []
    for depth, acceptance_rate in enumerate(stats.acceptance_rates, 1):
        reach_probability = min(
            reach_probability, share * acceptance_rate
        )  # nothing is accepted after a rejected token
        tokens += reach_probability
        steps = depth if METHODS[method].is_sequential else 1
        seconds = curve.seconds_at(1 + depth * share) + curve.num_seqs * step_s * steps
        speedups.append(tokens * curve.seconds_at(1) / seconds)
    return speedups
