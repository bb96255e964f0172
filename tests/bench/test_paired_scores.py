"""The comparison of scores agrees with published tables, and its interval covers the loss as often as it says."""

import random

import pytest

from bench.paired_scores import PairedScores, central_probability, quantile

# Two-sided 95% quantiles of Student's t, from a printed table: degrees of freedom and t.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 79: 1.990, 120: 1.980}


@pytest.mark.parametrize("degrees_of_freedom", TABLE)
def test_the_quantiles_are_those_of_a_printed_table(degrees_of_freedom):
    assert quantile(0.95, degrees_of_freedom) == pytest.approx(TABLE[degrees_of_freedom], abs=5e-4)
    assert central_probability(TABLE[degrees_of_freedom], degrees_of_freedom) == pytest.approx(0.95, abs=1e-4)


def test_the_figures_match_a_calculation_by_hand():
    # The losses are 2, 0, 1 and 1: their mean is 1 and their variance 2/3, so the standard error is sqrt(1/6).
    paired = PairedScores.of([9, 5, 8, 7], [7, 5, 7, 6], max_loss=9)
    assert paired.loss == 1
    assert paired.interval() == pytest.approx((1 - 3.182 * 0.40825, 1 + 3.182 * 0.40825), abs=1e-3)
    # With 3 degrees of freedom, t = 2.449 is exceeded with a probability of 4.59% on each side.
    assert paired.p_value() == pytest.approx(0.0917, abs=1e-4)


def test_the_interval_covers_the_loss_and_no_loss_is_rarely_taken_for_one():
    generator = random.Random(3)
    covered = significant = 0
    num_trials = 1000
    for _ in range(num_trials):
        base = [generator.randint(3, 10) for _ in range(30)]
        with_loss = [score - generator.choice([0, 0, 0, 1, 2, -1]) for score in base]
        low, high = PairedScores.of(base, with_loss, 9).interval()
        covered += low <= 2 / 6 <= high
        without_loss = [score - generator.choice([0, 0, 1, -1]) for score in base]
        significant += PairedScores.of(base, without_loss, 9).p_value() < 0.05
    assert 0.93 < covered / num_trials < 0.97 and significant / num_trials < 0.065


def test_equal_scores_and_a_single_problem_prove_nothing():
    equal = PairedScores.of([5, 6, 7], [5, 6, 7], 9)
    assert (equal.loss, equal.p_value(), equal.interval()) == (0, 1.0, (-9, 9))
    single = PairedScores.of([9], [5], 9)
    assert (single.loss, single.p_value(), single.interval()) == (4, 1.0, (-9, 9))


def test_the_interval_stays_within_the_scale():
    low, high = PairedScores.of([10, 1], [1, 10], 9).interval()
    assert (low, high) == (-9, 9)
