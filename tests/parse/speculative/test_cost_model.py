import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.speculative.cost_model import StepCostModel

CPU = ((1, 4.5e-3), (16, 5.6e-3), (64, 8.4e-3))
tables = st.lists(
    st.tuples(st.integers(0, 9), st.floats(1e-4, 1.0)), min_size=1, max_size=8, unique_by=lambda row: row[0]
).map(lambda rows: [(2**order, seconds) for order, seconds in sorted(rows)])


def known(table):
    costs = StepCostModel()
    costs.initialize(table)
    return costs


def fed(costs, entries, seconds, passes, texts=1, tokens=1):
    for _ in range(passes):
        costs.passed(texts, entries, tokens, seconds)
    return costs


@given(tables, st.floats(1, 600))
def test_a_pass_takes_what_was_measured_and_between_two_sizes_a_share_of_both(table, entries):
    sizes, seconds = zip(*table, strict=True)
    rising = list(np.maximum.accumulate(seconds)) == list(seconds)
    for size, taken in table if rising else ():
        assert known(table).step_seconds(size) == pytest.approx(taken)
    if rising and entries <= sizes[-1]:
        assert known(table).step_seconds(entries) == pytest.approx(float(np.interp(entries, sizes, seconds)))
    assert known(table).step_seconds(entries) >= min(seconds)


def test_beyond_the_largest_size_passes_grow_as_between_the_last_two():
    assert known(CPU).step_seconds(160) == pytest.approx(8.4e-3 + 96 * (8.4e-3 - 5.6e-3) / 48)


@given(tables, st.floats(0, 300), st.floats(1, 300))
def test_nothing_is_ever_won_by_more_entries(table, entries, beside):
    costs = known(table)
    assert costs.added_seconds(entries, beside) >= 0
    assert costs.added_seconds(0, beside) == 0


def test_more_entries_take_what_the_larger_pass_takes_longer():
    assert known(CPU).added_seconds(24, 16) == pytest.approx(24 / 48 * (8.4e-3 - 5.6e-3))
    assert known([(size, 0.02) for size in (1, 8, 64)]).added_seconds(50, 3) == 0


def test_before_anybody_looked_at_the_clock_nothing_takes_time():
    assert StepCostModel().step_seconds(7) == StepCostModel().added_seconds(3, 4) == 0


def test_a_single_size_says_nothing_of_others():
    costs = fed(StepCostModel(), 5, 0.01, 3)
    assert costs.step_seconds(1) == costs.step_seconds(90) == pytest.approx(0.01)


def test_what_passes_take_now_replaces_what_they_took_when_tried():
    """A machine that others use as well became half as fast."""
    costs = known(CPU)
    for entries, seconds in CPU * 100:
        costs.record(1, entries, 1, 2 * seconds)
    for entries, seconds in CPU:
        assert costs.step_seconds(entries) == pytest.approx(2 * seconds, rel=0.02)


def test_sizes_near_each_other_are_taken_together():
    """Where the truth is a straight line they lie on it, whichever of them were met."""
    rng = random.Random(0)
    costs = known([(1, 0.005), (64, 0.005 + 63e-4)])
    for _ in range(2000):
        entries = rng.randint(1, 64)
        costs.record(1, entries, 1, 0.005 + (entries - 1) * 1e-4)
    for entries in (2, 7, 20, 33, 50):
        assert costs.step_seconds(entries) == pytest.approx(0.005 + (entries - 1) * 1e-4, rel=0.05)


def test_a_pass_that_was_held_up_counts_little_however_long_it_took():
    once, forever = known(CPU), known(CPU)
    once.record(1, 16, 1, 0.1)
    forever.record(1, 16, 1, 3600.0)
    assert once.step_seconds(16) == forever.step_seconds(16) < 1.2 * 5.6e-3


def test_a_usual_pass_is_what_passes_have_been_lately():
    costs = fed(StepCostModel(), 40, 0.01, 300, texts=8, tokens=20)
    assert (costs.num_seqs, costs.num_tokens, costs.num_output_tokens) == pytest.approx((8, 40, 20), rel=1e-3)
    fed(costs, 2, 0.01, 300, texts=2, tokens=2)
    assert (costs.num_seqs, costs.num_tokens, costs.num_output_tokens) == pytest.approx((2, 2, 2), rel=1e-3)
    mean = np.mean([1, 9])
    for _ in range(200):
        costs.record(1, 1, 1, 0.01)
        costs.record(1, 9, 1, 0.01)
    assert abs(costs.num_tokens - mean) < 0.5
