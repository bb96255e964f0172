"""The part of a request that one forward pass computes.

The row of a request consists of the tokens of its sequence, followed by the nodes of the tree that is attached to them.
A chunk is a range of entries of this row. A token sees all tokens up to itself. A node sees the context up to the
position of its root, and its ancestors. No entry sees a later one, so a row can be computed in chunks of any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from parse.engines.native.prefix_cache import SequenceState
from parse.tree import TokenTree


@dataclass(frozen=True)
class ScheduledChunk:
    """Entries `start` to `end` of the row of a request.

    A chain of nodes is passed as its token ids.
    """

    sequence: SequenceState
    tree: TokenTree | Sequence[int]
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @cached_property
    def is_causal(self) -> bool:
        """Whether each entry sees all entries before it."""
        return not isinstance(self.tree, TokenTree) or self.end <= len(self.sequence.token_ids)

    def token_ids(self) -> list[int]:
        context_length = len(self.sequence.token_ids)
        nodes = self.tree.tokens.tolist() if isinstance(self.tree, TokenTree) else list(self.tree)
        return (
            self.sequence.token_ids[self.start : self.end]
            + nodes[max(self.start - context_length, 0) : max(self.end - context_length, 0)]
        )

    def positions(self) -> list[int]:
        context_length = len(self.sequence.token_ids)
        if self.is_causal:
            return list(range(self.start, self.end))
        assert isinstance(self.tree, TokenTree)
        positions = self.tree.visible_context(context_length) + self.tree.depth
        tree_positions = positions[max(self.start - context_length, 0) : self.end - context_length]
        return [*range(self.start, min(self.end, context_length)), *tree_positions.tolist()]

    def visibility(self, window: int | None) -> NDArray[np.bool_]:
        """Returns which keys up to `end` each entry sees, [entries, keys].

        `window` is the sliding window of the layer.
        """
        context_length = len(self.sequence.token_ids)
        key, entry = np.arange(self.end), np.arange(self.start, self.end)
        visible = key <= entry[:, None]
        key_positions = key
        if not self.is_causal:
            tree = self.tree
            assert isinstance(tree, TokenTree)
            key_positions = np.concatenate(
                [
                    np.arange(context_length),
                    (tree.visible_context(context_length) + tree.depth)[: self.end - context_length],
                ]
            )
            start = max(self.start - context_length, 0)
            node_rows = slice(max(context_length - self.start, 0), None)
            nodes = np.arange(start, self.end - context_length)
            visible[node_rows, :context_length] &= (
                np.arange(context_length) < tree.visible_context(context_length)[nodes, None]
            )
            visible[node_rows, context_length:] &= nodes[:, None] < tree.end[: self.end - context_length]
        if window is not None:
            visible &= key_positions[self.start :, None] - key_positions < window
        return visible
