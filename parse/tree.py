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

    def seen(self, context: int) -> Ints:
        """[T], how many tokens of a context of that length each node sees."""
        return np.full(len(self), context) if self.at is None else self.at

    def visible(self) -> NDArray[np.bool_]:
        """[T, T], True where the row's node sees the column's."""
        node = np.arange(len(self))
        return (node <= node[:, None]) & (node[:, None] < self.end)


def child(nodes: TokenTree | Sequence[int], node: int, token: int) -> int | None:
    """The node below that one which holds the token. Of a chain, mere token ids will do."""
    if not isinstance(nodes, TokenTree):
        return node + 1 if node + 1 < len(nodes) and nodes[node + 1] == token else None
    below = node + 1
    while below < nodes.end[node]:
        if nodes.tokens[below] == token:
            return below
        below = int(nodes.end[below])
    return None


def chain(tokens: Sequence[int]) -> TokenTree:
    size = len(tokens)
    return TokenTree(np.asarray(tokens, np.int64), np.full(size, size), np.arange(size))


def probes(at: Sequence[int], suffix: Sequence[int]) -> TokenTree:
    """A copy of `suffix` hung on the first c tokens of the context, for each c in `at`, blind to one another."""
    width = len(suffix)
    starts = width * np.arange(len(at))
    return TokenTree(
        tokens=np.tile(np.asarray(suffix, np.int64), len(at)),
        end=np.repeat(starts + width, width),
        depth=np.tile(np.arange(width), len(at)),
        at=np.repeat(np.asarray(at, np.int64), width),
    )


def proposals(tokens: Sequence[int], parents: Sequence[int]) -> tuple[TokenTree, Ints]:
    """The tree in which node j hangs below `parents[j]`, an earlier one, or is a root (-1).

    Comes with the place of each given node in the tree's preorder.
    """
    size = len(tokens)
    below = np.ones(size, np.int64)  # nodes in each subtree
    for node in range(size - 1, -1, -1):
        if not -1 <= parents[node] < node:
            raise ValueError(f"the parent of node {node} must stand before it, got {parents[node]}")
        if parents[node] >= 0:
            below[parents[node]] += below[node]
    place, depth = np.zeros(size, np.int64), np.zeros(size, np.int64)
    free = np.zeros(size + 1, np.int64)  # where the next child goes; the last entry serves the roots
    for node in range(size):
        parent = parents[node]
        place[node] = free[parent]
        free[parent] += below[node]
        free[node] = place[node] + 1
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    tree = TokenTree(np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64))
    tree.tokens[place], tree.end[place], tree.depth[place] = tokens, place + below, depth
    return tree, place


def probed(trunk: Sequence[int], cuts: Sequence[int], suffix: Sequence[int]) -> TokenTree:
    """A trunk with a copy of `suffix` behind its first c tokens, for every cut c.

    The trunk comes first and its deepest probe next: still preorder, and cutting the trunk short needs no gather.
    `probe_ends` says where the copies stand.
    """
    size, width = len(trunk), len(suffix)
    if any(not 0 < cut <= size for cut in cuts):
        raise ValueError(f"cuts must lie in 1..{size}, got {list(cuts)}")
    deepest_first = np.sort(np.asarray(cuts, dtype=np.int64))[::-1]
    # Probes hang below trunk node j when their cut lies beyond it: those laid out first.
    below = np.searchsorted(-deepest_first, -np.arange(size), side="left")
    starts = size + width * np.arange(len(deepest_first))
    return TokenTree(
        tokens=np.concatenate([np.asarray(trunk, np.int64), np.tile(np.asarray(suffix, np.int64), len(cuts))]),
        end=np.concatenate([size + width * below, np.repeat(starts + width, width)]),
        depth=np.concatenate([np.arange(size), (deepest_first[:, None] + np.arange(width)).ravel()]),
    )


def probe_ends(trunk: int, cuts: Sequence[int], width: int) -> Ints:
    """For each cut, in the order given, the node at the end of its probe: where the model answers."""
    rank = np.empty(len(cuts), dtype=np.int64)
    rank[np.argsort(-np.asarray(cuts, np.int64), kind="stable")] = np.arange(len(cuts))
    return trunk + width * (rank + 1) - 1
