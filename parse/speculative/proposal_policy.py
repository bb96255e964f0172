"""Decides when a method makes a proposal, and how many tokens it proposes.

A step of the target over a few tokens per sequence takes hardly longer than a step over one. If g proposed tokens are
accepted, the sequence saves g steps. The price is the time to make the proposal, and the time that its tokens add to
the step.

- A proposal pays if the time it saves exceeds its price. `SequenceSpeculation._net_gain_s` computes this without the
  time of proposing, which `SpeculativeMethod.next_step` takes into account.
- Within a proposal, one more token pays if its probability of being accepted, times the time that an accepted token
  saves, exceeds the price of that token. The price divided by that time is `ProposalRequest.min_probability`.
  Independently of the method's estimates, the acceptance rates observed at each position limit the depth
  (`ProposalRequest.max_depth`). For methods that do not estimate probabilities, this is the only limit.
- If proposals do not pay, none is made for a number of steps (`Backoff`). Then they are tried again.

This policy has no settings. The times come from the cost model and from a clock. The acceptance comes from earlier
proposals. The decisions therefore adapt to the device, to the load (a full batch makes additional tokens expensive),
and to each sequence. A method's own probabilities are corrected by how well they have predicted the acceptance of this
sequence so far (`Calibration`).

A method proposes for many sequences in one call, which takes little longer than a call for one sequence. Whether the
time of that call pays is therefore decided for all sequences together. If every token of a proposal takes another step
of the method, the depth is common to all sequences too.

A draft model can use proposed tokens without checking them (`SpeculativeMethod.min_confidence`). What is proposed then
decides what is drafted, which must not depend on timing: every proposal has the maximum number of tokens, and none of
this policy applies.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from parse.speculative.cost_model import COST_EMA_WEIGHT, StepCostModel
from parse.speculative.guard import GuardedProposer, GuardedState
from parse.speculative.proposal import UNLIMITED, MaskPrediction, Proposal, ProposalRequest
from parse.speculative.records import AcceptanceRecord, Backoff, Calibration
from parse.tree import MASK
from parse.types import SpeculationStats

EMA_WEIGHT = 0.1  # weight of the newest proposal in a sequence's record
SHARED_EMA_WEIGHT = 0.02  # weight of the newest proposal in the record of all sequences
EXPLORATION_INTERVAL = 8  # steps; in one of them, proposals are deeper than the depth that has paid so far
MAX_TIMINGS = 15  # calls of a method whose times are remembered
MIN_TRIALS = 3  # proposals for a sequence before its own record decides
MIN_SHARED_TRIALS = 10  # proposals for all sequences before the method's record decides
NEGLIGIBLE_LOSS = 0.02  # a loss of this share of a sequence's step time is not worth a pause
MARGINAL_TOKENS = 4.0  # the price of one more token is averaged over this many tokens


@dataclass
class SpeculativeMethod:
    """A token-level method in one engine.

    It holds everything that its sequences share: timings, acceptance record and pauses.
    """

    name: str
    proposer: GuardedProposer
    max_tokens: int  # in a proposal
    is_sequential: bool  # whether every token of a path takes another step of the method
    aux_hidden_state_layers: tuple[int, ...]  # the hidden states that the engine keeps, for all of its methods
    cost_model: StepCostModel
    min_confidence: float | None = None
    """Proposed tokens of at least this probability are not checked. None means that all of them are."""
    num_proposals: int = 0
    record: AcceptanceRecord = field(default_factory=AcceptanceRecord)
    num_steps: int = 0  # steps of the engine in which sequences of this method took part
    batch_size: int = 1  # sequences in the last call
    _mean_drafting_steps: float = 1.0  # steps of the method in one call
    _step_timings: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_TIMINGS))  # seconds of a step
    _backoff: Backoff = field(default_factory=Backoff)
    _net_gains: list[float] = field(default_factory=list)  # seconds that sequences gained since the last decision

    def start_sequence(self, *, check_all: bool = False) -> "SequenceSpeculation":
        """Returns the state of a new sequence. With `check_all`, no proposed token is used unchecked."""
        return SequenceSpeculation(self, self.proposer.new_state(), None if check_all else self.min_confidence)

    def reset(self) -> None:
        """Forgets the acceptance and the timings of all past proposals."""
        self.num_proposals, self.record = 0, AcceptanceRecord()
        self._step_timings.clear()
        self._net_gains.clear()
        self._backoff = Backoff()

    def propose(self, requests: Sequence[ProposalRequest[GuardedState]]) -> list[Proposal]:
        """Calls the proposer once for all requests and measures the time."""
        started = time.perf_counter()
        proposals = self.proposer.propose(requests)
        seconds = time.perf_counter() - started
        steps = max(
            self._drafting_steps(proposal, request) for proposal, request in zip(proposals, requests, strict=True)
        )
        self._step_timings.append(seconds / steps)
        self._mean_drafting_steps += EMA_WEIGHT * (steps - self._mean_drafting_steps)
        self.batch_size = len(requests)
        return proposals

    def _drafting_steps(self, proposal: Proposal, request: ProposalRequest[GuardedState]) -> int:
        """Returns the number of steps that the method took for this proposal.

        It is one more than the depth, because the last step may have found no token that is likely enough.
        """
        if not self.is_sequential:
            return 1
        depth = max(_node_depths(proposal), default=0)
        return max(1, min(depth + 1, request.max_tokens, request.max_depth))

    def next_step(self, last_step: int) -> int:
        """Returns the number of the step that a sequence makes after `last_step`.

        The first sequence that begins a new step also checks whether proposing pays for all sequences together. It does
        so only if all of them have reported their gains: it compares the sum with the time that proposing took.
        """
        if last_step >= self.num_steps:
            self.num_steps = last_step + 1
            if len(self._net_gains) >= self.batch_size:
                if self.num_proposals >= MIN_SHARED_TRIALS:
                    self._backoff.update(sum(self._net_gains) >= self.propose_s * len(self._net_gains), self.num_steps)
                self._net_gains.clear()
        return self.num_steps

    @property
    def is_paused(self) -> bool:
        return self.num_steps < self._backoff.end

    def record_net_gain(self, net_gain_s: float) -> None:
        """Adds the time that one sequence gained in its last step.

        The time of proposing is not subtracted.
        """
        self._net_gains.append(net_gain_s)

    @property
    def drafting_step_s(self) -> float:
        """Seconds of one step of the method, per sequence.

        The median is used because the first call for a sequence also prefills its prompt.
        """
        return median(self._step_timings) / self.batch_size if self._step_timings else 0.0

    @property
    def propose_s(self) -> float:
        """Seconds of one call of the method, per sequence."""
        return self.drafting_step_s * self._mean_drafting_steps

    def select_layers(self, hidden_states: Tensor | None) -> Tensor | None:
        """Returns the columns of [n, all layers * width] that this method reads.

        The columns are in the method's own order of layers.
        """
        if hidden_states is None or self.proposer.aux_hidden_state_layers == self.aux_hidden_state_layers:
            return hidden_states
        columns = [self.aux_hidden_state_layers.index(layer) for layer in self.proposer.aux_hidden_state_layers]
        return hidden_states.unflatten(-1, (len(self.aux_hidden_state_layers), -1))[:, columns].flatten(1)


@dataclass(frozen=True)
class ProposalCall:
    """A call of a method, which a request's program yields to get a proposal."""

    method: SpeculativeMethod
    request: ProposalRequest[GuardedState]


