"""The token tree: everything that a model computes.

Its layout lets one comparison decide which node sees which. The nodes are in preorder, and `end[j]` is one past the
last node of the subtree of j. Then

    visible(q, k)  =  k <= q < end[k]

holds exactly when k is q itself or one of its ancestors. Several roots form a forest, under the same comparison. A root
is attached to a cached context, at its end or at an earlier position. All nodes of its tree see the context up to that
position. The position of a node is the number of context tokens that it sees, plus its depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MASK = -1
"""A node with this value holds no token: the model only predicts a token there."""


@dataclass(frozen=True)
class TokenTree:
    tokens: Ints  # [T]
    end: Ints  # [T]
    depth: Ints  # [T], 0 at the root
    at: Ints | None = None  # [T], how many tokens of the context the node sees; None: all of them

    def __len__(self) -> int:
        return len(self.tokens)

    def visible_context(self, context_length: int) -> Ints:
        """Returns how many tokens of a context of that length each node sees, [T]."""
        return np.full(len(self), context_length) if self.at is None else self.at

    def visible(self) -> NDArray[np.bool_]:
        """Returns whether the node of a row sees the node of a column, [T, T]."""
        node = np.arange(len(self))
        return (node <= node[:, None]) & (node[:, None] < self.end)


def child(nodes: TokenTree | Sequence[int], node: int, token: int) -> int | None:
    """Returns the child of `node` that holds `token`, or None.

    A chain may be passed as its token ids.
    """
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
    """Returns copies of `suffix`, one attached at each prefix length of the context.

    The copies do not see each other.
    """
    width = len(suffix)
    starts = width * np.arange(len(prefix_lengths))
    return TokenTree(
        tokens=np.tile(np.asarray(suffix, np.int64), len(prefix_lengths)),
        end=np.repeat(starts + width, width),
        depth=np.tile(np.arange(width), len(prefix_lengths)),
        at=np.repeat(np.asarray(prefix_lengths, np.int64), width),
    )


def trunk_with_suffixes(trunk: Sequence[int], prefix_lengths: Sequence[int], suffix: Sequence[int]) -> TokenTree:
    """Returns a trunk with one copy of `suffix` per prefix length.

    The copy of prefix length n follows the first n tokens of the trunk. In the tree, the trunk comes first, then the
    suffix of the longest prefix. The suffix of the shortest prefix comes last.
    """
    size, width = len(trunk), len(suffix)
    if any(not 0 < length <= size for length in prefix_lengths):
        raise ValueError(f"prefix lengths must lie in 1..{size}, got {list(prefix_lengths)}")
    descending = np.sort(np.asarray(prefix_lengths, dtype=np.int64))[::-1]
    # The subtree of trunk node j holds the suffixes of all prefixes longer than j, which come first.
    suffixes_below = np.searchsorted(-descending, -np.arange(size), side="left")
    starts = size + width * np.arange(len(descending))
    return TokenTree(
        tokens=np.concatenate([np.asarray(trunk, np.int64), np.tile(np.asarray(suffix, np.int64), len(descending))]),
        end=np.concatenate([size + width * suffixes_below, np.repeat(starts + width, width)]),
        depth=np.concatenate([np.arange(size), (descending[:, None] + np.arange(width)).ravel()]),
    )


def tree_from_parents(tokens: Sequence[int], parents: Sequence[int]) -> tuple[TokenTree, Ints]:
    """Returns the tree in which the parent of node j is `parents[j]`.

    A parent is an earlier node, or -1 for a root. Also returns the index of each node in the preorder of the tree.
    """
    size = len(tokens)
    subtree_size = np.ones(size, np.int64)  # nodes in each subtree
    for node in range(size - 1, -1, -1):
        if not -1 <= parents[node] < node:
            raise ValueError(f"the parent of node {node} must come before it, got {parents[node]}")
        if parents[node] >= 0:
            subtree_size[parents[node]] += subtree_size[node]
    preorder, depth = np.zeros(size, np.int64), np.zeros(size, np.int64)
    next_free = np.zeros(size + 1, np.int64)  # the index of the next child; the last entry is for the roots
    for node in range(size):
        parent = parents[node]
        preorder[node] = next_free[parent]
        next_free[parent] += subtree_size[node]
        next_free[node] = preorder[node] + 1
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    tree = TokenTree(np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64))
    tree.tokens[preorder], tree.end[preorder], tree.depth[preorder] = tokens, preorder + subtree_size, depth
    return tree, preorder
