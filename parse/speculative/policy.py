"""Speculation on one request's text: what is wished for, what comes of it, and whether it pays.

Proposals of g accepted tokens save a text g passes, and take their own time and that of more entries in a pass. They
pay while they take less than they save. Within a proposal one more token pays while its chance to be accepted exceeds
the share of a token's time that it takes: the floor below which a method need not propose. Both move with the device,
with the load, and with how much this text has kept of what it was promised, in all and at each place. Where it does not
pay, nothing is proposed for a while, then tried again.

Proposals are made for many texts at once, which takes hardly longer than for one of them. So whether that time pays is
judged for all of them together, and how far they reach is common to them where every token takes a step of its own.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from torch import Tensor

from parse.speculative.cost_model import COST_EMA_WEIGHT, StepCostModel
from parse.speculative.guard import GuardedProposer, GuardedState
from parse.speculative.proposal import UNLIMITED, MaskPrediction, Proposal, ProposalRequest
from parse.tree import MASK
from parse.types import MethodName, SpeculationStats

EMA_WEIGHT = 0.1  # share of the newest proposal in what is expected of the next
SHARED_EMA_WEIGHT = 0.02  # the same, of what is expected of the next text
EXPLORATION_INTERVAL = 8  # passes; in one of them proposals reach further than pays
MAX_TIMINGS = 15  # calls whose times are remembered
INITIAL_PAUSE, MAX_PAUSE = 4, 64  # passes without proposals before another trial
CALIBRATION_PRIOR = 2.0  # tokens' worth of doubt about what a text has kept of what it was promised
CALIBRATION_HORIZON = 10.0  # proposals
POSITION_PRIOR = 3  # proposals, as which counts at first that a place is as good as the one before it
MIN_TRIALS = 3  # before a text is judged by what came of its own
MIN_SHARED_TRIALS = 10  # before a method is judged by what came of all texts
NEGLIGIBLE_LOSS = 0.02  # of a text's share in a pass: so small a loss is not worth a pause
MARGINAL_TOKENS = 4.0  # entries, over which the price of one more is measured


@dataclass
class AcceptanceRecord:
    """What came of proposals, in running means."""

    mean_accepted: float = 0.0  # tokens accepted of one
    mean_cost_s: float = 0.0  # seconds that its entries added to a pass
    acceptance_rates: list[float] = field(
        default_factory=list
    )  # by place: of those that reached it, the token there accepted
    num_observed: list[int] = field(default_factory=list)  # by place: those that reached it

    def add(self, accepted: int, deepest: int, cost_s: float, weight: float, position_weight: float) -> None:
        """The newest counts by `weight`; at each place by `newest` in the end, and at first hope counts too."""
        self.mean_accepted += weight * (accepted - self.mean_accepted)
        self.mean_cost_s += weight * (cost_s - self.mean_cost_s)
        for position in range(deepest):
            if position == len(self.acceptance_rates):
                self.acceptance_rates.append(self.acceptance_rates[-1] if position else 1.0)
                self.num_observed.append(POSITION_PRIOR)
            self.num_observed[position] += 1
            self.acceptance_rates[position] += max(position_weight, 1 / self.num_observed[position]) * (
                (position < accepted) - self.acceptance_rates[position]
            )

    def copy(self) -> "AcceptanceRecord":
        return replace(self, acceptance_rates=list(self.acceptance_rates), num_observed=list(self.num_observed))


@dataclass
class Backoff:
    """Passes without proposals, more of them each time that trying was in vain.

    It ends at a multiple of its length: texts that could share the time of proposing try together, for alone none of
    them could tell whether it pays.
    """

    length: int = INITIAL_PAUSE
    end: int = 0

    def begin(self, now: int) -> None:
        self.end = (now // self.length + 1) * self.length
        self.length = min(2 * self.length, MAX_PAUSE)

    def update(self, pays: bool, now: int) -> None:
        if pays:
            self.length = INITIAL_PAUSE
        else:
            self.begin(now)


@dataclass
class SpeculativeMethod:
    """A method as one engine offers it, and what has come of it in all texts."""

    name: MethodName
    proposer: GuardedProposer
    max_tokens: int  # tokens proposed at once
    is_sequential: bool  # does every token of a chain take another step of the method?
    aux_hidden_state_layers: tuple[int, ...]  # all that the engine keeps
    cost_model: StepCostModel
    num_proposals: int = 0
    record: AcceptanceRecord = field(default_factory=AcceptanceRecord)
    num_steps: int = 0  # of texts that use it
    batch_size: int = 1  # texts, in the last call
    _mean_drafting_steps: float = 1.0  # of a call, lately
    _step_timings: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMINGS))  # of a step
    _backoff: Backoff = field(default_factory=Backoff)
    _net_gains: list[float] = field(default_factory=list)  # to those who asked, since the last verdict

    def start_sequence(self) -> "SequenceSpeculation":
        return SequenceSpeculation(self, self.proposer.new_state())

    def reset(self) -> None:
        """What came of proposals so far."""
        self.num_proposals, self.record = 0, AcceptanceRecord()
        self._step_timings.clear()
        self._net_gains.clear()
        self._backoff = Backoff()

    def propose(self, requests: Sequence[ProposalRequest[GuardedState]]) -> list[Proposal]:
        began = time.perf_counter()
        proposals = self.proposer.propose(requests)
        seconds = time.perf_counter() - began
        steps = max(self._drafting_steps(proposal, wish) for proposal, wish in zip(proposals, requests, strict=True))
        self._step_timings.append(seconds / steps)
        self._mean_drafting_steps += EMA_WEIGHT * (steps - self._mean_drafting_steps)
        self.batch_size = len(requests)
        return proposals

    def _drafting_steps(self, proposal: Proposal, request: ProposalRequest[GuardedState]) -> int:
        """That it took: the last one may have found nothing that is likely enough."""
        return (
            max(1, min(max(_depths(proposal), default=0) + 1, request.max_tokens, request.max_depth))
            if self.is_sequential
            else 1
        )

    def next_step(self, last: int) -> int:
        """The number of the pass that a text is about to make after its last one."""
        if last >= self.num_steps:
            self.num_steps = last + 1
            if len(self._net_gains) >= self.batch_size:  # all have told what came of it
                if self.num_proposals >= MIN_SHARED_TRIALS:
                    self._backoff.update(sum(self._net_gains) >= self.propose_s * len(self._net_gains), self.num_steps)
                self._net_gains.clear()
        return self.num_steps

    @property
    def is_paused(self) -> bool:
        return self.num_steps < self._backoff.end

    def record_net_gain(self, net_gain_s: float) -> None:
        """To one of those who asked."""
        self._net_gains.append(net_gain_s)

    @property
    def drafting_step_s(self) -> float:
        """One text's share of a step: the median, for the first call of a text reads its prompt."""
        return median(self._step_timings) / self.batch_size if self._step_timings else 0.0

    @property
    def propose_s(self) -> float:
        """The same of a call."""
        return self.drafting_step_s * self._mean_drafting_steps

    def select_layers(self, hidden_states: Tensor | None) -> Tensor | None:
        """Of [n, all taps * width] what this method reads."""
        if hidden_states is None or self.proposer.aux_hidden_state_layers == self.aux_hidden_state_layers:
            return hidden_states
        columns = [self.aux_hidden_state_layers.index(tap) for tap in self.proposer.aux_hidden_state_layers]
        return hidden_states.unflatten(-1, (len(self.aux_hidden_state_layers), -1))[:, columns].flatten(1)


