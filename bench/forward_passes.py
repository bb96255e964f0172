"""Measures forward passes: bare ones by their size, and those of an engine while it generates."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parse.engines.native.engine import NativeEngine
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import attention_for
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedState
from parse.speculative.proposal import Proposal, ProposalRequest
from parse.tree import MASK

Propose = Callable[[Sequence[ProposalRequest[GuardedState]]], list[Proposal]]

TOKEN_COUNTS = 1, 2, 3, 5, 9, 13, 20, 32, 48  # of each sequence
CONTEXT_TOKENS = 200  # a prompt and half of its answer
NUM_TRIALS = 3


@dataclass(frozen=True)
class PassTimeCurve:
    """Seconds of a pass over a number of sequences, by the number of tokens of each."""

    num_seqs: int
    num_tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields under the keys of the published results."""
        return {"texts": self.num_seqs, "entries": self.num_tokens, "seconds": self.seconds}

    def seconds_at(self, num_tokens: float) -> float:
        """Returns the seconds, by linear interpolation between the measured sizes."""
        return float(np.interp(num_tokens, self.num_tokens, self.seconds))

    @classmethod
    def median(cls, curves: Sequence["PassTimeCurve"]) -> "PassTimeCurve":
        seconds = zip(*(curve.seconds for curve in curves), strict=True)
        return cls(curves[0].num_seqs, curves[0].num_tokens, tuple(map(statistics.median, seconds)))


def measure_passes(model: Model, num_seqs: int, *, masked: bool = False) -> PassTimeCurve:
    """Measures passes of the model alone. With `masked`, all tokens but the first are masks."""
    return PassTimeCurve(
        num_seqs, TOKEN_COUNTS, tuple(_pass_s(model, num_seqs, num_tokens, masked) for num_tokens in TOKEN_COUNTS)
    )


def measure_prefill_s(model: Model, tokens: int) -> float:
    """Measures a pass over a prompt that is not cached."""
    return _measure_s(model, [_scheduled_chunk(0, 0, [1] * tokens)])


def _pass_s(model: Model, num_seqs: int, num_tokens: int, masked: bool) -> float:
    nodes = [1, *[MASK if masked else 1] * (num_tokens - 1)]
    return _measure_s(model, [_scheduled_chunk(block, CONTEXT_TOKENS, nodes) for block in range(num_seqs)])


def _scheduled_chunk(block: int, num_computed_tokens: int, nodes: Sequence[int]) -> ScheduledChunk:
    sequence = SequenceState([1] * num_computed_tokens)
    sequence.block_ids = [block]
    return ScheduledChunk(sequence, list(nodes), num_computed_tokens, num_computed_tokens + len(nodes))


def _measure_s(model: Model, chunks: Sequence[ScheduledChunk]) -> float:
    kv_cache, attend = KVCache(len(chunks), chunks[0].end), attention_for(model.device)
    tokens = [token for chunk in chunks for token in chunk.token_ids()]
    positions = [position for chunk in chunks for position in chunk.positions()]
    seconds = []
    for _ in range(NUM_TRIALS + 1):  # the first trial includes work that is done only once, and is not counted
        started = time.perf_counter()
        logits, _ = model.forward(tokens, positions, attend(kv_cache, chunks), None)
        logits.argmax(-1).tolist()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@dataclass(frozen=True)
class ForwardPass:
    """A pass of an engine that only generated tokens."""

    num_seqs: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class PassRecords:
    """The passes of an engine, and for each proposal step the number of sequences and its seconds."""

    passes: tuple[ForwardPass, ...] = ()
    proposal_times: tuple[tuple[int, float], ...] = ()

    def __add__(self, other: "PassRecords") -> "PassRecords":
        return PassRecords(self.passes + other.passes, self.proposal_times + other.proposal_times)


class RecordingCostModel(StepCostModel):
    """Records the passes that an engine reports to its cost model, and the time of its methods."""

    def __init__(self, engine: NativeEngine) -> None:
        assert engine.core.cost_model is not None, "an engine without methods counts no costs"
        super().__init__()
        self._engine_costs = engine.core.cost_model
        self._passes: list[ForwardPass] = []
        self._proposal_times: list[tuple[int, float]] = []
        engine.core.cost_model = self
        for method in engine._methods.values():
            method.propose = self._timed(method.propose)  # type: ignore[method-assign, assignment]

    def record(self, num_seqs: int, num_tokens: int, num_output_tokens: int, seconds: float) -> None:
        self._engine_costs.record(num_seqs, num_tokens, num_output_tokens, seconds)
        self._passes.append(ForwardPass(num_seqs, num_tokens, seconds))

    def pop_records(self) -> PassRecords:
        """Returns all records since the last call."""
        records = PassRecords(tuple(self._passes), tuple(self._proposal_times))
        self._passes, self._proposal_times = [], []
        return records

    def _timed(self, propose: Propose) -> Propose:
        def timed(requests: Sequence[ProposalRequest[GuardedState]]) -> list[Proposal]:
            started = time.perf_counter()
            proposals = propose(requests)
            self._proposal_times.append((len(requests), time.perf_counter() - started))
            return proposals

        return timed
