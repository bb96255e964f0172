"""The tree that verifies every prefix of a draft in one pass: a trunk with a suffix after each prefix.

The engine does not need it: there the draft is in the KV cache, and the suffixes alone are a forest.
"""

from collections.abc import Sequence

import numpy as np

from parse.tree import Ints, TokenTree


def trunk_with_suffixes(trunk: Sequence[int], prefix_lengths: Sequence[int], suffix: Sequence[int]) -> TokenTree:
    """Returns a trunk with a copy of `suffix` after its first c tokens, for every prefix length c.

    The trunk comes first, and then the suffix of the longest prefix. This is still preorder, and the trunk can be
    shortened without a gather. `suffix_end_nodes` says where the copies end.
    """
    size, width = len(trunk), len(suffix)
    if any(not 0 < length <= size for length in prefix_lengths):
        raise ValueError(f"prefix lengths must lie in 1..{size}, got {list(prefix_lengths)}")
    descending = np.sort(np.asarray(prefix_lengths, dtype=np.int64))[::-1]
    # The subtree of trunk node j holds the suffixes of all prefixes longer than j, which come first.
    suffixes_below = np.searchsorted(-descending, -np.arange(size), side="left")
    starts = size + width * np.arange(len(descending))
    return TokenTree(
        tokens=np.concatenate(
            [np.asarray(trunk, np.int64), np.tile(np.asarray(suffix, np.int64), len(prefix_lengths))]
        ),
        end=np.concatenate([size + width * suffixes_below, np.repeat(starts + width, width)]),
        depth=np.concatenate([np.arange(size), (descending[:, None] + np.arange(width)).ravel()]),
    )


def suffix_end_nodes(trunk_length: int, prefix_lengths: Sequence[int], width: int) -> Ints:
    """Returns, in the order of `prefix_lengths`, the last node of each suffix, where the model answers."""
    rank = np.empty(len(prefix_lengths), dtype=np.int64)
    rank[np.argsort(-np.asarray(prefix_lengths, np.int64), kind="stable")] = np.arange(len(prefix_lengths))
    return trunk_length + width * (rank + 1) - 1
