import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.speculative.cost_model import StepCostModel

CPU = ((1, 4.5e-3), (16, 5.6e-3), (64, 8.4e-3))
tables = st.lists(
    st.tuples(st.integers(0, 9), st.floats(1e-4, 1.0)), min_size=1, max_size=8, unique_by=lambda row: row[0]
).map(lambda table: [(2**order, seconds) for order, seconds in sorted(table)])


def initialized(table):
    cost_model = StepCostModel()
    cost_model.initialize(table)
    return cost_model


def record_steps(cost_model, num_tokens, seconds, num_steps, num_seqs=1, num_output_tokens=1):
    for _ in range(num_steps):
        cost_model.record(num_seqs, num_tokens, num_output_tokens, seconds)
    return cost_model


def means_of(cost_model):
    return cost_model.num_seqs, cost_model.num_tokens, cost_model.num_output_tokens


@given(tables, st.floats(1, 600))
def test_step_seconds_are_interpolated_between_the_measured_sizes(table, num_tokens):
    sizes, seconds = zip(*table, strict=True)
    rising = list(np.maximum.accumulate(seconds)) == list(seconds)
    for size, taken in table if rising else ():
        assert initialized(table).step_seconds(size) == pytest.approx(taken)
    if rising and num_tokens <= sizes[-1]:
        interpolated = float(np.interp(num_tokens, sizes, seconds))
        assert initialized(table).step_seconds(num_tokens) == pytest.approx(interpolated)
    assert initialized(table).step_seconds(num_tokens) >= min(seconds)


def test_beyond_the_largest_size_step_seconds_grow_as_between_the_last_two():
    assert initialized(CPU).step_seconds(160) == pytest.approx(8.4e-3 + 96 * (8.4e-3 - 5.6e-3) / 48)


@given(tables, st.floats(0, 300), st.floats(1, 300))
def test_more_tokens_never_save_time(table, num_tokens, base_tokens):
    cost_model = initialized(table)
    assert cost_model.added_seconds(num_tokens, base_tokens) >= 0
    assert cost_model.added_seconds(0, base_tokens) == 0


def test_added_seconds_are_the_difference_of_two_steps():
    assert initialized(CPU).added_seconds(24, 16) == pytest.approx(24 / 48 * (8.4e-3 - 5.6e-3))
    assert initialized([(size, 0.02) for size in (1, 8, 64)]).added_seconds(50, 3) == 0


def test_without_measurements_everything_takes_no_time():
    assert StepCostModel().step_seconds(7) == StepCostModel().added_seconds(3, 4) == 0


def test_a_single_size_is_used_for_all_others():
    cost_model = record_steps(StepCostModel(), 5, 0.01, 3)
    assert cost_model.step_seconds(1) == cost_model.step_seconds(90) == pytest.approx(0.01)


def test_new_measurements_replace_those_made_at_start_up():
    """The machine becomes half as fast, because others use it as well."""
    cost_model = initialized(CPU)
    for num_tokens, seconds in CPU * 100:
        cost_model.record(1, num_tokens, 1, 2 * seconds)
    for num_tokens, seconds in CPU:
        assert cost_model.step_seconds(num_tokens) == pytest.approx(2 * seconds, rel=0.02)


def test_similar_sizes_share_a_mean():
    """If the true times lie on a straight line, so do the means, whichever sizes occurred."""
    rng = random.Random(0)
    cost_model = initialized([(1, 0.005), (64, 0.005 + 63e-4)])
    for _ in range(2000):
        num_tokens = rng.randint(1, 64)
        cost_model.record(1, num_tokens, 1, 0.005 + (num_tokens - 1) * 1e-4)
    for num_tokens in (2, 7, 20, 33, 50):
        assert cost_model.step_seconds(num_tokens) == pytest.approx(0.005 + (num_tokens - 1) * 1e-4, rel=0.05)


def test_a_delayed_step_counts_little_however_long_it_took():
    delayed, blocked = initialized(CPU), initialized(CPU)
    delayed.record(1, 16, 1, 0.1)
    blocked.record(1, 16, 1, 3600.0)
    assert delayed.step_seconds(16) == blocked.step_seconds(16) < 1.2 * 5.6e-3


def test_the_mean_step_follows_the_latest_steps():
    cost_model = record_steps(StepCostModel(), 40, 0.01, 300, num_seqs=8, num_output_tokens=20)
    assert means_of(cost_model) == pytest.approx((8, 40, 20), rel=1e-3)
    record_steps(cost_model, 2, 0.01, 300, num_seqs=2, num_output_tokens=2)
    assert means_of(cost_model) == pytest.approx((2, 2, 2), rel=1e-3)
    mean = np.mean([1, 9])
    for _ in range(200):
        cost_model.record(1, 1, 1, 0.01)
        cost_model.record(1, 9, 1, 0.01)
    assert abs(cost_model.num_tokens - mean) < 0.5
