"""Do counts look as if they came from a distribution?"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

ONE_IN_A_MILLION = 4.75  # standard deviations


def surprising(counts: ArrayLike, probabilities: Sequence[float]) -> bool:
    """Pearson's chi-square test; its quantile by Wilson and Hilferty's approximation. Rare cells are taken together."""
    observed, expected = np.asarray(counts, float), np.asarray(probabilities) * np.sum(counts)
    if (observed[expected == 0] > 0).any():
        return True
    common = expected >= 5
    rest = expected[~common].sum()
    observed = np.append(observed[common], observed[~common].sum())[: None if rest else -1]
    expected = np.append(expected[common], rest)[: None if rest else -1]
    freedom = len(expected) - 1
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + ONE_IN_A_MILLION * spread**0.5) ** 3
    return bool(((observed - expected) ** 2 / expected).sum() > quantile)
