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

from parse.engines.native.attention import MakeAttention, row_attention
from parse.engines.native.kv_cache import Memory
from parse.engines.native.scheduled_chunk import Span

PAGE = 256  # tokens; FlashAttention 2 takes pages of this size and its multiples
WIDEST = 256  # of a head, in FlashAttention 2
ALIGNED = 8  # entries; SDPA's kernels copy a mask whose rows begin elsewhere


def attention_on(device: torch.device) -> MakeAttention:
    return row_attention if device.type == "cpu" else PagedAttention


class PagedAttention:
    """The causal spans must come first. Every device that holds some of the layers is told of the step once."""

    def __init__(self, memory: Memory, spans: Sequence[Span]) -> None:
        self._memory, self._spans = memory, spans
        self._on: dict[torch.device, _Pages] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        device = query.device
        if device not in self._on:
            self._on[device] = _Pages(self._memory, self._spans, device)
        return self._on[device].attend(layer, query, key, value, scale, window)


class _Pages:
    """A step's pages, as the layers on one device need them."""

    def __init__(self, memory: Memory, spans: Sequence[Span], device: torch.device) -> None:
        self.memory, self.spans = memory, spans
        size = memory.page_size
        causal = sum(span.causal for span in spans)
        queries = np.array([len(span) for span in spans])
        keys = np.array([span.last for span in spans])
        pages = np.zeros((len(spans), -(-int(keys.max()) // size)), np.int64)
        for row, span in zip(pages, spans, strict=True):
            used = -(-span.last // size)
            row[:used] = span.context.pages[:used]
        owner = np.repeat(np.arange(len(spans)), queries)  # [T], the span of each query
        entry = np.arange(len(owner)) + np.repeat(keys - queries.cumsum(), queries)  # [T], its place in the span's row
        slots = pages[owner, entry // size] * size + entry % size
        bounds = [np.concatenate([[0], counts[:causal].cumsum()]) for counts in (queries, keys)]
        # Everything travels to the device at once.
        whole = torch.from_numpy(np.concatenate([slots, *bounds, keys, pages.ravel()])).to(device, non_blocking=True)
        self.slots, small = whole[: len(slots)], whole[len(slots) :].int()  # an index into memory must be long
        query_bounds, key_bounds, self._keys, flat = small.split([causal + 1, causal + 1, len(spans), pages.size])
        self._pages = flat.view(pages.shape)
        self._texts = _Texts(
            size=int(queries[:causal].sum()),
            query_bounds=query_bounds,
            key_bounds=key_bounds,
            keys=self._keys[:causal],
            pages=self._pages[:causal],
            most_queries=int(queries[:causal].max(initial=0)),
            most_keys=int(keys[:causal].max(initial=0)),
        )
        self._causal = causal
        self._arranged: dict[bool, list[_Texts | _Gathered]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        self.memory.write(layer, self.slots, key, value)
        keys, values = self.memory.paged(layer)
        asked = query[0].transpose(0, 1)  # [T, heads, width]
        parts = self._parts(kernel_serves(asked, values))
        sizes = [part.size for part in parts]
        out = [
            part.attend(queries, keys, values, scale, window)
            for part, queries in zip(parts, asked.split(sizes), strict=True)
        ]
        return (out[0] if len(out) == 1 else torch.cat(out)).unsqueeze(0)

    def _parts(self, kernel: bool) -> "list[_Texts | _Gathered]":
        """Which of the two ways each span goes: the same in every layer, or nearly."""
        if kernel not in self._arranged:
            by_kernel = self._causal if kernel else 0
            parts: list[_Texts | _Gathered] = [self._texts] if by_kernel else []
            for first, last in _alike(self.spans, by_kernel):
                page_numbers, lengths = self._pages[first:last], self._keys[first:last]
                parts.append(_Gathered(self.spans[first:last], page_numbers, lengths, self.memory.page_size))
            self._arranged[kernel] = parts
        return self._arranged[kernel]


@dataclass(frozen=True)
class _Texts:
    """Spans that see all before them, as the kernel is told of them; all indices in 32 bits."""

    size: int  # queries
    query_bounds: Tensor  # [spans + 1]
    key_bounds: Tensor  # [spans + 1], which the kernel demands and then passes over for `keys` and `pages`
    keys: Tensor  # [spans], how many
    pages: Tensor  # [spans, pages]
    most_queries: int
    most_keys: int  # or more

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query [T, heads, width], keys and values [pages, page size, key heads, width] -> [T, heads, width]."""
        if window is not None:
            reach = (window - 1, 0)  # to the left and right of a query itself
        elif self.most_queries == 1:
            reach = (-1, -1)  # the same for a last token, and heads that share a key head are then computed together
        else:
            reach = (-1, 0)
        out = varlen_attn(
            query,
            keys,
            values,
            self.query_bounds,
            self.key_bounds,
            self.most_queries,
            self.most_keys,
            scale=scale,
            window_size=reach,
            enable_gqa=True,
            seqused_k=self.keys,
            block_table=self.pages,
            # Left to itself the kernel may split the keys, and with pages loses rows then: pytorch issue 194167.
            num_splits=1,
        )
        assert isinstance(out, Tensor)
        return out


class CannotReplay(RuntimeError):
    """Of a step that cannot be recorded and replayed."""


class DecodingAttention:
    """Single tokens at the ends of their rows, told of by tensors alone.

    What is done, and with which arguments, depends on the tensors' shapes and not on what they hold.
    """

    def __init__(self, memory: Memory, lengths: Tensor, pages: Tensor) -> None:
        """lengths [rows], pages [rows, most], both long and on the device"""
        self._memory = memory
        rows, size = len(lengths), memory.page_size
        last = lengths - 1
        self._slots = pages.gather(1, (last // size)[:, None])[:, 0] * size + last % size
        bounds = torch.arange(rows + 1, device=lengths.device, dtype=torch.int32)
        self._texts = _Texts(
            size=rows,
            query_bounds=bounds,
            key_bounds=torch.cat([bounds[:1], lengths.cumsum(0).int()]),
            keys=lengths.int(),
            pages=pages.int(),
            most_queries=1,
            most_keys=pages.shape[1] * size,
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        self._memory.write(layer, self._slots, key, value)
        keys, values = self._memory.paged(layer)
        asked = query[0].transpose(0, 1)  # [T, heads, width]
        if not kernel_serves(asked, values):  # the other way lays out masks by what is in them
            raise CannotReplay("its attention does not go by the kernel that reads pages")
        return self._texts.attend(asked, keys, values, scale, window).unsqueeze(0)


class _Gathered:
    """Spans of equally many queries, their keys copied side by side."""

    def __init__(self, spans: Sequence[Span], pages: Tensor, keys: Tensor, page_size: int) -> None:
        """pages [spans, pages], keys [spans], how many"""
        self.spans = spans
        self.queries = len(spans[0])
        self.size = len(spans) * self.queries
        self.keys = max(span.last for span in spans)
        # A shorter row repeats its last key, for what is masked away must be a number too, and memory may hold none.
        place = torch.arange(self.keys, device=keys.device).minimum(keys[:, None] - 1)  # [spans, keys]
        self.slots = (pages.gather(1, place // page_size) * page_size + place % page_size).flatten()
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
        """query [T, heads, width], keys and values [pages, page size, key heads, width] -> [T, heads, value width]."""
        n, t, heads, key_heads = len(self.spans), self.queries, query.shape[1], keys.shape[2]
        groups = heads // key_heads
        key, value = (
            every.flatten(0, 1).index_select(0, self.slots).view(n, self.keys, key_heads, -1).transpose(1, 2)
            for every in (keys, values)
        )  # [n, key heads, keys, width]
        # Heads that share a key head become more queries of it.
        asked = query.view(n, t, key_heads, groups, -1).permute(0, 2, 3, 1, 4).reshape(n, key_heads, groups * t, -1)
        mask = self._mask(window, groups, query.dtype)
        out = scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scale)
        return out.view(n, key_heads, groups, t, -1).permute(0, 3, 1, 2, 4).reshape(n * t, heads, -1)

    def _mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """[spans, 1, groups * queries, keys], additive."""
        if window is not None and window >= self.keys:
            window = None
        if (window, groups) not in self._masks:
            visible = np.zeros((len(self.spans), 1, self.queries, self.keys), np.bool_)
            for row, span in zip(visible, self.spans, strict=True):
                row[0, :, : span.last] = span.visible(window)
            hidden = torch.from_numpy(~visible).to(self.slots.device).repeat(1, 1, groups, 1)
            stride = -(-self.keys // ALIGNED) * ALIGNED
            mask = torch.zeros((*hidden.shape[:3], stride), dtype=dtype, device=hidden.device)[..., : self.keys]
            self._masks[window, groups] = mask.masked_fill_(hidden, torch.finfo(dtype).min)
        return self._masks[window, groups]


def kernel_serves(query: Tensor, values: Tensor) -> bool:
    """query [T, heads, width], values [pages, page size, key heads, width]"""
    width = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and width == values.shape[-1]
        and width % 8 == 0
        and width <= WIDEST
        and values.shape[1] % PAGE == 0
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


def _alike(spans: Sequence[Span], start: int) -> list[tuple[int, int]]:
    """Stretches of spans from `start` on: single tokens together, all else alone."""
    stretches: list[tuple[int, int]] = []
    for place in range(start, len(spans)):
        if place > start and len(spans[place]) == len(spans[place - 1]) == 1:
            stretches[-1] = (stretches[-1][0], place + 1)
        else:
            stretches.append((place, place + 1))
    return stretches
