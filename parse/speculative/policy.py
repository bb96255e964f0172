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

from parse.speculative.cost_model import FRESH, Costs
from parse.speculative.guard import Guard, Guarded
from parse.speculative.proposal import ENDLESS, Foreseen, Proposal, Wish
from parse.tree import MASK
from parse.types import Method, Speculated

RECENT = 0.1  # share of the newest proposal in what is expected of the next
AMONG_TEXTS = 0.02  # the same, of what is expected of the next text
EXPLORING = 8  # passes; in one of them proposals reach further than pays
LATEST = 15  # calls whose times are remembered
FIRST_PAUSE, LONGEST_PAUSE = 4, 64  # passes without proposals before another trial
UNSURE = 2.0  # tokens' worth of doubt about what a text has kept of what it was promised
MEMORY = 10.0  # proposals
HOPE = 3  # proposals, as which counts at first that a place is as good as the one before it
TRIALS = 3  # before a text is judged by what came of its own
COMMON_TRIALS = 10  # before a method is judged by what came of all texts
NEGLIGIBLE = 0.02  # of a text's share in a pass: so small a loss is not worth a pause
AHEAD = 4.0  # entries, over which the price of one more is measured


@dataclass
class Record:
    """What came of proposals, in running means."""

    gain: float = 0.0  # tokens accepted of one
    spent: float = 0.0  # seconds that its entries added to a pass
    shares: list[float] = field(default_factory=list)  # by place: of those that reached it, the token there accepted
    seen: list[int] = field(default_factory=list)  # by place: those that reached it

    def add(self, accepted: int, deepest: int, spent: float, weight: float, newest: float) -> None:
        """The newest counts by `weight`; at each place by `newest` in the end, and at first hope counts too."""
        self.gain += weight * (accepted - self.gain)
        self.spent += weight * (spent - self.spent)
        for place in range(deepest):
            if place == len(self.shares):
                self.shares.append(self.shares[-1] if place else 1.0)
                self.seen.append(HOPE)
            self.seen[place] += 1
            self.shares[place] += max(newest, 1 / self.seen[place]) * ((place < accepted) - self.shares[place])

    def copy(self) -> "Record":
        return replace(self, shares=list(self.shares), seen=list(self.seen))


