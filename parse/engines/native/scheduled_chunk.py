"""One forward pass: which tokens of which contexts it computes, laid out in a single row.

A span is a stretch of a request's row: first the tokens of its context, then the nodes of the tree that hangs on it.
Token k of a context sees those up to itself; a node sees as much of the context as its root hangs on, and within the
tree what the tree says. So any span can be computed once all before it are: a prompt and a tree alike are cut to
measure.
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
    """Entries `first` to `last` of a request's row. A chain of nodes is given as mere token ids."""

    sequence: SequenceState
    tree: TokenTree | Sequence[int]
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @cached_property
    def is_causal(self) -> bool:
        """Does every entry see all before it?"""
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
        nodes = self.tree.visible_context(context_length) + self.tree.depth
        tree_positions = nodes[max(self.start - context_length, 0) : self.end - context_length]
        return [*range(self.start, min(self.end, context_length)), *tree_positions.tolist()]

    def visibility(self, window: int | None) -> NDArray[np.bool_]:
        """[entries, keys]: what each entry sees of the row up to `last`, in a layer with that sliding window."""
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
            rows = slice(max(context_length - self.start, 0), None)
            nodes = np.arange(start, self.end - context_length)
            visible[rows, :context_length] &= (
                np.arange(context_length) < tree.visible_context(context_length)[nodes, None]
            )
            visible[rows, context_length:] &= nodes[:, None] < tree.end[: self.end - context_length]
        if window is not None:
            visible &= key_positions[self.start :, None] - key_positions < window
        return visible
