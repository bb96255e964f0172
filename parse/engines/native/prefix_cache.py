"""Who holds which pages of key-value memory, and which context already knows the beginning of a new one.

Pure bookkeeping: the numbers of pages and slots, never the tensors. A context is a row of token ids of which the first
`computed` have their keys and values in its pages. Contexts that no request holds stay, least recently used first in
line to go, for whoever comes with the same beginning. A full page may belong to several contexts; a page that is
partly used belongs to one, and sharing it copies it.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

HASH_STRIDE = 16  # tokens; a shorter common beginning is not looked for


class SequenceState:
    """Token ids, and where their keys and values lie."""

    __slots__ = ("block_hashes", "block_ids", "in_use", "num_computed_tokens", "token_ids")

    def __init__(self, tokens: list[int]) -> None:
        self.token_ids = tokens
        self.num_computed_tokens = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[int] = []
        self.in_use = True


class PrefixCache:
    """`copy(source, target, count)` copies the first slots of a page into another."""

    def __init__(self, num_blocks: int, block_size: int, copy_block: Callable[[int, int, int], None]) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.hits = self.lookups = self.evictions = 0  # hits and lookups in tokens
        self._copy_block = copy_block
        self._free_blocks = list(range(num_blocks))  # a heap: low pages first keeps the busy ones together
        self._ref_counts: Counter[int] = Counter()
        self._cached_sequences: OrderedDict[SequenceState, None] = OrderedDict()
        self._sequences_by_hash: dict[int, dict[SequenceState, None]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_blocks)

    @property
    def num_cached_sequences(self) -> int:
        return len(self._cached_sequences)

    @property
    def num_cached_blocks(self) -> int:
        """Held by what may be given up; with nobody at work, all that are not free."""
        return len({page for context in list(self._cached_sequences) for page in context.block_ids})

    def is_being_computed(self, tokens: Sequence[int]) -> bool:
        """Is another request computing right now what one with these tokens could share?"""
        match, length = self._longest_match(list(tokens))
        return match is not None and match.in_use and length - min(length, match.num_computed_tokens) >= HASH_STRIDE

    def allocate(self, tokens: Sequence[int], num_extra_tokens: int) -> SequenceState | None:
        """A context of these tokens with memory for them and `room` more, as much of it computed as anyone has.

        None while there is no memory.
        """
        tokens = list(tokens)
        match, length = self._longest_match(tokens)
        usable = min(length, match.num_computed_tokens) if match else 0
        num_blocks = self._num_blocks_for(len(tokens) + num_extra_tokens)
        if match and self._can_take_over(match, usable):
            sequence = match
            del self._cached_sequences[sequence]
            self._truncate(sequence, usable)
            self._free_unused_blocks(sequence)
            if not self._grow(sequence, num_blocks):
                self._keep_for_reuse(sequence)
                return None
            sequence.in_use = True
            sequence.token_ids = tokens
        else:
            sequence = SequenceState(tokens)
            if not self._fork(sequence, match, usable, num_blocks):
                self._unref_blocks(sequence.block_ids)
                return None
        self.lookups += len(tokens)
        self.hits += sequence.num_computed_tokens
        self._index_hashes(sequence)
        return sequence

    def reserve(self, sequence: SequenceState, length: int) -> bool:
        """Memory for that many tokens; False when there is none."""
        return self._grow(sequence, self._num_blocks_for(length))

    def commit(self, sequence: SequenceState, tokens: Sequence[int]) -> None:
        """These tokens follow, and their keys and values are in place."""
        sequence.token_ids += tokens
        sequence.num_computed_tokens = len(sequence.token_ids)
        self._index_hashes(sequence)

    def truncate(self, sequence: SequenceState, length: int) -> None:
        """Cuts a sequence in use to at most `length` tokens, so that other tokens can follow there.

        What follows is written into the last block that remains. If another sequence shares that block, this sequence
        gets a copy. If there is no free block for the copy, the tokens in that block are computed again.
        """
        self._truncate(sequence, length)
        self._free_unused_blocks(sequence)
        full_blocks, rest = divmod(sequence.num_computed_tokens, self.block_size)
        if not rest or self._ref_counts[sequence.block_ids[full_blocks]] == 1:
            return
        shared_block = sequence.block_ids.pop()
        if self._grow(sequence, full_blocks + 1):
            self._copy_block(shared_block, sequence.block_ids[full_blocks], rest)
        else:
            sequence.num_computed_tokens = full_blocks * self.block_size
        self._unref_blocks([shared_block])

    def release(self, sequence: SequenceState) -> None:
        """Its request is done; what is computed stays for others."""
        self._truncate(sequence, sequence.num_computed_tokens)
        self._keep_for_reuse(sequence)

    def discard(self, sequence: SequenceState) -> None:
        """Its request needs the memory back more than the past."""
        self._truncate(sequence, 0)
        self._unref_blocks(sequence.block_ids)
        sequence.block_ids = []

    def reset(self) -> None:
        """Drops every context that no request holds."""
        while self._cached_sequences:
            self.discard(self._cached_sequences.popitem()[0])

    def _keep_for_reuse(self, sequence: SequenceState) -> None:
        sequence.in_use = False
        if sequence.num_computed_tokens < HASH_STRIDE:  # nobody will find it
            self.discard(sequence)
            return
        self._free_unused_blocks(sequence)
        self._cached_sequences[sequence] = None

    def _longest_match(self, tokens: list[int]) -> tuple[SequenceState | None, int]:
        """The context with the longest common beginning, and its length; idle ones first among equals."""
        candidates: tuple[SequenceState, ...] = ()
        chained = start = 0
        while start + HASH_STRIDE <= len(tokens):
            chained = hash((chained, *tokens[start : start + HASH_STRIDE]))
            if not (sequences := self._sequences_by_hash.get(chained)):
                break
            candidates, start = tuple(sequences), start + HASH_STRIDE
        best: SequenceState | None = None
        length = 0
        for sequence in candidates:
            common = _common_prefix_length(sequence.token_ids, tokens, start)
            if common > length or (common == length and best and best.in_use and not sequence.in_use):
                best, length = sequence, common
        return best, length

    def _can_take_over(self, sequence: SequenceState, usable: int) -> bool:
        """Taking a context over destroys its rest: not where that is the greater part, nor where another shares it."""
        if sequence.in_use or sequence.num_computed_tokens - usable > usable:
            return False
        return usable % self.block_size == 0 or self._ref_counts[sequence.block_ids[usable // self.block_size]] == 1

    def _fork(self, sequence: SequenceState, source: SequenceState | None, usable: int, num_blocks: int) -> bool:
        """Full pages are shared, the last one is copied."""
        if source is None:
            return self._grow(sequence, num_blocks)
        shared, rest = divmod(usable, self.block_size)
        sequence.block_ids = source.block_ids[:shared]
        self._ref_counts.update(sequence.block_ids)
        if self._grow(sequence, num_blocks, keep=source):
            if not source.in_use:
                self._cached_sequences.move_to_end(source)
            if rest:
                self._copy_block(source.block_ids[shared], sequence.block_ids[shared], rest)
            sequence.num_computed_tokens = usable
            return True
        if source.in_use:
            return False
        # The only memory left is the source's own: better all of it lost but the shared pages than the request never
        # served.
        del self._cached_sequences[source]
        self.discard(source)
        self.evictions += 1
        sequence.num_computed_tokens = shared * self.block_size
        return self._grow(sequence, num_blocks)

    def _free_unused_blocks(self, sequence: SequenceState) -> None:
        """Gives back the pages that hold nothing."""
        used = self._num_blocks_for(sequence.num_computed_tokens)
        self._unref_blocks(sequence.block_ids[used:])
        del sequence.block_ids[used:]

    def _num_blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _grow(self, sequence: SequenceState, num_blocks: int, keep: SequenceState | None = None) -> bool:
        missing = num_blocks - len(sequence.block_ids)
        while missing > len(self._free_blocks):
            oldest = next((idle for idle in self._cached_sequences if idle is not keep), None)
            if oldest is None:
                return False
            del self._cached_sequences[oldest]
            self.discard(oldest)
            self.evictions += 1
        for _ in range(missing):
            block_id = heapq.heappop(self._free_blocks)
            sequence.block_ids.append(block_id)
            self._ref_counts[block_id] += 1
        return True

    def _unref_blocks(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
            if not self._ref_counts[block_id]:
                del self._ref_counts[block_id]
                heapq.heappush(self._free_blocks, block_id)

    def _index_hashes(self, sequence: SequenceState) -> None:
        tokens, hashes = sequence.token_ids, sequence.block_hashes
        for start in range(len(hashes) * HASH_STRIDE, len(tokens) - HASH_STRIDE + 1, HASH_STRIDE):
            chained = hash((hashes[-1] if hashes else 0, *tokens[start : start + HASH_STRIDE]))
            hashes.append(chained)
            self._sequences_by_hash.setdefault(chained, {})[sequence] = None

    def _truncate(self, sequence: SequenceState, length: int) -> None:
        """Forgets all tokens beyond that length; what was computed of them is void."""
        while len(sequence.block_hashes) * HASH_STRIDE > length:
            chained = sequence.block_hashes.pop()
            sequences = self._sequences_by_hash[chained]
            del sequences[sequence]
            if not sequences:
                del self._sequences_by_hash[chained]
        del sequence.token_ids[length:]
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, length)


def _common_prefix_length(cached: list[int], tokens: list[int], start: int) -> int:
    """The length of the common beginning, which is `start` or up to a block more, unless hashes have collided."""
    if cached[:start] != tokens[:start]:
        return 0
    size = min(len(cached), len(tokens))
    while start < size and cached[start] == tokens[start]:
        start += 1
    return start