@dataclass
class Pause:
    """Passes without proposals, more of them each time that trying was in vain.

    It ends at a multiple of its length: texts that could share the time of proposing try together, for alone none of
    them could tell whether it pays.
    """

    length: int = FIRST_PAUSE
    end: int = 0

    def begin(self, now: int) -> None:
        self.end = (now // self.length + 1) * self.length
        self.length = min(2 * self.length, LONGEST_PAUSE)

    def judged(self, pays: bool, now: int) -> None:
        if pays:
            self.length = FIRST_PAUSE
        else:
            self.begin(now)


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
    passes: int = 0  # of texts that use it
    asking: int = 1  # texts, in the last call
    _steps: float = 1.0  # of a call, lately
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))  # of a step
    _pause: Pause = field(default_factory=Pause)
    _worths: list[float] = field(default_factory=list)  # to those who asked, since the last verdict

    def begin(self) -> "Speculation":
        return Speculation(self, self.foresight.proposer())

    def forget(self) -> None:
        """What came of proposals so far."""
        self.proposals, self.record = 0, Record()
        self._times.clear()
        self._worths.clear()
        self._pause = Pause()

    def propose(self, wishes: Sequence[Wish[Guarded]]) -> list[Proposal]:
        began = time.perf_counter()
        found = self.foresight.propose(wishes)
        seconds = time.perf_counter() - began
        steps = max(self._steps_of(proposal, wish) for proposal, wish in zip(found, wishes, strict=True))
        self._times.append(seconds / steps)
        self._steps += RECENT * (steps - self._steps)
        self.asking = len(wishes)
        return found

    def _steps_of(self, proposal: Proposal, wish: Wish[Guarded]) -> int:
        """That it took: the last one may have found nothing that is likely enough."""
        return max(1, min(max(_depths(proposal), default=0) + 1, wish.most, wish.depth)) if self.steps else 1

    def next_pass(self, last: int) -> int:
        """The number of the pass that a text is about to make after its last one."""
        if last >= self.passes:
            self.passes = last + 1
            if len(self._worths) >= self.asking:  # all have told what came of it
                if self.proposals >= COMMON_TRIALS:
                    self._pause.judged(sum(self._worths) >= self.propose_s * len(self._worths), self.passes)
                self._worths.clear()
        return self.passes

    @property
    def pausing(self) -> bool:
        return self.passes < self._pause.end

    def came(self, worth_s: float) -> None:
        """To one of those who asked."""
        self._worths.append(worth_s)

    @property
    def step_s(self) -> float:
        """One text's share of a step: the median, for the first call of a text reads its prompt."""
        return median(self._times) / self.asking if self._times else 0.0

    @property
    def propose_s(self) -> float:
        """The same of a call."""
        return self.step_s * self._steps

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
    _pass: int = 0
    _pause: Pause = field(default_factory=Pause)
    _trials: int = 0
    _asked: bool = False
    _mere: bool = False  # was the last proposal nothing but masks?
    _promised: float = UNSURE  # tokens that should have been accepted by the method's own account, and those that were
    _kept: float = UNSURE

    def __post_init__(self) -> None:
        costs = self.way.costs
        self._added, self._taken = costs.entries / costs.texts - 1, costs.tokens / costs.texts - 1
        if self.way.proposals >= TRIALS:  # what other texts made of it is the best guess
            self.record = self.way.record.copy()
            if self._worth_s() < 0:
                self._pause.begin(self.way.passes)

    @property
    def featured(self) -> bool:
        """Does the method read the model's features? Then it has nothing to say before the first pass."""
        return bool(self.way.foresight.taps)

    def take(self, tokens: Sequence[int], features: Tensor | None, foreseen: Foreseen | None) -> None:
        self.proposer.take(tokens, self.way.own(features), foreseen)

    def wish(self, room: int) -> Wished | None:
        """For at most that many tokens, if any."""
        self._asked = False
        self._pass = self.way.next_pass(self._pass)
        most = min(room, self.way.most)
        if self._pass < self._pause.end or self.way.pausing or most < 1:
            return None
        self._asked = True
        return Wished(self.way, Wish(self.proposer, most, self._floor(), self._depth()))

    def came(self, proposal: Proposal, accepted: int) -> Speculated:
        """The first `accepted` tokens along one path of the proposal were the text's next ones."""
        places = _depths(proposal)
        proposed = [0] * max(places, default=0)
        for place in places:
            if place:
                proposed[place - 1] += 1
        self._added += FRESH * (len(proposal.tokens) - self._added)
        self._taken += FRESH * (accepted - self._taken)
        # Mere masks will show their worth in the next pass, unless they have nothing to show then either.
        mere = not proposed and len(proposal.tokens) > 0
        if self._asked and proposal.ready and not (mere and not self._mere):
            self._learn(proposal, len(proposed), accepted)
        self._mere = mere
        came = tuple(int(place < accepted) for place in range(len(proposed)))
        return Speculated(self.way.method, 1, tuple(proposed), came)

    def _learn(self, proposal: Proposal, deepest: int, accepted: int) -> None:
        self._trials += 1
        way = self.way
        spent = way.costs.more_s(len(proposal.tokens), self._beside()[0])
        way.proposals += 1
        for record, newest in ((self.record, RECENT), (way.record, AMONG_TEXTS)):
            record.add(accepted, deepest, spent, max(newest, 1 / way.proposals), newest)
        if proposal.likely is not None:
            tokens = zip(proposal.tokens, proposal.likely, strict=True)
            promised = sum(chance for token, chance in tokens if token != MASK)
            self._promised += promised - (self._promised - UNSURE) / MEMORY
            self._kept += accepted - (self._kept - UNSURE) / MEMORY
        worth_s = self._worth_s()
        way.came(worth_s)
        self._pause.judged(self._trials < TRIALS or worth_s >= 0, self._pass)

    def _beside(self) -> tuple[float, float]:
        """Entries and tokens of a usual pass if nothing were proposed for this text."""
        costs = self.way.costs
        return max(1.0, costs.entries - self._added), max(1.0, costs.tokens - self._taken)

    @property
    def _token_s(self) -> float:
        """What a token of the batch takes, with proposals for this text."""
        (entries, tokens), way, record = self._beside(), self.way, self.record
        if not (whole_s := way.costs.pass_s(entries)):  # nobody has looked at the clock yet
            return 0.0
        return (whole_s + record.spent + way.propose_s) / (tokens + record.gain)

    @property
    def _entry_s(self) -> float:
        """What one more token in a proposal adds to a pass."""
        costs = self.way.costs
        return costs.more_s(AHEAD, costs.entries) / AHEAD

    def _floor(self) -> float:
        if not (token_s := self._token_s):
            return 0.0
        trust = min(1.5, max(0.05, self._kept / self._promised))
        alone = self.way.steps and self.way.asking == 1  # among others it saves no step to stop
        return (self._entry_s + self.way.step_s * alone) / token_s / trust

    def _depth(self) -> int:
        """How far proposals may reach, by what came of the places so far; now and then half as far again."""
        way, token_s = self.way, self._token_s
        price = (self._entry_s + way.step_s * way.steps) / token_s if token_s else 0.0
        shares = way.record.shares
        if not way.steps or way.asking == 1:  # a text's own are few: it is believed halfway
            shares = [(own + common) / 2 for own, common in zip(self.record.shares, shares, strict=False)]
        good = next((place for place, share in enumerate(shares) if share < price), ENDLESS)
        return max(1, good + (max(1, good // 2) if self._pass % EXPLORING == 0 else 0))

    def _worth_s(self) -> float:
        """What a proposal saves, less what its entries take; nothing is said of the time of proposing."""
        (entries, tokens), costs, record = self._beside(), self.way.costs, self.record
        whole_s = costs.pass_s(entries)
        if not whole_s:
            return math.inf
        return record.gain * whole_s / tokens - record.spent + NEGLIGIBLE * whole_s / costs.texts


def _depths(proposal: Proposal) -> list[int]:
    """Of each node, 1 behind the text; 0 for masks."""
    depths: list[int] = []
    for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
        depths.append(0 if token == MASK else depths[parent] + 1 if parent >= 0 else 1)
    return depths
