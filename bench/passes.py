"""What passes of a target take: bare ones by their size, and those that an engine makes while it writes."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import attention_for
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.engines.native.service import NativeEngine
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedState
from parse.speculative.proposal import Proposal, ProposalRequest
from parse.tree import MASK

Propose = Callable[[Sequence[ProposalRequest[GuardedState]]], list[Proposal]]

ENTRIES = 1, 2, 3, 5, 9, 13, 20, 32, 48  # of each text
CONTEXT = 200  # tokens behind which they stand: a question and half of its answer
TRIES = 3


@dataclass(frozen=True)
class Curve:
    """Seconds of a pass over so many texts, by the entries of each."""

    texts: int
    entries: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, entries: float) -> float:
        """Between two sizes a straight line."""
        return float(np.interp(entries, self.entries, self.seconds))

    @classmethod
    def median(cls, curves: Sequence["Curve"]) -> "Curve":
        seconds = zip(*(curve.seconds for curve in curves), strict=True)
        return cls(curves[0].texts, curves[0].entries, tuple(map(statistics.median, seconds)))


def bare(model: Model, texts: int, *, masked: bool = False) -> Curve:
    """Of the model alone, with nobody else in its process at work; `masked`: all entries but the first are masks."""
    return Curve(texts, ENTRIES, tuple(_pass_s(model, texts, entries, masked) for entries in ENTRIES))


def prompt_s(model: Model, tokens: int) -> float:
    """A pass over a text that is not known yet."""
    return _seconds(model, [_span(0, 0, [1] * tokens)])


def _pass_s(model: Model, texts: int, entries: int, masked: bool) -> float:
    nodes = [1, *[MASK if masked else 1] * (entries - 1)]
    return _seconds(model, [_span(page, CONTEXT, nodes) for page in range(texts)])


def _span(page: int, known: int, nodes: Sequence[int]) -> ScheduledChunk:
    context = SequenceState([1] * known)
    context.block_ids = [page]
    return ScheduledChunk(context, list(nodes), known, known + len(nodes))


def _seconds(model: Model, spans: Sequence[ScheduledChunk]) -> float:
    memory, attend = KVCache(len(spans), spans[0].end), attention_for(model.device)
    tokens = [token for span in spans for token in span.token_ids()]
    positions = [position for span in spans for position in span.positions()]
    seconds = []
    for _ in range(TRIES + 1):  # the first is not counted, for whatever is done once
        began = time.perf_counter()
        logits, _ = model.forward(tokens, positions, attend(memory, spans), None)
        logits.argmax(-1).tolist()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


@dataclass(frozen=True)
class Pass:
    """Of an engine, in which texts were written and nothing else was done."""

    texts: int
    entries: int
    seconds: float


@dataclass(frozen=True)
class Seen:
    """What an engine did for some answers: its passes, and the seconds that proposals took, for so many texts each."""

    passes: tuple[Pass, ...] = ()
    proposing: tuple[tuple[int, float], ...] = ()

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(self.passes + other.passes, self.proposing + other.proposing)


class Watch(StepCostModel):
    """Writes down what an engine tells its costs, on the way there, and what its methods take."""

    def __init__(self, service: NativeEngine) -> None:
        assert service.core.cost_model is not None, "an engine without methods counts no costs"
        super().__init__()
        self._told = service.core.cost_model
        self._passes: list[Pass] = []
        self._proposing: list[tuple[int, float]] = []
        service.core.cost_model = self
        for way in service._methods.values():
            way.propose = self._timed(way.propose)  # type: ignore[method-assign, assignment]

    def passed(self, texts: int, entries: int, tokens: int, seconds: float) -> None:
        self._told.record(texts, entries, tokens, seconds)
        self._passes.append(Pass(texts, entries, seconds))

    def taken(self) -> Seen:
        """All since the last time."""
        seen = Seen(tuple(self._passes), tuple(self._proposing))
        self._passes, self._proposing = [], []
        return seen

    def _timed(self, propose: Propose) -> Propose:
        def timed(wishes: Sequence[ProposalRequest[GuardedState]]) -> list[Proposal]:
            began = time.perf_counter()
            found = propose(wishes)
            self._proposing.append((len(wishes), time.perf_counter() - began))
            return found

        return timed
