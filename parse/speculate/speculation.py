"""Speculation on one request's text: what is wished for, what comes of it, and whether it pays.

Proposals of g accepted tokens save a text g passes, and take their own time and that of more entries in a pass. They
pay while they take less than they save. Within a proposal one more token pays while its chance to be accepted exceeds
the share of a token's time that it takes: the floor below which a method need not propose. Both move with the device,
with the load, and with how much this text has kept of what it was promised, in all and at each place. Where it does not
pay, nothing is proposed for a while, then tried again.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from torch import Tensor

from parse.speculate.costs import FRESH, Costs
from parse.speculate.guard import Guard, Guarded
from parse.speculate.proposal import ENDLESS, Foreseen, Proposal, Wish
from parse.tree import MASK
from parse.types import Method, Speculated

RECENT = 0.2  # share of the newest proposal in what is expected of the next
AMONG_TEXTS = 0.02  # the same, of what is expected of the next text
EXPLORING = 8  # proposals; one of them reaches further than pays
LATEST = 15  # times of proposals that are remembered
FIRST_PAUSE, LONGEST_PAUSE = 4, 64  # passes without proposals before another trial
UNSURE = 2.0  # tokens' worth of doubt about what a text has kept of what it was promised
MEMORY = 10.0  # proposals
TRIALS = 3  # before a text is judged by what came of its own
NEGLIGIBLE = 0.02  # of a pass: so small a loss is not worth a pause
AHEAD = 4.0  # entries, over which the price of one more is measured


@dataclass
class Record:
    """What came of proposals, in running means."""

    gain: float = 0.0  # tokens accepted of one
    spent: float = 0.0  # seconds that its entries added to a pass
    shares: list[float] = field(default_factory=list)  # by place: of those that reached it, the token there accepted

    def add(self, accepted: int, deepest: int, spent: float, weight: float) -> None:
        self.gain += weight * (accepted - self.gain)
        self.spent += weight * (spent - self.spent)
        for place in range(deepest):
            if place == len(self.shares):
                self.shares.append(self.shares[-1] if place else 1.0)
            self.shares[place] += weight * ((place < accepted) - self.shares[place])


@dataclass
class Way:
    """A method as one engine offers it, and what has come of it in all texts."""

    method: Method
    foresight: Guard
    most: int  # tokens proposed at once
    steps: bool  # does every token of a chain take another step of the method?
    taps: tuple[int, ...]  # all that the engine keeps
    costs: Costs
    proposals: int = 0
    record: Record = field(default_factory=Record)
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))

    def begin(self) -> "Speculation":
        return Speculation(self, self.foresight.proposer())

    def forget(self) -> None:
        self.proposals, self.record = 0, Record()
        self._times.clear()

    def propose(self, wishes: Sequence[Wish[Guarded]]) -> list[Proposal]:
        began = time.perf_counter()
        found = self.foresight.propose(wishes)
        self._times.append((time.perf_counter() - began) / len(wishes))
        return found

    @property
    def propose_s(self) -> float:
        """What a proposal takes: the median, for the first of a text reads its prompt."""
        return median(self._times) if self._times else 0.0

    def own(self, features: Tensor | None) -> Tensor | None:
        """Of [n, all taps * width] what this method reads."""
        if features is None or self.foresight.taps == self.taps:
            return features
        columns = [self.taps.index(tap) for tap in self.foresight.taps]
        return features.unflatten(-1, (len(self.taps), -1))[:, columns].flatten(1)


@dataclass(frozen=True)
class Wished:
    """What a program yields when it would like to have a proposal."""

    way: Way
    wish: Wish[Guarded]


@dataclass
class Speculation:
    """Of one request."""

    way: Way
    proposer: Guarded
    record: Record = field(default_factory=Record)
    _added: float = 0.0  # entries beyond the first in a usual pass, with proposals or without
    _taken: float = 0.0  # and tokens
    _pause: int = 0  # passes to come without proposals
    _next_pause: int = FIRST_PAUSE
    _trials: int = 0
    _asked: bool = False
    _promised: float = UNSURE  # tokens that should have been accepted by the method's own account, and those that were
    _kept: float = UNSURE

    def __post_init__(self) -> None:
        costs = self.way.costs
        self._added, self._taken = costs.entries / costs.texts - 1, costs.tokens / costs.texts - 1
        if self.way.proposals >= TRIALS:  # what other texts made of it is the best guess
            known = self.way.record
            self.record = replace(known, shares=list(known.shares))
            if not self._pays():
                self._pause = self._next_pause

    @property
    def featured(self) -> bool:
        """Does the method read the model's features? Then it has nothing to say before the first pass."""
        return bool(self.way.foresight.taps)

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None) -> None:
        self.proposer.take(tokens, self.way.own(features), foreseen)

    def wish(self, room: int) -> Wished | None:
        """For at most that many tokens, if any."""
        self._asked = False
        if self._pause > 0:
            self._pause -= 1
            return None
        most = min(room, self.way.most)
        if most < 1:
            return None
        self._asked = True
        floor, trust = self._floor(), min(1.5, max(0.05, self._kept / self._promised))
        return Wished(self.way, Wish(self.proposer, most, floor / trust, self._deepest(floor)))

    def came(self, proposal: Proposal, accepted: int) -> Speculated:
        """The first `accepted` tokens along one path of the proposal were the text's next ones."""
        places = _depths(proposal)
        proposed = [0] * max(places, default=0)
        for place in places:
            if place:
                proposed[place - 1] += 1
        self._added += FRESH * (len(proposal.tokens) - self._added)
        self._taken += FRESH * (accepted - self._taken)
        if self._asked and (proposed or not proposal.tokens):  # mere masks will show their worth in the next pass
            self._learn(proposal, len(proposed), accepted)
        came = tuple(int(place < accepted) for place in range(len(proposed)))
        return Speculated(self.way.method, 1, tuple(proposed), came)

    def _learn(self, proposal: Proposal, deepest: int, accepted: int) -> None:
        self._trials += 1
        way = self.way
        spent = way.costs.more_s(len(proposal.tokens), self._beside()[0])
        way.proposals += 1
        for record, newest in ((self.record, RECENT), (way.record, AMONG_TEXTS)):
            record.add(accepted, deepest, spent, max(newest, 1 / way.proposals))
        if proposal.likely is not None:
            tokens = zip(proposal.tokens, proposal.likely, strict=True)
            promised = sum(chance for token, chance in tokens if token != MASK)
            self._promised += promised - (self._promised - UNSURE) / MEMORY
            self._kept += accepted - (self._kept - UNSURE) / MEMORY
        if self._trials < TRIALS or self._pays():
            self._next_pause = FIRST_PAUSE
        else:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)

    def _beside(self) -> tuple[float, float]:
        """Entries and tokens of a usual pass if nothing were proposed for this text."""
        costs = self.way.costs
        return max(1.0, costs.entries - self._added), max(1.0, costs.tokens - self._taken)

    def _floor(self) -> float:
        entries, tokens = self._beside()
        costs = self.way.costs
        token_s = (costs.pass_s(entries) + self.record.spent + self.way.propose_s) / (tokens + self.record.gain)
        if not token_s:
            return 0.0
        return self._price_s() / token_s

    def _price_s(self) -> float:
        """Of one more token in a proposal."""
        costs = self.way.costs
        entry_s = costs.more_s(AHEAD, costs.entries) / AHEAD
        return entry_s + (self.way.propose_s / max(1, len(self.record.shares)) if self.way.steps else 0.0)

    def _deepest(self, floor: float) -> int:
        """How far proposals may reach, by what came of the places so far; now and then a place further."""
        good = next((place for place, share in enumerate(self.record.shares) if share < floor), ENDLESS)
        return min(ENDLESS, max(1, good + (self._trials % EXPLORING == 0)))

    def _pays(self) -> bool:
        entries, tokens = self._beside()
        whole_s = self.way.costs.pass_s(entries)
        if not whole_s:  # nobody has looked at the clock yet
            return True
        return self.record.gain * whole_s / tokens + NEGLIGIBLE * whole_s >= self.record.spent + self.way.propose_s


def _depths(proposal: Proposal) -> list[int]:
    """Of each node, 1 behind the text; 0 for masks."""
    depths: list[int] = []
    for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
        depths.append(0 if token == MASK else depths[parent] + 1 if parent >= 0 else 1)
    return depths
