"""Where the suffixes end in a tree that verifies every prefix of a draft."""

from collections.abc import Sequence

import numpy as np

from parse.tree import Ints


def suffix_end_nodes(trunk_length: int, prefix_lengths: Sequence[int], width: int) -> Ints:
    """Returns, in the order of `prefix_lengths`, the last node of each suffix of `parse.tree.trunk_with_suffixes`.

    The model answers there.
    """
    rank = np.empty(len(prefix_lengths), dtype=np.int64)
    rank[np.argsort(-np.asarray(prefix_lengths, np.int64), kind="stable")] = np.arange(len(prefix_lengths))
    return trunk_length + width * (rank + 1) - 1
