"""The token tree: everything a model is asked to run, laid out so that one comparison says who sees whom.

Nodes stand in preorder, and `end[j]` is one past the last node of j's subtree. Then

    visible(q, k)  =  k <= q < end[k]

holds exactly when k is q itself or one of its ancestors. Several roots make a forest, under the same comparison. A root
hangs on a cached context, at its end or somewhere before it, and with all below it sees the context up to there; a
node's position is the length of what its root sees, plus its depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MASK = -1
"""Stands in a node for no token: the model is only to say what it foresees there."""


@dataclass(frozen=True)
class TokenTree:
    tokens: Ints  # [T]
    end: Ints  # [T]
    depth: Ints  # [T], 0 at the root
    at: Ints | None = None  # [T], how many tokens of the context the node sees; None: all of them

    def __len__(self) -> int:
        return len(self.tokens)

    def visible_context(self, context_length: int) -> Ints:
        """[T], how many tokens of a context of that length each node sees."""
        return np.full(len(self), context_length) if self.at is None else self.at

    def visible(self) -> NDArray[np.bool_]:
        """[T, T], True where the row's node sees the column's."""
        node = np.arange(len(self))
        return (node <= node[:, None]) & (node[:, None] < self.end)


def child(nodes: TokenTree | Sequence[int], node: int, token: int) -> int | None:
    """The node below that one which holds the token. Of a chain, mere token ids will do."""
    if not isinstance(nodes, TokenTree):
        return node + 1 if node + 1 < len(nodes) and nodes[node + 1] == token else None
    candidate = node + 1
    while candidate < nodes.end[node]:
        if nodes.tokens[candidate] == token:
            return candidate
        candidate = int(nodes.end[candidate])
    return None


def chain(tokens: Sequence[int]) -> TokenTree:
    size = len(tokens)
    return TokenTree(np.asarray(tokens, np.int64), np.full(size, size), np.arange(size))


def suffix_forest(prefix_lengths: Sequence[int], suffix: Sequence[int]) -> TokenTree:
    """A copy of `suffix` hung on the first c tokens of the context, for each c in `at`, blind to one another."""
    width = len(suffix)
    starts = width * np.arange(len(prefix_lengths))
    return TokenTree(
        tokens=np.tile(np.asarray(suffix, np.int64), len(prefix_lengths)),
        end=np.repeat(starts + width, width),
        depth=np.tile(np.arange(width), len(prefix_lengths)),
        at=np.repeat(np.asarray(prefix_lengths, np.int64), width),
    )


def tree_from_parents(tokens: Sequence[int], parents: Sequence[int]) -> tuple[TokenTree, Ints]:
    """The tree in which node j hangs below `parents[j]`, an earlier one, or is a root (-1).

    Comes with the place of each given node in the tree's preorder.
    """
    size = len(tokens)
    subtree_size = np.ones(size, np.int64)  # nodes in each subtree
    for node in range(size - 1, -1, -1):
        if not -1 <= parents[node] < node:
            raise ValueError(f"the parent of node {node} must stand before it, got {parents[node]}")
        if parents[node] >= 0:
            subtree_size[parents[node]] += subtree_size[node]
    preorder, depth = np.zeros(size, np.int64), np.zeros(size, np.int64)
    next_free = np.zeros(size + 1, np.int64)  # where the next child goes; the last entry serves the roots
    for node in range(size):
        parent = parents[node]
        preorder[node] = next_free[parent]
        next_free[parent] += subtree_size[node]
        next_free[node] = preorder[node] + 1
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    tree = TokenTree(np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64))
    tree.tokens[preorder], tree.end[preorder], tree.depth[preorder] = tokens, preorder + subtree_size, depth
    return tree, preorder
