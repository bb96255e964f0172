from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from parse.engines.native.prefix_cache import HASH_STRIDE, PrefixCache

BLOCK_SIZES = {"rows": (5, 96), "blocks": (24, 16), "odd blocks": (40, 7), "tiny blocks": (96, 4), "scarce": (5, 16)}

MANY_STEPS = settings(max_examples=80, stateful_step_count=40)

# Token lists that share prefixes of all lengths: a few stems, cut anywhere, followed by a part of another one.
STEMS = [[stem * 1000 + place for place in range(80)] for stem in range(3)]
token_lists = st.builds(
    lambda stem, length, other, rest: (STEMS[stem][:length] + STEMS[other][:rest])[:80],
    st.integers(0, 2),
    st.integers(0, 80),
    st.integers(0, 2),
    st.integers(0, 80),
)


def common_prefix_length(one, other):
    size = 0
    while size < min(len(one), len(other)) and one[size] == other[size]:
        size += 1
    return size


class CacheMachine(RuleBasedStateMachine):
    """The slots hold token ids in place of their keys and values.

    `cached` is the machine's own list of the cached sequences, the least recently used first. It predicts evictions.
    """

    num_blocks, block_size = 24, 16
    hashes_collide = False  # a common prefix may then be missed

    def __init__(self):
        super().__init__()
        self.slots = [None] * (self.num_blocks * self.block_size)
        self.cache = PrefixCache(self.num_blocks, self.block_size, self.copy)
        self.in_use = []
        self.cached = []
        self.num_evicted = 0

    def copy(self, source, target, count):
        assert 0 < count <= self.block_size
        assert source != target
        for place in range(count):
            self.slots[target * self.block_size + place] = self.slots[source * self.block_size + place]

    def write(self, sequence, tokens):
        """Computes the next tokens of the sequence."""
        for place, token in enumerate(tokens, sequence.num_computed_tokens):
            block_id = sequence.block_ids[place // self.block_size]
            others = [other for other in self.all_sequences() if other is not sequence and block_id in other.block_ids]
            assert not others, "a block that others share is written to"
            self.slots[self.slot(sequence, place)] = token

    def slot(self, sequence, place):
        return sequence.block_ids[place // self.block_size] * self.block_size + place % self.block_size

    def all_sequences(self):
        return {*self.in_use, *(c for holders in self.cache._sequences_by_hash.values() for c in holders)}

    def current_blocks(self):
        return {sequence: set(sequence.block_ids) for sequence in (*self.cached, *self.in_use)}

    def check_evictions(self, candidates):
        """Removes the evicted sequences from `cached` and returns them. Candidates are evicted in their order."""
        evicted = [sequence for sequence in candidates if not sequence.block_ids]
        assert evicted == candidates[: len(evicted)], "a less recently used sequence is still cached"
        self.num_evicted += len(evicted)
        assert self.cache.evictions == self.num_evicted
        self.cached = [sequence for sequence in self.cached if sequence not in evicted]
        return evicted

    def is_necessary(self, eviction, evicted, blocks, kept):
        """Returns whether there would be too few free blocks without the last eviction.

        `blocks` are those of the other sequences before the request, and `kept` those that it shares with one of them.
        """
        held = kept.union(*(blocks[sequence] for sequence in blocks if sequence not in evicted))
        return self.cache.num_free_blocks < len(blocks[eviction] - held)

    def allocate(self, tokens, num_extra_tokens):
        held = {block_id for sequence in self.in_use for block_id in sequence.block_ids}
        lookups, hits = self.cache.lookups, self.cache.hits
        blocks = self.current_blocks()
        lengths = {sequence: common_prefix_length(sequence.token_ids, tokens) for sequence in blocks}
        sequence = self.cache.allocate(tokens, num_extra_tokens)
        needed = -(-(len(tokens) + num_extra_tokens) // self.block_size)
        if sequence is None:
            assert needed > self.cache.num_blocks - len(held), "there was memory"
            # A sequence that the request had begun to take over stays. All others are evicted.
            remaining = [cached for cached in self.cached if cached.block_ids]
            assert len(remaining) <= 1
            self.check_evictions([cached for cached in self.cached if cached not in remaining])
            return None
        assert sequence.token_ids == tokens
        assert sequence.num_computed_tokens <= len(tokens)
        assert len(sequence.block_ids) == needed
        assert (self.cache.lookups - lookups, self.cache.hits - hits) == (len(tokens), sequence.num_computed_tokens)
        if sequence in self.cached:
            self.check_taken_over(sequence, blocks, lengths)
        else:
            self.check_forked(sequence, blocks, lengths)
        self.in_use.append(sequence)
        return sequence

    def check_taken_over(self, sequence, blocks, lengths):
        assert sequence.num_computed_tokens == lengths[sequence] == max(lengths.values())
        self.cached.remove(sequence)
        del blocks[sequence]
        evicted = self.check_evictions(list(self.cached))
        kept = set(sequence.block_ids[: -(-sequence.num_computed_tokens // self.block_size)])
        assert not evicted or self.is_necessary(evicted[-1], evicted, blocks, kept), "one eviction less would do"

    def check_forked(self, sequence, blocks, lengths):
        """The source is evicted last, and counts as used.

        It is a sequence that shares the most tokens, and a cached one before one in use.
        """
        max_length = max(lengths.values(), default=0)
        sources = [cached for cached in self.cached if lengths[cached] == max_length >= HASH_STRIDE]
        if self.hashes_collide and not sequence.num_computed_tokens:
            sources = list(self.cached)
        others = [cached for cached in self.cached if cached not in sources]
        kept = set(sequence.block_ids[: sequence.num_computed_tokens // self.block_size])
        if not any(cached.block_ids for cached in self.cached):
            evicted, last = self.check_evictions(others + sources), sources or others[-1:]
        elif self.hashes_collide and not sequence.num_computed_tokens:
            evicted = self.check_evictions(list(self.cached))
            last = evicted[-1:]
        else:
            # If several share as many tokens, the cache may choose any of them.
            source = next(iter(reversed(self.cache._cached_sequences))) if sources else None
            assert source is None or source in sources
            evicted = self.check_evictions([cached for cached in self.cached if cached is not source])
            last = evicted[-1:]
            if source is not None:
                self.cached.remove(source)
                self.cached.append(source)
        assert not evicted or any(self.is_necessary(each, evicted, blocks, kept) for each in last), (
            "one eviction less would do"
        )

    def reserve(self, sequence, length):
        blocks = self.current_blocks()
        is_reserved = self.cache.reserve(sequence, length)
        evicted = self.check_evictions(list(self.cached))
        if is_reserved:
            assert not evicted or self.is_necessary(evicted[-1], evicted, blocks, set()), "one eviction less would do"
        else:
            assert not self.cached, "a cached sequence could have made way"
        return is_reserved

    @rule(tokens=token_lists, num_extra_tokens=st.integers(0, 16))
    def open(self, tokens, num_extra_tokens):
        self.allocate(tokens, num_extra_tokens)

    @rule(tokens=token_lists)
    def serve(self, tokens):
        """Runs a request from its first token to its last."""
        if (sequence := self.allocate(tokens, 0)) is not None:
            self.write(sequence, tokens[sequence.num_computed_tokens :])
            sequence.num_computed_tokens = len(tokens)
            self.close(-1)

    @precondition(lambda self: self.in_use)
    @rule(which=st.integers(0, 99), count=st.integers(1, 80))
    def compute(self, which, count):
        sequence = self.in_use[which % len(self.in_use)]
        tokens = sequence.token_ids[sequence.num_computed_tokens : sequence.num_computed_tokens + count]
        if self.reserve(sequence, sequence.num_computed_tokens + len(tokens)):
            self.write(sequence, tokens)
            sequence.num_computed_tokens += len(tokens)

    @precondition(lambda self: self.in_use)
    @rule(
        which=st.integers(0, 99),
        nodes=st.lists(st.integers(7000, 7002), min_size=1, max_size=12),
        num_kept=st.integers(),
    )
    def speculate(self, which, nodes, num_kept):
        """Runs nodes after the end of a sequence and keeps some of them."""
        sequence = self.in_use[which % len(self.in_use)]
        if self.reserve(sequence, len(sequence.token_ids) + len(nodes)):
            self.write(sequence, sequence.token_ids[sequence.num_computed_tokens :])
            sequence.num_computed_tokens = len(sequence.token_ids)
            self.write(sequence, nodes)
            self.cache.commit(sequence, nodes[: num_kept % (len(nodes) + 1)])

    @precondition(lambda self: self.in_use)
    @rule(which=st.integers(0, 99), length=st.integers(0, 90))
    def truncate(self, which, length):
        """The computed tokens stay, except those of a shared last block for which there is no free block."""
        sequence = self.in_use[which % len(self.in_use)]
        tokens, computed = list(sequence.token_ids), min(sequence.num_computed_tokens, length)
        self.cache.truncate(sequence, length)
        self.check_evictions(list(self.cached))
        assert sequence.token_ids == tokens[:length]
        assert len(sequence.block_ids) == -(-sequence.num_computed_tokens // self.block_size)
        if sequence.num_computed_tokens != computed:
            assert sequence.num_computed_tokens == computed - computed % self.block_size
            assert self.cache.num_cached_sequences == 0, "a cached sequence could have made way"
            held = {block_id for other in self.in_use if other is not sequence for block_id in other.block_ids}
            assert len(held | set(sequence.block_ids)) == self.cache.num_blocks, "there was a free block"

    @precondition(lambda self: self.in_use)
    @rule(which=st.integers(0, 99))
    def close(self, which):
        sequence = self.in_use.pop(which % len(self.in_use))
        self.cache.release(sequence)
        if sequence.num_computed_tokens >= HASH_STRIDE:
            self.cached.append(sequence)

    @rule(tokens=token_lists)
    def look_up(self, tokens):
        """A request waits only for a running one that computes at least a hash block more of the common prefix."""
        worth_waiting_for = [
            sequence
            for sequence in self.in_use
            if (length := common_prefix_length(sequence.token_ids, tokens)) >= HASH_STRIDE
            and length - sequence.num_computed_tokens >= HASH_STRIDE
        ]
        assert not self.cache.is_being_computed(tokens) or worth_waiting_for

    @invariant()
    def the_slots_of_computed_tokens_hold_them(self):
        for sequence in self.all_sequences():
            held = [self.slots[self.slot(sequence, place)] for place in range(sequence.num_computed_tokens)]
            assert held == sequence.token_ids[: sequence.num_computed_tokens]

    @invariant()
    def every_block_is_free_or_counted_once_per_holder(self):
        holders = Counter(block_id for sequence in self.all_sequences() for block_id in sequence.block_ids)
        assert holders == self.cache._ref_counts
        assert sorted([*self.cache._free_blocks, *holders]) == list(range(self.cache.num_blocks))

    @invariant()
    def cached_sequences_hold_only_computed_tokens(self):
        for sequence in self.all_sequences():
            assert sequence.in_use == (sequence in self.in_use)
            if not sequence.in_use:
                assert len(sequence.token_ids) == sequence.num_computed_tokens >= HASH_STRIDE
                assert len(sequence.block_ids) == -(-sequence.num_computed_tokens // self.block_size)
        assert self.cache.num_cached_sequences == len(self.cached)

    def teardown(self):
        """Once all requests have finished, a request for all blocks gets them."""
        for sequence in self.in_use:
            self.cache.release(sequence)
        self.in_use = []
        num_slots = self.cache.num_blocks * self.block_size
        sequence = self.cache.allocate(list(range(10**6, 10**6 + num_slots)), 0)
        assert sequence is not None
        assert sorted(sequence.block_ids) == list(range(self.cache.num_blocks))
        assert self.cache.num_cached_sequences == self.cache.num_free_blocks == 0


@pytest.mark.parametrize(("num_blocks", "block_size"), BLOCK_SIZES.values(), ids=BLOCK_SIZES)
def test_the_invariants_of_the_cache_hold_whatever_happens(num_blocks, block_size):
    run_state_machine_as_test(
        type("Machine", (CacheMachine,), dict(num_blocks=num_blocks, block_size=block_size)), settings=MANY_STEPS
    )


def test_even_when_hashes_collide(monkeypatch):
    monkeypatch.setattr(
        "parse.engines.native.prefix_cache.hash", lambda it: hash((it[0], *(t % 1000 for t in it[1:]))), raising=False
    )
    machine = type("Machine", (CacheMachine,), dict(hashes_collide=True))
    run_state_machine_as_test(machine, settings=MANY_STEPS)


def allocate(cache, tokens):
    sequence = cache.allocate(tokens, 0)
    assert sequence is not None
    return sequence


def serve(cache, tokens):
    """Returns the sequence that a finished request leaves, and how many of its tokens were already computed."""
    sequence = allocate(cache, tokens)
    num_cached_tokens = sequence.num_computed_tokens
    sequence.num_computed_tokens = len(tokens)
    cache.release(sequence)
    return sequence, num_cached_tokens


@pytest.mark.parametrize("block_size", [96, 16, 7])
@given(earlier=st.lists(token_lists, max_size=6), tokens=token_lists)
def test_all_that_a_cached_sequence_shares_is_found(block_size, earlier, tokens):
    """There are blocks for all sequences. Only the rest of a sequence that is taken over is lost."""
    cache = PrefixCache(-(-96 // block_size) * 8, block_size, lambda *_: None)
    kept = {}
    for earlier_tokens in earlier:
        sequence, _ = serve(cache, earlier_tokens)
        kept[sequence] = earlier_tokens
    shared = max((common_prefix_length(cached, tokens) for cached in kept.values()), default=0)
    assert serve(cache, tokens)[1] == (shared if shared >= HASH_STRIDE else 0)
    assert cache.evictions == 0


def test_a_following_request_continues_in_the_same_blocks():
    cache = PrefixCache(4, 96, lambda *_: pytest.fail())
    first, _ = serve(cache, STEMS[0][:40])
    assert serve(cache, STEMS[0][:60]) == (first, 40)
    assert cache.num_free_blocks == 3


def test_a_cached_prefix_is_used_before_an_equal_one_in_use():
    cache = PrefixCache(4, 96, lambda *_: None)
    allocate(cache, STEMS[0][:40])
    assert serve(cache, STEMS[0][:40])[1] == 0
    assert serve(cache, STEMS[0][:40])[1] == 40


def test_a_side_branch_does_not_destroy_a_long_sequence():
    copied = []
    cache = PrefixCache(4, 96, lambda *copy: copied.append(copy))
    long, _ = serve(cache, STEMS[0])
    branch, num_cached_tokens = serve(cache, STEMS[0][:20] + STEMS[1][:20])
    assert (branch is long, num_cached_tokens) == (False, 20)
    assert copied == [(*long.block_ids, *branch.block_ids, 20)]
    assert serve(cache, STEMS[0])[1] == 80


def test_full_blocks_are_shared_and_only_the_last_is_copied():
    copied = []
    cache = PrefixCache(12, 16, lambda *copy: copied.append(copy))
    long = allocate(cache, STEMS[0])
    long.num_computed_tokens = 80
    branch = allocate(cache, STEMS[0][:41] + STEMS[1][:20])
    assert branch.num_computed_tokens == 41
    assert branch.block_ids[:2] == long.block_ids[:2]
    assert not set(branch.block_ids[2:]) & set(long.block_ids)
    assert copied == [(long.block_ids[2], branch.block_ids[2], 9)]
    assert cache.num_free_blocks == 12 - 5 - 2


def test_a_sequence_cut_within_a_shared_block_goes_on_in_a_copy():
    copied = []
    cache = PrefixCache(12, 16, lambda *copy: copied.append(copy))
    first = allocate(cache, STEMS[0])
    first.num_computed_tokens = 80
    second = allocate(cache, STEMS[0] + [7])
    shared = list(first.block_ids)
    assert second.block_ids[:5] == shared
    cache.truncate(second, 41)
    assert (second.token_ids, second.num_computed_tokens) == (STEMS[0][:41], 41)
    assert second.block_ids[:2] == shared[:2] and second.block_ids[2] not in shared
    assert copied == [(shared[2], second.block_ids[2], 9)]
    assert first.block_ids == shared
    assert cache.num_free_blocks == 12 - 5 - 1


def test_a_sequence_cut_within_a_block_of_its_own_stays_there():
    cache = PrefixCache(12, 16, lambda *_: pytest.fail())
    sequence = allocate(cache, STEMS[0])
    sequence.num_computed_tokens = 80
    block_ids = list(sequence.block_ids)
    cache.truncate(sequence, 41)
    assert (sequence.num_computed_tokens, sequence.block_ids) == (41, block_ids[:3])
    assert cache.reserve(sequence, 80)
    cache.truncate(sequence, 90)
    assert (sequence.num_computed_tokens, len(sequence.block_ids)) == (41, 3)


def test_without_a_block_for_the_copy_the_shared_block_is_computed_again():
    cache = PrefixCache(6, 16, lambda *_: pytest.fail())
    first = allocate(cache, STEMS[0])
    first.num_computed_tokens = 80
    second = allocate(cache, STEMS[0][:64] + STEMS[1][:16])
    cache.truncate(second, 64)
    last = allocate(cache, [9] * 16)
    cache.truncate(second, 41)
    assert (second.token_ids, second.num_computed_tokens) == (STEMS[0][:41], 32)
    assert second.block_ids == first.block_ids[:2]
    assert not cache.reserve(second, 41)
    cache.release(last)
    assert cache.reserve(second, 41)


def test_what_was_cut_off_is_no_longer_found():
    cache = PrefixCache(12, 16, lambda *_: None)
    sequence = allocate(cache, STEMS[0])
    sequence.num_computed_tokens = 80
    cache.truncate(sequence, 40)
    cache.commit(sequence, STEMS[1][:24])
    cache.release(sequence)
    assert serve(cache, STEMS[0])[1] == 40


def test_an_evicted_sequence_leaves_the_blocks_that_others_hold():
    cache = PrefixCache(6, 16, lambda *_: None)
    long, _ = serve(cache, STEMS[0][:64])
    other = allocate(cache, STEMS[0][:17] + STEMS[1][:5])
    assert other.block_ids[0] == long.block_ids[0]
    last = allocate(cache, STEMS[0][:18] + STEMS[2][:60])
    assert (last.block_ids[0], last.num_computed_tokens) == (other.block_ids[0], 16)
    assert (long.block_ids, cache.num_free_blocks, cache.evictions) == ([], 0, 1)


def test_the_least_recently_used_sequence_is_evicted_first():
    cache = PrefixCache(3, 96, lambda *_: None)
    sequences = [serve(cache, stem)[0] for stem in STEMS]
    serve(cache, STEMS[0] + [7])
    running = allocate(cache, [8] * 20)
    assert cache.evictions == 1
    assert [sequence.num_computed_tokens for sequence in sequences] == [81, 0, 80]
    for other in (9, 10):
        assert cache.allocate([other] * 20, 0) is not None
    assert cache.allocate([11] * 20, 0) is None
    assert not cache.reserve(running, 97)
    assert cache.evictions == 3


def test_a_request_waits_for_tokens_that_are_being_computed():
    cache = PrefixCache(3, 96, lambda *_: None)
    sequence = allocate(cache, STEMS[0])
    assert cache.is_being_computed(STEMS[0][:50])
    assert not cache.is_being_computed(STEMS[0][:15])
    sequence.num_computed_tokens = 34
    assert cache.is_being_computed(STEMS[0][:50])
    sequence.num_computed_tokens = 35  # less than a hash block is missing
    assert not cache.is_being_computed(STEMS[0][:50])
    cache.release(sequence)
    assert not cache.is_being_computed(STEMS[0])


def test_a_reset_drops_all_cached_sequences():
    cache = PrefixCache(8, 16, lambda *_: None)
    running = allocate(cache, STEMS[0][:40])
    running.num_computed_tokens = 40
    serve(cache, STEMS[0][:64])
    assert cache.num_cached_blocks == cache.num_blocks - cache.num_free_blocks - 1  # two of the three are shared
    cache.reset()
    assert (cache.num_cached_sequences, cache.num_free_blocks) == (0, 5)
    assert serve(cache, STEMS[0][:64])[1] == 40
