"""Texts, methods and machines made up: how likely each token is accepted is known, and what every pass takes.

What is decided is held against every fixed depth, none included, on the same texts and the same machine.
"""

import itertools
import random
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import pytest

from parse.speculative import policy
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.policy import MAX_PAUSE, MIN_TRIALS, SpeculativeMethod
from parse.speculative.proposal import NO_PROPOSAL, NOT_READY, Proposal, Proposer, chain_proposal
from parse.tree import MASK

MS = 1e-3
MOST = 8
ROOM = 10**6
TRIED = 1, 2, 4, 8, 16, 32, 64  # entries


def cpu(entries):
    return (4.5 + (entries - 1) * 1.1 / 15 if entries < 16 else 5.6 + (entries - 16) * 2.8 / 48) * MS


def flat(entries):
    return 10 * MS


def proportional(entries):
    return entries * 0.4 * MS


class Clock:
    """In the place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(policy, "time", clock)
    return clock


class Text:
    """Each coming token is accepted, behind accepted ones, with a chance that `chance(rng)` draws."""

    def __init__(self, chance, seed):
        self.chance, self.rng = chance, random.Random(seed)
        self.go_on()

    def go_on(self):
        self.chances = [self.chance(self.rng) for _ in range(MOST)]
        self.comes = [self.rng.random() < chance for chance in self.chances]

    def run(self):
        """Tokens that would be accepted."""
        return sum(1 for _ in itertools.takewhile(bool, self.comes))

    def extend(self, tokens, features, foreseen):
        pass


@dataclass
class Method(Proposer):
    """Takes `call_s` and, for each step, `step_s`; knows the chances of tokens, and may tell or twist them."""

    clock: Clock
    call_s: float = 0.0
    step_s: float = 0.0
    told: Any = staticmethod(lambda chance: chance)
    blind: bool = False
    texts: list = field(default_factory=list)

    def new_state(self):
        return self.texts.pop(0)

    def propose(self, wishes):
        found, steps = [], 1
        for wish in wishes:
            likely: list[float] = []
            for drawn in wish.proposer.chances[: min(wish.most, wish.depth)]:
                steps = max(steps, len(likely) + 1)
                chance = self.told(drawn) * (likely[-1] if likely else 1.0)
                if chance < wish.floor and not self.blind:
                    break
                likely.append(chance)
            found.append(chain_proposal(list(range(len(likely))), None if self.blind else likely))
        self.clock.now += self.call_s + self.step_s * steps
        return found


@dataclass
class Came:
    """Of a number of passes."""

    tokens: int = 0
    seconds: float = 0.0
    proposed: list[list[int]] = field(default_factory=list)  # of each pass, for each text; -1: nothing was asked for
    floors: list[float] = field(default_factory=list)

    @property
    def rate(self):
        return self.tokens / self.seconds

    @property
    def depth(self):
        return mean(max(0, size) for sizes in self.proposed for size in sizes)


class Batch:
    """Texts written side by side, as an engine does it: each is told what came of its proposal, and asked for a wish,
    while those behind it have yet to hear of theirs."""

    def __init__(self, machine, method, costs=None):
        self.machine, self.method, self.costs = machine, method, costs or StepCostModel()
        self.costs.initialize((size, machine(size)) for size in TRIED)
        self.way = SpeculativeMethod("eagle3", GuardedProposer(method, MOST), MOST, method.step_s > 0, (), self.costs)
        self.going: list = []

    def begin(self, *texts):
        for text in texts:
            self.method.texts.append(text)
            going = self.way.start_sequence()
            self.going.append([text, going, going.proposal_call(ROOM)])

    def end(self):
        self.going = []

    def write(self, passes):
        came, clock = Came(), self.method.clock
        began = clock.now
        for _ in range(passes):
            asking = [wished.wish for _, _, wished in self.going if wished]
            came.floors += [wish.floor for wish in asking]
            found = iter(self.way.propose(asking) if asking else ())
            proposals = [next(found) if wished else NO_PROPOSAL for _, _, wished in self.going]
            came.proposed.append(
                [
                    len(proposal.token_ids) if wished else -1
                    for proposal, (_, _, wished) in zip(proposals, self.going, strict=True)
                ]
            )
            entries = sum(1 + len(proposal.token_ids) for proposal in proposals)
            tokens = 0
            for one, proposal in zip(self.going, proposals, strict=True):
                text, going, _ = one
                accepted = min(text.run(), len(proposal.token_ids))
                going.came(proposal, accepted)
                tokens += 1 + accepted
                text.go_on()
                one[2] = going.wish(ROOM)
            clock.now += self.machine(entries)
            self.costs.record(len(self.going), entries, tokens, self.machine(entries))
            came.tokens += tokens
        came.seconds = clock.now - began
        return came


def always(chance):
    return lambda rng: chance


def swinging(rng):
    """Most tokens are nearly sure, some are anybody's guess."""
    return rng.random() ** 0.3


