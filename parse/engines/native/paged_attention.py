"""Attention over sequences in small blocks that they may share, for GPUs.

All causal chunks, which are single tokens and parts of prompts, are computed by one call of a kernel that reads the
blocks in place. For a tree, the keys of its context are gathered from the blocks, and a mask is built. This second
method runs on any device, so it also computes causal chunks where the kernel is not available.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from parse.engines.native.attention import AttentionFactory, contiguous_attention
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.scheduled_chunk import ScheduledChunk

BLOCK_SIZE = 256  # tokens; FlashAttention 2 supports blocks of multiples of this size
MAX_HEAD_DIM = 256  # in FlashAttention 2
MASK_ALIGNMENT = 8  # entries; the kernels of SDPA copy a mask whose rows are not aligned to it


def attention_for(device: torch.device) -> AttentionFactory:
    return contiguous_attention if device.type == "cpu" else PagedAttention


class PagedAttention:
    """Attention of one step; causal chunks must come first.

    Each device with layers receives the block table once.
    """

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
    """The block table and slots of a step on one device."""

    def __init__(self, kv_cache: KVCache, chunks: Sequence[ScheduledChunk], device: torch.device) -> None:
        self.kv_cache, self.chunks = kv_cache, chunks
        size = kv_cache.block_size
        num_causal = sum(chunk.is_causal for chunk in chunks)
        queries = np.array([len(chunk) for chunk in chunks])
        keys = np.array([chunk.end for chunk in chunks])
        block_table = np.zeros((len(chunks), -(-int(keys.max()) // size)), np.int64)
        for row, chunk in zip(block_table, chunks, strict=True):
            num_blocks = -(-chunk.end // size)
            row[:num_blocks] = chunk.sequence.block_ids[:num_blocks]
        owner = np.repeat(np.arange(len(chunks)), queries)  # [T], the chunk of each query
        entry = np.arange(len(owner)) + np.repeat(
            keys - queries.cumsum(), queries
        )  # [T], its entry in the row of the chunk
        slots = block_table[owner, entry // size] * size + entry % size
        bounds = [np.concatenate([[0], counts[:num_causal].cumsum()]) for counts in (queries, keys)]
        # All numbers are packed into one tensor, so that a single transfer moves them to the device.
        packed = torch.from_numpy(np.concatenate([slots, *bounds, keys, block_table.ravel()])).to(
            device, non_blocking=True
        )
        self.slots, small = packed[: len(slots)], packed[len(slots) :].int()  # `index_copy_` needs 64-bit slots
        query_bounds, key_bounds, self._keys, flat = small.split(
            [num_causal + 1, num_causal + 1, len(chunks), block_table.size]
        )
        self._block_table = flat.view(block_table.shape)
        self._causal_chunks = _CausalChunks(
            num_queries=int(queries[:num_causal].sum()),
            query_bounds=query_bounds,
            key_bounds=key_bounds,
            num_keys=self._keys[:num_causal],
            block_table=self._block_table[:num_causal],
            max_queries=int(queries[:num_causal].max(initial=0)),
            max_keys=int(keys[:num_causal].max(initial=0)),
        )
        self._num_causal = num_causal
        self._parts_by_kernel: dict[bool, list[_CausalChunks | _GatheredChunks]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        self.kv_cache.write(layer, self.slots, key, value)
        keys, values = self.kv_cache.as_blocks(layer)
        query_rows = query[0].transpose(0, 1)  # [T, heads, size]
        parts = self._parts(kernel_supports(query_rows, values))
        sizes = [part.num_queries for part in parts]
        out = [
            part.attend(queries, keys, values, scale, window)
            for part, queries in zip(parts, query_rows.split(sizes), strict=True)
        ]
        return (out[0] if len(out) == 1 else torch.cat(out)).unsqueeze(0)

    def _parts(self, use_kernel: bool) -> "list[_CausalChunks | _GatheredChunks]":
        """Divides the chunks between the kernel and gathered attention.

        Nearly all layers divide the chunks in the same way, so the division is reused.
        """
        if use_kernel not in self._parts_by_kernel:
            num_by_kernel = self._num_causal if use_kernel else 0
            parts: list[_CausalChunks | _GatheredChunks] = [self._causal_chunks] if num_by_kernel else []
            for start, end in _equal_length_ranges(self.chunks, num_by_kernel):
                block_table, lengths = self._block_table[start:end], self._keys[start:end]
                parts.append(_GatheredChunks(self.chunks[start:end], block_table, lengths, self.kv_cache.block_size))
            self._parts_by_kernel[use_kernel] = parts
        return self._parts_by_kernel[use_kernel]


@dataclass(frozen=True)
class _CausalChunks:
    """Causal chunks in the form that the kernel takes; all indices have 32 bits."""

    num_queries: int
    query_bounds: Tensor  # [chunks + 1]
    key_bounds: Tensor  # [chunks + 1], which the kernel requires but ignores in favour of `num_keys`
    num_keys: Tensor  # [chunks]
    block_table: Tensor  # [chunks, blocks]
    max_queries: int
    max_keys: int  # an upper bound

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Returns the attention output [T, heads, size].

        `query` is [T, heads, size]; `keys` and `values` are [blocks, block size, key heads, size].
        """
        if window is not None:
            window_size = (window - 1, 0)  # keys to the left and right of the query
        elif self.max_queries == 1:
            # A last token sees all keys, and without a causal mask the kernel computes the heads that share a key head
            # together.
            window_size = (-1, -1)
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
            # By default the kernel may split the keys. It then loses rows of paged keys (pytorch issue 194167).
            num_splits=1,
        )
        assert isinstance(out, Tensor)
        return out


