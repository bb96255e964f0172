"""Attention over contexts that lie in small pages, which they share: what GPUs want.

Whatever sees all before it, single tokens and stretches of prompts, goes in one call to a kernel that reads the pages
where they lie. A tree has the keys of its context gathered from the pages, and a mask. That way runs on any device and
so serves everything where the kernel cannot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from parse.engines.native.attention import AttentionFactory, contiguous_attention
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.scheduled_chunk import ScheduledChunk

BLOCK_SIZE = 256  # tokens; FlashAttention 2 takes pages of this size and its multiples
MAX_HEAD_DIM = 256  # of a head, in FlashAttention 2
MASK_ALIGNMENT = 8  # entries; SDPA's kernels copy a mask whose rows begin elsewhere


def attention_for(device: torch.device) -> AttentionFactory:
    return contiguous_attention if device.type == "cpu" else PagedAttention


class PagedAttention:
    """The causal spans must come first. Every device that holds some of the layers is told of the step once."""

    def __init__(self, kv_cache: KVCache, chunks: Sequence[ScheduledChunk]) -> None:
        self._kv_cache, self._chunks = kv_cache, chunks
        self._per_device: dict[torch.device, _DeviceStep] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        device = query.device
        if device not in self._per_device:
            self._per_device[device] = _DeviceStep(self._kv_cache, self._chunks, device)
        return self._per_device[device].attend(layer, query, key, value, scale, window)


class _DeviceStep:
    """A step's pages, as the layers on one device need them."""

    def __init__(self, kv_cache: KVCache, chunks: Sequence[ScheduledChunk], device: torch.device) -> None:
        self.kv_cache, self.chunks = kv_cache, chunks
        size = kv_cache.block_size
        causal = sum(span.is_causal for span in chunks)
        queries = np.array([len(span) for span in chunks])
        keys = np.array([span.end for span in chunks])
        block_table = np.zeros((len(chunks), -(-int(keys.max()) // size)), np.int64)
        for row, span in zip(block_table, chunks, strict=True):
            used = -(-span.end // size)
            row[:used] = span.sequence.block_ids[:used]
        owner = np.repeat(np.arange(len(chunks)), queries)  # [T], the span of each query
        entry = np.arange(len(owner)) + np.repeat(keys - queries.cumsum(), queries)  # [T], its place in the span's row
        slots = block_table[owner, entry // size] * size + entry % size
        bounds = [np.concatenate([[0], counts[:causal].cumsum()]) for counts in (queries, keys)]
        # Everything travels to the device at once.
        packed = torch.from_numpy(np.concatenate([slots, *bounds, keys, block_table.ravel()])).to(
            device, non_blocking=True
        )
        self.slots, small = packed[: len(slots)], packed[len(slots) :].int()  # an index into memory must be long
        query_bounds, key_bounds, self._keys, flat = small.split(
            [causal + 1, causal + 1, len(chunks), block_table.size]
        )
        self._block_table = flat.view(block_table.shape)
        self._causal_chunks = _CausalChunks(
            num_queries=int(queries[:causal].sum()),
            query_bounds=query_bounds,
            key_bounds=key_bounds,
            num_keys=self._keys[:causal],
            block_table=self._block_table[:causal],
            max_queries=int(queries[:causal].max(initial=0)),
            max_keys=int(keys[:causal].max(initial=0)),
        )
        self._num_causal = causal
        self._parts_by_kernel: dict[bool, list[_CausalChunks | _GatheredChunks]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        self.kv_cache.write(layer, self.slots, key, value)
        keys, values = self.kv_cache.as_blocks(layer)
        query_rows = query[0].transpose(0, 1)  # [T, heads, width]
        parts = self._parts(kernel_supports(query_rows, values))
        sizes = [part.num_queries for part in parts]
        out = [
            part.attend(queries, keys, values, scale, window)
            for part, queries in zip(parts, query_rows.split(sizes), strict=True)
        ]
        return (out[0] if len(out) == 1 else torch.cat(out)).unsqueeze(0)

    def _parts(self, kernel: bool) -> "list[_CausalChunks | _GatheredChunks]":
        """Which of the two ways each span goes: the same in every layer, or nearly."""
        if kernel not in self._parts_by_kernel:
            by_kernel = self._num_causal if kernel else 0
            parts: list[_CausalChunks | _GatheredChunks] = [self._causal_chunks] if by_kernel else []
            for first, last in _equal_length_ranges(self.chunks, by_kernel):
                block_table, lengths = self._block_table[first:last], self._keys[first:last]
                parts.append(_GatheredChunks(self.chunks[first:last], block_table, lengths, self.kv_cache.block_size))
            self._parts_by_kernel[kernel] = parts
        return self._parts_by_kernel[kernel]


@dataclass(frozen=True)
class _CausalChunks:
    """Spans that see all before them, as the kernel is told of them; all indices in 32 bits."""

    num_queries: int  # queries
    query_bounds: Tensor  # [spans + 1]
    key_bounds: Tensor  # [spans + 1], which the kernel demands and then passes over for `keys` and `pages`
    num_keys: Tensor  # [spans], how many
    block_table: Tensor  # [spans, pages]
    max_queries: int
    max_keys: int  # or more

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query [T, heads, width], keys and values [pages, page size, key heads, width] -> [T, heads, width]."""
        if window is not None:
            window_size = (window - 1, 0)  # to the left and right of a query itself
        elif self.max_queries == 1:
            window_size = (
                -1,
                -1,
            )  # the same for a last token, and heads that share a key head are then computed together
        else:
            window_size = (-1, 0)
        out = varlen_attn(
            query,
            keys,
            values,
            self.query_bounds,
            self.key_bounds,
            self.max_queries,
            self.max_keys,
            scale=scale,
            window_size=window_size,
            enable_gqa=True,
            seqused_k=self.num_keys,
            block_table=self.block_table,
            # Left to itself the kernel may split the keys, and with pages loses rows then: pytorch issue 194167.
            num_splits=1,
        )
        assert isinstance(out, Tensor)
        return out


class CannotReplayError(RuntimeError):
    """Of a step that cannot be recorded and replayed."""


class DecodeAttention:
    """Single tokens at the ends of their rows, told of by tensors alone.

    What is done, and with which arguments, depends on the tensors' shapes and not on what they hold.
    """

    def __init__(self, kv_cache: KVCache, lengths: Tensor, block_table: Tensor) -> None:
        """lengths [rows], pages [rows, most], both long and on the device"""
        self._kv_cache = kv_cache
        rows, size = len(lengths), kv_cache.block_size
        last = lengths - 1
        self._slots = block_table.gather(1, (last // size)[:, None])[:, 0] * size + last % size
        bounds = torch.arange(rows + 1, device=lengths.device, dtype=torch.int32)
        self._causal_chunks = _CausalChunks(
            num_queries=rows,
            query_bounds=bounds,
            key_bounds=torch.cat([bounds[:1], lengths.cumsum(0).int()]),
            num_keys=lengths.int(),
            block_table=block_table.int(),
            max_queries=1,
            max_keys=block_table.shape[1] * size,
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        self._kv_cache.write(layer, self._slots, key, value)
        keys, values = self._kv_cache.as_blocks(layer)
        query_rows = query[0].transpose(0, 1)  # [T, heads, width]
        if not kernel_supports(query_rows, values):  # gathered attention builds its masks from the lengths
            raise CannotReplayError("the paged attention kernel does not support its attention")
        return self._causal_chunks.attend(query_rows, keys, values, scale, window).unsqueeze(0)


class _GatheredChunks:
    """Spans of equally many queries, their keys copied side by side."""

    def __init__(self, chunks: Sequence[ScheduledChunk], block_table: Tensor, keys: Tensor, block_size: int) -> None:
        """pages [spans, pages], keys [spans], how many"""
        self.chunks = chunks
        self.queries_per_chunk = len(chunks[0])
        self.num_queries = len(chunks) * self.queries_per_chunk
        self.num_keys = max(span.end for span in chunks)
        # A shorter row repeats its last key, for what is masked away must be a number too, and memory may hold none.
        place = torch.arange(self.num_keys, device=keys.device).minimum(keys[:, None] - 1)  # [spans, keys]
        self.slots = (block_table.gather(1, place // block_size) * block_size + place % block_size).flatten()
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query [T, heads, width], keys and values [pages, page size, key heads, width] -> [T, heads, value width]."""
        n, t, heads, key_heads = len(self.chunks), self.queries_per_chunk, query.shape[1], keys.shape[2]
        groups = heads // key_heads
        key, value = (
            every.flatten(0, 1).index_select(0, self.slots).view(n, self.num_keys, key_heads, -1).transpose(1, 2)
            for every in (keys, values)
        )  # [n, key heads, keys, width]
        # Heads that share a key head become more queries of it.
        grouped_query = (
            query.view(n, t, key_heads, groups, -1).permute(0, 2, 3, 1, 4).reshape(n, key_heads, groups * t, -1)
        )
        mask = self._mask(window, groups, query.dtype)
        out = scaled_dot_product_attention(grouped_query, key, value, attn_mask=mask, scale=scale)
        return out.view(n, key_heads, groups, t, -1).permute(0, 3, 1, 2, 4).reshape(n * t, heads, -1)

    def _mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """[spans, 1, groups * queries, keys], additive."""
        if window is not None and window >= self.num_keys:
            window = None
        if (window, groups) not in self._masks:
            visible = np.zeros((len(self.chunks), 1, self.queries_per_chunk, self.num_keys), np.bool_)
            for row, span in zip(visible, self.chunks, strict=True):
                row[0, :, : span.end] = span.visibility(window)
            hidden = torch.from_numpy(~visible).to(self.slots.device).repeat(1, 1, groups, 1)
            stride = -(-self.num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
            mask = torch.zeros((*hidden.shape[:3], stride), dtype=dtype, device=hidden.device)[..., : self.num_keys]
            self._masks[window, groups] = mask.masked_fill_(hidden, torch.finfo(dtype).min)
        return self._masks[window, groups]


def kernel_supports(query: Tensor, values: Tensor) -> bool:
    """query [T, heads, width], values [pages, page size, key heads, width]"""
    width = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and width == values.shape[-1]
        and width % 8 == 0
        and width <= MAX_HEAD_DIM
        and values.shape[1] % BLOCK_SIZE == 0
        and _has_kernel(query.device)
    )


@cache
def _has_kernel(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None  # pages are CUDA's alone
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _equal_length_ranges(chunks: Sequence[ScheduledChunk], start: int) -> list[tuple[int, int]]:
    """Stretches of spans from `start` on: single tokens together, all else alone."""
    ranges: list[tuple[int, int]] = []
    for place in range(start, len(chunks)):
        if place > start and len(chunks[place]) == len(chunks[place - 1]) == 1:
            ranges[-1] = (ranges[-1][0], place + 1)
        else:
            ranges.append((place, place + 1))
    return ranges