def in_turns(rng):
    return rng.choice((0.99, 0.2))


def best_fixed(machine, method, chances, passes=4000):
    """Tokens per second at the best depth, the same for all texts at all times."""
    texts = len(chances)
    runs = []
    for seed, chance in enumerate(chances):
        text = Text(chance, 1000 + seed)
        for _ in range(passes // texts):
            runs.append(text.run())
            text.go_on()

    def rate(depth):
        tokens = texts * (1 + mean(min(run, depth) for run in runs))
        proposing = method.call_s + depth * method.step_s if depth else 0.0
        return tokens / (machine(texts * (1 + depth)) + proposing)

    return max(rate(depth) for depth in range(MOST + 1))


KINDS = {
    "sure": always(0.95),
    "likely": always(0.8),
    "even": always(0.55),
    "hopeless": always(0.03),
    "swinging": swinging,
    "in turns": in_turns,
}
PACES = {  # seconds of a call, and of a step
    "at once": (1 * MS, 0.0),
    "by steps": (0.1 * MS, 0.3 * MS),
    "by slow steps": (0.0, 1 * MS),
}


@pytest.mark.parametrize("texts", [1, 8, 24])
@pytest.mark.parametrize("machine", [cpu, flat, proportional])
def test_in_the_long_run_it_is_nearly_as_fast_as_at_the_best_depth(machine, texts, clock):
    shares = []
    for (call_s, step_s), chance, blind in itertools.product(PACES.values(), KINDS.values(), (False, True)):
        method = Method(clock, call_s, step_s, blind=blind)
        batch = Batch(machine, method)
        batch.begin(*(Text(chance, seed) for seed in range(texts)))
        batch.write(100)
        shares.append(batch.write(100 + 800 // texts).rate / best_fixed(machine, method, [chance] * texts))
    assert mean(shares) > 0.95 and min(shares) > 0.8, sorted(shares)


def test_texts_that_could_share_the_time_of_proposing_find_that_it_pays(clock):
    """Of eight none could bear it alone: a step takes what a token does."""
    method = Method(clock, step_s=1.25 * MS)
    batch = Batch(flat, method)
    batch.begin(*(Text(always(0.9), seed) for seed in range(8)))
    assert batch.write(300).depth > 4
    batch = Batch(flat, method)
    batch.begin(*(Text(always(0.02), seed) for seed in range(8)))
    batch.write(200)
    assert batch.write(300).depth < 0.2
    for one in batch.going:  # and find it again
        one[0].chance = always(0.9)
    batch.write(300)
    assert batch.write(200).depth > 4


def test_where_more_entries_take_no_time_everything_is_proposed(clock):
    for blind in (False, True):
        batch = Batch(flat, Method(clock, blind=blind))
        batch.begin(*(Text(always(0.3), seed) for seed in range(4)))
        assert batch.write(100).depth == MOST


def test_where_entries_take_most_of_a_pass_only_what_is_likely_is_proposed(clock):
    def depth(chance):
        batch = Batch(lambda entries: (2 + 0.4 * entries) * MS, Method(clock))
        batch.begin(*(Text(chance, seed) for seed in range(8)))
        batch.write(100)
        return batch.write(100).depth

    assert depth(always(0.3)) < 0.2
    assert depth(always(0.97)) > 2


@pytest.mark.parametrize("pace", PACES)
def test_a_text_without_success_is_left_alone_and_tried_at_growing_intervals(pace, clock):
    batch = Batch(cpu, Method(clock, *PACES[pace]))
    batch.begin(Text(always(0.0), 1))
    tried = [number for number, (size,) in enumerate(batch.write(1000).proposed) if size >= 0]
    pauses = [after - before for before, after in itertools.pairwise(tried)][MIN_TRIALS:]
    assert tried[: MIN_TRIALS - 1] == list(range(MIN_TRIALS - 1))
    assert pauses == sorted(pauses) and max(pauses) == MAX_PAUSE
    assert len(tried) < 30


@pytest.mark.parametrize("texts", [1, 6])
@pytest.mark.parametrize("pace", PACES)
def test_proposals_come_back_when_a_text_becomes_predictable_and_go_when_it_ceases_to_be(pace, texts, clock):
    batch = Batch(cpu, Method(clock, *PACES[pace]))
    batch.begin(*(Text(always(0.02), seed) for seed in range(texts)))
    batch.write(500)
    before = batch.write(2 * MAX_PAUSE)
    for chance in (always(0.97), always(0.02)):
        for one in batch.going:
            one[0].chance = chance
        batch.write(6 * MAX_PAUSE)
        now = batch.write(2 * MAX_PAUSE)
        if chance(None) < 0.5:
            assert now.depth < 0.5 and now.rate == pytest.approx(before.rate, rel=0.1)
        else:
            assert now.depth > 3 and now.rate > 2 * before.rate


def test_hopeless_texts_do_not_keep_a_predictable_one_from_its_proposals(clock):
    batch = Batch(cpu, Method(clock, call_s=0.5 * MS))
    batch.begin(Text(always(0.97), 0), *(Text(always(0.02), seed) for seed in range(1, 4)))
    batch.write(200)
    depths = [mean(max(0, size) for size in sizes) for sizes in zip(*batch.write(200).proposed, strict=True)]
    assert depths[0] > 6 and max(depths[1:]) < 1


def test_a_new_text_starts_from_what_came_of_others(clock):
    for chance, readily in ((always(0.02), False), (always(0.95), True)):
        batch = Batch(cpu, Method(clock, call_s=1 * MS))
        batch.begin(Text(chance, 0))
        batch.write(150)
        batch.end()
        tried = 0
        for seed in range(1, 31):
            batch.begin(Text(chance, seed))
            tried += batch.write(3).proposed[0] != [-1]
            batch.end()
        assert tried > 28 if readily else tried < 10


def test_after_all_is_forgotten_a_text_is_tried_as_the_first_one_was(clock):
    batch = Batch(cpu, Method(clock, call_s=1 * MS, blind=True))
    batch.begin(Text(always(0.0), 0))
    batch.write(200)
    batch.end()
    batch.way.reset()
    batch.begin(Text(always(0.0), 1))
    came = batch.write(MIN_TRIALS - 1).proposed
    assert came[0] == [MOST] and [-1] not in came


def test_the_floor_is_what_one_more_entry_takes_of_a_tokens_time(clock):
    """Higher where entries take more, and where tokens take less, for they are accepted."""
    floors = {}
    for machine, chance in itertools.product((flat, cpu, proportional), (0.5, 0.8, 0.95)):
        batch = Batch(machine, Method(clock, call_s=0.1 * MS))
        batch.begin(Text(always(chance), 7))
        batch.write(100)
        came = batch.write(400)
        entries = 1 + came.depth
        price = (machine(entries + 4) - machine(entries)) / 4
        floors[machine, chance] = mean(came.floors)
        assert floors[machine, chance] == pytest.approx(price * came.rate, rel=0.35, abs=0.01)
    assert floors[flat, 0.8] == 0 < floors[cpu, 0.8] < 0.2 < floors[proportional, 0.8]
    assert floors[cpu, 0.5] < floors[cpu, 0.8] < floors[cpu, 0.95]


def test_what_a_method_says_of_its_tokens_is_believed_as_far_as_it_was_right(clock):
    """Where a floor matters: three methods propose for the same texts, and one of them knows how likely tokens are."""
    came = {}
    for name, told in (
        ("right", lambda chance: chance),
        ("boasting", lambda chance: chance**0.2),
        ("timid", lambda chance: chance**2),
    ):
        method = Method(clock, told=told)
        batch = Batch(cpu, method)
        batch.begin(*(Text(swinging, seed) for seed in range(8)))
        batch.write(100)
        came[name] = batch.write(300)
    floors = {name: mean(one.floors) for name, one in came.items()}
    assert floors["timid"] < floors["right"] < 0.8 * floors["boasting"]
    assert min(came[name].rate for name in came) > 0.93 * came["right"].rate


def test_the_length_of_proposals_without_chances_follows_what_came_of_their_places(clock):
    """As far as the place whose tokens still pay, and now and then one further."""
    for chance in (0.3, 0.6, 0.8, 0.99):
        method = Method(clock, blind=True)
        batch = Batch(cpu, method)
        batch.begin(*(Text(always(chance), seed) for seed in range(16)))
        batch.write(150)
        came = batch.write(100)
        price = (cpu(64) - cpu(16)) / 48 * came.rate
        pays = next((place for place in range(MOST) if chance ** (place + 1) < price), MOST)
        assert came.depth == pytest.approx(pays, abs=1.2)


class Silent(Method):
    def propose(self, wishes):
        self.clock.now += self.call_s
        return [self.answer] * len(wishes)

    answer = NO_PROPOSAL


def test_looking_in_vain_counts_by_the_time_it_takes(clock):
    for call_s, share in ((0.001 * MS, 1.0), (2 * MS, 0.05)):
        batch = Batch(cpu, Silent(clock, call_s))
        batch.begin(Text(always(0.5), 0))
        batch.write(300)
        asked = mean(size >= 0 for (size,) in batch.write(640).proposed)
        assert asked == pytest.approx(share, abs=0.05)


def test_a_text_that_is_yet_to_be_read_is_not_judged(clock):
    method = Silent(clock, 2 * MS)
    method.answer = NOT_READY
    batch = Batch(cpu, method)
    batch.begin(Text(always(0.5), 0))
    assert batch.write(50).proposed == [[0]] * 50


class Masked(Silent):
    """Every other time it asks what the model foresees; then it knows."""

    def propose(self, wishes):
        self.clock.now += self.call_s
        found = []
        for wish in wishes:
            wish.proposer.asked = not getattr(wish.proposer, "asked", False)
            mere = Proposal([MASK] * 3, (-1, 0, 1), (1.0,) * 3)
            found.append(mere if wish.proposer.asked else chain_proposal([1, 2, 3], (0.9, 0.9, 0.9)))
        return found


def test_mere_masks_are_judged_by_what_they_foresaw(clock):
    for chance, goes_on in ((0.95, True), (0.0, False)):
        method = Masked(clock, 0.1 * MS)
        batch = Batch(cpu, method)
        batch.begin(Text(always(chance), 0))
        batch.write(100)
        asked = mean(size >= 0 for (size,) in batch.write(320).proposed)
        assert asked == 1 if goes_on else asked < 0.2


def test_there_is_no_wish_where_there_is_no_room(clock):
    batch = Batch(flat, Method(clock))
    batch.method.texts.append(Text(always(0.9), 0))
    going = batch.way.start_sequence()
    assert going.proposal_call(0) is None
    wished = going.proposal_call(3)
    assert wished is not None and wished.request.max_tokens == 3


def test_before_anybody_has_looked_at_the_clock_everything_is_wished_for(clock):
    method = Method(clock, texts=[Text(always(0.0), 0)])
    way = SpeculativeMethod("ngram", GuardedProposer(method, MOST), MOST, False, (), StepCostModel())
    going = way.start_sequence()
    for _ in range(20):
        wished = going.proposal_call(ROOM)
        assert wished is not None and (wished.request.max_tokens, wished.request.min_probability) == (MOST, 0)
        going.observe(way.propose([wished.request])[0], 0)
