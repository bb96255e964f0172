import math
import random

import pytest

from training.confidence import (
    format_ratio,
    format_share,
    median_interval,
    rounds_interval,
    share_figures,
    throughput_ratio_interval,
    wilson_interval,
)


def test_wilson_intervals_equal_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3 (score).
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) is None


def test_the_bootstrap_interval_covers_the_true_ratio_in_most_runs():
    rng = random.Random(3)
    covered = 0
    for _ in range(60):
        sizes = [rng.uniform(50, 150) for _ in range(40)]
        fast = [size / 3 * rng.uniform(0.8, 1.2) for size in sizes]
        slow = [size * rng.uniform(0.8, 1.2) for size in sizes]
        interval = throughput_ratio_interval(sizes, fast, sizes, slow)
        assert interval is not None
        covered += interval[0] <= 3 <= interval[1]
    assert covered >= 50


def test_the_interval_of_a_median_covers_the_true_median_in_most_runs():
    rng = random.Random(4)
    covered = 0
    for _ in range(60):
        interval = median_interval([rng.lognormvariate(0, 1) for _ in range(50)])
        assert interval is not None
        covered += interval[0] <= 1 <= interval[1]
    assert covered >= 50


def test_one_problem_or_one_round_gives_no_interval():
    assert median_interval([1.0]) is None
    assert throughput_ratio_interval([1], [1], [1], [1]) is None
    assert rounds_interval([2.0]) is None


def test_the_interval_over_rounds_matches_a_calculation_by_hand():
    interval = rounds_interval([math.e, math.e**3])  # logarithms 1 and 3: mean 2, standard error 1
    assert interval is not None
    assert [math.log(bound) for bound in interval] == pytest.approx([2 - 12.706, 2 + 12.706])


def test_a_share_without_cases_is_null():
    assert share_figures("x", []) == {"x": None, "x_count": 0, "x_interval": None}
    figures = share_figures("x", [True, False])
    assert figures["x"] == 0.5 and figures["x_count"] == 2 and figures["x_interval"] == wilson_interval(1, 2)


def test_figures_are_shown_with_their_intervals():
    assert format_share(0.998, (0.989, 1.0)) == "99.8% (98.9 to 100.0)"
    assert format_ratio(3.0712, (2.975, 3.154)) == "3.07 (2.98 to 3.15)"
    assert format_ratio(1.0, None) == "1.00" and format_share(None, None) == ""
