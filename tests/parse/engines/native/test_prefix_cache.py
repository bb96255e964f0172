from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from parse.engines.native.prefix_cache import HASH_STRIDE, PrefixCache

PAGES = {"rows": (5, 96), "blocks": (24, 16), "odd pages": (40, 7), "tiny pages": (96, 4), "scarce": (5, 16)}

MUCH = settings(max_examples=80, stateful_step_count=40)

# Texts that share beginnings of all lengths: a few stems, cut anywhere, followed by some of another one.
STEMS = [[stem * 1000 + place for place in range(80)] for stem in range(3)]
texts = st.builds(
    lambda stem, cut, other, rest: (STEMS[stem][:cut] + STEMS[other][:rest])[:80],
    st.integers(0, 2),
    st.integers(0, 80),
    st.integers(0, 2),
    st.integers(0, 80),
)


def common(one, other):
    size = 0
    while size < min(len(one), len(other)) and one[size] == other[size]:
        size += 1
    return size


class CacheMachine(RuleBasedStateMachine):
    """Slots hold token ids where they would hold their keys and values."""

    pages, size = 24, 16

    def __init__(self):
        super().__init__()
        self.slots = [None] * (self.pages * self.size)
        self.cache = PrefixCache(self.pages, self.size, self.copy)
        self.busy = []

    def copy(self, source, target, count):
        assert 0 < count <= self.size
        assert source != target
        for place in range(count):
            self.slots[target * self.size + place] = self.slots[source * self.size + place]

    def write(self, context, tokens):
        """Computes what follows in the row."""
        for place, token in enumerate(tokens, context.computed):
            page = context.pages[place // self.size]
            others = [known for known in self.known() if known is not context and page in known.pages]
            assert not others, "a page that others share is written to"
            self.slots[self.slot(context, place)] = token

    def slot(self, context, place):
        return context.pages[place // self.size] * self.size + place % self.size

    def known(self):
        return {*self.busy, *(c for holders in self.cache._sequences_by_hash.values() for c in holders)}

    def begin(self, tokens, room):
        held = {page for context in self.busy for page in context.pages}
        lookups, hits = self.cache.lookups, self.cache.hits
        context = self.cache.allocate(tokens, room)
        needed = -(-(len(tokens) + room) // self.size)
        if context is None:
            assert needed > self.cache.num_blocks - len(held), "there was memory"
            return None
        assert context.token_ids == tokens
        assert context.num_computed_tokens <= len(tokens)
        assert len(context.block_ids) == needed
        assert (self.cache.lookups - lookups, self.cache.hits - hits) == (len(tokens), context.num_computed_tokens)
        self.busy.append(context)
        return context

    @rule(tokens=texts, room=st.integers(0, 16))
    def open(self, tokens, room):
        self.begin(tokens, room)

    @rule(tokens=texts)
    def serve(self, tokens):
        """A request from its beginning to its end."""
        if (context := self.begin(tokens, 0)) is not None:
            self.write(context, tokens[context.num_computed_tokens :])
            context.num_computed_tokens = len(tokens)
            self.close(-1)

    @precondition(lambda self: self.busy)
    @rule(which=st.integers(0, 99), count=st.integers(1, 80))
    def compute(self, which, count):
        context = self.busy[which % len(self.busy)]
        tokens = context.tokens[context.computed : context.computed + count]
        self.write(context, tokens)
        context.computed += len(tokens)

    @precondition(lambda self: self.busy)
    @rule(
        which=st.integers(0, 99), nodes=st.lists(st.integers(7000, 7002), min_size=1, max_size=12), keep=st.integers()
    )
    def speculate(self, which, nodes, keep):
        """Nodes are run on the end of a context, and some of them are kept."""
        context = self.busy[which % len(self.busy)]
        self.write(context, context.tokens[context.computed :])
        context.computed = len(context.tokens)
        if self.cache.reserve(context, context.computed + len(nodes)):
            self.write(context, nodes)
            self.cache.commit(context, nodes[: keep % (len(nodes) + 1)])

    @precondition(lambda self: self.busy)
    @rule(which=st.integers(0, 99))
    def close(self, which):
        self.cache.release(self.busy.pop(which % len(self.busy)))

    @rule(tokens=texts)
    def look(self, tokens):
        """Waiting is worth it only where somebody busy is about to compute at least a block more than there is."""
        worth = [
            c
            for c in self.busy
            if (length := common(c.tokens, tokens)) >= HASH_STRIDE and length - c.computed >= HASH_STRIDE
        ]
        assert not self.cache.is_being_computed(tokens) or worth

    @invariant()
    def what_is_said_to_be_computed_is(self):
        for context in self.known():
            held = [self.slots[self.slot(context, place)] for place in range(context.computed)]
            assert held == context.tokens[: context.computed]

    @invariant()
    def every_page_is_free_or_held_by_those_who_say_so(self):
        holders = Counter(page for context in self.known() for page in context.pages)
        assert holders == self.cache._ref_counts
        assert sorted([*self.cache._free_blocks, *holders]) == list(range(self.cache.num_blocks))

    @invariant()
    def idle_contexts_hold_nothing_but_what_is_computed(self):
        for context in self.known():
            assert context.busy == (context in self.busy)
            if not context.busy:
                assert len(context.tokens) == context.computed >= HASH_STRIDE
                assert len(context.pages) == -(-context.computed // self.size)

    def teardown(self):
        """When all are done, a request for all the memory gets it."""
        for context in self.busy:
            self.cache.release(context)
        self.busy = []
        every = self.cache.num_blocks * self.size
        whole = self.cache.allocate(list(range(10**6, 10**6 + every)), 0)
        assert whole is not None
        assert sorted(whole.block_ids) == list(range(self.cache.num_blocks))
        assert self.cache.num_cached_sequences == self.cache.num_free_blocks == 0


@pytest.mark.parametrize(("pages", "page_size"), PAGES.values(), ids=PAGES)
def test_the_cache_keeps_its_promises_whatever_happens(pages, page_size):
    run_state_machine_as_test(type("Machine", (CacheMachine,), dict(pages=pages, size=page_size)), settings=MUCH)


def test_even_when_hashes_collide(monkeypatch):
    monkeypatch.setattr(
        "parse.engines.native.prefix_cache.hash", lambda it: hash((it[0], *(t % 1000 for t in it[1:]))), raising=False
    )
    run_state_machine_as_test(CacheMachine, settings=MUCH)


def begun(cache, tokens):
    context = cache.open(tokens, 0)
    assert context is not None
    return context


def served(cache, tokens):
    """The context a finished request leaves, and how much of it was there before."""
    context = begun(cache, tokens)
    found = context.computed
    context.computed = len(tokens)
    cache.close(context)
    return context, found


@pytest.mark.parametrize("page_size", [96, 16, 7])
@given(earlier=st.lists(texts, max_size=6), tokens=texts)
def test_all_that_an_idle_context_shares_is_found(page_size, earlier, tokens):
    cache = PrefixCache(-(-96 // page_size) * 8, page_size, lambda *_: None)
    for text in earlier:
        served(cache, text)
    kept = [context.token_ids for context in cache._cached_sequences]
    shared = max((common(text, tokens) for text in kept), default=0)
    assert served(cache, tokens)[1] == (shared if shared >= HASH_STRIDE else 0)


def test_a_following_turn_goes_on_in_the_same_memory():
    cache = PrefixCache(4, 96, lambda *_: pytest.fail())
    first, _ = served(cache, STEMS[0][:40])
    assert served(cache, STEMS[0][:60]) == (first, 40)
    assert cache.num_free_blocks == 3


def test_a_side_branch_does_not_destroy_a_long_text():
    copied = []
    cache = PrefixCache(4, 96, lambda *copy: copied.append(copy))
    long, _ = served(cache, STEMS[0])
    branch, found = served(cache, STEMS[0][:20] + STEMS[1][:20])
    assert (branch is long, found) == (False, 20)
    assert copied == [(*long.pages, *branch.pages, 20)]
    assert served(cache, STEMS[0])[1] == 80


def test_full_pages_are_shared_and_only_the_last_is_copied():
    copied = []
    cache = PrefixCache(12, 16, lambda *copy: copied.append(copy))
    long = begun(cache, STEMS[0])
    long.num_computed_tokens = 80
    branch = begun(cache, STEMS[0][:41] + STEMS[1][:20])
    assert branch.num_computed_tokens == 41
    assert branch.block_ids[:2] == long.block_ids[:2]
    assert not set(branch.block_ids[2:]) & set(long.block_ids)
    assert copied == [(long.block_ids[2], branch.block_ids[2], 9)]
    assert cache.num_free_blocks == 12 - 5 - 2


def test_where_a_text_must_go_to_make_room_what_others_hold_of_it_stays():
    cache = PrefixCache(6, 16, lambda *_: None)
    long, _ = served(cache, STEMS[0][:64])
    other = begun(cache, STEMS[0][:17] + STEMS[1][:5])
    assert other.block_ids[0] == long.pages[0]
    last = begun(cache, STEMS[0][:18] + STEMS[2][:60])
    assert (last.block_ids[0], last.num_computed_tokens) == (other.block_ids[0], 16)
    assert (long.pages, cache.num_free_blocks, cache.evictions) == ([], 0, 1)


def test_who_was_used_longest_ago_goes_first():
    cache = PrefixCache(3, 96, lambda *_: None)
    contexts = [served(cache, stem)[0] for stem in STEMS]
    served(cache, STEMS[0] + [7])
    busy = begun(cache, [8] * 20)
    assert cache.evictions == 1
    assert [context.computed for context in contexts] == [81, 0, 80]
    for other in (9, 10):
        assert cache.allocate([other] * 20, 0) is not None
    assert cache.allocate([11] * 20, 0) is None
    assert not cache.reserve(busy, 97)
    assert cache.evictions == 3


def test_a_look_at_what_is_being_computed_is_worth_waiting_for():
    cache = PrefixCache(3, 96, lambda *_: None)
    context = begun(cache, STEMS[0])
    assert cache.is_being_computed(STEMS[0][:50])
    assert not cache.is_being_computed(STEMS[0][:15])
    context.num_computed_tokens = 34
    assert cache.is_being_computed(STEMS[0][:50])
    context.num_computed_tokens = 35  # less than a block is missing
    assert not cache.is_being_computed(STEMS[0][:50])
    cache.release(context)
    assert not cache.is_being_computed(STEMS[0])


def test_all_that_is_idle_can_be_forgotten():
    cache = PrefixCache(8, 16, lambda *_: None)
    busy = begun(cache, STEMS[0][:40])
    busy.num_computed_tokens = 40
    served(cache, STEMS[0][:64])
    assert cache.num_cached_blocks == cache.num_blocks - cache.num_free_blocks - 1  # two of the three are shared
    cache.reset()
    assert (cache.num_cached_sequences, cache.num_free_blocks) == (0, 5)
    assert served(cache, STEMS[0][:64])[1] == 40
