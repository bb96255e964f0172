"""The keys and values of all contexts: per layer, two tensors of token slots.

Where somebody foresees the model by its hidden states, these lie beside them: whoever finds a beginning computed finds
its features too.
"""

from collections.abc import Callable, Sequence

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
        self._by_head: dict[int, tuple[Tensor, Tensor]] = {}  # the same, seen as models shape it
        self.features: Tensor | None = None  # [slots, width]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts what a step computed, [1, heads, T, width], where it belongs.

        Returns the layer's whole memory, [1, heads, slots, width].
        """
        if layer not in self.keys:
            self.keys[layer], self.values[layer] = self._empty(keys), self._empty(values)
            self._by_head[layer] = _by_head(self.keys[layer]), _by_head(self.values[layer])
        rows = self._by_head[layer]
        rows[0].index_copy_(2, slots, keys)
        rows[1].index_copy_(2, slots, values)
        return rows

    def note(self, slots: Sequence[int], features: Tensor) -> None:
        """features [T, width], of the tokens in those slots."""
        if self.features is None:
            self.features = features.new_zeros(self.pages * self.page_size, features.shape[-1])
        self.features[torch.tensor(slots, device=features.device)] = features

    def paged(self, layer: int) -> tuple[Tensor, Tensor]:
        """[pages, page size, heads, width]"""
        keys, values = self.keys[layer], self.values[layer]
        return keys.unflatten(0, (self.pages, -1)), values.unflatten(0, (self.pages, -1))

    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` slots of a page into another page."""
        self._each(lambda slots: self._page(slots, target)[:count].copy_(self._page(slots, source)[:count]))

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Slots to other slots, all of them read before any is written."""

        def moved(slots: Tensor) -> None:
            slots[torch.tensor(targets, device=slots.device)] = slots[torch.tensor(sources, device=slots.device)]

        self._each(moved)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for tensors in (self.keys, self.values) for t in tensors.values())

    def _empty(self, like: Tensor) -> Tensor:
        """Zeros: what is masked away is multiplied all the same, and must be a number.

        On a CPU each head's keys lie together, for that is how they are read; kernels for GPUs want the heads side by
        side.
        """
        _, heads, _, width = like.shape
        slots = self.pages * self.page_size
        if like.device.type != "cpu":
            return torch.zeros(slots, heads, width, dtype=like.dtype, device=like.device)
        # NumPy's zeros come from the system, which gives memory only when something is first written there.
        size = slots * heads * width * like.element_size()
        raw = torch.from_numpy(np.zeros(size + CACHE_LINE, np.uint8))
        start = -raw.data_ptr() % CACHE_LINE
        return raw[start : start + size].view(like.dtype).view(heads, slots, width).transpose(0, 1)

    def _page(self, slots: Tensor, page: int) -> Tensor:
        return slots[page * self.page_size : (page + 1) * self.page_size]

    def _each(self, change: Callable[[Tensor], object]) -> None:
        for tensors in (self.keys, self.values):
            for slots in tensors.values():
                change(slots)
        if self.features is not None:
            change(self.features)


def _by_head(slots: Tensor) -> Tensor:
    return slots.transpose(0, 1).unsqueeze(0)
