"""Manages the blocks of the KV cache, and finds cached prefixes.

This module handles only block ids, no tensors. A sequence is a list of token ids. The keys and values of its first
`num_computed_tokens` are in its blocks. A sequence whose request has finished stays cached for later requests with the
same prefix. When the cache is full, the least recently used of these sequences is evicted. If there is none left, a new
request waits, or the scheduler preempts a running one. Several sequences may share a full block. A partly used
block is still written to, so it belongs to a single sequence, and other sequences copy its tokens.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

HASH_STRIDE = 16  # tokens; a shorter common prefix is not looked up


class SequenceState:
    """Token ids, and the blocks that hold their keys and values."""

    __slots__ = ("block_hashes", "block_ids", "in_use", "num_computed_tokens", "token_ids")

    def __init__(self, tokens: list[int]) -> None:
        self.token_ids = tokens
        self.num_computed_tokens = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[int] = []
        self.in_use = True


class PrefixCache:
    """Assigns blocks to sequences, and keeps finished sequences for reuse.

    `copy_block(source, target, count)` copies the first `count` slots of a block into another block.
    """

    def __init__(self, num_blocks: int, block_size: int, copy_block: Callable[[int, int, int], None]) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.hits = self.lookups = self.evictions = 0  # hits and lookups in tokens
        self._copy_block = copy_block
        self._free_blocks = list(range(num_blocks))  # a heap: low ids come first, which keeps the used blocks together
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
        """The number of blocks that cached sequences hold.

        While no request runs, these are all blocks that are not free.
        """
        return len({block_id for sequence in list(self._cached_sequences) for block_id in sequence.block_ids})

    def is_being_computed(self, tokens: Sequence[int]) -> bool:
        """Returns whether a running request is computing a prefix of these tokens.

        A request with these tokens could then share that prefix.
        """
        match, length = self._longest_match(list(tokens))
        return match is not None and match.in_use and length - min(length, match.num_computed_tokens) >= HASH_STRIDE

    def allocate(self, tokens: Sequence[int], num_extra_tokens: int) -> SequenceState | None:
        """Returns a sequence of these tokens, with blocks for its keys and values.

        It also gets blocks for `num_extra_tokens` more tokens.

        The tokens that it shares with the best matching sequence are not computed again. Returns None while there are
        too few free blocks.
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
        """Allocates blocks for `length` tokens in total.

        Returns False if there are too few, even after the eviction of all cached sequences. The scheduler then preempts
        a request.
        """
        return self._grow(sequence, self._num_blocks_for(length))

    def commit(self, sequence: SequenceState, tokens: Sequence[int]) -> None:
        """Appends tokens whose keys and values are already in the blocks."""
        sequence.token_ids += tokens
        sequence.num_computed_tokens = len(sequence.token_ids)
        self._index_hashes(sequence)

    def truncate(self, sequence: SequenceState, length: int) -> None:
        """Truncates a sequence in use to at most `length` tokens.

        The next tokens are written into the last block that remains. If another sequence shares that block, this
        sequence gets a copy of it. If there is no free block for the copy, the tokens in that block are computed again.
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
        """Keeps the computed tokens of a finished request for later ones."""
        self._truncate(sequence, sequence.num_computed_tokens)
        self._keep_for_reuse(sequence)

    def discard(self, sequence: SequenceState) -> None:
        """Forgets a sequence and frees its blocks."""
        self._truncate(sequence, 0)
        self._unref_blocks(sequence.block_ids)
        sequence.block_ids = []

    def reset(self) -> None:
        """Discards all cached sequences."""
        while self._cached_sequences:
            self.discard(self._cached_sequences.popitem()[0])

    def _keep_for_reuse(self, sequence: SequenceState) -> None:
        sequence.in_use = False
        if sequence.num_computed_tokens < HASH_STRIDE:  # too short to be looked up
            self.discard(sequence)
            return
        self._free_unused_blocks(sequence)
        self._cached_sequences[sequence] = None

    def _longest_match(self, tokens: list[int]) -> tuple[SequenceState | None, int]:
        """Returns the sequence with the longest common prefix, and its length.

        Among sequences with equal prefixes, a cached one is preferred.
        """
        candidates: tuple[SequenceState, ...] = ()
        chained_hash = start = 0
        while start + HASH_STRIDE <= len(tokens):
            chained_hash = hash((chained_hash, *tokens[start : start + HASH_STRIDE]))
            if not (sequences := self._sequences_by_hash.get(chained_hash)):
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
        """Returns whether a request may take over this sequence instead of forking it.

        Taking over discards the rest of the sequence.

        Returns False if the rest is the greater part, or if another sequence shares the block to write to.
        """
        if sequence.in_use or sequence.num_computed_tokens - usable > usable:
            return False
        return usable % self.block_size == 0 or self._ref_counts[sequence.block_ids[usable // self.block_size]] == 1

    def _fork(self, sequence: SequenceState, source: SequenceState | None, usable: int, num_blocks: int) -> bool:
        """Shares the full blocks of the source with a new sequence.

        The partly used block is copied.
        """
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
        # Nothing is left to evict except the source itself, and without evicting it the request might wait forever.
        # The request keeps the shared full blocks and computes the rest again.
        del self._cached_sequences[source]
        self.discard(source)
        self.evictions += 1
        sequence.num_computed_tokens = shared * self.block_size
        return self._grow(sequence, num_blocks)

    def _free_unused_blocks(self, sequence: SequenceState) -> None:
        """Frees the blocks that hold no computed token."""
        used = self._num_blocks_for(sequence.num_computed_tokens)
        self._unref_blocks(sequence.block_ids[used:])
        del sequence.block_ids[used:]

    def _num_blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _grow(self, sequence: SequenceState, num_blocks: int, keep: SequenceState | None = None) -> bool:
        missing = num_blocks - len(sequence.block_ids)
        while missing > len(self._free_blocks):
            oldest = next((cached for cached in self._cached_sequences if cached is not keep), None)
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
            chained_hash = hash((hashes[-1] if hashes else 0, *tokens[start : start + HASH_STRIDE]))
            hashes.append(chained_hash)
            self._sequences_by_hash.setdefault(chained_hash, {})[sequence] = None

    def _truncate(self, sequence: SequenceState, length: int) -> None:
        """Forgets all tokens beyond that length."""
        while len(sequence.block_hashes) * HASH_STRIDE > length:
            chained_hash = sequence.block_hashes.pop()
            sequences = self._sequences_by_hash[chained_hash]
            del sequences[sequence]
            if not sequences:
                del self._sequences_by_hash[chained_hash]
        del sequence.token_ids[length:]
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, length)


def _common_prefix_length(cached: list[int], tokens: list[int], start: int) -> int:
    """Returns the length of the common prefix of two sequences.

    Their first `start` tokens are equal unless hashes have collided.
    """
    if cached[:start] != tokens[:start]:
        return 0
    size = min(len(cached), len(tokens))
    while start < size and cached[start] == tokens[start]:
        start += 1
    return start
