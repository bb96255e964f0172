"""Attention over many sequences at once, for unmodified models.

It is registered with `transformers` under a name that this project defines. For such a name, `transformers` builds no
mask, but it passes on the keyword arguments of the forward call. The step is therefore passed as the argument `step`.
The step decides which keys each query sees.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from parse.engines.native.kv_cache import KVCache
from parse.engines.native.scheduled_chunk import ScheduledChunk

STEP_ATTENTION = "parse_step"


class UnsupportedModelError(ValueError):
    """Raised for a model that this engine would not compute correctly."""


class StepAttention(Protocol):
    """Computes the attention of one step, on one kind of device."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Returns the attention output [1, T, heads, value size].

        `query` is [1, heads, T, size]; `key` and `value` are [1, key heads, T, size].
        """
        ...


AttentionFactory = Callable[[KVCache, Sequence[ScheduledChunk]], StepAttention]


def step_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: StepAttention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    if step is None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: the model does not pass the keyword arguments of `forward` to its attention"
        )
    if softcap is not None or s_aux is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: softcapped attention scores and attention sinks are not supported"
        )
    out = step.attend(module.layer_idx, query, key, value, scaling, sliding_window)  # type: ignore[arg-type]
    return out.contiguous(), None  # some models call `view` on it


AttentionInterface.register(STEP_ATTENTION, step_attention)


class _QueryGroup:
    """Queries that are computed together.

    A group is one chunk, or single tokens of sequences in adjacent blocks.
    """

    def __init__(self, chunks: Sequence[ScheduledChunk]) -> None:
        self.chunks = chunks
        self.first_block = chunks[0].sequence.block_ids[0]
        self.num_queries = len(chunks[0])
        self.num_keys = max(chunk.end for chunk in chunks)
        # A single last token needs no mask, unless other sequences of the group are longer.
        self.is_unmasked = self.num_queries == 1 and all(
            chunk.end == self.num_keys and chunk.is_causal for chunk in chunks
        )
        self._masks: dict[
            tuple[int | None, int], Tensor
        ] = {}  # keyed by window and queries per key head, which may differ between layers

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """Returns an additive mask, [chunks, 1, groups * queries, keys].

        Returns None if all keys are visible.
        """
        if window is not None and window >= self.num_keys:
            window = None
        if self.is_unmasked and window is None:
            return None
        if (window, groups) not in self._masks:
            hidden = ~self._visible(window)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
            self._masks[window, groups] = mask.repeat(1, 1, groups, 1)
        return self._masks[window, groups]

    def _visible(self, window: int | None) -> Tensor:
        """Returns which keys each query sees, [chunks, 1, queries, keys]."""
        if self.num_queries > 1 or not self.chunks[0].is_causal:
            (chunk,) = self.chunks
            return torch.from_numpy(chunk.visibility(window))[None, None]
        key, end = torch.arange(self.num_keys), torch.tensor([chunk.end for chunk in self.chunks])[:, None]
        visible = key < end
        if window is not None:
            visible &= key >= end - window
        return visible[:, None, None]


def contiguous_attention(kv_cache: KVCache, chunks: Sequence[ScheduledChunk]) -> "ContiguousAttention":
    slots: list[int] = []
    for chunk in chunks:
        base = chunk.sequence.block_ids[0] * kv_cache.block_size
        slots += range(base + chunk.start, base + chunk.end)
    return ContiguousAttention(kv_cache, chunks, torch.tensor(slots))


class ContiguousAttention:
    """Attention on CPUs.

    A block holds a whole sequence, so its keys are one strided view and nothing is gathered.

    Chunks of single tokens must come first and in the order of their blocks. Those in adjacent blocks are computed as
    one batch.
    """

    def __init__(self, kv_cache: KVCache, chunks: Sequence[ScheduledChunk], slots: Tensor) -> None:
        self.kv_cache, self.slots = kv_cache, slots
        self.groups = [_QueryGroup(adjacent) for adjacent in _group_adjacent(chunks)]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        keys, values = self.kv_cache.write(layer, self.slots, key, value)
        if len(self.groups) == 1:
            return self._attend_group(self.groups[0], query, keys, values, scale, window)
        sizes = [len(group.chunks) * group.num_queries for group in self.groups]
        queries_by_group = query.split(sizes, dim=2)
        out = [
            self._attend_group(group, queries, keys, values, scale, window)
            for group, queries in zip(self.groups, queries_by_group, strict=True)
        ]
        return torch.cat(out, dim=1)

    def _attend_group(
        self, group: _QueryGroup, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Returns the attention output [1, T, heads, size] of one group.

        `query` is [1, heads, T, size]; `keys` and `values` are [1, key heads, slots, size].
        """
        n, heads, key_heads, block_size = len(group.chunks), query.shape[1], keys.shape[1], self.kv_cache.block_size
        mask = group.mask(window, heads // key_heads, query.dtype)
        if n == 1:
            key, value = (rows.narrow(2, group.first_block * block_size, group.num_keys) for rows in (keys, values))
            if heads == key_heads:
                return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
            # Heads that share a key head become additional queries of it.
            grouped_query = query.reshape(1, key_heads, -1, query.shape[-1])
            out = scaled_dot_product_attention(grouped_query, key, value, attn_mask=mask, scale=scale)
            return out.reshape(1, heads, group.num_queries, -1).transpose(1, 2)
        # Single tokens: adjacent blocks form a batch, [n, key heads, keys, size].
        key, value = (
            rows.unflatten(2, (-1, block_size))[
                0, :, group.first_block : group.first_block + n, : group.num_keys
            ].transpose(0, 1)
            for rows in (keys, values)
        )
        grouped_query = query[0].transpose(0, 1).reshape(n, key_heads, heads // key_heads, -1)
        out = scaled_dot_product_attention(grouped_query, key, value, attn_mask=mask, scale=scale)
        return out.reshape(1, n, heads, -1)


def _group_adjacent(chunks: Sequence[ScheduledChunk]) -> list[list[ScheduledChunk]]:
    groups: list[list[ScheduledChunk]] = []
    for chunk in chunks:
        previous = groups[-1][-1] if groups else None
        if (
            previous is not None
            and len(chunk) == len(previous) == 1
            and chunk.is_causal
            and previous.is_causal
            and chunk.sequence.block_ids[0] == previous.sequence.block_ids[0] + 1
        ):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups
