"""Attention over many contexts at once, plugged into unmodified models under a name of its own.

The library hands a function registered under an unknown name no mask, and the forward's own keyword arguments: so the
step travels as `step`, and decides who sees whom.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from parse.engines.native.kv_cache import Memory
from parse.engines.native.scheduled_chunk import Span

STEP_ATTENTION = "parse_step"


class UnsupportedModel(ValueError):
    """A model that this engine would not compute right."""


class Attention(Protocol):
    """What a step's queries see, on one kind of device."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """query [1, heads, T, width], key and value [1, key heads, T, width] -> [1, T, heads, value width]."""
        ...


MakeAttention = Callable[[Memory, Sequence[Span]], Attention]


def step_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Attention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    if step is None:
        raise UnsupportedModel(f"{type(module).__name__}: its model keeps the forward's arguments from it")
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel(f"{type(module).__name__}: capped scores and sinks are not supported")
    out = step.attend(module.layer_idx, query, key, value, scaling, sliding_window)  # type: ignore[arg-type]
    return out.contiguous(), None  # some models take a view of it


AttentionInterface.register(STEP_ATTENTION, step_attention)


class _Block:
    """Queries computed together: one span, or single tokens of contexts that lie side by side in memory."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.first_page = spans[0].context.pages[0]
        self.queries = len(spans[0])
        self.keys = max(span.last for span in spans)
        # Nothing is hidden from a single last token, unless its neighbours' rows are longer.
        self.sees_all = self.queries == 1 and all(s.last == self.keys and s.causal for s in spans)
        self._masks: dict[tuple[int | None, int], Tensor] = {}  # layers may differ in both

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """[spans, 1, groups * queries, keys], additive."""
        if window is not None and window >= self.keys:
            window = None
        if self.sees_all and window is None:
            return None
        if (window, groups) not in self._masks:
            hidden = ~self._visible(window)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
            self._masks[window, groups] = mask.repeat(1, 1, groups, 1)
        return self._masks[window, groups]

    def _visible(self, window: int | None) -> Tensor:
        """[spans, 1, queries, keys]"""
        if self.queries > 1 or not self.spans[0].causal:
            (span,) = self.spans
            return torch.from_numpy(span.visible(window))[None, None]
        key, last = torch.arange(self.keys), torch.tensor([span.last for span in self.spans])[:, None]
        visible = key < last
        if window is not None:
            visible &= key >= last - window
        return visible[:, None, None]


def row_attention(memory: Memory, spans: Sequence[Span]) -> "RowAttention":
    slots: list[int] = []
    for span in spans:
        base = span.context.pages[0] * memory.page_size
        slots += range(base + span.first, base + span.last)
    return RowAttention(memory, spans, torch.tensor(slots))


class RowAttention:
    """For CPUs: a page holds a whole context, so that its keys are one strided view and nothing is gathered.

    The spans of single tokens must come first and in the order of their pages; those of neighbouring pages are then
    computed as one batch.
    """

    def __init__(self, memory: Memory, spans: Sequence[Span], slots: Tensor) -> None:
        self.memory, self.slots = memory, slots
        self.blocks = [_Block(together) for together in _side_by_side(spans)]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        keys, values = self.memory.write(layer, self.slots, key, value)
        if len(self.blocks) == 1:
            return self._block(self.blocks[0], query, keys, values, scale, window)
        sizes = [len(block.spans) * block.queries for block in self.blocks]
        asked = query.split(sizes, dim=2)
        out = [
            self._block(block, queries, keys, values, scale, window)
            for block, queries in zip(self.blocks, asked, strict=True)
        ]
        return torch.cat(out, dim=1)

    def _block(
        self, block: _Block, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """query [1, heads, T, width], keys and values [1, key heads, slots, width] -> [1, T, heads, width]"""
        n, heads, key_heads, size = len(block.spans), query.shape[1], keys.shape[1], self.memory.page_size
        mask = block.mask(window, heads // key_heads, query.dtype)
        if n == 1:
            key, value = (rows.narrow(2, block.first_page * size, block.keys) for rows in (keys, values))
            if heads == key_heads:
                return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
            # Heads that share a key head become more queries of it.
            asked = query.reshape(1, key_heads, -1, query.shape[-1])
            out = scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scale)
            return out.reshape(1, heads, block.queries, -1).transpose(1, 2)
        # Single tokens: rows of neighbouring pages are a batch, [n, key heads, keys, width].
        key, value = (
            rows.unflatten(2, (-1, size))[0, :, block.first_page : block.first_page + n, : block.keys].transpose(0, 1)
            for rows in (keys, values)
        )
        asked = query[0].transpose(0, 1).reshape(n, key_heads, heads // key_heads, -1)
        out = scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scale)
        return out.reshape(1, n, heads, -1)


def _side_by_side(spans: Sequence[Span]) -> list[list[Span]]:
    together: list[list[Span]] = []
    for span in spans:
        before = together[-1][-1] if together else None
        if (
            before is not None
            and len(span) == len(before) == 1
            and span.causal
            and before.causal
            and span.context.pages[0] == before.context.pages[0] + 1
        ):
            together[-1].append(span)
        else:
            together.append([span])
    return together
