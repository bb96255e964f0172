"""The keys and values of all contexts: per layer, two tensors of token slots."""

from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

CACHE_LINE = 64  # bytes; vectors that begin anywhere else cost attention a twentieth


class Memory:
    """A layer's tensors are made when it first writes, for only then is the shape of its keys and values known."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self.keys: dict[int, Tensor] = {}  # per layer, [slots, key heads, width]
        self.values: dict[int, Tensor] = {}
        self._paged: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts what a step computed, [T, heads, width], where it belongs.

        Returns the layer's whole memory, [pages, page size, heads, width].
        """
        if layer not in self.keys:
            self.keys[layer], self.values[layer] = self._empty(keys), self._empty(values)
            self._paged[layer] = self._in_pages(self.keys[layer]), self._in_pages(self.values[layer])
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)
        return self._paged[layer]

    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` slots of a page into another page."""
        self._each(lambda slots: self._page(slots, target)[:count].copy_(self._page(slots, source)[:count]))

    def move(self, slots_from: Tensor, slots_to: Tensor) -> None:
        self._each(lambda slots: slots.index_copy_(0, slots_to, slots[slots_from]))

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for tensors in (self.keys, self.values) for t in tensors.values())

    def _empty(self, like: Tensor) -> Tensor:
        """Zeros: what is masked away is multiplied all the same, and must be a number."""
        shape = (self.pages * self.page_size, *like.shape[1:])
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        # NumPy's zeros come from the system, which gives memory only when something is first written there.
        size = prod(shape) * like.element_size()
        raw = torch.from_numpy(np.zeros(size + CACHE_LINE, np.uint8))
        start = -raw.data_ptr() % CACHE_LINE
        return raw[start : start + size].view(like.dtype).view(shape)

    def _in_pages(self, slots: Tensor) -> Tensor:
        return slots.view(self.pages, self.page_size, *slots.shape[1:])

    def _page(self, slots: Tensor, page: int) -> Tensor:
        return slots[page * self.page_size : (page + 1) * self.page_size]

    def _each(self, change: Callable[[Tensor], object]) -> None:
        for tensors in (self.keys, self.values):
            for slots in tensors.values():
                change(slots)