@dataclass
class SequenceSpeculation:
    """Speculation state of a single request."""

    method: SpeculativeMethod
    state: GuardedState
    min_confidence: float | None = None  # as in `SpeculativeMethod`
    record: AcceptanceRecord = field(default_factory=AcceptanceRecord)
    _calibration: Calibration = field(default_factory=Calibration)
    # The mean number of tokens proposed for this sequence per step, including steps without a proposal.
    _mean_proposed: float = 0.0
    _mean_accepted: float = 0.0  # mean number of these tokens that were accepted
    _step: int = 0
    _backoff: Backoff = field(default_factory=Backoff)
    _num_trials: int = 0
    _requested: bool = False  # whether a proposal was requested for the current step
    _only_masks: bool = False  # whether the last proposal consisted of masks only

    def __post_init__(self) -> None:
        cost_model = self.method.cost_model
        self._mean_proposed = cost_model.num_tokens / cost_model.num_seqs - 1
        self._mean_accepted = cost_model.num_output_tokens / cost_model.num_seqs - 1
        if self.method.num_proposals >= MIN_TRIALS:  # the record of other sequences is the best guess for a new one
            self.record = self.method.record.copy()
            if self._net_gain_s() < 0:
                self._backoff.begin(self.method.num_steps)

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the method reads hidden states.

        It then cannot propose before the first step of the target.
        """
        return bool(self.method.proposer.aux_hidden_state_layers)

    def extend(
        self, tokens: Sequence[int], hidden_states: Tensor | None, mask_prediction: MaskPrediction | None
    ) -> None:
        """Appends tokens to the sequence, as `ProposerState.extend` does.

        `hidden_states` contains the layers of all methods.
        """
        self.state.extend(tokens, self.method.select_layers(hidden_states), mask_prediction)

    def proposal_call(self, max_tokens: int) -> ProposalCall | None:
        """Returns the call for a proposal for the next step.

        The proposal has at most `max_tokens` tokens. Returns None if a proposal would not pay.
        """
        self._requested = False
        max_tokens = min(max_tokens, self.method.max_tokens)
        if self.min_confidence is not None:
            return ProposalCall(self.method, ProposalRequest(self.state, max_tokens)) if max_tokens > 0 else None
        self._step = self.method.next_step(self._step)
        if self._step < self._backoff.end or self.method.is_paused or max_tokens < 1:
            return None
        self._requested = True
        request = ProposalRequest(self.state, max_tokens, self._min_probability(), self._max_depth())
        return ProposalCall(self.method, request)

    def unchecked_tokens(self, proposal: Proposal) -> Sequence[int | None]:
        """Returns the proposed token that follows each node without a check, or None where the model chooses.

        The first node is the last token of the sequence. The others are those of the proposal, which must be a chain.
        """
        if self.min_confidence is None or proposal.probabilities is None:
            return ()
        if any(parent != node - 1 for node, parent in enumerate(proposal.parents)):
            raise ValueError("only the tokens of a chain can be used unchecked")
        paths = [1.0, *proposal.probabilities]
        return [
            token if path >= self.min_confidence * path_before else None
            for token, path_before, path in zip(proposal.token_ids, paths, paths[1:], strict=False)
        ]

    def observe(self, proposal: Proposal, accepted: int) -> SpeculationStats:
        """Records that the target accepted the first `accepted` tokens of a path."""
        proposed_per_position = _count_proposed_per_position(proposal)
        depth = len(proposed_per_position)
        self._mean_proposed += COST_EMA_WEIGHT * (len(proposal.token_ids) - self._mean_proposed)
        self._mean_accepted += COST_EMA_WEIGHT * (accepted - self._mean_accepted)
        # A proposal that consists of masks pays only in the next step, when their predictions can be proposed. It
        # counts as a failure if the proposal before it also consisted of masks.
        only_masks = not depth and len(proposal.token_ids) > 0
        if self._requested and proposal.ready and not (only_masks and not self._only_masks):
            self._record_trial(proposal, depth, accepted)
        self._only_masks = only_masks
        accepted_per_position = tuple(int(position < accepted) for position in range(depth))
        return SpeculationStats(self.method.name, 1, proposed_per_position, accepted_per_position)

    def _record_trial(self, proposal: Proposal, depth: int, accepted: int) -> None:
        """Updates the records and decides whether this sequence pauses."""
        self._num_trials += 1
        method = self.method
        base_tokens, _ = self._step_without_proposals()
        cost_s = method.cost_model.added_seconds(len(proposal.token_ids), base_tokens)
        method.num_proposals += 1
        for record, position_weight in ((self.record, EMA_WEIGHT), (method.record, SHARED_EMA_WEIGHT)):
            record.add(accepted, depth, cost_s, max(position_weight, 1 / method.num_proposals), position_weight)
        if proposal.probabilities is not None:
            nodes = zip(proposal.token_ids, proposal.probabilities, strict=True)
            self._calibration.add(sum(probability for token, probability in nodes if token != MASK), accepted)
        net_gain_s = self._net_gain_s()
        method.record_net_gain(net_gain_s)
        self._backoff.update(self._num_trials < MIN_TRIALS or net_gain_s >= 0, self._step)

    def _step_without_proposals(self) -> tuple[float, float]:
        """Returns how many tokens a typical step computes, and how many it outputs.

        Both numbers assume that nothing is proposed for this sequence.
        """
        cost_model = self.method.cost_model
        return (
            max(1.0, cost_model.num_tokens - self._mean_proposed),
            max(1.0, cost_model.num_output_tokens - self._mean_accepted),
        )

    @property
    def _seconds_per_output_token(self) -> float:
        """The time per output token of the batch, in seconds.

        It includes proposals for this sequence. It is 0 before anything has been timed.
        """
        base_tokens, base_output_tokens = self._step_without_proposals()
        step_s = self.method.cost_model.step_seconds(base_tokens)
        if not step_s:
            return 0.0
        step_s = step_s + self.record.mean_cost_s + self.method.propose_s
        return step_s / (base_output_tokens + self.record.mean_accepted)

    @property
    def _marginal_token_s(self) -> float:
        """The seconds that one more proposed token adds to a step."""
        cost_model = self.method.cost_model
        return cost_model.added_seconds(MARGINAL_TOKENS, cost_model.num_tokens) / MARGINAL_TOKENS

    def _min_probability(self) -> float:
        """Returns the minimum probability at which one more token pays.

        It is compared with the probabilities that the method estimates.
        """
        seconds_per_token = self._seconds_per_output_token
        if not seconds_per_token:
            return 0.0
        price_s = self._marginal_token_s
        if self.method.is_sequential and self.method.batch_size == 1:
            # If the sequence is alone, a token that is left out saves a step of the method as well.
            price_s += self.method.drafting_step_s
        return price_s / seconds_per_token / self._calibration.ratio

    def _max_depth(self) -> int:
        """Returns the depth up to which tokens pay.

        It follows from the observed acceptance rates. In some steps it is 50% larger, to explore greater depths.
        """
        method, seconds_per_token = self.method, self._seconds_per_output_token
        price_s = self._marginal_token_s + (method.drafting_step_s if method.is_sequential else 0.0)
        min_rate = price_s / seconds_per_token if seconds_per_token else 0.0
        acceptance_rates = method.record.acceptance_rates
        if not method.is_sequential or method.batch_size == 1:
            # A sequence has few observations of its own, so they count half.
            acceptance_rates = [
                (own + shared) / 2 for own, shared in zip(self.record.acceptance_rates, acceptance_rates, strict=False)
            ]
        depth = next((position for position, rate in enumerate(acceptance_rates) if rate < min_rate), UNLIMITED)
        if self._step % EXPLORATION_INTERVAL == 0:
            depth += max(1, depth // 2)
        return max(1, depth)

    def _net_gain_s(self) -> float:
        """Returns the seconds that a proposal saves, minus those its tokens add.

        The time of proposing is not subtracted.
        """
        cost_model, record = self.method.cost_model, self.record
        base_tokens, base_output_tokens = self._step_without_proposals()
        step_s = cost_model.step_seconds(base_tokens)
        if not step_s:
            return math.inf
        saved_s = record.mean_accepted * step_s / base_output_tokens
        return saved_s - record.mean_cost_s + NEGLIGIBLE_LOSS * step_s / cost_model.num_seqs


def _count_proposed_per_position(proposal: Proposal) -> tuple[int, ...]:
    """Returns the number of proposed tokens at each depth, without masks."""
    depths = _node_depths(proposal)
    counts = [0] * max(depths, default=0)
    for depth in depths:
        if depth:
            counts[depth - 1] += 1
    return tuple(counts)


def _node_depths(proposal: Proposal) -> list[int]:
    """Returns the depth of each node.

    It is 1 for a token that follows the sequence, and 0 for masks.
    """
    depths: list[int] = []
    for token, parent in zip(proposal.token_ids, proposal.parents, strict=True):
        depths.append(0 if token == MASK else depths[parent] + 1 if parent >= 0 else 1)
    return depths
