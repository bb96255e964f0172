"""The keys and values of all sequences: per layer, two tensors with one slot per token.

`PrefixCache` decides which sequence has which blocks, and which blocks are freed when the cache is full.

If a proposer reads hidden states of the model, these are cached in the same slots. A request that finds a computed
prefix then also finds its hidden states.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

CACHE_LINE = 64  # bytes; attention takes 5% longer if vectors are not aligned to it


class KVCache:
    """The tensors that hold keys and values.

    The tensors of a layer are allocated at its first write, when the shapes of its keys and values are known.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.keys: dict[int, Tensor] = {}  # per layer, [slots, key heads, head size]
        self.values: dict[int, Tensor] = {}
        self._by_head: dict[int, tuple[Tensor, Tensor]] = {}  # views of both in the layout that models use
        self.aux_hidden_states: Tensor | None = None  # [slots, width]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of a step, [1, heads, T, head size], to their slots.

        Returns all keys and values of the layer, [1, heads, slots, head size].
        """
        if layer not in self.keys:
            self.keys[layer], self.values[layer] = self._allocate(keys), self._allocate(values)
            self._by_head[layer] = _by_head(self.keys[layer]), _by_head(self.values[layer])
        views = self._by_head[layer]
        views[0].index_copy_(2, slots, keys)
        views[1].index_copy_(2, slots, values)
        return views

    def write_aux_hidden_states(self, slots: Sequence[int], hidden_states: Tensor) -> None:
        """Writes hidden states, [T, width], of the tokens in these slots."""
        if self.aux_hidden_states is None:
            self.aux_hidden_states = hidden_states.new_zeros(self.num_blocks * self.block_size, hidden_states.shape[-1])
        self.aux_hidden_states[torch.tensor(slots, device=hidden_states.device)] = hidden_states

    def as_blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, [blocks, block size, heads, head size]."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.unflatten(0, (self.num_blocks, -1)), values.unflatten(0, (self.num_blocks, -1))

    def copy_block(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` slots of a block into another block."""
        self._for_each_tensor(
            lambda slots: self._block(slots, target)[:count].copy_(self._block(slots, source)[:count])
        )

    def move_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Moves slots to other slots. All of them are read before any is written."""

        def move(slots: Tensor) -> None:
            slots[torch.tensor(targets, device=slots.device)] = slots[torch.tensor(sources, device=slots.device)]

        self._for_each_tensor(move)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for tensors in (self.keys, self.values) for t in tensors.values())

    def _allocate(self, like: Tensor) -> Tensor:
        """Allocates a tensor of zeros.

        Attention multiplies masked entries too, so they must be finite.

        On a CPU the keys of a head are contiguous, because attention reads them in this order. Kernels for GPUs expect
        the heads of a token next to each other.
        """
        _, heads, _, width = like.shape
        slots = self.num_blocks * self.block_size
        if like.device.type != "cpu":
            return torch.zeros(slots, heads, width, dtype=like.dtype, device=like.device)
        # The system provides the memory of NumPy's zeros only when it is first written.
        size = slots * heads * width * like.element_size()
        raw = torch.from_numpy(np.zeros(size + CACHE_LINE, np.uint8))
        start = -raw.data_ptr() % CACHE_LINE
        return raw[start : start + size].view(like.dtype).view(heads, slots, width).transpose(0, 1)

    def _block(self, slots: Tensor, block_id: int) -> Tensor:
        return slots[block_id * self.block_size : (block_id + 1) * self.block_size]

    def _for_each_tensor(self, change: Callable[[Tensor], object]) -> None:
        for tensors in (self.keys, self.values):
            for slots in tensors.values():
                change(slots)
        if self.aux_hidden_states is not None:
            change(self.aux_hidden_states)


def _by_head(slots: Tensor) -> Tensor:
    return slots.transpose(0, 1).unsqueeze(0)