@dataclass(frozen=True)
class ProposalCall:
    """What a program yields when it would like to have a proposal."""

    method: SpeculativeMethod
    request: ProposalRequest[GuardedState]


@dataclass
class SequenceSpeculation:
    """Of one request."""

    method: SpeculativeMethod
    state: GuardedState
    record: AcceptanceRecord = field(default_factory=AcceptanceRecord)
    _mean_proposed: float = 0.0  # entries beyond the first in a usual pass, with proposals or without
    _mean_accepted: float = 0.0  # and tokens
    _step: int = 0
    _backoff: Backoff = field(default_factory=Backoff)
    _num_trials: int = 0
    _requested: bool = False
    _only_masks: bool = False  # was the last proposal nothing but masks?
    _expected_accepted: float = (
        CALIBRATION_PRIOR  # tokens that should have been accepted by the method's own account, and those that were
    )
    _actually_accepted: float = CALIBRATION_PRIOR

    def __post_init__(self) -> None:
        costs = self.method.cost_model
        self._mean_proposed, self._mean_accepted = (
            costs.num_tokens / costs.num_seqs - 1,
            costs.num_output_tokens / costs.num_seqs - 1,
        )
        if self.method.num_proposals >= MIN_TRIALS:  # what other texts made of it is the best guess
            self.record = self.method.record.copy()
            if self._net_gain_s() < 0:
                self._backoff.begin(self.method.num_steps)

    @property
    def needs_hidden_states(self) -> bool:
        """Does the method read the model's features? Then it has nothing to say before the first pass."""
        return bool(self.method.proposer.aux_hidden_state_layers)

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        self.state.extend(tokens, self.method.select_layers(hidden_states), mask_prediction)

    def proposal_call(self, max_tokens: int) -> ProposalCall | None:
        """For at most that many tokens, if any."""
        self._requested = False
        self._step = self.method.next_step(self._step)
        limit = min(max_tokens, self.method.max_tokens)
        if self._step < self._backoff.end or self.method.is_paused or limit < 1:
            return None
        self._requested = True
        return ProposalCall(self.method, ProposalRequest(self.state, limit, self._min_probability(), self._max_depth()))

    def observe(self, proposal: Proposal, accepted: int) -> SpeculationStats:
        """The first `accepted` tokens along one path of the proposal were the text's next ones."""
        depths = _depths(proposal)
        proposed = [0] * max(depths, default=0)
        for depth in depths:
            if depth:
                proposed[depth - 1] += 1
        self._mean_proposed += COST_EMA_WEIGHT * (len(proposal.token_ids) - self._mean_proposed)
        self._mean_accepted += COST_EMA_WEIGHT * (accepted - self._mean_accepted)
        # Mere masks will show their worth in the next pass, unless they have nothing to show then either.
        only_masks = not proposed and len(proposal.token_ids) > 0
        if self._requested and proposal.ready and not (only_masks and not self._only_masks):
            self._learn(proposal, len(proposed), accepted)
        self._only_masks = only_masks
        accepted_per_position = tuple(int(place < accepted) for place in range(len(proposed)))
        return SpeculationStats(self.method.name, 1, tuple(proposed), accepted_per_position)

    def _learn(self, proposal: Proposal, deepest: int, accepted: int) -> None:
        self._num_trials += 1
        method = self.method
        cost_s = method.cost_model.added_seconds(len(proposal.token_ids), self._without_proposals()[0])
        method.num_proposals += 1
        for record, position_weight in ((self.record, EMA_WEIGHT), (method.record, SHARED_EMA_WEIGHT)):
            record.add(accepted, deepest, cost_s, max(position_weight, 1 / method.num_proposals), position_weight)
        if proposal.probabilities is not None:
            tokens = zip(proposal.token_ids, proposal.probabilities, strict=True)
            expected = sum(chance for token, chance in tokens if token != MASK)
            self._expected_accepted += expected - (self._expected_accepted - CALIBRATION_PRIOR) / CALIBRATION_HORIZON
            self._actually_accepted += accepted - (self._actually_accepted - CALIBRATION_PRIOR) / CALIBRATION_HORIZON
        net_gain_s = self._net_gain_s()
        method.record_net_gain(net_gain_s)
        self._backoff.update(self._num_trials < MIN_TRIALS or net_gain_s >= 0, self._step)

    def _without_proposals(self) -> tuple[float, float]:
        """Entries and tokens of a usual pass if nothing were proposed for this text."""
        costs = self.method.cost_model
        return max(1.0, costs.num_tokens - self._mean_proposed), max(1.0, costs.num_output_tokens - self._mean_accepted)

    @property
    def _token_s(self) -> float:
        """What a token of the batch takes, with proposals for this text."""
        (entries, tokens), method, record = self._without_proposals(), self.method, self.record
        if not (step_s := method.cost_model.step_seconds(entries)):  # nobody has looked at the clock yet
            return 0.0
        return (step_s + record.mean_cost_s + method.propose_s) / (tokens + record.mean_accepted)

    @property
    def _marginal_token_s(self) -> float:
        """What one more token in a proposal adds to a pass."""
        costs = self.method.cost_model
        return costs.added_seconds(MARGINAL_TOKENS, costs.num_tokens) / MARGINAL_TOKENS

    def _min_probability(self) -> float:
        if not (token_s := self._token_s):
            return 0.0
        calibration = min(1.5, max(0.05, self._actually_accepted / self._expected_accepted))
        alone = self.method.is_sequential and self.method.batch_size == 1  # among others it saves no step to stop
        return (self._marginal_token_s + self.method.drafting_step_s * alone) / token_s / calibration

    def _max_depth(self) -> int:
        """How far proposals may reach, by what came of the places so far; now and then half as far again."""
        method, token_s = self.method, self._token_s
        price = (self._marginal_token_s + method.drafting_step_s * method.is_sequential) / token_s if token_s else 0.0
        acceptance_rates = method.record.acceptance_rates
        if not method.is_sequential or method.batch_size == 1:  # a text's own are few: it is believed halfway
            acceptance_rates = [
                (own + common) / 2 for own, common in zip(self.record.acceptance_rates, acceptance_rates, strict=False)
            ]
        good = next((place for place, share in enumerate(acceptance_rates) if share < price), UNLIMITED)
        return max(1, good + (max(1, good // 2) if self._step % EXPLORATION_INTERVAL == 0 else 0))

    def _net_gain_s(self) -> float:
        """What a proposal saves, less what its entries take; nothing is said of the time of proposing."""
        (entries, tokens), cost_model, record = self._without_proposals(), self.method.cost_model, self.record
        step_s = cost_model.step_seconds(entries)
        if not step_s:
            return math.inf
        return (
            record.mean_accepted * step_s / tokens - record.mean_cost_s + NEGLIGIBLE_LOSS * step_s / cost_model.num_seqs
        )


def _depths(proposal: Proposal) -> list[int]:
    """Of each node, 1 behind the text; 0 for masks."""
    depths: list[int] = []
    for token, parent in zip(proposal.token_ids, proposal.parents, strict=True):
        depths.append(0 if token == MASK else depths[parent] + 1 if parent >= 0 else 1)
    return depths