class CannotReplayError(RuntimeError):
    """Raised for a step that cannot be recorded and replayed."""


class DecodeAttention:
    """Attention of single tokens at the ends of their sequences.

    The step is described by tensors only, so that it can be recorded as a CUDA graph.

    The operations and their arguments depend on the shapes of the tensors and not on their values.
    """

    def __init__(self, kv_cache: KVCache, lengths: Tensor, block_table: Tensor) -> None:
        """Computes the slots and bounds of the step.

        `lengths` is [sequences] and `block_table` is [sequences, max blocks]. Both are int64 tensors on the device.
        """
        self._kv_cache = kv_cache
        num_seqs, size = len(lengths), kv_cache.block_size
        last = lengths - 1
        self._slots = block_table.gather(1, (last // size)[:, None])[:, 0] * size + last % size
        bounds = torch.arange(num_seqs + 1, device=lengths.device, dtype=torch.int32)
        self._causal_chunks = _CausalChunks(
            num_queries=num_seqs,
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
        query_rows = query[0].transpose(0, 1)  # [T, heads, size]
        if not kernel_supports(query_rows, values):  # gathered attention builds its masks from the lengths
            raise CannotReplayError("the paged attention kernel does not support its attention")
        return self._causal_chunks.attend(query_rows, keys, values, scale, window).unsqueeze(0)


class _GatheredChunks:
    """Chunks with equal numbers of queries, whose keys are gathered side by side."""

    def __init__(
        self, chunks: Sequence[ScheduledChunk], block_table: Tensor, num_keys: Tensor, block_size: int
    ) -> None:
        """Computes the slots of the keys.

        `block_table` is [chunks, blocks], and `num_keys` is [chunks].
        """
        self.chunks = chunks
        self.queries_per_chunk = len(chunks[0])
        self.num_queries = len(chunks) * self.queries_per_chunk
        self.num_keys = max(chunk.end for chunk in chunks)
        # A shorter row repeats its last key: masked values must be finite too, and unused slots may hold NaN.
        entry = torch.arange(self.num_keys, device=num_keys.device).minimum(num_keys[:, None] - 1)  # [chunks, keys]
        self.slots = (block_table.gather(1, entry // block_size) * block_size + entry % block_size).flatten()
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Returns the attention output [T, heads, value size].

        `query` is [T, heads, size]; `keys` and `values` are [blocks, block size, key heads, size].
        """
        n, t, heads, key_heads = len(self.chunks), self.queries_per_chunk, query.shape[1], keys.shape[2]
        groups = heads // key_heads
        key, value = (
            blocks.flatten(0, 1).index_select(0, self.slots).view(n, self.num_keys, key_heads, -1).transpose(1, 2)
            for blocks in (keys, values)
        )  # [n, key heads, keys, size]
        # Heads that share a key head become additional queries of it.
        grouped_query = (
            query.view(n, t, key_heads, groups, -1).permute(0, 2, 3, 1, 4).reshape(n, key_heads, groups * t, -1)
        )
        mask = self._mask(window, groups, query.dtype)
        out = scaled_dot_product_attention(grouped_query, key, value, attn_mask=mask, scale=scale)
        return out.view(n, key_heads, groups, t, -1).permute(0, 3, 1, 2, 4).reshape(n * t, heads, -1)

    def _mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """Returns an additive mask, [chunks, 1, groups * queries, keys]."""
        if window is not None and window >= self.num_keys:
            window = None
        if (window, groups) not in self._masks:
            visible = np.zeros((len(self.chunks), 1, self.queries_per_chunk, self.num_keys), np.bool_)
            for row, chunk in zip(visible, self.chunks, strict=True):
                row[0, :, : chunk.end] = chunk.visibility(window)
            hidden = torch.from_numpy(~visible).to(self.slots.device).repeat(1, 1, groups, 1)
            stride = -(-self.num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
            mask = torch.zeros((*hidden.shape[:3], stride), dtype=dtype, device=hidden.device)[..., : self.num_keys]
            self._masks[window, groups] = mask.masked_fill_(hidden, torch.finfo(dtype).min)
        return self._masks[window, groups]


def kernel_supports(query: Tensor, values: Tensor) -> bool:
    """Returns whether the kernel supports these tensors on their device.

    `query` is [T, heads, size]; `values` is [blocks, block size, key heads, size].
    """
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == values.shape[-1]
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and values.shape[1] % BLOCK_SIZE == 0
        and _has_kernel(query.device)
    )


@cache
def _has_kernel(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None  # only CUDA builds support block tables
        and "block_table" in signature(varlen_attn).parameters  # PyTorch before 2.12 has none, even in CUDA builds
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _equal_length_ranges(chunks: Sequence[ScheduledChunk], start: int) -> list[tuple[int, int]]:
    """Divides the chunks from `start` on into ranges.

    Adjacent single tokens form one range. Every other chunk is a range of its own.
    """
    ranges: list[tuple[int, int]] = []
    for index in range(start, len(chunks)):
        if index > start and len(chunks[index]) == len(chunks[index - 1]) == 1:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges
