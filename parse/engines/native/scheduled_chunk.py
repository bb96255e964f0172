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

from parse.engines.native.prefix_cache import Context
from parse.tree import TokenTree


@dataclass(frozen=True)
class Span:
    """Entries `first` to `last` of a request's row. A chain of nodes is given as mere token ids."""

    context: Context
    tree: TokenTree | Sequence[int]
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @cached_property
    def causal(self) -> bool:
        """Does every entry see all before it?"""
        return not isinstance(self.tree, TokenTree) or self.last <= len(self.context.tokens)

    def tokens(self) -> list[int]:
        known = len(self.context.tokens)
        nodes = self.tree.tokens.tolist() if isinstance(self.tree, TokenTree) else list(self.tree)
        return (
            self.context.tokens[self.first : self.last] + nodes[max(self.first - known, 0) : max(self.last - known, 0)]
        )

    def positions(self) -> list[int]:
        known = len(self.context.tokens)
        if self.causal:
            return list(range(self.first, self.last))
        assert isinstance(self.tree, TokenTree)
        nodes = self.tree.seen(known) + self.tree.depth
        inside = nodes[max(self.first - known, 0) : self.last - known]
        return [*range(self.first, min(self.last, known)), *inside.tolist()]

    def visible(self, window: int | None) -> NDArray[np.bool_]:
        """[entries, keys]: what each entry sees of the row up to `last`, in a layer with that sliding window."""
        known = len(self.context.tokens)
        key, entry = np.arange(self.last), np.arange(self.first, self.last)
        visible = key <= entry[:, None]
        key_positions = key
        if not self.causal:
            tree = self.tree
            assert isinstance(tree, TokenTree)
            key_positions = np.concatenate([np.arange(known), (tree.seen(known) + tree.depth)[: self.last - known]])
            start = max(self.first - known, 0)
            rows = slice(max(known - self.first, 0), None)
            nodes = np.arange(start, self.last - known)
            visible[rows, :known] &= np.arange(known) < tree.seen(known)[nodes, None]
            visible[rows, known:] &= nodes[:, None] < tree.end[: self.last - known]
        if window is not None:
            visible &= key_positions[self.first :, None] - key_positions < window
        return visible
