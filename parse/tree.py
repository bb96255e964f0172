"""The token tree: everything a model is asked to run, laid out so that one comparison says who sees whom.

Nodes stand in preorder, and `end[j]` is one past the last node of j's subtree. Then

    visible(q, k)  =  k <= q < end[k]

holds exactly when k is q itself or one of its ancestors. A node's position is its depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenTree:
    tokens: Ints  # [T]
    end: Ints  # [T]
    depth: Ints  # [T], 0 at the root

    def __len__(self) -> int:
        return len(self.tokens)

    def visible(self) -> NDArray[np.bool_]:
        """[T, T], True where the row's node sees the column's."""
        node = np.arange(len(self))
        return (node <= node[:, None]) & (node[:, None] < self.end)


def chain(tokens: Sequence[int]) -> TokenTree:
    return probed(tokens, cuts=(), suffix=())


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
