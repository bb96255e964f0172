"""The policy on made-up sequences, methods and machines, whose acceptance probabilities and times are known exactly.

Its decisions are compared with every fixed depth, zero included, on the same sequences and the same machine.
"""

import itertools
import random
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import pytest

from parse.speculative import proposal_policy
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import NO_PROPOSAL, NOT_READY, Proposal, Proposer, chain_proposal
from parse.speculative.proposal_policy import MIN_TRIALS, SpeculativeMethod
from parse.speculative.records import MAX_PAUSE
from parse.tree import MASK

MS = 1e-3
MAX_TOKENS = 8
UNBOUNDED = 10**6
MEASURED_SIZES = 1, 2, 4, 8, 16, 32, 64  # tokens


def cpu(num_tokens):
    return (4.5 + (num_tokens - 1) * 1.1 / 15 if num_tokens < 16 else 5.6 + (num_tokens - 16) * 2.8 / 48) * MS


def flat(num_tokens):
    return 10 * MS


def proportional(num_tokens):
    return num_tokens * 0.4 * MS


class Clock:
    """Replaces the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(proposal_policy, "time", clock)
    return clock


class FakeSequence:
    """Each next token is accepted, if those before it are, with a probability that `draw(rng)` returns."""

    def __init__(self, draw, seed):
        self.draw, self.rng = draw, random.Random(seed)
        self.advance()

    def advance(self):
        self.probabilities = [self.draw(self.rng) for _ in range(MAX_TOKENS)]
        self.is_accepted = [self.rng.random() < probability for probability in self.probabilities]

    def num_acceptable(self):
        """The number of tokens that the target would accept."""
        return sum(1 for _ in itertools.takewhile(bool, self.is_accepted))

    def extend(self, tokens, hidden_states, mask_prediction):
        pass


@dataclass
class FakeProposer(Proposer):
    """Takes `call_s`, and `step_s` for each step. Knows the probabilities, and reports them truly, distorted or not."""

    clock: Clock
    call_s: float = 0.0
    step_s: float = 0.0
    report: Any = staticmethod(lambda probability: probability)
    blind: bool = False
    sequences: list = field(default_factory=list)

    def new_state(self):
        return self.sequences.pop(0)

    def propose(self, requests):
        proposals, steps = [], 1
        for request in requests:
            reported: list[float] = []
            for probability in request.state.probabilities[: min(request.max_tokens, request.max_depth)]:
                steps = max(steps, len(reported) + 1)
                path_probability = self.report(probability) * (reported[-1] if reported else 1.0)
                if path_probability < request.min_probability and not self.blind:
                    break
                reported.append(path_probability)
            proposals.append(chain_proposal(list(range(len(reported))), None if self.blind else reported))
        self.clock.now += self.call_s + self.step_s * steps
        return proposals


@dataclass
class Outcome:
    """The outcome of a number of steps."""

    tokens: int = 0
    seconds: float = 0.0
    proposed: list[list[int]] = field(default_factory=list)  # per step and sequence; -1: nothing was requested
    min_probabilities: list[float] = field(default_factory=list)

    @property
    def rate(self):
        return self.tokens / self.seconds

    @property
    def depth(self):
        return mean(max(0, size) for sizes in self.proposed for size in sizes)


@dataclass
class Generation:
    sequence: FakeSequence
    speculation: proposal_policy.SequenceSpeculation
    call: proposal_policy.ProposalCall | None


class Batch:
    """Sequences generated side by side in the order of an engine: each one observes the outcome of its proposal and
    requests the next one, while those after it have not observed theirs yet."""

    def __init__(self, machine, proposer, cost_model=None):
        self.machine, self.proposer, self.cost_model = machine, proposer, cost_model or StepCostModel()
        self.cost_model.initialize((size, machine(size)) for size in MEASURED_SIZES)
        guarded = GuardedProposer(proposer, MAX_TOKENS)
        self.method = SpeculativeMethod("eagle3", guarded, MAX_TOKENS, proposer.step_s > 0, (), self.cost_model)
        self.running: list[Generation] = []

    def begin(self, *sequences):
        for sequence in sequences:
            self.proposer.sequences.append(sequence)
            speculation = self.method.start_sequence()
            self.running.append(Generation(sequence, speculation, speculation.proposal_call(UNBOUNDED)))

    def end(self):
        self.running = []

    def set_draw(self, draw):
        for generation in self.running:
            generation.sequence.draw = draw

    def generate(self, num_steps):
        outcome, clock = Outcome(), self.proposer.clock
        started = clock.now
        for _ in range(num_steps):
            requests = [generation.call.request for generation in self.running if generation.call]
            outcome.min_probabilities += [request.min_probability for request in requests]
            requested = iter(self.method.propose(requests) if requests else ())
            proposals = [next(requested) if generation.call else NO_PROPOSAL for generation in self.running]
            outcome.proposed.append(
                [
                    len(proposal.token_ids) if generation.call else -1
                    for proposal, generation in zip(proposals, self.running, strict=True)
                ]
            )
            num_tokens = sum(1 + len(proposal.token_ids) for proposal in proposals)
            num_output_tokens = 0
            for generation, proposal in zip(self.running, proposals, strict=True):
                accepted = min(generation.sequence.num_acceptable(), len(proposal.token_ids))
                generation.speculation.observe(proposal, accepted)
                num_output_tokens += 1 + accepted
                generation.sequence.advance()
                generation.call = generation.speculation.proposal_call(UNBOUNDED)
            clock.now += self.machine(num_tokens)
            self.cost_model.record(len(self.running), num_tokens, num_output_tokens, self.machine(num_tokens))
            outcome.tokens += num_output_tokens
        outcome.seconds = clock.now - started
        return outcome


def always(probability):
    return lambda rng: probability


def swinging(rng):
    """Most tokens are nearly certain, some are not predictable at all."""
    return rng.random() ** 0.3


def alternating(rng):
    return rng.choice((0.99, 0.2))


def best_fixed_rate(machine, proposer, draws, num_steps=4000):
    """Tokens per second at the best depth, the same for all sequences in all steps."""
    num_seqs = len(draws)
    acceptable = []
    for seed, draw in enumerate(draws):
        sequence = FakeSequence(draw, 1000 + seed)
        for _ in range(num_steps // num_seqs):
            acceptable.append(sequence.num_acceptable())
            sequence.advance()

    def rate(depth):
        tokens = num_seqs * (1 + mean(min(count, depth) for count in acceptable))
        propose_s = proposer.call_s + depth * proposer.step_s if depth else 0.0
        return tokens / (machine(num_seqs * (1 + depth)) + propose_s)

    return max(rate(depth) for depth in range(MAX_TOKENS + 1))


PREDICTABILITY = {
    "certain": always(0.95),
    "likely": always(0.8),
    "even": always(0.55),
    "hopeless": always(0.03),
    "swinging": swinging,
    "alternating": alternating,
}
DRAFTING_TIMES = {  # seconds of a call, and of a step
    "at once": (1 * MS, 0.0),
    "by steps": (0.1 * MS, 0.3 * MS),
    "by slow steps": (0.0, 1 * MS),
}


@pytest.mark.parametrize("num_seqs", [1, 8, 24])
@pytest.mark.parametrize("machine", [cpu, flat, proportional])
def test_in_the_long_run_it_is_nearly_as_fast_as_at_the_best_depth(machine, num_seqs, clock):
    shares = []
    cases = itertools.product(DRAFTING_TIMES.values(), PREDICTABILITY.values(), (False, True))
    for (call_s, step_s), draw, blind in cases:
        proposer = FakeProposer(clock, call_s, step_s, blind=blind)
        batch = Batch(machine, proposer)
        batch.begin(*(FakeSequence(draw, seed) for seed in range(num_seqs)))
        batch.generate(100)
        best_rate = best_fixed_rate(machine, proposer, [draw] * num_seqs)
        shares.append(batch.generate(100 + 800 // num_seqs).rate / best_rate)
    assert mean(shares) > 0.95 and min(shares) > 0.8, sorted(shares)


def test_sequences_that_can_share_the_time_of_proposing_find_that_it_pays(clock):
    """None of the eight could afford it alone: a step of the method takes longer than a token is worth."""
    proposer = FakeProposer(clock, step_s=1.25 * MS)
    batch = Batch(flat, proposer)
    batch.begin(*(FakeSequence(always(0.9), seed) for seed in range(8)))
    assert batch.generate(300).depth > 4
    batch = Batch(flat, proposer)
    batch.begin(*(FakeSequence(always(0.02), seed) for seed in range(8)))
    batch.generate(200)
    assert batch.generate(300).depth < 0.2
    batch.set_draw(always(0.9))  # they notice the change
    batch.generate(300)
    assert batch.generate(200).depth > 4


def test_if_more_tokens_take_no_time_everything_is_proposed(clock):
    for blind in (False, True):
        batch = Batch(flat, FakeProposer(clock, blind=blind))
        batch.begin(*(FakeSequence(always(0.3), seed) for seed in range(4)))
        assert batch.generate(100).depth == MAX_TOKENS


def test_if_tokens_take_most_of_a_step_only_likely_ones_are_proposed(clock):
    def depth(draw):
        batch = Batch(lambda num_tokens: (2 + 0.4 * num_tokens) * MS, FakeProposer(clock))
        batch.begin(*(FakeSequence(draw, seed) for seed in range(8)))
        batch.generate(100)
        return batch.generate(100).depth

    assert depth(always(0.3)) < 0.2
    assert depth(always(0.97)) > 2


@pytest.mark.parametrize("times", DRAFTING_TIMES)
def test_a_sequence_without_success_pauses_and_is_tried_at_growing_intervals(times, clock):
    batch = Batch(cpu, FakeProposer(clock, *DRAFTING_TIMES[times]))
    batch.begin(FakeSequence(always(0.0), 1))
    trials = [step for step, (size,) in enumerate(batch.generate(1000).proposed) if size >= 0]
    pauses = [after - before for before, after in itertools.pairwise(trials)][MIN_TRIALS:]
    assert trials[: MIN_TRIALS - 1] == list(range(MIN_TRIALS - 1))
    assert pauses == sorted(pauses) and max(pauses) == MAX_PAUSE
    assert len(trials) < 30


@pytest.mark.parametrize("num_seqs", [1, 6])
@pytest.mark.parametrize("times", DRAFTING_TIMES)
def test_proposals_resume_when_a_sequence_becomes_predictable_and_stop_when_it_ceases_to_be(times, num_seqs, clock):
    batch = Batch(cpu, FakeProposer(clock, *DRAFTING_TIMES[times]))
    batch.begin(*(FakeSequence(always(0.02), seed) for seed in range(num_seqs)))
    batch.generate(500)
    before = batch.generate(2 * MAX_PAUSE)
    for predictable, probability in ((True, 0.97), (False, 0.02)):
        batch.set_draw(always(probability))
        batch.generate(6 * MAX_PAUSE)
        after = batch.generate(2 * MAX_PAUSE)
        if predictable:
            assert after.depth > 3 and after.rate > 2 * before.rate
        else:
            assert after.depth < 0.5 and after.rate == pytest.approx(before.rate, rel=0.1)


def test_unpredictable_sequences_do_not_keep_a_predictable_one_from_its_proposals(clock):
    batch = Batch(cpu, FakeProposer(clock, call_s=0.5 * MS))
    batch.begin(FakeSequence(always(0.97), 0), *(FakeSequence(always(0.02), seed) for seed in range(1, 4)))
    batch.generate(200)
    depths = [mean(max(0, size) for size in sizes) for sizes in zip(*batch.generate(200).proposed, strict=True)]
    assert depths[0] > 6 and max(depths[1:]) < 1


def test_a_new_sequence_starts_from_the_record_of_the_others(clock):
    for draw, predictable in ((always(0.02), False), (always(0.95), True)):
        batch = Batch(cpu, FakeProposer(clock, call_s=1 * MS))
        batch.begin(FakeSequence(draw, 0))
        batch.generate(150)
        batch.end()
        num_tried = 0
        for seed in range(1, 31):
            batch.begin(FakeSequence(draw, seed))
            num_tried += batch.generate(3).proposed[0] != [-1]
            batch.end()
        assert num_tried > 28 if predictable else num_tried < 10


def test_after_a_reset_a_sequence_is_tried_as_the_first_one_was(clock):
    batch = Batch(cpu, FakeProposer(clock, call_s=1 * MS, blind=True))
    batch.begin(FakeSequence(always(0.0), 0))
    batch.generate(200)
    batch.end()
    batch.method.reset()
    batch.begin(FakeSequence(always(0.0), 1))
    proposed = batch.generate(MIN_TRIALS - 1).proposed
    assert proposed[0] == [MAX_TOKENS] and [-1] not in proposed


def test_the_minimum_probability_is_the_price_of_a_token_over_the_time_it_saves(clock):
    """It is higher if more tokens add more time, and if many tokens are accepted, so that each takes less time."""
    min_probability = {}
    for machine, probability in itertools.product((flat, cpu, proportional), (0.5, 0.8, 0.95)):
        batch = Batch(machine, FakeProposer(clock, call_s=0.1 * MS))
        batch.begin(FakeSequence(always(probability), 7))
        batch.generate(100)
        outcome = batch.generate(400)
        num_tokens = 1 + outcome.depth
        price_s = (machine(num_tokens + 4) - machine(num_tokens)) / 4
        min_probability[machine, probability] = mean(outcome.min_probabilities)
        assert mean(outcome.min_probabilities) == pytest.approx(price_s * outcome.rate, rel=0.35, abs=0.01)
    assert min_probability[flat, 0.8] == 0 < min_probability[cpu, 0.8] < 0.2 < min_probability[proportional, 0.8]
    assert min_probability[cpu, 0.5] < min_probability[cpu, 0.8] < min_probability[cpu, 0.95]


def test_reported_probabilities_are_corrected_by_how_well_they_predicted(clock):
    """On a machine where the minimum matters, three methods propose for the same sequences. One reports truly."""
    outcomes = {}
    for name, report in (
        ("true", lambda probability: probability),
        ("too high", lambda probability: probability**0.2),
        ("too low", lambda probability: probability**2),
    ):
        proposer = FakeProposer(clock, report=report)
        batch = Batch(cpu, proposer)
        batch.begin(*(FakeSequence(swinging, seed) for seed in range(8)))
        batch.generate(100)
        outcomes[name] = batch.generate(300)
    min_probability = {name: mean(outcome.min_probabilities) for name, outcome in outcomes.items()}
    assert min_probability["too low"] < min_probability["true"] < 0.8 * min_probability["too high"]
    assert min(outcome.rate for outcome in outcomes.values()) > 0.93 * outcomes["true"].rate


def test_the_depth_of_proposals_without_probabilities_follows_the_acceptance_at_their_positions(clock):
    """Proposals reach the last position whose tokens pay, and now and then one further."""
    for probability in (0.3, 0.6, 0.8, 0.99):
        proposer = FakeProposer(clock, blind=True)
        batch = Batch(cpu, proposer)
        batch.begin(*(FakeSequence(always(probability), seed) for seed in range(16)))
        batch.generate(150)
        outcome = batch.generate(100)
        price = (cpu(64) - cpu(16)) / 48 * outcome.rate
        positions = range(MAX_TOKENS)
        expected = next((position for position in positions if probability ** (position + 1) < price), MAX_TOKENS)
        assert outcome.depth == pytest.approx(expected, abs=1.2)


class ConstantProposer(FakeProposer):
    proposal = NO_PROPOSAL

    def propose(self, requests):
        self.clock.now += self.call_s
        return [self.proposal] * len(requests)


def test_empty_proposals_count_by_the_time_they_take(clock):
    for call_s, share in ((0.001 * MS, 1.0), (2 * MS, 0.05)):
        batch = Batch(cpu, ConstantProposer(clock, call_s))
        batch.begin(FakeSequence(always(0.5), 0))
        batch.generate(300)
        requested_share = mean(size >= 0 for (size,) in batch.generate(640).proposed)
        assert requested_share == pytest.approx(share, abs=0.05)


def test_a_sequence_that_is_still_prefilled_does_not_pause(clock):
    proposer = ConstantProposer(clock, 2 * MS)
    proposer.proposal = NOT_READY
    batch = Batch(cpu, proposer)
    batch.begin(FakeSequence(always(0.5), 0))
    assert batch.generate(50).proposed == [[0]] * 50


class MaskProposer(FakeProposer):
    """Proposes masks and, in the next step, the tokens that were predicted there."""

    def propose(self, requests):
        self.clock.now += self.call_s
        proposals = []
        for request in requests:
            request.state.has_masks = not getattr(request.state, "has_masks", False)
            masks = Proposal([MASK] * 3, (-1, 0, 1), (1.0,) * 3)
            proposals.append(masks if request.state.has_masks else chain_proposal([1, 2, 3], (0.9, 0.9, 0.9)))
        return proposals


def test_proposals_of_masks_only_count_by_the_acceptance_of_their_predictions(clock):
    for probability, continues in ((0.95, True), (0.0, False)):
        batch = Batch(cpu, MaskProposer(clock, 0.1 * MS))
        batch.begin(FakeSequence(always(probability), 0))
        batch.generate(100)
        requested_share = mean(size >= 0 for (size,) in batch.generate(320).proposed)
        assert requested_share == 1 if continues else requested_share < 0.2


def test_no_proposal_is_requested_for_zero_tokens(clock):
    batch = Batch(flat, FakeProposer(clock))
    batch.proposer.sequences.append(FakeSequence(always(0.9), 0))
    speculation = batch.method.start_sequence()
    assert speculation.proposal_call(0) is None
    call = speculation.proposal_call(3)
    assert call is not None and call.request.max_tokens == 3


def test_before_anything_was_timed_everything_is_requested(clock):
    proposer = FakeProposer(clock, sequences=[FakeSequence(always(0.0), 0)])
    guarded = GuardedProposer(proposer, MAX_TOKENS)
    method = SpeculativeMethod("ngram", guarded, MAX_TOKENS, False, (), StepCostModel())
    speculation = method.start_sequence()
    for _ in range(20):
        call = speculation.proposal_call(UNBOUNDED)
        assert call is not None and (call.request.max_tokens, call.request.min_probability) == (MAX_TOKENS, 0)
        speculation.observe(method.propose([call.request])[0], 0)
